//! Each worker's histograms, and how the control side gets at them without a lock.
//!
//! A worker owns one set of histograms and records into it without allocating: their bounds are fixed. Whoever wants to read puts an
//! empty set into the exchange; the worker finds it between two batches, goes on with that one and hands over the one it had.

use crossbeam::queue::ArrayQueue;
use hdrhistogram::Histogram;

/// The longest time that is told apart: a batch that takes longer counts as this.
const NS_MAX: u64 = 1_000_000_000;

/// The largest batch that is told apart.
const BATCH_LEN_MAX: u64 = 4096;

/// Histograms of what a worker does, merged over workers by [`crate::runtime::Runtime::latency`].
#[derive(Clone, Debug)]
pub struct Latency {
    /// Nanoseconds from a batch's read to its last write, divided by its packets: one value for each batch.
    pub packet_ns: Histogram<u64>,
    /// Nanoseconds of the pipeline alone, divided by the packets.
    pub pipeline_ns: Histogram<u64>,
    /// Frames in a batch.
    pub batch_len: Histogram<u64>,
}

impl Default for Latency {
    fn default() -> Latency {
        let histogram = |max| Histogram::new_with_bounds(1, max, 2).expect("constant bounds within hdrhistogram's limits");
        Latency { packet_ns: histogram(NS_MAX), pipeline_ns: histogram(NS_MAX), batch_len: histogram(BATCH_LEN_MAX) }
    }
}

impl Latency {
    /// Notes one batch.
    #[inline]
    pub(crate) fn record(&mut self, frames: usize, pipeline_ns: u64, total_ns: u64) {
        let frames = frames.max(1) as u64;
        self.packet_ns.saturating_record(total_ns / frames);
        self.pipeline_ns.saturating_record(pipeline_ns / frames);
        self.batch_len.saturating_record(frames);
    }

    /// Adds what another set holds.
    pub fn merge(&mut self, other: &Latency) {
        let same = "the same bounds in every set";
        self.packet_ns.add(&other.packet_ns).expect(same);
        self.pipeline_ns.add(&other.pipeline_ns).expect(same);
        self.batch_len.add(&other.batch_len).expect(same);
    }

    fn clear(&mut self) {
        self.packet_ns.clear();
        self.pipeline_ns.clear();
        self.batch_len.clear();
    }
}

/// One worker's place of exchange.
pub(crate) struct Exchange {
    empty: ArrayQueue<Box<Latency>>,
    full: ArrayQueue<Box<Latency>>,
}

impl Default for Exchange {
    fn default() -> Exchange {
        Exchange { empty: ArrayQueue::new(1), full: ArrayQueue::new(1) }
    }
}

impl Exchange {
    /// The worker: swaps sets if somebody asked.
    #[inline]
    pub(crate) fn hand_over(&self, current: &mut Box<Latency>) {
        if let Some(empty) = self.empty.pop() {
            let full = std::mem::replace(current, empty);
            // Only one set travels at a time, so there is room for it.
            let _ = self.full.push(full);
        }
    }

    /// The reader: asks for what has been recorded since the last time.
    pub(crate) fn ask(&self, spare: &mut Option<Box<Latency>>) {
        if let Some(mut empty) = spare.take() {
            empty.clear();
            if let Err(empty) = self.empty.push(empty) {
                *spare = Some(empty);
            }
        }
    }

    /// The reader: the answer, if the worker has looked.
    pub(crate) fn answer(&self) -> Option<Box<Latency>> {
        self.full.pop()
    }
}
