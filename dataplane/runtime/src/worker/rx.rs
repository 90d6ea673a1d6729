//! Reading: one batch from one source, into buffers that were there before.

use std::io;
use std::ops::Range;

use podgate_core::decap;
use podgate_core::offload::{MergePlan, Merging, merge};
use podgate_core::packet::{Checksum, Ingress, Network, Outer};
use podgate_core::snapshot::Vnis;
use podgate_core::verdict::{DropReason, WorkerId};

use super::Judge;
use super::batch::{Arena, BATCH_BYTES_MAX, BATCH_LEN_MAX, Buffers, Messages, READS_MAX, Slot};
use super::desk::Desk;
use super::features::Offer;
use super::handoff::{Inbox, Origin};
use super::tx::count;
use crate::clock::Instant;
use crate::tun::Queue;
use crate::udp::{Received, Receiver};
use crate::vnet::VNET_HEADER_LEN;

/// Messages in one receive from the overlay at most: single datagrams, where neither the sender nor a card's driver joined them.
pub(crate) const MESSAGES_MAX: usize = 64;

/// Messages in one receive at least: up to half a megabyte where peers send superframes.
const MESSAGES_MIN: usize = 8;

/// Datagrams that are looked at in one message, and merged at once; the kernel joins at most 64 (`UDP_GRO_CNT_MAX`).
const DATAGRAMS_MAX: usize = 128;

const _: () = assert!(DATAGRAMS_MAX <= BATCH_LEN_MAX, "one message always fits a batch");

/// Payloads behind the heads of merged frames, in one batch: frames are few then, but tails are not. Eight messages of superframes have
/// some four hundred.
pub(super) const TAILS_MAX: usize = 512;

/// Whether a source may have more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// It was read to its end: it speaks up when it has more.
    Dry,
    /// The batch was full before it was.
    More,
}

/// The reading half of a worker: its buffers.
pub(crate) struct Rx {
    arena: Arena,
    messages: Messages,
    /// How many messages the next receive asks for, by how long the last ones were: as many as fill a batch.
    wanted: usize,
    received: Vec<Received>,
    segments: Vec<Range<usize>>,
    merge: MergePlan,
}

impl Rx {
    pub(super) fn new() -> Rx {
        Rx {
            arena: Arena::new(),
            messages: Messages::new(MESSAGES_MAX),
            wanted: MESSAGES_MIN,
            received: Vec::with_capacity(MESSAGES_MAX),
            segments: Vec::with_capacity(DATAGRAMS_MAX),
            merge: MergePlan::new(DATAGRAMS_MAX, Merging::On, Merging::On),
        }
    }

    /// A batch from the TUN `pods`.
    pub(super) fn pods(&mut self, queue: &Queue, judge: &mut Judge<'_>) -> io::Result<Progress> {
        self.tun(queue, Ingress::Pods, judge)
    }

    /// A batch from the TUN `host`.
    pub(super) fn host(&mut self, queue: &Queue, judge: &mut Judge<'_>) -> io::Result<Progress> {
        self.tun(queue, Ingress::Host, judge)
    }

    fn tun(&mut self, queue: &Queue, ingress: Ingress, judge: &mut Judge<'_>) -> io::Result<Progress> {
        let started = Instant::read();
        self.arena.clear();
        let mut reads = READS_MAX;
        let progress = self.read(queue, ingress, &mut reads, judge);
        judge.run(&mut self.arena, started);
        progress
    }

    /// A batch from pods' own TUNs: of each that has a turn in its order, until the batch is full.
    pub(super) fn own_tuns(&mut self, desk: &mut Desk, worker: WorkerId, judge: &mut Judge<'_>) {
        let started = Instant::read();
        self.arena.clear();
        let mut reads = READS_MAX;
        for _ in 0..desk.turns() {
            if reads == 0 || self.arena.room().is_none() {
                break;
            }
            let Some((seat, port)) = desk.next() else { continue };
            match self.read(port.queue(worker), Ingress::Pod(port.id), &mut reads, judge) {
                Ok(Progress::Dry) => {}
                // The others come first.
                Ok(Progress::More) => desk.ready(seat),
                // It speaks up if there is anything after all.
                Err(error) => port.failed(&error),
            }
        }
        judge.run(&mut self.arena, started);
    }

