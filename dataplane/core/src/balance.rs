//! How a backend is chosen for a new connection.
//!
//! Each list of endpoints has a [`Pick`], made by the compiler. `Even` needs no table: a hash of the connection, scaled to the list. The
//! others are for services that ask for them:
//!
//! - *weighted*: cumulative weights and a binary search;
//! - *Maglev* (Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI 2016, §3.4): a table that every node
//!   fills alike, and in which few places change when the endpoints do;
//! - *least loaded*: of two at random, the one with fewer live flows on this node ("The Power of Two Choices in Randomized Load Balancing",
//!   Mitzenmacher 2001). The flow table counts; see [`Loads`].
//!
//! A choice is a function of its arguments, so a retransmission that finds no flow yet is given the same backend (unless loads moved).

use std::sync::Arc;

use crate::addr::{Addr, Tuple};
use crate::flow::sync::{AtomicU64, Ordering};
use crate::service::Backend;

/// How one of the endpoints of a list is chosen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Pick {
    /// All alike.
    #[default]
    Even,
    /// By weight.
    Weighted(Arc<Weights>),
    /// By Maglev's table.
    Maglev(Arc<Maglev>),
    /// The one of two with fewer live flows; the two are chosen by weight, if there are any.
    LeastLoaded(Option<Arc<Weights>>),
}

impl Pick {
    /// One of `endpoints`, the list that this was made for. `hash` is the connection's, or the client's (see [`of_connection`], [`of_client`]).
    #[inline]
    pub fn choose<'a>(&self, endpoints: &'a [Backend], hash: u64, loads: Loads<'_>) -> Option<&'a Backend> {
        match self {
            Pick::Even => endpoints.get(scale(hash, endpoints.len())),
            Pick::Weighted(weights) => endpoints.get(weights.at(hash)),
            Pick::Maglev(maglev) => endpoints.get(maglev.at(hash)),
            Pick::LeastLoaded(weights) => least_loaded(endpoints, weights.as_deref(), hash, loads),
        }
    }

    /// Whether every node is to choose the same for a connection, whatever else goes on there.
    pub fn is_consistent(&self) -> bool {
        matches!(self, Pick::Maglev(_))
    }

    /// The name that operators know it by.
    pub fn name(&self) -> &'static str {
        match self {
            Pick::Even => "random",
            Pick::Weighted(_) => "random, weighted",
            Pick::Maglev(_) => "maglev",
            Pick::LeastLoaded(_) => "least-loaded",
        }
    }
}

/// How each of a service port's two lists of endpoints is chosen from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Balance {
    /// For [`crate::service::ServicePort::cluster`].
    pub cluster: Pick,
    /// For [`crate::service::ServicePort::local`].
    pub local: Pick,
}

/// The hash by which a connection is spread.
#[inline]
pub fn of_connection(tuple: &Tuple) -> u64 {
    scramble(tuple)
}

/// The hash by which a client is spread where it is to stick to its backend: the same for every connection of it to this service port.
#[inline]
pub fn of_client(client: Addr, service: u64) -> u64 {
    scramble(&Tuple { src: client, dst: Addr(service.into()), ..Tuple::default() })
}

/// A hash for spreading, not for security: which endpoint a client gets is no secret.
pub fn scramble(tuple: &Tuple) -> u64 {
    let mut hash = 0x9e37_79b9_7f4a_7c15_u64;
    let ports = (tuple.src_port as u64) << 32 | (tuple.dst_port as u64) << 8 | tuple.protocol as u64;
    for word in [tuple.src.0 as u64, (tuple.src.0 >> 64) as u64, tuple.dst.0 as u64, (tuple.dst.0 >> 64) as u64, ports] {
        hash = finalize(hash ^ word);
    }
    hash
}

