//! What the machine itself does to every figure, measured before the first workload: how long it takes a processor away from a thread that never
//! sleeps, and what it costs to wake a thread.
//!
//! A gateway in user space is woken for a packet that comes alone, the kernel's own forwarding is not. On a virtual machine a sleeping processor
//! may have to be woken by the host first, which can take longer than all else that a packet meets.

use std::fmt;
use std::fs;
use std::io::{self, Read, Write};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use jiff::Timestamp;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use serde::Serialize;

/// How long each processor is watched.
const WATCH: Duration = Duration::from_secs(1);

/// A thread that never sleeps and finds this much time gone was not running; interrupts take less.
const STALL_MIN: Duration = Duration::from_micros(100);

/// Round trips between two threads; fewer where each takes long.
const ROUND_TRIPS: usize = 2_000;

/// The machine of a run.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Machine {
    /// When it was looked at (RFC 3339).
    pub date: String,
    /// The processor's model.
    pub processor: String,
    /// How many of them this process may use.
    pub processors: usize,
    /// Whether they were kept from sleeping.
    pub kept_awake: bool,
    /// Linux' version.
    pub kernel: String,
    /// The mean number of threads that wanted to run in the last minute.
    pub load: f64,
    /// The longest time for which a thread that never sleeps did not run, in milliseconds.
    pub longest_stall_ms: f64,
    /// The share of the time for which it did not run, in percent: for more than 0.1 ms at a time.
    pub stalled_percent: f64,
    /// A byte to another thread and back through pipes, both on one processor, in microseconds.
    pub wake_here_us: f64,
    /// The same between two processors, each of which sleeps meanwhile; nothing where there is only one.
    pub wake_other_us: Option<f64>,
}

impl Machine {
    /// Looks, which takes a second and some.
    pub fn look(kept_awake: bool) -> anyhow::Result<Machine> {
        let cpus = cpus()?;
        let (longest, stalled) = thread::scope(|scope| {
            let watching: Vec<_> = cpus.iter().map(|cpu| scope.spawn(|| pin_to(*cpu).map(|()| stalls(WATCH)))).collect();
            let seen = watching.into_iter().map(|thread| thread.join().expect("watching a clock does not panic"));
            seen.collect::<io::Result<Vec<_>>>()
        })?
        .into_iter()
        .fold((Duration::ZERO, Duration::ZERO), |(longest, sum), (one, all)| (longest.max(one), sum + all));
        let first = *cpus.first().context("no processor may be used")?;
        let wake = |other| Ok::<_, io::Error>(round_trip(first, other)?.as_secs_f64() * 1e6);
        let (cpuinfo, loadavg) = (fs::read_to_string("/proc/cpuinfo")?, fs::read_to_string("/proc/loadavg")?);
        let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).map_or("unknown", |(_, name)| name);
        Ok(Machine {
            date: Timestamp::now().to_string(),
            processor: model.to_owned(),
            processors: cpus.len(),
            kept_awake,
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            load: loadavg.split(' ').next().and_then(|load| load.parse().ok()).unwrap_or(f64::NAN),
            longest_stall_ms: longest.as_secs_f64() * 1e3,
            stalled_percent: stalled.as_secs_f64() / (WATCH.as_secs_f64() * cpus.len() as f64) * 100.0,
            wake_here_us: wake(first)?,
            wake_other_us: cpus.get(1).map(|other| wake(*other)).transpose()?,
        })
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Machine { date, processor, processors, kernel, load, .. } = self;
        let awake = if self.kept_awake { ", kept awake" } else { "" };
        writeln!(f, "{date}, {processors} × {processor}{awake}, Linux {kernel}, load {load}")?;
        write!(f, "a thread that never sleeps: {:.1} % of the time not run, {:.1} ms at most; ", self.stalled_percent, self.longest_stall_ms)?;
        write!(f, "a byte to a sleeping thread and back: {:.1} µs on one processor", self.wake_here_us)?;
        self.wake_other_us.map_or(Ok(()), |us| write!(f, ", {us:.1} µs between two"))
    }
}

/// The processors that this process may use.
pub fn cpus() -> anyhow::Result<Vec<usize>> {
    let allowed = sched_getaffinity(Pid::from_raw(0)).context("cannot tell which processors may be used")?;
    Ok((0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu).unwrap_or(false)).collect())
}

/// Binds the calling thread to `cpu`.
fn pin_to(cpu: usize) -> io::Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    Ok(sched_setaffinity(Pid::from_raw(0), &set)?)
}

/// The longest time and the sum of all times for which the calling thread did not run, though it wanted to.
fn stalls(duration: Duration) -> (Duration, Duration) {
    let start = Instant::now();
    let (mut last, mut longest, mut sum) = (start, Duration::ZERO, Duration::ZERO);
    while last - start < duration {
        let now = Instant::now();
        let gap = now - last;
        if gap >= STALL_MIN {
            longest = longest.max(gap);
            sum += gap;
        }
        last = now;
    }
    (longest, sum)
}

/// The median time of a byte's way from a thread on `here` to one on `there`, which sleeps until it comes, and back.
fn round_trip(here: usize, there: usize) -> io::Result<Duration> {
    let ((mut ask_in, mut ask_out), (mut answer_in, mut answer_out)) = (io::pipe()?, io::pipe()?);
    thread::scope(|scope| {
        let answering = scope.spawn(move || -> io::Result<()> {
            pin_to(there)?;
            let mut byte = [0];
            while ask_in.read(&mut byte)? > 0 {
                answer_out.write_all(&byte)?;
            }
            Ok(())
        });
        // On a thread of its own: where the caller runs stays as it is.
        let asking = scope.spawn(move || -> io::Result<Duration> {
            pin_to(here)?;
            let (mut times, until, mut byte) = (Vec::new(), Instant::now() + WATCH / 2, [0]);
            while times.len() < ROUND_TRIPS && Instant::now() < until {
                let start = Instant::now();
                ask_out.write_all(&byte)?;
                answer_in.read_exact(&mut byte)?;
                times.push(start.elapsed());
            }
            times.sort();
            Ok(times[times.len() / 2])
        });
        let time = asking.join().expect("a pipe does not panic")?;
        answering.join().expect("a pipe does not panic")?;
        Ok(time)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_machine_does_to_its_threads_is_seen() {
        let machine = Machine::look(false).unwrap();
        assert!(machine.processors > 0 && machine.wake_here_us > 0.0 && machine.longest_stall_ms >= 0.0);
        assert_eq!(machine.wake_other_us.is_some(), machine.processors > 1);
        assert!((0.0..=100.0).contains(&machine.stalled_percent), "{machine}");
        let said = machine.to_string();
        assert!(said.contains(&machine.kernel) && said.contains("µs on one processor"), "{said}");
    }
}
