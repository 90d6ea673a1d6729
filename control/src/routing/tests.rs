//! The pure part by itself; the rest against the real kernel, in namespaces of the tests' own.

use super::*;
use crate::gateway_ns;
use crate::host_state::{HostState, Traces, cleanup};
use crate::netlink::{
    AddrGenMode, AddressSpec, LinkKind, LinkSettings, LinkState, MissingIsFine, Netlink, NewLink, ORIGIN_BOOT, ORIGIN_STATIC, Rule, sysctl,
};
use podgate_runtime::netns::Netns;
use podgate_runtime::tun::Tun;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;
use tokio::sync::{mpsc, watch};

/// Far more than it takes: nothing repairs by itself but when it is told.
const PATIENCE: Duration = Duration::from_secs(20);

fn plan() -> RoutingPlan {
    let ips = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<IpAddr>>();
    let networks = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<IpNetwork>>();
    RoutingPlan {
        pods_device: "pods".into(),
        host_device: "podgate".into(),
        node_addresses: ips(&["192.0.2.1", "2001:db8::1"]),
        node_port_addresses: ips(&["192.0.2.1", "2001:db8::1"]),
        sources: ips(&["192.0.2.1", "2001:db8::1"]),
        pod_cidrs: networks(&["10.244.0.0/16", "fd00:77::/32"]),
        service_cidrs: networks(&["10.96.0.0/16", "fd00:96::/112"]),
        vips: ips(&["198.51.100.7"]),
        node_ports: 30_000..=32_767,
        health_check_ports: BTreeSet::new(),
        masquerade: vec![61_000..=65_535],
        host_ports: vec![HostPort { address: "192.0.2.1".parse().unwrap(), protocol: 6, port: 80 }],
        pod_mtu: 1450,
        host_mtu: 1500,
        pods: Vec::new(),
    }
}

fn shown(rules: &[RuleSpec], family: Family) -> Vec<String> {
    let prefix = format!("{family} rule ");
    rules.iter().filter(|rule| rule.family == family).map(|rule| rule.to_string().replace(&prefix, "")).collect()
}

#[test]
fn the_nodes_rules_are_those_of_the_design() {
    let desired = desired(&plan(), Side::Node);
    assert_eq!(
        shown(&desired.rules, Family::V4),
        [
            "pref 0 iif podgate lookup local",
            "pref 0 to 192.0.2.1/32 ipproto tcp goto 10",
            "pref 0 to 192.0.2.1/32 ipproto udp goto 10",
            "pref 0 lookup local",
            "pref 10 to 192.0.2.1/32 ipproto tcp dport 30000-32767 lookup 232",
            "pref 11 to 192.0.2.1/32 ipproto tcp dport 61000-65534 lookup 232",
            "pref 10 to 192.0.2.1/32 ipproto udp dport 30000-32767 lookup 232",
            "pref 11 to 192.0.2.1/32 ipproto udp dport 61000-65534 lookup 232",
            "pref 12 to 192.0.2.1/32 ipproto tcp dport 80 lookup 232",
            "pref 100 lookup local",
            "pref 101 lookup 233",
        ]
    );
    let routes: Vec<String> = desired.routes.iter().filter(|route| route.family() == Family::V6).map(ToString::to_string).collect();
    assert_eq!(
        routes,
        [
            "IPv6 route default dev podgate metric 1024 mtu 1500 table 232",
            "IPv6 route unreachable default metric 9999 table 232",
            "IPv6 route fd00:77::/32 dev podgate src 2001:db8::1 metric 1024 mtu 1450 table 233",
            "IPv6 route unreachable fd00:77::/32 metric 9999 table 233",
            "IPv6 route fd00:96::/112 dev podgate src 2001:db8::1 metric 1024 mtu 1450 table 233",
            "IPv6 route unreachable fd00:96::/112 metric 9999 table 233",
        ]
    );
}

