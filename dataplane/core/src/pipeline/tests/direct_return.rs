//! Direct return: a client outside dials a node port or a VIP at node 1, and the pod of node 2 answers it from there.

use super::*;
use crate::flow::Flow;
use crate::testing::{fragments, icmp_error, tcp, udp, with_dont_fragment};

const CLIENT: &str = "203.0.113.9:5000";
const VIP: &str = "198.51.100.80";

/// What node 1 hands on, as node 2 gets it.
const FROM_NODE_1: Ingress = Ingress::Overlay(Outer { src: Addr::from_v4([192, 0, 2, 1]), ecn: 0, network: Network::DirectReturn });
const HANDED_ON: Verdict = Verdict::ToPeer(PeerId(0), Network::DirectReturn);

/// Node 1, which is dialled, and node 2, which has the pods 10.32.2.10 and .11.
struct Nodes {
    front: World,
    back: World,
}

/// The same cluster seen from either node: a service with pods of node 2 on node port 30081 and behind a load balancer.
fn nodes_with(protocol: u8, pods: &[&str]) -> Nodes {
    let services = |place: Place, node: &str| {
        let backends: Vec<Backend> =
            pods.iter().map(|ip| backend(ip, 8080, if ip.contains("32.2.") || ip.contains("32:2:") { place } else { Place::Outside })).collect();
        let web = service(protocol.into(), TrafficPolicy::Cluster, backends);
        let key = |ip: &str, port| FrontendKey { addr: addr(ip), port, protocol };
        let like = addr(node);
        let vip = if like.is_v4() { VIP } else { "2001:db8:80::1" };
        ServiceTable::default().with([
            (key(node, 30081), Some(Frontend { face: Face::NodePort, service: web.clone() })),
            (key(vip, 80), Some(Frontend { face: Face::LoadBalancer, service: web.clone() })),
            (key(if like.is_v4() { "10.96.0.11" } else { "fd00:96::11" }, 80), Some(Frontend { face: Face::ClusterIp, service: web })),
        ])
    };
    let v6 = pods.iter().any(|ip| ip.contains(':'));
    let (mut front, mut back) = (World::new(), World::new());
    front.snapshot.services = services(Place::RemotePod, if v6 { "2001:db8::1" } else { "192.0.2.1" });
    front.return_directly();

    let networks = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<ipnetwork::IpNetwork>>();
    let of_node_1 = networks(&["10.32.1.0/24", "fd00:32:1::/64", "192.0.2.1/32", "2001:db8::1/128"]);
    let node = Arc::make_mut(&mut back.snapshot.node);
    node.addresses = vec![addr("192.0.2.2"), addr("2001:db8::2")];
    (node.gateway_v4, node.gateway_v6) = (Some(addr("10.32.2.1")), Some(addr("fd00:32:2::1")));
    node.node_pod_cidrs = networks(&["10.32.2.0/24", "fd00:32:2::/64"]);
    back.snapshot.services = services(Place::LocalPod, if v6 { "2001:db8::2" } else { "192.0.2.2" });
    let here = ["10.32.2.10", "10.32.2.11", "fd00:32:2::10", "fd00:32:2::11"];
    back.snapshot.pods = PodTable::new(here.map(|ip| (addr(ip), Pod::new(1464))));
    back.snapshot.routes = Arc::new(PrefixMap::new(of_node_1.iter().map(|network| (*network, 0))));
    back.snapshot.peers = [Peer {
        name: "node-1".into(),
        underlay: "192.0.2.1".parse().unwrap(),
        port: 4790,
        mtu: 1464,
        prefixes: Arc::new(PrefixMap::new(of_node_1.iter().map(|network| (*network, ())))),
        direct_return: false,
    }]
    .into();
    back.return_directly();
    back.snapshot.peer_by_underlay = [(addr("192.0.2.1"), 0)].into();
    Nodes { front, back }
}

