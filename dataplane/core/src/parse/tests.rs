//! Literal headers, and etherparse as an oracle.

use etherparse::{SlicedPacket, TransportSlice};
use proptest::prelude::*;

use super::*;
use crate::packet::{Network, Offload, Outer};
use crate::testing::{self, More, flags};

/// Parses, and sees to it that the short way says the same where it says anything.
fn parse_from(bytes: &[u8], ingress: Ingress) -> Result<Parsed, DropReason> {
    let mut bytes = bytes.to_vec();
    let packet = testing::packet(&mut bytes, ingress);
    let parsed = parse(&packet);
    if let Some(plain) = parse_plain(&packet) {
        assert_eq!(parsed, Ok(plain));
    }
    parsed
}

fn parse_bytes(bytes: &[u8]) -> Result<Parsed, DropReason> {
    parse_from(bytes, Ingress::Pods)
}

const OVERLAY: Ingress = Ingress::Overlay(Outer { src: Addr::UNSPECIFIED, ecn: 0, network: Network::Cluster });

fn kind(bytes: &[u8]) -> Transport {
    parse_bytes(bytes).unwrap().transport_kind
}

#[test]
fn a_syn_as_linux_sends_it() {
    let bytes = [
        0x45, 0x10, 0x00, 0x3c, 0x1c, 0x46, 0x40, 0x00, 0x40, 0x06, 0x09, 0x68, 10, 1, 1, 2, 10, 96, 0, 1, // IPv4
        0xd4, 0x31, 0x01, 0xbb, 0x12, 0x34, 0x56, 0x78, 0, 0, 0, 0, 0xa0, 0x02, 0xfa, 0xf0, 0xab, 0xcd, 0, 0, // TCP
        2, 4, 0x05, 0xb4, 4, 2, 8, 10, 1, 2, 3, 4, 0, 0, 0, 0, 1, 3, 3, 7, // options
    ];
    let expected = Parsed {
        tuple: testing::tuple(protocol::TCP, "10.1.1.2:54321", "10.96.0.1:443"),
        transport: 20,
        len: 60,
        ttl: 64,
        traffic_class: 0x10,
        dont_fragment: true,
        fragment: None,
        transport_kind: Transport::Tcp { flags: tcp::SYN, header_len: 40 },
    };
    assert_eq!(parse_bytes(&bytes), Ok(expected));
    let mut padded = bytes.to_vec();
    padded.extend([0xee; 7]);
    assert_eq!(parse_bytes(&padded), Ok(expected), "padding is not the packet's");
}

#[test]
fn an_ipv6_datagram_as_a_linux_gpe_device_sends_it() {
    let inner = [
        0x60, 0x04, 0x20, 0xbd, 0x00, 0x0c, 0x11, 0x40, 0xfd, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xfd, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        0, 0, 1, // IPv6
        0xc8, 0xc9, 0x00, 0x09, 0x00, 0x0c, 0xfa, 0x23, b'f', b'o', b'u', b'r', // UDP
    ];
    let expected = Parsed {
        tuple: testing::tuple(protocol::UDP, "[fd01::1]:51401", "[fd02::1]:9"),
        transport: 40,
        len: 52,
        ttl: 64,
        traffic_class: 0,
        dont_fragment: true,
        fragment: None,
        transport_kind: Transport::Udp,
    };
    assert_eq!(parse_from(&inner, OVERLAY), Ok(expected));
}

#[test]
fn extension_headers_move_the_transport_and_nothing_else() {
    let plain = testing::tcp("[fd00::1]:1", "[fd00::2]:2", flags::ACK, b"data");
    let behind = testing::with_extension(&plain, ipv6::HOP_BY_HOP, &[5, 2, 0, 0, 1, 0]);
    let mut expected = parse_bytes(&plain).unwrap();
    expected.transport += 8;
    expected.len += 8;
    assert_eq!(parse_bytes(&behind), Ok(expected));
}

