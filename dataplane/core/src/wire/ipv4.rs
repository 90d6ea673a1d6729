//! The IPv4 header.
//!
//! Read first: RFC 791 §3.1; RFC 6864 for the identification.

use super::checksum::{Delta, Folded, Stored, Sum};
use super::{set_u16, u16_at};
use crate::addr::Addr;

/// Bytes of a header without options.
pub const HEADER_LEN: usize = 20;
/// Bytes of the longest header.
pub const HEADER_LEN_MAX: usize = 60;

/// Offset of DSCP and ECN.
pub const TRAFFIC_CLASS: usize = 1;
/// Offset of the total length.
pub const TOTAL_LEN: usize = 2;
/// Offset of the identification.
pub const ID: usize = 4;
/// Offset of the flags and the fragment offset.
pub const FLAGS_OFFSET: usize = 6;
/// Offset of the TTL.
pub const TTL: usize = 8;
/// Offset of the protocol number.
pub const PROTOCOL: usize = 9;
/// Offset of the header checksum.
pub const CHECKSUM: usize = 10;
/// Offset of the source address.
pub const SRC: usize = 12;
/// Offset of the destination address.
pub const DST: usize = 16;

/// In the field at [`FLAGS_OFFSET`]: no router may cut it.
pub const DONT_FRAGMENT: u16 = 0x4000;
/// In the field at [`FLAGS_OFFSET`]: it is not the last fragment.
pub const MORE_FRAGMENTS: u16 = 0x2000;
/// In the field at [`FLAGS_OFFSET`]: the fragment offset, in units of 8 bytes.
pub const OFFSET_MASK: u16 = 0x1fff;

/// A header without its options.
pub type Header = [u8; HEADER_LEN];

/// Header length in bytes, options included; may be anything from 0 to 60.
#[inline]
pub const fn header_len(header: &Header) -> usize {
    (header[0] & 0x0f) as usize * 4
}

/// Length of header and payload in bytes.
#[inline]
pub const fn total_len(header: &Header) -> u16 {
    u16::from_be_bytes([header[TOTAL_LEN], header[TOTAL_LEN + 1]])
}

/// Identification.
#[inline]
pub const fn id(header: &Header) -> u16 {
    u16::from_be_bytes([header[ID], header[ID + 1]])
}

/// Flags and fragment offset.
#[inline]
pub const fn flags_offset(header: &Header) -> u16 {
    u16::from_be_bytes([header[FLAGS_OFFSET], header[FLAGS_OFFSET + 1]])
}

/// Source address.
#[inline]
pub const fn src(header: &Header) -> Addr {
    Addr::from_v4([header[12], header[13], header[14], header[15]])
}

/// Destination address.
#[inline]
pub const fn dst(header: &Header) -> Addr {
    Addr::from_v4([header[16], header[17], header[18], header[19]])
}

/// Writes the 16-bit field at the even offset `at`, and the header checksum with it.
#[inline]
pub fn set_word(head: &mut [u8], at: usize, value: u16) {
    let delta = Delta::word(u16_at(head, at), value);
    set_u16(head, at, value);
    change_checksum(head, delta);
}

/// Writes the total length, and the header checksum with it.
#[inline]
pub fn set_total_len(head: &mut [u8], len: u16) {
    set_word(head, TOTAL_LEN, len);
}

/// Writes both addresses, the header checksum with them, and says how the sum changed.
#[inline]
pub fn set_addresses(head: &mut [u8], src: Addr, dst: Addr) -> Delta {
    let header = head.first_chunk::<HEADER_LEN>().expect("a whole IPv4 header");
    let delta = Delta::addr(self::src(header), src) + Delta::addr(self::dst(header), dst);
    replace_addresses(head, src, dst, delta);
    delta
}

/// Writes both addresses, and the header checksum by the change of the sum.
#[inline(always)]
pub fn replace_addresses(head: &mut [u8], src: Addr, dst: Addr, delta: impl Into<Folded>) {
    let header = head.first_chunk_mut::<HEADER_LEN>().expect("a whole IPv4 header");
    header[SRC..DST].copy_from_slice(&src.v4_octets());
    header[DST..].copy_from_slice(&dst.v4_octets());
    let stored = Stored::from_bytes([header[CHECKSUM], header[CHECKSUM + 1]]).changed(delta);
    header[CHECKSUM..SRC].copy_from_slice(&stored.to_bytes());
}

/// Applies a change to the header checksum.
#[inline]
pub fn change_checksum(head: &mut [u8], delta: Delta) {
    let stored = Stored(u16_at(head, CHECKSUM)).changed(delta);
    set_u16(head, CHECKSUM, stored.0);
}

/// Computes the header checksum anew: for headers made here.
pub fn fill_checksum(head: &mut [u8]) {
    let len = usize::from(head[0] & 0x0f) * 4;
    set_u16(head, CHECKSUM, 0);
    let stored = Sum::of(&head[..len]).finish();
    set_u16(head, CHECKSUM, stored.0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn a_header_is_read_field_by_field() {
        let header: Header = [0x46, 0xb9, 0x05, 0xdc, 0x12, 0x34, 0x60, 0x07, 0x3f, 0x11, 0xab, 0xcd, 10, 1, 2, 3, 192, 0, 2, 255];
        assert_eq!(header_len(&header), 24);
        assert_eq!(total_len(&header), 1500);
        assert_eq!(id(&header), 0x1234);
        assert_eq!(flags_offset(&header), DONT_FRAGMENT | MORE_FRAGMENTS | 7);
        assert_eq!(src(&header), testing::addr("10.1.2.3"));
        assert_eq!(dst(&header), testing::addr("192.0.2.255"));
    }

    #[test]
    fn setters_keep_the_header_whole() {
        let mut bytes = testing::udp("10.0.0.1:1", "10.0.0.2:2", b"data");
        for len in [20, 32, 0xffff] {
            set_total_len(&mut bytes, len);
            assert!(Sum::of(&bytes[..20]).is_whole());
        }
        set_word(&mut bytes, FLAGS_OFFSET, DONT_FRAGMENT);
        assert!(Sum::of(&bytes[..20]).is_whole());
        let incremental = bytes.clone();
        fill_checksum(&mut bytes);
        assert_eq!(bytes, incremental);
    }
}
