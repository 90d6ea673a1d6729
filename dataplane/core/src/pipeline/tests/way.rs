//! The way ahead: MTU, TTL and segment sizes, told to the sender in his own terms.

use super::*;

fn with_mss(src: &str, dst: &str, flags: u8, mss: u16) -> Vec<u8> {
    let [high, low] = mss.to_be_bytes();
    testing::tcp_with_options(src, dst, flags, &[2, 4, high, low], &[])
}

fn mss_of(bytes: &[u8]) -> u16 {
    let header_len = if bytes[0] >> 4 == 4 { 20 } else { 40 };
    u16::from_be_bytes([bytes[header_len + 22], bytes[header_len + 23]])
}

#[test]
fn segment_sizes_fit_the_overlay_in_both_directions() {
    let mut world = World::new();
    let (_, syn) = world.send(Ingress::Host, with_mss("203.0.113.9:5000", "192.0.2.1:30081", SYN, 1460));
    assert_eq!(mss_of(&syn), 1424, "1464 less 40");
    let left = tuple_of(&syn);
    let (_, answer) = world.send(PEER, with_mss("10.32.2.10:8080", &format!("10.32.1.1:{}", left.src_port), SYN | ACK, 8960));
    assert_eq!(mss_of(&answer), 1424, "what outside sends has to go back over the overlay");
    let (_, syn) = world.send(Ingress::Pods, with_mss("10.32.1.11:5001", "10.96.0.11:80", SYN, 1000));
    assert_eq!(mss_of(&syn), 1000, "never higher");
    let (_, syn) = world.send(Ingress::Pods, with_mss("[fd00:32:1::11]:5001", "[fd00:32:2::10]:80", SYN, 8900));
    assert_eq!(mss_of(&syn), 1404, "1464 less 60, without a flow too");
}

#[test]
fn a_superframe_whose_segments_are_too_long_is_answered_with_one_of_them() {
    for (client, dialled, mtu_at) in [("10.32.1.11:5000", "10.96.0.11:80", 26), ("[fd00:32:1::11]:5000", "[fd00:32:2::10]:80", 46)] {
        let mut world = World::new();
        world.leaves(Ingress::Pods, opener(protocol::TCP, client, dialled), TO_PEER);
        let bytes = testing::partial(&testing::tcp(client, dialled, ACK, &vec![1; 40_000]));
        for (size, fits) in [(1400u16, true), (1460, false)] {
            let mut copy = bytes.clone();
            let mut packet = testing::packet(&mut copy, Ingress::Pods);
            packet.offload = Offload { checksum: Checksum::Partial, gso: Gso::Tcp { size, ecn: false } };
            let mut verdicts = Vec::new();
            world.outbox.clear();
            let env = Env {
                snapshot: &world.snapshot,
                flows: world.flows.table(),
                now: world.now,
                now_ns: world.now.0 * 1_000_000,
                counters: &world.counters,
            };
            world.pipeline.run::<Touch>(&env, &mut [packet], &mut verdicts, &mut world.outbox);
            assert_eq!(verdicts[0] == TO_PEER, fits, "{verdicts:?}");
            if fits {
                continue;
            }
            let (egress, error) = world.answers().remove(0);
            testing::verify(&error);
            assert_eq!((egress, u16::from_be_bytes([error[mtu_at], error[mtu_at + 1]])), (Egress::Pods, 1464));
            let dialled = testing::tuple(protocol::TCP, client, dialled);
            let quoted = nat::quoted_addresses(&error, &parse(&testing::packet(&mut error.clone(), Ingress::Host)).unwrap()).unwrap();
            assert_eq!(quoted, (dialled.src, dialled.dst), "in the sender's terms");
        }
    }
}

/// An error about a datagram in fragments quotes its head, which has the ports but not the whole datagram.
#[test]
fn an_error_about_a_fragmented_datagram_is_translated_by_its_head() {
    for kind in [(3, 3), (11, 1)] {
        let mut world = World::new();
        let pieces = testing::fragments(&testing::udp("10.32.1.11:5000", "10.96.0.11:80", &[9; 4000]), 1464, 42);
        let (_, head) = world.send(Ingress::Pods, pieces[0].clone());
        let error = testing::icmp_error("10.32.2.10", "10.32.1.11", kind.0, kind.1, 0, &head[..548]);
        let (verdict, error) = world.send(PEER, error);
        assert_eq!((verdict, quoted_tuple(&error)), (Verdict::ToPods, testing::tuple(protocol::UDP, "10.32.1.11:5000", "10.96.0.11:80")));
        assert_eq!(tuple_of(&error).src, addr("10.96.0.11"));
        // Of a tail nobody can tell whose it is.
        let (_, tail) = world.send(Ingress::Pods, pieces[1].clone());
        let error = testing::icmp_error("10.32.2.10", "10.32.1.1", kind.0, kind.1, 0, &tail[..100]);
        assert!(matches!(world.send(PEER, error).0, Verdict::Drop(DropReason::IcmpErrorForged | DropReason::IcmpErrorUnmatched)));
    }
}

