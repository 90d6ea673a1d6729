//! Against the real kernel, in namespaces of the tests' own.

use super::kernel::source_rules;
use super::*;
use crate::gateway_ns;
use crate::netlink::sysctl::{self, Key};
use crate::netlink::{AddressSpec, LinkKind, LinkSettings, LinkState, NewLink, RouteSpec, RuleAction, RuleSpec, TABLE_MAIN};
use crate::routing::devices::POD_GATEWAY_V4;
use crate::routing::whole;
use std::str::FromStr;

struct Site {
    directory: PathBuf,
    pods: Option<Pods>,
}

impl Site {
    fn new(name: &str) -> Option<Site> {
        let directory = std::env::temp_dir().join(format!("podgate-pods-{name}-{}", std::process::id()));
        let gateway = gateway_ns::prepare(&directory.join("run")).inspect_err(|error| eprintln!("skipped: {error}")).ok()?;
        let pods = Pods::open(gateway, &directory.join("run"), &directory.join("state"), 2).unwrap();
        Some(Site { directory, pods: Some(pods) })
    }

    fn pods(&mut self) -> &mut Pods {
        self.pods.as_mut().unwrap()
    }

    /// As after a restart of the daemon.
    fn reopen(&mut self) {
        self.pods = None;
        let gateway = GatewayNs::open(&self.directory.join("run")).unwrap();
        self.pods = Some(Pods::open(gateway, &self.directory.join("run"), &self.directory.join("state"), 2).unwrap());
    }

