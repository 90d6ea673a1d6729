//! Changes between literal objects, and what the memory of them keeps.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::*;
use crate::model::Object;

fn service(name: &str, port: u16) -> Object {
    let spec = json!({"clusterIP": "10.96.0.10", "ports": [{"name": "http", "port": port}]});
    Object::from_service(&serde_json::from_value(json!({"metadata": {"name": name}, "spec": spec})).unwrap()).unwrap()
}

fn slice(endpoints: Value) -> Object {
    let object = json!({"metadata": {"name": "web-1", "labels": {"kubernetes.io/service-name": "web"}}, "addressType": "IPv4",
        "ports": [{"port": 8080}], "endpoints": endpoints});
    Object::from_slice(&serde_json::from_value(object).unwrap()).unwrap()
}

fn endpoint(address: &str, ready: bool, terminating: bool) -> Value {
    json!({"addresses": [address], "nodeName": "n1", "conditions": {"ready": ready, "serving": true, "terminating": terminating}})
}

fn between(before: Vec<Object>, after: Vec<Object>) -> Vec<Change> {
    let local = crate::compile::tests::local();
    let (before, after): (ClusterState, ClusterState) = (before.into_iter().collect(), after.into_iter().collect());
    changes(Inputs { state: &before, local: &local }, Inputs { state: &after, local: &local })
}

fn said(changes: &[Change]) -> Vec<String> {
    changes.iter().map(|change| format!("{change} {:?}: {}", change.what, change.details.join("; "))).collect()
}

#[test]
fn a_service_says_which_of_its_parts_changed() {
    assert_eq!(
        said(&between(vec![service("web", 80), service("gone", 1), service("same", 2)], vec![service("web", 81), service("same", 2)])),
        ["Service default/gone Removed: ", "Service default/web Updated: port http/TCP 80 → 81"]
    );
    let added = between(vec![], vec![service("web", 80)]);
    assert_eq!(
        said(&added),
        ["Service default/web Added: +clusterIPs 10.96.0.10; +externalTrafficPolicy Cluster; +internalTrafficPolicy Cluster; +port http/TCP 80"]
    );
}

#[test]
fn a_slice_says_which_endpoints_came_went_and_turned() {
    let before = slice(json!([endpoint("10.244.1.5", true, false), endpoint("10.244.1.6", true, false), endpoint("10.244.1.7", true, false)]));
    let after = slice(json!([endpoint("10.244.1.5", true, false), endpoint("10.244.1.7", false, true), endpoint("10.244.1.8", false, false)]));
    assert_eq!(
        said(&between(vec![before], vec![after])),
        ["EndpointSlice default/web-1 Updated: -10.244.1.6; 10.244.1.7 ready on n1 → terminating and serving on n1; +10.244.1.8 not ready on n1"]
    );
}

#[test]
fn a_long_list_is_cut_short_and_says_so() {
    let many: Vec<Value> = (1..=30).map(|last| endpoint(&format!("10.244.1.{last}"), true, false)).collect();
    let changes = between(vec![], vec![slice(many.into())]);
    assert_eq!(changes[0].details.len(), DETAILS_MAX + 1);
    assert_eq!(changes[0].details.last().unwrap(), "and 20 more", "30 endpoints, a port and a service");
}

#[test]
fn what_is_attached_here_and_the_machine_itself_are_objects_too() {
    let before = crate::compile::tests::local();
    let mut after = before.clone();
    let pod = after.pods.pop().unwrap();
    after.pods.push(("10.244.1.11".parse().unwrap(), pod.1));
    after.underlay_mtu = 1400;
    let state = ClusterState::default();
    let changes = changes(Inputs { state: &state, local: &before }, Inputs { state: &state, local: &after });
    let expected = [
        "Pod 10.244.1.10 Removed: ",
        "Pod 10.244.1.11 Added: +mtu 1444",
        "Machine n1 Updated: mtu 1500, 1500 to the outside → 1400, 1500 to the outside",
    ];
    assert_eq!(said(&changes), expected);
}

fn one(name: &str, what: What, detail: &str) -> Change {
    Change { kind: "Service", name: name.into(), what, details: vec![detail.into()] }
}

fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

fn seen(history: &History, since: Option<u64>) -> Vec<(String, What, Vec<u64>)> {
    history.since(since).unwrap().objects.into_iter().map(|object| (object.name, object.change, object.generations)).collect()
}

#[test]
fn an_object_is_told_of_once_with_what_became_of_it_in_sum() {
    let mut history = History::new(1);
    history.record(2, at(20), vec![one("a", What::Added, "+1"), one("b", What::Updated, "2"), one("c", What::Removed, "3")]);
    history.record(3, at(30), vec![one("a", What::Updated, "4"), one("b", What::Removed, "5"), one("c", What::Added, "6")]);
    let expected = [("a", What::Added, vec![2, 3]), ("b", What::Removed, vec![2, 3]), ("c", What::Updated, vec![2, 3])];
    assert_eq!(seen(&history, None), expected.clone().map(|(name, what, generations)| (name.to_owned(), what, generations)));
    assert_eq!(seen(&history, Some(1)), seen(&history, None));
    assert_eq!(seen(&history, Some(2))[0], ("a".into(), What::Updated, vec![3]));
    assert_eq!(seen(&history, Some(3)), []);
    let since = history.since(None).unwrap();
    assert_eq!((since.from, since.to, since.objects[0].at_unix_seconds), (1, 3, 30));
    assert_eq!(since.objects[0].details, ["+1", "4"]);
}

#[test]
fn what_changed_without_the_tables_changing_is_since_the_generation_in_force() {
    let mut history = History::new(1);
    history.record(2, at(0), vec![one("a", What::Added, "")]);
    history.record(2, at(1), vec![one("b", What::Added, "")]);
    assert_eq!(seen(&history, Some(2)), [("b".into(), What::Added, vec![2])]);
    assert_eq!(history.latest().count(), 1);
}

#[test]
fn what_is_forgotten_and_what_has_not_come_are_told_apart() {
    let mut history = History::new(0);
    for generation in 1..=GENERATIONS_MAX as u64 + 10 {
        history.record(generation, at(generation), vec![one("a", What::Updated, "")]);
    }
    assert_eq!(history.since(Some(9)), Err(HistoryError::Forgotten { asked: 9, oldest: 10 }));
    assert_eq!(history.since(Some(10)).unwrap().objects[0].generations.len(), GENERATIONS_MAX);
    let newest = GENERATIONS_MAX as u64 + 10;
    assert_eq!(history.since(Some(newest + 1)), Err(HistoryError::Ahead { asked: newest + 1, newest }));
}

#[test]
fn memory_is_bounded_in_changes_as_well() {
    let mut history = History::new(0);
    let many = || (0..CHANGES_OF_ONE_MAX + 5).map(|n| one(&n.to_string(), What::Updated, "")).collect::<Vec<_>>();
    for generation in 1..=30 {
        history.record(generation, at(0), many());
    }
    let held: usize = history.entries.iter().map(|entry| entry.changes.len()).sum();
    assert_eq!(held, CHANGES_MAX);
    assert_eq!(history.since(Some(29)).unwrap().left_out, 5);
}

#[test]
fn states_that_share_their_objects_have_no_change() {
    let state: Arc<ClusterState> = Arc::new([service("web", 80)].into_iter().collect());
    let copy = ClusterState::clone(&state);
    let local = crate::compile::tests::local();
    assert_eq!(changes(Inputs { state: &state, local: &local }, Inputs { state: &copy, local: &local }), []);
}
