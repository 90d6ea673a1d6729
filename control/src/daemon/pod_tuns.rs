//! The TUNs of pods in mode tun, between `pods`, which opens them, the dataplane, which reads and writes them, and the store, which keeps them open for
//! a successor.

use std::collections::BTreeSet;

use podgate_core::verdict::TunId;
use podgate_runtime::pod_tun::PodTun;

use super::Daemon;
use crate::keeper::{Keeper, Store, names};
use crate::pods::Pods;

/// What a problem of this kind begins with, in `podgate status`.
const PROBLEM: &str = "attach";

/// Whether the dataplane's TUNs are others than before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Plugged {
    /// With the next publication.
    Changed,
    /// They are not.
    Same,
}

impl Daemon {
    /// Gives the dataplane the TUNs that were opened and takes away those of pods that have gone. A publication makes it so.
    pub(super) fn plug_tuns(&self) -> Plugged {
        // While it is being replaced they wait: its successor starts with them.
        let Ok(dataplane) = self.dataplane() else { return Plugged::Same };
        let store = &self.start.store;
        let inner = &mut *self.inner.borrow_mut();
        let wanted: BTreeSet<TunId> = inner.pods.list().filter_map(|pod| pod.tun()).collect();
        let mut plugged = Plugged::Same;
        for gone in dataplane.pod_tuns().into_iter().filter(|tun| !wanted.contains(&tun.id)) {
            dataplane.unplug(gone.id);
            // A handle that is kept would keep the pod's namespace as well.
            forget(store, gone.id);
            plugged = Plugged::Changed;
        }
        for (id, tun) in taken(&mut inner.pods, store) {
            match dataplane.plug(id, tun) {
                Ok(()) => plugged = Plugged::Changed,
                Err(error) => tracing::error!(%error, "a pod's TUN"),
            }
        }
        inner.note_closed();
        plugged
    }

    /// Opens the TUNs that are not in use yet, and names those that cannot be.
    pub(super) fn open_tuns(&self) {
        let in_use: Vec<TunId> = match self.dataplane() {
            Ok(dataplane) => dataplane.pod_tuns().into_iter().map(|tun| tun.id).collect(),
            Err(_) => return,
        };
        self.inner.borrow_mut().open_tuns(&in_use);
        if self.plug_tuns() == Plugged::Changed
            && let Ok(dataplane) = self.dataplane()
        {
            dataplane.publish_again();
        }
    }
}

/// The TUNs that a predecessor left open, then all others of this node's pods; each is kept for a successor from now on. Which of them cannot
/// be had, `pods` knows.
pub(super) fn begin(pods: &mut Pods, store: &Store) -> Vec<(TunId, PodTun)> {
    for fds in store.take_kind(names::POD_TUN) {
        if let Err(error) = pods.adopt(fds) {
            tracing::warn!(%error, "a pod's TUN that was left open");
        }
    }
    pods.open_tuns(&[]);
    taken(pods, store)
}

/// What was opened, with handles on it in the store.
fn taken(pods: &mut Pods, store: &Store) -> Vec<(TunId, PodTun)> {
    let opened = pods.take_opened();
    for (id, tun) in &opened {
        if let Err(error) = store.keep_all(&name(*id), tun.descriptors(), Keeper::Starter) {
            tracing::warn!(%error, "a pod's TUN is not kept for a successor");
        }
    }
    opened
}

fn forget(store: &Store, id: TunId) {
    if let Err(error) = store.forget(&name(id)) {
        tracing::warn!(%error, "a pod's TUN is kept though the pod has gone");
    }
}

fn name(id: TunId) -> String {
    format!("{}:{}", names::POD_TUN, id.number())
}

impl super::Inner {
    /// Opens the TUNs that are not `in_use`; what cannot be opened is a problem.
    pub(super) fn open_tuns(&mut self, in_use: &[TunId]) {
        self.pods.open_tuns(in_use);
        self.note_closed();
    }

    /// Names the pods whose TUN could not be opened.
    pub(super) fn note_closed(&mut self) {
        self.problems.retain(|problem| !problem.starts_with(PROBLEM));
        let closed = self.pods.closed();
        let told = closed.map(|(pod, error)| format!("{PROBLEM}: nothing reaches {}: {error}; delete the pod and let it be attached anew", pod.name));
        self.problems.extend(told.collect::<Vec<_>>());
    }
}
