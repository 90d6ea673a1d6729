//! Addresses for this node's pods, from the node's pod ranges, never given out twice.
//!
//! An interface gets one address of each family, of the node's own pool or of one that it asks for by name (`space` says which addresses a
//! pool has), chosen in this order:
//!
//! 1. what the configuration reserves for the pod of that name;
//! 2. what the pod of that name had before on that interface, if nobody has it now;
//! 3. the lowest that nobody is known to have had;
//! 4. the one whose release is the longest ago.
//!
//! So a range is gone through before any address is used again, and a just-freed one is the last to be given out, so that nobody's late
//! packets reach a new owner. Whoever wishes for an address by itself is held to the cooldown instead. Addresses that another IPAM plugin
//! gave are claimed: they are not ours to choose, but ours to keep from others.
//!
//! What is given out is written to a [`journal`] before the caller has it. Every change is a record, applied by the same function whether it
//! was just made or is read again at the start. Leases end with the boot; whose an address was is remembered beyond it.

pub mod check;
mod error;
pub mod journal;
mod memory;
mod settings;
mod space;
mod state;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;

use ipnetwork::IpNetwork;
use podgate_core::addr::Addr;
use podgate_core::fib::bounds;
use serde::{Deserialize, Serialize, Serializer};

pub use check::{Finding, FindingKind, Holder};
pub use error::IpamError;
pub use memory::REMEMBERED_MAX;
pub use settings::{COOLDOWN_S, IpamSettings};

use journal::{Found, Journal, Origin, Record};
use space::{Place, Pool, Space};
use state::State;

/// Who has an address: one interface of one pod. It is told by [`Owner::netns`] and [`Owner::ifname`]; namespace and name are for people,
/// for reservations and for giving a pod that comes back what it had.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Owner {
    /// The pod's namespace; empty outside Kubernetes.
    pub namespace: String,
    /// The pod's name; `-` or empty if it has none.
    pub name: String,
    /// What names its network namespace and is never used twice at a time: the container's id, or the path of the namespace.
    pub netns: String,
    /// The interface in it.
    pub ifname: String,
}

impl Owner {
    /// `namespace/name`, or the name alone.
    pub fn pod_name(&self) -> String {
        full_name(&self.namespace, &self.name)
    }

    /// The pod, if it has a name to come back under.
    fn pod(&self) -> Option<Pod> {
        let named = !self.name.is_empty() && self.name != "-";
        named.then(|| Pod { namespace: self.namespace.clone(), name: self.name.clone(), ifname: self.ifname.clone() })
    }
}

impl std::fmt::Display for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({}, {})", self.pod_name(), self.ifname, self.netns)
    }
}

fn full_name(namespace: &str, name: &str) -> String {
    if namespace.is_empty() { name.to_owned() } else { format!("{namespace}/{name}") }
}

/// An interface of a pod of that name, whichever its network namespace.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Pod {
    /// The pod's namespace; empty outside Kubernetes.
    pub namespace: String,
    /// The pod's name.
    pub name: String,
    /// The interface in it.
    pub ifname: String,
}

impl std::fmt::Display for Pod {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", full_name(&self.namespace, &self.name), self.ifname)
    }
}

/// What tells owners apart.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    netns: String,
    ifname: String,
}

impl Key {
    fn of(owner: &Owner) -> Key {
        Key { netns: owner.netns.clone(), ifname: owner.ifname.clone() }
    }
}

/// What somebody asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wish {
    /// Of this pool; by default, of the node's own.
    pub pool: Option<String>,
    /// These addresses and no others, at most one of each family; by default, one of each that the pool has.
    pub wanted: Vec<IpAddr>,
}

/// What somebody has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Lease {
    /// Who.
    pub owner: Owner,
    /// The addresses.
    pub addresses: Vec<IpAddr>,
    /// Since when, in Unix seconds.
    #[serde(default)]
    pub since: u64,
    /// The IPAM plugin that gave them; none if it was the node's own allocator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plugin: Option<String>,
}

