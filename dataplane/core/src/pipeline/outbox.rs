//! What the pipeline itself has to say about a batch, and what whoever carries out the verdicts needs beside them.

use super::BATCH_LEN_MAX;
use crate::addr::Tuple;
use crate::flow::FlowRef;
use crate::fragment;
use crate::icmp::Silence;
use crate::packet::{Network, Packet};
use crate::parse::Parsed;
use crate::shape::Wait;
use crate::verdict::{DropReason, PeerId, TunId};

/// Where a packet that the pipeline made itself goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Egress {
    /// The TUN `pods`.
    Pods,
    /// The TUN inside a pod's namespace.
    Pod(TunId),
    /// The TUN `host`.
    Host,
    /// A peer, by this network of the overlay.
    Peer(PeerId, Network),
}

/// A UDP flow that has just been masqueraded: a socket bound to the destination of its replies brings those that come in fragments, and
/// keeps the kernel from refusing them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MasqueradePort {
    /// The flow; when it is over the socket may go.
    pub flow: FlowRef,
    /// The tuple of its replies.
    pub reply: Tuple,
    /// When the socket is needed.
    pub bind: Bind,
}

/// When a masquerade port's socket is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bind {
    /// Before the batch is sent: the flow begins with a datagram in fragments, so its first reply may well be one, too.
    BeforeSending,
    /// Soon.
    Soon,
}

/// Packets that the pipeline made itself while it looked at a batch: answers and fragments. Whole packets with full checksums. And which
/// packets are to leave later, for a bandwidth limit.
#[derive(Debug)]
pub struct Outbox {
    bytes: Vec<u8>,
    entries: Vec<(Egress, std::ops::Range<usize>)>,
    ports: Vec<MasqueradePort>,
    packet_waits: Vec<(usize, Wait)>,
    said_waits: Vec<(usize, Wait)>,
}

impl Outbox {
    /// With room for `packets` packets of `bytes` bytes in all; never grows.
    pub fn new(packets: usize, bytes: usize) -> Outbox {
        Outbox {
            bytes: Vec::with_capacity(bytes),
            entries: Vec::with_capacity(packets),
            ports: Vec::with_capacity(packets),
            packet_waits: Vec::with_capacity(BATCH_LEN_MAX),
            said_waits: Vec::with_capacity(packets),
        }
    }

    /// What is in it, in order.
    pub fn iter(&self) -> impl Iterator<Item = (Egress, &[u8])> {
        self.entries.iter().map(|(egress, range)| (*egress, &self.bytes[range.clone()]))
    }

    /// UDP flows masqueraded since the last `clear`.
    pub fn masquerade_ports(&self) -> &[MasqueradePort] {
        &self.ports
    }

    /// The batch's packets that are to leave later, by their places in it, in order: their verdicts are to be carried out then.
    pub fn packet_waits(&self) -> &[(usize, Wait)] {
        &self.packet_waits
    }

    /// Those of [`Outbox::iter`] that are to leave later, by their places, in order.
    pub fn said_waits(&self) -> &[(usize, Wait)] {
        &self.said_waits
    }

    /// Empties it.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.entries.clear();
        self.ports.clear();
        self.packet_waits.clear();
        self.said_waits.clear();
    }

    /// How many packets are in it.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// The batch's packet `at` waits.
    pub(super) fn wait_packet(&mut self, at: usize, wait: Wait) {
        debug_assert!(at < BATCH_LEN_MAX);
        self.packet_waits.push((at, wait));
    }

    /// All that was added from place `first` on waits.
    pub(super) fn wait_said(&mut self, first: usize, wait: Wait) {
        self.said_waits.extend((first..self.entries.len()).map(|at| (at, wait)));
    }

    /// Adds a packet of `len_max` bytes at most that `build` appends. What may not be said is not said, which is nobody's loss.
    pub(super) fn push(&mut self, egress: Egress, len_max: usize, build: impl FnOnce(&mut Vec<u8>) -> Result<(), Silence>) -> Result<(), DropReason> {
        let start = self.bytes.len();
        if self.entries.len() == self.entries.capacity() || start + len_max > self.bytes.capacity() {
            return Err(DropReason::OutboxFull);
        }
        match build(&mut self.bytes) {
            Ok(()) => {
                debug_assert!(self.bytes.len() - start <= len_max);
                self.entries.push((egress, start..self.bytes.len()));
            }
            Err(_) => self.bytes.truncate(start),
        }
        Ok(())
    }

    /// Adds the fragments of a packet: all or none.
    pub(super) fn push_fragments(&mut self, egress: Egress, packet: &mut Packet<'_>, parsed: &Parsed, mtu: u32, id: u32) -> Result<(), DropReason> {
        let (bytes, entries) = (self.bytes.len(), self.entries.len());
        let cut = fragment::cut(packet, parsed, mtu, id, |header, payload| {
            self.push(egress, header.len() + payload.len(), |out| {
                out.extend_from_slice(header);
                out.extend_from_slice(payload);
                Ok(())
            })
        });
        if let Err(reason) = cut {
            self.bytes.truncate(bytes);
            self.entries.truncate(entries);
            return Err(reason);
        }
        Ok(())
    }

    /// Notes that replies may come in fragments. Past its capacity nothing is noted: such replies go unserved, the rest do not.
    pub(super) fn masquerade_port(&mut self, port: MasqueradePort) {
        if self.ports.len() < self.ports.capacity() {
            self.ports.push(port);
        }
    }
}
