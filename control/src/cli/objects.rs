//! `podgate apply`, `get` and `delete`: the cluster's objects in etcd, with kubectl's habits.
//!
//! They speak to the etcd that `source.etcd` of the configuration names, as a daemon with it would. With another source there is nothing for
//! them to do: files are edited, and an API server has kubectl. Everything that a command was given is checked before anything is written, by
//! the parser of the sources, so that no daemon gets what it would refuse.

use std::io::Read;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};
use tokio::time::timeout;

use super::{ConfigFile, Exit, Format, Output, put, table};
use crate::config::{Config, ConfigError, SourceConfig};
use crate::model::{ObjectKey, ObjectName};
use crate::source::SourceIssue;
use crate::source::etcd::client::{Client, EtcdError};
use crate::source::etcd::store::{Keys, is_cluster_wide};
use crate::source::etcd::wire::{Compare, EventKind, KeyValue, Op, TxnRequest};
use crate::source::manifest::{Written, parse_written};

/// How long a watch is relied upon before it is opened anew.
const WATCH_LIFETIME: Duration = Duration::from_secs(20);
/// How often a write is tried that somebody else's got in the way of.
const ATTEMPTS: usize = 5;
/// As the API server's default.
const NAMESPACE: &str = "default";

/// `podgate apply`.
#[derive(Debug, Args)]
pub struct Apply {
    /// A file of manifests, YAML or JSON; `-` for stdin. May be given several times
    #[arg(short, long = "filename", value_name = "FILE", required = true)]
    filename: Vec<PathBuf>,
    /// The namespace of objects that name none
    #[arg(short, long, default_value = NAMESPACE)]
    namespace: String,
    /// The node's configuration, which names etcd
    #[command(flatten)]
    config: ConfigFile,
}

/// `podgate get`.
#[derive(Debug, Args)]
pub struct Get {
    /// services, endpointslices, nodes, networkpolicies, or a short form (svc, eps, no, netpol)
    #[arg(value_parser = kind)]
    kind: &'static Kind,
    /// One object by its name
    name: Option<String>,
    /// Its namespace
    #[arg(short, long, default_value = NAMESPACE)]
    namespace: String,
    /// Of every namespace
    #[arg(short = 'A', long, conflicts_with = "name")]
    all_namespaces: bool,
    /// Go on and print what changes
    #[arg(short, long)]
    watch: bool,
    /// How to print
    #[command(flatten)]
    output: Output,
    /// The node's configuration, which names etcd
    #[command(flatten)]
    config: ConfigFile,
}

/// `podgate delete`.
#[derive(Debug, Args)]
pub struct Delete {
    /// What kind of object, as for `podgate get`
    #[arg(value_parser = kind, required_unless_present = "filename", conflicts_with = "filename", requires = "names")]
    kind: Option<&'static Kind>,
    /// Which
    #[arg(value_name = "NAME")]
    names: Vec<String>,
    /// The objects in this file, YAML or JSON; `-` for stdin. May be given several times
    #[arg(short, long = "filename", value_name = "FILE")]
    filename: Vec<PathBuf>,
    /// The namespace of objects that name none
    #[arg(short, long, default_value = NAMESPACE)]
    namespace: String,
    /// That an object is not there is no failure
    #[arg(long)]
    ignore_not_found: bool,
    /// The node's configuration, which names etcd
    #[command(flatten)]
    config: ConfigFile,
}

/// A kind of objects that can be stored.
#[derive(Debug, PartialEq, Eq)]
pub struct Kind {
    kind: &'static str,
    /// As kubectl calls one in its messages.
    resource: &'static str,
    /// As people call them; the first is the plural.
    names: &'static [&'static str],
}

static KINDS: [Kind; 4] = [
    Kind { kind: "Service", resource: "service", names: &["services", "service", "svc"] },
    Kind { kind: "EndpointSlice", resource: "endpointslice.discovery.k8s.io", names: &["endpointslices", "endpointslice", "eps"] },
    Kind { kind: "Node", resource: "node", names: &["nodes", "node", "no"] },
    Kind { kind: "NetworkPolicy", resource: "networkpolicy.networking.k8s.io", names: &["networkpolicies", "networkpolicy", "netpol"] },
];

