//! How a flow is created, step by step, and how two workers that create one at the same time agree.
//!
//! 1. *Claim* a free record.
//! 2. *Write* the flow into it.
//! 3. *Place* the entry of the original tuple and *settle* it: look for rivals, other records with the same tuple.
//! 4. The same for the reply tuple.
//! 5. *Commit*: claimed becomes live.
//!
//! Of two rivals at least one sees the other, because each places its entry before it looks, with a sequentially consistent fence between
//! (Dekker's algorithm). A live rival has won. Of two claimed ones the record with the smaller number wins: it aborts the other, the other gives
//! way. Whether the loser noticed in time is decided by its control word alone: either the abort or the commit changes it first. So one
//! tuple never has two live flows; it may happen that both attempts end (a third aborted the winner), and then the caller tries again.
//!
//! Each step leaves the table in a state from which [`super::FlowTable::recover`] goes on.
#![expect(clippy::result_large_err, reason = "an existing flow is as good an outcome as a new one, and of the same size")]

use super::hash::Hash;
use super::index::Entry;
use super::record::{Ctrl, State};
use super::sync::{Ordering, fence};
use super::table::FlowTable;
use super::{Direction, Flow, FlowRef, InsertError, NewFlow, Now, Stage};
use crate::addr::Tuple;
use crate::verdict::WorkerId;

/// Records that an insertion looks at for a free one. It bounds the cost of a full table (8 KiB of control lines); at 95 % occupancy and a random
/// pattern it fails once in 700 times, and then a half-open flow makes room.
const CLAIM_SCAN: usize = 128;

/// So many of them in a row; then it goes on elsewhere. Flows that were opened one after the other stand side by side: whoever comes upon a
/// thousand of them, as a worker does that starts where its predecessor did, would find its whole reach full in a table that is all but empty.
const CLAIM_RUN: usize = 32;

/// How often `settle` looks again after it aborted a rival. Each look that is not the last has put one of at most 16 rivals out of the race.
const SETTLE_TRIES: usize = 16;

/// Where a worker looks for free records next: each worker has its own, so that they keep out of each other's way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cursor {
    next: usize,
    /// Half-open flows that were ended early to make room, since this cursor was made.
    pub evicted: u64,
}

/// The steps after the claim. Whoever drops it without `commit` or `undo` leaves what a crash leaves.
pub(super) struct Insertion<'a> {
    table: FlowTable<'a>,
    index: u32,
    claimed: Ctrl,
    new: NewFlow,
    hashes: [Hash; 2],
}

/// Who else has a tuple.
enum Rival {
    Live(Flow),
    Claimed(u32, Ctrl),
}

/// Why a tuple is not ours.
pub(super) enum Lost {
    To(Flow),
    GaveWay,
}

impl<'a> FlowTable<'a> {
    /// A cursor for `worker`, of `workers` in all.
    pub fn cursor(&self, worker: WorkerId, workers: u16) -> Cursor {
        Cursor { next: self.capacity() / usize::from(workers.max(1)) * usize::from(worker.0) % self.capacity(), evicted: 0 }
    }

    /// Creates a flow. On success it is live and both of its tuples find it; on an error nothing of it remains.
    ///
    /// With no free record within reach, the oldest half-open (or reset) flow within reach ends to make room; never an established one.
    pub fn insert(&self, new: &NewFlow, worker: WorkerId, now: Now, cursor: &mut Cursor) -> Result<Flow, InsertError> {
        debug_assert_eq!(new.original.protocol, new.reply.protocol);
        if new.original == new.reply {
            return Err(InsertError::ReplyTaken);
        }
        let insertion = self.claim(new, worker, cursor).ok_or(InsertError::Full)?;
        insertion.write(now);
        for direction in [Direction::Original, Direction::Reply] {
            if !insertion.place(direction) {
                insertion.undo();
                return Err(InsertError::Full);
            }
            if let Err(lost) = insertion.settle(direction) {
                insertion.undo();
                return Err(match (direction, lost) {
                    (Direction::Original, Lost::To(flow)) => InsertError::Exists(flow),
                    (Direction::Original, Lost::GaveWay) => InsertError::Raced,
                    (Direction::Reply, _) => InsertError::ReplyTaken,
                });
            }
        }
        insertion.commit()
    }

