//! False sources from pods and from the wire, floods, and what happens when the rule that guards a pod is missing.

use std::net::{IpAddr, Ipv6Addr};
use std::process::ExitCode;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use podgate::lab::program::{client, ping, raw, server};
use podgate::lab::{Machine, Node};
use podgate::netlink::{Family, MissingIsFine};
use podgate_testbed::{Bed, Outcome, all_hold, run};

const PATIENCE: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    run(|tests| {
        tests.add("nothing is delivered that a pod sends from an address it does not own, and all of it is counted", |bed| {
            all_hold(&bed.lab()?.check_pod_spoofs("b1")?)
        });
        tests.add("nothing is delivered that the wire brings as a pod, a gateway or a VIP, and all of it is counted", |bed| {
            all_hold(&bed.lab()?.check_wire_spoofs()?)
        });
        tests.add("a pod's neighbour flood leaves the machine's neighbour table flat", |bed| {
            all_hold(&[bed.lab()?.check_neighbour_flood("b1", 3000)?])
        });
        tests.add("a pod whose rule is missing reaches nothing", missing_rule);
        tests.add("a pod's router advertisement, redirect and overlay packet reach nobody", forbidden);
        tests.add("an overlay packet from a stranger is dropped by name", stranger);
        tests.add("a known peer that claims another's pod, a VIP or this node is dropped by name", peer);
    })
}

/// The daemon stands still meanwhile, so that it can neither put the rule back nor be the one that drops: what had a rule waits in the
/// TUN's queue and arrives afterwards, what had none is gone.
fn missing_rule(bed: &Bed) -> Outcome {
    let lab = bed.lab()?;
    let (node, liar, victim) = (lab.node(1), lab.pod("b1")?, lab.pod("a1")?);
    let gateway = lab.gateway_netlink(node)?;
    let pause = Paused::new(node)?;
    for family in Family::BOTH {
        let (own, to) = (liar.machine().address(family), victim.machine().addresses().server(family));
        let send = |text: &str| liar.machine().run(|| client::send(to, &[server::SPOOF_MARK, text.as_bytes()].concat()));
        send(&format!("with its rule {family}"))??;
        let rules = gateway.rules(family)?;
        let mine: Vec<_> = rules.into_iter().filter(|rule| rule.spec.from.is_some_and(|from| from.ip() == own)).collect();
        assert!(!mine.is_empty(), "no rule in the gateway's namespace is for {own}");
        for rule in mine {
            gateway.delete_rule(&rule.spec).or_missing()?;
        }
        // Sent before the daemon can know; an error ("unreachable") is as good as silence.
        let _ = send(&format!("without its rule {family}"))?;
    }
    drop(pause);
    for family in Family::BOTH {
        let expected = format!("with its rule {family}");
        podgate::lab::wait_until(
            PATIENCE,
            || expected.clone(),
            || {
                let delivered = lab.spoofs_delivered()?;
                Ok((!delivered.iter().any(|text| text.contains(&format!("\"{expected}\"")))).then(|| delivered.join(", ")))
            },
        )?;
    }
    let delivered = lab.spoofs_delivered()?;
    assert!(!delivered.iter().any(|text| text.contains("without its rule")), "{delivered:?}");
    // And the rules are back.
    for family in Family::BOTH {
        let to = victim.machine().addresses().server(family);
        podgate::lab::wait_until(
            PATIENCE,
            || format!("the rule of b1, {family}"),
            || Ok(liar.machine().run(|| client::udp(to, 1, 1, Duration::from_millis(300)))?.err().map(|error| error.to_string())),
        )?;
    }
    Ok(())
}

/// A process that stands still until this is dropped.
struct Paused(Pid);

impl Paused {
    fn new(node: &Node) -> Result<Paused, Box<dyn std::error::Error>> {
        let pid = Pid::from_raw(node.pid().ok_or("the daemon does not run")? as i32);
        kill(pid, Signal::SIGSTOP)?;
        Ok(Paused(pid))
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        // It exists: nobody waits for it but the lab.
        let _ = kill(self.0, Signal::SIGCONT);
    }
}

