//! Nodes with a firewall of their own: what does not pass it on its way must still talk, and `status` says what does not and why.

use std::process::{Command, ExitCode};

use podgate::lab::matrix::{Check, Path, Probe};
use podgate::lab::{Lab, wait_until};
use podgate::netlink::Family;
use podgate_testbed::{Bed, Need, Outcome, all_hold, run};

/// The checks run every 10 s.
const NOTICED: std::time::Duration = std::time::Duration::from_secs(15);

fn main() -> ExitCode {
    run(|tests| {
        let nft = Need::Program("nft");
        tests.add_if(nft, "with FORWARD DROP pods, services and the node talk; only the outside is lost, and status says so", forward_drop);
        tests.add_if(nft, "with INPUT DROP from the gateway's device pods and services talk; the node is lost, and status says so", input_drop);
        tests.add_if(nft, "with a v6 reverse-path rule pods talk, and status names the rule", reverse_path);
    })
}

/// Puts one chain on node-1 and takes it away again, whatever `work` comes to.
fn with_chain(lab: &Lab, chain: &str, work: impl FnOnce() -> Outcome) -> Outcome {
    let node = lab.node(1).machine();
    let nft = |text: &str| -> Outcome {
        let output = node.run(|| Command::new("nft").arg(text).output())??;
        if output.status.success() { Ok(()) } else { Err(format!("nft {text}: {}", String::from_utf8_lossy(&output.stderr)).into()) }
    };
    // nft wants lines.
    nft(&format!("table inet host {{\nchain guard {{\n{chain}\n}}\n}}"))?;
    let outcome = work();
    nft("delete table inet host")?;
    outcome
}

/// Whether a path passes the forwarding hook of node-1: between its gateway and the outside, which another node is too.
fn forwarded(path: &Path) -> bool {
    let outside = path.name.contains("outside") || path.name == "node to another node's node port";
    outside && path.group != "pods and nodes, no NAT"
}

/// Whether a path ends at a process of node-1, or at one of its sockets, coming from the gateway.
fn delivered_to_node(path: &Path) -> bool {
    path.server == "node-1" || path.client == "node-1" || path.name.starts_with("outside")
}

fn check(lab: &Lab, paths: impl Iterator<Item = Path>) -> Result<Vec<Check>, Box<dyn std::error::Error>> {
    let paths: Vec<Path> = paths.collect();
    assert!(!paths.is_empty());
    Ok(lab.check_paths(&paths, &[Probe::Tcp, Probe::Udp], &|_, _| {})?)
}

/// `status` of node-1 must come to name every word of `words` among its problems.
fn status_names(lab: &Lab, words: &[&str]) -> Outcome {
    let node = lab.node(1);
    wait_until(
        NOTICED,
        || format!("a problem that names {words:?} in `podgate status`"),
        || {
            let problems = node.query(&["status"])?["problems"].to_string().to_lowercase();
            Ok((!words.iter().all(|word| problems.contains(word))).then_some(problems))
        },
    )?;
    Ok(())
}

fn forward_drop(bed: &Bed) -> Outcome {
    let lab = bed.lab()?;
    with_chain(lab, "type filter hook forward priority 0; policy drop;", || {
        all_hold(&check(lab, lab.paths()?.into_iter().filter(|path| !forwarded(path)))?)?;
        status_names(lab, &["forward"])
    })?;
    all_hold(&check(lab, lab.paths()?.into_iter())?)
}

fn input_drop(bed: &Bed) -> Outcome {
    let lab = bed.lab()?;
    with_chain(lab, "type filter hook input priority 0; policy drop; iifname \"lo\" accept; iifname \"eth0\" accept;", || {
        all_hold(&check(lab, lab.paths()?.into_iter().filter(|path| !delivered_to_node(path)))?)?;
        status_names(lab, &["input"])
    })?;
    all_hold(&check(lab, lab.paths()?.into_iter())?)
}

/// As firewalld's `IPv6_rpfilter` has it.
fn reverse_path(bed: &Bed) -> Outcome {
    let lab = bed.lab()?;
    let chain = "type filter hook prerouting priority raw; meta nfproto ipv6 icmpv6 type { nd-router-advert, nd-neighbor-solicit } accept; \
                 meta nfproto ipv6 fib saddr . mark . iif oif missing drop;";
    with_chain(lab, chain, || {
        let pods = lab.paths()?.into_iter().filter(|path| path.name.starts_with("pod to pod") || path.name.starts_with("pod to VIP, backend on"));
        all_hold(&check(lab, pods)?)?;
        let v4: Vec<Path> = lab.paths()?;
        for path in &v4 {
            let outcome = lab.check_path(path, Family::V4, Probe::Tcp)?;
            if !outcome.ok {
                return Err(format!("IPv4 is not the rule's business: {}: {}", outcome.name, outcome.detail).into());
            }
        }
        status_names(lab, &["reverse"])
    })?;
    all_hold(&check(lab, lab.paths()?.into_iter())?)
}
