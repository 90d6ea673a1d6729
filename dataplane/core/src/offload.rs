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
use crate::parse::Parsed;
use crate::verdict::DropReason;
use crate::wire::checksum::Sum;

/// The most bytes one send with `UDP_SEGMENT` takes: an IPv4 datagram's payload, 65,535 - 20 - 8. The kernel holds IPv6 to the same
/// sum of lengths, so one figure serves both.
pub const SEND_BYTES_MAX: usize = 65_507;

/// The most segments one send with `UDP_SEGMENT` takes (`UDP_MAX_SEGMENTS` before Linux 6.7, twice that since).
pub const SEND_SEGMENTS_MAX: usize = 64;

/// The longest frame made by [`merge()`]: IPv4's length field has 16 bits, and the kernel's own limit for both families is the same.
pub const PACKET_BYTES_MAX: usize = 65_535;

/// Where the checksum stands in a TCP header.
pub(crate) const TCP_CHECKSUM: usize = 16;
/// Where the checksum stands in a UDP header.
pub(crate) const UDP_CHECKSUM: usize = 6;

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
        protocol::TCP => TCP_CHECKSUM,
        protocol::UDP => UDP_CHECKSUM,
        _ => return Err(DropReason::BadHeader),
    };
    if parsed.fragment.is_some() {
        return Err(DropReason::BadHeader);
    }
    let transport = packet.head.get_mut(parsed.transport.into()..parsed.len as usize).ok_or(DropReason::Truncated)?;
    let sum = Sum::of(transport);
    let stored = if parsed.tuple.protocol == protocol::UDP { sum.finish_udp() } else { sum.finish() };
    put16(transport.get_mut(field..field + 2).ok_or(DropReason::Truncated)?, 0, stored.0);
    packet.offload.checksum = Checksum::Full;
    Ok(())
}

#[inline]
pub(crate) fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

#[inline]
pub(crate) fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[inline]
pub(crate) fn put16(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

#[inline]
pub(crate) fn put32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

#[cfg(test)]
pub(crate) mod oracle;
#[cfg(test)]
mod tests;
