//! From the cluster's objects to a snapshot for this node: pure, and no dearer than what changed.
//!
//! [`compile`] takes the previous result and compares: states share what did not change, and what they share is not even looked at. A service
//! whose object and slices are the same keeps its service ports and touches no shard; peers and routes are built anew only if nodes changed,
//! warnings only if something that is warned of did. A fresh compile of the same state gives the same tables, which is what its property
//! test holds it to.
//!
//! What it decides is what kube-proxy's users rely on; each file names the upstream files that define it. `endpoints` chooses endpoints,
//! `service` makes frontends, `node` makes peers and routes, [`view`] tells operators of it.

mod endpoints;
mod node;
mod service;
pub mod view;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use imbl::{OrdMap, OrdSet};
use podgate_core::addr::protocol;
use podgate_core::fib::within;
use podgate_core::service::{Face, Frontend, FrontendKey, ServiceTable};
use podgate_core::snapshot::{Generation, Peer, Snapshot};
use serde::Serialize;

use crate::diff;
use crate::model::{ClusterState, ObjectName, Protocol};
use node::Locator;
pub use node::{Announcements, HostPort, LocalNode, Settings, gateway_address, pod_mtu};
use service::{CompiledPort, CompiledService, HOST_PORTS, compile_service, host_ports, owner, self_test, self_test_name};
use view::{HealthCheckView, health_check};

/// A snapshot, what it was made from, and what there is to say about it.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// What the workers read. Its generation grows only when something in it changed.
    pub snapshot: Snapshot,
    /// Service ports added, updated and removed since the previous one.
    pub changes: Arc<[ServiceChange]>,
    /// What is wrong with the objects, or seen and not enforced. Complete each time, not only what is new.
    pub warnings: Arc<[Warning]>,
    /// Frontends that the node itself has to lead to the gateway one by one: its own addresses and ports, but for TCP node ports, and VIPs
    /// outside of the service ranges.
    pub apart: OrdMap<FrontendKey, Face>,
    /// Health checks of services that have a port for it, by service.
    pub health_checks: OrdMap<ObjectName, HealthCheckView>,
    state: Arc<ClusterState>,
    local: Arc<LocalNode>,
    locator: Arc<Locator>,
    services: OrdMap<ObjectName, Arc<CompiledService>>,
    /// Services that there is something to warn of.
    doubtful: OrdSet<ObjectName>,
    /// Frontends that more than one service claims.
    contested: BTreeMap<FrontendKey, BTreeSet<ObjectName>>,
    node_warnings: Vec<Warning>,
}

/// Something that an operator should know about an object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Warning {
    /// The object, as `Kind namespace/name`.
    pub object: String,
    /// What is the matter with it, and what to do.
    pub message: String,
}

impl Warning {
    /// About `object`.
    pub fn new(object: impl Into<String>, message: impl Into<String>) -> Warning {
        Warning { object: object.into(), message: message.into() }
    }
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.object, self.message)
    }
}

/// One line for the log, in kube-proxy's words: a change of a service port itself, not of its endpoints.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ServiceChange {
    /// What happened.
    pub kind: ChangeKind,
    /// `namespace/name:port`.
    pub name: Arc<str>,
    /// The first address that clients dial, with port and protocol.
    pub address: String,
}

/// What happened to a service port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ChangeKind {
    /// It is new.
    Added,
    /// Its addresses, ports or policies changed.
    Updated,
    /// It is gone.
    Removed,
}

impl fmt::Display for ServiceChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.kind {
            ChangeKind::Added => "Adding new service port",
            ChangeKind::Updated => "Updating existing service port",
            ChangeKind::Removed => "Removing service port",
        };
        write!(f, "{what} {} at {}", self.name, self.address)
    }
}

impl Compiled {
    /// Before any object is known: the node's own tables and nothing else. Generation 0.
    pub fn empty(local: &Arc<LocalNode>) -> Compiled {
        let state = Arc::new(ClusterState::default());
        let nodes = node::nodes(&state, local);
        let snapshot = Snapshot {
            generation: Generation(0),
            node: Arc::new(nodes.tables),
            services: ServiceTable::default(),
            pods: node::pod_table(local),
            routes: Arc::new(nodes.routes),
            peers: nodes.peers.into(),
            peer_by_underlay: nodes.by_underlay.into(),
        };
        Compiled {
            snapshot,
            changes: Arc::new([]),
            warnings: nodes.warnings.clone().into(),
            apart: OrdMap::new(),
            health_checks: OrdMap::new(),
            state,
            local: local.clone(),
            locator: Arc::new(nodes.locator),
            services: OrdMap::new(),
            doubtful: OrdSet::new(),
            contested: BTreeMap::new(),
            node_warnings: nodes.warnings,
        }
    }
}

