//! Workloads without devices: the pipeline by workers and by flows, and the control side.

use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::ensure;
use podgate_core::addr::protocol;
use podgate_core::packet::{Checksum, Gso, Ingress, Offload};
use podgate_core::testing::flags::{ACK, SYN};
use podgate_core::verdict::Verdict;

use super::load::Sample;
use super::subject::Subject;
use crate::cpu_time::thread_cpu_time;
use crate::programming::{Programming, resident, timed};
use crate::world::{Family, Traffic, World, to_services};

const PLAIN: Offload = Offload { checksum: Checksum::Full, gso: Gso::None };
const BATCH: usize = 32;

/// Flows of the curve by workers, together.
const FLOWS: u32 = 10_000;

/// One endpoint's changes in a measurement.
const CHANGES: u32 = 50;

/// How many of them come each second where they come by the clock.
const CHANGES_A_SECOND: u32 = 200;

/// Measures `subject`, one of those without devices.
pub fn measure(subject: Subject, duration: Duration) -> anyhow::Result<Sample> {
    match subject {
        Subject::Workers(workers) => pipeline(workers, FLOWS, duration),
        Subject::Flows(flows) => pipeline(1, flows, duration),
        Subject::Compiler(services) => programming(services, duration),
        other => anyhow::bail!("{} is not in memory", other.name()),
    }
}

/// Flow hits of 64 bytes: each worker has packets of flows of its own, all in one table. Counted by the workers' own CPU time, which leaves
/// out what others on the machine take.
fn pipeline(workers: u16, flows: u32, duration: Duration) -> anyhow::Result<Sample> {
    let empty = resident()?;
    // A table that is full makes room for newcomers.
    let mut first = World::new(flows as usize * 5 / 4 + 16);
    let each = (flows / u32::from(workers)).max(1);
    let packets = |flags| to_services(Family::V4, protocol::TCP, each * u32::from(workers), 64, flags);
    first.send_all::<BATCH>(&mut Traffic::new(packets(SYN), PLAIN, Ingress::Pods), |verdict| *verdict == Verdict::ToPods);
    let opened = first.flows.table().len();
    ensure!(opened == each as usize * usize::from(workers), "each packet has a flow of its own: {opened} of them");
    let grown = resident()?.saturating_sub(empty);
    let mut worlds: Vec<World> = (1..workers).map(|worker| first.another(worker)).collect();
    worlds.push(first);
    let traffics = packets(ACK).chunks_exact(each as usize).map(|own| Traffic::new(own.to_vec(), PLAIN, Ingress::Pods)).collect::<Vec<_>>();
    let start = Barrier::new(worlds.len());
    let rates: Vec<f64> = thread::scope(|scope| {
        let threads: Vec<_> = worlds
            .iter_mut()
            .zip(traffics)
            .map(|(world, mut traffic)| {
                let start = &start;
                scope.spawn(move || {
                    world.send_all::<BATCH>(&mut traffic, |verdict| *verdict == Verdict::ToPods);
                    start.wait();
                    let (until, before, mut packets) = (Instant::now() + duration, thread_cpu_time(), 0_u64);
                    while Instant::now() < until {
                        for _ in 0..64 {
                            packets += world.run(&mut traffic.next_batch::<BATCH>()).len() as u64;
                        }
                    }
                    packets as f64 / (thread_cpu_time() - before).as_secs_f64()
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("a worker does not panic")).collect()
    });
    let sum: f64 = rates.iter().sum();
    let figures = [("M packets/s and core", sum / 1e6 / f64::from(workers)), ("M packets/s", sum / 1e6), ("MiB", grown as f64 / f64::from(1 << 20))];
    Ok(Sample(figures.to_vec()))
}

/// A cluster compiled from nothing, and one endpoint's change up to the workers.
fn programming(services: u32, duration: Duration) -> anyhow::Result<Sample> {
    // With the objects that they are made from. What an earlier round freed is taken again, so the most of all rounds is the truth.
    let before = resident()?;
    let programming = Programming::new(services);
    let (compiled, cold) = timed(|| programming.cold());
    let grown = resident()?.saturating_sub(before);
    drop(compiled);
    let mut changes = programming.changes_to_pins(2, CHANGES, None)?;
    changes.sort_by(f64::total_cmp);
    let many = (duration.as_secs_f64() * f64::from(CHANGES_A_SECOND)).ceil();
    let mut paced = programming.changes_to_pins(2, many as u32, Some(Duration::from_secs(1) / CHANGES_A_SECOND))?;
    // The last ones tell whether it fell behind.
    let last = paced[paced.len().saturating_sub(CHANGES_A_SECOND as usize)..].iter().sum::<f64>() / paced.len().min(CHANGES_A_SECOND as usize) as f64;
    paced.sort_by(f64::total_cmp);
    let figures = [
        ("cold ms", cold.as_secs_f64() * 1e3),
        ("state MiB", grown as f64 / f64::from(1 << 20)),
        ("change ms p50", changes[changes.len() / 2]),
        ("change ms p90", changes[changes.len() * 9 / 10]),
        ("at 200/s ms p99", paced[(paced.len() * 99 / 100).min(paced.len() - 1)]),
        ("at 200/s ms, last second", last),
    ];
    Ok(Sample(figures.to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_share_a_table_of_flows() {
        let sample = pipeline(2, 1_000, Duration::from_millis(50)).unwrap();
        assert!(sample.of("M packets/s").unwrap() > 0.0);
    }
}
