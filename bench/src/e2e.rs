//! End to end: each subject carries the same traffic in the same run, one after the other and again (A B A B …).
//!
//! Absolute figures say little on a machine that others use; what counts is the ratio of two subjects measured right after one another.
//! So every round measures each subject once, and the ratio given is the median of the rounds' ratios. Everything happens in namespaces
//! of a sandbox that leaves nothing behind ([`podgate::lab::sandbox`]).
//!
//! `machine` looks at what it runs on (`awake` keeps it awake), `workload` lists what is measured and by whom, `bed` and `peer` build who
//! carries it, `load` makes the traffic, `report` and `plot` tell.

mod awake;
mod bed;
pub(crate) mod load;
mod machine;
mod memory;
mod peer;
mod plot;
mod reflector;
mod report;
mod services;
mod subject;
mod workload;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use podgate::lab::Sandbox;

use awake::Awake;
use bed::{Bed, Plan};
use load::transactions::Pace;
use load::transactions::{crr, rr};
use load::{Sample, change, datagrams, iperf, overload, stream};
use machine::Machine;
use report::Report;
use subject::Subject;
use workload::{Group, Load, Scale, Workload};

/// What `podgate-bench e2e` can be told.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Only this workload; may be repeated
    #[arg(long = "workload", value_name = "NAME", value_parser = clap::builder::PossibleValuesParser::from(workload::names()))]
    workloads: Vec<String>,
    /// Beside this peer only; may be repeated
    #[arg(long = "peer", value_name = "NAME", value_parser = clap::builder::PossibleValuesParser::from(Subject::PEERS))]
    peers: Vec<String>,
    /// Without subjects that have more services than this: ten thousand take iptables and nft minutes to load
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    services_max: Option<u32>,
    /// Rounds, each of which measures every subject once
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pairs: u32,
    /// Seconds of each measurement, after half a second to warm up
    #[arg(long, value_name = "SECONDS", default_value_t = 3.0)]
    seconds: f64,
    /// One round of a fraction of a second, with a hundred services at most: does it run, not how fast
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
    /// Keep the processors from sleeping: on a virtual machine the host takes long to wake them
    #[arg(long)]
    awake: bool,
    /// How many workers each gateway has
    #[arg(long, value_name = "N", default_value_t = 2)]
    workers: u16,
}

/// Seconds of a measurement of the quick form.
const QUICK_SECONDS: f64 = 0.3;

/// What could take part by its nature and does not, and why.
const NOT_MEASURED: [&str; 1] = ["flannel's udp backend is not measured: no Debian package has it"];

/// Runs the benchmarks. Must be called while the process has one thread only.
pub fn main(options: &Options) -> ExitCode {
    crate::in_a_sandbox(|sandbox| run(options, sandbox))
}

struct Run<'a> {
    plan: Plan<'a>,
    rounds: u32,
    duration: Duration,
    start: Instant,
    report: Report,
}

fn run(options: &Options, sandbox: &Sandbox) -> anyhow::Result<()> {
    ensure!(options.seconds > 0.0 && options.seconds <= 3600.0, "--seconds takes more than 0 and at most 3600, not {}", options.seconds);
    let (rounds, seconds, scale) = if options.quick { (1, QUICK_SECONDS, Scale::QUICK) } else { (options.pairs, options.seconds, Scale::FULL) };
    let binary = binary(options.podgate.as_deref())?;
    let duration = Duration::from_secs_f64(seconds);
    let plan = Plan { sandbox, binary: &binary, workers: options.workers, scale };
    let _awake = options.awake.then(|| Awake::keep(&machine::cpus()?)).transpose()?;
    let machine = Machine::look(options.awake).context("cannot look at the machine")?;
    eprintln!("{machine}");
    let mut run = Run { plan, rounds, duration, start: Instant::now(), report: Report::new(machine, rounds, duration) };
    let mut chosen: Vec<Workload> = workload::all(scale).into_iter().filter(|workload| picked(&options.workloads, workload.name)).collect();
    for workload in &mut chosen {
        workload.subjects.retain(|subject| subject.peer().is_none_or(|peer| picked(&options.peers, peer)));
        workload.subjects.retain(|subject| subject.services() <= options.services_max.or(subject.services()));
        if workload.subjects.is_empty() {
            run.report.note(format!("{} is not measured: all of it has more services than --services-max", workload.name));
        }
    }
    chosen.retain(|workload| !workload.subjects.is_empty());
    ensure!(!chosen.is_empty(), "nothing is left to measure: raise --services-max, or choose other workloads (`--help` lists them)");
    run.leave_out_what_is_missing(&mut chosen);
    for group in [Group::Nodes, Group::Services, Group::Memory] {
        let chosen: Vec<&Workload> = chosen.iter().filter(|workload| workload.subjects.iter().any(|subject| subject.group() == group)).collect();
        // What was measured before is worth telling, whatever becomes of the rest.
        if !chosen.is_empty()
            && let Err(error) = run.group(group, &chosen)
        {
            run.progress(&format!("failed: {error:#}"));
            run.report.fault(format!("{error:#}"));
        }
    }
    let report = run.report;
    print!("{}", report.table());
    if let Some(path) = &options.output {
        let text = serde_json::to_string_pretty(&report.json()).context("cannot make JSON of the report")?;
        std::fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))?;
    }
    if let Some(path) = &options.plot {
        std::fs::write(path, plot::page(report.rows())).with_context(|| format!("cannot write {}", path.display()))?;
    }
    match report.faults() {
        [] => Ok(()),
        faults => bail!("{} faults:\n  {}", faults.len(), faults.join("\n  ")),
    }
}

