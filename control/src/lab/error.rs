//! What can go wrong in building and driving a cluster.

use std::io;
use std::path::PathBuf;

use podgate_runtime::netns::NetnsError;

use crate::netlink::NetlinkError;

/// Why the cluster could not be built, or did not do what it was told.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// A network namespace could not be had.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// A link, an address or a route could not be set.
    #[error("cannot set up {machine}: {source}")]
    Netlink {
        /// Whose.
        machine: String,
        /// What the kernel said.
        source: NetlinkError,
    },
    /// A thread or a socket of a program could not be had.
    #[error("cannot start {what}: {source}")]
    Program {
        /// Which program.
        what: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file could not be read or written.
    #[error("cannot use {path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The `podgate` program failed.
    #[error("`podgate {command}` on {node} failed with {status}: {stderr}\n--- the end of {node}'s log ---\n{log}")]
    Podgate {
        /// On which node.
        node: String,
        /// Its arguments.
        command: String,
        /// How it exited.
        status: String,
        /// What it said.
        stderr: String,
        /// The daemon's last lines.
        log: String,
    },
    /// The `podgate` program printed something else than it should.
    #[error("`podgate {command}` on {node} printed what cannot be used ({what}): {stdout}")]
    Output {
        /// On which node.
        node: String,
        /// Its arguments.
        command: String,
        /// What is wrong with it.
        what: String,
        /// What it printed.
        stdout: String,
    },
    /// Something that was waited for did not come about.
    #[error("{what} did not happen within {seconds} s{detail}")]
    TooLate {
        /// What.
        what: String,
        /// How long it was waited for.
        seconds: u64,
        /// What was seen instead.
        detail: String,
    },
    /// The lab has no machine of that name.
    #[error("there is no machine {name}; there are {known}")]
    NoSuchMachine {
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
}
