//! One service: its frontends and the service ports behind them.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnetwork::IpNetwork;
use podgate_core::addr::{Addr, protocol};
use podgate_core::balance::{Balance, Maglev, Pick, Weights};
use podgate_core::fib::within;
use podgate_core::service::{Backend, Face, Frontend, FrontendKey, Place, ServicePort, TrafficPolicy};

use super::Warning;
use super::endpoints::{Chosen, List, candidates, choose};
use super::node::{LocalNode, Locator};
use crate::model::{BALANCE_ANNOTATION, BalancePolicy, ObjectName, Protocol, Service, Slices, WEIGHT_ANNOTATION, WEIGHT_MAX};

/// A service as compiled: a service port for each port and family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct CompiledService {
    pub ports: Vec<CompiledPort>,
    pub warnings: Vec<Warning>,
}

/// A service port of one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct CompiledPort {
    pub protocol: Protocol,
    pub family: Family,
    /// What clients dial.
    pub faces: Vec<(FrontendKey, Face)>,
    /// How its endpoints are chosen, as it was asked for.
    pub policy: BalancePolicy,
    pub service: Arc<ServicePort>,
}

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Family {
    V4,
    V6,
}

impl Family {
    pub const BOTH: [Family; 2] = [Family::V4, Family::V6];

    pub fn holds(self, ip: IpAddr) -> bool {
        ip.is_ipv4() == (self == Family::V4)
    }

    /// An address of it that is nobody's.
    fn nobody(self) -> IpAddr {
        match self {
            Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
            Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
        }
    }
}

impl CompiledService {
    pub fn frontend(&self, key: &FrontendKey) -> Option<Frontend> {
        let port = self.ports.iter().find_map(|p| Some((p.faces.iter().find(|(k, _)| k == key)?.1, &p.service)));
        port.map(|(face, service)| Frontend { face, service: service.clone() })
    }

    pub fn keys(&self) -> impl Iterator<Item = FrontendKey> {
        self.ports.iter().flat_map(|p| p.faces.iter().map(|(key, _)| *key))
    }
}

/// The name as operators know it.
pub(super) fn port_name(service: &ObjectName, port: &str) -> Arc<str> {
    if port.is_empty() { service.to_string().into() } else { format!("{service}:{port}").into() }
}

/// The service that a service port's name belongs to: neither part of the name may hold a colon, nor the namespace a slash.
pub(super) fn owner(port: &ServicePort) -> ObjectName {
    let service = port.name.split_once(':').map_or(&*port.name, |(service, _)| service);
    let (namespace, name) = service.split_once('/').unwrap_or(("", service));
    ObjectName::new(namespace, name)
}

/// The same on every node, in every generation and after every restart: FNV-1a of name, protocol and family, then mixed, since FNV
/// spreads its last bytes badly. Flows keep it, so it must not change between versions.
pub(super) fn service_id(name: &str, protocol: u8, family: Family) -> u64 {
    let bytes = name.bytes().chain([0, protocol, if family == Family::V4 { 4 } else { 6 }]);
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    // The finalizer of SplitMix64.
    let hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (hash ^ (hash >> 31)).max(1)
}

