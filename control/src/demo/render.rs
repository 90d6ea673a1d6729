//! The demo's result as text: the map, the checks, the spread, the throughput, the counters.

use std::fmt::Write as _;
use std::path::Path;

use super::{Report, Spread};
use crate::lab::manifest::SERVICE_PORT;
use crate::lab::{Lab, Sandbox};

/// The longest bar of a chart, in characters.
const BAR_LEN: usize = 40;

/// Everything, in the order in which one wants to read it.
pub(super) fn report(report: &Report, lab: &Lab) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = map(&mut text, report, lab);
    let _ = checks(&mut text, report);
    let _ = spread(&mut text, &report.spread);
    let _ = throughput(&mut text, report);
    let _ = workers(&mut text, report);
    let _ = drops(&mut text, report);
    let _ = verdict(&mut text, report);
    text
}

/// What to try while the cluster stays. `program` is this very program, which need not be on the reader's path.
pub(super) fn commands(lab: &Lab, sandbox: &Sandbox, program: &Path) -> String {
    let mut text = String::new();
    let _ = write_commands(&mut text, lab, sandbox, program);
    text
}

fn map(out: &mut String, report: &Report, lab: &Lab) -> std::fmt::Result {
    writeln!(out, "\nThe cluster\n")?;
    let outside = lab.outside().addresses();
    writeln!(out, "  underlay 192.0.2.0/24, 2001:db8::/64")?;
    writeln!(out, "  ├─ outside     {:<16} {}", outside.v4, outside.v6)?;
    for (index, node) in report.nodes.iter().enumerate() {
        let (branch, trunk) = if index + 1 == report.nodes.len() { ("└─", "  ") } else { ("├─", "│ ") };
        writeln!(out, "  {branch} {:<11} {:<16} {}", node.name, node.addresses[0], node.addresses[1])?;
        writeln!(out, "  {trunk}  ├─ gateway  {:<16} {}", node.gateway[0], node.gateway[1])?;
        for (place, pod) in node.pods.iter().enumerate() {
            let branch = if place + 1 == node.pods.len() { "└─" } else { "├─" };
            writeln!(out, "  {trunk}  {branch} {:<8} {:<16} {}", pod.name, pod.addresses[0], pod.addresses[1])?;
        }
    }
    writeln!(out)?;
    for service in lab.services() {
        let names: Vec<String> = service.endpoints.iter().map(|endpoint| endpoint.addresses.v4.to_string()).collect();
        let name = format!("{}:{SERVICE_PORT}", service.name);
        writeln!(
            out,
            "  service {name:<12} {:<12} {:<12} node port {}  → {}",
            service.vips.v4,
            service.vips.v6,
            service.node_port,
            names.join(", ")
        )?;
    }
    Ok(())
}

/// One line for each path and family, with its protocols side by side, where a group has such a shape; else one for each check.
fn checks(out: &mut String, report: &Report) -> std::fmt::Result {
    let mut group = "";
    let mut rows = report.checks.iter().peekable();
    writeln!(out, "\nChecks")?;
    while let Some(check) = rows.next() {
        if check.group != group {
            group = &check.group;
            writeln!(out, "\n  {group}")?;
        }
        // "PATH, PROTOCOL FAMILY": what has the same path and family goes on one line.
        let Some((path, family)) = path_of(&check.name) else {
            let latency = check.latency_micros.map(latency).unwrap_or_default();
            writeln!(out, "    {} {:<86} {latency:>9}", mark(check.ok), check.name)?;
            continue;
        };
        let mut cells = vec![cell(check)];
        while let Some(next) = rows.next_if(|next| next.group == check.group && path_of(&next.name) == Some((path, family))) {
            cells.push(cell(next));
        }
        writeln!(out, "    {:<66} {family}  {}", path, cells.join("  "))?;
    }
    let failed: Vec<_> = report.checks.iter().filter(|check| !check.ok).collect();
    if !failed.is_empty() {
        writeln!(out, "\nWhat failed\n")?;
        for check in failed {
            writeln!(out, "  ✗ {}\n      {}", check.name, check.detail)?;
        }
    }
    Ok(())
}

const PROTOCOLS: [(&str, &str); 5] =
    [("TCP", "TCP"), ("UDP in fragments", "UDP 9k"), ("UDP", "UDP"), ("ICMP in fragments", "ICMP 9k"), ("ICMP", "ICMP")];

fn path_of(name: &str) -> Option<(&str, &str)> {
    let (path, rest) = name.rsplit_once(", ")?;
    let (protocol, family) = rest.rsplit_once(' ')?;
    PROTOCOLS.iter().any(|(known, _)| *known == protocol).then_some((path, family))
}

fn cell(check: &crate::lab::matrix::Check) -> String {
    let rest = check.name.rsplit_once(", ").map_or("", |(_, rest)| rest);
    let protocol = rest.rsplit_once(' ').map_or("", |(protocol, _)| protocol);
    let short = PROTOCOLS.iter().find(|(known, _)| *known == protocol).map_or("", |(_, short)| short);
    let latency = check.latency_micros.map_or("-".to_owned(), latency);
    format!("{} {short} {latency:>8}", mark(check.ok))
}

fn mark(ok: bool) -> char {
    if ok { '✓' } else { '✗' }
}

