//! `podgate demo`: a cluster in namespaces on this machine, with the real gateway on every node and real traffic, every answer checked.
//!
//! Progress goes to stderr while it happens; what an operator wants to see at the end goes to stdout. It exits with 0 only if every
//! check held. See [`crate::lab`] for how the cluster is built and why nothing of it is left behind.

mod render;

use std::io::{self, BufRead, IsTerminal};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::lab::checks::{Spread, Throughput};
use crate::lab::matrix::{Check, Probe};
use crate::lab::sandbox::{self, Entered};
use crate::lab::{Lab, LabError, Node, OUTSIDE, Sandbox};

/// What is asked of the demo.
#[derive(Clone, Debug)]
pub struct Options {
    /// How many nodes, from 1.
    pub nodes: u8,
    /// What happens when all is shown.
    pub afterwards: Afterwards,
    /// How the result is printed.
    pub format: Format,
    /// How much each bulk transfer moves, in bytes; [`crate::lab::program::bulk::LEN`] is a good choice.
    pub bulk_len: u64,
}

/// What happens to the cluster when all is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Afterwards {
    /// It is taken away.
    End,
    /// It stays, with the commands to try, until Enter or Ctrl-C.
    Keep,
}

/// How the result is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// For reading.
    Text,
    /// `{"ok": …, "checks": […], …}`.
    Json,
}

/// Everything that was found.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    schema_version: u32,
    ok: bool,
    checks: Vec<Check>,
    nodes: Vec<NodeRow>,
    spread: Vec<Spread>,
    throughput: Vec<Throughput>,
    workers: Vec<WorkerRow>,
    drops: Vec<DropRow>,
    seconds: f64,
}

/// A node on the map.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct NodeRow {
    name: String,
    addresses: [String; 2],
    gateway: [String; 2],
    pods: Vec<PodRow>,
}

/// A pod on the map.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct PodRow {
    name: String,
    addresses: [String; 2],
}

/// What a worker has read and written.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct WorkerRow {
    node: String,
    worker: u64,
    rx_packets: u64,
    tx_packets: u64,
    rx_bytes: u64,
    average_frame_bytes: u64,
    flows_created: u64,
}

/// A drop counter that is not zero.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct DropRow {
    node: String,
    reason: String,
    packets: u64,
}

/// The version of the JSON form.
const SCHEMA_VERSION: u32 = 1;

/// How many connections show the spread.
const SPREAD_CONNECTIONS: u32 = 120;

