//! A worker: a pinned thread that reads frames in batches, has the pipeline judge them and carries out the verdicts.
//!
//! It waits on its queue of each TUN, its overlay sockets and its inbox with [`mio::Poll`], edge-triggered: a source that became
//! readable is read, one batch in each round, until it has nothing more; sources take turns, so none starves another. After its start a
//! worker never allocates, locks, logs or awaits. What it shares is in `shared.rs`; time is read by it and handed to the pipeline.
//!
//! A worker that panics is started again on the same descriptors, with fresh buffers, while the others go on: see `run`.

pub(crate) mod batch;
mod desk;
pub mod features;
pub(crate) mod handoff;
mod held;
mod join;
pub mod latency;
pub(crate) mod rx;
pub(crate) mod shared;
mod spin;
mod tx;

use std::cell::Cell;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Once};
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};
use podgate_core::addr::Addr;
use podgate_core::counters::Counters;
use podgate_core::packet::{Ingress, Offload};
use podgate_core::pipeline::{Egress, Env, Outbox, Pipeline};
use podgate_core::shape::GRAIN_NS;
use podgate_core::verdict::{DropReason, Verdict, WorkerId};

use self::batch::{BATCH_LEN_MAX, Buffers, Lent, Slot};
use self::desk::Desk;
use self::features::Offers;
use self::handoff::Parcel;
use self::held::Held;
use self::join::{Joined, neighbours};
use self::latency::Latency;
use self::rx::{Progress, Rx, TAILS_MAX};
use self::shared::Shared;
use self::spin::Spin;
use self::tx::Tx;
use crate::clock::Instant;
use crate::flow_file::Prefetch;
use crate::netstack::route_own;
use crate::ports::request_masqueraded;
use crate::publish::{Reader, Session};
use crate::udp::Receiver;

/// Time between two calls of [`Pipeline::tick`].
const TICK: Duration = Duration::from_millis(50);

/// Ticks between two looks at what the kernel dropped at the overlay's sockets: one system call each.
const SOCKET_DROPS_TICKS: u32 = 16;

/// Packets that the gateway itself may have to say about one batch: an answer to each of its packets, or fragments of some.
const OUTBOX_PACKETS: usize = 512;

/// Their bytes.
const OUTBOX_BYTES: usize = 512 * 1024;

/// A worker that panics again and again waits this long before it starts, so that the machine has time for others.
const RESTART_PAUSE: Duration = Duration::from_millis(50);

/// Restarts without a pause.
const RESTARTS_AT_ONCE: u64 = 3;

/// What a worker is given, and keeps when it panics.
pub(crate) struct Station {
    id: WorkerId,
    cpu: Option<usize>,
    poll: Poll,
    reader: Reader,
    receivers: Vec<Receiver>,
    desk: Desk,
    spin: Spin,
}

/// The inbox's token; sources count from 0, pods' own TUNs from [`desk::FIRST_TOKEN`].
const WAKER: Token = Token(usize::MAX);

impl Station {
    /// Registers everything that the worker will wait for.
    pub(crate) fn new(
        shared: &Shared,
        id: WorkerId,
        cpu: Option<usize>,
        reader: Reader,
        receivers: Vec<Receiver>,
        spin: Duration,
    ) -> io::Result<Station> {
        let poll = Poll::new()?;
        let index = usize::from(id.0);
        let fds: [RawFd; 2] = [shared.pods[index].as_raw_fd(), shared.host[index].as_raw_fd()];
        for (token, fd) in fds.into_iter().chain(receivers.iter().map(AsRawFd::as_raw_fd)).enumerate() {
            poll.registry().register(&mut SourceFd(&fd), Token(token), Interest::READABLE)?;
        }
        shared.inboxes[index].set_waker(Waker::new(poll.registry(), WAKER)?);
        Ok(Station { id, cpu, poll, reader, receivers, desk: Desk::new(), spin: Spin::new(spin) })
    }
}

