//! Cutting: one superframe, many headers, no copy of payload.

use std::ops::Range;

use super::SEND_SEGMENTS_MAX;
use crate::packet::{Checksum, Gso, Packet};
use crate::parse::{Parsed, Transport};
use crate::verdict::DropReason;
use crate::wire::checksum::Sum;
use crate::wire::{ipv4, ipv6, set_u16, set_u32, tcp, u16_at, u32_at, udp};

/// One packet to be sent: a header of its own, and payload where it already lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// In [`SplitPlan::scratch`]; its first `room` bytes are for the encapsulation header.
    pub header: Range<usize>,
    /// In [`Packet::head`] (from [`split_merged`]: in the receive buffer).
    pub payload: Range<usize>,
}

impl Segment {
    /// Bytes in all.
    pub fn len(&self) -> usize {
        self.header.len() + self.payload.len()
    }

    /// Whether there is not one byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Headers and segments of the packets that were split since the last [`clear`](SplitPlan::clear). Never grows.
#[derive(Debug)]
pub struct SplitPlan {
    scratch: Vec<u8>,
    segments: Vec<Segment>,
}

impl SplitPlan {
    /// With room for `segments` segments, and `header_bytes` bytes of their headers in all.
    ///
    /// A peer's or a pod's choice of a tiny segment size decides how many segments a frame has: 64 KiB at Linux's least MSS of 88 - 40
    /// option bytes is 1,366. What does not fit is refused by [`split()`], not cut short.
    pub fn new(segments: usize, header_bytes: usize) -> SplitPlan {
        SplitPlan { scratch: Vec::with_capacity(header_bytes), segments: Vec::with_capacity(segments) }
    }

    /// Forgets all segments.
    pub fn clear(&mut self) {
        self.scratch.clear();
        self.segments.clear();
    }

    /// All segments, in order.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The headers.
    pub fn scratch(&self) -> &[u8] {
        &self.scratch
    }

    /// The `room` bytes before the headers of `segment`, and its headers.
    pub fn header_mut(&mut self, segment: usize) -> &mut [u8] {
        &mut self.scratch[self.segments[segment].header.clone()]
    }

    /// How `segments` group into sends with `UDP_SEGMENT`: runs of equal length, of which the last segment may be shorter, each within
    /// `bytes_max` and [`SEND_SEGMENTS_MAX`]. A run may span several packets, if they go to the same peer. A segment that alone is
    /// longer than `bytes_max` is a run of its own: its send will fail by itself.
    pub fn sends(&self, segments: Range<usize>, bytes_max: usize) -> Sends<'_> {
        Sends { plan: self, left: segments, bytes_max }
    }
}

/// Iterator over sends, see [`SplitPlan::sends`].
#[derive(Debug)]
pub struct Sends<'a> {
    plan: &'a SplitPlan,
    left: Range<usize>,
    bytes_max: usize,
}

impl Iterator for Sends<'_> {
    type Item = Range<usize>;

    fn next(&mut self) -> Option<Range<usize>> {
        let first = self.left.next()?;
        let stride = self.plan.segments[first].len();
        let mut bytes = stride;
        while self.left.start < self.left.end && self.left.start - first < SEND_SEGMENTS_MAX {
            let len = self.plan.segments[self.left.start].len();
            if len > stride || bytes + len > self.bytes_max {
                break;
            }
            bytes += len;
            self.left.start += 1;
            if len < stride {
                break;
            }
        }
        Some(first..self.left.start)
    }
}

/// Lays out `packet` as segments that are packets of their own, with full checksums, and appends them to `plan`; gives back which.
///
/// A superframe becomes as many segments as it stands for, any other packet one. `room` bytes stay free before each header. The whole
/// packet must lie in `head`; for a merged frame see [`split_merged`]. Nothing is appended to a plan that has no room for all.
pub fn split(packet: &Packet<'_>, parsed: &Parsed, room: usize, plan: &mut SplitPlan) -> Result<Range<usize>, DropReason> {
    let template = Template::new(packet, parsed)?;
    let (start, end) = (template.header_len, parsed.len as usize);
    let payload = packet.head.get(start..end).ok_or(DropReason::Truncated)?;
    lay_out(packet, &template, room, plan, |index| {
        let from = index * template.size;
        let to = (from + template.size).min(payload.len());
        Some((start + from..start + to, payload.get(from..to)?))
    })
}

