//! Where an address is: a pod of this node, a peer, or neither.

use std::sync::Arc;

use ipnetwork::IpNetwork;

use crate::addr::Addr;
use crate::fold;
use crate::shape::Limits;
use crate::verdict::{TunId, Verdict};

/// A map from prefixes to values with longest-prefix match, flattened to sorted disjoint ranges: a lookup is one binary search.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrefixMap<V> {
    /// `(first, last, value)`, sorted by `first`, no two overlapping.
    ranges: Box<[(Addr, Addr, V)]>,
}

impl<V> Default for PrefixMap<V> {
    fn default() -> Self {
        PrefixMap { ranges: Box::new([]) }
    }
}

/// The first and last address of a prefix.
pub fn bounds(prefix: IpNetwork) -> (Addr, Addr) {
    match prefix {
        IpNetwork::V4(p) => (p.network().into(), p.broadcast().into()),
        IpNetwork::V6(p) => (p.network().into(), p.broadcast().into()),
    }
}

/// Whether one of a handful of prefixes holds `addr`. For many prefixes use a [`PrefixMap`].
#[inline]
pub fn within(prefixes: &[IpNetwork], addr: Addr) -> bool {
    prefixes.iter().any(|prefix| match prefix {
        IpNetwork::V4(p) => addr.is_v4() && (addr.0 as u32 ^ u32::from(p.ip())) & u32::from(p.mask()) == 0,
        IpNetwork::V6(p) => !addr.is_v4() && (addr.0 ^ u128::from(p.ip())) & u128::from(p.mask()) == 0,
    })
}

impl<V: Clone + PartialEq> PrefixMap<V> {
    /// From prefixes in any order. Of two equal prefixes the later wins; of nested ones the longer.
    pub fn new(prefixes: impl IntoIterator<Item = (IpNetwork, V)>) -> PrefixMap<V> {
        let mut sorted: Vec<(Addr, Addr, V)> = prefixes
            .into_iter()
            .map(|(prefix, value)| {
                let (first, last) = bounds(prefix);
                (first, last, value)
            })
            .collect();
        // Outer prefixes before the ones nested in them; a stable sort keeps equal ones in the order given.
        sorted.sort_by(|a, b| a.0.cmp(&b.0).then(b.1.cmp(&a.1)));
        // A sweep: `open` holds the prefixes around the present address, the longest last; `next` is the first address not yet in a
        // range, or `None` behind the last address of all.
        let mut ranges: Vec<(Addr, Addr, V)> = Vec::with_capacity(sorted.len());
        let mut open: Vec<(Addr, V)> = Vec::new();
        let mut next = Some(0);
        let close = |ranges: &mut Vec<(Addr, Addr, V)>, next: &mut Option<u128>, (last, value): (Addr, V)| {
            if let Some(first) = next.filter(|first| *first <= last.0) {
                ranges.push((Addr(first), last, value));
                *next = last.0.checked_add(1);
            }
        };
        for (first, last, value) in sorted {
            while let Some(ended) = open.pop_if(|(end, _)| *end < first) {
                close(&mut ranges, &mut next, ended);
            }
            if let Some((_, outer)) = open.last()
                && let Some(from) = next.filter(|from| *from < first.0)
            {
                ranges.push((Addr(from), Addr(first.0 - 1), outer.clone()));
            }
            next = Some(first.0);
            open.push((last, value));
        }
        while let Some(ended) = open.pop() {
            close(&mut ranges, &mut next, ended);
        }
        PrefixMap { ranges: ranges.into_boxed_slice() }
    }
}

impl<V> PrefixMap<V> {
    /// The value of the longest prefix that holds `addr`.
    #[inline]
    pub fn lookup(&self, addr: Addr) -> Option<&V> {
        let at = self.ranges.partition_point(|(first, _, _)| *first <= addr);
        let (_, last, value) = self.ranges.get(at.checked_sub(1)?)?;
        (addr <= *last).then_some(value)
    }

