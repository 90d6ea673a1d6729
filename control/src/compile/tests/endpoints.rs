//! Rows 1 to 3: which endpoints a service port uses (upstream `pkg/proxy/topology_test.go`, `endpointslicecache_test.go`).

use super::*;

/// An endpoint of kube-proxy's tables: address, conditions (r, s, t), where it is, hints.
struct Case {
    name: &'static str,
    endpoints: Vec<Value>,
    cluster: &'static [&'static str],
    local: &'static [&'static str],
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
    let check = compiled.health_checks.values().next().unwrap();
    assert_eq!((check.port, check.local_endpoints), (32000, 0), "terminating-only is not healthy");
}

/// As [`endpoint`], with hints for these nodes.
fn for_nodes(mut endpoint: Value, nodes: &[&str]) -> Value {
    endpoint["hints"]["forNodes"] = nodes.iter().map(|n| json!({"name": n})).collect();
    endpoint
}

/// The cluster-wide list of a service with these endpoints, on a node of this zone.
fn chosen_in(zone: Option<&str>, endpoints: Vec<Value>) -> Vec<String> {
    let labels = zone.map_or(json!({}), |zone| json!({"topology.kubernetes.io/zone": zone}));
    let object = json!({"metadata": {"name": "n1", "labels": labels}, "spec": {"podCIDRs": ["10.244.1.0/24"]}});
    let node = Object::from_node(&serde_json::from_value(object).unwrap()).unwrap();
    let spec = json!({"clusterIP": "10.96.0.10", "ports": [{"port": 80}]});
    let compiled = fresh([node, service("web", spec), slice("web-1", "web", json!([{"port": 80}]), endpoints.into())]);
    list(&frontend(&compiled, "10.96.0.10:80").service.cluster)
}

#[test]
fn zone_hints_need_a_zone_and_an_endpoint_for_it() {
    let in_zones = || vec![endpoint(3, "rs", "n2", &["zone-a"]), endpoint(4, "rs", "n2", &["zone-b"]), endpoint(6, "rs", "n2", &["zone-a"])];
    let all = ["10.244.9.3:80", "10.244.9.4:80", "10.244.9.6:80"];
    assert_eq!(chosen_in(Some("zone-a"), in_zones()), ["10.244.9.3:80", "10.244.9.6:80"]);
    assert_eq!(chosen_in(Some("zone-b"), in_zones()), ["10.244.9.4:80"]);
    assert_eq!(chosen_in(Some("zone-c"), in_zones()), all, "no endpoint for this node's zone");
    assert_eq!(chosen_in(None, in_zones()), all, "a node without the label");
    assert_eq!(chosen_in(Some(""), in_zones()), all, "a node with an empty label");
}

#[test]
fn an_endpoint_with_several_zones_serves_each_of_them() {
    let endpoints = vec![
        endpoint(3, "rs", "n2", &["zone-a", "zone-b", "zone-c"]),
        endpoint(4, "rs", "n2", &["zone-b", "zone-c"]),
        endpoint(5, "rs", "n2", &["zone-b", "zone-d"]),
        endpoint(6, "rs", "n2", &["zone-c"]),
    ];
    assert_eq!(chosen_in(Some("zone-c"), endpoints), ["10.244.9.3:80", "10.244.9.4:80", "10.244.9.6:80"]);
}

#[test]
fn what_terminates_ignores_hints_since_nothing_is_ready() {
    let endpoints = vec![endpoint(3, "st", "n2", &["zone-a"]), endpoint(4, "st", "n2", &["zone-b"])];
    assert_eq!(chosen_in(Some("zone-a"), endpoints), ["10.244.9.3:80", "10.244.9.4:80"]);
}

#[test]
fn node_hints_need_one_on_every_ready_endpoint_and_fall_back_to_zones() {
    let hinted = |last, zone: &str, nodes: &[&str]| for_nodes(endpoint(last, "rs", "n2", &[zone]), nodes);
    let of = |endpoints| chosen_in(Some("zone-a"), endpoints);
    assert_eq!(of(vec![hinted(3, "zone-a", &["n1", "n2"]), hinted(4, "zone-a", &["n2"])]), ["10.244.9.3:80"]);
    // One without: the zones decide.
    assert_eq!(of(vec![hinted(3, "zone-b", &["n1"]), hinted(4, "zone-a", &[])]), ["10.244.9.4:80"]);
    // None for this node, and no zone for one of them: hints do not count at all.
    let without_zone = for_nodes(endpoint(5, "rs", "n2", &[]), &["n2"]);
    assert_eq!(of(vec![hinted(3, "zone-a", &["n2"]), without_zone]), ["10.244.9.3:80", "10.244.9.5:80"]);
    // Of those that are not ready nobody asks for hints.
    let unready = endpoint(6, "", "n1", &[]);
    assert_eq!(of(vec![hinted(3, "zone-b", &["n1"]), hinted(4, "zone-a", &["n2"]), unready]), ["10.244.9.3:80"]);
}

