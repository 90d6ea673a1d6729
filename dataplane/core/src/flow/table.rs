//! The table: lookups, the life of a flow after its creation, and what operators and a successor process need.

use std::fmt;

use super::hash::{Hash, Key};
use super::index::{BUCKET_ENTRIES, Bucket, Buckets, Entry, RECORDS_MAX};
use super::record::{self, COARSE_MS, Ctrl, Record, State, Words};
use super::sync::{AtomicU64, Ordering};
use super::{Direction, Fetch, Flow, FlowRef, FlowView, Now, Opener, Stage, Timeouts};
use crate::addr::{Tuple, protocol};
use crate::affinity::{self, AffinityTable};
use crate::balance::{self, Loads};
use crate::nat;
use crate::verdict::WorkerId;

/// The table: a view of borrowed memory, cheap to copy.
#[derive(Clone, Copy)]
pub struct FlowTable<'a> {
    pub(super) records: &'a [Record],
    pub(super) index: Buckets<'a>,
    affinity: AffinityTable<'a>,
    loads: Loads<'a>,
    key: Key,
}

/// The memory of a table.
#[derive(Clone, Copy)]
pub struct Memory<'a> {
    /// One for each flow; see [`layout`].
    pub records: &'a [Record],
    /// The index, a power of two; see [`layout`].
    pub buckets: &'a [Bucket],
    /// The table of session affinity, a power of two or none: then no client is remembered. See [`affinity::buckets_for`].
    pub affinity: &'a [affinity::Bucket],
    /// The backends' load counters, a power of two or none: then nothing is counted. See [`balance::loads_for`].
    pub loads: &'a [AtomicU64],
}

/// Which record [`FlowTable::likely`] took for that of a packet.
#[derive(Clone, Copy, Debug)]
pub struct Likely(Option<Entry>);

impl Likely {
    /// None.
    pub const NONE: Likely = Likely(None);
}

/// A live flow as a packet of it needs it: a consistent copy. See [`Flow`] for all of it.
#[derive(Clone, Copy)]
pub struct Hit<'a> {
    record: &'a Record,
    direction: Direction,
    found: record::Hit,
}

/// What one step of [`FlowTable::sweep`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Flows that it ended because their time was up.
    pub expired: usize,
    /// Records that it looked at.
    pub examined: usize,
}

/// What [`FlowTable::recover`] found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    /// Flows that live on.
    pub live: usize,
    /// Records freed that were left in the middle of a creation or an end.
    pub unfinished: usize,
    /// Records freed that made no sense, held a tuple of another flow, or found no place in the index.
    pub discarded: usize,
}

/// How many records and buckets a table for `capacity` flows has: the number of buckets is a power of two, and a full table fills
/// at most half of the index.
pub const fn layout(capacity: usize) -> (usize, usize) {
    let records = if capacity == 0 { 1 } else { capacity };
    let buckets = (2 * 2 * records).div_ceil(BUCKET_ENTRIES).next_power_of_two();
    (records, if buckets < 2 { 2 } else { buckets })
}

impl<'a> FlowTable<'a> {
    /// A table on `memory`, which is all zero or was filled by a table with this `key`. The key is secret, drawn at random once for each
    /// boot. Memory that another process filled wants [`FlowTable::recover`] first.
    ///
    /// # Panics
    ///
    /// If there is no record, or more than [`RECORDS_MAX`], or a number that is to be a power of two is not.
    pub fn new(key: [u64; 2], memory: Memory<'a>) -> FlowTable<'a> {
        let Memory { records, buckets, affinity, loads } = memory;
        assert!((1..=RECORDS_MAX).contains(&records.len()), "a flow table has 1 to {RECORDS_MAX} records, not {}", records.len());
        assert!(buckets.len().is_power_of_two() && buckets.len() >= 2, "the buckets of a flow table are a power of two, not {}", buckets.len());
        FlowTable { records, index: Buckets(buckets), affinity: AffinityTable::new(key, affinity), loads: Loads::new(loads), key: Key::new(key) }
    }

    /// Which clients stick to which backends.
    #[inline]
    pub fn affinity(&self) -> AffinityTable<'a> {
        self.affinity
    }

