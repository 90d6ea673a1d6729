//! For tests: somebody else's opinion of a packet, and packets of every kind.

use proptest::prelude::*;

use crate::testing;

/// Endpoints for a flow.
pub(crate) fn ends(v4: bool) -> (&'static str, &'static str) {
    if v4 { ("10.0.0.1:1234", "10.0.1.2:80") } else { ("[fd00::1]:1234", "[fd00:1::2]:80") }
}

/// Bytes that differ from place to place.
pub(crate) fn payload(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 7 + at / 251) as u8).collect()
}

/// Every length and checksum, by somebody else's code.
#[track_caller]
pub(crate) fn etherparse_agrees(bytes: &[u8]) {
    use etherparse::{NetHeaders, PacketHeaders, TransportHeader};
    let packet = PacketHeaders::from_ip_slice(bytes).expect("etherparse takes it");
    let payload = packet.payload.slice();
    let (found, expected) = match (packet.net.as_ref().expect("an IP header"), packet.transport.as_ref()) {
        (NetHeaders::Ipv4(ip, _), transport) => {
            assert_eq!(usize::from(ip.total_len), bytes.len());
            assert_eq!(ip.header_checksum, ip.calc_header_checksum());
            match transport {
                Some(TransportHeader::Tcp(tcp)) => (tcp.checksum, tcp.calc_checksum_ipv4(ip, payload).unwrap()),
                Some(TransportHeader::Udp(udp)) => (udp.checksum, udp.calc_checksum_ipv4(ip, payload).unwrap()),
                Some(TransportHeader::Icmpv4(icmp)) => (icmp.checksum, icmp.icmp_type.calc_checksum(payload)),
                _ => (0, 0),
            }
        }
        (NetHeaders::Ipv6(ip, _), transport) => {
            assert_eq!(usize::from(ip.payload_length) + 40, bytes.len());
            match transport {
                Some(TransportHeader::Tcp(tcp)) => (tcp.checksum, tcp.calc_checksum_ipv6(ip, payload).unwrap()),
                Some(TransportHeader::Udp(udp)) => (udp.checksum, udp.calc_checksum_ipv6(ip, payload).unwrap()),
                Some(TransportHeader::Icmpv6(icmp)) => (icmp.checksum, icmp.icmp_type.calc_checksum(ip.source, ip.destination, payload).unwrap()),
                _ => (0, 0),
            }
        }
        _ => panic!("neither IPv4 nor IPv6"),
    };
    assert_eq!(found, expected, "transport checksum");
}

/// A packet of some kind with some bytes overwritten, so that much of it still parses.
pub(crate) fn any_packet() -> impl Strategy<Value = Vec<u8>> {
    let (v4, v6) = (ends(true), ends(false));
    let mut kinds = Vec::new();
    for ((src, dst), (a, b)) in [(v4, ("10.0.0.1", "10.0.1.2")), (v6, ("fd00::1", "fd00:1::2"))] {
        let segment = testing::tcp_with_options(src, dst, 0x10, &[1; 12], &payload(300));
        kinds.push(testing::icmp_error(b, a, if a.contains(':') { 1 } else { 3 }, 1, 0, &segment));
        kinds.push(segment);
        kinds.push(testing::udp(src, dst, &payload(200)));
        kinds.push(testing::echo_request(a, b, 1, 2, &payload(64)));
        kinds.extend(testing::fragments(&testing::udp(src, dst, &payload(2000)), 1280, 5));
    }
    kinds.push(testing::with_extension(&testing::with_extension(&testing::udp(v6.0, v6.1, b"x"), 60, &[1, 4, 0, 0, 0, 0]), 0, &[1, 4, 0, 0, 0, 0]));
    let edits = prop::collection::vec((0usize..100, any::<u8>()), 0..6);
    (prop::sample::select(kinds), edits, 0usize..40).prop_map(|(mut bytes, edits, cut)| {
        for (at, value) in edits {
            if let Some(byte) = bytes.get_mut(at) {
                *byte = value;
            }
        }
        let len = bytes.len() - cut.min(bytes.len());
        if cut > 30 {
            bytes.truncate(len);
        }
        bytes
    })
}
