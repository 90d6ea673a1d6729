//! What operators see of the compiled services and peers: `podgate services`, `backends`, `peers`.
//!
//! Built when asked for, from the objects that the snapshot was compiled from, so that nothing of it burdens the tables.

use std::sync::Arc;

use podgate_core::service::{Backend, Face, Place, TrafficPolicy};
use serde::Serialize;

use super::endpoints::{Choice, candidates, cluster_choice, local_choice};
use super::node::Locator;
use super::service::Family;
use super::{Compiled, CompiledPort, CompiledService};
use crate::model::{ObjectName, Protocol, Service, SkipReason, Slices};

/// A service port of one family.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceView {
    /// `namespace/name:port`.
    pub service: String,
    /// Its protocol.
    pub protocol: Protocol,
    /// What clients dial.
    pub frontends: Vec<FrontendView>,
    /// `Cluster` or `Local`.
    pub internal_traffic_policy: &'static str,
    /// `Cluster` or `Local`.
    pub external_traffic_policy: &'static str,
    /// How long clients stick to their endpoint.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub session_affinity_seconds: Option<u64>,
    /// How endpoints are chosen: `random`, `random, weighted`, `maglev` or `least-loaded`.
    pub balance: &'static str,
    /// Who may dial its load balancer's addresses; empty means everybody.
    pub source_ranges: Vec<String>,
    /// Where load balancers ask whether this node has an endpoint of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub health_check_node_port: Option<u16>,
    /// Usable endpoints anywhere.
    pub cluster_backends: usize,
    /// Usable endpoints on this node.
    pub local_backends: usize,
}

/// One thing that clients dial.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FrontendView {
    /// `ClusterIP`, `NodePort`, `LoadBalancer`, `ExternalIP` or `HostPort`.
    pub face: &'static str,
    /// Address and port.
    pub address: String,
}

/// A service that is known and not served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SkippedView {
    /// `namespace/name`.
    pub service: String,
    /// Why.
    pub reason: String,
}

/// An endpoint of a service port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct BackendView {
    /// `namespace/name:port`.
    pub service: String,
    /// Its protocol.
    pub protocol: Protocol,
    /// Address and port.
    pub address: String,
    /// The node that the slice names.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// `localPod`, `thisNode`, `remotePod`, `otherNode` or `outside`.
    pub place: &'static str,
    /// The condition.
    pub ready: bool,
    /// The condition.
    pub serving: bool,
    /// The condition.
    pub terminating: bool,
    /// Its share of new connections beside the others'.
    pub weight: u16,
    /// Whether new connections reach it by the Cluster policy.
    pub used: bool,
    /// Whether new connections reach it by the Local policy.
    pub used_locally: bool,
    /// Why it is used by the Cluster policy, or why not.
    pub reason: &'static str,
    /// Why it is used by the Local policy, or why not.
    pub local_reason: &'static str,
}

/// Another node that runs a gateway.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PeerView {
    /// Its node's name.
    pub node: String,
    /// The underlay address and port that is sent to.
    pub underlay: String,
    /// The largest inner packet that fits, in bytes.
    pub mtu: u32,
    /// Its pod ranges.
    #[serde(rename = "podCIDRs")]
    pub pod_cidrs: Vec<String>,
    /// Its node addresses.
    pub addresses: Vec<String>,
    /// Whether its pods answer clients outside directly, whose connections this node hands on.
    pub direct_return: bool,
}

/// What a load balancer's health check of a service asks for (`healthCheckNodePort`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct HealthCheckView {
    /// The service's namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// The port to answer on.
    pub port: u16,
    /// Local *ready* endpoints: what serves while terminating does not count (Kubernetes `pkg/proxy/healthcheck/service_health.go`).
    pub local_endpoints: usize,
}

impl Compiled {
    /// Every service port that is served, by name.
    pub fn services(&self) -> Vec<ServiceView> {
        let of = |(name, service): (&ObjectName, &Arc<CompiledService>)| {
            let object = self.state.services().get(name);
            let local = object.filter(|object| object.external_policy == TrafficPolicy::Local);
            let check = local.and_then(|object| object.health_check_node_port);
            service.ports.iter().map(|port| service_view(port, check)).collect::<Vec<_>>()
        };
        self.services.iter().flat_map(of).collect()
    }

    /// Every service that is known and not served.
    pub fn skipped(&self) -> Vec<SkippedView> {
        let skipped = self.state.services().values().filter_map(|s| Some((s, s.skip.as_ref()?)));
        skipped.map(|(s, reason)| SkippedView { service: s.name.to_string(), reason: skip_reason(reason) }).collect()
    }

    /// Every endpoint of every service port that is served, with what becomes of it.
    pub fn backends(&self) -> Vec<BackendView> {
        let mut views = Vec::new();
        for (name, compiled) in &self.services {
            let slices = self.state.slices(name).map(|s| &**s);
            for port in &compiled.ports {
                if port.faces.iter().any(|(_, face)| *face == Face::HostPort) {
                    views.extend(port.service.local.iter().map(|backend| host_port_view(port, backend, &self.local.name)));
                    continue;
                }
                let port_name = port.service.name.split_once(':').map_or("", |(_, port)| port);
                let v4 = port.family == Family::V4;
                let found = candidates(slices, port_name, port.protocol, v4, &self.local.name, &self.locator);
                let cluster = cluster_choice(&found, &self.local.name, self.locator.zone.as_ref());
                let local = local_choice(&found);
                for ((candidate, cluster), local) in found.iter().zip(cluster).zip(local) {
                    let endpoint = candidate.endpoint;
                    views.push(BackendView {
                        service: port.service.name.to_string(),
                        protocol: port.protocol,
                        address: std::net::SocketAddr::new(endpoint.address, candidate.backend.port).to_string(),
                        node: endpoint.node.as_deref().map(Into::into),
                        place: place(candidate.backend.place),
                        ready: endpoint.ready,
                        serving: endpoint.serving,
                        terminating: endpoint.terminating,
                        weight: endpoint.weight,
                        used: cluster == Choice::Used,
                        used_locally: local == Some(Choice::Used),
                        reason: reason(cluster, endpoint.ready),
                        local_reason: local.map_or("on another node", |local| reason(local, endpoint.ready)),
                    });
                }
            }
        }
        views
    }

