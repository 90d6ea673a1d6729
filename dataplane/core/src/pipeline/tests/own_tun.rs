//! Pods with a TUN of their own: the descriptor says who sends, and the gateway is the first router.

use super::*;
use crate::verdict::TunId;

/// Of pod .10.
pub(super) const FIRST: TunId = TunId::new(7);
/// Of pod .11.
const SECOND: TunId = TunId::new(8);

/// The usual world, in which these pods have TUNs and the others veths.
pub(super) fn world(tuns: &[(&str, TunId)]) -> World {
    let mut world = World::new();
    let pods = world.snapshot.pods.iter().map(|(at, pod)| {
        let tun = tuns.iter().find(|(host, _)| at.to_string().ends_with(host)).map(|(_, tun)| *tun);
        (at, Pod { tun, ..pod.clone() })
    });
    world.snapshot.pods = PodTable::new(pods.collect::<Vec<_>>());
    world
}

fn both() -> World {
    world(&[("10", FIRST), ("11", SECOND)])
}

#[test]
fn every_path_leads_to_the_pods_own_tun_and_back_from_it() {
    use Verdict::{ToHost, ToPod};
    let (first, second) = (Ingress::Pod(FIRST), Ingress::Pod(SECOND));
    type Row = (Ingress, &'static str, &'static str, Verdict, Ingress, &'static str, Verdict, &'static str);
    let rows: &[Row] = &[
        (second, "10.32.1.11:5000", "10.32.1.10:8080", ToPod(FIRST), first, "10.32.1.11", ToPod(SECOND), "pods of one node"),
        (second, "10.32.1.11:5000", "10.32.2.10:8080", TO_PEER, PEER, "10.32.1.11", ToPod(SECOND), "pods of two"),
        (second, "10.32.1.11:5000", "10.96.0.10:80", ToPod(FIRST), first, "10.32.1.11", ToPod(SECOND), "a service"),
        (first, "10.32.1.10:5000", "10.96.0.10:80", ToPod(FIRST), first, "10.32.1.1", ToPod(FIRST), "a hairpin"),
        (first, "10.32.1.10:5000", "203.0.113.9:443", ToHost, Ingress::Host, "192.0.2.1", ToPod(FIRST), "to the outside"),
        (first, "10.32.1.10:5000", "192.0.2.1:22", ToHost, Ingress::Host, "10.32.1.10", ToPod(FIRST), "to the node"),
        (Ingress::Host, "192.0.2.1:5000", "10.32.1.10:8080", ToPod(FIRST), first, "192.0.2.1", ToHost, "from the node"),
        (Ingress::Host, "203.0.113.9:5000", "192.0.2.1:30080", ToPod(FIRST), first, "10.32.1.1", ToHost, "a node port"),
        (PEER, "10.32.2.11:5000", "10.32.1.10:8080", ToPod(FIRST), first, "10.32.2.11", TO_PEER, "from a pod elsewhere"),
        (second, "[fd00:32:1::11]:5000", "[fd00:96::10]:80", ToPod(FIRST), first, "fd00:32:1::11", ToPod(SECOND), "a service, IPv6"),
    ];
    for protocol in [protocol::TCP, protocol::UDP] {
        for (ingress, client, dialled, verdict, from, seen, back, why) in rows {
            let mut world = both();
            let left = world.leaves(*ingress, opener(protocol, client, dialled), *verdict);
            assert_eq!(left.src, addr(seen), "{why}");
            let answer = world.leaves(*from, reply(protocol, &left), *back);
            assert_eq!(answer, testing::tuple(protocol, client, dialled).reversed(), "{why}");
        }
    }
}

#[test]
fn a_source_that_is_not_the_tuns_own_pod_is_dropped_by_name() {
    let mut world = world(&[("10", FIRST)]);
    for (ingress, src, dst) in [
        (Ingress::Pod(FIRST), "10.32.1.11:5000", "10.32.1.10:80"),
        (Ingress::Pod(FIRST), "10.32.2.10:5000", "10.32.1.11:80"),
        (Ingress::Pod(FIRST), "192.0.2.1:5000", "10.32.1.11:80"),
        (Ingress::Pod(FIRST), "10.32.1.1:5000", "10.32.1.11:80"),
        (Ingress::Pod(FIRST), "10.96.0.10:80", "10.32.1.11:80"),
        (Ingress::Pod(FIRST), "[fd00:32:1::11]:5000", "[fd00:32:1::10]:80"),
        // Of a pod that has gone, or of none.
        (Ingress::Pod(SECOND), "10.32.1.10:5000", "10.32.1.11:80"),
        // Behind the TUN `pods` are the pods with veths alone.
        (Ingress::Pods, "10.32.1.10:5000", "10.32.1.11:80"),
        (Ingress::Pods, "[fd00:32:1::10]:5000", "[fd00:32:1::11]:80"),
    ] {
        let (verdict, _) = world.send(ingress, opener(protocol::UDP, src, dst));
        assert_eq!(verdict, Verdict::Drop(DropReason::SpoofedByPod), "{src} from {ingress:?}");
        assert!(world.answers().is_empty(), "the liar is not told");
    }
    world.leaves(Ingress::Pod(FIRST), opener(protocol::UDP, "10.32.1.10:5000", "10.32.1.11:80"), Verdict::ToPods);
    world.leaves(Ingress::Pods, opener(protocol::UDP, "10.32.1.11:5000", "10.32.1.10:80"), Verdict::ToPod(FIRST));
}

