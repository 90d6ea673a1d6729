//! Row 24, and that the cost of a change follows the change; then the promise that an incremental compile equals a fresh one.

use proptest::prelude::*;

use super::*;

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

// Upstream `TestBuildServiceMapAddRemove` and `TestBuildServiceMapServiceUpdate`.
#[test]
fn service_ports_and_health_checks_come_and_go_with_their_service() {
    let local = Arc::new(local());
    let ports = json!([{"name": "p1", "protocol": "UDP", "port": 1234}, {"name": "p2", "port": 1235}]);
    let cluster_ip = || service("svc1", json!({"clusterIP": "10.96.0.4", "ports": ports}));
    let load_balancer = || {
        let spec =
            json!({"type": "LoadBalancer", "clusterIP": "10.96.0.4", "externalTrafficPolicy": "Local", "healthCheckNodePort": 32000, "ports": ports});
        service_with_status("svc1", spec, json!({"loadBalancer": {"ingress": [{"ip": "198.18.0.3"}]}}))
    };
    let mut compiled = fresh_for(&local, [n1(), cluster_ip()]);
    let mut step = |objects: Vec<Object>| {
        compiled = compile(&compiled, &Arc::new(objects.into_iter().chain([n1()]).collect()), &local);
        let lines: Vec<String> = compiled.changes.iter().map(ToString::to_string).collect();
        let served = compiled.services().iter().filter(|s| s.service.starts_with("default/")).count();
        (served, compiled.health_checks.len(), lines)
    };
    let updated = [
        "Updating existing service port default/svc1:p1 at 10.96.0.4:1234/UDP",
        "Updating existing service port default/svc1:p2 at 10.96.0.4:1235/TCP",
    ];
    assert_eq!(step(vec![load_balancer()]), (2, 1, updated.map(String::from).to_vec()));
    assert_eq!(step(vec![load_balancer()]), (2, 1, vec![]), "no change, no line");
    assert_eq!(step(vec![cluster_ip()]), (2, 0, updated.map(String::from).to_vec()));
    let one = service("svc1", json!({"clusterIP": "10.96.0.4", "ports": [{"name": "p2", "port": 1235}]}));
    assert_eq!(step(vec![one]), (1, 0, vec!["Removing service port default/svc1:p1 at 10.96.0.4:1234/UDP".into()]));
    assert_eq!(step(vec![]), (0, 0, vec!["Removing service port default/svc1:p2 at 10.96.0.4:1235/TCP".into()]));
}

/// What two snapshots must agree on: everything but generation and pointers.
fn contents(compiled: &Compiled) -> (Map<FrontendKey, Frontend>, String) {
    let s = &compiled.snapshot;
    let mut pods: Vec<_> = s.pods.iter().map(|(a, p)| (a, p.clone())).collect();
    pods.sort_by_key(|(a, _)| *a);
    let Compiled { warnings, contested, apart, health_checks, .. } = compiled;
    let rest =
        format!("{:?} {:?} {:?} {:?} {pods:?} {warnings:?} {contested:?} {apart:?} {health_checks:?}", s.node, s.routes, s.peers, s.peer_by_underlay);
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
