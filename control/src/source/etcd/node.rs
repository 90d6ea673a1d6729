//! This node among the others: its registration, its blocks, and how long it may rely on them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use ipnetwork::IpNetwork;
use serde_json::json;

use super::client::EtcdError;
use super::lease::{Lease, Standing};
use super::store::{MACHINE_ANNOTATION, machine};
use super::wire::{Compare, Op, TxnRequest};
use super::{Follower, Membership};
use crate::blocks::{Record, Step, View, held, next_step, proven};
use crate::model::{Announcement, Object};
use crate::source::{SourceIssue, Tenure, manifest};

/// A node is short of addresses of a family when fewer than this are free, or a quarter of a block where that is less: so many pods can come
/// while the next block is claimed.
const FREE_MIN: u128 = 64;

/// What the key `cluster` says: nodes that cut other ranges would cut blocks that overlap.
pub(super) fn cluster(pod_cidrs: &[IpNetwork]) -> String {
    let mut ranges: Vec<String> = pod_cidrs.iter().map(ToString::to_string).collect();
    ranges.sort();
    json!({ "podCIDRs": ranges }).to_string()
}

impl Follower {
    /// Does the next thing that is to be done for this node, if it has seen what the last one came to.
    pub(super) async fn manage(&mut self) -> Result<(), EtcdError> {
        self.endings.note(self.store.ledger(), self.store.register(), self.started.elapsed());
        if self.awaited.is_some() {
            return Ok(());
        }
        let written = match &self.membership {
            None => self.join().await?,
            Some(membership) if membership.lease.now() == Standing::Lost => {
                tracing::warn!(node = self.node, "this node's registration was lost; it registers again");
                self.membership = None;
                self.join().await?
            }
            Some(_) => match self.correct_node().await? {
                Some(revision) => Some(revision),
                None => match self.correct_published().await? {
                    Some(revision) => Some(revision),
                    None => self.step().await?,
                },
            },
        };
        self.awaited = written.map(|revision| (revision, Instant::now()));
        Ok(())
    }

    /// Registers; the revision of what was written.
    async fn join(&mut self) -> Result<Option<i64>, EtcdError> {
        let key = self.keys.cluster();
        match self.store.value(&key) {
            None => {
                let claim =
                    TxnRequest { compare: vec![Compare::created(&key, 0)], success: vec![Op::put(&key, &self.cluster, 0)], ..TxnRequest::default() };
                return Ok(Some(self.client.txn(&claim).await?.header.revision.0));
            }
            Some(agreed) if agreed != self.cluster => {
                let reason = format!(
                    "the cluster's pod ranges are {agreed}, and this node's podgate.yaml says {}: give every node the same podCIDRs. This node gets no \
                     pod range",
                    self.cluster
                );
                self.obstacle = Some(SourceIssue { file: key, line: None, reason });
                return Ok(None);
            }
            Some(_) => {}
        }
        let key = self.keys.node(&self.node);
        if let Some(other) = self.store.value(&key).and_then(machine).filter(|other| *other != self.machine) {
            let reason = format!(
                "another machine ({other}) is registered as {}: give this one a name of its own (`node` in podgate.yaml). If it was set up anew, it \
                 can join {} s after its predecessor ended",
                self.node,
                self.times.lease.as_secs()
            );
            self.obstacle = Some(SourceIssue { file: key, line: None, reason });
            return Ok(None);
        }
        let lease = Lease::grant(&self.client, self.times.lease).await?;
        let node = self.own_node();
        let put = || vec![Op::put(&key, &node, lease.id)];
        let first = TxnRequest { compare: vec![Compare::created(&key, 0)], success: put(), failure: vec![Op::read(&key)] };
        let mut answer = self.client.txn(&first).await?;
        let mut term = answer.header.revision.0;
        if !answer.succeeded {
            let revision = answer.header.revision.0;
            let found = answer.read();
            let other = |value: &[u8]| machine(&String::from_utf8_lossy(value)).is_some_and(|other| other != self.machine);
            let Some(found) = found.filter(|found| !other(&found.value.0)) else {
                // It came or went this moment: the watch will tell.
                self.client.revoke(lease.id).await?;
                return Ok(Some(revision));
            };
            // Our own, of before a restart, or written by hand. Its lease ends without it.
            let again = TxnRequest { compare: vec![Compare::modified(&key, found.mod_revision.0)], success: put(), ..TxnRequest::default() };
            answer = self.client.txn(&again).await?;
            if !answer.succeeded {
                self.client.revoke(lease.id).await?;
                return Ok(Some(answer.header.revision.0));
            }
            term = found.create_revision.0;
        }
        let revision = answer.header.revision.0;
        tracing::info!(node = self.node, term, lease = lease.id, "registered");
        self.obstacle = None;
        self.membership = Some(Membership { lease, term, published: BTreeSet::new() });
        Ok(Some(revision))
    }

    /// Writes this node's object if etcd has another one than it should.
    async fn correct_node(&mut self) -> Result<Option<i64>, EtcdError> {
        let Some(Membership { lease, term, .. }) = &self.membership else { return Ok(None) };
        let (key, node) = (self.keys.node(&self.node), self.own_node());
        match self.store.value(&key) {
            // Gone behind the lease's back; or gone with the lease, which its keeper will find out.
            None => {
                self.membership = None;
                return Ok(None);
            }
            Some(value) if value == node => return Ok(None),
            Some(_) => {}
        }
        let write =
            TxnRequest { compare: vec![Compare::created(&key, *term)], success: vec![Op::put(&key, &node, lease.id)], ..TxnRequest::default() };
        let answer = self.client.txn(&write).await?;
        if !answer.succeeded {
            self.membership = None;
        }
        Ok(Some(answer.header.revision.0))
    }