    /// Every peer, by name.
    pub fn peers(&self) -> Vec<PeerView> {
        let view = |peer: &podgate_core::snapshot::Peer| {
            let node = self.state.nodes().get(&peer.name);
            let has = |ip: std::net::IpAddr| peer.prefixes.lookup(ip.into()).is_some();
            PeerView {
                node: peer.name.to_string(),
                underlay: std::net::SocketAddr::new(peer.underlay, peer.port).to_string(),
                mtu: peer.mtu,
                pod_cidrs: node.iter().flat_map(|n| &n.pod_cidrs).filter(|c| has(c.ip())).map(ToString::to_string).collect(),
                addresses: node.iter().flat_map(|n| &n.addresses).filter(|ip| has(**ip)).map(ToString::to_string).collect(),
                direct_return: peer.direct_return,
            }
        };
        self.snapshot.peers.iter().map(view).collect()
    }
}

/// What is asked about a service with a `healthCheckNodePort` and the Local policy; nothing of others.
pub(super) fn health_check(service: &Service, slices: Option<&Slices>, here: &str, locator: &Locator) -> Option<HealthCheckView> {
    let served = service.skip.is_none() && service.external_policy == TrafficPolicy::Local;
    let port = service.health_check_node_port.filter(|_| served)?;
    let mut addresses = std::collections::BTreeSet::new();
    for (service_port, v4) in service.ports.iter().flat_map(|p| [(p, true), (p, false)]) {
        let found = candidates(slices, &service_port.name, service_port.protocol, v4, here, locator);
        let local = found.iter().filter(|c| c.local == super::endpoints::Locality::Here && c.endpoint.ready);
        // An endpoint with several ports is one endpoint.
        addresses.extend(local.map(|c| c.endpoint.address));
    }
    let (namespace, name) = (service.name.namespace.to_string(), service.name.name.to_string());
    Some(HealthCheckView { namespace, name, port, local_endpoints: addresses.len() })
}

fn service_view(port: &CompiledPort, health_check_node_port: Option<u16>) -> ServiceView {
    let service = &port.service;
    let address = |key: &podgate_core::service::FrontendKey| std::net::SocketAddr::new(key.addr.ip(), key.port).to_string();
    ServiceView {
        service: service.name.to_string(),
        protocol: port.protocol,
        frontends: port
            .faces
            .iter()
            .filter(|(_, face)| *face != Face::PeersNodePort)
            .map(|(key, f)| FrontendView { face: f.name(), address: address(key) })
            .collect(),
        internal_traffic_policy: policy(service.internal_policy),
        external_traffic_policy: policy(service.external_policy),
        session_affinity_seconds: service.affinity.map(|a| a.as_secs()),
        balance: service.balance.cluster.name(),
        source_ranges: service.source_ranges.iter().map(ToString::to_string).collect(),
        health_check_node_port,
        cluster_backends: service.cluster.len(),
        local_backends: service.local.len(),
    }
}

/// The pod that asked for the port: it is attached, which is all that is asked of it.
fn host_port_view(port: &CompiledPort, backend: &Backend, node: &str) -> BackendView {
    BackendView {
        service: port.service.name.to_string(),
        protocol: port.protocol,
        address: std::net::SocketAddr::new(backend.addr.ip(), backend.port).to_string(),
        node: Some(node.to_owned()),
        place: place(backend.place),
        ready: true,
        serving: true,
        terminating: false,
        weight: 1,
        used: true,
        used_locally: true,
        reason: "attached with this host port",
        local_reason: "attached with this host port",
    }
}

fn policy(policy: TrafficPolicy) -> &'static str {
    match policy {
        TrafficPolicy::Cluster => "Cluster",
        TrafficPolicy::Local => "Local",
    }
}

fn place(place: Place) -> &'static str {
    match place {
        Place::LocalPod => "localPod",
        Place::ThisNode => "thisNode",
        Place::RemotePod => "remotePod",
        Place::OtherNode => "otherNode",
        Place::Outside => "outside",
    }
}

fn reason(choice: Choice, ready: bool) -> &'static str {
    match choice {
        Choice::Used if ready => "ready",
        Choice::Used => "terminating but still serving, and no endpoint is ready",
        Choice::HintedElsewhere => "ready, but its topology hints give it to other nodes or zones",
        Choice::NotReady => "not ready",
        Choice::Terminating => "terminating, and others are ready",
    }
}

fn skip_reason(reason: &SkipReason) -> String {
    match reason {
        SkipReason::Headless => "headless: clients find its endpoints by name".into(),
        SkipReason::NoClusterIp => "it has no cluster IP yet".into(),
        SkipReason::ExternalName => "ExternalName is resolved by DNS alone".into(),
        SkipReason::OtherProxy(name) => format!("service.kubernetes.io/service-proxy-name gives it to {name}"),
    }
}
