//! Transactions while the cluster changes: what a change costs those whom it does not concern.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use super::transactions::{Pace, rr};
use super::{Ends, Sample, quantile};

/// Transactions in a second, on this many connections that stay.
const RATE: f64 = 2_000.0;
const CONNECTIONS: usize = 32;

/// How long a change is left in force before the next.
const INTERVAL: Duration = Duration::from_millis(200);

/// Measures in peace, then while `change` is called again and again.
pub fn measure(ends: &Ends<'_>, duration: Duration, change: impl Fn(u64) -> anyhow::Result<()> + Sync) -> anyhow::Result<Sample> {
    let steady = rr(ends, CONNECTIONS, Pace::Rate(RATE), duration)?;
    let (changes, over) = (AtomicU64::new(0), super::Phase::default());
    let changing = thread::scope(|scope| {
        let changer = scope.spawn(|| -> anyhow::Result<()> {
            while !over.over() {
                change(changes.fetch_add(1, Ordering::Relaxed))?;
                thread::sleep(INTERVAL);
            }
            Ok(())
        });
        let seen = rr(ends, CONNECTIONS, Pace::Rate(RATE), duration);
        over.set(2);
        changer.join().expect("a changer does not panic")?;
        seen
    })?;
    let [before, during] = [&steady, &changing].map(|seen| quantile(&seen.latencies, 0.999));
    Ok(Sample(vec![
        ("p99.9 changing/steady", during / before),
        ("p99.9 µs steady", before),
        ("p99.9 µs changing", during),
        ("p50 µs steady", quantile(&steady.latencies, 0.5)),
        ("p50 µs changing", quantile(&changing.latencies, 0.5)),
        ("changes", changes.load(Ordering::Relaxed) as f64),
    ]))
}
