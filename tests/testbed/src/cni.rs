//! Calls a CNI plugin as a container runtime does: the command in the environment, the configuration on its standard input, JSON on its
//! standard output (CNI SPEC.md, section 2 and 4). `podgate-bench attach` uses it as well.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use podgate::lab::{LabError, Node};
use podgate::netlink::{LinkSettings, Netlink};
use podgate_runtime::netns::Netns;
use serde_json::{Value, json};

use crate::tool::{Running, ToolError};

/// How long a plugin has, which is far longer than any should take.
const PATIENCE: Duration = Duration::from_secs(120);

/// What a plugin is asked to do (`CNI_COMMAND`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// `ADD`
    Add,
    /// `DEL`
    Del,
    /// `CHECK`
    Check,
    /// `GC`
    Gc,
    /// `STATUS`
    Status,
    /// `VERSION`
    Version,
}

impl Verb {
    /// As the environment has it.
    pub const fn name(self) -> &'static str {
        match self {
            Verb::Add => "ADD",
            Verb::Del => "DEL",
            Verb::Check => "CHECK",
            Verb::Gc => "GC",
            Verb::Status => "STATUS",
            Verb::Version => "VERSION",
        }
    }
}

/// A plugin, called in the network namespace of a node.
#[derive(Debug)]
pub struct Plugin {
    program: PathBuf,
    search: OsString,
    netns: Netns,
}

/// What names an attachment in a call.
#[derive(Clone, Debug, Default)]
pub struct Target {
    /// `CNI_CONTAINERID`
    pub container: String,
    /// `CNI_NETNS`; unset where there is none.
    pub netns: Option<PathBuf>,
    /// `CNI_IFNAME`
    pub ifname: String,
    /// `CNI_ARGS`
    pub args: String,
}

/// A call under way.
pub struct Calling(Running);

/// What a plugin answered.
#[derive(Clone, Debug)]
pub struct Answer {
    /// How it exited.
    pub status: ExitStatus,
    /// What it printed; null if nothing.
    pub json: Value,
    /// What it said to people.
    pub stderr: String,
    /// From its start to its end.
    pub took: Duration,
}

impl Plugin {
    /// `program`, which finds others in `search`, on the node whose namespace is `netns`.
    pub fn new(program: impl Into<PathBuf>, search: &[PathBuf], netns: &Netns) -> Result<Plugin, ToolError> {
        let program = program.into();
        let failed = |why: String| ToolError::Output { what: program.display().to_string(), why, printed: String::new() };
        let search = env::join_paths(search).map_err(|error| failed(error.to_string()))?;
        let netns = netns.try_clone().map_err(|source| ToolError::Run { what: program.display().to_string(), source })?;
        Ok(Plugin { program, search, netns })
    }

    /// Another plugin on the same node.
    pub fn sibling(&self, program: impl Into<PathBuf>) -> Result<Plugin, ToolError> {
        Plugin::new(program, &env::split_paths(&self.search).collect::<Vec<_>>(), &self.netns)
    }

    /// Its command line and environment, for a thread that is in the node's namespace already.
    pub fn command(&self, verb: Verb, target: &Target) -> Command {
        let mut command = Command::new(&self.program);
        command.env_clear().env("PATH", env::var_os("PATH").unwrap_or_default()).env("CNI_PATH", &self.search).env("CNI_COMMAND", verb.name());
        // Of the calls that are about no attachment the specification has no such variables.
        if !matches!(verb, Verb::Gc | Verb::Status | Verb::Version) {
            command.env("CNI_CONTAINERID", &target.container).env("CNI_IFNAME", &target.ifname);
            command.envs(target.netns.as_ref().map(|netns| ("CNI_NETNS", netns)));
            command.envs((!target.args.is_empty()).then_some(("CNI_ARGS", &target.args)));
        }
        command
    }

    /// Starts a call and does not wait for it.
    pub fn start(&self, verb: Verb, target: &Target, config: &Value) -> Result<Calling, ToolError> {
        let command = self.command(verb, target);
        let input = config.to_string();
        let run = |source| ToolError::Run { what: self.program.display().to_string(), source };
        self.netns.run(|| Running::start(command, input.as_bytes())).map_err(run)?.map(Calling)
    }

