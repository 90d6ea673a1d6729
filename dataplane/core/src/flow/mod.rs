//! The flow table: shared by all workers, lock-free, on borrowed memory.
//!
//! No hash keeps the two directions of a translated flow on one queue, so any worker may meet any packet of it, and two may meet the
//! first packet of one connection at once. The table is a [`FlowTable`], a view of two slices that the runtime maps from a file:
//!
//! - [`Record`]s of 128 bytes, one for each flow, which holds both of its tuples;
//! - [`Bucket`]s of eight entries, the index. A flow has two entries, one for its original and one for its reply tuple, each in one of the
//!   two buckets that a keyed hash of the tuple names. A tuple is the key of at most one live flow, whichever the direction: to insert the
//!   reply tuple *is* to reserve the SNAT port in it.
//!
//! A record's control word says who may do what with it. It changes by compare-and-swap, and the version in it grows each time the record
//! is freed:
//!
//! | state | means | who may change the record | leaves by |
//! |---|---|---|---|
//! | free | nobody's | whoever claims it | claim |
//! | claimed | a worker creates a flow in it; its entries appear but readers pass over them | its owner alone; a rival may abort it | commit, abort, undo |
//! | aborted | a rival for one of its tuples came first | its owner alone, which frees it | undo |
//! | live | a flow: the tuples do not change; `last_seen` and the stage do, by any worker | nobody | `end` |
//! | dying | `end` takes its entries out of the index | the one caller whose `end` won | free |
//!
//! The commit is one compare-and-swap, so a reader sees both directions of a flow or neither. A killed process leaves records in any of
//! these states and an index that may lag behind; [`FlowTable::recover`] rebuilds the index from the live records and frees the rest.
//!
//! Files: `hash` (the keyed hash), `fetch` (cache lines before they are needed), `record` (the words of a record), `index` (the buckets), `insert` (how a flow is created and two
//! workers agree), `tcp` (stages), `table` (everything else); `model` checks the memory orders with loom.
//!
//! Read first: passt's `flow.h` for the manner, the kernel's `nf_conntrack_core.c` (`__nf_conntrack_confirm`, `early_drop`) for the job.

mod fetch;
pub(crate) mod hash;
mod index;
mod insert;
#[cfg(all(test, loom))]
mod model;
mod record;
pub(crate) mod sync;
mod table;
mod tcp;
#[cfg(all(test, not(loom)))]
mod tests;

use std::time::Duration;

use crate::addr::{Tuple, protocol};
use crate::balance::LoadSlot;

pub use fetch::{Fetch, Touch};
pub use hash::Hash;
pub use index::{Bucket, RECORDS_MAX};
pub use insert::Cursor;
pub use record::Record;
pub use table::{FlowTable, Hit, Likely, Memory, OwnedFlows, Recovered, Swept, layout};

/// Lifetimes of flows, as nf_conntrack's defaults unless configured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// TCP before both sides have spoken.
    pub tcp_opening: Duration,
    /// TCP, established.
    pub tcp_established: Duration,
    /// TCP after the first FIN.
    pub tcp_closing: Duration,
    /// TCP after a reset.
    pub tcp_reset: Duration,
    /// UDP without an answer.
    pub udp_unreplied: Duration,
    /// UDP with traffic both ways.
    pub udp_replied: Duration,
    /// ICMP echo.
    pub icmp: Duration,
    /// Any other protocol.
    pub other: Duration,
}

impl Timeouts {
    /// How long a flow of `protocol` may be silent in `stage`.
    pub const fn lifetime(&self, protocol: u8, stage: Stage) -> Duration {
        match (protocol, stage) {
            (protocol::TCP, Stage::Opening) => self.tcp_opening,
            (protocol::TCP, Stage::Established) => self.tcp_established,
            (protocol::TCP, Stage::Closing) => self.tcp_closing,
            (protocol::TCP, Stage::Reset) => self.tcp_reset,
            (protocol::UDP, Stage::Opening) => self.udp_unreplied,
            (protocol::UDP, _) => self.udp_replied,
            (protocol::ICMP | protocol::ICMPV6, _) => self.icmp,
            _ => self.other,
        }
    }
}

