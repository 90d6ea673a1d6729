//! A real etcd on a machine of the lab (Debian: `etcd-server`).

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use podgate::lab::Machine;

use crate::need::program;
use crate::tool::ToolError;

/// Starts a member that is a cluster by itself, keeps its data in `directory` and its log beside it, and serves clients at these URLs; with further
/// arguments.
pub fn start(machine: &Machine, directory: &Path, clients: &[&str], more: &[&str]) -> Result<Child, ToolError> {
    let failed = |source: io::Error| ToolError::File { path: directory.to_owned(), source };
    let log = fs::create_dir_all(directory).and_then(|()| File::options().create(true).append(true).open(directory.with_extension("log")));
    let log = log.and_then(|log| Ok((log.try_clone()?, log))).map_err(failed)?;
    let run = |source| ToolError::Run { what: "etcd".into(), source };
    let mut command = Command::new(program("etcd").ok_or_else(|| run(io::ErrorKind::NotFound.into()))?);
    // It refuses to run on a machine of another kind than it is tested on unless told so.
    command.env("ETCD_UNSUPPORTED_ARCH", std::env::consts::ARCH.replace("aarch64", "arm64"));
    command.arg("--data-dir").arg(directory).args(["--listen-peer-urls", "http://127.0.0.1:0", "--listen-client-urls", &clients.join(",")]);
    command.args(["--advertise-client-urls", clients.first().copied().unwrap_or_default()]).args(more);
    command.stdin(Stdio::null()).stdout(log.0).stderr(log.1);
    machine.run(|| command.spawn())?.map_err(run)
}
