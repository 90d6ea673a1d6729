//! What the API server said, kept on the disk: the cluster's state as Kubernetes objects again, which a later version reads as well.
//!
//! Only what forwarding needs is left of them. Read back they make the same state, to the last field: a list that says the same changes nothing.

use std::fmt::Display;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use k8s_openapi::jiff::Timestamp;
use podgate_core::service::TrafficPolicy;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use super::kinds::KINDS;
use crate::model::{
    Announcement, BALANCE_ANNOTATION, BalancePolicy, ClusterState, Endpoint, EndpointSlice, Leaving, Node, OVERLAY_ANNOTATION, Object, ObjectKey,
    ObjectName, PUBLISHER_ANNOTATION, Service, ServiceCidr, SkipReason, UNDERLAY_ANNOTATION, WEIGHT_ANNOTATION,
};
use crate::source::SourceStatus;
use crate::source::cache::Cache;

/// How often what changed is written, at most.
const KEEP_INTERVAL: Duration = Duration::from_secs(1);
/// So much longer than it takes to write is waited until the next time: a large cluster that changes all the time costs a twentieth of a core.
const PAUSE_FACTOR: u32 = 20;

/// The objects of the state that was kept last; none if there is none.
pub(super) fn load(cache: &Cache) -> Vec<Object> {
    let read = cache.load(|value: Value| KINDS.iter().find(|kind| value["kind"] == kind.name)?.read(value)?.object.ok());
    read.into_iter().flatten().collect()
}

/// Keeps every state that is whole.
pub(super) async fn keep(cache: Cache, mut states: watch::Receiver<Arc<ClusterState>>, mut statuses: watch::Receiver<SourceStatus>) {
    if statuses.wait_for(|status| status.complete).await.is_err() {
        return;
    }
    loop {
        let (cache, state) = (cache.clone(), states.borrow_and_update().clone());
        let began = Instant::now();
        // A panic in there has been printed; the next state may do better.
        let _ = tokio::task::spawn_blocking(move || cache.save(objects(&state))).await;
        sleep(KEEP_INTERVAL.max(began.elapsed() * PAUSE_FACTOR)).await;
        if states.changed().await.is_err() {
            return;
        }
    }
}

/// Every object of the state, as the API server would have it.
fn objects(state: &ClusterState) -> impl Iterator<Item = Value> + '_ {
    let nodes = state.nodes().values().map(|node| self::node(node));
    let services = state.services().values().map(|service| self::service(service));
    let slices = state.all_slices().values().flat_map(|slices| slices.values()).map(|slice| self::slice(slice));
    let orphans = state.orphan_slices().iter().map(orphan_slice);
    let ranges = state.service_cidrs().values().map(|range| service_cidr(range));
    nodes.chain(services).chain(slices).chain(orphans).chain(ranges).chain(state.unenforced().iter().map(unenforced))
}

