//! What translation must come to is known: the packet that a sender with the new addresses and ports would have made. Every test
//! compares with that packet, byte for byte.

use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use proptest::prelude::*;

use super::*;
use crate::packet::Ingress;
use crate::parse::parse;
use crate::testing::{self, flags};

/// A flow's endpoints before and after translation, as text.
#[derive(Clone, Debug)]
struct Case {
    from: [String; 2],
    to: [String; 2],
}

impl Case {
    fn new(from: [&str; 2], to: [&str; 2]) -> Case {
        Case { from: from.map(String::from), to: to.map(String::from) }
    }

    fn both() -> [Case; 2] {
        [
            Case::new(["10.1.1.2:40000", "10.96.0.10:53"], ["10.1.1.2:40000", "10.1.2.9:5353"]),
            Case::new(["[fd01::2]:40000", "[fd00:96::a]:53"], ["[fd01::1]:1024", "[fd02::9]:5353"]),
        ]
    }

    fn hosts(pair: &[String; 2]) -> [String; 2] {
        pair.each_ref().map(|endpoint| endpoint.parse::<std::net::SocketAddr>().unwrap().ip().to_string())
    }

    fn is_v4(&self) -> bool {
        self.from[0].starts_with(|first: char| first.is_ascii_digit())
    }
}

fn tuple(protocol: u8, pair: &[String; 2]) -> Tuple {
    testing::tuple(protocol, &pair[0], &pair[1])
}

fn parsed(bytes: &[u8]) -> Parsed {
    parse(&testing::packet(&mut bytes.to_vec(), Ingress::Pods)).unwrap()
}

#[track_caller]
fn assert_translates(from: &[u8], to: &[u8], checksum: Checksum, tuple: &Tuple) {
    let before = parsed(from);
    let mut bytes = from.to_vec();
    translate(&mut bytes, &before, checksum, tuple);
    assert_eq!(bytes, to, "{tuple:?}\n left: {bytes:02x?}\nright: {to:02x?}");
    translate(&mut bytes, &before, checksum, &before.tuple);
    assert_eq!(bytes, from, "undone");
    if matches!(before.transport_kind, Transport::Tcp { .. } | Transport::Udp) {
        translate_known(&mut bytes, &before, checksum, tuple, Change::new(&before.tuple, tuple));
        assert_eq!(bytes, to, "by a change that was known: {tuple:?}");
        translate_known(&mut bytes, &before, checksum, &before.tuple, Change::new(tuple, &before.tuple));
        assert_eq!(bytes, from, "undone by a change that was known");
    }
}

#[test]
fn a_datagram_to_a_vip_as_bytes() {
    // IPv4 header checksum and UDP checksum, before and after, worked out apart from this crate.
    let before =
        [0x45, 0, 0, 0x1e, 0, 1, 0x40, 0, 0x40, 0x11, 0x25, 0x62, 10, 1, 1, 2, 10, 0x60, 0, 10, 0x9c, 0x40, 0, 53, 0, 10, 0xe5, 0x8e, 0x68, 0x69];
    let after =
        [0x45, 0, 0, 0x1e, 0, 1, 0x40, 0, 0x40, 0x11, 0x23, 0xc2, 10, 1, 1, 2, 10, 1, 2, 9, 0x9c, 0x40, 0x14, 0xe9, 0, 10, 0xcf, 0x3a, 0x68, 0x69];
    testing::verify(&before);
    testing::verify(&after);
    assert_translates(&before, &after, Checksum::Full, &testing::tuple(protocol::UDP, "10.1.1.2:40000", "10.1.2.9:5353"));
}

