use std::ops::Range;

use proptest::prelude::*;

use super::oracle::{any_packet, ends, etherparse_agrees, payload};
use super::*;
use crate::packet::{Ingress, Offload};
use crate::parse::parse;
use crate::testing;
use crate::wire::{set_u32, u16_at, u32_at};

const ROOM: usize = 8;
const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const ACK: u8 = 0x10;
const CWR: u8 = 0x80;

fn tcp_frame(v4: bool, options: &[u8], flags: u8, len: usize) -> Vec<u8> {
    let (src, dst) = ends(v4);
    let mut bytes = testing::partial(&testing::tcp_with_options(src, dst, flags, options, &payload(len)));
    if v4 {
        bytes = with_id(bytes, 0xfffe);
    }
    bytes
}

fn with_id(mut bytes: Vec<u8>, id: u16) -> Vec<u8> {
    set_u16(&mut bytes, 4, id);
    set_u16(&mut bytes, 10, 0);
    let checksum = Sum::of(&bytes[..20]).finish().0;
    set_u16(&mut bytes, 10, checksum);
    bytes
}

fn super_packet(bytes: &mut [u8], gso: Gso) -> Packet<'_> {
    Packet { head: bytes, tail_len: 0, offload: Offload { checksum: Checksum::Partial, gso }, ingress: Ingress::Pods }
}

fn plan() -> SplitPlan {
    SplitPlan::new(2048, 2048 * 160)
}

/// The packets that a split makes, one after the other.
fn packets(plan: &SplitPlan, made: Range<usize>, payloads: &[u8]) -> Vec<Vec<u8>> {
    plan.segments()[made].iter().map(|s| [&plan.scratch()[s.header.clone()][ROOM..], &payloads[s.payload.clone()]].concat()).collect()
}

/// The packets that a frame which `merge` made becomes.
fn split_again(buffer: &mut [u8], plan: &MergePlan, frame: &Frame) -> Vec<Vec<u8>> {
    let (front, behind) = buffer.split_at_mut(frame.head.end);
    let packet = Packet { head: &mut front[frame.head.start..], tail_len: frame.tail_len, offload: frame.offload, ingress: Ingress::Pods };
    let parsed = parse(&packet).unwrap();
    let (tails, mut again) = (&plan.tails()[frame.tails.clone()], self::plan());
    let range = split_merged(&packet, &parsed, behind, frame.head.end, tails, ROOM, &mut again).unwrap();
    packets(&again, range, buffer)
}

fn split_all(bytes: &mut [u8], gso: Gso) -> Vec<Vec<u8>> {
    let packet = super_packet(bytes, gso);
    let parsed = parse(&packet).unwrap();
    let mut plan = plan();
    let made = split(&packet, &parsed, ROOM, &mut plan).unwrap();
    let made = packets(&plan, made, packet.head);
    assert_eq!(wire_packets(&packet, &parsed) as usize, made.len());
    assert_eq!(wire_len(&packet, &parsed) as usize, made[0].len());
    made
}

/// The packets as they lie in a receive buffer, each behind an encapsulation header.
fn received(packets: &[Vec<u8>]) -> (Vec<u8>, Vec<Range<usize>>) {
    let (mut buffer, mut ranges) = (Vec::new(), Vec::new());
    for packet in packets {
        buffer.extend_from_slice(&[0xee; ROOM]);
        ranges.push(buffer.len()..buffer.len() + packet.len());
        buffer.extend_from_slice(packet);
    }
    (buffer, ranges)
}

fn merged(packets: &[Vec<u8>]) -> Vec<(Vec<u8>, Offload, u16)> {
    merged_in(packets, Checksum::Full)
}

/// The frames made of packets whose checksums are in that state.
fn merged_in(packets: &[Vec<u8>], checksum: Checksum) -> Vec<(Vec<u8>, Offload, u16)> {
    let (mut buffer, ranges) = received(packets);
    let mut plan = MergePlan::new(ranges.len(), Merging::On, Merging::On);
    assert_eq!(merge(&mut buffer, &ranges, checksum, &mut plan), ranges.len());
    assert_eq!(plan.frames().iter().map(|frame| usize::from(frame.segments)).sum::<usize>(), packets.len(), "every packet is in one frame");
    let frame_bytes = |frame: &Frame| {
        let tails = plan.tails()[frame.tails.clone()].iter();
        assert_eq!(tails.clone().map(|tail| tail.len()).sum::<usize>(), frame.tail_len);
        [&buffer[frame.head.clone()], &tails.flat_map(|tail| &buffer[tail.clone()]).copied().collect::<Vec<u8>>()].concat()
    };
    plan.frames().iter().map(|frame| (frame_bytes(frame), frame.offload, frame.segments)).collect()
}

