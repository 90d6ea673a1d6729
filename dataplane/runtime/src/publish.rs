//! Snapshot publication: one root pointer, swapped by the control side, pinned by each worker once for each batch.
//!
//! [`crossbeam::epoch`] decides when no worker can still hold what was replaced. Its deferred work runs on whichever thread happens to
//! collect, which may be a worker; freeing a snapshot of ten thousand services there would stall packets. So the deferred work only
//! links what was replaced into a list, and the publisher's thread frees it ([`Publisher::reclaim`]).
//!
//! Each reader notes the generation that it pinned last. When every live reader has noted generation *g*, no packet is judged by an
//! older one: that is how the control side knows that a removed pod's address may be used again.

use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

use crossbeam::epoch::{self, Atomic, Guard, Owned, Shared};
use crossbeam::utils::CachePadded;
use podgate_core::snapshot::{Generation, Snapshot};

use crate::pod_tun::PodTuns;

/// What workers see, under the root pointer, and a link for the list of those that are waiting to be freed.
struct Node {
    snapshot: Arc<Snapshot>,
    /// The pods' TUNs that it names, and perhaps more.
    tuns: Arc<PodTuns>,
    next: AtomicPtr<Node>,
}

/// The tables of one batch.
#[derive(Clone, Copy)]
pub(crate) struct Tables<'a> {
    pub(crate) snapshot: &'a Snapshot,
    pub(crate) tuns: &'a PodTuns,
}

struct Root {
    current: Atomic<Node>,
    /// Replaced snapshots that no reader can hold any more: a Treiber stack, pushed by any thread, taken whole by the publisher.
    retired: AtomicPtr<Node>,
    seen: Box<[CachePadded<AtomicU64>]>,
}

/// The side that publishes. There is one.
pub struct Publisher {
    root: Arc<Root>,
}

/// The side that reads: one for each worker, to be taken to its thread.
pub struct Reader {
    root: Arc<Root>,
    index: usize,
}

/// A reader on its thread. It holds the snapshot that it looked at last until it looks again.
pub struct Session<'a> {
    reader: &'a Reader,
    guard: Guard,
}

/// A publisher of `first` and `readers` readers of it. The snapshot is known before the first packet is read.
pub fn channel(first: Arc<Snapshot>, readers: usize) -> (Publisher, Vec<Reader>) {
    channel_with(first, Arc::default(), readers)
}

/// The same, with the pods' TUNs.
pub(crate) fn channel_with(first: Arc<Snapshot>, tuns: Arc<PodTuns>, readers: usize) -> (Publisher, Vec<Reader>) {
    let root = Arc::new(Root {
        current: Atomic::new(Node { snapshot: first, tuns, next: AtomicPtr::new(ptr::null_mut()) }),
        retired: AtomicPtr::new(ptr::null_mut()),
        seen: (0..readers).map(|_| CachePadded::new(AtomicU64::new(0))).collect(),
    });
    let readers = (0..readers).map(|index| Reader { root: Arc::clone(&root), index }).collect();
    (Publisher { root }, readers)
}

impl Publisher {
    /// Makes `next` the snapshot of every batch that starts from now on.
    ///
    /// # Panics
    /// If its generation is not above the one in force: a generation names one snapshot.
    pub fn publish(&mut self, next: Arc<Snapshot>) {
        self.publish_with(next, Arc::default());
    }

    /// The same, with the pods' TUNs.
    pub(crate) fn publish_with(&mut self, next: Arc<Snapshot>, tuns: Arc<PodTuns>) {
        let generation = next.generation;
        assert!(generation > self.generation(), "generation {} is not above {}", generation.0, self.generation().0);
        self.replace(next, tuns);
    }

    /// Publishes the snapshot in force once more, with other TUNs.
    pub(crate) fn publish_again(&mut self, tuns: Arc<PodTuns>) {
        self.replace(self.current(), tuns);
    }

