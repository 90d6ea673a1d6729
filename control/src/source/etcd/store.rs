//! What etcd holds under the prefix, and the cluster's state that it makes.
//!
//! | key, behind the prefix | value |
//! |---|---|
//! | `objects/KIND/NAMESPACE/NAME`, `objects/KIND/NAME` | the object in Kubernetes' own JSON; a `Node` goes with its gateway's lease, and so do the slices that it publishes |
//! | `blocks/10.32.0.0_24` | a [`Record`]: which node holds the block |
//! | `cluster` | the pod ranges that all nodes cut their blocks from |
//!
//! **The last good state stays in force, object by object**: a value that does not parse is reported and changes nothing.
//!
//! Two things of the state are not as they are written. This node's own `Node` is what the node knows of itself: a lease that is lost takes
//! the object from etcd, not the node's ranges from its pods. And an endpoint whose address is a pod's, but of no block of a node that is
//! there, is neither ready nor serving: no packet would reach it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ipnetwork::IpNetwork;
use podgate_core::addr::Addr;
use podgate_core::fib::{PrefixMap, within};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::blocks::{Claim, Ledger, Record, Register, Registration};
use crate::model::{ClusterState, EndpointSlice, Object, ObjectKey, ObjectName};
use crate::source::{SourceIssue, manifest};

/// The annotation by which a registered node names its machine.
pub const MACHINE_ANNOTATION: &str = "podgate.io/machine";

/// Kinds without a namespace.
const CLUSTER_KINDS: [&str; 4] = ["Node", "AdminNetworkPolicy", "BaselineAdminNetworkPolicy", "ClusterNetworkPolicy"];

/// Whether objects of `kind` have no namespace.
pub fn is_cluster_wide(kind: &str) -> bool {
    CLUSTER_KINDS.contains(&kind)
}

/// Where things are in etcd.
#[derive(Clone, Debug)]
pub struct Keys {
    prefix: String,
}

impl Keys {
    /// Under `prefix`, which is not empty and does not end in `/`.
    pub fn new(prefix: &str) -> Keys {
        Keys { prefix: prefix.trim_end_matches('/').to_owned() }
    }

    /// The first key of all, and the first behind them: `0` follows `/`.
    pub fn all(&self) -> (String, String) {
        (format!("{}/", self.prefix), format!("{}0", self.prefix))
    }

    /// The same of the objects of `kind`, in `namespace` if one is given.
    pub fn of_kind(&self, kind: &str, namespace: Option<&str>) -> (String, String) {
        let path = namespace.map_or(String::new(), |namespace| format!("/{namespace}"));
        let base = format!("{}/objects/{kind}{path}", self.prefix);
        (format!("{base}/"), format!("{base}0"))
    }

    /// An object's.
    pub fn object(&self, key: &ObjectKey) -> String {
        let ObjectName { namespace, name } = &key.name;
        let path = if is_cluster_wide(&key.kind) { name.to_string() } else { format!("{namespace}/{name}") };
        format!("{}/objects/{}/{path}", self.prefix, key.kind)
    }

    /// A node's object.
    pub fn node(&self, name: &str) -> String {
        self.object(&ObjectKey { kind: "Node".into(), name: ObjectName::new("", name) })
    }

    /// A block's line in the ledger.
    pub fn block(&self, block: IpNetwork) -> String {
        format!("{}/blocks/{}_{}", self.prefix, block.network(), block.prefix())
    }

    /// The cluster's ranges.
    pub fn cluster(&self) -> String {
        format!("{}/cluster", self.prefix)
    }

    /// What a key is about.
    fn parse(&self, key: &str) -> Option<Subject> {
        let path = key.strip_prefix(&self.prefix)?.strip_prefix('/')?;
        let mut parts = path.split('/');
        let subject = match (parts.next()?, parts.next(), parts.next(), parts.next()) {
            ("objects", Some(kind), Some(name), None) if is_cluster_wide(kind) => {
                Subject::Object(ObjectKey { kind: kind.into(), name: ObjectName::new("", name) })
            }
            ("objects", Some(kind), Some(namespace), Some(name)) if !is_cluster_wide(kind) => {
                Subject::Object(ObjectKey { kind: kind.into(), name: ObjectName::new(namespace, name) })
            }
            ("blocks", Some(block), None, None) => Subject::Block(block.replace('_', "/").parse().ok()?),
            _ => return None,
        };
        parts.next().is_none().then_some(subject)
    }
}

