//! A TUN inside a pod's own namespace (attach mode tun), with a queue for each worker.
//!
//! As with the TUN of all pods, the kernel learns: what a worker writes leads the reply to the same worker's queue, so that both directions of a
//! connection settle on one worker, and none has to be woken for the other.
//!
//! Nothing of it is in the gateway's namespace: no veth, no rule, no neighbour. What was sent by it came from that pod, since nobody else can
//! send there; so the descriptor tells who a sender is. The device is persistent: a successor opens its queues again, by the namespace, or
//! takes over the descriptors from whoever kept them.
//!
//! `PodTuns` is what the workers see: immutable, published together with the snapshot ([`crate::publish`]), so that a number that a
//! snapshot names is in it. A descriptor is closed by the publisher's thread, once no table and no worker has it any more.
//!
//! Read first: `tun.rs` beside this. The open descriptor keeps the namespace it was opened in (drivers/net/tun.c, `tun_chr_open`): a pod's
//! namespace whose every process and mount is gone lives on until it is detached.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

use podgate_core::fold::FoldMap;
use podgate_core::verdict::{TunId, WorkerId};

use crate::netns::{Netns, Question};
use crate::tun::{Queue, Removed, Tun, TunError, Wanted};

/// Pods that workers can read: the memory for them is there from their start.
pub const PODS_MAX: usize = 4_096;

/// The TUN of one pod, open.
#[derive(Debug)]
pub struct PodTun {
    queues: Vec<Queue>,
    netns: Netns,
}

impl PodTun {
    /// Makes the interface `name` in the pod's namespace, with a queue for each of so many workers; it is down.
    pub fn make(name: &str, workers: u16, netns: &Netns) -> Result<PodTun, TunError> {
        PodTun::open(name, workers, netns, Wanted::New)
    }

    /// Opens the one that an earlier process made.
    pub fn reopen(name: &str, workers: u16, netns: &Netns) -> Result<PodTun, TunError> {
        PodTun::open(name, workers, netns, Wanted::Found)
    }

    /// Takes over the queues of one that is open, of a predecessor or of whoever kept them: as many as there are `workers`, and opens those that
    /// are missing. What of the `others` is no queue of the `first` one's device is closed.
    pub fn adopt(first: OwnedFd, others: impl IntoIterator<Item = OwnedFd>, workers: u16) -> Result<PodTun, TunError> {
        let queue = Queue::adopt(first)?;
        let failed =
            |error| TunError::Io { name: queue.name().to_owned(), step: "finding its namespace (SIOCGSKNS)", source: io::Error::other(error) };
        // The namespace that the queue was opened in, which is the device's: TUN answers the sockets' question.
        let netns = Netns::of(queue.as_fd(), Question::Socket).map_err(failed)?;
        let entered = |source| TunError::Io { name: queue.name().to_owned(), step: "entering its namespace", source };
        let further = usize::from(workers.saturating_sub(1));
        let mut siblings: Vec<Queue> = others.into_iter().filter_map(|fd| queue.sibling(fd, &netns)).take(further).collect();
        let missing = further - siblings.len();
        siblings.extend(netns.run(|| (0..missing).map(|_| queue.further()).collect::<Result<Vec<_>, _>>()).map_err(entered)??);
        let queues = std::iter::once(queue).chain(siblings).collect();
        Ok(PodTun { queues, netns })
    }

    /// Its queues, for whoever keeps them for a successor.
    pub fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.queues.iter().map(AsFd::as_fd)
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        self.queues[0].name()
    }

    /// The namespace that it is in.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Deletes the interface `name` of a pod, whoever holds its queue. An interface of another kind is not touched.
    pub fn remove(name: &str, netns: &Netns) -> Result<Removed, TunError> {
        Tun::remove(name, netns)
    }

    fn open(name: &str, workers: u16, netns: &Netns, wanted: Wanted) -> Result<PodTun, TunError> {
        let failed = |source| TunError::Io { name: name.to_owned(), step: "entering its namespace", source };
        let queues = netns.run(|| Queue::open_for_pod(name, workers, wanted)).map_err(failed)??;
        Ok(PodTun { queues, netns: netns.try_clone().map_err(failed)? })
    }
}

/// A pod's TUN in use.
#[derive(Debug)]
pub(crate) struct Port {
    pub(crate) id: TunId,
    tun: PodTun,
    /// Its seat at every worker's desk.
    seat: usize,
    /// errno of the last read that failed for another reason than that there was nothing; 0 if none did. Relaxed: it stands for itself.
    read_error: AtomicI32,
    /// How many reads failed so.
    read_errors: AtomicU64,
}

impl Port {
    /// The queue that `worker` reads and writes.
    #[inline]
    pub(crate) fn queue(&self, worker: WorkerId) -> &Queue {
        &self.tun.queues[usize::from(worker.0)]
    }

    /// Notes that a read failed.
    pub(crate) fn failed(&self, error: &io::Error) {
        self.read_error.store(error.raw_os_error().unwrap_or(libc::EIO), Ordering::Relaxed);
        self.read_errors.fetch_add(1, Ordering::Relaxed);
    }
}

/// The pods' TUNs as of one publication.
#[derive(Clone, Debug, Default)]
pub(crate) struct PodTuns {
    /// It grows by one with each change; 0 for an empty table.
    version: u64,
    ports: FoldMap<TunId, Arc<Port>>,
    /// The same by seat.
    seats: Vec<Option<Arc<Port>>>,
}