#[test]
fn what_icmp_messages_are() {
    for (from, to, number) in [("10.0.0.1", "10.0.0.2", protocol::ICMP), ("fd00::1", "fd00::2", protocol::ICMPV6)] {
        let request = parse_bytes(&testing::echo_request(from, to, 77, 1, b"ping")).unwrap();
        assert_eq!((request.transport_kind, request.tuple.src_port, request.tuple.dst_port), (Transport::EchoRequest, 77, 0));
        assert_eq!(request.tuple.protocol, number);
        let reply = parse_bytes(&testing::echo_reply(to, from, 77, 1, b"ping")).unwrap();
        assert_eq!((reply.transport_kind, reply.tuple), (Transport::EchoReply, request.tuple.reversed()));
    }
    let inside = testing::udp("10.0.0.1:1", "10.0.0.2:2", b"");
    for message in 0..=255 {
        let expected = match message {
            0 => Transport::EchoReply,
            8 => Transport::EchoRequest,
            3 | 11 | 12 => Transport::IcmpError { quoted: 28 },
            other => Transport::IcmpOther(other),
        };
        assert_eq!(kind(&testing::icmp("10.0.0.9", "10.0.0.1", message, 0, 0, &inside)), expected);
    }
    let inside = testing::udp("[fd00::1]:1", "[fd00::2]:2", b"");
    for message in 0..=255 {
        let expected = match message {
            128 => Transport::EchoRequest,
            129 => Transport::EchoReply,
            1..=4 => Transport::IcmpError { quoted: 48 },
            other => Transport::IcmpOther(other),
        };
        assert_eq!(kind(&testing::icmp("fd00::9", "fd00::1", message, 0, 0, &inside)), expected);
    }
}

#[test]
fn a_quote_is_of_its_own_family_and_long_enough() {
    let v4 = testing::udp("10.0.0.1:1", "10.0.0.2:2", b"");
    let v6 = testing::udp("[fd00::1]:1", "[fd00::2]:2", b"");
    let error_v4 = |quote: &[u8]| parse_bytes(&testing::icmp("10.0.0.9", "10.0.0.1", 3, 0, 0, quote)).err();
    let error_v6 = |quote: &[u8]| parse_bytes(&testing::icmp("fd00::9", "fd00::1", 1, 0, 0, quote)).err();
    assert_eq!((error_v4(&v4), error_v6(&v6)), (None, None));
    assert_eq!((error_v4(&v6), error_v6(&v4)), (Some(DropReason::BadHeader), Some(DropReason::BadHeader)));
    assert_eq!((error_v4(&v4[..27]), error_v6(&v6[..47])), (Some(DropReason::Truncated), Some(DropReason::Truncated)));
    assert_eq!((error_v4(&[]), error_v6(&[])), (Some(DropReason::Truncated), Some(DropReason::Truncated)));
    let mut optionless = v4;
    optionless[0] = 0x44;
    assert_eq!(error_v4(&optionless), Some(DropReason::BadHeader));
}

#[test]
fn other_protocols_have_no_ports() {
    for number in [protocol::SCTP, 50, 51, 47, protocol::ICMPV6] {
        let parsed = parse_bytes(&testing::ip("10.0.0.1", "10.0.0.2", number, &[1; 12])).unwrap();
        assert_eq!((parsed.transport_kind, parsed.tuple.src_port, parsed.tuple.dst_port), (Transport::Other, 0, 0));
    }
    for number in [protocol::SCTP, 50, 51, 59, protocol::ICMP] {
        assert_eq!(kind(&testing::ip("fd00::1", "fd00::2", number, b"")), Transport::Other);
    }
}

