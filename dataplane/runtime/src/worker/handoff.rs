//! Packets on their way from one thread to another: copied into pooled buffers, through bounded queues.
//!
//! Everything is allocated when the workers start. A full queue or an empty pool refuses the packet, and its sender counts the drop;
//! nothing here waits. A receiver is woken once for as many parcels as it finds.

use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam::queue::ArrayQueue;
use mio::Waker;
use podgate_core::packet::{Ingress, Offload};

/// The longest packet that anything here reads: an IPv6 header and its largest payload.
pub(crate) const PACKET_LEN_MAX: usize = crate::sockets::PACKET_LEN_MAX;

/// Buffers in the pool: enough for every worker to hand on a whole batch while the receivers still hold one. Their pages are touched
/// only as far as packets reach.
const BUFFERS: usize = 256;

/// Parcels that wait for one receiver.
const INBOX_LEN: usize = 128;

/// What a parcel's packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// It came in here, and the receiver's pipeline judges it.
    Ingress(Ingress),
    /// The gateway's own stack made it: it is only routed.
    OwnStack,
}

/// A packet in a pooled buffer.
#[derive(Debug)]
pub(crate) struct Parcel {
    buffer: Box<[u8]>,
    len: usize,
    pub(crate) offload: Offload,
    pub(crate) origin: Origin,
}

impl Parcel {
    /// The packet.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.buffer[..self.len]
    }
}

/// The buffers that are free.
pub(crate) struct Pool(ArrayQueue<Box<[u8]>>);

impl Default for Pool {
    /// Every buffer is free.
    fn default() -> Pool {
        let free = ArrayQueue::new(BUFFERS);
        for _ in 0..BUFFERS {
            free.push(vec![0; PACKET_LEN_MAX].into_boxed_slice()).expect("the queue has room for every buffer");
        }
        Pool(free)
    }
}

impl Pool {
    /// A packet, given in pieces, in a buffer of the pool; `None` if no buffer is free or it is longer than a packet can be.
    pub(crate) fn pack<'a>(&self, pieces: impl Iterator<Item = &'a [u8]>, offload: Offload, origin: Origin) -> Option<Parcel> {
        let mut parcel = Parcel { buffer: self.0.pop()?, len: 0, offload, origin };
        for piece in pieces {
            let Some(room) = parcel.buffer.get_mut(parcel.len..parcel.len + piece.len()) else {
                self.give_back(parcel);
                return None;
            };
            room.copy_from_slice(piece);
            parcel.len += piece.len();
        }
        Some(parcel)
    }

    /// Takes a parcel's buffer back.
    pub(crate) fn give_back(&self, parcel: Parcel) {
        // It was the pool's, and the pool has room for all of its own.
        let _ = self.0.push(parcel.buffer);
    }
}

/// A receiver's queue.
pub(crate) struct Inbox {
    parcels: ArrayQueue<Parcel>,
    waker: std::sync::OnceLock<Waker>,
    woken: AtomicBool,
}

impl Inbox {
    pub(crate) fn new() -> Inbox {
        Inbox { parcels: ArrayQueue::new(INBOX_LEN), waker: std::sync::OnceLock::new(), woken: AtomicBool::new(false) }
    }

    /// Names the receiver's waker. Once, before the first parcel.
    pub(crate) fn set_waker(&self, waker: Waker) {
        let _ = self.waker.set(waker);
    }

    /// Puts a packet in, and wakes the receiver; false if there was no room.
    pub(crate) fn send<'a>(&self, pool: &Pool, pieces: impl Iterator<Item = &'a [u8]>, offload: Offload, origin: Origin) -> bool {
        let Some(parcel) = pool.pack(pieces, offload, origin) else { return false };
        match self.parcels.push(parcel) {
            Ok(()) => {
                self.wake();
                true
            }
            Err(parcel) => {
                pool.give_back(parcel);
                false
            }
        }
    }

    /// Wakes the receiver unless it has been woken already and has not looked yet.
    pub(crate) fn wake(&self) {
        // AcqRel on both swaps (here and in `looked`): either the receiver's look sees what was pushed before, or this call sees that
        // it has looked already and writes to its eventfd.
        if !self.woken.swap(true, Ordering::AcqRel)
            && let Some(waker) = self.waker.get()
        {
            // It fails only if the eventfd's counter is full, and then the receiver is awake.
            let _ = waker.wake();
        }
    }

    /// The receiver says that it looks now: whoever sends later wakes it again. Call it before `take`.
    pub(crate) fn looked(&self) {
        self.woken.swap(false, Ordering::AcqRel);
    }

    /// The oldest parcel.
    pub(crate) fn take(&self) -> Option<Parcel> {
        self.parcels.pop()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_come_back_to_the_pool_whatever_becomes_of_a_parcel() {
        let pool = Pool::default();
        let inbox = Inbox::new();
        let send = || inbox.send(&pool, [&b"head"[..], b"tail"].into_iter(), Offload::default(), Origin::OwnStack);
        for _ in 0..INBOX_LEN {
            assert!(send());
        }
        assert!(!send(), "the inbox is full");
        let too_long = vec![0; PACKET_LEN_MAX + 1];
        assert!(pool.pack([&too_long[..]].into_iter(), Offload::default(), Origin::OwnStack).is_none());
        let mut taken = 0;
        while let Some(parcel) = inbox.take() {
            assert_eq!(parcel.bytes(), b"headtail");
            pool.give_back(parcel);
            taken += 1;
        }
        assert_eq!(taken, INBOX_LEN);
        assert_eq!(pool.0.len(), BUFFERS);
    }
}
