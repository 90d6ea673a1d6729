//! What is to become of a packet: known flow, new flow, plain forwarding or refusal. Pure: reads the tables and changes nothing, so that
//! `trace` asks the same code that forwards.

mod endpoint;

use std::ops::RangeInclusive;
use std::time::Duration;

use crate::addr::{Addr, Tuple, protocol};
use crate::admit::{self, Sender};
use crate::balance::{LoadSlot, Pick, finalize, scramble};
use crate::fib::{Pod, within};
use crate::flow::{Direction, Flow, FlowTable, Hash, Kind, Now, Opener};
use crate::nat;
use crate::packet::{Ingress, Packet};
use crate::parse::{Parsed, Transport};
use crate::service::{Backend, Face, Frontend, FrontendKey, Place, TrafficPolicy};
use crate::snapshot::{Masquerade, NodeTables, OutsideToPods, Snapshot};
use crate::verdict::{DropReason, PeerId, TunId};
use crate::wire::ip::Scope;

pub(crate) use self::endpoint::Reach;
use self::endpoint::{choose, choose_here};

/// What is to become of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It goes on as it is.
    Plain(Hop),
    /// It belongs to a flow: translate it and send it on.
    Known(Flow),
    /// It opens a flow.
    Open(Opening),
    /// An ICMP error about a packet of this flow.
    Quoting(Flow),
    /// It is for the gateway itself.
    Netstack,
    /// An echo request to a VIP, or in fragments to a gateway address: it goes back as the reply.
    Echo(Hop),
    /// A socket brought a copy of something that the node itself has dealt with.
    NotOurs,
    /// It ends here, and perhaps the sender is told.
    Refuse(DropReason, Say),
}

/// What the sender of a refused packet is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Say {
    /// Nothing.
    Nothing,
    /// A TCP reset, or an ICMP port unreachable.
    Reject,
    /// ICMP host unreachable, ICMPv6 no route.
    NoRoute,
}

/// Where a packet goes next, by its destination after translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hop {
    /// A pod of this node; the MTU of its interface.
    Pod {
        /// In bytes.
        mtu: u16,
        /// Whether what it receives is limited.
        limited: bool,
        /// Its own TUN; none if it is reached through the TUN `pods`.
        tun: Option<TunId>,
    },
    /// The node itself, through the TUN `host`.
    Node,
    /// Out through the node's own routing, through the TUN `host`.
    Outside,
    /// A peer.
    Peer(PeerId),
    /// A peer that has the backend, which the packet reaches as it is: the reply leaves there.
    DirectReturn(PeerId),
}

/// It is handed about in one register.
const _: () = assert!(size_of::<Result<Hop, DropReason>>() == 8);

/// A flow to be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opening {
    /// Why.
    pub kind: Kind,
    /// Where the opener sits.
    pub opener: Opener,
    /// The service's id, or 0.
    pub service: u64,
    /// The destination it leaves with.
    pub to: (Addr, u16),
    /// The source it leaves with.
    pub source: Source,
    /// Where it goes next.
    pub hop: Hop,
    /// Whether the client sticks to this backend, and for how long.
    pub affinity: Option<Duration>,
    /// The backend's counter, where somebody wants to know its load.
    pub load: LoadSlot,
}

/// The source that an opened flow leaves with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Its own.
    Keep,
    /// A gateway address of this node: replies come back by address.
    Gateway(Addr),
    /// A node's address and one of the masquerade ports.
    Masquerade(Addr),
}

/// Decides. `hash` is that of the packet's tuple; `sender` comes from `admit`; the packet is not a fragment's tail.
pub fn decide(snapshot: &Snapshot, flows: &FlowTable<'_>, packet: &Packet<'_>, parsed: &Parsed, hash: Hash, sender: Sender, now: Now) -> Decision {
    if let Transport::IcmpError { .. } = parsed.transport_kind {
        return quoting(snapshot, flows, packet, parsed, sender);
    }
    match flows.lookup_hashed(&parsed.tuple, hash) {
        Some(flow) if !gives_way(snapshot, flows, &flow, parsed, sender) => Decision::Known(flow),
        _ => first(snapshot, flows, packet, parsed, sender, now),
    }
}

