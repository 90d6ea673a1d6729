//! What became of each datagram's head, and tails that wait for it.
//!
//! A datagram's entry is made by its first fragment to arrive, whichever it is, and goes when all of it was seen: identifications are
//! reused within seconds at speed (16 bits at 10,000 datagrams of 9,000 bytes a second last 6.5 s), so nothing stays that need not.
//! Where fragments were lost the entry stays until its time is up or the table is full, oldest first.

use crate::addr::Addr;
use crate::flow::Now;
use crate::fragment::slab::{Held, NONE, Slab};
use crate::fragment::spans::{Fit, Spans};
use crate::packet::Ingress;
use crate::parse::{Fragment, Parsed};
use crate::verdict::DropReason;

/// How long a head's decision is kept. Linux gives a datagram 30 s to become whole (`ip_frag_time`); later tails are of no use to anyone.
const DECISION_MS: u64 = 30_000;

/// How long tails wait for their head. Fragments of one datagram overtake each other by milliseconds; a sender that lost the head sends
/// all again under a new identification. Less memory for hostile tails is worth more than the last straggler.
const WAIT_MS: u64 = 2_000;

/// A fragment that contradicts an entry which was silent for so long belongs to a new datagram with the same identification.
const REUSE_MS: u64 = 1_000;

/// Tails that one datagram may have waiting: 64 KiB in fragments of 1,280 bytes, less the head, and some more.
const HELD_PER_DATAGRAM_MAX: u16 = 64;

/// What names a datagram among others under way, in its packets as they arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FragmentKey {
    /// Source address.
    pub src: Addr,
    /// Destination address.
    pub dst: Addr,
    /// Identification.
    pub id: u32,
    /// Protocol; 0 for IPv6, where it does not name a datagram (RFC 8200 §4.5) and tails may say another than the head does.
    pub protocol: u8,
}

impl FragmentKey {
    /// The key of a fragment.
    pub fn of(parsed: &Parsed, fragment: &Fragment) -> FragmentKey {
        let tuple = &parsed.tuple;
        FragmentKey { src: tuple.src, dst: tuple.dst, id: fragment.id, protocol: if tuple.is_v4() { tuple.protocol } else { 0 } }
    }
}

/// How much memory fragments take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FragmentLimits {
    /// Datagrams under way at once.
    pub datagrams: usize,
    /// Bytes for tails that wait.
    pub held_bytes: usize,
}

impl Default for FragmentLimits {
    /// 4 MiB of waiting tails, and as many datagrams as make about 1.5 MiB of entries: at 100,000 datagrams a second whose tails never
    /// come, a head is remembered for 80 ms.
    fn default() -> FragmentLimits {
        FragmentLimits { datagrams: 8_192, held_bytes: 4 << 20 }
    }
}

/// What becomes of a fragment that is not the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tail<T> {
    /// The same as of its head.
    Follow(T),
    /// A copy waits for the head.
    Held,
    /// It ends here.
    Drop(DropReason),
}

/// Waiting tails that were given up, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lost {
    /// Their head did not come in time: [`DropReason::FragmentTimeout`].
    pub timeout: u64,
    /// Others needed the memory: [`DropReason::FragmentTableFull`].
    pub full: u64,
    /// A fragment of the same datagram overlapped: [`DropReason::FragmentOverlap`].
    pub overlap: u64,
}

impl Lost {
    /// Each reason and its count.
    pub fn by_reason(&self) -> [(DropReason, u64); 3] {
        [(DropReason::FragmentTimeout, self.timeout), (DropReason::FragmentTableFull, self.full), (DropReason::FragmentOverlap, self.overlap)]
    }
}

/// Datagrams under way; `T` is what was decided of a head. All memory is allocated by [`FragmentTable::new`].
#[derive(Debug)]
pub struct FragmentTable<T> {
    seed: u64,
    /// First entry of each bucket; a power of two of them.
    buckets: Box<[u32]>,
    entries: Box<[Entry<T>]>,
    free_entry: u32,
    live: usize,
    /// Entries without a decision, and with one: each in the order in which their time runs out.
    queues: [Queue; 2],
    slab: Slab,
    lost: Lost,
}