/// One step of SplitMix64 (Steele, Lea, Flood 2014).
pub(crate) fn finalize(word: u64) -> u64 {
    let hash = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let hash = (hash ^ hash >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let hash = (hash ^ hash >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ hash >> 31
}

/// A hash of an endpoint's name, address and port: the same on every node and in every release, since nodes of two releases must fill
/// Maglev's table alike and a table of session affinity outlives the process.
pub(crate) fn backend_hash(addr: Addr, port: u16) -> u64 {
    [addr.0 as u64, (addr.0 >> 64) as u64, port.into()].into_iter().fold(0x706f_6467_6174_6500, |hash, word| finalize(hash ^ word))
}

/// The hash's upper half, scaled to `0..len` (Lemire, "Fast Random Integer Generation in an Interval", without the rejection: a list is
/// too short for it to matter).
#[inline]
fn scale(hash: u64, len: usize) -> usize {
    (((hash >> 32) * len as u64) >> 32) as usize
}

/// Weights of a list's endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Weights {
    /// `up_to[n]` is the sum of the weights of the endpoints 0 to n.
    up_to: Box<[u32]>,
}

impl Weights {
    /// For endpoints of these weights; `None` if they are all alike, so that no table is needed.
    pub fn new(weights: &[u16]) -> Option<Weights> {
        let first = *weights.first()?;
        if weights.iter().all(|weight| *weight == first) {
            return None;
        }
        let sums = weights.iter().scan(0u32, |sum, weight| {
            *sum = sum.saturating_add(u32::from(*weight));
            Some(*sum)
        });
        Some(Weights { up_to: sums.collect() })
    }

    fn at(&self, hash: u64) -> usize {
        let ticket = scale(hash, self.up_to.last().map_or(0, |total| *total as usize)) as u32;
        self.up_to.partition_point(|up_to| *up_to <= ticket)
    }

    fn of(&self, at: usize) -> u32 {
        let before = at.checked_sub(1).map_or(0, |before| self.up_to[before]);
        self.up_to[at] - before
    }
}

/// Sizes of Maglev's table, each with the number of endpoints up to which it is used: primes, a hundred times as many places as endpoints, so
/// that no two endpoints differ by more than a hundredth in what they get (§5.3 of the paper). They are few and far between because a list
/// that grows past one of these bounds, or shrinks below it, moves most clients. Two bytes for each place: 2, 32 and 256 KiB.
const MAGLEV_SIZES: [(usize, usize); 3] = [(10, 1_021), (163, 16_381), (usize::MAX, 131_071)];

/// The most endpoints that a table tells apart; further ones get no connection.
const MAGLEV_ENDPOINTS_MAX: usize = u16::MAX as usize;

/// A Maglev table: which endpoint each place belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Maglev {
    places: Box<[u16]>,
}

impl Maglev {
    /// For `endpoints`, in an order that every node has alike, and their weights.
    pub fn new(endpoints: &[Backend], weights: &[u16]) -> Maglev {
        let endpoints = &endpoints[..endpoints.len().min(MAGLEV_ENDPOINTS_MAX)];
        if endpoints.is_empty() {
            return Maglev { places: Box::default() };
        }
        let size = MAGLEV_SIZES.iter().find(|(up_to, _)| endpoints.len() <= *up_to).map_or(MAGLEV_SIZES[0].1, |(_, size)| *size);
        // Each endpoint has the places in an order of its own: offset, offset + skip, ..., modulo a prime, so that it passes every place.
        let mut orders: Vec<(usize, usize)> = endpoints
            .iter()
            .map(|endpoint| {
                let name = backend_hash(endpoint.addr, endpoint.port);
                (scale(finalize(name ^ 1), size), scale(finalize(name ^ 2), size - 1) + 1)
            })
            .collect();
        let weight = |n: usize| u64::from(weights.get(n).copied().unwrap_or(1).max(1));
        let heaviest = (0..endpoints.len()).map(weight).max().unwrap_or(1);
        let mut due = vec![0u64; endpoints.len()];
        const NOBODY: u16 = u16::MAX;
        let mut places = vec![NOBODY; size].into_boxed_slice();
        let mut left = size;
        // Turn by turn each endpoint takes the next place of its order that is free; one of half the weight has every second turn.
        while left > 0 {
            for n in 0..endpoints.len() {
                due[n] += weight(n);
                if due[n] < heaviest {
                    continue;
                }
                due[n] -= heaviest;
                let (next, skip) = &mut orders[n];
                while places[*next] != NOBODY {
                    *next = (*next + *skip) % size;
                }
                places[*next] = n as u16;
                left -= 1;
                if left == 0 {
                    break;
                }
            }
        }
        Maglev { places }
    }