impl Compiled {
    /// What it was made from.
    pub fn inputs(&self) -> (&Arc<ClusterState>, &Arc<LocalNode>) {
        (&self.state, &self.local)
    }

    /// Every service port, by service.
    pub fn service_ports(&self) -> impl Iterator<Item = &podgate_core::service::ServicePort> {
        self.services.values().flat_map(|service| &service.ports).map(|port| &*port.service)
    }
}

/// The tables for `local` in a cluster like `state`, sharing with `previous` whatever did not change.
pub fn compile(previous: &Compiled, state: &Arc<ClusterState>, local: &Arc<LocalNode>) -> Compiled {
    let mut next = previous.clone();
    next.state = state.clone();
    next.local = local.clone();
    let nodes_changed = compile_nodes(previous, &mut next);
    let pods_changed = previous.local.pods != local.pods;
    if pods_changed {
        next.snapshot.pods = node::pod_table(local);
    }
    let changed = compile_services(previous, &mut next);
    let frontends = resolve(previous, &mut next, &changed);
    let services_changed = !frontends.is_empty();
    set_apart(previous, &mut next, &frontends);
    next.snapshot.services = previous.snapshot.services.with(frontends);
    next.changes = changed.iter().flat_map(|name| service_changes(previous.services.get(name), next.services.get(name))).collect();
    if may_warn_otherwise(previous, &next, &changed) {
        next.warnings = warnings(&next).into();
    }
    if nodes_changed || pods_changed || services_changed {
        next.snapshot.generation = Generation(previous.snapshot.generation.0 + 1);
    }
    next
}

/// Builds node tables, peers and routes anew if they may differ; whether they do.
fn compile_nodes(previous: &Compiled, next: &mut Compiled) -> bool {
    let same_nodes = previous.state.nodes().ptr_eq(next.state.nodes()) || previous.state.nodes() == next.state.nodes();
    // Pods count only where their addresses are in none of the node's ranges.
    let strays = |local: &LocalNode| -> Vec<_> {
        let ranges = &previous.snapshot.node.node_pod_cidrs;
        local.pods.iter().map(|(ip, _)| *ip).filter(|ip| !within(ranges, (*ip).into())).collect()
    };
    let same_machine = || previous.local.is_but_for_pods(&next.local) && strays(&previous.local) == strays(&next.local);
    if same_nodes && (previous.local == next.local || same_machine()) {
        return false;
    }
    let nodes = node::nodes(&next.state, &next.local);
    next.node_warnings = nodes.warnings;
    set(&mut next.locator, nodes.locator);
    let snapshot = &mut next.snapshot;
    let mut changed = set(&mut snapshot.node, nodes.tables);
    changed |= set(&mut snapshot.routes, nodes.routes);
    if *snapshot.peers != *nodes.peers {
        snapshot.peers = nodes.peers.into_iter().map(|peer| share_prefixes(peer, &previous.snapshot.peers)).collect();
        changed = true;
    }
    if *snapshot.peer_by_underlay != *nodes.by_underlay {
        snapshot.peer_by_underlay = nodes.by_underlay.into();
        changed = true;
    }
    changed
}

/// Puts `value` in place unless an equal one is there; whether it did.
fn set<T: PartialEq>(place: &mut Arc<T>, value: T) -> bool {
    let differs = **place != value;
    if differs {
        *place = Arc::new(value);
    }
    differs
}

fn share_prefixes(mut peer: Peer, previous: &[Peer]) -> Peer {
    // Both are sorted by name.
    if let Ok(at) = previous.binary_search_by(|p| p.name.cmp(&peer.name))
        && previous[at].prefixes == peer.prefixes
    {
        peer.prefixes = previous[at].prefixes.clone();
    }
    peer
}

/// Compiles the services that may differ; the names of those that do.
fn compile_services(previous: &Compiled, next: &mut Compiled) -> BTreeSet<ObjectName> {
    let (state, local, locator) = (next.state.clone(), next.local.clone(), next.locator.clone());
    let own = self_test_name();
    let mut of_the_node = host_ports(&local, &locator);
    of_the_node.insert(own.clone(), self_test(&local, &locator));
    let mut changed = BTreeSet::new();
    for name in may_differ(previous, &state, &local, &locator) {
        let before = previous.services.get(&name);
        // A service of the name of the gateway's own would take its place: it is warned of instead.
        let object = state.services().get(&name).filter(|_| name != own);
        let slices = || state.slices(&name).map(|slices| &**slices);
        let compiled = match (of_the_node.remove(&name), object) {
            (Some(compiled), _) => Some(compiled),
            (None, Some(service)) => Some(compile_service(service, slices(), &local, &locator, before.map(|before| &**before))),
            (None, None) => None,
        };
        match object.and_then(|service| health_check(service, slices(), &local.name, &locator)) {
            Some(check) => drop(next.health_checks.insert(name.clone(), check)),
            None => drop(next.health_checks.remove(&name)),
        }
        if before.map(|before| &**before) == compiled.as_ref() {
            continue;
        }
        match compiled.as_ref().is_some_and(|compiled| !compiled.warnings.is_empty()) {
            true => drop(next.doubtful.insert(name.clone())),
            false => drop(next.doubtful.remove(&name)),
        }
        match compiled {
            Some(compiled) => drop(next.services.insert(name.clone(), Arc::new(compiled))),
            None => drop(next.services.remove(&name)),
        }
        changed.insert(name);
    }
    for (name, compiled) in of_the_node {
        if previous.services.get(&name).is_none_or(|before| **before != compiled) {
            next.services.insert(name.clone(), Arc::new(compiled));
            changed.insert(name);
        }
    }
    changed
}

