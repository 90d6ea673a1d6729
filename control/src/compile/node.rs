//! Nodes: this one's own tables, the peers, and where every address is.

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::sync::Arc;

use ipnetwork::IpNetwork;
use podgate_core::addr::Addr;
use podgate_core::encap::overhead;
use podgate_core::fib::{Pod, PodTable, PrefixMap, bounds, within};
use podgate_core::flow::Timeouts;
use podgate_core::service::Place;
use podgate_core::snapshot::{DirectReturn, Masquerade, NodeTables, OutsideToPods, Peer};

use super::Warning;
use crate::config::{Config, NodePortAddresses, SourceConfig};
use crate::model::{Announcement, ClusterState, Node, Protocol};

/// What only this machine knows, beside the cluster's objects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalNode {
    /// This node's name.
    pub name: Arc<str>,
    /// What the configuration says.
    pub settings: Settings,
    /// The machine's own addresses that pods or peers may meet; the first of each family is the primary one.
    pub addresses: Vec<IpAddr>,
    /// Its underlay addresses.
    pub underlay: Vec<IpAddr>,
    /// MTU of its underlay, in bytes.
    pub underlay_mtu: u32,
    /// Paths to peers that were found to be narrower than the underlay: the peer's underlay address and the MTU, in bytes.
    pub path_mtus: BTreeMap<IpAddr, u32>,
    /// MTU towards the outside, in bytes.
    pub outside_mtu: u32,
    /// Addresses that masqueraded traffic leaves from: those that the node's routing would choose, one of each family at most.
    pub masquerade_sources: Vec<IpAddr>,
    /// The pods that are attached here, by address.
    pub pods: Vec<(IpAddr, Pod)>,
    /// Ports of this node that lead to pods which are attached here.
    pub host_ports: Vec<HostPort>,
    /// Marks this process's own probes.
    pub probe_token: u64,
    /// How many workers there are.
    pub workers: u16,
}

impl LocalNode {
    /// Whether `other` differs from it in pods and their ports at most.
    pub fn is_but_for_pods(&self, other: &LocalNode) -> bool {
        let bare = |node: &LocalNode| LocalNode { pods: Vec::new(), host_ports: Vec::new(), ..node.clone() };
        bare(self) == bare(other)
    }
}

/// A port of this node that leads to a pod of this node (`hostPort`).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostPort {
    /// The pod, as `namespace/name`.
    pub pod: Arc<str>,
    /// The protocol.
    pub protocol: Protocol,
    /// On this address of the node alone; `None` for those that answer node ports.
    pub address: Option<IpAddr>,
    /// The port on the node.
    pub port: u16,
    /// The pod's address, of the same family.
    pub to: IpAddr,
    /// The port in the pod.
    pub to_port: u16,
}

/// The part of the configuration that the tables depend on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The cluster's pod ranges.
    pub pod_cidrs: Vec<IpNetwork>,
    /// The cluster's service ranges.
    pub service_cidrs: Vec<IpNetwork>,
    /// Node ports.
    pub node_ports: RangeInclusive<u16>,
    /// Which addresses answer them.
    pub node_port_addresses: NodePortAddresses,
    /// Source ports of traffic that leaves the cluster.
    pub masquerade: Option<Vec<RangeInclusive<u16>>>,
    /// Inside these ranges external IPs are served.
    pub external_ips: Vec<IpNetwork>,
    /// UDP port of the overlay.
    pub overlay_port: u16,
    /// VNI of the overlay.
    pub overlay_vni: u32,
    /// VNI of direct return, if this node takes part in it.
    pub direct_return_vni: Option<u32>,
    /// Whether outside may open connections to pods.
    pub outside_to_pods: OutsideToPods,
    /// Port of the health endpoint: what the gateway's service of its own leads to.
    pub health_port: u16,
    /// Whether a node must announce itself to be a peer.
    pub announcements: Announcements,
    /// Lifetimes of flows.
    pub timeouts: Timeouts,
}

/// Whether a node must announce its overlay to be a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Announcements {
    /// Pod ranges and an `InternalIP` will do: the manifests were written for this gateway.
    Optional,
    /// Without an announcement it is outside: any node of the cluster may be without a gateway.
    Required,
}

