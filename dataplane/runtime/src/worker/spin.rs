//! How long a worker looks for more before it sleeps.
//!
//! To be woken costs a packet some microseconds: a signal to another processor, which has to leave its idle state, and a turn of the scheduler.
//! So a worker that slept a moment too soon looks around for twice as long the next time, up to a maximum; and one that looked in vain, because
//! its next packet came long afterwards, sleeps at once from then on. At most the maximum is lost for each packet.
//!
//! Read first: halt polling in Linux `virt/kvm/kvm_main.c` (`kvm_vcpu_halt`, `grow_halt_poll_ns`, `shrink_halt_poll_ns`).

use std::time::Duration;

/// The first time that it looks around, in nanoseconds: as `halt_poll_ns_grow_start`.
const START_NS: u64 = 10_000;

/// For how long one worker spins.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spin {
    max_ns: u64,
    window_ns: u64,
}

impl Spin {
    /// At most for `max` at a time; zero switches it off.
    pub(crate) fn new(max: Duration) -> Spin {
        Spin { max_ns: u64::try_from(max.as_nanos()).unwrap_or(u64::MAX), window_ns: 0 }
    }

    /// Whether it never spins.
    pub(crate) fn is_off(&self) -> bool {
        self.max_ns == 0
    }

    /// For how long the next time, in nanoseconds.
    pub(crate) fn window_ns(&self) -> u64 {
        self.window_ns
    }

    /// The worker had nothing to do for so long; then something came.
    pub(crate) fn idled(&mut self, idle_ns: u64) {
        if idle_ns > self.max_ns {
            self.window_ns = 0;
        } else if idle_ns > self.window_ns {
            self.window_ns = (2 * self.window_ns).clamp(START_NS.min(self.max_ns), self.max_ns);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_spins_longer_while_that_would_have_helped_and_not_at_all_once_it_would_not() {
        let mut spin = Spin::new(Duration::from_micros(50));
        assert_eq!(spin.window_ns(), 0, "nobody knows yet whether packets are frequent");
        for (idle, window) in [(30_000, 10_000), (30_000, 20_000), (30_000, 40_000), (30_000, 40_000), (45_000, 50_000), (49_000, 50_000)] {
            spin.idled(idle);
            assert_eq!(spin.window_ns(), window, "after {idle} ns");
        }
        spin.idled(2_000_000);
        assert_eq!(spin.window_ns(), 0);
        spin.idled(5_000);
        assert_eq!(spin.window_ns(), 10_000);
    }

    #[test]
    fn a_small_maximum_is_kept_and_none_is_off() {
        let mut spin = Spin::new(Duration::from_micros(3));
        spin.idled(1_000);
        assert_eq!(spin.window_ns(), 3_000);
        let mut off = Spin::new(Duration::ZERO);
        off.idled(0);
        assert!(off.is_off() && off.window_ns() == 0);
    }
}
