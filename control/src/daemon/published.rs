//! The services of this node's own: their checks, and their slices among the cluster's objects.
//!
//! A slice takes two ways. This gateway has it at once, beside what the source says, so that a verdict holds here whatever becomes of the source;
//! and a source that takes part in the cluster tells it to the other nodes ([`NodeReport::published`](crate::source::NodeReport)). The others hear
//! nothing of an endpoint before its first try has ended: what a predecessor told them is likelier true than anything that could be guessed.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;

use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;

use super::Inner;
use super::machine::Machine;
use crate::config::{Check, Config, Place, Publish};
use crate::model::{ClusterState, Object};
use crate::pods::Pods;
use crate::publish::check::attempt;
use crate::publish::{Course, Published, Verdict, slice};

/// What is published, and what is known of each endpoint.
#[derive(Default)]
pub struct Publisher {
    /// By the place in the configuration and the address.
    targets: BTreeMap<(usize, IpAddr), Target>,
    changed: Rc<Notify>,
    /// What the source said, the slices that were put beside it, and both together.
    merged: Option<(Arc<ClusterState>, Vec<Published>, Arc<ClusterState>)>,
}

/// An endpoint. Dropping it ends its check.
struct Target {
    verdict: Rc<Cell<Verdict>>,
    checker: Option<JoinHandle<()>>,
}

impl Drop for Target {
    fn drop(&mut self) {
        if let Some(checker) = &self.checker {
            checker.abort();
        }
    }
}

impl Publisher {
    /// Told when a verdict has changed.
    pub fn changed(&self) -> Rc<Notify> {
        self.changed.clone()
    }

    /// Brings the endpoints in line with the node's addresses and its pods.
    fn follow(&mut self, config: &Config, node: (&Machine, &Pods)) {
        let mut wanted = BTreeMap::new();
        for (at, publish) in config.publish.iter().enumerate() {
            wanted.extend(addresses(publish, node).into_iter().map(|address| ((at, address), publish)));
        }
        self.targets.retain(|key, _| wanted.contains_key(key));
        for (key, publish) in wanted {
            let first = if publish.check.is_some() { Verdict::Unknown } else { Verdict::Healthy };
            self.targets.entry(key).or_insert_with(|| Target { verdict: Rc::new(Cell::new(first)), checker: None });
        }
    }

    /// Begins to check what is not checked yet. Pods can be reached once the workers run.
    pub fn begin(&mut self, config: &Config) {
        for ((at, address), target) in &mut self.targets {
            let publish = &config.publish[*at];
            if let (Some(check), None) = (&publish.check, &target.checker) {
                let name = format!("{} at {address}", publish.service);
                let watch = watch(name, check.clone(), *address, target.verdict.clone(), self.changed.clone());
                target.checker = Some(tokio::task::spawn_local(watch));
            }
        }
    }

    /// The slices, each with what is known of its endpoint.
    fn slices(&self, config: &Config) -> Vec<(Verdict, Published)> {
        let of = |((at, address), target): (&(usize, IpAddr), &Target)| {
            let verdict = target.verdict.get();
            (verdict, slice(&config.publish[*at], &config.node, *address, verdict))
        };
        self.targets.iter().map(of).collect()
    }

    /// What the source says, with these slices in it.
    fn merge(&mut self, source: &Arc<ClusterState>, slices: Vec<Published>) -> Arc<ClusterState> {
        if slices.is_empty() {
            self.merged = None;
            return source.clone();
        }
        if let Some((before, with, merged)) = &self.merged
            && Arc::ptr_eq(before, source)
            && *with == slices
        {
            return merged.clone();
        }
        let mut state = ClusterState::clone(source);
        slices.iter().for_each(|slice| state.insert(slice.object.clone()));
        let merged = Arc::new(state);
        self.merged = Some((source.clone(), slices, merged.clone()));
        merged
    }
}

/// Where the endpoints of `publish` are now.
fn addresses(publish: &Publish, (machine, pods): (&Machine, &Pods)) -> BTreeSet<IpAddr> {
    match &publish.place {
        Place::Node => machine.underlay.iter().copied().collect(),
        Place::Addresses(addresses) => addresses.iter().copied().collect(),
        Place::Pod(name) => {
            let pod = pods.list().find(|pod| pod.name == *name);
            pod.into_iter().flat_map(|pod| pod.addresses.iter().copied()).collect()
        }
    }
}

/// Checks an endpoint for ever.
async fn watch(name: String, check: Check, address: IpAddr, verdict: Rc<Cell<Verdict>>, changed: Rc<Notify>) {
    let mut course = Course::new(&check);
    let mut interval = tokio::time::interval(check.interval);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        let result = attempt(&check, address).await;
        let Some(now) = course.note(&result) else { continue };
        match result {
            Ok(()) => tracing::info!("published {name}: ready"),
            Err(why) => tracing::warn!("published {name}: not ready: {why}"),
        }
        verdict.set(now);
        changed.notify_one();
    }
}

/// What the source says and what is known of the node's own services, brought together.
pub struct Merged {
    /// The cluster's objects, with the node's own slices among them.
    pub cluster: Arc<ClusterState>,
    /// Those of the slices that others are told of.
    pub told: Vec<Published>,
    /// What stands in the way.
    pub problems: BTreeSet<String>,
}

/// Brings the cluster's objects in line with what the source says and what is known of the node's own services.
pub fn merge(publisher: &mut Publisher, config: &Config, inner: &mut Inner) {
    let Merged { cluster, told, problems } = merged(publisher, config, (&inner.machine, &inner.pods), &inner.source_state);
    inner.cluster = cluster;
    inner.published = told;
    inner.problems.retain(|problem| !problem.starts_with("publish"));
    inner.problems.extend(problems);
}

/// The same, before there is anything to bring in line.
pub fn merged(publisher: &mut Publisher, config: &Config, node: (&Machine, &Pods), source_state: &Arc<ClusterState>) -> Merged {
    let mut problems = BTreeSet::new();
    if config.publish.is_empty() {
        return Merged { cluster: source_state.clone(), told: Vec::new(), problems };
    }
    publisher.follow(config, node);
    let (mut here, mut told) = (Vec::new(), Vec::new());
    for (verdict, published) in publisher.slices(config) {
        match (standing(source_state, &published.object, &config.node), verdict) {
            (Standing::Foreign, _) => {
                let reason = "is there already and was not published by this node, so it counts: delete it, or take the service out of `publish`";
                problems.insert(format!("publish: the EndpointSlice {} {reason}", published.name));
            }
            // What is there is what a predecessor told.
            (Standing::Own, Verdict::Unknown) => {}
            (Standing::Free, Verdict::Unknown) => here.push(published),
            (Standing::Own | Standing::Free, Verdict::Healthy | Verdict::Unhealthy) => {
                told.push(published.clone());
                here.push(published);
            }
        }
    }
    Merged { cluster: publisher.merge(source_state, here), told, problems }
}

/// Whose a slice of some name is in the source.
enum Standing {
    /// Nobody's.
    Free,
    /// This node's.
    Own,
    /// Somebody else's.
    Foreign,
}

/// Whose the slice is that has the name of `object`.
fn standing(source: &ClusterState, object: &Object, node: &str) -> Standing {
    let Object::EndpointSlice(slice) = object else { return Standing::Free };
    let there = slice.service.as_ref().and_then(|service| source.slices(service)?.get(&slice.name.name));
    match there {
        Some(there) if there.publisher.as_deref() == Some(node) => Standing::Own,
        None if !source.has(&object.key()) => Standing::Free,
        _ => Standing::Foreign,
    }
}
