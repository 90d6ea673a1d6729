//! Flows over time: endpoints that leave and come back, connections that end and begin again on one tuple, pods that go.

use super::*;

const FIN: u8 = 0x01;

fn endpoints(world: &mut World, protocol: u8, backends: Vec<Backend>) {
    let id = if protocol == protocol::TCP { 1 } else { 2 };
    let service = service(id, TrafficPolicy::Cluster, backends);
    world.snapshot.services = world.snapshot.services.with(faces("10.96.0.10", protocol, 80, 30080, &service));
}

/// What the control thread does after it published tables.
fn end_stale(world: &World) -> usize {
    world.flows.table().end_matching(|flow| flow.original.protocol == protocol::UDP && !decide::still_serves(&world.snapshot, flow))
}

/// Semantics row 10.
#[test]
fn a_udp_client_moves_with_its_next_datagram_and_meets_refusals_while_nobody_serves() {
    let mut world = World::new();
    let datagram = || opener(protocol::UDP, "10.32.1.11:5000", "10.96.0.10:80");
    let old = world.leaves(Ingress::Pods, datagram(), Verdict::ToPods);
    assert_eq!(end_stale(&world), 0, "a flow whose endpoint serves is kept");
    endpoints(&mut world, protocol::UDP, vec![]);
    assert_eq!(end_stale(&world), 1, "at zero endpoints too");
    assert_eq!(world.send(Ingress::Pods, datagram()).0, Verdict::Drop(DropReason::NoBackendRejected));
    assert_eq!(world.answers().len(), 1);
    endpoints(&mut world, protocol::UDP, vec![backend("10.32.2.10", 8080, Place::RemotePod)]);
    let new = world.leaves(Ingress::Pods, datagram(), TO_PEER);
    assert_eq!((new.src, new.src_port), (addr("10.32.1.11"), 5000));
    // A late answer of the old endpoint is no answer to anything: it goes as what it says, and does not come from the VIP.
    let late = world.leaves(Ingress::Pods, reply(protocol::UDP, &old), Verdict::ToPods);
    assert_eq!(late.src, addr("10.32.1.10"));
    endpoints(&mut world, protocol::UDP, vec![backend("10.32.1.10", 8080, Place::LocalPod)]);
    assert_eq!(end_stale(&world), 1);
    assert_eq!(world.leaves(Ingress::Pods, datagram(), Verdict::ToPods), old);
}

/// Semantics row 11.
#[test]
fn a_tcp_connection_outlives_its_endpoint_in_the_list_and_the_next_one_does_not() {
    let mut world = World::new();
    let segment = |flags| testing::tcp("10.32.1.11:5000", "10.96.0.10:80", flags, &[]);
    let left = world.leaves(Ingress::Pods, segment(SYN), Verdict::ToPods);
    world.leaves(Ingress::Pods, reply(protocol::TCP, &left), Verdict::ToPods);
    world.leaves(Ingress::Pods, segment(ACK), Verdict::ToPods);
    endpoints(&mut world, protocol::TCP, vec![]);
    assert_eq!(end_stale(&world), 0);
    for flags in [ACK, FIN | ACK, ACK] {
        world.leaves(Ingress::Pods, segment(flags), Verdict::ToPods);
    }
    assert_eq!(world.send(Ingress::Pods, segment(SYN)).0, Verdict::Drop(DropReason::NoBackendRejected));
    endpoints(&mut world, protocol::TCP, vec![backend("10.32.2.10", 8080, Place::RemotePod)]);
    world.leaves(Ingress::Pods, segment(SYN), TO_PEER);
    assert_eq!(world.flows.table().len(), 1);
}

