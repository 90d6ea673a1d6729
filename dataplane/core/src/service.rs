//! Services as a worker sees them: a frontend for each VIP and port, and the endpoints behind it.
//!
//! The table is cut into shards that successive snapshots share: a change copies one shard and the array of pointers to shards.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::addr::Addr;
use crate::balance::Balance;
use crate::fold::FoldMap;

/// What a client dials.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FrontendKey {
    /// The VIP or the node's address.
    pub addr: Addr,
    /// The port.
    pub port: u16,
    /// IP protocol number: TCP, UDP or SCTP.
    pub protocol: u8,
}

/// By which of its faces a service was dialled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Face {
    /// The cluster IP: `internalTrafficPolicy` decides.
    ClusterIp,
    /// A node port: `externalTrafficPolicy` decides.
    NodePort,
    /// A load balancer's VIP: `externalTrafficPolicy` decides, `loadBalancerSourceRanges` guard.
    LoadBalancer,
    /// An external IP: `externalTrafficPolicy` decides.
    ExternalIp,
    /// A node port that a client dialled at a peer, which hands the packet on for direct return. Its address is that of
    /// [`FrontendKey::at_a_peer`].
    PeersNodePort,
    /// A pod's `hostPort`: leads to that pod alone, with the client's own address.
    HostPort,
}

impl Face {
    /// Whether the address that is dialled is the service's, and not the node's.
    pub const fn is_vip(self) -> bool {
        !matches!(self, Face::NodePort | Face::PeersNodePort | Face::HostPort)
    }

    /// The name that operators know it by.
    pub const fn name(self) -> &'static str {
        match self {
            Face::ClusterIp => "ClusterIP",
            Face::NodePort => "NodePort",
            Face::PeersNodePort => "NodePort at a peer",
            Face::LoadBalancer => "LoadBalancer",
            Face::ExternalIp => "ExternalIP",
            Face::HostPort => "HostPort",
        }
    }
}

/// A traffic policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TrafficPolicy {
    /// Every endpoint of the cluster.
    Cluster,
    /// Endpoints on this node only.
    Local,
}

/// A frontend: one face of one service port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frontend {
    /// Which face.
    pub face: Face,
    /// The service port behind it.
    pub service: Arc<ServicePort>,
}

/// A service port: what every face of it shares.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// A hash of the name that is the same in every generation and on every node; flows keep it. Never 0.
    pub id: u64,
    /// `namespace/name:port`, as operators know it (without `:port` where the port has no name).
    pub name: Arc<str>,
    /// For cluster IPs.
    pub internal_policy: TrafficPolicy,
    /// For node ports, load balancers and external IPs.
    pub external_policy: TrafficPolicy,
    /// Usable endpoints anywhere in the cluster, as semantics row 1 picks them.
    pub cluster: Arc<[Backend]>,
    /// Usable endpoints on this node, picked by themselves.
    pub local: Arc<[Backend]>,
    /// How one of each list is chosen.
    pub balance: Balance,
    /// Clients stick to their endpoint for this long after their last new connection.
    pub affinity: Option<Duration>,
    /// `loadBalancerSourceRanges`; empty lets everybody in.
    pub source_ranges: Vec<ipnetwork::IpNetwork>,
}

/// An endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Backend {
    /// Its address.
    pub addr: Addr,
    /// Its port.
    pub port: u16,
    /// Where it runs, as the compiler knows it.
    pub place: Place,
}

/// Where an endpoint runs: it decides whether replies pass this gateway by themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Place {
    /// A pod of this node.
    LocalPod,
    /// A process on this node itself (host network).
    ThisNode,
    /// A pod of another node.
    RemotePod,
    /// A process on another node itself.
    OtherNode,
    /// Outside the cluster.
    Outside,
}

impl FrontendKey {
    /// From the standard library's address.
    pub fn new(addr: IpAddr, port: u16, protocol: u8) -> FrontendKey {
        FrontendKey { addr: addr.into(), port, protocol }
    }

    /// The key of a node port wherever a peer has it, in the family of `like`: no packet is addressed to nobody.
    pub fn at_a_peer(like: Addr, port: u16, protocol: u8) -> FrontendKey {
        let nobody = if like.is_v4() { Addr::from_v4([0; 4]) } else { Addr::UNSPECIFIED };
        FrontendKey { addr: nobody, port, protocol }
    }
}

