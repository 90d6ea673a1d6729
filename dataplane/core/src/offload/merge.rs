//! Merging: consecutive segments of one flow become one superframe, no copy of payload.
//!
//! The rules are those of the kernel's `inet_gro_receive`, `ipv6_gro_receive`, `tcp_gro_receive` and `udp_gro_receive`, so that what a
//! pod sees is what it would have seen from a network card. A merged frame says `NEEDS_CSUM`, which its receiver believes: so each
//! segment's checksums are verified before it becomes part of one, unless the kernel itself left them unfinished: what was made on this
//! machine has none yet.

use std::ops::Range;

use super::{PACKET_BYTES_MAX, SEND_SEGMENTS_MAX};
use crate::addr::protocol;
use crate::packet::{Checksum, Gso, Offload};
use crate::wire::checksum::Sum;
use crate::wire::tcp::{CWR, FIN, PSH, RST, SYN, URG};
use crate::wire::{ipv4, ipv6, set_u16, tcp, u16_at, u32_at, udp};

/// Whether the kernel takes superframes of a kind from us (`TUNSETOFFLOAD` may accept what a later write is refused for).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Merging {
    /// Make superframes.
    On,
    /// Pass every packet alone.
    Off,
}

/// A packet to be looked at and written as one: what it was merged from, or one packet as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Its first packet in the buffer, headers and first payload.
    pub head: Range<usize>,
    /// In [`MergePlan::tails`]: the payloads behind it.
    pub tails: Range<usize>,
    /// Bytes in those tails.
    pub tail_len: usize,
    /// What it is now.
    pub offload: Offload,
    /// How many packets it stands for.
    pub segments: u16,
}

/// What [`merge()`] found in one buffer. Never grows.
#[derive(Debug)]
pub struct MergePlan {
    /// Whether TCP is merged.
    pub tcp: Merging,
    /// Whether UDP is merged: only where the TUN takes `TUN_F_USO4` and `TUN_F_USO6`.
    pub udp: Merging,
    frames: Vec<Frame>,
    tails: Vec<Range<usize>>,
}

impl MergePlan {
    /// With room for `segments` packets.
    pub fn new(segments: usize, tcp: Merging, udp: Merging) -> MergePlan {
        MergePlan { tcp, udp, frames: Vec::with_capacity(segments), tails: Vec::with_capacity(segments) }
    }

    /// The frames, in the order of their first packets.
    pub fn frames(&self) -> &[Frame] {
        &self.frames
    }

    /// Payloads in the buffer; [`Frame::tails`] says whose.
    pub fn tails(&self) -> &[Range<usize>] {
        &self.tails
    }
}

/// Merges the packets that lie at `segments` in `buffer`, in order, into the frames of `plan` (cleared first), and edits the headers of
/// merged ones. Gives back how many segments it took: all, unless the plan is smaller than that. `checksum` is the state of each packet's.
///
/// Only neighbours are merged, so no packet overtakes another. What cannot be merged (fragments, IPv4 options, IPv6 extension headers,
/// ICMP, a wrong checksum, SYN, RST) is a frame of its own, untouched.
pub fn merge(buffer: &mut [u8], segments: &[Range<usize>], checksum: Checksum, plan: &mut MergePlan) -> usize {
    plan.frames.clear();
    plan.tails.clear();
    let room = plan.frames.capacity().min(plan.tails.capacity());
    let taken = segments.len().min(room);
    let mut open: Option<Run> = None;
    for range in &segments[..taken] {
        let bytes = buffer.get(range.clone()).unwrap_or_default();
        let shape = Shape::of(bytes).filter(|shape| shape.wanted(plan) && shape.verified(bytes, checksum));
        if let (Some(run), Some(shape)) = (&mut open, &shape)
            && run.takes(&buffer[run.head.clone()], bytes, shape)
        {
            run.append(bytes, shape);
            plan.tails.push(range.start + shape.header_len..range.start + shape.len);
            if run.full {
                close(&mut open, buffer, checksum, plan);
            }
            continue;
        }
        let next = shape.map(|shape| Run::start(range, bytes, shape, plan.tails.len()));
        close(&mut open, buffer, checksum, plan);
        open = next;
        if open.is_none() {
            plan.frames.push(alone(range.clone(), checksum, plan.tails.len()));
        }
        if open.as_ref().is_some_and(|run| run.full) {
            close(&mut open, buffer, checksum, plan);
        }
    }
    close(&mut open, buffer, checksum, plan);
    taken
}

