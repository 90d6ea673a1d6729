//! Requests and responses: what the daemon is asked, and what it answers.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::result::{Ip, Route};

/// The longest request that the daemon reads, in bytes. A collection names every attachment of a node.
pub const REQUEST_LEN_MAX: usize = 1024 * 1024;

/// What a client asks of the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase", deny_unknown_fields)]
pub enum Request {
    /// One of the tables: `status`, `services`, `backends`, `flows`, `peers`, `ipam`, `workers`, `drops` or `routes`.
    Show {
        /// Its name.
        table: String,
    },
    /// What would become of a packet.
    Trace {
        /// Its source.
        from: IpAddr,
        /// Its source port.
        from_port: u16,
        /// Its destination.
        to: IpAddr,
        /// Its destination port.
        to_port: u16,
        /// `tcp`, `udp` or `icmp`.
        protocol: String,
    },
    /// What changed since a generation of the tables, object by object.
    Diff {
        /// The generation; as long ago as is remembered if there is none.
        since: Option<u64>,
    },
    /// Attaches the network namespace whose descriptor comes with the request; the answer is a [`crate::result::Attached`].
    Attach(Box<AttachRequest>),
    /// Gives addresses to an attachment that was made with [`Addresses::Later`]; its namespace comes with the request, and the answer is
    /// that of `Attach`.
    Assign {
        /// Which attachment.
        attachment: Attachment,
        /// Its addresses.
        given: Given,
    },
    /// Takes an attachment away; the namespace need not exist any more. The answer is `{"detached": bool}`.
    Detach(Attachment),
    /// Whether an attachment is whole, in the namespace whose descriptor comes with the request: an empty object, or error 100 and what is
    /// missing.
    Check {
        /// Which attachment.
        attachment: Attachment,
        /// The addresses that it was given, as in its result (`10.244.1.5/32`).
        addresses: Vec<String>,
    },
    /// Takes away every attachment of a network that is not among those named. The answer is `{"collected": [...]}`, or an error that names
    /// what could not be taken away, after all the rest has been.
    Collect {
        /// The network's name, as in its configuration.
        network: String,
        /// What stays.
        valid: Vec<Valid>,
    },
    /// Whether pods can be attached: an empty object, or error 50 (not now) or 51 (not now, and attached pods have no network either).
    Ready,
    /// Changes what the daemon writes to its log: `{"before": "info"}`.
    LogLevel {
        /// A level, or levels of parts of the program.
        level: String,
    },
    /// Compares addresses with attachments: `{"findings": [{"address", "owner", "problem", "fixed"}]}`.
    IpamCheck {
        /// Also mend what is found.
        fix: bool,
    },
    /// Takes back the addresses of an owner that is not attached: `{"released": ["address", ...]}`.
    IpamRelease {
        /// An address, or an owner's `namespace/name`.
        what: String,
    },
}

/// Which interface of which pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Attachment {
    /// Names the sandbox: the container id of a CNI call, or the path of the namespace for an attachment by hand.
    pub sandbox: String,
    /// The interface's name inside the namespace.
    pub ifname: String,
    /// `namespace/name` of the pod, for people.
    #[serde(default)]
    pub name: Option<String>,
    /// The CNI network's name; none for an attachment by hand.
    #[serde(default)]
    pub network: Option<String>,
}

/// An attachment that is to stay (`cni.dev/valid-attachments`).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Valid {
    /// See [`Attachment::sandbox`].
    pub sandbox: String,
    /// See [`Attachment::ifname`].
    pub ifname: String,
}

