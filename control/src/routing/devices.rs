//! The two TUNs and the sysctls around them.
//!
//! Both TUNs have an MTU above every veth and uplink, so that the kernel never sends frag-needed or packet-too-big on its own
//! account for what is written to them or routed to them from outside: only the gateway does, in the sender's terms. The node's
//! own senders are told the real MTU by the routes' `mtu`.
//!
//! Read first: `Documentation/networking/ip-sysctl.rst`.

use crate::host_state::{HostState, HostStateError};
use crate::netlink::sysctl::{self, Key, SysctlError};
use crate::netlink::{AddrGenMode, AddressSpec, LinkSettings, LinkState, Netlink, NetlinkError};
use podgate_runtime::netns::Netns;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

/// The largest MTU a TUN takes (`MAX_MTU` in `drivers/net/tun.c`, no hardware header).
pub const DEVICE_MTU: u32 = 65535;
/// The most packets that wait in a TUN's queue: each may be a superframe of 64 KiB (design D2).
pub const TXQUEUELEN_MAX: u32 = 2000;
/// The source of ICMP errors that the kernel makes in the gateway's namespace, and the pods' next hop.
pub const POD_GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);

/// The same for IPv6, from the range for local use (RFC 4193); "podgate" in ASCII.
pub const ERROR_SOURCE_V6: Ipv6Addr = Ipv6Addr::new(0xfd70, 0x6f64, 0x6761, 0x7465, 0, 0, 0, 1);

/// An address that the TUN on the node has and nobody uses.
const HOST_DEVICE_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 2);

/// Why the devices or the sysctls around them could not be set.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The kernel refused.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// A sysctl could not be set.
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
    /// What was changed could not be noted down, so it was not changed.
    #[error(transparent)]
    State(#[from] HostStateError),
}

/// Sets the gateway's namespace up for forwarding, before anything is in it: loopback, the address that errors come from, sysctls.
pub fn prepare_gateway(netns: &Netns, netlink: &Netlink) -> Result<(), DeviceError> {
    // ICMP errors need a source; the pods' own next hop it is. It answers ping as well.
    netlink.set_link("lo", &LinkSettings::new().up())?;
    match netlink.add_address(&AddressSpec::new("lo", std::net::IpAddr::V4(POD_GATEWAY_V4).into())) {
        Err(error) if error.is_present_already() => {}
        other => other?,
    }
    let mut settings = vec![(Key::new("net/ipv4/ip_forward"), "1")];
    for device in ["all", "default"] {
        settings.extend([
            // Setting ip_forward resets others (net/ipv4/devinet.c), so it comes first. Sources are checked by the rules at
            // pref 20; a reverse-path filter on `pods` would drop what comes from outside.
            (Key::v4(device, "rp_filter"), "0"),
            (Key::v4(device, "accept_redirects"), "0"),
            (Key::v4(device, "send_redirects"), "0"),
            // Nothing is answered, so no solicitation of a pod makes an entry in the table that all namespaces share.
            (Key::v4(device, "arp_ignore"), "8"),
            (Key::v4(device, "proxy_arp"), "0"),
        ]);
    }
    let ipv6 = [
        (Key::v6("default", "accept_ra"), "0"),
        (Key::v6("default", "accept_dad"), "0"),
        (Key::v6("default", "accept_redirects"), "0"),
        (Key::v6("all", "disable_ipv6"), "0"),
        (Key::v6("default", "disable_ipv6"), "0"),
        (Key::v6("all", "forwarding"), "1"),
        // Behind the switch for all, which sets it too: pods' veths come as hosts' interfaces (see `pods`).
        (Key::v6("default", "forwarding"), "0"),
    ];
    sysctl::write_all(netns, &settings)?;
    match sysctl::write_all(netns, &ipv6) {
        Err(error) if error.is_missing() => return Ok(()), // a kernel without IPv6
        other => other?,
    }
    match netlink.add_address(&AddressSpec::new("lo", std::net::IpAddr::V6(ERROR_SOURCE_V6).into())) {
        Err(error) if error.is_present_already() => Ok(()),
        other => Ok(other?),
    }
}

