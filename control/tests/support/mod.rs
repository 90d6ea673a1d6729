//! A cluster to test a source with: the conformance server in this process, or a real one.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use http::header::AUTHORIZATION;
use http::{HeaderValue, Request, Response};
use k8s_openapi::api::{core::v1 as core_v1, discovery::v1 as discovery_v1, networking::v1 as networking_v1};
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use kube::client::Body;
use kube::config::{Config, KubeConfigOptions};
use kube::core::Request as Path;
use kube::{Api, Client};
use podgate::model::{ClusterState, Object, ObjectKey, ObjectName};
use podgate_apiserver::{ApiServer, PLAIN};
use serde_json::{Value, json};
use tokio::time::sleep;

/// Numbers by xorshift64 (Marsaglia 2003, p. 4).
pub struct Random(u64);

impl Random {
    /// From a seed.
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).max(1))
    }

    /// One number that nobody can foresee.
    pub fn chance() -> u64 {
        RandomState::new().hash_one(0)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }

    /// A number from `first` to before `end`.
    pub fn between(&mut self, first: u64, end: u64) -> u64 {
        first + self.below(end - first)
    }
}

/// A cluster.
pub struct Cluster {
    server: Option<ApiServer>,
    /// As the source sees it.
    client: Client,
    /// As the test does: without faults.
    plain: Client,
}

