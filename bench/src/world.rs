//! A node with its tables, and packets that go through it in batches: what the in-memory benches and the allocation test share.
//!
//! The tables are of a real size (250 pods of each family, 1,000 services, 100 peers), so that no lookup is flattered by an empty map.
//! A packet is edited in place, so each batch is copied from pristine bytes first, as a read from a device would write it; that copy is part
//! of every figure.

use std::sync::Arc;

use ipnetwork::IpNetwork;
use podgate_core::addr::{Addr, protocol};
use podgate_core::balance::Balance;
use podgate_core::counters::Counters;
use podgate_core::fib::{Pod, PodTable, PrefixMap};
use podgate_core::flow::{FlowTable, Now, OwnedFlows, Timeouts};
use podgate_core::packet::{Ingress, Network, Offload, Outer, Packet};
use podgate_core::pipeline::{Env, Outbox, Pipeline};
use podgate_core::service::{Backend, Face, Frontend, FrontendKey, Place, ServicePort, ServiceTable, TrafficPolicy};
use podgate_core::snapshot::{Generation, Masquerade, NodeTables, OutsideToPods, Peer, Snapshot};
use podgate_core::testing::{self, addr};
use podgate_core::verdict::{DropReason, Verdict, WorkerId};
use podgate_runtime::flow_file::{FlowFile, Prefetch};

/// Pods of this node, of each family.
pub const PODS: u32 = 250;
/// Services, each with a TCP and a UDP port and [`BACKENDS`] endpoints.
pub const SERVICES: u32 = 1_000;
/// Endpoints of each service, all pods of this node.
pub const BACKENDS: u32 = 25;
/// Other nodes.
pub const PEERS: u32 = 100;

/// IPv4 or IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// `v4` or `v6`.
    pub const fn name(self) -> &'static str {
        match self {
            Family::V4 => "v4",
            Family::V6 => "v6",
        }
    }

    /// The address of this node's pod `n`.
    pub fn pod(self, n: u32) -> String {
        match self {
            Family::V4 => format!("10.32.1.{}", n % PODS + 2),
            Family::V6 => format!("fd00:32:1::{:x}", n % PODS + 2),
        }
    }

    /// The address of pod `n` on the node of peer `peer`.
    pub fn pod_of_peer(self, peer: u32, n: u32) -> String {
        match self {
            Family::V4 => format!("10.32.{}.{}", peer % PEERS + 2, n % PODS + 2),
            Family::V6 => format!("fd00:32:{:x}::{:x}", peer % PEERS + 2, n % PODS + 2),
        }
    }

    /// The VIP of service `n`; both its ports are 80.
    pub fn vip(self, n: u32) -> String {
        let n = n % SERVICES;
        match self {
            Family::V4 => format!("10.96.{}.{}", n / 250, n % 250 + 1),
            Family::V6 => format!("fd00:96::{:x}", n + 1),
        }
    }

    /// An address and a port as text.
    pub fn with_port(self, address: &str, port: u16) -> String {
        match self {
            Family::V4 => format!("{address}:{port}"),
            Family::V6 => format!("[{address}]:{port}"),
        }
    }
}

/// The memory of a flow table.
#[derive(Debug)]
pub enum Flows {
    /// The process's own.
    Owned(OwnedFlows),
    /// A file, as the daemon has it.
    File(FlowFile),
}

impl Flows {
    /// The table.
    #[inline]
    pub fn table(&self) -> FlowTable<'_> {
        match self {
            Flows::Owned(flows) => flows.table(),
            Flows::File(flows) => flows.table(),
        }
    }
}

/// One worker with everything it reads.
#[derive(Debug)]
pub struct World {
    /// The tables.
    pub snapshot: Arc<Snapshot>,
    /// The flow table.
    pub flows: Arc<Flows>,
    counters: Counters,
    pipeline: Pipeline,
    outbox: Outbox,
    verdicts: Vec<Verdict>,
    now: Now,
}

impl World {
    /// A node whose flow table has room for `flows`.
    pub fn new(flows: usize) -> World {
        let flows = OwnedFlows::new(flows, [0x0706_0504_0302_0100, 0x0f0e_0d0c_0b0a_0908]);
        World::with_flows(Flows::Owned(flows))
    }

    /// A node with this flow table.
    pub fn with_flows(flows: Flows) -> World {
        World::of(snapshot().into(), flows.into(), 0)
    }

    /// Another worker of the same node.
    pub fn another(&self, worker: u16) -> World {
        World::of(self.snapshot.clone(), self.flows.clone(), worker)
    }