fn alone(head: Range<usize>, checksum: Checksum, tails: usize) -> Frame {
    Frame { head, tails: tails..tails, tail_len: 0, offload: Offload { checksum, gso: Gso::None }, segments: 1 }
}

fn close(open: &mut Option<Run>, buffer: &mut [u8], checksum: Checksum, plan: &mut MergePlan) {
    let Some(run) = open.take() else { return };
    let frame = if run.segments == 1 {
        alone(run.head, checksum, run.tails)
    } else {
        let offload = run.write(&mut buffer[run.head.clone()]);
        let tail_len = run.payload - run.size;
        Frame { head: run.head, tails: run.tails..plan.tails.len(), tail_len, offload, segments: run.segments }
    };
    plan.frames.push(frame);
}

/// A packet that could be merged: no options, no extension headers, no fragment, lengths that fit it exactly, payload.
#[derive(Clone, Copy, Debug)]
struct Shape {
    v4: bool,
    transport: usize,
    header_len: usize,
    len: usize,
    /// TCP flags; 0 for UDP.
    flags: u8,
    protocol: u8,
}

impl Shape {
    fn of(bytes: &[u8]) -> Option<Shape> {
        let (v4, transport, protocol, len) = match bytes.first()? {
            // No MF, no reserved bit, no offset: the packet is whole.
            0x45 if bytes.len() >= ipv4::HEADER_LEN && u16_at(bytes, ipv4::FLAGS_OFFSET) & !ipv4::DONT_FRAGMENT == 0 => {
                (true, ipv4::HEADER_LEN, bytes[ipv4::PROTOCOL], usize::from(u16_at(bytes, ipv4::TOTAL_LEN)))
            }
            first if first >> 4 == 6 && bytes.len() >= ipv6::HEADER_LEN => {
                let payload_len = usize::from(u16_at(bytes, ipv6::PAYLOAD_LEN));
                (false, ipv6::HEADER_LEN, bytes[ipv6::NEXT_HEADER], ipv6::HEADER_LEN + payload_len)
            }
            _ => return None,
        };
        let rest = &bytes[transport..];
        let (header, flags) = match protocol {
            _ if len != bytes.len() => return None,
            protocol::TCP if rest.len() >= tcp::HEADER_LEN && rest[tcp::DATA_OFFSET] >> 4 >= 5 => {
                (usize::from(rest[tcp::DATA_OFFSET] >> 4) * 4, rest[tcp::FLAGS])
            }
            // A checksum of 0 verifies nothing, and a merged frame must have one.
            protocol::UDP
                if rest.len() >= udp::HEADER_LEN && u16_at(rest, udp::CHECKSUM) != 0 && usize::from(u16_at(rest, udp::LEN)) == rest.len() =>
            {
                (udp::HEADER_LEN, 0)
            }
            _ => return None,
        };
        let plain = flags & (SYN | RST | URG) == 0;
        (plain && header < rest.len()).then_some(Shape { v4, transport, header_len: transport + header, len: bytes.len(), flags, protocol })
    }

    fn wanted(&self, plan: &MergePlan) -> bool {
        let merging = if self.protocol == protocol::TCP { plan.tcp } else { plan.udp };
        merging == Merging::On
    }

    fn payload(&self) -> usize {
        self.len - self.header_len
    }

