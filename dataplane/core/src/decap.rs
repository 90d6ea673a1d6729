//! Out of the overlay: is this a datagram of ours, and what does the outer header's congestion mark mean for the inner one.
//!
//! As strict as Linux's `vxlan_rcv` for GPE devices: a bit that means nothing today refuses the packet, so that it can mean something
//! tomorrow. Who may send which inner source is the pipeline's to judge.
//!
//! Read first: draft-ietf-nvo3-vxlan-gpe-13 §3, RFC 6040 §4.2.

use crate::packet::Network;
use crate::snapshot::Vnis;
use crate::verdict::DropReason;
use crate::wire::ip::{ECN_CE, ECN_ECT_0, ECN_ECT_1, ECN_MASK, ECN_NOT_ECT, Family};
use crate::wire::vxlan_gpe;

/// Checks the overlay header of a UDP payload, and says where the inner IP header starts.
#[inline]
pub fn open(datagram: &[u8], vni: u32) -> Result<usize, DropReason> {
    let (header, inner) = datagram.split_first_chunk::<{ vxlan_gpe::HEADER_LEN }>().ok_or(DropReason::Truncated)?;
    let next_protocol = match Family::of_packet(inner) {
        Some(Family::V4) => vxlan_gpe::IPV4,
        Some(Family::V6) => vxlan_gpe::IPV6,
        None if inner.is_empty() => return Err(DropReason::Truncated),
        None => return Err(DropReason::OverlayBadHeader),
    };
    // Version 0, I and P set, B (a broadcast copy) and O (not a packet but a message about the overlay) clear, the right VNI, the
    // next protocol that is there: one comparison with the header that we would write.
    if *header == vxlan_gpe::header(vni, next_protocol) { Ok(vxlan_gpe::HEADER_LEN) } else { Err(DropReason::OverlayBadHeader) }
}

/// By which network of the overlay a UDP payload came: that of the VNI that it names, if `vnis` has it.
#[inline]
pub fn network(datagram: &[u8], vnis: &Vnis) -> Network {
    let direct = vnis.direct_return.is_some() && vxlan_gpe::vni(datagram) == vnis.direct_return;
    if direct { Network::DirectReturn } else { Network::Cluster }
}

/// The ECN to write into the inner header of a packet that arrives with `outer_ecn` outside (RFC 6040 §4.2, figure 4).
#[inline]
pub fn ecn(inner_traffic_class: u8, outer_ecn: u8) -> Result<u8, DropReason> {
    let inner = inner_traffic_class & ECN_MASK;
    match (inner, outer_ecn & ECN_MASK) {
        (ECN_NOT_ECT, ECN_CE) => Err(DropReason::OverlayCongestion),
        (ECN_NOT_ECT, _) => Ok(ECN_NOT_ECT),
        (_, ECN_CE) => Ok(ECN_CE),
        (ECN_ECT_0, ECN_ECT_1) => Ok(ECN_ECT_1),
        _ => Ok(inner),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VNI: u32 = 0x12_3456;
    const V4: [u8; 9] = [0x0c, 0, 0, 1, 0x12, 0x34, 0x56, 0, 0x45];
    const V6: [u8; 9] = [0x0c, 0, 0, 2, 0x12, 0x34, 0x56, 0, 0x60];

    #[test]
    fn what_linux_sends_is_opened() {
        // `ip link add … type vxlan gpe external`, routes with `encap ip id 42`: headers as captured, and the inner version octet.
        assert_eq!(open(&[0x0c, 0, 0, 1, 0, 0, 42, 0, 0x45], 42), Ok(8));
        assert_eq!(open(&[0x0c, 0, 0, 2, 0, 0, 42, 0, 0x60], 42), Ok(8));
        assert_eq!(open(&V4, VNI), Ok(8));
        assert_eq!(open(&V6, VNI), Ok(8));
    }

    #[test]
    fn every_other_bit_of_the_header_is_refused() {
        for good in [V4, V6] {
            for bit in 0..64 {
                let mut bad = good;
                bad[bit / 8] ^= 0x80 >> (bit % 8);
                assert_eq!(open(&bad, VNI), Err(DropReason::OverlayBadHeader), "bit {bit}");
            }
        }
    }

    #[test]
    fn the_next_protocol_must_be_what_is_inside() {
        for (next_protocol, first) in [(1, 0x60), (2, 0x45), (3, 0x45), (1, 0x00)] {
            let mut bad = V4;
            bad[3] = next_protocol;
            bad[8] = first;
            assert_eq!(open(&bad, VNI), Err(DropReason::OverlayBadHeader));
        }
    }

    #[test]
    fn a_header_with_nothing_behind_it_is_truncated() {
        for len in 0..=8 {
            assert_eq!(open(&V4[..len], VNI), Err(DropReason::Truncated), "{len}");
        }
    }

    #[test]
    fn figure_4_of_rfc_6040() {
        const NOT: u8 = ECN_NOT_ECT;
        const E0: u8 = ECN_ECT_0;
        const E1: u8 = ECN_ECT_1;
        const CE: u8 = ECN_CE;
        let drop = Err(DropReason::OverlayCongestion);
        for (inner, by_outer) in [
            (NOT, [Ok(NOT), Ok(NOT), Ok(NOT), drop]),
            (E0, [Ok(E0), Ok(E0), Ok(E1), Ok(CE)]),
            (E1, [Ok(E1), Ok(E1), Ok(E1), Ok(CE)]),
            (CE, [Ok(CE), Ok(CE), Ok(CE), Ok(CE)]),
        ] {
            for (outer, expected) in [NOT, E0, E1, CE].into_iter().zip(by_outer) {
                assert_eq!(ecn(0xb8 | inner, outer), expected, "inner {inner:02b} outer {outer:02b}");
            }
        }
    }
}
