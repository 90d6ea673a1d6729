//! The cluster's objects in etcd, for several bare VMs that share it; and this node among them.
//!
//! One list and one watch cover everything under the prefix: objects, nodes and blocks ([`store`] says where each is). The node registers its
//! own `Node` under a lease ([`lease`]) and holds blocks of the cluster's ranges ([`crate::blocks`] decides which). Every write is a
//! transaction on what the node has seen; having written, it waits until the watch has told it so before it decides again.
//!
//! - *A dead connection* is noticed within 30 s: a watch is opened anew every [`WATCH_LIFETIME`], from the revision up to which everything
//!   was seen, which loses nothing. With a broken one the same is tried at once, then less and less often.
//! - *Compaction* ends a watch that is too far behind: then everything is listed.
//! - *A list that takes more than half away* needs a second one that agrees: an etcd that was set up anew is not to empty every node by one
//!   answer.
//! - *While etcd is away* the last state stays in force; it is on the disk as well ([`Cache`]), for a node that starts meanwhile. Addresses
//!   are given out only as long as it is sure that nobody else can have been given the block ([`Tenure`]).
//!
//! Read first: etcd's `Documentation/learning/api.md`, `api_guarantees.md`.

pub(crate) mod client;
mod endpoint;
mod lease;
mod machine;
mod node;
mod published;
pub(crate) mod store;
pub(crate) mod wire;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{sleep, sleep_until, timeout};

use super::cache::Cache;
use super::{NodeReport, Source, SourceError, SourceIssue, SourceStatus, Tenure, unix_now};
use crate::blocks::{Cut, Endings, Times};
use crate::config::{Config, EtcdConfig};
use crate::model::ClusterState;
use client::{Backoff, Client, EtcdError, Watch};
use lease::Lease;
use store::{Keys, Own, Pair, Store};
use wire::{EventKind, KeyValue, WatchResponse};

/// How long one watch is relied upon. With [`client`]'s time to open the next one, a silent connection is found out within 30 s.
const WATCH_LIFETIME: Duration = Duration::from_secs(20);
/// How long the start of a daemon waits for an etcd that answers, or of which nothing is known.
const FIRST_LOOK: Duration = Duration::from_secs(5);
/// How often what etcd holds is kept on the disk, if it changed.
const KEEP_INTERVAL: Duration = Duration::from_secs(5);
/// In the state directory.
pub(super) const CACHE: &str = "etcd.json";
/// How often the node's own affairs are looked at though nothing happened.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// How long what became of a write is waited for. A transaction that changed nothing is never told of.
const AWAIT_MAX: Duration = Duration::from_millis(900);
/// How long a list that takes most away is not believed.
const DOUBT: Duration = Duration::from_secs(1);
/// How many keys must be known before a list that takes most of them away is doubted.
const DOUBT_LEN_MIN: usize = 8;

/// Reads etcd and goes on watching it, with this node registered. Where something is kept, `look` is how long it waits for an answer.
pub(super) async fn start(config: &Config, etcd: &EtcdConfig, report: NodeReport, look: Duration) -> Result<Source, SourceError> {
    let client = Client::new(etcd)?;
    let path = || config.state_dir.display().to_string();
    let machine = machine::name(&config.state_dir).map_err(|source| SourceError::Machine { path: path(), source })?;
    let cache = Cache::new(&config.state_dir, CACHE, &format!("etcd under {}", etcd.prefix));
    let mut store = Store::new(Keys::new(&etcd.prefix), Own { node: config.node.clone(), pod_cidrs: config.pod_cidrs.clone() });
    store.replace(cache.load(|pair| pair));
    let known = store.len() > 0;

    let (states, state) = watch::channel(Arc::default());
    let first = SourceStatus { kind: "etcd", connected: false, complete: false, errors: Vec::new(), last_change: None, objects: 0 };
    let (statuses, status) = watch::channel(first);
    let (tenures, tenure) = watch::channel(Tenure::NONE);
    let (report, reports) = watch::channel(report);
    let mut follower = Follower {
        keys: Keys::new(&etcd.prefix),
        times: Times { lease: etcd.lease, grace: etcd.grace },
        cuts: config.pod_cidrs.iter().map(|range| Cut::of(*range)).collect(),
        cluster: node::cluster(&config.pod_cidrs),
        node: config.node.clone(),
        overlay: config.overlay,
        started: Instant::now(),
        endings: Endings::default(),
        revision: None,
        awaited: None,
        membership: None,
        obstacle: None,
        away: None,
        unkept: false,
        keeping: None,
        client,
        machine,
        cache,
        store,
        reports,
        states,
        statuses,
        tenures,
    };
    follower.publish();
    let task = tokio::spawn(follower.run());
    let (mut contact, mut ready) = (status.clone(), tenure.clone());
    // Connected, and with a block of its own; else the daemon starts with what is known, and follows later.
    if !known || timeout(look, contact.wait_for(|status| status.connected)).await.is_ok() {
        let _ = timeout(FIRST_LOOK, ready.wait_for(|tenure| !tenure.blocks.is_empty())).await;
    }
    Ok(Source { state, status, announcement: None, forwards: watch::Sender::new(false), tenure: Some(tenure), report, task })
}

