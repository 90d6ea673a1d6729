//! What the kernel offers, and whether this process may have it.

use super::super::facts::{Device, Facts, Trials};
use super::{AS_ROOT, Lines};

/// The oldest Linux whose sockets join datagrams (`UDP_GRO`, 5.0), without which the overlay's sockets are not opened. Rules by port are
/// older (4.17).
const OLDEST: (u32, u32) = (5, 0);

/// The capabilities that a gateway needs, as in [`crate::privileges`], and the one for echoes to peers.
const CAPABILITIES: [(&str, u32); 3] = [("CAP_NET_ADMIN", 12), ("CAP_SYS_ADMIN", 21), ("CAP_NET_RAW", 13)];

pub(super) fn judge(facts: &Facts, lines: &mut Lines) {
    let kernel = &facts.kernel;
    match version(&kernel.release) {
        Some(version) if version < OLDEST => lines.fail(
            "kernel",
            format!("Linux {} is too old", kernel.release),
            format!("Linux {}.{} is the oldest that has all that is needed; 6.2 the first with UDP superframes on TUN", OLDEST.0, OLDEST.1),
        ),
        Some(_) => lines.ok("kernel", format!("Linux {}", kernel.release)),
        None => lines.warn("kernel", format!("Linux {:?}: its version cannot be read", kernel.release), "see that it is 5.0 or later"),
    }
    let lacking = lacking(facts);
    capabilities(facts, &lacking, lines);
    match &kernel.device {
        Device::Opens => lines.ok("tun-device", "/dev/net/tun can be opened"),
        Device::Missing => lines.fail(
            "tun-device",
            "/dev/net/tun is missing",
            "load the module (`modprobe tun`); in a container, pass the device in (`--device /dev/net/tun`, or a hostPath volume)",
        ),
        Device::Denied if kernel.user != 0 => lines.warn("tun-device", "/dev/net/tun may not be opened by this user", AS_ROOT),
        Device::Denied => lines.fail(
            "tun-device",
            "/dev/net/tun may not be opened",
            "allow character device 10:200 to this container or unit (`DeviceAllow=/dev/net/tun rw`)",
        ),
        Device::Fails(why) => lines.fail("tun-device", format!("/dev/net/tun cannot be opened: {why}"), "load the module (`modprobe tun`)"),
    }
    match &kernel.trials {
        Ok(trials) => {
            lines.ok("namespaces", "network namespaces can be made");
            tried(facts, trials, lines);
        }
        // Only who lacks nothing else learns something of the kernel by the refusal.
        Err(_) if !lacking.is_empty() => {
            lines.warn(
                "namespaces",
                format!("nothing was tried (TUN, veth, rules by port, UDP segments): this needs {}", lacking.join(", ")),
                AS_ROOT,
            );
        }
        Err(why) => lines.fail(
            "namespaces",
            format!("no network namespace can be made: {why}"),
            "the kernel needs CONFIG_NET_NS, and `sysctl user.max_net_namespaces` a value above what is in use",
        ),
    }
}

fn capabilities(facts: &Facts, lacking: &[&str], lines: &mut Lines) {
    match &facts.kernel.capabilities {
        Err(why) => lines.warn("capabilities", format!("what this process may do cannot be seen: {}", why.0), "mount /proc"),
        Ok(_) if lacking.is_empty() => lines.ok("capabilities", "this process may do what a gateway does (CAP_NET_ADMIN, CAP_SYS_ADMIN)"),
        Ok(_) if facts.kernel.user != 0 => {
            lines.warn("capabilities", format!("this user lacks {}: not everything below could be looked at", lacking.join(", ")), AS_ROOT);
        }
        Ok(_) => lines.fail(
            "capabilities",
            format!("this process lacks {}, as a gateway that is started like it would", lacking.join(", ")),
            "in a container or a systemd unit, grant it (securityContext.capabilities.add, AmbientCapabilities)",
        ),
    }
}

fn lacking(facts: &Facts) -> Vec<&'static str> {
    let Ok(effective) = facts.kernel.capabilities else { return Vec::new() };
    CAPABILITIES.iter().filter(|(_, number)| effective & (1 << number) == 0).map(|(name, _)| *name).collect()
}

fn tried(facts: &Facts, trials: &Trials, lines: &mut Lines) {
    match &trials.tun {
        Ok((tso, uso)) => {
            lines.ok("tun-queues", "a TUN takes several queues and virtio-net headers");
            match (tso, uso) {
                (true, true) => lines.ok("tun-offloads", "a TUN takes superframes of TCP and of UDP"),
                (true, false) => lines.warn(
                    "tun-offloads",
                    "a TUN takes no UDP superframes: datagrams go one by one, TCP is as fast as ever",
                    "Linux 6.2 or later has them (TUN_F_USO4, TUN_F_USO6)",
                ),
                (false, _) => lines.warn("tun-offloads", "a TUN takes no superframes: every packet goes by itself", "use another kernel"),
            }
        }
        // The device's own line has said it.
        Err(_) if facts.kernel.device != Device::Opens => {}
        Err(why) => lines.fail("tun-queues", format!("no TUN with two queues and virtio-net headers can be made: {why}"), "use another kernel"),
    }
    let mut plain = |check, works: &str, fails: &str, result: &Result<(), String>, remedy: &str| match result {
        Ok(()) => lines.ok(check, works),
        Err(why) => lines.fail(check, format!("{fails}: {why}"), remedy),
    };
    plain("veth", "veth pairs can be made", "no veth pair can be made", &trials.veth, "load the module (`modprobe veth`)");
    plain(
        "port-rules",
        "routing rules can name ports",
        "no routing rule with a port can be made",
        &trials.port_rule,
        "the kernel needs CONFIG_IP_MULTIPLE_TABLES and CONFIG_IPV6_MULTIPLE_TABLES, Linux 4.17 or later",
    );
    match &trials.segments {
        Ok(()) => lines.ok("udp-segments", "UDP sockets cut and join datagrams (UDP_SEGMENT, UDP_GRO)"),
        Err(why) => lines.warn(
            "udp-segments",
            format!("UDP sockets do not cut or join datagrams (UDP_SEGMENT, UDP_GRO): {why}"),
            "traffic between nodes is slow without; use another kernel",
        ),
    }
}

/// `6.18.44-fc`: (6, 18).
fn version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((parts.next()?.ok()?, parts.next()?.ok()?))
}