impl From<&Config> for Settings {
    fn from(config: &Config) -> Settings {
        Settings {
            pod_cidrs: config.pod_cidrs.clone(),
            service_cidrs: config.service_cidrs.clone(),
            node_ports: config.node_ports.clone(),
            node_port_addresses: config.node_port_addresses.clone(),
            masquerade: config.masquerade.clone(),
            external_ips: config.external_ips.clone(),
            overlay_port: config.overlay.port,
            overlay_vni: config.overlay.vni,
            direct_return_vni: config.overlay.direct_return_vni,
            outside_to_pods: config.outside_to_pods,
            health_port: config.health.port(),
            announcements: match config.source {
                SourceConfig::Directory(_) => Announcements::Optional,
                SourceConfig::Kubernetes { .. } | SourceConfig::Etcd(_) => Announcements::Required,
            },
            timeouts: config.flows.timeouts,
        }
    }
}

/// Ports of a gateway address that SNAT inside the cluster takes (design D1: routed by address, so the whole unprivileged range).
const SNAT_PORTS: RangeInclusive<u16> = 1024..=65535;

/// The MTU of pods' interfaces: the largest inner packet that fits the underlay in whichever family a peer is reached.
pub fn pod_mtu(underlay: &[IpAddr], underlay_mtu: u32) -> u32 {
    underlay_mtu.saturating_sub(underlay.iter().map(|ip| overhead(*ip)).max().unwrap_or(0))
}

/// The gateway's own address in a pod range: the first behind the network's.
pub fn gateway_address(cidr: IpNetwork) -> Option<IpAddr> {
    let (first, last) = bounds(cidr);
    (last.0 > first.0).then(|| Addr(first.0 + 1).ip())
}

fn gateway_of(cidrs: &[IpNetwork], v4: bool) -> Option<Addr> {
    cidrs.iter().filter(|c| c.is_ipv4() == v4).find_map(|c| gateway_address(*c)).map(Addr::from)
}

/// Everything about nodes that the snapshot holds.
pub(super) struct Nodes {
    pub tables: NodeTables,
    pub peers: Vec<Peer>,
    pub routes: PrefixMap<u32>,
    pub by_underlay: Vec<(Addr, u32)>,
    pub locator: Locator,
    pub warnings: Vec<Warning>,
}

/// Where an address is. Services are compiled anew when it changes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Locator {
    places: PrefixMap<Place>,
    /// This node's zone, for topology hints.
    pub zone: Option<Arc<str>>,
    /// This node's own addresses.
    pub addresses: Vec<Addr>,
    /// Those that answer node ports.
    pub node_port_addresses: Vec<Addr>,
    /// The gateway's addresses, and of the same family the node's primary one.
    pub gateways: Vec<(Addr, Addr)>,
}

impl Locator {
    pub fn place(&self, addr: Addr) -> Place {
        self.places.lookup(addr).copied().unwrap_or(Place::Outside)
    }
}

