//! The index: buckets of eight entries, one cache line each.
//!
//! An entry is tag(31) direction(1) record number + 1 (32); zero is an empty place. It stands while its record is claimed, aborted, live or
//! dying and goes before the record is free, taken out only by whoever holds the record; entries never move. So a lookup looks at two cache
//! lines, however full the table is, and a key whose two buckets are full cannot be inserted: with two choices of eight places each that does
//! not happen to random keys below 70 % (`layout`), and the keyed hash keeps keys random.

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
pub(super) const BUCKET_ENTRIES: usize = 2;

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
    fn tag(self) -> u64 {
        self.0 >> 33
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

/// The buckets of a table.
#[derive(Clone, Copy)]
pub(super) struct Buckets<'a>(pub &'a [Bucket]);

impl<'a> Buckets<'a> {
    /// The entries that may be of `hash`'s key: those with its tag in its two buckets.
    #[inline]
    pub fn candidates(self, hash: Hash) -> impl Iterator<Item = Entry> + 'a {
        let tag = hash.tag();
        self.pair(hash).into_iter().flat_map(|bucket| bucket.0.iter()).filter_map(move |place| {
            // Acquire pairs with the Release in `place`: the record that the entry names is seen at least as written for it.
            let entry = Entry(place.load(Ordering::Acquire));
            (entry.tag() == tag && entry.0 != 0).then_some(entry)
        })
    }

    /// Puts `entry` into the emptier of its two buckets. `false`: both are full, or others were quicker every time.
    pub fn place(self, hash: Hash, entry: Entry) -> bool {
        for _ in 0..PLACE_TRIES {
            let pair = self.pair(hash);
            // Relaxed: only a guess, the exchange decides.
            let free = pair.map(|bucket| bucket.0.iter().filter(|place| place.load(Ordering::Relaxed) == 0).count());
            if free == [0, 0] {
                return false;
            }
            let bucket = if free[1] > free[0] { pair[1] } else { pair[0] };
            let Some(place) = bucket.0.iter().find(|place| place.load(Ordering::Relaxed) == 0) else { continue };
            // Release pairs with the Acquire in `candidates`.
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
