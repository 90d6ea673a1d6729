//! The index: buckets of eight entries, one cache line each.
//!
//! A bucket holds the tags of its entries side by side, so that one comparison looks at four, and the entries behind them: direction(1)
//! record number + 1 (31). Zero is an empty place, for both. An entry is put in by compare-and-swap and its tag after it; it stands while its
//! record is claimed, aborted, live or dying and goes, its tag before it, before the record is free, taken out only by whoever holds the
//! record; entries never move. So a lookup looks at two cache lines at most, however full the table is, and a key whose two buckets are
//! full cannot be inserted.
//!
//! How full may the index be? Two choices of eight places, simulated with random keys in 2^19 buckets, filled and then replaced three times
//! over: at 70 % one insertion in 600 finds no place, at 60 % one in 45,000, at 50 % none of 8 million. (Replacement is what hurts: a table
//! that is only filled takes 70 %.) So [`super::layout`] gives it twice the places that its flows can need.

use std::num::NonZeroU32;

use super::Direction;
use super::hash::Hash;
use super::sync::{AtomicU32, AtomicU64, Ordering};

/// One bucket of the index: 64 bytes of atomics, of which 16 are spare. All zeroes is an empty bucket.
#[derive(Debug, Default)]
#[repr(C, align(64))]
pub struct Bucket {
    /// Four tags each: place n's is lane n / TAG_WORDS of word n % TAG_WORDS.
    tags: [AtomicU64; TAG_WORDS],
    entries: [AtomicU32; BUCKET_ENTRIES],
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<Bucket>() == 64);

/// Entries of one bucket.
pub(super) const BUCKET_ENTRIES: usize = 4 * TAG_WORDS;
/// Words that hold their tags.
#[cfg(not(loom))]
const TAG_WORDS: usize = 2;
/// Fewer for the model checker, which looks at every order of every access.
#[cfg(loom)]
const TAG_WORDS: usize = 1;

/// Bits from one place to the next where words of tags are laid over each other.
const PLACE_BITS: usize = 16 / TAG_WORDS;

/// The lowest bit of each lane.
const LANES: u64 = 0x0001_0001_0001_0001;

/// `place` prefers the first bucket of a key while that has more than this many places left, so that most lookups need one cache line of the
/// index, not two: 87 % at half full.
const SPARE: usize = BUCKET_ENTRIES / 4;

/// How often `place` begins again when others take the places that it picks.
const PLACE_TRIES: usize = 16;

/// A place of the index that is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry(NonZeroU32);

/// The most records that entries can number.
pub const RECORDS_MAX: usize = (1 << 31) - 1;

impl Entry {
    #[inline]
    pub fn new(direction: Direction, record: u32) -> Entry {
        Entry(NonZeroU32::new((direction as u32) << 31 | (record + 1)).expect("a record's number is less than RECORDS_MAX"))
    }

    #[inline]
    pub fn direction(self) -> Direction {
        if self.0.get() >> 31 == 0 { Direction::Original } else { Direction::Reply }
    }

    /// The record's number.
    #[inline]
    pub fn record(self) -> u32 {
        (self.0.get() & !(1 << 31)).wrapping_sub(1)
    }
}

/// Places whose tag fits, as bits: place n's is bit n * PLACE_BITS.
#[derive(Clone, Copy)]
struct Found(u64);

impl Found {
    /// The next place, in the order of their bits.
    #[inline]
    fn pop(&mut self) -> Option<usize> {
        if self.0 == 0 {
            return None;
        }
        let bit = self.0.trailing_zeros() as usize;
        self.0 &= self.0 - 1;
        Some(bit / PLACE_BITS)
    }
}

impl Bucket {
    /// The places with this tag. All are looked at without a branch, since where an entry sits cannot be predicted.
    #[inline]
    fn find(&self, tag: u16) -> Found {
        let wanted = LANES.wrapping_mul(tag.into());
        let mut found = 0;
        for (n, tags) in self.tags.iter().enumerate() {
            // Acquire pairs with the Release in `place`: the entry behind a tag, and the record that it names, are seen at least as written
            // for it.
            let differing = tags.load(Ordering::Acquire) ^ wanted;
            // Lanes that are zero ("Hacker's Delight" §6-1). A lane of 1 above a zero counts as well: its entry leads to a record that
            // does not fit.
            let zero = differing.wrapping_sub(LANES) & !differing & LANES << 15;
            found |= zero >> 15 << (n * PLACE_BITS);
        }
        Found(found)
    }