/// A worker's thread: works until it is told to stop, and starts anew after a panic.
pub(crate) fn run(shared: Arc<Shared>, mut station: Station) {
    let index = usize::from(station.id.0);
    let seat = &shared.seats[index];
    panic_briefly();
    if let Some(cpu) = station.cpu {
        seat.pinned.store(pin_to(cpu).is_ok(), Ordering::Relaxed);
    }
    seat.round_ms.store(Instant::read().ms(), Ordering::Relaxed);
    seat.alive.store(true, Ordering::Relaxed);
    // What unwinding can leave half done: the pipeline and the buffers, which are built anew; a flow being inserted, which is abandoned
    // below; counters and queues, each of whose operations is whole.
    while catch_unwind(AssertUnwindSafe(|| Worker::new(&shared, &mut station).run())).is_err() {
        let restarts = seat.restarts.fetch_add(1, Ordering::Relaxed);
        shared.flows.table().abandon(station.id);
        if restarts >= RESTARTS_AT_ONCE {
            std::thread::sleep(RESTART_PAUSE);
        }
    }
    seat.alive.store(false, Ordering::Relaxed);
}

thread_local! {
    static PANICS_BRIEFLY: Cell<bool> = const { Cell::new(false) };
}

/// A panic of the calling thread is one line from now on, whatever `RUST_BACKTRACE` says: finding the names for a backtrace takes a
/// quarter of a second, in which a worker forwards nothing. Other threads' panics are printed as before.
fn panic_briefly() {
    static HOOKED: Once = Once::new();
    HOOKED.call_once(|| {
        let others = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !PANICS_BRIEFLY.get() {
                return others(panic);
            }
            let thread = std::thread::current();
            let message = panic.payload_as_str().unwrap_or("(no message)");
            let at = panic.location().map(ToString::to_string).unwrap_or_default();
            eprintln!("{} panicked at {at}: {message}; it starts again", thread.name().unwrap_or("a worker"));
        }));
    });
    PANICS_BRIEFLY.set(true);
}

/// Binds the calling thread to `cpu`.
fn pin_to(cpu: usize) -> nix::Result<()> {
    let mut set = nix::sched::CpuSet::new();
    set.set(cpu)?;
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set)
}

struct Worker<'a> {
    shared: &'a Shared,
    id: WorkerId,
    poll: &'a mut Poll,
    receivers: &'a mut [Receiver],
    desk: &'a mut Desk,
    spin: &'a mut Spin,
    rx: Rx,
    judge: Judge<'a>,
}

/// Sources with something to read, one bit each: the TUNs, the inbox, the overlay's sockets.
const PODS: usize = 0;
const HOST: usize = 1;
const RECEIVERS: usize = 2;