/// Runs the demo. Must be called while the process has one thread only, before any runtime is started.
pub fn main(options: &Options) -> ExitCode {
    let sandbox = match sandbox::enter() {
        Ok(Entered::Inside(sandbox)) => sandbox,
        Ok(Entered::Outside(code)) => return code,
        Err(error) => return fail(options, &error.to_string()),
    };
    let start = Instant::now();
    let progress = |what: &str| eprintln!("{:>5.1} s  {what}", start.elapsed().as_secs_f64());
    let binary = match std::env::current_exe() {
        Ok(binary) => binary,
        Err(error) => return fail(options, &format!("cannot find this program: {error}")),
    };
    let program = binary.clone();
    let lab = match build(&sandbox, binary, options, &progress) {
        Ok(lab) => lab,
        Err(error) => return fail(options, &error.to_string()),
    };
    let mut report = match examine(&lab, options, &progress) {
        Ok(report) => report,
        Err(error) => return fail(options, &error.to_string()),
    };
    report.seconds = start.elapsed().as_secs_f64();
    match options.format {
        Format::Text => crate::cli::put(&render::report(&report, &lab)),
        Format::Json => crate::cli::put(&json(&report)),
    };
    if options.afterwards == Afterwards::Keep {
        eprint!("{}", render::commands(&lab, &sandbox, &program));
        wait_for_enter();
    }
    // Leaving ends process 1 of the sandbox, and everything goes with it; there is nothing to wait for.
    if report.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn build(sandbox: &Sandbox, binary: PathBuf, options: &Options, progress: &dyn Fn(&str)) -> Result<Lab, LabError> {
    Lab::builder(sandbox, &binary).nodes(options.nodes).build(progress)
}

fn examine(lab: &Lab, options: &Options, progress: &dyn Fn(&str)) -> Result<Report, LabError> {
    let paths = lab.paths()?;
    let mut report = Report { schema_version: SCHEMA_VERSION, nodes: map(lab), ..Report::default() };
    progress(&format!("taking {} paths with TCP, UDP and ICMP over IPv4 and IPv6", paths.len()));
    let tick = ProgressLine::new();
    report.checks = lab.check_paths(&paths, &Probe::ALL, &|done, total| tick.show(done, total))?;
    tick.finish();
    progress("pinging gateways, tracing routes, discovering path MTUs");
    report.checks.extend(lab.check_gateways()?);
    report.checks.extend(lab.check_traceroutes(&paths)?);
    report.checks.extend(lab.check_path_mtu()?);
    progress("sending packets with false sources");
    report.checks.extend(lab.check_pod_spoofs("b1")?);
    report.checks.extend(lab.check_wire_spoofs()?);
    report.checks.push(lab.check_neighbour_flood("b1", 1000)?);
    progress("opening many connections to one service");
    for client in ["a1", OUTSIDE] {
        let spread = lab.spread(client, SPREAD_CONNECTIONS)?;
        report.checks.push(Lab::check_spread(&spread));
        report.spread.push(spread);
    }
    progress(&format!("moving {} MiB along each kind of path", options.bulk_len >> 20));
    let (checks, rows) = lab.check_throughput(&lab.kinds_of_path()?, options.bulk_len, &mut |_| Ok(()))?;
    report.checks.extend(checks);
    report.throughput = rows;
    progress("replacing the pods of a service one by one, under load");
    report.checks.extend(lab.check_rolling_update(progress)?);
    // A gateway that is killed takes its counters with it.
    for node in lab.nodes() {
        report.workers.extend(workers(node)?);
        let drops = node.drops()?.into_iter().filter(|(_, packets)| *packets > 0);
        report.drops.extend(drops.map(|(reason, packets)| DropRow { node: node.name().to_owned(), reason, packets }));
    }
    report.checks.extend(lab.check_node_loss(progress)?);
    report.ok = report.checks.iter().all(|check| check.ok);
    progress("done");
    Ok(report)
}

/// `podgate workers` of a node.
fn workers(node: &Node) -> Result<Vec<WorkerRow>, LabError> {
    let answer = node.query(&["workers"])?;
    let rows = answer["workers"].as_array().cloned().unwrap_or_default();
    let row = |row: serde_json::Value| {
        let number = |key: &str| row[key].as_u64().unwrap_or_default();
        WorkerRow {
            node: node.name().to_owned(),
            worker: number("worker"),
            rx_packets: number("rxPackets"),
            tx_packets: number("txPackets"),
            rx_bytes: number("rxBytes"),
            average_frame_bytes: number("averageFrameBytes"),
            flows_created: number("flowsCreated"),
        }
    };
    Ok(rows.into_iter().map(row).collect())
}

fn map(lab: &Lab) -> Vec<NodeRow> {
    let both = |dual: crate::lab::Dual| [dual.v4.to_string(), dual.v6.to_string()];
    let pods = lab.pods();
    let row = |(index, node): (usize, &Node)| NodeRow {
        name: node.name().to_owned(),
        addresses: both(node.machine().addresses()),
        gateway: both(node.gateway()),
        pods: pods
            .iter()
            .filter(|pod| pod.node() == index)
            .map(|pod| PodRow { name: pod.name().to_owned(), addresses: both(pod.machine().addresses()) })
            .collect(),
    };
    lab.nodes().iter().enumerate().map(row).collect()
}

/// Says what went wrong before there was anything to show, in the asked form.
fn fail(options: &Options, what: &str) -> ExitCode {
    eprintln!("podgate demo: {what}");
    if options.format == Format::Json {
        let check = Check { group: "cluster".into(), name: "the cluster is built".into(), ok: false, detail: what.into(), latency_micros: None };
        let report = Report { schema_version: SCHEMA_VERSION, checks: vec![check], ..Report::default() };
        crate::cli::put(&json(&report));
    }
    ExitCode::FAILURE
}

fn json(report: &Report) -> String {
    format!("{}\n", serde_json::to_string_pretty(report).expect("a report is always JSON"))
}

/// Returns at Enter. Where nobody can press it, only Ctrl-C or the end of the process outside ends the demo.
fn wait_for_enter() {
    let mut line = String::new();
    if io::stdin().is_terminal() && io::stdin().lock().read_line(&mut line).is_ok_and(|len| len > 0) {
        return;
    }
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

/// A count on one line of a terminal; nothing where stderr is a file.
struct ProgressLine {
    terminal: bool,
}

impl ProgressLine {
    fn new() -> ProgressLine {
        ProgressLine { terminal: io::stderr().is_terminal() }
    }

    fn show(&self, done: usize, total: usize) {
        if self.terminal {
            eprint!("\r         {done} of {total} ");
        }
    }

    fn finish(&self) {
        if self.terminal {
            eprint!("\r\x1b[K");
        }
    }
}
