//! A node of the lab: a machine on the underlay that runs the real `podgate`, with a configuration and a directory of manifests of
//! its own, as an operator would set it up.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::LabError;
use super::machine::{Dual, Machine};
use super::manifest::NodeSpec;

/// How long a daemon has to become ready, and to end after SIGTERM.
const PATIENCE: Duration = Duration::from_secs(20);

/// A node and its daemon.
pub struct Node {
    machine: Machine,
    spec: NodeSpec,
    gateway: Dual,
    directory: PathBuf,
    binary: PathBuf,
    daemon: Mutex<Option<Child>>,
}

/// What a node's configuration says beyond the addresses.
#[derive(Clone, Debug)]
pub struct NodeSettings {
    /// How many workers; `None` leaves it to the daemon. Two, unless `PODGATE_WORKERS` in the environment says otherwise.
    pub workers: Option<u16>,
    /// `veth` or `tun`: `veth`, unless `PODGATE_ATTACH` in the environment says otherwise.
    pub attach: String,
    /// What stands under `source:`, where it is not the node's directory of manifests.
    pub source: Option<String>,
    /// Further lines of YAML.
    pub extra: String,
    /// The filter of the daemon's log (`PODGATE_LOG`).
    pub log: String,
    /// Further words for `podgate run`.
    pub run: Vec<String>,
}

impl Default for NodeSettings {
    fn default() -> NodeSettings {
        let workers = std::env::var("PODGATE_WORKERS").ok().and_then(|text| text.parse().ok()).unwrap_or(2);
        let attach = std::env::var("PODGATE_ATTACH").unwrap_or_else(|_| "veth".to_owned());
        NodeSettings { workers: Some(workers), attach, source: None, extra: String::new(), log: "info".into(), run: Vec::new() }
    }
}

impl Node {
    pub(super) fn new(machine: Machine, spec: NodeSpec, gateway: Dual, directory: PathBuf, binary: PathBuf) -> Result<Node, LabError> {
        let node = Node { machine, spec, gateway, directory, binary, daemon: Mutex::new(None) };
        for directory in [node.manifests(), node.directory.join("run"), node.directory.join("state")] {
            fs::create_dir_all(&directory).map_err(|source| LabError::File { path: directory, source })?;
        }
        Ok(node)
    }

    /// The machine.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Its name.
    pub fn name(&self) -> &str {
        self.machine.name()
    }

    /// Its `Node` object.
    pub fn spec(&self) -> &NodeSpec {
        &self.spec
    }

    /// The gateway's own addresses in the node's pod ranges.
    pub fn gateway(&self) -> Dual {
        self.gateway
    }

    /// The daemon's socket.
    pub fn socket(&self) -> PathBuf {
        self.directory.join("run/podgate.sock")
    }

    /// Where the gateway's own namespace is mounted.
    pub fn gateway_netns(&self) -> PathBuf {
        self.directory.join("run/netns")
    }

    /// The directory that the daemon watches.
    pub fn manifests(&self) -> PathBuf {
        self.directory.join("cluster.d")
    }

    /// Its configuration file.
    pub fn config(&self) -> PathBuf {
        self.directory.join("podgate.yaml")
    }

    /// Writes its configuration.
    pub fn configure(&self, settings: &NodeSettings, cluster: &ClusterRanges) -> Result<(), LabError> {
        let Dual { v4, v6 } = self.machine.addresses();
        let directory = self.directory.display();
        let mut text = format!(
            "node: {name}\nunderlay: {{address: [{v4}, \"{v6}\"]}}\npodCIDRs: {pods}\nserviceCIDRs: {services}\nsource:\n  {source}\n\
             runtimeDir: {directory}/run\nstateDir: {directory}/state\nattach: {attach}\n{extra}",
            name = self.name(),
            pods = cluster.pods,
            services = cluster.services,
            source = settings.source.clone().unwrap_or_else(|| format!("directory: {directory}/cluster.d")),
            attach = settings.attach,
            extra = settings.extra,
        );
        if let Some(workers) = settings.workers {
            text.push_str(&format!("workers: {{count: {workers}}}\n"));
        }
        write_atomically(&self.config(), &text)
    }

    /// Puts the document `text` into the file `name` of the node's directory source, at once and as a whole.
    pub fn write_manifest(&self, name: &str, text: &str) -> Result<(), LabError> {
        write_atomically(&self.manifests().join(name), text)
    }

    /// Takes a file out of the node's directory source.
    pub fn remove_manifest(&self, name: &str) -> Result<(), LabError> {
        let path = self.manifests().join(name);
        fs::remove_file(&path).map_err(|source| LabError::File { path, source })
    }

    /// Makes what must outlive the daemon, as the unit or the init container before it does. Safe to repeat.
    pub fn prepare(&self) -> Result<(), LabError> {
        self.podgate(&["prepare", "--config", &self.config().display().to_string()]).map(|_| ())
    }

    /// Starts the daemon and returns at once.
    pub fn launch(&self, settings: &NodeSettings) -> Result<(), LabError> {
        let path = self.log_path();
        let log = File::options().create(true).append(true).open(&path).map_err(|source| LabError::File { path, source })?;
        let errors = log.try_clone().map_err(|source| LabError::File { path: self.log_path(), source })?;
        let mut command = Command::new(&self.binary);
        command.arg("run").arg("--config").arg(self.config()).args(&settings.run).env("PODGATE_LOG", &settings.log);
        command.stdin(Stdio::null()).stdout(log).stderr(errors);
        // A child is born into the namespace of the thread that starts it.
        let child = self.machine.run(|| command.spawn())?;
        *self.daemon() = Some(child.map_err(|source| LabError::Program { what: format!("podgate on {}", self.name()), source })?);
        Ok(())
    }

