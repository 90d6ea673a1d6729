//! What both families have: version, addresses, TTL, traffic class, and the scope of an address.
//!
//! The functions on packets look at the version themselves and take any slice that begins with a whole IP header.
//!
//! Read first: RFC 791 §3.1, RFC 8200 §3, RFC 3168 §5 for ECN, RFC 6890 for scopes.

use super::checksum::{Delta, Folded};
use super::{ipv4, ipv6};
use crate::addr::Addr;

/// The two low bits of the traffic class (RFC 3168 §5).
pub const ECN_MASK: u8 = 0b11;
/// The sender does not understand congestion marks.
pub const ECN_NOT_ECT: u8 = 0b00;
/// The sender understands congestion marks.
pub const ECN_ECT_0: u8 = 0b10;
/// The sender understands congestion marks, and means something by saying it this way (RFC 9331).
pub const ECN_ECT_1: u8 = 0b01;
/// Congestion was met.
pub const ECN_CE: u8 = 0b11;

/// An IP version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// An address's.
    #[inline]
    pub const fn of(addr: Addr) -> Family {
        if addr.is_v4() { Family::V4 } else { Family::V6 }
    }

    /// A packet's, by its version field.
    #[inline]
    pub fn of_packet(bytes: &[u8]) -> Option<Family> {
        match bytes.first()? >> 4 {
            4 => Some(Family::V4),
            6 => Some(Family::V6),
            _ => None,
        }
    }
}

/// Whom an address can name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// One host, at any distance.
    Unicast,
    /// Nobody: `0.0.0.0/8` (the kernel's `ipv4_is_zeronet`) or `::`.
    Unspecified,
    /// The host itself: `127.0.0.0/8` or `::1`.
    Loopback,
    /// A host on the same link: `169.254.0.0/16` or `fe80::/10`.
    LinkLocal,
    /// A group: `224.0.0.0/4` or `ff00::/8`.
    Multicast,
    /// Everybody on the link: `255.255.255.255`.
    Broadcast,
}

/// Whether an IPv4 address that begins with this octet is unicast, whatever follows.
const PLAIN: [bool; 256] = {
    let mut plain = [true; 256];
    (plain[0], plain[127], plain[169], plain[255]) = (false, false, false, false);
    let mut multicast = 224;
    while multicast < 240 {
        plain[multicast] = false;
        multicast += 1;
    }
    plain
};

impl Scope {
    /// An address's scope. `240.0.0.0/4` counts as unicast: clusters short of addresses use it for pods.
    #[inline]
    pub fn of(addr: Addr) -> Scope {
        if addr.is_v4() {
            let first = (addr.0 as u32 >> 24) as u8;
            // One look for what nearly every address is.
            if PLAIN[usize::from(first)] {
                return Scope::Unicast;
            }
            match addr.v4_octets() {
                [0, ..] => Scope::Unspecified,
                [127, ..] => Scope::Loopback,
                [169, 254, ..] => Scope::LinkLocal,
                [224..=239, ..] => Scope::Multicast,
                [255, 255, 255, 255] => Scope::Broadcast,
                _ => Scope::Unicast,
            }
        } else {
            match addr.0 {
                0 => Scope::Unspecified,
                1 => Scope::Loopback,
                bits if bits >> 118 == 0xfe80 >> 6 => Scope::LinkLocal,
                bits if bits >> 120 == 0xff => Scope::Multicast,
                _ => Scope::Unicast,
            }
        }
    }
}

/// Writes the TTL or hop limit.
#[inline]
pub fn set_ttl(head: &mut [u8], ttl: u8) {
    match Family::of_packet(head) {
        Some(Family::V4) => ipv4::set_word(head, ipv4::TTL, u16::from_be_bytes([ttl, head[ipv4::PROTOCOL]])),
        _ => head[ipv6::HOP_LIMIT] = ttl,
    }
}

/// Reads DSCP and ECN.
#[inline]
pub fn traffic_class(head: &[u8]) -> u8 {
    match Family::of_packet(head) {
        Some(Family::V4) => head[ipv4::TRAFFIC_CLASS],
        _ => head[0] << 4 | head[1] >> 4,
    }
}