#[test]
fn a_tcp_superframe_becomes_segments_with_consecutive_numbers_and_right_checksums() {
    for v4 in [true, false] {
        let mut frame = tcp_frame(v4, &[], ACK | PSH | FIN | CWR, 2500);
        let made = split_all(&mut frame, Gso::Tcp { size: 1000, ecn: true });
        assert_eq!(made.len(), 3);
        let at = if v4 { 20 } else { 40 };
        let of = |index: usize| (u32_at(&made[index], at + 4), made[index][at + 13], made[index].len());
        assert_eq!(of(0), (1000, ACK | CWR, at + 1020));
        assert_eq!(of(1), (2000, ACK, at + 1020));
        assert_eq!(of(2), (3000, ACK | PSH | FIN, at + 520));
        if v4 {
            assert_eq!(made.iter().map(|bytes| u16_at(bytes, 4)).collect::<Vec<_>>(), [0xfffe, 0xffff, 0]);
        }
        for bytes in &made {
            etherparse_agrees(bytes);
            testing::verify(bytes);
        }
        let sent: Vec<u8> = made.iter().flat_map(|bytes| bytes[at + 20..].to_vec()).collect();
        assert_eq!(sent, payload(2500));
    }
}

#[test]
fn a_udp_superframe_becomes_datagrams() {
    for v4 in [true, false] {
        let (src, dst) = ends(v4);
        let mut frame = testing::partial(&testing::udp(src, dst, &payload(2500)));
        let made = split_all(&mut frame, Gso::Udp { size: 1200 });
        assert_eq!(made.iter().map(|bytes| bytes.len() - if v4 { 28 } else { 48 }).collect::<Vec<_>>(), [1200, 1200, 100]);
        for bytes in &made {
            etherparse_agrees(bytes);
        }
    }
}

#[test]
fn a_computed_udp_checksum_of_zero_is_sent_as_its_other_form() {
    for v4 in [true, false] {
        let (src, dst) = ends(v4);
        let plain = testing::udp(src, dst, &[0, 0]);
        let at = if v4 { 20 } else { 40 };
        // With the checksum itself as payload the sum is that of all ones.
        let mut bytes = testing::partial(&testing::udp(src, dst, &plain[at + 6..at + 8]));
        let made = split_all(&mut bytes.clone(), Gso::None);
        assert_eq!(u16_at(&made[0], at + 6), 0xffff);
        let mut packet = super_packet(&mut bytes, Gso::None);
        let parsed = parse(&packet).unwrap();
        finish_checksum(&mut packet, &parsed).unwrap();
        assert_eq!(packet.head, made[0]);
    }
}

#[test]
fn a_plain_packet_is_one_segment_with_its_checksum_completed_and_its_padding_gone() {
    for v4 in [true, false] {
        let (src, dst) = ends(v4);
        let whole = testing::tcp(src, dst, ACK, b"some data");
        let mut padded = testing::partial(&whole);
        padded.extend_from_slice(&[0; 6]);
        assert_eq!(split_all(&mut padded, Gso::None), std::slice::from_ref(&whole));
        let mut plan = plan();
        let mut bytes = whole.clone();
        let packet = testing::packet(&mut bytes, Ingress::Pods);
        let parsed = parse(&packet).unwrap();
        let made = split(&packet, &parsed, ROOM, &mut plan).unwrap();
        assert_eq!(packets(&plan, made, packet.head), [whole]);
    }
}

#[test]
fn a_split_that_does_not_fit_the_plan_leaves_it_as_it_was() {
    let mut frame = tcp_frame(true, &[], ACK, 3000);
    let packet = super_packet(&mut frame, Gso::Tcp { size: 1000, ecn: false });
    let parsed = parse(&packet).unwrap();
    for (segments, bytes) in [(4, 1000), (100, 48 * 4)] {
        let mut plan = SplitPlan::new(segments, bytes);
        assert_eq!(split(&packet, &parsed, ROOM, &mut plan), Ok(0..3));
        assert_eq!(split(&packet, &parsed, ROOM, &mut plan), Err(DropReason::OutboxFull));
        assert_eq!(plan.segments().len(), 3);
    }
}