/// Compiles one service; what equals the previous result keeps its `Arc`s.
pub(super) fn compile_service(
    service: &Service,
    slices: Option<&Slices>,
    local: &LocalNode,
    at: &Locator,
    previous: Option<&CompiledService>,
) -> CompiledService {
    let mut compiled = CompiledService::default();
    if service.skip.is_some() {
        return compiled;
    }
    let vips = Vips::of(service, local, &mut compiled.warnings);
    for node_port in service.ports.iter().filter_map(|p| p.node_port).filter(|p| !local.settings.node_ports.contains(p)) {
        let (low, high) = local.settings.node_ports.clone().into_inner();
        let message = format!("node port {node_port} is outside nodePorts ({low}-{high}) and is not served; change one of them");
        compiled.warnings.push(Warning::new(format!("Service {}", service.name), message));
    }
    warn_of_annotations(service, slices, &mut compiled.warnings);
    for port in service.ports.iter().filter(|port| port.protocol == Protocol::Sctp) {
        // The pipeline forwards it by address: an association may have several, which no single translation can follow (RFC 9260 §5.1.2).
        let message = format!("its port {}/SCTP is not served: SCTP reaches endpoints by their own addresses alone; dial those", port.port);
        compiled.warnings.push(Warning::new(format!("Service {}", service.name), message));
    }
    for port in &service.ports {
        // A service is of the families of its cluster IPs, whatever other addresses it has: upstream has a proxier for each family.
        for family in Family::BOTH.into_iter().filter(|f| service.cluster_ips.iter().any(|ip| f.holds(*ip))) {
            let mut faces: Vec<(FrontendKey, Face)> = Vec::new();
            let mut add = |addr: Addr, number: u16, face: Face| {
                let key = FrontendKey { addr, port: number, protocol: port.protocol.number() };
                if faces.iter().all(|(known, _)| *known != key) {
                    faces.push((key, face));
                }
            };
            vips.faces(family).for_each(|(ip, face)| add(ip.into(), port.port, face));
            if let Some(node_port) = port.node_port.filter(|p| local.settings.node_ports.contains(p)) {
                at.node_port_addresses.iter().filter(|a| family.holds(a.ip())).for_each(|a| add(*a, node_port, Face::NodePort));
                if local.settings.direct_return_vni.is_some() && service.external_policy == TrafficPolicy::Cluster {
                    let key = FrontendKey::at_a_peer(family.nobody().into(), node_port, port.protocol.number());
                    add(key.addr, node_port, Face::PeersNodePort);
                }
            }
            if faces.is_empty() {
                continue;
            }
            let found = candidates(slices, &port.name, port.protocol, family == Family::V4, &local.name, at);
            let name = port_name(&service.name, &port.name);
            let before = previous.and_then(|p| p.ports.iter().find(|p| p.service.name == name && p.protocol == port.protocol && p.family == family));
            let chosen = choose(&found, &local.name, at.zone.as_ref());
            let service_port = service_port(service, name, port.protocol, family, &faces, chosen, at);
            let service_port = share(service_port, before.map(|b| &b.service));
            compiled.ports.push(CompiledPort { protocol: port.protocol, family, faces, policy: service.balance.clone(), service: service_port });
        }
    }
    compiled
}

/// Annotations that say nothing that can be done.
fn warn_of_annotations(service: &Service, slices: Option<&Slices>, warnings: &mut Vec<Warning>) {
    if let BalancePolicy::Unknown(text) = &service.balance {
        let message = format!("{BALANCE_ANNOTATION}: `{text}` is none of random, maglev, least-loaded; endpoints are chosen at random");
        warnings.push(Warning::new(format!("Service {}", service.name), message));
    }
    for slice in slices.into_iter().flat_map(|s| s.values()) {
        if let Some(text) = &slice.bad_weight {
            let message = format!("{WEIGHT_ANNOTATION}: `{text}` is no number from 1 to {WEIGHT_MAX}; its endpoints count once each");
            warnings.push(Warning::new(format!("EndpointSlice {}", slice.name), message));
        }
    }
}

/// How one of a list's endpoints is chosen. Only a list of a service that asks for it has a table.
fn pick(policy: &BalancePolicy, list: &List) -> Pick {
    let weights = || Weights::new(&list.weights).map(Arc::new);
    match policy {
        BalancePolicy::Random | BalancePolicy::Unknown(_) => weights().map_or(Pick::Even, Pick::Weighted),
        BalancePolicy::Maglev => Pick::Maglev(Arc::new(Maglev::new(&list.backends, &list.weights))),
        BalancePolicy::LeastLoaded => Pick::LeastLoaded(weights()),
    }
}

