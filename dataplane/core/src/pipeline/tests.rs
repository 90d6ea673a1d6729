//! The pipeline as a whole: packet in, verdict and packet out, with a sentence of why. Every packet that leaves has its checksums verified.

use std::sync::Arc;

use super::*;
use crate::addr::{Addr, protocol};
use crate::balance::Balance;
use crate::counters::Counters;
use crate::fib::{Pod, PodTable, PrefixMap};
use crate::flow::{Kind, Opener, OwnedFlows, Stage, Timeouts, Touch};
use crate::packet::{Checksum, Outer};
use crate::service::{Backend, Face, Frontend, FrontendKey, Place, ServicePort, ServiceTable, TrafficPolicy};
use crate::snapshot::{DirectReturn, Generation, Masquerade, NodeTables, OutsideToPods, Peer};
use crate::testing::{self, addr};
use crate::verdict::PeerId;

mod affinity;
mod direct_return;
mod hostile;
mod life;
mod limits;
mod masquerade;
mod own_tun;
mod policy;
mod random;
mod way;

const SYN: u8 = 0x02;
const ACK: u8 = 0x10;
const RST: u8 = 0x04;

/// Node 1 of two, both families: pods .1.10 and .1.11, peer node-2 with 10.32.2.0/24; web has one pod here, one there; `near` is Local.
struct World {
    snapshot: Snapshot,
    flows: OwnedFlows,
    counters: Counters,
    pipeline: Pipeline,
    outbox: Outbox,
    now: Now,
}

fn backend(address: &str, port: u16, place: Place) -> Backend {
    Backend { addr: addr(address), port, place }
}

fn service(id: u64, external_policy: TrafficPolicy, cluster: Vec<Backend>) -> Arc<ServicePort> {
    let local = cluster.iter().copied().filter(|b| matches!(b.place, Place::LocalPod | Place::ThisNode)).collect::<Vec<_>>();
    Arc::new(ServicePort {
        id,
        name: format!("default/s{id}").into(),
        internal_policy: TrafficPolicy::Cluster,
        external_policy,
        cluster: cluster.into(),
        local: local.into(),
        balance: Balance::default(),
        affinity: None,
        source_ranges: vec![],
    })
}

fn faces(address: &str, protocol: u8, port: u16, node_port: u16, service: &Arc<ServicePort>) -> Vec<(FrontendKey, Option<Frontend>)> {
    let vip = FrontendKey { addr: addr(address), port, protocol };
    let node = FrontendKey { addr: addr(if vip.addr.is_v4() { "192.0.2.1" } else { "2001:db8::1" }), port: node_port, protocol };
    vec![
        (vip, Some(Frontend { face: Face::ClusterIp, service: service.clone() })),
        (node, Some(Frontend { face: Face::NodePort, service: service.clone() })),
    ]
}

impl World {
    fn new() -> World {
        let networks = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<ipnetwork::IpNetwork>>();
        let pods = ["10.32.1.10", "10.32.1.11", "fd00:32:1::10", "fd00:32:1::11"];
        let peer_networks = networks(&["10.32.2.0/24", "fd00:32:2::/64", "192.0.2.2/32", "2001:db8::2/128"]);
        let mut services = ServiceTable::default();
        for (id, protocol) in [(1, protocol::TCP), (2, protocol::UDP)] {
            let here = service(id, TrafficPolicy::Cluster, vec![backend("10.32.1.10", 8080, Place::LocalPod)]);
            services = services.with(faces("10.96.0.10", protocol, 80, 30080, &here));
            let there = service(id + 10, TrafficPolicy::Cluster, vec![backend("10.32.2.10", 8080, Place::RemotePod)]);
            services = services.with(faces("10.96.0.11", protocol, 80, 30081, &there));
            let host = service(id + 20, TrafficPolicy::Cluster, vec![backend("192.0.2.1", 9090, Place::ThisNode)]);
            services = services.with(faces("10.96.0.12", protocol, 80, 30082, &host));
            let other_host = service(id + 30, TrafficPolicy::Cluster, vec![backend("192.0.2.2", 9090, Place::OtherNode)]);
            services = services.with(faces("10.96.0.13", protocol, 80, 30083, &other_host));
            let local = service(
                id + 40,
                TrafficPolicy::Local,
                vec![backend("10.32.1.10", 8080, Place::LocalPod), backend("10.32.2.10", 8080, Place::RemotePod)],
            );
            services = services.with(faces("10.96.0.14", protocol, 80, 30084, &local));
            let away = service(id + 50, TrafficPolicy::Local, vec![backend("10.32.2.10", 8080, Place::RemotePod)]);
            services = services.with(faces("10.96.0.15", protocol, 80, 30085, &away));
            let empty = service(id + 60, TrafficPolicy::Cluster, vec![]);
            services = services.with(faces("10.96.0.16", protocol, 80, 30086, &empty));
            let v6 = service(id + 70, TrafficPolicy::Cluster, vec![backend("fd00:32:1::10", 8080, Place::LocalPod)]);
            services = services.with(faces("fd00:96::10", protocol, 80, 30080, &v6));
        }
        let forger = service(99, TrafficPolicy::Cluster, vec![backend("192.0.2.2", 4790, Place::OtherNode)]);
        services = services.with(faces("10.96.0.99", protocol::UDP, 80, 30099, &forger));
        let node = NodeTables {
            addresses: vec![addr("192.0.2.1"), addr("2001:db8::1")],
            gateway_v4: Some(addr("10.32.1.1")),
            gateway_v6: Some(addr("fd00:32:1::1")),
            node_pod_cidrs: networks(&["10.32.1.0/24", "fd00:32:1::/64"]),
            cluster_pod_cidrs: networks(&["10.32.0.0/16", "fd00:32::/32"]),
            service_cidrs: networks(&["10.96.0.0/16", "fd00:96::/112"]),
            node_ports: 30000..=32767,
            node_port_addresses: vec![addr("192.0.2.1")],
            masquerade: Some(Masquerade { ports: vec![61000..=65534], source_v4: Some(addr("192.0.2.1")), source_v6: Some(addr("2001:db8::1")) }),
            snat_ports: 1024..=65535,
            overlay_port: 4790,
            overlay_vni: 1,
            direct_return: None,
            outside_mtu: 1500,
            outside_to_pods: OutsideToPods::Allow,
            timeouts: Timeouts::default(),
            probe_token: 0x0102_0304_0506_0708,
            workers: 1,
        };
        let snapshot = Snapshot {
            generation: Generation(1),
            node: Arc::new(node),
            services,
            pods: PodTable::new(pods.map(|ip| (addr(ip), Pod::new(1464)))),
            routes: Arc::new(PrefixMap::new(peer_networks.iter().map(|network| (*network, 0)))),
            peers: [Peer {
                name: "node-2".into(),
                underlay: "192.0.2.2".parse().unwrap(),
                port: 4790,
                mtu: 1464,
                prefixes: Arc::new(PrefixMap::new(peer_networks.iter().map(|network| (*network, ())))),
                direct_return: false,
            }]
            .into(),
            peer_by_underlay: [(addr("192.0.2.2"), 0)].into(),
        };
        World {
            snapshot,
            flows: OwnedFlows::new(1024, [1, 2]),
            counters: Counters::default(),
            pipeline: Pipeline::new(WorkerId(0), 7),
            outbox: Outbox::new(512, 1 << 20),
            now: Now(1_000_000),
        }
    }

