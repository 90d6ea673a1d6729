//! End to end: each subject carries the same traffic in the same run, one after the other and again (A B A B …).
//!
//! Absolute figures say little on a machine that others use; what counts is the ratio of two subjects measured right after one another.
//! So every round measures each subject once, and the ratio given is the median of the rounds' ratios. Everything happens in namespaces
//! of a sandbox that leaves nothing behind ([`podgate::lab::sandbox`]).

mod plot;
mod reflector;
mod report;
pub(crate) mod stream;
mod subject;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use podgate::lab::Sandbox;

use report::Report;
use stream::Sample;
use subject::{Bed, Place, Subject};

/// What `podgate-bench e2e` can be told.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Only this workload; may be repeated
    #[arg(long = "workload", value_name = "NAME", value_parser = workload_names())]
    workloads: Vec<String>,
    /// Beside this peer only; may be repeated
    #[arg(long = "peer", value_name = "NAME", value_parser = peer_names())]
    peers: Vec<String>,
    /// Rounds, each of which measures every subject once
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pairs: u32,
    /// Seconds of each measurement, after half a second to warm up
    #[arg(long, value_name = "SECONDS", default_value_t = 3.0)]
    seconds: f64,
    /// One round of one second: does it run, not how fast
    #[arg(long)]
    quick: bool,
    /// Write the rows there as JSON
    #[arg(long, value_name = "FILE.json")]
    output: Option<PathBuf>,
    /// Draw the rows there
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    /// The program under test [default: the `podgate` beside this program]
    #[arg(long, value_name = "FILE")]
    podgate: Option<PathBuf>,
    /// How many workers each gateway has
    #[arg(long, value_name = "N", default_value_t = 2)]
    workers: u16,
}

/// A kind of traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Workload {
    /// Its name on the command line and in reports.
    name: &'static str,
    /// From where to where.
    place: Place,
    /// TCP connections at once.
    flows: usize,
}

const WORKLOADS: [Workload; 4] = [
    Workload { name: "stream-same-node", place: Place::SameNode, flows: 1 },
    Workload { name: "stream-same-node-4", place: Place::SameNode, flows: 4 },
    Workload { name: "stream-between-nodes", place: Place::BetweenNodes, flows: 1 },
    Workload { name: "stream-between-nodes-4", place: Place::BetweenNodes, flows: 4 },
];

fn workload_names() -> clap::builder::PossibleValuesParser {
    WORKLOADS.map(|workload| workload.name).into()
}

fn peer_names() -> clap::builder::PossibleValuesParser {
    Subject::ALL.into_iter().filter(|subject| *subject != Subject::Podgate).map(Subject::name).collect::<Vec<_>>().into()
}

/// Runs the benchmarks. Must be called while the process has one thread only.
pub fn main(options: &Options) -> ExitCode {
    crate::in_a_sandbox(|sandbox| run(options, sandbox))
}

fn run(options: &Options, sandbox: &Sandbox) -> anyhow::Result<()> {
    ensure!(options.seconds > 0.0 && options.seconds <= 3600.0, "--seconds takes more than 0 and at most 3600, not {}", options.seconds);
    let chosen: Vec<Workload> = WORKLOADS.into_iter().filter(|workload| picked(&options.workloads, workload.name)).collect();
    let (rounds, duration) = if options.quick { (1, Duration::from_secs(1)) } else { (options.pairs, Duration::from_secs_f64(options.seconds)) };
    let start = Instant::now();
    let progress = |what: &str| eprintln!("{:>6.1} s  {what}", start.elapsed().as_secs_f64());
    let subjects: Vec<Subject> =
        Subject::ALL.into_iter().filter(|subject| *subject == Subject::Podgate || picked(&options.peers, subject.name())).collect();
    let places: Vec<Place> = [Place::SameNode, Place::BetweenNodes].into_iter().filter(|p| chosen.iter().any(|w| w.place == *p)).collect();

    progress("building what carries the packets: Podgate's nodes, and its peers");
    let bed = Bed::build(sandbox, &binary(options.podgate.as_deref())?, options.workers, &subjects, &places)?;
    let mut report = Report::new(rounds, duration);
    for workload in chosen {
        let subjects: Vec<Subject> = subjects.iter().copied().filter(|subject| subject.carries(workload.place)).collect();
        let mut samples: Vec<Vec<Sample>> = vec![Vec::new(); subjects.len()];
        let drops = bed.drops()?;
        for round in 1..=rounds {
            for (subject, samples) in subjects.iter().zip(&mut samples) {
                let ends = bed.ends(*subject, workload.place);
                let sample = stream::measure(ends, workload.flows, duration)
                    .with_context(|| format!("{} over {} came to nothing", workload.name, subject.name()))?;
                progress(&format!("{}, round {round} of {rounds}: {:>17} {:6.2} Gb/s", workload.name, subject.name(), sample.gbit_per_s()));
                samples.push(sample);
            }
        }
        report.add(workload.name, &subjects, &samples);
        for (node, reason, packets) in bed.drops_since(&drops)? {
            report.dropped(workload.name, &node, &reason, packets);
        }
    }
    print!("{}", report.table());
    if let Some(path) = &options.output {
        let text = serde_json::to_string_pretty(&report.json()).context("cannot make JSON of the report")?;
        std::fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))?;
    }
    if let Some(path) = &options.plot {
        std::fs::write(path, plot::bars(report.rows())).with_context(|| format!("cannot write {}", path.display()))?;
    }
    match report.unexplained() {
        [] => Ok(()),
        names => bail!("packets were dropped that nothing in these workloads explains: {}", names.join(", ")),
    }
}

/// Whether `name` is among the names asked for; if none was, all are.
fn picked(asked: &[String], name: &str) -> bool {
    asked.is_empty() || asked.iter().any(|asked| asked == name)
}

/// The program under test: the one named, or that beside this program.
pub(crate) fn binary(named: Option<&Path>) -> anyhow::Result<PathBuf> {
    if let Some(path) = named {
        return path.canonicalize().with_context(|| format!("there is no program {}", path.display()));
    }
    let beside = std::env::current_exe().context("cannot find this program")?.with_file_name("podgate");
    ensure!(beside.exists(), "there is no {}: build it (`cargo build --release -p podgate`) or say --podgate FILE", beside.display());
    Ok(beside)
}
