//! Where the cluster's objects come from. Every source yields the same: whole [`ClusterState`]s, the newest counts.
//!
//! A source is level-triggered: it tells what *is*, never only what changed, so nothing that happened while it was not looking is lost.
//! When it loses sight of its origin, the last state stays in force and [`SourceStatus`] says so.

mod directory;
mod manifest;

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use serde::Serialize;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::config::SourceConfig;
use crate::model::ClusterState;

/// A running source. Dropping it stops it.
#[derive(Debug)]
pub struct Source {
    /// The newest state. The first one is there from the start.
    pub state: watch::Receiver<Arc<ClusterState>>,
    /// How the source is.
    pub status: watch::Receiver<SourceStatus>,
    task: JoinHandle<()>,
}

impl Drop for Source {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// How a source is, for `podgate status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SourceStatus {
    /// `directory`, `kubernetes` or `etcd`.
    pub kind: &'static str,
    /// Whether the state is what the origin says now, as far as it can be read.
    pub connected: bool,
    /// What is wrong with it.
    pub errors: Vec<SourceIssue>,
    /// When the state last changed, in seconds of the Unix clock.
    #[serde(rename = "lastChangeUnixSeconds")]
    pub last_change: Option<u64>,
    /// How many objects the state holds.
    pub objects: usize,
}

/// Something wrong in a source.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SourceIssue {
    /// The file.
    pub file: String,
    /// Its line, from 1, where there is one to blame.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub line: Option<u64>,
    /// What is wrong and what to do.
    pub reason: String,
}

impl fmt::Display for SourceIssue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "{}:{line}: {}", self.file, self.reason),
            None => write!(f, "{}: {}", self.file, self.reason),
        }
    }
}

/// Why a source does not start.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The kind is in the configuration's grammar and not in this program.
    #[error("source.{kind}: this version of podgate cannot read from {kind} yet; use source: {{directory: /etc/podgate/cluster.d}}")]
    NotBuilt {
        /// The kind.
        kind: &'static str,
    },
    /// The directory cannot be read.
    #[error("source.directory: {path}: {reason}; make the directory, readable by the daemon, and put the cluster's manifests into it")]
    Directory {
        /// The directory.
        path: String,
        /// What the kernel says.
        reason: String,
    },
    /// The kernel gives out no watch.
    #[error("source.directory: {path} cannot be watched: {reason}; raise fs.inotify.max_user_instances and max_user_watches with sysctl")]
    Watch {
        /// The directory.
        path: String,
        /// What the kernel says.
        reason: String,
    },
}

/// Starts the source that the configuration names. To be called inside a tokio runtime.
pub async fn start(config: &SourceConfig) -> Result<Source, SourceError> {
    match config {
        SourceConfig::Directory(path) => directory::start(path).await,
        SourceConfig::Kubernetes { .. } | SourceConfig::Etcd(_) => Err(SourceError::NotBuilt { kind: config.kind() }),
    }
}

/// What a directory of manifests says now, read once: for tools that look and do not watch.
pub fn read_directory(path: &Path) -> Result<(ClusterState, Vec<SourceIssue>), SourceError> {
    directory::read_once(path)
}