#[test]
fn a_frame_that_contradicts_itself_is_refused() {
    let mut frame = tcp_frame(true, &[], ACK, 3000);
    for gso in [Gso::Udp { size: 100 }, Gso::Tcp { size: 0, ecn: false }] {
        let packet = super_packet(&mut frame, gso);
        let parsed = parse(&packet).unwrap();
        assert_eq!(split(&packet, &parsed, ROOM, &mut plan()), Err(DropReason::BadHeader));
    }
}

#[test]
fn sends_stay_within_the_bytes_and_segments_that_the_kernel_takes() {
    let mut frame = tcp_frame(true, &[], ACK, 65_000);
    for (size, expected) in [(1_400, vec![0..45, 45..47]), (500, vec![0..64, 64..128, 128..130])] {
        let packet = super_packet(&mut frame, Gso::Tcp { size, ecn: false });
        let parsed = parse(&packet).unwrap();
        let mut plan = plan();
        let made = split(&packet, &parsed, ROOM, &mut plan).unwrap();
        let sends: Vec<_> = plan.sends(made, SEND_BYTES_MAX).collect();
        assert_eq!(sends, expected);
        for send in sends {
            let lens: Vec<usize> = plan.segments()[send].iter().map(Segment::len).collect();
            assert!(lens.iter().sum::<usize>() <= SEND_BYTES_MAX && lens.len() <= SEND_SEGMENTS_MAX);
            assert!(lens[..lens.len() - 1].iter().all(|len| *len == lens[0]) && lens[lens.len() - 1] <= lens[0]);
        }
    }
}

#[test]
fn a_segment_with_a_wrong_checksum_passes_alone_and_untouched() {
    for v4 in [true, false] {
        let mut frame = tcp_frame(v4, &[], ACK, 5000);
        let mut made = split_all(&mut frame, Gso::Tcp { size: 1000, ecn: false });
        let last = made[2].len() - 1;
        made[2][last] ^= 1;
        let frames = merged(&made);
        assert_eq!(frames.iter().map(|frame| frame.2).collect::<Vec<_>>(), [2, 1, 2]);
        assert_eq!(frames[1].0, made[2]);
        assert_eq!(frames[1].1, Offload::default());
    }
}

#[test]
fn what_must_not_be_merged_is_not() {
    let base = || {
        let mut frame = tcp_frame(true, &[1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2], ACK, 2000);
        split_all(&mut frame, Gso::Tcp { size: 1000, ecn: false })
    };
    assert_eq!(merged(&base()).len(), 1);
    // Of the second segment: a byte to change, and what it is.
    for (at, what) in [
        (1, "traffic class"),
        (5, "identification without DF"),
        (8, "TTL"),
        (15, "source"),
        (21, "port"),
        (27, "sequence number"),
        (31, "acknowledgement"),
        (35, "window"),
        (39, "urgent pointer"),
        (51, "timestamp"),
    ] {
        let mut pair = base();
        pair[1][at] ^= 4;
        let mut bytes = testing::partial(&with_id(pair[1].clone(), u16_at(&pair[1], 4)));
        let mut packet = super_packet(&mut bytes, Gso::None);
        let parsed = parse(&packet).unwrap();
        finish_checksum(&mut packet, &parsed).unwrap();
        pair[1] = bytes;
        etherparse_agrees(&pair[1]);
        let frames = merged(&pair);
        assert_eq!(frames.iter().map(|frame| frame.0.clone()).collect::<Vec<_>>(), pair, "{what}");
    }
    for flags in [0x02, 0x04, 0x20, 0x40] {
        let (src, dst) = ends(true);
        let pair = [testing::tcp(src, dst, flags | ACK, &[1; 8]), with_id(tcp_at(1008, &[2; 8]), 1)];
        assert_eq!(merged(&pair).len(), 2, "flags {flags:#x}");
    }
}

fn tcp_at(seq: u32, payload: &[u8]) -> Vec<u8> {
    let (src, dst) = ends(true);
    let mut bytes = testing::tcp(src, dst, ACK, payload);
    set_u32(&mut bytes, 24, seq);
    testing::complete(&testing::partial(&bytes))
}

