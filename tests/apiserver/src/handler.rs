//! One request: what it asks for, whether it may, and the answer.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::http::{Method, Request, Response, StatusCode, header};
use serde_json::{Value, json};

use crate::access::{Use, check};
use crate::resources::{Resource, find};
use crate::select::Selector;
use crate::status::{Refusal, respond};
use crate::{Shared, discovery, lock, patch, watch};

/// No request is larger: etcd takes 1.5 MiB.
const BODY_MAX: usize = 3 << 20;

/// What a path names.
struct Target {
    resource: &'static Resource,
    /// Empty for all of them, and for the whole cluster's.
    namespace: String,
    name: Option<String>,
    subresource: Option<String>,
}

/// What a request is about.
pub(crate) struct Asked {
    pub resource: &'static Resource,
    pub namespace: String,
    pub selector: Selector,
    pub query: BTreeMap<String, String>,
    /// Whether names and labels are all that is wanted (`PartialObjectMetadata`).
    pub metadata_only: bool,
}

pub(crate) async fn answer(shared: &Arc<Shared>, request: Request<Body>) -> Response<Body> {
    let plain = request.headers().contains_key(crate::PLAIN);
    let delay = lock(&shared.dice).delay();
    if !plain && !delay.is_zero() {
        tokio::time::sleep(delay).await;
    }
    match handle(shared, request).await {
        Ok(response) => response,
        Err(refusal) => refusal.response(),
    }
}