fn balance(policy: &BalancePolicy, chosen: &Chosen) -> Balance {
    let (cluster, local) = (&chosen.cluster, &chosen.local);
    let of_cluster = pick(policy, cluster);
    // As on a cluster of one node.
    let alike = cluster.backends == local.backends && cluster.weights == local.weights;
    let of_local = if alike { of_cluster.clone() } else { pick(policy, local) };
    Balance { cluster: of_cluster, local: of_local }
}

fn service_port(
    service: &Service,
    name: Arc<str>,
    protocol: Protocol,
    family: Family,
    faces: &[(FrontendKey, Face)],
    chosen: Chosen,
    at: &Locator,
) -> ServicePort {
    let mut source_ranges: Vec<IpNetwork> = service.source_ranges.iter().filter(|r| family.holds(r.ip())).copied().collect();
    // A node that has a load balancer's VIP as a local address dials it from that very address (upstream `nftables/proxier.go`).
    if at.addresses.iter().any(|a| family.holds(a.ip()) && within(&source_ranges, *a)) {
        source_ranges.extend(faces.iter().filter(|(_, face)| *face == Face::LoadBalancer).map(|(key, _)| IpNetwork::from(key.addr.ip())));
    }
    source_ranges.sort_unstable();
    source_ranges.dedup();
    ServicePort {
        id: service_id(&name, protocol.number(), family),
        name,
        internal_policy: service.internal_policy,
        external_policy: service.external_policy,
        balance: balance(&service.balance, &chosen),
        cluster: chosen.cluster.backends.into(),
        local: chosen.local.backends.into(),
        affinity: service.affinity,
        source_ranges,
    }
}

/// `next`, with whatever equals the previous one shared with it.
fn share(mut next: ServicePort, previous: Option<&Arc<ServicePort>>) -> Arc<ServicePort> {
    let Some(previous) = previous else { return Arc::new(next) };
    if **previous == next {
        return previous.clone();
    }
    if previous.name == next.name {
        next.name = previous.name.clone();
    }
    if previous.cluster == next.cluster {
        next.cluster = previous.cluster.clone();
    }
    if previous.local == next.local {
        next.local = previous.local.clone();
    }
    if previous.balance == next.balance {
        next.balance = previous.balance.clone();
    }
    Arc::new(next)
}

/// A service's VIPs, with those taken out that may not be one.
struct Vips {
    faces: Vec<(IpAddr, Face)>,
}

impl Vips {
    fn of(service: &Service, local: &LocalNode, warnings: &mut Vec<Warning>) -> Vips {
        let settings = &local.settings;
        let mut warn = |message: String| warnings.push(Warning::new(format!("Service {}", service.name), message));
        let mut faces = Vec::new();
        for ip in &service.cluster_ips {
            if within(&settings.pod_cidrs, (*ip).into()) {
                warn(format!("its cluster IP {ip} lies in a pod range and is not served; give it one from serviceCIDRs"));
            } else {
                faces.push((*ip, Face::ClusterIp));
            }
        }
        for ip in &service.load_balancer_ips {
            if within(&settings.pod_cidrs, (*ip).into()) {
                warn(format!("its load balancer's address {ip} lies in a pod range and is not served"));
            } else {
                faces.push((*ip, Face::LoadBalancer));
            }
        }
        for ip in &service.external_ips {
            if !within(&settings.external_ips, (*ip).into()) {
                warn(format!("its external IP {ip} is not served: externalIPs.allow does not hold it"));
            } else if within(&settings.pod_cidrs, (*ip).into()) || within(&settings.service_cidrs, (*ip).into()) {
                warn(format!("its external IP {ip} lies in a pod or service range and is not served: it would shadow what is there"));
            } else {
                faces.push((*ip, Face::ExternalIp));
            }
        }
        for family in Family::BOTH {
            let of_family = |face: Face| faces.iter().any(|(ip, f)| *f == face && family.holds(*ip));
            let unguarded = !service.source_ranges.iter().any(|r| family.holds(r.ip()));
            if !service.source_ranges.is_empty() && unguarded && of_family(Face::LoadBalancer) {
                let family = if family == Family::V4 { "IPv4" } else { "IPv6" };
                warn(format!("loadBalancerSourceRanges has no {family} range: its {family} address lets everybody in, as with kube-proxy"));
            }
        }
        Vips { faces }
    }

