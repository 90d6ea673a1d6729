//! False sources from pods and from the wire, floods, and what happens when the rule that guards a pod is missing.

use std::net::{IpAddr, Ipv6Addr};
use std::process::ExitCode;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use podgate::lab::Node;
use podgate::lab::program::{client, ping, raw, server};
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

fn stranger(bed: &Bed) -> Outcome {
    let lab = bed.lab()?;
    let (node, victim) = (lab.node(1), lab.pod("a1")?);
    let before = node.dropped(&["overlay_unknown_peer"])?;
    // VXLAN-GPE: flags I and P, next protocol IPv4 (1), VNI 1; then a datagram that pretends to come from a pod of node 2.
    let header = [0x0c, 0, 0, 1, 0, 0, 1, 0];
    let inner = raw::udp_packet("10.244.2.2".parse()?, victim.machine().addresses().server(Family::V4), b"podgate-spoof from a stranger");
    let to = std::net::SocketAddr::new(node.machine().address(Family::V4), 4790);
    lab.outside().run(|| client::send(to, &[&header[..], &inner[..]].concat()))??;
    podgate::lab::wait_until(PATIENCE, || "its drop".into(), || Ok((node.dropped(&["overlay_unknown_peer"])? == before).then(|| "none".into())))?;
    let delivered = lab.spoofs_delivered()?;
    assert!(!delivered.iter().any(|text| text.contains("from a stranger")), "{delivered:?}");
    Ok(())
}