#[test]
fn contradictions_have_their_names() {
    use DropReason::{BadHeader, Truncated};
    let v4 = testing::tcp("10.0.0.1:1", "10.0.0.2:2", flags::ACK, b"data");
    let v6 = testing::udp("[fd00::1]:1", "[fd00::2]:2", b"data");
    for (what, good, changes, reason) in [
        ("version 5", &v4, &[(0, 0x55)][..], BadHeader),
        ("a header of 16 bytes", &v4, &[(0, 0x44)], BadHeader),
        ("options beyond the total length", &v4, &[(0, 0x4f), (3, 40)], BadHeader),
        ("a total length of 0, as BIG TCP has it", &v4, &[(2, 0), (3, 0)], BadHeader),
        ("a total length below the header's", &v4, &[(2, 0), (3, 19)], BadHeader),
        ("a total length beyond the packet", &v4, &[(3, 45)], Truncated),
        ("a total length within the TCP header", &v4, &[(3, 39)], Truncated),
        ("a TCP header of 16 bytes", &v4, &[(32, 0x40)], BadHeader),
        ("a TCP header beyond the packet", &v4, &[(32, 0x70)], Truncated),
        ("a payload length beyond the packet", &v6, &[(5, 13)], Truncated),
        ("a payload length within the UDP header", &v6, &[(5, 7)], Truncated),
        ("a UDP length below its header's", &v6, &[(45, 7)], BadHeader),
        ("a UDP length beyond the packet", &v6, &[(45, 13)], Truncated),
        ("a jumbogram", &v6, &[(5, 0), (6, 0)], BadHeader),
    ] {
        let mut bad = good.clone();
        for (at, value) in changes {
            bad[*at] = *value;
        }
        assert_eq!(parse_bytes(&bad), Err(reason), "{what}");
    }
    assert_eq!(parse_bytes(&[]), Err(Truncated));
}

#[test]
fn a_udp_length_short_of_the_packet_leaves_room_for_options() {
    let mut bytes = testing::udp("[fd00::1]:1", "[fd00::2]:2", b"data");
    bytes[45] = 8;
    assert_eq!(kind(&bytes), Transport::Udp);
}

#[test]
fn the_header_checksum_is_verified_where_no_kernel_did() {
    let mut bytes = testing::udp("10.0.0.1:1", "10.0.0.2:2", b"data");
    assert!(parse_from(&bytes, OVERLAY).is_ok());
    bytes[8] -= 1;
    assert_eq!(parse_from(&bytes, OVERLAY), Err(DropReason::BadChecksum));
    assert!(parse_bytes(&bytes).is_ok());
}

#[test]
fn sources_that_can_be_nobodys_are_martian() {
    for src in ["0.0.0.0", "0.1.2.3", "127.0.0.1", "224.0.0.1", "255.255.255.255"] {
        assert_eq!(parse_bytes(&testing::ip(src, "10.0.0.2", 47, b"")), Err(DropReason::MartianSource), "{src}");
    }
    for src in ["::", "::1", "ff02::1", "::ffff:10.0.0.1"] {
        assert_eq!(parse_bytes(&testing::ip(src, "fd00::2", 47, b"")), Err(DropReason::MartianSource), "{src}");
    }
    assert_eq!(parse_bytes(&testing::ip("fd00::1", "::ffff:10.0.0.1", 47, b"")), Err(DropReason::MartianDestination));
    for (src, dst) in [("169.254.1.1", "10.0.0.2"), ("240.0.0.1", "10.0.0.2"), ("fe80::1", "fd00::2"), ("10.0.0.1", "224.0.0.1")] {
        assert!(parse_bytes(&testing::ip(src, dst, 47, b"")).is_ok(), "{src}");
    }
}

#[test]
fn a_superframe_is_one_packet_with_its_payload_elsewhere() {
    for (from, to) in [("10.0.0.1:1", "10.0.0.2:2"), ("[fd00::1]:1", "[fd00::2]:2")] {
        for mut bytes in [testing::tcp(from, to, flags::ACK, &vec![7; 60_000]), testing::udp(from, to, &vec![7; 60_000])] {
            let whole = parse_bytes(&bytes).unwrap();
            let headers = bytes.len() - 60_000;
            let tail_len = 60_000;
            let split = Packet { head: &mut bytes[..headers], tail_len, offload: Offload::default(), ingress: Ingress::Pods };
            assert_eq!(parse(&split), Ok(whole));
            let missing = Packet { tail_len: tail_len - 1, ..split };
            assert_eq!(parse(&missing), Err(DropReason::Truncated));
        }
    }
}

