//! What the gateway knows of the cluster: Kubernetes objects, reduced to what forwarding needs.
//!
//! Objects are parsed once, where they come in (the `from_k8s` functions), with the defaults that an API
//! server would have filled in, so that a hand-written manifest means what the same manifest means in a cluster. After that the
//! types are trusted. Everything is pure: no clock, no IO; an unchanged object keeps its [`Arc`] from one [`ClusterState`] to the
//! next, by which the compiler knows what changed.
//!
//! Upstream: Kubernetes `pkg/proxy/serviceport.go`, `pkg/proxy/endpointslicecache.go`, `pkg/proxy/util/utils.go`.

mod node;
mod service;
mod service_cidr;
mod slice;

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use imbl::{OrdMap, OrdSet};
use ipnetwork::IpNetwork;
use k8s_openapi::api::core::v1 as core_v1;
use k8s_openapi::api::discovery::v1 as discovery_v1;
use k8s_openapi::api::networking::v1 as networking_v1;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use podgate_core::addr::protocol;
use serde::Serialize;

pub use node::{Announcement, Leaving, Node, OVERLAY_ANNOTATION, UNDERLAY_ANNOTATION};
pub use service::{BALANCE_ANNOTATION, BalancePolicy, Service, ServicePort, SkipReason};
pub use service_cidr::ServiceCidr;
pub use slice::{Endpoint, EndpointSlice, PUBLISHER_ANNOTATION, SlicePort, WEIGHT_ANNOTATION, WEIGHT_MAX};

/// A namespace and a name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectName {
    /// The namespace; empty for objects of the whole cluster.
    pub namespace: Arc<str>,
    /// The name.
    pub name: Arc<str>,
}

impl ObjectName {
    /// From its two parts.
    pub fn new(namespace: &str, name: &str) -> ObjectName {
        ObjectName { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() { f.write_str(&self.name) } else { write!(f, "{}/{}", self.namespace, self.name) }
    }
}

/// A transport protocol that a service can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP: passed by address, never translated in its ports.
    Sctp,
}

impl Protocol {
    /// The IP protocol number.
    pub const fn number(self) -> u8 {
        match self {
            Protocol::Tcp => protocol::TCP,
            Protocol::Udp => protocol::UDP,
            Protocol::Sctp => protocol::SCTP,
        }
    }

    /// As Kubernetes spells it; an absent one is TCP, as the API server's default.
    fn parse(text: Option<&str>) -> Option<Protocol> {
        match text {
            None | Some("" | "TCP") => Some(Protocol::Tcp),
            Some("UDP") => Some(Protocol::Udp),
            Some("SCTP") => Some(Protocol::Sctp),
            Some(_) => None,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Protocol::Tcp => "TCP",
            Protocol::Udp => "UDP",
            Protocol::Sctp => "SCTP",
        })
    }
}

/// An object that says something impossible. The API server would have refused it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{kind} {name}: {field}: {problem}")]
pub struct ModelError {
    /// The object's kind.
    pub kind: &'static str,
    /// Its name, with the namespace.
    pub name: String,
    /// The field at fault.
    pub field: String,
    /// What is wrong with it and what to write instead.
    pub problem: String,
}

/// What names an object in a source: its kind and its name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectKey {
    /// The kind.
    pub kind: Arc<str>,
    /// The name.
    pub name: ObjectName,
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind, self.name)
    }
}

/// An object of one of the kinds that a source delivers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Object {
    /// A node.
    Node(Arc<Node>),
    /// A service.
    Service(Arc<Service>),
    /// A slice of a service's endpoints.
    EndpointSlice(Arc<EndpointSlice>),
    /// Ranges that the API server gives services their addresses from.
    ServiceCidr(Arc<ServiceCidr>),
    /// Something that an operator expects to be enforced and that this gateway does not enforce: reported, never ignored in silence.
    Unenforced(ObjectKey),
}

/// Kinds that say how traffic is to be restricted or steered and that the gateway sees without enforcing.
pub const UNENFORCED_KINDS: &[&str] = &["NetworkPolicy", "AdminNetworkPolicy", "BaselineAdminNetworkPolicy", "ClusterNetworkPolicy"];