    /// Everything in the gateway's namespace that an attachment could leave behind.
    fn remains(&mut self) -> Vec<String> {
        let netlink = &self.pods().netlink;
        let mut found: Vec<String> = netlink.links().unwrap().into_iter().filter(|link| !link.loopback).map(|link| link.name).collect();
        for family in Family::BOTH {
            found.extend(netlink.rules(family).unwrap().into_iter().filter(|rule| rule.spec.pref == PREF_POD).map(|rule| rule.spec.to_string()));
            found.extend(netlink.routes(family, TABLE_MAIN).unwrap().into_iter().map(|route| route.spec.to_string()));
        }
        found.extend(netlink.neighbours().unwrap().into_iter().map(|neighbour| neighbour.address.to_string()));
        found
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.pods = None;
        let _ = gateway_ns::remove(&self.directory.join("run"));
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

fn spec(number: u8) -> AttachSpec {
    AttachSpec {
        id: format!("sandbox-{number}/eth0"),
        name: format!("default/pod-{number}"),
        network: None,
        attempt: 0,
        mode: AttachMode::Veth,
        netns_path: String::new(),
        ifname: "eth0".into(),
        addresses: vec![IpAddr::from([10, 244, 1, number]), format!("fd00:77:1::{number}").parse().unwrap()],
        mac: None,
        mtu: 1450,
        gso_max_size: 62_000,
        default_route: DefaultRoute::IfFree,
        targets: Vec::new(),
        options: PodOptions::default(),
    }
}

#[test]
fn a_pod_gets_its_addresses_routes_and_neighbours_and_leaves_nothing() {
    let Some(mut site) = Site::new("whole") else { return };
    let before = site.remains();
    let pod_ns = Netns::anonymous().unwrap();
    let pod = site.pods().attach(&pod_ns, &spec(2)).unwrap();

    let inside = Netlink::open(&pod_ns).unwrap();
    let eth0 = inside.expect_link("eth0").unwrap();
    assert_eq!((eth0.mtu, eth0.gso_max_size, eth0.mac, eth0.carrier), (1450, Some(62_000), Some(pod.pod_mac), LinkState::Up));
    assert_eq!(inside.expect_link("lo").unwrap().state, LinkState::Up);
    let addresses: Vec<String> =
        inside.addresses().unwrap().into_iter().filter(|found| found.index == eth0.index).map(|found| found.address.to_string()).collect();
    assert_eq!(addresses, ["10.244.1.2/32", "fd00:77:1::2/128"], "and no link-local one");
    assert!(inside.addresses().unwrap().iter().all(|found| !found.tentative));
    for (destination, gateway, source) in [("203.0.113.9", "169.254.1.1", "10.244.1.2"), ("2001:db8::9", "fe80::1", "fd00:77:1::2")] {
        let route = inside.route_to(destination.parse().unwrap()).unwrap().spec;
        assert_eq!((route.gateway, route.prefsrc), (Some(gateway.parse().unwrap()), Some(source.parse().unwrap())));
        let neighbour = inside.neighbours().unwrap().into_iter().find(|found| found.address == gateway.parse::<IpAddr>().unwrap()).unwrap();
        assert_eq!((neighbour.mac, neighbour.permanent), (Some(pod.gateway_mac), true));
    }
    let gateway = &site.pods().netlink;
    for address in &pod.addresses {
        let neighbour = gateway.neighbours().unwrap().into_iter().find(|found| found.address == *address).unwrap();
        assert_eq!((neighbour.mac, neighbour.permanent, neighbour.index), (Some(pod.pod_mac), true, pod.veth_index));
        let rules = gateway.rules(Family::of(*address)).unwrap();
        assert!(pod.route().rules().filter(|rule| rule.family == Family::of(*address)).all(|wanted| rules.iter().any(|rule| rule.is(&wanted))));
    }
    for (name, value) in [("forwarding", "0"), ("accept_ra", "0")] {
        assert_eq!(sysctl::read(site.pods().gateway.netns(), &Key::v6(&pod.veth, name)).unwrap(), value);
    }
    let errors_come_from = format!("{}/128", crate::routing::devices::ERROR_SOURCE_V6);
    let known = ["169.254.1.1/32", &errors_come_from, "127.0.0.1/8", "::1/128"];
    assert!(gateway_addresses(&mut site).iter().all(|address| known.contains(&address.as_str())));

    assert!(matches!(site.pods().detach(&pod.id, None).unwrap(), Detached::Gone(gone) if *gone == pod));
    assert_eq!(site.pods().detach(&pod.id, None).unwrap(), Detached::Absent);
    assert_eq!(site.remains(), before);
    assert!(inside.link("eth0").unwrap().is_none());
}

fn gateway_addresses(site: &mut Site) -> Vec<String> {
    site.pods().netlink.addresses().unwrap().into_iter().map(|found| found.address.to_string()).collect()
}

#[test]
fn a_veth_name_is_never_used_twice() {
    let Some(mut site) = Site::new("names") else { return };
    let mut names = Vec::new();
    for number in 1..=5 {
        let pod_ns = Netns::anonymous().unwrap();
        let pod = site.pods().attach(&pod_ns, &spec(number)).unwrap();
        site.pods().detach(&pod.id, None).unwrap();
        assert!(!names.contains(&pod.veth));
        names.push(pod.veth);
        site.reopen();
    }
}

#[test]
fn a_failure_leaves_nothing_on_either_side() {
    let Some(mut site) = Site::new("failure") else { return };
    let before = site.remains();
    let pod_ns = Netns::anonymous().unwrap();
    let inside = Netlink::open(&pod_ns).unwrap();
    // The pod's default route is taken, which is found out last.
    let kind = LinkKind::Veth { peer: "other-peer", peer_netns: None, peer_settings: LinkSettings::new().up() };
    inside.create_link(&NewLink { name: "other", kind, settings: LinkSettings::new().up() }).unwrap();
    inside.add_route(&RouteSpec::unicast(TABLE_MAIN, "0.0.0.0/0".parse().unwrap(), "other")).unwrap();
    let error = site.pods().attach(&pod_ns, &AttachSpec { default_route: DefaultRoute::Yes, ..spec(3) }).unwrap_err();
    assert!(matches!(error, PodError::DefaultRouteExists { family: Family::V4, .. }), "{error}");
    assert_eq!(site.remains(), before);
    assert!(inside.link("eth0").unwrap().is_none() && site.pods().list().next().is_none());

    let error = site.pods().attach(&pod_ns, &AttachSpec { ifname: "other".into(), ..spec(3) }).unwrap_err();
    assert!(matches!(error, PodError::InterfaceExists { .. }), "{error}");
    assert_eq!(site.remains(), before);
    assert!(inside.link("other").unwrap().is_some(), "what was there is not ours to undo");
}

#[test]
fn an_address_or_an_attachment_that_exists_is_refused() {
    let Some(mut site) = Site::new("refused") else { return };
    let (first, second) = (Netns::anonymous().unwrap(), Netns::anonymous().unwrap());
    site.pods().attach(&first, &spec(4)).unwrap();
    assert!(matches!(site.pods().attach(&second, &spec(4)), Err(PodError::AttachedAlready { .. })));
    let same_address = AttachSpec { id: "another".into(), ..spec(4) };
    assert!(matches!(site.pods().attach(&second, &same_address), Err(PodError::AddressTaken { .. })));
}

#[test]
fn an_interface_without_addresses_waits_for_them_and_lets_nothing_pass_meanwhile() {
    let Some(mut site) = Site::new("later") else { return };
    let before = site.remains();
    let pod_ns = Netns::anonymous().unwrap();
    let later = AttachSpec { addresses: Vec::new(), ..spec(5) };
    let waiting = site.pods().attach(&pod_ns, &later).unwrap();
    let inside = Netlink::open(&pod_ns).unwrap();
    assert_eq!(inside.expect_link("eth0").unwrap().carrier, LinkState::Up, "a DHCP client can speak through it");
    assert!(site.remains().iter().all(|what| !what.contains("pref 20")), "{:?}", site.remains());
    let given = spec(5).addresses;
    assert!(matches!(site.pods().assign(&pod_ns, "nobody", &given, Vec::new()), Err(PodError::NotAttached { .. })));
    let pod = site.pods().assign(&pod_ns, &waiting.id, &given, vec![IpNetwork::from_str("198.51.100.0/24").unwrap().into()]).unwrap();
    assert_eq!(pod.addresses, given);
    assert_eq!(pod.routes.iter().map(|route| &*route.dst).collect::<Vec<_>>(), ["0.0.0.0/0", "198.51.100.0/24", "::/0"]);
    site.pods().check(&pod.id, &pod_ns, &given).unwrap();
    assert!(matches!(site.pods().assign(&pod_ns, &pod.id, &given, Vec::new()), Err(PodError::AssignedAlready { .. })));
    site.pods().detach(&pod.id, None).unwrap();

    // A daemon that ends before the addresses come leaves nothing to its successor.
    site.pods().attach(&pod_ns, &later).unwrap();
    site.reopen();
    assert!(site.pods().list().next().is_none());
    assert_eq!(site.remains(), before);
    assert!(inside.link("eth0").unwrap().is_none());
}

#[test]
fn a_check_names_what_is_missing() {
    let Some(mut site) = Site::new("check") else { return };
    let pod_ns = Netns::anonymous().unwrap();
    let pod = site.pods().attach(&pod_ns, &spec(6)).unwrap();
    let inside = Netlink::open(&pod_ns).unwrap();
    let check =
        |site: &mut Site, netns: &Netns, addresses: &[IpAddr]| site.pods().check(&pod.id, netns, addresses).map_err(|error| error.to_string());
    assert_eq!(check(&mut site, &pod_ns, &pod.addresses), Ok(()));
    assert!(check(&mut site, &Netns::anonymous().unwrap(), &[]).unwrap_err().contains("namespace is not the one"));
    assert!(check(&mut site, &pod_ns, &["10.244.1.99".parse().unwrap()]).unwrap_err().contains("does not have 10.244.1.99"));
    let default = inside.routes(Family::V4, TABLE_MAIN).unwrap().remove(0).spec;
    inside.delete_route(&default).unwrap();
    assert!(check(&mut site, &pod_ns, &pod.addresses).unwrap_err().contains("the route to 0.0.0.0/0 by eth0 is gone"));
    inside.add_route(&default).unwrap();
    inside.set_link("eth0", &LinkSettings::new().down()).unwrap();
    assert!(check(&mut site, &pod_ns, &pod.addresses).unwrap_err().contains("eth0 is down"));
    inside.delete_link("eth0").unwrap();
    assert!(check(&mut site, &pod_ns, &pod.addresses).unwrap_err().contains("is gone"));
}

#[test]
fn a_restarted_daemon_knows_its_pods_and_undoes_what_was_half_done() {
    let Some(mut site) = Site::new("restart") else { return };
    let namespaces: Vec<Netns> = (0..3).map(|_| Netns::anonymous().unwrap()).collect();
    let kept = site.pods().attach(&namespaces[0], &spec(5)).unwrap();
    let half = site.pods().attach(&namespaces[1], &spec(6)).unwrap();
    site.pods().replace(Stage::Attaching, half.clone()).unwrap();
    // A veth and a rule that nobody knows.
    let kind = LinkKind::veth_into("eth0", &namespaces[2], LinkSettings::new());
    site.pods().netlink.create_link(&NewLink { name: "pg999", kind, settings: LinkSettings::new() }).unwrap();
    let stray = PodRoute { veth: "pg998".into(), addresses: spec(9).addresses };
    stray.rules().for_each(|rule| site.pods().netlink.add_rule(&rule).unwrap());

    site.reopen();
    assert_eq!(site.pods().list().collect::<Vec<_>>(), [&kept]);
    assert_eq!(site.pods().of_netns(&namespaces[0]).collect::<Vec<_>>(), [&kept]);
    assert!(Netlink::open(&namespaces[1]).unwrap().link("eth0").unwrap().is_none());
    assert!(site.remains().iter().all(|what| !what.contains("pg99") && !what.contains(&half.veth)), "{:?}", site.remains());
    assert!(site.pods().lost().unwrap().is_empty());
}

#[test]
fn many_pods_leave_together_and_a_name_is_free_when_they_have_gone() {
    let Some(mut site) = Site::new("together") else { return };
    let before = site.remains();
    let namespaces: Vec<Netns> = (0..4).map(|_| Netns::anonymous().unwrap()).collect();
    let pods: Vec<Attached> = (0..4).map(|n| site.pods().attach(&namespaces[n], &spec(20 + n as u8)).unwrap()).collect();
    for pod in &pods[..3] {
        assert!(matches!(site.pods().condemn(&pod.id, None).unwrap(), Detached::Gone(_)));
        assert!(site.pods().is_leaving(&pod.id) && site.pods().find(&pod.id).is_none());
    }
    assert_eq!(site.pods().condemn(&pods[0].id, None).unwrap(), Detached::Absent);
    // Until its veth has gone a pod's address is its own.
    let same_address = AttachSpec { id: "another".into(), ..spec(20) };
    assert!(matches!(site.pods().attach(&namespaces[3], &AttachSpec { ifname: "net1".into(), ..same_address }), Err(PodError::AddressTaken { .. })));
    assert!(site.pods().sweep_leaving().is_empty());
    assert!(!site.pods().is_leaving(&pods[0].id));
    for namespace in &namespaces[..3] {
        assert!(Netlink::open(namespace).unwrap().link("eth0").unwrap().is_none());
    }
    assert_eq!(site.pods().list().collect::<Vec<_>>(), [&pods[3]]);
    site.reopen();
    assert_eq!(site.pods().list().collect::<Vec<_>>(), [&pods[3]]);
    site.pods().detach(&pods[3].id, None).unwrap();
    assert_eq!(site.remains(), before);
}

#[test]
fn detaching_succeeds_with_the_pods_namespace_gone() {
    let Some(mut site) = Site::new("gone") else { return };
    let before = site.remains();
    let pod_ns = Netns::anonymous().unwrap();
    let pod = site.pods().attach(&pod_ns, &spec(7)).unwrap();
    drop(pod_ns); // the kernel takes the veth away in its own time
    assert!(matches!(site.pods().detach(&pod.id, None).unwrap(), Detached::Gone(_)));
    assert_eq!(site.remains(), before);
}

#[test]
fn several_interfaces_of_one_pod_have_their_own_addresses_and_routes() {
    let Some(mut site) = Site::new("several") else { return };
    let pod_ns = Netns::anonymous().unwrap();
    site.pods().attach(&pod_ns, &spec(8)).unwrap();
    let target = IpNetwork::from_str("198.51.100.0/24").unwrap();
    let second = AttachSpec { id: "sandbox-8/net1".into(), ifname: "net1".into(), targets: vec![target.into()], ..spec(9) };
    let pod = site.pods().attach(&pod_ns, &second).unwrap();
    let inside = Netlink::open(&pod_ns).unwrap();
    assert_eq!(inside.route_to("198.51.100.7".parse().unwrap()).unwrap().spec.device.as_deref(), Some("net1"));
    assert_eq!(inside.route_to("203.0.113.7".parse().unwrap()).unwrap().spec.device.as_deref(), Some("eth0"));
    assert_eq!(site.pods().of_netns(&pod_ns).count(), 2);
    // What is sent from the second's address leaves by the second, or it would be taken for a spoof.
    let sources = |inside: &Netlink| source_rules(inside, pod.addresses[0]).unwrap();
    let table = match sources(&inside)[..] {
        [RuleSpec { action: RuleAction::Lookup(table), .. }] => table,
        ref other => panic!("{other:?}"),
    };
    let routes = inside.routes(Family::V4, table).unwrap();
    assert_eq!(routes.iter().map(|route| (route.spec.destination.prefix(), route.spec.device.as_deref())).collect::<Vec<_>>(), [(0, Some("net1"))]);
    site.pods().check(&pod.id, &pod_ns, &pod.addresses).unwrap();
    site.pods().detach(&pod.id, Some(&pod_ns)).unwrap();
    assert!(sources(&inside).is_empty());
}

#[test]
fn a_pods_requests_for_the_gateways_address_make_no_neighbours() {
    let Some(mut site) = Site::new("arp") else { return };
    let pod_ns = Netns::anonymous().unwrap();
    let pod = site.pods().attach(&pod_ns, &spec(10)).unwrap();
    // With its entry for the gateway gone the pod asks on the wire, from addresses that it does not own.
    let inside = Netlink::open(&pod_ns).unwrap();
    inside.delete_neighbour("eth0", POD_GATEWAY_V4.into()).unwrap();
    for last in 100..120 {
        inside.add_address(&AddressSpec::new("eth0", whole(IpAddr::from([10, 244, 1, last])))).unwrap();
        let asked = pod_ns.run(|| {
            let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::new(10, 244, 1, last), 0))?;
            socket.send_to(b"x", (POD_GATEWAY_V4, 9))
        });
        asked.unwrap().unwrap();
    }
    let found = site.pods().netlink.neighbours().unwrap();
    assert!(found.iter().all(|neighbour| neighbour.permanent), "{found:#?}");
    assert_eq!(found.len(), pod.addresses.len());
}

