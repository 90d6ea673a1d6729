use proptest::prelude::*;

use super::*;
use crate::flow::Now;
use crate::offload::oracle::{any_packet, ends, etherparse_agrees, payload};
use crate::packet::{Checksum, Gso, Ingress, Offload, Packet};
use crate::parse::{Fragment, Parsed, parse};
use crate::testing;
use crate::verdict::DropReason;

const SMALL: FragmentLimits = FragmentLimits { datagrams: 4, held_bytes: 16 << 10 };

fn key(id: u32) -> FragmentKey {
    FragmentKey { src: testing::addr("10.0.0.1"), dst: testing::addr("10.0.0.2"), id, protocol: 17 }
}

fn piece(offset: u32, len: u32, more: bool) -> Fragment {
    Fragment { id: 0, offset, len, more, header: 0 }
}

fn table(limits: FragmentLimits) -> FragmentTable<char> {
    FragmentTable::new(limits, 7)
}

fn tail(table: &mut FragmentTable<char>, id: u32, now: u64, fragment: Fragment) -> Tail<char> {
    let bytes = vec![fragment.offset as u8; fragment.len as usize + 20];
    table.tail(key(id), &fragment, Now(now), &bytes, Ingress::Pods)
}

fn released(table: &mut FragmentTable<char>, id: u32) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    loop {
        let mut out = Vec::with_capacity(70_000);
        match table.release(key(id), &mut out) {
            None => return all,
            Some(held) => {
                assert_eq!(held.unwrap(), Held { ingress: Ingress::Pods, len: out.len() });
                all.push(out);
            }
        }
    }
}

#[test]
fn tails_follow_their_head_in_every_order_and_nothing_stays_behind() {
    let pieces = [piece(0, 1480, true), piece(1480, 1480, true), piece(2960, 1480, true), piece(4440, 60, false)];
    let mut orders = Vec::new();
    for n in 0..256usize {
        let order = [n % 4, n / 4 % 4, n / 16 % 4, n / 64];
        if (0..4).all(|index| order.contains(&index)) {
            orders.push(order);
        }
    }
    assert_eq!(orders.len(), 24);
    for order in orders {
        let mut table = table(FragmentLimits::default());
        let (mut waiting, mut head_came) = (Vec::new(), false);
        for index in order {
            if index == 0 {
                table.head(key(1), &pieces[0], Now(5), 'x').unwrap();
                head_came = true;
                let out: Vec<_> = released(&mut table, 1).iter().map(|bytes| (bytes[0], bytes.len() as u32 - 20)).collect();
                assert_eq!(out, waiting, "{order:?}");
            } else if head_came {
                assert_eq!(tail(&mut table, 1, 5, pieces[index]), Tail::Follow('x'));
            } else {
                assert_eq!(tail(&mut table, 1, 5, pieces[index]), Tail::Held);
                waiting.push((pieces[index].offset as u8, pieces[index].len));
            }
        }
        assert_eq!((table.datagrams(), table.held_bytes()), (0, 0));
        assert_eq!(table.expire(Now(100_000)), Lost::default());
    }
}

#[test]
fn an_identification_used_again_at_once_is_a_new_datagram() {
    let mut table = table(SMALL);
    for decision in ['a', 'b', 'c'] {
        table.head(key(1), &piece(0, 8, true), Now(5), decision).unwrap();
        assert_eq!(tail(&mut table, 1, 5, piece(8, 8, false)), Tail::Follow(decision));
    }
}

#[test]
fn an_identification_used_again_after_a_loss_is_a_new_datagram_once_the_old_one_is_silent() {
    let mut table = table(SMALL);
    table.head(key(1), &piece(0, 16, true), Now(0), 'a').unwrap();
    assert_eq!(tail(&mut table, 1, 0, piece(32, 8, false)), Tail::Follow('a'));
    assert_eq!(table.head(key(1), &piece(0, 16, true), Now(999), 'b'), Err(DropReason::FragmentOverlap));
    assert_eq!(table.head(key(1), &piece(0, 16, true), Now(1000), 'b'), Ok(()));
    assert_eq!(tail(&mut table, 1, 1000, piece(16, 8, true)), Tail::Follow('b'));
}

