//! Twice what the gateway can carry: what still arrives, and whether those who share the node with the flood are still heard.

use std::thread;
use std::time::Duration;

use super::datagrams::{Path, Shape, search};
use super::responder::Responder;
use super::transactions::{Pace, rr_with};
use super::{Ends, Sample, quantile, warm_up};

/// Traffic that must stay alive, and what its figures are called: how long its transactions take at most (p99), and how many of a hundred are missing.
#[derive(Clone, Debug)]
pub struct Probe<'a> {
    /// Who asks whom.
    pub ends: Ends<'a>,
    /// The units of its two figures.
    pub units: [&'static str; 2],
}

/// Transactions of each probe in a second.
const RATE: f64 = 100.0;

/// Finds the most that arrives at any rate, then offers twice as much for `duration` while `probes` go on.
pub fn measure(ends: &Ends<'_>, shape: Shape, probes: &[Probe<'_>], duration: Duration) -> anyhow::Result<Sample> {
    let peak = search(ends, shape, duration)?.peak();
    let path = Path::open(ends, shape)?;
    let servers: Vec<_> = probes.iter().map(|probe| probe.ends.first()).collect();
    let _responder = Responder::start(&servers)?;
    thread::scope(|scope| -> anyhow::Result<Sample> {
        let running: Vec<_> = probes.iter().map(|probe| scope.spawn(|| rr_with(&probe.ends, 1, Pace::Rate(RATE), duration))).collect();
        // The flood begins before the probes are counted and ends after them.
        let step = path.run(peak * 2.0, duration + warm_up(duration) * 2)?;
        let mut figures = vec![("goodput/peak", step.per_s() / peak), ("offered/peak", step.offered_per_s() / peak), ("peak packets/s", peak)];
        for (probe, running) in probes.iter().zip(running) {
            let seen = running.join().expect("a probe does not panic")?;
            let meant = RATE * seen.spent.elapsed.as_secs_f64();
            let missing = (1.0 - seen.done as f64 / meant).max(0.0) * 100.0;
            figures.extend(probe.units.into_iter().zip([quantile(&seen.latencies, 0.99) / 1e3, missing]));
        }
        Ok(Sample(figures))
    })
}
