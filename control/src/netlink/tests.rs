//! Against the real kernel, in namespaces of the tests' own.

use super::*;
use ipnetwork::IpNetwork;
use std::time::Duration;

fn namespace() -> Option<Netns> {
    Netns::anonymous().inspect_err(|error| eprintln!("skipped: {error}")).ok()
}

fn network(text: &str) -> IpNetwork {
    text.parse().unwrap()
}

/// A namespace with an interface that is up and has an address of each family.
fn furnished() -> Option<(Netns, Netlink)> {
    let netns = namespace()?;
    let netlink = Netlink::open(&netns).unwrap();
    let settings = LinkSettings::new().mtu(1400).addr_gen_mode(AddrGenMode::None).up();
    let kind = LinkKind::Veth { peer: "d0-peer", peer_netns: None, peer_settings: settings.clone() };
    netlink.create_link(&NewLink { name: "d0", kind, settings }).unwrap();
    for address in ["192.0.2.1/24", "2001:db8::1/64"] {
        netlink.add_address(&AddressSpec::new("d0", network(address))).unwrap();
    }
    Some((netns, netlink))
}

#[test]
fn a_veth_is_made_straight_into_another_namespace_with_all_its_settings() {
    let (Some(here), Some(there)) = (namespace(), namespace()) else { return };
    let (near, far) = (Netlink::open(&here).unwrap(), Netlink::open(&there).unwrap());
    let mac = Mac([2, 0, 0, 0, 0, 7]);
    let settings = LinkSettings::new().mtu(1450).gso_max_size(62_000).addr_gen_mode(AddrGenMode::None).up();
    let peer_settings = settings.clone().mac(mac).txqueuelen(500);
    near.create_link(&NewLink { name: "v7", kind: LinkKind::veth_into("eth0", &there, peer_settings), settings }).unwrap();
    let (host, pod) = (near.expect_link("v7").unwrap(), far.expect_link("eth0").unwrap());
    assert_eq!((host.mtu, host.state, host.carrier, host.addr_gen_mode), (1450, LinkState::Up, LinkState::Up, Some(AddrGenMode::None)));
    assert_eq!((pod.mtu, pod.mac, pod.txqueuelen, pod.state), (1450, Some(mac), 500, LinkState::Up));
    assert_eq!((pod.kind.as_str(), pod.gso_max_size, pod.peer), ("veth", Some(62_000), Some(host.index)));
    assert!(pod.gso_ipv4_max_size.is_none_or(|size| size == 62_000));
    assert!(far.addresses().unwrap().is_empty(), "no link-local address was made");
    assert!(near.link("eth0").unwrap().is_none(), "the pod's end never was on this side");
    near.delete_link("v7").unwrap();
    assert!(far.link("eth0").unwrap().is_none());
    assert!(near.delete_link("v7").or_missing().is_ok());
}

#[test]
fn links_are_renamed_moved_and_bridged() {
    let (Some(here), Some(there)) = (namespace(), namespace()) else { return };
    let (near, far) = (Netlink::open(&here).unwrap(), Netlink::open(&there).unwrap());
    near.create_link(&NewLink { name: "br0", kind: LinkKind::Bridge, settings: LinkSettings::new().up() }).unwrap();
    let kind = LinkKind::Veth { peer: "d0-peer", peer_netns: None, peer_settings: LinkSettings::new() };
    near.create_link(&NewLink { name: "d0", kind, settings: LinkSettings::new() }).unwrap();
    let bridge = near.expect_link("br0").unwrap().index;
    near.set_link("d0", &LinkSettings::new().name("d1").controller(bridge)).unwrap();
    assert_eq!(near.expect_link("d1").unwrap().controller, Some(bridge));
    near.move_link("d1", &there).unwrap();
    assert!(near.link("d1").unwrap().is_none());
    assert_eq!(far.expect_link("d1").unwrap().controller, None);
}

#[test]
fn a_gpe_external_vxlan_device_can_be_made() {
    let Some((_netns, netlink)) = furnished() else { return };
    let spec = VxlanSpec { vni: 0, port: 4790, local: Some("192.0.2.1".parse().unwrap()), remote: None, mode: VxlanMode::GpeExternal };
    let made = netlink.create_link(&NewLink { name: "vx0", kind: LinkKind::Vxlan(spec), settings: LinkSettings::new().up() });
    match made {
        Err(error) if error.errno() == Some(libc::EOPNOTSUPP) => eprintln!("skipped: this kernel has no VXLAN: {error}"),
        other => {
            other.unwrap();
            assert_eq!(netlink.expect_link("vx0").unwrap().kind, "vxlan");
        }
    }
}