fn nodes(protocol: u8) -> Nodes {
    nodes_with(protocol, &["10.32.2.10"])
}

impl Nodes {
    /// A client's packet through node 1, which hands it on as it came, and through node 2: the tuple that the pod sees.
    fn arrives(&mut self, bytes: Vec<u8>) -> Tuple {
        let (verdict, handed_on) = self.front.send(Ingress::Host, bytes.clone());
        assert_eq!(verdict, HANDED_ON, "drops: {:?}", self.front.drops());
        assert_eq!(handed_on, bytes, "it goes on as it came");
        self.back.leaves(FROM_NODE_1, handed_on, Verdict::ToPods)
    }

    /// The flow of a client's packet at node 1.
    fn flow(&self, protocol: u8, dialled: &str) -> Flow {
        self.front.flows.table().lookup(&testing::tuple(protocol, CLIENT, dialled)).expect("a flow")
    }
}

fn gateway_is_seen(world: &mut World, bytes: Vec<u8>, why: &str) {
    let tuple = world.leaves(Ingress::Host, bytes, TO_PEER);
    assert_eq!((tuple.src, tuple.dst), (addr("10.32.1.1"), addr("10.32.2.10")), "{why}");
}

#[test]
fn the_pod_sees_the_client_and_the_client_hears_from_what_it_dialled() {
    for protocol in [protocol::TCP, protocol::UDP] {
        for (pod, client, dialled) in [
            ("10.32.2.10", CLIENT, "192.0.2.1:30081"),
            ("10.32.2.10", CLIENT, "198.51.100.80:80"),
            ("fd00:32:2::10", "[2001:db8:9::9]:5000", "[2001:db8::1]:30081"),
            ("fd00:32:2::10", "[2001:db8:9::9]:5000", "[2001:db8:80::1]:80"),
        ] {
            let mut nodes = nodes_with(protocol, &[pod]);
            let seen = nodes.arrives(opener(protocol, client, dialled));
            let pod = std::net::SocketAddr::new(pod.parse().unwrap(), 8080).to_string();
            assert_eq!(seen, testing::tuple(protocol, client, &pod), "{dialled}");
            let heard = nodes.back.leaves(Ingress::Pods, reply(protocol, &seen), Verdict::ToHost);
            assert_eq!(heard, testing::tuple(protocol, dialled, client), "{dialled}: past node 1");
            if protocol == protocol::TCP {
                assert_eq!(nodes.arrives(tcp(client, dialled, ACK, b"hello")), seen, "and all that follows goes the same way");
            }
        }
    }
}

#[test]
fn a_client_alone_keeps_its_connection_at_the_node_that_it_dials() {
    let mut nodes = nodes(protocol::TCP);
    for (flags, stage) in [(SYN, Stage::Opening), (ACK, Stage::Established), (0x11, Stage::Closing)] {
        nodes.arrives(tcp(CLIENT, "192.0.2.1:30081", flags, &[]));
        assert_eq!(nodes.flow(protocol::TCP, "192.0.2.1:30081").stage, stage);
    }
    let before = nodes.flow(protocol::TCP, "192.0.2.1:30081").at;
    nodes.arrives(tcp(CLIENT, "192.0.2.1:30081", SYN, &[]));
    assert_ne!(nodes.flow(protocol::TCP, "192.0.2.1:30081").at, before, "the port used again is a connection of its own");
}

#[test]
fn whoever_is_no_client_outside_is_masqueraded_as_without_the_option() {
    let mut nodes = nodes(protocol::TCP);
    gateway_is_seen(&mut nodes.front, tcp("192.0.2.2:5000", "192.0.2.1:30081", SYN, &[]), "another node, past the overlay");
    let tuple = nodes.front.leaves(Ingress::Pods, tcp("10.32.1.10:5000", "192.0.2.1:30081", SYN, &[]), TO_PEER);
    assert_eq!(tuple.src, addr("10.32.1.1"), "a pod here");
    let tuple = nodes.front.leaves(Ingress::Host, tcp("192.0.2.1:5000", "192.0.2.1:30081", SYN, &[]), TO_PEER);
    assert_eq!(tuple.src, addr("192.0.2.1"), "this node");
}