impl Default for Timeouts {
    fn default() -> Timeouts {
        Timeouts {
            tcp_opening: Duration::from_secs(60),
            tcp_established: Duration::from_secs(5 * 24 * 3600),
            tcp_closing: Duration::from_secs(120),
            tcp_reset: Duration::from_secs(10),
            udp_unreplied: Duration::from_secs(30),
            udp_replied: Duration::from_secs(120),
            icmp: Duration::from_secs(30),
            other: Duration::from_secs(600),
        }
    }
}

/// Time on the packet path: milliseconds of the boot clock (`CLOCK_BOOTTIME`), so that it goes on over a restart of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Now(pub u64);

/// Where the opener of a flow sits: replies go back there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Opener {
    /// A pod of this node.
    Pod = 0,
    /// The node itself, or somebody outside: through the TUN `host`.
    Host = 1,
    /// Somebody behind a peer.
    Peer = 2,
}

/// Why a flow has a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A service translated it.
    Service = 0,
    /// A pod speaks to the outside from a node's address.
    Masquerade = 1,
    /// Somebody outside opened it to a pod's address: untranslated, known so that replies return unmasqueraded.
    OutsideToPod = 2,
    /// Somebody outside opened it to a pod of another node: its source is this node's gateway address.
    Relayed = 3,
    /// A service's, whose packets go on untranslated to the node of the backend. Its replies leave there, so no tuple of it is met but
    /// the original; the reply tuple says which backend was chosen.
    DirectReturn = 4,
}

/// A flow to be created.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewFlow {
    /// The opener's packets as they arrive: client to what it dialled.
    pub original: Tuple,
    /// The answer's packets as they arrive: backend to the client as the backend sees it. Of the same protocol and family.
    pub reply: Tuple,
    /// Why it has a slot.
    pub kind: Kind,
    /// Where the opener sits.
    pub opener: Opener,
    /// [`crate::service::ServicePort::id`], or 0.
    pub service: u64,
    /// The backend's counter, which counts this flow while it lives.
    pub load: LoadSlot,
}

/// Which way a packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Direction {
    /// From the opener.
    Original = 0,
    /// To the opener.
    Reply = 1,
}

/// The stage of a flow's life; it decides its lifetime.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Stage {
    /// Only the opener has spoken.
    Opening = 0,
    /// Both have spoken.
    Established = 1,
    /// TCP: a FIN was seen.
    Closing = 2,
    /// TCP: a reset was seen.
    Reset = 3,
}

/// A live flow as one lookup found it: a consistent copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Its record and the version of it, for `touch` and `end`.
    pub at: FlowRef,
    /// Which way the packet that was looked up goes.
    pub direction: Direction,
    /// The opener's packets as they arrive.
    pub original: Tuple,
    /// The answer's packets as they arrive.
    pub reply: Tuple,
    /// Why it has a slot.
    pub kind: Kind,
    /// Where the opener sits.
    pub opener: Opener,
    /// The service's id, or 0.
    pub service: u64,
    /// Its stage when it was looked up.
    pub stage: Stage,
}

impl Flow {
    /// Whether a service chose where it goes.
    #[inline]
    pub fn is_of_a_service(&self) -> bool {
        matches!(self.kind, Kind::Service | Kind::DirectReturn)
    }

    /// The tuple that packets of this direction arrive with.
    #[inline]
    pub fn arriving(&self) -> Tuple {
        match self.direction {
            Direction::Original => self.original,
            Direction::Reply => self.reply,
        }
    }

    /// The tuple that a packet of this direction leaves with.
    #[inline]
    pub fn translated(&self) -> Tuple {
        match self.direction {
            Direction::Original if self.kind == Kind::DirectReturn => self.original,
            Direction::Original => self.reply.reversed(),
            Direction::Reply => self.original.reversed(),
        }
    }
}

/// A record's number and version. A stale one is harmless: the version no longer fits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowRef {
    /// The record's number.
    pub index: u32,
    /// Its version.
    pub version: u32,
}

/// Why a flow was not created.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InsertError {
    /// Somebody created the same flow (the same `original`) first: this one.
    Exists(Flow),
    /// The reply tuple is another flow's: take another SNAT port.
    ReplyTaken,
    /// No free record within reach, or no free place in the index.
    Full,
    /// Two workers were at it at once and this one gave way: look up again.
    Raced,
}

/// A flow with its ages, for operators.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowView {
    /// The flow (its direction is `Original`).
    pub flow: Flow,
    /// Milliseconds since its last packet.
    pub idle_ms: u64,
    /// Milliseconds since it was created.
    pub age_ms: u64,
}