fn kind(text: &str) -> Result<&'static Kind, String> {
    let wanted = text.to_lowercase();
    let found = KINDS.iter().find(|kind| kind.names.contains(&wanted.as_str()));
    found.ok_or_else(|| format!("there is no such kind; write one of {}", KINDS.each_ref().map(|kind| kind.names[0]).join(", ")))
}

fn resource(kind: &str) -> &str {
    KINDS.iter().find(|known| known.kind == kind).map_or(kind, |known| known.resource)
}

/// Why a command about objects failed.
#[derive(Debug, thiserror::Error)]
pub enum ObjectsError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// etcd.
    #[error(transparent)]
    Etcd(#[from] EtcdError),
    /// The source is a directory.
    #[error(
        "the cluster's objects are the files in {0} (`source.directory` in {1}): edit them there; every change takes effect when the file is written"
    )]
    Directory(String, String),
    /// The source is an API server.
    #[error("the cluster's objects are the API server's (`source.kubernetes` in {0}): use kubectl")]
    Kubernetes(String),
    /// A file cannot be read.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: String,
        /// What the kernel says.
        source: std::io::Error,
    },
    /// Objects that are wrong; nothing was written.
    #[error("{}\nnothing was changed", lines(.0))]
    Wrong(Vec<SourceIssue>),
    /// Files without an object.
    #[error("there is no object in {0}")]
    Nothing(String),
    /// There is no such object.
    #[error("{0} \"{1}\" not found")]
    NotFound(String, String),
    /// A node's own object.
    #[error(
        "node \"{0}\" registers itself, as long as its daemon runs: its object cannot be written or deleted by hand. It goes when the daemon has ended"
    )]
    Registered(String),
    /// Somebody writes all the time.
    #[error("{0} was changed by somebody else each time it was to be written; try again")]
    Contended(String),
    /// No threads or timers.
    #[error("cannot start: {0}")]
    Runtime(std::io::Error),
}