enum Subject {
    Object(ObjectKey),
    Block(IpNetwork),
}

/// A key and its value, as they are kept beyond a restart.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Pair {
    /// The key.
    pub key: String,
    /// The value.
    pub value: String,
    /// The revision at which the key was made.
    pub created: i64,
    /// The revision at which it was last written.
    pub modified: i64,
}

/// What is known of a key.
#[derive(Debug)]
struct Entry {
    pair: Pair,
    /// What it held when it was last right.
    object: Option<Object>,
    issue: Option<SourceIssue>,
}

/// The node itself, and the cluster as it is configured.
#[derive(Clone, Debug)]
pub struct Own {
    /// The node's name.
    pub node: String,
    /// The cluster's pod ranges.
    pub pod_cidrs: Vec<IpNetwork>,
}

/// What etcd holds, as far as it is known.
#[derive(Debug)]
pub struct Store {
    keys: Keys,
    own: Own,
    /// This node's object, as the node knows it.
    own_node: Option<Object>,
    entries: BTreeMap<String, Entry>,
    ledger: Ledger,
    register: Register,
    state: ClusterState,
    /// Nodes changed: where endpoints are must be looked at again.
    nodes_changed: bool,
    /// Slices that are not in the state as they are.
    slices_changed: BTreeSet<ObjectKey>,
}

impl Store {
    /// Empty.
    pub fn new(keys: Keys, own: Own) -> Store {
        Store {
            keys,
            own,
            own_node: None,
            entries: BTreeMap::new(),
            ledger: Ledger::new(),
            register: Register::new(),
            state: ClusterState::default(),
            nodes_changed: false,
            slices_changed: BTreeSet::new(),
        }
    }

    /// Takes note of a key's value.
    pub fn put(&mut self, pair: Pair) {
        let subject = self.keys.parse(&pair.key);
        let before = self.entries.remove(&pair.key);
        let (object, issue) = match &subject {
            Some(Subject::Object(key)) => {
                let last = before.and_then(|entry| entry.object);
                match object(key, &pair) {
                    Ok(object) => (object, None),
                    Err(issue) => (last, Some(issue)),
                }
            }
            Some(Subject::Block(block)) => match serde_json::from_str::<Record>(&pair.value) {
                Ok(record) => {
                    self.ledger.insert(*block, Claim { record, created: pair.created, modified: pair.modified });
                    (None, None)
                }
                Err(error) => (None, Some(SourceIssue { file: pair.key.clone(), line: None, reason: error.to_string() })),
            },
            None => (None, None),
        };
        if let Some(Subject::Object(key)) = &subject {
            if &*key.kind == "Node" {
                self.register.remove(&*key.name.name);
                if let Some(machine) = machine(&pair.value) {
                    self.register.insert(key.name.name.to_string(), Registration { machine, term: pair.created });
                }
            }
            match object.clone() {
                Some(object) => self.show(object),
                None => self.hide(key),
            }
        }
        self.entries.insert(pair.key.clone(), Entry { pair, object, issue });
    }

    /// Takes note that a key is gone.
    pub fn delete(&mut self, key: &str) {
        self.entries.remove(key);
        match self.keys.parse(key) {
            Some(Subject::Block(block)) => {
                self.ledger.remove(&block);
            }
            Some(Subject::Object(object)) => {
                if &*object.kind == "Node" {
                    self.register.remove(&*object.name.name);
                }
                self.hide(&object);
            }
            None => {}
        }
    }

    /// Takes note of everything that there is.
    pub fn replace(&mut self, pairs: Vec<Pair>) {
        for gone in self.missing_from(&pairs) {
            self.delete(&gone);
        }
        for pair in pairs {
            // A value that was read already reads the same.
            if self.entries.get(&pair.key).is_none_or(|entry| entry.pair != pair) {
                self.put(pair);
            }
        }
    }

