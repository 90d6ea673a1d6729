//! The configuration, and the node's own network: ranges, rules, sysctls, ports, room, and what others have left there.

use std::net::IpAddr;

use super::super::facts::{Bound, Configuration, Daemon, Facts, Host, Protocol, Stage};
use super::{AS_ROOT, Lines, config, device, overlap, ranges};
use crate::config::Config;
use crate::netlink::{Family, ORIGIN_KERNEL, Rule, RuleAction, TABLE_LOCAL};
use crate::routing::{CLUSTER_TABLE, HOST_TABLE, UP_TABLE};

/// The last preference of ours on the node: what stands before it is tried before it.
const LAST_OF_OURS: u32 = 101;

/// Fewer free files than this are none.
const FILES_MIN: u64 = 256;

/// Other network plugins' interfaces: how their names begin, and whose they are.
const OTHERS: [(&str, &str); 16] = [
    ("cni0", "flannel or another plugin with a bridge"),
    ("flannel", "flannel"),
    ("weave", "Weave Net"),
    ("vethwe", "Weave Net"),
    ("vxlan-6784", "Weave Net"),
    ("cali", "Calico"),
    ("vxlan.calico", "Calico"),
    ("wireguard.cali", "Calico"),
    ("cilium", "Cilium"),
    ("lxc_health", "Cilium"),
    ("antrea", "Antrea"),
    ("ovn-k8s", "OVN-Kubernetes"),
    ("genev_sys_", "OVN-Kubernetes or Antrea"),
    ("kube-bridge", "kube-router"),
    ("kube-dummy", "kube-router"),
    ("cni-podman", "Podman"),
];

/// The dummy on which kube-proxy's IPVS mode puts every VIP.
const IPVS: &str = "kube-ipvs0";

pub(super) fn configuration(facts: &Facts, lines: &mut Lines) {
    match &facts.configuration {
        Configuration::Read(config) => lines.ok("config", format!("{} holds", config.file.display())),
        Configuration::Refused(why) => {
            lines.fail("config", why.clone(), "mend the file; what depends on it is looked at below as if it were not there");
        }
        Configuration::Missing(path) if facts.stage == Stage::Before => {
            lines.ok("config", format!("no {} yet: ranges, ports and the source are not looked at (--config names another)", path.display()));
        }
        Configuration::Missing(path) => lines.fail("config", format!("there is no {}", path.display()), "write it, or name another with --config"),
        Configuration::Denied(path) => lines.warn("config", format!("{} is not for this user to read", path.display()), AS_ROOT),
    }
    let (Some(config), Ok(host)) = (config(facts), &facts.host) else { return };
    match &host.machine {
        Some(Ok(machine)) => {
            let show = |ips: &[IpAddr]| ips.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            lines.ok("underlay", format!("the underlay is {} (MTU {})", show(&machine.underlay), machine.underlay_mtu));
        }
        Some(Err(why)) => lines.fail("underlay", why.clone(), "correct `underlay` in the configuration, or give the machine the address"),
        None => {}
    }
    overlaps(config, host, facts, lines);
}

/// Pod and service ranges against everything else that has addresses here.
fn overlaps(config: &Config, host: &Host, facts: &Facts, lines: &mut Lines) {
    let ours = device(facts);
    for (kind, range) in ranges(config) {
        for (link, address) in host.addresses.iter().filter(|(link, address)| link != ours && link != IPVS && range.contains(address.ip())) {
            lines.fail(
                "ranges",
                format!("{} of {link} lies in the {kind} range {range}: nobody would reach it any more", address.ip()),
                format!("choose another {kind} range, or take the address away if nobody needs it"),
            );
        }
        let foreign = |table: u32| !matches!(table, TABLE_LOCAL | HOST_TABLE | CLUSTER_TABLE | UP_TABLE);
        for route in host.routes.iter().filter(|route| foreign(route.table) && route.destination.prefix() > 0) {
            if overlap(route.destination, range) && route.device.as_deref() != Some(ours) {
                lines.warn(
                    "ranges",
                    format!("the {kind} range {range} overlaps a route that is there: {route}; what it leads to is hidden by the gateway"),
                    format!("choose another {kind} range, or take the route away if nobody needs it"),
                );
            }
        }
        for (file, other) in facts.cni.others.iter().flat_map(|(file, nets)| nets.iter().map(move |net| (file, *net))) {
            if overlap(other, range) {
                lines.warn(
                    "ranges",
                    format!("the {kind} range {range} overlaps {other}, from which the CNI configuration {} gives addresses", file.display()),
                    "give one of them another range, or remove that configuration",
                );
            }
        }
    }
    lines.ok_unless_found("ranges", "pod and service ranges overlap no address, route or other CNI configuration of this machine");
}