/// One on the way in from a TUN; none on the way to one; the kernel takes its own on a veth and an uplink (RFC 1812 §5.3.1).
#[test]
fn the_ttl_loses_one_where_the_kernel_takes_none() {
    let (tun, veth) = (Ingress::Pod(FIRST), Ingress::Pods);
    // From where, whom to whom, the TTL it comes with, and what it leaves with, or `None` if it dies here.
    type Row = (Ingress, &'static str, &'static str, u8, Option<u8>, &'static str);
    let rows: &[Row] = &[
        (tun, "10.32.1.10:5000", "10.32.2.10:80", 64, Some(63), "to another node"),
        (tun, "10.32.1.10:5000", "10.32.2.10:80", 2, Some(1), "which delivers it with what is left"),
        (tun, "10.32.1.10:5000", "10.32.2.10:80", 1, None, "the gateway is the first router"),
        (tun, "10.32.1.10:5000", "192.0.2.1:22", 2, Some(1), "to the node"),
        (tun, "10.32.1.10:5000", "192.0.2.1:22", 1, None, "which is a hop away"),
        (tun, "10.32.1.10:5000", "10.32.1.11:80", 3, Some(2), "to a veth, where the kernel takes the second"),
        (tun, "10.32.1.10:5000", "10.32.1.11:80", 2, None, "and would find none left"),
        (tun, "10.32.1.10:5000", "203.0.113.9:443", 2, None, "as on an uplink"),
        (tun, "10.32.1.10:5000", "10.96.0.10:80", 2, Some(1), "a hairpin is a way in and out"),
        (veth, "10.32.1.11:5000", "10.32.1.10:80", 1, Some(1), "the kernel took one on the veth already"),
        (Ingress::Host, "192.0.2.1:5000", "10.32.1.10:80", 1, Some(1), "the node is on the same link"),
        (PEER, "10.32.2.10:5000", "10.32.1.10:80", 1, Some(1), "the other node's gateway took one"),
        (tun, "[fd00:32:1::10]:5000", "[fd00:32:2::10]:80", 64, Some(63), "IPv6"),
        (tun, "[fd00:32:1::10]:5000", "[fd00:32:2::10]:80", 1, None, "IPv6"),
    ];
    for protocol in [protocol::TCP, protocol::UDP] {
        for (ingress, src, dst, ttl, left, why) in rows {
            let mut world = world(&[("10", FIRST)]);
            let (verdict, bytes) = world.send(*ingress, testing::with_ttl(opener(protocol, src, dst), *ttl));
            let at = if bytes[0] >> 4 == 4 { 8 } else { 7 };
            match left {
                Some(left) => assert_eq!(bytes[at], *left, "{src} to {dst}: {why}; {verdict:?}"),
                None => {
                    assert_eq!(verdict, Verdict::Drop(DropReason::TtlExceeded), "{src} to {dst}: {why}");
                    let (egress, error) = world.answers().remove(0);
                    assert_eq!(egress, Egress::Pod(FIRST));
                    assert_eq!(tuple_of(&error).src, addr(if bytes[0] >> 4 == 4 { "10.32.1.1" } else { "fd00:32:1::1" }));
                    // The quote is what was sent, TTL included (RFC 792, RFC 4443 §3.3).
                    let quote = if bytes[0] >> 4 == 4 { &error[28..] } else { &error[48..] };
                    assert_eq!((quote[at], quoted_tuple(&error)), (*ttl, testing::tuple(protocol, src, dst)));
                }
            }
        }
    }
}

fn quoted_tuple(error: &[u8]) -> Tuple {
    let mut bytes = error.to_vec();
    let parsed = parse(&testing::packet(&mut bytes, Ingress::Host)).unwrap();
    nat::quoted_tuple(&bytes, &parsed).unwrap()
}

#[test]
fn answers_go_back_by_the_tun_of_who_asked() {
    let mut world = both();
    // Nobody listens behind the VIP; a ping of the gateway; one of a VIP, whose reply costs no hop; an address that no pod has.
    assert!(matches!(world.send(Ingress::Pod(FIRST), opener(protocol::TCP, "10.32.1.10:5000", "10.96.0.16:80")).0, Verdict::Drop(_)));
    assert_eq!(world.answers()[0].0, Egress::Pod(FIRST));
    assert_eq!(world.send(Ingress::Pod(FIRST), testing::echo_request("10.32.1.10", "10.32.1.1", 1, 1, b"ping")).0, Verdict::ToNetstack);
    let ping = testing::with_ttl(testing::echo_request("10.32.1.11", "10.96.0.10", 5, 6, b"ping"), 1);
    assert_eq!(world.leaves(Ingress::Pod(SECOND), ping, Verdict::ToPod(SECOND)).src, addr("10.96.0.10"));
    assert!(matches!(world.send(Ingress::Pod(SECOND), opener(protocol::UDP, "10.32.1.11:5000", "10.32.1.99:80")).0, Verdict::Drop(_)));
    assert_eq!(world.answers()[0].0, Egress::Pod(SECOND));
    // Too big for the way to the other node: the sender is told the size.
    let big = testing::with_dont_fragment(testing::udp("10.32.1.10:5000", "10.32.2.10:80", &[0; 1450]));
    assert_eq!(world.send(Ingress::Pod(FIRST), big).0, Verdict::Drop(DropReason::PacketTooBig));
    let (egress, error) = world.answers().remove(0);
    assert_eq!((egress, u16::from_be_bytes([error[26], error[27]])), (Egress::Pod(FIRST), 1464));
    // An error of the backend's host comes back under the name of what was dialled, to the TUN of who dialled.
    let (_, left) = world.send(Ingress::Pod(SECOND), opener(protocol::UDP, "10.32.1.11:5000", "10.96.0.10:80"));
    let refused = testing::icmp_error("10.32.1.10", "10.32.1.11", 3, 3, 0, &left);
    assert_eq!(world.leaves(Ingress::Pod(FIRST), refused, Verdict::ToPod(SECOND)).src, addr("10.96.0.10"));
}

#[test]
fn a_superframe_passes_whole_with_its_checksum_left_to_the_kernel() {
    for (src, dst) in [("10.32.1.10:5000", "10.32.1.11:80"), ("[fd00:32:1::10]:5000", "[fd00:32:1::11]:80")] {
        let mut world = both();
        let sent = testing::partial(&testing::tcp(src, dst, ACK, &vec![1; 40_000]));
        let mut bytes = sent.clone();
        let offload = Offload { checksum: Checksum::Partial, gso: Gso::Tcp { size: 1400, ecn: false } };
        let mut packet = testing::packet(&mut bytes, Ingress::Pod(FIRST));
        packet.offload = offload;
        let mut verdicts = Vec::new();
        let env =
            Env { snapshot: &world.snapshot, flows: world.flows.table(), now: world.now, now_ns: world.now.0 * 1_000_000, counters: &world.counters };
        let mut batch = [packet];
        world.pipeline.run::<Touch>(&env, &mut batch, &mut verdicts, &mut world.outbox);
        assert_eq!((verdicts[0], batch[0].offload), (Verdict::ToPod(SECOND), offload));
        assert_eq!(bytes, testing::with_ttl(sent, 63), "nothing but a hop");
    }
}

#[test]
fn each_fragment_loses_one_whichever_comes_first() {
    let mut world = both();
    let pieces = testing::fragments(&testing::udp("10.32.1.10:5000", "10.96.0.10:80", &[9; 4000]), 1464, 42);
    assert_eq!(world.send(Ingress::Pod(FIRST), pieces[2].clone()).0, Verdict::Consumed(Consumed::Held), "before its head");
    let (verdict, head) = world.send(Ingress::Pod(FIRST), pieces[0].clone());
    assert_eq!((verdict, head[8]), (Verdict::ToPod(FIRST), 63), "a hairpin");
    let (egress, held) = world.answers().remove(0);
    assert_eq!((egress, held[8]), (Egress::Pod(FIRST), 63));
    let (verdict, tail) = world.send(Ingress::Pod(FIRST), pieces[1].clone());
    assert_eq!((verdict, tail[8]), (Verdict::ToPod(FIRST), 63));
    // A liar's tails follow nobody's head.
    assert_eq!(world.send(Ingress::Pod(SECOND), pieces[1].clone()).0, Verdict::Drop(DropReason::SpoofedByPod));
}

#[test]
fn a_trace_names_the_pods_own_tun() {
    let world = both();
    let steps =
        crate::trace::trace(&world.snapshot, &world.flows.table(), testing::tuple(protocol::TCP, "10.32.1.10:5000", "10.32.1.11:80"), world.now);
    let text = steps.iter().map(|step| format!("{}: {}\n", step.stage, step.detail)).collect::<String>();
    assert!(text.contains("the pod's own TUN") && text.contains("written to the pod's own TUN"), "{text}");
}
