//! `podgate.yaml`: read once at the start, refused with a reason or trusted ever after.
//!
//! ```
//! use podgate::config::{Config, HostFacts};
//! let text = "
//! underlay: {address: 192.0.2.1}
//! podCIDRs: [10.244.0.0/16]
//! source: {directory: /etc/podgate/cluster.d}
//! ";
//! let host = HostFacts { name: "node-1".into(), ephemeral_ports: 32768..=60999 };
//! let config = Config::parse("podgate.yaml".as_ref(), text, &host).unwrap();
//! assert_eq!((config.node.as_str(), config.overlay.port), ("node-1", 4790));
//! ```
//!
//! The file's shape is in `raw`, which refuses unknown keys with their line; what must hold between keys is in `validate`,
//! `addresses` and `publish`. Every error names the file and the key (or both keys), what is wrong and what to do.

mod addresses;
mod publish;
mod raw;
mod validate;

pub use publish::{Check, Place, Probe, Publish};
pub(crate) use validate::check_device_name;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnetwork::IpNetwork;
use podgate_cni::protocol::AttachMode;
use podgate_core::flow::Timeouts;
use podgate_core::snapshot::OutsideToPods;

use crate::ipam::IpamSettings;

/// The configuration of one node's gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The file that says all this, for errors that are found later.
    pub file: PathBuf,
    /// This node's name, as in its `Node` object.
    pub node: String,
    /// Where the overlay runs.
    pub underlay: Underlay,
    /// The overlay's port and VNI.
    pub overlay: Overlay,
    /// The cluster's pod ranges.
    pub pod_cidrs: Vec<IpNetwork>,
    /// The cluster's service ranges.
    pub service_cidrs: Vec<IpNetwork>,
    /// Node ports.
    pub node_ports: RangeInclusive<u16>,
    /// On which of the node's addresses node ports answer.
    pub node_port_addresses: NodePortAddresses,
    /// Source ports for traffic that leaves the cluster, sorted; `None` switches masquerade off.
    pub masquerade: Option<Vec<RangeInclusive<u16>>>,
    /// Inside these ranges a service's external IPs are served.
    pub external_ips: Vec<IpNetwork>,
    /// Where health is told over HTTP.
    pub health: SocketAddr,
    /// Where metrics are told over HTTP.
    pub metrics: SocketAddr,
    /// Where the cluster's objects come from.
    pub source: SourceConfig,
    /// The socket, the flow table and the gateway's namespace live here.
    pub runtime_dir: PathBuf,
    /// The journal of addresses lives here.
    pub state_dir: PathBuf,
    /// How pods are attached that do not say it themselves.
    pub attach: AttachMode,
    /// Workers; `None` leaves it to the machine.
    pub workers: Option<Workers>,
    /// For how long an idle worker looks for more packets before it sleeps; `None` leaves it to the machine.
    pub spin: Option<Duration>,
    /// Connections opened from outside the cluster to a pod's address.
    pub outside_to_pods: OutsideToPods,
    /// Names of the two TUNs.
    pub devices: Devices,
    /// The flow table.
    pub flows: Flows,
    /// Where the DHCP requests of pods are relayed to, whose addresses the plugin `dhcp` gives.
    pub dhcp_servers: Vec<Ipv4Addr>,
    /// How addresses are given out.
    pub ipam: IpamSettings,
    /// Services of this node's own that it publishes.
    pub publish: Vec<Publish>,
}

/// Where the overlay runs: what of it the configuration names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Underlay {
    /// One address, or one of each family.
    Addresses(Vec<IpAddr>),
    /// The addresses of this interface.
    Interface(String),
}

/// The overlay's parameters, the same on every node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overlay {
    /// UDP port.
    pub port: u16,
    /// VXLAN network identifier, 24 bits.
    pub vni: u32,
    /// Another one, for what is handed on to the node of a backend that answers the client directly; `None` switches that off.
    pub direct_return_vni: Option<u32>,
}

/// Which of the node's addresses answer node ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodePortAddresses {
    /// The primary address of each family.
    Primary,
    /// Every address of the node inside these ranges.
    Within(Vec<IpNetwork>),
}

/// Where the cluster's objects come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceConfig {
    /// A directory of manifests.
    Directory(PathBuf),
    /// An API server.
    Kubernetes {
        /// Its URL; in a pod it is found from the environment.
        server: Option<String>,
        /// A kubeconfig; in a pod the service account's token is used.
        kubeconfig: Option<PathBuf>,
    },
    /// An etcd cluster. Its credentials are read when it is connected to.
    Etcd(EtcdConfig),
}

/// How etcd is reached.
#[derive(Clone, PartialEq, Eq)]
pub struct EtcdConfig {
    /// URLs.
    pub endpoints: Vec<String>,
    /// Prefix of every key.
    pub prefix: String,
    /// CA certificate.
    pub ca: Option<PathBuf>,
    /// Client certificate.
    pub cert: Option<PathBuf>,
    /// Client key.
    pub key: Option<PathBuf>,
    /// `name:password`.
    pub user: Option<String>,
    /// How long this node's registration lasts if it does not renew it.
    pub lease: Duration,
    /// How long a node must be gone before its blocks of addresses go to others.
    pub grace: Duration,
}

impl std::fmt::Debug for EtcdConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // `user` holds a password: it must not reach a log or a support bundle.
        f.debug_struct("EtcdConfig").field("endpoints", &self.endpoints).field("prefix", &self.prefix).finish_non_exhaustive()
    }
}

