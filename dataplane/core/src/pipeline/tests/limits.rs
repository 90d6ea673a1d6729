//! Pods with a bandwidth limit.

use std::num::NonZeroU64;

use super::masquerade::set_pod;
use super::*;
use crate::packet::Offload;
use crate::shape::{GRAIN_NS, Rate};
use crate::trace::trace;

const MS: u64 = 1_000_000;

/// 1 Mbit/s, and no burst to speak of: 125 bytes take a millisecond.
const SLOW: Option<Rate> = Some(Rate { bits_per_second: NonZeroU64::new(1_000_000).unwrap(), burst_bits: 1 });

/// Both families of pod .11 get these limits; pod .10 has none.
fn limited(ingress: Option<Rate>, egress: Option<Rate>) -> World {
    let mut world = World::new();
    let pod = Pod { limits: Some(Arc::new(Limits::new(ingress, egress))), ..Pod::new(1464) };
    set_pod(&mut world, &pod);
    world
}

impl World {
    /// How long the packet that was sent last waits, in nanoseconds from now; `None` if it leaves at once.
    fn waits(&self) -> Option<u64> {
        assert!(self.outbox.packet_waits().iter().all(|(at, _)| *at == 0), "one packet in each batch");
        self.outbox.packet_waits().first().map(|(_, wait)| wait.due_ns - self.now.0 * MS)
    }
}