#[test]
fn overlaps_poison_the_datagram_and_what_waited_is_lost_by_name() {
    let mut table = table(SMALL);
    assert_eq!(tail(&mut table, 1, 0, piece(16, 16, true)), Tail::Held);
    assert_eq!(tail(&mut table, 1, 0, piece(24, 16, true)), Tail::Drop(DropReason::FragmentOverlap));
    assert_eq!(table.head(key(1), &piece(0, 16, true), Now(1), 'a'), Err(DropReason::FragmentOverlap));
    assert_eq!(tail(&mut table, 1, 2, piece(32, 8, false)), Tail::Drop(DropReason::FragmentOverlap));
    assert!(released(&mut table, 1).is_empty());
    assert_eq!(table.expire(Now(3)), Lost { overlap: 1, ..Lost::default() });
    assert_eq!(table.datagrams(), 1);
    table.expire(Now(40_000));
    assert_eq!(table.datagrams(), 0);
}

#[test]
fn a_repeated_fragment_is_dropped_and_harms_nobody() {
    let mut table = table(SMALL);
    assert_eq!(tail(&mut table, 1, 0, piece(8, 8, true)), Tail::Held);
    assert_eq!(tail(&mut table, 1, 0, piece(8, 8, true)), Tail::Drop(DropReason::FragmentOverlap));
    table.head(key(1), &piece(0, 8, true), Now(1), 'a').unwrap();
    assert_eq!(released(&mut table, 1).len(), 1);
    assert_eq!(table.head(key(1), &piece(0, 8, true), Now(1), 'a'), Err(DropReason::FragmentOverlap));
    assert_eq!(tail(&mut table, 1, 1, piece(16, 3, false)), Tail::Follow('a'));
    assert_eq!(table.datagrams(), 0);
}

#[test]
fn fragments_that_no_datagram_has_are_refused() {
    let mut table = table(SMALL);
    for bad in [piece(8, 7, true), piece(65_528, 16, false), piece(8, 0, false), piece(u32::MAX - 7, 8, true)] {
        assert_eq!(tail(&mut table, 1, 0, bad), Tail::Drop(DropReason::FragmentBad));
    }
    assert_eq!(table.head(key(1), &piece(0, 9, true), Now(0), 'a'), Err(DropReason::FragmentBad));
    assert_eq!(table.datagrams(), 0);
}

#[test]
fn tails_whose_head_does_not_come_are_given_up_and_heads_are_remembered_longer() {
    let mut table = table(SMALL);
    assert_eq!(tail(&mut table, 1, 0, piece(8, 8, true)), Tail::Held);
    table.head(key(2), &piece(0, 8, true), Now(0), 'b').unwrap();
    assert_eq!(table.expire(Now(1999)), Lost::default());
    assert_eq!(table.expire(Now(2000)), Lost { timeout: 1, ..Lost::default() });
    assert_eq!((table.datagrams(), table.held_bytes()), (1, 0));
    assert_eq!(tail(&mut table, 2, 29_999, piece(16, 8, true)), Tail::Follow('b'));
    table.expire(Now(30_000));
    assert_eq!(table.datagrams(), 0);
}

#[test]
fn a_full_table_gives_up_the_oldest_datagram() {
    let mut table = table(SMALL);
    assert_eq!(tail(&mut table, 1, 0, piece(8, 8, true)), Tail::Held);
    for id in 2..=4 {
        table.head(key(id), &piece(0, 8, true), Now(id.into()), 'x').unwrap();
    }
    table.head(key(5), &piece(0, 8, true), Now(5), 'x').unwrap();
    assert_eq!(table.expire(Now(5)), Lost { full: 1, ..Lost::default() });
    assert_eq!(tail(&mut table, 6, 5, piece(8, 8, true)), Tail::Held);
    assert_eq!(tail(&mut table, 2, 5, piece(8, 8, true)), Tail::Held, "its head is forgotten");
    assert_eq!(tail(&mut table, 4, 5, piece(8, 8, true)), Tail::Follow('x'));
}

