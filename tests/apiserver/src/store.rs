//! The objects, and the history of what became of them.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use tokio::sync::watch;

use crate::resources::{RESOURCES, Resource};
use crate::status::Refusal;
use crate::{defaults, lock};

/// So much history is kept; a watch from before it meets 410.
const HISTORY: usize = 10_000;
/// So many lists can be read page by page at a time; the oldest is forgotten, and its next page meets 410.
const LISTINGS: usize = 64;

/// The qualified resource, the namespace and the name.
type Key = (String, String, String);

/// What happened to an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    Added,
    Modified,
    Deleted,
}

/// Something that happened.
#[derive(Clone, Debug)]
pub(crate) struct Event {
    pub version: u64,
    pub change: Change,
    /// As it is now, or as it last was.
    pub object: Arc<Value>,
    /// As it was before.
    pub before: Option<Arc<Value>>,
    resource: &'static str,
    group: &'static str,
}

/// A part of a list.
pub(crate) struct Part {
    pub version: u64,
    pub objects: Vec<Arc<Value>>,
    /// By which the rest can be asked for, and how much that is.
    pub next: Option<(String, usize)>,
}

pub(crate) struct Store {
    inner: Mutex<Inner>,
    /// The newest version.
    changed: watch::Sender<u64>,
}

#[derive(Default)]
struct Inner {
    objects: BTreeMap<Key, Arc<Value>>,
    version: u64,
    history: VecDeque<Event>,
    /// What happened up to here is forgotten.
    forgotten: u64,
    /// Lists that are being read, with the version they are of, by number.
    listings: BTreeMap<u64, (u64, Vec<Arc<Value>>)>,
    numbers: u64,
}

