//! Rules of the node's firewall that drop what the gateway delivers, forwards or is forwarded, and those of kube-proxy.

use std::net::IpAddr;

use super::super::facts::{Daemon, Facts};
use super::super::firewall::{Chain, Condition, Dropped, Hook, Packet, Tool, droppers};
use super::{AS_ROOT, Lines, config, device};

pub(super) fn judge(facts: &Facts, lines: &mut Lines) {
    if !facts.firewall.unread.is_empty() {
        unread(facts, lines);
    }
    let tun = device(facts);
    let machine = facts.host.as_ref().ok().and_then(|host| host.machine.as_ref()).and_then(|machine| machine.as_ref().ok());
    let uplink = machine.and_then(|machine| machine.uplinks.first()).map_or("eth0", String::as_str);
    let families: Vec<bool> = match config(facts) {
        Some(config) => [true, false].into_iter().filter(|v4| config.pod_cidrs.iter().any(|cidr| cidr.is_ipv4() == *v4)).collect(),
        None => vec![true, false],
    };
    let chains = &facts.firewall.chains;
    for (check, what, hook, iif, oif) in [
        ("forward", "what pods send to the outside", Hook::Forward, tun, Some(uplink)),
        ("forward", "what the outside sends to node ports and pods", Hook::Forward, uplink, Some(tun)),
        ("input", "what pods and services send to this node", Hook::Input, tun, None),
        ("reverse-path", "what leaves by this node's own address (masqueraded traffic, node ports)", Hook::Prerouting, tun, None),
    ] {
        for v4 in &families {
            let node: Option<IpAddr> = machine.and_then(|machine| machine.underlay.iter().copied().find(|ip| ip.is_ipv4() == *v4));
            let pod = config(facts).and_then(|config| config.pod_cidrs.iter().find(|cidr| cidr.is_ipv4() == *v4)).and_then(|cidr| cidr.iter().nth(5));
            let (from, to) = match (hook, iif == tun) {
                (Hook::Input, _) => (pod, node),
                // To the outside by the node's address; from there to it.
                (_, true) => (node, None),
                (_, false) => (None, node),
            };
            let packet = Packet { hook, iif, oif, v4: *v4, from, to };
            for dropped in droppers(chains, &packet) {
                let by_source = dropped.rule.is_some_and(|rule| rule.conditions.contains(&Condition::NoWayBack));
                // Before routing it is only asked about the way back: what else is dropped there is not the gateway's in particular.
                if hook == Hook::Prerouting && !by_source {
                    continue;
                }
                let family = if *v4 { "IPv4" } else { "IPv6" };
                let detail = format!("{} drops {what} ({family})", show(&dropped));
                let remedy = remedy(&dropped, tun, hook);
                let said = lines.findings.iter().any(|finding| finding.check == check && finding.detail == detail);
                if !said {
                    lines.warn(check, detail, remedy);
                }
            }
        }
    }
    kube_proxy(chains, lines);
    let seen = !chains.is_empty() || facts.firewall.unread.is_empty();
    if seen {
        for (check, detail) in [
            ("forward", "no rule of the firewall drops what the node forwards for the gateway"),
            ("input", "no rule of the firewall drops what the gateway delivers to the node"),
            ("reverse-path", "no rule of the firewall drops the node's own address as source"),
            ("kube-proxy", "no rules of kube-proxy's"),
        ] {
            lines.ok_unless_found(check, detail);
        }
    }
}

/// Where not all of it could be read, the self-test of a daemon that runs tells as much as one needs to know.
fn unread(facts: &Facts, lines: &mut Lines) {
    let why = facts.firewall.unread.join("; ");
    if let Daemon::Answers(tables) = &facts.daemon
        && let Some(checks) = tables.status["checks"].as_array().filter(|checks| !checks.is_empty())
        && checks.iter().all(|check| check["ok"] == true)
    {
        return lines.ok("firewall", format!("not all of the firewall could be read ({why}), but the gateway's own test packets pass it"));
    }
    lines.warn(
        "firewall",
        format!("not all of the firewall could be read: {why}"),
        format!("{AS_ROOT}, with `nft` installed; or start the gateway, whose self-test shows what is dropped"),
    );
}

fn show(dropped: &Dropped<'_>) -> String {
    let Chain { family, table, name, .. } = dropped.chain;
    let tool = if dropped.chain.tool == Tool::Legacy { "iptables-legacy: " } else { "" };
    match dropped.rule {
        Some(rule) => format!("{tool}rule \"{}\" in chain {name} (table {family} {table})", rule.text),
        None => format!("{tool}the policy of chain {name} (table {family} {table})"),
    }
}

/// In the words of whoever made the rule.
fn remedy(dropped: &Dropped<'_>, tun: &str, hook: Hook) -> String {
    let Chain { family, table, name, tool, .. } = dropped.base;
    match (table.as_str(), hook) {
        ("firewalld", Hook::Prerouting) => "set IPv6_rpfilter=no in /etc/firewalld/firewalld.conf, then `systemctl restart firewalld`".to_owned(),
        ("firewalld", _) => format!("firewall-cmd --permanent --zone=trusted --add-interface={tun} && firewall-cmd --reload"),
        _ if dropped.chain.name.starts_with("ufw") || dropped.base.rules.iter().any(|rule| rule.text.contains("ufw-")) => {
            format!("ufw route allow in on {tun}; ufw route allow out on {tun}; ufw allow in on {tun}")
        }
        // The built-in chains of iptables, whose names are in capitals.
        _ if name.chars().all(|c| c.is_ascii_uppercase()) => {
            let program = match (family.as_str(), *tool) {
                ("ip6", Tool::Legacy) => "ip6tables-legacy",
                (_, Tool::Legacy) => "iptables-legacy",
                ("ip6", Tool::Nftables) => "ip6tables",
                (_, Tool::Nftables) => "iptables",
            };
            let table_option = if table == "filter" { String::new() } else { format!("-t {table} ") };
            let mut text = format!("{program} {table_option}-I {name} -i {tun} -j ACCEPT");
            if hook == Hook::Forward {
                text.push_str(&format!("; {program} {table_option}-I {name} -o {tun} -j ACCEPT"));
            }
            text
        }
        _ => {
            let mut text = format!("nft insert rule {family} {table} {name} iifname {tun} accept");
            if hook == Hook::Forward {
                text.push_str(&format!("; nft insert rule {family} {table} {name} oifname {tun} accept"));
            }
            text
        }
    }
}

/// kubelet has chains of its own (`KUBE-KUBELET-CANARY`, `KUBE-FIREWALL`), which are in nobody's way.
fn kube_proxy(chains: &[Chain], lines: &mut Lines) {
    let of_kube_proxy = |chain: &&Chain| {
        chain.table == "kube-proxy" || ["KUBE-SERVICES", "KUBE-NODEPORTS", "KUBE-SVC-"].iter().any(|name| chain.name.starts_with(name))
    };
    if let Some(chain) = chains.iter().find(of_kube_proxy) {
        let named = if chain.name.is_empty() { String::new() } else { format!("chain {} in ", chain.name) };
        lines.warn(
            "kube-proxy",
            format!(
                "kube-proxy's rules are there ({named}table {} {}): they lead the node's own connections past the gateway",
                chain.family, chain.table
            ),
            "stop kube-proxy and run `kube-proxy --cleanup` (it is in kube-proxy's image)",
        );
    }
}