#[test]
fn waiting_tails_never_take_more_than_their_memory_and_the_oldest_go_first() {
    let mut table = table(FragmentLimits { datagrams: 100, held_bytes: 16 << 10 });
    for id in 0..8 {
        assert_eq!(tail(&mut table, id, id.into(), piece(1480, 1480, true)), Tail::Held);
    }
    assert_eq!(table.held_bytes(), 16 << 10);
    assert_eq!(tail(&mut table, 8, 8, piece(1480, 4000, true)), Tail::Held);
    assert_eq!(table.held_bytes(), 16 << 10, "4,020 bytes take two blocks");
    assert_eq!(table.expire(Now(8)), Lost { full: 2, ..Lost::default() });
    assert_eq!(tail(&mut table, 9, 9, piece(8, 17_000, true)), Tail::Drop(DropReason::FragmentTableFull));
    table.head(key(9), &piece(0, 8, true), Now(9), 'x').unwrap();
}

#[test]
fn a_released_tail_without_room_is_lost_by_name() {
    let mut table = table(SMALL);
    assert_eq!(tail(&mut table, 1, 0, piece(8, 8, false)), Tail::Held);
    table.head(key(1), &piece(0, 8, true), Now(0), 'x').unwrap();
    assert_eq!(table.release(key(1), &mut Vec::with_capacity(27)), Some(Err(DropReason::OutboxFull)));
    assert_eq!((table.datagrams(), table.held_bytes()), (0, 0));
}

#[test]
fn a_flood_of_heads_and_tails_costs_nobody_else_a_fragment() {
    let mut table = table(FragmentLimits::default());
    let (mut followed, mut total) = (0, 0);
    for round in 0..2_000u32 {
        let now = u64::from(round);
        for nth in 0..100 {
            let id = 1_000_000 + round * 100 + nth;
            if nth % 2 == 0 {
                let _ = table.head(key(id), &piece(0, 1480, true), Now(now), 'e');
            } else {
                tail(&mut table, id, now, piece(1480, 1480, true));
            }
        }
        // A datagram whose fragments come 0, 1, 2, … 6 ms after its head.
        table.head(key(round), &piece(0, 1480, true), Now(now), 'x').unwrap();
        for age in 1..=6u32.min(round) {
            let last = age == 6;
            total += 1;
            followed += u32::from(tail(&mut table, round - age, now, piece(1480 * age, 1480, !last)) == Tail::Follow('x'));
        }
        table.expire(Now(now));
        assert!(table.held_bytes() <= 4 << 20);
    }
    assert_eq!(followed, total);
}

fn as_packet(bytes: &mut [u8], offload: Offload) -> (Packet<'_>, Parsed) {
    let packet = Packet { head: bytes, tail_len: 0, offload, ingress: Ingress::Pods };
    let parsed = parse(&packet).unwrap();
    (packet, parsed)
}

fn cut_all(bytes: &[u8], offload: Offload, mtu: u32, id: u32) -> Result<Vec<Vec<u8>>, DropReason> {
    let mut bytes = bytes.to_vec();
    let (mut packet, parsed) = as_packet(&mut bytes, offload);
    let mut pieces = Vec::new();
    let count = cut(&mut packet, &parsed, mtu, id, |header, payload| {
        pieces.push([header, payload].concat());
        Ok(())
    })?;
    assert_eq!(count, pieces.len());
    Ok(pieces)
}

/// Puts fragments together as RFC 791 and RFC 8200 describe it, slowly, for IPv6 with the fragment header behind `at`.
fn reassembled(pieces: &[Vec<u8>], at: usize, field: usize) -> Vec<u8> {
    let v4 = pieces[0][0] >> 4 == 4;
    let mut out = Vec::new();
    let mut ids = std::collections::HashSet::new();
    let mut rest = Vec::new();
    for (index, bytes) in pieces.iter().enumerate() {
        let last = index + 1 == pieces.len();
        testing::verify(bytes);
        if v4 {
            let header_len = usize::from(bytes[0] & 15) * 4;
            let word = u16::from_be_bytes([bytes[6], bytes[7]]);
            assert_eq!(usize::from(word & 0x1fff) * 8, rest.len(), "in order, without holes, in units of 8");
            assert_eq!(word & 0x2000 == 0, last);
            ids.insert(u32::from(u16::from_be_bytes([bytes[4], bytes[5]])));
            if index == 0 {
                out = bytes[..header_len].to_vec();
            }
            rest.extend_from_slice(&bytes[header_len..]);
        } else {
            let header = &bytes[at..at + 8];
            let word = u16::from_be_bytes([header[2], header[3]]);
            assert_eq!(bytes[field], 44);
            assert_eq!(usize::from(word & !7), rest.len());
            assert_eq!(word & 1 == 0, last);
            ids.insert(u32::from_be_bytes([header[4], header[5], header[6], header[7]]));
            if index == 0 {
                out = bytes[..at].to_vec();
                out[field] = header[0];
            }
            rest.extend_from_slice(&bytes[at + 8..]);
        }
    }
    assert_eq!(ids.len(), 1, "one identification");
    out.extend_from_slice(&rest);
    let len = out.len();
    if v4 {
        out[2..4].copy_from_slice(&(len as u16).to_be_bytes());
        out[6..8].fill(0);
        out[10..12].fill(0);
        let header_len = usize::from(out[0] & 15) * 4;
        let checksum = crate::wire::checksum::Sum::of(&out[..header_len]).finish().0;
        out[10..12].copy_from_slice(&checksum.to_be_bytes());
    } else {
        out[4..6].copy_from_slice(&((len - 40) as u16).to_be_bytes());
    }
    out
}

