//! Watches: the history from a version on, and then what happens, line by line.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, Response, header};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until};

use crate::handler::{Asked, metadata_of};
use crate::status::Refusal;
use crate::store::{Change, Event};
use crate::{Shared, lock};

/// How often a quiet watch hears of the version it has reached.
const BOOKMARKS: Duration = Duration::from_secs(10);
/// The longest watch, as the server's own default minimum.
const LONGEST: Duration = Duration::from_secs(1800);

type Line = io::Result<Bytes>;

/// How a watch ends before its time.
enum End {
    /// The client has gone.
    Unheard,
    /// In good order.
    Orderly,
    /// In the midst.
    Broken,
    /// It does not end, and brings nothing more.
    Silent,
}

struct Watch {
    shared: Arc<Shared>,
    asked: Asked,
    lines: mpsc::Sender<Line>,
    /// Everything up to here has been told.
    version: u64,
}

pub(crate) fn answer(shared: &Arc<Shared>, asked: Asked) -> Result<Response<Body>, Refusal> {
    let number = |name: &str| asked.query.get(name).and_then(|text| text.parse::<u64>().ok());
    let from = match asked.query.get("resourceVersion").map_or("", String::as_str) {
        "" | "0" => None,
        text => Some(text.parse().map_err(|_| Refusal::bad_request(format!("invalid resource version {text}")))?),
    };
    if let Some(from) = from {
        let newest = shared.store.version();
        if from > newest {
            return Err(Refusal::new(504, "Timeout", format!("Too large resource version: {from}, current: {newest}")));
        }
        // Told as a status or as an event: clients meet both.
        if lock(&shared.dice).hit(|faults| faults.gone) {
            return Err(Refusal::gone(from, newest));
        }
    }
    let time = number("timeoutSeconds").filter(|seconds| *seconds > 0).map_or(LONGEST, Duration::from_secs);
    let (lines, mut received) = mpsc::channel(16);
    let watch = Watch { shared: shared.clone(), asked, lines, version: from.unwrap_or(0) };
    tokio::spawn(watch.run(from.is_none(), Instant::now() + time));
    let stream = futures::stream::poll_fn(move |context| received.poll_recv(context));
    let mut response = Response::new(Body::from_stream(stream));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}

impl Watch {
    async fn run(mut self, from_nothing: bool, deadline: Instant) {
        let mut outage = self.shared.outage.subscribe();
        let outage = async move { drop(outage.wait_for(|outage| *outage).await) };
        let lines = self.lines.clone();
        let end = tokio::select! {
            biased;
            () = outage => End::Broken,
            end = self.tell(from_nothing, deadline) => end,
        };
        match end {
            End::Unheard | End::Orderly => {}
            End::Broken => drop(lines.send(Err(io::ErrorKind::ConnectionReset.into())).await),
            End::Silent => lines.closed().await,
        }
    }

    async fn tell(&mut self, from_nothing: bool, deadline: Instant) -> End {
        let mut changed = self.shared.store.subscribe();
        if from_nothing {
            let all = self.shared.store.list(self.asked.resource, 0, |namespace, object| self.asked.wants(namespace, object));
            self.version = all.version;
            for object in &all.objects {
                if let Err(end) = self.send("ADDED", object).await {
                    return end;
                }
            }
        }
        let bookmarks = self.asked.query.get("allowWatchBookmarks").is_some_and(|value| value == "true");
        loop {
            changed.mark_unchanged();
            match self.shared.store.since(self.asked.resource, self.version) {
                Ok(events) => {
                    for event in events {
                        if let Err(end) = self.event(&event, bookmarks).await {
                            return end;
                        }
                    }
                }
                Err(gone) => return self.error(&gone).await,
            }
            // What happened to other kinds is passed over: a bookmark says how far.
            let seen = self.shared.store.version();
            if self.shared.store.since(self.asked.resource, self.version).is_ok_and(|events| events.is_empty()) {
                self.version = self.version.max(seen);
            }
            tokio::select! {
                biased;
                () = self.lines.closed() => return End::Unheard,
                () = sleep_until(deadline) => {
                    if bookmarks && let Err(end) = self.bookmark().await {
                        return end;
                    }
                    return End::Orderly;
                }
                _ = changed.changed() => {}
                () = sleep(BOOKMARKS), if bookmarks => {
                    if let Err(end) = self.bookmark().await {
                        return end;
                    }
                }
            }
        }
    }

    async fn event(&mut self, event: &Event, bookmarks: bool) -> Result<(), End> {
        let namespace = event.object["metadata"]["namespace"].as_str().unwrap_or_default();
        let wanted = |object: &Value| self.asked.wants(namespace, object);
        let before = event.before.as_deref().is_some_and(wanted);
        let now = event.change != Change::Deleted && wanted(&event.object);
        // An object that comes to match a selector, or ceases to, comes or goes for whoever watches by it.
        let word = match (before, now) {
            (false, false) => {
                self.version = event.version;
                return Ok(());
            }
            (false, true) => "ADDED",
            (true, true) => "MODIFIED",
            (true, false) => "DELETED",
        };
        let (gone, silent, times, delay, also) = {
            let mut dice = lock(&self.shared.dice);
            let (gone, silent) = (dice.hit(|faults| faults.gone), dice.hit(|faults| faults.silent));
            let times = if dice.hit(|faults| faults.repeated) { 2 } else { 1 };
            (gone, silent, times, dice.delay(), bookmarks && dice.hit(|faults| faults.bookmark))
        };
        if gone {
            return Err(self.error(&Refusal::gone(self.version, event.version)).await);
        }
        if silent {
            return Err(End::Silent);
        }
        if !delay.is_zero() {
            sleep(delay).await;
        }
        for _ in 0..times {
            self.send(word, &event.object).await?;
        }
        self.version = event.version;
        if also {
            self.bookmark().await?;
        }
        if lock(&self.shared.dice).hit(|faults| faults.ended) { Err(End::Orderly) } else { Ok(()) }
    }

    async fn send(&self, word: &str, object: &Value) -> Result<(), End> {
        let object = if self.asked.metadata_only { metadata_of(object) } else { object.clone() };
        self.line(&json!({"type": word, "object": object})).await
    }

    async fn bookmark(&self) -> Result<(), End> {
        let resource = self.asked.resource;
        let metadata = json!({"resourceVersion": self.version.to_string(), "creationTimestamp": null});
        let (version, kind) =
            if self.asked.metadata_only { ("meta.k8s.io/v1".to_owned(), "PartialObjectMetadata") } else { (resource.api_version(), resource.kind) };
        self.line(&json!({"type": "BOOKMARK", "object": {"kind": kind, "apiVersion": version, "metadata": metadata}})).await
    }

    async fn error(&self, refusal: &Refusal) -> End {
        match self.line(&json!({"type": "ERROR", "object": refusal.object()})).await {
            Ok(()) => End::Orderly,
            Err(end) => end,
        }
    }

    async fn line(&self, value: &Value) -> Result<(), End> {
        let mut text = value.to_string();
        text.push('\n');
        let cut = {
            let mut dice = lock(&self.shared.dice);
            dice.hit(|faults| faults.cut).then(|| (dice.below(text.len() as u64) as usize, dice.below(2) == 0))
        };
        let Some((at, orderly)) = cut else {
            return self.lines.send(Ok(text.into())).await.map_err(|_| End::Unheard);
        };
        let begun = Bytes::from(text).slice(..at);
        self.lines.send(Ok(begun)).await.map_err(|_| End::Unheard)?;
        Err(if orderly { End::Orderly } else { End::Broken })
    }
}
