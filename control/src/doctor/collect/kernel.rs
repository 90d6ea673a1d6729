//! The kernel: what it says of itself, and what it does when it is asked, in a network namespace that has no name and goes with this process.

use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::net::UdpSocket;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use podgate_runtime::netns::Netns;
use podgate_runtime::tun::Tun;

use super::super::facts::{Device, Kernel, Look, Trials, Tried, Unseen};
use crate::netlink::{Family, LinkKind, LinkSettings, Netlink, NewLink, RuleAction, RuleSpec, TABLE_MAIN};

pub(super) fn look() -> Kernel {
    let release = nix::sys::utsname::uname().map(|name| name.release().to_string_lossy().into_owned()).unwrap_or_default();
    Kernel { release, capabilities: capabilities(), user: nix::unistd::geteuid().as_raw(), device: device(), trials: trials() }
}

fn capabilities() -> Look<u64> {
    let status = std::fs::read_to_string("/proc/self/status").map_err(|error| Unseen(format!("/proc/self/status: {error}")))?;
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).and_then(|text| u64::from_str_radix(text.trim(), 16).ok());
    effective.ok_or_else(|| Unseen("/proc/self/status has no CapEff".into()))
}

fn device() -> Device {
    match OpenOptions::new().read(true).write(true).open("/dev/net/tun") {
        Ok(_) => Device::Opens,
        Err(error) if error.kind() == ErrorKind::NotFound => Device::Missing,
        Err(error) if error.kind() == ErrorKind::PermissionDenied => Device::Denied,
        Err(error) => Device::Fails(error.to_string()),
    }
}

fn trials() -> Tried<Trials> {
    let netns = Netns::anonymous().map_err(|error| error.to_string())?;
    let netlink = Netlink::open(&netns).map_err(|error| error.to_string())?;
    let tun = Tun::open("trial", 2, &netns).map(|tun| (tun.features().tso, tun.features().uso)).map_err(|error| error.to_string());
    let kind = LinkKind::Veth { peer: "other", peer_netns: None, peer_settings: LinkSettings::new() };
    let veth = netlink.create_link(&NewLink { name: "one", kind, settings: LinkSettings::new() }).map_err(|error| error.to_string());
    let port_rule = Family::BOTH.into_iter().try_for_each(|family| {
        let rule = RuleSpec::new(family, 10, RuleAction::Lookup(TABLE_MAIN)).protocol(17).dport(30000..=32767);
        match netlink.add_rule(&rule) {
            // A kernel without IPv6.
            Err(error) if family == Family::V6 && matches!(error.errno(), Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP)) => Ok(()),
            other => other.map_err(|error| error.to_string()),
        }
    });
    let up = netlink.set_link("lo", &LinkSettings::new().up()).map_err(|error| error.to_string());
    let segments = up.and_then(|()| netns.run(segments).map_err(|error| error.to_string())?);
    Ok(Trials { tun, veth, port_rule, segments })
}

/// Three datagrams in one send, on loopback, which one receive must take together.
fn segments() -> Tried<()> {
    const LEN: usize = 100;
    let failed = |step: &'static str| move |error: std::io::Error| format!("{step}: {error}");
    let receiver = UdpSocket::bind("127.0.0.1:0").map_err(failed("binding a socket"))?;
    receiver.set_read_timeout(Some(Duration::from_secs(1))).map_err(failed("setting a timeout"))?;
    setsockopt(&receiver, sockopt::UdpGroSegment, &true).map_err(|errno| format!("UDP_GRO: {errno}"))?;
    let sender = UdpSocket::bind("127.0.0.1:0").map_err(failed("binding a socket"))?;
    setsockopt(&sender, sockopt::UdpGsoSegment, &(LEN as i32)).map_err(|errno| format!("UDP_SEGMENT: {errno}"))?;
    let to = receiver.local_addr().map_err(failed("finding a socket's address"))?;
    sender.send_to(&[0; 3 * LEN], to).map_err(failed("sending three datagrams at once"))?;
    let mut buffer = [0; 4 * LEN];
    match receiver.recv(&mut buffer).map_err(failed("receiving them"))? {
        received if received == 3 * LEN => Ok(()),
        received => Err(format!("of three datagrams of {LEN} bytes, sent at once, {received} bytes came together")),
    }
}
