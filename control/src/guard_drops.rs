//! What the kernel dropped in the gateway's own namespace, between the pods and the TUN `pods`.
//!
//! A packet from a source that its pod does not own matches no rule there and ends at the blackhole behind them (or is a martian even
//! before), so the pipeline never sees it. The kernel has no counter for that (`fib_rules` and `ip_route_input` drop silently), but it
//! counts everything else: what was received and neither forwarded, nor delivered, nor refused for its header, was dropped there.
//!
//! Read first: RFC 4293 §3.2.3, the case diagram of these counters; `net/ipv4/proc.c`, `net/ipv6/proc.c`.

use std::collections::HashMap;
use std::fs;
use std::io;

use podgate_runtime::netns::Netns;

/// Packets that ended in the gateway's namespace since it was made, both families together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuardDrops {
    /// No rule lets them through: false sources, mostly; a multicast that nobody there has joined is among them too.
    pub refused: u64,
    /// The kernel found the header wrong or the hop limit used up (it then told the sender).
    pub header_errors: u64,
}

/// Reads the counters of the gateway's namespace.
pub fn read(gateway: &Netns) -> io::Result<GuardDrops> {
    // Not /proc/net: that is the namespace of the process, not of the thread.
    let (v4, v6) = gateway
        .run(|| -> io::Result<_> { Ok((fs::read_to_string("/proc/thread-self/net/snmp")?, fs::read_to_string("/proc/thread-self/net/snmp6")?)) })??;
    let (v4, v6) = (balance(&ipv4(&v4)), balance(&ipv6(&v6)));
    Ok(GuardDrops { refused: v4.refused + v6.refused, header_errors: v4.header_errors + v6.header_errors })
}

fn balance(counters: &HashMap<&str, u64>) -> GuardDrops {
    let value = |name: &str| counters.get(name).copied().unwrap_or(0);
    let header_errors = value("InHdrErrors") + value("InAddrErrors") + value("InTruncatedPkts");
    // Fragments that are put together here count once each when they come and once together when they are delivered.
    let merged = value("ReasmReqds").saturating_sub(value("ReasmOKs"));
    let accounted = value("ForwDatagrams") + value("InDelivers") + value("InDiscards") + merged + header_errors;
    // The counters are read one by one while packets go on, so the difference may for a moment be too small.
    GuardDrops { refused: value("InReceives").saturating_sub(accounted), header_errors }
}

/// `Ip: NAME NAME …` and below it `Ip: VALUE VALUE …`.
fn ipv4(text: &str) -> HashMap<&str, u64> {
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Ip: "));
    let (names, values) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
    names.split_whitespace().zip(values.split_whitespace().filter_map(|value| value.parse().ok())).collect()
}

/// `Ip6NAME VALUE`, one on each line; IPv6 counts what it forwards as `OutForwDatagrams`.
fn ipv6(text: &str) -> HashMap<&str, u64> {
    let parse = |line| {
        let (name, value) = str::strip_prefix(line, "Ip6")?.split_once(char::is_whitespace)?;
        let name = if name == "OutForwDatagrams" { "ForwDatagrams" } else { name };
        Some((name, value.trim().parse().ok()?))
    };
    text.lines().filter_map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_received_and_went_nowhere_was_refused() {
        let text = "Ip: Forwarding DefaultTTL InReceives InHdrErrors InAddrErrors ForwDatagrams InUnknownProtos InDiscards InDelivers\nIp: 1 64 100 2 1 80 0 0 10\nIcmp: x\n";
        assert_eq!(balance(&ipv4(text)), GuardDrops { refused: 7, header_errors: 3 });
    }

    #[test]
    fn both_forms_of_the_file_are_read() {
        let text = "Ip6InReceives                   \t9\nIp6OutForwDatagrams             \t5\nIp6InDelivers                   \t1\nIcmp6InMsgs 4\n";
        assert_eq!(balance(&ipv6(text)), GuardDrops { refused: 3, header_errors: 0 });
    }
}