#[test]
fn where_the_other_side_would_not_know_it_the_gateway_stands_in_between() {
    let syn = || tcp(CLIENT, "192.0.2.1:30081", SYN, &[]);
    let mut front = nodes(protocol::TCP).front;
    Arc::make_mut(&mut front.snapshot.node).direct_return = None;
    gateway_is_seen(&mut front, syn(), "this node has it off");
    let mut front = nodes(protocol::TCP).front;
    let mut peer = front.snapshot.peers[0].clone();
    peer.direct_return = false;
    front.snapshot.peers = [peer].into();
    gateway_is_seen(&mut front, syn(), "the peer has it off");
    let mut front = nodes(protocol::TCP).front;
    Arc::make_mut(&mut front.snapshot.node).direct_return = Some(DirectReturn { vni: 2, addresses: vec![] });
    gateway_is_seen(&mut front, syn(), "peers do not know the address that was dialled");
}

#[test]
fn nothing_is_handed_on_from_inside_the_cluster() {
    let Nodes { mut back, .. } = nodes(protocol::UDP);
    for src in ["10.32.1.10:9", "10.32.2.11:9", "10.32.9.9:9", "10.96.0.11:9", "192.0.2.1:9", "192.0.2.2:9", "198.51.100.80:9", "169.254.7.7:9"] {
        let (verdict, _) = back.send(FROM_NODE_1, udp(src, "192.0.2.1:30081", b"x"));
        assert!(matches!(verdict, Verdict::Drop(DropReason::OverlayForeignSource | DropReason::MartianSource)), "{src}: {verdict:?}");
    }
}

#[test]
fn only_a_node_port_or_a_load_balancer_with_an_endpoint_here_is_served_to_peers() {
    let Nodes { mut back, .. } = nodes(protocol::UDP);
    let refused = Verdict::Drop(DropReason::DirectReturnRefused);
    for (dst, why) in [
        ("192.0.2.1:30082", "no such node port"),
        ("192.0.2.2:30081", "this node's own address"),
        ("203.0.113.77:30081", "nobody's address"),
        ("10.32.1.10:30081", "a pod's address of the peer"),
        ("10.32.2.10:8080", "a pod here"),
        ("10.32.2.1:80", "the gateway"),
        ("10.96.0.11:80", "a cluster IP"),
        ("10.96.0.77:80", "nobody's VIP"),
        ("198.51.100.80:81", "no port of the load balancer"),
        ("192.0.2.2:61000", "a masquerade port"),
    ] {
        let sent = back.send(FROM_NODE_1, udp(CLIENT, dst, b"x")).0;
        assert!(sent == refused || sent == Verdict::Drop(DropReason::MartianDestination), "{why}: {sent:?}");
    }
    let echo = testing::echo_request("203.0.113.9", VIP, 1, 1, b"");
    assert_eq!(back.send(FROM_NODE_1, echo).0, refused, "a ping");
    let mut away = nodes_with(protocol::UDP, &["10.32.9.9"]).back;
    assert_eq!(away.send(FROM_NODE_1, udp(CLIENT, "192.0.2.1:30081", b"x")).0, refused, "no endpoint here");
    let mut local = nodes(protocol::UDP).back;
    let web = service(17, TrafficPolicy::Local, vec![backend("10.32.2.10", 8080, Place::LocalPod)]);
    let key = FrontendKey { addr: addr(VIP), port: 80, protocol: protocol::UDP };
    local.snapshot.services = local.snapshot.services.with([(key, Some(Frontend { face: Face::LoadBalancer, service: web }))]);
    assert_eq!(local.send(FROM_NODE_1, udp(CLIENT, "198.51.100.80:80", b"x")).0, refused, "nobody hands on under the Local policy");
}