/// A part of the node's ranges and how much of it is given out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PoolView {
    /// The pool's name; none for the node's own.
    pub pool: Option<String>,
    /// The range.
    pub cidr: IpNetwork,
    /// The gateway's address in it, of the node's own pool.
    pub gateway: Option<IpAddr>,
    /// How many addresses the allocator has to give out. JSON has it up to 2^64-1.
    #[serde(serialize_with = "saturated")]
    pub capacity: u128,
    /// How many are in use, whoever gave them.
    pub used: usize,
    /// How many are excluded by the configuration.
    #[serde(serialize_with = "saturated")]
    pub excluded: u128,
    /// How many are kept for pods by name.
    #[serde(serialize_with = "saturated")]
    pub reserved: u128,
}

/// JSON's numbers end earlier than a /48 of IPv6.
fn saturated<S: Serializer>(number: &u128, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(u64::try_from(*number).unwrap_or(u64::MAX))
}

/// What `podgate ipam` shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct IpamView {
    /// When it was made, in Unix seconds, by the allocator's clock.
    pub now: u64,
    /// The ranges: the node's own, then those of named pools.
    pub pools: Vec<PoolView>,
    /// What is given out, by owner.
    pub leases: Vec<Lease>,
}

/// Where time comes from.
pub trait Clock: std::fmt::Debug {
    /// Seconds since 1970-01-01 UTC.
    fn unix_seconds(&self) -> u64;
}

/// The machine's clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn unix_seconds(&self) -> u64 {
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs())
    }
}

/// The address in a pod range that the self-test speaks from: the second behind the network's.
pub fn probe_address(cidr: IpNetwork) -> Option<IpAddr> {
    let (first, last) = bounds(cidr);
    (last.0 - first.0 >= 2).then(|| Addr(first.0 + 2).ip())
}

/// The allocator of one node.
#[derive(Debug)]
pub struct Ipam {
    journal: Journal,
    clock: Box<dyn Clock>,
    settings: IpamSettings,
    space: Space,
    state: State,
}

impl Ipam {
    /// Reads the journal in `state_dir` (made if it is missing) and serves from `cidrs`, the node's pod ranges. `boot` is the kernel's name
    /// for this boot: leases of another are over. The strings tell what was found and mended, for the log.
    pub fn open(
        state_dir: &Path,
        cidrs: &[IpNetwork],
        settings: &IpamSettings,
        boot: &str,
        clock: Box<dyn Clock>,
    ) -> Result<(Ipam, Vec<String>), IpamError> {
        let mut found = Found::read(state_dir, boot)?;
        let mut messages = std::mem::take(&mut found.messages);
        let (mut state, mut space) = (State::default(), Space::empty(settings));
        for (line, record) in std::mem::take(&mut found.records) {
            let record = match record {
                Record::Lease(lease) if found.origin == Origin::OtherBoot => Record::Lease(state.without_doubles(lease)),
                other => other,
            };
            if let Record::Lease(lease) = &record
                && let Some((address, other)) = state.held_by_another(lease)
            {
                return Err(found.corrupt(line, format!("gives {address} to {} while {other} has it", lease.owner)).into());
            }
            state.apply(record, &mut space);
        }
        if found.origin == Origin::OtherBoot && !state.leases.is_empty() {
            messages.push(format!("{} leases of an earlier boot are over; the pods that come back get the same addresses", state.leases.len()));
            let owners: Vec<Owner> = state.leases.values().map(|lease| lease.owner.clone()).collect();
            owners.into_iter().for_each(|owner| state.apply(Record::Release { owner, at: clock.unix_seconds() }, &mut space));
        }
        let journal = found.begin(&state.records())?;
        let mut ipam = Ipam { journal, clock, settings: settings.clone(), space, state };
        ipam.set_ranges(cidrs)?;
        Ok((ipam, messages))
    }

    /// Serves from other ranges from now on. What is given out stays so.
    pub fn set_ranges(&mut self, cidrs: &[IpNetwork]) -> Result<(), IpamError> {
        if self.space.ranges() == cidrs {
            return Ok(());
        }
        let mut space = Space::new(cidrs, &self.settings)?;
        self.state.owners.keys().for_each(|address| space.take(*address, None));
        for (address, freed) in self.state.memory.iter() {
            space.take(address, None);
            space.give_back(address, freed.turn);
        }
        self.space = space;
        Ok(())
    }

