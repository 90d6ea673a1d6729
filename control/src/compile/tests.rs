//! The semantics row by row, with kube-proxy's own cases; then the promise that an incremental compile equals a fresh one.

use std::collections::BTreeMap as Map;

use podgate_core::addr::Addr;
use podgate_core::fib::Pod;
use podgate_core::flow::Timeouts;
use podgate_core::service::{Backend, Place, TrafficPolicy};
use podgate_core::snapshot::OutsideToPods;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::config::NodePortAddresses;
use crate::model::Object;

fn settings() -> Settings {
    Settings {
        pod_cidrs: vec!["10.244.0.0/16".parse().unwrap(), "fd00:77::/32".parse().unwrap()],
        service_cidrs: vec!["10.96.0.0/16".parse().unwrap(), "fd00:96::/112".parse().unwrap()],
        node_ports: 30000..=32767,
        node_port_addresses: NodePortAddresses::Primary,
        masquerade: Some(vec![61000..=65534]),
        external_ips: vec!["203.0.113.0/24".parse().unwrap(), "10.96.5.0/24".parse().unwrap()],
        overlay_port: 4790,
        overlay_vni: 1,
        outside_to_pods: OutsideToPods::Allow,
        health_port: 10256,
        announcements: Announcements::Optional,
        timeouts: Timeouts::default(),
    }
}

fn local() -> LocalNode {
    LocalNode {
        name: "n1".into(),
        settings: settings(),
        addresses: vec!["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()],
        underlay: vec!["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()],
        underlay_mtu: 1500,
        path_mtus: Default::default(),
        outside_mtu: 1500,
        masquerade_sources: vec!["192.0.2.1".parse().unwrap()],
        pods: vec![("10.244.1.10".parse().unwrap(), Pod::new(1444))],
        host_ports: Vec::new(),
        probe_token: 7,
        workers: 2,
    }
}

fn node(name: &str, cidrs: &[&str], ips: &[&str], annotations: Value) -> Object {
    let addresses: Vec<Value> = ips.iter().map(|ip| json!({"type": "InternalIP", "address": ip})).collect();
    let object = json!({"metadata": {"name": name, "annotations": annotations, "labels": {"topology.kubernetes.io/zone": "zone-a"}},
        "spec": {"podCIDRs": cidrs}, "status": {"addresses": addresses}});
    Object::from_node(&serde_json::from_value(object).unwrap()).unwrap()
}

fn n1() -> Object {
    node("n1", &["10.244.1.0/24", "fd00:77:1::/64"], &["192.0.2.1", "2001:db8::1"], json!({}))
}

fn n2() -> Object {
    node("n2", &["10.244.2.0/24", "fd00:77:2::/64"], &["192.0.2.2", "2001:db8::2"], json!({}))
}

fn service(name: &str, spec: Value) -> Object {
    service_with_status(name, spec, json!({}))
}

fn service_with_status(name: &str, spec: Value, status: Value) -> Object {
    let object = json!({"metadata": {"name": name}, "spec": spec, "status": status});
    Object::from_service(&serde_json::from_value(object).unwrap()).unwrap()
}

fn slice(name: &str, service: &str, ports: Value, endpoints: Value) -> Object {
    let kind = if endpoints.to_string().contains("\"fd00") { "IPv6" } else { "IPv4" };
    let object = json!({"metadata": {"name": name, "labels": {"kubernetes.io/service-name": service}}, "addressType": kind,
        "ports": ports, "endpoints": endpoints});
    Object::from_slice(&serde_json::from_value(object).unwrap()).unwrap()
}

fn fresh(objects: impl IntoIterator<Item = Object>) -> Compiled {
    fresh_for(&Arc::new(local()), objects)
}

fn fresh_for(local: &Arc<LocalNode>, objects: impl IntoIterator<Item = Object>) -> Compiled {
    compile(&Compiled::empty(local), &Arc::new(objects.into_iter().collect()), local)
}

fn key(address: &str) -> FrontendKey {
    let (address, protocol) = address.split_once('/').unwrap_or((address, "TCP"));
    let address: std::net::SocketAddr = address.parse().unwrap();
    FrontendKey::new(address.ip(), address.port(), if protocol == "UDP" { 17 } else { 6 })
}

#[track_caller]
fn frontend<'a>(compiled: &'a Compiled, address: &str) -> &'a Frontend {
    compiled.snapshot.services.get(&key(address)).unwrap_or_else(|| panic!("nobody answers {address}"))
}