fn forbidden(bed: &Bed) -> Outcome {
    let lab = bed.lab()?;
    let (node, liar, victim) = (lab.node(1), lab.pod("b1")?, lab.pod("a1")?);
    let (IpAddr::V6(own), IpAddr::V6(other)) = (liar.machine().address(Family::V6), victim.machine().address(Family::V6)) else {
        return Err("an IPv6 address that is none".into());
    };
    let before = node.dropped(&["icmp_forbidden", "overlay_forged"])?;
    // RFC 4861 §4.2 and §4.5: a router advertisement with a lifetime, a redirect of everything to the liar.
    let advertisement = [&[134, 0, 0, 0, 64, 0, 0x07, 0x08][..], &[0; 8][..]].concat();
    let redirect = [&[137, 0, 0, 0, 0, 0, 0, 0][..], &own.octets()[..], &Ipv6Addr::UNSPECIFIED.octets()[..]].concat();
    for message in [&advertisement, &redirect] {
        liar.machine().run(|| raw::icmpv6(own, other, message))??;
    }
    for family in Family::BOTH {
        let overlay = std::net::SocketAddr::new(lab.node(2).machine().address(family), 4790);
        liar.machine().run(|| client::send(overlay, &[0x0c, 0, 0, 1, 0, 0, 1, 0, 0x45]))??;
    }
    podgate::lab::wait_until(
        PATIENCE,
        || "four drops".into(),
        || {
            let counted = node.dropped(&["icmp_forbidden", "overlay_forged"])? - before;
            Ok((counted < 4).then(|| format!("{counted} were counted as icmp_forbidden or overlay_forged")))
        },
    )?;
    liar.machine().run(|| ping::ping(other.into(), 56, PATIENCE))??;
    Ok(())
}

/// What `from` sends to the overlay port of node 1: VXLAN-GPE with flags I and P, the inner protocol and VNI 1, and in it a datagram to a
/// pod of node 1 that pretends to come from `source`.
fn overlay_packet(bed: &Bed, from: &Machine, source: IpAddr, text: &str) -> Outcome {
    let lab = bed.lab()?;
    let family = Family::of(source);
    let inner_protocol = if source.is_ipv4() { 1 } else { 2 };
    let header = [0x0c, 0, 0, inner_protocol, 0, 0, 1, 0];
    let to = lab.pod("a1")?.machine().addresses().server(family);
    let inner = raw::udp_packet(source, to, &[server::SPOOF_MARK, text.as_bytes()].concat());
    let overlay = std::net::SocketAddr::new(lab.node(1).machine().address(family), 4790);
    Ok(from.run(|| client::send(overlay, &[&header[..], &inner[..]].concat()))??)
}

/// Waits until `count` more drops of that name than `before` have been counted, and sees that nothing with `text` in it was delivered.
fn counted_and_not_delivered(bed: &Bed, reason: &str, before: u64, count: u64, text: &str) -> Outcome {
    let lab = bed.lab()?;
    podgate::lab::wait_until(
        PATIENCE,
        || format!("{count} drops as {reason}"),
        || {
            let found = lab.node(1).dropped(&[reason])? - before;
            Ok((found < count).then(|| format!("{found} were counted")))
        },
    )?;
    let delivered = lab.spoofs_delivered()?;
    assert!(!delivered.iter().any(|what| what.contains(text)), "{delivered:?}");
    Ok(())
}

fn stranger(bed: &Bed) -> Outcome {
    let lab = bed.lab()?;
    let before = lab.node(1).dropped(&["overlay_unknown_peer"])?;
    for source in ["10.244.2.2", "fd00:77:2::2"] {
        overlay_packet(bed, lab.outside(), source.parse()?, "from a stranger")?;
    }
    counted_and_not_delivered(bed, "overlay_unknown_peer", before, 2, "from a stranger")
}

/// A peer speaks for its own pods and its own addresses, and for nobody else's.
fn peer(bed: &Bed) -> Outcome {
    let lab = bed.lab()?;
    let before = lab.node(1).dropped(&["overlay_foreign_source"])?;
    let claims: Vec<IpAddr> = Family::BOTH
        .into_iter()
        .map(|family| lab.pod("b1").map(|pod| pod.machine().address(family)))
        .collect::<Result<Vec<_>, _>>()?
        .into_iter()
        .chain(["10.244.9.9", "fd00:77:9::9", "10.96.0.11", "fd00:96::11", "203.0.113.9"].map(|text| text.parse().expect("an address")))
        .chain(Family::BOTH.map(|family| lab.node(1).machine().address(family)))
        .collect();
    for source in &claims {
        overlay_packet(bed, lab.node(2).machine(), *source, "from a peer for another")?;
    }
    counted_and_not_delivered(bed, "overlay_foreign_source", before, claims.len() as u64, "from a peer for another")
}