pub(super) fn judge(facts: &Facts, lines: &mut Lines) {
    match &facts.host {
        Err(why) => lines.warn("host", format!("links, rules and routes could not be looked at: {}", why.0), AS_ROOT),
        Ok(host) => {
            rules(facts, host, lines);
            sysctls(facts, host, lines);
            leftovers(facts, host, lines);
            others(host, lines);
        }
    }
    ports(facts, lines);
    rooms(facts, lines);
}

fn uses(facts: &Facts, family: Family) -> bool {
    config(facts).is_none_or(|config| config.pod_cidrs.iter().any(|cidr| cidr.is_ipv4() == (family == Family::V4)))
}

fn is_ours(rule: &Rule) -> bool {
    let spec = &rule.spec;
    rule.exact
        && spec.origin == ORIGIN_KERNEL
        && match spec.action {
            RuleAction::Lookup(HOST_TABLE | CLUSTER_TABLE | UP_TABLE) => true,
            RuleAction::Lookup(TABLE_LOCAL) => matches!(spec.pref, 0 | 1 | 100),
            RuleAction::Goto(_) => spec.pref == 0,
            _ => false,
        }
}

fn rules(facts: &Facts, host: &Host, lines: &mut Lines) {
    for family in Family::BOTH.into_iter().filter(|family| uses(facts, *family)) {
        let mut of_family = host.rules.iter().filter(|rule| rule.spec.family == family);
        let flag = if family == Family::V4 { "-4" } else { "-6" };
        let Some(first) = of_family.clone().next() else { continue }; // a kernel without it
        if !of_family.any(|rule| rule.spec.pref == 0 && rule.spec.action == RuleAction::Lookup(TABLE_LOCAL)) {
            lines.fail(
                "local-rule",
                format!("the {family} rule \"pref 0 lookup local\" is missing (the first is: {}); hosts with VRFs move it", first.spec),
                format!("put it back with `ip {flag} rule add pref 0 lookup local`, or use a host without VRFs"),
            );
        }
    }
    lines.ok_unless_found("local-rule", "`local` is the first routing rule");
    let early = |rule: &&Rule| rule.spec.pref <= LAST_OF_OURS && !is_ours(rule) && rule.spec.action != RuleAction::Lookup(TABLE_LOCAL);
    for rule in host.rules.iter().filter(early) {
        lines.warn(
            "early-rules",
            format!("a routing rule of somebody else's is tried before those of the gateway: {}", rule.spec),
            format!("give it a preference above {LAST_OF_OURS}, or see that it leads neither pods nor services elsewhere"),
        );
    }
    lines.ok_unless_found("early-rules", "no routing rule of others' is tried before those of the gateway");
    for route in host.routes.iter().filter(|route| route.table == HOST_TABLE) {
        if let Some(other) = route.device.as_deref().filter(|other| *other != device(facts)) {
            lines.fail(
                "other-gateway",
                format!("this network namespace has another gateway: routing table {HOST_TABLE} leads to `{other}`"),
                "use the podgate.yaml of that gateway; or stop it and run `podgate cleanup` with it first",
            );
        }
    }
}

