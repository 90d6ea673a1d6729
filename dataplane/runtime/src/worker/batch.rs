//! A batch of frames between its read and its last write: where each lies, and how the pipeline gets to see them.
//!
//! Frames lie in buffers that are reused for every batch. For the pipeline's turn they are lent out as [`Packet`]s; what it changed
//! (the length of a head, the state of a checksum) is noted in the slots, so that the writers behind it need only shared borrows.

use std::ops::Range;

use podgate_core::packet::{Gso, Ingress, Offload, Packet};

use crate::vnet::VNET_HEADER_LEN;

/// Frames in one batch at most.
pub(crate) const BATCH_LEN_MAX: usize = podgate_core::pipeline::BATCH_LEN_MAX;

/// Frames read one by one for one batch: enough to share the cost of a batch (a clock, a pin, a poll) among small packets, and few
/// enough that the first of them does not wait long for the last.
pub(crate) const READS_MAX: usize = 64;

/// A batch that holds this many bytes is full: four superframes, so that they are still in a core's own cache when they are written.
pub(crate) const BATCH_BYTES_MAX: usize = 256 * 1024;

/// Bytes.
const CACHE_LINE: usize = 64;

/// Where one frame lies, and what is known of it.
#[derive(Clone, Debug)]
pub(crate) struct Slot {
    /// Which buffer holds it.
    pub(crate) buffer: usize,
    /// Where [`Packet::head`] lies in the buffer.
    pub(crate) head: Range<usize>,
    /// Which of the batch's tails are its own.
    pub(crate) tails: Range<usize>,
    /// Bytes in the tails.
    pub(crate) tail_len: usize,
    pub(crate) offload: Offload,
    pub(crate) ingress: Ingress,
}

impl Slot {
    /// A frame in one piece.
    pub(crate) fn whole(buffer: usize, head: Range<usize>, offload: Offload, ingress: Ingress) -> Slot {
        Slot { buffer, head, tails: 0..0, tail_len: 0, offload, ingress }
    }

    pub(crate) fn len(&self) -> usize {
        self.head.len() + self.tail_len
    }

    /// The frame as a packet; `head` are the bytes at its place.
    #[inline]
    pub(crate) fn packet<'b>(&self, head: &'b mut [u8]) -> Packet<'b> {
        Packet { head, tail_len: self.tail_len, offload: self.offload, ingress: self.ingress }
    }

    /// How many packets on a wire it stands for.
    pub(crate) fn packets(&self, buffer: &[u8]) -> u64 {
        packets(&buffer[self.head.clone()], self.len(), self.offload)
    }
}

/// The buffers of one batch.
pub(crate) trait Buffers {
    /// Bytes before each frame's head that are nobody's.
    const HEADROOM: usize = 0;

    /// The buffer of that number.
    fn buffer(&self, index: usize) -> &[u8];

    /// The buffer of that number, to be edited.
    fn buffer_mut(&mut self, index: usize) -> &mut [u8];

    /// All of them, in the order of their numbers.
    fn each_mut(&mut self) -> impl Iterator<Item = &mut [u8]>;
}

/// One buffer that frames are read into one behind the other, each behind its `virtio_net_hdr`, so that a batch of small ones touches little memory.
pub(crate) struct Arena {
    bytes: Box<[u8]>,
    used: usize,
}

impl Arena {
    pub(crate) fn new() -> Arena {
        Arena { bytes: vec![0; BATCH_BYTES_MAX + CACHE_LINE + super::handoff::PACKET_LEN_MAX + 1].into_boxed_slice(), used: 0 }
    }

    pub(crate) fn clear(&mut self) {
        self.used = 0;
    }

    /// Room for one more header and packet of any length, and a byte, unless the batch is full.
    pub(crate) fn room(&mut self) -> Option<&mut [u8]> {
        if self.used >= BATCH_BYTES_MAX {
            return None;
        }
        let packet = self.used + CACHE_LINE;
        Some(&mut self.bytes[packet - VNET_HEADER_LEN..=packet + super::handoff::PACKET_LEN_MAX])
    }

    /// Keeps the first `len` bytes of the packet in the room; gives back where they lie: at the start of a cache line.
    pub(crate) fn keep(&mut self, len: usize) -> Range<usize> {
        let at = self.used + CACHE_LINE;
        self.used = (at + len).next_multiple_of(CACHE_LINE);
        at..at + len
    }
}

impl Buffers for Arena {
    const HEADROOM: usize = VNET_HEADER_LEN;

    fn buffer(&self, _index: usize) -> &[u8] {
        &self.bytes
    }

    fn buffer_mut(&mut self, _index: usize) -> &mut [u8] {
        &mut self.bytes
    }

    fn each_mut(&mut self) -> impl Iterator<Item = &mut [u8]> {
        std::iter::once(&mut self.bytes[..])
    }
}

/// One buffer in which each message of a receive from the overlay has its place.
pub(crate) struct Messages {
    bytes: Box<[u8]>,
}

/// From one message's place to the next: not a power of two, so that the headers of a batch do not all fall into the same few
/// sets of the caches.
const MESSAGE_STRIDE: usize = crate::udp::RECEIVE_LEN_MAX + 320;

impl Messages {
    /// With places for `count` messages. Memory is taken as places are used: those behind the first few only while messages are small.
    pub(crate) fn new(count: usize) -> Messages {
        Messages { bytes: vec![0; count * MESSAGE_STRIDE].into_boxed_slice() }
    }

    /// The places of the first `count` messages.
    pub(crate) fn places(&mut self, count: usize) -> impl Iterator<Item = &mut [u8]> {
        self.bytes.chunks_exact_mut(MESSAGE_STRIDE).take(count)
    }