    /// Keys that are known and not among `pairs`.
    pub fn missing_from(&self, pairs: &[Pair]) -> Vec<String> {
        let listed: BTreeSet<&str> = pairs.iter().map(|pair| pair.key.as_str()).collect();
        self.entries.keys().filter(|key| !listed.contains(key.as_str())).cloned().collect()
    }

    /// Says what this node's object is.
    pub fn set_own_node(&mut self, node: Object) {
        if self.own_node.as_ref() != Some(&node) {
            self.state.insert(node.clone());
            self.own_node = Some(node);
            self.nodes_changed = true;
        }
    }

    fn is_own_node(&self, key: &ObjectKey) -> bool {
        &*key.kind == "Node" && *key.name.name == *self.own.node
    }

    fn show(&mut self, object: Object) {
        let key = object.key();
        match object {
            // The node knows better.
            Object::Node(_) if self.is_own_node(&key) => {}
            Object::Node(_) => {
                self.nodes_changed = true;
                self.state.insert(object);
            }
            // Where its endpoints are is looked at when all is read.
            Object::EndpointSlice(_) => {
                self.slices_changed.insert(key);
            }
            _ => self.state.insert(object),
        }
    }

    fn hide(&mut self, key: &ObjectKey) {
        if self.is_own_node(key) {
            return;
        }
        self.nodes_changed |= &*key.kind == "Node";
        self.slices_changed.remove(key);
        self.state.remove(key);
    }

    /// The state as of what was last taken note of.
    pub fn state(&mut self) -> &ClusterState {
        let mut slices = std::mem::take(&mut self.slices_changed);
        if std::mem::take(&mut self.nodes_changed) {
            let keys = self.entries.values().filter_map(|entry| entry.object.as_ref()).map(Object::key);
            slices = keys.filter(|key| &*key.kind == "EndpointSlice").collect();
        }
        if !slices.is_empty() {
            let ranges = self.ranges();
            slices.iter().for_each(|key| self.judge(&ranges, key));
        }
        &self.state
    }

    /// The blocks of nodes that are there.
    fn ranges(&self) -> PrefixMap<()> {
        PrefixMap::new(self.state.nodes().values().flat_map(|node| &node.pod_cidrs).map(|cidr| (*cidr, ())))
    }

    /// Puts a slice into the state, with endpoints that cannot be reached marked so.
    fn judge(&mut self, ranges: &PrefixMap<()>, key: &ObjectKey) {
        let object = self.entries.get(&self.keys.object(key)).and_then(|entry| entry.object.clone());
        let Some(Object::EndpointSlice(slice)) = object else { return };
        let lost = |address| {
            let address = Addr::from(address);
            within(&self.own.pod_cidrs, address) && ranges.lookup(address).is_none()
        };
        if !slice.endpoints.iter().any(|endpoint| lost(endpoint.address)) {
            return self.state.insert(Object::EndpointSlice(slice));
        }
        let mut judged = EndpointSlice::clone(&slice);
        for endpoint in judged.endpoints.iter_mut().filter(|endpoint| lost(endpoint.address)) {
            (endpoint.ready, endpoint.serving) = (false, false);
        }
        self.state.insert(Object::EndpointSlice(Arc::new(judged)));
    }

    /// Who holds which block.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// The nodes that are there.
    pub fn register(&self) -> &Register {
        &self.register
    }

    /// The value of `key`.
    pub fn value(&self, key: &str) -> Option<&str> {
        self.entries.get(key).map(|entry| entry.pair.value.as_str())
    }

    /// The object under `key`, as it was when it was last right.
    pub fn object(&self, key: &str) -> Option<&Object> {
        self.entries.get(key)?.object.as_ref()
    }

    /// The revision at which `key` was last written; 0 if it is not there.
    pub fn modified(&self, key: &str) -> i64 {
        self.entries.get(key).map_or(0, |entry| entry.pair.modified)
    }

    /// What is wrong.
    pub fn issues(&self) -> impl Iterator<Item = &SourceIssue> {
        self.entries.values().filter_map(|entry| entry.issue.as_ref())
    }