fn node(node: &Node) -> Value {
    let Node { name, pod_cidrs, addresses, zone, announcement, leaving } = node;
    let mut metadata = json!({"name": **name});
    if let Some(zone) = zone {
        metadata["labels"] = json!({"topology.kubernetes.io/zone": **zone});
    }
    match announcement {
        Announcement::Silent => {}
        Announcement::None => metadata["annotations"] = json!({OVERLAY_ANNOTATION: "none"}),
        Announcement::Overlay { underlay, port, vni, mtu, direct_return_vni } => {
            let figures = [("port", port.map(u32::from)), ("vni", *vni), ("mtu", *mtu), ("directReturnVni", *direct_return_vni)];
            let figures: Vec<String> = figures.iter().filter_map(|(name, figure)| Some(format!("{name}={}", (*figure)?))).collect();
            metadata["annotations"] = json!({UNDERLAY_ANNOTATION: texts(underlay).join(","), OVERLAY_ANNOTATION: figures.join(",")});
        }
    }
    let mut spec = json!({"podCIDRs": texts(pod_cidrs)});
    match leaving {
        None => {}
        // When it was deleted is of no account; that it was is.
        Some(Leaving::Deleted) => metadata["deletionTimestamp"] = json!("1970-01-01T00:00:00Z"),
        Some(Leaving::Autoscaler) => spec["taints"] = json!([{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]),
    }
    let addresses: Vec<Value> = addresses.iter().map(|address| json!({"type": "InternalIP", "address": address})).collect();
    json!({"apiVersion": "v1", "kind": "Node", "metadata": metadata, "spec": spec, "status": {"addresses": addresses}})
}

fn service(service: &Service) -> Value {
    let Service {
        name,
        skip,
        cluster_ips,
        external_ips,
        load_balancer_ips,
        ports,
        internal_policy,
        external_policy,
        affinity,
        balance,
        source_ranges,
        health_check_node_port,
    } = service;
    let mut metadata = metadata(name);
    let ports: Vec<Value> = ports
        .iter()
        .map(|port| json!({"name": *port.name, "protocol": port.protocol, "port": port.port, "nodePort": port.node_port.unwrap_or_default()}))
        .collect();
    let mut spec = json!({
        "clusterIPs": texts(cluster_ips),
        "externalIPs": texts(external_ips),
        "ports": ports,
        "internalTrafficPolicy": policy(*internal_policy),
        "externalTrafficPolicy": policy(*external_policy),
        "loadBalancerSourceRanges": texts(source_ranges),
        "healthCheckNodePort": health_check_node_port.unwrap_or_default(),
    });
    match skip {
        None | Some(SkipReason::NoClusterIp) => {}
        Some(SkipReason::Headless) => spec["clusterIPs"] = json!(["None"]),
        Some(SkipReason::ExternalName) => spec["type"] = json!("ExternalName"),
        Some(SkipReason::OtherProxy(proxy)) => metadata["labels"] = json!({"service.kubernetes.io/service-proxy-name": **proxy}),
    }
    if let Some(timeout) = affinity {
        spec["sessionAffinity"] = json!("ClientIP");
        spec["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": timeout.as_secs()}});
    }
    let balance = match balance {
        BalancePolicy::Random => None,
        BalancePolicy::Maglev => Some("maglev"),
        BalancePolicy::LeastLoaded => Some("least-loaded"),
        BalancePolicy::Unknown(other) => Some(&**other),
    };
    if let Some(balance) = balance {
        metadata["annotations"] = json!({BALANCE_ANNOTATION: balance});
    }
    let ingress: Vec<Value> = load_balancer_ips.iter().map(|ip| json!({"ip": ip})).collect();
    json!({"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec, "status": {"loadBalancer": {"ingress": ingress}}})
}

fn slice(slice: &EndpointSlice) -> Value {
    let EndpointSlice { name, service, ports, endpoints, bad_weight, triggered, publisher } = slice;
    let mut metadata = metadata(name);
    if let Some(service) = service {
        metadata["labels"] = json!({"kubernetes.io/service-name": *service.name});
    }
    let weight = bad_weight.as_deref().map(str::to_owned).or_else(|| Some(endpoints.first()?.weight.to_string()));
    if let Some(weight) = weight {
        metadata["annotations"][WEIGHT_ANNOTATION] = json!(weight);
    }
    if let Some(at) = triggered.and_then(time) {
        metadata["annotations"]["endpoints.kubernetes.io/last-change-trigger-time"] = json!(at);
    }
    if let Some(publisher) = publisher {
        metadata["annotations"][PUBLISHER_ANNOTATION] = json!(**publisher);
    }
    let ports: Vec<Value> = ports.iter().map(|port| json!({"name": *port.name, "protocol": port.protocol, "port": port.port})).collect();
    let family = if endpoints.first().is_none_or(|endpoint| endpoint.address.is_ipv4()) { "IPv4" } else { "IPv6" };
    let endpoints: Vec<Value> = endpoints.iter().map(endpoint).collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": metadata, "addressType": family, "ports": ports, "endpoints": endpoints
    })
}

