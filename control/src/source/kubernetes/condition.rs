//! Tells the scheduler that this node has a network: its own Node's condition `NetworkUnavailable` says `False`.
//!
//! Clouds that lay routes of their own give a new Node the condition `True`, and with it the taint `node.kubernetes.io/network-unavailable`, which
//! stays until whoever is the network says otherwise (kubernetes/kubernetes#120486). Flannel, Calico and Cilium say so on every Node, condition or
//! not, and so does this, as soon as the node is ready. Nothing is taken back when the gateway ends: flows and pods wait for its successor.
//!
//! Somebody who says `True` after that may say it again every few seconds. He is contradicted, since a cloud may come late, but seldom
//! ([`CONTRADICTION`]).

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams};
use kube::core::Request;
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};

use super::access::Server;
use super::kinds::NODES;
use super::reflector::Update;
use super::timing::Backoff;

/// The condition's type.
pub(super) const NETWORK_UNAVAILABLE: &str = "NetworkUnavailable";

/// How long another writer's word stands. Route controllers of clouds repeat theirs every ten seconds (`--route-reconciliation-period`).
const CONTRADICTION: Duration = Duration::from_secs(300);

/// What a Node says of its network.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Network {
    /// Of the Node: another one of the same name has been told nothing yet.
    pub uid: String,
    /// `True`, `False` or `Unknown`; `None` without the condition.
    pub status: Option<String>,
    /// Why, in the writer's word.
    pub reason: String,
}

impl Network {
    /// From a Node as the server has it.
    pub fn of(node: &Value) -> Network {
        let text = |value: Option<&Value>| value.and_then(Value::as_str).map(str::to_owned);
        let mut conditions = node.pointer("/status/conditions").and_then(Value::as_array).into_iter().flatten();
        let condition = conditions.find(|condition| condition["type"] == NETWORK_UNAVAILABLE);
        Network {
            uid: text(node.pointer("/metadata/uid")).unwrap_or_default(),
            status: text(condition.and_then(|condition| condition.get("status"))),
            reason: text(condition.and_then(|condition| condition.get("reason"))).unwrap_or_default(),
        }
    }
}

/// Keeps the condition.
pub(super) struct Conditioner {
    pub server: Arc<Server>,
    /// This node's name.
    pub node: String,
    /// How long the server may take to answer.
    pub answer: Duration,
    pub backoff: Backoff,
    /// Whether the node has been ready since this start.
    pub ready: watch::Receiver<bool>,
    /// What its Node says, as the server last told it.
    pub found: watch::Receiver<Option<Network>>,
    pub updates: mpsc::Sender<Update>,
}

impl Conditioner {
    /// Works until nobody wants or finds anything any more.
    pub async fn run(mut self) {
        if self.ready.wait_for(|ready| *ready).await.is_err() {
            return;
        }
        // On which Node it was written, and when.
        let mut written: Option<(String, Instant)> = None;
        let mut failed = false;
        loop {
            let found = self.found.borrow_and_update().clone();
            let wrong = found.filter(|network| network.status.as_deref() != Some("False"));
            let due = wrong.as_ref().map(|network| match &written {
                Some((uid, at)) if *uid == network.uid => *at + CONTRADICTION,
                _ => Instant::now(),
            });
            if let Some((network, _)) = wrong.zip(due).filter(|(_, due)| *due <= Instant::now()) {
                let outcome = self.patch().await;
                failed = outcome.is_err();
                if outcome.is_ok() {
                    let Network { uid, status, reason } = network;
                    let before = status.map_or("not there".to_owned(), |status| format!("{status} ({reason})"));
                    tracing::info!(before, "{NETWORK_UNAVAILABLE}=False on Node {}", self.node);
                    written = Some((uid, Instant::now()));
                }
                if self.updates.send(Update::Announced(NETWORK_UNAVAILABLE, outcome)).await.is_err() {
                    return;
                }
                if failed {
                    self.backoff.wait().await;
                } else {
                    self.backoff.reset();
                }
                continue;
            }
            // Somebody else has said it, though our last word was refused.
            if std::mem::take(&mut failed) && self.updates.send(Update::Announced(NETWORK_UNAVAILABLE, Ok(()))).await.is_err() {
                return;
            }
            tokio::select! {
                changed = self.found.changed() => if changed.is_err() { return },
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
            }
        }
    }

    /// A strategic merge: conditions are merged by their type, so nobody else's are touched.
    async fn patch(&self) -> Result<(), String> {
        let now = Timestamp::from_second(i64::try_from(crate::source::unix_now()).unwrap_or_default()).unwrap_or_default().to_string();
        let condition = json!({
            "type": NETWORK_UNAVAILABLE, "status": "False", "reason": "PodgateIsUp", "message": "Podgate forwards for this node's pods",
            "lastHeartbeatTime": now, "lastTransitionTime": now,
        });
        let patch = Patch::Strategic(json!({"status": {"conditions": [condition]}}));
        let params = PatchParams { field_manager: Some("podgate".into()), ..PatchParams::default() };
        let request = Request::new(NODES).patch_subresource("status", &self.node, &params, &patch).map_err(|error| error.to_string())?;
        let remedy = "a cloud that waits for it schedules no pods here; allow `patch` on nodes/status (deploy/kubernetes/rbac.yaml)";
        match timeout(self.answer, self.server.client().request::<Value>(request)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(kube::Error::Api(status))) => {
                Err(format!("the condition {NETWORK_UNAVAILABLE} is refused: {} ({}): {remedy}", status.message, status.code))
            }
            Ok(Err(error)) => Err(format!("the condition {NETWORK_UNAVAILABLE} cannot be written: {}", super::chain(&error))),
            Err(_) => Err(format!("the condition {NETWORK_UNAVAILABLE} had no answer within {} s", self.answer.as_secs())),
        }
    }
}
