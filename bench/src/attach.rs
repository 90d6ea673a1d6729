//! How long a pod waits for its network: many containers at once on one node, through our plugin and through the reference ones.
//!
//! Each subject has a node of its own: a network namespace, in Podgate's case with the daemon in it. In every round each subject in turn
//! attaches as many fresh namespaces as asked for, with all plugin processes started at once as a runtime starts them, each timed from its
//! start to its exit; then it detaches them in the same way. The reference plugins give IPv4 addresses alone unless `--dual` is said
//! (with IPv6 they wait until duplicate detection is over), Podgate gives both always.

mod report;

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use podgate::lab::node::NodeSettings;
use podgate::lab::{Lab, Machine, Sandbox};
use podgate_testbed::cni::{Container, Plugin, Target, Verb, network};
use podgate_testbed::need::{plugin, plugin_directories};
use serde_json::{Value, json};

use report::Report;

/// What `podgate-bench attach` can be told.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Containers attached at once
    #[arg(long, value_name = "N", default_value_t = 110, value_parser = clap::value_parser!(u16).range(1..=240))]
    pods: u16,
    /// Rounds, each of which measures every subject once
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Beside this reference plugin only; may be repeated
    #[arg(long = "peer", value_name = "NAME", value_parser = clap::builder::PossibleValuesParser::from(["bridge", "ptp"]))]
    peers: Vec<String>,
    /// The reference plugins give IPv6 addresses too
    #[arg(long)]
    dual: bool,
    /// Write the rows there as JSON
    #[arg(long, value_name = "FILE.json")]
    output: Option<PathBuf>,
    /// The daemon under test [default: the `podgate` beside this program]
    #[arg(long, value_name = "FILE")]
    podgate: Option<PathBuf>,
    /// The plugin under test [default: the `podgate-cni` beside this program]
    #[arg(long, value_name = "FILE")]
    plugin: Option<PathBuf>,
}

/// Who attaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Subject {
    /// `podgate-cni` and the daemon.
    Podgate,
    /// The reference `bridge` plugin with `host-local`.
    Bridge,
    /// The reference `ptp` plugin with `host-local`.
    Ptp,
}

impl Subject {
    const ALL: [Subject; 3] = [Subject::Podgate, Subject::Bridge, Subject::Ptp];

    /// Its name on the command line and in reports.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Subject::Podgate => "podgate",
            Subject::Bridge => "bridge",
            Subject::Ptp => "ptp",
        }
    }
}

/// What a round of one subject came to.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    /// How long each ADD took, from the start of the process to its exit.
    pub(crate) add: Vec<Duration>,
    /// The same for DEL.
    pub(crate) del: Vec<Duration>,
    /// From the first start of an ADD to the last exit.
    pub(crate) all: Duration,
}

/// A subject on its node.
struct Stand {
    subject: Subject,
    plugin: Plugin,
    config: Value,
}

/// Runs the benchmark. Must be called while the process has one thread only.
pub fn main(options: &Options) -> ExitCode {
    crate::in_a_sandbox(|sandbox| run(options, sandbox))
}