fn endpoint(endpoint: &Endpoint) -> Value {
    // The weight is the slice's.
    let Endpoint { address, node, ready, serving, terminating, node_hints, zone_hints, weight: _ } = endpoint;
    let mut value = json!({
        "addresses": [address],
        "conditions": {"ready": ready, "serving": serving, "terminating": terminating},
    });
    if let Some(node) = node {
        value["nodeName"] = json!(**node);
    }
    if !node_hints.is_empty() || !zone_hints.is_empty() {
        let named = |names: &[Arc<str>]| names.iter().map(|name| json!({"name": **name})).collect::<Vec<_>>();
        value["hints"] = json!({"forNodes": named(node_hints), "forZones": named(zone_hints)});
    }
    value
}

/// A slice without a service: its name is all that counts.
fn orphan_slice(name: &ObjectName) -> Value {
    json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": metadata(name), "addressType": "IPv4", "endpoints": []})
}

fn service_cidr(range: &ServiceCidr) -> Value {
    let ServiceCidr { name, cidrs } = range;
    json!({"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": **name}, "spec": {"cidrs": texts(cidrs)}})
}

fn unenforced(key: &ObjectKey) -> Value {
    json!({"kind": *key.kind, "metadata": metadata(&key.name)})
}

fn metadata(name: &ObjectName) -> Value {
    json!({"name": *name.name, "namespace": *name.namespace})
}

fn policy(policy: TrafficPolicy) -> &'static str {
    match policy {
        TrafficPolicy::Cluster => "Cluster",
        TrafficPolicy::Local => "Local",
    }
}

fn texts(values: &[impl Display]) -> Vec<String> {
    values.iter().map(ToString::to_string).collect()
}

