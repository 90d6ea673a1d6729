//! Session affinity: which backend a client sticks to, for every worker and for the next process too.
//!
//! One entry for each client and service port, whichever VIP or node port the client dialled (semantics row 9). The table is an
//! [`AffinityTable`], a view of borrowed [`Bucket`]s of sixteen places that lie behind the flows in their file, so that a successor of a
//! killed process finds it. A keyed hash names the one bucket in which an entry may stand; no operation looks at anything else.
//!
//! A place is four words: control, tag (the keyed hash of client and service port), the service port's id, and life (who, until when).
//!
//! | state | means | leaves by |
//! |---|---|---|
//! | free | nobody's | claim |
//! | claimed | its words are being written | placed |
//! | placed | a new entry that looks for rivals: readers pass over it | commit, or a rival frees it |
//! | live | a client sticks to a backend; the life word changes by compare-and-swap | claim by a newcomer, forget |
//!
//! Two workers that meet a client for the first time at once place an entry each, and then look: a live rival has won; of two placed ones
//! the lower place wins. It is the flow table's agreement ([`crate::flow`]) within one bucket. From then on the one life word decides.
//!
//! **A flood of clients.** A newcomer takes a free place, then one whose time is up, then that of a client that came but once; never that of a
//! client that came back. With none of these it is not remembered. Who is not remembered, or was put out, is not lost: backends of a
//! service with affinity are chosen by the client's address alone, so while the endpoints stay the same the choice is the same again.
//!
//! Sixteen places to a bucket: with random clients at half full one newcomer in 250 finds its bucket full, at a quarter one in a million
//! (Poisson, more than 16 where 8 or 4 are expected).

use std::fmt;
use std::time::Duration;

use crate::addr::{Addr, Tuple};
use crate::flow::Now;
use crate::flow::hash;
use crate::flow::sync::{AtomicU64, Ordering, fence};
use crate::service::Backend;
use crate::verdict::WorkerId;

/// Places of one bucket.
#[cfg(not(loom))]
const WAYS: usize = 16;
/// Fewer for the model checker.
#[cfg(loom)]
const WAYS: usize = 2;

/// Sixteen places: 512 bytes of atomics. All zeroes is an empty bucket. Words of one kind stand together, so that a search reads two cache
/// lines.
#[derive(Debug, Default)]
#[repr(C, align(64))]
pub struct Bucket {
    tag: [AtomicU64; WAYS],
    ctrl: [AtomicU64; WAYS],
    service: [AtomicU64; WAYS],
    life: [AtomicU64; WAYS],
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<Bucket>() == 512);

/// How many buckets belong to a flow table for `capacity` flows: a place for each four of them. A power of two.
pub const fn buckets_for(capacity: usize) -> usize {
    capacity.div_ceil(4 * WAYS).next_power_of_two()
}

/// How often an operation begins anew because others were quicker.
const TRIES: usize = 8;

/// A backend's name in the table: 35 bits of a hash of its address and port, the same in every generation and every release.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BackendId(u64);

const ID_BITS: u32 = 35;

impl BackendId {
    /// Of this address and port.
    pub fn new(addr: Addr, port: u16) -> BackendId {
        BackendId(crate::balance::backend_hash(addr, port) >> (u64::BITS - ID_BITS))
    }

    /// Of an endpoint.
    pub fn of(backend: &Backend) -> BackendId {
        BackendId::new(backend.addr, backend.port)
    }
}

/// What a client sticks to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sticky {
    /// The backend.
    pub backend: BackendId,
    /// For how many more seconds, unless the client comes back.
    pub left_s: u64,
}

/// A client's new connection to a service port with affinity.
#[derive(Clone, Copy, Debug)]
pub struct Visit {
    /// The client's own address.
    pub client: Addr,
    /// [`crate::service::ServicePort::id`].
    pub service: u64,
    /// How long the client is remembered from now on; whole seconds.
    pub timeout: Duration,
    /// The time.
    pub now: Now,
}

/// The table: a view of borrowed memory, cheap to copy.
#[derive(Clone, Copy)]
pub struct AffinityTable<'a> {
    buckets: &'a [Bucket],
    key: [u64; 2],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum State {
    Free = 0,
    Claimed = 1,
    Placed = 2,
    Live = 3,
}

/// The control word: version(32) owner(16) state(8). The version grows with each claim and each release.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ctrl(u64);

impl Ctrl {
    fn state(self) -> State {
        match self.0 as u8 {
            0 => State::Free,
            2 => State::Placed,
            3 => State::Live,
            // A number that no version of this code writes counts as claimed: nobody touches the place until `recover`.
            _ => State::Claimed,
        }
    }

