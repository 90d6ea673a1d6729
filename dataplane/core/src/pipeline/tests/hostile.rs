//! What must not get through, and what must not be taken for it.

use super::*;
use crate::flow::Flow;

const OUTSIDER: &str = "203.0.113.9";

fn face(world: &mut World, face: Face, address: &str, port: u16, service: &Arc<ServicePort>) {
    for protocol in [protocol::TCP, protocol::UDP] {
        let key = FrontendKey { addr: addr(address), port, protocol };
        world.snapshot.services = world.snapshot.services.with([(key, Some(Frontend { face, service: service.clone() }))]);
    }
}

fn node(world: &mut World, change: impl FnOnce(&mut NodeTables)) {
    change(Arc::make_mut(&mut world.snapshot.node));
}

fn dropped(world: &mut World, ingress: Ingress, bytes: Vec<u8>, reason: DropReason, why: &str) {
    assert_eq!(world.send(ingress, bytes).0, Verdict::Drop(reason), "{why}");
    assert!(world.answers().is_empty(), "{why}: nobody is told");
}

/// An ICMP error goes to who sent the packet it quotes, and comes from somebody who can have met that packet. Whoever merely guesses a
/// tuple breaks nobody's flow.
#[test]
fn nobody_breaks_anothers_flow_by_a_forged_icmp_error() {
    for protocol in [protocol::TCP, protocol::UDP] {
        let mut world = World::new();
        let (_, left) = world.send(Ingress::Pods, opener(protocol, "10.32.1.10:5000", "203.0.113.9:443"));
        for dst in [OUTSIDER, "192.0.2.1", "10.32.1.10"] {
            let forged = testing::icmp_error("10.32.1.11", dst, 3, 4, 576, &left);
            dropped(&mut world, Ingress::Pods, forged, DropReason::IcmpErrorForged, "a pod about another pod's masqueraded flow");
        }
        let forged = testing::icmp_error(OUTSIDER, "192.0.2.77", 3, 3, 0, &left);
        dropped(&mut world, Ingress::Host, forged, DropReason::IcmpErrorForged, "it goes to somebody who did not send the quoted packet");
        let forged = testing::icmp_error("10.32.2.11", "192.0.2.1", 3, 3, 0, &left);
        dropped(&mut world, PEER, forged, DropReason::IcmpErrorForged, "a peer about a packet that never went to it");

        let (_, left) = world.send(Ingress::Pods, opener(protocol, "10.32.1.11:5000", "10.96.0.10:80"));
        let honest = testing::icmp_error("10.32.1.10", "10.32.1.11", 3, 3, 0, &left);
        assert_eq!(world.send(Ingress::Pods, honest).0, Verdict::ToPods, "the backend itself may");
        // Untranslated traffic between pods has no flow: the same holds.
        let between = opener(protocol, "10.32.1.10:5000", "10.32.2.10:80");
        let forged = testing::icmp_error("10.32.1.11", "10.32.1.10", 3, 3, 0, &between);
        dropped(&mut world, Ingress::Pods, forged, DropReason::IcmpErrorForged, "a pod about two others");
        let honest = testing::icmp_error("10.32.2.10", "10.32.1.10", 3, 3, 0, &between);
        assert_eq!(world.send(PEER, honest).0, Verdict::ToPods);
        let by_its_gateway = testing::icmp_error("10.32.2.1", "10.32.1.10", 11, 0, 0, &between);
        assert_eq!(world.send(PEER, by_its_gateway).0, Verdict::ToPods);
        let unknown = testing::icmp_error("198.51.100.1", "10.32.1.10", 3, 3, 0, &opener(protocol, "10.32.1.10:1", "203.0.113.9:1"));
        dropped(&mut world, Ingress::Host, unknown, DropReason::IcmpErrorUnmatched, "no pod speaks to the outside by its own address");
    }
}

/// The error of a gateway on the way is about a flow of somebody outside: he can make nothing of a pod range's address.
#[test]
fn an_error_of_a_peers_gateway_reaches_the_outside_under_the_dialled_name() {
    let mut world = World::new();
    let (_, left) = world.send(Ingress::Host, opener(protocol::UDP, "203.0.113.9:5000", "192.0.2.1:30081"));
    let error = testing::icmp_error("10.32.2.1", "10.32.1.1", 3, 1, 0, &left);
    let (verdict, error) = world.send(PEER, error);
    assert_eq!(verdict, Verdict::ToHost);
    assert_eq!((tuple_of(&error).src, tuple_of(&error).dst), (addr("192.0.2.1"), addr(OUTSIDER)));
    assert_eq!(quoted_tuple(&error), testing::tuple(protocol::UDP, "203.0.113.9:5000", "192.0.2.1:30081"));
}

