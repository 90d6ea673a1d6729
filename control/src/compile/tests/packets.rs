//! Rows 6, 7, 8, 19, 21 and 22: what becomes of a client's first packet by the compiled tables, as upstream's `pkg/proxy/nftables/proxier_test.go`
//! asks it of its rules (its `packetFlowTest`s: inputs and expected outcomes, in this file's addresses).
//!
//! `masq` says that the source is replaced. Where upstream replaces the node's own address it stays here if the endpoint is a pod: it names
//! this node already, and every pod's reply to it comes back here (ARCHITECTURE.md). Those rows say so.

use std::collections::BTreeSet;
use std::net::IpAddr;

use podgate_core::addr::Tuple;
use podgate_core::admit;
use podgate_core::decide::{Decision, Hop, Say, Source, decide};
use podgate_core::flow::{Now, OwnedFlows};
use podgate_core::packet::{Ingress, Network, Offload, Outer, Packet};
use podgate_core::parse::{Parsed, Transport};

use super::*;

const POD: &str = "10.244.1.11";
const NODE: &str = "192.0.2.1";
const OUTSIDE: &str = "198.51.100.5";

/// Which endpoints new connections reach, in order, and `masq`; or `REJECT`, `DROP`, and nothing for what is no service's.
fn heard(compiled: &Compiled, protocol: u8, from: &str, to: &str) -> String {
    let snapshot = &compiled.snapshot;
    let flows = OwnedFlows::new(64, [1, 2]);
    let (from, to): (IpAddr, std::net::SocketAddr) = (from.parse().unwrap(), to.parse().unwrap());
    let src = Addr::from(from);
    let ingress = match (snapshot.pods.get(src), snapshot.routes.lookup(src)) {
        (Some(_), _) => Ingress::Pods,
        (None, Some(peer)) => Ingress::Overlay(Outer { src: snapshot.peers[*peer as usize].underlay.into(), ecn: 0, network: Network::Cluster }),
        (None, None) => Ingress::Host,
    };
    let transport_kind = if protocol == 6 { Transport::Tcp { flags: 0x02, header_len: 20 } } else { Transport::Udp };
    let transport = if from.is_ipv4() { 20 } else { 40 };
    let (mut endpoints, mut sources, mut others) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    // The choice goes by the client's port: these are enough for each endpoint to be chosen.
    for src_port in 20_000..20_200 {
        let tuple = Tuple { src, dst: to.ip().into(), src_port, dst_port: to.port(), protocol };
        let parsed = Parsed { tuple, transport, len: 60, ttl: 64, traffic_class: 0, dont_fragment: true, fragment: None, transport_kind };
        let mut packet = Packet { head: &mut [], tail_len: 0, offload: Offload::default(), ingress };
        let sender = match admit::admit(snapshot, &mut packet, &parsed) {
            Ok(sender) => sender,
            Err(_) => {
                others.insert("DROP");
                continue;
            }
        };
        let table = flows.table();
        match decide(snapshot, &table, &packet, &parsed, table.hash(&tuple), sender, Now(0)) {
            Decision::Open(opening) if opening.service != 0 => {
                endpoints.insert(std::net::SocketAddr::new(opening.to.0.ip(), opening.to.1));
                sources.insert(opening.source == Source::Keep);
            }
            Decision::Refuse(_, Say::Reject) => {
                others.insert("REJECT");
            }
            Decision::Refuse(..) => {
                others.insert("DROP");
            }
            Decision::Plain(Hop::Node) => {
                others.insert("");
            }
            other => panic!("{from} to {to}: {other:?}"),
        }
    }
    if endpoints.is_empty() {
        return others.into_iter().collect::<Vec<_>>().join(" or ");
    }
    assert!(others.is_empty(), "{from} to {to}: {endpoints:?}, and sometimes {others:?}");
    let list = endpoints.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    match sources.into_iter().collect::<Vec<_>>()[..] {
        [true] => list,
        [false] => format!("{list} masq"),
        _ => format!("{list} sometimes masq"),
    }
}

#[track_caller]
fn check(compiled: &Compiled, rows: &[(&str, &str, &str, &str)]) {
    for (what, from, to, expected) in rows {
        assert_eq!(heard(compiled, 6, from, to), *expected, "{what}: {from} to {to}");
    }
}

