//! Addresses for this node's pods: one of each family from the node's pod ranges, never given out twice.
//!
//! Of a range these are kept back: the network's own address, the first (the gateway), the second (the self-test's probe) and the
//! last (IPv4's broadcast; of IPv6 too, so that one rule holds for both). The rest goes round and round: a freed address is the last to be
//! given out again, so that nobody's late packets reach a new owner.
//!
//! What is given out is written to a [`journal`] and is on the disk before the caller has it.

pub mod journal;

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::path::Path;

use ipnetwork::IpNetwork;
use podgate_core::addr::Addr;
use podgate_core::fib::bounds;
use serde::{Deserialize, Serialize};

use journal::{Journal, JournalError, Record};

/// Who has an address: one interface of one pod.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Owner {
    /// The pod's namespace; empty outside Kubernetes.
    pub namespace: String,
    /// The pod's name.
    pub name: String,
    /// What names its network namespace and is never used twice at a time: the container's id, or device and inode of the namespace.
    pub netns: String,
    /// The interface in it.
    pub ifname: String,
}

impl std::fmt::Display for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Owner { namespace, name, netns, ifname } = self;
        if namespace.is_empty() { write!(f, "{name} ({ifname}, {netns})") } else { write!(f, "{namespace}/{name} ({ifname}, {netns})") }
    }
}

/// What somebody has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Lease {
    /// Who.
    pub owner: Owner,
    /// One address of each family that the node has a range of.
    pub addresses: Vec<IpAddr>,
}

/// A range and how much of it is given out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PoolView {
    /// The range.
    pub cidr: IpNetwork,
    /// The gateway's address in it.
    pub gateway: IpAddr,
    /// How many addresses there are to give out.
    pub capacity: u128,
    /// How many are given out.
    pub used: usize,
}

/// What `podgate ipam` shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct IpamView {
    /// The ranges.
    pub pools: Vec<PoolView>,
    /// What is given out, by owner.
    pub leases: Vec<Lease>,
}

/// Why there is no address.
#[derive(Debug, thiserror::Error)]
pub enum IpamError {
    /// The node has no range, or not yet.
    #[error("this node has no pod range; give its Node object spec.podCIDRs inside the cluster's podCIDRs")]
    NoRange,
    /// Every address is taken.
    #[error("all {capacity} addresses of {cidr} are given out; see `podgate ipam`, and detach pods that are gone or give the node a larger range")]
    Exhausted {
        /// The range.
        cidr: IpNetwork,
        /// How many it has to give out.
        capacity: u128,
    },
    /// A range without room.
    #[error("the pod range {cidr} is too small: four of its addresses are kept back; give the node at least a /{}", longest(.cidr))]
    TooSmall {
        /// The range.
        cidr: IpNetwork,
    },
    /// The journal cannot be read or written.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// The longest prefix of the range's family that leaves room for a pod.
fn longest(cidr: &IpNetwork) -> u8 {
    if cidr.is_ipv4() { 29 } else { 125 }
}

/// The address in a pod range that the self-test speaks from: the second behind the network's.
pub fn probe_address(cidr: IpNetwork) -> Option<IpAddr> {
    let (first, last) = bounds(cidr);
    (last.0 - first.0 >= 2).then(|| Addr(first.0 + 2).ip())
}

/// A range, cut to what may be given out.
#[derive(Clone, Copy, Debug)]
struct Pool {
    cidr: IpNetwork,
    first: u128,
    last: u128,
    /// The address given out last: the search goes on behind it.
    cursor: u128,
}

impl Pool {
    fn new(cidr: IpNetwork) -> Result<Pool, IpamError> {
        let (first, last) = bounds(cidr);
        // Network, gateway and probe in front; the last one behind.
        if last.0 - first.0 < 4 {
            return Err(IpamError::TooSmall { cidr });
        }
        let (first, last) = (first.0 + 3, last.0 - 1);
        Ok(Pool { cidr, first, last, cursor: last })
    }

    fn holds(&self, address: Addr) -> bool {
        (self.first..=self.last).contains(&address.0)
    }

    fn capacity(&self) -> u128 {
        self.last - self.first + 1
    }

    /// The next free address behind the cursor. It takes at most as many steps as there are addresses in use.
    fn next(&self, taken: impl Fn(Addr) -> bool) -> Option<Addr> {
        let mut at = self.cursor;
        for _ in 0..self.capacity() {
            at = if at >= self.last { self.first } else { at + 1 };
            if !taken(Addr(at)) {
                return Some(Addr(at));
            }
        }
        None
    }
}

#[derive(Clone, Debug, Default)]
/// What a pod would have.
pub struct Wish {
    /// Of this pool.
    pub pool: Option<String>,
    /// These.
    pub wanted: Vec<IpAddr>,
}
/// The allocator of one node.
#[derive(Debug)]
pub struct Ipam {
    journal: Journal,
    pools: Vec<Pool>,
    leases: BTreeMap<Owner, Lease>,
    owners: HashMap<Addr, Owner>,
}

impl Ipam {
    /// Reads the journal in `state_dir` (made if it is missing) and serves from `cidrs`, the node's pod ranges. The strings tell what was
    /// found torn and mended, for the log.
    pub fn open(state_dir: &Path, cidrs: &[IpNetwork]) -> Result<(Ipam, Vec<String>), IpamError> {
        let (journal, records, messages) = Journal::open(state_dir)?;
        let mut ipam = Ipam { journal, pools: Vec::new(), leases: BTreeMap::new(), owners: HashMap::new() };
        let mut given: Vec<IpAddr> = Vec::new();
        for (line, record) in records {
            match record {
                Record::Lease(lease) => {
                    if let Some((address, other)) = lease.addresses.iter().find_map(|a| Some((a, ipam.owners.get(&Addr::from(*a))?))) {
                        let problem = format!("gives {address} to {} while {other} has it", lease.owner);
                        return Err(ipam.journal.corrupt(line, problem).into());
                    }
                    given.extend(&lease.addresses);
                    ipam.remember(lease);
                }
                Record::Release(owner) => {
                    ipam.forget(&owner);
                }
                Record::Cursor(address) => given.push(address),
                Record::Journal { .. } => {}
            }
        }
        ipam.set_ranges(cidrs)?;
        for address in given {
            ipam.advance(address);
        }
        Ok((ipam, messages))
    }

