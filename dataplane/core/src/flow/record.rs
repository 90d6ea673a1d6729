//! A record: one flow in sixteen words.
//!
//! | word | holds | written |
//! |---|---|---|
//! | 0 | control: version(32) owner(16) state(8), see [`Ctrl`] | by compare-and-swap, or by whoever holds the record |
//! | 1 | last packet, ms of the boot clock | while live, about once a second |
//! | 2 | life: version(32) seen(8) stage(8), see [`Life`] | while live, when it changes |
//! | 3 | the number of the backend's load counter or 0 (32), family(8) opener(8) kind(8) protocol(8) | before the commit |
//! | 4–5 | the low 32 bits of an address: destination, source; of the original tuple, of the reply tuple | before the commit |
//! | 6 | ports: destination and source of the reply tuple, of the original tuple | before the commit |
//! | 7 | how translation changes a sum, for either direction, see [`Change`] | before the commit |
//! | 8–11 | the high 64 bits of the original tuple's source and destination, of the reply tuple's | before the commit |
//! | 12–13 | bits 32 to 63 of an address, as 4–5 | before the commit |
//! | 14 | the service's id | before the commit |
//! | 15 | created, ms of the boot clock | before the commit |
//!
//! All that a packet of a known flow over IPv4 needs, in either direction, lies in the first cache line. Every bit pattern is a valid
//! `Record`, so it may be mapped from a file; what a pattern means is checked where it is read.

use super::sync::{AtomicU64, Ordering, fence};
use super::tcp::Life;
use super::{Direction, Fetch, Flow, FlowRef, Kind, NewFlow, Now, Opener, Stage};
use crate::addr::{Addr, Tuple};
use crate::balance::LoadSlot;
use crate::nat::Change;
use crate::verdict::WorkerId;

/// One flow: 128 bytes of atomics. All zeroes is a free record.
#[derive(Debug, Default)]
#[repr(C, align(64))]
pub struct Record([AtomicU64; 16]);

#[cfg(not(loom))]
const _: () = assert!(size_of::<Record>() == 128);

const CTRL: usize = 0;
const LAST_SEEN: usize = 1;
const LIFE: usize = 2;
const META: usize = 3;
const LOWS: usize = 4;
const PORTS: usize = 6;
const CHANGES: usize = 7;
const HIGHS: usize = 8;
const MIDDLES: usize = 12;
const SERVICE: usize = 14;
const CREATED: usize = 15;

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

/// A tuple as a record holds it, without the protocol.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Packed {
    lows: u64,
    ports: u32,
    highs: [u64; 2],
    middles: u64,
}

impl Packed {
    #[inline]
    pub fn new(tuple: &Tuple) -> Packed {
        let (src, dst) = (tuple.src.0, tuple.dst.0);
        Packed {
            lows: u64::from(src as u32) | u64::from(dst as u32) << 32,
            ports: u32::from(tuple.src_port) | u32::from(tuple.dst_port) << 16,
            highs: [(src >> 64) as u64, (dst >> 64) as u64],
            middles: u64::from((src >> 32) as u32) | u64::from((dst >> 32) as u32) << 32,
        }
    }

    #[inline]
    pub fn tuple(&self, protocol: u8) -> Tuple {
        let addr = |high: u64, shift: u32| {
            Addr(u128::from(high) << 64 | u128::from((self.middles >> shift) as u32) << 32 | u128::from((self.lows >> shift) as u32))
        };
        Tuple {
            src: addr(self.highs[0], 0),
            dst: addr(self.highs[1], 32),
            src_port: self.ports as u16,
            dst_port: (self.ports >> 16) as u16,
            protocol,
        }
    }
}

/// A tuple of IPv4 as a record holds it, without the protocol: the other words say nothing.
#[derive(Clone, Copy, PartialEq, Eq)]
struct PackedV4 {
    lows: u64,
    ports: u32,
}

impl PackedV4 {
    #[inline]
    fn is(self, tuple: &Tuple) -> bool {
        let Packed { lows, ports, .. } = Packed::new(tuple);
        tuple.is_v4() && self == PackedV4 { lows, ports }
    }