    /// Whether the IPv4 header's and the transport checksum are right: an unfinished one if it is the pseudo header's.
    fn verified(&self, bytes: &[u8], checksum: Checksum) -> bool {
        if self.v4 && !Sum::of(&bytes[..ipv4::HEADER_LEN]).is_whole() {
            return false;
        }
        let pseudo = pseudo_header(bytes, self.v4, self.protocol, self.len - self.transport);
        match checksum {
            Checksum::Full => (pseudo + Sum::of(&bytes[self.transport..])).is_whole(),
            Checksum::Partial => {
                let field = if self.protocol == protocol::TCP { tcp::CHECKSUM } else { udp::CHECKSUM };
                pseudo.folded() == u16_at(bytes, self.transport + field)
            }
        }
    }
}

fn pseudo_header(bytes: &[u8], v4: bool, protocol: u8, transport_len: usize) -> Sum {
    let addresses = if v4 { &bytes[ipv4::SRC..ipv4::HEADER_LEN] } else { &bytes[ipv6::SRC..ipv6::HEADER_LEN] };
    // A length beyond 16 bits is no packet: see PACKET_BYTES_MAX.
    Sum::of(addresses) + Sum::of_words(&[protocol.into(), transport_len as u16])
}

/// Segments being merged.
#[derive(Clone, Debug)]
struct Run {
    head: Range<usize>,
    shape: Shape,
    /// Where its tails begin in the plan.
    tails: usize,
    /// Payload bytes of the first segment, and so of all but the last.
    size: usize,
    /// Payload bytes in all.
    payload: usize,
    segments: u16,
    /// IPv4 identification of the first segment; 0 for IPv6.
    id: u16,
    /// The second had the same.
    fixed_id: bool,
    /// FIN and PSH of the last segment.
    last_flags: u8,
    next_seq: u32,
    /// Nothing more may follow.
    full: bool,
}

impl Run {
    /// A run that begins with a segment.
    fn start(range: &Range<usize>, bytes: &[u8], shape: Shape, tails: usize) -> Run {
        let size = shape.payload();
        let next_seq = if shape.protocol == protocol::TCP { u32_at(bytes, shape.transport + tcp::SEQUENCE).wrapping_add(size as u32) } else { 0 };
        let full = shape.flags & (FIN | PSH) != 0;
        let id = if shape.v4 { u16_at(bytes, ipv4::ID) } else { 0 };
        Run { head: range.clone(), shape, tails, size, payload: size, segments: 1, id, fixed_id: false, last_flags: 0, next_seq, full }
    }

    /// Whether a segment continues this run, whose first is `head`.
    fn takes(&self, head: &[u8], bytes: &[u8], shape: &Shape) -> bool {
        let same_kind = (self.shape.v4, self.shape.protocol, self.shape.header_len) == (shape.v4, shape.protocol, shape.header_len);
        same_kind
            && shape.payload() <= self.size
            && self.shape.header_len + self.payload + shape.payload() <= PACKET_BYTES_MAX
            && self.segments < segments_max(shape.protocol)
            && self.same_network(head, bytes)
            && self.same_transport(&head[shape.transport..], &bytes[shape.transport..shape.header_len])
    }

    fn same_network(&self, head: &[u8], bytes: &[u8]) -> bool {
        if self.shape.v4 {
            // Whoever cuts the frame again counts up, so it must count up here; or stay the same with DF set, where it means nothing
            // (RFC 6864; the kernel's inet_gro_flush has the same rule).
            let dont_fragment = u16_at(bytes, ipv4::FLAGS_OFFSET) & ipv4::DONT_FRAGMENT != 0;
            let id = u16_at(bytes, ipv4::ID);
            let counted = !self.fixed_id && id == self.id.wrapping_add(self.segments);
            let fixed = dont_fragment && id == self.id && (self.fixed_id || self.segments == 1);
            let equal = |from: usize, to: usize| head[from..to] == bytes[from..to];
            equal(ipv4::TRAFFIC_CLASS, ipv4::TOTAL_LEN)
                && equal(ipv4::FLAGS_OFFSET, ipv4::PROTOCOL)
                && equal(ipv4::SRC, ipv4::HEADER_LEN)
                && (counted || fixed)
        } else {
            // Version, traffic class and flow label; hop limit and addresses.
            head[..ipv6::PAYLOAD_LEN] == bytes[..ipv6::PAYLOAD_LEN]
                && head[ipv6::HOP_LIMIT..ipv6::HEADER_LEN] == bytes[ipv6::HOP_LIMIT..ipv6::HEADER_LEN]
        }
    }

