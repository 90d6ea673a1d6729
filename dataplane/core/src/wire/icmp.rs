//! The headers of ICMP and ICMPv6, as far as the gateway reads and writes them.
//!
//! Read first: RFC 792, RFC 4443; RFC 6633 (source quench is no more).

/// Bytes of the header of echo messages and errors; an error's quote follows.
pub const HEADER_LEN: usize = 8;
/// Bytes of a quoted packet behind its IP header that every error has (RFC 792; RFC 4443 §2.4 (c) asks for more).
pub const QUOTE_PAYLOAD_LEN_MIN: usize = 8;

/// Offset of the type.
pub const TYPE: usize = 0;
/// Offset of the code.
pub const CODE: usize = 1;
/// Offset of the checksum.
pub const CHECKSUM: usize = 2;
/// Offset of an echo's identifier.
pub const ECHO_ID: usize = 4;
/// Offset of an echo's sequence number.
pub const ECHO_SEQUENCE: usize = 6;

/// Types and codes of ICMP.
pub mod v4 {
    /// Echo reply.
    pub const ECHO_REPLY: u8 = 0;
    /// Destination unreachable.
    pub const UNREACHABLE: u8 = 3;
    /// Redirect.
    pub const REDIRECT: u8 = 5;
    /// Echo request.
    pub const ECHO_REQUEST: u8 = 8;
    /// Time exceeded.
    pub const TIME_EXCEEDED: u8 = 11;
    /// Parameter problem.
    pub const PARAMETER_PROBLEM: u8 = 12;

    /// Code of [`UNREACHABLE`]: host.
    pub const CODE_HOST: u8 = 1;
    /// Code of [`UNREACHABLE`]: protocol.
    pub const CODE_PROTOCOL: u8 = 2;
    /// Code of [`UNREACHABLE`]: port.
    pub const CODE_PORT: u8 = 3;
    /// Code of [`UNREACHABLE`]: too big, and DF is set (RFC 1191).
    pub const CODE_FRAGMENTATION_NEEDED: u8 = 4;
    /// Code of [`UNREACHABLE`]: administratively prohibited (RFC 1812 §5.2.7.1).
    pub const CODE_PROHIBITED: u8 = 13;
}

/// Types and codes of ICMPv6.
pub mod v6 {
    /// Destination unreachable.
    pub const UNREACHABLE: u8 = 1;
    /// Packet too big.
    pub const PACKET_TOO_BIG: u8 = 2;
    /// Time exceeded.
    pub const TIME_EXCEEDED: u8 = 3;
    /// Parameter problem.
    pub const PARAMETER_PROBLEM: u8 = 4;
    /// Echo request.
    pub const ECHO_REQUEST: u8 = 128;
    /// Echo reply.
    pub const ECHO_REPLY: u8 = 129;
    /// Router solicitation (RFC 4861).
    pub const ROUTER_SOLICITATION: u8 = 133;
    /// Router advertisement (RFC 4861).
    pub const ROUTER_ADVERTISEMENT: u8 = 134;
    /// Neighbour solicitation (RFC 4861).
    pub const NEIGHBOUR_SOLICITATION: u8 = 135;
    /// Neighbour advertisement (RFC 4861).
    pub const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
    /// Redirect (RFC 4861).
    pub const REDIRECT: u8 = 137;

    /// Code of [`UNREACHABLE`]: no route.
    pub const CODE_NO_ROUTE: u8 = 0;
    /// Code of [`UNREACHABLE`]: administratively prohibited.
    pub const CODE_PROHIBITED: u8 = 1;
    /// Code of [`UNREACHABLE`]: address.
    pub const CODE_ADDRESS: u8 = 3;
    /// Code of [`UNREACHABLE`]: port.
    pub const CODE_PORT: u8 = 4;
}