    /// What of the configuration (`ipam` in `podgate.yaml`) has no effect with the node's present ranges, for `podgate status`.
    pub fn warnings(&self) -> Vec<String> {
        self.space.warnings()
    }

    /// Addresses for `owner`. Asking again gives the same.
    pub fn allocate(&mut self, owner: &Owner, wish: &Wish) -> Result<Lease, IpamError> {
        if let Some(lease) = self.standing(owner, &wish.wanted)? {
            return Ok(lease);
        }
        let name = wish.pool.as_deref();
        let known = || self.settings.pools.keys().cloned().collect();
        let cidrs = self.space.ranges().to_vec();
        if let Some(pool) = name.filter(|pool| !self.settings.pools.contains_key(*pool)) {
            return Err(IpamError::NoPool { pool: pool.to_owned(), known: known() });
        }
        let Some((number, pool)) = self.space.pool(name).filter(|_| !cidrs.is_empty()) else { return Err(IpamError::NoRange) };
        let addresses = if wish.wanted.is_empty() {
            let mut addresses = Vec::new();
            for v4 in [true, false].into_iter().filter(|v4| pool.side(*v4).present) {
                addresses.push(self.choose(owner, number, v4)?.ip());
            }
            if let (true, Some(pool)) = (addresses.is_empty(), name) {
                return Err(IpamError::PoolOutside { pool: pool.to_owned(), cidrs });
            }
            addresses
        } else {
            for (at, second) in wish.wanted.iter().enumerate() {
                if let Some(first) = wish.wanted[..at].iter().find(|first| first.is_ipv4() == second.is_ipv4()) {
                    return Err(IpamError::SameFamily { first: *first, second: *second });
                }
                self.admit(owner, number, *second)?;
            }
            wish.wanted.clone()
        };
        self.lease_out(owner, addresses, None)
    }

    /// Takes note of addresses that the IPAM plugin called `plugin` gave to `owner`, so that nobody else gets them. Excluded addresses are a
    /// plugin's to give, and so are those of pools. Claiming the same again gives the same.
    pub fn claim(&mut self, owner: &Owner, addresses: &[IpAddr], plugin: &str) -> Result<Lease, IpamError> {
        if addresses.is_empty() {
            return Err(IpamError::NothingGiven { plugin: plugin.to_owned() });
        }
        if let Some(lease) = self.standing(owner, addresses)? {
            return Ok(lease);
        }
        for address in addresses {
            match self.space.place(*address) {
                Place::Outside => return Err(self.outside(*address)),
                Place::KeptBack(why, cidr) => return Err(IpamError::KeptBack { address: *address, why, cidr }),
                Place::Open { reserved: Some(pod), .. } if pod != owner.pod_name() => {
                    return Err(IpamError::Reserved { address: *address, pod: pod.to_owned() });
                }
                Place::Excluded(_) | Place::Open { .. } => self.refuse_taken(*address)?,
            }
        }
        let distinct: BTreeSet<IpAddr> = addresses.iter().copied().collect();
        self.lease_out(owner, distinct.into_iter().collect(), Some(plugin.to_owned()))
    }

    /// Takes back what `owner` has; what that was. Releasing twice is no error.
    pub fn release(&mut self, owner: &Owner) -> Result<Option<Lease>, IpamError> {
        let Some(lease) = self.lease(owner).cloned() else { return Ok(None) };
        self.commit(vec![Record::Release { owner: lease.owner.clone(), at: self.clock.unix_seconds() }])?;
        Ok(Some(lease))
    }

    /// What `owner` has. Its names do not matter.
    pub fn lease(&self, owner: &Owner) -> Option<&Lease> {
        self.state.leases.get(&Key::of(owner))
    }

    /// Everything that is given out, by network namespace and interface.
    pub fn leases(&self) -> impl Iterator<Item = &Lease> {
        self.state.leases.values()
    }