fn sysctls(facts: &Facts, host: &Host, lines: &mut Lines) {
    let value = |key: String| host.sysctls.get(&key).map(String::as_str);
    let v6 = uses(facts, Family::V6);
    if v6 && value("net/ipv6/conf/all/disable_ipv6".into()) == Some("1") {
        lines.fail(
            "sysctls",
            "IPv6 is switched off (net.ipv6.conf.all.disable_ipv6), but the cluster has an IPv6 range",
            "sysctl -w net.ipv6.conf.all.disable_ipv6=0, or take the range out of the configuration",
        );
    }
    if matches!(facts.daemon, Daemon::Down(_)) {
        return lines.ok_unless_found("sysctls", "no sysctl is in the way; a gateway sets those it needs when it starts");
    }
    let tun = device(facts);
    for (name, wanted, why) in [
        ("rp_filter", "2", "strict or no reverse-path filter there: what the gateway writes from the node's own address is lost"),
        ("accept_local", "1", "what the gateway writes from the node's own address is lost"),
        ("forwarding", "1", "pods do not reach the outside"),
    ] {
        if let Some(found) = value(format!("net/ipv4/conf/{tun}/{name}")).filter(|found| *found != wanted) {
            lines.fail(
                "sysctls",
                format!("net.ipv4.conf.{tun}.{name} is {found}, and the gateway had set it to {wanted}: {why}"),
                format!("sysctl -w net.ipv4.conf.{tun}.{name}={wanted}, and take what sets it out of /etc/sysctl.d"),
            );
        }
    }
    let uplinks = host.machine.iter().flatten().flat_map(|machine| &machine.uplinks);
    for uplink in uplinks {
        if value(format!("net/ipv4/conf/{uplink}/forwarding")) == Some("0") {
            lines.fail(
                "sysctls",
                format!("net.ipv4.conf.{uplink}.forwarding is 0: nothing comes from there to pods and node ports"),
                format!("sysctl -w net.ipv4.conf.{uplink}.forwarding=1, and take what sets it out of /etc/sysctl.d"),
            );
        }
        let advertised = value(format!("net/ipv6/conf/{uplink}/accept_ra")) == Some("1");
        if v6 && advertised && value(format!("net/ipv6/conf/{uplink}/forwarding")) == Some("1") {
            lines.warn(
                "sysctls",
                format!("net.ipv6.conf.{uplink}.accept_ra is 1: a machine that forwards then ignores router advertisements, and loses its routes"),
                format!("sysctl -w net.ipv6.conf.{uplink}.accept_ra=2, if this network has router advertisements"),
            );
        }
    }
    if v6 && value("net/ipv6/conf/all/forwarding".into()) == Some("0") {
        lines.fail(
            "sysctls",
            "net.ipv6.conf.all.forwarding is 0: nothing of IPv6 is forwarded",
            "sysctl -w net.ipv6.conf.all.forwarding=1, and take what sets it out of /etc/sysctl.d",
        );
    }
    if let (Some(config), Some(reserved)) = (config(facts), value("net/ipv4/ip_local_reserved_ports".into())) {
        let mut wanted = vec![config.node_ports.clone()];
        wanted.extend(config.masquerade.iter().flatten().cloned());
        for range in wanted.iter().filter(|range| [range.start(), range.end()].iter().any(|port| !is_listed(reserved, **port))) {
            lines.warn(
                "sysctls",
                format!(
                    "net.ipv4.ip_local_reserved_ports lacks {}-{}, which the gateway had put there: the node's own connections may take these ports",
                    range.start(),
                    range.end()
                ),
                "restart the gateway, and take what sets it out of /etc/sysctl.d",
            );
        }
    }
    lines.ok_unless_found("sysctls", "forwarding, reverse-path filter and reserved ports are as the gateway set them");
}

/// Whether `port` is in a list as `ip_local_reserved_ports` has it: `30000-32767,61000`.
fn is_listed(list: &str, port: u16) -> bool {
    list.split(',').any(|part| {
        let (first, last) = part.trim().split_once('-').unwrap_or((part.trim(), part.trim()));
        matches!((first.parse::<u16>(), last.parse::<u16>()), (Ok(first), Ok(last)) if first <= port && port <= last)
    })
}

/// What a gateway has left, with nobody to keep it.
fn leftovers(facts: &Facts, host: &Host, lines: &mut Lines) {
    if !matches!(facts.daemon, Daemon::Down(_)) {
        return;
    }
    let mut found = Vec::new();
    let rules = host.rules.iter().filter(|rule| is_ours(rule) && !matches!(rule.spec.action, RuleAction::Lookup(TABLE_LOCAL))).count();
    if rules > 0 {
        found.push(format!("{rules} routing rules"));
    }
    let tun = device(facts);
    if host.links.iter().any(|(name, kind)| name == tun && kind == "tun") {
        found.push(format!("the interface {tun}"));
    }
    if let Some(netns) = &host.gateway_netns {
        found.push(format!("the gateway's namespace {}", netns.display()));
    }
    if found.is_empty() {
        lines.ok("leftovers", "nothing is left of an earlier gateway");
    } else {
        lines.warn(
            "leftovers",
            format!("no daemon runs, but there are {}", found.join(", ")),
            "start it again, and all of it is used as it is; or take it away with `podgate cleanup`",
        );
    }
}