impl<'a> Worker<'a> {
    /// All memory that it will ever use is allocated here.
    fn new(shared: &'a Shared, station: &'a mut Station) -> Worker<'a> {
        let Station { id, poll, reader, receivers, desk, spin, .. } = station;
        Worker { shared, id: *id, poll, receivers, desk, spin, rx: Rx::new(), judge: Judge::new(shared, *id, reader) }
    }

    fn run(mut self) {
        let index = usize::from(self.id.0);
        let (seat, inbox) = (&self.shared.seats[index], &self.shared.inboxes[index]);
        let sources = RECEIVERS + self.receivers.len();
        let mut events = Events::with_capacity(16);
        // After a restart nobody knows what was read to its end: every source gets a turn.
        let mut ready = vec![true; sources + 1];
        self.desk.all_ready();
        let mut last_tick = Instant::read();
        let mut ticks = 0u32;
        loop {
            let busy = ready.contains(&true) || self.desk.turns() > 0;
            let timeout = if busy { Duration::ZERO } else { self.judge.until_due().map_or(TICK, |due| due.min(TICK)) };
            if let Err(error) = self.wait(&mut events, timeout)
                && error.kind() != io::ErrorKind::Interrupted
            {
                seat.read_error.store(error.raw_os_error().unwrap_or(libc::EIO), Ordering::Relaxed);
            }
            for event in &events {
                match event.token() {
                    WAKER => ready[sources] = true,
                    Token(pod @ desk::FIRST_TOKEN..) => self.desk.ready(pod - desk::FIRST_TOKEN),
                    Token(source) => ready[source] = true,
                }
            }
            if ready[sources] {
                inbox.looked();
                // Each publication wakes.
                self.desk.follow(self.judge.session.tables().tuns, self.id, self.poll.registry());
            }
            if self.shared.stop.load(Ordering::Relaxed) {
                return self.finish();
            }
            if seat.crash.swap(false, Ordering::Relaxed) {
                panic!("worker {index} was told to panic (Runtime::crash_worker)");
            }
            seat.exchange.hand_over(&mut self.judge.latency);
            for (source, ready) in ready.iter_mut().enumerate() {
                if !*ready {
                    continue;
                }
                let progress = match source {
                    PODS => self.rx.pods(&self.shared.pods[index], &mut self.judge),
                    HOST => self.rx.host(&self.shared.host[index], &mut self.judge),
                    inboxed if inboxed == sources => Ok(self.rx.inbox(inbox, &mut self.judge)),
                    receiver => self.rx.overlay(&mut self.receivers[receiver - RECEIVERS], &mut self.judge),
                };
                *ready = match progress {
                    Ok(progress) => progress == Progress::More,
                    Err(error) => {
                        seat.read_error.store(error.raw_os_error().unwrap_or(libc::EIO), Ordering::Relaxed);
                        false
                    }
                };
            }
            if self.desk.turns() > 0 {
                self.rx.own_tuns(self.desk, self.id, &mut self.judge);
            }
            let now = Instant::read();
            seat.round_ms.store(now.ms(), Ordering::Relaxed);
            self.judge.release(now);
            if now.ns_since(last_tick) >= TICK.as_nanos() as u64 {
                last_tick = now;
                self.judge.tick(now);
                ticks = ticks.wrapping_add(1);
                if ticks.is_multiple_of(SOCKET_DROPS_TICKS) {
                    let drops = self.receivers.iter().map(|receiver| u64::from(receiver.kernel_drops().unwrap_or(0))).sum();
                    seat.socket_drops.store(drops, Ordering::Relaxed);
                }
            }
        }
    }
}

impl Worker<'_> {
    /// Nothing that has been read is left behind: what others handed on is judged, and what was held back goes at once, a little sooner than
    /// its limit says. What has not been read waits in the kernel for a successor.
    fn finish(&mut self) {
        let inbox = &self.shared.inboxes[usize::from(self.id.0)];
        while self.rx.inbox(inbox, &mut self.judge) == Progress::More {}
        self.judge.release_due(u64::MAX);
    }

    /// Waits until a source has something to read, for `timeout` at most: wide awake at first, where that is worth it.
    fn wait(&mut self, events: &mut Events, timeout: Duration) -> io::Result<()> {
        if timeout.is_zero() || self.spin.is_off() {
            return self.poll.poll(events, Some(timeout));
        }
        let since = Instant::read();
        let mut idle_ns = 0;
        let window_ns = self.spin.window_ns().min(timeout.as_nanos() as u64);
        let mut came = false;
        while !came && idle_ns < window_ns {
            self.poll.poll(events, Some(Duration::ZERO))?;
            came = !events.is_empty();
            idle_ns = Instant::read().ns_since(since);
        }
        if !came {
            self.poll.poll(events, Some(timeout))?;
            idle_ns = Instant::read().ns_since(since);
        }
        self.spin.idled(idle_ns);
        Ok(())
    }
}