#[test]
fn addresses_are_usable_at_once_and_can_be_taken_away() {
    let Some((_netns, netlink)) = furnished() else { return };
    let found = netlink.addresses().unwrap();
    let texts: Vec<String> = found.iter().map(|found| found.address.to_string()).collect();
    assert_eq!(texts, ["192.0.2.1/24", "2001:db8::1/64"]);
    assert!(found.iter().all(|found| !found.tentative && found.permanent));
    let spec = AddressSpec::new("d0", network("2001:db8::1/64"));
    assert!(netlink.add_address(&spec).unwrap_err().is_present_already());
    netlink.delete_address(&spec).unwrap();
    assert!(netlink.delete_address(&spec).or_missing().is_ok());
    assert_eq!(netlink.addresses().unwrap().len(), 1);
}

#[test]
fn routes_read_back_as_they_were_written() {
    let Some((_netns, netlink)) = furnished() else { return };
    let specs = [
        RouteSpec::unicast(233, network("10.244.0.0/16"), "d0").mtu(1350).prefsrc("192.0.2.1".parse().unwrap()),
        RouteSpec::unreachable(233, network("10.244.0.0/16")).metric(9999),
        RouteSpec::blackhole(70_000, network("198.51.100.0/24")),
        RouteSpec::unicast(232, network("0.0.0.0/0"), "d0").mtu(65_000),
        RouteSpec::unicast(TABLE_MAIN, network("0.0.0.0/0"), "d0").via("169.254.1.1".parse().unwrap()).onlink().origin(ORIGIN_BOOT),
        RouteSpec::unicast(233, network("fd00:77::/32"), "d0").mtu(1350).prefsrc("2001:db8::1".parse().unwrap()),
        RouteSpec::unreachable(233, network("fd00:77::/32")).metric(9999),
        RouteSpec::blackhole(70_000, network("2001:db8:1::/48")),
        RouteSpec::unicast(232, network("::/0"), "d0").mtu(65_000),
        RouteSpec::unicast(TABLE_MAIN, network("::/0"), "d0").via("fe80::1".parse().unwrap()).origin(ORIGIN_BOOT),
    ];
    for spec in &specs {
        netlink.add_route(spec).unwrap();
        assert!(netlink.add_route(spec).unwrap_err().is_present_already(), "{spec}");
        let there = netlink.routes(spec.family(), spec.table).unwrap();
        assert!(there.iter().any(|route| route.is(spec)), "{spec} is not among {there:#?}");
    }
    let changed = specs[0].clone().mtu(1300);
    netlink.replace_route(&changed).unwrap();
    let there = netlink.routes(Family::V4, 233).unwrap();
    assert!(there.iter().any(|route| route.is(&changed)) && !there.iter().any(|route| route.is(&specs[0])));
    assert_eq!(netlink.route_to("203.0.113.9".parse().unwrap()).unwrap().spec.gateway, specs[4].gateway);
    for spec in &specs[1..] {
        netlink.delete_route(spec).unwrap();
        assert!(netlink.delete_route(spec).or_missing().is_ok());
    }
    assert!(netlink.routes(Family::V4, 4_000_000).unwrap().is_empty());
}

#[test]
fn rules_read_back_as_they_were_written_in_the_kernels_order() {
    let Some((_netns, netlink)) = furnished() else { return };
    for family in Family::BOTH {
        let node = match family {
            Family::V4 => network("192.0.2.1/32"),
            Family::V6 => network("2001:db8::1/128"),
        };
        let specs = [
            RuleSpec::new(family, 0, RuleAction::Lookup(TABLE_LOCAL)).iif("d0"),
            RuleSpec::new(family, 0, RuleAction::Goto(10)).to(node).protocol(17),
            RuleSpec::new(family, 10, RuleAction::Lookup(232)).to(node).protocol(6).dport(30_000..=32_767),
            RuleSpec::new(family, 11, RuleAction::Lookup(232)).to(node).protocol(17).dport(61_000..=65_534),
            RuleSpec::new(family, 12, RuleAction::Lookup(232)).to(node).protocol(132).dport(80..=80),
            RuleSpec::new(family, 20, RuleAction::Lookup(70_000)).iif("not-there-yet").from(node),
            RuleSpec::new(family, 30, RuleAction::Blackhole),
        ];
        for spec in &specs {
            netlink.add_rule(spec).unwrap();
            assert!(netlink.add_rule(spec).unwrap_err().is_present_already(), "{spec}");
        }
        let rules = netlink.rules(family).unwrap();
        let local = RuleSpec::new(family, 0, RuleAction::Lookup(TABLE_LOCAL));
        let ours: Vec<&RuleSpec> = rules.iter().map(|rule| &rule.spec).take(8).collect();
        assert_eq!(ours, std::iter::once(&local).chain(&specs).collect::<Vec<_>>());
        assert!(rules.iter().all(|rule| rule.exact));
        assert!(local.would_delete(&rules[1]), "a deletion that names no interface takes a rule that does");
        netlink.delete_rule(&local).unwrap();
        let after = netlink.rules(family).unwrap();
        assert!(after[0].is(&specs[0]), "the first that agrees went: {after:#?}");
        for spec in &specs {
            netlink.delete_rule(spec).unwrap();
            assert!(netlink.delete_rule(spec).or_missing().is_ok());
        }
    }
}

