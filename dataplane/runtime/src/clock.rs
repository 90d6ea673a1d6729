//! The packet path's clock, read once for each batch.
//!
//! `CLOCK_BOOTTIME` (`clock_gettime(2)`): it goes on while the machine sleeps and over a restart of the process, so that the ages in
//! the mapped flow table stay right, and no change of the wall clock reaches it. The kernel serves it from the vDSO, without a system call.

use podgate_core::flow::Now;

/// A reading of the boot clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Instant {
    ns: u64,
}

impl Instant {
    /// Reads the clock.
    #[inline]
    pub fn read() -> Instant {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: `time` is a valid timespec for the call to fill; the clock's number is one that every Linux since 2.6.39 knows.
        let result = unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &mut time) };
        debug_assert_eq!(result, 0, "CLOCK_BOOTTIME is always there");
        Instant { ns: time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64 }
    }

    /// The same moment as the pipeline counts it.
    #[inline]
    pub fn now(self) -> Now {
        Now(self.ns / 1_000_000)
    }

    /// Nanoseconds from `earlier` to this reading; 0 if it is not earlier.
    #[inline]
    pub fn ns_since(self, earlier: Instant) -> u64 {
        self.ns.saturating_sub(earlier.ns)
    }

    /// Nanoseconds since boot.
    #[inline]
    pub fn ns(self) -> u64 {
        self.ns
    }

    /// Milliseconds since boot.
    #[inline]
    pub fn ms(self) -> u64 {
        self.ns / 1_000_000
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_never_goes_back_and_agrees_with_the_machines_uptime() {
        let first = Instant::read();
        let second = Instant::read();
        assert!(second >= first);
        let uptime = std::fs::read_to_string("/proc/uptime").unwrap();
        let uptime_ms = (uptime.split(' ').next().unwrap().parse::<f64>().unwrap() * 1000.0) as u64;
        assert!(uptime_ms.abs_diff(second.now().0) < 5_000, "{uptime_ms} against {:?}", second.now());
    }
}
