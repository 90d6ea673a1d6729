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

/// Not more often than this: two gateways under one name must not load the server with their quarrel.
const PAUSE: Duration = Duration::from_secs(1);

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
        loop {
            let wanted = self.wanted.borrow_and_update().clone();
            let found = self.found.borrow_and_update().clone();
            // Without a Node there is nothing to write on: the compiler warns of that.
            if let (Some(wanted), Some(found)) = (wanted, found)
                && [&wanted[0].1, &wanted[1].1].map(|text| Some(text.as_str())) != [found[0].as_deref(), found[1].as_deref()]
            {
                let patched = self.patch(&wanted).await;
                let failed = patched.is_err();
                if self.updates.send(Update::Announced(patched)).await.is_err() {
                    return;
                }
                if failed {
                    self.backoff.wait().await;
                    continue;
                }
                tracing::info!(underlay = wanted[0].1, overlay = wanted[1].1, "announced on Node {}", self.node);
                self.backoff.reset();
                tokio::time::sleep(PAUSE).await;
                // The watch tells what became of it; until it does, what is found is what was there before.
            }
            tokio::select! {
                changed = self.wanted.changed() => if changed.is_err() { return },
                changed = self.found.changed() => if changed.is_err() { return },
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