fn check_all(case: &Case, payload: &[u8]) {
    let [from, to] = [&case.from, &case.to];
    let segments = [from, to].map(|pair| testing::tcp(&pair[0], &pair[1], flags::ACK, payload));
    let datagrams = [from, to].map(|pair| testing::udp(&pair[0], &pair[1], payload));
    let (tcp, udp) = (tuple(protocol::TCP, to), tuple(protocol::UDP, to));
    assert_translates(&segments[0], &segments[1], Checksum::Full, &tcp);
    assert_translates(&datagrams[0], &datagrams[1], Checksum::Full, &udp);
    assert_translates(&testing::partial(&segments[0]), &testing::partial(&segments[1]), Checksum::Partial, &tcp);
    assert_translates(&testing::partial(&datagrams[0]), &testing::partial(&datagrams[1]), Checksum::Partial, &udp);
    if case.is_v4() {
        let [from, to] = [from, to].map(|pair| testing::udp_unsummed(&pair[0], &pair[1], payload));
        assert_translates(&from, &to, Checksum::Full, &udp);
    }
    // Echo: the identifier is the source port of the request, and of the reply the destination port.
    let ports = [from, to].map(|pair| tuple(0, pair).src_port);
    let hosts = [from, to].map(Case::hosts);
    let echo = if case.is_v4() { protocol::ICMP } else { protocol::ICMPV6 };
    let [from, to] = [0, 1].map(|side| testing::echo_request(&hosts[side][0], &hosts[side][1], ports[side], 1, payload));
    assert_translates(&from, &to, Checksum::Full, &Tuple { dst_port: 0, ..tuple(echo, &case.to) });
    let [from, to] = [0, 1].map(|side| testing::echo_reply(&hosts[side][1], &hosts[side][0], ports[side], 1, payload));
    assert_translates(&from, &to, Checksum::Full, &Tuple { dst_port: 0, ..tuple(echo, &case.to) }.reversed());
    // Other ICMP messages and other protocols: addresses alone.
    for number in [protocol::SCTP, 47] {
        let [from, to] = [0, 1].map(|side| testing::ip(&hosts[side][0], &hosts[side][1], number, payload));
        assert_translates(&from, &to, Checksum::Full, &Tuple { src_port: 0, dst_port: 0, ..tuple(number, &case.to) });
    }
    let [from, to] = [0, 1].map(|side| testing::icmp(&hosts[side][0], &hosts[side][1], 200, 0, 0, payload));
    assert_translates(&from, &to, Checksum::Full, &Tuple { src_port: 0, dst_port: 0, ..tuple(echo, &case.to) });
}

#[test]
fn every_protocol_comes_out_as_if_sent_so() {
    for case in Case::both() {
        check_all(&case, b"some data");
        check_all(&case, b"");
    }
}

#[test]
fn a_superframe_costs_no_look_at_its_payload() {
    for case in Case::both() {
        let [whole, expected] = [&case.from, &case.to].map(|pair| testing::tcp(&pair[0], &pair[1], flags::ACK, &vec![0xa5; 60_000]));
        let before = parsed(&whole);
        let mut headers = whole[..whole.len() - 60_000].to_vec();
        translate(&mut headers, &before, Checksum::Full, &tuple(protocol::TCP, &case.to));
        assert_eq!(headers, expected[..headers.len()]);
    }
}

#[test]
fn fragments_come_out_as_fragments_of_the_translated_datagram() {
    for case in Case::both() {
        let cut = [&case.from, &case.to].map(|pair| testing::fragments(&testing::udp(&pair[0], &pair[1], &[0x5a; 4000]), 1280, 99));
        for (from, to) in cut[0].iter().zip(&cut[1]) {
            assert_translates(from, to, Checksum::Full, &tuple(protocol::UDP, &case.to));
        }
        let big = [&case.from, &case.to].map(|pair| testing::tcp(&pair[0], &pair[1], flags::PSH, &[0x5a; 4000]));
        let cut = big.map(|bytes| testing::fragments(&bytes, 1280, 99));
        for (from, to) in cut[0].iter().zip(&cut[1]) {
            assert_translates(from, to, Checksum::Full, &tuple(protocol::TCP, &case.to));
        }
    }
}

#[test]
fn headers_behind_ipv6_extensions_are_translated() {
    let case = &Case::both()[1];
    let [from, to] = [&case.from, &case.to].map(|pair| {
        let bytes = testing::with_extension(&testing::udp(&pair[0], &pair[1], b"data"), 60, &[1, 4, 0, 0, 0, 0]);
        testing::with_extension(&bytes, 0, &[5, 2, 0, 0, 1, 0])
    });
    assert_translates(&from, &to, Checksum::Full, &tuple(protocol::UDP, &case.to));
}