    /// Everything, to be kept.
    pub fn pairs(&self) -> Vec<Pair> {
        self.entries.values().map(|entry| entry.pair.clone()).collect()
    }

    /// How many keys there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }
}

/// The object in `pair`, which must be the one that its key names.
fn object(key: &ObjectKey, pair: &Pair) -> Result<Option<Object>, SourceIssue> {
    let issue = |reason: String| SourceIssue { file: pair.key.clone(), line: None, reason };
    let found = manifest::parse_json(&pair.key, &pair.value).map_err(|mut issues| issues.remove(0))?;
    match &found[..] {
        [] => Ok(None),
        [(_, object)] if object.key() == *key => Ok(Some(object.clone())),
        [(_, object)] => Err(issue(format!("it holds {}, which belongs under another key; `podgate apply` puts it there", object.key()))),
        _ => Err(issue("it holds several objects; `podgate apply` gives each its own key".into())),
    }
}

/// The machine that a node's object names, if a gateway registered it.
pub fn machine(node: &str) -> Option<String> {
    let node: Value = serde_json::from_str(node).ok()?;
    node["metadata"]["annotations"][MACHINE_ANNOTATION].as_str().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn store() -> Store {
        Store::new(Keys::new("/podgate"), Own { node: "me".into(), pod_cidrs: vec!["10.32.0.0/12".parse().unwrap()] })
    }

    fn pair(key: &str, value: Value, revision: i64) -> Pair {
        Pair { key: format!("/podgate/{key}"), value: value.to_string(), created: revision, modified: revision }
    }

    fn service(ip: &str) -> Value {
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "shop"}, "spec": {"clusterIP": ip, "ports": [{"port": 80}]}})
    }

    fn slice(addresses: &[&str]) -> Value {
        let endpoints: Vec<Value> = addresses.iter().map(|address| json!({"addresses": [address]})).collect();
        json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4", "ports": [{"port": 80}], "endpoints": endpoints,
               "metadata": {"name": "web-1", "namespace": "shop", "labels": {"kubernetes.io/service-name": "web"}}})
    }

    fn node(name: &str, cidr: &str) -> Value {
        json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "annotations": {MACHINE_ANNOTATION: format!("m-{name}")}},
               "spec": {"podCIDRs": [cidr]}})
    }

    fn ready(store: &mut Store) -> Vec<(bool, bool)> {
        let slices = store.state().slices(&ObjectName::new("shop", "web")).unwrap().clone();
        slices["web-1"].endpoints.iter().map(|endpoint| (endpoint.ready, endpoint.serving)).collect()
    }

    #[test]
    fn every_key_is_about_what_it_was_made_for() {
        let keys = Keys::new("/a/b");
        let web = ObjectKey { kind: "Service".into(), name: ObjectName::new("shop", "web") };
        assert_eq!(keys.object(&web), "/a/b/objects/Service/shop/web");
        assert_eq!(keys.node("n1"), "/a/b/objects/Node/n1");
        assert_eq!(keys.block("fd00:77::/64".parse().unwrap()), "/a/b/blocks/fd00:77::_64");
        assert!(matches!(keys.parse("/a/b/objects/Service/shop/web"), Some(Subject::Object(key)) if key == web));
        assert!(matches!(keys.parse("/a/b/blocks/fd00:77::_64"), Some(Subject::Block(block)) if block.to_string() == "fd00:77::/64"));
        for other in [
            "/a/b/objects/Service/web",
            "/a/b/objects/Node/x/n1",
            "/a/b/objects/Service/shop/web/x",
            "/a/b/blocks/x",
            "/a/b/cluster",
            "/a/c/blocks/x",
        ] {
            assert!(keys.parse(other).is_none(), "{other}");
        }
        assert_eq!(keys.of_kind("Service", Some("shop")), ("/a/b/objects/Service/shop/".into(), "/a/b/objects/Service/shop0".into()));
    }

    #[test]
    fn a_value_that_breaks_is_reported_and_the_last_good_one_stays_in_force_until_the_key_goes() {
        let mut store = store();
        store.put(pair("objects/Service/shop/web", service("10.96.0.1"), 1));
        store.put(pair("objects/Service/shop/web", service("oops"), 2));
        let ip = |store: &mut Store| store.state().services().values().map(|service| service.cluster_ips[0].to_string()).collect::<Vec<_>>();
        assert_eq!(ip(&mut store), ["10.96.0.1"]);
        let issues: Vec<String> = store.issues().map(ToString::to_string).collect();
        assert_eq!(issues, ["/podgate/objects/Service/shop/web:1: Service shop/web: spec.clusterIPs: `oops` is not an IP address"]);
        store.put(pair("objects/Service/shop/other", service("10.96.0.9"), 3));
        assert!(store.issues().any(|issue| issue.reason.contains("belongs under another key")));
        store.delete("/podgate/objects/Service/shop/web");
        assert_eq!((ip(&mut store).len(), store.issues().count()), (0, 1));
    }

    #[test]
    fn an_endpoint_in_a_block_of_a_node_that_is_not_there_is_neither_ready_nor_serving() {
        let mut store = store();
        store.put(pair("objects/EndpointSlice/shop/web-1", slice(&["10.32.1.5", "10.32.2.5", "192.0.2.7"]), 1));
        assert_eq!(ready(&mut store), [(false, false), (false, false), (true, true)], "the last is no pod's");
        store.put(pair("objects/Node/n1", node("n1", "10.32.1.0/24"), 2));
        assert_eq!(ready(&mut store), [(true, true), (false, false), (true, true)]);
        store.delete("/podgate/objects/Node/n1");
        assert_eq!(ready(&mut store), [(false, false), (false, false), (true, true)]);
        let own = manifest::parse_json("own", &node("me", "10.32.2.0/24").to_string()).unwrap().remove(0).1;
        store.set_own_node(own);
        assert_eq!(ready(&mut store), [(false, false), (true, true), (true, true)]);
    }

    #[test]
    fn this_node_is_what_it_knows_of_itself_whatever_etcd_says() {
        let mut store = store();
        let own = manifest::parse_json("own", &node("me", "10.32.2.0/24").to_string()).unwrap().remove(0).1;
        store.set_own_node(own);
        store.put(pair("objects/Node/me", node("me", "10.32.9.0/24"), 5));
        assert_eq!(store.state().nodes()["me"].pod_cidrs[0].to_string(), "10.32.2.0/24");
        assert_eq!(store.register()["me"], Registration { machine: "m-me".into(), term: 5 });
        store.delete("/podgate/objects/Node/me");
        assert_eq!(store.state().nodes()["me"].pod_cidrs[0].to_string(), "10.32.2.0/24");
        assert!(store.register().is_empty());
    }

    #[test]
    fn a_list_takes_away_what_it_does_not_have_and_equals_a_fresh_reading() {
        let pairs = vec![
            pair("objects/Service/shop/web", service("10.96.0.1"), 1),
            pair("objects/EndpointSlice/shop/web-1", slice(&["10.32.1.5"]), 2),
            pair("objects/Node/n1", node("n1", "10.32.1.0/24"), 3),
            pair("blocks/10.32.1.0_24", json!({"node": "n1", "machine": "m-n1", "term": 3}), 4),
        ];
        let mut store = store();
        store.replace(pairs.clone());
        assert_eq!((store.ledger().len(), store.register().len(), store.state().len()), (1, 1, 3));
        // Every part of it, in place of every other.
        for from in 0..16u32 {
            for to in 0..16u32 {
                let part =
                    |bits: u32| pairs.iter().enumerate().filter(|(at, _)| bits >> at & 1 == 1).map(|(_, pair)| pair.clone()).collect::<Vec<_>>();
                let (mut followed, mut fresh) = (self::store(), self::store());
                followed.replace(part(from));
                followed.state();
                followed.replace(part(to));
                fresh.replace(part(to));
                assert_eq!(followed.state(), fresh.state(), "{from:b} to {to:b}");
                assert_eq!((followed.ledger(), followed.register(), followed.pairs()), (fresh.ledger(), fresh.register(), fresh.pairs()));
            }
        }
    }
}