/// Load balancers of small clusters name the nodes' own addresses: the service has its ports there, the node keeps the others.
#[test]
fn a_vip_that_is_a_nodes_address_leaves_the_node_its_other_ports() {
    let mut world = World::new();
    let web = service(7, TrafficPolicy::Cluster, vec![backend("10.32.1.10", 8080, Place::LocalPod)]);
    for address in ["192.0.2.1", "192.0.2.2"] {
        face(&mut world, Face::LoadBalancer, address, 443, &web);
    }
    for (dialled, verdict) in [("192.0.2.1", Verdict::ToHost), ("192.0.2.2", TO_PEER)] {
        for protocol in [protocol::TCP, protocol::UDP] {
            let left = world.leaves(Ingress::Pods, opener(protocol, "10.32.1.11:5000", &format!("{dialled}:22")), verdict);
            assert_eq!(left, testing::tuple(protocol, "10.32.1.11:5000", &format!("{dialled}:22")), "the node itself");
            world.leaves(Ingress::Pods, opener(protocol, "10.32.1.11:5001", &format!("{dialled}:443")), Verdict::ToPods);
        }
        world.leaves(Ingress::Pods, testing::echo_request("10.32.1.11", dialled, 1, 1, b"ping"), verdict);
        let sent = testing::udp(&format!("{dialled}:53"), "10.32.1.11:9999", b"x");
        world.leaves(Ingress::Pods, testing::icmp_error("10.32.1.11", dialled, 3, 3, 0, &sent), verdict);
    }
    // The other node dials a node port here, past the overlay, by its own address: that is no spoofed VIP.
    world.leaves(Ingress::Host, opener(protocol::TCP, "192.0.2.2:5000", "192.0.2.1:30080"), Verdict::ToPods);
    assert_eq!(world.drops(), []);
}

#[test]
fn load_balancer_source_ranges_come_before_everything_else() {
    let mut world = World::new();
    let mut guarded = (*service(7, TrafficPolicy::Cluster, vec![backend("10.32.1.10", 8080, Place::LocalPod)])).clone();
    guarded.source_ranges = vec!["203.0.113.0/24".parse().unwrap()];
    face(&mut world, Face::LoadBalancer, "198.51.100.80", 443, &Arc::new(guarded));
    world.leaves(Ingress::Host, opener(protocol::TCP, "203.0.113.9:1", "198.51.100.80:443"), Verdict::ToPods);
    for (ingress, client) in [(Ingress::Host, "192.0.2.1:1"), (Ingress::Host, "198.51.100.9:1"), (Ingress::Pods, "10.32.1.11:1")] {
        for flags in [SYN, ACK] {
            let bytes = testing::tcp(client, "198.51.100.80:443", flags, &[]);
            dropped(&mut world, ingress, bytes, DropReason::SourceRangeDenied, "no reset says that somebody listens");
        }
    }
}

#[test]
fn the_overlays_port_is_closed_to_pods_wherever_it_is() {
    let mut world = World::new();
    let mut peers = world.snapshot.peers.to_vec();
    peers[0].port = 4999;
    world.snapshot.peers = peers.into();
    let forger = service(7, TrafficPolicy::Cluster, vec![backend("192.0.2.2", 4999, Place::OtherNode)]);
    face(&mut world, Face::ClusterIp, "10.96.0.98", 80, &forger);
    for dialled in ["192.0.2.1:4790", "192.0.2.2:4790", "192.0.2.2:4999", "10.96.0.98:80"] {
        let bytes = opener(protocol::UDP, "10.32.1.11:5000", dialled);
        dropped(&mut world, Ingress::Pods, bytes.clone(), DropReason::OverlayForged, dialled);
        let pieces = testing::fragments(&testing::udp("10.32.1.11:5000", dialled, &[0; 3000]), 1400, 3);
        assert_eq!(world.send(Ingress::Pods, pieces[1].clone()).0, Verdict::Consumed(Consumed::Held), "a tail has no port to show");
        dropped(&mut world, Ingress::Pods, pieces[0].clone(), DropReason::OverlayForged, "its head has, and decides for both");
        dropped(&mut world, Ingress::Pods, pieces[2].clone(), DropReason::OverlayForged, "and for those that come late");
    }
    let bytes = opener(protocol::UDP, "10.32.2.11:5000", "192.0.2.1:4790");
    dropped(&mut world, PEER, bytes, DropReason::OverlayForged, "a pod of a peer that does not look");
    // A pod behind a node port answers whoever asked: nobody asks in the name of an overlay socket.
    for (src, dialled) in [("192.0.2.2:4790", "192.0.2.1:30080"), ("192.0.2.1:4790", "10.96.0.10:80"), ("192.0.2.2:4790", "10.32.1.10:80")] {
        dropped(&mut world, Ingress::Host, opener(protocol::UDP, src, dialled), DropReason::OverlayForged, src);
    }
}

