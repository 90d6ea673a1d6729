//! What clients rely on, word for word: versions, pages, watches and refusals.

use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::http::{Request, header};
use podgate_apiserver::{ApiServer, Faults, Rule};
use serde_json::{Value, json};

async fn ask(server: &ApiServer, method: &str, path: &str, kind: &str, body: Value) -> (u16, Value) {
    let body = if body.is_null() { Body::empty() } else { Body::from(body.to_string()) };
    let request = Request::builder().method(method).uri(path).header(header::CONTENT_TYPE, kind).body(body).unwrap();
    let response = server.call(request).await.unwrap();
    let code = response.status().as_u16();
    let bytes = to_bytes(response.into_body(), usize::MAX).await.unwrap();
    (code, serde_json::from_slice(&bytes).unwrap_or_else(|error| panic!("{method} {path}: {error}: {}", String::from_utf8_lossy(&bytes))))
}

async fn get(server: &ApiServer, path: &str) -> (u16, Value) {
    ask(server, "GET", path, "application/json", Value::Null).await
}

/// Everything that a watch says until it ends.
async fn watch(server: &ApiServer, path: &str) -> Vec<String> {
    let response = server.call(Request::get(path).body(Body::empty()).unwrap()).await.unwrap();
    let bytes = to_bytes(response.into_body(), usize::MAX).await.unwrap();
    let text = String::from_utf8(bytes.to_vec()).unwrap();
    let event = |line: &str| {
        let event: Value = serde_json::from_str(line).unwrap();
        let text = |pointer: &str| event.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned();
        format!("{} {}", text("/type"), if text("/type") == "ERROR" { text("/object/reason") } else { text("/object/metadata/name") })
    };
    text.lines().map(event).collect()
}

fn config(name: &str, color: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "labels": {"color": color}}})
}

fn version(list: &Value) -> String {
    list["metadata"]["resourceVersion"].as_str().unwrap().to_owned()
}

const MAPS: &str = "/api/v1/namespaces/default/configmaps";

#[tokio::test(start_paused = true)]
async fn pages_are_parts_of_one_list_whatever_happens_between_them() {
    let server = ApiServer::default();
    (0..5).for_each(|n| server.put(config(&format!("m{n}"), "red")));
    let (_, first) = get(&server, &format!("{MAPS}?limit=2")).await;
    assert_eq!((first["items"].as_array().unwrap().len(), &first["metadata"]["remainingItemCount"]), (2, &json!(3)));
    server.delete("configmaps", "default", "m3");
    server.put(config("m9", "red"));
    let next = first["metadata"]["continue"].as_str().unwrap().to_owned();
    let (_, rest) = get(&server, &format!("{MAPS}?limit=9&continue={next}")).await;
    let names: Vec<&str> = rest["items"].as_array().unwrap().iter().filter_map(|item| item["metadata"]["name"].as_str()).collect();
    assert_eq!((names, version(&rest)), (vec!["m2", "m3", "m4"], version(&first)));
    server.compact();
    let (code, gone) = get(&server, &format!("{MAPS}?limit=9&continue={next}")).await;
    assert_eq!((code, &gone["reason"], &gone["kind"]), (410, &json!("Expired"), &json!("Status")));
}

#[tokio::test(start_paused = true)]
async fn a_watch_tells_what_happened_since_and_ends_at_its_time() {
    let server = ApiServer::default();
    server.put(config("a", "red"));
    let (_, list) = get(&server, MAPS).await;
    let from = version(&list);
    server.put(config("b", "red"));
    server.put(config("a", "blue"));
    server.delete("configmaps", "default", "b");
    let start = tokio::time::Instant::now();
    let all = format!("{MAPS}?watch=true&resourceVersion={from}&timeoutSeconds=7");
    assert_eq!(watch(&server, &all).await, ["ADDED b", "MODIFIED a", "DELETED b"]);
    assert_eq!(start.elapsed(), Duration::from_secs(7));
    // By a selector, what comes to match it is added and what ceases to is deleted.
    assert_eq!(watch(&server, &format!("{all}&labelSelector=color%3Dblue")).await, ["ADDED a"]);
    assert_eq!(watch(&server, &format!("{all}&labelSelector=color%3Dred")).await, ["ADDED b", "DELETED a", "DELETED b"]);
    assert_eq!(watch(&server, &format!("{all}&allowWatchBookmarks=true")).await.last().unwrap(), "BOOKMARK ");
    assert_eq!(watch(&server, &format!("{MAPS}?watch=true&timeoutSeconds=1")).await, ["ADDED a"]);
    server.compact();
    assert_eq!(watch(&server, &all).await, ["ERROR Expired"]);
}

