//! What goes wrong with attachments.

use std::io;
use std::net::IpAddr;
use std::path::PathBuf;

use podgate_runtime::netns::NetnsError;
use podgate_runtime::tun::TunError;

use crate::netlink::sysctl::SysctlError;
use crate::netlink::{Family, NetlinkError};

/// Why a pod could not be attached or detached.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PodError {
    /// The pod has such an interface already.
    #[error("the pod has an interface {ifname} already: detach it first, or choose another name")]
    InterfaceExists {
        /// The interface.
        ifname: String,
    },
    /// The attachment exists already.
    #[error("{id} is attached already, as {veth}")]
    AttachedAlready {
        /// Which attachment.
        id: String,
        /// Its interface.
        veth: String,
    },
    /// An address belongs to another pod.
    #[error("address {address} belongs to {owner}, which is attached as {veth}")]
    AddressTaken {
        /// The address.
        address: IpAddr,
        /// The other attachment.
        owner: String,
        /// Its interface.
        veth: String,
    },
    /// No address was given.
    #[error("{id}: a pod needs at least one address")]
    NoAddress {
        /// Which attachment.
        id: String,
    },
    /// There is nothing of that name to work on.
    #[error("{id} is not attached")]
    NotAttached {
        /// Which attachment.
        id: String,
    },
    /// It has its addresses already.
    #[error("{id} has its addresses already")]
    AssignedAlready {
        /// Which attachment.
        id: String,
    },
    /// Somebody else gave the pod its default route.
    #[error("{id}: the pod has an {family} default route already; leave `isDefaultGateway` out, so that this interface gets a table of its own")]
    DefaultRouteExists {
        /// Which attachment.
        id: String,
        /// Of which family.
        family: Family,
    },
    /// An attachment is not whole.
    #[error("{id}: {what}; delete the pod and let it be attached anew")]
    Broken {
        /// Which attachment.
        id: String,
        /// What is missing.
        what: String,
    },
    /// The kernel refused.
    #[error("{id}: {source}")]
    Netlink {
        /// Which attachment.
        id: String,
        /// What and why.
        source: NetlinkError,
    },
    /// The pod's own TUN could not be made or opened.
    #[error("{id}: {source}")]
    Tun {
        /// Which attachment.
        id: String,
        /// What and why.
        source: TunError,
    },
    /// The pod's namespace could not be entered.
    #[error("{id}: its namespace is not to be had: {source}")]
    Namespace {
        /// Which attachment.
        id: String,
        /// Where it was looked for, and why not.
        source: NetnsError,
    },
    /// A sysctl could not be set.
    #[error("{id}: {source}")]
    Sysctl {
        /// Which attachment.
        id: String,
        /// What and why.
        source: SysctlError,
    },
    /// A file of ours could not be read or written.
    #[error("cannot {operation} {path}: {source}", path = path.display())]
    File {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}