#[test]
fn a_wrong_checksum_stays_wrong_for_the_receiver_to_see() {
    let mut bytes = testing::tcp("10.1.1.2:40000", "10.96.0.10:53", flags::ACK, b"data");
    *bytes.last_mut().unwrap() ^= 1;
    let before = parsed(&bytes);
    translate(&mut bytes, &before, Checksum::Full, &testing::tuple(protocol::TCP, "10.1.1.2:40000", "10.1.2.9:5353"));
    assert_eq!(testing::check(&bytes), Err("a wrong checksum of protocol 6".into()));
}

/// The error that `case`'s translated packet meets on its way, seen behind the translation and in front of it: the quote is cut to
/// `quote_len` bytes.
fn check_quoted(case: &Case, protocol: u8, quoted: &[Vec<u8>; 2], quote_len: usize) {
    let router = if case.is_v4() { "192.0.2.1" } else { "2001:db8::1" };
    let outer = [&case.from, &case.to].map(|pair| Case::hosts(pair)[0].clone());
    // The error arrives for the translated source and quotes the translated packet; the sender gets it in his own terms.
    let error = |side: usize| testing::icmp_error(router, &outer[side], 3, 1, 1400, &quoted[side][..quote_len.min(quoted[side].len())]);
    let (arriving, expected) = (error(1), error(0));
    let before = parsed(&arriving);
    let found = quoted_tuple(&arriving, &before).expect("a tuple");
    assert_eq!(found, parsed(&quoted[1]).tuple);
    assert_eq!(found.protocol, protocol);
    let mut bytes = arriving.clone();
    let original = parsed(&quoted[0]).tuple;
    let outer = Tuple { src: testing::addr(router), dst: testing::addr(&outer[0]), ..before.tuple };
    translate_quoted(&mut bytes, &before, &outer, &original);
    assert_eq!(bytes, expected, "quote of {quote_len}");
    testing::verify(&bytes);
    translate_quoted(&mut bytes, &before, &before.tuple, &found);
    assert_eq!(bytes, arriving, "undone");
}

fn check_all_quotes(case: &Case, payload: &[u8], quote_len: usize) {
    let pairs = [&case.from, &case.to];
    // A quote that ends within TCP's checksum keeps the half that it has, which nobody can use.
    if quote_len != if case.is_v4() { 37 } else { 57 } {
        check_quoted(case, protocol::TCP, &pairs.map(|pair| testing::tcp(&pair[0], &pair[1], flags::SYN, payload)), quote_len);
    }
    check_quoted(case, protocol::UDP, &pairs.map(|pair| testing::udp(&pair[0], &pair[1], payload)), quote_len);
    if case.is_v4() {
        check_quoted(case, protocol::UDP, &pairs.map(|pair| testing::udp_unsummed(&pair[0], &pair[1], payload)), quote_len);
    }
    let echo = if case.is_v4() { protocol::ICMP } else { protocol::ICMPV6 };
    let request = |pair: &[String; 2]| {
        let hosts = Case::hosts(pair);
        testing::echo_request(&hosts[0], &hosts[1], tuple(0, pair).src_port, 1, payload)
    };
    check_quoted(case, echo, &pairs.map(request), quote_len);
    let reply = |pair: &[String; 2]| {
        let hosts = Case::hosts(pair);
        testing::echo_reply(&hosts[0], &hosts[1], tuple(0, pair).dst_port, 1, payload)
    };
    check_quoted(case, echo, &pairs.map(reply), quote_len);
    let other = |pair: &[String; 2]| {
        let hosts = Case::hosts(pair);
        testing::ip(&hosts[0], &hosts[1], protocol::SCTP, &[1; 12])
    };
    check_quoted(case, protocol::SCTP, &pairs.map(other), quote_len);
}