/// A packet of no known flow.
fn first(snapshot: &Snapshot, flows: &FlowTable<'_>, packet: &Packet<'_>, parsed: &Parsed, sender: Sender, now: Now) -> Decision {
    let (node, dst) = (&*snapshot.node, parsed.tuple.dst);
    let key = FrontendKey { addr: dst, port: parsed.tuple.dst_port, protocol: parsed.tuple.protocol };
    if speaks_overlay(snapshot, parsed.tuple.protocol, (parsed.tuple.src, parsed.tuple.src_port)) {
        // Its answers would go there, from a node's address as like as not.
        return Decision::Refuse(DropReason::OverlayForged, Say::Nothing);
    }
    if let Sender::HandedOn(peer) = sender {
        return match dialled_at(snapshot, peer, &key) {
            Some(frontend) => dial(snapshot, flows, frontend, parsed, sender, now),
            None => Decision::Refuse(DropReason::DirectReturnRefused, Say::Nothing),
        };
    }
    if let Some(frontend) = snapshot.services.get(&key) {
        return dial(snapshot, flows, frontend, parsed, sender, now);
    }
    if packet.ingress == Ingress::Socket {
        return Decision::NotOurs;
    }
    if node.is_gateway(dst) {
        // The gateway's own stack is given whole packets alone.
        let in_fragments = parsed.fragment.is_some() && parsed.transport_kind == Transport::EchoRequest;
        return if in_fragments { Decision::Echo(way_back(snapshot, parsed.tuple.src, sender)) } else { Decision::Netstack };
    }
    if snapshot.is_vip(dst) {
        return match parsed.transport_kind {
            Transport::EchoRequest => Decision::Echo(way_back(snapshot, parsed.tuple.src, sender)),
            Transport::Tcp { .. } | Transport::Udp => Decision::Refuse(DropReason::NoBackendRejected, Say::Reject),
            _ => Decision::Refuse(DropReason::IcmpUnsupported, Say::Nothing),
        };
    }
    if within(&node.service_cidrs, dst) {
        return Decision::Refuse(DropReason::UnallocatedVip, Say::Nothing);
    }
    plain(snapshot, parsed, sender)
}

/// To an address that is no VIP.
fn plain(snapshot: &Snapshot, parsed: &Parsed, sender: Sender) -> Decision {
    let node = &*snapshot.node;
    let dst = parsed.tuple.dst;
    let hop = match hop(snapshot, dst) {
        Ok(hop) => hop,
        Err(reason) => return Decision::Refuse(reason, Say::NoRoute),
    };
    if matches!(sender, Sender::Pod { .. } | Sender::Peer(_)) && speaks_overlay(snapshot, parsed.tuple.protocol, (dst, parsed.tuple.dst_port)) {
        return Decision::Refuse(DropReason::OverlayForged, Say::Nothing);
    }
    let open = |kind, source| Decision::Open(Opening::plain(kind, sender, (dst, parsed.tuple.dst_port), source, hop));
    match (sender, hop) {
        (Sender::Peer(_), Hop::Peer(_) | Hop::Outside) => Decision::Refuse(DropReason::OverlayForeignDestination, Say::Nothing),
        (Sender::Pod { .. } | Sender::Node | Sender::Peer(_), Hop::Pod { .. } | Hop::Node | Hop::Peer(_)) | (Sender::Outside, Hop::Node) => {
            Decision::Plain(hop)
        }
        (Sender::Outside, Hop::Pod { .. } | Hop::Peer(_)) if node.outside_to_pods == OutsideToPods::Drop => {
            Decision::Refuse(DropReason::OutsideToPodDenied, Say::Nothing)
        }
        (Sender::Outside, Hop::Pod { .. }) => open(Kind::OutsideToPod, Source::Keep),
        // Without ports there is nothing to tell its replies by.
        (Sender::Outside, Hop::Peer(_)) if !has_ports(parsed) => Decision::Refuse(DropReason::ProtocolUnsupported, Say::Nothing),
        (Sender::Outside, Hop::Peer(_)) => match node.gateway_for(dst) {
            Some(gateway) => open(Kind::Relayed, Source::Gateway(gateway)),
            None => Decision::Refuse(DropReason::NoRouteFamily, Say::NoRoute),
        },
        // What is handed on is for services alone; and no address by itself is reached by direct return.
        (Sender::HandedOn(_), _) | (_, Hop::DirectReturn(_)) => Decision::Refuse(DropReason::DirectReturnRefused, Say::Nothing),
        (Sender::Node | Sender::Outside, Hop::Outside) => Decision::Refuse(DropReason::UnallocatedVip, Say::NoRoute),
        (Sender::Pod { .. }, Hop::Outside) => {
            let Some(masquerade) = masquerade_of(snapshot, parsed.tuple.src) else {
                return Decision::Plain(hop);
            };
            if !has_ports(parsed) {
                return Decision::Refuse(DropReason::ProtocolUnsupported, Say::Nothing);
            }
            match if dst.is_v4() { masquerade.source_v4 } else { masquerade.source_v6 } {
                Some(source) => open(Kind::Masquerade, Source::Masquerade(source)),
                None => Decision::Refuse(DropReason::MasqueradeOff, Say::NoRoute),
            }
        }
    }
}