/// Sets up the TUN `pods` in the gateway's namespace.
pub fn settle_pods_device(netns: &Netns, netlink: &Netlink, device: &str) -> Result<(), DeviceError> {
    let before_up = [(Key::v4(device, "accept_local"), "1"), (Key::v4(device, "rp_filter"), "0"), (Key::v4(device, "forwarding"), "1")];
    settle(netns, netlink, device, &before_up)?;
    match sysctl::write(netns, &Key::v6(device, "forwarding"), "1") {
        Err(error) if error.is_missing() => Ok(()), // a kernel without IPv6
        other => Ok(other?),
    }
}

/// Sets up the TUN on the node. Its sysctls go with it, so nothing has to be undone.
pub fn settle_host_device(netns: &Netns, netlink: &Netlink, device: &str) -> Result<(), DeviceError> {
    let before_up = [
        // Loose, whatever `all` says (the larger of the two counts): sources written here are routed to where they came from.
        (Key::v4(device, "rp_filter"), "2"),
        (Key::v4(device, "accept_local"), "1"),
        (Key::v4(device, "forwarding"), "1"),
        (Key::v4(device, "send_redirects"), "0"),
    ];
    settle(netns, netlink, device, &before_up)?;
    // Without any IPv4 address a device is strict, whatever its `rp_filter` (`last_resort` in net/ipv4/fib_frontend.c), and what no port
    // rule matches (ICMP and fragments from the node's own address) would be dropped.
    match netlink.add_address(&AddressSpec::new(device, std::net::IpAddr::V4(HOST_DEVICE_V4).into()).for_the_host_alone()) {
        Err(error) if error.is_present_already() => Ok(()),
        other => Ok(other?),
    }
}

fn settle(netns: &Netns, netlink: &Netlink, device: &str, before_up: &[(Key, &str)]) -> Result<(), DeviceError> {
    sysctl::write_all(netns, before_up)?;
    let settings = LinkSettings::new().addr_gen_mode(AddrGenMode::None).mtu(DEVICE_MTU).txqueuelen(TXQUEUELEN_MAX);
    let unsettled = |settings: &LinkSettings| -> Result<bool, NetlinkError> {
        let link = netlink.expect_link(device)?;
        Ok(link.state != LinkState::Up
            || Some(link.mtu) != settings.mtu
            || Some(link.txqueuelen) != settings.txqueuelen
            || link.addr_gen_mode.is_some_and(|mode| mode != AddrGenMode::None))
    };
    if unsettled(&settings)? {
        netlink.set_link(device, &settings.up())?;
    }
    Ok(())
}

/// What forwarding on the node needs, each change noted in `state` first so that it can be undone.
///
/// IPv4 forwards per interface. IPv6 has one switch for all, and turning it on makes interfaces ignore router advertisements and
/// lose the routes they learned, unless their `accept_ra` is 2: so that comes first, where advertisements are in use.
pub fn settle_node(netns: &Netns, state: &mut HostState, uplinks: &[String], ipv6: Ipv6Use) -> Result<(), DeviceError> {
    for uplink in uplinks {
        state.set(netns, &Key::v4(uplink, "forwarding"), "1")?;
    }
    if ipv6 == Ipv6Use::InUse {
        let devices = netns.run(ipv6_devices).unwrap_or_default();
        for device in devices.iter().filter(|device| !matches!(device.as_str(), "all" | "default" | "lo")) {
            if sysctl::read(netns, &Key::v6(device, "accept_ra")).is_ok_and(|value| value == "1")
                && sysctl::read(netns, &Key::v6(device, "forwarding")).is_ok_and(|value| value == "0")
            {
                state.set(netns, &Key::v6(device, "accept_ra"), "2")?;
            }
        }
        // The switch for all sets every interface's own, which have to come back as they were.
        state.set_with(netns, &Key::v6("all", "forwarding"), "1", devices.iter().map(|device| Key::v6(device, "forwarding")))?;
    }
    Ok(())
}

/// Whether the cluster uses IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ipv6Use {
    /// It does.
    InUse,
    /// It does not: nothing of IPv6 is touched.
    Unused,
}

fn ipv6_devices() -> Vec<String> {
    let entries = std::fs::read_dir("/proc/sys/net/ipv6/conf").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).filter(|name| name != "all").collect()
}

/// Keeps the kernel from giving our ports to the node's own connections.
pub fn reserve_ports(netns: &Netns, state: &mut HostState, ports: &[RangeInclusive<u16>]) -> Result<(), DeviceError> {
    Ok(state.reserve_ports(netns, ports)?)
}