    #[inline]
    fn tuple(self, protocol: u8) -> Tuple {
        let [src, dst] = [self.lows as u32, (self.lows >> 32) as u32].map(|bits| Addr::from_v4(bits.to_be_bytes()));
        Tuple { src, dst, src_port: self.ports as u16, dst_port: (self.ports >> 16) as u16, protocol }
    }
}

/// The word with kind, opener, family, protocol and load.
#[derive(Clone, Copy)]
struct Meta(u64);

/// In [`Meta`]: both tuples are of IPv4.
const V4: u64 = 4 << 24;
/// In [`Meta`]: they are not.
const V6: u64 = 6 << 24;

impl Meta {
    fn new(new: &NewFlow) -> Meta {
        let family = if new.original.is_v4() && new.original.src.is_v4() && new.reply.is_v4() && new.reply.src.is_v4() { V4 } else { V6 };
        Meta(new.load.0 << 32 | family | (new.opener as u64) << 16 | (new.kind as u64) << 8 | u64::from(new.original.protocol))
    }

    #[inline]
    fn protocol(self) -> u8 {
        self.0 as u8
    }

    #[inline]
    fn is_v4(self) -> bool {
        self.0 & 0xff << 24 == V4
    }

    #[inline]
    fn is_direct_return(self) -> bool {
        (self.0 >> 8) as u8 == Kind::DirectReturn as u8
    }

    fn kind(self) -> Option<Kind> {
        Some(match (self.0 >> 8) as u8 {
            0 => Kind::Service,
            1 => Kind::Masquerade,
            2 => Kind::OutsideToPod,
            3 => Kind::Relayed,
            4 => Kind::DirectReturn,
            _ => return None,
        })
    }

    #[inline]
    fn opener(self) -> Option<Opener> {
        Some(match (self.0 >> 16) as u8 {
            0 => Opener::Pod,
            1 => Opener::Host,
            2 => Opener::Peer,
            _ => return None,
        })
    }
}

/// What a packet of a known flow needs of its record, read at one moment.
#[derive(Clone, Copy)]
pub(super) struct Hit {
    pub version: u32,
    pub opener: Opener,
    pub life: Life,
    /// The tuple that it leaves with.
    pub to: Tuple,
    /// What that changes in a sum.
    pub change: Change,
}

/// A record's words behind the control word, read at one moment.
#[derive(Clone, Copy)]
pub(super) struct Words([u64; 16]);

impl Words {
    /// Whether the tuple of `direction` is this one.
    #[inline]
    pub fn is(&self, direction: Direction, tuple: &Tuple) -> bool {
        self.packed(direction) == Packed::new(tuple) && self.meta().protocol() == tuple.protocol
    }

    pub fn tuple(&self, direction: Direction) -> Tuple {
        self.packed(direction).tuple(self.meta().protocol())
    }

    #[inline]
    fn packed(&self, direction: Direction) -> Packed {
        let at = direction as usize;
        let ports = (self.0[PORTS] >> (32 * at)) as u32;
        Packed { lows: self.0[LOWS + at], ports, highs: [self.0[HIGHS + 2 * at], self.0[HIGHS + 2 * at + 1]], middles: self.0[MIDDLES + at] }
    }

    #[inline]
    fn meta(&self) -> Meta {
        Meta(self.0[META])
    }