    fn faces(&self, family: Family) -> impl Iterator<Item = (IpAddr, Face)> {
        self.faces.iter().filter(move |(ip, _)| family.holds(*ip)).copied()
    }
}

/// The gateway's own service: each gateway address, at the health port, leads to the health endpoint on the node. A dial of it from
/// here goes through translation, the flow table and the TUN `host` and back, which is what `ready` has to prove.
pub(super) fn self_test(local: &LocalNode, at: &Locator) -> CompiledService {
    let port = local.settings.health_port;
    let name = port_name(&self_test_name(), "");
    let ports = at.gateways.iter().map(|(gateway, primary)| {
        let family = if gateway.is_v4() { Family::V4 } else { Family::V6 };
        let backends: Arc<[Backend]> = [Backend { addr: *primary, port, place: Place::ThisNode }].into();
        let service = ServicePort {
            id: service_id(&name, protocol::TCP, family),
            name: name.clone(),
            internal_policy: TrafficPolicy::Cluster,
            external_policy: TrafficPolicy::Cluster,
            cluster: backends.clone(),
            local: backends,
            balance: Balance::default(),
            affinity: None,
            source_ranges: Vec::new(),
        };
        let key = FrontendKey { addr: *gateway, port, protocol: protocol::TCP };
        let faces = vec![(key, Face::ClusterIp)];
        CompiledPort { protocol: Protocol::Tcp, family, faces, policy: BalancePolicy::Random, service: Arc::new(service) }
    });
    CompiledService { ports: ports.collect(), warnings: Vec::new() }
}

/// The namespace of pods' host ports as services. It is none that Kubernetes takes, so no service has the same name.
pub(super) const HOST_PORTS: &str = "hostPort";

/// Pods' host ports as services of the node's own, by pod.
pub(super) fn host_ports(local: &LocalNode, at: &Locator) -> BTreeMap<ObjectName, CompiledService> {
    let mut services: BTreeMap<ObjectName, CompiledService> = BTreeMap::new();
    for port in &local.host_ports {
        let family = if port.to.is_ipv4() { Family::V4 } else { Family::V6 };
        let object = ObjectName::new(HOST_PORTS, &port.pod.replace(':', "_"));
        let name = port_name(&object, &port.port.to_string());
        let on_the_node = at.node_port_addresses.iter().copied().filter(|address| family.holds(address.ip()));
        let addresses: Vec<Addr> = port.address.map_or_else(|| on_the_node.collect(), |address| vec![address.into()]);
        let key = |addr: Addr| FrontendKey { addr, port: port.port, protocol: port.protocol.number() };
        let backends: Arc<[Backend]> = [Backend { addr: port.to.into(), port: port.to_port, place: Place::LocalPod }].into();
        let service = ServicePort {
            id: service_id(&name, port.protocol.number(), family),
            name,
            internal_policy: TrafficPolicy::Local,
            external_policy: TrafficPolicy::Local,
            cluster: backends.clone(),
            local: backends,
            balance: Balance::default(),
            affinity: None,
            source_ranges: Vec::new(),
        };
        let faces = addresses.into_iter().map(|addr| (key(addr), Face::HostPort)).collect();
        let compiled = CompiledPort { protocol: port.protocol, family, faces, policy: BalancePolicy::Random, service: Arc::new(service) };
        services.entry(object).or_default().ports.push(compiled);
    }
    services
}

/// `podgate/self-test`.
pub(super) fn self_test_name() -> ObjectName {
    ObjectName::new("podgate", "self-test")
}