    /// The ranges, sorted: `(first, last, value)`.
    pub fn ranges(&self) -> &[(Addr, Addr, V)] {
        &self.ranges
    }
}

/// A pod of this node.
#[derive(Clone, Debug)]
pub struct Pod {
    /// MTU of its interface, in bytes: no IP packet is longer than 65,535.
    pub mtu: u16,
    /// Whether what it says to the outside is masqueraded, where the node masquerades at all.
    pub masquerade: bool,
    /// What it may receive and send, if that is limited.
    pub limits: Option<Arc<Limits>>,
    /// The TUN inside its namespace; none for a pod that hangs in the gateway's namespace by a veth.
    pub tun: Option<TunId>,
}

impl Pod {
    /// A pod on a veth that is masqueraded as the node is configured, and not limited. `mtu` in bytes.
    pub fn new(mtu: u32) -> Pod {
        Pod { mtu: u16::try_from(mtu).unwrap_or(u16::MAX), masquerade: true, limits: None, tun: None }
    }

    /// The way to it.
    #[inline]
    pub fn verdict(&self) -> Verdict {
        self.tun.map_or(Verdict::ToPods, Verdict::ToPod)
    }
}

impl PartialEq for Pod {
    /// Limits are equal if they are the same ones: others with the same rates have a state of their own.
    fn eq(&self, other: &Pod) -> bool {
        let same_limits = match (&self.limits, &other.limits) {
            (None, None) => true,
            (Some(ours), Some(theirs)) => Arc::ptr_eq(ours, theirs),
            _ => false,
        };
        (self.mtu, self.masquerade, self.tun) == (other.mtu, other.masquerade, other.tun) && same_limits
    }
}

impl Eq for Pod {}

/// The pods of this node, by address: each packet is looked up by its source, its destination or both.
///
/// Open addressing with linear probing, an eighth full at most: most pods are where their hash says, so that a lookup is one cache line. A
/// branch that cannot be foreseen would cost a packet more than all the rest of a lookup.
#[derive(Clone, Debug)]
pub struct PodTable {
    /// A power of two of them.
    slots: Arc<[Option<(Addr, Pod)>]>,
}

/// Two to a cache line.
const _: () = assert!(size_of::<Option<(Addr, Pod)>>() == 32);

impl Default for PodTable {
    fn default() -> PodTable {
        PodTable::new([])
    }
}

impl PodTable {
    /// From the pods' addresses, each of which one pod has.
    pub fn new(pods: impl IntoIterator<Item = (Addr, Pod)>) -> PodTable {
        let pods: Vec<(Addr, Pod)> = pods.into_iter().collect();
        let mut slots = vec![None; (8 * pods.len()).next_power_of_two()];
        for (addr, pod) in pods {
            let mut at = PodTable::place(addr, slots.len());
            while slots[at].is_some() {
                at = (at + 1) % slots.len();
            }
            slots[at] = Some((addr, pod));
        }
        PodTable { slots: slots.into() }
    }

    /// The pod that has `addr`.
    #[inline]
    pub fn get(&self, addr: Addr) -> Option<&Pod> {
        let mut at = PodTable::place(addr, self.slots.len());
        // An empty slot ends the search.
        while let Some((other, pod)) = self.slots.get(at)? {
            if *other == addr {
                return Some(pod);
            }
            at = (at + 1) & (self.slots.len() - 1);
        }
        None
    }