/// The node's registration.
#[derive(Debug)]
struct Membership {
    lease: Lease,
    /// The revision at which it began.
    term: i64,
    /// Keys of the slices that were written with this lease.
    published: BTreeSet<String>,
}

/// Follows etcd.
struct Follower {
    client: Client,
    keys: Keys,
    times: Times,
    cuts: Vec<Cut>,
    /// What the key `cluster` must say.
    cluster: String,
    node: String,
    machine: String,
    overlay: crate::config::Overlay,
    /// Where the clock of [`Endings`] begins.
    started: Instant,
    endings: Endings,
    store: Store,
    /// Everything up to here is in the store; nothing if it must be listed.
    revision: Option<i64>,
    /// The revision of our own last write, until the watch has told of it.
    awaited: Option<(i64, Instant)>,
    membership: Option<Membership>,
    /// Why this node cannot be a node of the cluster.
    obstacle: Option<SourceIssue>,
    /// Why etcd is away.
    away: Option<SourceIssue>,
    cache: Cache,
    /// The store is not on the disk as it is.
    unkept: bool,
    /// What is being written to the disk.
    keeping: Option<JoinHandle<()>>,
    reports: watch::Receiver<NodeReport>,
    states: watch::Sender<Arc<ClusterState>>,
    statuses: watch::Sender<SourceStatus>,
    tenures: watch::Sender<Tenure>,
}

impl Follower {
    async fn run(mut self) {
        let mut backoff = Backoff::default();
        loop {
            let Err(error) = self.follow(&mut backoff).await;
            // The pages that were read are of one revision; what happened since can only be listed.
            if let EtcdError::Compacted { .. } = error {
                tracing::info!("etcd: {error}; listing everything");
                self.revision = None;
            } else if self.away.is_none() {
                tracing::warn!("etcd: {error}; the last state stays in force");
            }
            self.awaited = None;
            self.set_away(Some(error.to_string()));
            self.keep();
            backoff.wait().await;
        }
    }

    /// Lists if it must, then watches; returns when etcd cannot be followed.
    async fn follow(&mut self, backoff: &mut Backoff) -> Result<std::convert::Infallible, EtcdError> {
        if self.revision.is_none() {
            self.list().await?;
        }
        loop {
            let (prefix, end) = self.keys.all();
            let from = self.revision.unwrap_or(0) + 1;
            let watch = self.client.watch(&prefix, &end, from).await?;
            backoff.reset();
            if self.away.is_some() {
                tracing::info!("etcd answers");
            }
            self.set_away(None);
            self.attend(watch).await?;
        }
    }

    /// Works off what one watch tells, until it is time for the next.
    async fn attend(&mut self, mut watch: Watch) -> Result<(), EtcdError> {
        let end = tokio::time::Instant::now() + WATCH_LIFETIME;
        let mut look = tokio::time::interval(LOOK_INTERVAL);
        let mut keep = tokio::time::interval_at(tokio::time::Instant::now() + KEEP_INTERVAL, KEEP_INTERVAL);
        loop {
            tokio::select! {
                response = watch.next() => self.note(response?),
                () = sleep_until(end) => return Ok(()),
                _ = keep.tick() => {
                    self.keep();
                    continue;
                }
                _ = self.reports.changed() => {}
                // The lease's standing is looked at as well.
                _ = look.tick() => self.awaited = self.awaited.filter(|(_, since)| since.elapsed() < AWAIT_MAX),
            }
            self.manage().await?;
            self.publish();
        }
    }

