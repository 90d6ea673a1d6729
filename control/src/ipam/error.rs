//! Why there is no address: what was asked for, why it cannot be, and what to do next.

use std::fmt::Display;
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::journal::JournalError;
use super::{Owner, Pod};

/// Why there is no address.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IpamError {
    /// The node has no range, or not yet.
    #[error("this node has no pod range; give its Node object spec.podCIDRs inside the cluster's podCIDRs")]
    NoRange,
    /// Every address is taken.
    #[error(
        "all {capacity} addresses of {} are given out; see `podgate ipam`, and detach pods that are gone or give the node a larger range",
        place(.pool.as_deref(), .cidrs)
    )]
    Exhausted {
        /// The pool, if one was asked for by name.
        pool: Option<String>,
        /// The ranges of the family that has none left.
        cidrs: Vec<IpNetwork>,
        /// How many addresses there are to give out.
        capacity: u128,
    },
    /// A range without room.
    #[error("the pod range {cidr} is too small: four of its addresses are kept back; give the node at least a /{}", longest(.cidr))]
    TooSmall {
        /// The range.
        cidr: IpNetwork,
    },
    /// There is no pool of that name.
    #[error("there is no pool `{pool}`; {}", known_pools(.known))]
    NoPool {
        /// The name.
        pool: String,
        /// Those that there are.
        known: Vec<String>,
    },
    /// A pool without an address in this node's ranges.
    #[error("no address of the pool `{pool}` lies in this node's ranges {}; see `ipam.pools` in podgate.yaml", list(.cidrs))]
    PoolOutside {
        /// Its name.
        pool: String,
        /// The node's ranges.
        cidrs: Vec<IpNetwork>,
    },
    /// An address that no packet would be sent to this node for.
    #[error("{address} lies outside this node's ranges {}; other nodes would not send to it", list(.cidrs))]
    Outside {
        /// The address.
        address: IpAddr,
        /// The node's ranges.
        cidrs: Vec<IpNetwork>,
    },
    /// One of the four of each range that are nobody's.
    #[error("{address} is {why} of {cidr}, and no pod's; choose another")]
    KeptBack {
        /// The address.
        address: IpAddr,
        /// What it is.
        why: &'static str,
        /// The range.
        cidr: IpNetwork,
    },
    /// It is not to be given out.
    #[error("{address} is excluded ({cidr} in `ipam.exclude` of podgate.yaml); choose another")]
    Excluded {
        /// The address.
        address: IpAddr,
        /// By which entry.
        cidr: IpNetwork,
    },
    /// It is kept for another pod.
    #[error("{address} is reserved for {pod} (`ipam.reserve` in podgate.yaml); choose another")]
    Reserved {
        /// The address.
        address: IpAddr,
        /// For whom.
        pod: String,
    },
    /// It belongs to a pool that was not asked for.
    #[error("{address} belongs to the pool `{pool}`; ask for that pool by name, or choose an address outside it")]
    InPool {
        /// The address.
        address: IpAddr,
        /// The pool.
        pool: String,
    },
    /// It does not belong to the pool that was asked for.
    #[error("{address} does not belong to the pool `{pool}`; choose one that does, or ask for no pool")]
    OutsidePool {
        /// The address.
        address: IpAddr,
        /// The pool.
        pool: String,
    },
    /// Somebody has it.
    #[error("{address} is in use by {by}; detach that first, or choose another")]
    Taken {
        /// The address.
        address: IpAddr,
        /// By whom.
        by: Box<Owner>,
    },
    /// Somebody had it until a moment ago.
    #[error("{address} was {whose} until a moment ago, and is given to nobody else for another {seconds} s (`ipam.cooldown`); try again then", whose = whose(.last))]
    Cooling {
        /// The address.
        address: IpAddr,
        /// Whose it was.
        last: Option<Pod>,
        /// For how long, in seconds.
        seconds: u64,
    },
    /// An interface has at most one address of each family from us.
    #[error("{first} and {second} are of one family; an interface gets one of each")]
    SameFamily {
        /// One.
        first: IpAddr,
        /// The other.
        second: IpAddr,
    },
    /// A plugin gave nothing.
    #[error("the IPAM plugin {plugin} gave no address; see its configuration (`ipam` in the network's)")]
    NothingGiven {
        /// The plugin's name.
        plugin: String,
    },
    /// The owner has addresses, and they are not those that are asked for now.
    #[error("{owner} has {} already; detach it before it gets others", list(.has))]
    HasOthers {
        /// Who.
        owner: Box<Owner>,
        /// What it has.
        has: Vec<IpAddr>,
    },
    /// There is nothing to release.
    #[error("nobody has {what}: it is neither an address in use nor the NAMESPACE/NAME of a pod that has one; `podgate ipam` lists both")]
    NotLeased {
        /// What was asked for.
        what: String,
    },
    /// What is attached keeps its addresses.
    #[error(
        "{owner} is attached and uses {}; delete the pod, or detach it with `podgate detach --netns {} --ifname {}`",
        list(.addresses), .owner.netns, .owner.ifname
    )]
    Attached {
        /// Who.
        owner: Box<Owner>,
        /// What it has.
        addresses: Vec<IpAddr>,
    },
    /// The journal cannot be read or written.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

impl IpamError {
    /// The error code for a CNI runtime (CNI SPEC.md, "Error"): 7 where the configuration asks for what can never be, 11 where it is worth
    /// trying again later, 5 where the disk failed.
    pub fn code(&self) -> u32 {
        use IpamError::*;
        match self {
            NoPool { .. } | PoolOutside { .. } | Outside { .. } | KeptBack { .. } | Excluded { .. } | Reserved { .. } => 7,
            InPool { .. } | OutsidePool { .. } | SameFamily { .. } | NothingGiven { .. } | HasOthers { .. } => 7,
            NoRange | Exhausted { .. } | TooSmall { .. } | Taken { .. } | Cooling { .. } | Attached { .. } => 11,
            // 3: "Container unknown or does not exist".
            NotLeased { .. } => 3,
            Journal(_) => 5,
        }
    }
}

/// `a, b and c` would read better, but these are copied into commands.
pub(super) fn list<T: Display>(items: &[T]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn place(pool: Option<&str>, cidrs: &[IpNetwork]) -> String {
    match pool {
        Some(pool) => format!("the pool `{pool}` ({})", list(cidrs)),
        None => list(cidrs),
    }
}

fn known_pools(known: &[String]) -> String {
    match known {
        [] => "podgate.yaml names none (`ipam.pools`)".into(),
        known => format!("podgate.yaml names {} (`ipam.pools`)", list(known)),
    }
}

fn whose(last: &Option<Pod>) -> String {
    last.as_ref().map_or_else(|| "somebody's".into(), |pod| format!("{pod}'s"))
}

/// The longest prefix of the range's family that leaves room for a pod.
fn longest(cidr: &IpNetwork) -> u8 {
    if cidr.is_ipv4() { 29 } else { 125 }
}