    /// How many of the flows that are counted each backend has.
    #[inline]
    pub fn loads(&self) -> Loads<'a> {
        self.loads
    }

    /// The hash of a tuple under this table's key.
    #[inline]
    pub fn hash(&self, tuple: &Tuple) -> Hash {
        self.key.hash(tuple)
    }

    /// Brings the index entries of `hash` nearer: for a whole batch, before its lookups. See also [`FlowTable::likely`].
    #[inline]
    pub fn warm<F: Fetch>(&self, hash: Hash) {
        F::fetch(self.index.line(hash));
    }

    /// Which record is likely that of a tuple with this hash, by one look at the index.
    #[inline]
    pub fn likely(&self, hash: Hash) -> Likely {
        Likely(self.index.likely(hash))
    }

    /// Brings a record nearer that is likely that of `tuple`: for a whole batch, before its lookups.
    #[inline]
    pub fn warm_record<F: Fetch>(&self, tuple: &Tuple, likely: Likely) {
        if let Some(record) = likely.0.and_then(|entry| self.records.get(entry.record() as usize)) {
            record.warm::<F>(tuple.is_v4());
        }
    }

    /// The flow of `tuple`, if it is the one that [`FlowTable::likely`] found: what a packet of it needs, and no more.
    #[inline(always)]
    pub fn hit(&self, tuple: &Tuple, likely: Likely) -> Option<Hit<'a>> {
        let entry = likely.0?;
        let record = self.records.get(entry.record() as usize)?;
        Some(Hit { record, direction: entry.direction(), found: record.hit(entry.direction(), tuple)? })
    }

    /// The flow that has this tuple, in either direction.
    #[inline]
    pub fn lookup(&self, tuple: &Tuple) -> Option<Flow> {
        self.lookup_hashed(tuple, self.hash(tuple))
    }

    /// [`FlowTable::lookup`] of a tuple whose hash is known.
    ///
    /// It looks at each entry of two buckets once, so it never waits: a flow that ends or is replaced meanwhile is missed, and was
    /// indeed absent at some moment of the lookup.
    #[inline]
    pub fn lookup_hashed(&self, tuple: &Tuple, hash: Hash) -> Option<Flow> {
        self.index.candidates(hash).find_map(|entry| {
            let (version, words) = self.records.get(entry.record() as usize)?.read_live()?;
            if words.is(entry.direction(), tuple) { words.flow(entry.record(), version, entry.direction()) } else { None }
        })
    }

    /// Notes a packet of `flow`, in its direction, and says which stage the flow is in after it. `tcp_flags` is the flags octet of a TCP
    /// segment; `None` for another protocol or a fragment without a header. Harmless if the flow is gone.
    #[inline]
    pub fn touch(&self, flow: &Flow, now: Now, tcp_flags: Option<u8>) -> Stage {
        let Some(record) = self.live(flow.at) else { return flow.stage };
        record.see(now);
        if tcp_flags.is_none() && flow.original.protocol == protocol::TCP {
            // A fragment without the TCP header shows that the connection is alive, and nothing else.
            return flow.stage;
        }
        record.advance(flow.at.version, |life| life.after(flow.direction, tcp_flags)).map_or(flow.stage, |life| life.stage)
    }

    /// Whether a segment of `flow` with these TCP flags opens a new connection: a SYN of the opener after a reset or after both FINs. The
    /// caller then ends this flow and inserts anew. A retransmitted SYN opens nothing.
    pub fn opens_anew(&self, flow: &Flow, tcp_flags: u8) -> bool {
        let life = self.live(flow.at).and_then(|record| record.life(flow.at.version));
        life.is_some_and(|life| life.opens_anew(flow.direction, tcp_flags))
    }

    /// Ends a flow. `true` for the one caller who did it; `false` if it had ended before.
    pub fn end(&self, at: FlowRef) -> bool {
        let Some(dying) = self.mark_dying(at) else { return false };
        self.bury(at.index, dying);
        true
    }

    /// Ends every flow that `over` says is over, and says how many. It reads the whole table: for the control thread, when a pod's address is
    /// taken back or a UDP backend leaves.
    pub fn end_matching(&self, mut over: impl FnMut(&Flow) -> bool) -> usize {
        (0..self.records.len() as u32).filter_map(|index| self.flow_at(index)).filter(|(flow, _)| over(flow) && self.end(flow.at)).count()
    }

    /// Whether the flow is still there.
    #[inline]
    pub fn is_live(&self, at: FlowRef) -> bool {
        self.live(at).is_some()
    }

    /// Looks at the next `records` records from `cursor` on and ends flows whose time is up. One worker's small step between batches; workers
    /// may sweep different parts or the same.
    pub fn sweep(&self, cursor: &mut usize, records: usize, now: Now, timeouts: &Timeouts) -> Swept {
        let mut swept = Swept::default();
        for _ in 0..records.min(self.records.len()) {
            let index = *cursor % self.records.len();
            *cursor = (index + 1) % self.records.len();
            swept.examined += 1;
            let record = &self.records[index];
            // Acquire pairs with the Release of the commit: the words below are this flow's, or a later one's, and then `end` refuses.
            let ctrl = record.ctrl(Ordering::Acquire);
            if ctrl.state() != State::Live {
                continue;
            }
            let Some(life) = record.life(ctrl.version()) else { continue };
            let lifetime = timeouts.lifetime(record.protocol(), life.stage).as_millis() as u64;
            // `last_seen` may be a coarse step behind the last packet.
            let over = now.0.saturating_sub(record.last_seen()) >= lifetime.saturating_add(COARSE_MS);
            if over && self.end(FlowRef { index: index as u32, version: ctrl.version() }) {
                swept.expired += 1;
            }
        }
        swept
    }

    /// Frees what a worker that died left in the middle of an insertion, and says how many records that were. Only after that worker's thread
    /// has ended, and before another takes its number.
    pub fn abandon(&self, worker: WorkerId) -> usize {
        self.affinity.abandon(worker);
        let mut freed = 0;
        for (index, record) in self.records.iter().enumerate() {
            let Some((ctrl, words)) = record.read() else { continue };
            if ctrl.owner() != worker || !matches!(ctrl.state(), State::Claimed | State::Aborted) {
                continue;
            }
            // If the words were not yet written there is no entry either, and nothing is found to remove.
            self.forget(index as u32, &words);
            record.free(ctrl);
            freed += 1;
        }
        freed
    }

    /// Makes the table whole after the process that used it is gone, whatever it was doing: the index is rebuilt from the live records, which
    /// all live on under their versions; unfinished ones are freed. Only while nobody else uses the table.
    pub fn recover(&self) -> Recovered {
        self.affinity.recover();
        self.loads.clear();
        self.index.clear();
        let mut recovered = Recovered::default();
        for (index, record) in self.records.iter().enumerate() {
            let ctrl = record.ctrl(Ordering::Acquire);
            match ctrl.state() {
                State::Free => {}
                State::Claimed | State::Aborted | State::Dying => {
                    record.free(ctrl);
                    recovered.unfinished += 1;
                }
                State::Live if self.reinstate(index as u32) => recovered.live += 1,
                State::Live => {
                    record.free(ctrl);
                    recovered.discarded += 1;
                }
            }
        }
        recovered
    }

    /// Every flow, for operators. It reads the table while the workers go on: a flow that lives all the while is there once.
    pub fn views(self, now: Now) -> impl Iterator<Item = FlowView> + 'a {
        (0..self.records.len() as u32).filter_map(move |index| {
            let (flow, words) = self.flow_at(index)?;
            Some(FlowView { flow, idle_ms: now.0.saturating_sub(words.last_seen()), age_ms: now.0.saturating_sub(words.created()) })
        })
    }

    /// How many flows there are, by counting.
    pub fn len(&self) -> usize {
        self.records.iter().filter(|record| record.ctrl(Ordering::Relaxed).state() == State::Live).count()
    }

    /// Whether there is no flow, by looking.
    pub fn is_empty(&self) -> bool {
        self.records.iter().all(|record| record.ctrl(Ordering::Relaxed).state() != State::Live)
    }

    /// How many flows it can hold.
    pub fn capacity(&self) -> usize {
        self.records.len()
    }

    /// First half of `end`: the flow is no longer found. `None`: it is not live, or another caller was first.
    pub(super) fn mark_dying(&self, at: FlowRef) -> Option<Ctrl> {
        let record = self.records.get(at.index as usize)?;
        let ctrl = record.ctrl(Ordering::Relaxed);
        if ctrl.version() != at.version || ctrl.state() != State::Live {
            return None;
        }
        let dying = ctrl.with(State::Dying);
        // Acquire pairs with the Release of the commit: `bury` reads the flow's words.
        record.change(ctrl, dying, Ordering::Acquire).ok()?;
        Some(dying)
    }

    /// Second half of `end`: out of the index, and free.
    fn bury(&self, index: u32, dying: Ctrl) {
        let record = &self.records[index as usize];
        // The version cannot change, since the record is ours.
        if let Some((_, words)) = record.read() {
            self.loads.end(words.load());
            self.forget(index, &words);
        }
        record.free(dying);
    }

    /// Takes both entries of a record that the caller holds out of the index.
    fn forget(&self, index: u32, words: &Words) {
        for direction in [Direction::Original, Direction::Reply] {
            let hash = self.hash(&words.tuple(direction));
            self.index.remove(hash, Entry::new(direction, index));
        }
    }

    /// Puts a live record's entries back into the index; `false` if it makes no sense or there is no place.
    fn reinstate(&self, index: u32) -> bool {
        let Some((flow, words)) = self.flow_at(index) else { return false };
        if flow.original == flow.reply || self.lookup(&flow.original).is_some() || self.lookup(&flow.reply).is_some() {
            return false;
        }
        let placed = [(Direction::Original, &flow.original), (Direction::Reply, &flow.reply)].into_iter().all(|(direction, tuple)| {
            let hash = self.hash(tuple);
            self.index.place(hash, Entry::new(direction, index))
        });
        if placed {
            self.loads.begin(words.load());
        } else {
            self.forget(index, &words);
        }
        placed
    }

    #[inline]
    fn live(&self, at: FlowRef) -> Option<&'a Record> {
        let record = self.records.get(at.index as usize)?;
        // Relaxed: whoever asks already read this flow, and what it writes next carries the version or does no harm.
        let ctrl = record.ctrl(Ordering::Relaxed);
        (ctrl.version() == at.version && ctrl.state() == State::Live).then_some(record)
    }

    fn flow_at(&self, index: u32) -> Option<(Flow, Words)> {
        let record = &self.records[index as usize];
        // Most records are free: whoever reads the whole table does not want their words. Relaxed: `read_live` looks again.
        if record.ctrl(Ordering::Relaxed).state() != State::Live {
            return None;
        }
        let (version, words) = record.read_live()?;
        Some((words.flow(index, version, Direction::Original)?, words))
    }
}