impl SourceConfig {
    /// Its kind, as in the file and in `podgate status`.
    pub fn kind(&self) -> &'static str {
        match self {
            SourceConfig::Directory(_) => "directory",
            SourceConfig::Kubernetes { .. } => "kubernetes",
            SourceConfig::Etcd(_) => "etcd",
        }
    }
}

/// Workers, where the configuration says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workers {
    /// How many.
    pub count: u16,
    /// The CPU of each; empty leaves the choice to the machine.
    pub cpus: Vec<u16>,
}

/// Names of the two TUNs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Devices {
    /// In the gateway's namespace.
    pub pods: String,
    /// On the node.
    pub host: String,
}

/// The flow table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flows {
    /// How many flows it holds.
    pub capacity: u32,
    /// How long flows may be silent.
    pub timeouts: Timeouts,
}

/// What of the machine the configuration is checked against.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostFacts {
    /// The host's name: the default of `node`.
    pub name: String,
    /// The ports that the kernel gives to the host's own connections (`net.ipv4.ip_local_port_range`).
    pub ephemeral_ports: RangeInclusive<u16>,
}

/// What whoever starts the gateway says of this node, so that one file can serve all of them. What the file itself says counts before it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Given {
    /// This node's name.
    pub node: Option<String>,
    /// Its addresses towards the other nodes, one of each family at most.
    pub underlay: Vec<IpAddr>,
}

/// The kernel's default of `ip_local_port_range` (Linux `Documentation/networking/ip-sysctl.rst`).
const EPHEMERAL_DEFAULT: RangeInclusive<u16> = 32768..=60999;

impl HostFacts {
    /// Of this machine (of the calling thread's network namespace).
    pub fn read() -> HostFacts {
        // Kubelet registers the node under the lower-case form.
        let name = nix::unistd::gethostname().map(|n| n.to_string_lossy().to_lowercase()).unwrap_or_default();
        let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
        let mut bounds = range.split_whitespace().map(str::parse::<u16>);
        let ephemeral_ports = match (bounds.next(), bounds.next()) {
            (Some(Ok(low)), Some(Ok(high))) => low..=high,
            _ => EPHEMERAL_DEFAULT,
        };
        HostFacts { name, ephemeral_ports }
    }
}

/// Why a configuration is refused: what, where, and what to do next.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{file}: cannot be read: {reason}; name a readable file with --config")]
    Unreadable {
        /// The file.
        file: String,
        /// What the kernel says.
        reason: String,
    },
    /// A key that does not exist.
    #[error("{file}:{line}:{column}: unknown key `{key}`; {help}")]
    UnknownKey {
        /// The file.
        file: String,
        /// Its line, from 1.
        line: u64,
        /// Its column, from 1.
        column: u64,
        /// The key.
        key: String,
        /// What was probably meant.
        help: String,
    },
    /// The text is not YAML, or a value is not of its key's kind.
    #[error("{file}:{line}:{column}: {problem}")]
    Malformed {
        /// The file.
        file: String,
        /// Its line, from 1.
        line: u64,
        /// Its column, from 1.
        column: u64,
        /// What is wrong.
        problem: String,
    },
    /// A value that cannot be, alone or beside another one.
    #[error("{file}: {key}: {problem}; {remedy}")]
    Invalid {
        /// The file.
        file: String,
        /// The key, or the keys.
        key: String,
        /// What is wrong.
        problem: String,
        /// What to do.
        remedy: String,
    },
}

impl Config {
    /// Reads and checks the file at `path`.
    pub fn load(path: &Path) -> Result<Config, ConfigError> {
        Config::load_for(path, &Given::default())
    }

    /// Reads and checks the file at `path`, with what it leaves out taken from `given`.
    pub fn load_for(path: &Path, given: &Given) -> Result<Config, ConfigError> {
        let unreadable = |reason: String| ConfigError::Unreadable { file: path.display().to_string(), reason };
        let bytes = std::fs::read(path).map_err(|error| unreadable(error.to_string()))?;
        let text = String::from_utf8(bytes).map_err(|error| unreadable(format!("it is not UTF-8 (byte {})", error.utf8_error().valid_up_to())))?;
        Config::parse_for(path, &text, &HostFacts::read(), given)
    }

    /// Checks `text`, read from `file`, for a machine like `host`.
    pub fn parse(file: &Path, text: &str, host: &HostFacts) -> Result<Config, ConfigError> {
        Config::parse_for(file, text, host, &Given::default())
    }

    /// The same, with what `text` leaves out taken from `given`.
    pub fn parse_for(file: &Path, text: &str, host: &HostFacts, given: &Given) -> Result<Config, ConfigError> {
        let mut raw = raw::parse(file, text)?;
        raw.node = raw.node.or_else(|| given.node.clone());
        if raw.underlay.is_none() && !given.underlay.is_empty() {
            raw.underlay = Some(raw::RawUnderlay { address: Some(raw::OneOrMore(given.underlay.clone())), interface: None });
        }
        validate::validate(file, raw, host)
    }

    /// `<runtimeDir>/podgate.sock`.
    pub fn socket(&self) -> PathBuf {
        self.runtime_dir.join("podgate.sock")
    }

    /// `<runtimeDir>/netns`, where the gateway's namespace is bind-mounted.
    pub fn netns(&self) -> PathBuf {
        self.runtime_dir.join("netns")
    }
}

#[cfg(test)]
mod tests;