#[test]
fn addresses_that_nobody_outside_has_do_not_come_from_there() {
    let mut world = World::new();
    let mut pods: Vec<(Addr, Pod)> = world.snapshot.pods.iter().map(|(addr, pod)| (addr, pod.clone())).collect();
    pods.push((addr("172.20.0.5"), Pod::new(1464)));
    world.snapshot.pods = PodTable::new(pods);
    for ingress in [Ingress::Host, Ingress::Socket] {
        let bytes = testing::udp("172.20.0.5:1", "10.32.1.10:80", b"x");
        dropped(&mut world, ingress, bytes, DropReason::SpoofedFromHost, "a pod of a range beside the cluster's");
        let bytes = testing::udp("[fe80::5]:1", "[fd00:32:1::10]:80", b"x");
        dropped(&mut world, ingress, bytes, DropReason::MartianSource, "link-local, beyond its link (RFC 4291 §2.5.6)");
    }
    for (ingress, src) in [(Ingress::Host, OUTSIDER), (Ingress::Host, "192.0.2.1"), (PEER, "10.32.2.11")] {
        let redirect = testing::icmp(src, "10.32.1.10", 5, 1, 0, &opener(protocol::UDP, "10.32.1.10:1", "203.0.113.9:1"));
        dropped(&mut world, ingress, redirect, DropReason::IcmpForbidden, "a redirect is for one link");
    }
    let advertisement = testing::icmp("fd00:32:2::11", "fd00:32:1::10", 134, 0, 0, &[0; 8]);
    dropped(&mut world, PEER, advertisement, DropReason::IcmpForbidden, "so is a router advertisement");
    assert!(world.flows.table().is_empty());
}

/// What comes back from `host` for an address that is neither here nor a peer's would go out again and come back again.
#[test]
fn what_is_for_nobody_here_does_not_go_back_to_the_node() {
    for (src, dst) in [("203.0.113.9:1", "198.51.100.7:1"), ("192.0.2.1:1", "198.51.100.7:1"), ("[2001:db8:9::9]:1", "[2001:db8:7::7]:1")] {
        for protocol in [protocol::TCP, protocol::UDP] {
            let mut world = World::new();
            assert_eq!(world.send(Ingress::Host, opener(protocol, src, dst)).0, Verdict::Drop(DropReason::UnallocatedVip));
        }
    }
}

#[test]
fn what_has_no_ports_is_not_sent_where_its_answers_could_not_be_told() {
    let mut world = World::new();
    let gre = testing::ip(OUTSIDER, "10.32.2.10", 47, &[0; 8]);
    dropped(&mut world, Ingress::Host, gre, DropReason::ProtocolUnsupported, "relayed under the gateway's address");
    world.leaves(Ingress::Host, testing::ip(OUTSIDER, "10.32.1.10", 47, &[0; 8]), Verdict::ToPods);
    world.leaves(Ingress::Pods, testing::ip("10.32.1.10", OUTSIDER, 47, &[0; 8]), Verdict::ToHost);
    assert_eq!(world.flows.table().len(), 1);
}

/// An endpoint is an address that anybody may write into a manifest.
#[test]
fn no_service_leads_to_loopback_or_a_link() {
    for endpoint in ["127.0.0.1", "169.254.169.254", "224.0.0.1", "0.0.0.0", "255.255.255.255", "::1", "fe80::1", "ff02::1"] {
        let mut world = World::new();
        let inward = service(7, TrafficPolicy::Cluster, vec![backend(endpoint, 10250, Place::Outside)]);
        let (vip, client) = if endpoint.contains(':') { ("fd00:96::7", "[fd00:32:1::11]:1") } else { ("10.96.0.7", "10.32.1.11:1") };
        face(&mut world, Face::ClusterIp, vip, 80, &inward);
        let dialled = std::net::SocketAddr::new(vip.parse().unwrap(), 80).to_string();
        dropped(&mut world, Ingress::Pods, opener(protocol::TCP, client, &dialled), DropReason::MartianDestination, endpoint);
    }
}

