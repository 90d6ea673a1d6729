//! Nodes: peers, routes and whose claim counts.

use super::*;

#[test]
fn peers_have_routes_prefixes_and_the_mtu_that_is_left() {
    let announced = json!({"podgate.io/underlay": "198.51.100.3", "podgate.io/overlay": "port=4791,vni=1,mtu=1400"});
    let compiled = fresh([
        n1(),
        n2(),
        node("n3", &["10.244.3.0/24"], &["192.0.2.3"], announced),
        node("n4", &["10.244.4.0/24"], &["192.0.2.4"], json!({"podgate.io/overlay": "none"})),
        node("n5", &["10.244.5.0/24"], &["192.0.2.5"], json!({"podgate.io/overlay": "vni=2"})),
        node("n6", &["10.244.6.0/24"], &["2001:db8::6"], json!({})),
        node("n7", &[], &["192.0.2.7"], json!({})),
    ]);
    let snapshot = &compiled.snapshot;
    let peers: Vec<(&str, String, u32)> = snapshot.peers.iter().map(|p| (&*p.name, format!("{} {}", p.underlay, p.port), p.mtu)).collect();
    // Not above what a peer's pods take: those of a dual-stack node have room for the longer outer header.
    let expected = [("n2", "192.0.2.2 4790", 1444), ("n3", "198.51.100.3 4791", 1364), ("n6", "2001:db8::6 4790", 1444)];
    assert_eq!(peers, expected.map(|(n, u, m)| (n, u.to_string(), m)));
    let addr = |ip: &str| Addr::from(ip.parse::<std::net::IpAddr>().unwrap());
    let route = |ip: &str| snapshot.routes.lookup(addr(ip)).map(|i| &*snapshot.peers[*i as usize].name);
    assert_eq!(route("10.244.2.9"), Some("n2"));
    assert_eq!(route("fd00:77:2::9"), Some("n2"));
    assert_eq!(route("192.0.2.3"), Some("n3"));
    assert_eq!(route("10.244.4.1"), None, "it opted out");
    assert_eq!(route("10.244.5.1"), None, "another VNI");
    assert_eq!((route("10.244.1.1"), route("192.0.2.1")), (None, None), "never this node's own");
    assert!(snapshot.peers[1].prefixes.lookup(addr("198.51.100.3")).is_some(), "a peer may speak from its underlay address");
    assert!(snapshot.peers[1].prefixes.lookup(addr("10.244.2.9")).is_none(), "and not from another peer's range");
    let by_underlay: Vec<String> = snapshot.peer_by_underlay.iter().map(|(a, i)| format!("{a} {}", snapshot.peers[*i as usize].name)).collect();
    assert_eq!(by_underlay, ["192.0.2.2 n2", "198.51.100.3 n3", "2001:db8::2 n2", "2001:db8::6 n6"]);
    assert!(snapshot.peer_by_underlay.is_sorted());
    assert_eq!(compiled.warnings.len(), 1, "{:?}", compiled.warnings);
    assert_eq!(compiled.peers()[1].pod_cidrs, ["10.244.3.0/24"]);
}

#[test]
fn where_announcements_are_required_a_silent_node_is_outside() {
    let mut local = local();
    local.settings.announcements = Announcements::Required;
    let compiled = fresh_for(&Arc::new(local), [n1(), n2()]);
    assert!(compiled.snapshot.peers.is_empty());
}

#[test]
fn nodes_that_claim_what_is_anothers_are_named_and_do_not_get_it() {
    let compiled = fresh([
        n1(),
        n2(),
        node("n3", &["10.244.2.128/25"], &["192.0.2.2"], json!({})),
        node("n4", &["10.244.1.0/24"], &["10.244.9.9"], json!({})),
        node("n5", &["10.0.0.0/8"], &["192.0.2.5"], json!({})),
        node("n6", &["10.99.0.0/24"], &["192.0.2.6"], json!({})),
    ]);
    let messages: Vec<String> = compiled.warnings.iter().map(|w| w.to_string()).collect();
    let has = |text: &str| assert!(messages.iter().any(|m| m.contains(text)), "{text}: {messages:#?}");
    has("Node n3: its pod range 10.244.2.128/25 overlaps 10.244.2.0/24 of Node n2 and is ignored");
    has("Node n3: its InternalIP 192.0.2.2 is Node n2's and is ignored");
    has("Node n3: its underlay address 192.0.2.2 is another node's too");
    has("Node n4: its pod range 10.244.1.0/24 overlaps 10.244.1.0/24 of Node n1 and is ignored");
    has("Node n4: its InternalIP 10.244.9.9 lies in a pod range and is ignored");
    has("Node n5: its pod range 10.0.0.0/8 overlaps 10.244.1.0/24 of Node n1 and is ignored");
    has("Node n6: its pod range 10.99.0.0/24 is not inside podCIDRs (10.244.0.0/16, fd00:77::/32) and is ignored");
    let snapshot = &compiled.snapshot;
    let route = |ip: &str| snapshot.routes.lookup(ip.parse::<std::net::IpAddr>().unwrap().into()).map(|i| &*snapshot.peers[*i as usize].name);
    assert_eq!((route("10.244.2.200"), route("192.0.2.2"), route("10.244.1.77"), route("10.99.0.1")), (Some("n2"), Some("n2"), None, None));
}

#[test]
fn a_service_range_that_the_configuration_lacks_is_a_warning() {
    let cidr = |name: &str, cidrs: Value| {
        let object = json!({"metadata": {"name": name}, "spec": {"cidrs": cidrs}});
        Object::from_service_cidr(&serde_json::from_value(object).unwrap()).unwrap()
    };
    assert!(fresh([n1(), cidr("kubernetes", json!(["10.96.0.0/20", "fd00:96::/112"]))]).warnings.is_empty());
    let compiled = fresh([n1(), cidr("more", json!(["10.96.0.0/12"]))]);
    let warning = compiled.warnings[0].to_string();
    assert!(warning.starts_with("ServiceCIDR more: services get addresses from 10.96.0.0/12, which is not inside serviceCIDRs"), "{warning}");
}