    fn owner(self) -> WorkerId {
        WorkerId((self.0 >> 16) as u16)
    }

    fn version(self) -> u64 {
        self.0 >> 32
    }

    fn with(self, state: State) -> Ctrl {
        Ctrl(self.0 & !0xff | state as u64)
    }

    fn next(self) -> u64 {
        self.version().wrapping_add(1) << 32
    }

    fn claimed_by(self, worker: WorkerId) -> Ctrl {
        Ctrl(self.next() | (worker.0 as u64) << 16 | State::Claimed as u64)
    }

    fn freed(self) -> Ctrl {
        Ctrl(self.next())
    }
}

/// The life word: backend(35) came back(1) until(28), seconds of the boot clock, which last for eight years.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Life(u64);

const UNTIL_BITS: u32 = u64::BITS - ID_BITS - 1;
const CAME_BACK: u64 = 1 << UNTIL_BITS;

impl Life {
    fn new(backend: BackendId, visit: &Visit) -> Life {
        // Rounded up: a client is never forgotten early, and at most a second late.
        let until = visit.now.0.div_ceil(1_000).saturating_add(visit.timeout.as_secs());
        Life(backend.0 << (UNTIL_BITS + 1) | until.min(CAME_BACK - 1))
    }

    fn again(self, visit: &Visit) -> Life {
        Life(Life::new(self.backend(), visit).0 | CAME_BACK)
    }

    fn backend(self) -> BackendId {
        BackendId(self.0 >> (UNTIL_BITS + 1))
    }

    fn came_back(self) -> bool {
        self.0 & CAME_BACK != 0
    }

    fn until(self) -> u64 {
        self.0 & (CAME_BACK - 1)
    }

    fn left_s(self, now: Now) -> u64 {
        self.until().saturating_sub(now.0 / 1_000)
    }
}

/// What names an entry.
#[derive(Clone, Copy)]
struct Key {
    tag: u64,
    service: u64,
}

/// An entry as one look found it.
#[derive(Clone, Copy)]
struct Found {
    way: usize,
    life: Life,
}

/// What an attempt to remember a client came to.
enum Remembered {
    /// It sticks to what was chosen.
    Yes,
    /// Somebody else remembered it meanwhile, or may have, or is about to: with this backend, if it could be seen.
    Raced(Option<BackendId>),
    /// Every place of its bucket is one of a client that came back.
    NoRoom,
}

