//! A record: one flow in sixteen words.
//!
//! | word | holds | written |
//! |---|---|---|
//! | 0 | control: version(32) owner(16) state(8), see [`Ctrl`] | by compare-and-swap, or by whoever holds the record |
//! | 1 | last packet, ms of the boot clock | while live, about once a second |
//! | 2 | created, ms of the boot clock | before the commit |
//! | 3 | life: version(32) seen(8) stage(8), see [`Life`] | while live, when it changes |
//! | 4–8 | the original tuple; word 8 also has kind and opener | before the commit |
//! | 9–13 | the reply tuple | before the commit |
//! | 14 | the service's id | before the commit |
//! | 15 | the number of the backend's load counter, or 0 | before the commit |
//!
//! All that a packet of the original direction compares lies in the first cache line. Every bit pattern is a valid `Record`, so it may
//! be mapped from a file; what a pattern means is checked where it is read.

use super::hash::tuple_words;
use super::sync::{AtomicU64, Ordering, fence};
use super::tcp::Life;
use super::{Direction, Flow, FlowRef, Kind, NewFlow, Now, Opener, Stage};
use crate::addr::{Addr, Tuple};
use crate::balance::LoadSlot;
use crate::verdict::WorkerId;

/// One flow: 128 bytes of atomics. All zeroes is a free record.
#[derive(Debug, Default)]
#[repr(C, align(64))]
pub struct Record([AtomicU64; 16]);

#[cfg(not(loom))]
const _: () = assert!(size_of::<Record>() == 128);

const CTRL: usize = 0;
const LAST_SEEN: usize = 1;
const CREATED: usize = 2;
const LIFE: usize = 3;
const ORIGINAL: usize = 4;
const REPLY: usize = 9;
const SERVICE: usize = 14;
const LOAD: usize = 15;

/// `last_seen` is written only when it is this much out of date, so that the cache line of a busy flow stays shared between the workers.
pub(super) const COARSE_MS: u64 = 1_000;

/// Who may do what with a record; the table in the module's documentation has the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum State {
    Free = 0,
    Claimed = 1,
    Aborted = 2,
    Live = 3,
    Dying = 4,
}

/// The control word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ctrl(pub u64);

impl Ctrl {
    pub fn version(self) -> u32 {
        (self.0 >> 32) as u32
    }

    pub fn owner(self) -> WorkerId {
        WorkerId((self.0 >> 16) as u16)
    }

    /// The state. A number that no version of this code writes counts as dying: nobody touches the record until `recover`.
    pub fn state(self) -> State {
        match self.0 as u8 {
            0 => State::Free,
            1 => State::Claimed,
            2 => State::Aborted,
            3 => State::Live,
            _ => State::Dying,
        }
    }

    pub fn with(self, state: State) -> Ctrl {
        Ctrl(self.0 & !0xffff | state as u64)
    }

    pub fn claimed_by(self, worker: WorkerId) -> Ctrl {
        Ctrl(self.0 & !0xffff_ffff | (worker.0 as u64) << 16 | State::Claimed as u64)
    }

    /// Free, under the next version: whatever still refers to this one no longer fits.
    pub fn freed(self) -> Ctrl {
        Ctrl((self.version().wrapping_add(1) as u64) << 32)
    }
}

/// A record's words behind the control word, read at one moment.
#[derive(Clone, Copy)]
pub(super) struct Words([u64; 16]);

impl Words {
    pub fn is(&self, direction: Direction, key: &[u64; 5]) -> bool {
        match direction {
            Direction::Original => self.0[ORIGINAL..ORIGINAL + 4] == key[..4] && self.0[ORIGINAL + 4] & PORTS == key[4],
            Direction::Reply => self.0[REPLY..REPLY + 5] == *key,
        }
    }

    pub fn tuple(&self, direction: Direction) -> Tuple {
        let first = match direction {
            Direction::Original => ORIGINAL,
            Direction::Reply => REPLY,
        };
        let word = &self.0[first..first + 5];
        Tuple {
            src: Addr((word[0] as u128) << 64 | word[1] as u128),
            dst: Addr((word[2] as u128) << 64 | word[3] as u128),
            src_port: word[4] as u16,
            dst_port: (word[4] >> 16) as u16,
            protocol: (word[4] >> 32) as u8,
        }
    }

    /// The flow in it, if the words have a meaning (a file may hold anything).
    pub fn flow(&self, index: u32, version: u32, direction: Direction) -> Option<Flow> {
        let meta = self.0[ORIGINAL + 4] >> 40;
        let kind = match meta as u8 {
            0 => Kind::Service,
            1 => Kind::Masquerade,
            2 => Kind::OutsideToPod,
            3 => Kind::Relayed,
            4 => Kind::DirectReturn,
            _ => return None,
        };
        let opener = match (meta >> 8) as u8 {
            0 => Opener::Pod,
            1 => Opener::Host,
            2 => Opener::Peer,
            _ => return None,
        };
        let life = life_from(self.0[LIFE], version)?;
        Some(Flow {
            at: FlowRef { index, version },
            direction,
            original: self.tuple(Direction::Original),
            reply: self.tuple(Direction::Reply),
            kind,
            opener,
            service: self.0[SERVICE],
            stage: life.stage,
        })
    }

    pub fn last_seen(&self) -> u64 {
        self.0[LAST_SEEN]
    }

    pub fn created(&self) -> u64 {
        self.0[CREATED]
    }

    pub fn load(&self) -> LoadSlot {
        LoadSlot(self.0[LOAD])
    }
}

/// The bits of a tuple's last word: ports and protocol.
const PORTS: u64 = (1 << 40) - 1;