impl Object {
    /// Its kind and name.
    pub fn key(&self) -> ObjectKey {
        match self {
            Object::Node(node) => ObjectKey { kind: "Node".into(), name: ObjectName { namespace: "".into(), name: node.name.clone() } },
            Object::Service(service) => ObjectKey { kind: "Service".into(), name: service.name.clone() },
            Object::EndpointSlice(slice) => ObjectKey { kind: "EndpointSlice".into(), name: slice.name.clone() },
            Object::ServiceCidr(cidr) => ObjectKey { kind: "ServiceCIDR".into(), name: ObjectName { namespace: "".into(), name: cidr.name.clone() } },
            Object::Unenforced(key) => key.clone(),
        }
    }

    /// From a Kubernetes node.
    pub fn from_node(node: &core_v1::Node) -> Result<Object, ModelError> {
        Ok(Object::Node(Arc::new(Node::from_k8s(node)?)))
    }

    /// From a Kubernetes service.
    pub fn from_service(service: &core_v1::Service) -> Result<Object, ModelError> {
        Ok(Object::Service(Arc::new(Service::from_k8s(service)?)))
    }

    /// From a Kubernetes endpoint slice.
    pub fn from_slice(slice: &discovery_v1::EndpointSlice) -> Result<Object, ModelError> {
        Ok(Object::EndpointSlice(Arc::new(EndpointSlice::from_k8s(slice)?)))
    }

    /// From a Kubernetes service range.
    pub fn from_service_cidr(cidr: &networking_v1::ServiceCIDR) -> Result<Object, ModelError> {
        Ok(Object::ServiceCidr(Arc::new(ServiceCidr::from_k8s(cidr)?)))
    }
}

/// The slices of one service, by their names.
pub type Slices = BTreeMap<Arc<str>, Arc<EndpointSlice>>;

/// Every object that matters, as of one moment. A clone shares everything, and two states that came from one another are compared at the cost
/// of what they do not share.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClusterState {
    nodes: OrdMap<Arc<str>, Arc<Node>>,
    services: OrdMap<ObjectName, Arc<Service>>,
    /// By the service they belong to, then by their own name.
    slices: OrdMap<ObjectName, Arc<Slices>>,
    /// Which service a slice belongs to.
    slice_service: OrdMap<ObjectName, ObjectName>,
    /// Slices without the label that says so.
    orphans: OrdSet<ObjectName>,
    service_cidrs: OrdMap<Arc<str>, Arc<ServiceCidr>>,
    unenforced: OrdSet<ObjectKey>,
}

impl ClusterState {
    /// Adds `object`, or puts it in place of the one of the same kind and name. An equal one changes nothing.
    pub fn insert(&mut self, object: Object) {
        match object {
            Object::Node(node) => keep_or_insert(&mut self.nodes, node.name.clone(), node),
            Object::Service(service) => keep_or_insert(&mut self.services, service.name.clone(), service),
            Object::EndpointSlice(slice) => {
                let before = match &slice.service {
                    Some(service) => {
                        self.orphans.remove(&slice.name);
                        self.slice_service.insert(slice.name.clone(), service.clone())
                    }
                    None => {
                        self.orphans.insert(slice.name.clone());
                        self.slice_service.remove(&slice.name)
                    }
                };
                if before != slice.service
                    && let Some(before) = before
                {
                    self.unlink_slice(&before, &slice.name.name);
                }
                if let Some(service) = slice.service.clone() {
                    let slices = self.slices.entry(service).or_default();
                    if slices.get(&slice.name.name) != Some(&slice) {
                        Arc::make_mut(slices).insert(slice.name.name.clone(), slice);
                    }
                }
            }
            Object::ServiceCidr(cidr) => keep_or_insert(&mut self.service_cidrs, cidr.name.clone(), cidr),
            Object::Unenforced(key) => {
                self.unenforced.insert(key);
            }
        }
    }