#[tokio::test(start_paused = true)]
async fn who_changes_an_old_version_is_refused_and_what_changes_nothing_is_no_event() {
    let server = ApiServer::default();
    let (code, made) = ask(&server, "POST", MAPS, "application/json", config("a", "red")).await;
    assert_eq!(code, 201);
    let (code, again) = ask(&server, "POST", MAPS, "application/json", config("a", "red")).await;
    assert_eq!((code, &again["reason"], &again["details"]["name"]), (409, &json!("AlreadyExists"), &json!("a")));
    let merge = "application/merge-patch+json";
    let patch = json!({"metadata": {"labels": {"color": "blue"}}});
    let (_, changed) = ask(&server, "PATCH", &format!("{MAPS}/a"), merge, patch.clone()).await;
    let (_, same) = ask(&server, "PATCH", &format!("{MAPS}/a"), merge, patch).await;
    assert_eq!((changed["metadata"]["labels"]["color"].as_str(), version(&same)), (Some("blue"), version(&changed)));
    let (code, conflict) = ask(&server, "PUT", &format!("{MAPS}/a"), "application/json", made).await;
    assert_eq!((code, &conflict["reason"]), (409, &json!("Conflict")));
    let (code, _) = ask(&server, "PUT", &format!("{MAPS}/a"), "application/json", changed).await;
    assert_eq!(code, 200);
    let (code, nowhere) = ask(&server, "POST", "/api/v1/namespaces/nowhere/configmaps", "application/json", config("a", "red")).await;
    assert_eq!((code, &nowhere["message"]), (404, &json!("namespaces \"nowhere\" not found")));
}

#[tokio::test(start_paused = true)]
async fn the_status_of_a_node_is_written_by_its_own_path_alone() {
    let server = ApiServer::default();
    server.put(json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}, "status": {"phase": "x"}}));
    let patch = json!({"spec": {"unschedulable": true}, "status": {"phase": "y"}});
    let (_, spec) = ask(&server, "PATCH", "/api/v1/nodes/n1", "application/merge-patch+json", patch.clone()).await;
    assert_eq!((&spec["spec"]["unschedulable"], &spec["status"]["phase"]), (&json!(true), &json!("x")));
    let (_, status) = ask(&server, "PATCH", "/api/v1/nodes/n1/status", "application/merge-patch+json", patch).await;
    assert_eq!(status["status"]["phase"], "y");
}

#[tokio::test(start_paused = true)]
async fn a_service_gets_an_address_and_a_node_port_of_its_own() {
    let server = ApiServer::default();
    let path = "/api/v1/namespaces/default/services";
    let mut addresses = Vec::new();
    for name in ["a", "b"] {
        let body = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": {"type": "NodePort", "ports": [{"port": 80}, {"port": 81}]}});
        let (_, made) = ask(&server, "POST", path, "application/json", body).await;
        addresses.push((
            made["spec"]["clusterIP"].clone(),
            made["spec"]["ports"][0]["nodePort"].clone(),
            made["spec"]["ports"][1]["nodePort"].clone(),
        ));
    }
    let expected = [(json!("10.96.100.0"), json!(31000), json!(31001)), (json!("10.96.100.1"), json!(31002), json!(31003))];
    assert_eq!(addresses, expected);
}

#[tokio::test(start_paused = true)]
async fn a_token_may_do_what_its_rules_allow() {
    let server = ApiServer::default();
    let manifest = "kind: ClusterRole\nmetadata: {name: r}\nrules: [{apiGroups: [''], resources: [configmaps], verbs: [list]}]\n";
    server.allow("t", Some(Rule::of_manifest(manifest).unwrap()));
    let with = |path: &str, token: &str| Request::get(path).header(header::AUTHORIZATION, format!("Bearer {token}")).body(Body::empty()).unwrap();
    let code = async |request| server.call(request).await.unwrap().status().as_u16();
    assert_eq!(code(with("/api/v1/configmaps", "t")).await, 200);
    assert_eq!(code(with("/api/v1/configmaps?watch=true", "t")).await, 403);
    assert_eq!(code(with("/api/v1/services", "t")).await, 403);
    assert_eq!(code(with("/api/v1/configmaps", "u")).await, 401);
    assert_eq!(server.used().len(), 1);
    assert!(Rule::of_manifest("kind: Role\n").is_err());
}

#[tokio::test(start_paused = true)]
async fn a_seed_decides_what_goes_wrong() {
    let outcome = async |seed| {
        let server = ApiServer::new(Faults { refused: 500, ..Faults::none(seed) });
        let mut codes = Vec::new();
        for _ in 0..32 {
            codes.push(get(&server, MAPS).await.0);
        }
        codes
    };
    assert_eq!(outcome(1).await, outcome(1).await);
    assert_ne!(outcome(1).await, outcome(2).await);
}