/// One destination and 4,535 masquerade ports: nearly all of them are found.
#[test]
fn the_search_for_a_port_fails_only_when_hardly_one_is_left() {
    for protocol in [protocol::TCP, protocol::UDP] {
        let mut world = World::new();
        world.flows = OwnedFlows::new(16_384, [3, 4]);
        let mut ports = std::collections::HashSet::new();
        for port in 1..60_000u16 {
            let (verdict, bytes) = world.send(Ingress::Pods, opener(protocol, &format!("10.32.1.10:{port}"), "203.0.113.9:443"));
            match verdict {
                Verdict::ToHost => assert!(ports.insert(tuple_of(&bytes).src_port)),
                verdict => {
                    assert_eq!(verdict, Verdict::Drop(DropReason::SnatPortsExhausted));
                    break;
                }
            }
        }
        assert!(ports.iter().all(|port| (61000..=65534).contains(port)));
        assert!(ports.len() > 4_535 * 95 / 100, "{} of 4535", ports.len());
        // Whoever goes on costs little: the long searches of a moment are bounded, and another destination is not touched.
        for port in 1..10_000u16 {
            world.send(Ingress::Pods, opener(protocol, &format!("10.32.1.11:{port}"), "203.0.113.9:443"));
        }
        world.leaves(Ingress::Pods, opener(protocol, "10.32.1.11:1", "203.0.113.9:444"), Verdict::ToHost);
    }
}

/// A flood of half-open flows makes room for others' connections, and no established one ends.
#[test]
fn a_flood_from_one_pod_ends_no_established_flow_and_keeps_nobody_out() {
    let mut world = World::new();
    let mut established: Vec<Flow> = Vec::new();
    for port in 5000..5100 {
        let client = format!("10.32.1.11:{port}");
        let left = world.leaves(Ingress::Pods, opener(protocol::TCP, &client, "10.96.0.10:80"), Verdict::ToPods);
        world.leaves(Ingress::Pods, reply(protocol::TCP, &left), Verdict::ToPods);
        world.leaves(Ingress::Pods, testing::tcp(&client, "10.96.0.10:80", ACK, &[]), Verdict::ToPods);
        established.push(world.flows.table().lookup(&testing::tuple(protocol::TCP, &client, "10.96.0.10:80")).unwrap());
    }
    for n in 0..10_240u32 {
        world.now.0 += u64::from(n % 8 == 0);
        world.send(Ingress::Pods, opener(protocol::TCP, &format!("10.32.1.10:{}", n % 60_000 + 1), &format!("203.0.113.{}:443", n % 200)));
    }
    assert!(established.iter().all(|flow| world.flows.table().is_live(flow.at)));
    for port in 6000..6200 {
        world.now.0 += 1;
        world.leaves(Ingress::Pods, opener(protocol::TCP, &format!("10.32.1.11:{port}"), "10.96.0.11:80"), TO_PEER);
    }
}

/// A backend outside the cluster answers whom it hears from: the node's address and a masquerade port, whose UDP socket brings fragments.
#[test]
fn a_backend_outside_the_cluster_wants_its_ports_socket_too() {
    let mut world = World::new();
    let away = service(7, TrafficPolicy::Cluster, vec![backend("198.51.100.53", 53, Place::Outside)]);
    face(&mut world, Face::ClusterIp, "10.96.0.53", 53, &away);
    let left = world.leaves(Ingress::Pods, opener(protocol::UDP, "10.32.1.11:5000", "10.96.0.53:53"), Verdict::ToHost);
    let ports = world.outbox.masquerade_ports();
    assert_eq!((ports.len(), ports[0].reply), (1, left.reversed()));
    assert_eq!(world.flows.table().lookup(&left.reversed()).unwrap().kind, Kind::Service);
    // Without masquerade the network routes pods' addresses: a pod keeps its own, everybody else is given the gateway's.
    node(&mut world, |node| node.masquerade = None);
    let left = world.leaves(Ingress::Pods, opener(protocol::UDP, "10.32.1.11:6000", "10.96.0.53:53"), Verdict::ToHost);
    assert_eq!(left.src, addr("10.32.1.11"));
    let left = world.leaves(Ingress::Host, opener(protocol::UDP, "192.0.2.1:6000", "10.96.0.53:53"), Verdict::ToHost);
    assert_eq!(left.src, addr("10.32.1.1"));
}