    /// Whether `object` is there, exactly so: to insert it would change nothing.
    pub fn holds(&self, object: &Object) -> bool {
        match object {
            Object::Node(node) => self.nodes.get(&node.name) == Some(node),
            Object::Service(service) => self.services.get(&service.name) == Some(service),
            Object::EndpointSlice(slice) => {
                let same = |service| self.slices.get(service).and_then(|slices| slices.get(&slice.name.name)) == Some(slice);
                // Of a slice that belongs to no service the name is all that is kept.
                match &slice.service {
                    Some(service) => self.slice_service.get(&slice.name) == Some(service) && same(service),
                    None => self.orphans.contains(&slice.name),
                }
            }
            Object::ServiceCidr(cidr) => self.service_cidrs.get(&cidr.name) == Some(cidr),
            Object::Unenforced(key) => self.unenforced.contains(key),
        }
    }

    /// Whether there is an object of this kind and name.
    pub fn has(&self, key: &ObjectKey) -> bool {
        match &*key.kind {
            "Node" => self.nodes.contains_key(&key.name.name),
            "Service" => self.services.contains_key(&key.name),
            "EndpointSlice" => self.slice_service.contains_key(&key.name) || self.orphans.contains(&key.name),
            "ServiceCIDR" => self.service_cidrs.contains_key(&key.name.name),
            _ => self.unenforced.contains(key),
        }
    }

    /// Takes an object away, if it is there.
    pub fn remove(&mut self, key: &ObjectKey) {
        match &*key.kind {
            "Node" => {
                self.nodes.remove(&key.name.name);
            }
            "Service" => {
                self.services.remove(&key.name);
            }
            "EndpointSlice" => {
                self.orphans.remove(&key.name);
                if let Some(service) = self.slice_service.remove(&key.name) {
                    self.unlink_slice(&service, &key.name.name);
                }
            }
            "ServiceCIDR" => {
                self.service_cidrs.remove(&key.name.name);
            }
            _ => {
                self.unenforced.remove(key);
            }
        }
    }

    fn unlink_slice(&mut self, service: &ObjectName, slice: &Arc<str>) {
        if let Some(slices) = self.slices.get_mut(service) {
            Arc::make_mut(slices).remove(slice);
            if slices.is_empty() {
                self.slices.remove(service);
            }
        }
    }

    /// The nodes, by name.
    pub fn nodes(&self) -> &OrdMap<Arc<str>, Arc<Node>> {
        &self.nodes
    }

    /// The services, by name.
    pub fn services(&self) -> &OrdMap<ObjectName, Arc<Service>> {
        &self.services
    }

    /// The slices of `service`.
    pub fn slices(&self, service: &ObjectName) -> Option<&Arc<Slices>> {
        self.slices.get(service)
    }

    /// All slices, by the service that they belong to.
    pub fn all_slices(&self) -> &OrdMap<ObjectName, Arc<Slices>> {
        &self.slices
    }

    /// Slices without the label that joins them to a service.
    pub fn orphan_slices(&self) -> &OrdSet<ObjectName> {
        &self.orphans
    }

    /// The ranges that services have their addresses from, by name.
    pub fn service_cidrs(&self) -> &OrdMap<Arc<str>, Arc<ServiceCidr>> {
        &self.service_cidrs
    }

    /// Objects that are seen but not enforced.
    pub fn unenforced(&self) -> &OrdSet<ObjectKey> {
        &self.unenforced
    }

    /// How many objects there are.
    pub fn len(&self) -> usize {
        self.nodes.len() + self.services.len() + self.slice_service.len() + self.orphans.len() + self.service_cidrs.len() + self.unenforced.len()
    }

    /// Whether there is no object at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl FromIterator<Object> for ClusterState {
    fn from_iter<I: IntoIterator<Item = Object>>(objects: I) -> ClusterState {
        let mut state = ClusterState::default();
        objects.into_iter().for_each(|object| state.insert(object));
        state
    }
}

/// Keeps the `Arc` that is there if the new value equals it.
fn keep_or_insert<K: Ord + Clone, V: PartialEq>(map: &mut OrdMap<K, Arc<V>>, key: K, value: Arc<V>) {
    if map.get(&key) != Some(&value) {
        map.insert(key, value);
    }
}

