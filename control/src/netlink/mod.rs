//! The kernel's links, addresses, routes, rules and neighbours in any network namespace.
//!
//! [`Netlink::open`] gives one handle for one namespace, from anywhere: the socket is opened inside and stays there. Calls block,
//! for microseconds (see [`socket`](self)'s reasons), so the daemon's single-threaded runtime, tests and the demo use the same
//! handle. Changes made by others arrive through [`events::Events`], asynchronously. Sysctls have no netlink face and are
//! files of the namespace: [`sysctl`].
//!
//! The types here ([`RuleSpec`], [`RouteSpec`], [`Link`]) say what is meant in the words of `ip`; they compare equal when the
//! kernel would take them for the same object, which is what the reconciler of [`crate::routing`] rests on.
//!
//! Read first: rtnetlink(7), `linux/rtnetlink.h`, `linux/fib_rules.h`.

pub mod events;
pub mod sysctl;

mod address;
mod error;
mod link;
mod neighbour;
mod route;
mod rule;
mod socket;

pub use address::{Address, AddressSpec, DuplicateDetection, Reach};
pub use error::{MissingIsFine, NetlinkError};
pub use link::{AddrGenMode, Link, LinkKind, LinkSettings, LinkState, LinkStats, Mac, NewLink, VxlanMode, VxlanSpec};
pub use neighbour::{Neighbour, NeighbourSpec};
pub use route::{Route, RouteKind, RouteSpec};
pub use rule::{Rule, RuleAction, RuleSpec};

use netlink_packet_route::AddressFamily;
use podgate_runtime::netns::Netns;
use serde::{Deserialize, Serialize};
use socket::Transport;
use std::fmt;
use std::net::IpAddr;

/// `RTPROT_KERNEL`: what all our rules and routes carry, so that daemons which tidy up "foreign" ones (systemd-networkd's
/// `ManageForeignRoutingPolicyRules`, `ip route flush`) leave them alone.
pub const ORIGIN_KERNEL: u8 = 2;
/// `RTPROT_BOOT`: what `ip` gives routes by default.
pub const ORIGIN_BOOT: u8 = 3;
/// `RTPROT_STATIC`: of an administrator.
pub const ORIGIN_STATIC: u8 = 4;

/// `RT_TABLE_MAIN`.
pub const TABLE_MAIN: u32 = 254;
/// `RT_TABLE_LOCAL`.
pub const TABLE_LOCAL: u32 = 255;

/// IPv4 or IPv6, where a rule or a table exists once for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both, in the order in which things are done.
    pub const BOTH: [Family; 2] = [Family::V4, Family::V6];

    /// The family of an address.
    pub fn of(ip: IpAddr) -> Family {
        if ip.is_ipv4() { Family::V4 } else { Family::V6 }
    }

    /// The address that means "none" (`0.0.0.0`, `::`), which is also the default route's destination.
    pub fn unspecified(self) -> IpAddr {
        match self {
            Family::V4 => std::net::Ipv4Addr::UNSPECIFIED.into(),
            Family::V6 => std::net::Ipv6Addr::UNSPECIFIED.into(),
        }
    }

    /// The length of a whole address in bits.
    pub const fn bits(self) -> u8 {
        match self {
            Family::V4 => 32,
            Family::V6 => 128,
        }
    }

    fn kernel(self) -> AddressFamily {
        match self {
            Family::V4 => AddressFamily::Inet,
            Family::V6 => AddressFamily::Inet6,
        }
    }

    fn from_kernel(family: AddressFamily) -> Option<Family> {
        match family {
            AddressFamily::Inet => Some(Family::V4),
            AddressFamily::Inet6 => Some(Family::V6),
            _ => None,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        })
    }
}

/// A handle on the networking of one namespace. It may be shared between threads; calls are worked off one after the other.
pub struct Netlink {
    transport: Transport,
}

impl Netlink {
    /// A handle on the namespace `netns`, usable from any other.
    pub fn open(netns: &Netns) -> Result<Netlink, NetlinkError> {
        Ok(Netlink { transport: Transport::open(netns)? })
    }

    /// A handle on the calling thread's namespace, to be had without privilege; what it may change is another question.
    pub fn here() -> Result<Netlink, NetlinkError> {
        Ok(Netlink { transport: Transport::here()? })
    }
}

impl fmt::Debug for Netlink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Netlink")
    }
}

#[cfg(test)]
mod tests;