    /// Who has `address`.
    pub fn owner(&self, address: IpAddr) -> Option<&Owner> {
        self.state.owners.get(&Addr::from(address)).map(|key| &self.state.leases[key].owner)
    }

    /// What `podgate ipam` shows.
    pub fn list(&self) -> IpamView {
        let mut used: BTreeMap<(usize, IpNetwork), usize> = BTreeMap::new();
        for address in self.state.owners.keys().map(|address| address.ip()) {
            let number = self.space.pool_at(address);
            let cidr = self.space.pools().get(number).and_then(|pool| pool.cidrs.iter().find(|cidr| cidr.contains(address)));
            cidr.into_iter().for_each(|cidr| *used.entry((number, *cidr)).or_default() += 1);
        }
        let view = |number: usize, pool: &Pool, cidr: &IpNetwork| {
            let extent = self.space.extent(number, *cidr);
            PoolView {
                pool: pool.name.clone(),
                cidr: *cidr,
                gateway: pool.name.is_none().then(|| Addr(bounds(*cidr).0.0 + 1).ip()),
                capacity: extent.capacity,
                used: used.get(&(number, *cidr)).copied().unwrap_or(0),
                excluded: extent.excluded,
                reserved: extent.reserved,
            }
        };
        let pools = self.space.pools().iter().enumerate().flat_map(|(number, pool)| pool.cidrs.iter().map(move |cidr| view(number, pool, cidr)));
        IpamView { now: self.clock.unix_seconds(), pools: pools.collect(), leases: self.leases().cloned().collect() }
    }

    /// The pool that `address` lies in, if it is a named one.
    pub fn pool_of(&self, address: IpAddr) -> Option<&str> {
        self.space.pools().get(self.space.pool_at(address))?.name.as_deref()
    }

    /// What `owner` has already, under the names that it has now. Refused where other addresses are asked for.
    fn standing(&mut self, owner: &Owner, addresses: &[IpAddr]) -> Result<Option<Lease>, IpamError> {
        let Some(mut lease) = self.lease(owner).cloned() else { return Ok(None) };
        let set = |addresses: &[IpAddr]| addresses.iter().copied().collect::<BTreeSet<_>>();
        if !addresses.is_empty() && set(addresses) != set(&lease.addresses) {
            return Err(IpamError::HasOthers { owner: Box::new(lease.owner), has: lease.addresses });
        }
        if lease.owner != *owner && owner.pod().is_some() {
            lease.owner = owner.clone();
            self.commit(vec![Record::Lease(lease.clone())])?;
        }
        Ok(Some(lease))
    }

    /// An address of that family in that pool.
    fn choose(&self, owner: &Owner, number: usize, v4: bool) -> Result<Addr, IpamError> {
        let pool = &self.space.pools()[number];
        if let Some(reserved) = self.reserved(owner, pool.name.is_some().then_some(number), v4)? {
            return Ok(reserved);
        }
        let of_family = |address: &Addr| address.is_v4() == v4;
        let had = owner.pod().and_then(|pod| self.state.memory.of(&pod).filter(of_family).find(|address| self.space.giver(*address) == Some(number)));
        let side = pool.side(v4);
        let fresh = || side.fresh.first().map(Addr);
        let freed = || side.freed.first_key_value().map(|(_, address)| *address);
        had.or_else(fresh).or_else(freed).ok_or_else(|| IpamError::Exhausted {
            pool: pool.name.clone(),
            cidrs: pool.cidrs_of(v4),
            capacity: side.capacity,
        })
    }

