//! How long the source waits for what. All of it is measured by the monotonic clock: a jump of the wall clock changes nothing.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

/// Times and sizes of a Kubernetes source.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// How long one watch lasts, in seconds: the server ends it then, and it is taken up again where it ended. A connection that died in
    /// silence is noticed at the end of the watch, so this and [`Timing::grace`] together are how long that takes.
    pub watch_seconds: u32,
    /// How much longer than that is waited for the server to end it.
    pub grace: Duration,
    /// How long an answer may take: a page of a list, or the beginning of a watch.
    pub answer: Duration,
    /// The first wait after a failure. It doubles with each further one.
    pub backoff_min: Duration,
    /// The longest wait.
    pub backoff_max: Duration,
    /// How long after a list that lacks more than half of what is known a second one is asked for.
    pub second_list: Duration,
    /// After this long everything is listed again, though nothing is known to be wrong.
    pub audit: Duration,
    /// How many objects one page of a list may have.
    pub page: u32,
}

impl Default for Timing {
    fn default() -> Timing {
        Timing {
            watch_seconds: 30,
            grace: Duration::from_secs(3),
            answer: Duration::from_secs(30),
            backoff_min: Duration::from_millis(250),
            backoff_max: Duration::from_secs(30),
            second_list: Duration::from_secs(1),
            // It guards against faults that nobody knows of; a list of everything, from every node, costs the server something.
            audit: Duration::from_secs(1800),
            // As kube-apiserver's own clients: an answer of a few hundred kilobytes.
            page: 500,
        }
    }
}

/// Numbers that keep the nodes of a cluster from asking all at once: xorshift64 (Marsaglia 2003, p. 4).
#[derive(Clone, Debug)]
pub(super) struct Jitter(u64);

impl Jitter {
    /// From `seed`, or from the machine's own chance.
    pub fn new(seed: Option<u64>) -> Jitter {
        Jitter(seed.unwrap_or_else(|| RandomState::new().hash_one(0)).max(1))
    }

    /// Another one, which goes its own way.
    pub fn split(&mut self) -> Jitter {
        Jitter(self.next().wrapping_mul(0x9e37_79b9_7f4a_7c15).max(1))
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Between half of `duration` and all of it.
    pub fn within(&mut self, duration: Duration) -> Duration {
        let half = duration / 2;
        let nanos = u64::try_from(half.as_nanos()).unwrap_or(u64::MAX);
        half + Duration::from_nanos(if nanos == 0 { 0 } else { self.next() % nanos })
    }
}

/// Failures in a row, and how long to wait after them.
#[derive(Clone, Debug)]
pub(super) struct Backoff {
    min: Duration,
    max: Duration,
    failures: u32,
    jitter: Jitter,
}

impl Backoff {
    pub fn new(timing: &Timing, jitter: Jitter) -> Backoff {
        Backoff { min: timing.backoff_min, max: timing.backoff_max, failures: 0, jitter }
    }

    /// All is well again.
    pub fn reset(&mut self) {
        self.failures = 0;
    }

    /// Notes a failure and waits.
    pub async fn wait(&mut self) {
        let longest = self.min.saturating_mul(1 << self.failures.min(16)).min(self.max);
        self.failures = self.failures.saturating_add(1);
        tokio::time::sleep(self.jitter.within(longest)).await;
    }

    /// Waits about as long as `duration`.
    pub async fn about(&mut self, duration: Duration) {
        tokio::time::sleep(self.jitter.within(duration)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn waits_double_up_to_the_longest_and_differ_from_node_to_node() {
        let timing = Timing::default();
        let mut backoff = Backoff::new(&timing, Jitter::new(Some(7)));
        let mut waits = Vec::new();
        for _ in 0..12 {
            let start = tokio::time::Instant::now();
            backoff.wait().await;
            waits.push(start.elapsed());
        }
        assert!(waits[0] >= timing.backoff_min / 2 && waits[0] <= timing.backoff_min + Duration::from_millis(1), "{waits:?}");
        assert!(waits[11] >= timing.backoff_max / 2 && waits[11] <= timing.backoff_max + Duration::from_millis(1), "{waits:?}");
        let mut other = Backoff::new(&timing, Jitter::new(Some(8)));
        let start = tokio::time::Instant::now();
        other.wait().await;
        assert_ne!(start.elapsed(), waits[0]);
        backoff.reset();
        let start = tokio::time::Instant::now();
        backoff.wait().await;
        assert!(start.elapsed() <= timing.backoff_min + Duration::from_millis(1));
    }
}
