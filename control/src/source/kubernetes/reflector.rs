//! One kind of object, followed: listed, then watched from there on, and listed again whenever a watch cannot go on.
//!
//! Upstream: "Efficient detection of changes" in the Kubernetes API concepts; client-go `tools/cache/reflector.go`.
//!
//! The state that comes of it is that of a list, brought forward by events that each hold the whole object. So an event that comes twice
//! changes nothing, and whatever was removed while nobody listened is either told by the watch that takes up where the last one ended, or
//! missing in the list that is read when the server no longer knows that point (410 Gone).

use std::collections::BTreeSet;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt};
use kube::api::{ListParams, WatchParams};
use kube::core::{Request, Status, WatchEvent};
use serde::Deserialize;
use serde_json::Value;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout, timeout_at};

use super::access::Server;
use super::kinds::{Kind, Read};
use super::timing::{Backoff, Jitter, Timing};
use crate::model::ObjectKey;

/// A watch that ended sooner than this and brought nothing counts as a failure, so that a server which ends each at once is not asked
/// without a pause.
const SHORT_WATCH: Duration = Duration::from_secs(1);

/// What a reflector tells.
#[derive(Debug)]
pub(super) enum Update {
    /// All there is of a kind, and which objects are no more.
    Listed(Kind, Vec<Read>, Vec<ObjectKey>),
    /// An object as it is now.
    Changed(Read),
    /// An object that is no more.
    Gone(ObjectKey),
    /// Whether what is told of a kind is what the server has, and if not, why.
    Health(Kind, Result<(), String>),
    /// Whether a part of what this node says of itself on its own Node stands.
    Announced(&'static str, Result<(), String>),
}

/// Follows one kind.
pub(super) struct Reflector {
    kind: Kind,
    server: Arc<Server>,
    timing: Timing,
    updates: mpsc::Sender<Update>,
    backoff: Backoff,
    /// Every object that was told and not taken back.
    known: BTreeSet<ObjectKey>,
    /// The last watch could not go on, and none has since.
    relisting: bool,
}

/// A list, whole.
struct Listing {
    /// The point in the server's history at which it was true.
    version: String,
    objects: Vec<Read>,
}

/// A page of a list (`v1/List` of any kind).
#[derive(Deserialize)]
struct Page {
    metadata: PageMetadata,
    items: Option<Vec<Value>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PageMetadata {
    resource_version: String,
    #[serde(rename = "continue")]
    next: Option<String>,
}

/// Why something did not work, and what follows from it.
enum Failure {
    /// Try the same again.
    Passing(String),
    /// What was known of the server's history is of no use: list again.
    Stale(String),
    /// The server has no such kind.
    Absent(String),
    /// A watch ended as soon as it had begun: nothing is wrong unless it goes on like that.
    Brief,
}

/// Nobody listens any more.
struct Stopped;

impl Reflector {
    /// Of `kind`, of which `known` are told already.
    pub fn new(
        kind: Kind,
        server: Arc<Server>,
        timing: Timing,
        jitter: Jitter,
        updates: mpsc::Sender<Update>,
        known: BTreeSet<ObjectKey>,
    ) -> Reflector {
        Reflector { kind, server, timing, updates, backoff: Backoff::new(&timing, jitter), known, relisting: false }
    }

    /// Follows the kind until nobody listens any more.
    pub async fn run(mut self) {
        while self.round().await.is_ok() {}
    }

    async fn round(&mut self) -> Result<(), Stopped> {
        let listed_at = Instant::now();
        match self.list_until_believed().await? {
            Some(version) => self.follow(version, listed_at + self.timing.audit).await,
            None => {
                // It may come with an upgrade of the server.
                self.backoff.about(self.timing.audit).await;
                Ok(())
            }
        }
    }