    /// Step 1: a free record, now claimed by `worker`.
    pub(super) fn claim(&self, new: &NewFlow, worker: WorkerId, cursor: &mut Cursor) -> Option<Insertion<'a>> {
        let mut victim: Option<(u64, FlowRef)> = None;
        // Four steps of five eighths go to each quarter of the table once, less its length's remainder.
        let elsewhere = if self.records.len() > CLAIM_SCAN { self.records.len() / 8 * 5 } else { 0 };
        for look in 0..CLAIM_SCAN.min(self.records.len()) {
            if look % CLAIM_RUN == 0 && look > 0 {
                cursor.next = (cursor.next + elsewhere) % self.records.len();
            }
            let index = cursor.next;
            cursor.next = (index + 1) % self.records.len();
            // Relaxed: only a guess, the exchange in `claim_at` decides.
            let ctrl = self.records[index].ctrl(Ordering::Relaxed);
            match ctrl.state() {
                State::Free => {
                    if let Some(insertion) = self.claim_at(index as u32, ctrl, worker, new) {
                        return Some(insertion);
                    }
                }
                State::Live => {
                    let record = &self.records[index];
                    let evictable = record.life(ctrl.version()).is_some_and(|life| matches!(life.stage, Stage::Opening | Stage::Reset));
                    let last_seen = record.last_seen();
                    if evictable && victim.is_none_or(|(oldest, _)| last_seen < oldest) {
                        victim = Some((last_seen, FlowRef { index: index as u32, version: ctrl.version() }));
                    }
                }
                State::Claimed | State::Aborted | State::Dying => {}
            }
        }
        let (_, victim) = victim?;
        if self.end(victim) {
            cursor.evicted += 1;
        }
        // Whoever ended it, it is free now or soon; if somebody is quicker to claim it, the table is full for this packet.
        let ctrl = self.records[victim.index as usize].ctrl(Ordering::Relaxed);
        if ctrl.state() == State::Free { self.claim_at(victim.index, ctrl, worker, new) } else { None }
    }

    fn claim_at(&self, index: u32, free: Ctrl, worker: WorkerId, new: &NewFlow) -> Option<Insertion<'a>> {
        let claimed = free.claimed_by(worker);
        // Acquire pairs with the Release in `Record::free`: the entries of the record's last flow are gone.
        self.records[index as usize].change(free, claimed, Ordering::Acquire).ok()?;
        Some(Insertion { table: *self, index, claimed, new: *new, hashes: [self.hash(&new.original), self.hash(&new.reply)] })
    }

    /// Another record that holds `key` and is in the race for it or has won. Aborted and dying ones are out of it: neither becomes live.
    fn rival(&self, key: &Tuple, hash: Hash, me: u32) -> Option<Rival> {
        for entry in self.index.candidates(hash) {
            let Some(record) = self.records.get(entry.record() as usize) else { continue };
            if entry.record() == me {
                continue;
            }
            // `None`: the record was freed while we read, so the entry was a dying flow's. A new one with this key in the same place
            // was placed after our look at that place, hence after our fence, and will see ours. For the same reason it does no harm to
            // meet, behind such an entry, a record that is being written anew: at worst we abort it for nothing, and its owner tries again.
            let Some((ctrl, found)) = record.read() else { continue };
            if !found.is(entry.direction(), key) {
                continue;
            }
            match ctrl.state() {
                State::Live => {
                    if let Some(flow) = found.flow(entry.record(), ctrl.version(), entry.direction()) {
                        return Some(Rival::Live(flow));
                    }
                }
                State::Claimed => return Some(Rival::Claimed(entry.record(), ctrl)),
                State::Free | State::Aborted | State::Dying => {}
            }
        }
        None
    }
}

impl Insertion<'_> {
    /// Step 2: the flow's words, which nobody reads yet.
    pub fn write(&self, now: Now) {
        self.table.records[self.index as usize].write(self.claimed, &self.new, now);
    }

    /// Steps 3 and 4, first half: the entry of one tuple. `false`: no place in either bucket.
    pub fn place(&self, direction: Direction) -> bool {
        let hash = self.hashes[direction as usize];
        self.table.index.place(hash, Entry::new(direction, self.index))
    }

    /// Steps 3 and 4, second half: the tuple is ours alone, or why not.
    pub fn settle(&self, direction: Direction) -> Result<(), Lost> {
        let key = match direction {
            Direction::Original => &self.new.original,
            Direction::Reply => &self.new.reply,
        };
        // Pairs with itself in a rival's `settle`: of two entries for one tuple, each placed before its owner's fence, at least one owner
        // sees the other's. Without it both could miss each other and both commit.
        fence(Ordering::SeqCst);
        for _ in 0..SETTLE_TRIES {
            match self.table.rival(key, self.hashes[direction as usize], self.index) {
                None => return Ok(()),
                Some(Rival::Live(flow)) => return Err(Lost::To(flow)),
                Some(Rival::Claimed(index, ctrl)) if self.index < index => {
                    // Relaxed: only the order of changes to this one word matters, and an exchange always meets the last. If it fails, the
                    // rival is live, aborted or gone by now, and the next look tells.
                    let _ = self.table.records[index as usize].change(ctrl, ctrl.with(State::Aborted), Ordering::Relaxed);
                }
                Some(Rival::Claimed(..)) => return Err(Lost::GaveWay),
            }
        }
        Err(Lost::GaveWay)
    }

    /// Step 5: the flow is live, unless a rival aborted it; then it is undone.
    pub fn commit(self) -> Result<Flow, InsertError> {
        // Release pairs with the Acquire in `Record::read`: who sees it live sees all of its words.
        match self.table.records[self.index as usize].change(self.claimed, self.claimed.with(State::Live), Ordering::Release) {
            Ok(()) => {
                self.table.loads().begin(self.new.load);
                Ok(Flow {
                    at: FlowRef { index: self.index, version: self.claimed.version() },
                    direction: Direction::Original,
                    original: self.new.original,
                    reply: self.new.reply,
                    kind: self.new.kind,
                    opener: self.new.opener,
                    service: self.new.service,
                    stage: Stage::Opening,
                })
            }
            Err(_) => {
                self.undo();
                Err(InsertError::Raced)
            }
        }
    }

    /// Takes everything back.
    pub fn undo(self) {
        for direction in [Direction::Original, Direction::Reply] {
            let hash = self.hashes[direction as usize];
            self.table.index.remove(hash, Entry::new(direction, self.index));
        }
        self.table.records[self.index as usize].free(self.claimed);
    }
}