    /// Adds what `queue` has to the batch, in so many reads at most, which are taken off.
    fn read(&mut self, queue: &Queue, ingress: Ingress, reads: &mut usize, judge: &mut Judge<'_>) -> io::Result<Progress> {
        let traffic = if ingress == Ingress::Host { &judge.counters.host_rx } else { &judge.counters.pods_rx };
        // Reads are counted, not frames: those that are refused must not keep the worker here.
        while *reads > 0
            && let Some(room) = self.arena.room()
        {
            *reads -= 1;
            match queue.read(room) {
                Ok(Some((len, offload))) => {
                    let slot = Slot::whole(0, self.arena.keep(len), offload, ingress);
                    count(traffic, len, slot.packets(self.arena.buffer(0)));
                    judge.slots.push(slot);
                }
                Ok(None) => return Ok(Progress::Dry),
                // A frame that is too long or whose header makes no sense is gone; the next may be good.
                Err(error) if error.kind() == io::ErrorKind::InvalidData || error.raw_os_error() == Some(libc::EMSGSIZE) => {
                    judge.counters.dropped(DropReason::BadHeader, 1);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Progress::More)
    }

    /// A batch from other threads.
    pub(super) fn inbox(&mut self, inbox: &Inbox, judge: &mut Judge<'_>) -> Progress {
        let started = Instant::read();
        self.arena.clear();
        let mut progress = Progress::More;
        while judge.slots.len() < READS_MAX
            && let Some(room) = self.arena.room()
        {
            let Some(parcel) = inbox.take() else {
                progress = Progress::Dry;
                break;
            };
            let packet = parcel.bytes();
            match parcel.origin {
                Origin::Ingress(ingress) => {
                    room[VNET_HEADER_LEN..][..packet.len()].copy_from_slice(packet);
                    let slot = Slot::whole(0, self.arena.keep(packet.len()), parcel.offload, ingress);
                    // What another worker handed on it has counted itself.
                    if ingress == Ingress::Socket {
                        count(&judge.counters.host_rx, slot.len(), slot.packets(self.arena.buffer(0)));
                    }
                    judge.slots.push(slot);
                }
                Origin::OwnStack => judge.own(packet),
            }
            judge.give_back(parcel);
        }
        judge.run(&mut self.arena, started);
        progress
    }

    /// A batch from peers: opened, and merged into superframes where the TUNs take them.
    ///
    /// Neighbouring datagrams are merged whether or not they came in one message: without GRO below the socket each comes alone, and a
    /// write, a route and a TCP input for each would cost five times the underlay.
    pub(super) fn overlay(&mut self, receiver: &mut Receiver, judge: &mut Judge<'_>) -> io::Result<Progress> {
        let started = Instant::read();
        self.received.clear();
        let wanted = self.wanted;
        let count = receiver.recv(self.messages.places(wanted), &mut self.received)?;
        let bytes: usize = self.received.iter().map(|message| message.len).sum();
        if let Some(mean) = bytes.checked_div(self.received.len()) {
            self.wanted = (BATCH_BYTES_MAX / mean.max(1)).clamp(MESSAGES_MIN, MESSAGES_MAX);
        }
        let merging = |offer: &Offer| if offer.on() { Merging::On } else { Merging::Off };
        self.merge.tcp = merging(&judge.offers().tso);
        self.merge.udp = merging(&judge.offers().uso);
        let vnis = judge.session.refresh().node.vnis();
        self.segments.clear();
        let mut ingress = None;
        for message in &self.received {
            let mut next = 0;
            while next < message.datagrams().min(DATAGRAMS_MAX) {
                let network = decap::network(&self.messages.buffer(0)[datagram(message, next)], &vnis);
                let from = Outer { src: message.from.ip().into(), ecn: message.ecn, network };
                // What is merged is judged as one, so it has one sender, one network and one congestion mark.
                let full = self.segments.len() + message.datagrams() > DATAGRAMS_MAX;
                if let Some(before) = ingress.replace(from)
                    && (full || before != from)
                {
                    append(before, &mut self.messages, &mut self.segments, &mut self.merge, judge, started);
                }
                next = open(message, next, &self.messages, (network, &vnis), &mut self.segments, judge);
            }
        }
        if let Some(from) = ingress {
            append(from, &mut self.messages, &mut self.segments, &mut self.merge, judge, started);
        }
        judge.run(&mut self.messages, started);
        // Fewer than there was room for: recvmmsg has seen the end.
        Ok(if count < wanted { Progress::Dry } else { Progress::More })
    }
}

/// Where datagram `index` of a message lies.
fn datagram(message: &Received, index: usize) -> Range<usize> {
    let place = Messages::place_at(message.buffer);
    place + index * message.segment..place + ((index + 1) * message.segment).min(message.len)
}

/// Opens the datagrams of one message from `next` on, as long as they are of one network, and adds the packets in them to `segments`. Gives
/// back where it stopped.
fn open(
    message: &Received,
    next: usize,
    messages: &Messages,
    (network, vnis): (Network, &Vnis),
    segments: &mut Vec<Range<usize>>,
    judge: &Judge<'_>,
) -> usize {
    let datagrams = message.datagrams();
    for index in next..datagrams.min(DATAGRAMS_MAX) {
        let range = datagram(message, index);
        let bytes = &messages.buffer(0)[range.clone()];
        if index > next && decap::network(bytes, vnis) != network {
            return index;
        }
        match decap::open(bytes, vnis.of(network)) {
            Ok(inner) => segments.push(range.start + inner..range.end),
            Err(reason) => judge.counters.dropped(reason, 1),
        }
    }
    if datagrams > DATAGRAMS_MAX {
        judge.counters.dropped(DropReason::OverlayBadHeader, (datagrams - DATAGRAMS_MAX) as u64);
    }
    datagrams
}

/// Merges what may be merged of `segments`, which are of one sender, and appends the frames to the batch. Leaves `segments` empty.
fn append(from: Outer, messages: &mut Messages, segments: &mut Vec<Range<usize>>, plan: &mut MergePlan, judge: &mut Judge<'_>, started: Instant) {
    // Small datagrams that cannot be merged fill more than one batch.
    if judge.slots.len() + segments.len() > BATCH_LEN_MAX || judge.tails.len() + segments.len() > TAILS_MAX {
        judge.run(messages, started);
    }
    merge(messages.buffer_mut(0), segments, Checksum::Full, plan);
    let ingress = Ingress::Overlay(from);
    for frame in plan.frames() {
        let tails_at = judge.tails.len();
        debug_assert!(tails_at + frame.tails.len() <= judge.tails.capacity(), "a worker does not allocate");
        judge.tails.extend_from_slice(&plan.tails()[frame.tails.clone()]);
        let tails = tails_at..judge.tails.len();
        let slot = Slot { buffer: 0, head: frame.head.clone(), tails, tail_len: frame.tail_len, offload: frame.offload, ingress };
        judge.slots.push(slot);
    }
    // As the peer counted them: a merged frame's headers as often as they came.
    let traffic = &judge.counters.overlay_rx;
    traffic.frames.add(plan.frames().len() as u64);
    traffic.packets.add(segments.len() as u64);
    traffic.bytes.add(segments.iter().map(|segment| segment.len() as u64).sum());
    segments.clear();
}