#[test]
fn pure_acknowledgements_and_packets_of_other_kinds_pass_alone_in_order() {
    let (src, dst) = ends(true);
    let ack = testing::tcp(src, dst, ACK, b"");
    let ping = testing::echo_request("10.0.0.1", "10.0.1.2", 1, 1, b"x");
    let unsummed = testing::udp_unsummed(src, dst, b"four");
    let fragments = testing::fragments(&testing::udp(src, dst, &[1; 3000]), 1500, 9);
    let mut all = vec![ack.clone(), ack, ping, unsummed.clone(), unsummed];
    all.extend(fragments);
    let frames = merged(&all);
    assert_eq!(frames.iter().map(|frame| frame.0.clone()).collect::<Vec<_>>(), all);
    assert!(frames.iter().all(|frame| frame.1 == Offload::default()));
}

#[test]
fn a_plan_with_less_room_takes_what_fits() {
    let mut frame = tcp_frame(true, &[], ACK, 5000);
    let (mut buffer, ranges) = received(&split_all(&mut frame, Gso::Tcp { size: 1000, ecn: false }));
    let mut plan = MergePlan::new(3, Merging::On, Merging::On);
    plan.tcp = Merging::Off;
    assert_eq!(merge(&mut buffer, &ranges, Checksum::Full, &mut plan), 3);
    assert_eq!(plan.frames().len(), 3);
}

#[test]
fn a_merged_frame_splits_into_the_packets_that_it_was_made_from() {
    for v4 in [true, false] {
        let mut frame = tcp_frame(v4, &[], ACK | PSH, 4500);
        let made = split_all(&mut frame, Gso::Tcp { size: 1000, ecn: false });
        let (mut buffer, ranges) = received(&made);
        let mut plan = MergePlan::new(64, Merging::On, Merging::On);
        merge(&mut buffer, &ranges, Checksum::Full, &mut plan);
        let merged = &plan.frames()[0];
        let packet =
            Packet { head: &mut buffer.clone()[merged.head.clone()], tail_len: merged.tail_len, offload: merged.offload, ingress: Ingress::Pods };
        let parsed = parse(&packet).unwrap();
        assert_eq!(split(&packet, &parsed, ROOM, &mut self::plan()), Err(DropReason::Truncated));
        assert_eq!(split_again(&mut buffer, &plan, merged), made);
    }
}

/// A datagram as a pod leaves it to its device: with DF, and a checksum that is that of the pseudo header.
fn left_undone(v4: bool, payload: &[u8], id: u16) -> Vec<u8> {
    let (src, dst) = ends(v4);
    let bytes = testing::partial(&testing::udp(src, dst, payload));
    if v4 { with_id(testing::with_dont_fragment(bytes), id) } else { bytes }
}

#[test]
fn datagrams_made_on_this_machine_become_one_without_a_look_at_their_payload() {
    // 10.0.0.1:1234 to 10.0.1.2:53, DF, unfinished checksums: "abcd", "efgh", "ij".
    let made = [
        b"\x45\x00\x00\x20\x00\x07\x40\x00\x40\x11\x25\xc4\x0a\x00\x00\x01\x0a\x00\x01\x02\x04\xd2\x00\x35\x00\x0c\x15\x20abcd".to_vec(),
        b"\x45\x00\x00\x20\x00\x08\x40\x00\x40\x11\x25\xc3\x0a\x00\x00\x01\x0a\x00\x01\x02\x04\xd2\x00\x35\x00\x0c\x15\x20efgh".to_vec(),
        b"\x45\x00\x00\x1e\x00\x09\x40\x00\x40\x11\x25\xc4\x0a\x00\x00\x01\x0a\x00\x01\x02\x04\xd2\x00\x35\x00\x0a\x15\x1eij".to_vec(),
    ];
    let one = b"\x45\x00\x00\x26\x00\x07\x40\x00\x40\x11\x25\xbe\x0a\x00\x00\x01\x0a\x00\x01\x02\x04\xd2\x00\x35\x00\x12\x15\x26abcdefghij";
    let partial = |gso| Offload { checksum: Checksum::Partial, gso };
    assert_eq!(merged_in(&made, Checksum::Partial), [(one.to_vec(), partial(Gso::Udp { size: 4 }), 3)]);
    // The last is shorter, so nothing may follow it.
    let frames = merged_in(&[&made[..], &made[..1]].concat(), Checksum::Partial);
    assert_eq!(frames[1..], [(made[0].clone(), partial(Gso::None), 1)]);
    // As full ones these are wrong.
    assert_eq!(merged(&made).iter().map(|frame| frame.2).collect::<Vec<_>>(), [1, 1, 1]);
}