impl Store {
    pub fn new() -> Store {
        let store = Store { inner: Mutex::default(), changed: watch::Sender::new(0) };
        for name in ["default", "kube-system", "kube-public", "kube-node-lease"] {
            store.put(json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}));
        }
        store
    }

    /// Tells of every new version.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    pub fn version(&self) -> u64 {
        lock(&self.inner).version
    }

    /// Works on the objects, and tells watchers afterwards.
    fn change<T>(&self, work: impl FnOnce(&mut Inner) -> T) -> T {
        let mut inner = lock(&self.inner);
        let result = work(&mut inner);
        let version = inner.version;
        drop(inner);
        self.changed.send_if_modified(|known| std::mem::replace(known, version) != version);
        result
    }

    pub fn find(&self, resource: &Resource, namespace: &str, name: &str) -> Option<Arc<Value>> {
        lock(&self.inner).objects.get(&key(resource, namespace, name)).cloned()
    }

    pub fn create(&self, resource: &'static Resource, namespace: &str, mut object: Value) -> Result<Arc<Value>, Refusal> {
        self.change(|inner| {
            if resource.namespaced && !inner.objects.contains_key(&("namespaces".into(), String::new(), namespace.into())) {
                return Err(Refusal::not_found(&RESOURCES[0], namespace));
            }
            inner.numbers += 1;
            let number = inner.numbers;
            defaults::identity(resource, namespace, &mut object, number);
            let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
            if name.is_empty() {
                return Err(Refusal::invalid(resource, "", "metadata.name: Required value: name or generateName is required"));
            }
            let key = key(resource, namespace, &name);
            if inner.objects.contains_key(&key) {
                return Err(Refusal::already_exists(resource, &name));
            }
            defaults::fill(resource, &mut object, |path, value| inner.taken(path, value));
            Ok(inner.write(resource, key, object))
        })
    }

    /// Replaces an object by what `make` makes of it. What changes nothing makes no event.
    pub fn update(
        &self,
        resource: &'static Resource,
        namespace: &str,
        name: &str,
        make: impl FnOnce(&Value) -> Result<Value, Refusal>,
    ) -> Result<Arc<Value>, Refusal> {
        self.change(|inner| {
            let key = key(resource, namespace, name);
            let known = inner.objects.get(&key).cloned().ok_or_else(|| Refusal::not_found(resource, name))?;
            let mut object = make(&known)?;
            let asked = object["metadata"]["resourceVersion"].as_str().unwrap_or_default();
            if !asked.is_empty() && known["metadata"]["resourceVersion"] != asked {
                return Err(Refusal::conflict(resource, name));
            }
            if object["metadata"]["name"] != name {
                return Err(Refusal::bad_request("the name of the object does not match the name on the URL"));
            }
            for kept in ["resourceVersion", "uid", "creationTimestamp", "namespace"] {
                match known["metadata"].get(kept) {
                    Some(value) => object["metadata"][kept] = value.clone(),
                    None => drop(object["metadata"].as_object_mut().and_then(|metadata| metadata.remove(kept))),
                }
            }
            defaults::carry_over(resource, &known, &mut object);
            defaults::fill(resource, &mut object, |path, value| inner.taken(path, value));
            if object == *known { Ok(known) } else { Ok(inner.write(resource, key, object)) }
        })
    }

    pub fn delete(&self, resource: &'static Resource, namespace: &str, name: &str) -> Result<Arc<Value>, Refusal> {
        self.change(|inner| {
            let removed = inner.remove(resource, key(resource, namespace, name)).ok_or_else(|| Refusal::not_found(resource, name))?;
            if resource.plural == "namespaces" {
                for resource in RESOURCES.iter().filter(|resource| resource.namespaced) {
                    let inside: Vec<Key> = inner.of(resource).filter(|(key, _)| key.1 == name).map(|(key, _)| key.clone()).collect();
                    for key in inside {
                        inner.remove(resource, key);
                    }
                }
            }
            Ok(removed)
        })
    }

    /// Everything that `wanted` takes, up to `limit`.
    pub fn list(&self, resource: &Resource, limit: usize, wanted: impl Fn(&str, &Value) -> bool) -> Part {
        let mut inner = lock(&self.inner);
        let objects: Vec<Arc<Value>> = inner.of(resource).filter(|(key, object)| wanted(&key.1, object)).map(|(_, object)| object.clone()).collect();
        let version = inner.version;
        if limit == 0 || objects.len() <= limit {
            return Part { version, objects, next: None };
        }
        inner.numbers += 1;
        let number = inner.numbers;
        inner.listings.insert(number, (version, objects));
        while inner.listings.len() > LISTINGS {
            inner.listings.pop_first();
        }
        inner.part(number, 0, limit).unwrap_or(Part { version, objects: Vec::new(), next: None })
    }

    /// The rest of a list, as it was when it began.
    pub fn list_on(&self, token: &str, limit: usize) -> Result<Part, Refusal> {
        let inner = lock(&self.inner);
        let parsed = token.split_once('.').and_then(|(number, offset)| Some((number.parse().ok()?, offset.parse().ok()?)));
        let (number, offset) = parsed.ok_or_else(|| Refusal::bad_request("continue key is not valid"))?;
        let message = "The provided continue parameter is too old to display a consistent list result. You must start a new list without it.";
        inner.part(number, offset, if limit == 0 { usize::MAX } else { limit }).ok_or_else(|| Refusal::new(410, "Expired", message))
    }

    /// What happened to a resource after `version`.
    pub fn since(&self, resource: &Resource, version: u64) -> Result<Vec<Event>, Refusal> {
        let inner = lock(&self.inner);
        if version < inner.forgotten {
            return Err(Refusal::gone(version, inner.forgotten));
        }
        let start = inner.history.partition_point(|event| event.version <= version);
        let of = |event: &&Event| event.resource == resource.plural && event.group == resource.group;
        Ok(inner.history.range(start..).filter(of).cloned().collect())
    }

    pub fn compact(&self) {
        let mut inner = lock(&self.inner);
        inner.forgotten = inner.version;
        inner.history.clear();
        inner.listings.clear();
    }

    pub fn put(&self, mut object: Value) {
        let find = |resource: &&Resource| object["kind"] == resource.kind && object["apiVersion"] == resource.api_version();
        let resource = RESOURCES.iter().find(find).expect("the server knows the kind of what is put into it");
        let namespace = match (resource.namespaced, object["metadata"]["namespace"].as_str()) {
            (true, given) => given.unwrap_or("default").to_owned(),
            (false, _) => String::new(),
        };
        let name = object["metadata"]["name"].as_str().expect("what is put has a name").to_owned();
        self.change(|inner| {
            let of_namespace = ("namespaces".to_owned(), String::new(), namespace.clone());
            if resource.namespaced && !inner.objects.contains_key(&of_namespace) {
                let made = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}, "status": {"phase": "Active"}});
                inner.write(&RESOURCES[0], of_namespace, made);
            }
            inner.numbers += 1;
            let number = inner.numbers;
            defaults::identity(resource, &namespace, &mut object, number);
            inner.write(resource, key(resource, &namespace, &name), object);
        });
    }

    pub fn delete_named(&self, plural: &str, namespace: &str, name: &str) -> bool {
        let Some(resource) = RESOURCES.iter().find(|resource| resource.plural == plural) else { return false };
        self.delete(resource, namespace, name).is_ok()
    }

    pub fn objects(&self, plural: &str) -> Vec<Value> {
        let inner = lock(&self.inner);
        let resources = RESOURCES.iter().filter(|resource| resource.plural == plural);
        resources.flat_map(|resource| inner.of(resource)).map(|(_, object)| (**object).clone()).collect()
    }
}