/// What an attachment is to have.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AttachRequest {
    /// Which one.
    pub attachment: Attachment,
    /// Chosen at random by the client. The same request sent again, because its answer was lost, has the same: it is answered as it was,
    /// where another request for the same interface is refused.
    #[serde(default)]
    pub attempt: u64,
    /// The namespace's path, for the result.
    #[serde(default)]
    pub netns: String,
    /// Where its addresses come from.
    #[serde(default)]
    pub addresses: Addresses,
    /// Whether what it sends out of the cluster is masqueraded (`ipMasq`); by default, what the node's configuration says.
    #[serde(default)]
    pub masquerade: Option<bool>,
    /// Whether it has the pod's default route (`isDefaultGateway`); by default, if the pod has none yet.
    #[serde(default)]
    pub default_route: Option<bool>,
    /// Its MTU, in bytes; by default, the largest that the overlay takes.
    #[serde(default)]
    pub mtu: Option<u32>,
    /// Its Ethernet address; by default, the kernel's choice.
    #[serde(default)]
    pub mac: Option<String>,
    /// Routes beside the default one.
    #[serde(default)]
    pub routes: Vec<Route>,
    /// Ports of the node that lead to the pod.
    #[serde(default)]
    pub port_mappings: Vec<PortMapping>,
    /// Limits.
    #[serde(default)]
    pub bandwidth: Option<Bandwidth>,
    /// How it is attached; by default, as the node's configuration says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<AttachMode>,
}

/// How a pod is attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AttachMode {
    /// A veth pair, one end in the gateway's namespace.
    #[default]
    Veth,
    /// A TUN inside the pod's namespace.
    Tun,
}

impl AttachMode {
    /// As configurations say it.
    pub const fn name(self) -> &'static str {
        match self {
            AttachMode::Veth => "veth",
            AttachMode::Tun => "tun",
        }
    }

    /// The mode of that name.
    pub fn of(name: &str) -> Option<AttachMode> {
        [AttachMode::Veth, AttachMode::Tun].into_iter().find(|mode| mode.name() == name)
    }
}

/// Where an attachment's addresses come from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase", deny_unknown_fields)]
pub enum Addresses {
    /// The daemon's own allocator gives one of each family.
    Own {
        /// Of this pool; by default, of the node's pod ranges.
        #[serde(default)]
        pool: Option<String>,
        /// These and no others (capability `ips`, `K8S_POD` annotations, `IP` in `CNI_ARGS`).
        #[serde(default)]
        wanted: Vec<IpAddr>,
    },
    /// Somebody else gave them: a delegated IPAM plugin.
    Given(Given),
    /// They come with [`Request::Assign`]: the plugin that gives them (`dhcp`) needs the interface first.
    Later,
}

impl Default for Addresses {
    fn default() -> Addresses {
        Addresses::Own { pool: None, wanted: Vec::new() }
    }
}

/// What a delegated IPAM plugin gave.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Given {
    /// The plugin's name.
    pub plugin: String,
    /// Its addresses.
    pub ips: Vec<Ip>,
    /// Its routes.
    #[serde(default)]
    pub routes: Vec<Route>,
}

/// A port of the node that leads to a pod (capability `portMappings`).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PortMapping {
    /// On the node.
    pub host_port: u16,
    /// In the pod.
    pub container_port: u16,
    /// `tcp`, `udp` or `sctp`.
    pub protocol: String,
    /// On this address of the node alone; by default, on those that answer node ports.
    #[serde(default)]
    pub host_ip: Option<IpAddr>,
}

/// Limits of a pod's interface (capability `bandwidth`), in bits per second and bits; 0 means none. Ingress is what the pod receives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Bandwidth {
    /// Bits per second to the pod.
    #[serde(default)]
    pub ingress_rate: u64,
    /// Bits that may come at once after a pause.
    #[serde(default)]
    pub ingress_burst: u64,
    /// Bits per second from the pod.
    #[serde(default)]
    pub egress_rate: u64,
    /// Bits that may come at once after a pause.
    #[serde(default)]
    pub egress_burst: u64,
}

/// The daemon's answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Response {
    /// What was asked for.
    Ok(serde_json::Value),
    /// Why not.
    Error {
        /// One of the CNI specification's error codes (1 to 99), or 100 and above for this project's own.
        code: u32,
        /// What went wrong and what to do next.
        message: String,
    },
}