impl<'a> AffinityTable<'a> {
    /// A table on `buckets` (see [`buckets_for`]), all zero or filled by a table with this `key`. Memory that another process filled wants
    /// `recover` first. Without a bucket nobody is remembered.
    ///
    /// # Panics
    ///
    /// If the number of buckets is neither zero nor a power of two.
    pub fn new(key: [u64; 2], buckets: &'a [Bucket]) -> AffinityTable<'a> {
        assert!(buckets.is_empty() || buckets.len().is_power_of_two(), "the buckets of an affinity table are a power of two, not {}", buckets.len());
        AffinityTable { buckets, key }
    }

    /// What `client` sticks to at the service port of this id.
    pub fn lookup(&self, client: Addr, service: u64, now: Now) -> Option<Sticky> {
        let (key, bucket) = self.key(client, service)?;
        let life = find(bucket, key, State::Live)?.life;
        let left_s = life.left_s(now);
        (left_s > 0).then_some(Sticky { backend: life.backend(), left_s })
    }

    /// Notes a new connection and says which backend its client sticks to from now on: what it stuck to before, if that is `usable`, else
    /// `choice`, unless another worker was quicker with another choice. Never waits: of a rival that has not got there after several looks (its
    /// thread may be off its CPU) it takes the backend on trust.
    pub fn stick(&self, visit: &Visit, choice: BackendId, worker: WorkerId, usable: impl Fn(BackendId) -> bool) -> BackendId {
        let Some((key, bucket)) = self.key(visit.client, visit.service) else { return choice };
        let mut rival = None;
        for _ in 0..TRIES {
            let Some(found) = find(bucket, key, State::Live) else {
                match remember(bucket, key, visit, choice, worker) {
                    Remembered::Yes | Remembered::NoRoom => return choice,
                    Remembered::Raced(seen) => rival = seen.or(rival),
                }
                continue;
            };
            let keeps = found.life.left_s(visit.now) > 0 && usable(found.life.backend());
            let life = if keeps { found.life.again(visit) } else { Life::new(choice, visit) };
            // Relaxed: the word is complete in itself. A place that changed hands since the look has another life, save for one of the same
            // backend that ends in the same second: then another client's entry is refreshed, or chosen anew where it was over. And if a
            // newcomer is taking the place at this moment, the client is not remembered this time.
            if life == found.life || bucket.life[found.way].compare_exchange(found.life.0, life.0, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
                return life.backend();
            }
        }
        rival.filter(|backend| usable(*backend)).unwrap_or(choice)
    }

    /// Forgets every client for whose service port and backend `over` says so, and says how many. It reads the whole table: for the control
    /// thread, when endpoints leave.
    pub fn forget(&self, over: impl Fn(u64, BackendId) -> bool) -> usize {
        let mut forgotten = 0;
        for bucket in self.buckets {
            for way in 0..WAYS {
                let Some((ctrl, _, service, life)) = read(bucket, way) else { continue };
                if ctrl.state() == State::Live && over(service, life.backend()) && change(bucket, way, ctrl, ctrl.freed(), Ordering::Release) {
                    forgotten += 1;
                }
            }
        }
        forgotten
    }

    /// How many clients are remembered whose time is not up, by counting.
    pub fn len(&self, now: Now) -> usize {
        let places = self.buckets.iter().flat_map(|bucket| (0..WAYS).filter_map(|way| read(bucket, way)));
        places.filter(|(ctrl, _, _, life)| ctrl.state() == State::Live && life.left_s(now) > 0).count()
    }

    /// How many clients it can remember.
    pub fn capacity(&self) -> usize {
        self.buckets.len() * WAYS
    }

    /// Frees what a worker that died left half done. Only after that worker's thread has ended.
    pub(crate) fn abandon(&self, worker: WorkerId) {
        self.free_unfinished(|ctrl| ctrl.owner() == worker);
    }

    /// Frees what a process that is gone left half done. Only while nobody else uses the table.
    pub(crate) fn recover(&self) {
        self.free_unfinished(|_| true);
    }

    fn free_unfinished(&self, theirs: impl Fn(Ctrl) -> bool) {
        for bucket in self.buckets {
            for (way, ctrl) in bucket.ctrl.iter().enumerate() {
                let ctrl = Ctrl(ctrl.load(Ordering::Acquire));
                if matches!(ctrl.state(), State::Claimed | State::Placed) && theirs(ctrl) {
                    // A rival may be quicker to free a placed one.
                    change(bucket, way, ctrl, ctrl.freed(), Ordering::Release);
                }
            }
        }
    }

    fn key(&self, client: Addr, service: u64) -> Option<(Key, &'a Bucket)> {
        if self.buckets.is_empty() {
            return None;
        }
        // The flow table's hash, of a tuple that no flow has: nobody's destination is a service's id.
        let named = Tuple { src: client, dst: Addr(service.into()), ..Tuple::default() };
        let tag = hash::Key::new(self.key).hash(&named).word();
        Some((Key { tag, service }, &self.buckets[tag as usize & (self.buckets.len() - 1)]))
    }
}

impl fmt::Debug for AffinityTable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AffinityTable").field("capacity", &self.capacity()).finish_non_exhaustive()
    }
}

/// A place's control word and then the others, if it did not change hands meanwhile: of one that was live or placed they are one entry's,
/// complete.
fn read(bucket: &Bucket, way: usize) -> Option<(Ctrl, u64, u64, Life)> {
    // Acquire pairs with the Release of `place`, and of the commit.
    let ctrl = Ctrl(bucket.ctrl[way].load(Ordering::Acquire));
    let tag = bucket.tag[way].load(Ordering::Relaxed);
    let service = bucket.service[way].load(Ordering::Relaxed);
    let life = Life(bucket.life[way].load(Ordering::Relaxed));
    // Pairs with the Release fence in `place`: who sees a word of a later entry sees its claim as well.
    fence(Ordering::Acquire);
    let after = Ctrl(bucket.ctrl[way].load(Ordering::Relaxed));
    (after.version() == ctrl.version()).then_some((ctrl, tag, service, life))
}

/// The entry of `key` in `state`, in the lowest place.
fn find(bucket: &Bucket, key: Key, state: State) -> Option<Found> {
    (0..WAYS).filter(|way| bucket.tag[*way].load(Ordering::Relaxed) == key.tag).find_map(|way| {
        let (ctrl, tag, service, life) = read(bucket, way)?;
        (ctrl.state() == state && tag == key.tag && service == key.service).then_some(Found { way, life })
    })
}

fn change(bucket: &Bucket, way: usize, from: Ctrl, to: Ctrl, success: Ordering) -> bool {
    bucket.ctrl[way].compare_exchange(from.0, to.0, success, Ordering::Relaxed).is_ok()
}