    fn replace(&mut self, next: Arc<Snapshot>, tuns: Arc<PodTuns>) {
        let guard = epoch::pin();
        let node = Owned::new(Node { snapshot: next, tuns, next: AtomicPtr::new(ptr::null_mut()) });
        // AcqRel: Release pairs with the Acquire load in `Session::refresh`, so that a reader sees the whole snapshot; Acquire so that the
        // node that comes back is whole for us.
        let before = self.root.current.swap(node, Ordering::AcqRel, &guard);
        let root = Arc::clone(&self.root);
        let before = Retired(before.as_raw().cast_mut());
        // SAFETY: `before` was taken from the root, so no reader that pins from now on finds it, and the epoch runs this only after
        // every reader that pinned earlier has gone. The closure owns all that it touches (`root` is counted), so it may run on any
        // thread, at any later time. It is pushed once, since it was swapped out once.
        unsafe { guard.defer_unchecked(move || root.retire(before)) };
        guard.flush();
        drop(guard);
        self.reclaim();
    }

    /// The snapshot in force.
    pub fn current(&self) -> Arc<Snapshot> {
        let guard = epoch::pin();
        // SAFETY: the root is never null, and only `publish`, which needs `&mut self`, retires what it points to.
        let node = unsafe { self.root.current.load(Ordering::Acquire, &guard).deref() };
        Arc::clone(&node.snapshot)
    }

    /// The generation in force.
    pub fn generation(&self) -> Generation {
        self.current().generation
    }

    /// The generation that each reader pinned last; 0 for one that has not read yet.
    pub fn seen(&self) -> Vec<Generation> {
        // Acquire pairs with the Release store in `Session::refresh`: whoever sees the number also sees what was done with older ones.
        self.root.seen.iter().map(|seen| Generation(seen.load(Ordering::Acquire))).collect()
    }

    /// Frees the replaced snapshots that no reader holds any more, on this thread; returns how many.
    pub fn reclaim(&mut self) -> usize {
        let guard = epoch::pin();
        guard.flush();
        drop(guard);
        self.root.free_retired()
    }
}

/// A retired node's address on its way to the list.
struct Retired(*mut Node);

// SAFETY: a `Node` is counted references to a `Snapshot` and to TUNs' descriptors, which are `Send + Sync`, and an atomic; the pointer is the only one left.
unsafe impl Send for Retired {}

impl Root {
    fn retire(&self, retired: Retired) {
        let node = retired.0;
        let mut head = self.retired.load(Ordering::Relaxed);
        loop {
            // SAFETY: `node` is ours alone until the exchange below succeeds.
            unsafe { (*node).next.store(head, Ordering::Relaxed) };
            // Release pairs with the Acquire swap in `free_retired`: whoever takes the list sees the links.
            match self.retired.compare_exchange_weak(head, node, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => return,
                Err(now) => head = now,
            }
        }
    }

    fn free_retired(&self) -> usize {
        let mut node = self.retired.swap(ptr::null_mut(), Ordering::Acquire);
        let mut freed = 0;
        while !node.is_null() {
            // SAFETY: nodes in the list were made by `Owned::new` (a `Box`), no reader holds them, and the swap above made the whole
            // list ours: each is freed once.
            let owned = unsafe { Box::from_raw(node) };
            node = owned.next.load(Ordering::Relaxed);
            freed += 1;
        }
        freed
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        self.free_retired();
        // SAFETY: `&mut self`: the publisher, every reader and every deferred closure are gone, each of which held a reference.
        let current = unsafe { self.current.load(Ordering::Acquire, epoch::unprotected()) };
        if !current.is_null() {
            // SAFETY: as above; the root owns what it points to.
            drop(unsafe { current.into_owned() });
        }
    }
}

impl Reader {
    /// Registers the calling thread with the epoch, which allocates: before it reads its first packet.
    pub fn enter(&self) -> Session<'_> {
        Session { reader: self, guard: epoch::pin() }
    }
}

