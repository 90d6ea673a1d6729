//! The daemon's tables, by its socket.

use std::io::ErrorKind;
use std::path::Path;
use std::time::Duration;

use podgate_cni::{CallError, Client, Request};

use super::super::facts::{Daemon, Tables};

/// How long an answer may take; it comes within a millisecond.
const TIMEOUT: Duration = Duration::from_secs(5);

pub(super) fn ask(socket: &Path) -> Daemon {
    let client = Client::new(socket).with_timeout(TIMEOUT);
    let table = |name: &str| client.call(&Request::Show { table: name.to_owned() }, &[]);
    let tables = || Ok(Tables { status: table("status")?, workers: table("workers")?, peers: table("peers")? });
    match tables() {
        Ok(tables) => Daemon::Answers(Box::new(tables)),
        Err(CallError::Unreachable { source, .. }) if source.kind() == ErrorKind::PermissionDenied => Daemon::Denied(socket.to_owned()),
        Err(CallError::Unreachable { .. }) => Daemon::Down(socket.to_owned()),
        Err(error) => Daemon::Mute(error.to_string()),
    }
}