async fn handle(shared: &Arc<Shared>, request: Request<Body>) -> Result<Response<Body>, Refusal> {
    let (head, body) = request.into_parts();
    let header = |name| head.headers.get(name).and_then(|value| value.to_str().ok());
    let rules = lock(&shared.access).rules(header(header::AUTHORIZATION))?;
    if head.method == Method::GET
        && let Some(response) = discovery::answer(head.uri.path())
    {
        return Ok(response);
    }
    let target = target(head.uri.path()).ok_or_else(Refusal::no_path)?;
    let query: BTreeMap<String, String> = form_urlencoded::parse(head.uri.query().unwrap_or_default().as_bytes()).into_owned().collect();
    let flag = |name: &str| query.get(name).is_some_and(|value| value == "true" || value == "1");
    let verb = match (&head.method, &target.name) {
        (&Method::GET, None) if flag("watch") => "watch",
        (&Method::GET, None) => "list",
        (&Method::GET, Some(_)) => "get",
        (&Method::POST, None) => "create",
        (&Method::PUT, Some(_)) => "update",
        (&Method::PATCH, Some(_)) => "patch",
        (&Method::DELETE, Some(_)) => "delete",
        (&Method::DELETE, None) => "deletecollection",
        _ => return Err(Refusal::new(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")),
    };
    if let Some(rules) = rules {
        let resource = target.subresource.as_ref().map_or(target.resource.plural.to_owned(), |sub| format!("{}/{sub}", target.resource.plural));
        let asked = Use { group: target.resource.group.into(), resource, verb: verb.into() };
        check(&rules, &asked, target.resource, target.name.as_deref())?;
        lock(&shared.used).insert(asked);
    }
    let plain = head.headers.contains_key(crate::PLAIN);
    if !plain && lock(&shared.dice).hit(|faults| faults.refused) {
        return Err(refused(lock(&shared.dice).below(3)));
    }
    let accept = header(header::ACCEPT).unwrap_or_default();
    let content_type = header(header::CONTENT_TYPE).unwrap_or_default().to_owned();
    let text = |name: &str| query.get(name).map_or("", String::as_str);
    let asked = Asked {
        resource: target.resource,
        namespace: target.namespace.clone(),
        selector: Selector::parse(text("labelSelector"), text("fieldSelector"))?,
        metadata_only: accept.contains("as=PartialObjectMetadata"),
        query,
    };
    match verb {
        "watch" => return watch::answer(shared, asked),
        "list" => return list(shared, &asked, plain),
        _ => {}
    }
    let body = axum::body::to_bytes(body, BODY_MAX).await;
    let body = body.map_err(|_| Refusal::new(413, "RequestEntityTooLarge", "the request is too large"))?;
    let show = |code: u16, object: &Value| respond(code, &if asked.metadata_only { metadata_of(object) } else { object.clone() });
    match verb {
        "get" => {
            let name = target.name.as_deref().unwrap_or_default();
            let found = shared.store.find(target.resource, &target.namespace, name);
            Ok(show(200, &*found.ok_or_else(|| Refusal::not_found(target.resource, name))?))
        }
        "create" => create(shared, &target, &asked, &body).map(|object| show(201, &object)),
        "update" => update(shared, &target, &asked, &body).map(|object| show(200, &object)),
        "patch" => patched(shared, &target, &asked, &content_type, &body).map(|(code, object)| show(code, &object)),
        "delete" => delete(shared, &target, &asked),
        _ => {
            let all = shared.store.list(target.resource, 0, |namespace, object| asked.wants(namespace, object));
            for object in &all.objects {
                let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default();
                // Somebody else may have been faster.
                let _ = shared.store.delete(target.resource, text("namespace"), text("name"));
            }
            Ok(respond(200, &json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"})))
        }
    }
}

impl Asked {
    pub fn wants(&self, namespace: &str, object: &Value) -> bool {
        (self.namespace.is_empty() || self.namespace == namespace) && self.selector.matches(object)
    }

    fn dry_run(&self) -> bool {
        self.query.contains_key("dryRun")
    }

    fn field_manager(&self) -> &str {
        self.query.get("fieldManager").map_or("", String::as_str)
    }
}

fn refused(which: u64) -> Refusal {
    match which {
        0 => Refusal::new(429, "TooManyRequests", "the server has received too many requests and has asked us to try again later"),
        1 => Refusal::new(500, "InternalError", "Internal error occurred: etcdserver: leader changed"),
        _ => Refusal::new(503, "ServiceUnavailable", "the server is currently unable to handle the request"),
    }
}

fn target(path: &str) -> Option<Target> {
    let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
    let (group, rest) = match parts.as_slice() {
        ["api", "v1", rest @ ..] => ("", rest),
        ["apis", group, "v1", rest @ ..] => (*group, rest),
        _ => return None,
    };
    let (namespace, rest) = match rest {
        // `namespaces` is a resource as well: what follows the name decides.
        ["namespaces", namespace, plural, rest @ ..] if find(group, plural).is_some_and(|resource| resource.namespaced) => {
            (*namespace, [&[*plural], rest].concat())
        }
        rest => ("", rest.to_vec()),
    };
    let (plural, rest) = rest.split_first()?;
    let resource = find(group, plural)?;
    let (name, subresource) = match rest {
        [] => (None, None),
        [name] => (Some(*name), None),
        [name, "status"] if resource.status => (Some(*name), Some("status")),
        _ => return None,
    };
    // An object of a namespace is not to be had without it.
    if resource.namespaced && namespace.is_empty() && name.is_some() {
        return None;
    }
    Some(Target { resource, namespace: namespace.into(), name: name.map(Into::into), subresource: subresource.map(Into::into) })
}

/// What `PartialObjectMetadata` keeps.
pub(crate) fn metadata_of(object: &Value) -> Value {
    json!({"apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadata", "metadata": object["metadata"]})
}

fn list(shared: &Arc<Shared>, asked: &Asked, plain: bool) -> Result<Response<Body>, Refusal> {
    let mut limit = asked.query.get("limit").and_then(|limit| limit.parse().ok()).unwrap_or(0);
    let (torn, expired) = if plain {
        (false, false)
    } else {
        let mut dice = lock(&shared.dice);
        if limit > 1 && dice.hit(|faults| faults.short_page) {
            limit = 1 + dice.below(limit as u64 - 1) as usize;
        }
        (dice.hit(|faults| faults.torn_page), dice.hit(|faults| faults.expired_page))
    };
    let token = asked.query.get("continue").filter(|token| !token.is_empty());
    let empty = !plain && token.is_none() && lock(&shared.empty_lists).remove(asked.resource.plural);
    let part = match token {
        Some(_) if expired => return Err(Refusal::new(410, "Expired", "The provided continue parameter is too old")),
        Some(token) => shared.store.list_on(token, limit)?,
        None => shared.store.list(asked.resource, limit, |namespace, object| !empty && asked.wants(namespace, object)),
    };
    let items: Vec<Value> = part.objects.iter().map(|object| if asked.metadata_only { metadata_of(object) } else { (**object).clone() }).collect();
    let mut metadata = json!({"resourceVersion": part.version.to_string()});
    if let Some((next, remaining)) = part.next {
        metadata["continue"] = json!(next);
        metadata["remainingItemCount"] = json!(remaining);
    }
    let (version, kind) = match asked.metadata_only {
        true => ("meta.k8s.io/v1".to_owned(), "PartialObjectMetadataList".to_owned()),
        false => (asked.resource.api_version(), format!("{}List", asked.resource.kind)),
    };
    let answer = json!({"kind": kind, "apiVersion": version, "metadata": metadata, "items": items});
    if !torn {
        return Ok(respond(200, &answer));
    }
    let mut text = answer.to_string();
    let mut at = lock(&shared.dice).below(text.len() as u64) as usize;
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    text.truncate(at);
    Ok(Response::new(Body::from(text)))
}

/// JSON or YAML.
fn parsed(body: &Bytes) -> Result<Value, Refusal> {
    let text = std::str::from_utf8(body).map_err(|_| Refusal::bad_request("the body is not UTF-8"))?;
    let unreadable = |error: String| Refusal::bad_request(format!("the body cannot be read: {error}"));
    if text.trim_start().starts_with('{') {
        return serde_json::from_str(text).map_err(|error| unreadable(error.to_string()));
    }
    serde_saphyr::from_str(text).map_err(|error| unreadable(error.to_string()))
}

fn object_of(target: &Target, body: &Bytes) -> Result<Value, Refusal> {
    let object = parsed(body)?;
    let resource = target.resource;
    let fits = object["kind"] == resource.kind && object["apiVersion"] == resource.api_version();
    if !fits {
        let given = format!("{} in {}", object["kind"], object["apiVersion"]);
        return Err(Refusal::bad_request(format!("{given} in the body is not {} in {}", resource.kind, resource.api_version())));
    }
    let namespace = object["metadata"]["namespace"].as_str().unwrap_or_default();
    if resource.namespaced && !namespace.is_empty() && namespace != target.namespace {
        return Err(Refusal::bad_request("the namespace of the provided object does not match the namespace sent on the request"));
    }
    Ok(object)
}

fn create(shared: &Arc<Shared>, target: &Target, asked: &Asked, body: &Bytes) -> Result<Arc<Value>, Refusal> {
    let object = object_of(target, body)?;
    if asked.dry_run() {
        return Ok(Arc::new(object));
    }
    shared.store.create(target.resource, &target.namespace, object)
}

fn update(shared: &Arc<Shared>, target: &Target, asked: &Asked, body: &Bytes) -> Result<Arc<Value>, Refusal> {
    let object = object_of(target, body)?;
    let name = target.name.as_deref().unwrap_or_default();
    if asked.dry_run() {
        return Ok(Arc::new(object));
    }
    shared.store.update(target.resource, &target.namespace, name, |known| Ok(kept_apart(target, known, object)))
}

/// The path of an object leaves its status alone, and the path of the status leaves everything else.
fn kept_apart(target: &Target, known: &Value, mut wanted: Value) -> Value {
    if target.subresource.is_some() {
        let mut object = known.clone();
        object["status"] = wanted["status"].take();
        object["metadata"]["resourceVersion"] = wanted["metadata"]["resourceVersion"].take();
        return object;
    }
    if target.resource.status {
        match known.get("status") {
            Some(status) => wanted["status"] = status.clone(),
            None => drop(wanted.as_object_mut().and_then(|object| object.remove("status"))),
        }
    }
    wanted
}

fn patched(shared: &Arc<Shared>, target: &Target, asked: &Asked, content_type: &str, body: &Bytes) -> Result<(u16, Arc<Value>), Refusal> {
    let name = target.name.as_deref().unwrap_or_default();
    let given = parsed(body)?;
    let kind = content_type.split(';').next().unwrap_or_default().trim();
    let plural = target.resource.plural;
    let apply = kind == "application/apply-patch+yaml";
    let owner = |object: &Value| (object["metadata"]["uid"].as_str().unwrap_or_default().to_owned(), asked.field_manager().to_owned());
    let remember = |object: &Value| {
        if apply && !asked.dry_run() {
            lock(&shared.applied).insert(owner(object), given.clone());
        }
    };
    if apply && shared.store.find(target.resource, &target.namespace, name).is_none() {
        return create(shared, target, asked, body).inspect(|object| remember(object)).map(|object| (201, object));
    }
    let make = |known: &Value| {
        let mut object = known.clone();
        // A patch that names a version asks for exactly that one.
        if let Some(metadata) = object["metadata"].as_object_mut() {
            metadata.remove("resourceVersion");
        }
        match kind {
            "application/merge-patch+json" => patch::merge(&mut object, &given),
            "application/strategic-merge-patch+json" => patch::strategic(plural, &mut object, &given),
            // Who applies a part owns that part: it is laid over what is there, less what the same manager applied before.
            "application/apply-patch+yaml" => {
                if let Some(last) = lock(&shared.applied).get(&owner(known)) {
                    patch::withdraw(plural, &mut object, last, &given);
                }
                patch::strategic(plural, &mut object, &given);
            }
            other => return Err(Refusal::new(415, "UnsupportedMediaType", format!("patches of type {other} are not understood"))),
        }
        Ok(kept_apart(target, known, object))
    };
    if asked.dry_run() {
        let known = shared.store.find(target.resource, &target.namespace, name).ok_or_else(|| Refusal::not_found(target.resource, name))?;
        return Ok((200, Arc::new(make(&known)?)));
    }
    shared.store.update(target.resource, &target.namespace, name, make).inspect(|object| remember(object)).map(|object| (200, object))
}

fn delete(shared: &Arc<Shared>, target: &Target, asked: &Asked) -> Result<Response<Body>, Refusal> {
    let name = target.name.as_deref().unwrap_or_default();
    let removed = match asked.dry_run() {
        true => shared.store.find(target.resource, &target.namespace, name).ok_or_else(|| Refusal::not_found(target.resource, name))?,
        false => shared.store.delete(target.resource, &target.namespace, name)?,
    };
    let details = json!({"name": name, "group": target.resource.group, "kind": target.resource.plural, "uid": removed["metadata"]["uid"]});
    Ok(respond(StatusCode::OK.as_u16(), &json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details})))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_name_what_they_name() {
        let shown = |path: &str| {
            let target = target(path)?;
            Some(format!("{} {} {:?} {:?}", target.resource.plural, target.namespace, target.name, target.subresource))
        };
        assert_eq!(shown("/api/v1/services").as_deref(), Some("services  None None"));
        assert_eq!(shown("/api/v1/namespaces/shop").as_deref(), Some("namespaces  Some(\"shop\") None"));
        assert_eq!(shown("/api/v1/namespaces/shop/services/a/status").as_deref(), Some("services shop Some(\"a\") Some(\"status\")"));
        assert_eq!(shown("/apis/discovery.k8s.io/v1/namespaces/shop/endpointslices").as_deref(), Some("endpointslices shop None None"));
        assert_eq!(shown("/api/v1/nodes/n1/status").as_deref(), Some("nodes  Some(\"n1\") Some(\"status\")"));
        for nothing in ["/api/v1/services/a", "/api/v1/pods", "/apis/apps/v1/deployments", "/api/v2/services", "/"] {
            assert_eq!(shown(nothing), None, "{nothing}");
        }
    }
}
