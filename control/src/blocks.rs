//! Blocks of the cluster's pod ranges, and which node holds which: the decisions alone, without clock or IO.
//!
//! Each range is cut into blocks of one size ([`Cut`]). What nodes share is a ledger of blocks, in which each line names the node, the machine
//! under that name and the *term* of its registration, and a register of the nodes that are there. Both live in a store with revisions and
//! compare-and-swap (etcd); every [`Step`] is one such transaction, so a step that was decided on an outdated view changes nothing.
//!
//! **Whose is a block?** A registration begins at a revision of the store, its term, and ends when its lease does; a term that is over never
//! comes back. A block may be given addresses of by a node only under a line that bears the node's present term ([`proven`]). So:
//!
//! - who joins again after its lease was lost has a new term, and must first renew the lines that are still there ([`Step::Renew`]);
//! - a line whose term has been over for the grace period may be struck out by anybody ([`Step::TakeBack`]), on condition that nobody has
//!   touched it: a node that came back in time has;
//! - a node that cannot reach the store goes on for less than that: until the lease that it last renewed has ended and half of the grace
//!   period has gone by ([`Times::tenure`]). The other half is for clocks that do not run alike.
//!
//! **Which block next?** The range is split equally among the nodes, by the order of their names; a node takes what it needs from the
//! beginning of its own share, and when that is used up from the end of the share with the most left. A share is nobody's property: it keeps
//! nodes out of each other's way, and a node's blocks together.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use ipnetwork::IpNetwork;
use podgate_core::addr::Addr;
use podgate_core::fib::bounds;
use serde::{Deserialize, Serialize};

/// A range has at most 2^20 blocks: what is left of a larger one makes the blocks larger.
const INDEX_BITS_MAX: u8 = 20;

/// How a range of the cluster is cut: into blocks of one size, the same for everybody who knows the range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    range: IpNetwork,
    block_prefix: u8,
}

impl Cut {
    /// Of `range`. Blocks are /24 and /64; smaller where the range would have fewer than 64 (IPv4) or 256 (IPv6) of them, down to /28 and
    /// /124.
    pub fn of(range: IpNetwork) -> Cut {
        let length = range.prefix();
        let (usual, least) = if range.is_ipv4() { (24, (length + 6).min(28)) } else { (64, length.saturating_add(8).min(124)) };
        let block_prefix = u8::max(usual, least).min(length.saturating_add(INDEX_BITS_MAX)).max(length);
        Cut { range, block_prefix }
    }

    /// The range.
    pub fn range(self) -> IpNetwork {
        self.range
    }

    /// How many blocks there are.
    pub fn blocks(self) -> u32 {
        1 << (self.block_prefix - self.range.prefix())
    }

    /// How many addresses a block has.
    pub fn block_len(self) -> u128 {
        1 << (self.width() - self.block_prefix)
    }

    /// The block of this number, which is less than [`Cut::blocks`].
    pub fn block(self, index: u32) -> IpNetwork {
        let first = Addr(bounds(self.range).0.0 + u128::from(index) * self.block_len());
        IpNetwork::new(first.ip(), self.block_prefix).expect("a block's prefix is as long as its family allows")
    }

    /// The number of `block`, if it is one of these.
    pub fn index(self, block: IpNetwork) -> Option<u32> {
        let same = block.is_ipv4() == self.range.is_ipv4() && block.prefix() == self.block_prefix && self.range.contains(block.network());
        let offset = same.then(|| (bounds(block).0.0 - bounds(self.range).0.0) / self.block_len())?;
        u32::try_from(offset).ok()
    }

    fn width(self) -> u8 {
        if self.range.is_ipv4() { Ipv4Addr::BITS as u8 } else { Ipv6Addr::BITS as u8 }
    }
}

/// A line of the ledger: who holds a block.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// The node.
    pub node: String,
    /// The machine under that name: a machine that was set up anew is another one.
    pub machine: String,
    /// The revision at which the node's registration began.
    pub term: i64,
}

/// A line of the ledger, and what the store says of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Who holds the block.
    pub record: Record,
    /// The revision at which the block was claimed.
    pub created: i64,
    /// The revision at which the line was last written.
    pub modified: i64,
}

/// Who holds which block.
pub type Ledger = BTreeMap<IpNetwork, Claim>;

/// A node that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registration {
    /// The machine under the name.
    pub machine: String,
    /// The revision at which it registered.
    pub term: i64,
}

/// The nodes that are there, by name.
pub type Register = BTreeMap<String, Registration>;

/// Whether the node that wrote `record` has gone, or has come back as another.
pub fn is_over(record: &Record, register: &Register) -> bool {
    register.get(&record.node).is_none_or(|registration| registration.term != record.term)
}

/// The blocks of the node `name` on `machine`, whichever the term, the oldest first: the first of a family has the gateway's address.
pub fn held(ledger: &Ledger, name: &str, machine: &str) -> Vec<IpNetwork> {
    let mine = ledger.iter().filter(|(_, claim)| claim.record.node == name && claim.record.machine == machine);
    let mut blocks: Vec<(i64, IpNetwork)> = mine.map(|(block, claim)| (claim.created, *block)).collect();
    blocks.sort_unstable();
    blocks.into_iter().map(|(_, block)| block).collect()
}

/// The blocks that a node can prove to hold, the oldest first: under its present term, which the register must know.
pub fn proven(ledger: &Ledger, register: &Register, me: &Record) -> Vec<IpNetwork> {
    let known = register.get(&me.node).is_some_and(|registration| registration.term == me.term && registration.machine == me.machine);
    let mut blocks = if known { held(ledger, &me.node, &me.machine) } else { Vec::new() };
    blocks.retain(|block| ledger[block].record.term == me.term);
    blocks
}