    /// The flow in it, if the words have a meaning (a file may hold anything).
    pub fn flow(&self, index: u32, version: u32, direction: Direction) -> Option<Flow> {
        let life = life_from(self.0[LIFE], version)?;
        Some(Flow {
            at: FlowRef { index, version },
            direction,
            original: self.tuple(Direction::Original),
            reply: self.tuple(Direction::Reply),
            kind: self.meta().kind()?,
            opener: self.meta().opener()?,
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
        LoadSlot(self.meta().0 >> 32)
    }
}

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
        let [original, reply] = [&new.original, &new.reply].map(Packed::new);
        store(LAST_SEEN, now.0);
        store(LIFE, life_word(claimed.version(), Life::of(new.kind)));
        store(META, Meta::new(new).0);
        store(PORTS, u64::from(original.ports) | u64::from(reply.ports) << 32);
        let changes = [(&new.original, &new.reply), (&new.reply, &new.original)].map(|(from, other)| Change::new(from, &other.reversed()).0);
        store(CHANGES, u64::from(changes[0]) | u64::from(changes[1]) << 32);
        for (at, packed) in [original, reply].into_iter().enumerate() {
            store(LOWS + at, packed.lows);
            store(MIDDLES + at, packed.middles);
            store(HIGHS + 2 * at, packed.highs[0]);
            store(HIGHS + 2 * at + 1, packed.highs[1]);
        }
        store(SERVICE, new.service);
        store(CREATED, now.0);
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

    /// What a packet with the tuple `from` needs, if this is its flow, in `direction`, live, and translates. As [`Record::read_live`], but of IPv4 only the
    /// first cache line.
    #[inline(always)]
    pub(super) fn hit(&self, direction: Direction, from: &Tuple) -> Option<Hit> {
        let before = self.ctrl(Ordering::Acquire);
        let load = |word: usize| self.0[word].load(Ordering::Relaxed);
        let meta = Meta(load(META));
        let (here, there) = (direction as usize, 1 - direction as usize);
        // This direction's half, and the other's.
        let halves = |word: u64| match direction {
            Direction::Original => [word as u32, (word >> 32) as u32],
            Direction::Reply => [(word >> 32) as u32, word as u32],
        };
        let (ports, [change, _]) = (halves(load(PORTS)), halves(load(CHANGES)));
        // That it does not fit may be said of halves of two flows: the stages look again.
        let other = if meta.is_v4() {
            if !(PackedV4 { lows: load(LOWS + here), ports: ports[0] }).is(from) {
                return None;
            }
            PackedV4 { lows: load(LOWS + there), ports: ports[1] }.tuple(from.protocol)
        } else {
            let highs = |at: usize| [load(HIGHS + 2 * at), load(HIGHS + 2 * at + 1)];
            let packed = |at: usize, ports| Packed { lows: load(LOWS + at), ports, highs: highs(at), middles: load(MIDDLES + at) };
            if packed(here, ports[0]) != Packed::new(from) {
                return None;
            }
            packed(there, ports[1]).tuple(from.protocol)
        };
        let life = load(LIFE);
        // Pairs with the Release fence in `write`.
        fence(Ordering::Acquire);
        let same = self.ctrl(Ordering::Relaxed) == before;
        if !same || before.state() != State::Live || meta.is_direct_return() || meta.protocol() != from.protocol {
            return None;
        }
        Some(Hit {
            version: before.version(),
            opener: meta.opener()?,
            life: life_from(life, before.version())?,
            to: other.reversed(),
            change: Change(change),
        })
    }

    /// Notes a packet at `now`.
    #[inline]
    pub(super) fn see(&self, now: Now) {
        // Relaxed: nothing else is read because of it. The maximum, so that a worker that slept between its check of the version and
        // this store cannot make a later flow in the record older than it is.
        if now.0.saturating_sub(COARSE_MS) >= self.0[LAST_SEEN].load(Ordering::Relaxed) {
            self.0[LAST_SEEN].fetch_max(now.0, Ordering::Relaxed);
        }
    }

    #[inline]
    pub(super) fn last_seen(&self) -> u64 {
        self.0[LAST_SEEN].load(Ordering::Relaxed)
    }

    /// Fetches the lines that [`Record::hit`] reads.
    #[inline]
    pub(super) fn warm<F: Fetch>(&self, is_v4: bool) {
        F::fetch(&self.0[CTRL]);
        if !is_v4 {
            F::fetch(&self.0[HIGHS]);
        }
    }

    /// The IP protocol of the flow.
    #[inline]
    pub(super) fn protocol(&self) -> u8 {
        Meta(self.0[META].load(Ordering::Relaxed)).protocol()
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
