//! A machine before its first gateway.

use std::fs;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::path::Path;

use nix::mount::{MsFlags, mount, umount};
use podgate::netlink::Family;
use podgate_testbed::need::program;

use crate::{Fault, Try, Undo, Ward};

const fn fault(
    name: &'static str,
    make: for<'a> fn(&'a Ward<'a>) -> Try<Undo<'a>>,
    check: &'static str,
    status: &'static str,
    words: &'static [&'static str],
) -> Fault {
    Fault { name, make, check, status, words }
}

/// A file system over `path`, seen by the sandbox alone.
fn mounted<'a>(path: impl AsRef<Path>, options: &'static str) -> Try<Undo<'a>> {
    let path = path.as_ref().to_owned();
    mount(Some("none"), &path, Some("tmpfs"), MsFlags::empty(), Some(options))?;
    Ok(Box::new(move || Ok(umount(&path)?)))
}

/// A machine where no firewall can be read.
fn without_nft<'a>() -> Try<Undo<'a>> {
    let path = program("nft").unwrap_or_else(|| "/usr/sbin/nft".into());
    if !path.exists() {
        return Ok(Box::new(|| Ok(())));
    }
    let path = path.canonicalize()?;
    mount(Some("/dev/null"), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    Ok(Box::new(move || Ok(umount(&path)?)))
}

/// Somebody who has a port.
fn holds<'a>(ward: &'a Ward<'a>, bind: impl FnOnce() -> std::io::Result<std::os::fd::OwnedFd> + Send) -> Try<Undo<'a>> {
    let holder = ward.node.machine().run(bind)??;
    Ok(Box::new(move || {
        drop(holder);
        Ok(())
    }))
}

fn listens<'a>(ward: &'a Ward<'a>, address: &'static str) -> Try<Undo<'a>> {
    holds(ward, move || TcpListener::bind(address).map(Into::into))
}