#[test]
fn fragments_of_one_datagram() {
    for (from, to, header) in [("10.0.0.1:1", "10.0.0.2:2", 0), ("[fd00::1]:1", "[fd00::2]:2", 40)] {
        let whole = testing::udp(from, to, &[7; 3000]);
        let ip_len = whole.len() - 3008;
        let cut: Vec<Parsed> = testing::fragments(&whole, 1300, 0x1234).iter().map(|bytes| parse_bytes(bytes).unwrap()).collect();
        assert_eq!(cut.len(), 3);
        assert_eq!(cut[0].transport_kind, Transport::Udp);
        assert_eq!(cut[0].tuple, testing::tuple(protocol::UDP, from, to));
        let mut offset = 0;
        for (index, parsed) in cut.iter().enumerate() {
            let len = parsed.len - ip_len as u32 - u32::from(header != 0) * 8;
            assert_eq!(parsed.fragment, Some(Fragment { id: 0x1234, offset, len, more: index < 2, header }));
            offset += len;
            if index > 0 {
                assert_eq!(parsed.transport_kind, Transport::Tail);
                assert_eq!((parsed.tuple.src_port, parsed.tuple.dst_port, parsed.tuple.protocol), (0, 0, protocol::UDP));
                assert_eq!((parsed.tuple.src, parsed.tuple.dst), (cut[0].tuple.src, cut[0].tuple.dst));
            }
        }
        assert_eq!(offset, 3008);
    }
}

#[test]
fn an_atomic_fragment_is_a_whole_packet() {
    let whole = testing::udp("[fd00::1]:1", "[fd00::2]:2", b"data");
    let parsed = parse_bytes(&testing::fragment(&whole, 9, 0, 12, More::None)).unwrap();
    assert_eq!((parsed.fragment, parsed.transport_kind, parsed.transport), (None, Transport::Udp, 48));
}

#[test]
fn bad_fragments() {
    for (a, b) in [("10.0.0.1", "10.0.0.2"), ("fd00::1", "fd00::2")] {
        let port = |host: &str| std::net::SocketAddr::new(host.parse().unwrap(), 7).to_string();
        let datagram = testing::udp(&port(a), &port(b), &[7; 100]);
        let segment = testing::tcp_with_options(&port(a), &port(b), flags::SYN, &[1; 12], &[7; 100]);
        let ping = testing::echo_request(a, b, 1, 1, &[7; 100]);
        let error = testing::icmp_error(a, b, 3, 3, 0, &datagram);
        for (what, bytes, offset, len, more) in [
            ("a middle of no even length", &datagram, 8, 20, More::Follow),
            ("nothing in it", &datagram, 8, 0, More::None),
            ("half a TCP header", &segment, 0, 16, More::Follow),
            ("a TCP header without its options", &segment, 0, 24, More::Follow),
            ("a tail over the TCP header", &segment, 16, 16, More::Follow),
            ("an error that was cut", &error, 0, 48, More::Follow),
        ] {
            let cut = testing::fragment(bytes, 1, offset, len, more);
            assert_eq!(parse_bytes(&cut), Err(DropReason::FragmentBad), "{what}");
        }
        for (what, bytes, offset, len, more) in [
            ("a UDP header alone", &datagram, 0, 8, More::Follow),
            ("the head of an echo", &ping, 0, 8, More::Follow),
            ("an end of no even length", &datagram, 96, 12, More::None),
            ("a whole TCP header", &segment, 0, 32, More::Follow),
        ] {
            assert!(parse_bytes(&testing::fragment(bytes, 1, offset, len, more)).is_ok(), "{what}");
        }
        let mut beyond = testing::fragment(&datagram, 1, 96, 12, More::None);
        let at = if a.contains(':') { 42 } else { 6 };
        beyond[at] = if a.contains(':') { 0xff } else { 0x1f };
        beyond[at + 1] = if a.contains(':') { 0xf8 } else { 0xff };
        assert_eq!(parse_bytes(&beyond), Err(DropReason::FragmentBad), "beyond 65,535 bytes");
    }
}