#[test]
fn quotes_of_every_length_are_translated_inside_and_out() {
    for case in Case::both() {
        let header_len = if case.is_v4() { 20 } else { 40 };
        for quote_len in header_len + 8..header_len + 60 {
            check_all_quotes(&case, b"thirty bytes of any payload ok", quote_len);
        }
    }
}

#[test]
fn a_quote_behind_extension_headers_is_translated() {
    let case = &Case::both()[1];
    let quoted = [&case.from, &case.to].map(|pair| testing::with_extension(&testing::udp(&pair[0], &pair[1], b"data"), 0, &[5, 2, 0, 0, 1, 0]));
    check_quoted(case, protocol::UDP, &quoted, usize::MAX);
}

#[test]
fn what_rfc_4884_appends_to_a_quote_is_left_alone() {
    let case = &Case::both()[0];
    let quoted = [&case.from, &case.to].map(|pair| testing::udp(&pair[0], &pair[1], b"data"));
    let padded = quoted.clone().map(|mut quote| {
        quote.resize(128, 0);
        // An extension structure: version 2, its checksum (left as is), one MPLS object.
        quote.extend([0x20, 0, 0xaa, 0xbb, 0, 8, 1, 1, 1, 2, 3, 4]);
        quote
    });
    let error = |side: usize| testing::icmp("192.0.2.1", &Case::hosts([&case.from, &case.to][side])[0], 11, 0, 32 << 16, &padded[side]);
    let mut bytes = error(1);
    let before = parsed(&bytes);
    translate_quoted(&mut bytes, &before, &parsed(&error(0)).tuple, &parsed(&quoted[0]).tuple);
    assert_eq!(bytes, error(0));
}

#[test]
fn quotes_that_no_flow_can_be_found_by() {
    for (a, b) in [("10.0.0.1", "10.0.0.2"), ("fd00::1", "fd00::2")] {
        let port = |host: &str| std::net::SocketAddr::new(host.parse().unwrap(), 7).to_string();
        let datagram = testing::udp(&port(a), &port(b), &[7; 100]);
        let tail = testing::fragment(&datagram, 1, 48, 60, testing::More::None);
        let head = testing::fragment(&datagram, 1, 0, 48, testing::More::Follow);
        let nested = testing::icmp_error(a, b, 3, 1, 0, &datagram);
        let unwrap = |quote: &[u8]| {
            let bytes = testing::icmp_error(b, a, 3, 1, 0, quote);
            quoted_tuple(&bytes, &parsed(&bytes))
        };
        assert_eq!(unwrap(&tail), None);
        assert_eq!(unwrap(&nested), None);
        assert_eq!(unwrap(&head), Some(parsed(&datagram).tuple));
        assert_eq!(quoted_tuple(&datagram, &parsed(&datagram)), None);
    }
    let behind = testing::with_extension(&testing::udp("[fd00::1]:1", "[fd00::2]:2", b"data"), 60, &[1, 4, 0, 0, 0, 0]);
    let bytes = testing::icmp_error("fd00::2", "fd00::1", 1, 1, 0, &behind[..52]);
    assert_eq!(quoted_tuple(&bytes, &parsed(&bytes)), None, "the quote ends before the ports");
}

#[test]
fn a_syn_announces_no_more_than_the_path_takes() {
    for (from, to) in [("10.0.0.1:1", "10.0.0.2:2"), ("[fd00::1]:1", "[fd00::2]:2")] {
        for (options, clamped) in [
            (&[2, 4, 5, 180][..], &[2, 4, 4, 0x4c][..]),
            (&[1, 2, 4, 5, 180, 1, 1, 1], &[1, 2, 4, 4, 0x4c, 1, 1, 1]),
            (&[2, 4, 4, 0x4c], &[2, 4, 4, 0x4c]),
            (&[2, 4, 2, 24], &[2, 4, 2, 24]),
            (&[1, 1, 4, 2], &[1, 1, 4, 2]),
            (&[], &[]),
        ] {
            for (flags, expected) in [(flags::SYN, clamped), (flags::SYN | flags::ACK, clamped), (flags::ACK, options)] {
                let segment = testing::tcp_with_options(from, to, flags, options, b"x");
                let expected = testing::tcp_with_options(from, to, flags, expected, b"x");
                let mut bytes = segment.clone();
                clamp_mss(&mut bytes, &parsed(&segment), Checksum::Full, 1100);
                assert_eq!(bytes, expected, "{options:?}");
                let mut bytes = testing::partial(&segment);
                clamp_mss(&mut bytes, &parsed(&segment), Checksum::Partial, 1100);
                assert_eq!(testing::complete(&bytes), expected, "{options:?}");
            }
        }
    }
}