/// This node with some attached pods.
fn here() -> Arc<LocalNode> {
    let mut local = local();
    local.pods.extend([POD, "10.244.1.12", "fd00:77:1::11"].map(|ip| (ip.parse().unwrap(), Pod::new(1444))));
    Arc::new(local)
}

/// A service with an endpoint here and one elsewhere, of each policy.
fn with_policies(name: &str, last: u8, internal: &str, external: &str) -> [Object; 2] {
    let spec = json!({"type": "LoadBalancer", "clusterIP": format!("10.96.0.{last}"), "externalIPs": [format!("203.0.113.{last}")],
        "internalTrafficPolicy": internal, "externalTrafficPolicy": external,
        "ports": [{"name": "p80", "port": 80, "nodePort": 30000 + u16::from(last)}]});
    let status = json!({"loadBalancer": {"ingress": [{"ip": format!("198.18.0.{last}")}]}});
    let endpoints = json!([{"addresses": ["10.244.1.10"], "nodeName": "n1"}, {"addresses": ["10.244.2.10"], "nodeName": "n2"}]);
    [service_with_status(name, spec, status), slice(&format!("{name}-1"), name, json!([{"name": "p80", "port": 80}]), endpoints)]
}

const BOTH: &str = "10.244.1.10:80, 10.244.2.10:80";
const BOTH_MASQ: &str = "10.244.1.10:80, 10.244.2.10:80 masq";
const LOCAL: &str = "10.244.1.10:80";
const LOCAL_MASQ: &str = "10.244.1.10:80 masq";

// Upstream `TestInternalExternalMasquerade`, `TestExternalTrafficPolicyLocal` and `TestExternalTrafficPolicyCluster`.
#[test]
fn policies_decide_who_reaches_which_endpoint_with_which_source() {
    let mut objects = vec![n1(), n2()];
    objects.extend(with_policies("svc1", 41, "Cluster", "Cluster"));
    objects.extend(with_policies("svc2", 42, "Cluster", "Local"));
    objects.extend(with_policies("svc3", 43, "Local", "Cluster"));
    objects.extend(with_policies("svc4", 44, "Local", "Local"));
    let compiled = fresh_for(&here(), objects);
    check(
        &compiled,
        &[
            ("pod to ClusterIP", POD, "10.96.0.41:80", BOTH),
            ("pod to NodePort", POD, "192.0.2.1:30041", BOTH_MASQ),
            ("pod to LB", POD, "198.18.0.41:80", BOTH_MASQ),
            ("pod to external IP", POD, "203.0.113.41:80", BOTH_MASQ),
            ("node to ClusterIP (upstream: masq)", NODE, "10.96.0.41:80", BOTH),
            ("node to NodePort (upstream: masq)", NODE, "192.0.2.1:30041", BOTH),
            ("node to LB (upstream: masq)", NODE, "198.18.0.41:80", BOTH),
            ("external to ClusterIP", OUTSIDE, "10.96.0.41:80", BOTH_MASQ),
            ("external to NodePort", OUTSIDE, "192.0.2.1:30041", BOTH_MASQ),
            ("external to LB", OUTSIDE, "198.18.0.41:80", BOTH_MASQ),
            ("external to external IP", OUTSIDE, "203.0.113.41:80", BOTH_MASQ),
            ("pod to ClusterIP with eTP:Local", POD, "10.96.0.42:80", BOTH),
            ("pod to NodePort with eTP:Local", POD, "192.0.2.1:30042", BOTH),
            ("pod to LB with eTP:Local", POD, "198.18.0.42:80", BOTH),
            ("pod to external IP with eTP:Local", POD, "203.0.113.42:80", BOTH),
            ("node to ClusterIP with eTP:Local (upstream: masq)", NODE, "10.96.0.42:80", BOTH),
            ("node to NodePort with eTP:Local (upstream: masq)", NODE, "192.0.2.1:30042", BOTH),
            ("node to LB with eTP:Local (upstream: masq)", NODE, "198.18.0.42:80", BOTH),
            ("external to ClusterIP with eTP:Local", OUTSIDE, "10.96.0.42:80", BOTH_MASQ),
            ("external to NodePort with eTP:Local", OUTSIDE, "192.0.2.1:30042", LOCAL),
            ("external to LB with eTP:Local", OUTSIDE, "198.18.0.42:80", LOCAL),
            ("external to external IP with eTP:Local", OUTSIDE, "203.0.113.42:80", LOCAL),
            ("pod to ClusterIP with iTP:Local", POD, "10.96.0.43:80", LOCAL),
            ("pod to NodePort with iTP:Local", POD, "192.0.2.1:30043", BOTH_MASQ),
            ("pod to LB with iTP:Local", POD, "198.18.0.43:80", BOTH_MASQ),
            ("node to ClusterIP with iTP:Local (upstream: masq)", NODE, "10.96.0.43:80", LOCAL),
            ("node to NodePort with iTP:Local (upstream: masq)", NODE, "192.0.2.1:30043", BOTH),
            ("node to LB with iTP:Local (upstream: masq)", NODE, "198.18.0.43:80", BOTH),
            ("external to ClusterIP with iTP:Local", OUTSIDE, "10.96.0.43:80", LOCAL_MASQ),
            ("external to NodePort with iTP:Local", OUTSIDE, "192.0.2.1:30043", BOTH_MASQ),
            ("external to LB with iTP:Local", OUTSIDE, "198.18.0.43:80", BOTH_MASQ),
            ("pod to ClusterIP with both", POD, "10.96.0.44:80", LOCAL),
            ("pod to LB with both", POD, "198.18.0.44:80", BOTH),
            ("external to LB with both", OUTSIDE, "198.18.0.44:80", LOCAL),
            ("the endpoint itself to ClusterIP with iTP:Local: hairpin", "10.244.1.10", "10.96.0.43:80", LOCAL_MASQ),
        ],
    );
}

