//! Runs the plugin as a runtime does.

use std::io::{ErrorKind, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::peer::Peer;

/// The versions of the specification.
pub const VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// A call of the plugin: the environment, and what it reads.
#[derive(Clone, Debug)]
pub struct Shim {
    environment: Vec<(String, String)>,
    stdin: Vec<u8>,
}

/// What came of it.
#[derive(Debug)]
pub struct Outcome {
    pub success: bool,
    /// `Null` if nothing was printed.
    pub json: Value,
    pub stderr: String,
    pub took: Duration,
}

impl Shim {
    /// `command` with the environment that it needs, in the network `config` of `version` with `peer` as daemon.
    pub fn new(command: &str, version: &str, peer: &Peer, config: Value) -> Shim {
        let mut network = json!({"cniVersion": version, "name": "podgate", "type": "podgate-cni", "socket": peer.socket});
        if let Value::Object(more) = config {
            network.as_object_mut().unwrap().extend(more);
        }
        network.as_object_mut().unwrap().retain(|_, value| *value != json!("absent"));
        let shim = Shim { environment: Vec::new(), stdin: network.to_string().into_bytes() };
        let shim = shim.set("CNI_COMMAND", command).set("CNI_PATH", "/nonexistent:/opt/none");
        if matches!(command, "ADD" | "DEL" | "CHECK") {
            shim.set("CNI_CONTAINERID", "c1").set("CNI_NETNS", "/proc/self/ns/net").set("CNI_IFNAME", "eth0")
        } else {
            shim
        }
    }

    pub fn set(mut self, name: &str, value: &str) -> Shim {
        self.environment.retain(|(other, _)| other != name);
        self.environment.push((name.into(), value.into()));
        self
    }

    pub fn path(self, directory: &Path) -> Shim {
        self.set("CNI_PATH", &format!("/nonexistent:{}", directory.display()))
    }

    pub fn unset(mut self, name: &str) -> Shim {
        self.environment.retain(|(other, _)| other != name);
        self
    }

    pub fn stdin(self, stdin: impl Into<Vec<u8>>) -> Shim {
        Shim { stdin: stdin.into(), ..self }
    }

    /// Runs it.
    pub fn run(&self) -> Outcome {
        self.run_as(Command::new(env!("CARGO_BIN_EXE_podgate-cni")))
    }

    /// Runs `program`, which is the plugin or runs it.
    pub fn run_as(&self, mut program: Command) -> Outcome {
        let start = Instant::now();
        program.env_clear().envs(self.environment.iter().map(|(name, value)| (name, value)));
        let mut child = program.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        match child.stdin.take().unwrap().write_all(&self.stdin) {
            // A plugin may fail before it has read everything.
            Err(e) if e.kind() != ErrorKind::BrokenPipe => panic!("{e}"),
            _ => {}
        }
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(matches!(output.status.code(), Some(0 | 1)), "{:?}: {stderr}", output.status);
        let stdout = String::from_utf8(output.stdout).unwrap();
        let json = if stdout.is_empty() { Value::Null } else { serde_json::from_str(&stdout).unwrap_or_else(|e| panic!("{e}: {stdout}")) };
        Outcome { success: output.status.success(), json, stderr, took: start.elapsed() }
    }
}

impl Outcome {
    /// It succeeded and printed nothing.
    #[track_caller]
    pub fn silent(&self) {
        assert!(self.success && self.json.is_null(), "{self:?}");
    }

    /// It failed with `code`, in `version`, and says `words` in its message or details.
    #[track_caller]
    pub fn failed(&self, version: &str, code: u64, words: &str) {
        assert!(!self.success, "{self:?}");
        let keys: Vec<&String> = self.json.as_object().unwrap().keys().collect();
        assert_eq!(keys, ["cniVersion", "code", "details", "msg"], "{self:?}");
        assert_eq!((&self.json["cniVersion"], &self.json["code"]), (&json!(version), &json!(code)), "{self:?}");
        let text = |key: &str| self.json[key].as_str().unwrap();
        assert!(!text("msg").is_empty(), "{self:?}");
        assert!(format!("{} | {}", text("msg"), text("details")).contains(words), "{words:?} is not in {self:?}");
    }

    /// It succeeded and printed this.
    #[track_caller]
    pub fn printed(&self, json: &Value) {
        assert!(self.success, "{self:?}");
        assert_eq!(&self.json, json);
    }
}