/// The checksum that etherparse computes for a packet, and the one that it carries.
fn checksums_by_etherparse(bytes: &[u8]) -> (u16, u16) {
    let sliced = SlicedPacket::from_ip(bytes).unwrap();
    match (sliced.net.unwrap(), sliced.transport.unwrap()) {
        (NetSlice::Ipv4(ip), TransportSlice::Tcp(segment)) => {
            assert_eq!(ip.header().to_header().calc_header_checksum(), ip.header().header_checksum());
            (segment.calc_checksum_ipv4(ip.header().source(), ip.header().destination()).unwrap(), segment.checksum())
        }
        (NetSlice::Ipv6(ip), TransportSlice::Tcp(segment)) => {
            (segment.calc_checksum_ipv6(ip.header().source(), ip.header().destination()).unwrap(), segment.checksum())
        }
        (NetSlice::Ipv4(ip), TransportSlice::Udp(datagram)) => {
            let header = datagram.to_header();
            let (src, dst) = (ip.header().source(), ip.header().destination());
            (header.calc_checksum_ipv4_raw(src, dst, datagram.payload()).unwrap(), datagram.checksum())
        }
        (NetSlice::Ipv6(ip), TransportSlice::Udp(datagram)) => {
            let header = datagram.to_header();
            let (src, dst) = (ip.header().source(), ip.header().destination());
            (header.calc_checksum_ipv6_raw(src, dst, datagram.payload()).unwrap(), datagram.checksum())
        }
        other => panic!("{other:?}"),
    }
}

fn cases() -> impl Strategy<Value = Case> {
    let v4 = any::<[u16; 8]>().prop_map(|n| {
        let endpoint = |host: u16, port: u16| format!("10.{}.{}.7:{port}", host >> 8, host & 255);
        Case { from: [endpoint(n[0], n[1]), endpoint(n[2], n[3])], to: [endpoint(n[4], n[5]), endpoint(n[6], n[7])] }
    });
    let v6 = any::<[(u64, u16); 4]>().prop_map(|n| {
        let endpoint = |(host, port): (u64, u16)| {
            let ip = std::net::Ipv6Addr::from(0xfd00_u128 << 112 | u128::from(host) << 20 | 1);
            format!("[{ip}]:{port}")
        };
        Case { from: [endpoint(n[0]), endpoint(n[1])], to: [endpoint(n[2]), endpoint(n[3])] }
    });
    prop_oneof![v4, v6]
}

proptest! {
    #[test]
    fn translation_is_what_a_sender_would_have_made_and_can_be_undone(case in cases(), payload in proptest::collection::vec(any::<u8>(), 0..80)) {
        check_all(&case, &payload);
    }

    #[test]
    fn quotes_are_what_a_router_would_have_quoted(case in cases(), payload in proptest::collection::vec(any::<u8>(), 0..80), beyond in 8usize..60) {
        check_all_quotes(&case, &payload, if case.is_v4() { 20 } else { 40 } + beyond);
    }

    #[test]
    fn etherparse_finds_translated_checksums_right(case in cases(), payload in proptest::collection::vec(any::<u8>(), 0..80)) {
        let from = [testing::tcp(&case.from[0], &case.from[1], 0, &payload), testing::udp(&case.from[0], &case.from[1], &payload)];
        for mut bytes in from {
            let before = parsed(&bytes);
            translate(&mut bytes, &before, Checksum::Full, &tuple(before.tuple.protocol, &case.to));
            let (computed, carried) = checksums_by_etherparse(&bytes);
            prop_assert_eq!(computed, carried);
        }
    }
}
