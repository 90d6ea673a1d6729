//! Superframes: one frame that stands for many segments, cut for the overlay and put together again behind it.
//!
//! The kernel hands over up to 64 KiB of TCP or UDP in one frame (GSO) and takes the same back, which is where this gateway's speed
//! comes from. Between nodes the segments must be real packets: [`split()`] makes their headers, and one `sendmsg` with `UDP_SEGMENT`
//! alternates a header with a slice of the frame. On the other side [`merge()`] edits the first segment's headers so that they stand for
//! all, and one `writev` puts the payloads behind them. Neither copies payload.
//!
//! Assumes packets that `parse` has accepted. Read first: `linux/virtio_net.h`, the kernel's `net/ipv4/tcp_offload.c` and
//! `net/ipv4/udp_offload.c`, RFC 1071.

mod merge;
mod split;

pub use merge::{Frame, MergePlan, Merging, merge};
pub use split::{Segment, SplitPlan, split, split_merged};

pub(crate) use split::Template;

use crate::addr::protocol;
use crate::packet::{Checksum, Gso, Packet};
use crate::parse::{Parsed, Transport};
use crate::verdict::DropReason;
use crate::wire::checksum::Sum;
use crate::wire::{set_u16, tcp, udp};

/// The most bytes one send with `UDP_SEGMENT` takes: an IPv4 datagram's payload, 65,535 - 20 - 8. IPv6 would take
/// 20 more, as its length field leaves its header out; one figure serves both.
pub const SEND_BYTES_MAX: usize = 65_507;

/// The most segments one send with `UDP_SEGMENT` takes: `UDP_MAX_SEGMENTS` of the kernels that know least.
pub const SEND_SEGMENTS_MAX: usize = 64;

/// The longest frame made by [`merge()`]: IPv4's length field has 16 bits, and the kernel's own limit for both families is the same.
pub const PACKET_BYTES_MAX: usize = 65_535;

/// The length of the longest packet that `packet` is on a wire, in bytes: its own, or that of a superframe's first segment. This is what
/// a path's MTU is held against.
#[inline]
pub fn wire_len(packet: &Packet<'_>, parsed: &Parsed) -> u32 {
    match segmented(packet, parsed) {
        Some((header_len, size)) => parsed.len.min(header_len + size),
        None => parsed.len,
    }
}

/// How many packets `packet` is on a wire.
#[inline]
pub fn wire_packets(packet: &Packet<'_>, parsed: &Parsed) -> u32 {
    match segmented(packet, parsed) {
        Some((header_len, size)) => parsed.len.saturating_sub(header_len).div_ceil(size).max(1),
        None => 1,
    }
}

/// How many bytes `packet` is on a wire, in all its packets together: a superframe's headers as often as it has segments.
#[inline]
pub fn wire_bytes(packet: &Packet<'_>, parsed: &Parsed) -> u32 {
    let header_len = segmented(packet, parsed).map_or(0, |(header_len, _)| header_len);
    parsed.len + (wire_packets(packet, parsed) - 1) * header_len
}

/// A superframe's header length and payload bytes per segment.
#[inline(always)]
fn segmented(packet: &Packet<'_>, parsed: &Parsed) -> Option<(u32, u32)> {
    let transport = u32::from(parsed.transport);
    match (packet.offload.gso, parsed.transport_kind) {
        (Gso::Tcp { size: size @ 1.., .. }, Transport::Tcp { header_len, .. }) => Some((transport + u32::from(header_len), size.into())),
        (Gso::Udp { size: size @ 1.. }, Transport::Udp) => Some((transport + udp::HEADER_LEN as u32, size.into())),
        _ => None,
    }
}

/// Completes the checksum of a packet that its sender left [`Checksum::Partial`], in place. Others stay as they are.
///
/// The field holds the sum of the pseudo header, so the sum from the transport header to the end, field included, is all that is needed
/// (`skb_checksum_help` does the same). A superframe has no checksum of its own: it keeps `Partial`, and its segments get theirs from
/// [`split()`] or from the kernel.
pub fn finish_checksum(packet: &mut Packet<'_>, parsed: &Parsed) -> Result<(), DropReason> {
    if packet.offload.checksum == Checksum::Full || packet.offload.gso != Gso::None {
        return Ok(());
    }
    let field = match parsed.tuple.protocol {
        protocol::TCP => tcp::CHECKSUM,
        protocol::UDP => udp::CHECKSUM,
        _ => return Err(DropReason::BadHeader),
    };
    if parsed.fragment.is_some() {
        return Err(DropReason::BadHeader);
    }
    let transport = packet.head.get_mut(parsed.transport.into()..parsed.len as usize).ok_or(DropReason::Truncated)?;
    let sum = Sum::of(transport);
    let stored = if parsed.tuple.protocol == protocol::UDP { sum.finish_udp() } else { sum.finish() };
    set_u16(transport.get_mut(field..field + 2).ok_or(DropReason::Truncated)?, 0, stored.0);
    packet.offload.checksum = Checksum::Full;
    Ok(())
}

#[cfg(test)]
pub(crate) mod oracle;
#[cfg(test)]
mod tests;
