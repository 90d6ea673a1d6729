//! Joining: neighbouring datagrams of one flow are written to a TUN as one superframe.
//!
//! A program that sends datagrams one by one costs a read for each, since a TUN brings one frame at a time. A write for each would cost
//! more than that again: a route, a device and a socket's input in the kernel. So what the pipeline has judged one by one, and leads to
//! the same TUN, is merged behind it by the rules by which a network card's driver would have done it ([`podgate_core::offload::merge`]);
//! the receiver's kernel cuts it again at the socket, or hands it over whole where the program asked for that (`UDP_GRO`).
//!
//! Behind the pipeline, not before it: so each datagram has its own verdict, its own place in a limit's queue, its own ICMP error, and may be
//! cut by itself where the way is narrow; and what goes to peers is as it came.
//!
//! Read first: net/ipv4/udp_offload.c (`udp_gro_receive`, `__udp_gso_segment`), include/net/udp.h (`udp_unexpected_gso`).

use std::ops::Range;

use podgate_core::addr::protocol;
use podgate_core::offload::{MergePlan, Merging, merge};
use podgate_core::packet::{Gso, Offload};
use podgate_core::verdict::Verdict;
use podgate_core::wire::{ipv4, ipv6, udp};

use super::batch::{Buffers, READS_MAX, Slot};

/// Datagrams of one superframe at most: no batch from a TUN has more.
const JOINED_MAX: usize = READS_MAX;

/// Datagrams of one superframe at least.
const JOINED_MIN: usize = 2;

/// What has been joined last.
pub(super) struct Joined {
    segments: Vec<Range<usize>>,
    plan: MergePlan,
}

impl Joined {
    pub(super) fn new() -> Joined {
        Joined { segments: Vec::with_capacity(JOINED_MAX), plan: MergePlan::new(JOINED_MAX, Merging::Off, Merging::On) }
    }

    /// Merges what may be merged of `slots`, which are [`neighbours`].
    pub(super) fn join(&mut self, slots: &[Slot], buffers: &mut impl Buffers) {
        let Some(first) = slots.first() else { return };
        self.segments.clear();
        self.segments.extend(slots.iter().map(|slot| slot.head.clone()));
        merge(buffers.buffer_mut(first.buffer), &self.segments, first.offload.checksum, &mut self.plan);
    }

    /// The frames made of them, as slots whose tails are in [`Joined::tails`]. `like` is one of those that were joined.
    pub(super) fn slots(&self, like: &Slot) -> impl Iterator<Item = Slot> {
        self.plan.frames().iter().map(|frame| Slot {
            buffer: like.buffer,
            head: frame.head.clone(),
            tails: frame.tails.clone(),
            tail_len: frame.tail_len,
            offload: frame.offload,
            ingress: like.ingress,
        })
    }

    /// Where their payloads lie.
    pub(super) fn tails(&self) -> &[Range<usize>] {
        self.plan.tails()
    }
}

/// How many of `slots`, from the first on, look like one superframe: datagrams of one flow to one TUN, of the same length but for the last. 1
/// if it is not worth a closer look.
#[inline]
pub(super) fn neighbours(slots: &[Slot], verdicts: &[Verdict], buffers: &impl Buffers) -> usize {
    let ([first, second, ..], [verdict, next, ..]) = (slots, verdicts) else { return 1 };
    let alike = first.head.len() == second.head.len() && first.offload == second.offload && verdict == next;
    if !alike || first.offload.gso != Gso::None || !matches!(verdict, Verdict::ToPods | Verdict::ToPod(_) | Verdict::ToHost) {
        return 1;
    }
    let bytes = buffers.buffer(first.buffer);
    let Some(flow) = flow(bytes, first) else { return 1 };
    let len = first.head.len();
    let follows = |(slot, to): &(&Slot, &Verdict)| {
        slot.head.len() <= len
            && single(slot, first.offload)
            && *to == verdict
            && slot.buffer == first.buffer
            && self::flow(bytes, slot) == Some(flow)
    };
    let mut count = 1;
    for (slot, _) in slots.iter().zip(verdicts).take(JOINED_MAX).skip(1).take_while(follows) {
        count += 1;
        if slot.head.len() < len {
            break;
        }
    }
    if count < JOINED_MIN { 1 } else { count }
}

/// Whether the frame is one packet, in one piece, in the given state.
fn single(slot: &Slot, offload: Offload) -> bool {
    slot.offload == offload && slot.tails.is_empty()
}

/// What all datagrams of a flow have in common, addresses and ports; `None` if it is something else, or not plain.
#[inline]
fn flow<'b>(bytes: &'b [u8], slot: &Slot) -> Option<&'b [u8]> {
    const V4: usize = ipv4::HEADER_LEN + udp::HEADER_LEN;
    const V6: usize = ipv6::HEADER_LEN + udp::HEADER_LEN;
    let head = &bytes[slot.head.clone()];
    match head.first()? {
        0x45 if head.len() > V4 && head[ipv4::PROTOCOL] == protocol::UDP => Some(&head[ipv4::SRC..ipv4::HEADER_LEN + udp::LEN]),
        0x60..=0x6f if head.len() > V6 && head[ipv6::NEXT_HEADER] == protocol::UDP => Some(&head[ipv6::SRC..ipv6::HEADER_LEN + udp::LEN]),
        _ => None,
    }
}
