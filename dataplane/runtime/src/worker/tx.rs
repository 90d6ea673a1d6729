//! Writing: a verdict becomes a system call.
//!
//! Frames go to a TUN whole, superframes as one `writev`; to a peer as one `sendmsg` with `UDP_SEGMENT` whose slices alternate a
//! rewritten header and payload where it lies. Consecutive packets of one flow to one peer share a send. Nothing is retried: what the
//! kernel refuses is counted, and TCP's and the application's own retransmission does the rest.
//!
//! Read first: udp(7) (`UDP_SEGMENT`), net/ipv4/udp.c `udp_send_skb` (which error means what), drivers/net/tun.c `tun_get_user`.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::ops::Range;

use podgate_core::counters::{Counters, Traffic};
use podgate_core::encap;
use podgate_core::offload::{self, SEND_BYTES_MAX, SEND_SEGMENTS_MAX, SplitPlan};
use podgate_core::packet::{Gso, Ingress, Network, Offload};
use podgate_core::parse::{Parsed, parse};
use podgate_core::pipeline::Egress;
use podgate_core::snapshot::Snapshot;
use podgate_core::verdict::{DropReason, PeerId, Verdict, WorkerId};
use podgate_core::wire::ip::Family;

use super::batch::{Buffers, Slot};
use super::features::Offer;
use super::handoff::{Inbox, Origin, PACKET_LEN_MAX};
use super::shared::Shared;
use crate::publish::Tables;
use crate::tun::{Feature, Queue, WRITE_SLICES_MAX};
use crate::udp::Sender;
use crate::vnet::{VNET_HEADER_LEN, VnetHeader};

/// Segments that wait for one send: those of a superframe with the smallest segment size worth the name, and some.
const SEGMENTS_MAX: usize = 2048;

/// Bytes of headers before payload, at most: encapsulation, IPv6 with a fragment's or options' header, TCP with all its options.
const HEADER_LEN_MAX: usize = 160;

/// The writing half of a worker.
pub(super) struct Tx<'a> {
    shared: &'a Shared,
    worker: WorkerId,
    counters: &'a Counters,
    pods: &'a Queue,
    host: &'a Queue,
    sender: &'a Sender,
    /// Where a packet of the gateway's own lies while it is written.
    scratch: Scratch,
    plan: SplitPlan,
    /// For each segment of the plan, what to add to its payload's range to find it in its buffer.
    bases: Vec<usize>,
    run: Option<Run>,
}

/// What all segments in the plan have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    peer: PeerId,
    to: SocketAddr,
    traffic_class: u8,
    entropy: u32,
    buffer: usize,
}

/// Which TUN.
#[derive(Clone, Copy, Debug)]
enum Side<'q> {
    Pods,
    /// A pod's own.
    Pod(&'q Queue),
    Host,
}

/// Why a send was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refusal {
    /// The path takes only smaller packets now.
    PathShrank,
    /// The kernel did not do what it offered.
    Kernel,
}

