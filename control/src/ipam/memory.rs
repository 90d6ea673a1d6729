//! Which addresses were released, when, and whose they were: so that a pod that comes back finds its own, and that nobody else gets one
//! that was in use a moment ago. It is bounded: beyond [`REMEMBERED_MAX`] the oldest is forgotten.

use std::collections::{BTreeMap, HashMap};

use podgate_core::addr::Addr;

use super::Pod;

/// How many released addresses are remembered. A node runs some hundred pods (kubelet's default is at most 110): this is their turnover of
/// days, in about 1 MiB.
pub const REMEMBERED_MAX: usize = 8192;

/// A released address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Freed {
    /// When, in Unix seconds.
    pub at: u64,
    /// Its place in the order of releases.
    pub turn: u64,
    /// Whose it was, if that was a pod with a name.
    pub last: Option<Pod>,
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Memory {
    freed: HashMap<Addr, Freed>,
    by_turn: BTreeMap<u64, Addr>,
    /// The addresses of a pod, the latest released last.
    of_pod: HashMap<Pod, Vec<Addr>>,
    next_turn: u64,
}

impl Memory {
    /// Takes note of a release: its turn, and what is forgotten in exchange.
    pub fn note(&mut self, address: Addr, last: Option<Pod>, at: u64) -> (u64, Option<(u64, Addr)>) {
        self.forget(address);
        let turn = self.next_turn;
        self.next_turn += 1;
        if let Some(pod) = &last {
            self.of_pod.entry(pod.clone()).or_default().push(address);
        }
        self.freed.insert(address, Freed { at, turn, last });
        self.by_turn.insert(turn, address);
        let oldest = (self.freed.len() > REMEMBERED_MAX).then(|| self.by_turn.first_key_value().map(|(turn, address)| (*turn, *address))).flatten();
        if let Some((_, oldest)) = oldest {
            self.forget(oldest);
        }
        (turn, oldest)
    }

    /// Forgets an address; what was known of it.
    pub fn forget(&mut self, address: Addr) -> Option<Freed> {
        let freed = self.freed.remove(&address)?;
        self.by_turn.remove(&freed.turn);
        if let Some(pod) = &freed.last
            && let Some(addresses) = self.of_pod.get_mut(pod)
        {
            addresses.retain(|known| *known != address);
            if addresses.is_empty() {
                self.of_pod.remove(pod);
            }
        }
        Some(freed)
    }

    /// What is known of an address.
    pub fn get(&self, address: Addr) -> Option<&Freed> {
        self.freed.get(&address)
    }

    /// Brings a release that lies in the future back to `now`: the machine's clock was set back.
    pub fn not_later(&mut self, address: Addr, now: u64) {
        if let Some(freed) = self.freed.get_mut(&address) {
            freed.at = freed.at.min(now);
        }
    }

    /// The addresses that a pod had, the latest first.
    pub fn of(&self, pod: &Pod) -> impl Iterator<Item = Addr> {
        self.of_pod.get(pod).into_iter().flat_map(|addresses| addresses.iter().rev().copied())
    }

    /// Everything, the oldest release first.
    pub fn iter(&self) -> impl Iterator<Item = (Addr, &Freed)> {
        self.by_turn.values().map(|address| (*address, &self.freed[address]))
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.freed.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(name: &str) -> Pod {
        Pod { namespace: "default".into(), name: name.into(), ifname: "eth0".into() }
    }

    #[test]
    fn the_latest_of_a_pod_comes_first_and_what_is_forgotten_is_gone_everywhere() {
        let mut memory = Memory::default();
        memory.note(Addr(1), Some(pod("a")), 10);
        memory.note(Addr(2), Some(pod("a")), 11);
        memory.note(Addr(3), None, 12);
        assert_eq!(memory.of(&pod("a")).collect::<Vec<_>>(), [Addr(2), Addr(1)]);
        assert_eq!(memory.forget(Addr(2)).map(|freed| (freed.at, freed.turn)), Some((11, 1)));
        assert_eq!(memory.of(&pod("a")).collect::<Vec<_>>(), [Addr(1)]);
        // Released again, by another: it is the latest, and no longer the first pod's.
        memory.note(Addr(1), Some(pod("b")), 13);
        assert_eq!(memory.of(&pod("a")).count(), 0);
        assert_eq!(memory.iter().map(|(address, _)| address).collect::<Vec<_>>(), [Addr(3), Addr(1)]);
        assert_eq!(memory.of_pod.len(), 1);
    }

    #[test]
    fn beyond_its_bound_the_oldest_is_forgotten() {
        let mut memory = Memory::default();
        for n in 0..REMEMBERED_MAX as u128 {
            assert_eq!(memory.note(Addr(n), Some(pod(&n.to_string())), 0).1, None);
        }
        assert_eq!(memory.note(Addr(u128::MAX), Some(pod("one more")), 0).1, Some((0, Addr(0))));
        assert_eq!((memory.len(), memory.by_turn.len(), memory.of_pod.len()), (REMEMBERED_MAX, REMEMBERED_MAX, REMEMBERED_MAX));
        assert_eq!(memory.of(&pod("0")).count(), 0);
    }
}
