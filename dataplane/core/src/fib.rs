//! Where an address is: a pod of this node, a peer, or neither.

use std::collections::HashMap;
use std::sync::Arc;

use ipnetwork::IpNetwork;

use crate::addr::Addr;

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
        let mut ranges: Vec<(Addr, Addr, V)> = Vec::with_capacity(sorted.len());
        for (first, last, value) in sorted {
            let mut behind = None;
            if let Some(outer) = ranges.last_mut()
                && outer.1 >= first
            {
                if outer.1 > last {
                    behind = Some((Addr(last.0 + 1), outer.1, outer.2.clone()));
                }
                if outer.0 == first {
                    ranges.pop();
                } else {
                    outer.1 = Addr(first.0 - 1);
                }
            }
            ranges.push((first, last, value));
            ranges.extend(behind);
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pod {
    /// MTU of its interface, in bytes.
    pub mtu: u32,
}

/// The pods of this node, by address.
#[derive(Clone, Debug, Default)]
pub struct PodTable {
    pods: Arc<HashMap<Addr, Pod>>,
}

impl PodTable {
    /// From the pods' addresses.
    pub fn new(pods: impl IntoIterator<Item = (Addr, Pod)>) -> PodTable {
        PodTable { pods: Arc::new(pods.into_iter().collect()) }
    }

    /// The pod that has `addr`.
    #[inline]
    pub fn get(&self, addr: Addr) -> Option<&Pod> {
        self.pods.get(&addr)
    }

    /// Every address and its pod, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (Addr, &Pod)> {
        self.pods.iter().map(|(addr, pod)| (*addr, pod))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
