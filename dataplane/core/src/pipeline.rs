//! A packet's way through the gateway, stage by stage.

use crate::addr::Tuple;
use crate::counters::Counters;
use crate::flow::{FlowRef, FlowTable, Now};
use crate::packet::Packet;
use crate::snapshot::Snapshot;
use crate::verdict::{PeerId, Verdict, WorkerId};

/// What a batch is judged by.
#[derive(Clone, Copy)]
pub struct Env<'a> {
    /// The tables, pinned for the batch.
    pub snapshot: &'a Snapshot,
    /// The flow table.
    pub flows: FlowTable<'a>,
    /// The time, read once for the batch.
    pub now: Now,
    /// This worker's counters.
    pub counters: &'a Counters,
}

/// Where a packet that the pipeline made itself goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Egress {
    /// The TUN `pods`.
    Pods,
    /// The TUN `host`.
    Host,
    /// A peer.
    Peer(PeerId),
}

/// Packets that the pipeline made itself while it looked at a batch: answers and fragments. Whole packets with full checksums.
#[derive(Debug)]
pub struct Outbox {
    bytes: Vec<u8>,
    entries: Vec<(Egress, std::ops::Range<usize>)>,
    ports: Vec<(FlowRef, Tuple)>,
}

/// One worker's pipeline: the state that is its own (fragments, rate limits).
#[derive(Debug)]
pub struct Pipeline {
    worker: WorkerId,
}

impl Pipeline {
    /// A pipeline for `worker`. All memory it will ever use is allocated here.
    pub fn new(worker: WorkerId) -> Pipeline {
        Pipeline { worker }
    }

    /// Judges `batch`: one verdict for each packet, in order, into `verdicts` (cleared first; give it room for the batch), and what the
    /// gateway itself has to say into `outbox`. Drops are counted here; traffic is counted by the caller, who reads and writes.
    pub fn run(&mut self, env: &Env<'_>, batch: &mut [Packet<'_>], verdicts: &mut Vec<Verdict>, outbox: &mut Outbox) {
        let _ = (env, batch, verdicts, outbox, self.worker);
        unimplemented!()
    }

    /// Work between batches: fragments whose time is up, a step of the flow table's sweep. Call it every 10 to 100 ms.
    pub fn tick(&mut self, env: &Env<'_>) {
        let _ = env;
    }
}

impl Outbox {
    /// With room for `packets` packets of `bytes` bytes in all; never grows.
    pub fn new(packets: usize, bytes: usize) -> Outbox {
        Outbox { bytes: Vec::with_capacity(bytes), entries: Vec::with_capacity(packets), ports: Vec::with_capacity(packets) }
    }

    /// What is in it, in order.
    pub fn iter(&self) -> impl Iterator<Item = (Egress, &[u8])> {
        self.entries.iter().map(|(egress, range)| (*egress, &self.bytes[range.clone()]))
    }

    /// UDP flows masqueraded since the last `clear`, with the tuple of their replies: a socket bound to its destination brings replies
    /// that come in fragments.
    pub fn masquerade_ports(&self) -> &[(FlowRef, Tuple)] {
        &self.ports
    }

    /// Empties it.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.entries.clear();
        self.ports.clear();
    }
}