    /// Lists until an answer can be believed and tells it. `None` if there is no such kind.
    async fn list_until_believed(&mut self) -> Result<Option<String>, Stopped> {
        let mut doubted: Option<BTreeSet<ObjectKey>> = None;
        loop {
            let listing = match self.list().await {
                Ok(listing) => listing,
                Err(Failure::Absent(_)) if self.kind.optional => {
                    tracing::info!("source.kubernetes: {} has no {}", self.server.url, self.kind.resource);
                    self.tell(Listing { version: String::new(), objects: Vec::new() }).await?;
                    return Ok(None);
                }
                Err(Failure::Passing(reason) | Failure::Stale(reason) | Failure::Absent(reason)) => {
                    self.fail(reason).await?;
                    continue;
                }
                // Of watches alone.
                Err(Failure::Brief) => continue,
            };
            let listed: BTreeSet<&ObjectKey> = listing.objects.iter().map(|read| &read.key).collect();
            let missing: BTreeSet<ObjectKey> = self.known.iter().filter(|key| !listed.contains(key)).cloned().collect();
            let (lost, of) = (missing.len(), self.known.len());
            let agreed = doubted.as_ref().is_some_and(|doubted| doubted.is_subset(&missing));
            if lost * 2 > of && !agreed {
                let name = self.kind.name;
                let reason = format!("a list lacks {lost} of {of} {name} objects; they stay in force until a second list says the same");
                tracing::warn!("source.kubernetes: {}: {reason}", self.at());
                self.health(Err(reason)).await?;
                doubted = Some(missing);
                self.backoff.about(self.timing.second_list).await;
                continue;
            }
            if doubted.is_some() {
                tracing::warn!(
                    "source.kubernetes: {}: believed after another list: {lost} of {of} {} objects are no more",
                    self.at(),
                    self.kind.name
                );
            }
            let version = listing.version.clone();
            self.tell(listing).await?;
            return Ok(Some(version));
        }
    }

    async fn tell(&mut self, listing: Listing) -> Result<(), Stopped> {
        let now: BTreeSet<ObjectKey> = listing.objects.iter().map(|read| read.key.clone()).collect();
        let gone = self.known.difference(&now).cloned().collect();
        self.known = now;
        self.send(Update::Listed(self.kind, listing.objects, gone)).await?;
        self.health(Ok(())).await
    }

    /// Everything there is, page by page.
    async fn list(&self) -> Result<Listing, Failure> {
        let request = Request::new(self.kind.path);
        let mut params = ListParams::default().limit(self.timing.page);
        let mut objects = Vec::new();
        loop {
            // Without a version the answer is the newest there is. A cache of the server's ("0") may lag behind what was seen already,
            // and would bring back what has been removed.
            let built = if self.kind.metadata_only { request.list_metadata(&params) } else { request.list(&params) };
            let built = built.map_err(|error| Failure::Passing(error.to_string()))?;
            let page = timeout(self.timing.answer, self.server.client().request::<Page>(built)).await;
            let page = match page {
                Ok(page) => self.judge("list", page).await?,
                Err(_) => return Err(Failure::Passing(format!("no answer within {} s", self.timing.answer.as_secs()))),
            };
            if page.metadata.resource_version.is_empty() {
                return Err(Failure::Passing("a list came without a version".into()));
            }
            for item in page.items.into_iter().flatten() {
                let read = self.kind.read(item).ok_or_else(|| Failure::Passing("a list holds an object without a name".into()))?;
                objects.push(read);
            }
            match page.metadata.next.filter(|next| !next.is_empty()) {
                Some(next) => params.continue_token = Some(next),
                None => return Ok(Listing { version: page.metadata.resource_version, objects }),
            }
        }
    }

