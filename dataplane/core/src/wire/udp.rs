//! The UDP header.
//!
//! Read first: RFC 768; RFC 8200 §8.1 (a checksum is required over IPv6).

/// Bytes of the header.
pub const HEADER_LEN: usize = 8;

/// Offset of the source port; the destination port follows.
pub const PORTS: usize = 0;
/// Offset of the length of header and payload.
pub const LEN: usize = 4;
/// Offset of the checksum.
pub const CHECKSUM: usize = 6;