    /// Both nodes take part in direct return.
    fn return_directly(&mut self) {
        let node = Arc::make_mut(&mut self.snapshot.node);
        node.direct_return = Some(DirectReturn { vni: 2, addresses: node.addresses.clone() });
        self.snapshot.peers = self.snapshot.peers.iter().map(|peer| Peer { direct_return: true, ..peer.clone() }).collect();
        let services = self.snapshot.services.clone();
        let node_ports = services.iter().filter(|(_, frontend)| frontend.face == Face::NodePort);
        let at_peers = node_ports.map(|(key, frontend)| {
            let service = frontend.service.clone();
            (FrontendKey::at_a_peer(key.addr, key.port, key.protocol), Some(Frontend { face: Face::PeersNodePort, service }))
        });
        self.snapshot.services = services.with(at_peers);
    }

    /// Sends one packet and gives back its verdict and bytes, checksums verified.
    fn send(&mut self, ingress: Ingress, mut bytes: Vec<u8>) -> (Verdict, Vec<u8>) {
        let mut verdicts = Vec::with_capacity(1);
        self.outbox.clear();
        let env =
            Env { snapshot: &self.snapshot, flows: self.flows.table(), now: self.now, now_ns: self.now.0 * 1_000_000, counters: &self.counters };
        let mut batch = [testing::packet(&mut bytes, ingress)];
        self.pipeline.run::<Touch>(&env, &mut batch, &mut verdicts, &mut self.outbox);
        if let Verdict::ToPods | Verdict::ToPod(_) | Verdict::ToHost | Verdict::ToPeer(..) = verdicts[0] {
            testing::verify(&bytes);
        }
        self.outbox.iter().for_each(|(_, bytes)| testing::verify(bytes));
        (verdicts[0], bytes)
    }

    fn answers(&self) -> Vec<(Egress, Vec<u8>)> {
        self.outbox.iter().map(|(egress, bytes)| (egress, bytes.to_vec())).collect()
    }

    /// Sends one packet, expects it to leave as `verdict`, and gives back the tuple that it leaves with.
    fn leaves(&mut self, ingress: Ingress, bytes: Vec<u8>, verdict: Verdict) -> Tuple {
        let (actual, bytes) = self.send(ingress, bytes);
        assert_eq!(actual, verdict, "drops: {:?}", self.drops());
        tuple_of(&bytes)
    }

    fn drops(&self) -> Vec<(&'static str, u64)> {
        DropReason::ALL.iter().map(|r| (r.name(), self.counters.drops(*r))).filter(|(_, n)| *n > 0).collect()
    }
}

fn tuple_of(bytes: &[u8]) -> Tuple {
    let mut bytes = bytes.to_vec();
    parse(&testing::packet(&mut bytes, Ingress::Pods)).unwrap().tuple
}