/// From a batch that has been read to the last of its writes.
pub(crate) struct Judge<'a> {
    shared: &'a Shared,
    pub(crate) counters: &'a Counters,
    pub(crate) session: Session<'a>,
    pipeline: Pipeline,
    outbox: Outbox,
    verdicts: Vec<Verdict>,
    lent: Lent,
    /// The batch's frames; whoever reads fills it.
    pub(crate) slots: Vec<Slot>,
    /// Payload of merged frames that lies away from their heads.
    pub(crate) tails: Vec<std::ops::Range<usize>>,
    /// What is written later.
    held: Held,
    joined: Joined,
    tx: Tx<'a>,
    latency: Box<Latency>,
}

impl<'a> Judge<'a> {
    fn new(shared: &'a Shared, id: WorkerId, reader: &'a Reader) -> Judge<'a> {
        Judge {
            shared,
            counters: &shared.counters[usize::from(id.0)],
            session: reader.enter(),
            pipeline: Pipeline::new(id, RandomState::new().hash_one(id)),
            outbox: Outbox::new(OUTBOX_PACKETS, OUTBOX_BYTES),
            verdicts: Vec::with_capacity(BATCH_LEN_MAX),
            lent: Lent::new(BATCH_LEN_MAX),
            slots: Vec::with_capacity(BATCH_LEN_MAX),
            tails: Vec::with_capacity(TAILS_MAX),
            held: Held::new(),
            joined: Joined::new(),
            tx: Tx::new(shared, usize::from(id.0)),
            latency: Box::default(),
        }
    }

    /// Judges the batch in `slots` and carries out the verdicts. It was begun at `started`.
    pub(crate) fn run(&mut self, buffers: &mut impl Buffers, started: Instant) {
        if self.slots.is_empty() {
            return;
        }
        // What is due goes before the batch: none of a pod's packets overtakes another that waits for the same limit.
        self.release(started);
        let tables = self.session.tables();
        let snapshot = tables.snapshot;
        let env = Env { snapshot, flows: self.shared.flows.table(), now: started.now(), now_ns: started.ns(), counters: self.counters };
        let (pipeline, verdicts, outbox) = (&mut self.pipeline, &mut self.verdicts, &mut self.outbox);
        let before = Instant::read();
        self.lent.with(&mut self.slots, buffers, |packets| pipeline.run::<Prefetch>(&env, packets, verdicts, outbox));
        let judged = Instant::read();
        request_masqueraded(self.shared, self.outbox.masquerade_ports());
        let mut waits = self.outbox.packet_waits().iter().peekable();
        let joining = self.shared.offers.uso.on();
        let mut at = 0;
        while let (Some(slot), Some(verdict)) = (self.slots.get(at), self.verdicts.get(at)) {
            if let Some((_, wait)) = waits.next_if(|(packet, _)| *packet == at) {
                let bytes = buffers.buffer(slot.buffer);
                let pieces = std::iter::once(&slot.head).chain(&self.tails[slot.tails.clone()]).map(|piece| &bytes[piece.clone()]);
                if !self.held.put(*wait, (*verdict, snapshot.generation), (slot.offload, slot.ingress), pieces) {
                    self.counters.dropped(DropReason::BandwidthQueueFull, slot.packets(bytes));
                }
                at += 1;
                continue;
            }
            let until = waits.peek().map_or(self.slots.len(), |(packet, _)| *packet);
            let count = if joining { neighbours(&self.slots[at..until], &self.verdicts[at..until], buffers) } else { 1 };
            if count == 1 {
                self.tx.carry_out(*verdict, slot, &self.tails, buffers, tables);
            } else {
                self.joined.join(&self.slots[at..at + count], buffers);
                for joined in self.joined.slots(slot) {
                    self.tx.carry_out(*verdict, &joined, self.joined.tails(), buffers, tables);
                }
            }
            at += count;
        }
        self.tx.flush(buffers);
        let mut waits = self.outbox.said_waits().iter().peekable();
        for (at, (egress, packet)) in self.outbox.iter().enumerate() {
            match waits.next_if(|(said, _)| *said == at) {
                None => self.tx.own(egress, packet, tables),
                Some((_, wait)) => {
                    let verdict = (verdict_of(egress), snapshot.generation);
                    if !self.held.put(*wait, verdict, (Offload::default(), Ingress::Host), std::iter::once(packet)) {
                        self.counters.dropped(DropReason::BandwidthQueueFull, 1);
                    }
                }
            }
        }
        self.outbox.clear();
        self.counters.batches.add(1);
        self.latency.record(self.slots.len(), judged.ns_since(before), Instant::read().ns_since(started));
        self.slots.clear();
        self.tails.clear();
    }

    /// Carries out the verdicts of the packets that have waited until `now`, or will have in a moment.
    #[inline]
    fn release(&mut self, now: Instant) {
        let by_ns = now.ns().saturating_add(GRAIN_NS);
        if self.held.due_ns().is_some_and(|due_ns| due_ns <= by_ns) {
            self.release_due(by_ns);
        }
    }

    #[cold]
    fn release_due(&mut self, by_ns: u64) {
        let tables = self.session.tables();
        while let Some((frame, slot)) = self.held.take(by_ns) {
            let bytes = self.held.memory().buffer(slot.buffer);
            let verdict = frame.verdict_by(tables.snapshot, &bytes[slot.head.clone()]);
            if let Verdict::Drop(reason) = verdict {
                self.counters.dropped(reason, slot.packets(bytes));
            }
            self.tx.carry_out(verdict, &slot, &[], self.held.memory(), tables);
        }
        self.tx.flush(self.held.memory());
        self.held.free();
    }

    /// How long until there is something to release; `None` if nothing waits.
    fn until_due(&self) -> Option<Duration> {
        let due_ns = self.held.due_ns()?;
        Some(Duration::from_nanos(due_ns.saturating_sub(GRAIN_NS).saturating_sub(Instant::read().ns())))
    }

    /// Routes a packet that the gateway's own stack made.
    pub(crate) fn own(&mut self, packet: &[u8]) {
        let Some(dst) = destination(packet) else { return };
        let tables = self.session.tables();
        let egress = match route_own(tables.snapshot, dst) {
            Verdict::ToPods => Egress::Pods,
            Verdict::ToPod(tun) => Egress::Pod(tun),
            Verdict::ToPeer(peer, network) => Egress::Peer(peer, network),
            Verdict::Drop(reason) => return self.counters.dropped(reason, 1),
            _ => Egress::Host,
        };
        self.counters.answers.add(1);
        self.tx.own(egress, packet, tables);
    }

    /// Takes a parcel's buffer back.
    pub(crate) fn give_back(&self, parcel: Parcel) {
        self.shared.pool.give_back(parcel);
    }

    /// What the kernel is known to take.
    pub(crate) fn offers(&self) -> &'a Offers {
        &self.shared.offers
    }

    fn tick(&mut self, now: Instant) {
        let snapshot = self.session.refresh();
        let env = Env { snapshot, flows: self.shared.flows.table(), now: now.now(), now_ns: now.ns(), counters: self.counters };
        self.pipeline.tick(&env);
    }
}

fn verdict_of(egress: Egress) -> Verdict {
    match egress {
        Egress::Pods => Verdict::ToPods,
        Egress::Pod(tun) => Verdict::ToPod(tun),
        Egress::Host => Verdict::ToHost,
        Egress::Peer(peer, network) => Verdict::ToPeer(peer, network),
    }
}

/// The destination address, RFC 791 §3.1 and RFC 8200 §3.
fn destination(packet: &[u8]) -> Option<Addr> {
    match packet.first()? >> 4 {
        4 => Some(Addr::from_v4(*packet.get(16..20)?.first_chunk()?)),
        6 => Some(Addr::from_v6(*packet.get(24..40)?.first_chunk()?)),
        _ => None,
    }
}
