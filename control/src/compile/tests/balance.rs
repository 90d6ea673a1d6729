//! How endpoints are chosen, as objects ask for it, and which clients are forgotten when endpoints leave.

use podgate_core::affinity::{BackendId, Visit};
use podgate_core::balance::{Pick, Weights};
use podgate_core::flow::{Now, OwnedFlows};
use podgate_core::verdict::WorkerId;

use super::*;

fn weighted_slice(name: &str, weight: &str, endpoints: &[&str]) -> Object {
    let metadata = json!({"name": name, "labels": {"kubernetes.io/service-name": "web"}, "annotations": {"podgate.io/weight": weight}});
    let endpoints: Vec<Value> = endpoints.iter().map(|address| json!({"addresses": [address]})).collect();
    let object = json!({"metadata": metadata, "addressType": "IPv4", "ports": [{"port": 80}], "endpoints": endpoints});
    Object::from_slice(&serde_json::from_value(object).unwrap()).unwrap()
}

fn balanced(policy: &str) -> Object {
    let spec = json!({"clusterIP": "10.96.0.10", "ports": [{"port": 80}]});
    let object = json!({"metadata": {"name": "web", "annotations": {"podgate.io/balance": policy}}, "spec": spec});
    Object::from_service(&serde_json::from_value(object).unwrap()).unwrap()
}

#[test]
fn only_who_asks_for_it_has_a_table_to_choose_endpoints_by() {
    let alike = || [weighted_slice("a", "2", &["10.244.2.10"]), weighted_slice("b", "2", &["10.244.2.11"])];
    let unlike = || [weighted_slice("a", "9", &["10.244.2.10"]), weighted_slice("b", "1", &["10.244.2.11"])];
    let of = |policy, slices: [Object; 2]| {
        let compiled = fresh([n1(), n2(), balanced(policy)].into_iter().chain(slices));
        assert_eq!(*compiled.warnings, []);
        frontend(&compiled, "10.96.0.10:80").service.balance.cluster.clone()
    };
    assert_eq!(of("", alike()), Pick::Even);
    assert_eq!(of("random", unlike()), Pick::Weighted(Weights::new(&[9, 1]).unwrap().into()));
    assert_eq!(of("least-loaded", alike()), Pick::LeastLoaded(None));
    assert_eq!(of("least-loaded", unlike()), Pick::LeastLoaded(Some(Weights::new(&[9, 1]).unwrap().into())));
    let Pick::Maglev(table) = of("maglev", alike()) else { panic!("no table") };
    assert_eq!(table.size(), 1_021);
    assert_ne!(of("maglev", unlike()), Pick::Maglev(table), "weights count");
}

#[test]
fn nodes_fill_maglevs_table_alike_and_an_unchanged_one_is_shared() {
    let objects = || [n1(), n2(), balanced("maglev"), weighted_slice("a", "1", &["10.244.2.10", "10.244.1.10", "192.0.2.2"])];
    let here = fresh(objects());
    let there = fresh_for(&Arc::new(LocalNode { name: "n2".into(), addresses: vec!["192.0.2.2".parse().unwrap()], ..local() }), objects());
    let pick = |compiled: &Compiled| frontend(compiled, "10.96.0.10:80").service.balance.cluster.clone();
    assert_eq!(pick(&here), pick(&there));
    let mut state: ClusterState = objects().into_iter().collect();
    let status = json!({"loadBalancer": {"ingress": [{"ip": "198.51.100.7"}]}});
    let object = json!({"metadata": {"name": "web", "annotations": {"podgate.io/balance": "maglev"}}, "status": status,
        "spec": {"clusterIP": "10.96.0.10", "ports": [{"port": 80}], "sessionAffinity": "ClientIP"}});
    state.insert(Object::from_service(&serde_json::from_value(object).unwrap()).unwrap());
    let next = compile(&here, &Arc::new(state), &Arc::new(local()));
    match (pick(&here), pick(&next)) {
        (Pick::Maglev(before), Pick::Maglev(after)) => assert!(Arc::ptr_eq(&before, &after)),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_annotation_that_says_nothing_is_warned_of_and_the_service_is_served() {
    let compiled =
        fresh([n1(), n2(), balanced("fairest"), weighted_slice("a", "heavy", &["10.244.2.10"]), weighted_slice("b", "3", &["10.244.2.11"])]);
    let warnings: Vec<String> = compiled.warnings.iter().map(ToString::to_string).collect();
    assert_eq!(
        warnings,
        [
            "Service default/web: podgate.io/balance: `fairest` is none of random, maglev, least-loaded; endpoints are chosen at random",
            "EndpointSlice default/a: podgate.io/weight: `heavy` is no number from 1 to 100; its endpoints count once each",
        ]
    );
    assert_eq!(frontend(&compiled, "10.96.0.10:80").service.balance.cluster, Pick::Weighted(Weights::new(&[1, 3]).unwrap().into()));
}

/// Semantics row 9: forgotten when the endpoint stops being usable, so that one which comes back does not get its old clients.
#[test]
fn clients_of_an_endpoint_that_left_are_forgotten_and_no_others() {
    let web = |ports: Value| service("web", json!({"clusterIP": "10.96.0.10", "type": "NodePort", "sessionAffinity": "ClientIP", "ports": ports}));
    let both = json!([{"name": "a", "port": 80, "nodePort": 30080}, {"name": "b", "port": 81}]);
    let ports = json!([{"name": "a", "port": 80}, {"name": "b", "port": 81}]);
    let endpoints = |last: &[u8]| last.iter().map(|n| json!({"addresses": [format!("10.244.2.{n}")]})).collect::<Vec<_>>().into();
    let at = |spec: &Value, last: &[u8]| fresh([n1(), n2(), web(spec.clone()), slice("web-1", "web", ports.clone(), endpoints(last))]).snapshot;
    let before = at(&both, &[10, 11]);
    let id = |port: &str| before.services.get(&key(port)).unwrap().service.id;
    let (a, b) = (id("10.96.0.10:80"), id("10.96.0.10:81"));
    let remembered = |now: &Snapshot| {
        let flows = OwnedFlows::new(1024, [1, 2]);
        let affinity = flows.table().affinity();
        for (n, (service, last)) in (0..).zip([(a, 10), (a, 11), (b, 10), (b, 11), (99, 10)]) {
            let visit = Visit { client: Addr(n), service, timeout: std::time::Duration::from_secs(60), now: Now(0) };
            let port = if service == b { 81 } else { 80 };
            affinity.stick(&visit, BackendId::new(Addr::from_v4([10, 244, 2, last]), port), WorkerId(0), |_| true);
        }
        let forgotten = crate::daemon::flows::forget_stale(flows.table(), &before, now);
        let left: Vec<u128> = (0..5).filter(|n| affinity.lookup(Addr(*n), [a, a, b, b, 99][*n as usize], Now(0)).is_some()).collect();
        assert_eq!(forgotten, 5 - left.len());
        left
    };
    assert_eq!(remembered(&before.clone()), [0, 1, 2, 3, 4]);
    assert_eq!(remembered(&at(&both, &[11, 12])), [1, 3, 4], "of both ports");
    assert_eq!(
        remembered(&at(&json!([{"name": "a", "port": 80}, {"name": "b", "port": 81}]), &[10, 11])),
        [0, 1, 2, 3, 4],
        "a face is gone, not the port"
    );
    assert_eq!(remembered(&at(&json!([{"name": "b", "port": 81}]), &[10, 11])), [2, 3, 4], "a port is gone");
    assert_eq!(remembered(&fresh([n1(), n2()]).snapshot), [4], "the service is gone");
}