    /// Calls it and waits for its answer.
    pub fn call(&self, verb: Verb, target: &Target, config: &Value) -> Result<Answer, ToolError> {
        self.start(verb, target, config)?.answer()
    }

    /// The node's namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }
}

impl Calling {
    /// Waits for its end for `time` at most; whether it has ended.
    pub fn ends_within(&mut self, time: Duration) -> Result<bool, ToolError> {
        self.0.ends_within(time)
    }

    /// Kills it with SIGKILL.
    pub fn kill(&mut self) -> Result<(), ToolError> {
        self.0.kill()
    }

    /// Waits for its answer.
    pub fn answer(self) -> Result<Answer, ToolError> {
        let ended = self.0.end(PATIENCE)?;
        let json = match ended.stdout.trim() {
            "" => Value::Null,
            text => serde_json::from_str(text).map_err(|error| ToolError::Output {
                what: ended.what.clone(),
                why: error.to_string(),
                printed: text.to_owned(),
            })?,
        };
        Ok(Answer { status: ended.status, json, stderr: ended.stderr, took: ended.took })
    }
}

impl Answer {
    /// Its JSON, provided that it succeeded.
    pub fn success(self) -> Result<Value, ToolError> {
        if self.status.success() {
            return Ok(self.json);
        }
        Err(ToolError::Failed { what: "the plugin".into(), status: self.status, printed: format!("{} {}", self.json, self.stderr) })
    }

    /// The error's code, if it failed as the specification says it: another exit code than 0, and an error object.
    pub fn error(&self) -> Option<u64> {
        if self.status.success() { None } else { self.json["code"].as_u64() }
    }
}

/// The configuration of a network of `node` as a runtime hands it to our plugin, in `version` of the specification and with the further
/// keys of `more`.
pub fn network(node: &Node, name: &str, version: &str, more: &Value) -> Value {
    let mut config = json!({"cniVersion": version, "name": name, "type": "podgate-cni", "socket": node.socket()});
    if let (Some(config), Some(more)) = (config.as_object_mut(), more.as_object()) {
        config.extend(more.clone());
    }
    config
}

/// `config` with the result of an earlier ADD, as CHECK and DEL get it.
pub fn with_result(config: &Value, result: &Value) -> Value {
    let mut config = config.clone();
    config["prevResult"] = result.clone();
    config
}

/// A namespace as a runtime makes one for a container: nothing in it but a loopback interface that is down. It ends when this is dropped.
#[derive(Debug)]
pub struct Container {
    id: String,
    netns: Netns,
    path: PathBuf,
}

impl Container {
    /// The container `id`, whose namespace is mounted at `directory/id`.
    pub fn new(directory: &Path, id: &str) -> Result<Container, LabError> {
        let path = directory.join(id);
        std::fs::create_dir_all(directory).map_err(|source| LabError::File { path: directory.to_owned(), source })?;
        let netns = Netns::anonymous()?;
        netns.bind(&path)?;
        Ok(Container { id: id.to_owned(), netns, path })
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Where its namespace is mounted.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What names its interface `ifname` in a call.
    pub fn target(&self, ifname: &str) -> Target {
        Target { container: self.id.clone(), netns: Some(self.path.clone()), ifname: ifname.to_owned(), args: String::new() }
    }

    /// A handle on its links, addresses and routes.
    pub fn netlink(&self) -> Result<Netlink, LabError> {
        Netlink::open(&self.netns).map_err(|source| LabError::Netlink { machine: self.id.clone(), source })
    }

    /// Runs `work` inside.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, LabError> {
        self.netns.run(work).map_err(|source| LabError::Program { what: format!("something in {}", self.id), source })
    }

    /// Brings its loopback interface up, as the `loopback` plugin does before any other.
    pub fn loopback(&self) -> Result<(), LabError> {
        let up = LinkSettings::new().up();
        self.netlink()?.set_link("lo", &up).map_err(|source| LabError::Netlink { machine: self.id.clone(), source })
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // A mount that cannot be taken away goes with the sandbox.
        let _ = Netns::unbind(&self.path);
    }
}