/// RFC 6946: an atomic fragment is a whole packet, and is translated like one.
#[test]
fn an_atomic_fragment_goes_through_translation_by_itself() {
    let mut world = World::new();
    let whole = testing::udp("[fd00:32:1::11]:5000", "[fd00:96::10]:80", b"question");
    let atomic = testing::fragment(&whole, 7, 0, whole.len() - 40, testing::More::None);
    let left = world.leaves(Ingress::Pods, atomic, Verdict::ToPods);
    assert_eq!(left, testing::tuple(protocol::UDP, "[fd00:32:1::11]:5000", "[fd00:32:1::10]:8080"));
    world.leaves(Ingress::Pods, reply(protocol::UDP, &left), Verdict::ToPods);
}

/// Every piece of a masqueraded datagram leaves from the node's address, and of its answer every piece reaches the pod.
#[test]
fn a_masqueraded_datagram_in_fragments_goes_and_comes_whole() {
    for order in [[0, 1, 2], [2, 0, 1], [1, 2, 0]] {
        let mut world = World::new();
        let (mut left, mut ports) = (Vec::new(), Vec::new());
        let send = |world: &mut World, ingress, bytes, out: &mut Vec<Vec<u8>>, to: Verdict| {
            let (verdict, bytes) = world.send(ingress, bytes);
            out.extend((verdict == to).then_some(bytes));
            out.extend(world.answers().into_iter().map(|(_, bytes)| bytes));
        };
        let pieces = testing::fragments(&testing::udp("10.32.1.11:5000", "203.0.113.9:53", &[9; 4000]), 1464, 42);
        for at in order {
            send(&mut world, Ingress::Pods, pieces[at].clone(), &mut left, Verdict::ToHost);
            ports.extend(world.outbox.masquerade_ports().iter().map(|port| port.reply.dst_port));
        }
        assert!(left.len() == 3 && left.iter().all(|bytes| bytes[12..20] == [192, 0, 2, 1, 203, 0, 113, 9]), "{:?}", world.drops());
        assert_eq!(ports.len(), 1);
        let answer = testing::udp("203.0.113.9:53", &format!("192.0.2.1:{}", ports[0]), &[8; 4000]);
        let mut back = Vec::new();
        for at in order {
            send(&mut world, Ingress::Host, testing::fragments(&answer, 1464, 43)[at].clone(), &mut back, Verdict::ToPods);
        }
        assert!(back.len() == 3 && back.iter().all(|bytes| bytes[12..20] == [203, 0, 113, 9, 10, 32, 1, 11]), "{:?}", world.drops());
    }
}

#[test]
fn a_packet_that_runs_out_of_hops_is_answered_by_the_name_its_sender_knows() {
    let mut world = World::new();
    let left = world.leaves(Ingress::Host, opener(protocol::UDP, "203.0.113.9:5000", "192.0.2.1:30080"), Verdict::ToPods);
    // Towards the pod: somebody outside dialled the node, and the node it is that answers.
    let bytes = testing::with_ttl(opener(protocol::UDP, "203.0.113.9:5000", "192.0.2.1:30080"), 1);
    assert_eq!(world.send(Ingress::Host, bytes).0, Verdict::Drop(DropReason::TtlExceeded));
    let (egress, error) = world.answers().remove(0);
    assert_eq!((egress, tuple_of(&error).src, quoted_tuple(&error).dst), (Egress::Host, addr("192.0.2.1"), addr("192.0.2.1")));
    // Back towards the outside: the pod answered the gateway's address.
    let bytes = testing::with_ttl(reply(protocol::UDP, &left), 1);
    assert_eq!(world.send(Ingress::Pods, bytes).0, Verdict::Drop(DropReason::TtlExceeded));
    let (egress, error) = world.answers().remove(0);
    assert_eq!((egress, tuple_of(&error).dst, quoted_tuple(&error).dst), (Egress::Pods, addr("10.32.1.10"), addr("10.32.1.1")));
    // Nothing is said of what is not the first fragment, nor of errors.
    let pieces = testing::fragments(&testing::udp("10.32.1.11:5000", "10.96.0.10:80", &[9; 4000]), 1464, 42);
    for (at, said) in [(0, 1), (1, 0), (2, 0)] {
        assert_eq!(world.send(Ingress::Pods, testing::with_ttl(pieces[at].clone(), 1)).0, Verdict::Drop(DropReason::TtlExceeded));
        assert_eq!(world.answers().len(), said);
    }
}
