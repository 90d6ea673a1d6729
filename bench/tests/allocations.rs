//! A worker allocates nothing once it runs: every path of the pipeline, after one round to warm up, leaves the allocator alone.

use podgate_bench::world::{Family, Traffic, World, from_peer, packet, to_peers, to_pods, to_services};
use podgate_core::addr::protocol;
use podgate_core::packet::{Checksum, Gso, Ingress, Offload};
use podgate_core::testing::{self, flags};

const PLAIN: Offload = Offload { checksum: Checksum::Full, gso: Gso::None };
const FLOWS: u32 = 1_000;

/// Sends the same packets twice, and says how many times memory was taken the second time. The flows of the first round end in between,
/// so that they are created again.
fn allocations_of(packets: Vec<Vec<u8>>, offload: Offload, ingress: Ingress) -> u64 {
    let mut world = World::new(FLOWS as usize * 2);
    let mut traffic = Traffic::new(packets, offload, ingress);
    let mut round = |world: &mut World| {
        for _ in 0..traffic.len().div_ceil(64) {
            world.run(&mut traffic.next_batch::<64>());
        }
    };
    round(&mut world);
    world.flows.table().end_matching(|_| true);
    allocation_counter::measure(|| {
        // Flows are created in the first of these rounds and found in the second.
        round(&mut world);
        round(&mut world);
    })
    .count_total
}

#[test]
fn the_counter_sees_an_allocation() {
    assert_eq!(allocation_counter::measure(|| drop(std::hint::black_box(Box::new(1)))).count_total, 1);
}

#[test]
fn flows_are_created_and_followed_without_an_allocation() {
    for family in [Family::V4, Family::V6] {
        for protocol in [protocol::TCP, protocol::UDP] {
            assert_eq!(allocations_of(to_services(family, protocol, FLOWS, 64, flags::SYN), PLAIN, Ingress::Pods), 0, "{family:?} {protocol}");
        }
    }
}

#[test]
fn plain_packets_go_on_without_an_allocation() {
    for family in [Family::V4, Family::V6] {
        assert_eq!(allocations_of(to_pods(family, FLOWS, 64), PLAIN, Ingress::Pods), 0, "{family:?} to pods");
        assert_eq!(allocations_of(to_peers(family, FLOWS, 64), PLAIN, Ingress::Pods), 0, "{family:?} to peers");
    }
}

#[test]
fn superframes_go_on_without_an_allocation() {
    let offload = Offload { checksum: Checksum::Partial, gso: Gso::Tcp { size: 1_400, ecn: false } };
    assert_eq!(allocations_of(to_services(Family::V4, protocol::TCP, 100, 9_000, flags::SYN), offload, Ingress::Pods), 0);
}

#[test]
fn fragments_are_held_and_released_without_an_allocation() {
    for family in [Family::V4, Family::V6] {
        let whole = packet(
            family,
            protocol::UDP,
            &family.with_port(&family.pod(1), 5000),
            &family.with_port(&family.vip(3), 80),
            if family == Family::V4 { 20 + 2_720 } else { 40 + 2_720 },
            0,
        );
        let fragments: Vec<Vec<u8>> = (0..100)
            .flat_map(|id| {
                let header = if family == Family::V4 { 20 } else { 40 + 8 };
                // Tails first: they wait for their head.
                testing::fragments(&whole, header + 1_360, id).into_iter().rev().collect::<Vec<_>>()
            })
            .collect();
        assert_eq!(allocations_of(fragments, PLAIN, Ingress::Pods), 0, "{family:?}");
    }
}

#[test]
fn answers_and_drops_are_made_without_an_allocation() {
    let v4 = Family::V4;
    let (pod, stranger) = (v4.with_port(&v4.pod(1), 5000), v4.with_port("10.32.1.254", 5000));
    let unknown_port = v4.with_port(&v4.vip(1), 81);
    let refused = vec![packet(v4, protocol::TCP, &pod, &unknown_port, 64, flags::SYN); 100];
    assert_eq!(allocations_of(refused, PLAIN, Ingress::Pods), 0, "a reset");
    let refused = vec![packet(v4, protocol::UDP, &pod, &unknown_port, 64, 0); 100];
    assert_eq!(allocations_of(refused, PLAIN, Ingress::Pods), 0, "an ICMP error");
    let spoofed = vec![packet(v4, protocol::UDP, &stranger, &pod, 64, 0); 100];
    assert_eq!(allocations_of(spoofed.clone(), PLAIN, Ingress::Pods), 0, "a spoof from a pod");
    assert_eq!(allocations_of(spoofed, PLAIN, from_peer()), 0, "a spoof from a peer");
    let large = vec![packet(v4, protocol::UDP, &pod, &v4.with_port(&v4.pod(2), 80), 3_000, 0); 10];
    assert_eq!(allocations_of(large, PLAIN, Ingress::Pods), 0, "a packet that is cut");
}
