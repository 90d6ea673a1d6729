//! The index: buckets of eight entries, one cache line each.
//!
//! An entry is tag(31) direction(1) record number + 1 (32); zero is an empty place. It stands while its record is claimed, aborted, live or
//! dying and goes before the record is free, taken out only by whoever holds the record; entries never move. So a lookup looks at two cache
//! lines at most, however full the table is, and a key whose two buckets are full cannot be inserted.
//!
//! How full may the index be? Two choices of eight places, simulated with random keys in 2^19 buckets, filled and then replaced three times
//! over: at 70 % one insertion in 600 finds no place, at 60 % one in 45,000, at 50 % none of 8 million. (Replacement is what hurts: a table
//! that is only filled takes 70 %.) So [`super::layout`] gives it twice the places that its flows can need.

use super::Direction;
use super::hash::Hash;
use super::sync::{AtomicU64, Ordering};

/// One bucket of the index: 64 bytes of atomics. All zeroes is an empty bucket.
#[derive(Debug, Default)]
#[repr(C, align(64))]
pub struct Bucket([AtomicU64; BUCKET_ENTRIES]);

#[cfg(not(loom))]
const _: () = assert!(size_of::<Bucket>() == 64);

/// Entries of one bucket.
#[cfg(not(loom))]
pub(super) const BUCKET_ENTRIES: usize = 8;
/// Fewer for the model checker, which looks at every order of every access.
#[cfg(loom)]
pub(super) const BUCKET_ENTRIES: usize = 4;

/// `place` prefers the first bucket of a key while that has more than this many places left, so that most lookups need one cache line of the
/// index, not two: 87 % at half full.
const SPARE: usize = BUCKET_ENTRIES / 4;

/// How often `place` begins again when others take the places that it picks.
const PLACE_TRIES: usize = 16;

/// A place of the index that is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry(u64);

impl Entry {
    #[inline]
    pub fn new(hash: Hash, direction: Direction, record: u32) -> Entry {
        Entry(hash.tag() << 33 | (direction as u64) << 32 | (record as u64 + 1))
    }

    #[inline]
    pub fn direction(self) -> Direction {
        if self.0 >> 32 & 1 == 0 { Direction::Original } else { Direction::Reply }
    }

    /// The record's number.
    #[inline]
    pub fn record(self) -> u32 {
        (self.0 as u32).wrapping_sub(1)
    }
}

impl Bucket {
    /// The entries with this tag. All places are looked at without a branch, since where an entry sits cannot be predicted.
    #[inline]
    fn matches(&self, tag: u64) -> impl Iterator<Item = Entry> {
        // Acquire pairs with the Release in `place`: the record that an entry names is seen at least as written for it.
        let entries: [u64; BUCKET_ENTRIES] = std::array::from_fn(|n| self.0[n].load(Ordering::Acquire));
        let mut found = 0u32;
        for (n, entry) in entries.iter().enumerate() {
            found |= u32::from(entry >> 33 == tag && *entry != 0) << n;
        }
        std::iter::from_fn(move || {
            let n = found.trailing_zeros() as usize;
            found &= found.wrapping_sub(1);
            entries.get(n).copied().map(Entry)
        })
    }
}

/// The buckets of a table.
#[derive(Clone, Copy)]
pub(super) struct Buckets<'a>(pub &'a [Bucket]);

impl<'a> Buckets<'a> {
    /// The entries that may be of `hash`'s key: those with its tag in its two buckets, those of the first bucket first.
    #[inline]
    pub fn candidates(self, hash: Hash) -> impl Iterator<Item = Entry> + 'a {
        self.pair(hash).into_iter().flat_map(move |bucket| bucket.matches(hash.tag()))
    }

    /// Puts `entry` into its first bucket, or once that is nearly full into the emptier of its two. `false`: both are full, or others were quicker every time.
    pub fn place(self, hash: Hash, entry: Entry) -> bool {
        for _ in 0..PLACE_TRIES {
            let pair = self.pair(hash);
            // Relaxed: only a guess, the exchange decides.
            let free = pair.map(|bucket| bucket.0.iter().filter(|place| place.load(Ordering::Relaxed) == 0).count());
            if free == [0, 0] {
                return false;
            }
            let bucket = if free[0] > SPARE || free[0] >= free[1] { pair[0] } else { pair[1] };
            let Some(place) = bucket.0.iter().find(|place| place.load(Ordering::Relaxed) == 0) else { continue };
            // Release pairs with the Acquire in `matches`.
            if place.compare_exchange(0, entry.0, Ordering::Release, Ordering::Relaxed).is_ok() {
                return true;
            }
        }
        false
    }

    /// Takes `entry` out. Only for whoever holds its record. Harmless if it is not there.
    pub fn remove(self, hash: Hash, entry: Entry) {
        for bucket in self.pair(hash) {
            for place in &bucket.0 {
                // Relaxed: nobody else writes to a place that holds this entry, and that it is gone must be known only to who claims the
                // record next, for which the Release in `Record::free` stands.
                if place.load(Ordering::Relaxed) == entry.0 {
                    place.store(0, Ordering::Relaxed);
                }
            }
        }
    }

    /// Brings the two buckets of `hash` nearer.
    #[inline]
    pub fn warm(self, hash: Hash) {
        for bucket in self.pair(hash) {
            // The value does not matter, so Relaxed; `black_box` keeps the load.
            std::hint::black_box(bucket.0[0].load(Ordering::Relaxed));
        }
    }

    /// Empties every place. Only while nobody else uses the table.
    pub fn clear(self) {
        for place in self.0.iter().flat_map(|bucket| bucket.0.iter()) {
            place.store(0, Ordering::Relaxed);
        }
    }

    /// Places that are taken.
    #[cfg(test)]
    pub fn taken(self) -> usize {
        self.0.iter().flat_map(|bucket| bucket.0.iter()).filter(|place| place.load(Ordering::Relaxed) != 0).count()
    }

    #[inline]
    fn pair(self, hash: Hash) -> [&'a Bucket; 2] {
        hash.buckets(self.0.len()).map(|n| &self.0[n])
    }
}
