//! The IPv6 header and the walk over its extension headers.
//!
//! Read first: RFC 8200 §3 and §4; RFC 5095 (routing type 0), RFC 6946 (atomic fragments), RFC 7112 (the chain fits the first fragment).

use super::checksum::Delta;
use super::{set_u16, u16_at, u32_at};
use crate::addr::Addr;
use crate::verdict::DropReason;

/// Bytes of the fixed header.
pub const HEADER_LEN: usize = 40;
/// Bytes of the fragment header.
pub const FRAGMENT_HEADER_LEN: usize = 8;
/// The smallest MTU that every IPv6 link has (RFC 8200 §5).
pub const MTU_MIN: u32 = 1280;

/// Offset of the payload length.
pub const PAYLOAD_LEN: usize = 4;
/// Offset of the next header's number.
pub const NEXT_HEADER: usize = 6;
/// Offset of the hop limit.
pub const HOP_LIMIT: usize = 7;
/// Offset of the source address.
pub const SRC: usize = 8;
/// Offset of the destination address.
pub const DST: usize = 24;

/// Next header: hop-by-hop options.
pub const HOP_BY_HOP: u8 = 0;
/// Next header: routing.
pub const ROUTING: u8 = 43;
/// Next header: fragment.
pub const FRAGMENT: u8 = 44;
/// Next header: destination options.
pub const DESTINATION_OPTIONS: u8 = 60;

/// Extension headers that a packet may have. RFC 8200 §4.1 lists six in a sane packet, one of them twice; more are an attack on
/// whoever walks them.
pub const EXTENSIONS_MAX: usize = 8;

/// The fixed header.
pub type Header = [u8; HEADER_LEN];

/// What lies behind the extension headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Upper {
    /// Its protocol number. A routing header that has not run out is named itself: the destination field is not yet the receiver.
    pub protocol: u8,
    /// Where it starts.
    pub at: usize,
    /// The fragment header, unless the fragment is atomic.
    pub fragment: Option<FragmentHeader>,
}

/// A fragment header's fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FragmentHeader {
    /// Where it starts.
    pub at: usize,
    /// Offset of the fragment in the fragmentable part, in bytes.
    pub offset: u32,
    /// Whether more follow.
    pub more: bool,
    /// Identification.
    pub id: u32,
}

/// Length of what follows the fixed header, in bytes.
#[inline]
pub const fn payload_len(header: &Header) -> u16 {
    u16::from_be_bytes([header[PAYLOAD_LEN], header[PAYLOAD_LEN + 1]])
}

/// DSCP and ECN.
#[inline]
pub const fn traffic_class(header: &Header) -> u8 {
    header[0] << 4 | header[1] >> 4
}

/// Source address.
#[inline]
pub fn src(header: &Header) -> Addr {
    Addr::from_v6(*header[SRC..].first_chunk().expect("inside the header"))
}

/// Destination address.
#[inline]
pub fn dst(header: &Header) -> Addr {
    Addr::from_v6(*header[DST..].first_chunk().expect("inside the header"))
}

/// Writes the payload length.
#[inline]
pub fn set_payload_len(head: &mut [u8], len: u16) {
    set_u16(head, PAYLOAD_LEN, len);
}

/// Writes both addresses and says how the sum changed.
#[inline]
pub fn set_addresses(head: &mut [u8], src: Addr, dst: Addr) -> Delta {
    let header = head.first_chunk::<HEADER_LEN>().expect("a whole IPv6 header");
    let delta = Delta::addr(self::src(header), src) + Delta::addr(self::dst(header), dst);
    replace_addresses(head, src, dst);
    delta
}

/// Writes both addresses.
#[inline]
pub fn replace_addresses(head: &mut [u8], src: Addr, dst: Addr) {
    let header = head.first_chunk_mut::<HEADER_LEN>().expect("a whole IPv6 header");
    header[SRC..DST].copy_from_slice(&src.v6_octets());
    header[DST..].copy_from_slice(&dst.v6_octets());
}

/// Walks from the fixed header of `bytes` (which is whole, and cut where the packet ends) to the upper layer.
#[inline]
pub fn walk(bytes: &[u8]) -> Result<Upper, DropReason> {
    let protocol = bytes[NEXT_HEADER];
    match protocol {
        HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION_OPTIONS => walk_extensions(bytes, protocol),
        _ => Ok(Upper { protocol, at: HEADER_LEN, fragment: None }),
    }
}

