//! Tells the other nodes how this node's gateway is reached: two annotations on its own Node, put back whenever they are not there.

use std::sync::Arc;
use std::time::Duration;

use kube::api::{Patch, PatchParams};
use kube::core::Request;
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

use super::access::Server;
use super::kinds::NODES;
use super::reflector::Update;
use super::timing::Backoff;
use crate::source::Announced;

/// What of this node's own Node it is about.
const ANNOTATIONS: &str = "annotations";

/// Not more often than this: two gateways under one name must not load the server with their quarrel.
const PAUSE: Duration = Duration::from_secs(1);

/// What was written and is not seen for so long is written again: the Node may have been made anew before anybody saw the old one with it.
const UNSEEN: Duration = Duration::from_secs(30);

/// Keeps the announcement as it is wanted.
pub(super) struct Announcer {
    pub server: Arc<Server>,
    /// This node's name.
    pub node: String,
    /// How long the server may take to answer.
    pub answer: Duration,
    pub backoff: Backoff,
    /// What is to be announced.
    pub wanted: watch::Receiver<Option<Announced>>,
    /// What is announced, as the server last told it.
    pub found: watch::Receiver<Option<[Option<String>; 2]>>,
    pub updates: mpsc::Sender<Update>,
}

impl Announcer {
    /// Works until nobody wants or finds anything any more.
    pub async fn run(mut self) {
        let mut failed = false;
        loop {
            let wanted = self.wanted.borrow_and_update().clone();
            let found = self.found.borrow_and_update().clone();
            let (mut outcome, mut unseen) = (None, false);
            match (wanted, found) {
                (Some(wanted), Some(found))
                    if [&wanted[0].1, &wanted[1].1].map(|text| Some(text.as_str())) != [found[0].as_deref(), found[1].as_deref()] =>
                {
                    let patched = self.patch(&wanted).await;
                    if patched.is_ok() {
                        tracing::info!(underlay = wanted[0].1, overlay = wanted[1].1, "announced on Node {}", self.node);
                    }
                    (outcome, unseen) = (Some(patched), true);
                }
                // It stands, though the last answer may have said otherwise; or there is no Node to write on, of which the compiler warns.
                _ if failed => outcome = Some(Ok(())),
                _ => {}
            }
            if let Some(outcome) = outcome {
                failed = outcome.is_err();
                if self.updates.send(Update::Announced(ANNOTATIONS, outcome)).await.is_err() {
                    return;
                }
                if failed {
                    self.backoff.wait().await;
                    continue;
                }
                self.backoff.reset();
                tokio::time::sleep(PAUSE).await;
            }
            tokio::select! {
                changed = self.wanted.changed() => if changed.is_err() { return },
                changed = self.found.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(UNSEEN), if unseen => {}
            }
        }
    }

    async fn patch(&self, wanted: &Announced) -> Result<(), String> {
        let annotations: serde_json::Map<String, Value> = wanted.iter().map(|(name, text)| ((*name).to_owned(), json!(text))).collect();
        let patch = Patch::Merge(json!({"metadata": {"annotations": annotations}}));
        let params = PatchParams { field_manager: Some("podgate".into()), ..PatchParams::default() };
        let request = Request::new(NODES).patch_metadata(&self.node, &params, &patch).map_err(|error| error.to_string())?;
        let remedy = "other nodes cannot reach this one's pods; allow `patch` on nodes (deploy/kubernetes/rbac.yaml)";
        match timeout(self.answer, self.server.client().request::<Value>(request)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(kube::Error::Api(status))) => Err(format!("the announcement is refused: {} ({}): {remedy}", status.message, status.code)),
            Ok(Err(error)) => Err(format!("the announcement fails: {}", super::chain(&error))),
            Err(_) => Err(format!("the announcement had no answer within {} s", self.answer.as_secs())),
        }
    }
}
