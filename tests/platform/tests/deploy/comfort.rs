//! What an operator reads: the log, and the pages beside the manifests.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use clap::CommandFactory;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use podgate::cli::Cli;
use podgate_core::verdict::DropReason;
use podgate_testbed::{Bed, Outcome};
use serde_json::Value;

use crate::{deploy, workspace};

pub fn level(bed: &Bed) -> Outcome {
    let node = bed.lab()?.node(1);
    let changed = node.podgate_output(&["log-level", "debug"])?;
    let said = String::from_utf8_lossy(&changed.stderr);
    assert!(changed.status.success() && said.contains("is debug now; it was info"), "{said}");
    assert!(node.log_tail(50).contains("the log's level was changed"), "{}", node.log_tail(5));
    let refused = node.podgate_output(&["log-level", "loud"])?;
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(refused.status.code() == Some(1) && said.contains("write off, error, warn"), "{said}");
    let back = node.podgate_output(&["log-level", "info"])?;
    assert!(String::from_utf8_lossy(&back.stderr).contains("it was debug"));
    Ok(())
}

/// A gateway that takes over from another says so in JSON; when it ends, the other has the node again.
pub fn json(bed: &Bed) -> Outcome {
    let node = bed.lab()?.node(1);
    let mut command = Command::new(bed.binary());
    command.args(["run", "--take-over", "--log-format=json", "--config"]).arg(node.config());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = node.machine().run(|| command.spawn())??;
    let lines = BufReader::new(child.stderr.take().ok_or("no stderr")?).lines();
    let mut said = Vec::new();
    for line in lines {
        let line: Value = serde_json::from_str(&line?)?;
        assert!(line["level"] == "INFO" && line["timestamp"].is_string(), "{line}");
        said.push(line["fields"]["message"].as_str().unwrap_or_default().to_owned());
        if said.last().is_some_and(|message| message == "readiness") {
            assert!(!node.podgate_output(&["status"])?.stdout.is_empty());
            kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM)?;
        }
    }
    assert!(said[0].contains("asking it to hand the node over"), "{said:?}");
    assert!(said.iter().any(|message| message.contains("took over from the gateway before this one")), "{said:?}");
    let status = child.wait()?;
    assert!(status.success(), "{status}");
    Ok(node.wait_ready()?)
}

/// The pages name commands and reasons that exist.
pub fn pages(_: &Bed) -> Outcome {
    let known: Vec<String> = Cli::command().get_subcommands().map(|command| command.get_name().to_owned()).collect();
    let (mut commands, mut reasons) = (0, 0);
    for page in std::fs::read_dir(workspace("deploy/docs"))?.flatten() {
        let page = page.file_name().to_string_lossy().into_owned();
        let text = deploy(&format!("docs/{page}"))?;
        // What stands between backticks, and lines of commands.
        let code = text.split('`').skip(1).step_by(2).chain(text.lines().filter_map(|line| line.strip_prefix("    ")));
        for words in code {
            let mut words = words.split_whitespace();
            match (words.next(), words.next()) {
                (Some("podgate"), Some(command)) => {
                    assert!(known.iter().any(|name| name == command), "{page}: there is no `podgate {command}`");
                    commands += 1;
                }
                (Some(word), None)
                    if word.contains('_') && word.chars().all(|c| c.is_ascii_lowercase() || c == '_') && !word.starts_with("kubeproxy") =>
                {
                    assert!(DropReason::ALL.iter().any(|reason| reason.name() == word), "{page}: nothing is dropped as `{word}`");
                    reasons += 1;
                }
                _ => {}
            }
        }
    }
    assert!(commands > 20 && reasons > 4, "{commands} commands and {reasons} reasons were found");
    Ok(())
}
