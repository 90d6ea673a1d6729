//! The VXLAN-GPE header.
//!
//! ```text
//!  0                   1                   2                   3
//!  0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
//! +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
//! |R|R|Ver|I|P|B|O|       Reserved                | Next Protocol |
//! |                VXLAN Network Identifier (VNI) |   Reserved    |
//! ```
//!
//! Read first: draft-ietf-nvo3-vxlan-gpe-13 §3; Linux `include/net/vxlan.h` (`struct vxlanhdr_gpe`) and `vxlan_rcv`, which drops
//! what has any bit beside I, P, the next protocol and the VNI; what is written here has no other.

/// Bytes of the header.
pub const HEADER_LEN: usize = 8;

/// Offset of the flags and the version.
pub const FLAGS: usize = 0;
/// Offset of the next protocol.
pub const NEXT_PROTOCOL: usize = 3;
/// Offset of the VNI's three octets.
pub const VNI: usize = 4;

/// Flag: the VNI counts.
pub const FLAG_VNI: u8 = 0x08;
/// Flag: the next protocol counts.
pub const FLAG_NEXT_PROTOCOL: u8 = 0x04;

/// Next protocol: IPv4.
pub const IPV4: u8 = 1;
/// Next protocol: IPv6.
pub const IPV6: u8 = 2;

/// The VNI that a header names; `None` if it is cut short.
#[inline]
pub fn vni(header: &[u8]) -> Option<u32> {
    let [a, b, c] = *header.get(VNI..)?.first_chunk()?;
    Some(u32::from_be_bytes([0, a, b, c]))
}

/// A header.
pub type Header = [u8; HEADER_LEN];

/// The header for `vni` (24 bits) and `next_protocol`.
#[inline]
pub const fn header(vni: u32, next_protocol: u8) -> Header {
    let [_, a, b, c] = vni.to_be_bytes();
    [FLAG_VNI | FLAG_NEXT_PROTOCOL, 0, 0, next_protocol, a, b, c, 0]
}
