//! Pods that are not masqueraded.

use super::*;
use crate::trace::trace;

/// Gives both addresses of pod .11 this entry.
pub(super) fn set_pod(world: &mut World, pod: &Pod) {
    let others = ["10.32.1.10", "fd00:32:1::10"].map(|ip| (addr(ip), Pod::new(1464)));
    let ours = ["10.32.1.11", "fd00:32:1::11"].map(|ip| (addr(ip), pod.clone()));
    world.snapshot.pods = PodTable::new(others.into_iter().chain(ours));
}

#[test]
fn a_pod_without_masquerade_keeps_its_address_to_the_outside_and_its_neighbour_does_not() {
    for protocol in [protocol::TCP, protocol::UDP] {
        for (ours, beside, outside) in
            [("10.32.1.11:5000", "10.32.1.10:5000", "203.0.113.9:443"), ("[fd00:32:1::11]:5000", "[fd00:32:1::10]:5000", "[2001:db8:9::9]:443")]
        {
            let mut world = World::new();
            set_pod(&mut world, &Pod { masquerade: false, ..Pod::new(1464) });
            let left = world.leaves(Ingress::Pods, opener(protocol, ours, outside), Verdict::ToHost);
            assert_eq!(left, testing::tuple(protocol, ours, outside));
            assert_eq!(world.flows.table().len(), 0, "as where the node masquerades nobody");
            let answer = world.leaves(Ingress::Host, reply(protocol, &left), Verdict::ToPods);
            assert_eq!(answer, left.reversed());
            let left = world.leaves(Ingress::Pods, opener(protocol, beside, outside), Verdict::ToHost);
            assert_eq!((left.src, left.src_port >= 61000), (addr(if left.is_v4() { "192.0.2.1" } else { "2001:db8::1" }), true));
        }
    }
    // Without ports, too; a router's error about it comes through, and not one to a pod that is masqueraded.
    let mut world = World::new();
    set_pod(&mut world, &Pod { masquerade: false, ..Pod::new(1464) });
    assert_eq!(world.send(Ingress::Pods, testing::ip("10.32.1.11", "203.0.113.9", 132, &[0; 20])).0, Verdict::ToHost);
    assert_eq!(world.send(Ingress::Pods, testing::ip("10.32.1.10", "203.0.113.9", 132, &[0; 20])).0, Verdict::Drop(DropReason::ProtocolUnsupported));
    for (pod, expected) in [("10.32.1.11", Verdict::ToPods), ("10.32.1.10", Verdict::Drop(DropReason::IcmpErrorUnmatched))] {
        let quoted = testing::ip(pod, "203.0.113.9", 132, &[0; 20]);
        assert_eq!(world.send(Ingress::Host, testing::icmp_error("198.51.100.1", pod, 3, 1, 0, &quoted)).0, expected);
    }
}

#[test]
fn a_pod_without_masquerade_reaches_a_service_outside_from_its_own_address() {
    let mut world = World::new();
    set_pod(&mut world, &Pod { masquerade: false, ..Pod::new(1464) });
    let outside = service(70, TrafficPolicy::Cluster, vec![backend("198.51.100.53", 53, Place::Outside)]);
    world.snapshot.services = world.snapshot.services.with(faces("10.96.0.70", protocol::UDP, 53, 30070, &outside));
    let left = world.leaves(Ingress::Pods, opener(protocol::UDP, "10.32.1.11:5000", "10.96.0.70:53"), Verdict::ToHost);
    assert_eq!(left, testing::tuple(protocol::UDP, "10.32.1.11:5000", "198.51.100.53:53"));
    let answer = world.leaves(Ingress::Host, reply(protocol::UDP, &left), Verdict::ToPods);
    assert_eq!(answer, testing::tuple(protocol::UDP, "10.96.0.70:53", "10.32.1.11:5000"));
    let left = world.leaves(Ingress::Pods, opener(protocol::UDP, "10.32.1.10:5000", "10.96.0.70:53"), Verdict::ToHost);
    assert_eq!(left.src, addr("192.0.2.1"), "its neighbour is masqueraded");
}

#[test]
fn a_trace_shows_who_is_not_masqueraded() {
    let mut world = World::new();
    set_pod(&mut world, &Pod { masquerade: false, ..Pod::new(1464) });
    let translate = |src, dst| -> Vec<String> {
        let steps = trace(&world.snapshot, &world.flows.table(), testing::tuple(protocol::TCP, src, dst), world.now);
        steps.into_iter().filter(|step| step.stage == "translate").map(|step| step.detail).collect()
    };
    assert_eq!(translate("10.32.1.11:5000", "203.0.113.9:443"), ["nothing: this pod is not masqueraded"]);
    assert_eq!(translate("10.32.1.11:5000", "10.32.1.10:80").len(), 0);
    assert!(translate("10.32.1.10:5000", "203.0.113.9:443")[0].contains("masquerade port"));
}
