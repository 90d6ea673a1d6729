//! Rows 4, 5, 8, 19 and 21: what of a service can be dialled (upstream `pkg/proxy/servicechangetracker_test.go`).

use super::*;

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
fn a_node_port_is_known_at_peers_where_its_clients_may_be_answered_directly() {
    let spec =
        |policy| json!({"type": "NodePort", "clusterIP": "10.96.0.10", "externalTrafficPolicy": policy, "ports": [{"port": 80, "nodePort": 30080}]});
    let compiled_with = |vni, policy, overlay| {
        let mut local = local();
        local.settings.direct_return_vni = vni;
        let n2 = node("n2", &["10.244.2.0/24"], &["192.0.2.2"], json!({"podgate.io/overlay": overlay}));
        fresh_for(&Arc::new(local), [n1(), n2, service("web", spec(policy))])
    };
    let at_a_peer = |compiled: &Compiled| compiled.snapshot.services.iter().filter(|(_, frontend)| frontend.face == Face::PeersNodePort).count();
    let on = compiled_with(Some(2), "Cluster", "directReturnVni=2");
    assert_eq!(at_a_peer(&on), 1);
    assert!(frontend(&on, "0.0.0.0:30080").face == Face::PeersNodePort && on.snapshot.peers[0].direct_return);
    let addresses = &on.snapshot.node.direct_return.as_ref().unwrap().addresses;
    assert!(addresses.contains(&"192.0.2.1".parse::<std::net::IpAddr>().unwrap().into()));
    assert!(
        on.services().iter().all(|view| view.frontends.iter().all(|face| !face.address.starts_with("0.0.0.0"))),
        "operators see what can be dialled"
    );
    assert!(!compiled_with(Some(2), "Cluster", "vni=1").snapshot.peers[0].direct_return, "the peer does not take part");
    assert!(!compiled_with(Some(2), "Cluster", "directReturnVni=3").snapshot.peers[0].direct_return, "the peer has another VNI");
    assert_eq!(at_a_peer(&compiled_with(Some(2), "Local", "directReturnVni=2")), 0, "only its own endpoints answer at each node");
    let off = compiled_with(None, "Cluster", "directReturnVni=2");
    assert!(at_a_peer(&off) == 0 && off.snapshot.node.direct_return.is_none() && !off.snapshot.peers[0].direct_return);
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
fn a_services_id_never_changes() {
    // Flows on disk hold it: these figures are part of the format.
    assert_eq!(service::service_id("default/web:http", 6, service::Family::V4), 0x735c_f472_b984_bdd3);
    assert_eq!(service::service_id("kube-system/kube-dns:dns", 17, service::Family::V6), 0xafc0_83d1_1f9e_b613);
}

/// Every face of the services in `objects`, but for the gateway's own.
fn faces(objects: impl IntoIterator<Item = Object>) -> Vec<String> {
    let compiled = fresh(objects);
    let own = |f: &Frontend| f.service.name.starts_with("podgate/");
    let all = compiled.snapshot.services.iter().filter(|(_, f)| !own(f));
    let mut all: Vec<String> = all.map(|(key, f)| format!("{} {}:{} {}", f.face.name(), key.addr, key.port, key.protocol)).collect();
    all.sort();
    all
}

fn of_service(spec: Value, status: Value) -> Vec<String> {
    faces([n1(), service_with_status("svc", spec, status)])
}

// Upstream `TestServiceToServiceMap`; its `ipFamily` is one of two proxiers, and here both are one.
#[test]
fn a_service_is_of_the_families_of_its_cluster_ips() {
    let ingress = json!({"loadBalancer": {"ingress": [{"ip": "198.18.0.1"}, {"ip": "2001:db8:ffff::80"}]}});
    let ports = json!([{"name": "testPort", "port": 12345}]);
    let both = json!(["203.0.113.9", "2001:db8:9::9"]);
    assert_eq!(
        of_service(json!({"clusterIP": "fd00:96::1", "ports": ports, "externalIPs": both}), ingress.clone()),
        ["ClusterIP fd00:96::1:12345 6", "LoadBalancer 2001:db8:ffff::80:12345 6"],
        "an external IP of its family is not in the allow-list"
    );
    assert_eq!(
        of_service(json!({"clusterIP": "10.96.0.1", "ports": ports, "externalIPs": both}), ingress.clone()),
        ["ClusterIP 10.96.0.1:12345 6", "ExternalIP 203.0.113.9:12345 6", "LoadBalancer 198.18.0.1:12345 6"]
    );
    assert_eq!(of_service(json!({"clusterIP": "None", "ports": ports, "externalIPs": both}), ingress.clone()), [""; 0]);
    assert_eq!(of_service(json!({"type": "ExternalName", "clusterIP": "10.96.0.4", "externalName": "x", "ports": ports}), ingress), [""; 0]);
}

#[test]
fn source_ranges_are_sorted_by_family() {
    let spec = json!({"type": "LoadBalancer", "clusterIPs": ["10.96.0.1", "fd00:96::1"], "ports": [{"port": 80}],
        "loadBalancerSourceRanges": [" 198.51.100.0/28", "2001:db8:1::/48"]});
    let status = json!({"loadBalancer": {"ingress": [{"ip": "198.18.0.1"}, {"ip": "2001:db8:ffff::80"}]}});
    let compiled = fresh([n1(), service_with_status("svc", spec, status)]);
    let ranges = |address: &str| frontend(&compiled, address).service.source_ranges.clone();
    assert_eq!(ranges("198.18.0.1:80"), ["198.51.100.0/28".parse().unwrap()]);
    assert_eq!(ranges("[2001:db8:ffff::80]:80"), ["2001:db8:1::/48".parse().unwrap()]);
    assert!(compiled.warnings.is_empty());
}

#[test]
fn each_port_name_and_protocol_is_a_service_port_of_its_own() {
    let ports =
        json!([{"name": "p1", "protocol": "UDP", "port": 1234}, {"name": "p2", "protocol": "UDP", "port": 1235}, {"name": "p3", "port": 1234}]);
    let compiled = fresh([n1(), service("svc", json!({"clusterIP": "10.96.0.1", "ports": ports}))]);
    let service = |address: &str| frontend(&compiled, address).service.clone();
    let three = [service("10.96.0.1:1234/UDP"), service("10.96.0.1:1235/UDP"), service("10.96.0.1:1234")];
    assert_eq!(three.iter().map(|s| &*s.name).collect::<Vec<_>>(), ["default/svc:p1", "default/svc:p2", "default/svc:p3"]);
    assert_eq!(three.iter().map(|s| s.id).collect::<std::collections::BTreeSet<_>>().len(), 3);
}

#[test]
fn labels_leave_a_service_to_somebody_else() {
    for label in ["service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless"] {
        let object = json!({"metadata": {"name": "svc", "labels": {label: "other"}}, "spec": {"clusterIP": "10.96.0.1", "type": "LoadBalancer",
            "externalTrafficPolicy": "Local", "healthCheckNodePort": 32000, "ports": [{"port": 80, "nodePort": 30080}]}});
        let service = Object::from_service(&serde_json::from_value(object).unwrap()).unwrap();
        let compiled = fresh([n1(), service.clone()]);
        assert_eq!(faces([n1(), service]), [""; 0], "{label}");
        assert_eq!((compiled.skipped().len(), compiled.health_checks.len()), (1, 0), "{label}");
    }
}

#[test]
fn addresses_that_would_shadow_the_clusters_own_are_named_and_not_served() {
    let spec = json!({"clusterIP": "10.244.3.3", "externalIPs": ["10.96.5.5", "198.18.7.7"], "ports": [{"port": 80, "nodePort": 8080}]});
    let compiled = fresh([n1(), service_with_status("svc", spec, json!({"loadBalancer": {"ingress": [{"ip": "10.244.4.4"}]}}))]);
    let warnings: Vec<String> = compiled.warnings.iter().map(|w| w.message.clone()).collect();
    for part in [
        "its cluster IP 10.244.3.3 lies in a pod range",
        "its load balancer's address 10.244.4.4 lies in a pod range",
        "its external IP 10.96.5.5 lies in a pod or service range",
        "its external IP 198.18.7.7 is not served: externalIPs.allow does not hold it",
        "node port 8080 is outside nodePorts (30000-32767)",
    ] {
        assert!(warnings.iter().any(|w| w.contains(part)), "{part}: {warnings:#?}");
    }
    assert_eq!(compiled.services().len(), 2, "nothing is left to dial but the gateway's own service, in both families");
}

/// The health checks: service, port and how many endpoints.
fn checks(objects: impl IntoIterator<Item = Object>) -> Vec<(String, u16, usize)> {
    fresh(objects).health_checks.values().map(|c| (c.name.clone(), c.port, c.local_endpoints)).collect()
}

// Row 12; upstream `HealthCheckNodePorts` and `LocalReadyEndpoints`.
#[test]
fn health_checks_count_the_ready_endpoints_of_this_node_once_each() {
    let spec = |external: &str| {
        json!({"type": "LoadBalancer", "clusterIP": "10.96.0.10", "externalTrafficPolicy": external, "healthCheckNodePort": 32000,
            "ports": [{"name": "a", "port": 80}, {"name": "b", "port": 81}]})
    };
    let ports = json!([{"name": "a", "port": 80}, {"name": "b", "port": 81}]);
    let endpoints = json!([
        endpoint(1, "rs", "n1", &[]),
        endpoint(2, "rs", "n1", &[]),
        endpoint(3, "st", "n1", &[]),
        endpoint(4, "", "n1", &[]),
        endpoint(5, "rs", "n2", &[])
    ]);
    let of = |external: &str, endpoints: Value| checks([n1(), service("web", spec(external)), slice("web-1", "web", ports.clone(), endpoints)]);
    assert_eq!(of("Local", endpoints.clone()), [("web".into(), 32000, 2)], "two ports of one endpoint are one endpoint");
    assert_eq!(of("Local", json!([endpoint(3, "st", "n1", &[])])), [("web".into(), 32000, 0)], "what only terminates does not count");
    assert_eq!(of("Local", json!([])), [("web".into(), 32000, 0)]);
    assert_eq!(of("Cluster", endpoints), [], "only under the Local policy");
}