impl Run<'_> {
    fn progress(&self, what: &str) {
        eprintln!("{:>6.1} s  {what}", self.start.elapsed().as_secs_f64());
    }

    fn leave_out_what_is_missing(&mut self, chosen: &mut Vec<Workload>) {
        let mut subjects: Vec<Subject> = chosen.iter().flat_map(|workload| workload.subjects.iter().copied()).collect();
        subjects.sort();
        subjects.dedup();
        for subject in subjects {
            if let Some(why) = subject.missing() {
                self.report.note(format!("{} is not measured: {why}", subject.name()));
            }
        }
        for workload in chosen.iter_mut() {
            workload.subjects.retain(|subject| subject.missing().is_none());
        }
        if let Some(why) = iperf::missing() {
            self.report.note(format!("stream-iperf3 is not measured: {why}"));
            chosen.retain(|workload| workload.load != Load::Iperf);
        }
        if !Path::new("/proc/net/ip_vs").exists() {
            self.report.note("kube-proxy's IPVS shape is not measured: the kernel has no IPVS".to_owned());
        }
        NOT_MEASURED.into_iter().for_each(|why| self.report.note(why.to_owned()));
    }

    /// Builds what the workloads of `group` need, runs them, and takes it down.
    fn group(&mut self, group: Group, chosen: &[&Workload]) -> anyhow::Result<()> {
        if group == Group::Memory {
            return chosen.iter().try_for_each(|workload| self.workload(workload, None));
        }
        let mut subjects: Vec<Subject> = chosen.iter().flat_map(|workload| workload.subjects.iter().copied()).collect();
        subjects.sort();
        subjects.dedup();
        self.progress("building what carries the packets: Podgate's nodes, and its peers");
        let bed = Bed::build(self.plan, &subjects)?;
        // The others are measured all the same.
        bed.unbuilt().iter().for_each(|why| self.report.fault(why.clone()));
        chosen.iter().try_for_each(|workload| self.workload(workload, Some(&bed)))
    }

    fn workload(&mut self, workload: &Workload, bed: Option<&Bed>) -> anyhow::Result<()> {
        let mut samples: Vec<Vec<Sample>> = vec![Vec::new(); workload.subjects.len()];
        let mut failed: Vec<Subject> = Vec::new();
        let drops = bed.map(Bed::drops).transpose()?;
        for round in 1..=self.rounds {
            for (subject, samples) in workload.subjects.iter().zip(&mut samples) {
                if failed.contains(subject) {
                    continue;
                }
                let name = subject.name();
                match self.measure(workload, *subject, bed) {
                    Ok(sample) => {
                        let (unit, value) = sample.0[0];
                        self.progress(&format!("{}, round {round} of {}: {name:>18} {value:10.2} {unit}", workload.name, self.rounds));
                        samples.push(sample);
                    }
                    Err(error) => {
                        self.progress(&format!("{}, round {round} of {}: {name:>18} failed: {error:#}", workload.name, self.rounds));
                        self.report.fault(format!("{} over {name} came to nothing: {error:#}", workload.name));
                        failed.push(*subject);
                    }
                }
            }
        }
        let (names, samples): (Vec<String>, Vec<Vec<Sample>>) = workload
            .subjects
            .iter()
            .zip(samples)
            .filter(|(subject, _)| !failed.contains(subject))
            .map(|(subject, samples)| (subject.name(), samples))
            .unzip();
        self.report.add(workload.name, &names, &samples);
        if let (Some(bed), Some(before)) = (bed, drops) {
            for (node, reason, packets) in bed.drops_since(&before)? {
                self.report.dropped(workload.name, workload.load.explains(), &node, &reason, packets);
            }
        }
        Ok(())
    }

    fn measure(&self, workload: &Workload, subject: Subject, bed: Option<&Bed>) -> anyhow::Result<Sample> {
        let (duration, place) = (self.duration, workload.place);
        let Some(bed) = bed else { return memory::measure(subject, duration) };
        bed.with_ends(subject, place, |ends| match workload.load {
            Load::Stream(flows) => stream::measure(ends, flows, duration).map(|streamed| streamed.sample()),
            Load::Iperf => iperf::measure(ends, duration),
            Load::Rr(connections, pace @ Pace::AtOnce(_)) => rr(ends, connections, pace, duration).map(|seen| seen.answered()),
            Load::Rr(connections, pace) => rr(ends, connections, pace, duration).map(|seen| seen.paced()),
            Load::Crr(at_once) => crr(ends, Pace::AtOnce(at_once), duration).map(|seen| seen.connected()),
            Load::FirstPacket(rate) => crr(ends, Pace::Rate(rate), duration).map(|seen| seen.opened()),
            Load::Datagrams(shape) if shape.payload < 1_000 => datagrams::search(ends, shape, duration).map(|found| found.packets()),
            Load::Datagrams(shape) => datagrams::search(ends, shape, duration).map(|found| found.bits(shape.payload)),
            Load::Overload(shape) => bed.with_probes(subject, |probes| overload::measure(ends, shape, probes, duration))?,
            Load::Change => {
                let node = bed.node(subject);
                let before = services::synced(node)?;
                let mut sample = change::measure(ends, duration, |turn| Ok(services::change(bed.cluster(subject), node, turn)?))?;
                let after = services::synced(node)?;
                sample.0.push(("event to workers ms", (after.seconds - before.seconds) / (after.events - before.events) * 1e3));
                Ok(sample)
            }
            Load::Pipeline | Load::Programming => bail!("{} needs no devices", workload.name),
        })?
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
