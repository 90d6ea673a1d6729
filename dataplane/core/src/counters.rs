//! What a worker counts. Each worker writes its own; anyone may read.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::verdict::DropReason;

/// A counter with one writer: a plain load and store, no locked instruction.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`. Only the counter's one writer may call this.
    #[inline]
    pub fn add(&self, n: u64) {
        // Relaxed: one writer; readers need no order between counters.
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// Its value.
    #[inline]
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Frames and bytes of one device in one direction.
#[derive(Debug, Default)]
pub struct Traffic {
    /// Frames as read or written: a superframe is one.
    pub frames: Counter,
    /// Packets as they are on a wire: a superframe counts its segments.
    pub packets: Counter,
    /// Bytes of IP packets, headers included.
    pub bytes: Counter,
}

/// One worker's counters.
#[derive(Debug)]
pub struct Counters {
    /// From and to the TUN `pods`.
    pub pods_rx: Traffic,
    /// To the TUN `pods`.
    pub pods_tx: Traffic,
    /// From the TUN `host` and the sockets beside it.
    pub host_rx: Traffic,
    /// To the TUN `host`.
    pub host_tx: Traffic,
    /// From peers.
    pub overlay_rx: Traffic,
    /// To peers.
    pub overlay_tx: Traffic,
    /// Answers made by the gateway itself: ICMP errors, resets, echoes.
    pub answers: Counter,
    /// Flows created.
    pub flows_created: Counter,
    /// Flows that expired.
    pub flows_expired: Counter,
    /// Batches processed.
    pub batches: Counter,
    /// Probes of this gateway's own that came back, by their number.
    pub probes: [Counter; 8],
    drops: [Counter; DropReason::ALL.len()],
}

impl Default for Counters {
    fn default() -> Counters {
        Counters {
            pods_rx: Traffic::default(),
            pods_tx: Traffic::default(),
            host_rx: Traffic::default(),
            host_tx: Traffic::default(),
            overlay_rx: Traffic::default(),
            overlay_tx: Traffic::default(),
            answers: Counter::default(),
            flows_created: Counter::default(),
            flows_expired: Counter::default(),
            batches: Counter::default(),
            probes: std::array::from_fn(|_| Counter::default()),
            drops: std::array::from_fn(|_| Counter::default()),
        }
    }
}

impl Counters {
    /// Counts `packets` dropped for `reason`.
    #[inline]
    pub fn dropped(&self, reason: DropReason, packets: u64) {
        self.drops[reason as usize].add(packets);
    }

    /// Packets dropped for `reason`.
    pub fn drops(&self, reason: DropReason) -> u64 {
        self.drops[reason as usize].value()
    }
}