/// A client that reuses its port within TIME_WAIT, masqueraded too: a new connection, with a port of its own.
#[test]
fn a_tuple_is_used_again_after_both_fins_or_a_reset_and_not_before() {
    for (dialled, verdict, ingress) in [("10.96.0.10:80", Verdict::ToPods, Ingress::Pods), ("203.0.113.9:443", Verdict::ToHost, Ingress::Host)] {
        let mut world = World::new();
        let segment = |flags| testing::tcp("10.32.1.11:5000", dialled, flags, &[]);
        let left = world.leaves(Ingress::Pods, segment(SYN), verdict);
        let first = world.flows.table().lookup(&tuple_of(&segment(SYN))).unwrap().at;
        let show = |ip: Addr, port: u16| std::net::SocketAddr::new(ip.ip(), port).to_string();
        let back = |left: &Tuple, flags| testing::tcp(&show(left.dst, left.dst_port), &show(left.src, left.src_port), flags, &[]);
        world.leaves(ingress, back(&left, SYN | ACK), Verdict::ToPods);
        world.leaves(Ingress::Pods, segment(ACK), verdict);
        world.leaves(Ingress::Pods, segment(FIN | ACK), verdict);
        world.leaves(Ingress::Pods, segment(SYN), verdict);
        assert!(world.flows.table().is_live(first), "half closed: the other side may still send");
        world.leaves(ingress, back(&left, FIN | ACK), Verdict::ToPods);
        let again = world.leaves(Ingress::Pods, segment(SYN), verdict);
        assert!(!world.flows.table().is_live(first));
        world.leaves(ingress, back(&again, RST | ACK), Verdict::ToPods);
        world.leaves(Ingress::Pods, segment(SYN), verdict);
        assert_eq!(world.flows.table().len(), 1);
    }
}

/// A pod that is gone is not reached through a flow that somebody forgot: nothing goes to an address that nobody has.
#[test]
fn a_flow_does_not_lead_to_a_pod_that_left() {
    let mut world = World::new();
    let left = world.leaves(Ingress::Pods, opener(protocol::UDP, "10.32.1.11:5000", "10.96.0.10:80"), Verdict::ToPods);
    world.leaves(Ingress::Host, opener(protocol::UDP, "203.0.113.9:7", "10.32.1.11:53"), Verdict::ToPods);
    world.snapshot.pods = PodTable::new([(addr("10.32.1.10"), Pod::new(1464))]);
    assert_eq!(world.send(Ingress::Pods, reply(protocol::UDP, &left)).0, Verdict::Drop(DropReason::NoRoutePod));
    assert_eq!(world.send(Ingress::Host, opener(protocol::UDP, "203.0.113.9:7", "10.32.1.11:53")).0, Verdict::Drop(DropReason::NoRoutePod));
}

/// A client that has spoken to a backend through a service and comes back to it directly, from the same port, is answered by whom it dialled.
#[test]
fn a_direct_connection_is_not_taken_for_one_through_a_service() {
    const RST: u8 = 0x04;
    for protocol in [protocol::TCP, protocol::UDP] {
        let mut world = World::new();
        let through = world.leaves(Ingress::Pods, opener(protocol, "10.32.1.11:5000", "10.96.0.10:80"), Verdict::ToPods);
        assert_eq!(through, testing::tuple(protocol, "10.32.1.11:5000", "10.32.1.10:8080"));
        // The old flow lives: the direct one needs a source of the gateway's.
        let direct = world.leaves(Ingress::Pods, opener(protocol, "10.32.1.11:5000", "10.32.1.10:8080"), Verdict::ToPods);
        assert_eq!((direct.src, direct.dst), (addr("10.32.1.1"), addr("10.32.1.10")));
        let answer = world.leaves(Ingress::Pods, reply(protocol, &direct), Verdict::ToPods);
        assert_eq!(answer, testing::tuple(protocol, "10.32.1.10:8080", "10.32.1.11:5000"));
        let answer = world.leaves(Ingress::Pods, reply(protocol, &through), Verdict::ToPods);
        assert_eq!(answer, testing::tuple(protocol, "10.96.0.10:80", "10.32.1.11:5000"), "and the old one is still its own");
    }
    // A connection that is over gives way, and nothing is replaced.
    let mut world = World::new();
    world.leaves(Ingress::Pods, opener(protocol::TCP, "10.32.1.11:5000", "10.96.0.10:80"), Verdict::ToPods);
    world.leaves(Ingress::Pods, testing::tcp("10.32.1.11:5000", "10.96.0.10:80", RST, &[]), Verdict::ToPods);
    let direct = world.leaves(Ingress::Pods, opener(protocol::TCP, "10.32.1.11:5000", "10.32.1.10:8080"), Verdict::ToPods);
    assert_eq!(direct, testing::tuple(protocol::TCP, "10.32.1.11:5000", "10.32.1.10:8080"));
    assert_eq!(world.flows.table().len(), 0);
    // The same between two services with one backend.
    let also = service(77, TrafficPolicy::Cluster, vec![backend("10.32.1.10", 8080, Place::LocalPod)]);
    world.snapshot.services = world.snapshot.services.with(faces("10.96.0.77", protocol::TCP, 80, 30077, &also));
    world.leaves(Ingress::Pods, opener(protocol::TCP, "10.32.1.11:5000", "10.96.0.10:80"), Verdict::ToPods);
    world.leaves(Ingress::Pods, testing::tcp("10.32.1.11:5000", "10.96.0.10:80", RST, &[]), Verdict::ToPods);
    let left = world.leaves(Ingress::Pods, opener(protocol::TCP, "10.32.1.11:5000", "10.96.0.77:80"), Verdict::ToPods);
    assert_eq!(left.src, addr("10.32.1.11"));
}