    fn of(snapshot: Arc<Snapshot>, flows: Arc<Flows>, worker: u16) -> World {
        World {
            snapshot,
            flows,
            counters: Counters::default(),
            pipeline: Pipeline::new(WorkerId(worker), 7 + u64::from(worker)),
            outbox: Outbox::new(512, 1 << 20),
            verdicts: Vec::with_capacity(256),
            now: Now(1_000_000),
        }
    }

    /// Sends one batch through the pipeline, and gives back its verdicts.
    #[inline]
    pub fn run(&mut self, batch: &mut [Packet<'_>]) -> &[Verdict] {
        self.outbox.clear();
        let env =
            Env { snapshot: &self.snapshot, flows: self.flows.table(), now: self.now, now_ns: self.now.0 * 1_000_000, counters: &self.counters };
        self.pipeline.run::<Prefetch>(&env, batch, &mut self.verdicts, &mut self.outbox);
        &self.verdicts
    }

    /// Sends all of `traffic` once, in batches of `N`, and panics unless every packet gets a verdict that `expected` holds of.
    pub fn send_all<const N: usize>(&mut self, traffic: &mut Traffic, expected: impl Fn(&Verdict) -> bool) {
        for _ in 0..traffic.len().div_ceil(N) {
            let verdicts = self.run(&mut traffic.next_batch::<N>());
            if let Some(other) = verdicts.iter().copied().find(|verdict| !expected(verdict)) {
                panic!("not what this traffic is meant to meet: {other:?}; drops {:?}", self.drops());
            }
        }
    }

    /// What was dropped so far, by name.
    pub fn drops(&self) -> Vec<(&'static str, u64)> {
        DropReason::ALL.iter().map(|reason| (reason.name(), self.counters.drops(*reason))).filter(|(_, packets)| *packets > 0).collect()
    }
}

/// Packets of one size, sent round and round in a shuffled order.
#[derive(Debug)]
pub struct Traffic {
    /// The first `restored` bytes of each packet, one after the other.
    pristine: Vec<u8>,
    /// The batch that is on its way: each of `stride` bytes.
    working: Vec<u8>,
    stride: usize,
    restored: usize,
    offload: Offload,
    ingress: Ingress,
    at: usize,
}

/// Bytes of a superframe that the pipeline may edit; the rest of it is payload, which it never touches.
const EDITED_LEN_MAX: usize = 128;

/// The largest batch.
const BATCH_LEN_MAX: usize = 256;

impl Traffic {
    /// From packets of equal length.
    ///
    /// # Panics
    ///
    /// If there is none, or their lengths differ.
    pub fn new(mut packets: Vec<Vec<u8>>, offload: Offload, ingress: Ingress) -> Traffic {
        shuffle(&mut packets);
        let stride = packets[0].len();
        assert!(packets.iter().all(|packet| packet.len() == stride), "packets of one length");
        let restored = stride.min(EDITED_LEN_MAX);
        let pristine = packets.iter().flat_map(|packet| &packet[..restored]).copied().collect();
        Traffic { pristine, working: packets[0].repeat(BATCH_LEN_MAX), stride, restored, offload, ingress, at: 0 }
    }

