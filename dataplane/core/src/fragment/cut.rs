//! Cutting a packet into fragments.

use crate::offload::finish_checksum;
use crate::packet::{Gso, Packet};
use crate::parse::Parsed;
use crate::verdict::DropReason;
use crate::wire::checksum::Sum;
use crate::wire::{ipv4, ipv6, set_u16, u16_at};

/// The longest per-fragment headers that are repeated. IPv4's are 60 at most; an IPv6 packet with more extension headers than that is
/// none that a pod has reason to send.
const HEADER_BYTES_MAX: usize = 256;

/// Cuts `packet` into fragments of at most `mtu` bytes, each given to `emit` as header and payload; gives back how many.
///
/// A packet that fits is emitted whole. A fragment may be cut again, and keeps its identification; so does an IPv4 packet. `id` is for
/// an IPv6 packet that is not a fragment yet. Whether an IPv6 packet may be cut at all is the caller's to know (only its sender may, RFC
/// 8200 §4.5); an IPv4 packet with DF set is refused. The transport checksum is completed first. Superframes are to be split before.
pub fn cut(
    packet: &mut Packet<'_>,
    parsed: &Parsed,
    mtu: u32,
    id: u32,
    mut emit: impl FnMut(&[u8], &[u8]) -> Result<(), DropReason>,
) -> Result<usize, DropReason> {
    if packet.offload.gso != Gso::None {
        return Err(DropReason::PacketTooBig);
    }
    finish_checksum(packet, parsed)?;
    let bytes = packet.head.get(..parsed.len as usize).ok_or(DropReason::Truncated)?;
    if parsed.len <= mtu {
        let (header, payload) = bytes.split_at(parsed.transport.into());
        emit(header, payload)?;
        return Ok(1);
    }
    if parsed.tuple.is_v4() { cut_v4(bytes, mtu as usize, emit) } else { cut_v6(bytes, mtu as usize, id, emit) }
}

fn cut_v4(bytes: &[u8], mtu: usize, mut emit: impl FnMut(&[u8], &[u8]) -> Result<(), DropReason>) -> Result<usize, DropReason> {
    let header_len = usize::from(bytes[0] & 0x0f) * 4;
    let (original, payload) = bytes.split_at_checked(header_len).ok_or(DropReason::Truncated)?;
    let flags = u16_at(original, ipv4::FLAGS_OFFSET);
    if flags & ipv4::DONT_FRAGMENT != 0 {
        return Err(DropReason::PacketTooBig);
    }
    let (first_offset, more_behind) = (usize::from(flags & ipv4::OFFSET_MASK) * 8, flags & ipv4::MORE_FRAGMENTS);
    let mut buffer = [0; ipv4::HEADER_LEN_MAX];
    let header = &mut buffer[..header_len];
    header.copy_from_slice(original);
    let (mut at, mut count, mut header_len) = (0, 0, header_len);
    while at < payload.len() {
        let len = piece(payload.len() - at, mtu, header_len)?;
        let more = if at + len < payload.len() { ipv4::MORE_FRAGMENTS } else { more_behind };
        let header = &mut buffer[..header_len];
        set_u16(header, ipv4::TOTAL_LEN, (header_len + len) as u16);
        set_u16(header, ipv4::FLAGS_OFFSET, more | ((first_offset + at) / 8) as u16);
        set_u16(header, ipv4::CHECKSUM, 0);
        let checksum = Sum::of(header).finish().0;
        set_u16(header, ipv4::CHECKSUM, checksum);
        emit(header, &payload[at..at + len])?;
        if at == 0 && header_len > ipv4::HEADER_LEN {
            header_len = keep_copied_options(&mut buffer[..header_len]);
        }
        at += len;
        count += 1;
    }
    Ok(count)
}