#[test]
fn health_check_ports_are_left_to_the_node() {
    let plan = RoutingPlan {
        health_check_ports: BTreeSet::from([30_000, 31_000, 31_001, 40_000]),
        masquerade: Vec::new(),
        host_ports: Vec::new(),
        ..plan()
    };
    let rules: Vec<String> = shown(&desired(&plan, Side::Node).rules, Family::V6).into_iter().filter(|rule| rule.contains("dport")).collect();
    assert_eq!(
        rules,
        [
            "pref 10 to 2001:db8::1/128 ipproto tcp dport 30001-30999 lookup 232",
            "pref 10 to 2001:db8::1/128 ipproto tcp dport 31002-32767 lookup 232",
            "pref 10 to 2001:db8::1/128 ipproto udp dport 30000-32767 lookup 232",
        ]
    );
}

#[test]
fn the_gateways_rules_are_those_of_the_design() {
    let pod = PodRoute { veth: "pg1".into(), addresses: vec!["10.244.1.2".parse().unwrap(), "fd00:77:1::2".parse().unwrap()] };
    let desired = desired(&RoutingPlan { pods: vec![pod], ..plan() }, Side::Gateway);
    assert_eq!(
        shown(&desired.rules, Family::V6),
        [
            "pref 0 lookup local",
            "pref 4 iif lo lookup main",
            "pref 5 iif pods lookup main",
            "pref 20 from fd00:77:1::2/128 iif pg1 lookup 234",
            "pref 30 blackhole",
        ]
    );
}

#[test]
fn a_family_that_the_cluster_does_not_use_is_left_alone_on_the_node() {
    let mut plan = plan();
    plan.pod_cidrs.retain(IpNetwork::is_ipv4);
    plan.service_cidrs.retain(IpNetwork::is_ipv4);
    let desired = desired(&plan, Side::Node);
    assert!(shown(&desired.rules, Family::V6).is_empty() && desired.routes.iter().all(|route| route.family() == Family::V4));
}

#[test]
fn without_ports_of_ours_nothing_takes_the_detour_around_local() {
    let bare = RoutingPlan { node_port_addresses: Vec::new(), masquerade: Vec::new(), host_ports: Vec::new(), ..plan() };
    assert!(desired(&bare, Side::Node).rules.iter().all(|rule| !matches!(rule.action, RuleAction::Goto(_))));
    let host_ports_only = RoutingPlan { host_ports: plan().host_ports, ..bare };
    let rules = shown(&desired(&host_ports_only, Side::Node).rules, Family::V4);
    assert!(rules.contains(&"pref 0 to 192.0.2.1/32 ipproto tcp goto 12".to_owned()), "{rules:?}");
}

/// A node and a gateway's namespace with their TUNs, in a directory of the test's own.
struct Site {
    node: Netns,
    node_link: Netlink,
    gateway: gateway_ns::GatewayNs,
    gateway_link: Netlink,
    host_tun: Option<Tun>,
    pods_tun: Option<Tun>,
    directory: PathBuf,
}

impl Site {
    fn new(name: &str) -> Option<Site> {
        let directory = std::env::temp_dir().join(format!("podgate-routing-{name}-{}", std::process::id()));
        let node = Netns::anonymous().inspect_err(|error| eprintln!("skipped: {error}")).ok()?;
        let gateway = gateway_ns::prepare(&directory.join("run")).inspect_err(|error| eprintln!("skipped: {error}")).ok()?;
        let (node_link, gateway_link) = (Netlink::open(&node).unwrap(), Netlink::open(gateway.netns()).unwrap());
        let settings = LinkSettings::new().up();
        node_link.set_link("lo", &settings).unwrap();
        let kind = LinkKind::Veth { peer: "u-peer", peer_netns: None, peer_settings: settings.clone().addr_gen_mode(AddrGenMode::None) };
        node_link.create_link(&NewLink { name: "u", kind, settings }).unwrap();
        for address in ["192.0.2.1/24", "2001:db8::1/64"] {
            node_link.add_address(&AddressSpec::new("u", address.parse().unwrap())).unwrap();
        }
        let site = Site { node, node_link, gateway, gateway_link, host_tun: None, pods_tun: None, directory };
        Some(site.open_tuns())
    }

    fn open_tuns(mut self) -> Site {
        self.host_tun = Some(Tun::open("podgate", 1, &self.node).unwrap());
        self.pods_tun = Some(Tun::open("pods", 1, self.gateway.netns()).unwrap());
        self
    }

