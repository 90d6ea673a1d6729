//! What would become of a packet: the pipeline's own stages asked one by one, with nothing changed and nothing sent.

use std::time::Duration;

use crate::addr::{Addr, Tuple, protocol};
use crate::admit::{self, Sender};
use crate::balance::Pick;
use crate::decide::{self, Decision, Hop, Reach, Say, Source};
use crate::flow::{Direction, FlowTable, Kind, Now};
use crate::packet::{Ingress, Network, Offload, Outer, Packet};
use crate::parse::{Parsed, Transport};
use crate::service::{FrontendKey, ServicePort};
use crate::shape::{Limiter, Limits};
use crate::snapshot::Snapshot;
use crate::verdict::{DropReason, PeerId};

/// One stage of a packet's way and what happens there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// `ingress`, `admit`, `flow`, `service`, `balance`, `affinity`, `translate`, `limit`, `next hop` or `verdict`.
    pub stage: &'static str,
    /// For people.
    pub detail: String,
}

/// The way of the first packet of `tuple` (for TCP a SYN, for ICMP an echo request), sent by whoever owns its source.
pub fn trace(snapshot: &Snapshot, flows: &FlowTable<'_>, tuple: Tuple, now: Now) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut note = |stage, detail: String| steps.push(Step { stage, detail });
    let ingress = ingress_of(snapshot, &tuple);
    note("ingress", describe_ingress(snapshot, ingress, &tuple));
    let transport_kind = match tuple.protocol {
        protocol::TCP => Transport::Tcp { flags: 0x02, header_len: 20 },
        protocol::UDP => Transport::Udp,
        protocol::ICMP | protocol::ICMPV6 => Transport::EchoRequest,
        _ => Transport::Other,
    };
    let transport = if tuple.is_v4() { 20 } else { 40 };
    let parsed =
        Parsed { tuple, transport, len: transport as u32 + 20, ttl: 64, traffic_class: 0, dont_fragment: true, fragment: None, transport_kind };
    let mut packet = Packet { head: &mut [], tail_len: 0, offload: Offload::default(), ingress };
    let sender = match admit::admit(snapshot, &mut packet, &parsed) {
        Ok(sender) => sender,
        Err(reason) => {
            note("admit", format!("refused: {}", reason.help()));
            note("verdict", drop_text(reason));
            return steps;
        }
    };
    note(
        "admit",
        match sender {
            Sender::Pod { .. } => "the source is a pod of this node".into(),
            Sender::Node => "the source is this node itself".into(),
            Sender::Outside => "the source is outside the cluster".into(),
            Sender::Peer(peer) | Sender::HandedOn(peer) => format!("the source belongs to peer {}", snapshot.peers[peer.0 as usize].name),
        },
    );
    let decision = decide::decide(snapshot, flows, &packet, &parsed, flows.hash(&parsed.tuple), sender, now);
    match decision {
        Decision::Known(flow) => {
            let way = if flow.direction == Direction::Original { "as its opener" } else { "as a reply" };
            note("flow", format!("known, {way}: stage {:?}, kind {:?}", flow.stage, flow.kind));
        }
        _ => note("flow", "none yet".into()),
    }
    let key = FrontendKey { addr: tuple.dst, port: tuple.dst_port, protocol: tuple.protocol };
    if let Some(frontend) = snapshot.services.get(&key) {
        let service = &frontend.service;
        note(
            "service",
            format!(
                "{} by its {}; usable endpoints: {}, on this node: {}",
                service.name,
                frontend.face.name(),
                service.cluster.len(),
                service.local.len()
            ),
        );
        if let Some(reach) = decide::reach(snapshot, &parsed, sender) {
            if !matches!(reach.pick, Pick::Even) {
                note("balance", format!("a new connection's endpoint is chosen by the policy {}", reach.pick.name()));
            }
            if let Some(timeout) = service.affinity {
                note("affinity", describe_affinity(flows, &reach, service, tuple.src, timeout, now));
            }
        }
    } else if snapshot.is_vip(tuple.dst) && !snapshot.node.is_gateway(tuple.dst) {
        note("service", "a VIP, but no service has this port".into());
    }
    // Where its packets go once they are translated.
    let mut dst = tuple.dst;
    let hop = match decision {
        Decision::Plain(hop) => {
            if matches!((sender, hop), (Sender::Pod { .. }, Hop::Outside)) && snapshot.node.masquerade.is_some() {
                note("translate", "nothing: this pod is not masqueraded".into());
            }
            Ok(hop)
        }
        Decision::Known(flow) => {
            let to = flow.translated();
            dst = to.dst;
            note("translate", format!("{}:{} > {}:{}", to.src, to.src_port, to.dst, to.dst_port));
            decide::hop_of_flow(snapshot, &flow)
        }
        Decision::Open(opening) => {
            let source = match opening.source {
                Source::Keep if opening.kind == Kind::DirectReturn => "both by the gateway there; here the packet stays as it is".to_owned(),
                Source::Keep => "the source stays".to_owned(),
                Source::Gateway(addr) => format!("the source becomes the gateway's address {addr}, so that replies come back here"),
                Source::Masquerade(addr) => format!("the source becomes the node's address {addr} with a masquerade port"),
            };
            note("translate", format!("to {}:{}; {source}", opening.to.0, opening.to.1));
            dst = opening.to.0;
            Ok(opening.hop)
        }
        Decision::Netstack => {
            note("verdict", "answered by the gateway's own network stack".into());
            return steps;
        }
        Decision::Echo(_) => {
            note("verdict", "answered on the spot: a VIP answers ping".into());
            return steps;
        }
        Decision::Quoting(_) | Decision::NotOurs => return steps,
        Decision::Refuse(reason, say) => {
            let told = match say {
                Say::Nothing => "the sender is not told",
                Say::Reject => "the sender gets a TCP reset or an ICMP port unreachable",
                Say::NoRoute => "the sender gets an ICMP host unreachable",
            };
            note("verdict", format!("{}; {told}", drop_text(reason)));
            return steps;
        }
    };
    let limits = |pod| snapshot.pods.get(pod).and_then(|pod| pod.limits.as_deref());
    let egress = if let Sender::Pod { .. } = sender { limits(tuple.src).and_then(|limits: &Limits| limits.egress.as_ref()) } else { None };
    if let Some(limiter) = egress {
        note("limit", format!("what {} sends: {}", tuple.src, describe_limit(limiter)));
    }
    let ingress = if let Ok(Hop::Pod { .. }) = hop { limits(dst).and_then(|limits| limits.ingress.as_ref()) } else { None };
    if let Some(limiter) = ingress {
        note("limit", format!("what {dst} receives: {}", describe_limit(limiter)));
    }
    match hop {
        Ok(hop) => {
            let (way, verdict) = match hop {
                Hop::Pod { mtu, tun: None, .. } => (format!("a pod of this node, MTU {mtu}"), "written to the TUN of the pods"),
                Hop::Pod { mtu, tun: Some(_), .. } => (format!("a pod of this node, MTU {mtu}"), "written to the pod's own TUN"),
                Hop::Node => ("this node itself".into(), "written to the TUN of the host"),
                Hop::Outside => (format!("outside, by the node's own routing, MTU {}", snapshot.node.outside_mtu), "written to the TUN of the host"),
                Hop::Peer(peer) => (describe_peer(snapshot, peer), "encapsulated and sent"),
                Hop::DirectReturn(peer) => {
                    (describe_peer(snapshot, peer), "encapsulated as it came and sent by the network for direct return: the reply leaves there")
                }
            };
            note("next hop", way);
            note("verdict", verdict.into());
        }
        Err(reason) => note("verdict", drop_text(reason)),
    }
    steps
}