    /// Does what is to be done about blocks.
    async fn step(&mut self) -> Result<Option<i64>, EtcdError> {
        let Some(me) = self.record() else { return Ok(None) };
        let view = View {
            cuts: &self.cuts,
            ledger: self.store.ledger(),
            register: self.store.register(),
            endings: &self.endings,
            me: &me,
            short: self.short(),
            now: self.started.elapsed(),
            times: self.times,
        };
        let Some(step) = next_step(&view) else { return Ok(None) };
        let line = serde_json::to_string(&me).expect("a record is always JSON");
        let (block, condition, operation) = match step {
            Step::Claim { block } => (block, Compare::created(&self.keys.block(block), 0), Op::put(&self.keys.block(block), &line, 0)),
            Step::Renew { block, modified } => {
                (block, Compare::modified(&self.keys.block(block), modified), Op::put(&self.keys.block(block), &line, 0))
            }
            Step::TakeBack { block, modified } => (block, Compare::modified(&self.keys.block(block), modified), Op::delete(&self.keys.block(block))),
        };
        // Fenced: void if this node is no longer registered as it thinks it is.
        let compare = vec![Compare::created(&self.keys.node(&self.node), me.term), condition];
        let answer = self.client.txn(&TxnRequest { compare, success: vec![operation], ..TxnRequest::default() }).await?;
        if answer.succeeded {
            tracing::info!(%block, "{}", match step {
                Step::Claim { .. } => "claimed a block of addresses",
                Step::Renew { .. } => "a block of addresses is this node's as before",
                Step::TakeBack { .. } => "took back a block of a node that is gone",
            });
        }
        Ok(Some(answer.header.revision.0))
    }

    /// What this node writes into the ledger.
    fn record(&self) -> Option<Record> {
        let membership = self.membership.as_ref()?;
        Some(Record { node: self.node.clone(), machine: self.machine.clone(), term: membership.term })
    }

    /// Whether more addresses are needed, of IPv4 and of IPv6. Figures about other blocks than the present ones are of before.
    fn short(&self) -> [bool; 2] {
        let report = self.reports.borrow();
        let current = report.ranges == held(self.store.ledger(), &self.node, &self.machine);
        [true, false].map(|v4| {
            let at = usize::from(!v4);
            let block_len = self.cuts.iter().filter(|cut| cut.range().is_ipv4() == v4).map(|cut| cut.block_len()).min().unwrap_or(0);
            current && report.used[at] > 0 && report.free[at] < FREE_MIN.min(block_len / 4)
        })
    }

    /// This node's object as it is to be.
    fn own_node(&self) -> String {
        let report = self.reports.borrow();
        let blocks: Vec<String> = held(self.store.ledger(), &self.node, &self.machine).iter().map(ToString::to_string).collect();
        let underlay: Vec<String> = report.underlay.iter().map(ToString::to_string).collect();
        let addresses: Vec<_> = underlay.iter().map(|address| json!({"type": "InternalIP", "address": address})).collect();
        let mut annotations: BTreeMap<&str, String> = Announcement::annotations(&report.underlay, &self.overlay, report.underlay_mtu).into();
        annotations.insert(MACHINE_ANNOTATION, self.machine.clone());
        let node = json!({
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {
                "name": self.node,
                "labels": {"kubernetes.io/hostname": self.node},
                "annotations": annotations,
            },
            "spec": if blocks.is_empty() { json!({}) } else { json!({"podCIDR": blocks[0], "podCIDRs": blocks}) },
            "status": {"addresses": addresses},
        });
        node.to_string()
    }

    /// Brings what the state says of this node in line with what the node knows.
    pub(super) fn note_own_node(&mut self) {
        let key = self.keys.node(&self.node);
        if let Ok(objects) = manifest::parse_json(&key, &self.own_node())
            && let Some((_, node @ Object::Node(_))) = objects.into_iter().next()
        {
            self.store.set_own_node(node);
        }
    }

    /// Says which blocks addresses may be given out of, and until when.
    pub(super) fn publish_tenure(&mut self) {
        let (Some(membership), Some(me)) = (&self.membership, self.record()) else {
            // Not registered now. What was proven before holds until its time is over.
            return;
        };
        let Standing::Renewed(asked) = membership.lease.now() else { return };
        let blocks = proven(self.store.ledger(), self.store.register(), &me);
        let until = asked + self.times.tenure();
        self.tenures.send_if_modified(|tenure| {
            let next = Tenure { blocks, until: Some(until) };
            std::mem::replace(tenure, next.clone()) != next
        });
    }
}

impl Tenure {
    /// Nothing can be given out.
    pub(super) const NONE: Tenure = Tenure { blocks: Vec::new(), until: None };

    /// Whether an address may be given out now.
    pub fn covers(&self, address: std::net::IpAddr) -> bool {
        self.until.is_some_and(|until| Instant::now() < until) && self.blocks.iter().any(|block| block.contains(address))
    }
}