/// `options` in an IPv4 packet that has none.
fn with_options(bytes: &[u8], options: &[u8]) -> Vec<u8> {
    let mut out = [&bytes[..20], options, &bytes[20..]].concat();
    let (len, header_len) = (out.len(), 20 + options.len());
    out[0] = 0x40 | (header_len / 4) as u8;
    out[2..4].copy_from_slice(&(len as u16).to_be_bytes());
    out[10..12].fill(0);
    let checksum = crate::wire::checksum::Sum::of(&out[..header_len]).finish().0;
    out[10..12].copy_from_slice(&checksum.to_be_bytes());
    out
}

#[test]
fn only_copied_options_are_in_every_fragment() {
    let (src, dst) = ends(true);
    // NOP; record route (not copied) of 7 bytes; router alert (copied) of 4 bytes.
    let options = [1, 7, 7, 4, 0, 0, 0, 0, 0x94, 4, 0, 0];
    let whole = with_options(&testing::udp(src, dst, &payload(100)), &options);
    let pieces = cut_all(&whole, Offload::default(), 80, 0).unwrap();
    assert_eq!(pieces[0][..20 + 12][20..], options);
    assert_eq!(pieces.iter().map(|bytes| bytes[0] & 15).collect::<Vec<_>>(), [8, 6, 6]);
    assert_eq!(pieces[1][20..24], [0x94, 4, 0, 0]);
    assert_eq!(reassembled(&pieces, 0, 0), whole);
}

#[test]
fn ipv6_extension_headers_for_nodes_on_the_way_stay_before_the_fragment_header() {
    let (src, dst) = ends(false);
    let inner = testing::udp(src, dst, &payload(3000));
    let destination = testing::with_extension(&inner, 60, &[1, 4, 0, 0, 0, 0]);
    let pieces = cut_all(&destination, Offload::default(), 1280, 77).unwrap();
    assert_eq!(reassembled(&pieces, 40, 6), destination);
    let hop_by_hop = testing::with_extension(&destination, 0, &[1, 4, 0, 0, 0, 0]);
    let pieces = cut_all(&hop_by_hop, Offload::default(), 1280, 77).unwrap();
    assert!(pieces.iter().all(|bytes| bytes.len() <= 1280 && bytes[52..56] == [0, 0, 0, 77]));
    assert_eq!(reassembled(&pieces, 48, 40), hop_by_hop);
}

#[test]
fn an_atomic_fragment_is_cut_in_its_own_fragment_header_under_a_fresh_identification() {
    let (src, dst) = ends(false);
    let inner = testing::udp(src, dst, &payload(3000));
    let atomic = testing::fragment(&inner, 1, 0, inner.len() - 40, testing::More::None);
    let pieces = cut_all(&atomic, Offload::default(), 1280, 77).unwrap();
    assert!(pieces.iter().all(|bytes| bytes.len() <= 1280 && bytes[44..48] == [0, 0, 0, 77]));
    assert_eq!(reassembled(&pieces, 40, 6), inner);
}