    fn reconciler(&self) -> Reconciler {
        Reconciler::new(&self.node, self.gateway.netns(), &plan(), Vec::new()).unwrap()
    }

    fn link(&self, side: Side) -> &Netlink {
        if side == Side::Gateway { &self.gateway_link } else { &self.node_link }
    }

    /// Whether everything is there, in order, and `local` is not at 1.
    fn is_as(&self, plan: &RoutingPlan, side: Side) -> bool {
        let wanted = desired(plan, side);
        let netlink = self.link(side);
        Family::BOTH.iter().all(|family| {
            let rules: Vec<Rule> = netlink.rules(*family).unwrap();
            let first: Vec<&RuleSpec> = wanted.rules.iter().filter(|rule| rule.family == *family && rule.pref == 0).collect();
            let later = wanted.rules.iter().filter(|rule| rule.family == *family && rule.pref != 0);
            rules.iter().filter(|rule| rule.spec.pref == 0).map(|rule| &rule.spec).eq(first)
                && later.into_iter().all(|wanted| rules.iter().any(|rule| rule.is(wanted)))
                && rules.iter().all(|rule| rule.spec.pref != PREF_MEANWHILE)
        }) && wanted.routes.iter().all(|route| netlink.routes(route.family(), route.table).unwrap().iter().any(|found| found.is(route)))
    }

    /// Everything that `cleanup` must leave as it found it.
    fn snapshot(&self) -> String {
        let mut text = String::new();
        for family in Family::BOTH {
            let tables = [HOST_TABLE, CLUSTER_TABLE, crate::netlink::TABLE_MAIN, crate::netlink::TABLE_LOCAL];
            text += &format!("{:#?}", self.node_link.rules(family).unwrap());
            for table in tables {
                text += &format!("{:#?}", self.node_link.routes(family, table).unwrap());
            }
        }
        let names: Vec<String> = self.node_link.links().unwrap().into_iter().map(|link| link.name).collect();
        text += &format!("{names:#?}");
        let sysctls = self.node.run(|| {
            let mut found = Vec::new();
            for root in ["/proc/sys/net/ipv4", "/proc/sys/net/ipv6"] {
                read_tree(root.into(), &mut found);
            }
            found.sort();
            found
        });
        text + &format!("{:#?}", sysctls.unwrap())
    }
}

fn read_tree(path: PathBuf, found: &mut Vec<(PathBuf, String)>) {
    for entry in std::fs::read_dir(path).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            read_tree(path, found);
        } else if let Ok(text) = std::fs::read_to_string(&path) {
            // Those that count or that are random say nothing.
            if !["stable_secret", "tcp_fastopen_key", "ip_local_port_range"].iter().any(|name| path.ends_with(name)) {
                found.push((path, text));
            }
        }
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        let _ = gateway_ns::remove(&self.directory.join("run"));
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

const SIDES: [Side; 2] = [Side::Gateway, Side::Node];

#[test]
fn applying_twice_changes_nothing_the_second_time() {
    let Some(site) = Site::new("twice") else { return };
    let mut reconciler = site.reconciler();
    for side in SIDES {
        let first = reconciler.apply(side, &plan()).unwrap().changes;
        assert!(first.failed.is_empty() && !first.added.is_empty(), "{side}: {first:#?}");
        assert!(site.is_as(&plan(), side), "{side}: {:#?}", site.link(side).rules(Family::V4));
        let second = reconciler.apply(side, &plan()).unwrap().changes;
        assert!(second.is_empty(), "{side}: {second:#?}");
    }
    let prefs: Vec<u32> = site.gateway_link.rules(Family::V4).unwrap().iter().map(|rule| rule.spec.pref).collect();
    assert_eq!(prefs, [0, 4, 5, 30], "the kernel's permissive rules are gone");
    let host = site.node_link.expect_link("podgate").unwrap();
    assert_eq!((host.mtu, host.txqueuelen, host.state, host.addr_gen_mode), (DEVICE_MTU, TXQUEUELEN_MAX, LinkState::Up, Some(AddrGenMode::None)));
    assert_eq!(sysctl::read(&site.node, &sysctl::Key::v4("podgate", "rp_filter")).unwrap(), "2");
}