/// A TCP SYN, or a datagram.
fn opener(protocol: u8, src: &str, dst: &str) -> Vec<u8> {
    if protocol == protocol::TCP { testing::tcp(src, dst, SYN, &[]) } else { testing::udp(src, dst, b"question") }
}

fn reply(protocol: u8, tuple: &Tuple) -> Vec<u8> {
    let show = |ip: Addr, port: u16| std::net::SocketAddr::new(ip.ip(), port).to_string();
    let (src, dst) = (show(tuple.dst, tuple.dst_port), show(tuple.src, tuple.src_port));
    if protocol == protocol::TCP { testing::tcp(&src, &dst, SYN | ACK, &[]) } else { testing::udp(&src, &dst, b"answer") }
}

const PEER: Ingress = Ingress::Overlay(Outer { src: Addr::from_v4([192, 0, 2, 2]), ecn: 0, network: Network::Cluster });
const TO_PEER: Verdict = Verdict::ToPeer(PeerId(0), Network::Cluster);

/// Every way through the gateway for TCP and UDP: what is dialled, where it goes, whom the backend sees; then the reply comes back the
/// same way and says what was dialled.
#[test]
fn every_path_translates_there_and_back() {
    use Verdict::{ToHost, ToPods};
    type Row = (Ingress, &'static str, &'static str, Verdict, &'static str, &'static str, Verdict, &'static str);
    let rows: &[Row] = &[
        // from, client, dialled, goes, leaves as source (ip), leaves to, back verdict, why
        (Ingress::Pods, "10.32.1.11:5000", "10.32.1.10:8080", ToPods, "10.32.1.11", "10.32.1.10:8080", ToPods, "pods of one node see each other"),
        (Ingress::Pods, "10.32.1.11:5000", "10.32.2.10:8080", TO_PEER, "10.32.1.11", "10.32.2.10:8080", ToPods, "so do pods of two"),
        (Ingress::Pods, "10.32.1.11:5000", "10.96.0.10:80", ToPods, "10.32.1.11", "10.32.1.10:8080", ToPods, "a ClusterIP keeps a pod's source"),
        (Ingress::Pods, "10.32.1.11:5000", "10.96.0.11:80", TO_PEER, "10.32.1.11", "10.32.2.10:8080", ToPods, "with a backend elsewhere too"),
        (Ingress::Pods, "10.32.1.10:5000", "10.96.0.10:80", ToPods, "10.32.1.1", "10.32.1.10:8080", ToPods, "a hairpin is masqueraded"),
        (
            Ingress::Pods,
            "10.32.1.11:5000",
            "10.96.0.12:80",
            ToHost,
            "10.32.1.11",
            "192.0.2.1:9090",
            ToPods,
            "a process on the node replies through us",
        ),
        (Ingress::Pods, "10.32.1.11:5000", "10.96.0.13:80", TO_PEER, "10.32.1.11", "192.0.2.2:9090", ToPods, "and one on another node"),
        (Ingress::Host, "192.0.2.1:5000", "10.96.0.10:80", ToPods, "192.0.2.1", "10.32.1.10:8080", ToHost, "the node's own address names this node"),
        (
            Ingress::Host,
            "192.0.2.1:5000",
            "10.96.0.11:80",
            TO_PEER,
            "192.0.2.1",
            "10.32.2.10:8080",
            ToHost,
            "a pod elsewhere replies through the overlay",
        ),
        (Ingress::Host, "192.0.2.1:5000", "10.96.0.12:80", ToHost, "10.32.1.1", "192.0.2.1:9090", ToHost, "the node would answer itself past us"),
        (Ingress::Host, "192.0.2.1:5000", "10.96.0.13:80", TO_PEER, "10.32.1.1", "192.0.2.2:9090", ToHost, "and so would another node"),
        (
            Ingress::Host,
            "203.0.113.9:5000",
            "192.0.2.1:30080",
            ToPods,
            "10.32.1.1",
            "10.32.1.10:8080",
            ToHost,
            "Cluster policy from outside: always masqueraded",
        ),
        (Ingress::Host, "203.0.113.9:5000", "192.0.2.1:30081", TO_PEER, "10.32.1.1", "10.32.2.10:8080", ToHost, "with a backend elsewhere too"),
        (Ingress::Host, "203.0.113.9:5000", "192.0.2.1:30082", ToHost, "10.32.1.1", "192.0.2.1:9090", ToHost, "and on the node itself"),
        (
            Ingress::Host,
            "203.0.113.9:5000",
            "192.0.2.1:30084",
            ToPods,
            "203.0.113.9",
            "10.32.1.10:8080",
            ToHost,
            "Local policy keeps the client's address",
        ),
        (Ingress::Host, "192.0.2.1:5000", "192.0.2.1:30080", ToPods, "192.0.2.1", "10.32.1.10:8080", ToHost, "the node dials its own node port"),
        (
            Ingress::Pods,
            "10.32.1.11:5000",
            "192.0.2.1:30080",
            ToPods,
            "10.32.1.1",
            "10.32.1.10:8080",
            ToPods,
            "Cluster policy masquerades pods too, as kube-proxy does",
        ),
        (PEER, "10.32.2.11:5000", "192.0.2.1:30080", ToPods, "10.32.1.1", "10.32.1.10:8080", TO_PEER, "a pod elsewhere dials our node port"),
        (PEER, "10.32.2.11:5000", "192.0.2.1:30081", TO_PEER, "10.32.1.1", "10.32.2.10:8080", TO_PEER, "and is sent back over the overlay"),
        (Ingress::Pods, "10.32.1.11:5000", "203.0.113.9:443", ToHost, "192.0.2.1", "203.0.113.9:443", ToPods, "to the outside by masquerade"),
        (Ingress::Host, "203.0.113.9:5000", "10.32.1.10:8080", ToPods, "203.0.113.9", "10.32.1.10:8080", ToHost, "outside to a pod keeps everything"),
        (
            Ingress::Host,
            "203.0.113.9:5000",
            "10.32.2.10:8080",
            TO_PEER,
            "10.32.1.1",
            "10.32.2.10:8080",
            ToHost,
            "a pod elsewhere is reached from our address",
        ),
        (Ingress::Host, "192.0.2.1:5000", "10.32.1.10:8080", ToPods, "192.0.2.1", "10.32.1.10:8080", ToHost, "node to pod"),
        (Ingress::Pods, "10.32.1.10:5000", "192.0.2.1:22", ToHost, "10.32.1.10", "192.0.2.1:22", ToPods, "pod to node"),
        (
            Ingress::Pods,
            "10.32.1.10:5000",
            "192.0.2.2:22",
            TO_PEER,
            "10.32.1.10",
            "192.0.2.2:22",
            ToPods,
            "pod to another node goes over the overlay",
        ),
        (Ingress::Pods, "[fd00:32:1::11]:5000", "[fd00:96::10]:80", ToPods, "fd00:32:1::11", "[fd00:32:1::10]:8080", ToPods, "IPv6: a ClusterIP"),
        (Ingress::Pods, "[fd00:32:1::10]:5000", "[fd00:96::10]:80", ToPods, "fd00:32:1::1", "[fd00:32:1::10]:8080", ToPods, "IPv6: a hairpin"),
        (Ingress::Pods, "[fd00:32:1::11]:5000", "[2001:db8:9::9]:443", ToHost, "2001:db8::1", "[2001:db8:9::9]:443", ToPods, "IPv6: masquerade"),
        (Ingress::Host, "[2001:db8:9::9]:5000", "[2001:db8::1]:30080", ToPods, "fd00:32:1::1", "[fd00:32:1::10]:8080", ToHost, "IPv6: a node port"),
    ];
    for protocol in [protocol::TCP, protocol::UDP] {
        for (ingress, client, dialled, verdict, seen, to, back, why) in rows {
            let mut world = World::new();
            let left = world.leaves(*ingress, opener(protocol, client, dialled), *verdict);
            let expected = testing::tuple(protocol, client, to);
            assert_eq!((left.src, left.dst, left.dst_port), (addr(seen), expected.dst, expected.dst_port), "{why}: {client} dialled {dialled}");
            let from = match verdict {
                ToPods => Ingress::Pods,
                ToHost => Ingress::Host,
                _ => PEER,
            };
            let answer = world.leaves(from, reply(protocol, &left), *back);
            assert_eq!(answer, testing::tuple(protocol, client, dialled).reversed(), "{why}: the answer to {client}, who dialled {dialled}");
            // The opener's next packet takes the same way.
            let next = if protocol == protocol::TCP { testing::tcp(client, dialled, ACK, b"x") } else { testing::udp(client, dialled, b"again") };
            assert_eq!(world.leaves(*ingress, next, *verdict), left, "{why}: the second packet");
        }
    }
}

#[test]
fn untranslated_traffic_between_pods_takes_no_slot() {
    let mut world = World::new();
    world.leaves(Ingress::Pods, opener(protocol::TCP, "10.32.1.11:5000", "10.32.1.10:8080"), Verdict::ToPods);
    world.leaves(Ingress::Pods, opener(protocol::UDP, "10.32.1.11:5000", "10.32.2.10:8080"), TO_PEER);
    assert_eq!(world.flows.table().len(), 0);
}

#[test]
fn refusals_have_their_names_and_tell_the_sender_where_they_should() {
    let rows: &[(Ingress, Vec<u8>, DropReason, Option<u8>)] = &[
        (Ingress::Pods, opener(protocol::TCP, "10.32.1.11:5000", "10.96.0.16:80"), DropReason::NoBackendRejected, Some(protocol::TCP)),
        (Ingress::Pods, opener(protocol::UDP, "10.32.1.11:5000", "10.96.0.16:80"), DropReason::NoBackendRejected, Some(protocol::ICMP)),
        (Ingress::Pods, opener(protocol::TCP, "10.32.1.11:5000", "10.96.0.10:81"), DropReason::NoBackendRejected, Some(protocol::TCP)),
        (Ingress::Host, opener(protocol::TCP, "203.0.113.9:5000", "192.0.2.1:30085"), DropReason::NoBackendLocal, None),
        (Ingress::Pods, opener(protocol::TCP, "10.32.1.11:5000", "10.96.7.7:80"), DropReason::UnallocatedVip, None),
        (Ingress::Pods, opener(protocol::UDP, "10.32.1.11:5000", "10.32.1.99:80"), DropReason::NoRoutePod, Some(protocol::ICMP)),
        (Ingress::Pods, opener(protocol::UDP, "10.32.1.11:5000", "10.32.9.9:80"), DropReason::NoRoutePeer, Some(protocol::ICMP)),
        (Ingress::Pods, testing::tcp("10.32.1.11:5000", "10.96.0.10:80", ACK, b"late"), DropReason::NoFlow, Some(protocol::TCP)),
        (Ingress::Pods, testing::tcp("10.32.1.11:5000", "10.96.0.10:80", RST, &[]), DropReason::NoFlow, None),
        (Ingress::Pods, opener(protocol::UDP, "10.32.1.11:5000", "192.0.2.2:4790"), DropReason::OverlayForged, None),
        (Ingress::Pods, opener(protocol::UDP, "10.32.1.11:5000", "192.0.2.1:4790"), DropReason::OverlayForged, None),
        (Ingress::Pods, opener(protocol::UDP, "10.32.1.11:5000", "10.96.0.99:80"), DropReason::OverlayForged, None),
        (Ingress::Host, opener(protocol::UDP, "203.0.113.9:5000", "192.0.2.1:30099"), DropReason::OverlayForged, None),
        (Ingress::Pods, opener(protocol::UDP, "10.32.1.11:5000", "224.0.0.251:5353"), DropReason::MartianDestination, None),
        (Ingress::Pods, testing::ip("10.32.1.11", "203.0.113.9", 47, b"GRE"), DropReason::ProtocolUnsupported, None),
        (PEER, opener(protocol::UDP, "10.32.2.11:5000", "203.0.113.9:53"), DropReason::OverlayForeignDestination, None),
        (PEER, opener(protocol::UDP, "10.32.2.11:5000", "10.32.2.12:53"), DropReason::OverlayForeignDestination, None),
        (PEER, opener(protocol::UDP, "10.32.1.11:5000", "10.32.1.10:53"), DropReason::OverlayForeignSource, None),
        (PEER, opener(protocol::UDP, "203.0.113.9:5000", "10.32.1.10:53"), DropReason::OverlayForeignSource, None),
        (
            Ingress::Overlay(Outer { src: Addr::from_v4([192, 0, 2, 66]), ecn: 0, network: Network::Cluster }),
            opener(protocol::UDP, "10.32.2.11:5000", "10.32.1.10:53"),
            DropReason::OverlayUnknownPeer,
            None,
        ),
    ];
    for (ingress, bytes, reason, answer) in rows {
        let mut world = World::new();
        let (verdict, _) = world.send(*ingress, bytes.clone());
        assert_eq!(verdict, Verdict::Drop(*reason));
        assert_eq!(world.drops(), [(reason.name(), 1)]);
        let answers: Vec<u8> = world.answers().iter().map(|(_, bytes)| tuple_of(bytes).protocol).collect();
        assert_eq!(answers, Vec::from_iter(*answer), "{}", reason.name());
        assert_eq!(world.flows.table().len(), 0, "a refused packet leaves no flow: {}", reason.name());
    }
}

#[test]
fn spoofed_sources_end_at_the_door() {
    let sources = ["10.32.1.99", "192.0.2.1", "10.96.0.10", "198.51.100.7", "10.32.2.10", "10.32.1.1", "fd00:32:1::99", "2001:db8::1", "fd00:96::10"];
    for src in sources {
        let dst = if src.contains(':') { "[fd00:32:1::10]:80" } else { "10.32.1.10:80" };
        let src = if src.contains(':') { format!("[{src}]:1") } else { format!("{src}:1") };
        let mut world = World::new();
        assert_eq!(world.send(Ingress::Pods, testing::udp(&src, dst, b"x")).0, Verdict::Drop(DropReason::SpoofedByPod), "{src}");
        assert!(world.answers().is_empty());
    }
    for src in ["127.0.0.1", "224.0.0.1", "0.0.0.0", "::1", "ff02::1"] {
        let dst = if src.contains(':') { "[fd00:32:1::10]:80" } else { "10.32.1.10:80" };
        let src = if src.contains(':') { format!("[{src}]:1") } else { format!("{src}:1") };
        let mut world = World::new();
        assert_eq!(world.send(Ingress::Pods, testing::udp(&src, dst, b"x")).0, Verdict::Drop(DropReason::MartianSource), "{src}");
    }
    for src in ["10.32.1.10", "10.32.1.1", "10.96.0.10", "10.96.9.9", "10.32.2.10"] {
        let mut world = World::new();
        let bytes = testing::udp(&format!("{src}:1"), "10.32.1.10:80", b"x");
        assert_eq!(world.send(Ingress::Host, bytes).0, Verdict::Drop(DropReason::SpoofedFromHost), "{src}");
    }
}

#[test]
fn a_pod_speaks_no_router_or_neighbour_messages() {
    for kind in [133, 134, 135, 136, 137] {
        let mut world = World::new();
        let bytes = testing::icmp("fd00:32:1::10", "fd00:32:1::11", kind, 0, 0, &[0; 16]);
        assert_eq!(world.send(Ingress::Pods, bytes).0, Verdict::Drop(DropReason::IcmpForbidden), "type {kind}");
    }
    let mut world = World::new();
    let bytes = testing::icmp("10.32.1.10", "10.32.1.11", 5, 0, 0, &[0; 28]);
    assert_eq!(world.send(Ingress::Pods, bytes).0, Verdict::Drop(DropReason::IcmpForbidden));
}

#[test]
fn pings_pass_and_vips_and_gateways_answer_them() {
    let mut world = World::new();
    let ping = |src: &str, dst: &str| testing::echo_request(src, dst, 77, 1, b"ping");
    world.leaves(Ingress::Pods, ping("10.32.1.11", "10.32.1.10"), Verdict::ToPods);
    world.leaves(Ingress::Pods, ping("10.32.1.11", "10.32.2.10"), TO_PEER);
    assert_eq!(world.send(Ingress::Pods, ping("10.32.1.11", "10.32.1.1")).0, Verdict::ToNetstack);
    let (verdict, answer) = world.send(Ingress::Pods, testing::with_ttl(ping("10.32.1.11", "10.96.0.10"), 1));
    assert_eq!((verdict, answer), (Verdict::ToPods, testing::with_ttl(testing::echo_reply("10.96.0.10", "10.32.1.11", 77, 1, b"ping"), 64)));
    // In fragments they come back in fragments: from a VIP, and from the gateway, whose own stack sees whole packets only.
    for (src, dst) in [("10.32.1.11", "10.96.0.10"), ("fd00:32:1::11", "fd00:96::10"), ("10.32.1.11", "10.32.1.1")] {
        let pieces = testing::fragments(&testing::echo_request(src, dst, 77, 1, &[5; 4000]), 1464, 9);
        let expected = testing::fragments(&testing::echo_reply(dst, src, 77, 1, &[5; 4000]), 1464, 9);
        for (piece, expected) in pieces.into_iter().zip(expected) {
            assert_eq!(world.send(Ingress::Pods, piece), (Verdict::ToPods, expected), "{dst}");
        }
    }
    // Masqueraded, the identifier is the port: the reply, which a socket brings, finds its pod.
    for (src, dst, node) in [("10.32.1.11", "203.0.113.9", "192.0.2.1"), ("fd00:32:1::11", "2001:db8:9::9", "2001:db8::1")] {
        let left = world.leaves(Ingress::Pods, ping(src, dst), Verdict::ToHost);
        assert_eq!(left.src, addr(node));
        let back = world.leaves(Ingress::Socket, testing::echo_reply(dst, node, left.src_port, 1, b"ping"), Verdict::ToPods);
        assert_eq!((back.src, back.dst, back.dst_port), (addr(dst), addr(src), 77));
        assert_eq!(world.send(Ingress::Socket, testing::echo_reply(dst, node, 1, 1, b"the node's own")).0, Verdict::Consumed(Consumed::NotOurs));
    }
}

#[test]
fn an_icmp_error_about_a_translated_flow_is_translated_inside_and_out() {
    for protocol in [protocol::TCP, protocol::UDP] {
        let mut world = World::new();
        // A pod dials a VIP; the backend's node says that the port is closed.
        let (_, sent) = world.send(Ingress::Pods, opener(protocol, "10.32.1.11:5000", "10.96.0.11:80"));
        let (verdict, error) = world.send(PEER, testing::icmp_error("10.32.2.10", "10.32.1.11", 3, 3, 0, &sent));
        assert_eq!(verdict, Verdict::ToPods);
        assert_eq!((tuple_of(&error).src, tuple_of(&error).dst), (addr("10.96.0.11"), addr("10.32.1.11")), "it comes from what was dialled");
        let quoted = quoted_tuple(&error);
        assert_eq!(quoted, testing::tuple(protocol, "10.32.1.11:5000", "10.96.0.11:80"), "and quotes what was sent");
        // A router outside says that the path of masqueraded traffic is narrow: it keeps its name.
        let (_, sent) = world.send(Ingress::Pods, opener(protocol, "10.32.1.11:5001", "203.0.113.9:443"));
        let (verdict, error) = world.send(Ingress::Socket, testing::icmp_error("198.51.100.1", "192.0.2.1", 3, 4, 1400, &sent));
        assert_eq!(verdict, Verdict::ToPods);
        assert_eq!((tuple_of(&error).src, tuple_of(&error).dst), (addr("198.51.100.1"), addr("10.32.1.11")));
        assert_eq!(quoted_tuple(&error), testing::tuple(protocol, "10.32.1.11:5001", "203.0.113.9:443"));
    }
}

fn quoted_tuple(error: &[u8]) -> Tuple {
    let mut bytes = error.to_vec();
    let parsed = parse(&testing::packet(&mut bytes, Ingress::Pods)).unwrap();
    nat::quoted_tuple(error, &parsed).unwrap()
}

#[test]
fn errors_of_the_gateway_itself_speak_in_the_senders_terms() {
    let mut world = World::new();
    let expiring = testing::with_ttl(opener(protocol::UDP, "10.32.1.11:5000", "10.96.0.10:80"), 1);
    assert_eq!(world.send(Ingress::Pods, expiring).0, Verdict::Drop(DropReason::TtlExceeded));
    let (egress, error) = world.answers().remove(0);
    assert_eq!((egress, tuple_of(&error).src), (Egress::Pods, addr("10.32.1.1")));
    assert_eq!(quoted_tuple(&error), testing::tuple(protocol::UDP, "10.32.1.11:5000", "10.96.0.10:80"), "the VIP, not the backend");

    let big = testing::with_dont_fragment(testing::udp("10.32.1.11:5000", "10.96.0.11:80", &[7; 1470]));
    assert_eq!(world.send(Ingress::Pods, big).0, Verdict::Drop(DropReason::PacketTooBig));
    let (_, error) = world.answers().remove(0);
    assert_eq!(error[20..22], [3, 4], "fragmentation needed");
    assert_eq!(u16::from_be_bytes([error[26], error[27]]), 1464, "with the overlay's MTU");
    assert_eq!(quoted_tuple(&error).dst, addr("10.96.0.11"));
}

#[test]
fn what_may_be_cut_is_cut_to_the_mtu_of_the_way_ahead() {
    let mut world = World::new();
    assert_eq!(world.send(Ingress::Host, testing::udp("192.0.2.1:5000", "10.32.2.10:53", &[7; 4000])).0, Verdict::Consumed(Consumed::Fragmented));
    let pieces = world.answers();
    assert!(pieces.len() >= 3);
    for (egress, bytes) in &pieces {
        assert_eq!(*egress, Egress::Peer(PeerId(0), Network::Cluster));
        assert!(bytes.len() <= 1464);
    }
    // IPv6 is cut only where a socket brought it, reassembled.
    let v6 = testing::udp("[2001:db8:9::9]:5000", "[2001:db8::1]:30080", &[7; 4000]);
    assert_eq!(world.send(Ingress::Host, v6.clone()).0, Verdict::Drop(DropReason::PacketTooBig));
    assert_eq!(world.send(Ingress::Socket, v6).0, Verdict::Consumed(Consumed::Fragmented));
}

#[test]
fn fragments_follow_their_head_in_any_order() {
    for order in [[0, 1, 2], [2, 1, 0], [1, 0, 2], [2, 0, 1]] {
        for (src, dst) in [("10.32.1.11:5000", "10.96.0.11:80"), ("[fd00:32:1::11]:5000", "[fd00:96::10]:80")] {
            let mut world = World::new();
            let pieces = testing::fragments(&testing::udp(src, dst, &[9; 4000]), 1464, 42);
            assert_eq!(pieces.len(), 3);
            let mut left = 0;
            for at in order {
                let (verdict, bytes) = world.send(Ingress::Pods, pieces[at].clone());
                if let Verdict::ToPeer(..) | Verdict::ToPods = verdict {
                    assert_ne!(tuple_of(&bytes).dst, testing::tuple(protocol::UDP, src, dst).dst, "translated");
                    left += 1;
                }
                left += world.answers().len();
            }
            assert_eq!(left, 3, "{order:?} {dst}: {:?}", world.drops());
        }
    }
}

#[test]
fn a_fresh_syn_after_a_reset_or_to_a_backend_that_left_selects_anew() {
    let mut world = World::new();
    let syn = || opener(protocol::TCP, "10.32.1.11:5000", "10.96.0.10:80");
    world.leaves(Ingress::Pods, syn(), Verdict::ToPods);
    let first = world.flows.table().lookup(&tuple_of(&syn())).unwrap();
    world.leaves(Ingress::Pods, syn(), Verdict::ToPods);
    assert_eq!(world.flows.table().lookup(&tuple_of(&syn())).unwrap().at, first.at, "a retransmission stays");
    // The backend leaves; an established connection would go on, a fresh SYN goes elsewhere.
    let elsewhere = service(1, TrafficPolicy::Cluster, vec![backend("10.32.2.10", 8080, Place::RemotePod)]);
    world.snapshot.services = world.snapshot.services.with(faces("10.96.0.10", protocol::TCP, 80, 30080, &elsewhere));
    world.leaves(Ingress::Pods, testing::tcp("10.32.1.11:5000", "10.96.0.10:80", ACK, b"x"), Verdict::ToPods);
    world.leaves(Ingress::Pods, syn(), TO_PEER);
    let second = world.flows.table().lookup(&tuple_of(&syn())).unwrap();
    assert_eq!((second.reply.src, second.stage, second.opener), (addr("10.32.2.10"), Stage::Opening, Opener::Pod));
    assert_eq!(world.flows.table().len(), 1);
}

#[test]
fn clients_that_share_a_port_get_different_snat_ports() {
    let mut world = World::new();
    let mut seen = std::collections::HashSet::new();
    for client in 1..=200 {
        let left = world.leaves(Ingress::Host, opener(protocol::TCP, &format!("203.0.113.{client}:5000"), "192.0.2.1:30080"), Verdict::ToPods);
        assert!(seen.insert(left.src_port), "the reply tuple is unique");
    }
    let mut ports = std::collections::HashSet::new();
    for client in 10..12 {
        let left = world.leaves(Ingress::Pods, opener(protocol::UDP, &format!("10.32.1.{client}:62000"), "203.0.113.9:53"), Verdict::ToHost);
        assert!((61000..=65534).contains(&left.src_port));
        ports.insert(left.src_port);
    }
    assert_eq!(ports.len(), 2);
    assert_eq!(world.outbox.masquerade_ports().len(), 1, "of the last batch");
}

#[test]
fn a_masqueraded_flow_that_begins_in_fragments_wants_its_port_before_it_is_sent() {
    let mut world = World::new();
    for (src, dst) in [("10.32.1.10:5000", "203.0.113.9:53"), ("[fd00:32:1::10]:5000", "[2001:db8:9::9]:53")] {
        let pieces = testing::fragments(&testing::udp(src, dst, &[9; 4000]), 1280, 42);
        assert_eq!(world.send(Ingress::Pods, pieces[0].clone()).0, Verdict::ToHost, "{:?}", world.drops());
        let ports = world.outbox.masquerade_ports();
        assert_eq!((ports.len(), ports[0].bind), (1, Bind::BeforeSending));
        assert_eq!(world.flows.table().lookup(&ports[0].reply).unwrap().at, ports[0].flow);
        assert_eq!(world.send(Ingress::Pods, pieces[1].clone()).0, Verdict::ToHost);
        assert!(world.outbox.masquerade_ports().is_empty(), "once for each flow");
    }
    // One that is cut here goes out in fragments as well; one that is not does not.
    for (len, bind) in [(4000, Bind::BeforeSending), (100, Bind::Soon)] {
        world.send(Ingress::Pods, testing::udp(&format!("10.32.1.10:{}", 6000 + len), "203.0.113.9:53", &vec![9; len]));
        assert_eq!(world.outbox.masquerade_ports().iter().map(|port| port.bind).collect::<Vec<_>>(), [bind]);
    }
}

#[test]
fn a_superframe_is_translated_once_and_a_partial_checksum_stays_partial() {
    let mut world = World::new();
    world.leaves(Ingress::Pods, opener(protocol::TCP, "10.32.1.11:5000", "10.96.0.10:80"), Verdict::ToPods);
    let mut bytes = testing::partial(&testing::tcp("10.32.1.11:5000", "10.96.0.10:80", ACK, &vec![1; 40_000]));
    let mut packet = testing::packet(&mut bytes, Ingress::Pods);
    packet.offload = Offload { checksum: Checksum::Partial, gso: Gso::Tcp { size: 1400, ecn: false } };
    let mut verdicts = Vec::new();
    let env =
        Env { snapshot: &world.snapshot, flows: world.flows.table(), now: world.now, now_ns: world.now.0 * 1_000_000, counters: &world.counters };
    world.pipeline.run::<Touch>(&env, &mut [packet], &mut verdicts, &mut world.outbox);
    assert_eq!(verdicts, [Verdict::ToPods]);
    testing::verify(&testing::complete(&bytes));
    assert_eq!(tuple_of(&bytes), testing::tuple(protocol::TCP, "10.32.1.11:5000", "10.32.1.10:8080"));
}

#[test]
fn a_superframe_that_is_dropped_counts_its_segments() {
    let world = &mut World::new();
    let mut bytes = testing::partial(&testing::tcp("10.32.1.11:5000", "10.96.77.77:80", ACK, &vec![1; 40_000]));
    let mut packet = testing::packet(&mut bytes, Ingress::Pods);
    packet.offload = Offload { checksum: Checksum::Partial, gso: Gso::Tcp { size: 1400, ecn: false } };
    let mut verdicts = Vec::new();
    let env =
        Env { snapshot: &world.snapshot, flows: world.flows.table(), now: world.now, now_ns: world.now.0 * 1_000_000, counters: &world.counters };
    world.pipeline.run::<Touch>(&env, &mut [packet], &mut verdicts, &mut world.outbox);
    assert_eq!(verdicts, [Verdict::Drop(DropReason::UnallocatedVip)]);
    assert_eq!(world.counters.drops(DropReason::UnallocatedVip), 29);
}

#[test]
fn probes_are_counted_and_go_no_further() {
    let mut world = World::new();
    let mut payload = world.snapshot.node.probe_token.to_be_bytes().to_vec();
    payload.push(1);
    let probe = testing::udp("192.0.2.1:9", "10.32.1.1:9", &payload);
    assert_eq!(world.send(Ingress::Host, probe.clone()).0, Verdict::Consumed(Consumed::Probe));
    assert_eq!(world.counters.probes[1].value(), 1);
    assert_ne!(world.send(Ingress::Pods, probe).0, Verdict::Consumed(Consumed::Probe), "a pod cannot make one");
}

#[test]
fn congestion_on_the_underlay_reaches_the_pod() {
    let mut world = World::new();
    let outer = Ingress::Overlay(Outer { src: addr("192.0.2.2"), ecn: 3, network: Network::Cluster });
    let capable = testing::with_traffic_class(opener(protocol::UDP, "10.32.2.11:5000", "10.32.1.10:53"), 2);
    let (verdict, bytes) = world.send(outer, capable);
    assert_eq!((verdict, bytes[1] & 3), (Verdict::ToPods, 3));
    let incapable = opener(protocol::UDP, "10.32.2.11:5000", "10.32.1.10:53");
    assert_eq!(world.send(outer, incapable).0, Verdict::Drop(DropReason::OverlayCongestion));
}