fn lines(issues: &[SourceIssue]) -> String {
    issues.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

/// Runs `podgate apply`.
pub fn apply(words: &Apply) -> Exit {
    run(&words.config, async |session| {
        for written in read_all(&words.filename, &words.namespace)? {
            let done = session.apply(&written).await?;
            put(&format!("{}/{} {done}\n", resource(&written.key.kind), written.key.name.name));
        }
        Ok(Exit::Ok)
    })
}

/// Runs `podgate delete`.
pub fn delete(words: &Delete) -> Exit {
    run(&words.config, async |session| {
        let keys: Vec<ObjectKey> = match words.kind {
            Some(kind) => words.names.iter().map(|name| key(kind, &words.namespace, name)).collect(),
            None => read_all(&words.filename, &words.namespace)?.into_iter().map(|written| written.key).collect(),
        };
        let mut exit = Exit::Ok;
        for key in keys {
            let name = &key.name.name;
            if session.delete(&key).await? {
                put(&format!("{} \"{name}\" deleted\n", resource(&key.kind)));
            } else if !words.ignore_not_found {
                eprintln!("podgate: {}", ObjectsError::NotFound(resource(&key.kind).into(), name.to_string()));
                exit = Exit::Failed;
            }
        }
        Ok(exit)
    })
}

/// Runs `podgate get`.
pub fn get(words: &Get) -> Exit {
    run(&words.config, async |session| session.get(words).await)
}

fn key(kind: &Kind, namespace: &str, name: &str) -> ObjectKey {
    let namespace = if is_cluster_wide(kind.kind) { "" } else { namespace };
    ObjectKey { kind: kind.kind.into(), name: ObjectName::new(namespace, name) }
}

fn run(file: &ConfigFile, work: impl AsyncFnOnce(&Session) -> Result<Exit, ObjectsError>) -> Exit {
    let done = (|| {
        let session = Session::new(file)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(ObjectsError::Runtime)?;
        runtime.block_on(work(&session))
    })();
    done.unwrap_or_else(|error| {
        eprintln!("podgate: {error}");
        Exit::Failed
    })
}

/// Every object in these files, in their order.
fn read_all(files: &[PathBuf], namespace: &str) -> Result<Vec<Written>, ObjectsError> {
    let (mut all, mut issues) = (Vec::new(), Vec::new());
    for path in files {
        let (name, read) = if path.as_os_str() == "-" {
            let mut text = String::new();
            ("stdin".to_owned(), std::io::stdin().read_to_string(&mut text).map(|_| text))
        } else {
            (path.display().to_string(), std::fs::read_to_string(path))
        };
        let text = read.map_err(|source| ObjectsError::File { path: name.clone(), source })?;
        match parse_written(&name, &text) {
            Ok(written) => all.extend(written.into_iter().map(|written| in_namespace(written, namespace))),
            Err(found) => issues.extend(found),
        }
    }
    if !issues.is_empty() {
        return Err(ObjectsError::Wrong(issues));
    }
    if all.is_empty() {
        return Err(ObjectsError::Nothing(files.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")));
    }
    Ok(all)
}

/// The object with the namespace written out.
fn in_namespace(mut written: Written, namespace: &str) -> Written {
    let metadata = &mut written.value["metadata"];
    if is_cluster_wide(&written.key.kind) {
        metadata.as_object_mut().map(|metadata| metadata.remove("namespace"));
    } else {
        if metadata["namespace"].as_str().is_none_or(str::is_empty) {
            metadata["namespace"] = namespace.into();
        }
        let namespace = metadata["namespace"].as_str().unwrap_or(namespace).to_owned();
        written.key.name = ObjectName::new(&namespace, &written.key.name.name);
    }
    // What the store says is not to be written back into it.
    for stored in ["resourceVersion", "uid", "managedFields", "generation", "selfLink", "creationTimestamp"] {
        written.value["metadata"].as_object_mut().map(|metadata| metadata.remove(stored));
    }
    written
}

/// An etcd and a prefix.
struct Session {
    client: Client,
    keys: Keys,
}

impl Session {
    fn new(file: &ConfigFile) -> Result<Session, ObjectsError> {
        let config = Config::load(&file.config)?;
        let shown = || file.config.display().to_string();
        match &config.source {
            SourceConfig::Etcd(etcd) => Ok(Session { client: Client::new(etcd)?, keys: Keys::new(&etcd.prefix) }),
            SourceConfig::Directory(path) => Err(ObjectsError::Directory(path.display().to_string(), shown())),
            SourceConfig::Kubernetes { .. } => Err(ObjectsError::Kubernetes(shown())),
        }
    }

    /// Puts an object in place; what became of it, in kubectl's word.
    async fn apply(&self, written: &Written) -> Result<&'static str, ObjectsError> {
        let path = self.keys.object(&written.key);
        for _ in 0..ATTEMPTS {
            let found = self.client.read(&path).await?;
            refuse_registered(&written.key, found.as_ref())?;
            let before = found.as_ref().map(value);
            let mut next = written.value.clone();
            let created = before.as_ref().and_then(|before| before["metadata"]["creationTimestamp"].as_str()).map(str::to_owned);
            next["metadata"]["creationTimestamp"] = created.unwrap_or_else(now).into();
            if before.as_ref() == Some(&next) {
                return Ok("unchanged");
            }
            let modified = found.map_or(0, |kv| kv.mod_revision.0);
            let txn = TxnRequest {
                compare: vec![Compare::modified(&path, modified)],
                success: vec![Op::put(&path, &next.to_string(), 0)],
                ..TxnRequest::default()
            };
            if self.client.txn(&txn).await?.succeeded {
                return Ok(if before.is_some() { "configured" } else { "created" });
            }
        }
        Err(ObjectsError::Contended(written.key.to_string()))
    }

    /// Takes an object away; whether it was there.
    async fn delete(&self, key: &ObjectKey) -> Result<bool, ObjectsError> {
        let path = self.keys.object(key);
        for _ in 0..ATTEMPTS {
            let Some(found) = self.client.read(&path).await? else { return Ok(false) };
            refuse_registered(key, Some(&found))?;
            let compare = vec![Compare::modified(&path, found.mod_revision.0)];
            if self.client.txn(&TxnRequest { compare, success: vec![Op::delete(&path)], ..TxnRequest::default() }).await?.succeeded {
                return Ok(true);
            }
        }
        Err(ObjectsError::Contended(key.to_string()))
    }

    async fn get(&self, words: &Get) -> Result<Exit, ObjectsError> {
        let namespace = (!words.all_namespaces && !is_cluster_wide(words.kind.kind)).then_some(words.namespace.as_str());
        let (first, end) = match &words.name {
            // The key alone: nothing else lies before the one that a NUL makes of it.
            Some(name) => {
                let path = self.keys.object(&key(words.kind, &words.namespace, name));
                (path.clone(), format!("{path}\0"))
            }
            None => self.keys.of_kind(words.kind.kind, namespace),
        };
        let listing = self.client.list(&first, &end).await?;
        let objects: Vec<Value> = listing.kvs.iter().map(shown).collect();
        if let (Some(name), true) = (&words.name, objects.is_empty()) {
            return Err(ObjectsError::NotFound(words.kind.names[0].into(), name.clone()));
        }
        let exit = put(&print(words, &objects, Title::Shown));
        if objects.is_empty() && matches!(words.output.format, Format::Table | Format::Wide) && !words.watch {
            match namespace {
                Some(namespace) => eprintln!("No resources found in {namespace} namespace."),
                None => eprintln!("No resources found."),
            }
        }
        if words.watch { self.watch(words, (&first, &end), listing.revision).await } else { Ok(exit) }
    }

    /// Prints what changes, until nobody reads it any more.
    async fn watch(&self, words: &Get, (first, end): (&str, &str), mut revision: i64) -> Result<Exit, ObjectsError> {
        loop {
            let mut watch = match self.client.watch(first, end, revision + 1).await {
                // What is missed is told by the objects as they are now.
                Err(EtcdError::Compacted { .. }) => {
                    let listing = self.client.list(first, end).await?;
                    revision = listing.revision;
                    put(&print(words, &listing.kvs.iter().map(shown).collect::<Vec<_>>(), Title::Hidden));
                    continue;
                }
                watch => watch?,
            };
            let until = tokio::time::Instant::now() + WATCH_LIFETIME;
            while let Ok(response) = tokio::time::timeout_at(until, watch.next()).await {
                let events = match response {
                    Ok(response) => response.events,
                    Err(EtcdError::Broken { .. } | EtcdError::Compacted { .. }) => break,
                    Err(error) => return Err(error.into()),
                };
                for event in events {
                    revision = revision.max(event.kv.mod_revision.0);
                    let object = match event.kind {
                        EventKind::Put => shown(&event.kv),
                        EventKind::Delete => gone(&event.kv),
                    };
                    if put(&print(words, &[object], Title::Hidden)) != Exit::Ok {
                        return Ok(Exit::Failed);
                    }
                }
            }
            // Before the next one, so that an etcd that is away is not asked without a pause.
            let _ = timeout(Duration::from_millis(100), std::future::pending::<()>()).await;
        }
    }
}

fn refuse_registered(key: &ObjectKey, found: Option<&KeyValue>) -> Result<(), ObjectsError> {
    match found {
        Some(found) if &*key.kind == "Node" && found.lease.0 != 0 => Err(ObjectsError::Registered(key.name.name.to_string())),
        _ => Ok(()),
    }
}

fn value(kv: &KeyValue) -> Value {
    serde_json::from_slice(&kv.value.0).unwrap_or(Value::Null)
}

/// As it is shown: with what the store knows of it.
fn shown(kv: &KeyValue) -> Value {
    let mut object = value(kv);
    if object.is_object() {
        object["metadata"]["resourceVersion"] = kv.mod_revision.0.to_string().into();
    }
    object
}

/// Of an object that is gone, its name is all there is.
fn gone(kv: &KeyValue) -> Value {
    let path = String::from_utf8_lossy(&kv.key.0).into_owned();
    let mut parts = path.rsplit('/');
    let (name, namespace) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    json!({"metadata": {"name": name, "namespace": namespace, "deletionTimestamp": now()}})
}

fn now() -> String {
    Timestamp::from_second(unix_now()).unwrap_or_default().to_string()
}

fn unix_now() -> i64 {
    crate::source::unix_now().cast_signed()
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Title {
    Shown,
    Hidden,
}

/// The objects as they are asked for.
fn print(words: &Get, objects: &[Value], title: Title) -> String {
    match words.output.format {
        format @ (Format::Json | Format::Yaml) => match (objects, title, &words.name) {
            ([one], Title::Hidden, _) | ([one], _, Some(_)) => table::raw(one, format),
            _ => table::raw(&json!({"apiVersion": "v1", "kind": "List", "metadata": {"resourceVersion": ""}, "items": objects}), format),
        },
        format => {
            if objects.is_empty() {
                return String::new();
            }
            let namespaces = words.all_namespaces && !is_cluster_wide(words.kind.kind);
            let columns = columns(words.kind.kind, format == Format::Wide, namespaces);
            let rows: Vec<Value> = objects.iter().map(|object| row(words.kind.kind, object)).collect();
            let text = table::plain(&columns, &rows);
            if title == Title::Shown { text } else { text.lines().skip(1).map(|line| format!("{line}\n")).collect() }
        }
    }
}

/// A title and the field of a row.
type Column = (&'static str, &'static str);

fn columns(kind: &str, wide: bool, namespaces: bool) -> Vec<Column> {
    let (usual, further): (&[Column], &[Column]) = match kind {
        "Service" => (
            &[("NAME", "name"), ("TYPE", "type"), ("CLUSTER-IP", "clusterIP"), ("EXTERNAL-IP", "externalIP"), ("PORT(S)", "ports"), ("AGE", "age")],
            &[("POLICY", "policy")],
        ),
        "EndpointSlice" => (
            &[("NAME", "name"), ("ADDRESSTYPE", "addressType"), ("PORTS", "ports"), ("ENDPOINTS", "endpoints"), ("AGE", "age")],
            &[("SERVICE", "service"), ("NODES", "nodes")],
        ),
        "Node" => (
            &[("NAME", "name"), ("STATUS", "status"), ("INTERNAL-IP", "internalIP"), ("POD-CIDRS", "podCIDRs")],
            &[("OVERLAY", "overlay"), ("MACHINE", "machine")],
        ),
        _ => (&[("NAME", "name"), ("POD-SELECTOR", "podSelector"), ("AGE", "age")], &[]),
    };
    let namespace: &[Column] = if namespaces { &[("NAMESPACE", "namespace")] } else { &[] };
    [namespace, usual, if wide { further } else { &[] }].concat()
}

/// A row of the table of its kind.
fn row(kind: &str, object: &Value) -> Value {
    let (metadata, spec) = (&object["metadata"], &object["spec"]);
    let texts = |list: &Value, of: &dyn Fn(&Value) -> String| list.as_array().into_iter().flatten().map(of).collect::<Vec<_>>();
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let joined = |list: Vec<String>| if list.is_empty() { Value::Null } else { Value::from(list.join(",")) };
    let mut row = json!({
        "name": metadata["name"],
        "namespace": metadata["namespace"],
        "age": if metadata["deletionTimestamp"].is_string() { Value::from("deleted") } else { age(metadata["creationTimestamp"].as_str()) },
    });
    match kind {
        "Service" => {
            let ports = texts(&spec["ports"], &|port| {
                let node_port = port["nodePort"].as_u64().map_or(String::new(), |node_port| format!(":{node_port}"));
                format!("{}{node_port}/{}", port["port"], port["protocol"].as_str().unwrap_or("TCP"))
            });
            let ingress = texts(&object["status"]["loadBalancer"]["ingress"], &|ingress| text(&ingress["ip"]));
            row["type"] = spec["type"].as_str().unwrap_or("ClusterIP").into();
            row["clusterIP"] = spec["clusterIP"].clone();
            row["externalIP"] = joined([texts(&spec["externalIPs"], &text), ingress].concat());
            row["ports"] = joined(ports);
            row["policy"] = spec["externalTrafficPolicy"].clone();
        }
        "EndpointSlice" => {
            row["addressType"] = object["addressType"].clone();
            row["ports"] = joined(texts(&object["ports"], &|port| text(&port["port"])));
            row["endpoints"] = joined(texts(&object["endpoints"], &|endpoint| text(&endpoint["addresses"][0])));
            row["service"] = metadata["labels"]["kubernetes.io/service-name"].clone();
            row["nodes"] = joined(texts(&object["endpoints"], &|endpoint| endpoint["nodeName"].as_str().unwrap_or("-").to_owned()));
        }
        "Node" => {
            let annotations = &metadata["annotations"];
            let machine = &annotations[crate::source::etcd::store::MACHINE_ANNOTATION];
            let deleted = metadata["deletionTimestamp"].is_string();
            row["status"] = if deleted {
                "Gone"
            } else if machine.is_string() {
                "Registered"
            } else {
                "ByHand"
            }
            .into();
            row["internalIP"] = joined(texts(&object["status"]["addresses"], &|address| text(&address["address"])));
            row["podCIDRs"] = joined(texts(&spec["podCIDRs"], &text));
            row["overlay"] = annotations[crate::model::OVERLAY_ANNOTATION].clone();
            row["machine"] = machine.clone();
        }
        _ => {
            let labels = spec["podSelector"]["matchLabels"].as_object().into_iter().flatten();
            let selector = labels.map(|(key, value)| format!("{key}={}", text(value))).collect::<Vec<_>>();
            row["podSelector"] = if selector.is_empty() { "<none>".into() } else { selector.join(",").into() };
        }
    }
    row
}

/// As kubectl says how old something is: two units for young things, one for old ones.
fn age(created: Option<&str>) -> Value {
    let Some(created) = created.and_then(|text| text.parse::<Timestamp>().ok()) else { return Value::Null };
    let seconds = (unix_now() - created.as_second()).max(0);
    let text = match seconds {
        0..120 => format!("{seconds}s"),
        120..600 if seconds % 60 != 0 => format!("{}m{}s", seconds / 60, seconds % 60),
        120..10_800 => format!("{}m", seconds / 60),
        10_800..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    };
    text.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_of_a_kind_is_known_in_any_case_and_others_are_told_what_there_is() {
        assert_eq!(kind("svc").unwrap().kind, "Service");
        assert_eq!(kind("NetworkPolicies").unwrap().kind, "NetworkPolicy");
        assert_eq!(kind("pods").unwrap_err(), "there is no such kind; write one of services, endpointslices, nodes, networkpolicies");
    }

    #[test]
    fn a_namespace_is_filled_in_where_there_is_none_and_what_the_store_added_is_left_out() {
        let text = "apiVersion: v1\nkind: Service\nmetadata: {name: web, resourceVersion: \"7\", creationTimestamp: 2026-01-01T00:00:00Z}\nspec: {clusterIP: 10.96.0.1, ports: [{port: 80}]}\n\
                    ---\napiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\nspec: {clusterIP: 10.96.0.2, ports: [{port: 80}]}\n";
        let written: Vec<Written> = parse_written("a.yaml", text).unwrap().into_iter().map(|w| in_namespace(w, "lab")).collect();
        assert_eq!(written.iter().map(|w| w.key.to_string()).collect::<Vec<_>>(), ["Service lab/web", "Service shop/web"]);
        assert_eq!(written[0].value["metadata"], json!({"name": "web", "namespace": "lab"}));
    }

    #[test]
    fn rows_say_what_kubectl_says() {
        let service = json!({"metadata": {"name": "web"}, "spec": {"type": "NodePort", "clusterIP": "10.96.0.1", "ports": [{"port": 80, "nodePort": 30080}, {"port": 53, "protocol": "UDP"}]}});
        let text = table::plain(&columns("Service", false, false), &[row("Service", &service)]);
        assert_eq!(
            text,
            "NAME   TYPE       CLUSTER-IP   EXTERNAL-IP   PORT(S)               AGE\n\
             web    NodePort   10.96.0.1    -             80:30080/TCP,53/UDP   -\n"
        );
        for (ago, expected) in [(5, "5s"), (119, "119s"), (125, "2m5s"), (3600, "60m"), (7_200 * 2, "4h"), (400_000, "4d")] {
            let created = Timestamp::from_second(unix_now() - ago).unwrap().to_string();
            assert_eq!(age(Some(&created)), expected);
        }
    }

    #[test]
    fn a_file_with_anything_wrong_in_it_is_refused_with_every_line_before_anything_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.yaml");
        std::fs::write(&path, "kind: Service\napiVersion: v1\nmetadata: {name: a}\nspec: {clusterIP: oops}\n---\nkind: Deployment\napiVersion: apps/v1\nmetadata: {name: b}\n").unwrap();
        let error = read_all(std::slice::from_ref(&path), NAMESPACE).unwrap_err().to_string();
        let shown = path.display();
        assert_eq!(
            error,
            format!(
                "{shown}:1: Service default/a: spec.clusterIPs: `oops` is not an IP address\n\
                 {shown}:5: a Deployment is not stored; there are Service, EndpointSlice, Node and NetworkPolicy\nnothing was changed"
            )
        );
    }
}