impl Opening {
    /// Of a flow that is no service's.
    pub(crate) fn plain(kind: Kind, sender: Sender, to: (Addr, u16), source: Source, hop: Hop) -> Opening {
        Opening { kind, opener: sender.opener(), service: 0, to, source, hop, affinity: None, load: LoadSlot::NONE }
    }
}

/// The endpoints that a packet to a service could be led to, and how; `None` where its destination is no frontend.
pub(crate) fn reach<'a>(snapshot: &'a Snapshot, parsed: &Parsed, sender: Sender) -> Option<Reach<'a>> {
    let key = FrontendKey { addr: parsed.tuple.dst, port: parsed.tuple.dst_port, protocol: parsed.tuple.protocol };
    let frontend = match sender {
        Sender::HandedOn(peer) => dialled_at(snapshot, peer, &key),
        _ => snapshot.services.get(&key),
    };
    Some(Reach::of(frontend?, &snapshot.node, parsed.tuple.src, sender))
}

/// What a client outside dialled at a peer that may hand it on to this node: a VIP of both, or a node port at the peer's own address.
fn dialled_at<'a>(snapshot: &'a Snapshot, peer: PeerId, key: &FrontendKey) -> Option<&'a Frontend> {
    let node = &*snapshot.node;
    if node.owns(key.addr) || within(&node.cluster_pod_cidrs, key.addr) {
        return None;
    }
    let here = match snapshot.peers[peer.0 as usize].prefixes.lookup(key.addr) {
        Some(()) => snapshot.services.get(&FrontendKey::at_a_peer(key.addr, key.port, key.protocol)),
        None => None,
    };
    let vip = || snapshot.services.get(key).filter(|frontend| matches!(frontend.face, Face::LoadBalancer | Face::ExternalIp));
    here.or_else(vip).filter(|frontend| frontend.service.external_policy == TrafficPolicy::Cluster)
}

