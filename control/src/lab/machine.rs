//! A machine of the lab: a network namespace with a name, addresses and a server. Pods, nodes and the outside client are alike here.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};
use podgate_runtime::netns::Netns;

use super::LabError;
use super::program::PORT;
use super::program::server::Server;
use crate::netlink::sysctl::{self, Key};
use crate::netlink::{AddressSpec, Family, LinkKind, LinkSettings, Netlink, NetlinkError, NewLink, RouteSpec, TABLE_MAIN};

/// The name of every machine's interface on the underlay, and of a pod's.
pub const ETH0: &str = "eth0";

/// A pair of addresses, one of each family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dual {
    /// The IPv4 address.
    pub v4: Ipv4Addr,
    /// The IPv6 address.
    pub v6: Ipv6Addr,
}

impl Dual {
    /// The one of `family`.
    pub fn of(self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.v4.into(),
            Family::V6 => self.v6.into(),
        }
    }

    /// The one of `family`, with [`PORT`].
    pub fn server(self, family: Family) -> SocketAddr {
        SocketAddr::new(self.of(family), PORT)
    }
}

/// A namespace with a name, addresses and a server.
pub struct Machine {
    name: String,
    netns: Netns,
    path: PathBuf,
    addresses: Dual,
    server: OnceLock<Server>,
}

impl Machine {
    /// A machine that has its addresses already, or will get them.
    pub(super) fn new(name: &str, netns: Netns, path: PathBuf, addresses: Dual) -> Machine {
        Machine { name: name.to_owned(), netns, path, addresses, server: OnceLock::new() }
    }

    /// Its name, which its server tells clients.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Where its namespace is mounted.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its addresses.
    pub fn addresses(&self) -> Dual {
        self.addresses
    }

    /// Its address of `family`.
    pub fn address(&self, family: Family) -> IpAddr {
        self.addresses.of(family)
    }

    /// Runs `work` in its namespace.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, LabError> {
        self.netns.run(work).map_err(|source| LabError::Program { what: format!("something on {}", self.name), source })
    }

    /// A handle on its links, addresses and routes.
    pub fn netlink(&self) -> Result<Netlink, LabError> {
        Netlink::open(&self.netns).map_err(self.failed())
    }

    /// Starts its server. It runs as long as the machine exists.
    pub fn serve(&self) -> Result<&Server, LabError> {
        if self.server.get().is_none() {
            let server = Server::start(&self.name, &self.netns)?;
            // If another thread was first, ours could not have bound its port.
            let _ = self.server.set(server);
        }
        Ok(self.server.get().expect("it was set just now"))
    }

    /// Its server, if it was started.
    pub fn server(&self) -> Option<&Server> {
        self.server.get()
    }

    /// Writes a sysctl, such as `net/ipv4/ip_forward`, in its namespace.
    pub fn set_sysctl(&self, key: &str, value: &str) -> Result<(), LabError> {
        let failed = |source: sysctl::SysctlError| LabError::File { path: key.into(), source: std::io::Error::other(source) };
        sysctl::write(&self.netns, &Key::new(key), value).map_err(failed)
    }

    pub(super) fn failed(&self) -> impl Fn(NetlinkError) -> LabError {
        let machine = self.name.clone();
        move |source| LabError::Netlink { machine: machine.clone(), source }
    }
}

/// A namespace as a fresh machine has it: loopback up, IPv6 on, addresses usable at once; mounted at `directory/name`.
pub(super) fn fresh_netns(directory: &Path, name: &str) -> Result<(Netns, PathBuf), LabError> {
    let netns = Netns::anonymous()?;
    let path = directory.join(name);
    netns.bind(&path)?;
    let failed = |source| LabError::Netlink { machine: name.to_owned(), source };
    let sysctls = [
        // Some machines switch IPv6 off for new namespaces; duplicate detection would cost a second and more for each address.
        (Key::new("net/ipv6/conf/all/disable_ipv6"), "0"),
        (Key::new("net/ipv6/conf/default/disable_ipv6"), "0"),
        (Key::new("net/ipv6/conf/default/accept_dad"), "0"),
        (Key::new("net/ipv6/conf/default/accept_ra"), "0"),
    ];
    sysctl::write_all(&netns, &sysctls).map_err(|source| LabError::File { path: name.into(), source: std::io::Error::other(source) })?;
    Netlink::open(&netns).and_then(|netlink| netlink.set_link("lo", &LinkSettings::new().up())).map_err(failed)?;
    Ok((netns, path))
}

/// The nodes' own network: a bridge in a namespace of its own, with one port for each machine, 192.0.2.0/24 and 2001:db8::/64.
pub struct Underlay {
    netns: Netns,
    mtu: u32,
}

/// The bridge's name.
const BRIDGE: &str = "underlay";

impl Underlay {
    pub(super) fn new(directory: &Path, mtu: u32) -> Result<Underlay, LabError> {
        let (netns, _) = fresh_netns(directory, BRIDGE)?;
        let failed = |source| LabError::Netlink { machine: BRIDGE.to_owned(), source };
        let netlink = Netlink::open(&netns).map_err(failed)?;
        let settings = LinkSettings::new().mtu(mtu).up();
        netlink.create_link(&NewLink { name: BRIDGE, kind: LinkKind::Bridge, settings }).map_err(failed)?;
        Ok(Underlay { netns, mtu })
    }

    /// Connects `machine` and gives it its addresses.
    pub(super) fn connect(&self, machine: &Machine) -> Result<(), LabError> {
        let failed = machine.failed();
        let netlink = Netlink::open(&self.netns).map_err(&failed)?;
        let bridge = netlink.expect_link(BRIDGE).map_err(&failed)?.index;
        let kind = LinkKind::veth_into(ETH0, machine.netns(), LinkSettings::new().mtu(self.mtu));
        let settings = LinkSettings::new().mtu(self.mtu).controller(bridge).up();
        netlink.create_link(&NewLink { name: machine.name(), kind, settings }).map_err(&failed)?;
        let theirs = machine.netlink()?;
        theirs.set_link(ETH0, &LinkSettings::new().up()).map_err(&failed)?;
        for address in [v4_network(machine.addresses.v4, 24), v6_network(machine.addresses.v6, 64)] {
            theirs.add_address(&AddressSpec::new(ETH0, address)).map_err(&failed)?;
        }
        Ok(())
    }

    /// The bridge's namespace, whose ports have the names of the machines.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Its MTU.
    pub fn mtu(&self) -> u32 {
        self.mtu
    }
}

pub(super) fn default_routes(machine: &Machine, via: Dual) -> Result<(), LabError> {
    let netlink = machine.netlink()?;
    for (destination, via) in [(v4_network(Ipv4Addr::UNSPECIFIED, 0), via.v4.into()), (v6_network(Ipv6Addr::UNSPECIFIED, 0), via.v6.into())] {
        netlink.add_route(&RouteSpec::unicast(TABLE_MAIN, destination, ETH0).via(via)).map_err(machine.failed())?;
    }
    Ok(())
}

pub(super) fn v4_network(address: Ipv4Addr, prefix: u8) -> IpNetwork {
    Ipv4Network::new(address, prefix).expect("a prefix of at most 32 bits").into()
}

pub(super) fn v6_network(address: Ipv6Addr, prefix: u8) -> IpNetwork {
    Ipv6Network::new(address, prefix).expect("a prefix of at most 128 bits").into()
}
