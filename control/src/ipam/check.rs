//! Addresses compared with what is attached: leaks, doubles, and what lies outside the node's ranges; and how that is mended.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use podgate_core::fib::within;
use serde::Serialize;

use super::error::list;
use super::journal::Record;
use super::{Addr, Ipam, IpamError, Key, Lease, Owner};

/// Something that is attached, and the addresses that its interface has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Whose interface. What counts is [`Owner::netns`] and [`Owner::ifname`].
    pub owner: Owner,
    /// Its addresses; none for one that is to get them later.
    pub addresses: Vec<IpAddr>,
}

/// What kind of disagreement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum FindingKind {
    /// An address is kept from everybody, and nothing that is attached uses it.
    Leaked,
    /// Something attached uses an address that the allocator takes for free or for another's.
    Unleased,
    /// Two attachments use one address.
    Double,
    /// An address in use lies outside the node's ranges.
    Outside,
}

/// A disagreement.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Finding {
    /// What kind.
    pub kind: FindingKind,
    /// About which address.
    pub address: IpAddr,
    /// Whose it is.
    pub owner: Owner,
    /// What is wrong and, where `--fix` cannot mend it, what to do.
    pub problem: String,
    /// Whether it has been mended.
    pub fixed: bool,
}

impl Ipam {
    /// Compares what is given out with what is attached, and with the node's ranges. By address.
    pub fn check(&self, attached: &[Holder]) -> Vec<Finding> {
        let by_key: BTreeMap<Key, &Holder> = attached.iter().map(|holder| (Key::of(&holder.owner), holder)).collect();
        let mut users: BTreeMap<Addr, Vec<&Owner>> = BTreeMap::new();
        for holder in attached {
            let distinct: BTreeSet<Addr> = holder.addresses.iter().map(|address| Addr::from(*address)).collect();
            distinct.into_iter().for_each(|address| users.entry(address).or_default().push(&holder.owner));
        }
        let finding = |kind, address, owner: &Owner, problem| Finding { kind, address, owner: owner.clone(), problem, fixed: false };
        let mut findings = Vec::new();
        for (key, lease) in &self.state.leases {
            for address in &lease.addresses {
                let problem = match by_key.get(key) {
                    None => "it is given out, but nothing of its owner is attached; --fix releases it".to_owned(),
                    Some(holder) if !holder.addresses.contains(address) => {
                        let has = if holder.addresses.is_empty() { "no address".into() } else { list(&holder.addresses) };
                        format!("it is given out, but its owner's interface has {has}; --fix releases it")
                    }
                    _ => continue,
                };
                findings.push(finding(FindingKind::Leaked, *address, &lease.owner, problem));
            }
        }
        for (address, owners) in &users {
            let ip = address.ip();
            if let [first, others @ ..] = &owners[..]
                && !others.is_empty()
            {
                let Owner { netns, ifname, .. } = others[0];
                let problem = format!(
                    "{} use it too; detach them, as with `podgate detach --netns {netns} --ifname {ifname}`, and attach them again",
                    list(others)
                );
                findings.push(finding(FindingKind::Double, ip, first, problem));
            }
            let holder = self.state.owners.get(address);
            let leased = owners.iter().any(|owner| holder == Some(&Key::of(owner)));
            if !leased {
                let lease = holder.and_then(|key| self.state.leases.get(key));
                let whom = lease.map_or_else(|| "nobody, and could be given to another".to_owned(), |lease| lease.owner.to_string());
                let problem = format!("it is in use, but given out to {whom}; --fix takes note of it");
                findings.push(finding(FindingKind::Unleased, ip, owners[0], problem));
            }
            if !self.space.ranges().is_empty() && !within(self.space.ranges(), *address) {
                let ranges = list(self.space.ranges());
                let problem = format!("it lies outside this node's ranges {ranges}, so other nodes do not send to it; make the pod anew");
                findings.push(finding(FindingKind::Outside, ip, owners[0], problem));
            }
        }
        findings.sort_by(|a, b| (a.address, a.kind, &a.owner).cmp(&(b.address, b.kind, &b.owner)));
        findings
    }

