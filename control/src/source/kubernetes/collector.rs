//! Puts together what the reflectors tell, and publishes it: one state out of all kinds, which is whole as soon as every kind has been listed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot, watch};

use super::condition::Network;
use super::kinds::{KINDS, Kind, Read};
use super::reflector::Update;
use crate::model::{ClusterState, ObjectKey};
use crate::source::{SourceIssue, SourceStatus, unix_now};

/// A flood of events is published in parts of so many, so that the first are not held up by the last.
const BATCH: usize = 1024;

/// Gathers updates and publishes states.
pub(super) struct Collector {
    /// For people: the server's URL.
    pub url: String,
    /// This node's name.
    pub node: String,
    /// Where states go.
    pub states: watch::Sender<Arc<ClusterState>>,
    /// Where the status goes.
    pub statuses: watch::Sender<SourceStatus>,
    /// What this node's own annotations say, as the server has it; `None` while the server has no such node.
    pub own: watch::Sender<Option<[Option<String>; 2]>>,
    /// What this node's own Node says of its network; `None` while the server has no such node.
    pub network: watch::Sender<Option<Network>>,
    /// Is sent once every kind has been listed.
    pub all_listed: Option<oneshot::Sender<()>>,
    pub listed: BTreeSet<&'static str>,
    /// Whether the first state is a whole one, of before this start.
    pub kept: bool,
    /// What is wrong with a kind's connection.
    pub ailing: BTreeMap<&'static str, SourceIssue>,
    /// Objects that say something impossible.
    pub faults: BTreeMap<ObjectKey, SourceIssue>,
    /// Why what this node says of itself does not stand, by what of it.
    pub announcement: BTreeMap<&'static str, SourceIssue>,
}

impl Collector {
    /// Works until nobody tells anything any more.
    pub async fn run(mut self, mut updates: mpsc::Receiver<Update>) {
        let mut batch = Vec::new();
        loop {
            if updates.recv_many(&mut batch, BATCH).await == 0 {
                return;
            }
            let mut next = self.states.borrow().clone();
            for update in batch.drain(..) {
                self.take(update, &mut next);
            }
            self.publish(next);
        }
    }

    fn take(&mut self, update: Update, state: &mut Arc<ClusterState>) {
        match update {
            Update::Listed(kind, objects, gone) => {
                self.listed.insert(kind.name);
                gone.iter().for_each(|key| self.remove(key, state));
                // Before the first list of nodes came, it was not known whether there is one of this name.
                objects.into_iter().for_each(|read| self.insert(read, state));
            }
            Update::Changed(read) => self.insert(read, state),
            Update::Gone(key) => self.remove(&key, state),
            Update::Health(kind, health) => self.health(kind, health),
            Update::Announced(what, health) => {
                let before = self.announcement.remove(what);
                if let Err(reason) = health {
                    let issue = SourceIssue { file: format!("{}/api/v1/nodes/{}", self.url, self.node), line: None, reason };
                    if before.as_ref() != Some(&issue) {
                        tracing::warn!("{issue}");
                    }
                    self.announcement.insert(what, issue);
                }
            }
        }
    }

    fn insert(&mut self, read: Read, state: &mut Arc<ClusterState>) {
        if self.is_own(&read.key) {
            self.own.send_if_modified(|own| own.replace(read.announced.clone()).as_ref() != Some(&read.announced));
            self.network.send_if_modified(|network| std::mem::replace(network, read.network.clone()) != read.network);
        }
        match read.object {
            Ok(object) => {
                self.faults.remove(&read.key);
                // Most events change nothing that matters (a node's heartbeat): then the state is not copied.
                if !state.holds(&object) {
                    Arc::make_mut(state).insert(object);
                }
            }
            Err(reason) => {
                let reason = format!("{reason}; what it said before stays in force");
                let issue = SourceIssue { file: read.key.to_string(), line: None, reason };
                let known = self.faults.insert(read.key, issue.clone());
                if known.as_ref() != Some(&issue) {
                    tracing::warn!("{issue}");
                }
            }
        }
    }

    fn remove(&mut self, key: &ObjectKey, state: &mut Arc<ClusterState>) {
        self.faults.remove(key);
        if self.is_own(key) {
            self.own.send_replace(None);
            self.network.send_replace(None);
        }
        if state.has(key) {
            Arc::make_mut(state).remove(key);
        }
    }

    fn is_own(&self, key: &ObjectKey) -> bool {
        &*key.kind == "Node" && *key.name.name == *self.node
    }

    fn health(&mut self, kind: Kind, health: Result<(), String>) {
        match health {
            Ok(()) => {
                if self.ailing.remove(kind.name).is_some() {
                    tracing::info!("source.kubernetes: {}{}: in step with the server again", self.url, kind.path);
                }
            }
            Err(reason) => {
                let issue = SourceIssue { file: format!("{}{}", self.url, kind.path), line: None, reason };
                if self.ailing.insert(kind.name, issue.clone()).as_ref() != Some(&issue) {
                    tracing::warn!("source.kubernetes: {issue}; the last state stays in force");
                }
            }
        }
    }

    fn publish(&mut self, next: Arc<ClusterState>) {
        let all_listed = self.listed.len() == KINDS.len();
        let changed = !Arc::ptr_eq(&self.states.borrow(), &next);
        let last_change = if changed { Some(unix_now()) } else { self.statuses.borrow().last_change };
        let issues = self.ailing.values().chain(self.faults.values()).chain(self.announcement.values()).cloned().collect();
        let connected = all_listed && self.ailing.is_empty();
        let complete = all_listed || self.kept;
        let status = SourceStatus { kind: "kubernetes", connected, complete, errors: issues, last_change, objects: next.len() };
        // The state first: who sees that the source is connected finds the state that it is connected with.
        if changed {
            self.states.send_replace(next);
        }
        self.statuses.send_if_modified(|known| std::mem::replace(known, status.clone()) != status);
        if all_listed && let Some(waiting) = self.all_listed.take() {
            // Nobody waits if the start was given up.
            let _ = waiting.send(());
        }
    }
}