    /// Takes note of what happened.
    fn note(&mut self, response: WatchResponse) {
        for event in response.events {
            let revision = event.kv.mod_revision.0;
            match event.kind {
                EventKind::Put => {
                    if let Some(pair) = pair(event.kv) {
                        self.store.put(pair);
                    }
                }
                EventKind::Delete => self.store.delete(&String::from_utf8_lossy(&event.kv.key.0)),
            }
            self.revision = self.revision.max(Some(revision));
            self.awaited = self.awaited.filter(|(awaited, _)| *awaited > revision);
            self.unkept = true;
        }
    }

    /// Reads everything anew.
    async fn list(&mut self) -> Result<(), EtcdError> {
        let (prefix, end) = self.keys.all();
        let mut doubted: Option<BTreeSet<String>> = None;
        loop {
            let listing = self.client.list(&prefix, &end).await?;
            let pairs: Vec<Pair> = listing.kvs.into_iter().filter_map(pair).collect();
            let gone = self.store.missing_from(&pairs);
            if self.store.len() >= DOUBT_LEN_MIN && gone.len() * 2 > self.store.len() {
                let gone: BTreeSet<String> = gone.into_iter().collect();
                if doubted.as_ref() != Some(&gone) {
                    tracing::warn!(gone = gone.len(), known = self.store.len(), "etcd: a list lacks most of what is known; it must say so twice");
                    doubted = Some(gone);
                    sleep(DOUBT).await;
                    continue;
                }
                tracing::warn!(gone = gone.len(), "etcd: a second list agrees");
            }
            self.store.replace(pairs);
            self.revision = Some(listing.revision);
            self.unkept = true;
            return Ok(());
        }
    }

    fn set_away(&mut self, reason: Option<String>) {
        self.away = reason.map(|reason| SourceIssue { file: "etcd".into(), line: None, reason });
        self.publish();
    }

    /// Tells the daemon what there is.
    fn publish(&mut self) {
        self.note_own_node();
        let state = self.store.state();
        let changed = **self.states.borrow() != *state;
        if changed {
            let state = Arc::new(state.clone());
            self.states.send_replace(state);
        }
        let errors = self.away.iter().chain(&self.obstacle).chain(self.store.issues()).cloned().collect();
        let status = SourceStatus {
            kind: "etcd",
            connected: self.away.is_none() && self.revision.is_some(),
            // What was kept on the disk was whole.
            complete: self.store.len() > 0,
            errors,
            last_change: if changed { Some(unix_now()) } else { self.statuses.borrow().last_change },
            objects: self.states.borrow().len(),
        };
        self.report_issues(&status.errors);
        self.statuses.send_if_modified(|old| std::mem::replace(old, status.clone()) != status);
        self.publish_tenure();
    }

    /// Logs what is wrong with objects that was not wrong before, and what is mended.
    fn report_issues(&self, after: &[SourceIssue]) {
        let before = self.statuses.borrow();
        let of_objects = |issue: &&SourceIssue| Some(*issue) != self.away.as_ref();
        for issue in after.iter().filter(of_objects).filter(|issue| !before.errors.contains(issue)) {
            tracing::warn!("{issue}");
        }
        for issue in before.errors.iter().filter(|issue| issue.file != "etcd" && !after.contains(issue)) {
            tracing::info!(key = issue.file, "no longer: {}", issue.reason);
        }
    }

    /// Keeps what etcd holds on the disk.
    fn keep(&mut self) {
        let busy = self.keeping.as_ref().is_some_and(|keeping| !keeping.is_finished());
        if !busy && std::mem::take(&mut self.unkept) {
            let (cache, pairs) = (self.cache.clone(), self.store.pairs());
            self.keeping = Some(tokio::task::spawn_blocking(move || cache.save(pairs)));
        }
    }
}

/// As it is kept; nothing where it is no text, which is nothing of ours.
fn pair(kv: KeyValue) -> Option<Pair> {
    let (key, value) = (String::from_utf8(kv.key.0).ok()?, String::from_utf8(kv.value.0).ok()?);
    Some(Pair { key, value, created: kv.create_revision.0, modified: kv.mod_revision.0 })
}
