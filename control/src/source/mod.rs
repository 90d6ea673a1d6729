//! Where the cluster's objects come from. Every source yields the same: whole [`ClusterState`]s, the newest counts.
//!
//! A source is level-triggered: it tells what *is*, never only what changed, so nothing that happened while it was not looking is lost.
//! When it loses sight of its origin, the last state stays in force and [`SourceStatus`] says so.

mod directory;
pub mod kubernetes;
mod manifest;

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

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
    /// Where what is to be announced goes, if anybody is to hear of it.
    announcement: Option<watch::Sender<Option<Announced>>>,
    task: JoinHandle<()>,
}

/// Annotations and what they are to say, as [`crate::model::Announcement::annotations`] gives them.
pub type Announced = [(&'static str, String); 2];

impl Source {
    /// Says how this node's gateway is reached, for the other nodes to know. A directory is nobody's to write to: there it is left to whoever
    /// writes the manifests.
    pub fn announce(&self, announced: Announced) {
        if let Some(announcement) = &self.announcement {
            announcement.send_if_modified(|known| known.replace(announced.clone()).as_ref() != Some(&announced));
        }
    }
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
    /// The file; or the object, or the URL.
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
    /// The API server cannot be asked.
    #[error("source.kubernetes: {0}")]
    Kubernetes(#[from] kubernetes::AccessError),
    /// It ended before it had begun, by a panic.
    #[error("the source ended before anything was read; the log says why")]
    Ended,
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

/// Starts the source that the configuration names, for the node called `node`, and returns when it has read everything once: for an API server
/// that is away this waits until it is there. To be called inside a tokio runtime.
pub async fn start(config: &SourceConfig, node: &str) -> Result<Source, SourceError> {
    match config {
        SourceConfig::Directory(path) => directory::start(path).await,
        SourceConfig::Kubernetes { server, kubeconfig } => kubernetes::start(server.as_deref(), kubeconfig.as_deref(), node).await,
        SourceConfig::Etcd(_) => Err(SourceError::NotBuilt { kind: config.kind() }),
    }
}

/// The Unix clock, in seconds: for people, nothing is measured by it.
fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// What a directory of manifests says now, read once: for tools that look and do not watch.
pub fn read_directory(path: &Path) -> Result<(ClusterState, Vec<SourceIssue>), SourceError> {
    directory::read_once(path)
}