    /// Every address and its pod, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (Addr, &Pod)> {
        self.slots.iter().flatten().map(|(addr, pod)| (*addr, pod))
    }

    /// Where the search for `addr` begins among `slots`, a power of two.
    #[inline]
    fn place(addr: Addr, slots: usize) -> usize {
        fold::hash_u128(addr.0) as usize & (slots - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_are_found_by_their_addresses_and_by_no_others() {
        let addr =
            |n: u32| if n.is_multiple_of(2) { Addr::from_v4((0x0a20_0100 + n).to_be_bytes()) } else { Addr(0xfd00_0032 << 96 | u128::from(n)) };
        for count in [0, 1, 2, 3, 250, 1_000] {
            let pods = PodTable::new((0..count).map(|n| (addr(n), Pod::new(n))));
            for n in 0..2 * count + 2 {
                assert_eq!(pods.get(addr(n)).map(|pod| pod.mtu.into()), (n < count).then_some(n));
            }
            let mut seen: Vec<u32> = pods.iter().map(|(_, pod)| pod.mtu.into()).collect();
            seen.sort_unstable();
            assert!(seen.into_iter().eq(0..count));
        }
    }

    #[test]
    fn a_search_among_a_nodes_pods_is_short() {
        // 10.32.1.2 and on, and the same of IPv6, as IPAM hands them out.
        let addrs = |n: u32| [Addr::from_v4((0x0a20_0102 + n).to_be_bytes()), Addr(0xfd00_0032_0001 << 80 | u128::from(n + 2))];
        let pods = PodTable::new((0..250).flat_map(addrs).map(|addr| (addr, Pod::new(0))));
        let direct =
            pods.iter().filter(|(addr, _)| pods.slots[PodTable::place(*addr, pods.slots.len())].as_ref().is_some_and(|slot| slot.0 == *addr));
        let direct = direct.count();
        assert!(direct > 450, "{direct} of 500 are where their hash says");
    }

    #[test]
    fn the_longest_prefix_wins_and_the_outer_one_resumes_behind_it() {
        let map = PrefixMap::new([
            ("10.0.0.0/8".parse().unwrap(), 1),
            ("10.1.0.0/16".parse().unwrap(), 2),
            ("10.1.2.3/32".parse().unwrap(), 3),
            ("10.0.0.0/24".parse().unwrap(), 4),
            ("fd00::/16".parse().unwrap(), 5),
        ]);
        let at = |ip: &str| map.lookup(ip.parse::<std::net::IpAddr>().unwrap().into()).copied();
        assert_eq!(at("9.255.255.255"), None);
        assert_eq!(at("10.0.0.7"), Some(4));
        assert_eq!(at("10.0.1.0"), Some(1));
        assert_eq!(at("10.1.2.2"), Some(2));
        assert_eq!(at("10.1.2.3"), Some(3));
        assert_eq!(at("10.1.2.4"), Some(2));
        assert_eq!(at("10.255.255.255"), Some(1));
        assert_eq!(at("11.0.0.0"), None);
        assert_eq!(at("fd00:1::1"), Some(5));
    }

    #[test]
    fn a_lookup_is_the_longest_of_all_prefixes_that_hold_the_address() {
        let prefixes: Vec<(IpNetwork, usize)> = [
            "::/0",
            "fd00::/8",
            "fd00::/16",
            "fd00:1::/32",
            "fd00:1:ffff::/48",
            "ffff::/16",
            "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128",
            "10.0.0.0/8",
            "10.0.0.0/9",
            "10.0.0.0/24",
            "10.1.0.0/16",
            "10.1.0.0/32",
            "10.1.255.255/32",
            "10.255.255.255/32",
            "10.0.0.0/24",
        ]
        .iter()
        .enumerate()
        .map(|(value, text)| (text.parse().unwrap(), value))
        .collect();
        let map = PrefixMap::new(prefixes.clone());
        for (edge, _) in prefixes.iter().map(|(prefix, _)| bounds(*prefix)).flat_map(|(first, last)| [(first, ()), (last, ())]) {
            for addr in [Addr(edge.0.wrapping_sub(1)), edge, Addr(edge.0.wrapping_add(1))] {
                // Within the other family the mapped form of IPv4 is an address like any other.
                let longest = prefixes
                    .iter()
                    .filter(|(prefix, _)| (bounds(*prefix).0..=bounds(*prefix).1).contains(&addr))
                    .max_by_key(|(prefix, value)| (prefix.prefix() + if prefix.is_ipv4() { 96 } else { 0 }, *value));
                assert_eq!(map.lookup(addr), longest.map(|(_, value)| value), "{addr}");
            }
        }
    }
}
