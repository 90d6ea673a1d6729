//! Links, addresses, rules, routes and sysctls of the namespace that this process is in, and the sockets that listen there.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use podgate_runtime::netns::Netns;

use super::super::facts::{Bound, Host, Look, Protocol, Unseen};
use crate::config::Config;
use crate::daemon::machine::{Machine, MachineError};
use crate::netlink::sysctl::{Key, read_here};
use crate::netlink::{Family, Netlink, NetlinkError, RuleAction, TABLE_LOCAL, TABLE_MAIN};
use crate::routing::HOST_TABLE;

pub(super) fn look(config: Option<&Config>) -> Look<Host> {
    let netlink = Netlink::here().map_err(|error| Unseen(error.to_string()))?;
    seen(&netlink, config).map_err(|error| Unseen(error.to_string()))
}

fn seen(netlink: &Netlink, config: Option<&Config>) -> Result<Host, NetlinkError> {
    let links = netlink.links()?;
    let name = |index: u32| links.iter().find(|link| link.index == index).map_or_else(|| index.to_string(), |link| link.name.clone());
    let mut host = Host {
        addresses: netlink.addresses()?.into_iter().map(|found| (name(found.index), found.address)).collect(),
        links: links.iter().map(|link| (link.name.clone(), link.kind.clone())).collect(),
        ..Host::default()
    };
    for family in Family::BOTH {
        let rules = match netlink.rules(family) {
            Err(error) if matches!(error.errno(), Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP)) => continue, // a kernel without IPv6
            other => other?,
        };
        // Tables to which no rule leads are nobody's, but for our own.
        let mut tables = BTreeSet::from([TABLE_MAIN, HOST_TABLE]);
        tables.extend(rules.iter().filter_map(|rule| if let RuleAction::Lookup(table) = rule.spec.action { Some(table) } else { None }));
        tables.remove(&TABLE_LOCAL);
        host.rules.extend(rules);
        for table in tables {
            host.routes.extend(netlink.routes(family, table)?.into_iter().map(|route| route.spec));
        }
    }
    host.machine = config.map(|config| Machine::look(netlink, config).map_err(|error: MachineError| error.to_string()));
    host.gateway_netns = config.map(Config::netns).filter(|path| Netns::open(path).is_ok());
    let uplinks = host.machine.iter().flatten().flat_map(|machine| machine.uplinks.clone());
    let devices: Vec<String> = uplinks.chain(config.map(|config| config.devices.host.clone())).collect();
    host.sysctls = sysctls(&devices);
    Ok(host)
}

fn sysctls(devices: &[String]) -> BTreeMap<String, String> {
    let mut keys =
        vec![Key::new("net/ipv4/ip_local_reserved_ports"), Key::v6("all", "forwarding"), Key::v6("all", "disable_ipv6"), Key::v4("all", "rp_filter")];
    for device in devices {
        keys.extend(["rp_filter", "accept_local", "forwarding"].map(|name| Key::v4(device, name)));
        keys.extend(["accept_ra", "forwarding"].map(|name| Key::v6(device, name)));
    }
    keys.into_iter().filter_map(|key| Some((key.as_str().to_owned(), read_here(&key).ok()?))).collect()
}

/// Every socket that listens, of whoever: `/proc/net/tcp` and the like (proc_net_tcp(5)).
pub(super) fn sockets() -> Look<Vec<Bound>> {
    let mut bound = Vec::new();
    for (file, protocol) in [("tcp", Protocol::Tcp), ("tcp6", Protocol::Tcp), ("udp", Protocol::Udp), ("udp6", Protocol::Udp)] {
        match std::fs::read_to_string(format!("/proc/self/net/{file}")) {
            Ok(text) => bound.extend(text.lines().filter_map(|line| listening(line, protocol)).map(|address| Bound { protocol, address })),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {} // a kernel without IPv6
            Err(error) => return Err(Unseen(format!("/proc/self/net/{file}: {error}"))),
        }
    }
    Ok(bound)
}

/// `  0: 0100007F:2809 00000000:0000 0A ...`: address, port and state in hexadecimal, an address in the words of the machine's own order.
fn listening(line: &str, protocol: Protocol) -> Option<SocketAddr> {
    let mut words = line.split_whitespace().skip(1);
    let (local, _remote, state) = (words.next()?, words.next()?, words.next()?);
    // TCP_LISTEN; a UDP socket that is not connected is "closed" (include/net/tcp_states.h).
    let wanted = if protocol == Protocol::Tcp { "0A" } else { "07" };
    let (address, port) = local.split_once(':').filter(|_| state == wanted)?;
    let words: Option<Vec<[u8; 4]>> =
        (0..address.len() / 8).map(|at| u32::from_str_radix(address.get(at * 8..at * 8 + 8)?, 16).ok().map(u32::to_ne_bytes)).collect();
    let bytes = words?.concat();
    let ip: IpAddr = match (<[u8; 4]>::try_from(bytes.as_slice()), <[u8; 16]>::try_from(bytes.as_slice())) {
        (Ok(v4), _) => Ipv4Addr::from(v4).into(),
        (_, Ok(v6)) => Ipv6Addr::from(v6).into(),
        _ => return None,
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_endian = "little")]
    fn listening_sockets_are_read_as_the_kernel_prints_them() {
        let tcp = "   1: 0100007F:2809 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 21344 1 0 100 0 0 10 0";
        assert_eq!(listening(tcp, Protocol::Tcp), Some("127.0.0.1:10249".parse().unwrap()));
        assert_eq!(listening(&tcp.replace(" 0A ", " 01 "), Protocol::Tcp), None, "an open connection");
        let udp = "  12: B80D0120000000000000000001000000:12B6 00000000000000000000000000000000:0000 07 00000000:00000000";
        assert_eq!(listening(udp, Protocol::Udp), Some("[2001:db8::1]:4790".parse().unwrap()));
        assert_eq!(listening("  sl  local_address rem_address   st tx_queue", Protocol::Tcp), None);
    }
}
