//! From facts to findings, purely.

mod cluster;
mod cni;
mod daemon;
mod firewall;
mod host;
mod kernel;

use ipnetwork::IpNetwork;

use super::facts::{Configuration, Facts};
use super::{Finding, Status};
use crate::config::Config;

/// What is said where something is hidden from this user.
const AS_ROOT: &str = "run it as root";

/// Every line, in its order.
pub fn findings(facts: &Facts) -> Vec<Finding> {
    let mut lines = Lines { group: "", findings: Vec::new() };
    kernel::judge(facts, lines.group("kernel"));
    host::configuration(facts, lines.group("configuration"));
    host::judge(facts, lines.group("host"));
    firewall::judge(facts, lines.group("firewall"));
    cluster::origin(facts, lines.group("cluster"));
    cni::judge(facts, lines.group("cni"));
    daemon::judge(facts, lines.group("daemon"));
    cluster::peers(facts, lines.group("peers"));
    lines.findings
}

/// Findings as they are made.
struct Lines {
    group: &'static str,
    findings: Vec<Finding>,
}

impl Lines {
    fn group(&mut self, group: &'static str) -> &mut Lines {
        self.group = group;
        self
    }

    fn add(&mut self, check: &'static str, status: Status, detail: String, remedy: Option<String>) {
        self.findings.push(Finding { group: self.group, check, status, detail, remedy });
    }

    fn ok(&mut self, check: &'static str, detail: impl Into<String>) {
        self.add(check, Status::Ok, detail.into(), None);
    }

    fn warn(&mut self, check: &'static str, detail: impl Into<String>, remedy: impl Into<String>) {
        self.add(check, Status::Warning, detail.into(), Some(remedy.into()));
    }

    fn fail(&mut self, check: &'static str, detail: impl Into<String>, remedy: impl Into<String>) {
        self.add(check, Status::Failure, detail.into(), Some(remedy.into()));
    }

    /// Says that all is well, unless a check of this name found otherwise.
    fn ok_unless_found(&mut self, check: &'static str, detail: impl Into<String>) {
        if !self.findings.iter().any(|finding| finding.check == check && finding.group == self.group) {
            self.ok(check, detail);
        }
    }
}

/// The configuration, where it holds.
fn config(facts: &Facts) -> Option<&Config> {
    match &facts.configuration {
        Configuration::Read(config) => Some(config),
        _ => None,
    }
}

/// The TUN on the node.
fn device(facts: &Facts) -> &str {
    config(facts).map_or("podgate", |config| &config.devices.host)
}

/// The cluster's ranges, with what they are for.
fn ranges(config: &Config) -> impl Iterator<Item = (&'static str, IpNetwork)> {
    let pods = config.pod_cidrs.iter().map(|cidr| ("pod", *cidr));
    pods.chain(config.service_cidrs.iter().map(|cidr| ("service", *cidr)))
}

/// Whether two ranges have an address in common: then one holds the other's first.
fn overlap(a: IpNetwork, b: IpNetwork) -> bool {
    a.is_ipv4() == b.is_ipv4() && (a.contains(b.network()) || b.contains(a.network()))
}

#[cfg(test)]
mod tests;