pub const FAULTS: &[Fault] = &[
    fault("an old kernel", |ward| ward.wrapped(&["setarch", "--uname-2.6"]), "kernel", "failure", &["Linux 2.6.", "too old"]),
    fault("no /dev/net/tun", |_| mounted("/dev/net", ""), "tun-device", "failure", &["/dev/net/tun is missing", "modprobe tun"]),
    fault(
        "no CAP_NET_ADMIN",
        |ward| ward.wrapped(&["setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-all"]),
        "capabilities",
        "failure",
        &["lacks CAP_NET_ADMIN", "AmbientCapabilities"],
    ),
    fault(
        "no CAP_SYS_ADMIN",
        |ward| ward.wrapped(&["setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-all"]),
        "capabilities",
        "failure",
        &["lacks CAP_SYS_ADMIN"],
    ),
    fault(
        "no further network namespace",
        |ward| {
            let limit = "echo 0 > /proc/sys/user/max_net_namespaces && exec \"$0\" \"$@\"";
            ward.wrapped(&["unshare", "--user", "--map-root-user", "sh", "-c", limit])
        },
        "namespaces",
        "failure",
        &["no network namespace can be made", "user.max_net_namespaces"],
    ),
    fault(
        "a configuration that is refused",
        |ward| ward.configured(|text| text.replace("10.96.0.0/16", "10.244.128.0/17")),
        "config",
        "failure",
        &["pod range 10.244.0.0/16 overlaps service range 10.244.128.0/17"],
    ),
    fault(
        "an underlay address that is not the machine's",
        |ward| ward.configured(|text| text.replace("192.0.2.1,", "192.0.2.99,")),
        "underlay",
        "failure",
        &["192.0.2.99 is not an address of this machine"],
    ),
    fault(
        "an underlay interface that is not there",
        |ward| ward.configured(|text| text.replace("address: [192.0.2.1, \"2001:db8::1\"]", "interface: eth9")),
        "underlay",
        "failure",
        &["eth9 is not there"],
    ),
    fault(
        "an address in the service range",
        |ward| ward.tools("ip addr add 10.96.3.4/32 dev eth0", "ip addr del 10.96.3.4/32 dev eth0"),
        "ranges",
        "failure",
        &["10.96.3.4 of eth0", "service range 10.96.0.0/16"],
    ),
    fault(
        "`local` behind VRFs' rule",
        |ward| ward.tools("ip rule add pref 2000 lookup local && ip rule del pref 0", "ip rule add pref 0 lookup local && ip rule del pref 2000"),
        "local-rule",
        "failure",
        &["the IPv4 rule \"pref 0 lookup local\" is missing", "ip -4 rule add pref 0 lookup local"],
    ),
    fault(
        "`local` of IPv6 behind VRFs' rule",
        |ward| {
            ward.tools(
                "ip -6 rule add pref 2000 lookup local && ip -6 rule del pref 0",
                "ip -6 rule add pref 0 lookup local && ip -6 rule del pref 2000",
            )
        },
        "local-rule",
        "failure",
        &["ip -6 rule add pref 0 lookup local"],
    ),
    fault(
        "no IPv6",
        |ward| {
            let later = "echo 0 > /proc/sys/net/ipv6/conf/all/disable_ipv6 && ip addr add 2001:db8::1/64 dev eth0 nodad";
            ward.tools("echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6", later)
        },
        "sysctls",
        "failure",
        &["IPv6 is switched off", "disable_ipv6=0"],
    ),
    fault(
        "what an earlier gateway left",
        |ward| {
            let undo = ["cleanup", "--config", &ward.node.config().display().to_string()].map(str::to_owned);
            ward.node.prepare()?;
            Ok(Box::new(move || {
                ward.node.podgate(&undo.each_ref().map(String::as_str))?;
                // It has taken the directories with it.
                Ok(fs::create_dir_all(ward.node.gateway_netns().with_file_name(""))?)
            }))
        },
        "leftovers",
        "warning",
        &["the gateway's namespace", "podgate cleanup"],
    ),
    fault(
        "somebody on the overlay's port",
        |ward| {
            let address = SocketAddr::new(ward.node.machine().address(Family::V6), 4790);
            holds(ward, move || UdpSocket::bind(address).map(Into::into))
        },
        "ports",
        "failure",
        &["[2001:db8::1]:4790 (UDP) is taken", "ss -ulnp", "overlay.port"],
    ),
    fault("somebody on the health port", |ward| listens(ward, "0.0.0.0:10256"), "ports", "failure", &["0.0.0.0:10256 (TCP)", "health.address"]),
    fault(
        "somebody on the metrics' port",
        |ward| listens(ward, "127.0.0.1:10249"),
        "ports",
        "failure",
        &["127.0.0.1:10249 (TCP)", "metrics.address"],
    ),
    fault("somebody on a node port", |ward| listens(ward, "0.0.0.0:30080"), "ports", "warning", &["0.0.0.0:30080, a node port", "nodePorts"]),
    fault(
        "no room for addresses",
        |ward| mounted(ward.node.config().with_file_name("state"), "size=64k"),
        "room",
        "failure",
        &["MiB left", "stateDir"],
    ),
    fault("no room for flows", |ward| mounted(ward.node.config().with_file_name("run"), "size=4m"), "room", "failure", &["4 MiB left", "runtimeDir"]),
    fault(
        "no room for files",
        |ward| mounted(ward.node.config().with_file_name("state"), "nr_inodes=20"),
        "room",
        "failure",
        &["more files", "stateDir"],
    ),
    fault("a firewall that cannot be read", |_| without_nft(), "firewall", "warning", &["nft", "self-test"]),
    fault(
        "another plugin's configuration",
        |ward| {
            fs::create_dir_all(ward.conf_dir())?;
            let path = ward.conf_dir().join("05-other.conflist");
            fs::write(&path, "{}")?;
            Ok(Box::new(move || Ok(fs::remove_file(&path)?)))
        },
        "cni-order",
        "warning",
        &["05-other.conflist"],
    ),
];