    /// How many different packets there are.
    pub fn len(&self) -> usize {
        self.pristine.len() / self.restored
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The next `N` packets, as if just read.
    #[inline]
    pub fn next_batch<const N: usize>(&mut self) -> [Packet<'_>; N] {
        const { assert!(N <= BATCH_LEN_MAX) };
        let mut heads = self.working.chunks_exact_mut(self.stride);
        std::array::from_fn(|_| {
            let head = heads.next().expect("room for the largest batch");
            let pristine = &self.pristine[self.at..self.at + self.restored];
            match (head.first_chunk_mut::<64>(), pristine.as_array::<64>()) {
                // Known at compile time, so that it is four moves and no call.
                (Some(head), Some(pristine)) => *head = *pristine,
                _ => head[..self.restored].copy_from_slice(pristine),
            }
            self.at += self.restored;
            if self.at == self.pristine.len() {
                self.at = 0;
            }
            Packet { head, tail_len: 0, offload: self.offload, ingress: self.ingress }
        })
    }
}

/// Where packets of the first peer come in.
pub fn from_peer() -> Ingress {
    Ingress::Overlay(Outer { src: addr("192.0.2.2"), ecn: 0, network: Network::Cluster })
}

/// `count` packets of `len` bytes, each of a flow of its own: pods of this node to services' VIPs.
pub fn to_services(family: Family, protocol: u8, count: u32, len: usize, flags: u8) -> Vec<Vec<u8>> {
    (0..count)
        .map(|n| {
            let (src, dst) = (family.with_port(&family.pod(n), 1024 + (n / PODS) as u16), family.with_port(&family.vip(n), 80));
            packet(family, protocol, &src, &dst, len, flags)
        })
        .collect()
}

/// `count` packets of `len` bytes from pod to pod of this node.
pub fn to_pods(family: Family, count: u32, len: usize) -> Vec<Vec<u8>> {
    (0..count)
        .map(|n| packet(family, protocol::UDP, &family.with_port(&family.pod(n), 5000), &family.with_port(&family.pod(n + 1 + n / PODS), 80), len, 0))
        .collect()
}

/// `count` packets of `len` bytes from pods of this node to pods of all peers.
pub fn to_peers(family: Family, count: u32, len: usize) -> Vec<Vec<u8>> {
    (0..count)
        .map(|n| packet(family, protocol::UDP, &family.with_port(&family.pod(n), 5000), &family.with_port(&family.pod_of_peer(n, n / 7), 80), len, 0))
        .collect()
}

/// One packet of `len` bytes.
pub fn packet(family: Family, protocol: u8, src: &str, dst: &str, len: usize, flags: u8) -> Vec<u8> {
    let ip = if family == Family::V4 { 20 } else { 40 };
    let payload = |header: usize| vec![0x5a; len - ip - header];
    if protocol == protocol::TCP { testing::tcp(src, dst, flags, &payload(20)) } else { testing::udp(src, dst, &payload(8)) }
}

/// Fisher and Yates with a fixed seed: flows are met in no order that a cache could foresee.
fn shuffle<T>(items: &mut [T]) {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for at in (1..items.len()).rev() {
        // Knuth's MMIX generator; its high bits are good enough for this.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        items.swap(at, (state >> 33) as usize % (at + 1));
    }
}

fn snapshot() -> Snapshot {
    let network = |text: String| text.parse::<IpNetwork>().expect("a network as text");
    let networks = |texts: &[&str]| texts.iter().map(|text| network(text.to_string())).collect::<Vec<_>>();
    let peer_networks = |n: u32| {
        [format!("10.32.{}.0/24", n + 2), format!("fd00:32:{:x}::/64", n + 2), format!("192.0.2.{}/32", n + 2), format!("2001:db8::{:x}/128", n + 2)]
            .map(network)
    };
    let mut peers = Vec::new();
    let mut routes = Vec::new();
    let mut by_underlay = Vec::new();
    for n in 0..PEERS {
        let prefixes = PrefixMap::new(peer_networks(n).map(|network| (network, ())));
        let underlay = addr(&format!("192.0.2.{}", n + 2));
        peers.push(Peer {
            name: format!("node-{}", n + 2).into(),
            underlay: underlay.ip(),
            port: 4790,
            mtu: 1464,
            prefixes: prefixes.into(),
            direct_return: false,
        });
        routes.extend(peer_networks(n).map(|network| (network, n)));
        by_underlay.push((underlay, n));
    }
    by_underlay.sort();
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
    let pods = (0..PODS).flat_map(|n| [Family::V4.pod(n), Family::V6.pod(n)]).map(|ip| (addr(&ip), Pod::new(1464)));
    Snapshot {
        generation: Generation(1),
        node: Arc::new(node),
        services: services(),
        pods: PodTable::new(pods),
        routes: Arc::new(PrefixMap::new(routes)),
        peers: peers.into(),
        peer_by_underlay: by_underlay.into(),
    }
}

fn services() -> ServiceTable {
    let mut changes = Vec::new();
    for n in 0..SERVICES {
        for family in [Family::V4, Family::V6] {
            let backends: Arc<[Backend]> =
                (0..BACKENDS).map(|b| Backend { addr: addr(&family.pod(n + b)), port: 8080, place: Place::LocalPod }).collect();
            for protocol in [protocol::TCP, protocol::UDP] {
                let service = ServicePort {
                    id: u64::from(n) << 16 | u64::from(protocol) << 8 | (family as u64 + 1),
                    name: format!("bench/service-{n}").into(),
                    internal_policy: TrafficPolicy::Cluster,
                    external_policy: TrafficPolicy::Cluster,
                    cluster: backends.clone(),
                    local: backends.clone(),
                    balance: Balance::default(),
                    affinity: None,
                    source_ranges: vec![],
                };
                let key = FrontendKey { addr: vip(family, n), port: 80, protocol };
                changes.push((key, Some(Frontend { face: Face::ClusterIp, service: Arc::new(service) })));
            }
        }
    }
    ServiceTable::default().with(changes)
}

fn vip(family: Family, n: u32) -> Addr {
    addr(&family.vip(n))
}