    /// Serves from other ranges from now on. What is given out stays so.
    pub fn set_ranges(&mut self, cidrs: &[IpNetwork]) -> Result<(), IpamError> {
        let pools = cidrs.iter().map(|cidr| Pool::new(*cidr)).collect::<Result<Vec<_>, _>>()?;
        let keep = |pool: Pool| self.pools.iter().find(|old| old.cidr == pool.cidr).copied().unwrap_or(pool);
        self.pools = pools.into_iter().map(keep).collect();
        Ok(())
    }

    /// Addresses that a plugin gave.
    pub fn claim(&mut self, owner: &Owner, _a: &[IpAddr], _p: &str) -> Result<Lease, IpamError> {
        self.allocate(owner, &Wish::default())
    }
    /// One address of each family for `owner`. Asking again gives the same.
    pub fn allocate(&mut self, owner: &Owner, _wish: &Wish) -> Result<Lease, IpamError> {
        if let Some(lease) = self.leases.get(owner) {
            return Ok(lease.clone());
        }
        let mut addresses = Vec::new();
        for v4 in [true, false] {
            let of_family: Vec<&Pool> = self.pools.iter().filter(|p| p.cidr.is_ipv4() == v4).collect();
            let Some(first) = of_family.first() else { continue };
            let free = of_family.iter().find_map(|pool| pool.next(|addr| self.owners.contains_key(&addr)));
            addresses.push(free.ok_or(IpamError::Exhausted { cidr: first.cidr, capacity: of_family.iter().map(|p| p.capacity()).sum() })?.ip());
        }
        if addresses.is_empty() {
            return Err(IpamError::NoRange);
        }
        let lease = Lease { owner: owner.clone(), addresses };
        self.journal.append(&Record::Lease(lease.clone()))?;
        lease.addresses.iter().for_each(|address| self.advance(*address));
        self.remember(lease.clone());
        self.compact_if_due();
        Ok(lease)
    }

    /// Takes back what `owner` has; what that was. Releasing twice is no error.
    pub fn release(&mut self, owner: &Owner) -> Result<Option<Lease>, IpamError> {
        if !self.leases.contains_key(owner) {
            return Ok(None);
        }
        self.journal.append(&Record::Release(owner.clone()))?;
        let lease = self.forget(owner);
        self.compact_if_due();
        Ok(lease)
    }

    /// What `owner` has.
    pub fn lease(&self, owner: &Owner) -> Option<&Lease> {
        self.leases.get(owner)
    }

    /// Everything that is given out, by owner.
    pub fn leases(&self) -> impl Iterator<Item = &Lease> {
        self.leases.values()
    }

    /// Who has `address`.
    pub fn owner(&self, address: IpAddr) -> Option<&Owner> {
        self.owners.get(&Addr::from(address))
    }

    /// What `podgate ipam` shows.
    pub fn list(&self) -> IpamView {
        let view = |pool: &Pool| PoolView {
            cidr: pool.cidr,
            gateway: Addr(pool.first - 2).ip(),
            capacity: pool.capacity(),
            used: self.owners.keys().filter(|addr| pool.holds(**addr)).count(),
        };
        IpamView { pools: self.pools.iter().map(view).collect(), leases: self.leases.values().cloned().collect() }
    }

    fn remember(&mut self, lease: Lease) {
        // A journal may hold a second lease of an owner only behind its release; without one the later counts.
        self.forget(&lease.owner.clone());
        self.owners.extend(lease.addresses.iter().map(|a| (Addr::from(*a), lease.owner.clone())));
        self.leases.insert(lease.owner.clone(), lease);
    }

    fn forget(&mut self, owner: &Owner) -> Option<Lease> {
        let lease = self.leases.remove(owner)?;
        lease.addresses.iter().for_each(|a| {
            self.owners.remove(&Addr::from(*a));
        });
        Some(lease)
    }

    fn advance(&mut self, address: IpAddr) {
        let addr = Addr::from(address);
        if let Some(pool) = self.pools.iter_mut().find(|p| p.holds(addr)) {
            pool.cursor = addr.0;
        }
    }

    /// A journal that grew well beyond what it says is written anew. If that fails, the long one is as good.
    fn compact_if_due(&mut self) {
        const SLACK: usize = 1024;
        if self.journal.records() <= 2 * self.leases.len() + SLACK {
            return;
        }
        if let Err(error) = self.compact() {
            tracing::warn!(%error, "the journal of addresses stays long");
        }
    }

    /// Writes the journal anew, without what is over.
    pub fn compact(&mut self) -> Result<(), IpamError> {
        let leases = self.leases.values().cloned().map(Record::Lease);
        let cursors = self.pools.iter().map(|pool| Record::Cursor(Addr(pool.cursor).ip()));
        let records: Vec<Record> = leases.chain(cursors).collect();
        Ok(self.journal.rewrite(&records)?)
    }
}

#[cfg(test)]
mod tests;