// Upstream `TestClusterIPGeneral`.
#[test]
fn cluster_ips_are_told_apart_by_port_and_protocol() {
    let ports = json!([{"name": "http", "port": 80}, {"name": "https", "port": 443}, {"name": "dns-udp", "protocol": "UDP", "port": 53},
        {"name": "dns-tcp", "port": 53}, {"name": "dns-sctp", "protocol": "SCTP", "port": 53}]);
    let targets = json!([{"name": "http", "port": 80}, {"name": "https", "port": 8443}, {"name": "dns-udp", "protocol": "UDP", "port": 53},
        {"name": "dns-tcp", "port": 5353}, {"name": "dns-sctp", "protocol": "SCTP", "port": 53}]);
    let endpoints = json!([{"addresses": ["10.244.1.10"], "nodeName": "n1"}, {"addresses": ["10.244.2.10"], "nodeName": "n2"}]);
    let compiled = fresh_for(
        &here(),
        [
            n1(),
            n2(),
            service("svc1", json!({"clusterIP": "10.96.0.41", "ports": [{"name": "http", "port": 80}]})),
            slice("svc1-1", "svc1", json!([{"name": "http", "port": 80}]), json!([{"addresses": ["10.244.1.10"], "nodeName": "n1"}])),
            service("svc2", json!({"clusterIP": "10.96.0.42", "ports": ports})),
            slice("svc2-1", "svc2", targets, endpoints),
        ],
    );
    check(
        &compiled,
        &[
            ("simple clusterIP", POD, "10.96.0.41:80", LOCAL),
            ("hairpin to cluster IP", "10.244.1.10", "10.96.0.41:80", LOCAL_MASQ),
            ("clusterIP with multiple endpoints", POD, "10.96.0.42:80", BOTH),
            ("clusterIP with TargetPort", POD, "10.96.0.42:443", "10.244.1.10:8443, 10.244.2.10:8443"),
            ("TCP and UDP on the same port (TCP)", POD, "10.96.0.42:53", "10.244.1.10:5353, 10.244.2.10:5353"),
            ("svc1 does not accept svc2's ports", POD, "10.96.0.41:443", "REJECT"),
            ("packet to unallocated cluster ip", POD, "10.96.0.50:80", "DROP"),
            ("the same from the node", NODE, "10.96.0.50:80", "DROP"),
            ("the same from outside", OUTSIDE, "10.96.0.50:80", "DROP"),
        ],
    );
    assert_eq!(heard(&compiled, 17, POD, "10.96.0.42:53"), "10.244.1.10:53, 10.244.2.10:53");
    assert_eq!(heard(&compiled, 17, POD, "10.96.0.42:80"), "REJECT", "a TCP-only port does not match UDP traffic");
    let sctp = compiled.services().into_iter().find(|s| s.service == "default/svc2:dns-sctp").unwrap();
    assert_eq!((sctp.protocol, sctp.cluster_backends), (Protocol::Sctp, 2), "a service port of its own");
    let warnings: Vec<String> = compiled.warnings.iter().map(ToString::to_string).collect();
    assert_eq!(warnings, ["Service default/svc2: its port 53/SCTP is not served: SCTP reaches endpoints by their own addresses alone; dial those"]);
}

