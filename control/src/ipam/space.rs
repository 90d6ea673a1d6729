//! Which addresses there are, whose business each is, and which are free: the node's ranges, cut by what the configuration says.
//!
//! Of a range are kept back the network's own address, the first (the gateway), the second (the self-test's probe) and the last (IPv4's
//! broadcast; of IPv6 too, so that one rule holds for both). What is left belongs to a pool: the named one that it lies in, or the node's own.
//! Excluded addresses and those reserved for a pod belong to none.
//!
//! Free addresses are of two kinds, since a range of IPv6 cannot be listed: those that nobody is known to have had, as intervals, and the
//! released ones in the order of their release. Every operation costs the logarithm of what is in use or remembered, never a walk along a range.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use podgate_core::addr::Addr;
use podgate_core::fib::bounds;

use super::{IpamError, IpamSettings};

/// Disjoint intervals, both ends inclusive, no two of which touch: the last address of each by its first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Intervals(BTreeMap<u128, u128>);

impl Intervals {
    /// Adds `first..=last`, whatever of it is there already.
    pub fn add(&mut self, mut first: u128, mut last: u128) {
        // Neighbours and what overlaps melt into one.
        while let Some((&at, &end)) = self.0.range(..=last.saturating_add(1)).next_back().filter(|(_, end)| end.saturating_add(1) >= first) {
            self.0.remove(&at);
            (first, last) = (first.min(at), last.max(end));
        }
        self.0.insert(first, last);
    }

    /// Takes `first..=last` away, whatever of it is there.
    pub fn cut(&mut self, first: u128, last: u128) {
        while let Some((&at, &end)) = self.0.range(..=last).next_back().filter(|(_, end)| **end >= first) {
            self.0.remove(&at);
            if at < first {
                self.0.insert(at, first - 1);
            }
            if end > last {
                self.0.insert(last + 1, end);
            }
        }
    }

    /// The lowest.
    pub fn first(&self) -> Option<u128> {
        self.0.first_key_value().map(|(first, _)| *first)
    }

    /// How many addresses.
    pub fn count(&self) -> u128 {
        self.0.iter().fold(0u128, |sum, (first, last)| sum.saturating_add(last - first).saturating_add(1))
    }

    /// What of it lies in `first..=last`.
    fn within(&self, first: u128, last: u128) -> Intervals {
        let mut part = self.clone();
        if first > 0 {
            part.cut(0, first - 1);
        }
        if last < u128::MAX {
            part.cut(last + 1, u128::MAX);
        }
        part
    }
}

/// Whose business an address is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place<'a> {
    /// No range of the node's has it.
    Outside,
    /// It is nobody's: what it is, and of which range.
    KeptBack(&'static str, IpNetwork),
    /// The configuration excludes it.
    Excluded(IpNetwork),
    /// It can be given out.
    Open {
        /// By its place in [`Space::pools`].
        pool: usize,
        /// Only to this pod.
        reserved: Option<&'a str>,
    },
}

/// The free addresses of one family in a pool.
#[derive(Debug, Default)]
pub(super) struct Side {
    /// Whether the pool has any range of that family on this node.
    pub present: bool,
    /// How many addresses there are to give out, free or not.
    pub capacity: u128,
    /// Nobody is known to have had these.
    pub fresh: Intervals,
    /// Released, by turn.
    pub freed: BTreeMap<u64, Addr>,
}

/// A pool: the node's own, or a named one.
#[derive(Debug)]
pub(super) struct Pool {
    /// None for the node's own.
    pub name: Option<String>,
    /// Its ranges; of a named one as configured, whether the node has them or not.
    pub cidrs: Vec<IpNetwork>,
    /// IPv4 and IPv6.
    pub sides: [Side; 2],
}

impl Pool {
    /// Of that family.
    pub fn side(&self, v4: bool) -> &Side {
        &self.sides[usize::from(!v4)]
    }

    /// Its ranges of that family.
    pub fn cidrs_of(&self, v4: bool) -> Vec<IpNetwork> {
        self.cidrs.iter().filter(|cidr| cidr.is_ipv4() == v4).copied().collect()
    }
}

/// How much there is of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    /// To give out to anybody who may ask.
    pub capacity: u128,
    /// Excluded by the configuration.
    pub excluded: u128,
    /// Kept for pods by name.
    pub reserved: u128,
}

/// The node's ranges and what is free of them.
#[derive(Debug)]
pub(super) struct Space {
    ranges: Vec<IpNetwork>,
    settings: IpamSettings,
    reserved: HashMap<Addr, String>,
    pools: Vec<Pool>,
}

/// What of a range may belong to a pod.
fn usable(cidr: IpNetwork) -> Option<(u128, u128)> {
    let (first, last) = bounds(cidr);
    // Network, gateway and probe in front; the last one behind.
    (last.0 - first.0 >= 4).then(|| (first.0 + 3, last.0 - 1))
}