fn tun_spec(number: u8, path: &Path) -> AttachSpec {
    AttachSpec { mode: AttachMode::Tun, netns_path: path.display().to_string(), ..spec(number) }
}

#[test]
fn a_pod_in_mode_tun_has_addresses_and_routes_and_the_gateways_namespace_has_nothing_of_it() {
    let Some(mut site) = Site::new("tun") else { return };
    let before = site.remains();
    let pod_ns = Netns::anonymous().unwrap();
    let pod = site.pods().attach(&pod_ns, &tun_spec(2, Path::new("/nowhere"))).unwrap();
    let opened = site.pods().take_opened();
    assert_eq!(opened.iter().map(|(id, _)| Some(*id)).collect::<Vec<_>>(), [pod.tun()]);
    assert_eq!((pod.mode, pod.netns_seen, pod.routed()), (AttachMode::Tun, false, None));
    assert_eq!(site.remains(), before);

    let inside = Netlink::open(&pod_ns).unwrap();
    let eth0 = inside.expect_link("eth0").unwrap();
    assert_eq!((eth0.kind.as_str(), eth0.mtu, eth0.gso_max_size, eth0.carrier), ("tun", 1450, Some(62_000), LinkState::Up));
    let addresses: Vec<String> =
        inside.addresses().unwrap().into_iter().filter(|found| found.index == eth0.index).map(|found| found.address.to_string()).collect();
    assert_eq!(addresses, ["10.244.1.2/32", "fd00:77:1::2/128"], "and no link-local one");
    assert!(inside.addresses().unwrap().iter().all(|found| !found.tentative));
    for (destination, gateway, source) in [("203.0.113.9", "169.254.1.1", "10.244.1.2"), ("2001:db8::9", "fe80::1", "fd00:77:1::2")] {
        let route = inside.route_to(destination.parse().unwrap()).unwrap().spec;
        assert_eq!((route.gateway, route.prefsrc), (Some(gateway.parse().unwrap()), Some(source.parse().unwrap())));
    }
    site.pods().check(&pod.id, &pod_ns, &pod.addresses).unwrap();
    // Nobody reads it any more.
    drop(opened);
    assert!(site.pods().check(&pod.id, &pod_ns, &[]).unwrap_err().to_string().contains("nobody reads eth0"));

    assert!(matches!(site.pods().detach(&pod.id, None).unwrap(), Detached::Gone(gone) if *gone == pod), "the namespace is remembered");
    assert_eq!(inside.link("eth0").unwrap().map(|link| link.name), None);
    assert_eq!(site.pods().detach(&pod.id, None).unwrap(), Detached::Absent);
    assert_eq!(site.remains(), before);
}

