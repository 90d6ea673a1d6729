//! What changed, object by object, and with which generation of the tables: `podgate diff`, and what `podgate status` says is pending.
//!
//! Two states are walked side by side where they are not one and the same. What is remembered is text, bounded in generations and in changes ([`History`]), so that it costs no more in a large cluster than in a small one.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::iter::Peekable;
use std::net::IpAddr;
use std::time::SystemTime;

use imbl::OrdMap;
use imbl::ordmap::DiffItem;
use podgate_core::fib::Pod;
use serde::Serialize;

use crate::compile::LocalNode;
use crate::model::{Announcement, ClusterState, EndpointSlice, Leaving, Node, Service};

/// How many generations are remembered.
const GENERATIONS_MAX: usize = 512;

/// How many changes are remembered over all generations: some 10 MB at the longest.
const CHANGES_MAX: usize = 20_000;

/// How many changes of one generation are remembered; a relist of a large cluster has more.
const CHANGES_OF_ONE_MAX: usize = 2_000;

/// How much is said about one object.
const DETAILS_MAX: usize = 12;

/// What became of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum What {
    /// It is new.
    Added,
    /// It is another than it was.
    Updated,
    /// It is gone.
    Removed,
}

/// A change of one object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Its kind: one of the source's, `Pod` for an address that is attached here, `Machine` for this machine itself.
    pub kind: &'static str,
    /// Its name, with the namespace.
    pub name: String,
    /// What became of it.
    pub what: What,
    /// In which parts: `+` for what came, `-` for what went, `→` between before and after.
    pub details: Vec<String>,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind, self.name)
    }
}

/// What the tables are compiled from.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// The cluster's objects.
    pub state: &'a ClusterState,
    /// What only this machine knows.
    pub local: &'a LocalNode,
}

/// Every object that differs.
pub fn changes(before: Inputs<'_>, after: Inputs<'_>) -> Vec<Change> {
    let mut changes = Vec::new();
    if !std::ptr::eq(before.state, after.state) {
        differing(before.state.nodes(), after.state.nodes(), |name, before, after| {
            changes.push(change("Node", name.to_string(), before.map(|n| of_node(n)), after.map(|n| of_node(n))));
        });
        differing(before.state.services(), after.state.services(), |name, before, after| {
            changes.push(change("Service", name.to_string(), before.map(|s| of_service(s)), after.map(|s| of_service(s))));
        });
        each_slice(before.state, after.state, |before, after| {
            let name = after.or(before).map(|slice| slice.name.to_string()).unwrap_or_default();
            changes.push(change("EndpointSlice", name, before.map(of_slice), after.map(of_slice)));
        });
    }
    if !std::ptr::eq(before.local, after.local) {
        let (old, new): (BTreeMap<_, _>, BTreeMap<_, _>) = (pods(before.local).collect(), pods(after.local).collect());
        side_by_side(&old, &new, |ip, before, after| {
            changes.push(change("Pod", ip.to_string(), before.map(|p| of_pod(p)), after.map(|p| of_pod(p))));
        });
        let (was, is) = (of_machine(before.local), of_machine(after.local));
        if was != is {
            changes.push(change("Machine", after.local.name.to_string(), Some(was), Some(is)));
        }
    }
    changes
}

/// Every slice that differs, before and after. One that changes its service goes there and comes here.
pub fn each_slice(before: &ClusterState, after: &ClusterState, mut each: impl FnMut(Option<&EndpointSlice>, Option<&EndpointSlice>)) {
    let none = BTreeMap::new();
    differing(before.all_slices(), after.all_slices(), |_, before, after| {
        let (before, after) = (before.map_or(&none, |slices| &**slices), after.map_or(&none, |slices| &**slices));
        side_by_side(before, after, |_, before, after| each(before.map(|s| &**s), after.map(|s| &**s)));
    });
}

/// Calls `differs` for each key whose values differ, in order. What the maps share is not looked at.
pub fn differing<K: Ord, V: PartialEq>(before: &OrdMap<K, V>, after: &OrdMap<K, V>, mut differs: impl FnMut(&K, Option<&V>, Option<&V>)) {
    for item in before.diff(after) {
        match item {
            DiffItem::Add(key, is) => differs(key, None, Some(is)),
            DiffItem::Update { old: (key, was), new: (_, is) } => differs(key, Some(was), Some(is)),
            DiffItem::Remove(key, was) => differs(key, Some(was), None),
        }
    }
}