// Kept out of line: almost no packet has an extension header.
#[cold]
fn walk_extensions(bytes: &[u8], first: u8) -> Result<Upper, DropReason> {
    let mut upper = Upper { protocol: first, at: HEADER_LEN, fragment: None };
    for count in 0..=EXTENSIONS_MAX {
        if !matches!(upper.protocol, HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION_OPTIONS) {
            return Ok(upper);
        }
        // RFC 7112 §5: a first fragment without the whole chain.
        let short = if upper.fragment.is_some() { DropReason::FragmentBad } else { DropReason::Truncated };
        let header = bytes.get(upper.at..).and_then(|rest| rest.first_chunk::<8>()).ok_or(short)?;
        let len = match upper.protocol {
            FRAGMENT => FRAGMENT_HEADER_LEN,
            _ => 8 + usize::from(header[1]) * 8,
        };
        if bytes.len() - upper.at < len {
            return Err(short);
        }
        match upper.protocol {
            // RFC 8200 §4.1: only right behind the fixed header.
            HOP_BY_HOP if count != 0 => return Err(DropReason::BadHeader),
            // RFC 5095 §3: type 0 with segments left is refused.
            ROUTING if header[3] != 0 && header[2] == 0 => return Err(DropReason::BadHeader),
            ROUTING if header[3] != 0 => return Ok(upper),
            FRAGMENT if upper.fragment.is_some() => return Err(DropReason::BadHeader),
            FRAGMENT => {
                let offset_more = u16_at(header, 2);
                let (offset, more) = (u32::from(offset_more & !7), offset_more & 1 != 0);
                // RFC 6946: an atomic fragment is a whole packet.
                if offset != 0 || more {
                    upper.fragment = Some(FragmentHeader { at: upper.at, offset, more, id: u32_at(header, 4) });
                }
            }
            _ => {}
        }
        upper.protocol = header[0];
        upper.at += len;
        if upper.fragment.is_some_and(|fragment| fragment.offset != 0) {
            return Ok(upper);
        }
    }
    Err(DropReason::BadHeader)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::protocol;
    use crate::testing::{self, with_extension};

    fn datagram() -> Vec<u8> {
        testing::udp("[fd00::1]:1", "[fd00::2]:2", b"data")
    }

    const PADDING: [u8; 6] = [1, 4, 0, 0, 0, 0];

    #[test]
    fn extension_headers_in_their_order_are_walked_over() {
        let mut bytes = with_extension(&datagram(), DESTINATION_OPTIONS, &PADDING);
        bytes = with_extension(&bytes, ROUTING, &[4, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]);
        bytes = with_extension(&bytes, HOP_BY_HOP, &PADDING);
        assert_eq!(walk(&bytes), Ok(Upper { protocol: protocol::UDP, at: 40 + 8 + 16 + 8, fragment: None }));
    }

    #[test]
    fn what_is_cut_short_repeated_or_misplaced_is_refused() {
        let options = with_extension(&datagram(), DESTINATION_OPTIONS, &PADDING);
        for len in 40..48 {
            assert_eq!(walk(&options[..len]), Err(DropReason::Truncated));
        }
        let late = with_extension(&with_extension(&datagram(), HOP_BY_HOP, &PADDING), DESTINATION_OPTIONS, &PADDING);
        assert_eq!(walk(&late), Err(DropReason::BadHeader));
        let twice = with_extension(&with_extension(&datagram(), FRAGMENT, &[0, 1, 0, 0, 0, 1]), FRAGMENT, &[0, 1, 0, 0, 0, 1]);
        assert_eq!(walk(&twice), Err(DropReason::BadHeader));
        let mut many = datagram();
        for _ in 0..EXTENSIONS_MAX {
            many = with_extension(&many, DESTINATION_OPTIONS, &PADDING);
        }
        assert_eq!(walk(&many).map(|upper| upper.protocol), Ok(protocol::UDP));
        assert_eq!(walk(&with_extension(&many, DESTINATION_OPTIONS, &PADDING)), Err(DropReason::BadHeader));
    }

    #[test]
    fn a_routing_header_with_segments_left_ends_the_walk() {
        let source_route = with_extension(&datagram(), ROUTING, &[0, 1, 0, 0, 0, 0]);
        assert_eq!(walk(&source_route), Err(DropReason::BadHeader));
        let segment_routing = with_extension(&datagram(), ROUTING, &[4, 1, 0, 0, 0, 0]);
        assert_eq!(walk(&segment_routing), Ok(Upper { protocol: ROUTING, at: 40, fragment: None }));
    }

    #[test]
    fn an_atomic_fragment_is_a_whole_packet() {
        let atomic = with_extension(&datagram(), FRAGMENT, &[0, 0, 0, 0, 0, 9]);
        assert_eq!(walk(&atomic), Ok(Upper { protocol: protocol::UDP, at: 48, fragment: None }));
    }

    #[test]
    fn the_chain_of_a_later_fragment_is_not_followed() {
        let later = with_extension(&datagram(), FRAGMENT, &[0, 8, 0, 0, 0, 9]);
        let fragment = Some(FragmentHeader { at: 40, offset: 8, more: false, id: 9 });
        assert_eq!(walk(&later), Ok(Upper { protocol: protocol::UDP, at: 48, fragment }));
        let mut options = later;
        options[40] = DESTINATION_OPTIONS;
        assert_eq!(walk(&options), Ok(Upper { protocol: DESTINATION_OPTIONS, at: 48, fragment }));
    }
}