#[derive(Clone, Copy, Debug)]
struct Entry<T> {
    key: FragmentKey,
    state: State<T>,
    spans: Spans,
    /// When it took its state.
    since: Now,
    /// When its last fragment came.
    last: Now,
    /// Waiting tails, in order of arrival.
    first_held: u32,
    last_held: u32,
    held: u16,
    /// In its bucket (or in the free list).
    next: u32,
    /// In its queue.
    older: u32,
    newer: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State<T> {
    /// Tails came before the head.
    Waiting,
    /// The head came.
    Decided(T),
    /// Fragments overlapped: nothing more of it passes (RFC 5722 §4).
    Poisoned,
}

#[derive(Clone, Copy, Debug)]
struct Queue {
    oldest: u32,
    newest: u32,
}

const WAITING: usize = 0;
const SETTLED: usize = 1;

impl<T> State<T> {
    fn queue(&self) -> usize {
        match self {
            State::Waiting => WAITING,
            State::Decided(_) | State::Poisoned => SETTLED,
        }
    }
}

/// Why tails are given up.
#[derive(Clone, Copy, Debug)]
enum Why {
    Timeout,
    Full,
    Overlap,
}

impl<T: Copy> FragmentTable<T> {
    /// A table within `limits`. `seed` should be random: it keeps a sender from choosing which entries share a bucket.
    pub fn new(limits: FragmentLimits, seed: u64) -> FragmentTable<T> {
        let count = limits.datagrams.clamp(1, NONE as usize - 1);
        let nobody = FragmentKey { src: Addr::UNSPECIFIED, dst: Addr::UNSPECIFIED, id: 0, protocol: 0 };
        let empty = Entry {
            key: nobody,
            state: State::Waiting,
            spans: Spans::EMPTY,
            since: Now(0),
            last: Now(0),
            first_held: NONE,
            last_held: NONE,
            held: 0,
            next: NONE,
            older: NONE,
            newer: NONE,
        };
        let mut entries = vec![empty; count].into_boxed_slice();
        for (index, entry) in entries.iter_mut().enumerate().take(count - 1) {
            entry.next = index as u32 + 1;
        }
        FragmentTable {
            seed,
            buckets: vec![NONE; (count * 2).next_power_of_two()].into_boxed_slice(),
            entries,
            free_entry: 0,
            live: 0,
            queues: [Queue { oldest: NONE, newest: NONE }; 2],
            slab: Slab::new(limits.held_bytes),
            lost: Lost::default(),
        }
    }

    /// Notes a datagram's first fragment and what was decided of it. Tails that wait for it are to be released next.
    pub fn head(&mut self, key: FragmentKey, fragment: &Fragment, now: Now, decision: T) -> Result<(), DropReason> {
        let (start, end) = span(fragment)?;
        let at = self.note(key, start, end, fragment.more, now)?;
        self.leave_queue(at);
        let entry = &mut self.entries[at as usize];
        entry.state = State::Decided(decision);
        entry.since = now;
        self.join_queue(at);
        if self.entries[at as usize].held == 0 {
            self.remove_if_complete(at);
        }
        Ok(())
    }

    /// Notes a fragment that is not the first, whose whole packet is `bytes`, and says what becomes of it.
    pub fn tail(&mut self, key: FragmentKey, fragment: &Fragment, now: Now, bytes: &[u8], ingress: Ingress) -> Tail<T> {
        let noted = span(fragment).and_then(|(start, end)| self.note(key, start, end, fragment.more, now));
        let at = match noted {
            Ok(at) => at,
            Err(reason) => return Tail::Drop(reason),
        };
        if let State::Decided(decision) = self.entries[at as usize].state {
            if self.entries[at as usize].held == 0 {
                self.remove_if_complete(at);
            }
            return Tail::Follow(decision);
        }
        match self.hold(at, bytes, ingress) {
            Ok(()) => Tail::Held,
            Err(reason) => {
                // Its bytes are noted as seen though they are gone, which no later fragment can mend: the datagram is lost.
                self.remove(at, Why::Full);
                Tail::Drop(reason)
            }
        }
    }

    /// Takes the next tail that waited for the head of `key`, in order of arrival, and appends it to `into`, which never grows: one that
    /// has no room there is lost, [`DropReason::OutboxFull`]. To be called until it gives `None`, after [`head`](FragmentTable::head).
    pub fn release(&mut self, key: FragmentKey, into: &mut Vec<u8>) -> Option<Result<Held, DropReason>> {
        let at = self.find(key)?;
        let entry = &mut self.entries[at as usize];
        if !matches!(entry.state, State::Decided(_)) || entry.held == 0 {
            return None;
        }
        let block = entry.first_held;
        let (held, next) = self.slab.describe(block);
        entry.first_held = next;
        entry.held -= 1;
        let fits = into.capacity() - into.len() >= held.len;
        if fits {
            self.slab.copy(block, into);
        }
        self.slab.free(block);
        if self.entries[at as usize].held == 0 {
            self.remove_if_complete(at);
        }
        Some(if fits { Ok(held) } else { Err(DropReason::OutboxFull) })
    }