/// The name in `metadata`; the API server's default namespace for what is written without one.
fn namespaced(kind: &'static str, metadata: &ObjectMeta) -> Result<ObjectName, ModelError> {
    let name = metadata.name.as_deref().unwrap_or_default();
    let namespace = metadata.namespace.as_deref().filter(|n| !n.is_empty()).unwrap_or("default");
    if name.is_empty() {
        let problem = "is missing; every object needs a name".to_string();
        return Err(ModelError { kind, name: "(unnamed)".into(), field: "metadata.name".into(), problem });
    }
    Ok(ObjectName::new(namespace, name))
}

/// For building errors about one object.
struct Blame<'a> {
    kind: &'static str,
    name: &'a dyn fmt::Display,
}

impl Blame<'_> {
    fn error(&self, field: impl Into<String>, problem: impl Into<String>) -> ModelError {
        ModelError { kind: self.kind, name: self.name.to_string(), field: field.into(), problem: problem.into() }
    }

    fn ip(&self, field: &str, text: &str) -> Result<IpAddr, ModelError> {
        text.trim().parse().map_err(|_| self.error(field, format!("`{text}` is not an IP address")))
    }

    fn cidr(&self, field: &str, text: &str) -> Result<IpNetwork, ModelError> {
        let network: IpNetwork =
            text.trim().parse().map_err(|_| self.error(field, format!("`{text}` is not a CIDR; write one as 10.244.1.0/24 or fd00::/64")))?;
        // Host bits mean nothing in a range; without them equal ranges compare equal.
        Ok(IpNetwork::new(network.network(), network.prefix()).expect("a network's own prefix length fits it"))
    }

    fn port(&self, field: &str, number: i32) -> Result<u16, ModelError> {
        u16::try_from(number).ok().filter(|p| *p != 0).ok_or_else(|| self.error(field, format!("{number} is not a port; ports are 1 to 65535")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slice(name: &str, service: Option<&str>) -> Object {
        Object::EndpointSlice(Arc::new(EndpointSlice {
            name: ObjectName::new("default", name),
            service: service.map(|s| ObjectName::new("default", s)),
            ports: Vec::new(),
            endpoints: Vec::new(),
            bad_weight: None,
            triggered: None,
            publisher: None,
        }))
    }

    #[test]
    fn a_slice_that_changes_its_label_moves_to_the_other_service() {
        let mut state: ClusterState = [slice("a", Some("web")), slice("b", Some("web"))].into_iter().collect();
        state.insert(slice("a", Some("db")));
        assert_eq!(state.slices(&ObjectName::new("default", "web")).unwrap().len(), 1);
        assert_eq!(state.slices(&ObjectName::new("default", "db")).unwrap().len(), 1);
        state.insert(slice("a", None));
        assert!(state.slices(&ObjectName::new("default", "db")).is_none());
        assert_eq!(state.orphan_slices().len(), 1);
    }

    #[test]
    fn an_equal_object_keeps_the_pointer_of_the_one_that_is_there() {
        let mut state: ClusterState = [slice("a", Some("web"))].into_iter().collect();
        let before = state.slices(&ObjectName::new("default", "web")).unwrap().clone();
        state.insert(slice("a", Some("web")));
        assert!(Arc::ptr_eq(&before, state.slices(&ObjectName::new("default", "web")).unwrap()));
    }

    #[test]
    fn an_object_is_held_only_as_it_is() {
        let (one, other) = (slice("a", Some("web")), slice("a", Some("db")));
        let mut state: ClusterState = [one.clone()].into_iter().collect();
        assert!(state.holds(&one) && !state.holds(&other) && state.has(&other.key()));
        state.remove(&one.key());
        assert!(!state.holds(&one) && !state.has(&one.key()));
    }

    #[test]
    fn what_is_taken_away_leaves_nothing_behind() {
        let mut state: ClusterState = [slice("a", Some("web"))].into_iter().collect();
        state.remove(&slice("a", None).key());
        assert_eq!(state, ClusterState::default());
    }
}
