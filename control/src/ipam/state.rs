//! Who has what, and who had what: the sum of the journal's records.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use podgate_core::addr::Addr;

use super::journal::Record;
use super::memory::Memory;
use super::space::Space;
use super::{Key, Lease, Owner, Pod};

/// All of it.
#[derive(Debug, Default)]
pub(super) struct State {
    /// What is given out.
    pub leases: BTreeMap<Key, Lease>,
    /// The same by address.
    pub owners: BTreeMap<Addr, Key>,
    /// What was released.
    pub memory: Memory,
}

impl State {
    /// The one way to change anything: what was just written to the journal, or is read from it.
    pub fn apply(&mut self, record: Record, space: &mut Space) {
        match record {
            Record::Lease(lease) => self.hold(lease, space),
            Record::Release { owner, at } => {
                if let Some(lease) = self.leases.remove(&Key::of(&owner)) {
                    lease.addresses.iter().for_each(|address| self.owners.remove(&Addr::from(*address)).into_iter().for_each(drop));
                    // A plugin chooses for itself who gets its addresses again.
                    let last = lease.owner.pod().filter(|_| lease.plugin.is_none());
                    lease.addresses.iter().for_each(|address| self.note(*address, last.clone(), at, space));
                }
            }
            Record::Freed { address, last, at } if !self.owners.contains_key(&Addr::from(address)) => self.note(address, last, at, space),
            Record::Freed { .. } | Record::Journal { .. } | Record::Cursor(_) => {}
        }
    }

    fn hold(&mut self, lease: Lease, space: &mut Space) {
        let key = Key::of(&lease.owner);
        if let Some(before) = self.leases.remove(&key) {
            for address in before.addresses {
                self.owners.remove(&Addr::from(address));
                if !lease.addresses.contains(&address) {
                    self.note(address, None, lease.since, space);
                }
            }
        }
        for address in lease.addresses.iter().map(|address| Addr::from(*address)) {
            let turn = self.memory.forget(address).map(|freed| freed.turn);
            space.take(address, turn);
            self.owners.insert(address, key.clone());
        }
        self.leases.insert(key, lease);
    }

    fn note(&mut self, address: IpAddr, last: Option<Pod>, at: u64, space: &mut Space) {
        let address = Addr::from(address);
        let (turn, forgotten) = self.memory.note(address, last, at);
        space.give_back(address, turn);
        if let Some((turn, oldest)) = forgotten {
            space.forget(oldest, turn);
        }
    }

    /// An address of `lease` that somebody else has, and who.
    pub fn held_by_another(&self, lease: &Lease) -> Option<(IpAddr, &Owner)> {
        let key = Key::of(&lease.owner);
        lease.addresses.iter().find_map(|address| {
            let other = self.owners.get(&Addr::from(*address)).filter(|other| **other != key)?;
            Some((*address, &self.leases[other].owner))
        })
    }

    /// Takes out of `lease` what somebody else has: for records of an earlier boot, of which some are lost.
    pub fn without_doubles(&self, mut lease: Lease) -> Lease {
        let key = Key::of(&lease.owner);
        lease.addresses.retain(|address| self.owners.get(&Addr::from(*address)).is_none_or(|other| *other == key));
        let mut seen = BTreeSet::new();
        lease.addresses.retain(|address| seen.insert(*address));
        lease
    }

    /// What a journal needs to say to come to the same.
    pub fn records(&self) -> Vec<Record> {
        let freed = self.memory.iter().map(|(address, freed)| Record::Freed { address: address.ip(), last: freed.last.clone(), at: freed.at });
        freed.chain(self.leases.values().cloned().map(Record::Lease)).collect()
    }
}