impl Hit<'_> {
    /// Which way the packet goes.
    #[inline]
    pub fn direction(&self) -> Direction {
        self.direction
    }

    /// Where the opener sits.
    #[inline]
    pub fn opener(&self) -> Opener {
        self.found.opener
    }

    /// The tuple that the packet leaves with.
    #[inline]
    pub fn to(&self) -> &Tuple {
        &self.found.to
    }

    /// What that changes in a sum.
    #[inline]
    pub fn change(&self) -> nat::Change {
        self.found.change
    }

    /// [`FlowTable::touch`] of this flow.
    #[inline(always)]
    pub fn touch(&self, now: Now, tcp_flags: Option<u8>) {
        self.record.see(now);
        let life = self.found.life;
        if life.after(self.direction, tcp_flags) != life {
            self.record.advance(self.found.version, |life| life.after(self.direction, tcp_flags));
        }
    }
}

impl fmt::Debug for FlowTable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Neither a million records nor the key.
        f.debug_struct("FlowTable").field("capacity", &self.capacity()).finish_non_exhaustive()
    }
}

/// A table that owns its memory: for tests, the simulator and benches.
pub struct OwnedFlows {
    records: Box<[Record]>,
    buckets: Box<[Bucket]>,
    affinity: Box<[affinity::Bucket]>,
    loads: Box<[AtomicU64]>,
    key: [u64; 2],
}

impl OwnedFlows {
    /// An empty table for `capacity` flows.
    pub fn new(capacity: usize, key: [u64; 2]) -> OwnedFlows {
        let (records, buckets) = layout(capacity);
        let affinity = (0..affinity::buckets_for(capacity)).map(|_| affinity::Bucket::default()).collect();
        let loads = (0..balance::loads_for(capacity)).map(|_| AtomicU64::new(0)).collect();
        OwnedFlows { affinity, loads, ..OwnedFlows::with_layout(records, buckets, key) }
    }

    /// An empty table of this many records and buckets, which remembers no client and counts no load.
    pub(super) fn with_layout(records: usize, buckets: usize, key: [u64; 2]) -> OwnedFlows {
        OwnedFlows {
            records: (0..records).map(|_| Record::default()).collect(),
            buckets: (0..buckets).map(|_| Bucket::default()).collect(),
            affinity: Box::default(),
            loads: Box::default(),
            key,
        }
    }

    /// The table.
    pub fn table(&self) -> FlowTable<'_> {
        FlowTable::new(self.key, Memory { records: &self.records, buckets: &self.buckets, affinity: &self.affinity, loads: &self.loads })
    }
}

impl fmt::Debug for OwnedFlows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.table().fmt(f)
    }
}