#[test]
fn every_rule_and_route_that_is_taken_away_comes_back() {
    let Some(site) = Site::new("each") else { return };
    let mut reconciler = site.reconciler();
    for side in SIDES {
        reconciler.apply(side, &plan()).unwrap();
        let netlink = site.link(side);
        let wanted = desired(&plan(), side);
        for rule in &wanted.rules {
            netlink.delete_rule(rule).unwrap();
            let changes = reconciler.apply(side, &plan()).unwrap().changes;
            assert!(changes.failed.is_empty() && site.is_as(&plan(), side), "{rule}: {changes:#?}");
        }
        for route in &wanted.routes {
            netlink.delete_route(route).unwrap();
            let changes = reconciler.apply(side, &plan()).unwrap().changes;
            assert_eq!(changes.added, [route.to_string()], "{changes:#?}");
            assert!(site.is_as(&plan(), side));
        }
        assert!(reconciler.apply(side, &plan()).unwrap().changes.is_empty());
    }
}

#[test]
fn what_is_wrong_is_put_right_and_what_is_others_stays() {
    let Some(site) = Site::new("wrong") else { return };
    let mut reconciler = site.reconciler();
    let theirs = [
        RuleSpec::new(Family::V4, 10, RuleAction::Lookup(77)).origin(ORIGIN_STATIC),
        RuleSpec::new(Family::V4, 50, RuleAction::Lookup(HOST_TABLE)).origin(ORIGIN_BOOT),
        RuleSpec::new(Family::V4, 0, RuleAction::Lookup(78)).iif("u").origin(ORIGIN_BOOT),
    ];
    theirs.iter().for_each(|rule| site.node_link.add_rule(rule).unwrap());
    reconciler.apply(Side::Node, &plan()).unwrap();
    let old =
        RoutingPlan { node_addresses: vec!["192.0.2.9".parse().unwrap()], pod_mtu: 1300, vips: vec!["198.51.100.8".parse().unwrap()], ..plan() };
    let changes = reconciler.apply(Side::Node, &old).unwrap().changes;
    assert!(changes.failed.is_empty(), "{changes:#?}");
    let changes = reconciler.apply(Side::Node, &plan()).unwrap().changes;
    assert!(changes.failed.is_empty(), "{changes:#?}");
    assert!(changes.removed.iter().any(|removed| removed.contains("198.51.100.8/32 dev podgate")), "{changes:#?}");
    let rules = site.node_link.rules(Family::V4).unwrap();
    assert!(theirs.iter().all(|theirs| rules.iter().any(|rule| rule.is(theirs))));
    assert!(rules.iter().all(|rule| !rule.spec.to_string().contains("192.0.2.9")), "{rules:#?}");
    reconciler.apply(Side::Gateway, &plan()).unwrap();
    let default: RouteSpec = RouteSpec::unicast(crate::netlink::TABLE_MAIN, "0.0.0.0/0".parse().unwrap(), "pods");
    site.gateway_link.add_route(&default).unwrap();
    let open = RuleSpec::new(Family::V6, 3, RuleAction::Lookup(crate::netlink::TABLE_MAIN)).origin(ORIGIN_BOOT);
    site.gateway_link.add_rule(&open).unwrap();
    reconciler.apply(Side::Gateway, &plan()).unwrap();
    assert!(site.gateway_link.delete_route(&default).unwrap_err().is_missing(), "an opening in the gateway's namespace was closed");
    assert!(site.gateway_link.delete_rule(&open).unwrap_err().is_missing());
}