impl Space {
    /// Without any range.
    pub fn empty(settings: &IpamSettings) -> Space {
        Space { ranges: Vec::new(), settings: settings.clone(), reserved: HashMap::new(), pools: Vec::new() }
    }

    /// Of these ranges, everything free and nobody known to have had it.
    pub fn new(ranges: &[IpNetwork], settings: &IpamSettings) -> Result<Space, IpamError> {
        let mut usable_ranges = Intervals::default();
        for cidr in ranges {
            let (first, last) = usable(*cidr).ok_or(IpamError::TooSmall { cidr: *cidr })?;
            usable_ranges.add(first, last);
        }
        let reserved: HashMap<Addr, String> =
            settings.reserve.iter().flat_map(|(pod, addresses)| addresses.iter().map(|a| (Addr::from(*a), pod.clone()))).collect();
        let mut open = usable_ranges.clone();
        for (first, last) in settings.exclude.iter().map(|cidr| bounds(*cidr)) {
            open.cut(first.0, last.0);
        }
        reserved.keys().for_each(|address| open.cut(address.0, address.0));
        let mut pools = Vec::new();
        for (name, cidrs) in &settings.pools {
            let mut pool = Pool { name: Some(name.clone()), cidrs: cidrs.clone(), sides: Default::default() };
            for cidr in cidrs {
                let (first, last) = bounds(*cidr);
                let side = &mut pool.sides[usize::from(!cidr.is_ipv4())];
                side.present |= usable_ranges.within(first.0, last.0).first().is_some();
                open.within(first.0, last.0).0.iter().for_each(|(first, last)| side.fresh.add(*first, *last));
                open.cut(first.0, last.0);
            }
            pools.push(pool);
        }
        let mut own = Pool { name: None, cidrs: ranges.to_vec(), sides: Default::default() };
        for cidr in ranges {
            let (first, last) = bounds(*cidr);
            let side = &mut own.sides[usize::from(!cidr.is_ipv4())];
            side.present = true;
            open.within(first.0, last.0).0.iter().for_each(|(first, last)| side.fresh.add(*first, *last));
        }
        pools.insert(0, own);
        pools.iter_mut().flat_map(|pool| &mut pool.sides).for_each(|side| side.capacity = side.fresh.count());
        Ok(Space { ranges: ranges.to_vec(), settings: settings.clone(), reserved, pools })
    }

    /// The node's ranges.
    pub fn ranges(&self) -> &[IpNetwork] {
        &self.ranges
    }

    /// The node's own pool first, then the named ones.
    pub fn pools(&self) -> &[Pool] {
        &self.pools
    }

    /// The named pool, or the node's own.
    pub fn pool(&self, name: Option<&str>) -> Option<(usize, &Pool)> {
        self.pools.iter().enumerate().find(|(_, pool)| pool.name.as_deref() == name)
    }

    /// The pool that `address` belongs to by its place alone.
    pub fn pool_at(&self, address: IpAddr) -> usize {
        let named = |pool: &Pool| pool.name.is_some() && pool.cidrs.iter().any(|cidr| cidr.contains(address));
        self.pools.iter().position(named).unwrap_or(0)
    }