#[test]
fn rules_that_are_more_than_we_can_say_are_not_exact() {
    let Some((netns, netlink)) = furnished() else { return };
    let added = netns.run(|| std::process::Command::new("ip").args(["rule", "add", "pref", "50", "fwmark", "7", "lookup", "main"]).status());
    if !added.unwrap().is_ok_and(|status| status.success()) {
        eprintln!("skipped: iproute2 is not installed");
        return;
    }
    let rule = netlink.rules(Family::V4).unwrap().into_iter().find(|rule| rule.spec.pref == 50).unwrap();
    assert!(!rule.exact);
}

#[test]
fn permanent_neighbours_are_set_replaced_and_deleted() {
    let Some((_netns, netlink)) = furnished() else { return };
    for address in ["169.254.1.1", "fe80::1"] {
        let address: IpAddr = address.parse().unwrap();
        for mac in [Mac([2, 0, 0, 0, 0, 1]), Mac([2, 0, 0, 0, 0, 2])] {
            netlink.set_neighbour(&NeighbourSpec { device: "d0".into(), address, mac }).unwrap();
            let found = netlink.neighbours().unwrap().into_iter().find(|found| found.address == address).unwrap();
            assert_eq!((found.mac, found.permanent), (Some(mac), true));
        }
        netlink.delete_neighbour("d0", address).unwrap();
        assert!(netlink.neighbours().unwrap().iter().all(|found| found.address != address));
        assert!(netlink.delete_neighbour("d0", address).or_missing().is_ok());
    }
}

#[test]
fn an_error_names_the_operation_the_object_and_the_kernels_reason() {
    let Some((_netns, netlink)) = furnished() else { return };
    let error = netlink.add_rule(&RuleSpec::new(Family::V4, 20, RuleAction::Goto(10))).unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with("cannot add IPv4 rule pref 20 goto 10: Invalid argument"), "{text}");
    assert!(text.contains("(kernel: "), "{text}");
    let missing = netlink.add_route(&RouteSpec::unicast(232, network("0.0.0.0/0"), "nothing")).unwrap_err();
    assert!(missing.to_string().starts_with("cannot find link nothing: No such device"), "{missing}");
}

#[test]
fn sysctls_are_those_of_the_namespace() {
    let Some((netns, _netlink)) = furnished() else { return };
    let key = sysctl::Key::v4("d0", "rp_filter");
    sysctl::write(&netns, &key, "2").unwrap();
    assert_eq!(sysctl::read(&netns, &key).unwrap(), "2");
    assert!(sysctl::read(&netns, &sysctl::Key::v4("nothing", "rp_filter")).unwrap_err().is_missing());
}

#[test]
fn changes_by_others_are_heard() {
    let Some((netns, netlink)) = furnished() else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut events = events::Events::open(&netns).unwrap();
        let rule = RuleSpec::new(Family::V6, 77, RuleAction::Blackhole);
        netlink.add_rule(&rule).unwrap();
        netlink.delete_rule(&rule).unwrap();
        netlink.delete_address(&AddressSpec::new("d0", network("192.0.2.1/24"))).unwrap();
        netlink.delete_link("d0").unwrap();
        let mut seen = Vec::new();
        let (mut rule_gone, mut address_gone, mut link_gone) = (false, false, false);
        while !(rule_gone && address_gone && link_gone) {
            let changes = tokio::time::timeout(Duration::from_secs(5), events.changes()).await;
            for change in changes.unwrap_or_else(|_| panic!("only {seen:#?}")).unwrap() {
                rule_gone |= matches!(&change, events::Change::RuleGone(gone) if gone.is(&rule));
                address_gone |= matches!(&change, events::Change::AddressGone(gone) if gone.address == network("192.0.2.1/24"));
                link_gone |= matches!(&change, events::Change::LinkGone(gone) if gone.name == "d0");
                seen.push(change);
            }
        }
    });
}
