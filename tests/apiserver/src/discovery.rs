//! What a client reads first: which groups, versions and kinds there are, and which parameters are understood.

use axum::body::Body;
use axum::http::{HeaderValue, Response, header};
use serde_json::{Map, Value, json};

use crate::resources::{GROUPS, RESOURCES, Resource};
use crate::status::respond;

const VERBS: [&str; 7] = ["create", "delete", "get", "list", "patch", "update", "watch"];

/// The answer to a GET of `path`, if it is no resource's.
pub(crate) fn answer(path: &str) -> Option<Response<Body>> {
    let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
    let value = match parts.as_slice() {
        ["api"] => json!({"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}),
        ["api", "v1"] => resources(""),
        ["apis"] => json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": GROUPS.map(group)}),
        ["apis", name] if GROUPS.contains(name) => {
            let mut group = group(name);
            group["kind"] = json!("APIGroup");
            group["apiVersion"] = json!("v1");
            group
        }
        ["apis", group, "v1"] if GROUPS.contains(group) => resources(group),
        ["version"] => version(),
        ["openapi", "v2"] => return Some(openapi_v2()),
        ["openapi", "v3"] => openapi_v3_index(),
        ["openapi", "v3", "api", "v1"] => openapi_v3(""),
        ["openapi", "v3", "apis", group, "v1"] if GROUPS.contains(group) => openapi_v3(group),
        ["healthz" | "livez" | "readyz"] => return Some(Response::new(Body::from("ok"))),
        _ => return None,
    };
    Some(respond(200, &value))
}

fn version() -> Value {
    json!({
        "major": "1", "minor": "33", "gitVersion": "v1.33.0-podgate-test", "gitCommit": "", "gitTreeState": "clean",
        "buildDate": "1970-01-01T00:00:00Z", "goVersion": "", "compiler": "rustc", "platform": "linux"
    })
}

fn group(name: &str) -> Value {
    let version = json!({"groupVersion": format!("{name}/v1"), "version": "v1"});
    json!({"name": name, "versions": [version], "preferredVersion": version})
}

fn of_group(group: &str) -> impl Iterator<Item = &'static Resource> + use<'_> {
    RESOURCES.iter().filter(move |resource| resource.group == group)
}

fn group_version(group: &str) -> String {
    if group.is_empty() { "v1".into() } else { format!("{group}/v1") }
}

fn resources(group: &str) -> Value {
    let mut list = Vec::new();
    for resource in of_group(group) {
        list.push(json!({
            "name": resource.plural, "singularName": resource.singular, "namespaced": resource.namespaced, "kind": resource.kind,
            "verbs": VERBS, "shortNames": resource.short, "categories": []
        }));
        if resource.status {
            let name = format!("{}/status", resource.plural);
            let verbs = ["get", "patch", "update"];
            list.push(json!({"name": name, "singularName": "", "namespaced": resource.namespaced, "kind": resource.kind, "verbs": verbs}));
        }
    }
    json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version(group), "resources": list})
}

/// An empty document in protobuf, which is how clients ask for it: they take a kind that is not in it as valid.
fn openapi_v2() -> Response<Body> {
    let mut response = Response::new(Body::empty());
    let media = HeaderValue::from_static("application/com.github.proto-openapi.spec.v2@v1.0+protobuf");
    response.headers_mut().insert(header::CONTENT_TYPE, media);
    response
}

fn openapi_v3_index() -> Value {
    let mut paths = Map::new();
    for group in [""].iter().chain(&GROUPS) {
        let path = if group.is_empty() { "api/v1".to_owned() } else { format!("apis/{group}/v1") };
        let url = format!("/openapi/v3/{path}?hash=1");
        paths.insert(path, json!({"serverRelativeURL": url}));
    }
    json!({"paths": paths})
}

/// No schemas; but that each kind can be patched, and with which parameters: by that `kubectl` knows that the server validates.
fn openapi_v3(group: &str) -> Value {
    let root = if group.is_empty() { "/api/v1".to_owned() } else { format!("/apis/{group}/v1") };
    let names = ["dryRun", "fieldManager", "fieldValidation", "force"];
    let parameter = |name: &str| json!({"name": name, "in": "query", "schema": {"type": "string", "uniqueItems": true}});
    let parameters = names.map(parameter);
    let mut paths = Map::new();
    for resource in of_group(group) {
        let space = if resource.namespaced { "/namespaces/{namespace}" } else { "" };
        let patch = json!({
            "operationId": format!("patch{}", resource.kind),
            "parameters": parameters,
            "responses": {"200": {"description": "OK"}},
            "x-kubernetes-action": "patch",
            "x-kubernetes-group-version-kind": {"group": group, "version": "v1", "kind": resource.kind}
        });
        paths.insert(format!("{root}{space}/{}/{{name}}", resource.plural), json!({"patch": patch}));
    }
    json!({"openapi": "3.0.0", "info": {"title": "Kubernetes", "version": "v1.33.0"}, "paths": paths, "components": {"schemas": {}}})
}
