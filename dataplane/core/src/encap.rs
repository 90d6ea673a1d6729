//! Into the overlay: the VXLAN-GPE header, what the outer headers cost, and what of the inner packet shows outside.
//!
//! The kernel writes the outer IP and UDP headers; this module says what goes into them. Nothing here touches the inner packet.
//!
//! Read first: draft-ietf-nvo3-vxlan-gpe-13 §3, RFC 6040 §4.1, RFC 2983.

use std::net::IpAddr;

use crate::parse::Parsed;
use crate::wire::ip::Family;
use crate::wire::{ipv4, ipv6, udp, vxlan_gpe};

/// Bytes of the VXLAN-GPE header.
pub const HEADER_LEN: usize = vxlan_gpe::HEADER_LEN;

/// Writes the VXLAN-GPE header of an inner packet of `family`. `vni` has 24 bits.
#[inline]
pub fn write_header(out: &mut [u8; HEADER_LEN], vni: u32, family: Family) {
    *out = vxlan_gpe::header(vni, if family == Family::V4 { vxlan_gpe::IPV4 } else { vxlan_gpe::IPV6 });
}

/// The outer traffic class of an inner packet: ECN copied (RFC 6040 §4.1, normal mode), DSCP copied (RFC 2983 §3, uniform model).
#[inline]
pub const fn outer_traffic_class(inner: u8) -> u8 {
    inner
}

/// Bytes that the overlay adds to each packet towards `underlay`: outer IP, UDP and VXLAN-GPE.
pub const fn overhead(underlay: IpAddr) -> u32 {
    let ip = match underlay {
        IpAddr::V4(_) => ipv4::HEADER_LEN,
        IpAddr::V6(_) => ipv6::HEADER_LEN,
    };
    (ip + udp::HEADER_LEN + HEADER_LEN) as u32
}

/// A number for the packet's flow, to choose the outer source port by, so that networks and receivers can spread flows. It need not
/// resist an adversary: who controls it controls only the spread of his own flows.
///
/// Fragments of one datagram take one way, so only what all of them show counts for them: the addresses.
#[inline]
pub fn entropy(parsed: &Parsed) -> u32 {
    let tuple = &parsed.tuple;
    let rest = match parsed.fragment {
        Some(_) => 0,
        None => u64::from(tuple.src_port) << 32 | u64::from(tuple.dst_port) << 16 | u64::from(tuple.protocol),
    };
    let fold = |number: u128| (number >> 64) as u64 ^ number as u64;
    let mut hash = mix(fold(tuple.src.0) ^ SEEDS[0], fold(tuple.dst.0) ^ SEEDS[1]);
    hash = mix(hash ^ rest, SEEDS[2]);
    (hash >> 32) as u32 ^ hash as u32
}

/// Odd numbers without a pattern: the fractions of the square roots of 2, 3 and 5.
const SEEDS: [u64; 3] = [0x6a09_e667_f3bc_c909, 0xbb67_ae85_84ca_a73b, 0x3c6e_f372_fe94_f82b];

/// Both halves of a product: every bit of either factor reaches the result.
#[inline]
fn mix(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    (product >> 64) as u64 ^ product as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::Ingress;
    use crate::parse::parse;
    use crate::testing;

    #[test]
    fn the_header_has_the_bits_that_linux_takes_and_no_other() {
        let mut header = [0xff; 8];
        write_header(&mut header, 42, Family::V4);
        assert_eq!(header, [0x0c, 0, 0, 1, 0, 0, 42, 0]);
        write_header(&mut header, 0xab_cdef, Family::V6);
        assert_eq!(header, [0x0c, 0, 0, 2, 0xab, 0xcd, 0xef, 0]);
    }

    #[test]
    fn overhead_by_family_of_the_underlay() {
        assert_eq!(overhead("192.0.2.1".parse().unwrap()), 36);
        assert_eq!(overhead("2001:db8::1".parse().unwrap()), 56);
    }

    fn entropy_of(mut bytes: Vec<u8>) -> u32 {
        entropy(&parse(&testing::packet(&mut bytes, Ingress::Pods)).unwrap())
    }

    #[test]
    fn all_fragments_of_a_datagram_have_one_entropy() {
        for (from, to) in [("10.0.0.1:1", "10.0.0.2:2"), ("[fd00::1]:1", "[fd00::2]:2")] {
            let cut = testing::fragments(&testing::udp(from, to, &[0; 5000]), 1280, 7);
            let first = entropy_of(cut[0].clone());
            assert!(cut.len() > 3 && cut.into_iter().all(|bytes| entropy_of(bytes) == first));
        }
    }

    #[test]
    fn flows_spread_evenly_over_few_sockets() {
        for host in ["10.0.0.", "fd00::"] {
            let mut sockets = [0u32; 16];
            for peer in 1..=64 {
                for port in 0..64u16 {
                    let socket = |host: String, port: u16| std::net::SocketAddr::new(host.parse().unwrap(), port).to_string();
                    let bytes = testing::udp(&socket(format!("{host}1"), 32768 + port), &socket(format!("{host}{peer}"), 53), b"");
                    sockets[entropy_of(bytes) as usize % 16] += 1;
                }
            }
            // 256 each on average, standard deviation 15.5.
            assert!(sockets.iter().all(|count| (180..332).contains(count)), "{sockets:?}");
        }
    }
}