fn list(backends: &[Backend]) -> Vec<String> {
    backends.iter().map(|b| format!("{}:{}", b.addr, b.port)).collect()
}

/// An endpoint of kube-proxy's tables: address, conditions (r, s, t), where it is, hints.
struct Case {
    name: &'static str,
    endpoints: Vec<Value>,
    cluster: &'static [&'static str],
    local: &'static [&'static str],
}

fn endpoint(last: u8, conditions: &str, node: &str, zones: &[&str]) -> Value {
    let zones: Vec<Value> = zones.iter().map(|z| json!({"name": z})).collect();
    json!({"addresses": [format!("10.244.9.{last}")], "nodeName": node, "hints": {"forZones": zones},
        "conditions": {"ready": conditions.contains('r'), "serving": conditions.contains('s'), "terminating": conditions.contains('t')}})
}

#[test]
fn endpoints_are_chosen_as_kube_proxy_chooses_them() {
    let e = endpoint;
    let for_nodes = |mut e: Value, nodes: &[&str]| {
        e["hints"]["forNodes"] = nodes.iter().map(|n| json!({"name": n})).collect();
        e
    };
    let cases = [
        Case { name: "none at all", endpoints: vec![], cluster: &[], local: &[] },
        Case { name: "none ready", endpoints: vec![e(0, "", "n1", &[]), e(1, "", "n2", &[])], cluster: &[], local: &[] },
        Case { name: "some ready", endpoints: vec![e(0, "", "n1", &[]), e(1, "rs", "n2", &[])], cluster: &["10.244.9.1:80"], local: &[] },
        Case {
            name: "some are local",
            endpoints: vec![e(0, "rs", "n1", &[]), e(1, "rs", "n2", &[])],
            cluster: &["10.244.9.0:80", "10.244.9.1:80"],
            local: &["10.244.9.0:80"],
        },
        Case { name: "all remote", endpoints: vec![e(0, "rs", "n2", &[])], cluster: &["10.244.9.0:80"], local: &[] },
        Case {
            name: "all terminating",
            endpoints: vec![e(0, "st", "n1", &[]), e(1, "st", "n2", &[]), e(2, "t", "n2", &[])],
            cluster: &["10.244.9.0:80", "10.244.9.1:80"],
            local: &["10.244.9.0:80"],
        },
        Case { name: "all remote and terminating", endpoints: vec![e(0, "st", "n2", &[])], cluster: &["10.244.9.0:80"], local: &[] },
        Case {
            name: "ready elsewhere, terminating here: the lists are decided apart",
            endpoints: vec![e(0, "rs", "n2", &[]), e(1, "", "n1", &[]), e(2, "st", "n1", &[]), e(3, "st", "n2", &[])],
            cluster: &["10.244.9.0:80"],
            local: &["10.244.9.2:80"],
        },
        Case {
            name: "hints of zones",
            endpoints: vec![e(3, "rs", "n2", &["zone-a"]), e(4, "rs", "n2", &["zone-b"]), e(5, "rs", "n2", &["zone-b", "zone-a"])],
            cluster: &["10.244.9.3:80", "10.244.9.5:80"],
            local: &[],
        },
        Case {
            name: "hints do not count for the local list",
            endpoints: vec![e(3, "rs", "n1", &["zone-a"]), e(4, "rs", "n1", &["zone-b"]), e(6, "rs", "n2", &["zone-a"])],
            cluster: &["10.244.9.3:80", "10.244.9.6:80"],
            local: &["10.244.9.3:80", "10.244.9.4:80"],
        },
        Case {
            name: "a missing hint switches hints off",
            endpoints: vec![e(3, "rs", "n2", &["zone-a"]), e(4, "rs", "n2", &[])],
            cluster: &["10.244.9.3:80", "10.244.9.4:80"],
            local: &[],
        },
        Case { name: "no hint names this zone", endpoints: vec![e(3, "rs", "n2", &["zone-b"])], cluster: &["10.244.9.3:80"], local: &[] },
        Case {
            name: "an unready endpoint in the zone does not count",
            endpoints: vec![e(3, "", "n2", &["zone-a"]), e(4, "rs", "n2", &["zone-b"])],
            cluster: &["10.244.9.4:80"],
            local: &[],
        },
        Case {
            name: "an unready endpoint without hints does not switch hints off",
            endpoints: vec![e(3, "", "n2", &[]), e(4, "rs", "n2", &["zone-b"]), e(5, "rs", "n2", &["zone-a"])],
            cluster: &["10.244.9.5:80"],
            local: &[],
        },
        Case {
            name: "hints of nodes come before those of zones",
            endpoints: vec![for_nodes(e(3, "rs", "n1", &["zone-a"]), &["n1"]), for_nodes(e(4, "rs", "n2", &["zone-a"]), &["n2"])],
            cluster: &["10.244.9.3:80"],
            local: &["10.244.9.3:80"],
        },
        Case {
            name: "hints of nodes that do not name this one leave it to the zones",
            endpoints: vec![for_nodes(e(3, "rs", "n2", &["zone-b"]), &["n2"]), for_nodes(e(4, "rs", "n3", &["zone-a"]), &["n3"])],
            cluster: &["10.244.9.4:80"],
            local: &[],
        },
    ];
    for case in cases {
        let spec =
            json!({"clusterIP": "10.96.0.10", "externalTrafficPolicy": "Local", "type": "NodePort", "ports": [{"port": 80, "nodePort": 30080}]});
        let compiled = fresh([n1(), service("web", spec), slice("web-1", "web", json!([{"port": 80}]), case.endpoints.into())]);
        let web = &frontend(&compiled, "10.96.0.10:80").service;
        assert_eq!(list(&web.cluster), case.cluster, "{}: cluster", case.name);
        assert_eq!(list(&web.local), case.local, "{}: local", case.name);
    }
}