/// As [`split()`], for a frame that [`merge()`](super::merge()) made: its segments are the ones it was made from, with edited headers.
///
/// `behind` is the receive buffer from the end of `packet.head` on, `behind_at` where that is in the buffer, and `tails` the frame's
/// tails; the payloads of the new segments are ranges of the buffer.
pub fn split_merged(
    packet: &Packet<'_>,
    parsed: &Parsed,
    behind: &[u8],
    behind_at: usize,
    tails: &[Range<usize>],
    room: usize,
    plan: &mut SplitPlan,
) -> Result<Range<usize>, DropReason> {
    let template = Template::new(packet, parsed)?;
    let head_at = behind_at.checked_sub(packet.head.len()).ok_or(DropReason::Truncated)?;
    lay_out(packet, &template, room, plan, |index| {
        if index == 0 {
            let payload = packet.head.get(template.header_len..)?;
            return (payload.len() == template.payload_len(0)).then_some((head_at + template.header_len..behind_at, payload));
        }
        let tail = tails.get(index - 1)?;
        let payload = behind.get(tail.start.checked_sub(behind_at)?..tail.end.checked_sub(behind_at)?)?;
        (payload.len() == template.payload_len(index)).then_some((tail.clone(), payload))
    })
}

fn lay_out<'a>(
    packet: &Packet<'_>,
    template: &Template,
    room: usize,
    plan: &mut SplitPlan,
    payload: impl Fn(usize) -> Option<(Range<usize>, &'a [u8])>,
) -> Result<Range<usize>, DropReason> {
    let first = plan.segments.len();
    let undo = plan.scratch.len();
    let needed = (room + template.header_len) * template.segments;
    if plan.scratch.capacity() - undo < needed || plan.segments.capacity() - first < template.segments {
        return Err(DropReason::OutboxFull);
    }
    let header = packet.head.get(..template.header_len).ok_or(DropReason::Truncated)?;
    for index in 0..template.segments {
        let Some((range, payload)) = payload(index) else {
            plan.scratch.truncate(undo);
            plan.segments.truncate(first);
            return Err(DropReason::Truncated);
        };
        let at = plan.scratch.len();
        plan.scratch.resize(at + room, 0);
        plan.scratch.extend_from_slice(header);
        if template.kind != Rewrite::Nothing {
            template.write(&mut plan.scratch[at + room..], index, payload.len(), Sum::of(payload));
        }
        plan.segments.push(Segment { header: at..plan.scratch.len(), payload: range });
    }
    Ok(first..plan.segments.len())
}

/// What differs from one segment's header to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rewrite {
    /// The packet's checksum is full already: it goes as it is.
    Nothing,
    /// TCP: lengths, IPv4 id, sequence number, flags, checksums.
    Tcp,
    /// UDP: lengths, IPv4 id, checksums.
    Udp,
}

/// The headers of a superframe with everything summed once that is the same in each of its segments.
pub(crate) struct Template {
    kind: Rewrite,
    v4: bool,
    transport: usize,
    /// IP and transport header.
    pub(crate) header_len: usize,
    /// Payload bytes of each segment but the last.
    size: usize,
    /// Payload bytes in all.
    payload: usize,
    /// How many segments.
    pub(crate) segments: usize,
    /// IPv4: the header without total length, id and checksum.
    ip: Sum,
    /// IPv4 identification of the first.
    id: u16,
    /// Pseudo header without length, and transport header without what `write` puts there.
    fixed: Sum,
    seq: u32,
    flags: u8,
}

