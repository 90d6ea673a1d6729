//! Arrival is not trust: may a packet claim to come from where it says, given the side it came in on?
//!
//! The sides are told apart by descriptor, so what is left to check is the source address, and what kind of thing the destination is.
//! The kernel's per-pod rules (`iif VETH from POD_IP`) stand in front of the TUN `pods`; the check here is the second lock on that door.
//! On a pod's own TUN it is the only one, and a sure one: nobody else can send there.

use crate::addr::{Addr, protocol};
use crate::decap;
use crate::fib::within;
use crate::flow::Opener;
use crate::packet::{Ingress, Network, Outer, Packet};
use crate::parse::{Parsed, Transport};
use crate::snapshot::Snapshot;
use crate::verdict::{DropReason, PeerId};
use crate::wire::ip::{self, Scope};

/// A packet that may go on: who is behind its source address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sender {
    /// A pod of this node.
    Pod {
        /// Whether what it sends is limited.
        limited: bool,
    },
    /// The node itself, by one of its own addresses. (From a wire it could be forged on IPv6: the node's own firewall is to stop that.)
    Node,
    /// Somebody outside the cluster, or a node that is reached past the overlay.
    Outside,
    /// Somebody behind this peer, by an address that is the peer's.
    Peer(PeerId),
    /// Somebody outside, who dialled a service at this peer; the reply is to leave here.
    HandedOn(PeerId),
}

impl Sender {
    /// Where the flow table notes that the opener sits.
    pub fn opener(self) -> Opener {
        match self {
            Sender::Pod { .. } => Opener::Pod,
            Sender::Node | Sender::Outside | Sender::HandedOn(_) => Opener::Host,
            Sender::Peer(_) => Opener::Peer,
        }
    }
}

/// The port of this gateway's own probes: discard (RFC 863).
pub const PROBE_PORT: u16 = 9;

/// Who sent it, or why it may not go on.
#[inline(always)]
pub fn admit(snapshot: &Snapshot, packet: &mut Packet<'_>, parsed: &Parsed) -> Result<Sender, DropReason> {
    let (src, dst) = (parsed.tuple.src, parsed.tuple.dst);
    // Link-local IPv4 goes on: cloud metadata and caches of the node live there. Nothing of IPv6's may leave its link (RFC 4291 §2.5.6).
    if !(Scope::of(dst) == Scope::Unicast || Scope::of(dst) == Scope::LinkLocal && dst.is_v4()) {
        return Err(DropReason::MartianDestination);
    }
    // Sockets bring copies of what the node itself takes from its links.
    if packet.ingress != Ingress::Socket && is_link_business(parsed) {
        return Err(DropReason::IcmpForbidden);
    }
    match packet.ingress {
        Ingress::Pods | Ingress::Pod(_) => of_pod(snapshot, src, packet.ingress),
        Ingress::Host | Ingress::Socket => admit_from_host(snapshot, src),
        Ingress::Overlay(outer) => admit_from_peer(snapshot, packet, parsed, outer),
    }
}

/// A pod's packet, if its source is an address of a pod that sends by this way.
#[inline(always)]
fn of_pod(snapshot: &Snapshot, src: Addr, ingress: Ingress) -> Result<Sender, DropReason> {
    let tun = if let Ingress::Pod(tun) = ingress { Some(tun) } else { None };
    let pod = snapshot.pods.get(src).filter(|pod| pod.tun == tun).ok_or(DropReason::SpoofedByPod)?;
    Ok(Sender::Pod { limited: pod.limits.is_some() })
}

fn admit_from_host(snapshot: &Snapshot, src: Addr) -> Result<Sender, DropReason> {
    if snapshot.node.owns(src) {
        return Ok(Sender::Node);
    }
    if claims_to_be_ours(snapshot, src) {
        return Err(DropReason::SpoofedFromHost);
    }
    if Scope::of(src) == Scope::LinkLocal && !src.is_v4() {
        return Err(DropReason::MartianSource);
    }
    Ok(Sender::Outside)
}

fn admit_from_peer(snapshot: &Snapshot, packet: &mut Packet<'_>, parsed: &Parsed, outer: Outer) -> Result<Sender, DropReason> {
    let src = parsed.tuple.src;
    let peer = peer_at(snapshot, outer.src).ok_or(DropReason::OverlayUnknownPeer)?;
    let sender = match outer.network {
        Network::Cluster => snapshot.peers[peer.0 as usize].prefixes.lookup(src).map(|()| Sender::Peer(peer)),
        Network::DirectReturn => is_outside(snapshot, src).then_some(Sender::HandedOn(peer)),
    };
    let sender = sender.ok_or(DropReason::OverlayForeignSource)?;
    let ecn = decap::ecn(parsed.traffic_class, outer.ecn)?;
    if ecn != parsed.traffic_class & 0b11 {
        ip::set_ecn(packet.head, ecn);
    }
    Ok(sender)
}

/// Whether a packet from `host` is one of this gateway's own probes, and which: they come back with sources that nobody else may use.
#[inline]
pub fn probe(snapshot: &Snapshot, packet: &Packet<'_>, parsed: &Parsed) -> Option<u8> {
    let from_host = matches!(packet.ingress, Ingress::Host | Ingress::Socket);
    if !from_host || parsed.tuple.dst_port != PROBE_PORT || parsed.transport_kind != Transport::Udp {
        return None;
    }
    if !snapshot.node.is_gateway(parsed.tuple.dst) || parsed.fragment.is_some() {
        return None;
    }
    let payload = packet.head.get(parsed.transport as usize + 8..)?;
    let (token, rest) = payload.split_first_chunk::<8>()?;
    (u64::from_be_bytes(*token) == snapshot.node.probe_token).then_some(*rest.first()?)
}

/// Whether `src` is an address that only pods, gateways and VIPs have.
fn claims_to_be_ours(snapshot: &Snapshot, src: Addr) -> bool {
    let node = &snapshot.node;
    within(&node.cluster_pod_cidrs, src) || within(&node.service_cidrs, src) || snapshot.is_vip(src) || snapshot.pods.get(src).is_some()
}

/// Whether `src` can be a client's outside of the cluster: no pod's, no service's, no node's, and no link's alone.
pub(crate) fn is_outside(snapshot: &Snapshot, src: Addr) -> bool {
    let nodes = || snapshot.node.owns(src) || snapshot.routes.lookup(src).is_some() || peer_at(snapshot, src).is_some();
    Scope::of(src) == Scope::Unicast && !claims_to_be_ours(snapshot, src) && !nodes()
}

/// The peer that has this underlay address.
fn peer_at(snapshot: &Snapshot, underlay: Addr) -> Option<PeerId> {
    let by_underlay = &snapshot.peer_by_underlay;
    let at = by_underlay.binary_search_by_key(&underlay, |(addr, _)| *addr).ok()?;
    Some(PeerId(by_underlay[at].1))
}

/// Router and neighbour messages and redirects: they mean something on one link, and a pod has nobody on its own but the gateway
/// (RFC 4861 §4, RFC 792, RFC 1256).
#[inline]
fn is_link_business(parsed: &Parsed) -> bool {
    match (parsed.tuple.protocol, parsed.transport_kind) {
        (protocol::ICMPV6, Transport::IcmpOther(kind)) => (133..=137).contains(&kind),
        (protocol::ICMP, Transport::IcmpOther(kind)) => matches!(kind, 5 | 9 | 10),
        _ => false,
    }
}
