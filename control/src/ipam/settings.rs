//! What the configuration says of addresses.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnetwork::IpNetwork;

/// How long a released address is given to nobody else, in seconds. It is longer than a packet may be on its way (RFC 9293 §3.4.1 assumes two
/// minutes; in a cluster it is less than one) and than a name is cached by most resolvers of pods (30 s in CoreDNS).
pub const COOLDOWN_S: u64 = 60;

/// How addresses are given out: `ipam` in `podgate.yaml`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IpamSettings {
    /// Never given out by the node's own allocator. A delegated IPAM plugin may use them: so a part of a range is left to one.
    pub exclude: Vec<IpNetwork>,
    /// Addresses kept for a pod, by its `namespace/name` (the name alone outside Kubernetes).
    pub reserve: BTreeMap<String, Vec<IpAddr>>,
    /// Parts of the node's ranges, by name, that only those get who ask for them by name.
    pub pools: BTreeMap<String, Vec<IpNetwork>>,
    /// How long a released address is given to nobody else unless nothing else is left, in seconds.
    pub cooldown_s: u64,
}

impl Default for IpamSettings {
    fn default() -> IpamSettings {
        IpamSettings { exclude: Vec::new(), reserve: BTreeMap::new(), pools: BTreeMap::new(), cooldown_s: COOLDOWN_S }
    }
}