/// To a service.
fn dial(snapshot: &Snapshot, flows: &FlowTable<'_>, frontend: &Frontend, parsed: &Parsed, sender: Sender, now: Now) -> Decision {
    let (node, service) = (&*snapshot.node, &*frontend.service);
    let src = parsed.tuple.src;
    // Before all else: who may not dial learns nothing, by a reset for one (semantics row 8; the node itself is no exception).
    if frontend.face == Face::LoadBalancer && !service.source_ranges.is_empty() && !within(&service.source_ranges, src) {
        return Decision::Refuse(DropReason::SourceRangeDenied, Say::Nothing);
    }
    if let Transport::Tcp { flags, .. } = parsed.transport_kind
        && flags & (SYN | ACK | RST) != SYN
    {
        // Not the start of a connection: a backend chosen now would not know it.
        return Decision::Refuse(DropReason::NoFlow, Say::Reject);
    }
    let reach = Reach::of(frontend, node, src, sender);
    let chosen = match sender {
        Sender::HandedOn(_) => choose_here(flows, &reach, frontend, node, &parsed.tuple, now),
        _ => choose(flows, &reach, service, &parsed.tuple, now),
    };
    let Some(backend) = chosen else {
        return if let Sender::HandedOn(_) = sender {
            Decision::Refuse(DropReason::DirectReturnRefused, Say::Nothing)
        } else if reach.policy == TrafficPolicy::Local && !service.cluster.is_empty() {
            Decision::Refuse(DropReason::NoBackendLocal, Say::Nothing)
        } else {
            Decision::Refuse(DropReason::NoBackendRejected, Say::Reject)
        };
    };
    // An API server refuses such endpoints; a directory of manifests may hold them. With `route_localnet` on, as kube-proxy leaves it, the
    // node's loopback would be open to every pod.
    if Scope::of(backend.addr) != Scope::Unicast {
        return Decision::Refuse(DropReason::MartianDestination, Say::Nothing);
    }
    let hop = match hop(snapshot, backend.addr) {
        Ok(hop) => hop,
        Err(reason) => return Decision::Refuse(reason, Say::NoRoute),
    };
    let to = (backend.addr, backend.port);
    if speaks_overlay(snapshot, parsed.tuple.protocol, to) {
        return Decision::Refuse(DropReason::OverlayForged, Say::Nothing);
    }
    let load = if let Pick::LeastLoaded(_) = reach.pick { flows.loads().slot(backend.addr, backend.port) } else { LoadSlot::NONE };
    let open = |kind, source, hop| {
        Decision::Open(Opening { kind, opener: sender.opener(), service: service.id, to, source, hop, affinity: service.affinity, load })
    };
    if let Some(peer) = returns_directly(snapshot, frontend.face, &reach, &parsed.tuple, sender, backend, hop) {
        return open(Kind::DirectReturn, Source::Keep, Hop::DirectReturn(peer));
    }
    // A node's own address already names this node: policy asks no more of the source.
    let policy_masquerades = reach.masquerade && sender != Sender::Node;
    let hairpin = backend.addr == src;
    let source = if hop == Hop::Outside
        && let Some(masquerade) = masquerade_of(snapshot, src)
    {
        match if src.is_v4() { masquerade.source_v4 } else { masquerade.source_v6 } {
            Some(source) => Source::Masquerade(source),
            None => return Decision::Refuse(DropReason::MasqueradeOff, Say::NoRoute),
        }
    } else if policy_masquerades || hairpin || !returns_here(node, src, sender, hop, backend) {
        match node.gateway_for(src) {
            Some(gateway) => Source::Gateway(gateway),
            None => return Decision::Refuse(DropReason::NoRouteFamily, Say::NoRoute),
        }
    } else {
        Source::Keep
    };
    open(Kind::Service, source, hop)
}

/// The peer whose backend answers the client itself, where both nodes have it so and the peer will know what was dialled. A process on the
/// other node itself answers past its gateway, and so not from the address that was dialled.
fn returns_directly(
    snapshot: &Snapshot,
    face: Face,
    reach: &Reach<'_>,
    tuple: &Tuple,
    sender: Sender,
    backend: &Backend,
    hop: Hop,
) -> Option<PeerId> {
    let Hop::Peer(peer) = hop else { return None };
    let direct = snapshot.node.direct_return.as_ref()?;
    let known_there = match face {
        Face::LoadBalancer | Face::ExternalIp => true,
        Face::NodePort => direct.addresses.contains(&tuple.dst),
        Face::ClusterIp | Face::PeersNodePort | Face::HostPort => false,
    };
    let agreed = known_there && reach.masquerade && backend.place == Place::RemotePod && snapshot.peers[peer.0 as usize].direct_return;
    (agreed && sender == Sender::Outside && admit::is_outside(snapshot, tuple.src)).then_some(peer)
}