#[test]
fn slices_are_joined_and_a_duplicate_that_is_not_terminating_wins() {
    let ports = json!([{"name": "http", "port": 8080}, {"name": "dns", "protocol": "UDP", "port": 5353}]);
    let spec = json!({"clusterIP": "10.96.0.10", "ports": [{"name": "http", "port": 80}, {"name": "dns", "protocol": "UDP", "port": 80}]});
    let compiled = fresh([
        n1(),
        service("web", spec),
        slice("web-1", "web", ports.clone(), json!([endpoint(1, "st", "n1", &[]), endpoint(2, "rs", "n1", &[])])),
        slice("web-2", "web", ports.clone(), json!([endpoint(1, "rs", "n1", &[])])),
        slice("web-3", "web", json!([{"name": "other", "port": 1}]), json!([endpoint(3, "rs", "n1", &[])])),
        slice("db-1", "db", ports, json!([endpoint(4, "rs", "n1", &[])])),
    ]);
    assert_eq!(list(&frontend(&compiled, "10.96.0.10:80").service.cluster), ["10.244.9.1:8080", "10.244.9.2:8080"]);
    // The same number over UDP is another service.
    let dns = &frontend(&compiled, "10.96.0.10:80/UDP").service;
    assert_eq!(list(&dns.cluster), ["10.244.9.1:5353", "10.244.9.2:5353"]);
    assert_eq!(&*dns.name, "default/web:dns");
    assert_ne!(dns.id, frontend(&compiled, "10.96.0.10:80").service.id);
}

#[test]
fn a_service_without_endpoints_is_there_with_empty_lists() {
    let compiled = fresh([n1(), service("web", json!({"clusterIP": "10.96.0.10", "ports": [{"port": 80}]}))]);
    let web = frontend(&compiled, "10.96.0.10:80");
    assert!(web.service.cluster.is_empty() && web.service.local.is_empty());
    assert!(compiled.snapshot.services.is_vip("10.96.0.10".parse::<std::net::IpAddr>().unwrap().into()));
}

