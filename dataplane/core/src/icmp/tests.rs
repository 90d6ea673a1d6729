use proptest::prelude::*;

use super::*;
use crate::offload::oracle::{any_packet, ends, etherparse_agrees, payload};
use crate::packet::{Ingress, Offload};
use crate::parse::parse;
use crate::testing;
use crate::testing::flags;

const PSH: u8 = 0x08;

fn gateway(v4: bool) -> Addr {
    testing::addr(if v4 { "10.9.9.9" } else { "fd00:9::9" })
}

fn with_offload<R>(bytes: &[u8], offload: Offload, tell: impl FnOnce(&mut Vec<u8>, &Packet<'_>, &Parsed) -> R) -> (Vec<u8>, R) {
    let mut bytes = bytes.to_vec();
    let packet = Packet { head: &mut bytes, tail_len: 0, offload, ingress: Ingress::Pods };
    let parsed = parse(&packet).unwrap();
    let mut out = Vec::with_capacity(70_000);
    let result = tell(&mut out, &packet, &parsed);
    (out, result)
}

fn told(bytes: &[u8], tell: impl FnOnce(&mut Vec<u8>, &Packet<'_>, &Parsed) -> Result<(), Silence>) -> Result<Vec<u8>, Silence> {
    let (out, result) = with_offload(bytes, Offload::default(), tell);
    match result {
        Ok(()) => {
            etherparse_agrees(&out);
            testing::verify(&out);
        }
        Err(_) => assert!(out.is_empty()),
    }
    result.map(|()| out)
}

fn error_about(bytes: &[u8], kind: Answer) -> Result<Vec<u8>, Silence> {
    told(bytes, |out, packet, parsed| error(out, kind, gateway(parsed.tuple.is_v4()), packet, parsed))
}

#[test]
fn errors_have_the_type_and_code_of_their_family_and_quote_the_packet() {
    for (kind, v4, v6) in [
        (Answer::TimeExceeded, [11, 0, 0, 0, 0, 0], [3, 0, 0, 0, 0, 0]),
        (Answer::FragmentationNeeded { mtu: 1450 }, [3, 4, 0, 0, 5, 170], [2, 0, 0, 0, 5, 170]),
        (Answer::PortUnreachable, [3, 3, 0, 0, 0, 0], [1, 4, 0, 0, 0, 0]),
        (Answer::HostUnreachable, [3, 1, 0, 0, 0, 0], [1, 3, 0, 0, 0, 0]),
        (Answer::NoRoute, [3, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]),
        (Answer::AdminProhibited, [3, 13, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]),
    ] {
        for (is_v4, expected) in [(true, v4), (false, v6)] {
            let (src, dst) = ends(is_v4);
            let about = testing::udp(src, dst, b"hello");
            let said = error_about(&about, kind).unwrap();
            let at = if is_v4 { 20 } else { 40 };
            let fields = [&said[at..at + 2], &said[at + 4..at + 8]].concat();
            assert_eq!(fields, expected, "{kind:?}");
            assert_eq!(said[at + 8..], about);
            let mut said = said;
            let parsed = parse(&testing::packet(&mut said, Ingress::Host)).unwrap();
            let (sender, _) = ends(is_v4);
            assert_eq!(parsed.tuple.dst, testing::tuple(17, sender, sender).src);
            assert_eq!((parsed.tuple.src, parsed.ttl), (gateway(is_v4), 64));
        }
    }
}

#[test]
fn a_quote_is_as_long_as_its_standard_allows() {
    for (v4, longest) in [(true, 576), (false, 1280)] {
        let (src, dst) = ends(v4);
        let said = error_about(&testing::udp(src, dst, &payload(3000)), Answer::FragmentationNeeded { mtu: 1450 }).unwrap();
        assert_eq!(said.len(), longest);
    }
}

#[test]
fn a_quote_has_no_padding() {
    let (src, dst) = ends(true);
    let about = testing::udp(src, dst, b"hello");
    let padded = [&about[..], &[0; 9]].concat();
    assert_eq!(error_about(&padded, Answer::TimeExceeded), error_about(&about, Answer::TimeExceeded));
}

#[test]
fn a_checksum_left_to_offloads_is_completed_in_the_quote() {
    for v4 in [true, false] {
        let (src, dst) = ends(v4);
        let whole = testing::tcp(src, dst, flags::ACK, &payload(5000));
        let offload = Offload { checksum: Checksum::Partial, gso: Gso::None };
        let (said, result) =
            with_offload(&testing::partial(&whole), offload, |out, packet, parsed| error(out, Answer::NoRoute, gateway(v4), packet, parsed));
        result.unwrap();
        etherparse_agrees(&said);
        assert_eq!(Ok(said), error_about(&whole, Answer::NoRoute));
    }
}

#[test]
fn of_a_superframe_the_first_segment_is_quoted() {
    for v4 in [true, false] {
        let (src, dst) = ends(v4);
        let about = testing::partial(&testing::tcp(src, dst, flags::ACK | PSH, &payload(5000)));
        let offload = Offload { checksum: Checksum::Partial, gso: Gso::Tcp { size: 400, ecn: false } };
        let kind = Answer::FragmentationNeeded { mtu: 400 };
        let (said, result) = with_offload(&about, offload, |out, packet, parsed| error(out, kind, gateway(v4), packet, parsed));
        result.unwrap();
        // The segment is short enough to be quoted whole, so its own checksum is verified as well.
        testing::verify(&said);
        let at = if v4 { 20 } else { 40 };
        let quote = &said[at + 8..];
        assert_eq!(quote.len(), at + 20 + 400);
        assert_eq!(quote[at + 13], flags::ACK);
        assert_eq!(u32_at(quote, at + 4), 1000);
    }
}

#[test]
fn nothing_is_said_where_a_standard_forbids_it() {
    let v4 = |src: &str, dst: &str| testing::ip(src, dst, 99, b"12345678");
    let segment = testing::tcp("10.0.0.1:1", "10.0.0.2:2", flags::ACK, b"x");
    let v6_segment = testing::tcp("[fd00::1]:1", "[fd00::2]:2", flags::ACK, b"x");
    let fragments = testing::fragments(&testing::udp("10.0.0.1:1", "10.0.0.2:2", &payload(3000)), 1500, 1);
    for (about, why) in [
        (testing::icmp_error("10.0.0.1", "10.0.0.2", 3, 1, 0, &segment), "an ICMP error"),
        (testing::icmp("10.0.0.1", "10.0.0.2", 5, 1, 0, &segment), "a redirect"),
        (testing::icmp_error("fd00::1", "fd00::2", 1, 1, 0, &v6_segment), "an ICMPv6 error"),
        (testing::icmp("fd00::1", "fd00::2", 100, 0, 0, &v6_segment), "an unknown ICMPv6 error"),
        (fragments[1].clone(), "a fragment that is not the first"),
        (v4("10.0.0.1", "224.0.0.1"), "to multicast"),
        (v4("10.0.0.1", "255.255.255.255"), "to broadcast"),
        (testing::ip("fd00::1", "ff02::1", 99, b"12345678"), "to IPv6 multicast"),
        (testing::ip("fe80::1", "fd00::1", 99, b"12345678"), "from a link-local address"),
    ] {
        assert_eq!(error_about(&about, Answer::TimeExceeded), Err(Silence::Forbidden), "{why}");
    }
    for (about, why) in [
        (fragments[0].clone(), "a first fragment"),
        (testing::echo_request("10.0.0.1", "10.0.0.2", 1, 1, b""), "an echo request (traceroute)"),
        (testing::icmp("fd00::1", "fd00::2", 200, 0, 0, b""), "an informational ICMPv6 message"),
        (v4("10.0.0.1", "10.0.0.2"), "any protocol"),
    ] {
        assert!(error_about(&about, Answer::TimeExceeded).is_ok(), "{why}");
    }
}

#[test]
fn a_source_of_the_other_family_says_nothing() {
    let about = testing::tcp("10.0.0.1:1", "10.0.0.2:2", flags::ACK, b"x");
    assert_eq!(told(&about, |out, packet, parsed| error(out, Answer::NoRoute, gateway(false), packet, parsed)), Err(Silence::Forbidden));
}

#[test]
fn nothing_grows_a_full_buffer() {
    let mut about = testing::tcp("10.0.0.1:1", "10.0.0.2:2", flags::ACK, b"x");
    let packet = testing::packet(&mut about, Ingress::Pods);
    let parsed = parse(&packet).unwrap();
    let mut out = Vec::with_capacity(39);
    assert_eq!(reset(&mut out, &packet, &parsed), Err(Silence::NoRoom));
    assert_eq!(error(&mut out, Answer::NoRoute, gateway(true), &packet, &parsed), Err(Silence::NoRoom));
    assert!(out.is_empty() && out.capacity() == 39);
}

#[test]
fn a_reset_has_the_numbers_that_its_receiver_accepts() {
    for v4 in [true, false] {
        let (src, dst) = ends(v4);
        // Sequence number 1000 and acknowledgement number 2000 in each.
        for (flags, len, expected) in [
            (flags::ACK, 10, (2000, 0, flags::RST)),
            (flags::SYN, 0, (0, 1001, flags::RST | flags::ACK)),
            (flags::SYN | flags::ACK, 0, (2000, 0, flags::RST)),
            (flags::FIN, 10, (0, 1011, flags::RST | flags::ACK)),
            (0, 10, (0, 1010, flags::RST | flags::ACK)),
        ] {
            let said = told(&testing::tcp(src, dst, flags, &payload(len)), reset).unwrap();
            let at = if v4 { 20 } else { 40 };
            assert_eq!((u32_at(&said, at + 4), u32_at(&said, at + 8), said[at + 13]), expected);
            let mut said = said;
            let parsed = parse(&testing::packet(&mut said, Ingress::Host)).unwrap();
            assert_eq!(parsed.tuple, testing::tuple(protocol::TCP, dst, src));
        }
        assert_eq!(told(&testing::tcp(src, dst, flags::RST | flags::ACK, b""), reset), Err(Silence::Forbidden));
        assert_eq!(told(&testing::udp(src, dst, b""), reset), Err(Silence::Forbidden));
    }
}

#[test]
fn a_reset_acknowledges_a_whole_merged_frame() {
    let mut head = testing::tcp("10.0.0.1:1", "10.0.0.2:2", 0, &payload(1000));
    set_u16(&mut head, 2, 40 + 3000);
    set_u16(&mut head, 10, 0);
    let checksum = Sum::of(&head[..20]).finish();
    set_u16(&mut head, 10, checksum.0);
    let offload = Offload { checksum: Checksum::Partial, gso: Gso::Tcp { size: 1000, ecn: false } };
    let packet = Packet { head: &mut head, tail_len: 2000, offload, ingress: Ingress::Pods };
    let parsed = parse(&packet).unwrap();
    let mut out = Vec::with_capacity(1000);
    reset(&mut out, &packet, &parsed).unwrap();
    assert_eq!(u32_at(&out, 28), 4000);
    out.clear();
    error(&mut out, Answer::NoRoute, gateway(true), &packet, &parsed).unwrap();
    etherparse_agrees(&out);
}

#[test]
fn a_bucket_lets_a_burst_through_and_then_its_rate() {
    let mut bucket = TokenBucket::new(100, 5);
    let mut taken = |now: u64| (0..50).filter(|_| bucket.take(Now(now))).count();
    assert_eq!(taken(1_000), 5);
    assert_eq!(taken(1_009), 0);
    assert_eq!(taken(1_010), 1);
    assert_eq!(taken(1_000), 0, "time does not go back");
    assert_eq!(taken(1_035), 2);
    assert_eq!(taken(1_040), 1);
    assert_eq!(taken(9_999_999), 5);
}

proptest! {
    #[test]
    fn no_packet_makes_an_answer_panic_and_every_answer_is_whole(mut bytes in any_packet(), size: u16, partial: bool) {
        let gso = if size > 0 { Gso::Tcp { size, ecn: false } } else { Gso::None };
        let checksum = if partial { Checksum::Partial } else { Checksum::Full };
        let packet = Packet { head: &mut bytes, tail_len: 0, offload: Offload { checksum, gso }, ingress: Ingress::Pods };
        if let Ok(parsed) = parse(&packet) {
            let mut out = Vec::with_capacity(4000);
            if error(&mut out, Answer::TimeExceeded, gateway(parsed.tuple.is_v4()), &packet, &parsed).is_ok() {
                etherparse_agrees(&out);
            }
            out.clear();
            if reset(&mut out, &packet, &parsed).is_ok() {
                etherparse_agrees(&out);
                testing::verify(&out);
            }
        }
    }
}