#[test]
fn the_cluster_network_carries_no_stranger_and_the_other_no_flow_of_somebody_else() {
    let Nodes { mut back, .. } = nodes(protocol::UDP);
    let cluster = Ingress::Overlay(Outer { src: addr("192.0.2.1"), ecn: 0, network: Network::Cluster });
    let question = || udp(CLIENT, "192.0.2.1:30081", b"x");
    assert_eq!(back.send(cluster, question()).0, Verdict::Drop(DropReason::OverlayForeignSource));
    // A pod here asks outside; a peer forges the answer.
    let asked = back.leaves(Ingress::Pods, udp("10.32.2.10:7", "203.0.113.9:53", b"?"), Verdict::ToHost);
    let forged = reply(protocol::UDP, &asked);
    assert_eq!(back.send(FROM_NODE_1, forged).0, Verdict::Drop(DropReason::DirectReturnRefused));
}

#[test]
fn an_error_about_a_reply_reaches_the_pod_by_the_node_that_was_dialled() {
    let mut nodes = nodes(protocol::UDP);
    let seen = nodes.arrives(udp(CLIENT, "192.0.2.1:30081", b"question"));
    let (_, answer) = nodes.back.send(Ingress::Pods, reply(protocol::UDP, &seen));
    // A router on the way to the client: the next link takes 1,400 bytes.
    let error = icmp_error("203.0.113.1", "192.0.2.1", 3, 4, 1400, &answer);
    let (verdict, handed_on) = nodes.front.send(Ingress::Socket, error.clone());
    assert_eq!((verdict, &handed_on), (HANDED_ON, &error));
    let (verdict, told) = nodes.back.send(FROM_NODE_1, handed_on);
    assert_eq!(verdict, Verdict::ToPods);
    assert_eq!((tuple_of(&told).src, tuple_of(&told).dst), (addr("203.0.113.1"), addr("10.32.2.10")));
    assert_eq!(tuple_of(&told[28..]), seen.reversed(), "it quotes what the pod sent");
    let stray = icmp_error("203.0.113.1", "192.0.2.1", 3, 4, 1400, &udp("192.0.2.1:30081", "203.0.113.9:5001", b""));
    assert_eq!(nodes.back.send(FROM_NODE_1, stray).0, Verdict::Drop(DropReason::IcmpErrorUnmatched));
}

#[test]
fn a_datagram_in_fragments_is_handed_on_whole_and_in_order_of_its_head() {
    let mut nodes = nodes(protocol::UDP);
    let cut = fragments(&udp(CLIENT, "198.51.100.80:80", &[7; 3000]), 1400, 9);
    // The tails first: they are held until the head says where they go.
    for bytes in cut[1..].iter().chain(&cut[..1]) {
        let (verdict, _) = nodes.front.send(Ingress::Host, bytes.clone());
        if verdict == HANDED_ON {
            assert_eq!(nodes.back.send(FROM_NODE_1, bytes.clone()).0, Verdict::ToPods);
        }
    }
    let tails = nodes.front.answers();
    assert!(tails.len() == cut.len() - 1 && tails.iter().all(|(egress, _)| *egress == Egress::Peer(PeerId(0), Network::DirectReturn)));
    for (_, tail) in tails {
        let (verdict, bytes) = nodes.back.send(FROM_NODE_1, tail);
        assert_eq!(verdict, Verdict::ToPods);
        assert_eq!(addr("10.32.2.10"), tuple_of(&bytes).dst);
    }
}

#[test]
fn what_does_not_fit_the_way_to_the_peer_is_told_from_the_address_that_was_dialled() {
    let mut front = nodes(protocol::UDP).front;
    let (verdict, _) = front.send(Ingress::Host, with_dont_fragment(udp(CLIENT, "192.0.2.1:30081", &[0; 1450])));
    assert_eq!(verdict, Verdict::Drop(DropReason::PacketTooBig));
    let answers = front.answers();
    assert_eq!((answers[0].0, tuple_of(&answers[0].1).src), (Egress::Host, addr("192.0.2.1")));
}