/// Whether the backend's replies to the sender's own address pass this gateway by themselves. Where they do not, the source must be
/// replaced, or the client would hear from an address that it never dialled.
fn returns_here(node: &NodeTables, src: Addr, sender: Sender, hop: Hop, backend: &Backend) -> bool {
    match (sender, hop) {
        // Replies to a pod of this node come here from wherever they are sent.
        (Sender::Pod { .. }, _) => true,
        // A pod's replies to anybody but a pod elsewhere leave by its own node's gateway; a pod of another node by that one's.
        (Sender::Node | Sender::Outside | Sender::Peer(_) | Sender::HandedOn(_), Hop::Pod { .. }) => true,
        // To this node's own address every pod replies through the overlay, a process on another node past it.
        (Sender::Node, Hop::Peer(_)) => backend.place == Place::RemotePod,
        // A process on this node replies to pods through the gateway (the cluster's ranges are routed to it), to all others past it.
        (Sender::Peer(_), Hop::Node) => within(&node.cluster_pod_cidrs, src),
        _ => false,
    }
}

/// Whether it is for the overlay's port of some node: a pod, or somebody through a service, could forge a peer's traffic there.
fn speaks_overlay(snapshot: &Snapshot, protocol: u8, (addr, port): (Addr, u16)) -> bool {
    if protocol != protocol::UDP {
        return false;
    }
    let ours = snapshot.node.overlay_port;
    let by_underlay = &snapshot.peer_by_underlay;
    match by_underlay.binary_search_by_key(&addr, |(underlay, _)| *underlay) {
        // A peer may have announced another port than ours.
        Ok(at) => port == ours || port == snapshot.peers[by_underlay[at].1 as usize].port,
        Err(_) => port == ours && snapshot.node.owns(addr),
    }
}

/// An ICMP error: it belongs to the flow whose packet it quotes, or else goes where its own header says.
fn quoting(snapshot: &Snapshot, flows: &FlowTable<'_>, packet: &Packet<'_>, parsed: &Parsed, sender: Sender) -> Decision {
    if !is_plausible(snapshot, packet, parsed, sender) {
        return Decision::Refuse(DropReason::IcmpErrorForged, Say::Nothing);
    }
    // A packet towards the quoted one's source is of the same flow as the error.
    let known = nat::quoted_tuple(packet.head, parsed).and_then(|quoted| flows.lookup(&quoted.reversed()));
    if let Some(flow) = known.filter(|flow| may_follow(flow, sender)) {
        return Decision::Quoting(flow);
    }
    if packet.ingress == Ingress::Socket {
        return Decision::NotOurs;
    }
    if snapshot.node.is_gateway(parsed.tuple.dst) || snapshot.is_vip(parsed.tuple.dst) {
        return Decision::Refuse(DropReason::IcmpErrorUnmatched, Say::Nothing);
    }
    match (sender, hop(snapshot, parsed.tuple.dst)) {
        (Sender::HandedOn(_), _) => Decision::Refuse(DropReason::IcmpErrorUnmatched, Say::Nothing),
        (Sender::Peer(_), Ok(Hop::Peer(_) | Hop::Outside)) => Decision::Refuse(DropReason::OverlayForeignDestination, Say::Nothing),
        // An error has no ports to masquerade it by.
        (_, Ok(Hop::Outside)) => Decision::Refuse(DropReason::IcmpErrorUnmatched, Say::Nothing),
        (Sender::Outside, Ok(Hop::Peer(_))) => Decision::Refuse(DropReason::IcmpErrorUnmatched, Say::Nothing),
        // What pods say to the outside is masqueraded or has a flow: an error about anything else is about nothing.
        (Sender::Outside, Ok(Hop::Pod { .. })) if masquerade_of(snapshot, parsed.tuple.dst).is_some() => {
            Decision::Refuse(DropReason::IcmpErrorUnmatched, Say::Nothing)
        }
        (_, Ok(hop)) => Decision::Plain(hop),
        (_, Err(reason)) => Decision::Refuse(reason, Say::Nothing),
    }
}

