//! Where the cluster's objects come from. Every source yields the same: whole [`ClusterState`]s, the newest counts.
//!
//! A source is level-triggered: it tells what *is*, never only what changed, so nothing that happened while it was not looking is lost.
//! When it loses sight of its origin, the last state stays in force and [`SourceStatus`] says so.

mod cache;
mod directory;
pub(crate) mod etcd;
pub mod kubernetes;
pub(crate) mod manifest;

use std::fmt;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use ipnetwork::IpNetwork;
use serde::Serialize;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::config::{Config, SourceConfig};
use crate::model::ClusterState;
use crate::publish::Published;

/// Files in the state directory in which sources keep what their origins held.
pub(crate) const KEPT_FILES: [&str; 2] = [etcd::CACHE, kubernetes::CACHE];

/// A running source. Dropping it stops it.
#[derive(Debug)]
pub struct Source {
    /// The newest state. The first one is there from the start.
    pub state: watch::Receiver<Arc<ClusterState>>,
    /// How the source is.
    pub status: watch::Receiver<SourceStatus>,
    /// Where what is to be announced goes, if anybody is to hear of it.
    announcement: Option<watch::Sender<Option<Announced>>>,
    /// That the node forwards, for whoever is to hear of it.
    pub forwards: watch::Sender<bool>,
    /// Which addresses this node may give out; none where its ranges are nobody else's for good.
    pub tenure: Option<watch::Receiver<Tenure>>,
    /// For a source that takes part in the cluster: what to tell others of this node.
    pub report: watch::Sender<NodeReport>,
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

/// What a node that shares the cluster's ranges with others may give addresses out of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tenure {
    /// The blocks that nobody else can have.
    pub blocks: Vec<IpNetwork>,
    /// Until when that is sure, if it ever was.
    pub until: Option<Instant>,
}

/// What a source that takes part in the cluster tells of this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeReport {
    /// Its underlay addresses, which are its `InternalIP`s too.
    pub underlay: Vec<IpAddr>,
    /// MTU of its underlay, in bytes.
    pub underlay_mtu: u32,
    /// The pod ranges that the figures are about.
    pub ranges: Vec<IpNetwork>,
    /// How many of their addresses are in use, of IPv4 and of IPv6.
    pub used: [u128; 2],
    /// How many are free.
    pub free: [u128; 2],
    /// The slices that it publishes of its own services.
    pub published: Vec<Published>,
}

/// How a source is, for `podgate status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SourceStatus {
    /// `directory`, `kubernetes` or `etcd`.
    pub kind: &'static str,
    /// Whether the state is what the origin says now, as far as it can be read.
    pub connected: bool,
    /// Whether the state that is in force was whole when it was last read, however long ago: enough to forward by.
    #[serde(skip)]
    pub complete: bool,
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
    /// The API server cannot be asked.
    #[error("source.kubernetes: {0}")]
    Kubernetes(#[from] kubernetes::AccessError),
    /// It ended before it had begun, by a panic.
    #[error("the source ended before anything was read; the log says why")]
    Ended,
    /// etcd cannot be used as it is configured. That it does not answer is no such error.
    #[error(transparent)]
    Etcd(#[from] etcd::client::EtcdError),
    /// The machine's own name cannot be kept.
    #[error("stateDir: {path}: this machine's name among the nodes cannot be kept there: {source}; make it writable for the daemon")]
    Machine {
        /// The directory.
        path: String,
        /// What the kernel says.
        source: std::io::Error,
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

/// How a source begins where `stateDir` has what its origin said before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FirstLook {
    /// It waits for a moment for what the origin says now.
    ForNews,
    /// It begins with what is kept: packets wait. The news comes soon after.
    AtWhatIsKept,
}

/// Starts the source that the configuration names. An API server that is away is waited for, unless `stateDir` has what it said before. To be called
/// inside a tokio runtime.
pub async fn start(config: &Config, report: NodeReport, look: FirstLook) -> Result<Source, SourceError> {
    let look = match look {
        FirstLook::ForNews => cache::KNOWN_LOOK,
        FirstLook::AtWhatIsKept => Duration::ZERO,
    };
    match &config.source {
        SourceConfig::Directory(path) => directory::start(path, report).await,
        SourceConfig::Etcd(etcd) => etcd::start(config, etcd, report, look).await,
        SourceConfig::Kubernetes { server, kubeconfig } => {
            kubernetes::start(server.as_deref(), kubeconfig.as_deref(), &config.node, &config.state_dir, look).await
        }
    }
}

/// Seconds of the Unix clock.
pub(crate) fn unix_now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// What a directory of manifests says now, read once: for tools that look and do not watch.
pub fn read_directory(path: &Path) -> Result<(ClusterState, Vec<SourceIssue>), SourceError> {
    directory::read_once(path)
}