pub(super) fn nodes(state: &ClusterState, local: &LocalNode) -> Nodes {
    let mut warnings = Vec::new();
    let own = state.nodes().get(&local.name);
    let settings = &local.settings;
    if own.is_none() {
        let message = "the source has no Node of this name: this node has no pod range and cannot attach pods; add the object, or set `node`";
        warnings.push(Warning::new(format!("Node {}", local.name), message));
    }
    let node_pod_cidrs = own_pod_cidrs(own.map(|n| &**n), settings, &mut warnings);
    let mut addresses: Vec<Addr> = local.addresses.iter().chain(&local.underlay).map(|ip| Addr::from(*ip)).collect();
    addresses.sort_unstable();
    addresses.dedup();
    for missing in own.iter().flat_map(|n| &n.addresses).filter(|ip| !addresses.contains(&Addr::from(**ip))) {
        let message = format!("its InternalIP {missing} is on no interface of this machine; give the machine the address, or correct the object");
        warnings.push(Warning::new(format!("Node {}", local.name), message));
    }
    let node_port_addresses = node_port_addresses(settings, local, &addresses);
    let gateways = [true, false].map(|v4| gateway_of(&node_pod_cidrs, v4));
    let primary = |v4: bool| local.addresses.iter().find(|ip| ip.is_ipv4() == v4).map(|ip| Addr::from(*ip));
    let source = |v4: bool| local.masquerade_sources.iter().find(|ip| ip.is_ipv4() == v4).map(|ip| Addr::from(*ip));
    let tables = NodeTables {
        addresses: addresses.clone(),
        gateway_v4: gateways[0],
        gateway_v6: gateways[1],
        node_pod_cidrs: node_pod_cidrs.clone(),
        cluster_pod_cidrs: settings.pod_cidrs.clone(),
        service_cidrs: settings.service_cidrs.clone(),
        node_ports: settings.node_ports.clone(),
        node_port_addresses: node_port_addresses.clone(),
        masquerade: settings.masquerade.clone().map(|ports| Masquerade { ports, source_v4: source(true), source_v6: source(false) }),
        snat_ports: SNAT_PORTS,
        overlay_port: settings.overlay_port,
        overlay_vni: settings.overlay_vni,
        direct_return: settings.direct_return_vni.map(|vni| DirectReturn { vni, addresses: known_to_peers(own.map(|n| &**n), local) }),
        outside_mtu: local.outside_mtu,
        outside_to_pods: settings.outside_to_pods,
        timeouts: settings.timeouts,
        probe_token: local.probe_token,
        workers: local.workers,
    };
    let mut claims = Claims::of(local, &node_pod_cidrs, &addresses);
    let (mut peers, mut routes, mut by_underlay) = (Vec::new(), Vec::new(), Vec::new());
    let mut places: Vec<(IpNetwork, Place)> = Vec::new();
    for node in state.nodes().values().filter(|n| n.name != local.name) {
        let cidrs: Vec<IpNetwork> = node.pod_cidrs.iter().filter(|c| claims.range(node, **c, settings, &mut warnings)).copied().collect();
        let hosts: Vec<IpAddr> = node.addresses.iter().filter(|ip| claims.address(node, **ip, settings, &mut warnings)).copied().collect();
        places.extend(cidrs.iter().map(|c| (*c, Place::RemotePod)));
        places.extend(hosts.iter().map(|ip| (IpNetwork::from(*ip), Place::OtherNode)));
        let Some(link) = link(node, local, &mut warnings) else { continue };
        let index = u32::try_from(peers.len()).expect("fewer than 2^32 nodes");
        for underlay in node.underlay() {
            by_underlay.push((Addr::from(*underlay), index));
        }
        let own_prefixes = || cidrs.iter().copied().chain(hosts.iter().map(|ip| IpNetwork::from(*ip)));
        routes.extend(own_prefixes().map(|prefix| (prefix, index)));
        let extra = node.underlay().iter().filter(|ip| !claims.taken_by_other(node, **ip)).map(|ip| IpNetwork::from(*ip));
        let prefixes = PrefixMap::new(own_prefixes().chain(extra).map(|prefix| (prefix, ())));
        let Link { underlay, port, mtu, direct_return } = link;
        peers.push(Peer { name: node.name.clone(), underlay, port, mtu, prefixes: Arc::new(prefixes), direct_return });
    }
    drop_shared_underlays(&mut by_underlay, &peers, &addresses, &mut warnings);
    places.extend(node_pod_cidrs.iter().map(|c| (*c, Place::LocalPod)));
    places
        .extend(local.pods.iter().filter(|(ip, _)| !within(&node_pod_cidrs, Addr::from(*ip))).map(|(ip, _)| (IpNetwork::from(*ip), Place::LocalPod)));
    places.extend(addresses.iter().chain(gateways.iter().flatten()).map(|a| (IpNetwork::from(a.ip()), Place::ThisNode)));
    let locator = Locator {
        places: PrefixMap::new(places),
        zone: own.and_then(|n| n.zone.clone()),
        addresses,
        node_port_addresses,
        gateways: [true, false].into_iter().zip(gateways).filter_map(|(v4, gateway)| Some((gateway?, primary(v4)?))).collect(),
    };
    Nodes { tables, peers, routes: PrefixMap::new(routes), by_underlay, locator, warnings }
}