/// Whether the sender of an ICMP error can have met the packet that it quotes, and the receiver can have sent it: else anybody who
/// guesses a tuple could break the flow of somebody else (`icmp_error_inner` in the kernel's `nf_conntrack_proto_icmp.c` asks for the
/// receiver; it cannot know that a pod is no router).
fn is_plausible(snapshot: &Snapshot, packet: &Packet<'_>, parsed: &Parsed, sender: Sender) -> bool {
    let Some((src, dst)) = nat::quoted_addresses(packet.head, parsed) else { return false };
    src == parsed.tuple.dst
        && match sender {
            // Only what is sent to a pod comes to it.
            Sender::Pod { .. } => dst == parsed.tuple.src,
            // A peer's gateway speaks for what is behind it.
            Sender::Peer(peer) => snapshot.peers[peer.0 as usize].prefixes.lookup(dst).is_some(),
            // A router on the way may have any name.
            Sender::Node | Sender::Outside | Sender::HandedOn(_) => true,
        }
}

/// Where a destination is reached.
#[inline]
pub fn hop(snapshot: &Snapshot, dst: Addr) -> Result<Hop, DropReason> {
    match snapshot.pods.get(dst) {
        Some(pod) => Ok(hop_to_pod(pod)),
        None => hop_elsewhere(snapshot, dst),
    }
}

/// Where a destination is reached that is no pod of this node.
fn hop_elsewhere(snapshot: &Snapshot, dst: Addr) -> Result<Hop, DropReason> {
    let node = &*snapshot.node;
    if node.owns(dst) {
        Ok(Hop::Node)
    } else if let Some(peer) = snapshot.routes.lookup(dst) {
        Ok(Hop::Peer(PeerId(*peer)))
    } else if within(&node.node_pod_cidrs, dst) {
        Err(DropReason::NoRoutePod)
    } else if within(&node.cluster_pod_cidrs, dst) {
        Err(DropReason::NoRoutePeer)
    } else if within(&node.service_cidrs, dst) {
        Err(DropReason::UnallocatedVip)
    } else {
        Ok(Hop::Outside)
    }
}

/// The hop to a pod of this node.
#[inline]
fn hop_to_pod(pod: &Pod) -> Hop {
    Hop::Pod { mtu: pod.mtu, limited: pod.limits.is_some(), tun: pod.tun }
}

/// How what `src` says to the outside is masqueraded, if it is: a pod may be left out of it.
fn masquerade_of(snapshot: &Snapshot, src: Addr) -> Option<&Masquerade> {
    snapshot.node.masquerade.as_ref().filter(|_| snapshot.pods.get(src).is_none_or(|pod| pod.masquerade))
}

/// Where a packet of a known flow goes next. Replies to somebody outside go back the way the flow was opened, even where the opener's
/// address is a peer's: a node that came past the overlay is answered past it.
pub fn hop_of_flow(snapshot: &Snapshot, flow: &Flow) -> Result<Hop, DropReason> {
    if flow.kind == Kind::DirectReturn && flow.direction == Direction::Original {
        return match hop(snapshot, flow.reply.src)? {
            Hop::Peer(peer) => Ok(Hop::DirectReturn(peer)),
            // Its address is a pod's of this node by now: the connection ended with the pod that had it.
            _ => Err(DropReason::NoRoutePeer),
        };
    }
    hop_back_or_on(snapshot, flow.direction, flow.opener, flow.translated().dst)
}

/// [`hop_of_flow`] of a packet that leaves for `to`.
#[inline]
pub(crate) fn hop_back_or_on(snapshot: &Snapshot, direction: Direction, opener: Opener, to: Addr) -> Result<Hop, DropReason> {
    match (direction, opener) {
        (Direction::Reply, Opener::Host) if !snapshot.node.owns(to) => Ok(Hop::Outside),
        _ => hop(snapshot, to),
    }
}