// Upstream `TestLoadBalancer`.
#[test]
fn source_ranges_guard_the_load_balancers_address_alone() {
    let spec = json!({"type": "LoadBalancer", "clusterIP": "10.96.0.41", "ports": [{"name": "p80", "port": 80, "nodePort": 30041}],
        // The second one has a blank.
        "loadBalancerSourceRanges": ["192.0.2.0/24", " 198.51.100.0/25"]});
    let status = json!({"loadBalancer": {"ingress": [{"ip": "198.18.0.1"}, {"ip": "198.18.0.2"}]}});
    let endpoints = json!([{"addresses": ["10.244.2.10"], "nodeName": "n2"}]);
    let objects = [n1(), n2(), service_with_status("svc1", spec, status), slice("svc1-1", "svc1", json!([{"name": "p80", "port": 80}]), endpoints)];
    let blocked = "198.51.100.200";
    let compiled = fresh_for(&here(), objects.clone());
    let (endpoint, masq) = ("10.244.2.10:80", "10.244.2.10:80 masq");
    check(
        &compiled,
        &[
            ("pod to cluster IP", POD, "10.96.0.41:80", endpoint),
            ("external to nodePort", OUTSIDE, "192.0.2.1:30041", masq),
            ("nodePort bypasses LoadBalancerSourceRanges", blocked, "192.0.2.1:30041", masq),
            ("accepted external to LB1", OUTSIDE, "198.18.0.1:80", masq),
            ("accepted external to LB2", OUTSIDE, "198.18.0.2:80", masq),
            ("blocked external to LB1", blocked, "198.18.0.1:80", "DROP"),
            ("blocked external to LB2", blocked, "198.18.0.2:80", "DROP"),
            ("pod to LB1 (blocked by LoadBalancerSourceRanges)", POD, "198.18.0.1:80", "DROP"),
            ("pod to LB2 (blocked by LoadBalancerSourceRanges)", POD, "198.18.0.2:80", "DROP"),
            ("node to LB1 (allowed by LoadBalancerSourceRanges; upstream: masq)", NODE, "198.18.0.1:80", endpoint),
            ("node to LB2 (allowed by LoadBalancerSourceRanges; upstream: masq)", NODE, "198.18.0.2:80", endpoint),
        ],
    );
    // "Same node to LB1, SNATted to LB1 (implicitly allowed)": such a node has the address, and says so with it.
    let mut with_vip = (*here()).clone();
    with_vip.addresses.push("198.18.0.1".parse().unwrap());
    let compiled = fresh_for(&Arc::new(with_vip), objects);
    assert_eq!(heard(&compiled, 6, "198.18.0.1", "198.18.0.1:80"), endpoint);
    assert_eq!(heard(&compiled, 6, "198.18.0.2", "198.18.0.2:80"), "DROP", "an address of nobody's here is forged");
}

