//! What only this machine knows: its addresses, its uplinks and their MTU, its CPUs.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use crate::config::{Config, Underlay, Workers};
use crate::model::Announcement;
use crate::netlink::{Netlink, NetlinkError};
use crate::source::Announced;

/// The machine as the gateway needs to know it. It changes when addresses or links do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// Every address of the node that somebody else could dial; the underlay's first.
    pub addresses: Vec<IpAddr>,
    /// The underlay's addresses, at most one of each family.
    pub underlay: Vec<IpAddr>,
    /// MTU of the underlay, in bytes.
    pub underlay_mtu: u32,
    /// The interfaces that have these addresses.
    pub uplinks: Vec<String>,
}

/// Why the machine cannot be a node.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The kernel cannot be asked.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// The configured interface has no address.
    #[error("underlay.interface: {0} is not there or has no address; `ip address` lists what there is")]
    NoInterface(String),
    /// The configured address is nobody's.
    #[error("underlay.address: {0} is not an address of this machine; it has {1}. Write one of these, or {{interface: eth0}}")]
    NotOurs(IpAddr, String),
    /// A configured CPU is not there, or not for this process.
    #[error("workers.cpus: {0} is no CPU that this process may use; it may use {1} (sched_setaffinity(2), cgroup cpuset)")]
    NoCpu(u16, String),
}

impl Machine {
    /// Looks at the machine. `ours` is the TUN on the node, whose addresses do not count.
    pub fn look(netlink: &Netlink, config: &Config) -> Result<Machine, MachineError> {
        let links = netlink.links()?;
        let usable = |link: &crate::netlink::Link| !link.loopback && link.name != config.devices.host;
        let mut found = Vec::new();
        for address in netlink.addresses()? {
            let ip = address.address.ip();
            if let Some(link) = links.iter().find(|link| link.index == address.index && usable(link))
                && is_reachable(ip)
                && !address.deprecated
            {
                found.push((ip, link));
            }
        }
        let mut underlay: Vec<IpAddr> = Vec::new();
        match &config.underlay {
            Underlay::Addresses(addresses) => {
                for ip in addresses {
                    if !found.iter().any(|(other, _)| other == ip) {
                        let known: Vec<String> = found.iter().map(|(ip, _)| ip.to_string()).collect();
                        return Err(MachineError::NotOurs(*ip, if known.is_empty() { "none".into() } else { known.join(", ") }));
                    }
                    underlay.push(*ip);
                }
            }
            Underlay::Interface(name) => {
                for (ip, _) in found.iter().filter(|(_, link)| link.name == *name) {
                    if !underlay.iter().any(|other| other.is_ipv4() == ip.is_ipv4()) {
                        underlay.push(*ip);
                    }
                }
                if underlay.is_empty() {
                    return Err(MachineError::NoInterface(name.clone()));
                }
            }
        }
        found.sort_by_key(|(ip, _)| !underlay.contains(ip));
        let on_underlay = found.iter().filter(|(ip, _)| underlay.contains(ip));
        let underlay_mtu = on_underlay.map(|(_, link)| link.mtu).min().unwrap_or(1500);
        let uplinks: BTreeSet<String> = found.iter().map(|(_, link)| link.name.clone()).collect();
        Ok(Machine { addresses: found.into_iter().map(|(ip, _)| ip).collect(), underlay, underlay_mtu, uplinks: uplinks.into_iter().collect() })
    }

    /// How other nodes reach the gateway on this one.
    pub fn announced(&self, config: &Config) -> Announced {
        Announcement::annotations(&self.underlay, &config.overlay, self.underlay_mtu)
    }

    /// The first address of each family: what the node's own packets to pods leave from.
    pub fn primary(&self) -> Vec<IpAddr> {
        let first = |v4: bool| self.addresses.iter().copied().find(|ip| ip.is_ipv4() == v4);
        [first(true), first(false)].into_iter().flatten().collect()
    }
}

/// Whether somebody beyond the link can dial it.
fn is_reachable(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => !ip.is_loopback() && !ip.is_link_local() && !ip.is_unspecified(),
        IpAddr::V6(ip) => !ip.is_loopback() && !ip.is_unicast_link_local() && !ip.is_unspecified(),
    }
}

/// More workers than this help no node that was measured; more can be configured.
const WORKERS_MAX_DEFAULT: usize = 8;

/// The CPU of each worker: as configured, or one worker on each CPU that the process may use.
pub fn workers(configured: Option<&Workers>) -> Result<Vec<Option<usize>>, MachineError> {
    let allowed = allowed_cpus();
    if let Some(Workers { cpus, .. }) = configured
        && let Some(cpu) = cpus.iter().find(|cpu| !allowed.is_empty() && !allowed.contains(&usize::from(**cpu)))
    {
        return Err(MachineError::NoCpu(*cpu, allowed.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")));
    }
    Ok(match configured {
        Some(Workers { count, cpus }) if cpus.is_empty() => (0..usize::from(*count)).map(|at| allowed.get(at).copied()).collect(),
        Some(Workers { cpus, .. }) => cpus.iter().map(|cpu| Some(usize::from(*cpu))).collect(),
        None if allowed.is_empty() => vec![None],
        None => allowed.into_iter().take(WORKERS_MAX_DEFAULT).map(Some).collect(),
    })
}

/// For how long an idle worker looks for more: as configured. Otherwise for as long as it takes to be woken where there are processors to spare;
/// on a small machine the pods need them more.
pub fn spin(config: &Config) -> Duration {
    const CPUS_MIN: usize = 4;
    const SPIN: Duration = Duration::from_micros(50);
    config.spin.unwrap_or(if allowed_cpus().len() < CPUS_MIN { Duration::ZERO } else { SPIN })
}

fn allowed_cpus() -> Vec<usize> {
    let Ok(set) = nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(0)) else {
        return Vec::new();
    };
    (0..nix::sched::CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false)).collect()
}
