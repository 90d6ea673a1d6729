//! The Kubernetes API server as a source.
//!
//! Each kind has a `reflector` that lists and watches it; the `collector` makes one state of what they tell; the `announce`r keeps this
//! node's own announcement on its Node, and the `condition`er that it has a network. Nothing is published before every kind has been listed once: half a cluster would look like one
//! whose other half has been removed. What was published is on the disk as well (`kept`), for a gateway that starts while the server is away.
//!
//! What it may do is in `deploy/kubernetes/rbac.yaml`, and it needs exactly that.

mod access;
mod announce;
mod collector;
mod condition;
mod kept;
mod kinds;
mod reflector;
mod timing;
mod token;

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kube::Client;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::cache::{Cache, KNOWN_LOOK};
use super::{NodeReport, Source, SourceError, SourceStatus};
use crate::model::{ClusterState, Object, ObjectKey};
pub use access::AccessError;
use access::Server;
use announce::Announcer;
use collector::Collector;
use condition::Conditioner;
use kinds::KINDS;
use reflector::{Reflector, Update};
pub use timing::Timing;
use timing::{Backoff, Jitter};

/// So many updates may wait for the collector before reflectors wait for it.
const QUEUE: usize = 4096;

/// In the state directory.
pub(super) const CACHE: &str = "kubernetes.json";

/// Connects as configured, and returns when every kind has been listed; where something is kept in `state_dir`, after `look` at the latest.
pub(super) async fn start(
    server: Option<&str>,
    kubeconfig: Option<&Path>,
    node: &str,
    state_dir: &Path,
    look: Duration,
) -> Result<Source, SourceError> {
    let server = Server::open(server, kubeconfig).await?;
    tracing::info!(server = server.url, "source.kubernetes: waiting for the first lists");
    follow(server, node, (state_dir, look), Timing::default(), Jitter::new(None)).await
}

/// Follows the server that `client` leads to, for tests: `node` is this node's name, and `seed` decides what is otherwise left to chance.
pub async fn start_with(client: Client, node: &str, state_dir: &Path, timing: Timing, seed: u64) -> Result<Source, SourceError> {
    follow(Server::with(client, "the server"), node, (state_dir, KNOWN_LOOK), timing, Jitter::new(Some(seed))).await
}

/// Whether the server serves this node as configured, for `podgate doctor`: its URL, and the `Date` of its answer if it has one. One node is
/// asked for, since a list of nodes is the first thing that the source needs to be allowed.
pub(crate) async fn reach(server: Option<&str>, kubeconfig: Option<&Path>) -> Result<(String, Option<String>), String> {
    let server = Server::open(server, kubeconfig).await.map_err(|error| error.to_string())?;
    let request = http::Request::get("/api/v1/nodes?limit=1").body(kube::client::Body::empty()).map_err(|error| error.to_string())?;
    let answer = server.client().send(request).await.map_err(|error| format!("{}: {}", server.url, chain(&error)))?;
    let date = answer.headers().get(http::header::DATE).and_then(|date| date.to_str().ok()).map(str::to_owned);
    match answer.status() {
        status if status.is_success() => Ok((server.url, date)),
        http::StatusCode::UNAUTHORIZED => Err(format!("{}: it does not know these credentials (401)", server.url)),
        http::StatusCode::FORBIDDEN => {
            Err(format!("{}: it does not let these credentials list nodes (403; deploy/kubernetes/rbac.yaml has what is needed)", server.url))
        }
        status => Err(format!("{}: it answers {status}", server.url)),
    }
}

async fn follow(server: Server, node: &str, (state_dir, look): (&Path, Duration), timing: Timing, mut jitter: Jitter) -> Result<Source, SourceError> {
    let server = Arc::new(server);
    let cache = Cache::new(state_dir, CACHE, &server.url);
    let objects = kept::load(&cache);
    let keys: Vec<ObjectKey> = objects.iter().map(Object::key).collect();
    let known: Arc<ClusterState> = Arc::new(objects.into_iter().collect());
    // Only what was whole is kept.
    let complete = !known.is_empty();
    let first = SourceStatus { kind: "kubernetes", connected: false, complete, errors: Vec::new(), last_change: None, objects: known.len() };
    let (updates, received) = mpsc::channel::<Update>(QUEUE);
    let (states, state) = watch::channel(known.clone());
    let (statuses, status) = watch::channel(first);
    let (own, found) = watch::channel(None);
    let (announcement, wanted) = watch::channel(None);
    let (network, condition) = watch::channel(None);
    let (forwards, ready) = watch::channel(false);
    let (listed, completed) = oneshot::channel();
    let collector = Collector {
        url: server.url.clone(),
        node: node.to_owned(),
        states,
        statuses,
        own,
        network,
        all_listed: Some(listed),
        listed: BTreeSet::new(),
        kept: complete,
        ailing: BTreeMap::new(),
        faults: BTreeMap::new(),
        announcement: BTreeMap::new(),
    };
    // Dropping the set ends what is in it; it lives in the task that the source owns.
    let mut tasks = JoinSet::new();
    for kind in KINDS {
        let known = keys.iter().filter(|key| &*key.kind == kind.name).cloned().collect();
        tasks.spawn(Reflector::new(kind, server.clone(), timing, jitter.split(), updates.clone(), known).run());
    }
    let backoff = Backoff::new(&timing, jitter.split());
    let (of_server, told) = (server.clone(), updates.clone());
    let conditioner =
        Conditioner { server: of_server, node: node.to_owned(), answer: timing.answer, backoff, ready, found: condition, updates: told };
    tasks.spawn(conditioner.run());
    let announcer =
        Announcer { server, node: node.to_owned(), answer: timing.answer, backoff: Backoff::new(&timing, jitter.split()), wanted, found, updates };
    tasks.spawn(announcer.run());
    tasks.spawn(collector.run(received));
    tasks.spawn(kept::keep(cache, state.clone(), status.clone()));
    let task = tokio::spawn(async move { while tasks.join_next().await.is_some() {} });
    // Its own Node is the API server's to describe, but for the announcement and its network.
    let (report, _) = watch::channel(NodeReport::default());
    let source = Source { state, status, announcement: Some(announcement), forwards, tenure: None, report, task };
    if !complete {
        completed.await.map_err(|_| SourceError::Ended)?;
    } else if timeout(look, completed).await.is_err() {
        tracing::warn!(
            objects = known.len(),
            "source.kubernetes: the server has not told everything yet; what it said before this start is in force"
        );
    }
    Ok(source)
}

/// An error with what caused it, in one line.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let said = cause.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        next = cause.source();
    }
    text
}