// Upstream `TestNodePorts`: `--nodeport-addresses` in its combinations, both families.
#[test]
fn node_ports_are_on_the_chosen_addresses_and_on_no_others() {
    let spec = json!({"type": "NodePort", "clusterIPs": ["10.96.0.41", "fd00:96::41"], "ports": [{"name": "p80", "port": 80, "nodePort": 30041}]});
    let ports = json!([{"name": "p80", "port": 80}]);
    let v4 = json!([{"addresses": ["10.244.1.10"], "nodeName": "n1"}, {"addresses": ["10.244.2.10"]}]);
    let v6 = json!([{"addresses": ["fd00:77:2::10"], "nodeName": "n2"}]);
    let objects = [n1(), n2(), service("svc1", spec), slice("svc1-4", "svc1", ports.clone(), v4), slice("svc1-6", "svc1", ports, v6)];
    let ranges = |ranges: &[&str]| NodePortAddresses::Within(ranges.iter().map(|range| range.parse().unwrap()).collect());
    let (v6_pod, v6_outside, v6_masq) = ("fd00:77:1::11", "2001:db8:5::1", "[fd00:77:2::10]:80 masq");
    for (what, chosen, alternate) in [
        ("the primary addresses", NodePortAddresses::Primary, false),
        ("several ranges", ranges(&["192.0.2.0/24", "192.0.3.0/24", "2001:db8::/64", "2001:db8:1::2/128"]), true),
    ] {
        let mut local = (*here()).clone();
        local.addresses.extend(["192.0.3.2".parse::<IpAddr>().unwrap(), "2001:db8:1::2".parse().unwrap()]);
        local.settings.node_port_addresses = chosen;
        let compiled = fresh_for(&Arc::new(local), objects.clone());
        let (alternate_v4, alternate_v6) = if alternate { (BOTH_MASQ, v6_masq) } else { ("", "") };
        println!("{what}");
        check(
            &compiled,
            &[
                ("pod to cluster IP", POD, "10.96.0.41:80", BOTH),
                ("external to nodePort", OUTSIDE, "192.0.2.1:30041", BOTH_MASQ),
                ("node to nodePort (upstream: masq)", NODE, "192.0.2.1:30041", BOTH),
                ("external to nodePort on secondary IP", OUTSIDE, "192.0.3.2:30041", alternate_v4),
                ("pod to cluster IP, IPv6", v6_pod, "[fd00:96::41]:80", "[fd00:77:2::10]:80"),
                ("external to nodePort, IPv6", v6_outside, "[2001:db8::1]:30041", v6_masq),
                ("external to nodePort on secondary IP, IPv6", v6_outside, "[2001:db8:1::2]:30041", alternate_v6),
            ],
        );
    }
}

// Upstream `TestTerminatingEndpointsTrafficPolicyLocal` and `...Cluster`.
#[test]
fn what_terminates_is_used_only_where_nothing_is_ready() {
    let spec = |external: &str| json!({"type": "LoadBalancer", "clusterIP": "10.96.0.41", "externalTrafficPolicy": external, "healthCheckNodePort": 30000, "ports": [{"port": 80}]});
    let status = json!({"loadBalancer": {"ingress": [{"ip": "198.18.0.41"}]}});
    let at = |address: &str, node: &str, conditions: &str| {
        json!({"addresses": [address], "nodeName": node, "conditions": {"ready": conditions == "ready", "serving": conditions != "gone",
            "terminating": conditions != "ready"}})
    };
    let (here_1, here_2) = (|c: &str| at("10.244.1.10", "n1", c), |c: &str| at("10.244.1.11", "n1", c));
    let (there_1, there_2) = (|c: &str| at("10.244.2.10", "n2", c), |c: &str| at("10.244.2.11", "n2", c));
    // Endpoints; what a pod reaches by the cluster IP, somebody outside by the load balancer under Local and under Cluster.
    let cases = [
        (
            "ready endpoints exist",
            vec![here_1("ready"), here_2("serving"), there_1("ready"), there_2("gone")],
            ["10.244.1.10:80, 10.244.2.10:80", "10.244.1.10:80", "10.244.1.10:80, 10.244.2.10:80 masq"],
        ),
        (
            "only terminating endpoints exist",
            vec![here_1("serving"), here_2("gone"), there_1("serving"), there_2("gone")],
            ["10.244.1.10:80, 10.244.2.10:80", "10.244.1.10:80", "10.244.1.10:80, 10.244.2.10:80 masq"],
        ),
        (
            "only terminating endpoints here, ready ones elsewhere",
            vec![here_1("serving"), here_2("gone"), there_1("ready")],
            ["10.244.2.10:80", "10.244.1.10:80", "10.244.2.10:80 masq"],
        ),
        ("terminating endpoints on a remote node", vec![there_1("serving")], ["10.244.2.10:80", "DROP", "10.244.2.10:80 masq"]),
        ("no usable endpoints on any node", vec![here_1("gone"), there_1("gone")], ["REJECT"; 3]),
        ("no endpoints", vec![], ["REJECT"; 3]),
    ];
    for (what, endpoints, [pod, under_local, under_cluster]) in cases {
        for (external, expected) in [("Local", under_local), ("Cluster", under_cluster)] {
            let slice = slice("svc1-1", "svc1", json!([{"port": 80}]), endpoints.clone().into());
            let compiled = fresh_for(&here(), [n1(), n2(), service_with_status("svc1", spec(external), status.clone()), slice]);
            // One of the endpoints must not dial: a hairpin has its source replaced.
            assert_eq!(heard(&compiled, 6, "10.244.1.12", "10.96.0.41:80"), pod, "{what}: pod to clusterIP");
            assert_eq!(heard(&compiled, 6, OUTSIDE, "198.18.0.41:80"), expected, "{what}: external to LB, {external}");
        }
    }
}

