//! Bounded memory for tails that wait for their head.

use crate::packet::Ingress;

/// No block, no entry.
pub(super) const NONE: u32 = u32::MAX;

/// Bytes in a block: a fragment at the usual MTU takes one.
const BLOCK_BYTES: usize = 2_048;

/// A tail that has waited, see [`crate::fragment::FragmentTable::release`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// Where it came in.
    pub ingress: Ingress,
    /// Its length in bytes.
    pub len: usize,
}

/// Bytes of waiting tails, in blocks of one size, chained.
#[derive(Debug)]
pub(super) struct Slab {
    bytes: Box<[u8]>,
    blocks: Box<[Block]>,
    free: u32,
    free_count: usize,
}

#[derive(Clone, Copy, Debug)]
struct Block {
    /// The next block of the same tail, or in the free list.
    next: u32,
    /// In a tail's first block: the first block of the next tail of the same datagram.
    next_tail: u32,
    /// In a tail's first block: its length.
    len: u32,
    /// In a tail's first block: where it came in.
    ingress: Ingress,
}

impl Slab {
    /// With at most `limit` bytes.
    pub(super) fn new(limit: usize) -> Slab {
        let count = limit / BLOCK_BYTES;
        let mut blocks = vec![Block { next: NONE, next_tail: NONE, len: 0, ingress: Ingress::Pods }; count].into_boxed_slice();
        for (index, block) in blocks.iter_mut().enumerate().take(count.saturating_sub(1)) {
            block.next = index as u32 + 1;
        }
        let free = if count == 0 { NONE } else { 0 };
        Slab { bytes: vec![0; count * BLOCK_BYTES].into_boxed_slice(), blocks, free, free_count: count }
    }

    pub(super) fn used_bytes(&self) -> usize {
        (self.blocks.len() - self.free_count) * BLOCK_BYTES
    }

    pub(super) fn has_room(&self, len: usize) -> bool {
        len.div_ceil(BLOCK_BYTES) <= self.free_count
    }

    /// The first block of a copy of `bytes`, for which there is room and of which there is at least one.
    pub(super) fn store(&mut self, bytes: &[u8], ingress: Ingress) -> u32 {
        let first = self.free;
        let mut last = first;
        for chunk in bytes.chunks(BLOCK_BYTES) {
            last = self.free;
            self.free = self.blocks[last as usize].next;
            self.free_count -= 1;
            self.bytes[last as usize * BLOCK_BYTES..][..chunk.len()].copy_from_slice(chunk);
        }
        self.blocks[last as usize].next = NONE;
        let block = &mut self.blocks[first as usize];
        (block.next_tail, block.len, block.ingress) = (NONE, bytes.len() as u32, ingress);
        first
    }

    pub(super) fn link(&mut self, tail: u32, next: u32) {
        self.blocks[tail as usize].next_tail = next;
    }

    /// What is stored from `first` on, and the tail behind it.
    pub(super) fn describe(&self, first: u32) -> (Held, u32) {
        let block = &self.blocks[first as usize];
        (Held { ingress: block.ingress, len: block.len as usize }, block.next_tail)
    }

    pub(super) fn copy(&self, first: u32, into: &mut Vec<u8>) {
        let mut left = self.blocks[first as usize].len as usize;
        let mut at = first;
        while left > 0 {
            let len = left.min(BLOCK_BYTES);
            into.extend_from_slice(&self.bytes[at as usize * BLOCK_BYTES..][..len]);
            left -= len;
            at = self.blocks[at as usize].next;
        }
    }

    pub(super) fn free(&mut self, first: u32) {
        let mut at = first;
        while at != NONE {
            let next = std::mem::replace(&mut self.blocks[at as usize].next, self.free);
            self.free = at;
            self.free_count += 1;
            at = next;
        }
    }
}