#[test]
fn a_successor_opens_tuns_again_by_their_path_takes_them_over_and_names_those_it_cannot_find() {
    let Some(mut site) = Site::new("tun-again") else { return };
    let path = site.directory.join("pod-ns");
    let pod_ns = Netns::anonymous().unwrap();
    if pod_ns.bind(&path).inspect_err(|error| eprintln!("skipped: {error}")).is_err() {
        return;
    }
    let hidden_ns = Netns::anonymous().unwrap();
    let pod = site.pods().attach(&pod_ns, &tun_spec(2, &path)).unwrap();
    let hidden = site.pods().attach(&hidden_ns, &AttachSpec { ifname: "net1".into(), ..tun_spec(3, Path::new("/nowhere/ns")) }).unwrap();
    assert!(pod.netns_seen);
    let kept = site.pods().take_opened().into_iter().find(|(id, _)| Some(*id) == hidden.tun()).map(|(_, tun)| handles_on(&tun)).unwrap();
    site.reopen();
    let ids = |opened: Vec<(TunId, PodTun)>| opened.iter().map(|(id, _)| Some(*id)).collect::<Vec<_>>();
    site.pods().open_tuns(&[]);
    let closed: Vec<(String, String)> = site.pods().closed().map(|(pod, error)| (pod.id.clone(), error.to_string())).collect();
    assert!(matches!(&closed[..], [(id, why)] if *id == hidden.id && why.contains("/nowhere/ns")), "{closed:?}");
    let opened = site.pods().take_opened();
    assert_eq!(opened.iter().map(|(id, _)| Some(*id)).collect::<Vec<_>>(), [pod.tun()]);
    assert_eq!((opened[0].1.name(), opened[0].1.netns().id()), ("eth0", pod_ns.id()));
    assert!(site.pods().lost().unwrap().is_empty(), "what is out of sight is not gone");
    // Whoever kept the descriptors gives them back.
    site.pods().adopt(kept).unwrap();
    site.pods().open_tuns(&[pod.tun().unwrap()]);
    assert_eq!(site.pods().closed().count(), 0);
    assert_eq!(ids(site.pods().take_opened()), [hidden.tun()]);
    // A stranger's is closed.
    let strange_ns = Netns::anonymous().unwrap();
    site.pods().adopt(handles_on(&PodTun::make("eth0", 2, &strange_ns).unwrap())).unwrap();
    assert_eq!(ids(site.pods().take_opened()), []);

    drop(opened);
    Netns::unbind(&path).unwrap();
    let lost: Vec<String> = site.pods().lost().unwrap().into_iter().map(|pod| pod.id.clone()).collect();
    assert_eq!(lost, std::slice::from_ref(&pod.id), "its path is gone, where there was one");
    PodTun::remove("net1", &hidden_ns).unwrap();
    assert_eq!(site.pods().lost().unwrap().len(), 2, "an interface that was deleted in its pod");
    for id in [pod.id, hidden.id] {
        assert!(matches!(site.pods().detach(&id, None).unwrap(), Detached::Gone(_)));
    }
    assert_eq!(site.pods().list().count(), 0);
}