    /// An address that is kept for this pod, in the pool asked for if one was. Its other interfaces may have them all, and then it gets one
    /// as everybody does; but if an earlier sandbox of the same interface has it, it is worth waiting for.
    fn reserved(&self, owner: &Owner, pool: Option<usize>, v4: bool) -> Result<Option<Addr>, IpamError> {
        let here = |address: &IpAddr| match self.space.place(*address) {
            Place::Open { pool: lies_in, .. } => pool.is_none_or(|pool| pool == lies_in),
            _ => false,
        };
        let mut taken = None;
        for address in self.space.reserved_for(&owner.pod_name()).iter().filter(|a| a.is_ipv4() == v4).filter(|a| here(a)) {
            match self.owner(*address) {
                None => return Ok(Some(Addr::from(*address))),
                Some(by) if by.pod() == owner.pod() => taken = Some(IpamError::Taken { address: *address, by: Box::new(by.clone()) }),
                Some(_) => {}
            }
        }
        taken.map_or(Ok(None), Err)
    }

    /// Whether `owner` may have exactly this address, out of that pool.
    fn admit(&mut self, owner: &Owner, number: usize, address: IpAddr) -> Result<(), IpamError> {
        let asked = self.space.pools()[number].name.clone();
        match self.space.place(address) {
            Place::Outside => return Err(self.outside(address)),
            Place::KeptBack(why, cidr) => return Err(IpamError::KeptBack { address, why, cidr }),
            Place::Excluded(cidr) => return Err(IpamError::Excluded { address, cidr }),
            Place::Open { reserved: Some(pod), .. } if pod != owner.pod_name() => return Err(IpamError::Reserved { address, pod: pod.to_owned() }),
            Place::Open { pool, reserved } if pool != number => match (asked, self.space.pools()[pool].name.clone()) {
                (Some(asked), _) => return Err(IpamError::OutsidePool { address, pool: asked }),
                // Who says that it is this pod's has said that it may have it.
                (None, _) if reserved.is_some() => {}
                (None, Some(lies_in)) => return Err(IpamError::InPool { address, pool: lies_in }),
                (None, None) => unreachable!("the pool that was not asked for has a name"),
            },
            Place::Open { .. } => {}
        }
        self.refuse_taken(address)?;
        let (now, addr) = (self.clock.unix_seconds(), Addr::from(address));
        self.state.memory.not_later(addr, now);
        match self.state.memory.get(addr) {
            Some(freed) if freed.last.is_none() || freed.last != owner.pod() => {
                let seconds = (freed.at + self.settings.cooldown_s).saturating_sub(now);
                if seconds > 0 { Err(IpamError::Cooling { address, last: freed.last.clone(), seconds }) } else { Ok(()) }
            }
            _ => Ok(()),
        }
    }

    fn outside(&self, address: IpAddr) -> IpamError {
        match self.space.ranges() {
            [] => IpamError::NoRange,
            cidrs => IpamError::Outside { address, cidrs: cidrs.to_vec() },
        }
    }

    fn refuse_taken(&self, address: IpAddr) -> Result<(), IpamError> {
        self.owner(address).map_or(Ok(()), |by| Err(IpamError::Taken { address, by: Box::new(by.clone()) }))
    }

    fn lease_out(&mut self, owner: &Owner, addresses: Vec<IpAddr>, plugin: Option<String>) -> Result<Lease, IpamError> {
        let lease = Lease { owner: owner.clone(), addresses, since: self.clock.unix_seconds(), plugin };
        self.commit(vec![Record::Lease(lease.clone())])?;
        Ok(lease)
    }

    /// Writes records and then does what they say.
    fn commit(&mut self, records: Vec<Record>) -> Result<(), IpamError> {
        self.journal.append(&records)?;
        records.into_iter().for_each(|record| self.state.apply(record, &mut self.space));
        self.compact_if_due();
        Ok(())
    }

    /// A journal that grew well beyond what it says is written anew. If that fails, the long one is as good.
    fn compact_if_due(&mut self) {
        const SLACK: usize = 1024;
        if self.journal.records() <= 2 * (self.state.leases.len() + self.state.memory.len()) + SLACK {
            return;
        }
        if let Err(error) = self.compact() {
            tracing::warn!(%error, "the journal of addresses stays long");
        }
    }

    /// Writes the journal anew, without what is over.
    pub fn compact(&mut self) -> Result<(), IpamError> {
        Ok(self.journal.rewrite(&self.state.records())?)
    }
}

#[cfg(test)]
mod tests;