// Upstream `TestEndpointsMapFromESC`.
#[test]
fn slices_of_one_service_are_a_union_by_address_and_port() {
    let spec = json!({"clusterIP": "10.96.0.10", "ports": [{"name": "port-0", "port": 80}, {"name": "port-1", "port": 443}]});
    let of = |slices: Vec<Object>| {
        let compiled = fresh([n1(), service("svc1", spec.clone())].into_iter().chain(slices));
        ["10.96.0.10:80", "10.96.0.10:443"].map(|address| list(&frontend(&compiled, address).service.cluster).join(" "))
    };
    let at = |addresses: &[&str]| addresses.iter().map(|a| json!({"addresses": [a]})).collect::<Value>();
    let http = || json!([{"name": "port-0", "port": 80}]);
    let both = json!([{"name": "port-0", "port": 80}, {"name": "port-1", "port": 443}]);
    assert_eq!(of(vec![slice("a", "svc1", both, at(&["10.0.1.1", "10.0.1.2"]))]), ["10.0.1.1:80 10.0.1.2:80", "10.0.1.1:443 10.0.1.2:443"]);
    let two = |first: &[&str], second: &[&str]| of(vec![slice("a", "svc1", http(), at(first)), slice("b", "svc1", http(), at(second))]);
    assert_eq!(two(&["10.0.1.1"], &["10.0.2.1"]), ["10.0.1.1:80 10.0.2.1:80", ""]);
    assert_eq!(two(&["10.0.1.1", "10.0.1.2"], &["10.0.1.2", "10.0.1.3"]), ["10.0.1.1:80 10.0.1.2:80 10.0.1.3:80", ""]);
    assert_eq!(of(vec![slice("a", "svc1", json!([{"name": "port-0"}]), at(&["10.0.1.1"]))]), ["", ""], "an absent port is skipped");
    let other_port = slice("b", "svc1", json!([{"name": "port-0", "port": 8080}]), at(&["10.0.1.1"]));
    assert_eq!(of(vec![slice("a", "svc1", http(), at(&["10.0.1.1"])), other_port]), ["10.0.1.1:80 10.0.1.1:8080", ""], "one address, two ports");
}

#[test]
fn slices_of_other_services_and_namespaces_are_not_this_ones() {
    let elsewhere = json!({"metadata": {"name": "web-1", "namespace": "other", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4", "ports": [{"port": 80}], "endpoints": [{"addresses": ["10.0.3.1"]}]});
    let compiled = fresh([
        n1(),
        service("web", json!({"clusterIP": "10.96.0.10", "ports": [{"port": 80}]})),
        slice("web-1", "web", json!([{"port": 80}]), json!([{"addresses": ["10.0.1.1"]}])),
        slice("db-1", "db", json!([{"port": 80}]), json!([{"addresses": ["10.0.2.1"]}])),
        Object::from_slice(&serde_json::from_value(elsewhere).unwrap()).unwrap(),
    ]);
    assert_eq!(list(&frontend(&compiled, "10.96.0.10:80").service.cluster), ["10.0.1.1:80"]);
}

#[test]
fn of_two_that_are_one_endpoint_the_one_that_stays_wins_in_either_order() {
    for (first, second) in [("st", "rs"), ("rs", "st")] {
        let compiled = fresh([
            n1(),
            service("web", json!({"clusterIP": "10.96.0.10", "ports": [{"port": 80}]})),
            slice("web-1", "web", json!([{"port": 80}]), json!([endpoint(1, first, "n1", &[])])),
            slice("web-2", "web", json!([{"port": 80}]), json!([endpoint(1, second, "n1", &[])])),
        ]);
        let [backend] = &compiled.backends()[..] else { panic!("one endpoint") };
        assert_eq!((backend.ready, backend.terminating, backend.used), (true, false, true));
    }
}

#[test]
fn endpoints_that_no_api_server_would_take_are_left_out() {
    let endpoints = json!([{"addresses": ["127.0.0.1"]}, {"addresses": ["169.254.1.1"]}, {"addresses": ["224.0.0.1"]}, {"addresses": ["10.0.1.1"]}]);
    let compiled = fresh([
        n1(),
        service("web", json!({"clusterIP": "10.96.0.10", "ports": [{"port": 80}]})),
        slice("web-1", "web", json!([{"port": 80}]), endpoints),
    ]);
    assert_eq!(list(&frontend(&compiled, "10.96.0.10:80").service.cluster), ["10.0.1.1:80"]);
}

#[test]
fn operators_see_why_the_list_of_this_node_is_as_it_is() {
    let endpoints = json!([endpoint(1, "rs", "n2", &[]), endpoint(2, "st", "n1", &[]), endpoint(3, "rs", "n1", &[]), endpoint(4, "", "n1", &[])]);
    let spec = json!({"clusterIP": "10.96.0.10", "externalTrafficPolicy": "Local", "type": "NodePort", "ports": [{"port": 80}]});
    let compiled = fresh([n1(), service("web", spec), slice("web-1", "web", json!([{"port": 80}]), endpoints)]);
    let seen: Vec<_> = compiled.backends().into_iter().map(|b| (b.used_locally, b.local_reason)).collect();
    assert_eq!(seen, [(false, "on another node"), (false, "terminating, and others are ready"), (true, "ready"), (false, "not ready")]);
}