fn latency(micros: u64) -> String {
    if micros < 1000 { format!("{micros} µs") } else { format!("{:.1} ms", micros as f64 / 1000.0) }
}

fn spread(out: &mut String, spreads: &[Spread]) -> std::fmt::Result {
    writeln!(out, "\nHow connections spread over the backends")?;
    for spread in spreads {
        let total: u32 = spread.backends.values().sum::<u32>() + spread.failed;
        writeln!(out, "\n  {}: {total} connections", spread.name)?;
        let most = spread.backends.values().copied().max().unwrap_or(1).max(1);
        for (name, count) in &spread.backends {
            writeln!(out, "    {name:<8} {count:>4} {}", bar(f64::from(*count) / f64::from(most)))?;
        }
    }
    Ok(())
}

fn throughput(out: &mut String, report: &Report) -> std::fmt::Result {
    writeln!(out, "\nThroughput of one TCP stream, every byte compared\n")?;
    let most = report.throughput.iter().map(|row| row.gbit_per_second).fold(f64::MIN_POSITIVE, f64::max);
    for row in &report.throughput {
        writeln!(out, "    {:<54} {:>4} MiB {:>6.2} Gb/s {}", row.name, row.bytes >> 20, row.gbit_per_second, bar(row.gbit_per_second / most))?;
    }
    Ok(())
}

fn workers(out: &mut String, report: &Report) -> std::fmt::Result {
    writeln!(out, "\nWhat the workers carried (a frame of more than the MTU is a superframe: many packets in one)\n")?;
    writeln!(out, "    {:<8} worker {:>11} {:>11} {:>9} {:>13} {:>7}", "", "packets in", "out", "MiB in", "average frame", "flows")?;
    for row in &report.workers {
        let (mib, average) = (row.rx_bytes >> 20, format!("{} B", row.average_frame_bytes));
        writeln!(
            out,
            "    {:<8} {:>6} {:>11} {:>11} {mib:>9} {average:>13} {:>7}",
            row.node, row.worker, row.rx_packets, row.tx_packets, row.flows_created
        )?;
    }
    Ok(())
}

fn drops(out: &mut String, report: &Report) -> std::fmt::Result {
    writeln!(out, "\nDropped packets by reason (the false sources above are among them)\n")?;
    for row in &report.drops {
        writeln!(out, "    {:<8} {:<28} {:>8}", row.node, row.reason, row.packets)?;
    }
    if report.drops.is_empty() {
        writeln!(out, "    none")?;
    }
    Ok(())
}

fn verdict(out: &mut String, report: &Report) -> std::fmt::Result {
    let held = report.checks.iter().filter(|check| check.ok).count();
    let total = report.checks.len();
    let word = if report.ok { "Every check held" } else { "Not every check held" };
    writeln!(out, "\n{word}: {held} of {total}, in {:.0} s.", report.seconds)
}

fn bar(share: f64) -> String {
    "█".repeat((share * BAR_LEN as f64).round() as usize)
}

fn write_commands(out: &mut String, lab: &Lab, sandbox: &Sandbox, program: &Path) -> std::fmt::Result {
    let pods = lab.pods();
    let (Some(node), Some(pod)) = (lab.nodes().first(), pods.first()) else { return Ok(()) };
    // In a user namespace one must first become its root, which does not change the mounts that the paths go by.
    let enter = if sandbox.is_privileged() {
        "nsenter".to_owned()
    } else {
        format!("nsenter --target {} --user --preserve-credentials", sandbox.outer_pid())
    };
    let path = |machine: &crate::lab::Machine| sandbox.path_from_outside(machine.path()).display().to_string();
    let podgate = format!("{} --socket {}", program.display(), sandbox.path_from_outside(&node.socket()).display());
    let vip = lab.services().first().map(|service| service.vips.v4.to_string()).unwrap_or_default();
    writeln!(out, "\nThe cluster stays until you press Enter or Ctrl-C. In another terminal, try:\n")?;
    writeln!(out, "  {podgate} status")?;
    writeln!(out, "  {podgate} flows")?;
    writeln!(out, "  {podgate} trace --from {} --to {vip}:{SERVICE_PORT}", pod.machine().addresses().v4)?;
    writeln!(out, "  {enter} --net={} ping -c 3 {vip}", path(pod.machine()))?;
    writeln!(out, "  {enter} --net={} ip route", path(pod.machine()))?;
    writeln!(out, "  {enter} --net={} ip rule", path(node.machine()))?;
    writeln!(out, "  ls {}     # the manifests that this node watches: change one", sandbox.path_from_outside(&node.manifests()).display())?;
    writeln!(out, "\n  Every machine's namespace is in {}.\n", sandbox.path_from_outside(&lab.directory().join("netns")).display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_protocols_of_one_path_share_a_line() {
        assert_eq!(path_of("pod to VIP, backend on another node, UDP in fragments IPv6"), Some(("pod to VIP, backend on another node", "IPv6")));
        assert_eq!(path_of("a pod sends as loopback (::1), IPv6"), None);
    }

    #[test]
    fn latencies_have_units() {
        assert_eq!((latency(80), latency(1500)), ("80 µs".to_owned(), "1.5 ms".to_owned()));
    }
}