/// The same of maps that share nothing.
fn side_by_side<K: Ord, V: PartialEq>(before: &BTreeMap<K, V>, after: &BTreeMap<K, V>, mut differs: impl FnMut(&K, Option<&V>, Option<&V>)) {
    let (mut old, mut new) = (before.iter().peekable(), after.iter().peekable());
    loop {
        match (old.peek(), new.peek()) {
            (None, None) => return,
            (Some((key, _)), Some((other, _))) if key == other => {
                let (Some((key, was)), Some((_, is))) = (old.next(), new.next()) else { return };
                if was != is {
                    differs(key, Some(was), Some(is));
                }
            }
            (Some((key, _)), other) if other.is_none_or(|(other, _)| key < other) => take(&mut old, |key, was| differs(key, Some(was), None)),
            _ => take(&mut new, |key, is| differs(key, None, Some(is))),
        }
    }
}

fn take<'a, K: 'a, V: 'a>(from: &mut Peekable<impl Iterator<Item = (&'a K, &'a V)>>, with: impl FnOnce(&'a K, &'a V)) {
    if let Some((key, value)) = from.next() {
        with(key, value);
    }
}

/// What there is to say of an object, by part.
type Facts = BTreeMap<String, String>;

fn change(kind: &'static str, name: String, before: Option<Facts>, after: Option<Facts>) -> Change {
    let what = match (&before, &after) {
        (None, _) => What::Added,
        (Some(_), None) => What::Removed,
        (Some(_), Some(_)) => What::Updated,
    };
    let mut details = Vec::new();
    // Of what has gone, that it has gone is enough.
    if let Some(after) = after {
        side_by_side(&before.unwrap_or_default(), &after, |part, before, after| {
            let join = |value: &str| if value.is_empty() { part.clone() } else { format!("{part} {value}") };
            details.push(match (before, after) {
                (None, after) => format!("+{}", join(after.map_or("", |a| a))),
                (Some(_), None) => format!("-{part}"),
                (Some(before), Some(after)) => format!("{part} {before} → {after}"),
            });
        });
    }
    if details.len() > DETAILS_MAX {
        let more = details.len() - DETAILS_MAX;
        details.truncate(DETAILS_MAX);
        details.push(format!("and {more} more"));
    }
    Change { kind, name, what, details }
}

fn list<T: ToString>(items: impl IntoIterator<Item = T>) -> String {
    let text = items.into_iter().map(|item| item.to_string()).collect::<Vec<_>>().join(", ");
    if text.is_empty() { "none".into() } else { text }
}

fn facts<const N: usize>(facts: [(&str, Option<String>); N]) -> Facts {
    facts.into_iter().filter_map(|(part, value)| Some((part.to_owned(), value?))).collect()
}

fn some<T: ToString>(items: impl IntoIterator<Item = T>) -> Option<String> {
    Some(list(items)).filter(|text| text != "none")
}

fn of_node(node: &Node) -> Facts {
    facts([
        ("podCIDRs", some(&node.pod_cidrs)),
        ("addresses", some(&node.addresses)),
        ("zone", node.zone.as_ref().map(ToString::to_string)),
        (
            "overlay",
            match &node.announcement {
                Announcement::Silent => None,
                Announcement::None => Some("none".into()),
                Announcement::Overlay { underlay, port, vni, mtu, direct_return_vni } => {
                    let number = |name: &str, value: Option<u32>| value.map(|v| format!("{name}={v}"));
                    let figures = [("port", port.map(u32::from)), ("vni", *vni), ("mtu", *mtu), ("directReturnVni", *direct_return_vni)];
                    let parts = figures.map(|(name, value)| number(name, value));
                    Some(list(underlay.iter().map(ToString::to_string).chain(parts.into_iter().flatten())))
                }
            },
        ),
        (
            "leaving",
            node.leaving.map(|leaving| match leaving {
                Leaving::Deleted => "it is being deleted".into(),
                Leaving::Autoscaler => "the cluster autoscaler's taint".into(),
            }),
        ),
    ])
}