#[test]
fn every_face_of_a_dual_stack_service_is_served() {
    let spec = json!({"type": "LoadBalancer", "clusterIPs": ["10.96.0.10", "fd00:96::a"], "externalTrafficPolicy": "Local", "internalTrafficPolicy": "Local",
        "sessionAffinity": "ClientIP", "ports": [{"name": "http", "port": 80, "nodePort": 30080}],
        "externalIPs": ["203.0.113.9", "198.51.100.9", "10.96.5.5"], "loadBalancerSourceRanges": ["192.0.2.0/24"]});
    let status =
        json!({"loadBalancer": {"ingress": [{"ip": "203.0.113.80"}, {"ip": "2001:db8:ffff::80"}, {"ip": "203.0.113.81", "ipMode": "Proxy"}]}});
    let compiled = fresh([
        n1(),
        service_with_status("web", spec, status),
        slice("web-4", "web", json!([{"name": "http", "port": 8080}]), json!([{"addresses": ["10.244.1.10"]}])),
        slice("web-6", "web", json!([{"name": "http", "port": 8080}]), json!([{"addresses": ["fd00:77:2::10"]}])),
    ]);
    let faces: Map<String, Face> = compiled.snapshot.services.iter().map(|(k, f)| (dialled(k, Protocol::Tcp), f.face)).collect();
    let expected = [
        ("10.96.0.10:80/TCP", Face::ClusterIp),
        ("[fd00:96::a]:80/TCP", Face::ClusterIp),
        ("192.0.2.1:30080/TCP", Face::NodePort),
        ("[2001:db8::1]:30080/TCP", Face::NodePort),
        ("203.0.113.80:80/TCP", Face::LoadBalancer),
        ("[2001:db8:ffff::80]:80/TCP", Face::LoadBalancer),
        ("203.0.113.9:80/TCP", Face::ExternalIp),
        // The gateway's own.
        ("10.244.1.1:10256/TCP", Face::ClusterIp),
        ("[fd00:77:1::1]:10256/TCP", Face::ClusterIp),
    ];
    assert_eq!(faces, expected.map(|(a, f)| (a.to_string(), f)).into());
    let v4 = &frontend(&compiled, "192.0.2.1:30080").service;
    assert_eq!((v4.internal_policy, v4.external_policy), (TrafficPolicy::Local, TrafficPolicy::Local));
    assert_eq!(v4.affinity.unwrap().as_secs(), 10_800);
    assert_eq!(list(&v4.cluster), ["10.244.1.10:8080"]);
    assert_eq!(v4.local, v4.cluster, "without a nodeName the address tells that it is here");
    // The range holds the node's own address, so the VIP itself may dial too.
    assert_eq!(v4.source_ranges, ["192.0.2.0/24".parse().unwrap(), "203.0.113.80/32".parse().unwrap()]);
    let v6 = &frontend(&compiled, "[fd00:96::a]:80").service;
    assert_eq!(list(&v6.cluster), ["fd00:77:2::10:8080"]);
    assert!(v6.local.is_empty() && v6.source_ranges.is_empty());
    assert_ne!(v4.id, v6.id);
    let warnings: Vec<String> = compiled.warnings.iter().map(ToString::to_string).collect();
    assert_eq!(
        warnings,
        [
            "Service default/web: its external IP 198.51.100.9 is not served: externalIPs.allow does not hold it",
            "Service default/web: its external IP 10.96.5.5 lies in a pod or service range and is not served: it would shadow what is there",
            "Service default/web: loadBalancerSourceRanges has no IPv6 range: its IPv6 address lets everybody in, as with kube-proxy",
        ]
    );
}

#[test]
fn skipped_services_have_no_frontend() {
    let mut objects = vec![n1()];
    let ip = "10.96.0.10";
    objects.push(service("a", json!({"clusterIP": "None", "ports": [{"port": 80}]})));
    objects.push(service("b", json!({"type": "ExternalName", "clusterIP": ip, "externalName": "x", "ports": [{"port": 80}]})));
    objects.push(service("c", json!({"ports": [{"port": 80}]})));
    let compiled = fresh(objects);
    assert_eq!(compiled.services().len(), 2, "the gateway's own service, in both families");
    assert_eq!(compiled.skipped().len(), 3);
}

#[test]
fn a_backend_is_placed_by_pod_ranges_and_node_addresses() {
    let addresses = ["10.244.1.10", "192.0.2.1", "10.244.2.10", "192.0.2.2", "198.51.100.1", "10.244.77.1"];
    let endpoints: Vec<Value> = addresses.iter().map(|a| json!({"addresses": [a]})).collect();
    let spec = json!({"clusterIP": "10.96.0.10", "ports": [{"port": 80}]});
    let compiled = fresh([n1(), n2(), service("web", spec), slice("web-1", "web", json!([{"port": 80}]), endpoints.into())]);
    let placed: Map<String, Place> = frontend(&compiled, "10.96.0.10:80").service.cluster.iter().map(|b| (b.addr.to_string(), b.place)).collect();
    use Place::*;
    let expected = addresses.iter().map(|a| a.to_string()).zip([LocalPod, ThisNode, RemotePod, OtherNode, Outside, Outside]);
    assert_eq!(placed, expected.collect());
}