/// The names of services that need to be looked at: all of them if the rest of the world changed, else those whose own objects did.
fn may_differ(previous: &Compiled, state: &ClusterState, local: &LocalNode, locator: &Arc<Locator>) -> BTreeSet<ObjectName> {
    let all = previous.locator != *locator || previous.local.settings != local.settings || previous.local.name != local.name;
    if all {
        return state.services().keys().chain(previous.services.keys()).cloned().collect();
    }
    let mut names = BTreeSet::new();
    diff::differing(previous.state.services(), state.services(), |name, _, _| names.extend([name.clone()]));
    diff::differing(previous.state.all_slices(), state.all_slices(), |name, _, _| names.extend([name.clone()]));
    names.retain(|name| state.services().contains_key(name) || previous.services.contains_key(name));
    let host_ports = previous.services.range(ObjectName::new(HOST_PORTS, "")..).map(|(name, _)| name);
    names.extend(host_ports.take_while(|name| *name.namespace == *HOST_PORTS).cloned());
    names
}

/// Keeps [`Compiled::apart`] in step with the table, in which `frontends` are about to change.
fn set_apart(previous: &Compiled, next: &mut Compiled, frontends: &[(FrontendKey, Option<Frontend>)]) {
    let node = next.snapshot.node.clone();
    let is_apart = |key: &FrontendKey, face: Face| match face {
        Face::NodePort => key.protocol == protocol::UDP,
        Face::PeersNodePort => false,
        _ => node.owns(key.addr) || !within(&node.service_cidrs, key.addr) && !within(&node.cluster_pod_cidrs, key.addr),
    };
    if !Arc::ptr_eq(&previous.snapshot.node, &node) {
        let kept = previous.snapshot.services.iter().filter(|(key, frontend)| is_apart(key, frontend.face));
        next.apart = kept.map(|(key, frontend)| (*key, frontend.face)).collect();
    }
    for (key, frontend) in frontends {
        match frontend.as_ref().filter(|frontend| is_apart(key, frontend.face)) {
            Some(frontend) => drop(next.apart.insert(*key, frontend.face)),
            None => drop(next.apart.remove(key)),
        }
    }
}

/// What must change in the table because the services named in `changed` did. A frontend that several services claim goes to the one
/// whose face ranks first (a cluster IP is never shadowed), then to the first by name.
fn resolve(previous: &Compiled, next: &mut Compiled, changed: &BTreeSet<ObjectName>) -> Vec<(FrontendKey, Option<Frontend>)> {
    let mut claims: BTreeMap<FrontendKey, BTreeSet<ObjectName>> = BTreeMap::new();
    let known = |key: &FrontendKey| match previous.contested.get(key) {
        Some(claimants) => claimants.clone(),
        None => previous.snapshot.services.get(key).map(|f| owner(&f.service)).into_iter().collect(),
    };
    for name in changed {
        for key in previous.services.get(name).iter().flat_map(|s| s.keys()) {
            claims.entry(key).or_insert_with(|| known(&key)).remove(name);
        }
        for key in next.services.get(name).iter().flat_map(|s| s.keys()) {
            claims.entry(key).or_insert_with(|| known(&key)).insert(name.clone());
        }
    }
    let mut frontends = Vec::new();
    for (key, claimants) in claims {
        let winner = claimants.iter().filter_map(|name| next.services.get(name)?.frontend(&key)).min_by_key(|frontend| rank(frontend.face));
        match claimants.len() {
            0 | 1 => next.contested.remove(&key),
            _ => next.contested.insert(key, claimants),
        };
        let same = match (previous.snapshot.services.get(&key), &winner) {
            (Some(before), Some(now)) => before.face == now.face && Arc::ptr_eq(&before.service, &now.service),
            (None, None) => true,
            _ => false,
        };
        if !same {
            frontends.push((key, winner));
        }
    }
    frontends
}