fn of_service(service: &Service) -> Facts {
    let mut known = facts([
        ("clusterIPs", some(&service.cluster_ips)),
        ("externalIPs", some(&service.external_ips)),
        ("loadBalancerIPs", some(&service.load_balancer_ips)),
        ("sourceRanges", some(&service.source_ranges)),
        ("internalTrafficPolicy", Some(format!("{:?}", service.internal_policy))),
        ("externalTrafficPolicy", Some(format!("{:?}", service.external_policy))),
        ("sessionAffinity", service.affinity.map(|timeout| format!("{} s", timeout.as_secs()))),
        ("healthCheckNodePort", service.health_check_node_port.map(|port| port.to_string())),
        ("notServed", service.skip.as_ref().map(|reason| format!("{reason:?}"))),
    ]);
    for port in &service.ports {
        let part = if port.name.is_empty() { format!("port {}", port.protocol) } else { format!("port {}/{}", port.name, port.protocol) };
        let node_port = port.node_port.map(|node_port| format!(" (node port {node_port})")).unwrap_or_default();
        known.insert(part, format!("{}{node_port}", port.port));
    }
    known
}

fn of_slice(slice: &EndpointSlice) -> Facts {
    let ports = slice.ports.iter().map(|port| {
        let part = if port.name.is_empty() { format!("port {}", port.protocol) } else { format!("port {}/{}", port.name, port.protocol) };
        (part, port.port.to_string())
    });
    let service = slice.service.iter().map(|service| ("service".to_owned(), service.to_string()));
    let endpoints = slice.endpoints.iter().map(|endpoint| {
        let condition = match (endpoint.ready, endpoint.serving, endpoint.terminating) {
            (true, ..) => "ready",
            (false, true, true) => "terminating and serving",
            (false, false, true) => "terminating",
            (false, _, false) => "not ready",
        };
        let node = endpoint.node.as_ref().map(|node| format!(" on {node}")).unwrap_or_default();
        let hints: Vec<&str> = endpoint.node_hints.iter().chain(&endpoint.zone_hints).map(|hint| &**hint).collect();
        let hints = if hints.is_empty() { String::new() } else { format!(" for {}", hints.join(", ")) };
        (endpoint.address.to_string(), format!("{condition}{node}{hints}"))
    });
    ports.chain(service).chain(endpoints).collect()
}

fn pods(local: &LocalNode) -> impl Iterator<Item = (IpAddr, &Pod)> {
    local.pods.iter().map(|(ip, pod)| (*ip, pod))
}

fn of_pod(pod: &Pod) -> Facts {
    let masquerade = (!pod.masquerade).then(|| "off".to_owned());
    facts([("mtu", Some(pod.mtu.to_string())), ("masquerade", masquerade), ("bandwidth", pod.limits.as_ref().map(|_| "limited".to_owned()))])
}

fn of_machine(local: &LocalNode) -> Facts {
    facts([
        ("addresses", some(&local.addresses)),
        ("underlay", some(&local.underlay)),
        ("mtu", Some(format!("{}, {} to the outside", local.underlay_mtu, local.outside_mtu))),
        ("narrowPaths", some(local.path_mtus.iter().map(|(peer, mtu)| format!("{peer} {mtu}")))),
        ("hostPorts", some(local.host_ports.iter().map(|port| format!("{}/{} of {}", port.port, port.protocol, port.pod)))),
    ])
}

/// What changed with each of the last generations.
#[derive(Debug)]
pub struct History {
    entries: VecDeque<Entry>,
    /// Everything after this generation is remembered.
    complete_after: u64,
    newest: u64,
}

#[derive(Debug)]
struct Entry {
    generation: u64,
    /// Whether the tables changed; else the generation is the one that was in force.
    published: bool,
    at: SystemTime,
    changes: Vec<Change>,
    left_out: usize,
}

/// Everything that became of one object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ObjectHistory {
    /// Its kind.
    pub kind: &'static str,
    /// Its name.
    pub name: String,
    /// In sum: an object that came and has gone again was removed.
    pub change: What,
    /// The generations that it changed in, the last one last.
    pub generations: Vec<u64>,
    /// When it last changed, in seconds of the Unix clock.
    pub at_unix_seconds: u64,
    /// In which parts, in order.
    pub details: Vec<String>,
}