fn run(options: &Options, sandbox: &Sandbox) -> anyhow::Result<()> {
    let start = Instant::now();
    let progress = |what: &str| eprintln!("{:>6.1} s  {what}", start.elapsed().as_secs_f64());
    progress("building a node for each subject");
    let daemon = beside(options.podgate.as_deref(), "podgate")?;
    let lab = Lab::builder(sandbox, &daemon).nodes(1).pods([]).settings(NodeSettings::default()).build(&|_| {})?;
    let (stands, _machines) = stands(options, &lab)?;
    let mut report = Report::new(options.pods, options.rounds, options.dual);
    for round in 1..=options.rounds {
        for stand in &stands {
            let sample = measure(stand, sandbox.directory(), options.pods).with_context(|| format!("{} came to nothing", stand.subject.name()))?;
            progress(&format!("round {round} of {}: {:>8}, all attached after {:.0} ms", options.rounds, stand.subject.name(), millis(sample.all)));
            report.add(stand.subject, sample);
        }
    }
    print!("{}", report.table());
    if let Some(path) = &options.output {
        let text = serde_json::to_string_pretty(&report.json()).context("cannot make JSON of the report")?;
        std::fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// The subjects, and the machines on which the reference plugins work.
fn stands(options: &Options, lab: &Lab) -> anyhow::Result<(Vec<Stand>, Vec<Machine>)> {
    let node = lab.node(1);
    let ours = Plugin::new(beside(options.plugin.as_deref(), "podgate-cni")?, &plugin_directories(), node.machine().netns())?;
    let mut stands = vec![Stand { subject: Subject::Podgate, plugin: ours, config: network(node, "podgate", "1.0.0", &Value::Null) }];
    let mut machines = Vec::new();
    for (number, subject) in Subject::ALL.into_iter().enumerate().skip(1) {
        if !options.peers.is_empty() && !options.peers.iter().any(|peer| peer == subject.name()) {
            continue;
        }
        let machine = lab.add_machine(subject.name(), 100 + number as u8)?;
        let name = subject.name();
        let program = plugin(name).with_context(|| format!("there is no CNI plugin {name}: install containernetworking-plugins, or say --peer"))?;
        let plugin = Plugin::new(program, &plugin_directories(), machine.netns())?;
        stands.push(Stand { subject, plugin, config: reference(subject, lab.directory(), number, options.dual) });
        machines.push(machine);
    }
    Ok((stands, machines))
}

/// The usual configuration of a reference plugin.
fn reference(subject: Subject, directory: &Path, number: usize, dual: bool) -> Value {
    let mut ranges = vec![json!([{"subnet": format!("10.88.{number}.0/24")}])];
    let mut routes = vec![json!({"dst": "0.0.0.0/0"})];
    if dual {
        ranges.push(json!([{"subnet": format!("fd00:88:{number}::/64")}]));
        routes.push(json!({"dst": "::/0"}));
    }
    let ipam = json!({"type": "host-local", "dataDir": directory.join("host-local"), "ranges": ranges, "routes": routes});
    json!({"cniVersion": "1.0.0", "name": subject.name(), "type": subject.name(), "isGateway": true, "ipMasq": false, "ipam": ipam})
}

/// Attaches and detaches `pods` fresh namespaces.
fn measure(stand: &Stand, directory: &Path, pods: u16) -> anyhow::Result<Sample> {
    let directory = directory.join(format!("containers-{}", stand.subject.name()));
    let containers: Vec<Container> = (0..pods).map(|number| Container::new(&directory, &format!("pod-{number}"))).collect::<Result<_, _>>()?;
    let (answers, all) = all_at_once(stand, Verb::Add, &containers)?;
    let mut addresses = std::collections::BTreeSet::new();
    for (container, (text, _)) in containers.iter().zip(&answers) {
        let result: Value = serde_json::from_str(text).with_context(|| format!("the result of {}", container.id()))?;
        let given = result["ips"][0]["address"].as_str().and_then(|text| text.split('/').next()?.parse::<IpAddr>().ok());
        ensure!(given.is_some_and(|address| addresses.insert(address)), "{} has no address of its own: {text}", container.id());
        ensure!(container.netlink()?.link("eth0")?.is_some(), "{} has no eth0", container.id());
    }
    let add = answers.into_iter().map(|(_, took)| took).collect();
    let (answers, _) = all_at_once(stand, Verb::Del, &containers)?;
    Ok(Sample { add, del: answers.into_iter().map(|(_, took)| took).collect(), all })
}

/// Calls the plugin for every container at once: what each printed, how long it took, and how long all of them took.
fn all_at_once(stand: &Stand, verb: Verb, containers: &[Container]) -> anyhow::Result<(Vec<(String, Duration)>, Duration)> {
    let barrier = Barrier::new(containers.len() + 1);
    let config = stand.config.to_string();
    let call = |target: Target| -> anyhow::Result<(String, Duration)> {
        let mut command = stand.plugin.command(verb, &target);
        let outcome = stand.plugin.netns().run(|| {
            barrier.wait();
            timed(&mut command, &config)
        });
        outcome.context("cannot enter the node's namespace")?.with_context(|| format!("{} of {}", verb.name(), target.container))
    };
    thread::scope(|scope| {
        let calls: Vec<_> = containers
            .iter()
            .map(|container| {
                let call = &call;
                scope.spawn(move || call(container.target("eth0")))
            })
            .collect();
        barrier.wait();
        let start = Instant::now();
        let answers =
            calls.into_iter().map(|call| call.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect::<anyhow::Result<_>>();
        Ok((answers?, start.elapsed()))
    })
}

/// Runs a plugin to its end: what it printed, and the time from before its start to after its exit.
fn timed(command: &mut Command, config: &str) -> anyhow::Result<(String, Duration)> {
    use std::io::Write as _;
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let start = Instant::now();
    let mut child = command.spawn().context("cannot start the plugin")?;
    child.stdin.take().map(|mut stdin| stdin.write_all(config.as_bytes())).transpose().context("cannot write to the plugin")?;
    let output = child.wait_with_output().context("cannot wait for the plugin")?;
    let took = start.elapsed();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if !output.status.success() {
        bail!("the plugin failed with {}: {} {}", output.status, text(&output.stdout), text(&output.stderr));
    }
    Ok((text(&output.stdout), took))
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn beside(named: Option<&Path>, name: &str) -> anyhow::Result<PathBuf> {
    if let Some(path) = named {
        return path.canonicalize().with_context(|| format!("there is no program {}", path.display()));
    }
    let beside = std::env::current_exe().context("cannot find this program")?.with_file_name(name);
    ensure!(beside.exists(), "there is no {}: build it in the same profile, or name it on the command line (see --help)", beside.display());
    Ok(beside)
}