    /// Waits until the node forwards with a complete snapshot.
    pub fn wait_ready(&self) -> Result<(), LabError> {
        let start = Instant::now();
        loop {
            // A second at a time, so that a daemon which gave up is noticed.
            match self.podgate(&["status", "--wait=1"]) {
                Ok(_) => return Ok(()),
                Err(error) if start.elapsed() > PATIENCE || !self.running() => return Err(error),
                Err(_) => {}
            }
        }
    }

    /// Whether the daemon runs.
    pub fn running(&self) -> bool {
        self.daemon().as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    /// The daemon's process.
    pub fn pid(&self) -> Option<u32> {
        self.daemon().as_ref().map(Child::id)
    }

    /// Ends the daemon with `signal` and waits until it has gone.
    pub fn end(&self, signal: Signal) -> Result<(), LabError> {
        let Some(mut child) = self.daemon().take() else { return Ok(()) };
        let failed = |source| LabError::Program { what: format!("the end of podgate on {}", self.name()), source };
        kill(Pid::from_raw(child.id() as i32), signal).map_err(|errno| failed(errno.into()))?;
        let start = Instant::now();
        while child.try_wait().map_err(failed)?.is_none() {
            if start.elapsed() > PATIENCE {
                child.kill().and_then(|()| child.wait()).map_err(failed)?;
                let what = format!("the end of podgate on {} after {signal}", self.name());
                return Err(LabError::TooLate { what, seconds: PATIENCE.as_secs(), detail: format!("\n{}", self.log_tail(30)) });
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Runs `podgate ARGS` on the node, as an operator would there, and gives what it printed.
    pub fn podgate(&self, arguments: &[&str]) -> Result<String, LabError> {
        let output = self.podgate_output(arguments)?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(self.failure(arguments, &output))
    }

    fn failure(&self, arguments: &[&str], output: &Output) -> LabError {
        LabError::Podgate {
            node: self.name().to_owned(),
            command: arguments.join(" "),
            status: output.status.to_string(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
            log: self.log_tail(20),
        }
    }

    /// The same, however it exits.
    pub fn podgate_output(&self, arguments: &[&str]) -> Result<Output, LabError> {
        let mut command = Command::new(&self.binary);
        command.args(arguments).env("PODGATE_SOCKET", self.socket()).stdin(Stdio::null());
        let failed = |source| LabError::Program { what: format!("podgate {} on {}", arguments.join(" "), self.name()), source };
        self.machine.run(|| command.output())?.map_err(failed)
    }

    /// Runs `podgate ARGS -o json` on the node. That the node is degraded (exit code 3) is part of the answer.
    pub fn query(&self, arguments: &[&str]) -> Result<Value, LabError> {
        let arguments = [arguments, &["-o", "json"]].concat();
        let output = self.podgate_output(&arguments)?;
        if !matches!(output.status.code(), Some(0 | 3)) {
            return Err(self.failure(&arguments, &output));
        }
        let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
        serde_json::from_str(&stdout).map_err(|error| self.bad_output(&arguments, error.to_string(), stdout))
    }

    /// The drop counters by name, zeroes included as the daemon gives them.
    pub fn drops(&self) -> Result<Vec<(String, u64)>, LabError> {
        let value = self.query(&["drops"])?;
        let rows = value["drops"].as_array().cloned().unwrap_or_default();
        Ok(rows.iter().filter_map(|row| Some((row["reason"].as_str()?.to_owned(), row["packets"].as_u64()?))).collect())
    }

    /// The sum of the drop counters called `reasons`.
    pub fn dropped(&self, reasons: &[&str]) -> Result<u64, LabError> {
        Ok(self.drops()?.iter().filter(|(reason, _)| reasons.contains(&reason.as_str())).map(|(_, packets)| packets).sum())
    }

    /// The daemon's log.
    pub fn log(&self) -> String {
        fs::read(self.log_path()).map(|log| String::from_utf8_lossy(&log).into_owned()).unwrap_or_default()
    }

    /// Its last `lines` lines.
    pub fn log_tail(&self, lines: usize) -> String {
        let log = self.log();
        let all: Vec<&str> = log.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    pub(super) fn bad_output(&self, arguments: &[&str], what: String, stdout: String) -> LabError {
        LabError::Output { node: self.name().to_owned(), command: arguments.join(" "), what, stdout }
    }

    fn log_path(&self) -> PathBuf {
        self.directory.join("log")
    }

    fn daemon(&self) -> MutexGuard<'_, Option<Child>> {
        self.daemon.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(mut child) = self.daemon().take() {
            // The sandbox ends it at the latest.
            let _ = child.kill().and_then(|()| child.wait());
        }
    }
}

/// The cluster's ranges, as YAML lists.
#[derive(Clone, Debug)]
pub struct ClusterRanges {
    /// Pods.
    pub pods: String,
    /// Services.
    pub services: String,
}

/// Writes under a name that no source reads, then renames: a watcher never sees half a document.
fn write_atomically(path: &Path, text: &str) -> Result<(), LabError> {
    let failed = |source| LabError::File { path: path.to_owned(), source };
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let draft = path.with_file_name(format!(".{name}.draft"));
    fs::write(&draft, text).and_then(|()| fs::rename(&draft, path)).map_err(failed)
}