/// One packet of each shape.
fn samples() -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for (a, b) in [("10.0.0.1", "10.0.0.2"), ("fd00::1", "fd00::2")] {
        let port = |host: &str| std::net::SocketAddr::new(host.parse().unwrap(), 7).to_string();
        let segment = testing::tcp_with_options(&port(a), &port(b), flags::SYN, &[2, 4, 5, 180, 1, 1, 4, 2], b"data");
        let datagram = testing::udp(&port(a), &port(b), b"data");
        all.push(testing::echo_request(a, b, 3, 4, b"ping"));
        all.push(testing::icmp_error(b, a, 3, 3, 0, &segment));
        all.push(testing::icmp_error(b, a, 3, 3, 0, &testing::echo_request(a, b, 3, 4, b"ping")));
        all.extend(testing::fragments(&testing::udp(&port(a), &port(b), &[7; 100]), 80, 5));
        if a.contains(':') {
            let behind = testing::with_extension(&datagram, ipv6::DESTINATION_OPTIONS, &[1, 4, 0, 0, 0, 0]);
            all.push(testing::icmp_error(b, a, 1, 4, 0, &behind));
            all.push(testing::with_extension(&behind, ipv6::HOP_BY_HOP, &[1, 4, 0, 0, 0, 0]));
        }
        all.extend([segment, datagram]);
    }
    all
}

#[test]
fn a_packet_cut_anywhere_is_named_and_breaks_nothing() {
    for whole in samples() {
        assert!(parse_bytes(&whole).is_ok());
        for len in 0..whole.len() {
            assert_eq!(parse_bytes(&whole[..len]), Err(DropReason::Truncated), "{len} of {whole:02x?}");
            // The same cut made honest: the IP header says what is there.
            let mut honest = whole[..len].to_vec();
            if whole[0] >> 4 == 4 && len >= 20 {
                crate::wire::set_u16(&mut honest, ipv4::TOTAL_LEN, len as u16);
            } else if len >= 40 {
                ipv6::set_payload_len(&mut honest, (len - 40) as u16);
            }
            edit_everything(&mut honest);
        }
    }
}

/// Whatever passes `parse` can be edited without a panic.
fn edit_everything(bytes: &mut [u8]) {
    use crate::nat;
    use crate::packet::Checksum;
    for ingress in [Ingress::Pods, OVERLAY] {
        let Ok(parsed) = parse_from(bytes, ingress) else { continue };
        assert!(usize::from(parsed.transport) <= bytes.len() && parsed.len as usize <= bytes.len());
        let to = parsed.tuple.reversed();
        let quoted = nat::quoted_tuple(bytes, &parsed);
        nat::translate(bytes, &parsed, Checksum::Full, &to);
        nat::translate(bytes, &parsed, Checksum::Partial, &to);
        nat::clamp_mss(bytes, &parsed, Checksum::Full, 500);
        nat::translate_quoted(bytes, &parsed, &to, &quoted.unwrap_or(to));
        crate::wire::ip::set_ecn_ce(bytes);
        crate::wire::ip::set_ttl(bytes, 1);
        let _ = crate::encap::entropy(&parsed);
    }
}

/// Two endpoints of one family that pass as sources.
fn endpoints() -> impl Strategy<Value = (String, String)> {
    let v4 =
        (11u8..100, any::<u16>(), 11u8..100, any::<u16>()).prop_map(|(a, from, b, to)| (format!("10.{a}.1.2:{from}"), format!("{b}.2.3.4:{to}")));
    let v6 = (1u16.., any::<u16>(), 1u16.., any::<u16>())
        .prop_map(|(a, from, b, to)| (format!("[fd00::{a:x}]:{from}"), format!("[2001:db8::{b:x}]:{to}")));
    prop_oneof![v4, v6]
}