impl Session<'_> {
    /// Lets go of the snapshot that was looked at before and takes the one in force, noting its generation: once for each batch. No
    /// allocation, no system call.
    ///
    /// The guard is renewed, never dropped and made anew: `pin` would now and then free what others deferred, on this thread, which
    /// `repin` does not. So a reader that waits for packets holds what it saw last; it looks again within a tick.
    #[inline]
    pub fn refresh(&mut self) -> &Snapshot {
        self.tables().snapshot
    }

    /// The same, with the pods' TUNs beside the snapshot.
    #[inline]
    pub(crate) fn tables(&mut self) -> Tables<'_> {
        self.guard.repin();
        // Acquire pairs with the AcqRel swap in `Publisher::publish`.
        let node: Shared<'_, Node> = self.reader.root.current.load(Ordering::Acquire, &self.guard);
        // SAFETY: the root is never null, and the guard keeps the node for as long as this borrow of the session lasts.
        let node: &Node = unsafe { node.deref() };
        // Release pairs with the Acquire load in `Publisher::seen`.
        self.reader.root.seen[self.reader.index].store(node.snapshot.generation.0, Ordering::Release);
        Tables { snapshot: &node.snapshot, tuns: &node.tuns }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::atomic::AtomicBool;

    use podgate_core::fib::{PodTable, PrefixMap};
    use podgate_core::service::ServiceTable;
    use podgate_core::snapshot::{NodeTables, OutsideToPods};

    use super::*;

    /// A snapshot of a node without pods, peers or services.
    pub(crate) fn empty(generation: u64) -> Snapshot {
        Snapshot {
            generation: Generation(generation),
            node: Arc::new(NodeTables {
                addresses: Vec::new(),
                gateway_v4: None,
                gateway_v6: None,
                node_pod_cidrs: Vec::new(),
                cluster_pod_cidrs: Vec::new(),
                service_cidrs: Vec::new(),
                node_ports: 30000..=32767,
                node_port_addresses: Vec::new(),
                masquerade: None,
                snat_ports: 1024..=65535,
                overlay_port: 4790,
                overlay_vni: 1,
                direct_return: None,
                outside_mtu: 1500,
                outside_to_pods: OutsideToPods::Allow,
                timeouts: Default::default(),
                probe_token: 1,
                workers: 1,
            }),
            services: ServiceTable::default(),
            pods: PodTable::default(),
            routes: Arc::new(PrefixMap::default()),
            peers: Arc::new([]),
            peer_by_underlay: Arc::new([]),
        }
    }

    #[test]
    fn readers_see_generations_in_order_and_each_snapshot_whole_until_they_let_go() {
        const PUBLICATIONS: u64 = 2_000;
        let mut first = empty(1);
        Arc::make_mut(&mut first.node).overlay_vni = 1;
        let (mut publisher, readers) = channel(Arc::new(first), 3);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for reader in readers {
                let stop = &stop;
                scope.spawn(move || {
                    let mut session = reader.enter();
                    let mut last = Generation(0);
                    while !stop.load(Ordering::Acquire) {
                        let pinned = session.refresh();
                        assert!(pinned.generation >= last, "{:?} after {last:?}", pinned.generation);
                        last = pinned.generation;
                        // The port was written with the generation: memory that was freed and used again would disagree.
                        for _ in 0..50 {
                            assert_eq!(u64::from(pinned.node.overlay_vni), last.0);
                        }
                    }
                });
            }
            for generation in 2..=PUBLICATIONS {
                let mut next = empty(generation);
                Arc::make_mut(&mut next.node).overlay_vni = generation as u32;
                publisher.publish(Arc::new(next));
                assert_eq!(publisher.generation(), Generation(generation));
            }
            while publisher.seen().iter().any(|seen| *seen != Generation(PUBLICATIONS)) {
                std::thread::yield_now();
            }
            stop.store(true, Ordering::Release);
        });
    }

    #[test]
    fn a_replaced_snapshot_is_freed_once_its_last_reader_has_let_go_and_not_before() {
        let first = Arc::new(empty(1));
        let weak = Arc::downgrade(&first);
        let (mut publisher, mut readers) = channel(first, 1);
        let reader = readers.pop().unwrap();
        let mut session = reader.enter();
        let held = session.refresh();
        publisher.publish(Arc::new(empty(2)));
        for _ in 0..100 {
            publisher.reclaim();
        }
        assert_eq!(weak.strong_count(), 1, "a reader still holds it");
        assert_eq!(held.generation, Generation(1));
        assert_eq!(publisher.seen(), [Generation(1)]);
        assert_eq!(session.refresh().generation, Generation(2));
        assert_eq!(publisher.seen(), [Generation(2)]);
        // Another test's thread may be pinned at this moment: the epoch is the process's.
        while weak.strong_count() > 0 {
            session.refresh();
            publisher.reclaim();
            std::thread::yield_now();
        }
    }

    #[test]
    #[should_panic(expected = "is not above")]
    fn a_generation_is_never_published_twice() {
        let (mut publisher, _readers) = channel(Arc::new(empty(7)), 1);
        publisher.publish(Arc::new(empty(7)));
    }
}