/// The times that nodes agree on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Times {
    /// How long a registration lasts that nobody renews.
    pub lease: Duration,
    /// How long a term must be over before the node's blocks may go to others.
    pub grace: Duration,
}

impl Times {
    /// How long after it asked for a renewal that was granted a node may rely on its lines of the ledger.
    pub fn tenure(self) -> Duration {
        self.lease + self.grace / 2
    }
}

/// Terms that are known to be over, and since when.
#[derive(Clone, Debug, Default)]
pub struct Endings(BTreeMap<Record, Duration>);

impl Endings {
    /// Takes note of what ended. `now` comes from a clock that only goes forward.
    pub fn note(&mut self, ledger: &Ledger, register: &Register, now: Duration) {
        let over: BTreeSet<&Record> = ledger.values().map(|claim| &claim.record).filter(|record| is_over(record, register)).collect();
        self.0.retain(|record, _| over.contains(record));
        for record in over {
            self.0.entry(record.clone()).or_insert(now);
        }
    }

    /// Whether the term of `record` has been over for `grace`.
    fn lapsed(&self, record: &Record, now: Duration, grace: Duration) -> bool {
        self.0.get(record).is_some_and(|since| now.saturating_sub(*since) >= grace)
    }

    /// When the next grace period ends that has not ended by `now`.
    pub fn next(&self, now: Duration, grace: Duration) -> Option<Duration> {
        self.0.values().map(|since| *since + grace).filter(|end| *end > now).min()
    }
}

/// What a node knows when it decides.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    /// How the cluster's ranges are cut.
    pub cuts: &'a [Cut],
    /// The ledger.
    pub ledger: &'a Ledger,
    /// The register.
    pub register: &'a Register,
    /// Terms that are over.
    pub endings: &'a Endings,
    /// The node itself.
    pub me: &'a Record,
    /// Whether it is short of addresses of IPv4 and of IPv6.
    pub short: [bool; 2],
    /// The time by the clock of [`Endings::note`].
    pub now: Duration,
    /// The times that nodes agree on.
    pub times: Times,
}

/// A transaction, with what it is conditional upon. Each is void unless the node's registration still has its term.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Enter the node for a block that has no line.
    Claim {
        /// The block.
        block: IpNetwork,
    },
    /// Put the node's present term into its line, if that was last written at `modified`.
    Renew {
        /// The block.
        block: IpNetwork,
        /// The revision.
        modified: i64,
    },
    /// Strike out a line whose term is over, if it was last written at `modified`.
    TakeBack {
        /// The block.
        block: IpNetwork,
        /// The revision.
        modified: i64,
    },
}

/// What the node should do next about blocks; nothing if all is as it should be.
pub fn next_step(view: &View<'_>) -> Option<Step> {
    let View { cuts, ledger, register, me, .. } = *view;
    if register.get(&me.node).is_none_or(|registration| registration.term != me.term) {
        return None; // it is not there yet as far as it can see
    }
    let ours = |claim: &Claim| claim.record.node == me.node && claim.record.machine == me.machine;
    if let Some((block, claim)) = ledger.iter().find(|(_, claim)| ours(claim) && claim.record.term != me.term) {
        return Some(Step::Renew { block: *block, modified: claim.modified });
    }
    let lapsed = |v4: Option<bool>| {
        let of_family = |block: &IpNetwork| v4.is_none_or(|v4| block.is_ipv4() == v4);
        let lapsed = |claim: &Claim| view.endings.lapsed(&claim.record, view.now, view.times.grace);
        let found = ledger.iter().find(|(block, claim)| of_family(block) && lapsed(claim));
        found.map(|(block, claim)| Step::TakeBack { block: *block, modified: claim.modified })
    };
    for v4 in [true, false] {
        let of_family = || cuts.iter().filter(|cut| cut.range.is_ipv4() == v4);
        let has_one = ledger.iter().any(|(block, claim)| block.is_ipv4() == v4 && ours(claim));
        if of_family().next().is_none() || (has_one && !view.short[usize::from(!v4)]) {
            continue;
        }
        let free = of_family().find_map(|cut| choose(*cut, ledger, &me.node, register).map(|index| cut.block(index)));
        if let Some(step) = free.map(|block| Step::Claim { block }).or_else(|| lapsed(Some(v4))) {
            return Some(step);
        }
    }
    // One is enough to tidy up, and everybody agrees on who is the first.
    if register.keys().next() == Some(&me.node) { lapsed(None) } else { None }
}

/// The number of the free block that `node` should take.
fn choose(cut: Cut, ledger: &Ledger, node: &str, register: &Register) -> Option<u32> {
    let taken: BTreeSet<u32> = ledger.keys().filter_map(|block| cut.index(*block)).collect();
    let (blocks, nodes) = (u64::from(cut.blocks()), register.len().max(1) as u64);
    // Fits: both ends are at most `blocks`.
    let share = |rank: u64| (rank * blocks / nodes) as u32..((rank + 1) * blocks / nodes) as u32;
    let rank = register.keys().take_while(|name| name.as_str() < node).count() as u64;
    share(rank).find(|index| !taken.contains(index)).or_else(|| {
        let left = |rank: &u64| share(*rank).len() - taken.range(share(*rank)).count();
        let richest = (0..nodes).max_by_key(left)?;
        share(richest).rev().find(|index| !taken.contains(index))
    })
}

#[cfg(test)]
mod tests;