impl<'a> Tx<'a> {
    pub(super) fn new(shared: &'a Shared, worker: usize) -> Tx<'a> {
        Tx {
            shared,
            worker: WorkerId(worker as u16),
            counters: &shared.counters[worker],
            pods: &shared.pods[worker],
            host: &shared.host[worker],
            sender: &shared.sender,
            scratch: Scratch(vec![0; PACKET_LEN_MAX].into_boxed_slice()),
            plan: SplitPlan::new(SEGMENTS_MAX, SEGMENTS_MAX * HEADER_LEN_MAX),
            bases: Vec::with_capacity(SEGMENTS_MAX),
            run: None,
        }
    }

    /// Carries out `verdict` for the frame in `slot`. Sends to peers may wait for more of their kind until [`Tx::flush`].
    pub(super) fn carry_out(&mut self, verdict: Verdict, slot: &Slot, tails: &[Range<usize>], buffers: &mut impl Buffers, tables: Tables<'_>) {
        let tails = &tails[slot.tails.clone()];
        match verdict {
            Verdict::ToPods => self.write_frame(Side::Pods, slot, tails, buffers),
            Verdict::ToPod(tun) => match tables.tuns.get(tun) {
                Some(port) => self.write_frame(Side::Pod(port.queue(self.worker)), slot, tails, buffers),
                None => self.counters.dropped(DropReason::WritePod, slot.packets(buffers.buffer(slot.buffer))),
            },
            Verdict::ToHost => self.write_frame(Side::Host, slot, tails, buffers),
            Verdict::ToPeer(peer, network) => self.plan_for_peer((peer, network), slot, tails, buffers, tables.snapshot),
            Verdict::ToNetstack => {
                let sent = self.hand_to(&self.shared.netstack, slot, tails, buffers.buffer(slot.buffer));
                if !sent {
                    self.counters.dropped(DropReason::NetstackFull, slot.packets(buffers.buffer(slot.buffer)));
                }
            }
            Verdict::HandOff(worker) => {
                let inbox = self.shared.inboxes.get(usize::from(worker.0));
                if !inbox.is_some_and(|inbox| self.hand_to(inbox, slot, tails, buffers.buffer(slot.buffer))) {
                    self.counters.dropped(DropReason::HandOffFull, 1);
                }
            }
            // The pipeline has counted these.
            Verdict::Consumed(_) | Verdict::Drop(_) => {}
        }
    }

    /// Writes a whole packet with full checksums, such as the gateway makes itself. Nothing may wait for its send.
    pub(super) fn own(&mut self, egress: Egress, packet: &[u8], tables: Tables<'_>) {
        debug_assert!(self.run.is_none(), "the plan's ranges are of the batch's buffers; this packet is in another");
        let mut scratch = std::mem::take(&mut self.scratch);
        if let Some(room) = scratch.bytes().get_mut(..packet.len()) {
            room.copy_from_slice(packet);
            let slot = Slot::whole(0, 0..packet.len(), Offload::default(), Ingress::Host);
            match egress {
                Egress::Pods => self.write_frame(Side::Pods, &slot, &[], &mut scratch),
                Egress::Pod(tun) => match tables.tuns.get(tun) {
                    Some(port) => self.write_frame(Side::Pod(port.queue(self.worker)), &slot, &[], &mut scratch),
                    None => self.counters.dropped(DropReason::WritePod, 1),
                },
                Egress::Host => self.write_frame(Side::Host, &slot, &[], &mut scratch),
                Egress::Peer(peer, network) => {
                    self.plan_for_peer((peer, network), &slot, &[], &mut scratch, tables.snapshot);
                    self.flush(&scratch);
                }
            }
        }
        self.scratch = scratch;
    }

    fn hand_to(&self, inbox: &Inbox, slot: &Slot, tails: &[Range<usize>], bytes: &[u8]) -> bool {
        let pieces = std::iter::once(&bytes[slot.head.clone()]).chain(tails.iter().map(|tail| &bytes[tail.clone()]));
        inbox.send(&self.shared.pool, pieces, slot.offload, Origin::Ingress(slot.ingress))
    }

    fn write_frame(&mut self, side: Side<'_>, slot: &Slot, tails: &[Range<usize>], buffers: &mut impl Buffers) {
        let packets = slot.packets(buffers.buffer(slot.buffer));
        if slot.offload == Offload::default() {
            let written = write(self.queue(side), &VnetHeader::PLAIN, slot, tails, buffers);
            return self.wrote(side, written, slot.len(), packets);
        }
        let Ok(parsed) = parse_head(slot, buffers.buffer_mut(slot.buffer)) else {
            // The pipeline read the same headers and let it pass: a frame that it broke is worth no more than a count.
            return self.refused(side, packets);
        };
        let offer = self.offer(slot.offload.gso);
        if offer.is_none_or(Offer::on) {
            let written = write(self.queue(side), &VnetHeader::of(slot.offload, &parsed), slot, tails, buffers);
            match (&written, offer) {
                (Err(error), Some(_)) if error.raw_os_error() == Some(libc::EINVAL) => self.offer_refused(side, slot.offload.gso),
                (_, offer) => {
                    if let (Ok(()), Some(offer)) = (&written, offer) {
                        offer.took();
                    }
                    return self.wrote(side, written, slot.len(), packets);
                }
            }
        }
        self.write_in_software(side, slot, &parsed, tails, buffers);
    }

    /// Cuts a superframe that the kernel does not take and writes its segments one by one.
    #[cold]
    fn write_in_software(&mut self, side: Side<'_>, slot: &Slot, parsed: &Parsed, tails: &[Range<usize>], buffers: &mut impl Buffers) {
        self.flush(buffers);
        match self.split(slot, parsed, tails, buffers.buffer_mut(slot.buffer), 0) {
            Ok((segments, base)) => {
                let bytes = buffers.buffer(slot.buffer);
                for segment in &self.plan.segments()[segments] {
                    let header = &self.plan.scratch()[segment.header.clone()];
                    let payload = &bytes[base + segment.payload.start..base + segment.payload.end];
                    let written = self.queue(side).write(&VnetHeader::PLAIN, &[IoSlice::new(header), IoSlice::new(payload)]);
                    self.wrote(side, written, header.len() + payload.len(), 1);
                }
            }
            Err(_) => self.refused(side, slot.packets(buffers.buffer(slot.buffer))),
        }
        self.plan.clear();
    }

    fn plan_for_peer(
        &mut self,
        (peer, network): (PeerId, Network),
        slot: &Slot,
        tails: &[Range<usize>],
        buffers: &mut impl Buffers,
        snapshot: &Snapshot,
    ) {
        let (Some(to), Ok(parsed)) = (snapshot.peers.get(peer.0 as usize), parse_head(slot, buffers.buffer_mut(slot.buffer))) else {
            return self.counters.dropped(DropReason::SendOverlay, slot.packets(buffers.buffer(slot.buffer)));
        };
        let run = Run {
            peer,
            to: SocketAddr::new(to.underlay, to.port),
            traffic_class: encap::outer_traffic_class(parsed.traffic_class),
            entropy: encap::entropy(&parsed),
            buffer: slot.buffer,
        };
        if self.run.is_some_and(|before| before != run) {
            self.flush(buffers);
        }
        let mut planned = self.split(slot, &parsed, tails, buffers.buffer_mut(slot.buffer), encap::HEADER_LEN);
        if planned.is_err() && self.run.is_some() {
            self.flush(buffers);
            planned = self.split(slot, &parsed, tails, buffers.buffer_mut(slot.buffer), encap::HEADER_LEN);
        }
        let Ok((segments, base)) = planned else {
            return self.counters.dropped(DropReason::SendOverlay, slot.packets(buffers.buffer(slot.buffer)));
        };
        let family = if parsed.tuple.is_v4() { Family::V4 } else { Family::V6 };
        let vni = snapshot.node.vnis().of(network);
        for index in segments {
            let header = self.plan.header_mut(index).first_chunk_mut().expect("split left room for the encapsulation header");
            encap::write_header(header, vni, family);
            self.bases.push(base);
        }
        self.run = Some(run);
    }

    /// Plans the segments of `slot`, and says what to add to their payloads' ranges to find them in the buffer.
    fn split(
        &mut self,
        slot: &Slot,
        parsed: &Parsed,
        tails: &[Range<usize>],
        bytes: &mut [u8],
        room: usize,
    ) -> Result<(Range<usize>, usize), DropReason> {
        let (head, behind) = bytes.split_at_mut(slot.head.end);
        let packet = slot.packet(&mut head[slot.head.start..]);
        if tails.is_empty() {
            return offload::split(&packet, parsed, room, &mut self.plan).map(|segments| (segments, slot.head.start));
        }
        offload::split_merged(&packet, parsed, behind, slot.head.end, tails, room, &mut self.plan).map(|segments| (segments, 0))
    }

    /// Sends what waits for its send.
    pub(super) fn flush(&mut self, buffers: &impl Buffers) {
        if let Some(run) = self.run.take() {
            self.send(&run, buffers.buffer(run.buffer));
            self.plan.clear();
            self.bases.clear();
        }
    }

    fn send(&self, run: &Run, bytes: &[u8]) {
        for group in self.plan.sends(0..self.plan.segments().len(), SEND_BYTES_MAX) {
            if group.len() > 1 && self.shared.offers.udp_gso.on() {
                match self.send_group(run, group.clone(), bytes) {
                    Ok(()) => {
                        self.shared.offers.udp_gso.took();
                        continue;
                    }
                    Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EMSGSIZE | libc::EIO)) => {
                        if self.segmented_send_refused(run, &group) == Refusal::PathShrank {
                            self.counters.dropped(DropReason::SendOverlay, group.len() as u64);
                            continue;
                        }
                    }
                    Err(error) => {
                        self.send_failed(&error, group.len());
                        continue;
                    }
                }
            }
            for index in group {
                if let Err(error) = self.send_group(run, index..index + 1, bytes) {
                    if error.raw_os_error() == Some(libc::EMSGSIZE) {
                        self.report_path_mtu(run, index);
                    }
                    self.send_failed(&error, 1);
                }
            }
        }
    }

    #[cold]
    fn send_failed(&self, error: &io::Error, packets: usize) {
        let reason = match error.raw_os_error() {
            Some(libc::ENOPROTOOPT) => DropReason::NoRouteFamily,
            _ => DropReason::SendOverlay,
        };
        self.counters.dropped(reason, packets as u64);
    }

    /// One send: several segments of equal length (the last may be shorter), or one packet.
    fn send_group(&self, run: &Run, group: Range<usize>, bytes: &[u8]) -> io::Result<()> {
        let segments = &self.plan.segments()[group.clone()];
        let scratch = self.plan.scratch();
        let mut slices = [IoSlice::new(&[]); 2 * SEND_SEGMENTS_MAX];
        let mut len = 0;
        for (slices, (segment, base)) in slices.chunks_exact_mut(2).zip(segments.iter().zip(&self.bases[group])) {
            slices[0] = IoSlice::new(&scratch[segment.header.clone()]);
            slices[1] = IoSlice::new(&bytes[base + segment.payload.start..base + segment.payload.end]);
            len += segment.len();
        }
        let segment_len = (segments.len() > 1).then(|| segments[0].len() as u16);
        self.sender.send(run.entropy, run.to, run.traffic_class, segment_len, &slices[..2 * segments.len()])?;
        count(&self.counters.overlay_tx, len - segments.len() * encap::HEADER_LEN, segments.len() as u64);
        Ok(())
    }

    /// EINVAL and EMSGSIZE may only mean that the path's MTU shrank below the segments: ask before blaming the kernel.
    #[cold]
    fn segmented_send_refused(&self, run: &Run, group: &Range<usize>) -> Refusal {
        let refusal = self.report_path_mtu(run, group.start);
        if refusal == Refusal::Kernel {
            self.shared.offers.udp_gso.refused();
        }
        refusal
    }

    /// If the path's MTU is what is in the way, tells the control side, which lowers the peer's: from then on the pipeline answers in
    /// the sender's terms.
    #[cold]
    fn report_path_mtu(&self, run: &Run, segment: usize) -> Refusal {
        let inner = self.plan.segments()[segment].len() - encap::HEADER_LEN;
        let outer = inner as u32 + encap::overhead(run.to.ip());
        match self.sender.path_mtu(run.to) {
            Ok(mtu) if mtu < outer => {
                // If the queue is full, the control side has enough of them to read already.
                let _ = self.shared.path_mtus.push((run.to.ip(), mtu));
                Refusal::PathShrank
            }
            _ => Refusal::Kernel,
        }
    }

    fn queue<'q>(&self, side: Side<'q>) -> &'q Queue
    where
        'a: 'q,
    {
        match side {
            Side::Pods => self.pods,
            Side::Pod(queue) => queue,
            Side::Host => self.host,
        }
    }

    fn offer(&self, gso: Gso) -> Option<&'a Offer> {
        match gso {
            Gso::None => None,
            Gso::Tcp { .. } => Some(&self.shared.offers.tso),
            Gso::Udp { .. } => Some(&self.shared.offers.uso),
        }
    }

    #[cold]
    fn offer_refused(&self, side: Side<'_>, gso: Gso) {
        if let Some(offer) = self.offer(gso)
            && offer.refused()
        {
            let feature = if matches!(gso, Gso::Udp { .. }) { Feature::Uso } else { Feature::Tso };
            // If it cannot be switched off at the source, frames go on arriving whole and are cut here.
            let _ = self.queue(side).disable(feature);
        }
    }

    fn wrote(&self, side: Side<'_>, written: io::Result<()>, len: usize, packets: u64) {
        match (written, side) {
            (Ok(()), Side::Pods | Side::Pod(_)) => count(&self.counters.pods_tx, len, packets),
            (Ok(()), Side::Host) => count(&self.counters.host_tx, len, packets),
            (Err(_), side) => self.refused(side, packets),
        }
    }

    fn refused(&self, side: Side<'_>, packets: u64) {
        let reason = match side {
            Side::Pods => DropReason::WritePods,
            Side::Pod(_) => DropReason::WritePod,
            Side::Host => DropReason::WriteHost,
        };
        self.counters.dropped(reason, packets);
    }
}