/// Handles on a TUN's queues, as whoever keeps them for a successor has.
fn handles_on(tun: &PodTun) -> Vec<std::os::fd::OwnedFd> {
    tun.descriptors().map(|fd| fd.try_clone_to_owned().unwrap()).collect()
}

#[test]
fn a_half_made_tun_is_undone_by_the_next_start_and_a_failed_one_at_once() {
    let Some(mut site) = Site::new("tun-half") else { return };
    let path = site.directory.join("pod-ns");
    let pod_ns = Netns::anonymous().unwrap();
    if pod_ns.bind(&path).inspect_err(|error| eprintln!("skipped: {error}")).is_err() {
        return;
    }
    let pod = site.pods().attach(&pod_ns, &tun_spec(2, &path)).unwrap();
    site.pods().record(Stage::Attaching, &pod).unwrap();
    site.reopen();
    assert_eq!(site.pods().list().count(), 0);
    let inside = Netlink::open(&pod_ns).unwrap();
    assert!(inside.link("eth0").unwrap().is_none());

    // The default route is taken, which only shows when the TUN is there already.
    let first = site.pods().attach(&pod_ns, &AttachSpec { ifname: "eth1".into(), ..tun_spec(3, &path) }).unwrap();
    let greedy = AttachSpec { default_route: DefaultRoute::Yes, ..tun_spec(4, &path) };
    assert!(matches!(site.pods().attach(&pod_ns, &greedy), Err(PodError::DefaultRouteExists { .. })));
    assert!(inside.link("eth0").unwrap().is_none());
    assert_eq!(site.pods().list().map(|pod| pod.id.clone()).collect::<Vec<_>>(), std::slice::from_ref(&first.id));
    // A second interface has a table of its own, which goes with it.
    let second = site.pods().attach(&pod_ns, &tun_spec(5, &path)).unwrap();
    assert_eq!(source_rules(&inside, second.addresses[0]).unwrap().len(), 1);
    site.pods().detach(&second.id, Some(&pod_ns)).unwrap();
    assert_eq!(source_rules(&inside, second.addresses[0]).unwrap().len(), 0);
    site.pods().detach(&first.id, None).unwrap();
    Netns::unbind(&path).unwrap();
}