pub(super) fn pod_table(local: &LocalNode) -> PodTable {
    PodTable::new(local.pods.iter().map(|(ip, pod)| (Addr::from(*ip), pod.clone())))
}

fn own_pod_cidrs(own: Option<&Node>, settings: &Settings, warnings: &mut Vec<Warning>) -> Vec<IpNetwork> {
    let Some(own) = own else { return Vec::new() };
    let (inside, outside): (Vec<IpNetwork>, Vec<_>) = own.pod_cidrs.iter().copied().partition(|c| inside(&settings.pod_cidrs, *c));
    for cidr in outside {
        warnings.push(Warning::new(format!("Node {}", own.name), foreign_range(&cidr, settings)));
    }
    if inside.is_empty() {
        warnings.push(Warning::new(
            format!("Node {}", own.name),
            "it has no pod range of this cluster's: no pod can be attached here; set spec.podCIDRs",
        ));
    }
    inside
}

fn foreign_range(cidr: &IpNetwork, settings: &Settings) -> String {
    let known = settings.pod_cidrs.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    format!("its pod range {cidr} is not inside podCIDRs ({known}) and is ignored; correct the object or the configuration")
}

/// Whether `cidr` lies whole inside one of `ranges`.
pub(super) fn inside(ranges: &[IpNetwork], cidr: IpNetwork) -> bool {
    let (first, last) = bounds(cidr);
    ranges.iter().any(|range| bounds(*range).0 <= first && last <= bounds(*range).1)
}

fn node_port_addresses(settings: &Settings, local: &LocalNode, addresses: &[Addr]) -> Vec<Addr> {
    let mut chosen: Vec<Addr> = match &settings.node_port_addresses {
        NodePortAddresses::Primary => {
            let first = |v4: bool| local.addresses.iter().find(|ip| ip.is_ipv4() == v4);
            [first(true), first(false)].into_iter().flatten().map(|ip| Addr::from(*ip)).collect()
        }
        NodePortAddresses::Within(ranges) => addresses.iter().filter(|a| within(ranges, **a)).copied().collect(),
    };
    chosen.sort_unstable();
    chosen
}

/// The addresses of this machine by which peers know this node.
fn known_to_peers(own: Option<&Node>, local: &LocalNode) -> Vec<Addr> {
    let announced = own.into_iter().flat_map(|node| &node.addresses).filter(|ip| local.addresses.contains(ip));
    announced.chain(&local.underlay).map(|ip| Addr::from(*ip)).collect()
}

/// Which node has which range and address already: of two nodes that claim one, the first by name has it, and this node before all.
struct Claims {
    ranges: Vec<(IpNetwork, Arc<str>)>,
    addresses: std::collections::HashMap<Addr, Arc<str>>,
}

impl Claims {
    fn of(local: &LocalNode, cidrs: &[IpNetwork], addresses: &[Addr]) -> Claims {
        Claims {
            ranges: cidrs.iter().map(|c| (*c, local.name.clone())).collect(),
            addresses: addresses.iter().map(|a| (*a, local.name.clone())).collect(),
        }
    }

    fn range(&mut self, node: &Node, cidr: IpNetwork, settings: &Settings, warnings: &mut Vec<Warning>) -> bool {
        let (first, last) = bounds(cidr);
        let meets = |other: &IpNetwork| bounds(*other).0 <= last && first <= bounds(*other).1;
        if let Some((other, holder)) = self.ranges.iter().find(|(other, _)| meets(other)) {
            let message = format!("its pod range {cidr} overlaps {other} of Node {holder} and is ignored; give each node a range of its own");
            warnings.push(Warning::new(format!("Node {}", node.name), message));
            return false;
        }
        if !inside(&settings.pod_cidrs, cidr) {
            warnings.push(Warning::new(format!("Node {}", node.name), foreign_range(&cidr, settings)));
            return false;
        }
        self.ranges.push((cidr, node.name.clone()));
        true
    }