    /// Watches from `version` on, one watch after the other, until a list is due or needed.
    async fn follow(&mut self, mut version: String, audit: Instant) -> Result<(), Stopped> {
        while Instant::now() < audit {
            match self.watch(&mut version).await? {
                Ok(()) => {}
                Err(Failure::Passing(reason)) => self.fail(reason).await?,
                Err(Failure::Brief) => self.backoff.wait().await,
                Err(Failure::Stale(reason)) => {
                    // Until the list is read nobody knows what is missing.
                    self.health(Err(format!("listing again: {reason}"))).await?;
                    // The server answers: how long it took to reach it is no reason to wait, that the last list was of no use is.
                    if !std::mem::replace(&mut self.relisting, true) {
                        self.backoff.reset();
                    }
                    self.backoff.wait().await;
                    return Ok(());
                }
                Err(Failure::Absent(reason)) => {
                    self.fail(reason).await?;
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// One watch, to its end. `version` is the point from which the next one can go on, at every moment.
    async fn watch(&mut self, version: &mut String) -> Result<Result<(), Failure>, Stopped> {
        let params = WatchParams::default().timeout(self.timing.watch_seconds);
        let request = Request::new(self.kind.path);
        let built = if self.kind.metadata_only { request.watch_metadata(&params, version) } else { request.watch(&params, version) };
        let built = match built {
            Ok(built) => built,
            Err(error) => return Ok(Err(Failure::Stale(error.to_string()))),
        };
        // Counted from here: how long the connection has been silent does not matter, the server ends the watch at that time in any case.
        let deadline = Instant::now() + Duration::from_secs(self.timing.watch_seconds.into()) + self.timing.grace;
        let answer = (Instant::now() + self.timing.answer).min(deadline);
        let stream = match timeout_at(answer, self.server.client().request_events::<Value>(built)).await {
            Ok(opened) => match self.judge("watch", opened).await {
                Ok(stream) => stream,
                Err(failure) => return Ok(Err(failure)),
            },
            Err(_) => return Ok(Err(Failure::Passing("the server does not answer".into()))),
        };
        let (opened, before) = (Instant::now(), version.clone());
        self.health(Ok(())).await?;
        let outcome = self.take_events(pin!(stream), deadline, version).await?;
        if *version != before || opened.elapsed() >= SHORT_WATCH {
            self.backoff.reset();
            self.relisting = false;
            return Ok(outcome);
        }
        Ok(outcome.and(Err(Failure::Brief)))
    }

    /// Takes what a watch brings until it ends, or until `deadline`.
    async fn take_events<S>(&mut self, mut stream: Pin<&mut S>, deadline: Instant, version: &mut String) -> Result<Result<(), Failure>, Stopped>
    where
        S: Stream<Item = kube::Result<WatchEvent<Value>>>,
    {
        loop {
            let event = match timeout_at(deadline, stream.next()).await {
                Ok(Some(Ok(event))) => event,
                Ok(None) => return Ok(Ok(())),
                Ok(Some(Err(error))) => return Ok(self.judge("watch", Err(error)).await),
                Err(_) => {
                    let seconds = self.timing.watch_seconds;
                    return Ok(Err(Failure::Passing(format!("the connection is dead: the server did not end a watch of {seconds} s"))));
                }
            };
            let next = match event {
                WatchEvent::Bookmark(bookmark) => Some(bookmark.metadata.resource_version),
                WatchEvent::Error(status) => return Ok(Err(Failure::Stale(said(&status)))),
                WatchEvent::Added(value) | WatchEvent::Modified(value) => {
                    let next = version_of(&value);
                    let Some(read) = self.kind.read(value) else { return Ok(Err(unreadable())) };
                    self.known.insert(read.key.clone());
                    self.send(Update::Changed(read)).await?;
                    next
                }
                WatchEvent::Deleted(value) => {
                    let Some(key) = self.kind.key(&value) else { return Ok(Err(unreadable())) };
                    self.known.remove(&key);
                    self.send(Update::Gone(key)).await?;
                    version_of(&value)
                }
            };
            match next.filter(|next| !next.is_empty()) {
                Some(next) => *version = next,
                None => return Ok(Err(unreadable())),
            }
        }
    }

    /// Sorts errors by what follows from them.
    async fn judge<T>(&self, verb: &str, answer: kube::Result<T>) -> Result<T, Failure> {
        let error = match answer {
            Ok(answer) => return Ok(answer),
            Err(error) => error,
        };
        Err(match error {
            kube::Error::Api(status) => {
                let said = said(&status);
                match status.code {
                    401 => {
                        self.server.renew().await;
                        Failure::Passing(format!("the server does not take our credentials: {said}; renew the token or the certificate"))
                    }
                    403 => {
                        let resource = self.kind.resource;
                        Failure::Passing(format!("no leave to {verb} {resource}: {said}; apply deploy/kubernetes/rbac.yaml"))
                    }
                    404 => Failure::Absent(format!("the server has no {}: {said}", self.kind.resource)),
                    // Too many requests, or the server (or what stands before it) is not able to right now.
                    429 | 500..=503 => Failure::Passing(said),
                    _ => Failure::Stale(said),
                }
            }
            kube::Error::SerdeError(error) => Failure::Stale(format!("an answer cannot be read: {error}")),
            other => Failure::Passing(super::chain(&other)),
        })
    }

    /// Tells why the state may be behind, and waits.
    async fn fail(&mut self, reason: String) -> Result<(), Stopped> {
        self.health(Err(reason)).await?;
        self.backoff.wait().await;
        Ok(())
    }

    async fn health(&self, health: Result<(), String>) -> Result<(), Stopped> {
        self.send(Update::Health(self.kind, health)).await
    }

    async fn send(&self, update: Update) -> Result<(), Stopped> {
        self.updates.send(update).await.map_err(|_| Stopped)
    }

    /// For messages: where the objects are.
    fn at(&self) -> String {
        format!("{}{}", self.server.url, self.kind.path)
    }
}

fn version_of(value: &Value) -> Option<String> {
    Some(value.pointer("/metadata/resourceVersion")?.as_str()?.to_owned())
}

fn unreadable() -> Failure {
    Failure::Stale("an event holds no object with a name and a version".into())
}

/// What the server says, in one line.
fn said(status: &Status) -> String {
    if status.message.is_empty() { format!("{} {}", status.code, status.reason) } else { format!("{} ({})", status.message, status.code) }
}