#[test]
fn a_flush_of_all_rules_leaves_the_node_reachable_and_is_repaired() {
    let Some(site) = Site::new("flush") else { return };
    let mut reconciler = site.reconciler();
    reconciler.apply(Side::Node, &plan()).unwrap();
    let flushed = site.node.run(|| ["-4", "-6"].map(|flag| Command::new("ip").args([flag, "rule", "flush"]).status())).unwrap();
    if flushed.iter().any(|status| !status.as_ref().is_ok_and(|status| status.success())) {
        eprintln!("skipped: iproute2 is not installed");
        return;
    }
    let local = site.node_link.route_to("192.0.2.1".parse().unwrap()).unwrap();
    assert_eq!(local.spec.kind, crate::netlink::RouteKind::Local, "its own addresses are its own");
    reconciler.apply(Side::Node, &plan()).unwrap();
    assert!(site.is_as(&plan(), Side::Node));
}

#[test]
fn a_host_that_moved_local_away_is_refused_with_the_remedy() {
    let Some(site) = Site::new("vrf") else { return };
    let local = |pref| RuleSpec::new(Family::V4, pref, RuleAction::Lookup(crate::netlink::TABLE_LOCAL));
    site.node_link.add_rule(&local(32_765).origin(ORIGIN_BOOT)).unwrap();
    site.node_link.delete_rule(&local(0)).unwrap();
    let before = site.snapshot();
    let error = site.reconciler().apply(Side::Node, &plan()).unwrap_err().to_string();
    assert!(error.contains("ip -4 rule add pref 0 lookup local"), "{error}");
    // The device was settled before; rules and routes were not touched.
    assert_eq!(site.node_link.rules(Family::V4).unwrap().len(), 3, "{before}");
}

#[test]
fn the_kernel_takes_packets_where_the_plan_says() {
    let Some(mut site) = Site::new("lookup") else { return };
    site.reconciler().apply(Side::Node, &plan()).unwrap();
    for (destination, device) in [("10.244.1.2", "podgate"), ("10.96.0.10", "podgate"), ("198.51.100.7", "podgate"), ("192.0.2.77", "u")] {
        let route = site.node_link.route_to(destination.parse().unwrap()).unwrap().spec;
        assert_eq!(route.device.as_deref(), Some(device), "{destination}");
        assert_eq!(route.prefsrc, Some("192.0.2.1".parse().unwrap()), "{destination}");
    }
    site.host_tun = None;
    Tun::remove("podgate", &site.node).unwrap();
    let error = site.node_link.route_to("10.244.1.2".parse().unwrap()).unwrap_err();
    assert_eq!(error.errno(), Some(libc::EHOSTUNREACH), "without the device the destination is closed, not open: {error}");
}

#[test]
fn cleanup_leaves_the_host_as_it_was_found() {
    let Some(mut site) = Site::new("cleanup") else { return };
    // What was there before us, one of it in exactly our form.
    site.node_link.add_rule(&RuleSpec::new(Family::V4, 101, RuleAction::Lookup(CLUSTER_TABLE))).unwrap();
    sysctl::write(&site.node, &sysctl::Key::v6("u", "accept_ra"), "1").unwrap();
    site.host_tun = None;
    Tun::remove("podgate", &site.node).unwrap();
    let before = site.snapshot();
    site.host_tun = Some(Tun::open("podgate", 1, &site.node).unwrap());

    let state_dir = site.directory.join("state");
    let mut state = HostState::load(&state_dir).unwrap();
    let spared = state.spare_found_rules(&site.node_link, &desired(&plan(), Side::Node)).unwrap();
    assert_eq!(spared.len(), 1);
    devices::settle_node(&site.node, &mut state, &["u".into()], devices::Ipv6Use::InUse).unwrap();
    devices::reserve_ports(&site.node, &mut state, &[30_000..=32_767, 61_000..=65_535]).unwrap();
    let mut reconciler = Reconciler::new(&site.node, site.gateway.netns(), &plan(), spared).unwrap();
    reconciler.apply(Side::Node, &plan()).unwrap();
    assert_eq!(sysctl::read(&site.node, &sysctl::Key::v6("u", "accept_ra")).unwrap(), "2");
    assert_eq!(sysctl::read(&site.node, &sysctl::Key::v6("all", "forwarding")).unwrap(), "1");
    assert_ne!(site.snapshot(), before);

    site.host_tun = None;
    let run = site.directory.join("run");
    std::fs::write(run.join("podgate.sock"), "").unwrap();
    let known = state_dir.join("kubernetes.json");
    std::fs::write(&known, "").unwrap();
    let traces = Traces { runtime_dir: &run, runtime_files: &["podgate.sock"], state_dir: &state_dir, host_device: "podgate" };
    let cleaned = cleanup(&site.node, &traces).unwrap();
    assert!(cleaned.kept.is_empty() && !known.exists(), "{cleaned:#?}");
    pretty_equal(&site.snapshot(), &before);
    assert!(!run.exists(), "{:?}", std::fs::read_dir(&run).map(|entries| entries.flatten().collect::<Vec<_>>()));
    // Now that nothing is noted any more, the rule that looks like ours can only be taken for it.
    let again = cleanup(&site.node, &traces).unwrap();
    assert!(again.kept.is_empty() && again.removed == ["IPv4 rule pref 101 lookup 233"], "{again:#?}");
}