#[test]
fn the_gateways_own_service_leads_to_the_health_port_of_the_node() {
    let compiled = fresh([n1()]);
    for (gateway, node) in [("10.244.1.1:10256", "192.0.2.1"), ("[fd00:77:1::1]:10256", "2001:db8::1")] {
        let own = frontend(&compiled, gateway);
        assert_eq!((own.face, &*own.service.name), (Face::ClusterIp, "podgate/self-test"));
        let expected = Backend { addr: node.parse::<std::net::IpAddr>().unwrap().into(), port: 10256, place: Place::ThisNode };
        assert_eq!(*own.service.cluster, [expected]);
    }
    let node = &compiled.snapshot.node;
    assert_eq!((node.gateway_v4.unwrap().to_string(), node.gateway_v6.unwrap().to_string()), ("10.244.1.1".into(), "fd00:77:1::1".into()));
}

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
fn two_services_that_claim_one_address_are_named_and_the_cluster_ip_wins() {
    let a = service("a", json!({"clusterIP": "10.96.0.1", "externalIPs": ["203.0.113.9"], "ports": [{"port": 80}]}));
    let b = service("b", json!({"clusterIP": "203.0.113.9", "ports": [{"port": 80}]}));
    let both = fresh([n1(), a.clone(), b.clone()]);
    assert_eq!(&*frontend(&both, "203.0.113.9:80").service.name, "default/b");
    let message = "Service default/a: 203.0.113.9:80 belongs to Service default/b already and leads there; give one of them another address or port";
    assert_eq!(both.warnings.iter().map(ToString::to_string).collect::<Vec<_>>(), [message]);
    // The loser takes over when the winner goes.
    let after = compile(&both, &Arc::new([n1(), a].into_iter().collect()), &Arc::new(local()));
    assert_eq!(&*frontend(&after, "203.0.113.9:80").service.name, "default/a");
    assert!(after.warnings.is_empty());
}