    /// Gives up what has waited or stayed too long. Gives back the waiting tails that were lost since the last call, for whatever reason.
    pub fn expire(&mut self, now: Now) -> Lost {
        for (queue, keep) in [(WAITING, WAIT_MS), (SETTLED, DECISION_MS)] {
            while let Some(entry) = self.entries.get(self.queues[queue].oldest as usize)
                && now.0.saturating_sub(entry.since.0) >= keep
            {
                self.remove(self.queues[queue].oldest, Why::Timeout);
            }
        }
        std::mem::take(&mut self.lost)
    }

    /// Datagrams under way.
    pub fn datagrams(&self) -> usize {
        self.live
    }

    /// Bytes of memory taken by waiting tails, in whole blocks.
    pub fn held_bytes(&self) -> usize {
        self.slab.used_bytes()
    }

    /// Notes a fragment in its datagram's entry, which is made if there is none.
    fn note(&mut self, key: FragmentKey, start: u16, end: u16, more: bool, now: Now) -> Result<u32, DropReason> {
        let at = match self.find(key) {
            Some(at) => at,
            None => self.insert(key, now),
        };
        let entry = &mut self.entries[at as usize];
        let silent = now.0.saturating_sub(entry.last.0) >= REUSE_MS;
        let fit = if entry.state.is_poisoned() { Fit::Conflict } else { entry.spans.note(start, end, more) };
        match fit {
            Fit::New => {
                entry.last = now;
                Ok(at)
            }
            Fit::Duplicate | Fit::Conflict if silent => {
                self.remove(at, Why::Timeout);
                self.note(key, start, end, more, now)
            }
            // Dropped as Linux does, but harmless: it may be the network that repeats.
            Fit::Duplicate => Err(DropReason::FragmentOverlap),
            Fit::Conflict => {
                self.poison(at, now);
                Err(DropReason::FragmentOverlap)
            }
            Fit::Full => Err(DropReason::FragmentTableFull),
        }
    }

    fn poison(&mut self, at: u32, now: Now) {
        self.free_held(at, Why::Overlap);
        self.leave_queue(at);
        let entry = &mut self.entries[at as usize];
        if !entry.state.is_poisoned() {
            entry.since = now;
        }
        entry.state = State::Poisoned;
        entry.last = now;
        self.join_queue(at);
    }

    fn hold(&mut self, at: u32, bytes: &[u8], ingress: Ingress) -> Result<(), DropReason> {
        if self.entries[at as usize].held >= HELD_PER_DATAGRAM_MAX || bytes.is_empty() {
            return Err(DropReason::FragmentTableFull);
        }
        while !self.slab.has_room(bytes.len()) {
            // The oldest that waits goes first. Those with a decision whose tails are not yet released have just got their head.
            let oldest = self.queues[WAITING].oldest;
            if oldest == at || oldest == NONE {
                return Err(DropReason::FragmentTableFull);
            }
            self.remove(oldest, Why::Full);
        }
        let block = self.slab.store(bytes, ingress);
        let entry = &mut self.entries[at as usize];
        if entry.held == 0 {
            entry.first_held = block;
        } else {
            self.slab.link(entry.last_held, block);
        }
        entry.last_held = block;
        entry.held += 1;
        Ok(())
    }

    fn bucket(&self, key: &FragmentKey) -> usize {
        // Multiply and fold (as wyhash does): cheap, and with a secret seed good enough against chosen collisions.
        let fold = |a: u64, b: u64| {
            let product = u128::from(a) * u128::from(b);
            (product >> 64) as u64 ^ product as u64
        };
        let mut hash = self.seed ^ 0x9e37_79b9_7f4a_7c15;
        for word in
            [(key.src.0 >> 64) as u64, key.src.0 as u64, (key.dst.0 >> 64) as u64, key.dst.0 as u64, u64::from(key.id) << 8 | u64::from(key.protocol)]
        {
            hash = fold(hash ^ word, 0xa076_1d64_78bd_642f ^ self.seed | 1);
        }
        hash as usize & (self.buckets.len() - 1)
    }