/// Puts a new entry into the bucket, unless a rival for the same client does.
fn remember(bucket: &Bucket, key: Key, visit: &Visit, choice: BackendId, worker: WorkerId) -> Remembered {
    let (way, found) = match room(bucket, key, visit.now) {
        Ok(room) => room,
        Err(without) => return without,
    };
    let claimed = found.claimed_by(worker);
    // Acquire pairs with the Release with which the place was freed.
    if !change(bucket, way, found, claimed, Ordering::Acquire) {
        return Remembered::Raced(None);
    }
    let placed = place(bucket, way, claimed, key, Life::new(choice, visit));
    settle(bucket, way, placed, key)
}

/// Where a newcomer may stand (the rule is the module's), or why it may not.
fn room(bucket: &Bucket, key: Key, now: Now) -> Result<(usize, Ctrl), Remembered> {
    let mut victim: Option<(u64, usize, Ctrl)> = None;
    let mut rival = None;
    for way in 0..WAYS {
        let Some((ctrl, tag, service, life)) = read(bucket, way) else { continue };
        match ctrl.state() {
            State::Free => return Ok((way, ctrl)),
            State::Placed if (tag, service) == (key.tag, key.service) => rival = Some(life.backend()),
            State::Claimed | State::Placed => {}
            // Since the search for it: it must not be put out as if it were somebody else.
            State::Live if (tag, service) == (key.tag, key.service) => return Err(Remembered::Raced(Some(life.backend()))),
            State::Live => {
                let over = life.left_s(now) == 0;
                // Those whose time is up come before all others.
                let until = if over { 0 } else { life.until() };
                if (over || !life.came_back()) && victim.is_none_or(|(earliest, ..)| until < earliest) {
                    victim = Some((until, way, ctrl));
                }
            }
        }
    }
    victim.map(|(_, way, ctrl)| (way, ctrl)).ok_or(match rival {
        Some(backend) => Remembered::Raced(Some(backend)),
        None => Remembered::NoRoom,
    })
}

/// Writes the entry into a place that was claimed as `claimed`, and shows it to rivals.
fn place(bucket: &Bucket, way: usize, claimed: Ctrl, key: Key, life: Life) -> Ctrl {
    // Pairs with the Acquire fence in `read`: no word of this entry is seen before the claim.
    fence(Ordering::Release);
    bucket.tag[way].store(key.tag, Ordering::Relaxed);
    bucket.service[way].store(key.service, Ordering::Relaxed);
    bucket.life[way].store(life.0, Ordering::Relaxed);
    let placed = claimed.with(State::Placed);
    // Release pairs with the Acquire in `read`. A plain store: nobody else changes a claimed place.
    bucket.ctrl[way].store(placed.0, Ordering::Release);
    placed
}

/// Makes a placed entry live, unless a rival has won.
fn settle(bucket: &Bucket, way: usize, placed: Ctrl, key: Key) -> Remembered {
    // Pairs with itself in a rival's `settle`: of two entries for one client, each placed before its owner's fence, at least one owner sees
    // the other's.
    fence(Ordering::SeqCst);
    let give_way = |to: Life| {
        // If it fails a rival has freed it already.
        change(bucket, way, placed, placed.freed(), Ordering::Release);
        Remembered::Raced(Some(to.backend()))
    };
    for other in (0..WAYS).filter(|other| *other != way && bucket.tag[*other].load(Ordering::Relaxed) == key.tag) {
        // `None`: it changed hands after our fence, so whoever has it now places its entry later still, and will see this one.
        while let Some((ctrl, tag, service, life)) = read(bucket, other) {
            if (tag, service) != (key.tag, key.service) {
                break;
            }
            match ctrl.state() {
                // A claimed place shows its rival's entry later, and its owner looks after that: it will see this one.
                State::Free | State::Claimed => break,
                State::Live => return give_way(life),
                State::Placed if other < way => return give_way(life),
                // Relaxed: whether the rival is put out or lives is decided by the order of changes to this one word. Whichever failed, the
                // next look tells.
                State::Placed => {
                    change(bucket, other, ctrl, ctrl.freed(), Ordering::Relaxed);
                }
            }
        }
    }
    // Release pairs with the Acquire in `read`.
    if change(bucket, way, placed, placed.with(State::Live), Ordering::Release) { Remembered::Yes } else { Remembered::Raced(None) }
}

#[cfg(all(test, loom))]
mod model;
#[cfg(all(test, not(loom)))]
mod tests;