impl PodTuns {
    /// The TUN of that number.
    #[inline]
    pub(crate) fn get(&self, id: TunId) -> Option<&Port> {
        self.ports.get(&id).map(|port| &**port)
    }

    /// What tells it from the table before.
    #[inline]
    pub(crate) fn version(&self) -> u64 {
        self.version
    }

    /// What each worker reads, by seat.
    pub(crate) fn seats(&self) -> &[Option<Arc<Port>>] {
        &self.seats
    }
}

/// One pod's TUN, for status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodTunStatus {
    /// Which.
    pub id: TunId,
    /// errno of the last read that failed for another reason than that there was nothing to read; 0 if none did. EBADFD (77) means that the
    /// interface was deleted.
    pub read_error: i32,
    /// How many reads failed so.
    pub read_errors: u64,
}

/// Why a pod's TUN cannot be taken into use.
#[derive(Debug, thiserror::Error)]
pub enum PodTunError {
    /// Its number is another's.
    #[error("the number {} is another pod's already", .0.number())]
    Taken(TunId),
    /// Workers have as many as they can read.
    #[error("{PODS_MAX} pods in mode tun are as many as there can be; attach further ones with mode veth")]
    Full,
    /// It has not a queue for each worker.
    #[error("it has {queues} queues for {workers} workers: open it with one for each")]
    Queues {
        /// Its queues.
        queues: usize,
        /// The workers.
        workers: u16,
    },
}

/// The control side of [`PodTuns`]: the next publication's.
#[derive(Debug)]
pub(crate) struct Patchbay {
    next: Arc<PodTuns>,
    workers: u16,
    /// Taken out, and perhaps still in a worker's hands.
    leaving: Vec<Arc<Port>>,
    /// Packets that found each queue full, as far as was looked; and those of the TUNs that have gone: a counter never falls.
    queue_full: FoldMap<TunId, u64>,
    queue_full_before: u64,
}

impl Patchbay {
    pub(crate) fn new(workers: u16) -> Patchbay {
        Patchbay { next: Arc::default(), workers, leaving: Vec::new(), queue_full: FoldMap::default(), queue_full_before: 0 }
    }

    /// What the next publication is to have.
    pub(crate) fn table(&self) -> Arc<PodTuns> {
        Arc::clone(&self.next)
    }

    /// Takes a TUN into use.
    pub(crate) fn insert(&mut self, id: TunId, tun: PodTun) -> Result<(), PodTunError> {
        if self.next.ports.contains_key(&id) {
            return Err(PodTunError::Taken(id));
        }
        if tun.queues.len() != usize::from(self.workers) {
            return Err(PodTunError::Queues { queues: tun.queues.len(), workers: self.workers });
        }
        if self.next.ports.len() == PODS_MAX {
            return Err(PodTunError::Full);
        }
        let next = Arc::make_mut(&mut self.next);
        let seats = &mut next.seats;
        let seat = seats.iter().position(Option::is_none).unwrap_or(seats.len());
        let (read_error, read_errors) = (AtomicI32::new(0), AtomicU64::new(0));
        let port = Arc::new(Port { id, tun, seat, read_error, read_errors });
        seats.resize(seats.len().max(seat + 1), None);
        seats[seat] = Some(Arc::clone(&port));
        next.ports.insert(id, port);
        next.version += 1;
        Ok(())
    }

    /// Takes a TUN out of use: from the next publication on nobody reads or writes it.
    pub(crate) fn remove(&mut self, id: TunId) {
        if !self.next.ports.contains_key(&id) {
            return;
        }
        let next = Arc::make_mut(&mut self.next);
        next.version += 1;
        if let Some(port) = next.ports.remove(&id) {
            next.seats[port.seat] = None;
            self.leaving.push(port);
            self.queue_full_before += self.queue_full.remove(&id).unwrap_or(0);
        }
    }

    /// Closes what nobody has any more; true if some still are.
    pub(crate) fn close_left(&mut self) -> bool {
        // Tables and workers hold counted references, and nobody makes one from what has been taken out of the table.
        self.leaving.retain(|port| Arc::strong_count(port) > 1);
        !self.leaving.is_empty()
    }

    pub(crate) fn status(&self) -> Vec<PodTunStatus> {
        let status = |port: &Arc<Port>| PodTunStatus {
            id: port.id,
            read_error: port.read_error.load(Ordering::Relaxed),
            read_errors: port.read_errors.load(Ordering::Relaxed),
        };
        self.next.ports.values().map(status).collect()
    }

    /// How many packets found the queue of a pod's TUN full.
    pub(crate) fn queue_full(&mut self) -> u64 {
        for port in self.next.ports.values() {
            // Of one whose interface is gone nothing more is known.
            if let Ok(Some(losses)) = Tun::losses(port.tun.name(), &port.tun.netns) {
                self.queue_full.insert(port.id, losses.queue_full);
            }
        }
        self.queue_full_before + self.queue_full.values().sum::<u64>()
    }
}

impl Drop for Patchbay {
    /// With the workers gone the queues are closed at once, not when the last replaced table is freed: whoever comes next opens them again.
    fn drop(&mut self) {
        for port in self.next.ports.values().chain(&self.leaving) {
            for error in port.tun.queues.iter().filter_map(|queue| queue.vacate().err()) {
                eprintln!("a queue of {} stays open: {error}", port.tun.name());
            }
        }
    }
}