// Upstream `TestNonLocalExternalIPs`, `TestExternalIPsReject`, `TestOnlyLocalExternalIPs`; the allow-list is ours.
#[test]
fn external_ips_are_served_inside_the_allow_list_alone() {
    let spec = |external: &str| json!({"clusterIP": "10.96.0.41", "externalIPs": ["203.0.113.41", "198.18.9.9"], "externalTrafficPolicy": external, "ports": [{"port": 80}]});
    let remote = || slice("svc1-1", "svc1", json!([{"port": 80}]), json!([{"addresses": ["10.244.2.10"], "nodeName": "n2"}]));
    let compiled = fresh_for(&here(), [n1(), n2(), service("svc1", spec("Cluster")), remote()]);
    assert_eq!(heard(&compiled, 6, OUTSIDE, "203.0.113.41:80"), "10.244.2.10:80 masq");
    assert!(compiled.snapshot.services.get(&key("198.18.9.9:80")).is_none(), "outside the allow-list");
    let compiled = fresh_for(&here(), [n1(), n2(), service("svc1", spec("Local")), remote()]);
    check(
        &compiled,
        &[
            ("external to external IP with eTP:Local and no local endpoint", OUTSIDE, "203.0.113.41:80", "DROP"),
            ("pod to external IP with eTP:Local", POD, "203.0.113.41:80", "10.244.2.10:80"),
        ],
    );
    let compiled = fresh_for(&here(), [n1(), service("svc1", spec("Cluster"))]);
    check(
        &compiled,
        &[
            ("no endpoint, external IP", OUTSIDE, "203.0.113.41:80", "REJECT"),
            ("no endpoint, cluster IP", POD, "10.96.0.41:80", "REJECT"),
            ("a port of the external IP that no service has", OUTSIDE, "203.0.113.41:81", "REJECT"),
        ],
    );
}

// Row 22: processes on nodes as endpoints. Their replies pass this gateway only if the source is one that is routed to it.
#[test]
fn host_network_endpoints_are_reached_from_everywhere() {
    let both = json!([{"addresses": ["192.0.2.1"], "nodeName": "n1"}, {"addresses": ["192.0.2.2"], "nodeName": "n2"}]);
    let spec = json!({"type": "NodePort", "clusterIP": "10.96.0.1", "ports": [{"port": 443, "nodePort": 30443}]});
    let objects = [n1(), n2(), service("kubernetes", spec), slice("k-1", "kubernetes", json!([{"port": 6443}]), both)];
    let compiled = fresh_for(&here(), objects);
    let nodes = "192.0.2.1:6443, 192.0.2.2:6443";
    let masq = "192.0.2.1:6443, 192.0.2.2:6443 masq";
    check(
        &compiled,
        &[
            ("pod to ClusterIP", POD, "10.96.0.1:443", nodes),
            ("node to ClusterIP", NODE, "10.96.0.1:443", masq),
            ("external to NodePort", OUTSIDE, "192.0.2.1:30443", masq),
        ],
    );
}

// Row 21: a pod's host port leads to that pod alone, with the client's own address.
#[test]
fn a_host_port_leads_to_its_pod_with_the_clients_address() {
    let mut local = (*here()).clone();
    let to = POD.parse().unwrap();
    local.host_ports = vec![HostPort { pod: "default/web-0".into(), protocol: Protocol::Tcp, address: None, port: 8080, to, to_port: 80 }];
    let compiled = fresh_for(&Arc::new(local), [n1(), n2()]);
    check(
        &compiled,
        &[
            ("external", OUTSIDE, "192.0.2.1:8080", "10.244.1.11:80"),
            ("another pod", "10.244.1.10", "192.0.2.1:8080", "10.244.1.11:80"),
            ("the pod itself", POD, "192.0.2.1:8080", "10.244.1.11:80 masq"),
            ("the node", NODE, "192.0.2.1:8080", "10.244.1.11:80"),
        ],
    );
}