impl Template {
    pub(crate) fn new(packet: &Packet<'_>, parsed: &Parsed) -> Result<Template, DropReason> {
        let len = parsed.len as usize;
        let transport = usize::from(parsed.transport);
        let (kind, size) = match (packet.offload.gso, parsed.transport_kind, packet.offload.checksum) {
            (Gso::None, _, Checksum::Full) => (Rewrite::Nothing, usize::MAX),
            (Gso::None, Transport::Tcp { .. }, Checksum::Partial) => (Rewrite::Tcp, usize::MAX),
            (Gso::None, Transport::Udp, Checksum::Partial) => (Rewrite::Udp, usize::MAX),
            (Gso::Tcp { size, .. }, Transport::Tcp { .. }, _) => (Rewrite::Tcp, size.into()),
            (Gso::Udp { size }, Transport::Udp, _) => (Rewrite::Udp, size.into()),
            // The frame's sender contradicts itself: what it is beside what it says it is.
            _ => return Err(DropReason::BadHeader),
        };
        let header_len = match (kind, parsed.transport_kind) {
            (Rewrite::Nothing, _) => transport,
            (_, Transport::Tcp { header_len, .. }) => transport + usize::from(header_len),
            _ => transport + udp::HEADER_LEN,
        };
        if kind != Rewrite::Nothing && parsed.fragment.is_some() || size == 0 {
            return Err(DropReason::BadHeader);
        }
        if header_len > len || header_len > packet.head.len() || len > packet.len() {
            return Err(DropReason::Truncated);
        }
        let payload = len - header_len;
        let size = size.min(payload);
        let segments = if payload == 0 { 1 } else { payload.div_ceil(size) };
        let head = &packet.head[..header_len];
        let v4 = head[0] >> 4 == 4;
        let mut template =
            Template { kind, v4, transport, header_len, size, payload, segments, ip: Sum::default(), id: 0, fixed: Sum::default(), seq: 0, flags: 0 };
        if kind == Rewrite::Nothing {
            return Ok(template);
        }
        let addresses = if v4 {
            template.ip = Sum::of(&head[..2]) + Sum::of(&head[6..10]) + Sum::of(&head[12..transport]);
            template.id = u16_at(head, ipv4::ID);
            &head[ipv4::SRC..ipv4::HEADER_LEN]
        } else {
            &head[ipv6::SRC..ipv6::HEADER_LEN]
        };
        let fixed = Sum::of(addresses) + Sum::of_words(&[parsed.tuple.protocol.into()]);
        template.fixed = match kind {
            Rewrite::Tcp => {
                let segment = &head[transport..];
                template.seq = u32_at(segment, tcp::SEQUENCE);
                template.flags = segment[tcp::FLAGS];
                // Ports, acknowledgement, data offset, window, urgent pointer and options; not sequence number, flags, checksum.
                let data_offset = Sum::of_words(&[u16::from(segment[tcp::DATA_OFFSET]) << 8]);
                let ports = Sum::of(&segment[tcp::PORTS..tcp::SEQUENCE]);
                let window = Sum::of(&segment[tcp::WINDOW..tcp::CHECKSUM]);
                fixed + ports + Sum::of(&segment[tcp::ACKNOWLEDGEMENT..tcp::DATA_OFFSET]) + data_offset + window + Sum::of(&segment[tcp::URGENT..])
            }
            _ => fixed + Sum::of(&head[transport..][udp::PORTS..udp::LEN]),
        };
        Ok(template)
    }

    /// Payload bytes of segment `index`.
    pub(crate) fn payload_len(&self, index: usize) -> usize {
        self.size.min(self.payload.saturating_sub(index * self.size))
    }

    /// Turns `header`, a copy of the superframe's, into that of segment `index`.
    pub(crate) fn write(&self, header: &mut [u8], index: usize, payload_len: usize, payload: Sum) {
        let len = self.header_len + payload_len;
        if self.v4 {
            let id = self.id.wrapping_add(index as u16);
            set_u16(header, ipv4::TOTAL_LEN, len as u16);
            set_u16(header, ipv4::ID, id);
            set_u16(header, ipv4::CHECKSUM, (self.ip + Sum::of_words(&[len as u16, id])).finish().0);
        } else {
            ipv6::set_payload_len(header, (len - ipv6::HEADER_LEN) as u16);
        }
        let transport_len = (len - self.transport) as u16;
        let sum = self.fixed + Sum::of_words(&[transport_len]) + payload;
        let transport = &mut header[self.transport..];
        if self.kind == Rewrite::Tcp {
            let seq = self.seq.wrapping_add((index * self.size) as u32);
            let mut flags = self.flags;
            if index > 0 {
                flags &= !tcp::CWR;
            }
            if index + 1 < self.segments {
                flags &= !(tcp::FIN | tcp::PSH);
            }
            set_u32(transport, tcp::SEQUENCE, seq);
            transport[tcp::FLAGS] = flags;
            set_u16(transport, tcp::CHECKSUM, (sum + Sum::of_words(&[(seq >> 16) as u16, seq as u16, flags.into()])).finish().0);
        } else {
            set_u16(transport, udp::LEN, transport_len);
            // The length is summed twice: in the pseudo header and in the header.
            set_u16(transport, udp::CHECKSUM, (sum + Sum::of_words(&[transport_len])).finish_udp().0);
        }
    }
}
