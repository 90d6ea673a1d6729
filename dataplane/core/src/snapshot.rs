//! The tables that workers read: immutable, shared, one generation per publication.
//!
//! A new snapshot shares every unchanged part with the one before ([`std::sync::Arc`]), so the cost of a change follows the change.
//! `podgate`'s compiler builds these; nothing here is parsed or validated again.

use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::sync::Arc;

use ipnetwork::IpNetwork;

use crate::addr::Addr;
use crate::fib::{PodTable, PrefixMap};
use crate::flow::Timeouts;
use crate::packet::Network;
use crate::service::ServiceTable;

/// A snapshot's number: it grows by one with each publication.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Generation(pub u64);

/// Everything a worker needs to know, as of one generation.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Its number.
    pub generation: Generation,
    /// This node.
    pub node: Arc<NodeTables>,
    /// Frontends and their endpoints.
    pub services: ServiceTable,
    /// The pods of this node.
    pub pods: PodTable,
    /// Which peer has which prefix: pod ranges and node addresses. Values index `peers`.
    pub routes: Arc<PrefixMap<u32>>,
    /// The other nodes that run a gateway.
    pub peers: Arc<[Peer]>,
    /// Peers by underlay address, sorted; the second is an index into `peers`.
    pub peer_by_underlay: Arc<[(Addr, u32)]>,
}

/// What is fixed for this node until its configuration or its addresses change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeTables {
    /// Every address that the node itself owns and that pods or peers may meet (its `InternalIP`s and the underlay's), sorted.
    pub addresses: Vec<Addr>,
    /// The gateway's own address in the node's pod range, IPv4: SNAT inside the cluster, ICMP errors, ping.
    pub gateway_v4: Option<Addr>,
    /// The same for IPv6.
    pub gateway_v6: Option<Addr>,
    /// This node's own pod ranges.
    pub node_pod_cidrs: Vec<IpNetwork>,
    /// The cluster's pod ranges.
    pub cluster_pod_cidrs: Vec<IpNetwork>,
    /// The cluster's service ranges.
    pub service_cidrs: Vec<IpNetwork>,
    /// Node ports; at most 65534 as the upper end.
    pub node_ports: RangeInclusive<u16>,
    /// Addresses on which node ports answer, sorted.
    pub node_port_addresses: Vec<Addr>,
    /// How pods reach the outside; `None` switches it off.
    pub masquerade: Option<Masquerade>,
    /// Ports of gateway addresses that SNAT inside the cluster takes.
    pub snat_ports: RangeInclusive<u16>,
    /// UDP port of the overlay on every node.
    pub overlay_port: u16,
    /// VNI of the overlay, 24 bits.
    pub overlay_vni: u32,
    /// Whether clients outside are answered by the backend's node directly, and how; `None` switches it off, here and for peers.
    pub direct_return: Option<DirectReturn>,
    /// MTU towards the outside, through the node's uplinks, in bytes.
    pub outside_mtu: u32,
    /// Whether connections opened from outside the cluster to a pod's address are let in.
    pub outside_to_pods: OutsideToPods,
    /// Lifetimes of flows.
    pub timeouts: Timeouts,
    /// The first eight payload bytes of this gateway's own probes (UDP to a gateway address, port 9, then one octet that numbers the
    /// probe): random for each start of the process. See [`crate::counters::Counters::probes`].
    pub probe_token: u64,
    /// How many workers share the fragments among them.
    pub workers: u16,
}

/// Direct return: what a client outside sends to a service goes to the backend's node as it is, and the reply leaves there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectReturn {
    /// VNI of [`Network::DirectReturn`], 24 bits.
    pub vni: u32,
    /// The addresses of this node that peers know to be its: what is dialled there may be handed on.
    pub addresses: Vec<Addr>,
}

/// The VNIs of the overlay's networks, 24 bits each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vnis {
    /// Of [`Network::Cluster`].
    pub cluster: u32,
    /// Of [`Network::DirectReturn`], where this node takes part in it.
    pub direct_return: Option<u32>,
}

impl Vnis {
    /// The VNI of a network; of one that this node takes no part in, that of the cluster's.
    #[inline]
    pub fn of(&self, network: Network) -> u32 {
        match network {
            Network::Cluster => self.cluster,
            Network::DirectReturn => self.direct_return.unwrap_or(self.cluster),
        }
    }
}

/// Masquerade of traffic that leaves the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Masquerade {
    /// Source ports on the node's addresses, in ranges that do not overlap.
    pub ports: Vec<RangeInclusive<u16>>,
    /// The node's address that outside sees, IPv4.
    pub source_v4: Option<Addr>,
    /// The same for IPv6.
    pub source_v6: Option<Addr>,
}

/// What becomes of connections that somebody outside the cluster opens to a pod's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutsideToPods {
    /// Let in, and followed so that the replies leave unmasqueraded.
    Allow,
    /// Dropped by name.
    Drop,
}

/// Another node that runs a gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its node's name.
    pub name: Arc<str>,
    /// The underlay address to send to.
    pub underlay: IpAddr,
    /// The overlay port it announced.
    pub port: u16,
    /// The largest inner packet that fits the path to it, in bytes.
    pub mtu: u32,
    /// The sources that its inner packets may have: its pod ranges and node addresses.
    pub prefixes: Arc<PrefixMap<()>>,
    /// Whether it takes what is handed on for direct return, by the VNI that this node has for it.
    pub direct_return: bool,
}

impl Snapshot {
    /// Whether `addr` is a VIP and nothing else. A load balancer's address or an external IP may well be a node's (k3s says so of every
    /// node): there the service has its ports, and all the others are still the node's.
    #[inline]
    pub fn is_vip(&self, addr: Addr) -> bool {
        self.services.is_vip(addr) && !self.node.owns(addr) && self.routes.lookup(addr).is_none()
    }
}

impl NodeTables {
    /// The VNIs of the overlay's networks.
    #[inline]
    pub fn vnis(&self) -> Vnis {
        Vnis { cluster: self.overlay_vni, direct_return: self.direct_return.as_ref().map(|direct| direct.vni) }
    }

    /// The gateway's address of the family of `like`.
    #[inline]
    pub fn gateway_for(&self, like: Addr) -> Option<Addr> {
        if like.is_v4() { self.gateway_v4 } else { self.gateway_v6 }
    }

    /// Whether the node itself owns `addr`.
    #[inline]
    pub fn owns(&self, addr: Addr) -> bool {
        self.addresses.contains(&addr)
    }

    /// Whether `addr` is a gateway address of this node.
    #[inline]
    pub fn is_gateway(&self, addr: Addr) -> bool {
        Some(addr) == self.gateway_v4 || Some(addr) == self.gateway_v6
    }
}