#[test]
fn identifications_count_up_or_stay_the_same_with_dont_fragment() {
    for (dont_fragment, ids, frames) in [
        (true, [5, 6, 7], 1),
        (true, [0, 0, 0], 1),
        (true, [5, 5, 6], 2),
        (true, [5, 5, 7], 2),
        (true, [5, 6, 5], 2),
        (true, [5, 7, 9], 3),
        (false, [0xffff, 0, 1], 1),
        (false, [5, 5, 5], 3),
        (false, [5, 4, 3], 3),
    ] {
        let datagram = |id| {
            let (src, dst) = ends(true);
            let bytes = testing::partial(&testing::udp(src, dst, &[1; 100]));
            with_id(if dont_fragment { testing::with_dont_fragment(bytes) } else { bytes }, id)
        };
        let made = ids.map(datagram);
        assert_eq!(merged_in(&made, Checksum::Partial).len(), frames, "{ids:?}, dont_fragment: {dont_fragment}");
        assert_eq!(merged(&made.map(|bytes| testing::complete(&bytes))).len(), frames, "{ids:?}, dont_fragment: {dont_fragment}");
    }
}

#[test]
fn datagrams_that_differ_in_more_than_payload_pass_alone_and_untouched() {
    for v4 in [true, false] {
        let pair = || [left_undone(v4, &[1; 100], 1), left_undone(v4, &[2; 100], 2)];
        assert_eq!(merged_in(&pair(), Checksum::Partial).len(), 1);
        // Of the second: a byte to change, and what it is.
        let places: &[(usize, u8, &str)] = if v4 {
            &[
                (1, 4, "traffic class"),
                (6, 0x40, "DF"),
                (6, 0x20, "more fragments"),
                (7, 1, "fragment offset"),
                (8, 1, "TTL"),
                (15, 1, "source"),
                (21, 1, "port"),
            ]
        } else {
            &[(1, 0x10, "traffic class"), (3, 1, "flow label"), (7, 1, "hop limit"), (23, 1, "source"), (39, 1, "destination"), (43, 1, "port")]
        };
        for (at, bits, what) in places {
            let mut pair = pair();
            pair[1][*at] ^= bits;
            if v4 {
                pair[1] = with_id(pair[1].clone(), 2);
            }
            // Else the sum alone would keep them apart.
            if ["source", "destination"].contains(what) {
                pair[1] = testing::partial(&pair[1]);
            }
            let frames = merged_in(&pair, Checksum::Partial);
            assert_eq!(frames.iter().map(|frame| frame.0.clone()).collect::<Vec<_>>(), pair, "{what}");
        }
        let at = if v4 { 26 } else { 46 };
        for (stored, what) in [([0x12, 0x34], "another sum than the pseudo header's"), ([0, 0], "none")] {
            let mut pair = pair();
            pair[1][at..at + 2].copy_from_slice(&stored);
            assert_eq!(merged_in(&pair, Checksum::Partial).len(), 2, "{what}");
        }
    }
    let mut pair = [left_undone(true, &[1; 100], 1), left_undone(true, &[2; 100], 2)];
    pair[1][10] ^= 1;
    assert_eq!(merged_in(&pair, Checksum::Partial)[1].0, pair[1], "a wrong header checksum is not made right");
}