/// Leaves only the options that every fragment repeats, and gives back the header's new length.
fn keep_copied_options(header: &mut [u8]) -> usize {
    // RFC 791 §3.1: the type's highest bit is the copied flag; 0 ends the list, 1 is one byte of padding, others say their length.
    let (mut from, mut to) = (ipv4::HEADER_LEN, ipv4::HEADER_LEN);
    while from < header.len() {
        let len = match header[from] {
            0 => break,
            1 => 1,
            _ => header.get(from + 1).map_or(1, |len| usize::from(*len).max(2)),
        };
        let end = (from + len).min(header.len());
        if header[from] & 0x80 != 0 {
            header.copy_within(from..end, to);
            to += end - from;
        }
        from = end;
    }
    let len = to.next_multiple_of(4);
    header[to..len].fill(0);
    header[0] = 0x40 | (len / 4) as u8;
    len
}

fn cut_v6(bytes: &[u8], mtu: usize, id: u32, mut emit: impl FnMut(&[u8], &[u8]) -> Result<(), DropReason>) -> Result<usize, DropReason> {
    let place = insertion_point(bytes)?;
    let mut buffer = [0; HEADER_BYTES_MAX];
    let header_len = place.at + ipv6::FRAGMENT_HEADER_LEN;
    let header = buffer.get_mut(..header_len).ok_or(DropReason::FragmentBad)?;
    header[..place.at].copy_from_slice(&bytes[..place.at]);
    let (payload, first_offset, more_behind) = if place.next == ipv6::FRAGMENT {
        let existing = bytes.get(place.at..header_len).ok_or(DropReason::Truncated)?;
        header[place.at..].copy_from_slice(existing);
        let word = u16_at(existing, 2);
        if word & !0b110 == 0 {
            // An atomic fragment (RFC 6946) is cut under an identification that is known to be fresh.
            header[place.at + 4..].copy_from_slice(&id.to_be_bytes());
        }
        (&bytes[header_len..], usize::from(word & !7), word & 1)
    } else {
        header[place.next_field] = ipv6::FRAGMENT;
        header[place.at] = place.next;
        header[place.at + 4..].copy_from_slice(&id.to_be_bytes());
        (&bytes[place.at..], 0, 0)
    };
    let (mut at, mut count) = (0, 0);
    while at < payload.len() {
        let len = piece(payload.len() - at, mtu, header_len)?;
        let more = if at + len < payload.len() { 1 } else { more_behind };
        // The offset counts units of 8 bytes and stands above three bits: in place, it is the offset in bytes.
        set_u16(header, place.at + 2, (first_offset + at) as u16 | more);
        ipv6::set_payload_len(header, (header_len - ipv6::HEADER_LEN + len) as u16);
        emit(header, &payload[at..at + len])?;
        at += len;
        count += 1;
    }
    Ok(count)
}

/// Where a fragment header goes, or already is.
#[derive(Clone, Copy)]
struct Place {
    at: usize,
    /// The header that follows there.
    next: u8,
    /// The field that says so.
    next_field: usize,
}

/// Behind the headers that every node on the way looks at: up to a routing header, or else a hop-by-hop header (RFC 8200 §4.5).
fn insertion_point(bytes: &[u8]) -> Result<Place, DropReason> {
    let mut here = Place { at: ipv6::HEADER_LEN, next: bytes[ipv6::NEXT_HEADER], next_field: ipv6::NEXT_HEADER };
    let mut best = here;
    while matches!(here.next, ipv6::HOP_BY_HOP | ipv6::ROUTING | ipv6::DESTINATION_OPTIONS) {
        let header = bytes.get(here.at..here.at + 8).ok_or(DropReason::Truncated)?;
        let per_fragment = here.next != ipv6::DESTINATION_OPTIONS;
        here = Place { at: here.at + 8 + usize::from(header[1]) * 8, next: header[0], next_field: here.at };
        if per_fragment || here.next == ipv6::FRAGMENT {
            best = here;
        }
    }
    if best.at > bytes.len() { Err(DropReason::Truncated) } else { Ok(best) }
}

/// Payload bytes of the next piece when `left` are to go.
fn piece(left: usize, mtu: usize, header_len: usize) -> Result<usize, DropReason> {
    let room = mtu.saturating_sub(header_len);
    if left <= room {
        return Ok(left);
    }
    match room / 8 * 8 {
        0 => Err(DropReason::PacketTooBig),
        room => Ok(room),
    }
}