    /// What stands in a place that was found; nothing if it was taken out meanwhile.
    #[inline]
    fn entry(&self, place: usize) -> Option<Entry> {
        // Relaxed: behind the Acquire of `find`.
        NonZeroU32::new(self.entries[place].load(Ordering::Relaxed)).map(Entry)
    }

    /// The entries with this tag.
    #[inline]
    fn matches(&self, tag: u16) -> impl Iterator<Item = Entry> {
        let mut found = self.find(tag);
        std::iter::from_fn(move || {
            loop {
                if let Some(entry) = self.entry(found.pop()?) {
                    return Some(entry);
                }
            }
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

    /// The first of [`Buckets::candidates`], which hardly ever is another key's.
    #[inline]
    pub fn likely(self, hash: Hash) -> Option<Entry> {
        let bucket = self.first(hash);
        match bucket.find(hash.tag()).pop() {
            Some(place) => bucket.entry(place),
            None => self.second(hash).matches(hash.tag()).next(),
        }
    }

    /// Puts `entry` into its first bucket, or once that is nearly full into the emptier of its two. `false`: both are full, or others were quicker every time.
    pub fn place(self, hash: Hash, entry: Entry) -> bool {
        for _ in 0..PLACE_TRIES {
            let pair = self.pair(hash);
            // Relaxed: only a guess, the exchange decides.
            let free = pair.map(|bucket| bucket.entries.iter().filter(|place| place.load(Ordering::Relaxed) == 0).count());
            if free == [0, 0] {
                return false;
            }
            let bucket = if free[0] > SPARE || free[0] >= free[1] { pair[0] } else { pair[1] };
            let Some(place) = bucket.entries.iter().position(|place| place.load(Ordering::Relaxed) == 0) else { continue };
            // Acquire pairs with the Release in `remove`: the last entry's tag is gone.
            if bucket.entries[place].compare_exchange(0, entry.0.get(), Ordering::Acquire, Ordering::Relaxed).is_ok() {
                // Release pairs with the Acquire in `find`.
                let (tags, shift) = bucket.lane(place);
                tags.fetch_or(u64::from(hash.tag()) << shift, Ordering::Release);
                return true;
            }
        }
        false
    }

    /// Takes `entry` out. Only for whoever holds its record. Harmless if it is not there.
    pub fn remove(self, hash: Hash, entry: Entry) {
        for bucket in self.pair(hash) {
            for (n, place) in bucket.entries.iter().enumerate() {
                // Relaxed: nobody else writes to a place that holds this entry.
                if place.load(Ordering::Relaxed) == entry.0.get() {
                    let (tags, shift) = bucket.lane(n);
                    tags.fetch_and(!(0xffff << shift), Ordering::Relaxed);
                    // Release pairs with the Acquire in `place`. That the entry is gone must be known to who claims the record next, too,
                    // for which the Release in `Record::free` stands.
                    place.store(0, Ordering::Release);
                }
            }
        }
    }

    /// The line that a lookup of `hash` needs first. The second bucket is looked at by one packet in eight when the index is as full as it gets.
    #[inline]
    pub fn line(self, hash: Hash) -> &'a AtomicU64 {
        &self.first(hash).tags[0]
    }

    /// Empties every place. Only while nobody else uses the table.
    pub fn clear(self) {
        for bucket in self.0 {
            bucket.tags.iter().for_each(|tags| tags.store(0, Ordering::Relaxed));
            bucket.entries.iter().for_each(|place| place.store(0, Ordering::Relaxed));
        }
    }

    /// Places that are taken.
    #[cfg(test)]
    pub fn taken(self) -> usize {
        self.0.iter().flat_map(|bucket| bucket.entries.iter()).filter(|place| place.load(Ordering::Relaxed) != 0).count()
    }

    #[inline]
    fn first(self, hash: Hash) -> &'a Bucket {
        &self.0[hash.bucket(self.0.len())]
    }

    #[inline]
    fn second(self, hash: Hash) -> &'a Bucket {
        &self.0[hash.second_bucket(self.0.len())]
    }

    #[inline]
    fn pair(self, hash: Hash) -> [&'a Bucket; 2] {
        [self.first(hash), self.second(hash)]
    }
}

impl Bucket {
    /// The word that holds a place's tag, and where in it.
    fn lane(&self, place: usize) -> (&AtomicU64, u32) {
        (&self.tags[place % TAG_WORDS], place as u32 / TAG_WORDS as u32 * 16)
    }
}