#[test]
fn a_superframe_has_64_datagrams_and_64_kib_at_most() {
    for v4 in [true, false] {
        let headers = if v4 { 28 } else { 48 };
        for (size, most) in [(10, 64), (1000, 64), (1400, (PACKET_BYTES_MAX - headers) / 1400)] {
            let made: Vec<_> = (0..most as u16 + 1).map(|id| left_undone(v4, &payload(size), id)).collect();
            let frames = merged_in(&made, Checksum::Partial);
            assert_eq!(frames.iter().map(|frame| usize::from(frame.2)).collect::<Vec<_>>(), [most, 1], "{size} bytes");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn what_is_made_of_any_datagrams_splits_into_the_same_again(
        v4: bool,
        full: bool,
        kinds in prop::collection::vec((prop::sample::select(vec![100usize, 100, 100, 37, 1]), 0u16..8, prop::sample::select(vec![64u8, 64, 64, 63])), 1..100),
    ) {
        let made: Vec<Vec<u8>> = kinds.iter().enumerate().map(|(index, (len, other, ttl))| {
            let (src, dst) = ends(v4);
            // One in eight is of another flow.
            let src = if *other == 0 { src.replace("1234", "1235") } else { src.to_owned() };
            let mut bytes = testing::udp(&src, dst, &payload(index + len)[index..]);
            bytes[if v4 { 8 } else { 7 }] = *ttl;
            let bytes = if v4 { with_id(bytes, index as u16) } else { bytes };
            if full { bytes } else { testing::partial(&bytes) }
        }).collect();
        let (mut buffer, ranges) = received(&made);
        let mut plan = MergePlan::new(100, Merging::On, Merging::On);
        merge(&mut buffer, &ranges, if full { Checksum::Full } else { Checksum::Partial }, &mut plan);
        let again: Vec<Vec<u8>> = plan.frames().iter().flat_map(|frame| split_again(&mut buffer, &plan, frame)).collect();
        let whole: Vec<Vec<u8>> = made.iter().map(|bytes| if full { bytes.clone() } else { testing::complete(bytes) }).collect();
        prop_assert_eq!(&again, &whole);
    }

    #[test]
    fn split_then_merge_is_the_identity(
        v4: bool, timestamps: bool, psh: bool, fin: bool, cwr: bool, dont_fragment: bool, size in 1u16..9000, len in 0usize..65_400,
    ) {
        let options: &[u8] = if timestamps { &[1, 1, 8, 10, 9, 8, 7, 6, 5, 4, 3, 2] } else { &[] };
        let size = size.max((len / 1000 + 1) as u16);
        let flags = ACK | if psh { PSH } else { 0 } | if fin { FIN } else { 0 } | if cwr { CWR } else { 0 };
        let mut frame = tcp_frame(v4, options, flags, len);
        if v4 && dont_fragment {
            frame = testing::with_dont_fragment(frame);
        }
        let gso = Gso::Tcp { size, ecn: cwr };
        let made = split_all(&mut frame, gso);
        for bytes in &made {
            etherparse_agrees(bytes);
        }
        let frames = merged(&made);
        prop_assert_eq!(frames.len(), 1);
        if len > size.into() {
            prop_assert_eq!(&frames[0].0, &frame);
            prop_assert_eq!(frames[0].1, Offload { checksum: Checksum::Partial, gso });
        } else {
            prop_assert_eq!(&frames[0].0, &testing::complete(&frame));
            prop_assert_eq!(frames[0].1, Offload::default());
        }
    }

    #[test]
    fn split_then_merge_of_udp_is_the_identity(v4: bool, size in 1u16..9000, count in 1usize..64, last in 1usize..9000) {
        let len = (usize::from(size) * (count - 1) + last.min(size.into())).min(65_400);
        let (src, dst) = ends(v4);
        let mut frame = testing::partial(&testing::udp(src, dst, &payload(len)));
        let made = split_all(&mut frame, Gso::Udp { size });
        for bytes in &made {
            etherparse_agrees(bytes);
        }
        let frames = merged(&made);
        prop_assert_eq!(frames.len(), 1);
        if len > size.into() {
            prop_assert_eq!(&frames[0].0, &frame);
            prop_assert_eq!(frames[0].1, Offload { checksum: Checksum::Partial, gso: Gso::Udp { size } });
        }
    }

    #[test]
    fn no_bytes_make_split_or_merge_panic(mut bytes in any_packet(), size: u16, udp: bool, cuts in prop::collection::vec(0usize..200, 0..8)) {
        let mut at = 0;
        let ranges: Vec<_> = cuts.iter().map(|len| { let from = at; at += len; from..at }).collect();
        let mut plan = MergePlan::new(16, Merging::On, Merging::On);
        merge(&mut bytes.clone(), &ranges, Checksum::Full, &mut plan);
        merge(&mut bytes.clone(), &ranges, Checksum::Partial, &mut plan);
        let gso = match (size, udp) { (0, _) => Gso::None, (_, true) => Gso::Udp { size }, _ => Gso::Tcp { size, ecn: false } };
        let mut packet = super_packet(&mut bytes, gso);
        if let Ok(parsed) = parse(&packet) {
            let _ = split(&packet, &parsed, ROOM, &mut self::plan());
            let _ = finish_checksum(&mut packet, &parsed);
        }
    }
}