fn rank(face: Face) -> u8 {
    match face {
        Face::ClusterIp => 0,
        Face::NodePort | Face::PeersNodePort => 1,
        Face::LoadBalancer => 2,
        Face::ExternalIp => 3,
        Face::HostPort => 4,
    }
}

fn service_changes(before: Option<&Arc<CompiledService>>, now: Option<&Arc<CompiledService>>) -> Vec<ServiceChange> {
    fn find<'a>(side: Option<&'a Arc<CompiledService>>, like: &CompiledPort) -> Option<&'a CompiledPort> {
        side?.ports.iter().find(|p| p.service.id == like.service.id)
    }
    let mut changes = Vec::new();
    let mut push = |kind, port: &CompiledPort| {
        let Some((key, _)) = port.faces.first() else { return };
        changes.push(ServiceChange { kind, name: port.service.name.clone(), address: dialled(key, port.protocol) });
    };
    for port in now.iter().flat_map(|s| &s.ports) {
        match find(before, port) {
            None => push(ChangeKind::Added, port),
            Some(old) if !same_but_endpoints(old, port) => push(ChangeKind::Updated, port),
            Some(_) => {}
        }
    }
    for port in before.iter().flat_map(|s| &s.ports).filter(|p| find(now, p).is_none()) {
        push(ChangeKind::Removed, port);
    }
    changes
}

fn same_but_endpoints(a: &CompiledPort, b: &CompiledPort) -> bool {
    let of = |p: &CompiledPort| (p.service.internal_policy, p.service.external_policy, p.service.affinity, p.service.source_ranges.clone());
    a.faces == b.faces && of(a) == of(b) && a.policy == b.policy
}

/// `10.96.0.10:80/TCP`.
fn dialled(key: &FrontendKey, protocol: Protocol) -> String {
    format!("{}/{protocol}", std::net::SocketAddr::new(key.addr.ip(), key.port))
}

/// Whether [`warnings`] could come out otherwise than before.
fn may_warn_otherwise(previous: &Compiled, next: &Compiled, changed: &BTreeSet<ObjectName>) -> bool {
    let (before, now) = (&previous.state, &next.state);
    let doubtful = |name| previous.doubtful.contains(name) || next.doubtful.contains(name);
    let own = self_test_name();
    previous.node_warnings != next.node_warnings
        || changed.iter().any(doubtful)
        // Who wins a contested address may change with any of the claimants.
        || !(previous.contested.is_empty() && next.contested.is_empty())
        || previous.local.settings.service_cidrs != next.local.settings.service_cidrs
        || before.services().contains_key(&own) != now.services().contains_key(&own)
        || !before.service_cidrs().ptr_eq(now.service_cidrs())
        || !before.unenforced().ptr_eq(now.unenforced())
        || !before.orphan_slices().ptr_eq(now.orphan_slices())
}

fn warnings(next: &Compiled) -> Vec<Warning> {
    let mut warnings = next.node_warnings.clone();
    warnings.extend(next.doubtful.iter().filter_map(|name| next.services.get(name)).flat_map(|s| s.warnings.iter().cloned()));
    if next.state.services().contains_key(&self_test_name()) {
        let message = "this name is the gateway's own, for its self-test; the object is not served: give it another name";
        warnings.push(Warning::new(format!("Service {}", self_test_name()), message));
    }
    for (key, claimants) in &next.contested {
        let winner = next.snapshot.services.get(key).map(|f| owner(&f.service));
        for loser in claimants.iter().filter(|c| Some(*c) != winner.as_ref()) {
            let winner = winner.as_ref().map(ToString::to_string).unwrap_or_default();
            let address = std::net::SocketAddr::new(key.addr.ip(), key.port);
            let message = format!("{address} belongs to Service {winner} already and leads there; give one of them another address or port");
            warnings.push(Warning::new(format!("Service {loser}"), message));
        }
    }
    let ranges = &next.local.settings.service_cidrs;
    for cidr in next.state.service_cidrs().values() {
        for missing in cidr.cidrs.iter().filter(|cidr| !node::inside(ranges, **cidr)) {
            let message = format!(
                "services get addresses from {missing}, which is not inside serviceCIDRs ({}): what is sent to an address there that no service has \
                 is not held back; add the range to podgate.yaml",
                ranges.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
            );
            warnings.push(Warning::new(format!("ServiceCIDR {}", cidr.name), message));
        }
    }
    for object in next.state.unenforced() {
        let message = format!("{} objects are seen but not enforced: traffic flows as if this one did not exist", object.kind);
        warnings.push(Warning::new(object.to_string(), message));
    }
    for slice in next.state.orphan_slices() {
        let message = "it has no label kubernetes.io/service-name and so belongs to no service; add the label";
        warnings.push(Warning::new(format!("EndpointSlice {slice}"), message));
    }
    warnings
}

#[cfg(test)]
pub(crate) mod tests;
