//! Wire formats: where bytes become fields and fields become bytes. Byte order is crossed here and nowhere else.
//!
//! Each module holds the constants and plain accessors of one header, over slices whose length the caller has checked: on the
//! packet path that is [`crate::parse`], once. Setters of fields that a checksum covers keep the IPv4 header checksum right by the
//! change alone ([`checksum::Delta`]), so a header that arrived wrong leaves wrong.

pub mod checksum;
pub mod icmp;
pub mod ip;
pub mod ipv4;
pub mod ipv6;
pub mod tcp;
pub mod udp;
pub mod vxlan_gpe;

/// The 16-bit number at `at`.
#[inline]
pub fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

/// The 32-bit number at `at`.
#[inline]
pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) << 16 | u32::from(u16_at(bytes, at + 2))
}

/// Writes a 16-bit number at `at`.
#[inline]
pub fn set_u16(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

/// Writes a 32-bit number at `at`.
#[inline]
pub fn set_u32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
}