#[test]
fn a_segment_of_no_connection_that_is_handed_on_is_reset_towards_the_client() {
    let mut back = nodes(protocol::TCP).back;
    let (verdict, _) = back.send(FROM_NODE_1, tcp(CLIENT, "192.0.2.1:30081", ACK, b"late"));
    assert_eq!(verdict, Verdict::Drop(DropReason::NoFlow));
    let answers = back.answers();
    assert_eq!((answers[0].0, tuple_of(&answers[0].1)), (Egress::Host, testing::tuple(protocol::TCP, "192.0.2.1:30081", CLIENT)));
}

#[test]
fn one_client_port_towards_two_addresses_of_one_backend_is_told_apart() {
    let mut nodes = nodes(protocol::TCP);
    nodes.arrives(tcp(CLIENT, "192.0.2.1:30081", SYN, &[]));
    let tuple = nodes.front.leaves(Ingress::Host, tcp(CLIENT, "198.51.100.80:80", SYN, &[]), TO_PEER);
    assert_eq!(tuple.src, addr("10.32.1.1"), "the second has the gateway's address and its own way back");
    let mut nodes = self::nodes(protocol::TCP);
    nodes.arrives(tcp(CLIENT, "192.0.2.1:30081", SYN, &[]));
    let direct = nodes.back.leaves(Ingress::Host, tcp(CLIENT, "192.0.2.2:30081", SYN, &[]), Verdict::ToPods);
    assert_eq!(direct.src, addr("10.32.2.1"), "and so has one that came to the backend's node by itself");
}

#[test]
fn what_comes_handed_on_is_never_handed_on_again() {
    let mut nodes = nodes_with(protocol::UDP, &["10.32.2.10"]);
    // Node 2 has handed the same connection on to node 1 before: the load balancer has changed its mind since.
    let elsewhere = service(17, TrafficPolicy::Cluster, vec![backend("10.32.1.10", 8080, Place::RemotePod)]);
    let key = FrontendKey { addr: addr(VIP), port: 80, protocol: protocol::UDP };
    let both = nodes.back.snapshot.services.clone();
    nodes.back.snapshot.services = both.with([(key, Some(Frontend { face: Face::LoadBalancer, service: elsewhere }))]);
    assert_eq!(nodes.back.send(Ingress::Host, udp(CLIENT, "198.51.100.80:80", b"x")).0, HANDED_ON);
    assert_eq!(nodes.back.send(FROM_NODE_1, udp(CLIENT, "198.51.100.80:80", b"x")).0, Verdict::Drop(DropReason::DirectReturnRefused));
    nodes.back.snapshot.services = both;
    assert_eq!(nodes.arrives(udp(CLIENT, "198.51.100.80:80", b"x")).dst, addr("10.32.2.10"));
}

#[test]
fn both_nodes_choose_the_same_endpoint_of_the_same_list() {
    let pods = ["10.32.2.10", "198.51.100.7", "10.32.2.11", "198.51.100.8"];
    let mut met = std::collections::HashSet::new();
    for port in 5000..5200 {
        let mut nodes = nodes_with(protocol::UDP, &pods);
        let client = format!("203.0.113.9:{port}");
        let (verdict, bytes) = nodes.front.send(Ingress::Host, udp(&client, "192.0.2.1:30081", b"x"));
        if verdict == HANDED_ON {
            let flow = nodes.front.flows.table().lookup(&testing::tuple(protocol::UDP, &client, "192.0.2.1:30081")).unwrap();
            let seen = nodes.back.leaves(FROM_NODE_1, bytes, Verdict::ToPods);
            assert_eq!(seen.dst, flow.reply.src);
            met.insert(seen.dst);
        }
    }
    assert_eq!(met.len(), 2, "both pods of node 2 are met");
}
