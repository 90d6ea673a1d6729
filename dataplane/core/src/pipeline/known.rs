//! The short way of a packet in the middle of a known flow.
//!
//! It asks what the stages ask, of the same functions, and leaves to them whatever is unusual: so it needs one cache line of the flow's record, no
//! copy of the flow, and a change of checksums that was worked out when the flow began. That the outcome is the same is tested with random packets in two
//! worlds, one without it (`tests/random.rs`).

use super::{Env, TtlTaken, mtu_of, trim, verdict_of};
use crate::admit::{self, Sender};
use crate::decide::{self, Hop};
use crate::flow::Likely;
use crate::nat;
use crate::offload;
use crate::packet::Packet;
use crate::parse::{Parsed, Transport};
use crate::verdict::Verdict;
use crate::wire::ip;
use crate::wire::tcp::SYN;

/// Stages 2 to 7 at once for a packet of a known flow that is no fragment, opens nothing and keeps within TTL, MTU and no limit at all.
/// `None`: it is something else, or something is the matter with it; nothing has happened to it that its way through the stages would not do as well.
#[inline(always)]
pub(super) fn follow_known(env: &Env<'_>, packet: &mut Packet<'_>, parsed: &Parsed, likely: Likely) -> Option<Verdict> {
    let tcp_flags = match parsed.transport_kind {
        Transport::Tcp { flags, .. } if flags & SYN == 0 => Some(flags),
        Transport::Udp => None,
        _ => return None,
    };
    if parsed.fragment.is_some() || admit::probe(env.snapshot, packet, parsed).is_some() {
        return None;
    }
    let flow = env.flows.hit(&parsed.tuple, likely)?;
    let sender = admit::admit(env.snapshot, packet, parsed).ok()?;
    if let Sender::HandedOn(_) = sender {
        return None;
    }
    let hop = decide::hop_back_or_on(env.snapshot, flow.direction(), flow.opener(), flow.to().dst).ok()?;
    let limited = matches!(sender, Sender::Pod { limited: true }) || matches!(hop, Hop::Pod { limited: true, .. });
    let ttl = TtlTaken::of(packet.ingress, hop);
    if limited || parsed.ttl <= ttl.by_all().max(1) || offload::wire_len(packet, parsed) > mtu_of(env.snapshot, hop) {
        return None;
    }
    trim(packet, parsed);
    if ttl.by_us > 0 {
        ip::set_ttl(packet.head, parsed.ttl - ttl.by_us);
    }
    flow.touch(env.now, tcp_flags);
    nat::translate_known(packet.head, parsed, packet.offload.checksum, flow.to(), flow.change());
    Some(verdict_of(hop))
}
