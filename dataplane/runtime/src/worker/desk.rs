//! A worker's queues of the pods' TUNs: registered with its poll while they are in the published table, and read in turn.
//!
//! A worker follows the table ([`PodTuns::seats`]) when it is woken, which each publication does. All memory is there from its start. What it
//! lets go of is closed by the control side, which keeps a reference for as long as it takes.

use std::collections::VecDeque;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use podgate_core::verdict::WorkerId;

use crate::pod_tun::{PODS_MAX, PodTuns, Port};

/// The token of seat 0; those of the other seats follow.
pub(super) const FIRST_TOKEN: usize = 1 << 16;

/// A worker's seats.
pub(super) struct Desk {
    /// The table that it follows.
    version: u64,
    seats: Vec<Option<Arc<Port>>>,
    /// Seats whose TUN may have something to read, in the order of their turns.
    turns: VecDeque<usize>,
    /// Whether each seat has a turn.
    has_turn: Vec<bool>,
}

impl Desk {
    pub(super) fn new() -> Desk {
        Desk { version: 0, seats: vec![None; PODS_MAX], turns: VecDeque::with_capacity(PODS_MAX), has_turn: vec![false; PODS_MAX] }
    }

    /// Reads what `tuns` has for `worker` from now on, and nothing else.
    #[inline]
    pub(super) fn follow(&mut self, tuns: &PodTuns, worker: WorkerId, registry: &Registry) {
        if tuns.version() != self.version {
            self.version = tuns.version();
            self.change(tuns.seats(), worker, registry);
        }
    }

    #[cold]
    fn change(&mut self, wanted: &[Option<Arc<Port>>], worker: WorkerId, registry: &Registry) {
        for seat in 0..self.seats.len() {
            let wanted = wanted.get(seat).and_then(Option::as_ref);
            let same = match (&self.seats[seat], wanted) {
                (Some(ours), Some(wanted)) => Arc::ptr_eq(ours, wanted),
                (None, None) => true,
                _ => false,
            };
            if same {
                continue;
            }
            if let Some(gone) = self.seats[seat].take() {
                // It fails only for what was never registered.
                let _ = registry.deregister(&mut SourceFd(&gone.queue(worker).as_raw_fd()));
            }
            if let Some(new) = wanted {
                match registry.register(&mut SourceFd(&new.queue(worker).as_raw_fd()), Token(FIRST_TOKEN + seat), Interest::READABLE) {
                    Ok(()) => self.ready(seat),
                    Err(error) => new.failed(&error),
                }
                self.seats[seat] = Some(Arc::clone(new));
            }
        }
    }

    /// The TUN of this seat may have something to read.
    #[inline]
    pub(super) fn ready(&mut self, seat: usize) {
        if self.has_turn.get(seat) == Some(&false) {
            self.has_turn[seat] = true;
            self.turns.push_back(seat);
        }
    }

    /// After a restart nobody knows what was read to its end.
    pub(super) fn all_ready(&mut self) {
        (0..self.seats.len()).filter(|seat| self.seats[*seat].is_some()).collect::<Vec<_>>().into_iter().for_each(|seat| self.ready(seat));
    }

    /// How many have a turn.
    #[inline]
    pub(super) fn turns(&self) -> usize {
        self.turns.len()
    }

    /// Whose turn it is, and its seat; its turn is over with that.
    #[inline]
    pub(super) fn next(&mut self) -> Option<(usize, &Port)> {
        let seat = self.turns.pop_front()?;
        self.has_turn[seat] = false;
        self.seats[seat].as_deref().map(|port| (seat, port))
    }
}
