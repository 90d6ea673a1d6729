//! Addresses and tuples as the tables hold them: both families in one shape.
//!
//! An IPv4 address is kept as its IPv4-mapped IPv6 form (RFC 4291 §2.5.5.2), so that one flow table and one service table serve
//! both families. The mapped form never arrives on the wire as an IPv6 address: `parse` refuses such packets.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An address of either family; IPv4 in its mapped form. The integer is in host order: the first octet is the most significant.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Addr(pub u128);

const MAPPED: u128 = 0xffff_0000_0000;

impl Addr {
    /// `::`, which no packet that passes `parse` carries.
    pub const UNSPECIFIED: Addr = Addr(0);

    /// From the four octets of an IPv4 header.
    #[inline]
    pub const fn from_v4(octets: [u8; 4]) -> Addr {
        Addr(MAPPED | u32::from_be_bytes(octets) as u128)
    }

    /// From the sixteen octets of an IPv6 header.
    #[inline]
    pub const fn from_v6(octets: [u8; 16]) -> Addr {
        Addr(u128::from_be_bytes(octets))
    }

    /// Whether this is an IPv4 address.
    #[inline]
    pub const fn is_v4(self) -> bool {
        // In halves: the compiler makes less of them than of 128 bits.
        (self.0 >> 64) as u64 == 0 && (self.0 as u64) >> 32 == (MAPPED >> 32) as u64
    }

    /// The four octets of an IPv4 address; of an IPv6 address, its last four.
    #[inline]
    pub const fn v4_octets(self) -> [u8; 4] {
        (self.0 as u32).to_be_bytes()
    }

    /// The sixteen octets (the mapped form for IPv4).
    #[inline]
    pub const fn v6_octets(self) -> [u8; 16] {
        self.0.to_be_bytes()
    }

    /// The standard library's form.
    pub fn ip(self) -> IpAddr {
        if self.is_v4() { IpAddr::V4(Ipv4Addr::from(self.v4_octets())) } else { IpAddr::V6(Ipv6Addr::from(self.0)) }
    }
}

impl From<IpAddr> for Addr {
    fn from(ip: IpAddr) -> Addr {
        match ip {
            IpAddr::V4(ip) => ip.into(),
            IpAddr::V6(ip) => ip.into(),
        }
    }
}

impl From<Ipv4Addr> for Addr {
    fn from(ip: Ipv4Addr) -> Addr {
        Addr::from_v4(ip.octets())
    }
}

impl From<Ipv6Addr> for Addr {
    fn from(ip: Ipv6Addr) -> Addr {
        Addr::from_v6(ip.octets())
    }
}

impl fmt::Display for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.ip().fmt(f)
    }
}

impl fmt::Debug for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.ip().fmt(f)
    }
}

/// IP protocol numbers that the gateway knows by name (IANA "Protocol Numbers").
pub mod protocol {
    /// ICMP for IPv4.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// ICMP for IPv6.
    pub const ICMPV6: u8 = 58;
    /// SCTP.
    pub const SCTP: u8 = 132;
}

/// What names a flow's one direction: the addresses, ports and protocol of its packets as they arrive.
///
/// For an ICMP echo request the identifier is the source port and the destination port is 0; for a reply it is the other way
/// round, so that a reply's tuple is the request's tuple reversed. Protocols without ports have 0 for both.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Tuple {
    /// Source address.
    pub src: Addr,
    /// Destination address.
    pub dst: Addr,
    /// Source port, or the identifier of an echo request.
    pub src_port: u16,
    /// Destination port, or the identifier of an echo reply.
    pub dst_port: u16,
    /// IP protocol number, see [`protocol`].
    pub protocol: u8,
}

impl Tuple {
    /// The same tuple as the answer's packets carry it.
    #[inline]
    pub const fn reversed(self) -> Tuple {
        Tuple { src: self.dst, dst: self.src, src_port: self.dst_port, dst_port: self.src_port, protocol: self.protocol }
    }

    /// Whether it is of IPv4.
    #[inline]
    pub const fn is_v4(self) -> bool {
        self.dst.is_v4()
    }
}

impl fmt::Debug for Tuple {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}:{} > {}:{}", self.protocol, self.src, self.src_port, self.dst, self.dst_port)
    }
}