fn drop_text(reason: DropReason) -> String {
    format!("dropped as {}: {}", reason.name(), reason.help().trim_end_matches('.'))
}

fn describe_peer(snapshot: &Snapshot, peer: PeerId) -> String {
    let peer = &snapshot.peers[peer.0 as usize];
    format!("peer {} at {} port {}, MTU {}", peer.name, peer.underlay, peer.port, peer.mtu)
}

fn describe_affinity(flows: &FlowTable<'_>, reach: &Reach<'_>, service: &ServicePort, client: Addr, timeout: Duration, now: Now) -> String {
    let sticky = flows.affinity().lookup(client, service.id, now);
    match sticky.map(|sticky| (sticky, reach.find(sticky.backend))) {
        Some((sticky, Some(backend))) => format!("{client} sticks to {}:{} for {} s", backend.addr, backend.port, sticky.left_s),
        Some((_, None)) => {
            format!("{client} stuck to an endpoint that is not one of these; it will stick to its next one for {} s", timeout.as_secs())
        }
        None => format!("{client} sticks to none yet; it will stick to its next one for {} s", timeout.as_secs()),
    }
}

fn describe_limit(limiter: &Limiter) -> String {
    let rate = limiter.rate();
    let (rate, burst) = (bits(rate.bits_per_second.get()), bits(rate.burst()));
    format!("{rate}/s, bursts of {burst}; more waits for {} ms at most", limiter.horizon_ns() / 1_000_000)
}

/// A number of bits in the largest unit that divides it.
fn bits(bits: u64) -> String {
    match bits {
        bits if bits % 1_000_000_000 == 0 => format!("{} Gbit", bits / 1_000_000_000),
        bits if bits % 1_000_000 == 0 => format!("{} Mbit", bits / 1_000_000),
        bits if bits % 1_000 == 0 => format!("{} kbit", bits / 1_000),
        bits => format!("{bits} bit"),
    }
}

/// The side on which the owner of the source sends.
fn ingress_of(snapshot: &Snapshot, tuple: &Tuple) -> Ingress {
    if let Some(pod) = snapshot.pods.get(tuple.src) {
        return pod.tun.map_or(Ingress::Pods, Ingress::Pod);
    }
    match snapshot.routes.lookup(tuple.src) {
        Some(peer) => Ingress::Overlay(Outer { src: snapshot.peers[*peer as usize].underlay.into(), ecn: 0, network: Network::Cluster }),
        None => Ingress::Host,
    }
}

fn describe_ingress(snapshot: &Snapshot, ingress: Ingress, tuple: &Tuple) -> String {
    match ingress {
        Ingress::Pods => format!("the TUN of the pods: {} is a pod here", tuple.src),
        Ingress::Pod(_) => format!("the pod's own TUN: {} is a pod here", tuple.src),
        Ingress::Host | Ingress::Socket => format!("the TUN of the host, if the node's routing brings it: {} is no pod that is known", tuple.src),
        Ingress::Overlay(outer) => {
            let name = snapshot.peers.iter().find(|peer| crate::addr::Addr::from(peer.underlay) == outer.src).map_or("?", |peer| &*peer.name);
            format!("the overlay, from {name}: {} is one of its addresses", tuple.src)
        }
    }
}