/// What etherparse, which shares no code with this crate, says of a packet that `parse` took.
fn agree_with_etherparse(bytes: &[u8], parsed: &Parsed) {
    let sliced = match SlicedPacket::from_ip(bytes) {
        Ok(sliced) => sliced,
        Err(error) => panic!("etherparse refuses {bytes:02x?}: {error}"),
    };
    let (src, dst) = match sliced.net.as_ref().expect("an IP header") {
        etherparse::NetSlice::Ipv4(ip) => {
            let header = ip.header();
            assert_eq!((header.ttl(), u32::from(header.total_len())), (parsed.ttl, parsed.len));
            (Addr::from_v4(header.source()), Addr::from_v4(header.destination()))
        }
        etherparse::NetSlice::Ipv6(ip) => {
            let header = ip.header();
            assert_eq!((header.hop_limit(), header.traffic_class()), (parsed.ttl, parsed.traffic_class));
            (Addr::from_v6(header.source()), Addr::from_v6(header.destination()))
        }
        other => panic!("not IP: {other:?}"),
    };
    assert_eq!((src, dst), (parsed.tuple.src, parsed.tuple.dst));
    let ports = (parsed.tuple.src_port, parsed.tuple.dst_port);
    match (parsed.transport_kind, sliced.transport) {
        (Transport::Tcp { flags, header_len }, Some(TransportSlice::Tcp(segment))) => {
            assert_eq!(ports, (segment.source_port(), segment.destination_port()));
            assert_eq!((flags, usize::from(header_len)), (segment.header_slice()[13], segment.header_len()));
        }
        (Transport::Udp, Some(TransportSlice::Udp(datagram))) => {
            assert_eq!(ports, (datagram.source_port(), datagram.destination_port()));
        }
        (Transport::Tcp { .. } | Transport::Udp, other) => assert!(parsed.fragment.is_some(), "{other:?}"),
        (_, other) => assert!(!matches!(other, Some(TransportSlice::Tcp(_) | TransportSlice::Udp(_))), "{other:?}"),
    }
}

proptest! {
    #[test]
    fn etherparse_reads_what_parse_reads((from, to) in endpoints(), flags in any::<u8>(), payload in 0usize..100) {
        let payload = vec![7; payload];
        for bytes in [testing::tcp(&from, &to, flags, &payload), testing::udp(&from, &to, &payload)] {
            agree_with_etherparse(&bytes, &parse_bytes(&bytes).unwrap());
        }
    }

    #[test]
    fn a_packet_with_a_few_wrong_bytes_is_refused_or_read_as_etherparse_does(
        sample in any::<prop::sample::Selector>(), changes in proptest::collection::vec((0usize..64, any::<u8>()), 1..4)
    ) {
        let mut bytes = sample.select(samples());
        for (at, value) in changes {
            let at = at % bytes.len();
            bytes[at] = value;
        }
        if let Ok(parsed) = parse_bytes(&bytes)
            // Of the others etherparse reads on where this crate stops: in a fragment that is not the first, in ICMP messages.
            && matches!(parsed.transport_kind, Transport::Tcp { .. } | Transport::Udp | Transport::EchoRequest | Transport::EchoReply)
        {
            agree_with_etherparse(&bytes, &parsed);
        }
        edit_everything(&mut bytes);
    }

    #[test]
    fn any_bytes_are_refused_or_can_be_edited(version in prop_oneof![Just(0x45u8), Just(0x46), Just(0x60)], mut bytes in proptest::collection::vec(any::<u8>(), 1..200)) {
        bytes[0] = version;
        edit_everything(&mut bytes);
        // Once more with a length that fits, to get further in.
        let len = bytes.len();
        if version == 0x60 && len >= 40 {
            ipv6::set_payload_len(&mut bytes, (len - 40) as u16);
            bytes[ipv6::SRC] = 0xfd;
            bytes[ipv6::NEXT_HEADER] = [0, 6, 17, 43, 44, 58, 60][usize::from(bytes[6]) % 7];
        } else if len >= 20 {
            crate::wire::set_u16(&mut bytes, ipv4::TOTAL_LEN, len as u16);
            bytes[ipv4::SRC] = 10;
            bytes[ipv4::PROTOCOL] = [1, 6, 17][usize::from(bytes[9]) % 3];
        }
        edit_everything(&mut bytes);
    }
}