#[test]
fn what_is_seen_and_not_enforced_is_a_warning() {
    let key = crate::model::ObjectKey { kind: "NetworkPolicy".into(), name: ObjectName::new("default", "deny") };
    let compiled = fresh([n1(), Object::Unenforced(key)]);
    assert_eq!(
        compiled.warnings[0].to_string(),
        "NetworkPolicy default/deny: NetworkPolicy objects are seen but not enforced: traffic flows as if this one did not exist"
    );
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

#[test]
fn an_endpoints_change_rebuilds_that_endpoint_set_alone() {
    let local = Arc::new(local());
    let web = |n: &str, ip: &str| service(n, json!({"type": "NodePort", "clusterIP": ip, "ports": [{"port": 80, "nodePort": 30080}]}));
    let other = service("other", json!({"clusterIP": "10.96.0.11", "ports": [{"port": 80}]}));
    let of = |service: &str, last: u8| slice(&format!("{service}-1"), service, json!([{"port": 80}]), json!([endpoint(last, "rs", "n1", &[])]));
    let before = fresh_for(&local, [n1(), n2(), web("web", "10.96.0.10"), other.clone(), of("web", 1), of("other", 1)]);
    let state = Arc::new([n1(), n2(), web("web", "10.96.0.10"), other, of("web", 2), of("other", 1)].into_iter().collect());
    let after = compile(&before, &state, &local);
    let service = |c: &Compiled, address: &str| frontend(c, address).service.clone();
    assert!(Arc::ptr_eq(&service(&before, "10.96.0.11:80"), &service(&after, "10.96.0.11:80")), "the other service is shared");
    assert_eq!(list(&service(&after, "10.96.0.10:80").cluster), ["10.244.9.2:80"]);
    assert!(Arc::ptr_eq(&service(&after, "10.96.0.10:80"), &service(&after, "192.0.2.1:30080")), "its faces share one service port");
    assert!(Arc::ptr_eq(&before.snapshot.node, &after.snapshot.node));
    assert!(Arc::ptr_eq(&before.snapshot.routes, &after.snapshot.routes));
    assert!(Arc::ptr_eq(&before.snapshot.peers, &after.snapshot.peers));
    assert!(after.changes.is_empty(), "endpoints are no change of the service port");
    assert_eq!(after.snapshot.generation.0, before.snapshot.generation.0 + 1);
    let again = compile(&after, &state, &local);
    assert_eq!(again.snapshot.generation, after.snapshot.generation, "nothing changed, nothing to publish");
}

#[test]
fn a_change_of_the_pods_touches_the_pod_table_alone() {
    let before = fresh([n1(), n2()]);
    let mut moved = local();
    moved.pods.push(("10.244.1.11".parse().unwrap(), Pod::new(1444)));
    let after = compile(&before, &before.state, &Arc::new(moved));
    assert!(after.snapshot.pods.get("10.244.1.11".parse::<std::net::IpAddr>().unwrap().into()).is_some());
    assert!(Arc::ptr_eq(&before.snapshot.routes, &after.snapshot.routes) && Arc::ptr_eq(&before.snapshot.node, &after.snapshot.node));
    assert_eq!(after.snapshot.generation.0, before.snapshot.generation.0 + 1);
}

#[test]
fn changes_of_service_ports_are_told_in_kube_proxys_words() {
    let local = Arc::new(local());
    let web = |port: u16| service("web", json!({"clusterIP": "10.96.0.10", "ports": [{"name": "http", "port": port}]}));
    let lines = |c: &Compiled| c.changes.iter().map(ToString::to_string).filter(|l| !l.contains("self-test")).collect::<Vec<_>>();
    let added = fresh_for(&local, [n1(), web(80)]);
    assert_eq!(lines(&added), ["Adding new service port default/web:http at 10.96.0.10:80/TCP"]);
    let updated = compile(&added, &Arc::new([n1(), web(81)].into_iter().collect()), &local);
    assert_eq!(lines(&updated), ["Updating existing service port default/web:http at 10.96.0.10:81/TCP"]);
    assert!(updated.snapshot.services.get(&key("10.96.0.10:80")).is_none());
    let removed = compile(&updated, &Arc::new([n1()].into_iter().collect()), &local);
    assert_eq!(lines(&removed), ["Removing service port default/web:http at 10.96.0.10:81/TCP"]);
}

#[test]
fn a_services_id_never_changes() {
    // Flows on disk hold it: these figures are part of the format.
    assert_eq!(service::service_id("default/web:http", 6, service::Family::V4), 0x735c_f472_b984_bdd3);
    assert_eq!(service::service_id("kube-system/kube-dns:dns", 17, service::Family::V6), 0xafc0_83d1_1f9e_b613);
}

#[test]
fn operators_see_why_an_endpoint_is_or_is_not_used() {
    let spec = json!({"clusterIP": "10.96.0.10", "externalTrafficPolicy": "Local", "type": "LoadBalancer", "healthCheckNodePort": 32000, "ports": [{"port": 80}]});
    let endpoints = json!([endpoint(1, "rs", "n2", &[]), endpoint(2, "st", "n1", &[]), endpoint(3, "", "n1", &[])]);
    let compiled = fresh([n1(), service("web", spec), slice("web-1", "web", json!([{"port": 80}]), endpoints)]);
    let seen: Vec<_> = compiled.backends().into_iter().map(|b| (b.address, b.used, b.used_locally, b.reason)).collect();
    assert_eq!(
        seen,
        [
            ("10.244.9.1:80".into(), true, false, "ready"),
            ("10.244.9.2:80".into(), false, true, "terminating, and others are ready"),
            ("10.244.9.3:80".into(), false, false, "not ready"),
        ]
    );
    let web = serde_json::to_value(compiled.services()).unwrap()[0].clone();
    assert_eq!(web["frontends"][0], json!({"face": "ClusterIP", "address": "10.96.0.10:80"}));
    assert_eq!((&web["clusterBackends"], &web["localBackends"]), (&json!(1), &json!(1)));
    let check = &compiled.health_checks()[0];
    assert_eq!((check.port, check.local_endpoints), (32000, 0), "terminating-only is not healthy");
}

/// What two snapshots must agree on: everything but generation and pointers.
fn contents(compiled: &Compiled) -> (Map<FrontendKey, Frontend>, String) {
    let s = &compiled.snapshot;
    let mut pods: Vec<_> = s.pods.iter().map(|(a, p)| (a, p.clone())).collect();
    pods.sort_by_key(|(a, _)| *a);
    let rest =
        format!("{:?} {:?} {:?} {:?} {pods:?} {:?} {:?}", s.node, s.routes, s.peers, s.peer_by_underlay, compiled.warnings, compiled.contested);
    (s.services.iter().map(|(k, f)| (*k, f.clone())).collect(), rest)
}

/// One step of a history.
#[derive(Clone, Debug)]
enum Step {
    Put(Object),
    Remove(u8, u8),
    Pods(Vec<u8>),
}

fn step() -> impl Strategy<Value = Step> {
    let names = ["a", "b", "c", "podgate"];
    let service = (0..4usize, 0..3u8, 0..3u8, any::<[bool; 4]>()).prop_map(move |(name, ip, port, [dual, local, external, node_port])| {
        let mut ips = vec![format!("10.96.0.{ip}")];
        if dual {
            ips.push(format!("fd00:96::{ip}"));
        }
        let mut ports = json!([{"name": "p", "port": 80 + u16::from(port)}]);
        if node_port {
            ports[0]["nodePort"] = json!(29999 + u16::from(port));
        }
        let external: &[&str] = if external { &["203.0.113.1", "10.96.5.5"] } else { &[] };
        let spec =
            json!({"clusterIPs": ips, "ports": ports, "externalIPs": external, "internalTrafficPolicy": if local { "Local" } else { "Cluster" }});
        Step::Put(self::service(names[name], spec))
    });
    let slice = (0..4usize, 0..3u8, prop::collection::vec((0..4u8, 0..4u8, any::<[bool; 3]>()), 0..4)).prop_map(move |(name, n, endpoints)| {
        let endpoints: Vec<Value> = endpoints
            .into_iter()
            .map(|(net, last, [ready, terminating, named])| {
                let conditions = json!({"ready": ready, "serving": true, "terminating": terminating});
                let mut e = json!({"addresses": [format!("10.244.{net}.{last}")], "conditions": conditions});
                if named {
                    e["nodeName"] = json!(format!("n{net}"));
                }
                e
            })
            .collect();
        Step::Put(self::slice(&format!("s{n}"), names[name], json!([{"name": "p", "port": 8080}]), endpoints.into()))
    });
    let node = (1..5u8, 1..5u8, any::<bool>()).prop_map(|(name, net, silent)| {
        let annotations = if silent { json!({}) } else { json!({"podgate.io/overlay": "none"}) };
        Step::Put(self::node(&format!("n{name}"), &[&format!("10.244.{net}.0/24")], &[&format!("192.0.2.{net}")], annotations))
    });
    let remove = (0..3u8, 0..4u8).prop_map(|(kind, n)| Step::Remove(kind, n));
    let pods = prop::collection::vec(0..4u8, 0..3).prop_map(Step::Pods);
    prop_oneof![4 => service, 4 => slice, 2 => node, 2 => remove, 1 => pods]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn an_incremental_compile_equals_a_fresh_one(steps in prop::collection::vec(step(), 1..40)) {
        let (mut state, mut node) = (ClusterState::default(), local());
        let mut compiled = Compiled::empty(&Arc::new(node.clone()));
        for step in steps {
            match step {
                Step::Put(object) => state.insert(object),
                Step::Remove(kind, n) => {
                    let (kind, name) = match kind {
                        0 => ("Service", ObjectName::new("default", ["a", "b", "c", "podgate"][n as usize])),
                        1 => ("EndpointSlice", ObjectName::new("default", &format!("s{n}"))),
                        _ => ("Node", ObjectName::new("", &format!("n{n}"))),
                    };
                    state.remove(&crate::model::ObjectKey { kind: kind.into(), name });
                }
                Step::Pods(last) => node.pods = last.into_iter().map(|l| (std::net::Ipv4Addr::new(10, 244, 1, l).into(), Pod::new(1444))).collect(),
            }
            let (state, node) = (Arc::new(state.clone()), Arc::new(node.clone()));
            let next = compile(&compiled, &state, &node);
            let fresh = compile(&Compiled::empty(&node), &state, &node);
            prop_assert_eq!(contents(&next), contents(&fresh));
            if contents(&next).0 != contents(&compiled).0 {
                prop_assert!(next.snapshot.generation > compiled.snapshot.generation, "a change is a generation");
            }
            compiled = next;
        }
    }
}