#[test]
fn a_packet_that_fits_is_whole_one_with_df_or_gso_is_refused_and_a_tiny_mtu_too() {
    let (src, dst) = ends(true);
    let whole = testing::udp(src, dst, &payload(2000));
    assert_eq!(cut_all(&whole, Offload::default(), 2028, 0).unwrap(), std::slice::from_ref(&whole));
    let held = testing::with_dont_fragment(whole.clone());
    assert_eq!(cut_all(&held, Offload::default(), 1500, 0), Err(DropReason::PacketTooBig));
    assert_eq!(cut_all(&whole, Offload::default(), 27, 0), Err(DropReason::PacketTooBig));
    let superframe = Offload { checksum: Checksum::Partial, gso: Gso::Udp { size: 1000 } };
    assert_eq!(cut_all(&whole, superframe, 1500, 0), Err(DropReason::PacketTooBig));
}

#[test]
fn a_refusal_of_the_writer_ends_the_cut() {
    let (src, dst) = ends(true);
    let mut whole = testing::udp(src, dst, &payload(4000));
    let (mut packet, parsed) = as_packet(&mut whole, Offload::default());
    let mut room = 2;
    let result = cut(&mut packet, &parsed, 1500, 0, |_, _| {
        if room == 0 {
            return Err(DropReason::OutboxFull);
        }
        room -= 1;
        Ok(())
    });
    assert_eq!(result, Err(DropReason::OutboxFull));
}

proptest! {
    #[test]
    fn cut_then_reassemble_is_the_identity(v4: bool, partial: bool, mtu in 68u32..9000, len in 0usize..60_000, again in 0u32..3000) {
        let (src, dst) = ends(v4);
        let whole = testing::udp(src, dst, &payload(len));
        let (bytes, checksum) = if partial { (testing::partial(&whole), Checksum::Partial) } else { (whole.clone(), Checksum::Full) };
        let pieces = cut_all(&bytes, Offload { checksum, gso: Gso::None }, mtu, 0x1234_5678).unwrap();
        prop_assert!(pieces.iter().all(|bytes| bytes.len() <= mtu as usize));
        if pieces.len() == 1 {
            prop_assert_eq!(&pieces[0], &whole);
        } else {
            prop_assert_eq!(reassembled(&pieces, 40, 6), &whole[..]);
            // And each fragment cut again on a narrower path.
            let mtu = 68 + again.min(mtu - 68);
            let smaller: Vec<_> = pieces.iter().flat_map(|bytes| cut_all(bytes, Offload::default(), mtu, 1).unwrap()).collect();
            prop_assert!(smaller.iter().all(|bytes| bytes.len() <= mtu as usize));
            prop_assert_eq!(reassembled(&smaller, 40, 6), &whole[..]);
        }
        etherparse_agrees(&whole);
    }

    #[test]
    fn no_packet_makes_a_cut_panic(mut bytes in any_packet(), mtu in 0u32..1500, id: u32) {
        let mut packet = Packet { head: &mut bytes, tail_len: 0, offload: Offload::default(), ingress: Ingress::Pods };
        if let Ok(parsed) = parse(&packet) {
            let result = cut(&mut packet, &parsed, mtu, id, |header, payload| {
                assert!(header.len() + payload.len() <= mtu as usize);
                Ok(())
            });
            prop_assert!(result.is_err() || mtu > 0);
        }
    }

    #[test]
    fn every_held_tail_is_released_or_lost_by_name(
        steps in prop::collection::vec((0u32..6, 0u32..12, 1u32..4, any::<bool>(), 0u64..600), 0..300),
    ) {
        let mut table = table(SMALL);
        let (mut now, mut held, mut out) = (0, 0, 0);
        let mut lost = 0;
        for (id, unit, units, more, pause) in steps {
            now += pause / 20;
            let fragment = piece(unit * 800, units * 800, more);
            if unit == 0 {
                if table.head(key(id), &fragment, Now(now), 'x').is_ok() {
                    out += released(&mut table, id).len() as u64;
                }
            } else {
                held += u64::from(tail(&mut table, id, now, fragment) == Tail::Held);
            }
            let gone = table.expire(Now(now));
            lost += gone.timeout + gone.full + gone.overlap;
            prop_assert!(table.datagrams() <= SMALL.datagrams && table.held_bytes() <= SMALL.held_bytes);
        }
        let gone = table.expire(Now(now + 60_000));
        lost += gone.timeout + gone.full + gone.overlap;
        prop_assert_eq!(held, out + lost);
        prop_assert_eq!((table.datagrams(), table.held_bytes()), (0, 0));
    }
}