    fn same_transport(&self, head: &[u8], bytes: &[u8]) -> bool {
        if head[..4] != bytes[..4] {
            return false;
        }
        if self.shape.protocol == protocol::UDP {
            return true;
        }
        // As in tcp_gro_receive: acknowledgement, data offset, window and options equal; flags too, but that FIN and PSH may come with
        // the last and CWR only with the first. The urgent pointer is compared as well: nothing of a segment is lost in a merge.
        u32_at(bytes, tcp::SEQUENCE) == self.next_seq
            && head[tcp::ACKNOWLEDGEMENT..tcp::FLAGS] == bytes[tcp::ACKNOWLEDGEMENT..tcp::FLAGS]
            && head[tcp::WINDOW..tcp::CHECKSUM] == bytes[tcp::WINDOW..tcp::CHECKSUM]
            && head[tcp::URGENT..bytes.len()] == bytes[tcp::URGENT..]
            && bytes[tcp::FLAGS] & CWR == 0
            && (head[tcp::FLAGS] ^ bytes[tcp::FLAGS]) & !(CWR | FIN | PSH) == 0
    }

    fn append(&mut self, bytes: &[u8], shape: &Shape) {
        let len = shape.payload();
        if self.segments == 1 {
            self.fixed_id = shape.v4 && u16_at(bytes, ipv4::ID) == self.id;
        }
        self.payload += len;
        self.segments += 1;
        self.last_flags = shape.flags & (FIN | PSH);
        if shape.protocol == protocol::TCP {
            self.next_seq = u32_at(bytes, shape.transport + tcp::SEQUENCE).wrapping_add(len as u32);
        }
        self.full = len < self.size || self.last_flags != 0;
    }

    /// Makes the headers of `head` stand for all segments.
    fn write(&self, head: &mut [u8]) -> Offload {
        let len = self.shape.header_len + self.payload;
        let transport = self.shape.transport;
        if self.shape.v4 {
            set_u16(head, ipv4::TOTAL_LEN, len as u16);
            set_u16(head, ipv4::CHECKSUM, 0);
            let checksum = Sum::of(&head[..ipv4::HEADER_LEN]).finish().0;
            set_u16(head, ipv4::CHECKSUM, checksum);
        } else {
            ipv6::set_payload_len(head, (len - ipv6::HEADER_LEN) as u16);
        }
        let pseudo = pseudo_header(head, self.shape.v4, self.shape.protocol, len - transport).folded();
        // Payloads are parts of one packet of at most 65,535 bytes.
        let size = self.size as u16;
        let gso = if self.shape.protocol == protocol::TCP {
            head[transport + tcp::FLAGS] |= self.last_flags;
            set_u16(head, transport + tcp::CHECKSUM, pseudo);
            Gso::Tcp { size, ecn: head[transport + tcp::FLAGS] & CWR != 0 }
        } else {
            set_u16(head, transport + udp::LEN, (len - transport) as u16);
            set_u16(head, transport + udp::CHECKSUM, pseudo);
            Gso::Udp { size }
        };
        Offload { checksum: Checksum::Partial, gso }
    }
}

/// How many segments a frame of `protocol` may stand for: `UDP_GRO_CNT_MAX` for UDP; TCP is bounded by its bytes alone.
fn segments_max(protocol: u8) -> u16 {
    if protocol == protocol::UDP { SEND_SEGMENTS_MAX as u16 } else { u16::MAX }
}