/// A client of the server in this process.
fn client_of(server: &ApiServer, token: Option<&str>, headers: &[(&'static str, &str)], without: &[&'static str]) -> Client {
    let mut headers: Vec<(http::HeaderName, HeaderValue)> =
        headers.iter().map(|(name, value)| (http::HeaderName::from_static(name), HeaderValue::from_str(value).unwrap())).collect();
    headers.extend(token.map(|token| (AUTHORIZATION, HeaderValue::from_str(&format!("Bearer {token}")).unwrap())));
    let (server, without) = (server.clone(), without.to_vec());
    let service = tower::service_fn(move |mut request: Request<Body>| {
        request.headers_mut().extend(headers.clone());
        let server = server.clone();
        let missing = without.iter().any(|plural| request.uri().path().ends_with(plural));
        async move {
            if missing {
                let answer = Response::builder().status(404).body(axum::body::Body::from("404 page not found\n"));
                return answer.map_err(std::io::Error::other);
            }
            server.call(request.map(axum::body::Body::new)).await
        }
    });
    Client::new(service, "default")
}

impl Cluster {
    /// The one that `server` has.
    pub fn of(server: ApiServer, token: Option<&str>) -> Cluster {
        let plain = client_of(&server, token, &[(PLAIN, "1")], &[]);
        Cluster { client: client_of(&server, token, &[], &[]), plain, server: Some(server) }
    }

    /// The same without the resources of these names.
    pub fn without(self, plurals: &[&'static str]) -> Cluster {
        let server = self.server.as_ref().expect("a real server has what it has");
        Cluster { client: client_of(server, None, &[], plurals), ..self }
    }

    /// The one of `PODGATE_APISERVER`.
    pub async fn real(_seed: u64) -> Cluster {
        let url: http::Uri = std::env::var("PODGATE_APISERVER").unwrap().parse().expect("PODGATE_APISERVER is a URL");
        let mut config = match std::env::var_os("KUBECONFIG") {
            Some(_) => Config::from_kubeconfig(&KubeConfigOptions::default()).await.expect("KUBECONFIG names a usable file"),
            None => Config::new(url.clone()),
        };
        config.cluster_url = url;
        let client = Client::try_from(config).unwrap();
        let cluster = Cluster { server: None, plain: client.clone(), client };
        cluster.clean_up().await;
        cluster
    }

    /// The server, if it is in this process.
    pub fn server(&self) -> Option<&ApiServer> {
        self.server.as_ref()
    }

    /// A client for the source.
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// Makes an object or replaces what it says.
    pub async fn put(&self, object: Value) {
        let (path, name) = (path_of(&object), object["metadata"]["name"].as_str().unwrap().to_owned());
        let params = PatchParams::apply("podgate-test").force();
        let request = Path::new(path.clone()).patch(&name, &params, &Patch::Apply(&object)).unwrap();
        self.plain.request::<Value>(request).await.unwrap_or_else(|error| panic!("{path}/{name}: {error}"));
        if object.get("status").is_some() {
            let request = Path::new(path).patch_subresource("status", &name, &PatchParams::default(), &Patch::Merge(&object)).unwrap();
            self.plain.request::<Value>(request).await.unwrap();
        }
    }

    /// Takes an object away, if it is there.
    pub async fn delete(&self, plural: &str, namespace: &str, name: &str) {
        let path = path(plural, namespace);
        let request = Path::new(path).delete(name, &DeleteParams::default()).unwrap();
        match self.plain.request_status::<Value>(request).await {
            Ok(_) => {}
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(error) => panic!("{plural} {name}: {error}"),
        }
    }

    /// Sets annotations; null takes one away.
    pub async fn annotate(&self, plural: &str, name: &str, annotations: Value) {
        let patch = Patch::Merge(json!({"metadata": {"annotations": annotations}}));
        let request = Path::new(path(plural, "")).patch(name, &PatchParams::default(), &patch).unwrap();
        self.plain.request::<Value>(request).await.unwrap();
    }

    /// Waits until a node's annotation says this.
    pub async fn wait_for_annotation(&self, node: &str, name: &str, text: &str) {
        loop {
            let found = Api::<core_v1::Node>::all(self.plain.clone()).get(node).await.unwrap();
            if found.metadata.annotations.is_some_and(|annotations| annotations.get(name).is_some_and(|found| found == text)) {
                return;
            }
            sleep(Duration::from_millis(100)).await;
        }
    }

    /// Writes a condition of a node, as whoever else writes one.
    pub async fn set_condition(&self, node: &str, kind: &str, status: &str, reason: &str) {
        let patch = Patch::Strategic(json!({"status": {"conditions": [{"type": kind, "status": status, "reason": reason}]}}));
        let request = Path::new(path("nodes", "")).patch_subresource("status", node, &PatchParams::default(), &patch).unwrap();
        self.plain.request::<Value>(request).await.unwrap();
    }

    /// Waits until a node's condition says this: `STATUS REASON`.
    pub async fn wait_for_condition(&self, node: &str, kind: &str, wanted: &str) {
        loop {
            let found = Api::<core_v1::Node>::all(self.plain.clone()).get(node).await.unwrap();
            let mut conditions = found.status.and_then(|status| status.conditions).into_iter().flatten();
            let condition = conditions.find(|condition| condition.type_ == kind);
            if condition.is_some_and(|found| format!("{} {}", found.status, found.reason.unwrap_or_default()) == wanted) {
                return;
            }
            sleep(Duration::from_millis(100)).await;
        }
    }

    /// What a fresh list says.
    pub async fn fresh(&self) -> ClusterState {
        let all = ListParams::default();
        let mut state = ClusterState::default();
        for node in Api::<core_v1::Node>::all(self.plain.clone()).list(&all).await.unwrap() {
            state.insert(Object::from_node(&node).unwrap());
        }
        for service in Api::<core_v1::Service>::all(self.plain.clone()).list(&all).await.unwrap() {
            state.insert(Object::from_service(&service).unwrap());
        }
        for slice in Api::<discovery_v1::EndpointSlice>::all(self.plain.clone()).list(&all).await.unwrap() {
            state.insert(Object::from_slice(&slice).unwrap());
        }
        for policy in Api::<networking_v1::NetworkPolicy>::all(self.plain.clone()).list(&all).await.unwrap() {
            let (namespace, name) = (policy.metadata.namespace.unwrap(), policy.metadata.name.unwrap());
            state.insert(Object::Unenforced(ObjectKey { kind: "NetworkPolicy".into(), name: ObjectName::new(&namespace, &name) }));
        }
        match Api::<networking_v1::ServiceCIDR>::all(self.plain.clone()).list(&all).await {
            Ok(ranges) => ranges.into_iter().for_each(|range| state.insert(Object::from_service_cidr(&range).unwrap())),
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(error) => panic!("{error}"),
        }
        state
    }

    /// Takes away everything of the names that these tests use.
    pub async fn clean_up(&self) {
        if self.server.is_none() {
            for number in 0..100 {
                self.delete("services", "default", &format!("web-{number}")).await;
                self.delete("endpointslices", "default", &format!("slice-{number}")).await;
            }
            for number in 0..5 {
                self.delete("nodes", "", &format!("node-{number}")).await;
                self.delete("networkpolicies", "default", &format!("policy-{number}")).await;
            }
        }
    }
}

fn path(plural: &str, namespace: &str) -> String {
    let root = match plural {
        "endpointslices" => "/apis/discovery.k8s.io/v1",
        "networkpolicies" | "servicecidrs" => "/apis/networking.k8s.io/v1",
        _ => "/api/v1",
    };
    if namespace.is_empty() { format!("{root}/{plural}") } else { format!("{root}/namespaces/{namespace}/{plural}") }
}

fn path_of(object: &Value) -> String {
    let plural = match object["kind"].as_str().unwrap() {
        "NetworkPolicy" => "networkpolicies".to_owned(),
        kind => format!("{}s", kind.to_lowercase()),
    };
    path(&plural, object["metadata"]["namespace"].as_str().unwrap_or_default())
}

/// The service `web-NUMBER`, of one of several looks.
pub fn service(number: u64, look: u64) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": format!("web-{number}"), "namespace": "default"},
        "spec": {"clusterIP": format!("10.96.7.{}", number + 1), "ports": [{"name": "http", "protocol": "TCP", "port": 80, "targetPort": 8080 + look}],
            "internalTrafficPolicy": if look == 1 { "Local" } else { "Cluster" }}
    })
}

/// The slice `slice-NUMBER` of the service `web-OF`, with so many endpoints.
pub fn slice(number: u64, of: u64, endpoints: u64) -> Value {
    let endpoint = |n: u64| json!({"addresses": [format!("10.244.{}.{}", 1 + n % 3, 10 + number)], "nodeName": format!("node-{}", 1 + n % 3)});
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": format!("slice-{number}"), "namespace": "default", "labels": {"kubernetes.io/service-name": format!("web-{of}")}},
        "addressType": "IPv4", "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        "endpoints": (0..endpoints).map(endpoint).collect::<Vec<_>>()
    })
}

/// The node `node-NUMBER`, in one of several zones.
pub fn node(number: u64, zone: u64) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": format!("node-{number}"), "labels": {"topology.kubernetes.io/zone": format!("zone-{zone}")}},
        "spec": {"podCIDR": format!("10.244.{number}.0/24"), "podCIDRs": [format!("10.244.{number}.0/24")]},
        "status": {"addresses": [{"type": "InternalIP", "address": format!("192.0.2.{number}")}]}
    })
}

/// The policy `policy-NUMBER`.
pub fn policy(number: u64) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": format!("policy-{number}"), "namespace": "default"}, "spec": {"podSelector": {}}
    })
}
