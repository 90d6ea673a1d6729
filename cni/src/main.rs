//! `podgate-cni`: the CNI plugin (CNI SPEC.md 1.1.0). A container runtime runs it once for each command; it checks what it is given, opens the
//! container's network namespace, passes it to the daemon, and prints what comes back. Everything else is the daemon's work.
#![forbid(unsafe_code)]

mod command;
mod daemon;
mod delegate;
mod environment;
mod error;
mod namespace;
mod network;
mod note;
mod section;

use std::io::Write;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use podgate_cni::result::VERSIONS;
use serde_json::Value;

use crate::command::say;
use crate::environment::{Command, Environment};
use crate::error::Error;

/// The longest configuration that is read, in bytes. A list of a node's attachments, for GC, is by far the longest part.
const CONFIG_LEN_MAX: u64 = 1024 * 1024;

/// How long the runtime may take to write the configuration.
const CONFIG_TIMEOUT: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    let mut version = VERSIONS[VERSIONS.len() - 1];
    let (output, code) = match run(&mut version) {
        Ok(output) => (output, ExitCode::SUCCESS),
        Err(error) => (Some(error.to_json(version)), ExitCode::FAILURE),
    };
    let Some(output) = output else { return code };
    let mut stdout = std::io::stdout().lock();
    match writeln!(stdout, "{output}").and_then(|()| stdout.flush()) {
        Ok(()) => code,
        Err(e) => {
            say(format!("the result cannot be written: {e}"));
            ExitCode::FAILURE
        }
    }
}

/// Runs the command of this process's environment; `version` becomes the one that an error is told in.
fn run(version: &mut &'static str) -> Result<Option<Value>, Error> {
    // Before the configuration is read: somebody who runs this by hand is told at once, and not left waiting.
    let command = Command::from_environment()?;
    let config = delegate::read_bounded(std::io::stdin(), CONFIG_LEN_MAX, Instant::now() + CONFIG_TIMEOUT)
        .map_err(|source| Error::Io { doing: "read the network configuration from standard input".into(), source })?;
    let blank = config.iter().all(u8::is_ascii_whitespace);
    let question: Result<Value, _> = if command == Command::Version && blank { Ok(Value::Null) } else { serde_json::from_slice(&config) };
    if let Ok(question) = &question {
        *version = network::version_to_answer_in(question);
    }
    let environment = Environment::of(command)?;
    let question = question.map_err(|e| Error::Undecodable { what: "the network configuration".into(), problem: format!("it is not JSON: {e}") })?;
    match command {
        Command::Version => command::version(&question).map(Some),
        _ => command::run(command, environment, question, &config),
    }
}