/// A client's kernel gives a port to one connection after another as long as they go to different addresses; through VIPs with the same endpoints
/// they would meet at one of them, whose kernel remembers the last (TIME_WAIT) and refuses the next.
#[test]
fn a_port_that_is_in_use_towards_an_endpoint_is_led_to_another_under_its_own_name() {
    for protocol in [protocol::TCP, protocol::UDP] {
        let mut world = World::new();
        world.snapshot.pods = PodTable::new(["10.32.1.10", "10.32.1.11", "10.32.1.12"].map(|ip| (addr(ip), Pod::new(1464))));
        let both = ["10.32.1.10", "10.32.1.12"].map(|ip| backend(ip, 8080, Place::LocalPod));
        for number in 1..=3 {
            let same = service(70 + number, TrafficPolicy::Cluster, both.to_vec());
            world.snapshot.services = world.snapshot.services.with(faces(&format!("10.96.0.7{number}"), protocol, 80, 30070 + number as u16, &same));
        }
        let mut firsts = [0; 2];
        for port in 5000..5064 {
            let client = format!("10.32.1.11:{port}");
            let [first, second, third] =
                [1, 2, 3].map(|number| world.leaves(Ingress::Pods, opener(protocol, &client, &format!("10.96.0.7{number}:80")), Verdict::ToPods));
            assert_eq!([first.src, second.src], [addr("10.32.1.11"); 2]);
            assert_eq!([first.src_port, second.src_port], [port; 2]);
            assert_ne!(first.dst, second.dst);
            assert_eq!(third.src, addr("10.32.1.1"), "where none is free the source is the gateway's");
            firsts[usize::from(first.dst == both[0].addr)] += 1;
            for (left, number) in [(first, 1), (second, 2), (third, 3)] {
                let answer = world.leaves(Ingress::Pods, reply(protocol, &left), Verdict::ToPods);
                assert_eq!(answer, testing::tuple(protocol, &format!("10.96.0.7{number}:80"), &client));
            }
        }
        assert!(firsts.iter().all(|count| *count > 16), "the first choice is as even as ever: {firsts:?}");
    }
}

#[test]
fn a_worker_that_comes_later_ends_no_half_open_flow_of_another_while_there_is_room() {
    let mut world = World::new();
    Arc::get_mut(&mut world.snapshot.node).expect("nobody else has it").workers = 2;
    // More than a search for a free record looks at, less than half of the table.
    for port in 2_000..2_400 {
        world.leaves(Ingress::Pods, opener(protocol::TCP, &format!("10.32.1.11:{port}"), "10.96.0.10:80"), Verdict::ToPods);
    }
    world.pipeline = Pipeline::new(WorkerId(1), 7);
    for port in 2_400..2_800 {
        world.leaves(Ingress::Pods, opener(protocol::TCP, &format!("10.32.1.11:{port}"), "10.96.0.10:80"), Verdict::ToPods);
    }
    assert_eq!(world.flows.table().len(), 800);
}