/// What a limit is about: row by row, whom it holds up and whom it does not.
#[test]
fn a_limit_holds_for_all_that_its_pod_sends_or_receives_and_for_nobody_else() {
    use Verdict::{ToHost, ToPods};
    type Row = (Ingress, &'static str, &'static str, Verdict, bool, bool, &'static str);
    let rows: &[Row] = &[
        // from, source, destination, verdict, by egress, by ingress, why
        (Ingress::Pods, "10.32.1.11:5000", "10.32.1.10:8080", ToPods, true, false, "to a pod of the node"),
        (Ingress::Pods, "10.32.1.11:5000", "10.32.2.10:8080", TO_PEER, true, false, "to a pod elsewhere"),
        (Ingress::Pods, "10.32.1.11:5000", "192.0.2.1:22", ToHost, true, false, "to the node"),
        (Ingress::Pods, "10.32.1.11:5000", "10.96.0.10:80", ToPods, true, false, "translated to a pod"),
        (Ingress::Pods, "10.32.1.11:5000", "10.96.0.11:80", TO_PEER, true, false, "translated to a pod elsewhere"),
        (Ingress::Pods, "10.32.1.11:5000", "203.0.113.9:443", ToHost, true, false, "masqueraded"),
        (Ingress::Pods, "10.32.1.11:5000", "10.32.1.1:80", Verdict::ToNetstack, true, false, "to the gateway itself"),
        (Ingress::Pods, "[fd00:32:1::11]:5000", "[fd00:32:1::10]:8080", ToPods, true, false, "IPv6: to a pod"),
        (Ingress::Pods, "[fd00:32:1::11]:5000", "[fd00:96::10]:80", ToPods, true, false, "IPv6: translated"),
        (Ingress::Pods, "[fd00:32:1::11]:5000", "[2001:db8:9::9]:443", ToHost, true, false, "IPv6: masqueraded"),
        (Ingress::Pods, "10.32.1.10:5000", "10.32.1.11:8080", ToPods, false, true, "from a pod of the node"),
        (PEER, "10.32.2.10:5000", "10.32.1.11:8080", ToPods, false, true, "from a pod elsewhere"),
        (Ingress::Host, "192.0.2.1:5000", "10.32.1.11:8080", ToPods, false, true, "from the node"),
        (Ingress::Host, "203.0.113.9:5000", "10.32.1.11:8080", ToPods, false, true, "from outside"),
        (PEER, "[fd00:32:2::10]:5000", "[fd00:32:1::11]:8080", ToPods, false, true, "IPv6: from a pod elsewhere"),
        (Ingress::Pods, "10.32.1.10:5000", "10.32.2.10:8080", TO_PEER, false, false, "a pod beside it, to elsewhere"),
        (Ingress::Pods, "10.32.1.10:5000", "10.96.0.12:80", ToHost, false, false, "a pod beside it, translated"),
        (PEER, "10.32.2.10:5000", "10.32.1.10:8080", ToPods, false, false, "to a pod beside it"),
    ];
    for protocol in [protocol::TCP, protocol::UDP] {
        for (ingress, src, dst, verdict, by_egress, by_ingress, why) in rows {
            for (limits, applies) in [((None, SLOW), *by_egress), ((SLOW, None), *by_ingress)] {
                let mut world = limited(limits.0, limits.1);
                let (first, first_bytes) = world.send(*ingress, opener(protocol, src, dst));
                assert_eq!((first, world.waits()), (*verdict, None), "{why}: the first has a free way");
                // The same once more, as the opener's retransmission or next datagram: it takes as long as the first does to leave.
                let mut takes = 0;
                while takes <= GRAIN_NS {
                    let (next, next_bytes) = world.send(*ingress, opener(protocol, src, dst));
                    takes += first_bytes.len() as u64 * 8_000;
                    assert_eq!((next, tuple_of(&next_bytes)), (*verdict, tuple_of(&first_bytes)), "{why}");
                    let waits = Some(takes - 1_000).filter(|waits| applies && *waits > GRAIN_NS);
                    assert_eq!(world.waits(), waits, "{why}: {src} > {dst}, protocol {protocol}");
                }
            }
        }
    }
}

#[test]
fn answers_to_a_limited_pod_are_what_it_receives_whatever_they_were_translated_from() {
    for (client, dialled, to, from) in [
        ("10.32.1.11:5000", "10.96.0.10:80", Verdict::ToPods, Ingress::Pods),
        ("10.32.1.11:5000", "10.96.0.11:80", TO_PEER, PEER),
        ("10.32.1.11:5000", "203.0.113.9:53", Verdict::ToHost, Ingress::Host),
        ("[fd00:32:1::11]:5000", "[2001:db8:9::9]:53", Verdict::ToHost, Ingress::Host),
    ] {
        let mut world = limited(SLOW, None);
        let left = world.leaves(Ingress::Pods, opener(protocol::UDP, client, dialled), to);
        let show = |ip: Addr, port: u16| std::net::SocketAddr::new(ip.ip(), port).to_string();
        let answer = testing::udp(&show(left.dst, left.dst_port), &show(left.src, left.src_port), &[7; 1000]);
        let takes = answer.len() as u64 * 8_000;
        world.leaves(from, answer.clone(), Verdict::ToPods);
        assert_eq!(world.waits(), None);
        world.leaves(from, answer, Verdict::ToPods);
        assert_eq!(world.waits(), Some(takes - 1_000), "{client} dialled {dialled}");
    }
}

#[test]
fn one_limit_is_shared_by_a_pods_addresses_and_lasts_through_snapshots() {
    let mut world = World::new();
    let pod = Pod { limits: Some(Arc::new(Limits::new(None, SLOW))), ..Pod::new(1464) };
    for (round, (src, dst)) in [("10.32.1.11:1", "10.32.2.10:2"), ("[fd00:32:1::11]:1", "[fd00:32:2::10]:2")].iter().cycle().take(8).enumerate() {
        // A new snapshot for each packet, as control publishes them.
        set_pod(&mut world, &pod);
        world.snapshot.generation = Generation(round as u64 + 2);
        let v4 = round % 2 == 0;
        world.leaves(Ingress::Pods, testing::udp(src, dst, &[0; 500][if v4 { 0 } else { 20 }..]), TO_PEER);
        // 528 bytes each.
        let waits = (round as u64 * 528 * 8_000).checked_sub(1_000).filter(|waits| *waits > GRAIN_NS);
        assert_eq!(world.waits(), waits, "packet {round}");
    }
}

#[test]
fn what_exceeds_the_limit_is_dropped_by_name_before_it_opens_a_flow_or_is_translated() {
    let payload = [9; 1000];
    for (world, ingress, src, dst) in [
        (limited(None, SLOW), Ingress::Pods, "10.32.1.11", "10.96.0.10:80"),
        (limited(None, SLOW), Ingress::Pods, "[fd00:32:1::11]", "[2001:db8:9::9]:443"),
        (limited(SLOW, None), PEER, "10.32.2.10", "10.32.1.11:80"),
        (limited(SLOW, None), Ingress::Host, "[2001:db8:9::9]", "[fd00:32:1::11]:80"),
    ] {
        let mut world = world;
        let mut sent = 0u16;
        while world.drops().is_empty() {
            sent += 1;
            let bytes = testing::udp(&format!("{src}:{sent}"), dst, &payload);
            let (verdict, after) = world.send(ingress, bytes.clone());
            if verdict == Verdict::Drop(DropReason::BandwidthExceeded) {
                assert_eq!(after, bytes, "untranslated");
            }
            assert!(sent < 100);
        }
        // 120 ms at most in the queue, 8.2 ms each.
        assert!((15..=17).contains(&sent), "{sent}");
        assert_eq!(world.drops(), [("bandwidth_exceeded", 1)]);
        if ingress == Ingress::Pods {
            assert_eq!(world.flows.table().len(), usize::from(sent) - 1, "the refused one opened none");
        }
        assert_eq!(world.answers(), [], "nobody is told: a sender slows down when packets are lost");
        // A little later there is room again.
        world.now = Now(world.now.0 + 10);
        let (verdict, _) = world.send(ingress, testing::udp(&format!("{src}:1"), dst, &payload));
        assert!(matches!(verdict, Verdict::ToPods | Verdict::ToHost), "{verdict:?}");
        assert!(world.waits().is_some());
    }
}

#[test]
fn a_superframe_counts_all_its_segments_with_their_headers_and_so_does_its_drop() {
    let mut world = limited(None, SLOW);
    let send = |world: &mut World| {
        let mut bytes = testing::partial(&testing::tcp("10.32.1.11:5000", "10.32.2.10:80", ACK, &[1; 10_000]));
        let mut verdicts = Vec::with_capacity(1);
        world.outbox.clear();
        let env = Env { snapshot: &world.snapshot, flows: world.flows.table(), now: world.now, now_ns: world.now.0 * MS, counters: &world.counters };
        let mut packet = testing::packet(&mut bytes, Ingress::Pods);
        packet.offload = Offload { checksum: Checksum::Partial, gso: Gso::Tcp { size: 1400, ecn: false } };
        world.pipeline.run::<Touch>(&env, &mut [packet], &mut verdicts, &mut world.outbox);
        verdicts[0]
    };
    assert_eq!((send(&mut world), world.waits()), (TO_PEER, None));
    // Eight segments, each with 40 bytes of headers.
    assert_eq!((send(&mut world), world.waits()), (TO_PEER, Some((10_000 + 8 * 40) * 8_000 - 1_000)));
    assert_eq!(send(&mut world), Verdict::Drop(DropReason::BandwidthExceeded));
    assert_eq!(world.drops(), [("bandwidth_exceeded", 8)]);
}

#[test]
fn fragments_count_whether_they_come_in_order_or_before_their_head_or_are_cut_here() {
    for (src, dst) in [("10.32.1.11:5000", "10.96.0.11:80"), ("[fd00:32:1::11]:5000", "[fd00:96::10]:80")] {
        let pieces = testing::fragments(&testing::udp(src, dst, &[9; 4000]), 1464, 42);
        let took = |count: usize| pieces[..count].iter().map(|piece| piece.len() as u64 * 8_000).sum::<u64>() - 1_000;
        let mut world = limited(None, SLOW);
        for (at, piece) in pieces.iter().enumerate() {
            world.send(Ingress::Pods, piece.clone());
            assert_eq!(world.waits(), (at > 0).then(|| took(at)), "piece {at}");
        }
        let mut world = limited(None, SLOW);
        for tail in &pieces[1..] {
            assert_eq!(world.send(Ingress::Pods, tail.clone()).0, Verdict::Consumed(Consumed::Held));
        }
        let (verdict, _) = world.send(Ingress::Pods, pieces[0].clone());
        assert!(matches!(verdict, Verdict::ToPods | Verdict::ToPeer(..)));
        // The tails leave first, and the head behind them.
        assert_eq!(world.outbox.iter().count(), pieces.len() - 1);
        assert_eq!(world.outbox.said_waits().len(), pieces.len() - 2);
        assert_eq!(world.outbox.said_waits()[0].0, 1);
        assert_eq!(world.waits(), Some(pieces[1..].iter().map(|piece| piece.len() as u64 * 8_000).sum::<u64>() - 1_000));
    }
    // A datagram that is cut here: its fragments wait together.
    let mut world = limited(None, SLOW);
    Arc::get_mut(&mut world.snapshot.peers).unwrap()[0].mtu = 600;
    let datagram = || testing::udp("10.32.1.11:5000", "10.32.2.10:80", &[9; 1400]);
    assert_eq!(world.send(Ingress::Pods, datagram()).0, Verdict::Consumed(Consumed::Fragmented));
    assert_eq!((world.outbox.packet_waits(), world.outbox.said_waits()), (&[][..], &[][..]));
    assert_eq!(world.send(Ingress::Pods, datagram()).0, Verdict::Consumed(Consumed::Fragmented));
    let waits: Vec<_> = world.outbox.said_waits().iter().map(|(at, wait)| (*at, wait.due_ns - world.now.0 * MS)).collect();
    assert_eq!(waits, [0, 1, 2].map(|at| (at, 1428 * 8_000 - 1_000)));
    assert_eq!((world.outbox.iter().count(), world.outbox.packet_waits()), (3, &[][..]));
}

#[test]
fn tails_of_a_datagram_whose_head_was_refused_are_dropped_with_it() {
    let mut world = limited(None, SLOW);
    while world.send(Ingress::Pods, testing::udp("10.32.1.11:1", "10.32.2.10:2", &[0; 1400])).0 == TO_PEER {}
    let pieces = testing::fragments(&testing::udp("10.32.1.11:5000", "10.32.2.10:80", &[9; 4000]), 1464, 42);
    for piece in pieces {
        assert_eq!(world.send(Ingress::Pods, piece).0, Verdict::Drop(DropReason::BandwidthExceeded));
        world.now = Now(world.now.0 + 50);
    }
    assert_eq!(world.drops(), [("bandwidth_exceeded", 4)]);
}

#[test]
fn a_packet_between_two_limited_pods_waits_for_the_slower_and_is_charged_to_neither_if_one_refuses() {
    let fast = Rate { bits_per_second: NonZeroU64::new(8_000_000).unwrap(), burst_bits: 1 };
    let mut world = World::new();
    let limits = |ingress, egress| Pod { limits: Some(Arc::new(Limits::new(ingress, egress))), ..Pod::new(1464) };
    let (sender, receiver) = (limits(None, Some(fast)), limits(SLOW, None));
    world.snapshot.pods = PodTable::new([(addr("10.32.1.10"), sender.clone()), (addr("10.32.1.11"), receiver)]);
    let send = |world: &mut World, dst| world.send(Ingress::Pods, testing::udp("10.32.1.10:1", dst, &[0; 972])).0;
    assert_eq!((send(&mut world, "10.32.1.11:2"), world.waits()), (Verdict::ToPods, None));
    assert_eq!((send(&mut world, "10.32.1.11:2"), world.waits()), (Verdict::ToPods, Some(8 * MS - 1_000)));
    let mut accepted = 2;
    while send(&mut world, "10.32.1.11:2") == Verdict::ToPods {
        accepted += 1;
    }
    // The sender's own limit has counted as many as were let through, a millisecond each, and the refused one not.
    assert_eq!(send(&mut world, "10.32.2.10:2"), TO_PEER);
    assert_eq!(world.waits(), Some(accepted * MS - 125));
}

#[test]
fn what_the_gateway_itself_says_to_a_limited_pod_does_not_wait() {
    let mut world = limited(SLOW, None);
    for _ in 0..20 {
        assert_eq!(
            world.send(Ingress::Pods, opener(protocol::UDP, "10.32.1.11:5000", "10.96.0.16:80")).0,
            Verdict::Drop(DropReason::NoBackendRejected)
        );
        assert_eq!((world.answers().len(), world.outbox.said_waits().len()), (1, 0));
    }
}

#[test]
fn a_pods_table_entry_is_the_same_only_with_the_same_limits() {
    let limits = Arc::new(Limits::new(SLOW, SLOW));
    let pod = Pod { limits: Some(limits.clone()), ..Pod::new(1464) };
    assert_eq!(pod, Pod { limits: Some(limits), ..Pod::new(1464) });
    assert_ne!(pod, Pod { limits: Some(Arc::new(Limits::new(SLOW, SLOW))), ..Pod::new(1464) }, "its state is another");
    assert_ne!(pod, Pod::new(1464));
}

#[test]
fn a_trace_shows_the_limits_on_the_way() {
    let mut world = World::new();
    let rate = |bits_per_second, burst_bits| Some(Rate { bits_per_second: NonZeroU64::new(bits_per_second).unwrap(), burst_bits });
    let limits = Some(Arc::new(Limits::new(rate(2_500_000, 0), rate(10_000_000, 400_000))));
    set_pod(&mut world, &Pod { limits, ..Pod::new(1464) });
    let steps = |src, dst| -> Vec<(&'static str, String)> {
        let steps = trace(&world.snapshot, &world.flows.table(), testing::tuple(protocol::TCP, src, dst), world.now);
        steps.into_iter().filter(|step| step.stage == "limit").map(|step| (step.stage, step.detail)).collect()
    };
    let sends = "what 10.32.1.11 sends: 10 Mbit/s, bursts of 400 kbit; more waits for 100 ms at most";
    assert_eq!(steps("10.32.1.11:5000", "203.0.113.9:443"), [("limit", sends.to_owned())]);
    assert_eq!(
        steps("10.32.1.10:5000", "10.32.1.11:80"),
        [("limit", "what 10.32.1.11 receives: 2500 kbit/s, bursts of 120 kbit; more waits for 100 ms at most".to_owned())]
    );
    assert_eq!(steps("10.32.1.10:5000", "10.32.2.10:80"), []);
    assert_eq!(steps("10.32.1.11:5000", "10.96.0.10:80").last().unwrap(), &("limit", sends.to_owned()), "behind a service as well");
}