/// Writes DSCP and ECN.
#[inline]
pub fn set_traffic_class(head: &mut [u8], traffic_class: u8) {
    match Family::of_packet(head) {
        Some(Family::V4) => ipv4::set_word(head, 0, u16::from_be_bytes([head[0], traffic_class])),
        _ => {
            head[0] = 0x60 | traffic_class >> 4;
            head[1] = traffic_class << 4 | head[1] & 0x0f;
        }
    }
}

/// Writes ECN and leaves DSCP.
#[inline]
pub fn set_ecn(head: &mut [u8], ecn: u8) {
    let old = traffic_class(head);
    if old & ECN_MASK != ecn {
        set_traffic_class(head, old & !ECN_MASK | ecn);
    }
}

/// Says that congestion was met.
#[inline]
pub fn set_ecn_ce(head: &mut [u8]) {
    set_ecn(head, ECN_CE);
}

/// Writes both addresses, the IPv4 header checksum with them, and says how the sum changed, for the transport checksum.
#[inline]
pub fn set_addresses(head: &mut [u8], src: Addr, dst: Addr) -> Delta {
    debug_assert_eq!(src.is_v4(), dst.is_v4(), "translation stays within a family");
    match Family::of_packet(head) {
        Some(Family::V4) => ipv4::set_addresses(head, src, dst),
        _ => ipv6::set_addresses(head, src, dst),
    }
}

/// [`set_addresses`] where it is known how the sum changes.
#[inline]
pub fn replace_addresses(head: &mut [u8], src: Addr, dst: Addr, delta: Folded) {
    match Family::of_packet(head) {
        Some(Family::V4) => ipv4::replace_addresses(head, src, dst, delta),
        _ => ipv6::replace_addresses(head, src, dst),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{self, addr};

    #[test]
    fn scopes_of_addresses() {
        for (text, scope) in [
            ("10.0.0.1", Scope::Unicast),
            ("240.0.0.1", Scope::Unicast),
            ("255.255.255.254", Scope::Unicast),
            ("0.0.0.0", Scope::Unspecified),
            ("0.1.2.3", Scope::Unspecified),
            ("127.9.9.9", Scope::Loopback),
            ("169.254.169.254", Scope::LinkLocal),
            ("169.253.0.1", Scope::Unicast),
            ("224.0.0.1", Scope::Multicast),
            ("239.255.255.255", Scope::Multicast),
            ("255.255.255.255", Scope::Broadcast),
            ("fd00::1", Scope::Unicast),
            ("2001:db8::1", Scope::Unicast),
            ("::", Scope::Unspecified),
            ("::1", Scope::Loopback),
            ("::2", Scope::Unicast),
            ("fe80::1", Scope::LinkLocal),
            ("febf:ffff::1", Scope::LinkLocal),
            ("fec0::1", Scope::Unicast),
            ("ff02::1", Scope::Multicast),
        ] {
            assert_eq!(Scope::of(addr(text)), scope, "{text}");
        }
    }

    #[test]
    fn ttl_and_traffic_class_change_alone_and_leave_the_packet_whole() {
        for (from, to) in [("10.0.0.1:1", "10.0.0.2:2"), ("[fd00::1]:1", "[fd00::2]:2")] {
            let plain = testing::udp(from, to, b"data");
            for value in [0u8, 1, 0x2e, 0x7f, 0xb9, 0xff] {
                let mut bytes = plain.clone();
                set_ttl(&mut bytes, value);
                assert_eq!(bytes, testing::with_ttl(plain.clone(), value));
                let mut bytes = plain.clone();
                set_traffic_class(&mut bytes, value);
                assert_eq!(traffic_class(&bytes), value);
                assert_eq!(bytes, testing::with_traffic_class(plain.clone(), value));
                set_ecn_ce(&mut bytes);
                assert_eq!(traffic_class(&bytes), value | 3);
                testing::verify(&bytes);
            }
        }
    }

    #[test]
    fn an_ipv6_flow_label_survives_a_change_of_traffic_class() {
        let mut bytes = testing::udp("[fd00::1]:1", "[fd00::2]:2", b"data");
        bytes[1..4].copy_from_slice(&[0x0a, 0xbc, 0xde]);
        set_traffic_class(&mut bytes, 0xff);
        assert_eq!(bytes[..4], [0x6f, 0xfa, 0xbc, 0xde]);
    }
}
