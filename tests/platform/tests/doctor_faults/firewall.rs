//! Rules of a firewall. That the remedy is one is shown by having a shell do it, as it stands in the report.

use std::path::PathBuf;

use nix::mount::{MsFlags, mount, umount};
use podgate_testbed::need::program;

use crate::{Fault, Outcome, Try, Undo, Ward};

const fn dropped(name: &'static str, make: for<'a> fn(&'a Ward<'a>) -> Try<Undo<'a>>, check: &'static str, words: &'static [&'static str]) -> Fault {
    Fault { name, make, check, status: "warning", words }
}

/// A chain of nftables' own. It is undone by the remedies of `check`'s lines, and when every line is fine, taken away.
fn chain<'a>(ward: &'a Ward<'a>, chain: &str, check: &'static str) -> Try<Undo<'a>> {
    // nft wants lines.
    ward.shell(&format!("printf 'table inet host {{\\nchain guard {{\\n{chain}\\n}}\\n}}\\n' | nft -f -"))?;
    Ok(Box::new(move || mended(ward, check).and(ward.tool("nft delete table inet host"))))
}

/// Does what the lines of `check` say, after which every line must be fine.
fn mended(ward: &Ward<'_>, check: &str) -> Outcome {
    let seen = ward.look()?;
    let mut remedies: Vec<String> =
        seen.findings().filter(|finding| finding["check"] == check).filter_map(|finding| finding["remedy"].as_str().map(str::to_owned)).collect();
    remedies.dedup();
    remedies.iter().try_for_each(|remedy| ward.shell(&format!("set -e; {remedy}")))?;
    ward.all_fine()
}

/// Rules by an `iptables`, undone by the remedies.
fn iptables<'a>(ward: &'a Ward<'a>, now: &str, check: &'static str, later: &'static str) -> Try<Undo<'a>> {
    ward.shell(now)?;
    Ok(Box::new(move || mended(ward, check).and(ward.shell(later))))
}

/// An `nft` that cannot be run, seen by the sandbox alone.
fn without_nft<'a>(ward: &'a Ward<'a>) -> Try<Undo<'a>> {
    let path: PathBuf = program("nft").ok_or("there is no nft")?.canonicalize()?;
    mount(Some("/dev/null"), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    // The daemon's own self-test makes up for it, so there is a fault beside it, by which both are seen.
    let undo = ward.shell("ip rule add pref 50 lookup 4000");
    let seen = ward.look();
    let unmounted = umount(&path);
    undo?;
    unmounted?;
    let seen = seen?;
    let line = seen.findings().find(|finding| finding["check"] == "firewall" && finding["status"] == "ok");
    let said = line.and_then(|line| line["detail"].as_str()).unwrap_or_default();
    assert!(said.contains("nft") && said.contains("test packets pass"), "{}", seen.printed);
    Ok(Box::new(move || ward.tool("ip rule del pref 50")))
}

const FORWARD: &str = "type filter hook forward priority 0; policy drop;";
const INPUT: &str = "type filter hook input priority 0; policy drop; iifname lo accept; iifname eth0 accept;";
/// As firewalld's `IPv6_rpfilter` has it.
const REVERSE_PATH: &str = "type filter hook prerouting priority raw; meta nfproto ipv6 icmpv6 type { nd-router-advert, nd-neighbor-solicit } accept; \
                            meta nfproto ipv6 fib saddr . mark . iif oif missing drop;";

pub const FAULTS: &[Fault] = &[
    dropped(
        "FORWARD DROP by nftables",
        |ward| chain(ward, FORWARD, "forward"),
        "forward",
        &["policy of chain guard (table inet host)", "nft insert rule inet host guard iifname podgate accept"],
    ),
    dropped("FORWARD DROP, as the self-test meets it", |ward| chain(ward, FORWARD, "forward"), "self-test", &["`forward IPv4` fails"]),
    dropped("INPUT DROP by nftables", |ward| chain(ward, INPUT, "input"), "input", &["policy of chain guard", "send to this node (IPv6)"]),
    dropped("INPUT DROP, as the self-test meets it", |ward| chain(ward, INPUT, "input"), "self-test", &["`host IPv4` fails", "INPUT"]),
    dropped(
        "a reverse-path rule for IPv6",
        |ward| chain(ward, REVERSE_PATH, "reverse-path"),
        "reverse-path",
        &["fib saddr ... oif missing", "(IPv6)", "nft insert rule inet host guard iifname podgate accept"],
    ),
    dropped(
        "a reverse-path rule, as the self-test meets it",
        |ward| chain(ward, REVERSE_PATH, "reverse-path"),
        "self-test",
        &["`source IPv6` fails"],
    ),
    dropped(
        "FORWARD DROP by iptables",
        |ward| {
            let later = "iptables-nft -P FORWARD ACCEPT; iptables-nft -F FORWARD";
            iptables(ward, "iptables-nft -P FORWARD DROP", "forward", later)
        },
        "forward",
        &["policy of chain FORWARD (table ip filter)", "iptables -I FORWARD -i podgate -j ACCEPT"],
    ),
    dropped(
        "INPUT REJECT by ip6tables",
        |ward| {
            let now = "ip6tables-nft -A INPUT -p ipv6-icmp -j ACCEPT && ip6tables-nft -A INPUT ! -i eth0 -j REJECT";
            iptables(ward, now, "input", "ip6tables-nft -F INPUT")
        },
        "input",
        &["chain INPUT (table ip6 filter)", "(IPv6)", "ip6tables -I INPUT -i podgate -j ACCEPT"],
    ),
    dropped(
        "FORWARD DROP by the older iptables",
        |ward| iptables(ward, "iptables-legacy -P FORWARD DROP", "forward", "iptables-legacy -P FORWARD ACCEPT; iptables-legacy -F FORWARD"),
        "forward",
        &["iptables-legacy: the policy of chain FORWARD", "iptables-legacy -I FORWARD -o podgate -j ACCEPT"],
    ),
    dropped(
        "kube-proxy's chains of iptables",
        |ward| ward.tools("iptables-nft -t nat -N KUBE-SERVICES", "iptables-nft -t nat -X KUBE-SERVICES"),
        "kube-proxy",
        &["chain KUBE-SERVICES", "kube-proxy --cleanup"],
    ),
    dropped(
        "kube-proxy's table of nftables",
        |ward| ward.tools("nft add table ip kube-proxy", "nft delete table ip kube-proxy"),
        "kube-proxy",
        &["table ip kube-proxy"],
    ),
    Fault { name: "an nft that cannot be run", make: without_nft, check: "early-rules", status: "warning", words: &["pref 50"] },
];