/// The way back to who sent a packet.
fn way_back(snapshot: &Snapshot, src: Addr, sender: Sender) -> Hop {
    match sender {
        Sender::Pod { .. } => snapshot.pods.get(src).map_or(Hop::Pod { mtu: 0, limited: false, tun: None }, hop_to_pod),
        Sender::Node => Hop::Node,
        Sender::Outside | Sender::HandedOn(_) => Hop::Outside,
        Sender::Peer(peer) => Hop::Peer(peer),
    }
}

const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;

/// Whether a packet that fits a flow opens a new one in its place, if it opens any.
pub fn gives_way(snapshot: &Snapshot, flows: &FlowTable<'_>, flow: &Flow, parsed: &Parsed, sender: Sender) -> bool {
    !may_follow(flow, sender) || starts_anew(snapshot, flows, flow, parsed)
}

/// Whether what a peer hands on may belong to this flow: to one that a client outside opened to an endpoint, here. One that would hand it on
/// again could lead round in a circle.
fn may_follow(flow: &Flow, sender: Sender) -> bool {
    let from_outside = flow.kind == Kind::Service && flow.opener == Opener::Host && flow.direction == Direction::Original;
    from_outside || !matches!(sender, Sender::HandedOn(_))
}

/// Whether a packet that fits a flow is a fresh SYN where the old connection has ended, or whose backend serves no more (semantics row 11).
fn starts_anew(snapshot: &Snapshot, flows: &FlowTable<'_>, flow: &Flow, parsed: &Parsed) -> bool {
    let Transport::Tcp { flags, .. } = parsed.transport_kind else {
        return false;
    };
    let fresh = flags & (SYN | ACK | RST) == SYN && flow.direction == Direction::Original;
    fresh && (flows.opens_anew(flow, flags) || flow.is_of_a_service() && !still_serves(snapshot, flow))
}

/// Whether the backend of a service's flow is still one of the endpoints behind what was dialled.
pub fn still_serves(snapshot: &Snapshot, flow: &Flow) -> bool {
    let key = FrontendKey { addr: flow.original.dst, port: flow.original.dst_port, protocol: flow.original.protocol };
    let at_a_peer = || snapshot.services.get(&FrontendKey::at_a_peer(key.addr, key.port, key.protocol));
    snapshot.services.get(&key).or_else(at_a_peer).is_some_and(|frontend| {
        let is_it = |b: &Backend| b.addr == flow.reply.src && b.port == flow.reply.src_port;
        frontend.service.id == flow.service && (frontend.service.cluster.iter().any(is_it) || frontend.service.local.iter().any(is_it))
    })
}

/// Whether a flow of it can be told from others by ports or an identifier.
pub fn has_ports(parsed: &Parsed) -> bool {
    matches!(parsed.transport_kind, Transport::Tcp { .. } | Transport::Udp | Transport::EchoRequest)
        && matches!(parsed.tuple.protocol, protocol::TCP | protocol::UDP | protocol::ICMP | protocol::ICMPV6)
}

/// The ports that a source has for `attempt`s to find a free one: the sender's own first where it lies in the ranges, then spread by
/// `scramble`, so that clients do not queue up for the same port.
pub fn source_port(ranges: &[RangeInclusive<u16>], tuple: &Tuple, attempt: u32) -> Option<u16> {
    if attempt == 0 && ranges.iter().any(|range| range.contains(&tuple.src_port)) {
        return Some(tuple.src_port);
    }
    let size = |range: &RangeInclusive<u16>| (*range.end() as u32 + 1).saturating_sub(*range.start() as u32);
    let total: u32 = ranges.iter().map(size).sum();
    if total == 0 {
        return None;
    }
    // Each attempt starts afresh: with a stride that all flows share, ports in use would lie in runs, and a run would hold everybody up.
    let mut at = (finalize(scramble(tuple).wrapping_add(u64::from(attempt))) as u32) % total;
    for range in ranges {
        if at < size(range) {
            return Some(*range.start() + at as u16);
        }
        at -= size(range);
    }
    None
}
