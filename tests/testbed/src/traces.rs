//! What attachments leave on a node, and what a gateway leaves on its host, to be compared before and after.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::Path;

use podgate::lab::{Lab, LabError, Machine, Node};
use podgate::netlink::{Family, Netlink, NetlinkError, RouteSpec, RuleSpec, TABLE_MAIN};

/// Interfaces, rules, routes and addresses on a node that come and go with attachments, each as a line for people.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Traces(BTreeSet<String>);

impl Traces {
    /// Those of `node` now.
    pub fn of(lab: &Lab, node: &Node) -> Result<Traces, LabError> {
        let mut traces = Traces::default();
        for (place, netlink) in [("gateway", lab.gateway_netlink(node)?), ("node", node.machine().netlink()?)] {
            traces.look(place, &netlink).map_err(|source| LabError::Netlink { machine: format!("the {place} of {}", node.name()), source })?;
        }
        traces.0.extend(leases(node)?.into_iter().map(|(address, owner)| format!("lease {address} of {owner}")));
        Ok(traces)
    }

    /// What is there that was not there `before`.
    pub fn beyond(&self, before: &Traces) -> Vec<String> {
        self.0.difference(&before.0).cloned().collect()
    }

    /// How many there are that begin with `kind`.
    pub fn count(&self, kind: &str) -> usize {
        self.0.iter().filter(|trace| trace.starts_with(kind)).count()
    }

    fn look(&mut self, place: &str, netlink: &Netlink) -> Result<(), NetlinkError> {
        let links = netlink.links()?;
        let routes = [netlink.routes(Family::V4, TABLE_MAIN)?, netlink.routes(Family::V6, TABLE_MAIN)?].concat();
        // An interface is known by where it leads, since none is called as another was: that of the gateway's self-test is a new one after
        // each start of the daemon.
        let leads_to = |name: &str| {
            let mut to = routes.iter().filter(|route| route.spec.device.as_deref() == Some(name)).map(|route| route.spec.destination);
            to.find(|to| to.is_ipv4() && to.prefix() == 32).map(|to| format!("to {}", to.ip()))
        };
        let known = |name: &str| leads_to(name).unwrap_or_else(|| name.to_owned());
        self.0.extend(links.iter().map(|link| format!("{place} link {} ({})", known(&link.name), link.kind)));
        for route in &routes {
            let RouteSpec { destination, device, kind, gateway, .. } = &route.spec;
            let device = device.as_deref().map(known);
            self.0.insert(format!("{place} route {destination} {kind:?} {device:?} {gateway:?}"));
        }
        for family in Family::BOTH {
            for rule in netlink.rules(family)? {
                let iif = rule.spec.iif.as_deref().map(known);
                self.0.insert(format!("{place} rule {:?}", RuleSpec { iif, ..rule.spec }));
            }
        }
        for neighbour in netlink.neighbours()?.iter().filter(|neighbour| neighbour.permanent) {
            let device = links.iter().find(|link| link.index == neighbour.index).map(|link| known(&link.name));
            self.0.insert(format!("{place} neighbour {} {device:?}", neighbour.address));
        }
        Ok(())
    }
}

impl fmt::Display for Traces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|trace| writeln!(f, "  {trace}"))
    }
}

/// Everything of a machine's network that a gateway could change: links, rules, routes, and the value of each sysctl.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Host(BTreeSet<String>);

impl Host {
    /// As it is now.
    pub fn of(machine: &Machine) -> Result<Host, LabError> {
        let failed = |source| LabError::Netlink { machine: machine.name().to_owned(), source };
        let netlink = machine.netlink()?;
        let mut found: BTreeSet<String> = netlink.links().map_err(failed)?.into_iter().map(|link| format!("link {}", link.name)).collect();
        for family in Family::BOTH {
            found.extend(netlink.rules(family).map_err(failed)?.into_iter().map(|rule| format!("rule {family} {}", rule.spec)));
            for table in [TABLE_MAIN, podgate::routing::HOST_TABLE, podgate::routing::CLUSTER_TABLE] {
                let routes = netlink.routes(family, table).map_err(failed)?.into_iter();
                // Those of link-local addresses come and go with interfaces.
                let routes = routes.filter(|route| !route.spec.destination.to_string().starts_with("fe80"));
                found.extend(routes.map(|route| format!("route {family} {}", route.spec)));
            }
        }
        // /proc/sys/net is that of the thread that looks.
        machine.run(|| sysctls(Path::new("/proc/sys/net"), &mut found))?;
        Ok(Host(found))
    }

    /// What is there now and was not `before`, with `+`, and the other way round, with `-`.
    pub fn differs(&self, before: &Host) -> Vec<String> {
        let (come, gone) = (self.0.difference(&before.0), before.0.difference(&self.0));
        come.map(|line| format!("+ {line}")).chain(gone.map(|line| format!("- {line}"))).collect()
    }
}

/// Every sysctl below `path` that can be read, but for those that count something.
fn sysctls(path: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            sysctls(&path, found);
        } else if let Ok(value) = fs::read_to_string(&path)
            && !path.ends_with("nf_conntrack_count")
        {
            found.insert(format!("sysctl {} = {}", path.display(), value.trim()));
        }
    }
}

/// The addresses that somebody has, each with its owner, as `podgate ipam` shows them.
pub fn leases(node: &Node) -> Result<Vec<(String, String)>, LabError> {
    let value = node.query(&["ipam"])?;
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let rows = value["ipam"].as_array().cloned().unwrap_or_default();
    Ok(rows
        .iter()
        .filter(|row| !row["owner"].is_null())
        .map(|row| (text(&row["address"]), format!("{} {}", text(&row["sandbox"]), text(&row["ifname"]))))
        .collect())
}