/// How many shards a table has: at 10,000 services with two faces each some twenty frontends share a shard, so that a change copies
/// little beside the 8 KiB of pointers.
const SHARDS: usize = 1024;

type Shard = FoldMap<FrontendKey, Frontend>;

/// Every frontend of the cluster. Cloning it costs one reference count.
#[derive(Clone, Debug)]
pub struct ServiceTable {
    shards: Arc<[Arc<Shard>]>,
    /// Addresses that are a VIP of some service (cluster IP, load balancer, external IP) with the number of frontends on them.
    vips: Arc<[Arc<FoldMap<Addr, u32>>]>,
}

impl Default for ServiceTable {
    fn default() -> ServiceTable {
        let (shard, vips) = (Arc::new(Shard::default()), Arc::new(FoldMap::default()));
        ServiceTable { shards: vec![shard; SHARDS].into(), vips: vec![vips; SHARDS].into() }
    }
}

/// Spreads keys over shards; not secret, since only the cluster's own objects are keys.
fn mix(value: u128) -> usize {
    let folded = (value as u64) ^ ((value >> 64) as u64);
    (folded.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 54) as usize
}

const _: () = assert!(SHARDS == 1 << 10, "mix keeps ten bits");

impl FrontendKey {
    fn shard(&self) -> usize {
        mix(self.addr.0 ^ ((self.port as u128) << 32) ^ ((self.protocol as u128) << 48))
    }
}

impl ServiceTable {
    /// The frontend that `key` dials.
    #[inline]
    pub fn get(&self, key: &FrontendKey) -> Option<&Frontend> {
        self.shards[key.shard()].get(key)
    }

    /// Whether some service has `addr` as a VIP (node addresses are not VIPs).
    #[inline]
    pub fn is_vip(&self, addr: Addr) -> bool {
        self.vips[mix(addr.0)].contains_key(&addr)
    }

    /// Every frontend, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (&FrontendKey, &Frontend)> {
        self.shards.iter().flat_map(|shard| shard.iter())
    }

    /// Every frontend whose shard differs from that of `other`, in no order: all that another table of the same line cannot have alike.
    /// What has not changed costs a comparison of a thousand pointers.
    pub fn unlike<'a>(&'a self, other: &'a ServiceTable) -> impl Iterator<Item = (&'a FrontendKey, &'a Frontend)> {
        let differing = self.shards.iter().zip(&*other.shards).filter(|(ours, theirs)| !Arc::ptr_eq(ours, theirs));
        differing.flat_map(|(ours, _)| ours.iter())
    }

    /// The table after `changes`: a frontend to put, or `None` to take away. Copies the shards that change and no other.
    pub fn with(&self, changes: impl IntoIterator<Item = (FrontendKey, Option<Frontend>)>) -> ServiceTable {
        let mut next = self.clone();
        let (mut shards, mut vips) = (None, None);
        for (key, frontend) in changes {
            let shards: &mut Vec<Arc<Shard>> = shards.get_or_insert_with(|| self.shards.to_vec());
            let shard = Arc::make_mut(&mut shards[key.shard()]);
            let is_vip = |f: &Frontend| f.face.is_vip();
            let now = frontend.as_ref().is_some_and(is_vip);
            let before = match frontend {
                Some(frontend) => shard.insert(key, frontend),
                None => shard.remove(&key),
            };
            let was = before.as_ref().is_some_and(is_vip);
            if was == now {
                continue;
            }
            let vips: &mut Vec<Arc<FoldMap<Addr, u32>>> = vips.get_or_insert_with(|| self.vips.to_vec());
            let vips = Arc::make_mut(&mut vips[mix(key.addr.0)]);
            let count = vips.entry(key.addr).or_insert(0);
            if now {
                *count += 1;
            } else {
                *count -= 1;
                if *count == 0 {
                    vips.remove(&key.addr);
                }
            }
        }
        if let Some(shards) = shards {
            next.shards = shards.into();
        }
        if let Some(vips) = vips {
            next.vips = vips.into();
        }
        next
    }
}