fn life_word(version: u32, life: Life) -> u64 {
    (version as u64) << 32 | (life.seen as u64) << 8 | life.stage as u64
}

fn life_from(word: u64, version: u32) -> Option<Life> {
    if (word >> 32) as u32 != version {
        return None;
    }
    let stage = match word as u8 {
        0 => Stage::Opening,
        1 => Stage::Established,
        2 => Stage::Closing,
        3 => Stage::Reset,
        _ => return None,
    };
    Some(Life { stage, seen: (word >> 8) as u8 })
}

impl Record {
    #[inline]
    pub(super) fn ctrl(&self, ordering: Ordering) -> Ctrl {
        Ctrl(self.0[CTRL].load(ordering))
    }

    /// Moves the control word from `from` to `to`, or says what it is instead.
    #[inline]
    pub(super) fn change(&self, from: Ctrl, to: Ctrl, success: Ordering) -> Result<(), Ctrl> {
        // Relaxed on failure: whoever goes on with the value it found loads the word again with what it needs.
        self.0[CTRL].compare_exchange(from.0, to.0, success, Ordering::Relaxed).map(drop).map_err(Ctrl)
    }

    /// Frees the record. Only for who holds it: the owner of a claimed or aborted one, the winner of `end`, `recover`.
    #[inline]
    pub(super) fn free(&self, held: Ctrl) {
        // Release pairs with the Acquire of the next claim: the entries are out of the index before the record is somebody else's. A plain
        // store is enough, since the only change that others may make to a held record is claimed to aborted, and that is over as well.
        self.0[CTRL].store(held.freed().0, Ordering::Release);
    }

    /// Writes a flow into a record that the caller has claimed (as `claimed`).
    pub(super) fn write(&self, claimed: Ctrl, new: &NewFlow, now: Now) {
        // Pairs with the Acquire fence in `read`: a reader that sees one of the words below also sees the claim, so its second look at the
        // control word tells it that the flow it began to read is gone. Without the fence the words could overtake the claim.
        fence(Ordering::Release);
        let store = |word: usize, value: u64| self.0[word].store(value, Ordering::Relaxed);
        let mut original = tuple_words(&new.original);
        original[4] |= (new.kind as u64) << 40 | (new.opener as u64) << 48;
        for (first, words) in [(ORIGINAL, original), (REPLY, tuple_words(&new.reply))] {
            words.into_iter().enumerate().for_each(|(n, word)| store(first + n, word));
        }
        store(LAST_SEEN, now.0);
        store(CREATED, now.0);
        store(LIFE, life_word(claimed.version(), Life::of(new.kind)));
        store(SERVICE, new.service);
        store(LOAD, new.load.0);
    }

    /// The control word and then the words, if its version was still the same afterwards. Of a record that was live at the first look they are
    /// one flow's, complete; of one that was claimed they may be half written, even if it has become live since.
    #[inline]
    pub(super) fn read(&self) -> Option<(Ctrl, Words)> {
        // Acquire pairs with the Release of the commit (a live record) and, through the entry that led here, of `Buckets::place` (a claimed one).
        let before = self.ctrl(Ordering::Acquire);
        let words = Words(std::array::from_fn(|n| if n == CTRL { before.0 } else { self.0[n].load(Ordering::Relaxed) }));
        // Pairs with the Release fence in `write`.
        fence(Ordering::Acquire);
        let after = self.ctrl(Ordering::Relaxed);
        (after.version() == before.version()).then_some((before, words))
    }

    /// [`Record::read`] for a live record.
    #[inline]
    pub(super) fn read_live(&self) -> Option<(u32, Words)> {
        let (ctrl, words) = self.read()?;
        (ctrl.state() == State::Live).then_some((ctrl.version(), words))
    }

    /// Notes a packet at `now`.
    #[inline]
    pub(super) fn see(&self, now: Now) {
        // Relaxed: nothing else is read because of it. The maximum, so that a worker that slept between its check of the version and
        // this store cannot make a later flow in the record older than it is.
        if now.0 >= self.0[LAST_SEEN].load(Ordering::Relaxed).saturating_add(COARSE_MS) {
            self.0[LAST_SEEN].fetch_max(now.0, Ordering::Relaxed);
        }
    }

    #[inline]
    pub(super) fn last_seen(&self) -> u64 {
        self.0[LAST_SEEN].load(Ordering::Relaxed)
    }

    /// The service's word: on the second cache line.
    #[inline]
    pub(super) fn service(&self) -> u64 {
        self.0[SERVICE].load(Ordering::Relaxed)
    }

    /// The IP protocol of the flow.
    #[inline]
    pub(super) fn protocol(&self) -> u8 {
        (self.0[ORIGINAL + 4].load(Ordering::Relaxed) >> 32) as u8
    }

    /// The life of the flow of this version.
    #[inline]
    pub(super) fn life(&self, version: u32) -> Option<Life> {
        life_from(self.0[LIFE].load(Ordering::Relaxed), version)
    }

    /// Applies `step` to the life of the flow of this version. `None`: the record holds another flow.
    #[inline]
    pub(super) fn advance(&self, version: u32, step: impl Fn(Life) -> Life) -> Option<Life> {
        loop {
            let word = self.0[LIFE].load(Ordering::Relaxed);
            let life = life_from(word, version)?;
            let next = step(life);
            // Relaxed: the word is complete in itself; the version in it keeps a late store away from a later flow. The loop ends
            // because lives only advance.
            if next == life || self.0[LIFE].compare_exchange(word, life_word(version, next), Ordering::Relaxed, Ordering::Relaxed).is_ok() {
                return Some(next);
            }
        }
    }
}