/// The one buffer that packets of the gateway's own are written from.
#[derive(Default)]
struct Scratch(Box<[u8]>);

impl Scratch {
    fn bytes(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

impl Buffers for Scratch {
    fn buffer(&self, _index: usize) -> &[u8] {
        &self.0
    }

    fn buffer_mut(&mut self, _index: usize) -> &mut [u8] {
        &mut self.0
    }

    fn each_mut(&mut self) -> impl Iterator<Item = &mut [u8]> {
        std::iter::once(&mut self.0[..])
    }
}

/// One `write` where the frame is in one piece with room for the header before it, else one `writev`: the head, and the tails where they lie.
#[inline]
fn write<B: Buffers>(queue: &Queue, header: &[u8; VNET_HEADER_LEN], slot: &Slot, tails: &[Range<usize>], buffers: &mut B) -> io::Result<()> {
    if B::HEADROOM >= VNET_HEADER_LEN && tails.is_empty() {
        let frame = &mut buffers.buffer_mut(slot.buffer)[slot.head.start - VNET_HEADER_LEN..slot.head.end];
        frame[..VNET_HEADER_LEN].copy_from_slice(header);
        return queue.write_whole(frame);
    }
    let bytes = buffers.buffer(slot.buffer);
    let head = IoSlice::new(&bytes[slot.head.clone()]);
    if tails.is_empty() {
        return queue.write(header, &[head]);
    }
    let mut slices = [head; WRITE_SLICES_MAX];
    for (slice, tail) in slices[1..].iter_mut().zip(tails) {
        *slice = IoSlice::new(&bytes[tail.clone()]);
    }
    queue.write(header, slices.get(..=tails.len()).ok_or(io::ErrorKind::InvalidInput)?)
}

/// The headers as the pipeline left them.
#[inline]
fn parse_head(slot: &Slot, bytes: &mut [u8]) -> Result<Parsed, DropReason> {
    let mut packet = slot.packet(&mut bytes[slot.head.clone()]);
    // What the pipeline let pass is trusted: no second look at the IPv4 checksum of what came over the overlay.
    packet.ingress = Ingress::Host;
    parse(&packet)
}

/// Counts one frame of `len` bytes.
#[inline]
pub(super) fn count(traffic: &Traffic, len: usize, packets: u64) {
    traffic.frames.add(1);
    traffic.packets.add(packets);
    traffic.bytes.add(len as u64);
}