fn pretty_equal(after: &str, before: &str) {
    let differing: Vec<(&str, &str)> = after.lines().zip(before.lines()).filter(|(after, before)| after != before).take(10).collect();
    assert!(after == before, "after and before: {differing:#?}");
}

#[test]
fn what_somebody_removes_comes_back_and_a_lost_device_is_told() {
    let Some(mut site) = Site::new("run") else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (plan_to, plan_from) = watch::channel(plan());
        let (events_to, mut events) = mpsc::channel(64);
        let running = tokio::spawn(site.reconciler().run(plan_from, events_to));
        async fn until(events: &mut mpsc::Receiver<Event>, limit: Duration, mut wanted: impl FnMut(&Event) -> bool) -> Event {
            let found = tokio::time::timeout(limit, async {
                loop {
                    let event = events.recv().await.expect("the reconciler runs");
                    if wanted(&event) {
                        return event;
                    }
                }
            });
            found.await.expect("in time")
        }
        let changed = |side: Side| move |event: &Event| matches!(event, Event::Changed(found, _) if *found == side);
        until(&mut events, PATIENCE, changed(Side::Gateway)).await;
        until(&mut events, PATIENCE, changed(Side::Node)).await;
        assert!(site.is_as(&plan(), Side::Node) && site.is_as(&plan(), Side::Gateway));

        for side in SIDES {
            let wanted = desired(&plan(), side);
            for rule in wanted.rules.iter().rev().take(3) {
                site.link(side).delete_rule(rule).unwrap();
                until(&mut events, PATIENCE, changed(side)).await;
                assert!(site.is_as(&plan(), side), "{rule}");
            }
            let route = &wanted.routes[1];
            site.link(side).delete_route(route).or_missing().unwrap();
            until(&mut events, PATIENCE, changed(side)).await;
            assert!(site.is_as(&plan(), side), "{route}");
        }
        site.node_link.add_address(&AddressSpec::new("u", "192.0.2.50/24".parse().unwrap())).unwrap();
        until(&mut events, PATIENCE, |event| matches!(event, Event::NodeAddresses(found) if found.len() == 3)).await;

        site.node_link.set_link("podgate", &LinkSettings::new().down()).unwrap();
        until(&mut events, PATIENCE, changed(Side::Node)).await;
        assert!(site.is_as(&plan(), Side::Node), "a link that was set down is up again, with its routes");

        site.host_tun = None;
        Tun::remove("podgate", &site.node).unwrap();
        until(&mut events, PATIENCE, |event| matches!(event, Event::DeviceLost(Side::Node))).await;
        site.host_tun = Some(Tun::open("podgate", 1, &site.node).unwrap());
        until(&mut events, PATIENCE, |event| matches!(event, Event::DeviceBack(Side::Node))).await;
        until(&mut events, PATIENCE, changed(Side::Node)).await;
        assert!(site.is_as(&plan(), Side::Node));

        let other = RoutingPlan { vips: Vec::new(), ..plan() };
        plan_to.send(other.clone()).unwrap();
        until(&mut events, PATIENCE, changed(Side::Node)).await;
        assert!(site.is_as(&other, Side::Node));
        drop(plan_to);
        tokio::time::timeout(PATIENCE, running).await.expect("it ends with its plan").unwrap().unwrap();
    });
}