fn time(at: SystemTime) -> Option<String> {
    Some(Timestamp::try_from(at).ok()?.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(value: Value) -> Object {
        let kind = KINDS.iter().find(|kind| value["kind"] == kind.name).unwrap();
        kind.read(value).unwrap().object.unwrap()
    }

    /// Services of every kind that the model tells apart.
    fn services() -> Vec<Value> {
        let web = |name: &str, metadata: Value, spec: Value| {
            let mut value = json!({"kind": "Service", "metadata": metadata, "spec": spec, "status": {"loadBalancer": {"ingress": [
                {"ip": "203.0.113.1"}, {"ip": "203.0.113.2", "ipMode": "Proxy"}, {"ip": "2001:db8::5", "ipMode": "VIP"}]}}});
            value["metadata"]["name"] = json!(name);
            value["metadata"]["namespace"] = json!("shop");
            value
        };
        let all = json!({
            "clusterIPs": ["10.96.0.1", "fd00:96::1"], "externalIPs": ["198.51.100.1"], "internalTrafficPolicy": "Local", "externalTrafficPolicy": "Local",
            "loadBalancerSourceRanges": [" 192.0.2.0/24"], "healthCheckNodePort": 30999, "sessionAffinity": "ClientIP",
            "ports": [{"name": "a", "port": 80, "nodePort": 30080}, {"name": "b", "port": 53, "protocol": "UDP"}, {"name": "c", "port": 9, "protocol": "SCTP"}]
        });
        let short = json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 7}}, "clusterIP": "10.96.0.2"});
        let balanced = |how: &str| json!({"annotations": {"podgate.io/balance": how}});
        let mut services = vec![
            web("all", json!({}), all.clone()),
            web("short", json!({}), short),
            web("headless", json!({}), json!({"clusterIP": "None", "ports": [{"port": 80}]})),
            web("labelled", json!({"labels": {"service.kubernetes.io/headless": ""}}), all.clone()),
            web("name", json!({}), json!({"type": "ExternalName", "externalName": "example.com"})),
            web("pending", json!({}), json!({"clusterIP": ""})),
            web("others", json!({"labels": {"service.kubernetes.io/service-proxy-name": "x"}}), all.clone()),
        ];
        services.extend(["random", "maglev", "least-loaded", "Maglev"].map(|how| web(&format!("by-{how}"), balanced(how), all.clone())));
        services
    }

    fn slices() -> Vec<Value> {
        let slice = |name: &str, annotations: Value, family: &str, endpoints: Value| {
            json!({"kind": "EndpointSlice", "addressType": family, "endpoints": endpoints,
                "metadata": {"name": name, "namespace": "shop", "labels": {"kubernetes.io/service-name": "all"}, "annotations": annotations},
                "ports": [{"name": "a", "port": 8080}, {"name": "b", "port": 53, "protocol": "UDP"}, {"name": "all"}]})
        };
        let hints = json!({"forNodes": [{"name": "n1"}], "forZones": [{"name": "z1"}, {"name": "z2"}]});
        let v4 = json!([
            {"addresses": ["10.244.1.3"], "nodeName": "n1", "hints": hints},
            {"addresses": ["10.244.1.4"], "conditions": {"ready": false, "serving": true, "terminating": true}},
            {"addresses": ["10.244.1.5"], "conditions": {"ready": false, "serving": false}}
        ]);
        let triggered = json!({"endpoints.kubernetes.io/last-change-trigger-time": "2026-11-25T12:00:00.123456789Z", "podgate.io/weight": "10", "podgate.io/published-by": "n1"});
        let mut orphan = slice("orphan", json!({}), "IPv4", v4.clone());
        orphan["metadata"]["labels"] = json!({});
        vec![
            slice("v4", triggered.clone(), "IPv4", v4),
            slice("v6", json!({"podgate.io/weight": "many"}), "IPv6", json!([{"addresses": ["fd00::3"]}])),
            slice("empty", triggered.clone(), "IPv6", json!([])),
            slice("names", triggered, "FQDN", json!([{"addresses": ["example.com"]}])),
            orphan,
        ]
    }

    fn others() -> Vec<Value> {
        let node = |metadata: Value, spec: Value| {
            json!({"kind": "Node", "metadata": metadata, "spec": spec, "status": {"addresses": [
            {"type": "Hostname", "address": "n"}, {"type": "InternalIP", "address": "192.0.2.1"}, {"type": "InternalIP", "address": "2001:db8::1"}]}})
        };
        let announced = json!({"podgate.io/underlay": "192.0.2.9,2001:db8::9", "podgate.io/overlay": "port=4790,vni=7,mtu=9000,color=3"});
        let taints = json!([{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]);
        vec![
            node(
                json!({"name": "n1", "labels": {"topology.kubernetes.io/zone": "a"}, "annotations": announced}),
                json!({"podCIDR": "10.244.1.0/24"}),
            ),
            node(json!({"name": "n2", "annotations": {"podgate.io/overlay": "none"}}), json!({"podCIDRs": ["10.244.2.0/24", "fd00:2::/64"]})),
            node(json!({"name": "n3", "annotations": {"podgate.io/overlay": "vni=3"}, "deletionTimestamp": "2026-11-25T12:00:00Z"}), json!({})),
            node(json!({"name": "n4", "annotations": {"podgate.io/underlay": "192.0.2.4"}}), json!({"taints": taints})),
            json!({"kind": "ServiceCIDR", "metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.96.0.0/16", "fd00:96::/112"]}}),
            json!({"kind": "NetworkPolicy", "metadata": {"name": "deny", "namespace": "shop"}}),
        ]
    }

    #[test]
    fn every_object_comes_back_as_it_was_to_the_last_field() {
        let values: Vec<Value> = services().into_iter().chain(slices()).chain(others()).collect();
        let len = values.len();
        let state: ClusterState = values.into_iter().map(read).collect();
        assert_eq!(state.len(), len);
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(dir.path(), "kubernetes.json", "https://192.0.2.10:6443");
        cache.save(objects(&state));
        let back: ClusterState = load(&cache).into_iter().collect();
        for (name, service) in state.services() {
            assert_eq!(back.services().get(name), Some(service));
        }
        for (name, node) in state.nodes() {
            assert_eq!(back.nodes().get(name), Some(node));
        }
        assert_eq!(back, state);
    }
}