    fn find(&self, key: FragmentKey) -> Option<u32> {
        let mut at = self.buckets[self.bucket(&key)];
        while let Some(entry) = self.entries.get(at as usize) {
            if entry.key == key {
                return Some(at);
            }
            at = entry.next;
        }
        None
    }

    fn insert(&mut self, key: FragmentKey, now: Now) -> u32 {
        if self.free_entry == NONE {
            self.remove(self.oldest(), Why::Full);
        }
        let at = self.free_entry;
        let bucket = self.bucket(&key);
        let entry = &mut self.entries[at as usize];
        self.free_entry = entry.next;
        self.live += 1;
        entry.key = key;
        entry.state = State::Waiting;
        entry.spans = Spans::EMPTY;
        entry.since = now;
        entry.last = now;
        entry.held = 0;
        entry.next = self.buckets[bucket];
        self.buckets[bucket] = at;
        self.join_queue(at);
        at
    }

    /// The older of the two queues' oldest.
    fn oldest(&self) -> u32 {
        let [waiting, settled] = [self.queues[WAITING].oldest, self.queues[SETTLED].oldest];
        match (self.entries.get(waiting as usize), self.entries.get(settled as usize)) {
            (Some(a), Some(b)) if b.since < a.since => settled,
            (Some(_), _) => waiting,
            (None, _) => settled,
        }
    }

    fn remove_if_complete(&mut self, at: u32) {
        if self.entries[at as usize].spans.complete() {
            self.remove(at, Why::Timeout);
        }
    }

    fn remove(&mut self, at: u32, why: Why) {
        self.free_held(at, why);
        self.leave_queue(at);
        let bucket = self.bucket(&self.entries[at as usize].key);
        let next = self.entries[at as usize].next;
        let mut link = self.buckets[bucket];
        if link == at {
            self.buckets[bucket] = next;
        } else {
            while self.entries[link as usize].next != at {
                link = self.entries[link as usize].next;
            }
            self.entries[link as usize].next = next;
        }
        self.entries[at as usize].next = self.free_entry;
        self.free_entry = at;
        self.live -= 1;
    }

    fn free_held(&mut self, at: u32, why: Why) {
        let entry = &mut self.entries[at as usize];
        let count = u64::from(entry.held);
        for _ in 0..count {
            let (_, next) = self.slab.describe(entry.first_held);
            self.slab.free(entry.first_held);
            entry.first_held = next;
        }
        entry.held = 0;
        match why {
            Why::Timeout => self.lost.timeout += count,
            Why::Full => self.lost.full += count,
            Why::Overlap => self.lost.overlap += count,
        }
    }

    fn join_queue(&mut self, at: u32) {
        let queue = &mut self.queues[self.entries[at as usize].state.queue()];
        let older = std::mem::replace(&mut queue.newest, at);
        if older == NONE {
            queue.oldest = at;
        } else {
            self.entries[older as usize].newer = at;
        }
        let entry = &mut self.entries[at as usize];
        entry.older = older;
        entry.newer = NONE;
    }

    fn leave_queue(&mut self, at: u32) {
        let Entry { older, newer, state, .. } = self.entries[at as usize];
        let queue = &mut self.queues[state.queue()];
        match older {
            NONE => queue.oldest = newer,
            older => self.entries[older as usize].newer = newer,
        }
        match newer {
            NONE => queue.newest = older,
            newer => self.entries[newer as usize].older = older,
        }
    }
}

impl<T> State<T> {
    fn is_poisoned(&self) -> bool {
        matches!(self, State::Poisoned)
    }
}

/// First byte and end of a fragment's payload in the datagram's.
fn span(fragment: &Fragment) -> Result<(u16, u16), DropReason> {
    let end = fragment.offset.saturating_add(fragment.len);
    // RFC 791 §3.2 and RFC 8200 §4.5: all but the last are multiples of 8 bytes; none is empty; none reaches beyond what a length can say.
    let ragged = fragment.more && !fragment.len.is_multiple_of(8);
    match (u16::try_from(fragment.offset), u16::try_from(end)) {
        (Ok(start), Ok(end)) if start < end && !ragged => Ok((start, end)),
        _ => Err(DropReason::FragmentBad),
    }
}
