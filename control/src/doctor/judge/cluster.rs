//! The origin of the cluster's objects, and the other nodes.

use super::super::facts::{Daemon, Facts, Origin, Peer};
use super::{AS_ROOT, Lines};

/// How far two clocks may be apart, in seconds: far below the life of a token, far above what a request takes.
const CLOCK_OFFSET_MAX: u64 = 30;

/// So many nodes are named one by one.
const NAMED_MAX: usize = 20;

pub(super) fn origin(facts: &Facts, lines: &mut Lines) {
    match &facts.origin {
        None => {}
        Some(Origin::Directory(path, Ok(count))) => lines.ok("source", format!("{} can be read: {count} manifests", path.display())),
        Some(Origin::Directory(path, Err(why))) => lines.fail(
            "source",
            format!("the directory of manifests {} cannot be read: {why}", path.display()),
            "make it, or correct `source.directory` in the configuration",
        ),
        Some(Origin::Server(url, Ok(offset))) => {
            lines.ok("source", format!("{url} answers"));
            if let Some(offset) = offset {
                clock(url, *offset, lines);
            }
        }
        Some(Origin::Server(url, Err(why))) => lines.fail(
            "source",
            format!("{url} does not serve this node: {why}"),
            "see that it runs and can be reached from here, and that `source` in the configuration names it and credentials that it takes",
        ),
    }
}

fn clock(url: &str, offset: i64, lines: &mut Lines) {
    let apart = offset.unsigned_abs();
    if apart > CLOCK_OFFSET_MAX {
        let way = if offset > 0 { "behind" } else { "ahead of" };
        lines.warn(
            "clock",
            format!("this machine's clock is {apart} s {way} that of {url}: certificates and tokens may count as expired, or as not valid yet"),
            "synchronise the clocks (chrony, systemd-timesyncd)",
        );
    } else {
        lines.ok("clock", format!("this machine's clock agrees with that of {url}"));
    }
}

pub(super) fn peers(facts: &Facts, lines: &mut Lines) {
    let Daemon::Answers(tables) = &facts.daemon else { return };
    let answers = match &facts.peers {
        None => return,
        Some(Err(why)) => return lines.warn("peers", format!("other nodes could not be asked: {}", why.0), AS_ROOT),
        Some(Ok(answers)) => answers,
    };
    let silent: Vec<&Peer> = answers.iter().filter(|peer| peer.small.is_none()).collect();
    for peer in silent.iter().take(NAMED_MAX) {
        let Peer { node, gateway, underlay, .. } = peer;
        let (detail, remedy) = match peer.beside {
            Some(_) => (
                format!("{node} does not answer through the overlay ({gateway}), though its machine {} answers a ping", underlay.ip()),
                format!(
                    "see that a gateway runs there (`podgate doctor`), that no firewall on the way drops UDP port {}, and that VNIs are alike",
                    underlay.port()
                ),
            ),
            None => (
                format!("{node} answers neither through the overlay ({gateway}) nor by a ping of its machine {}", underlay.ip()),
                "see that the machine is up and that the underlay leads to it".to_owned(),
            ),
        };
        lines.fail("peers", detail, remedy);
    }
    for peer in answers.iter().filter(|peer| peer.small.is_some() && peer.full.is_none()).take(NAMED_MAX) {
        lines.fail(
            "path-mtu",
            format!(
                "{} answers small packets through the overlay, but not one of {} bytes, which its path should carry: large ones are lost on the way to {}",
                peer.node, peer.size, peer.underlay
            ),
            "see that every link and switch on the way carries the underlay's MTU, and that ICMP \"fragmentation needed\" comes back; or lower the MTU of this machine's interface",
        );
    }
    let pod_mtu = tables.status["podMtu"].as_u64();
    for row in tables.peers["peers"].as_array().into_iter().flatten() {
        if let (Some(mtu), Some(pod_mtu), Some(node)) = (row["mtu"].as_u64(), pod_mtu, row["node"].as_str())
            && mtu < pod_mtu
        {
            lines.warn(
                "path-mtu",
                format!(
                    "the path to {node} carries packets of {mtu} bytes, where pods send up to {pod_mtu}: who sends more is told so, which costs time"
                ),
                "give the underlay one MTU everywhere; a path that was found narrow is tried again after ten minutes",
            );
        }
    }
    if silent.len() > NAMED_MAX {
        lines.fail("peers", format!("and {} more nodes do not answer", silent.len() - NAMED_MAX), "see above");
    }
    let nodes: std::collections::BTreeSet<&str> = answers.iter().map(|peer| peer.node.as_str()).collect();
    if nodes.is_empty() {
        return lines.ok("peers", "no other node has a gateway");
    }
    let slowest = answers.iter().filter_map(|peer| peer.small).max().unwrap_or_default();
    let who = if nodes.len() == 1 { "the other node answers".to_owned() } else { format!("all {} other nodes answer", nodes.len()) };
    lines.ok_unless_found("peers", format!("{who} through the overlay, within {:.1} ms", slowest.as_secs_f64() * 1e3));
    let all_silent = silent.len() == answers.len();
    if !all_silent {
        let size = answers.iter().map(|peer| peer.size).max().unwrap_or_default();
        lines.ok_unless_found("path-mtu", format!("full-sized packets pass between nodes uncut (up to {size} bytes)"));
    }
}