fn others(host: &Host, lines: &mut Lines) {
    for (name, _) in &host.links {
        if name == IPVS {
            let vips = host.addresses.iter().filter(|(link, _)| link == IPVS).count();
            lines.fail(
                "other-plugins",
                format!("kube-proxy in IPVS mode is or was here: {IPVS} has {vips} VIPs, which the node takes for its own, so that they never reach the gateway"),
                format!("stop kube-proxy and run `kube-proxy --cleanup`, or `ip link delete {IPVS}`"),
            );
        } else if let Some((_, whose)) = OTHERS.iter().find(|(prefix, _)| name.starts_with(prefix)) {
            lines.warn(
                "other-plugins",
                format!("{name} is an interface of another network plugin ({whose})"),
                format!("remove that plugin from the node; when no pod hangs on it any more, `ip link delete {name}`"),
            );
        }
    }
    let engine = |name: &str| name == "docker0" || name.starts_with("podman") || name.starts_with("br-") || name == "virbr0" || name == "lxdbr0";
    let engines: Vec<&str> = host.links.iter().filter(|(name, kind)| kind == "bridge" && engine(name)).map(|(name, _)| &**name).collect();
    let beside = if engines.is_empty() { String::new() } else { format!(" ({} of a container engine: harmless by itself)", engines.join(", ")) };
    lines.ok_unless_found("other-plugins", format!("no interface of another network plugin{beside}"));
}

/// Ports that the gateway will want, and somebody has.
fn ports(facts: &Facts, lines: &mut Lines) {
    // A daemon that answers has them itself.
    let (Daemon::Down(_), Some(config)) = (&facts.daemon, config(facts)) else { return };
    let bound = match &facts.sockets {
        Ok(bound) => bound,
        Err(why) => return lines.warn("ports", format!("which ports are taken could not be seen: {}", why.0), AS_ROOT),
    };
    let underlay: Vec<IpAddr> = match &facts.host {
        Ok(Host { machine: Some(Ok(machine)), .. }) => machine.underlay.clone(),
        _ => Vec::new(),
    };
    let on = |bound: &Bound, ip: IpAddr| bound.address.ip().is_unspecified() || ip.is_unspecified() || bound.address.ip() == ip;
    let mut check = |protocol: Protocol, port: u16, ips: &[IpAddr], what: &str, key: &str| {
        let taken = |bound: &&Bound| bound.protocol == protocol && bound.address.port() == port && ips.iter().any(|ip| on(bound, *ip));
        if let Some(holder) = bound.iter().find(taken) {
            let (name, flag) = if protocol == Protocol::Tcp { ("TCP", "-tlnp") } else { ("UDP", "-ulnp") };
            lines.fail(
                "ports",
                format!("{} ({name}) is taken, which is to be the gateway's {what}", holder.address),
                format!("`ss {flag}` names who has it: stop that (a kernel VXLAN device counts), or change `{key}`"),
            );
        }
    };
    check(Protocol::Udp, config.overlay.port, &underlay, "overlay", "overlay.port");
    check(Protocol::Tcp, config.health.port(), &[config.health.ip()], "health port", "health.address");
    check(Protocol::Tcp, config.metrics.port(), &[config.metrics.ip()], "metrics port", "metrics.address");
    let hidden = bound.iter().filter(|bound| config.node_ports.contains(&bound.address.port()) && !bound.address.ip().is_loopback());
    for holder in hidden {
        lines.warn(
            "ports",
            format!("somebody listens on {}, a node port: on the node's own addresses it will not be reached any more", holder.address),
            "move it to another port, or change `nodePorts`",
        );
    }
    lines.ok_unless_found("ports", "the overlay's, health's and metrics' ports are free");
}

fn rooms(facts: &Facts, lines: &mut Lines) {
    const MIB: u64 = 1 << 20;
    for room in &facts.rooms {
        let path = room.path.display();
        match &room.free {
            Ok((bytes, _)) if *bytes < room.needed => lines.fail(
                "room",
                format!("{path} has {} MiB left, and {} MiB are needed", bytes / MIB, room.needed.div_ceil(MIB)),
                format!("make room there, or name another directory with `{}`", room.key),
            ),
            Ok((_, files)) if *files < FILES_MIN => lines.fail(
                "room",
                format!("{path} has room for {files} more files only"),
                format!("remove files there, or name another directory with `{}`", room.key),
            ),
            Ok(_) => {}
            Err(why) => lines.warn("room", format!("how much room {path} has cannot be seen: {why}"), AS_ROOT),
        }
    }
    if !facts.rooms.is_empty() {
        let paths: Vec<String> = facts.rooms.iter().map(|room| room.path.display().to_string()).collect();
        lines.ok_unless_found("room", format!("there is room in {}", paths.join(" and ")));
    }
}