    /// Whose business `address` is.
    pub fn place(&self, address: IpAddr) -> Place<'_> {
        let Some(cidr) = self.ranges.iter().find(|cidr| cidr.contains(address)) else { return Place::Outside };
        let (addr, (first, last)) = (Addr::from(address), bounds(*cidr));
        let kept_back = match addr.0 - first.0 {
            0 => Some("the network's own address"),
            1 => Some("the gateway"),
            2 => Some("the self-test's address"),
            _ if addr == last => Some("the last address"),
            _ => None,
        };
        if let Some(why) = kept_back {
            return Place::KeptBack(why, *cidr);
        }
        if let Some(cidr) = self.settings.exclude.iter().find(|cidr| cidr.contains(address)) {
            return Place::Excluded(*cidr);
        }
        Place::Open { pool: self.pool_at(address), reserved: self.reserved.get(&addr).map(String::as_str) }
    }

    /// The addresses reserved for the pod that the configuration calls so.
    pub fn reserved_for(&self, pod: &str) -> &[IpAddr] {
        self.settings.reserve.get(pod).map_or(&[], Vec::as_slice)
    }

    /// The pool that gives `address` to whoever asks, if one does.
    pub fn giver(&self, address: Addr) -> Option<usize> {
        match self.place(address.ip()) {
            Place::Open { pool, reserved: None } => Some(pool),
            _ => None,
        }
    }

    fn side_mut(&mut self, address: Addr) -> Option<&mut Side> {
        let pool = self.giver(address)?;
        Some(&mut self.pools[pool].sides[usize::from(!address.is_v4())])
    }

    /// `address` is in use from now on. `turn` is that of its release, if that was remembered.
    pub fn take(&mut self, address: Addr, turn: Option<u64>) {
        if let Some(side) = self.side_mut(address) {
            turn.map(|turn| side.freed.remove(&turn));
            side.fresh.cut(address.0, address.0);
        }
    }

    /// `address` was released in that turn.
    pub fn give_back(&mut self, address: Addr, turn: u64) {
        if let Some(side) = self.side_mut(address) {
            side.freed.insert(turn, address);
        }
    }

    /// The release of `address` in that turn is no longer remembered: it is as if nobody had had it.
    pub fn forget(&mut self, address: Addr, turn: u64) {
        if let Some(side) = self.side_mut(address) {
            side.freed.remove(&turn);
            side.fresh.add(address.0, address.0);
        }
    }

    /// How much there is of `cidr` in the pool of that number.
    pub fn extent(&self, number: usize, cidr: IpNetwork) -> Extent {
        let mut whole = Intervals::default();
        for (first, last) in self.ranges.iter().filter_map(|range| usable(*range)) {
            whole.add(first, last);
        }
        let (first, last) = bounds(cidr);
        whole = whole.within(first.0, last.0);
        if number == 0 {
            let named = self.pools.iter().filter(|pool| pool.name.is_some()).flat_map(|pool| &pool.cidrs);
            named.for_each(|cidr| {
                let (first, last) = bounds(*cidr);
                whole.cut(first.0, last.0);
            });
        }
        let mut open = whole.clone();
        for (first, last) in self.settings.exclude.iter().map(|cidr| bounds(*cidr)) {
            open.cut(first.0, last.0);
        }
        let (whole, not_excluded) = (whole.count(), open.count());
        self.reserved.keys().for_each(|address| open.cut(address.0, address.0));
        let capacity = open.count();
        Extent { capacity, excluded: whole - not_excluded, reserved: not_excluded - capacity }
    }

    /// What of the configuration has no effect, because it lies outside the node's ranges. Nothing is said as long as there are none.
    pub fn warnings(&self) -> Vec<String> {
        if self.ranges.is_empty() {
            return Vec::new();
        }
        let ranges = super::error::list(&self.ranges);
        let meets = |cidr: &IpNetwork| {
            let (first, last) = bounds(*cidr);
            self.ranges.iter().map(|range| bounds(*range)).any(|(from, to)| first <= to && from <= last)
        };
        let outside = |what: String| format!("{what} lies outside this node's ranges {ranges} and has no effect here");
        let exclude = self.settings.exclude.iter().filter(|cidr| !meets(cidr)).map(|cidr| outside(format!("ipam.exclude {cidr}")));
        let pools = self.settings.pools.iter().flat_map(|(name, cidrs)| cidrs.iter().map(move |cidr| (name, cidr)));
        let pools = pools.filter(|(_, cidr)| !meets(cidr)).map(|(name, cidr)| outside(format!("ipam.pools.{name} {cidr}")));
        let reserve = self.settings.reserve.iter().flat_map(|(pod, addresses)| addresses.iter().map(move |address| (pod, *address)));
        let reserve = reserve.filter_map(|(pod, address)| match self.place(address) {
            Place::Outside => Some(outside(format!("ipam.reserve.{pod} {address}"))),
            Place::KeptBack(why, cidr) => Some(format!("ipam.reserve.{pod} {address} is {why} of {cidr} and has no effect here")),
            _ => None,
        });
        exclude.chain(pools).chain(reserve).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn intervals_are_sets(steps in prop::collection::vec((any::<bool>(), 0..40u128, 0..12u128), 1..40)) {
            let (mut intervals, mut set) = (Intervals::default(), BTreeSet::new());
            for (add, first, len) in steps {
                // Both ends of the numbers, where adding one would overflow.
                for base in [0, u128::MAX - 51] {
                    let (first, last) = (base + first, base + first + len);
                    if add {
                        intervals.add(first, last);
                        set.extend(first..=last);
                    } else {
                        intervals.cut(first, last);
                        set.retain(|n| !(first..=last).contains(n));
                    }
                }
                prop_assert_eq!(intervals.count(), set.len() as u128);
                prop_assert_eq!(intervals.first(), set.first().copied());
                let listed: BTreeSet<u128> = intervals.0.iter().flat_map(|(first, last)| *first..=*last).collect();
                prop_assert_eq!(&listed, &set);
                let touching = intervals.0.iter().zip(intervals.0.iter().skip(1)).any(|((_, end), (next, _))| end + 1 >= *next);
                prop_assert!(!touching, "{intervals:?}");
                let (from, to) = (first, first + 5);
                let part: BTreeSet<u128> = set.range(from..=to).copied().collect();
                prop_assert_eq!(intervals.within(from, to).0.iter().flat_map(|(first, last)| *first..=*last).collect::<BTreeSet<_>>(), part);
            }
        }
    }
}