    /// [`Ipam::check`], and makes the leases as the attachments are: what nobody has is released, what somebody has is noted. What cannot be
    /// mended here comes back with `fixed` false.
    pub fn fix(&mut self, attached: &[Holder]) -> Result<Vec<Finding>, IpamError> {
        let mut findings = self.check(attached);
        if findings.is_empty() {
            return Ok(findings);
        }
        let by_key: BTreeMap<Key, &Holder> = attached.iter().map(|holder| (Key::of(&holder.owner), holder)).collect();
        // Released first, so that what is in use is free to be noted.
        for (key, lease) in self.state.leases.clone() {
            let kept: Vec<IpAddr> = lease.addresses.iter().filter(|a| by_key.get(&key).is_some_and(|h| h.addresses.contains(a))).copied().collect();
            if kept.len() == lease.addresses.len() {
                continue;
            }
            let mut records = vec![Record::Release { owner: lease.owner.clone(), at: self.clock.unix_seconds() }];
            if !kept.is_empty() {
                records.push(Record::Lease(Lease { addresses: kept, ..lease }));
            }
            self.commit(records)?;
        }
        for holder in attached {
            let key = Key::of(&holder.owner);
            let free = |address: &&IpAddr| self.state.owners.get(&Addr::from(**address)).is_none_or(|other| *other == key);
            let addresses: BTreeSet<IpAddr> = holder.addresses.iter().filter(free).copied().collect();
            let known = self.state.leases.get(&key);
            if addresses.is_empty() || known.is_some_and(|lease| addresses.iter().all(|address| lease.addresses.contains(address))) {
                continue;
            }
            let (since, plugin) = known.map_or((self.clock.unix_seconds(), None), |lease| (lease.since, lease.plugin.clone()));
            let lease = Lease { owner: holder.owner.clone(), addresses: addresses.into_iter().collect(), since, plugin };
            self.commit(vec![Record::Lease(lease)])?;
        }
        let left = self.check(attached);
        let same = |a: &Finding, b: &Finding| (a.kind, a.address, &a.owner) == (b.kind, b.address, &b.owner);
        for finding in &mut findings {
            finding.fixed = !left.iter().any(|other| same(finding, other));
        }
        Ok(findings)
    }

    /// Takes back by hand what `what` has: an address, or a pod's `namespace/name`. What is attached keeps its addresses.
    pub fn release_by_hand(&mut self, what: &str, attached: &[Holder]) -> Result<Vec<IpAddr>, IpamError> {
        let named = |lease: &&Lease| lease.owner.pod_name() == what;
        let leases: Vec<Lease> = match what.parse::<IpAddr>() {
            Ok(address) => self.owner(address).and_then(|owner| self.lease(owner)).into_iter().cloned().collect(),
            Err(_) => self.leases().filter(named).cloned().collect(),
        };
        if leases.is_empty() {
            return Err(IpamError::NotLeased { what: what.to_owned() });
        }
        let keys: BTreeSet<Key> = attached.iter().map(|holder| Key::of(&holder.owner)).collect();
        // A pod that was made anew may be attached while what its first sandbox had has leaked: that can go.
        let (in_use, leaked): (Vec<Lease>, Vec<Lease>) = leases.into_iter().partition(|lease| keys.contains(&Key::of(&lease.owner)));
        if let ([], Some(lease)) = (&leaked[..], in_use.into_iter().next()) {
            return Err(IpamError::Attached { owner: Box::new(lease.owner), addresses: lease.addresses });
        }
        let mut released = Vec::new();
        for lease in leaked {
            released.extend(self.release(&lease.owner)?.into_iter().flat_map(|lease| lease.addresses));
        }
        Ok(released)
    }
}