    /// Where the place of message `index` begins.
    pub(crate) fn place_at(index: usize) -> usize {
        index * MESSAGE_STRIDE
    }
}

impl Buffers for Messages {
    fn buffer(&self, _index: usize) -> &[u8] {
        &self.bytes
    }

    fn buffer_mut(&mut self, _index: usize) -> &mut [u8] {
        &mut self.bytes
    }

    fn each_mut(&mut self) -> impl Iterator<Item = &mut [u8]> {
        std::iter::once(&mut self.bytes[..])
    }
}

/// The memory of a `Vec<Packet>` between batches.
pub(crate) struct Lent {
    empty: Vec<Packet<'static>>,
}

impl Lent {
    pub(crate) fn new(packets: usize) -> Lent {
        Lent { empty: Vec::with_capacity(packets) }
    }

    /// Lends the heads of `slots`, which are sorted by buffer and place and do not overlap, to `f` as packets, and notes what it made
    /// of them.
    pub(crate) fn with<R>(&mut self, slots: &mut [Slot], buffers: &mut impl Buffers, f: impl FnOnce(&mut [Packet<'_>]) -> R) -> R {
        let mut packets: Vec<Packet<'_>> = std::mem::take(&mut self.empty);
        assert!(slots.len() <= packets.capacity(), "the batch is within its bounds");
        let mut each = buffers.each_mut();
        let (mut index, mut at, mut rest) = (0, 0, each.next().unwrap_or_default());
        for slot in slots.iter() {
            while index < slot.buffer {
                (index, at, rest) = (index + 1, 0, each.next().expect("a slot names a buffer of the batch"));
            }
            let (head, behind) = rest[slot.head.start - at..].split_at_mut(slot.head.len());
            (at, rest) = (slot.head.end, behind);
            packets.push(slot.packet(head));
        }
        let result = f(&mut packets);
        for (slot, packet) in slots.iter_mut().zip(&packets) {
            // The pipeline may take bytes off a head's end (padding), never off its start.
            slot.head.end = slot.head.start + packet.head.len();
            slot.offload = packet.offload;
            slot.ingress = packet.ingress;
        }
        self.empty = emptied(packets);
        result
    }
}

/// The vector without its packets, for packets of another lifetime; no allocation.
fn emptied(mut packets: Vec<Packet<'_>>) -> Vec<Packet<'static>> {
    packets.clear();
    let mut packets = std::mem::ManuallyDrop::new(packets);
    let (pointer, capacity) = (packets.as_mut_ptr(), packets.capacity());
    // SAFETY: the parts are those of a vector that is forgotten here; the two element types differ in a lifetime alone, so size and
    // alignment are the same; and there is no element, so no borrow is prolonged.
    unsafe { Vec::from_raw_parts(pointer.cast::<Packet<'static>>(), 0, capacity) }
}

/// How many packets on a wire a frame of `len` bytes stands for: its headers lie in `head`.
pub(crate) fn packets(head: &[u8], len: usize, offload: Offload) -> u64 {
    let (size, udp) = match offload.gso {
        Gso::None => return 1,
        Gso::Tcp { size, .. } => (usize::from(size), false),
        Gso::Udp { size } => (usize::from(size), true),
    };
    // Extension headers of IPv6 are few bytes beside a superframe: at worst the count is one too high.
    let ip = if head.first().is_some_and(|b| b >> 4 == 4) { usize::from(head[0] & 0xf) * 4 } else { 40 };
    let transport = if udp { 8 } else { head.get(ip + 12).map_or(20, |b| usize::from(b >> 4) * 4) };
    (len.saturating_sub(ip + transport)).div_ceil(size.max(1)).max(1) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_lent_where_they_lie_and_what_was_cut_off_is_noted() {
        let mut arena = Arena::new();
        let mut slots = Vec::new();
        for i in 0..5u8 {
            arena.room().unwrap()[..VNET_HEADER_LEN + 100].fill(i);
            let head = arena.keep(100);
            if i != 2 {
                slots.push(Slot::whole(0, head, Offload::default(), Ingress::Pods));
            }
        }
        let mut lent = Lent::new(BATCH_LEN_MAX);
        for round in 0..3 {
            lent.with(&mut slots, &mut arena, |packets| {
                let firsts: Vec<u8> = packets.iter().map(|p| p.head[0]).collect();
                assert_eq!(firsts, [0, 1, 3, 4]);
                let head = std::mem::take(&mut packets[1].head);
                packets[1].head = &mut head[..90 - round];
            });
            assert_eq!(slots[1].head.len(), 90 - round);
            assert_eq!(lent.empty.capacity(), BATCH_LEN_MAX);
        }
        assert!(arena.buffer(0)[slots[3].head.clone()].iter().all(|b| *b == 4));
    }

    #[test]
    fn a_superframe_counts_its_segments() {
        let mut head = [0; 60];
        head[0] = 0x45;
        head[32] = 0x80;
        let tcp = |size| Offload { gso: Gso::Tcp { size, ecn: false }, ..Offload::default() };
        assert_eq!(packets(&head, 52 + 1448 * 3, tcp(1448)), 3);
        assert_eq!(packets(&head, 52 + 1448 * 3 + 1, tcp(1448)), 4);
        assert_eq!(packets(&head, 52, tcp(1448)), 1);
        assert_eq!(packets(&head, 28 + 2000, Offload { gso: Gso::Udp { size: 1000 }, ..Offload::default() }), 2);
        assert_eq!(packets(&[], 0, tcp(0)), 1);
    }
}