    fn address(&mut self, node: &Node, ip: IpAddr, settings: &Settings, warnings: &mut Vec<Warning>) -> bool {
        let about = || format!("Node {}", node.name);
        let ranges = [("pod", &settings.pod_cidrs), ("service", &settings.service_cidrs)];
        if let Some((kind, _)) = ranges.iter().find(|(_, cidrs)| within(cidrs, ip.into())) {
            warnings.push(Warning::new(
                about(),
                format!("its InternalIP {ip} lies in a {kind} range and is ignored; nodes, pods and services may not overlap"),
            ));
            return false;
        }
        if let Some(holder) = self.addresses.get(&Addr::from(ip)) {
            warnings
                .push(Warning::new(about(), format!("its InternalIP {ip} is Node {holder}'s and is ignored; give each node an address of its own")));
            return false;
        }
        self.addresses.insert(ip.into(), node.name.clone());
        true
    }

    fn taken_by_other(&self, node: &Node, ip: IpAddr) -> bool {
        self.addresses.get(&Addr::from(ip)).is_some_and(|holder| *holder != node.name)
    }
}

/// How a peer is reached.
struct Link {
    underlay: IpAddr,
    port: u16,
    mtu: u32,
    direct_return: bool,
}

/// How `node`'s gateway is reached, or `None` if it has none and so is outside.
fn link(node: &Node, local: &LocalNode, warnings: &mut Vec<Warning>) -> Option<Link> {
    let settings = &local.settings;
    let (port, vni, mtu, direct_return_vni) = match &node.announcement {
        Announcement::None => return None,
        Announcement::Silent => {
            let peer = settings.announcements == Announcements::Optional && !node.pod_cidrs.is_empty() && !node.addresses.is_empty();
            peer.then_some((None, None, None, settings.direct_return_vni))?
        }
        Announcement::Overlay { port, vni, mtu, direct_return_vni, .. } => (*port, *vni, *mtu, *direct_return_vni),
    };
    let about = || format!("Node {}", node.name);
    if let Some(vni) = vni.filter(|v| *v != settings.overlay_vni) {
        let message = format!("its gateway's VNI is {vni}, this one's {}: no overlay between them; set overlay.vni alike", settings.overlay_vni);
        warnings.push(Warning::new(about(), message));
        return None;
    }
    // In the order of this node's own addresses, so that both sides of a dual-stack pair choose the same family where they can.
    let common = local.underlay.iter().find_map(|own| node.underlay().iter().find(|theirs| theirs.is_ipv4() == own.is_ipv4()));
    let Some(underlay) = common.or(node.underlay().first()).copied() else {
        warnings.push(Warning::new(about(), "its gateway has no underlay address; announce one, or give the node an InternalIP"));
        return None;
    };
    if common.is_none() {
        let message = format!("its underlay address {underlay} is of a family that this node's underlay lacks: nothing can be sent to it");
        warnings.push(Warning::new(about(), message));
    }
    let path = local.underlay_mtu.min(mtu.unwrap_or(u32::MAX)).min(local.path_mtus.get(&underlay).copied().unwrap_or(u32::MAX));
    // Not above what its pods' interfaces take: a packet that had to be cut there could be no IPv6 packet.
    let mtu = pod_mtu(node.underlay(), path);
    let direct_return = settings.direct_return_vni.is_some() && direct_return_vni == settings.direct_return_vni;
    Some(Link { underlay, port: port.unwrap_or(settings.overlay_port), mtu, direct_return })
}

/// Sorts, and of several peers (or this node and a peer) with one underlay address keeps the first.
fn drop_shared_underlays(by_underlay: &mut Vec<(Addr, u32)>, peers: &[Peer], own: &[Addr], warnings: &mut Vec<Warning>) {
    let mut seen: HashSet<Addr> = own.iter().copied().collect();
    by_underlay.sort_unstable();
    by_underlay.dedup();
    by_underlay.retain(|(addr, index)| {
        let first = seen.insert(*addr);
        if !first {
            let message =
                format!("its underlay address {addr} is another node's too: what arrives from there counts as the other's; correct one of them");
            warnings.push(Warning::new(format!("Node {}", peers[*index as usize].name), message));
        }
        first
    });
}
