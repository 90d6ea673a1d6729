//! How far the workers are behind what is wanted, and what changed on the way.
//!
//! An update is pending from the event until every worker reads the new tables. It is noted when it has been handed out, never before: what
//! is told about it costs its way to the workers nothing.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use podgate_core::addr::Addr;
use podgate_core::snapshot::Generation;
use serde_json::{Value, json};

use super::{Daemon, Inner};
use crate::compile::LocalNode;
use crate::diff::{self, Inputs};
use crate::model::ClusterState;

/// How long workers may take to take note of a new generation before it is said that they are stuck.
const PUBLISH_TIMEOUT: Duration = Duration::from_secs(1);

/// For so long the control thread waits for them with nothing but its place on the processor given up.
const PUBLISH_YIELD: Duration = Duration::from_micros(300);

/// How many of the objects that wait are named in `podgate status`.
const NAMED_MAX: usize = 8;

/// What the tables were compiled from, and as which generation.
pub(super) struct Known {
    pub generation: Generation,
    state: Arc<ClusterState>,
    local: Arc<LocalNode>,
}

impl Known {
    pub fn of(inner: &Inner) -> Known {
        let (state, local) = inner.compiled.inputs();
        Known { generation: inner.compiled.snapshot.generation, state: state.clone(), local: local.clone() }
    }
}

impl Daemon {
    /// Publishes the compiled snapshot, waits for the workers to use it, and ends what must not go on.
    pub(super) async fn publish(&self, generation: Generation, before: &Known) {
        let dataplane = match self.dataplane() {
            Ok(dataplane) => dataplane,
            // Whoever replaces it starts with these tables.
            Err(_) => return self.note_changes(before),
        };
        let snapshot = Arc::new(self.inner.borrow().compiled.snapshot.clone());
        let previous = dataplane.snapshot();
        dataplane.publish(snapshot.clone());
        self.note_changes(before);
        let start = Instant::now();
        while dataplane.generations().iter().any(|seen| *seen < generation) {
            let waited = start.elapsed();
            if waited > PUBLISH_TIMEOUT {
                tracing::error!(?generation, "a worker does not take note of the new tables");
                break;
            }
            // Workers take some ten microseconds, and tokio knows no time below a millisecond.
            if waited < PUBLISH_YIELD { std::thread::yield_now() } else { tokio::time::sleep(Duration::from_millis(1)).await }
        }
        self.settle();
        // Only now: a worker with the old tables could open such a flow again.
        super::flows::tidy(dataplane.flows(), &previous, &snapshot);
        dataplane.set_udp_ports(super::demands::udp_ports(&self.inner.borrow().compiled));
    }

    /// Takes note of what changed since `before`.
    pub(super) fn note_changes(&self, before: &Known) {
        let inner = &mut *self.inner.borrow_mut();
        let after = Known::of(inner);
        let now = SystemTime::now();
        let changes = diff::changes(Inputs { state: &before.state, local: &before.local }, Inputs { state: &after.state, local: &after.local });
        let count = |kind: &str| changes.iter().filter(|change| change.kind == kind).count() as u64;
        if !changes.is_empty() || before.generation != after.generation {
            inner.programming.queued(now, count("EndpointSlice"), count("Service"));
        }
        if !Arc::ptr_eq(&before.state, &after.state) {
            diff::each_slice(&before.state, &after.state, |was, is| {
                // What goes has nothing to measure it by.
                let Some(triggered) = is.and_then(|slice| slice.triggered) else { return };
                if was.and_then(|slice| slice.triggered) != Some(triggered) {
                    inner.programming.slice_changed(triggered);
                }
            });
        }
        inner.history.record(after.generation.0, now, changes);
        let node = after.state.nodes().get(&after.local.name);
        self.health.set_eligible(node.is_none_or(|node| node.leaving.is_none()));
    }

    /// Takes note if the workers have all there is.
    pub(super) fn settle(&self) {
        let Ok(dataplane) = self.dataplane() else { return };
        let inner = &mut *self.inner.borrow_mut();
        let generation = inner.compiled.snapshot.generation;
        if dataplane.generations().iter().any(|seen| *seen < generation) {
            return;
        }
        let now = SystemTime::now();
        match self.health.pending(Instant::now()) {
            Some(waited) => {
                inner.programming.synced(now, waited);
                self.health.applied(now);
            }
            None => inner.programming.settled(now),
        }
    }

    /// What waits for the workers, for how long, and for which of them.
    pub(super) fn pending(&self, inner: &Inner) -> Value {
        let (Some(waiting), Ok(dataplane)) = (self.health.pending(Instant::now()), self.dataplane()) else { return Value::Null };
        let generation = inner.compiled.snapshot.generation;
        let behind = dataplane.generations().into_iter().enumerate().filter(|(_, seen)| *seen < generation).map(|(worker, _)| worker);
        let objects: Vec<String> = inner.history.latest().map(ToString::to_string).collect();
        json!({
            "generation": generation.0,
            "seconds": waiting.as_secs_f64(),
            "workers": behind.collect::<Vec<_>>(),
            "objects": objects.iter().take(NAMED_MAX).collect::<Vec<_>>(),
            "objectsMore": objects.len().saturating_sub(NAMED_MAX),
        })
    }

    /// `podgate diff`.
    pub(super) fn diff(&self, since: Option<u64>) -> Result<Value, podgate_cni::Response> {
        let inner = self.inner.borrow();
        let diff::Since { from, to, objects, left_out } = inner.history.since(since).map_err(|e| super::answers::error(4, e.to_string()))?;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |now| now.as_secs());
        let rows = objects.into_iter().map(|object| {
            let mut row = json!(object);
            row["ageSeconds"] = json!(now.saturating_sub(object.at_unix_seconds));
            row["detail"] = json!(object.details.join("; "));
            row
        });
        let mut value = super::views::table("changes", rows.collect());
        value["from"] = json!(from);
        value["to"] = json!(to);
        value["leftOut"] = json!(left_out);
        Ok(value)
    }

    /// Answers load balancers that ask for the health of services with the Local policy.
    pub(super) async fn serve_health_checks(&self) {
        let mut servers = self.service_health.lock().await;
        let (checks, addresses): (_, Vec<IpAddr>) = {
            let inner = self.inner.borrow();
            let addresses = inner.compiled.snapshot.node.node_port_addresses.iter().map(|addr: &Addr| addr.ip());
            (inner.compiled.health_checks.values().cloned().collect::<Vec<_>>(), addresses.collect())
        };
        servers.sync(&checks, &addresses).await;
        let inner = &mut *self.inner.borrow_mut();
        let problems = servers.problems().iter().cloned().collect();
        for problem in inner.health_check_problems.difference(&problems) {
            tracing::info!("no longer so: {problem}");
        }
        for problem in problems.difference(&inner.health_check_problems) {
            tracing::warn!("{problem}");
        }
        inner.health_check_problems = problems;
    }
}