/// What changed since a generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Since {
    /// The generation asked for.
    pub from: u64,
    /// The one in force.
    pub to: u64,
    /// By kind and name.
    pub objects: Vec<ObjectHistory>,
    /// Changes that were too many to be remembered.
    pub left_out: usize,
}

/// Why it cannot be told what changed since a generation.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HistoryError {
    /// It is too long ago.
    #[error("what changed since generation {asked} is no longer remembered: ask for {oldest} or later, or for no generation at all")]
    Forgotten {
        /// The generation asked for.
        asked: u64,
        /// The first one that can be asked for.
        oldest: u64,
    },
    /// It has not come yet.
    #[error("there is no generation {asked} yet: the tables are at {newest} (`podgate status` says so too)")]
    Ahead {
        /// The generation asked for.
        asked: u64,
        /// The one in force.
        newest: u64,
    },
}

impl History {
    /// Begins with the tables of `generation`.
    pub fn new(generation: u64) -> History {
        History { entries: VecDeque::new(), complete_after: generation, newest: generation }
    }

    /// Remembers what changed when the tables became those of `generation`; or, where that is the one in force already, without them
    /// becoming others.
    pub fn record(&mut self, generation: u64, at: SystemTime, mut changes: Vec<Change>) {
        let published = generation != self.newest;
        if changes.is_empty() && !published {
            return;
        }
        self.newest = generation;
        let left_out = changes.len().saturating_sub(CHANGES_OF_ONE_MAX);
        changes.truncate(CHANGES_OF_ONE_MAX);
        self.entries.push_back(Entry { generation, published, at, changes, left_out });
        while self.entries.len() > GENERATIONS_MAX || self.entries.iter().map(|entry| entry.changes.len()).sum::<usize>() > CHANGES_MAX {
            let Some(gone) = self.entries.pop_front() else { return };
            self.complete_after = if gone.published { gone.generation } else { gone.generation + 1 };
        }
    }

    /// The objects of the newest entry, for whoever waits for it.
    pub fn latest(&self) -> impl Iterator<Item = &Change> {
        self.entries.back().into_iter().flat_map(|entry| &entry.changes)
    }

    /// Everything since `generation`; since as long ago as is remembered, if none is named.
    pub fn since(&self, generation: Option<u64>) -> Result<Since, HistoryError> {
        let from = generation.unwrap_or(self.complete_after);
        if from > self.newest {
            return Err(HistoryError::Ahead { asked: from, newest: self.newest });
        }
        if from < self.complete_after {
            return Err(HistoryError::Forgotten { asked: from, oldest: self.complete_after });
        }
        let mut objects: BTreeMap<(&str, &str), ObjectHistory> = BTreeMap::new();
        let mut left_out = 0;
        let came_after = |entry: &&Entry| entry.generation > from || entry.generation == from && !entry.published;
        let mut new: BTreeSet<(&str, &str)> = BTreeSet::new();
        for entry in self.entries.iter().filter(came_after) {
            left_out += entry.left_out;
            let at_unix_seconds = entry.at.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |at| at.as_secs());
            for change in &entry.changes {
                let key = (change.kind, change.name.as_str());
                let object = objects.entry(key).or_insert_with(|| {
                    if change.what == What::Added {
                        new.insert(key);
                    }
                    let name = change.name.clone();
                    ObjectHistory { kind: change.kind, name, change: change.what, generations: Vec::new(), at_unix_seconds, details: Vec::new() }
                });
                object.change = match change.what {
                    What::Removed => What::Removed,
                    What::Added | What::Updated if new.contains(&key) => What::Added,
                    What::Added | What::Updated => What::Updated,
                };
                if object.generations.last() != Some(&entry.generation) {
                    object.generations.push(entry.generation);
                }
                object.at_unix_seconds = at_unix_seconds;
                object.details.extend(change.details.iter().cloned());
            }
        }
        Ok(Since { from, to: self.newest, objects: objects.into_values().collect(), left_out })
    }
}

#[cfg(test)]
mod tests;