impl Inner {
    fn of<'a>(&'a self, resource: &Resource) -> impl Iterator<Item = (&'a Key, &'a Arc<Value>)> + use<'a> {
        let qualified = resource.qualified();
        let first = (qualified.clone(), String::new(), String::new());
        let range = self.objects.range((Bound::Included(first), Bound::Unbounded));
        range.take_while(move |(key, _)| key.0 == qualified)
    }

    /// Whether a service has `value` at `path` already.
    fn taken(&self, path: &str, value: &Value) -> bool {
        self.objects.iter().filter(|(key, _)| key.0 == "services").any(|(_, service)| match path {
            "nodePort" => service["spec"]["ports"].as_array().into_iter().flatten().any(|port| port["nodePort"] == *value),
            _ => service["spec"][path] == *value,
        })
    }

    fn write(&mut self, resource: &'static Resource, key: Key, mut object: Value) -> Arc<Value> {
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        let object = Arc::new(object);
        let before = self.objects.insert(key, object.clone());
        let change = if before.is_some() { Change::Modified } else { Change::Added };
        self.note(resource, change, object.clone(), before);
        object
    }

    fn remove(&mut self, resource: &'static Resource, key: Key) -> Option<Arc<Value>> {
        let before = self.objects.remove(&key)?;
        self.version += 1;
        // The version of a removal is its own, not the object's last one: a watch goes on from there.
        let mut last = (*before).clone();
        last["metadata"]["resourceVersion"] = json!(self.version.to_string());
        let last = Arc::new(last);
        self.note(resource, Change::Deleted, last.clone(), Some(before));
        Some(last)
    }

    fn note(&mut self, resource: &'static Resource, change: Change, object: Arc<Value>, before: Option<Arc<Value>>) {
        self.history.push_back(Event { version: self.version, change, object, before, resource: resource.plural, group: resource.group });
        if self.history.len() > HISTORY
            && let Some(oldest) = self.history.pop_front()
        {
            self.forgotten = oldest.version;
        }
    }

    fn part(&self, number: u64, offset: usize, limit: usize) -> Option<Part> {
        let (version, all) = self.listings.get(&number)?;
        let end = offset.saturating_add(limit).min(all.len());
        let objects = all.get(offset..end)?.to_vec();
        let next = (end < all.len()).then(|| (format!("{number}.{end}"), all.len() - end));
        Some(Part { version: *version, objects, next })
    }
}

fn key(resource: &Resource, namespace: &str, name: &str) -> Key {
    (resource.qualified(), if resource.namespaced { namespace.to_owned() } else { String::new() }, name.to_owned())
}
