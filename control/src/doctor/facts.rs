//! What was seen of the machine: plain data, which tests write down as it comes.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use ipnetwork::IpNetwork;
use serde_json::Value;

use super::firewall::Chain;
use crate::config::Config;
use crate::daemon::machine::Machine;
use crate::netlink::{RouteSpec, Rule};

/// Why something could not be looked at, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unseen(pub String);

/// What was seen, or why it was not.
pub type Look<T> = Result<T, Unseen>;

/// What came of a trial: it works so, or what the kernel said.
pub type Tried<T> = Result<T, String>;

/// When the doctor comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Before an installation: only what must be there before.
    Before,
    /// To a node on which a gateway should be running.
    Installed,
}

/// Everything.
#[derive(Debug)]
pub struct Facts {
    /// When.
    pub stage: Stage,
    /// What the kernel offers to this process.
    pub kernel: Kernel,
    /// The gateway's configuration.
    pub configuration: Configuration,
    /// Links, addresses, rules, routes, sysctls.
    pub host: Look<Host>,
    /// Sockets that listen.
    pub sockets: Look<Vec<Bound>>,
    /// Room in the directories that the gateway writes to.
    pub rooms: Vec<Room>,
    /// The firewall.
    pub firewall: Firewall,
    /// Where the cluster's objects come from.
    pub origin: Option<Origin>,
    /// The CNI plugin and what is beside it.
    pub cni: Cni,
    /// What the daemon says.
    pub daemon: Daemon,
    /// What came back from other nodes; none where nobody was asked.
    pub peers: Option<Look<Vec<Peer>>>,
}

/// What the kernel offers.
#[derive(Debug)]
pub struct Kernel {
    /// `uname -r`.
    pub release: String,
    /// The effective set of this process (`CapEff` in proc_pid_status(5)).
    pub capabilities: Look<u64>,
    /// Its effective user.
    pub user: u32,
    /// `/dev/net/tun`.
    pub device: Device,
    /// What was tried in a namespace without a name.
    pub trials: Tried<Trials>,
}

/// `/dev/net/tun`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Device {
    /// It can be opened.
    Opens,
    /// It is not there.
    Missing,
    /// It may not be opened.
    Denied,
    /// Something else, with what the kernel said.
    Fails(String),
}

/// What was tried in a namespace of its own.
#[derive(Clone, Debug)]
pub struct Trials {
    /// A TUN with two queues and `virtio_net_hdr`: which superframes it takes (TCP's, UDP's).
    pub tun: Tried<(bool, bool)>,
    /// A pair of veths.
    pub veth: Tried<()>,
    /// A rule by destination port.
    pub port_rule: Tried<()>,
    /// `UDP_SEGMENT` and `UDP_GRO`: one send of three datagrams that one receive takes.
    pub segments: Tried<()>,
}

/// `podgate.yaml`.
#[derive(Debug)]
pub enum Configuration {
    /// It holds.
    Read(Box<Config>),
    /// It is refused, with the reason.
    Refused(String),
    /// There is none.
    Missing(PathBuf),
    /// It is not for this user.
    Denied(PathBuf),
}

/// The node's own network.
#[derive(Debug, Default)]
pub struct Host {
    /// Interfaces: name and kind (`bridge`, `tun`, `veth`).
    pub links: Vec<(String, String)>,
    /// Addresses, with their interface.
    pub addresses: Vec<(String, IpNetwork)>,
    /// Rules of both families, in their order.
    pub rules: Vec<Rule>,
    /// Routes of every table that a rule leads to, but for `local`.
    pub routes: Vec<RouteSpec>,
    /// Sysctls by their path below `/proc/sys`; what is missing there is missing here.
    pub sysctls: BTreeMap<String, String>,
    /// The machine as the gateway would see it; none without a configuration.
    pub machine: Option<Tried<Machine>>,
    /// Whether the gateway's namespace is mounted.
    pub gateway_netns: Option<PathBuf>,
}

/// A socket that listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bound {
    /// Its protocol.
    pub protocol: Protocol,
    /// Where.
    pub address: SocketAddr,
}

/// A protocol with ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// Room in a directory's file system.
#[derive(Clone, Debug)]
pub struct Room {
    /// The directory.
    pub path: PathBuf,
    /// The key that names it.
    pub key: &'static str,
    /// Bytes that are needed there.
    pub needed: u64,
    /// Bytes and files that there is room for, of a user without privilege.
    pub free: Tried<(u64, u64)>,
}

/// The firewall, as far as it could be read.
#[derive(Debug, Default)]
pub struct Firewall {
    /// Every chain of every table.
    pub chains: Vec<Chain>,
    /// What could not be read, and why.
    pub unread: Vec<String>,
}

/// Where the cluster's objects come from.
#[derive(Debug)]
pub enum Origin {
    /// A directory: how many manifests are in it.
    Directory(PathBuf, Tried<usize>),
    /// A server: its URL (or URLs), and how far its clock is ahead of this machine's, in seconds, if it told.
    Server(String, Tried<Option<i64>>),
}

/// The CNI plugin.
#[derive(Debug)]
pub struct Cni {
    /// Where it is looked for.
    pub plugin: PathBuf,
    /// What is there.
    pub found: Plugin,
    /// Where its configuration is looked for.
    pub configuration: PathBuf,
    /// What is there: the text, or why it cannot be read; none if there is nothing.
    pub text: Option<Tried<String>>,
    /// Configurations that runtimes take before ours, by name.
    pub before: Vec<PathBuf>,
    /// Other configurations, with the ranges that they give addresses from.
    pub others: Vec<(PathBuf, Vec<IpNetwork>)>,
}

/// What is where the plugin should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Plugin {
    /// Nothing.
    Missing,
    /// A file that nobody may run.
    NotExecutable,
    /// It does not answer as a plugin.
    Fails(String),
    /// It answers, and is the one that belongs to this program, or another, or it cannot be told.
    Answers(Option<Same>),
}

/// Whether two files are alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Same {
    /// Byte by byte.
    Alike,
    /// Not.
    Different,
}

/// The daemon.
#[derive(Debug)]
pub enum Daemon {
    /// Nobody listens at the socket.
    Down(PathBuf),
    /// The socket is not for this user.
    Denied(PathBuf),
    /// It listens, but gives no answer of use.
    Mute(String),
    /// Its tables, as `podgate status`, `workers` and `peers` print them.
    Answers(Box<Tables>),
}

/// The daemon's tables.
#[derive(Debug)]
pub struct Tables {
    /// `podgate status -o json`.
    pub status: Value,
    /// `podgate workers -o json`.
    pub workers: Value,
    /// `podgate peers -o json`.
    pub peers: Value,
}

/// What came back from another node's gateway, through the overlay.
#[derive(Clone, Debug)]
pub struct Peer {
    /// The node.
    pub node: String,
    /// Its gateway's own address.
    pub gateway: IpAddr,
    /// Where its overlay is, on the underlay.
    pub underlay: SocketAddr,
    /// A small echo: how long it took.
    pub small: Option<Duration>,
    /// An echo as large as a pod's largest packet, which must not be cut on its way.
    pub full: Option<Duration>,
    /// How large that was, in bytes, IP header included.
    pub size: u32,
    /// An echo past the overlay, by the underlay alone: asked for only if the small one did not come back.
    pub beside: Option<Duration>,
}