    fn at(&self, hash: u64) -> usize {
        self.places.get(scale(hash, self.places.len())).map_or(usize::MAX, |endpoint| usize::from(*endpoint))
    }

    /// Its length in places.
    pub fn size(&self) -> usize {
        self.places.len()
    }
}

/// Live flows by backend, as the flow table counts them for the services that want to know: a view of borrowed counters, all zero at first.
///
/// A flow's record names its counter, so whoever ends the flow knows what to count down, and a successor process counts anew. The cost is
/// one atomic addition when such a flow begins and one when it ends; no other packet touches a counter, and no other service's flow.
/// Two backends whose hashes fall on one counter are taken for equally loaded.
#[derive(Clone, Copy, Debug)]
pub struct Loads<'a>(&'a [AtomicU64]);

/// The number of a counter in [`Loads`], or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct LoadSlot(pub(crate) u64);

impl LoadSlot {
    /// Not counted.
    pub const NONE: LoadSlot = LoadSlot(0);
}

/// How many counters belong to a flow table for `capacity` flows: 128 KiB at most. A power of two.
pub const fn loads_for(capacity: usize) -> usize {
    if capacity >= 16_384 { 16_384 } else { capacity.next_power_of_two() }
}

impl<'a> Loads<'a> {
    /// On `counters`, a power of two of them, or none: then nothing is counted.
    pub(crate) fn new(counters: &'a [AtomicU64]) -> Loads<'a> {
        assert!(counters.is_empty() || counters.len().is_power_of_two(), "load counters are a power of two, not {}", counters.len());
        Loads(counters)
    }

    /// The counter of a backend.
    pub fn slot(&self, addr: Addr, port: u16) -> LoadSlot {
        match self.0.len() {
            0 => LoadSlot::NONE,
            len => LoadSlot((backend_hash(addr, port) & (len as u64 - 1)) + 1),
        }
    }

    /// Live flows of a backend.
    pub fn of(&self, backend: &Backend) -> u64 {
        // For a moment an end may be counted before its beginning.
        self.counter(self.slot(backend.addr, backend.port)).map_or(0, |counter| (counter.load(Ordering::Relaxed) as i64).max(0) as u64)
    }

    // Relaxed, all of them: a count stands for itself.
    pub(crate) fn begin(&self, slot: LoadSlot) {
        if let Some(counter) = self.counter(slot) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(crate) fn end(&self, slot: LoadSlot) {
        if let Some(counter) = self.counter(slot) {
            counter.fetch_sub(1, Ordering::Relaxed);
        }
    }

    pub(crate) fn clear(&self) {
        self.0.iter().for_each(|counter| counter.store(0, Ordering::Relaxed));
    }

    fn counter(&self, slot: LoadSlot) -> Option<&'a AtomicU64> {
        // A file may hold any number.
        usize::try_from(slot.0.checked_sub(1)?).ok().and_then(|at| self.0.get(at))
    }
}

fn least_loaded<'a>(endpoints: &'a [Backend], weights: Option<&Weights>, hash: u64, loads: Loads<'_>) -> Option<&'a Backend> {
    let at = |hash| weights.map_or_else(|| scale(hash, endpoints.len()), |weights| weights.at(hash));
    let (first, second) = (at(hash), at(finalize(hash)));
    // The same one twice is no choice.
    let second = if second == first && endpoints.len() > 1 { (first + 1) % endpoints.len() } else { second };
    let (a, b) = (endpoints.get(first)?, endpoints.get(second)?);
    let weight = |at| weights.map_or(1, |weights| u64::from(weights.of(at)));
    // Flows for each unit of weight, without the division.
    let heavier = loads.of(a).saturating_mul(weight(second)) > loads.of(b).saturating_mul(weight(first));
    Some(if heavier { b } else { a })
}

#[cfg(all(test, not(loom)))]
mod tests;
