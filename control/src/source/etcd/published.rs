//! The slices that this node publishes of its own services, in etcd: they go with its registration.

use super::client::EtcdError;
use super::wire::{Compare, Op, TxnRequest};
use super::{Follower, Membership};
use crate::model::{Object, ObjectKey};

/// What is to be done about a slice.
enum Correction {
    Put,
    Delete,
    /// It is gone, or somebody else's by now.
    Forget,
}

impl Follower {
    /// Brings the next slice in line with what the node says of its services; the revision of what was written.
    pub(super) async fn correct_published(&mut self) -> Result<Option<i64>, EtcdError> {
        let Some((key, correction, text)) = self.next_correction() else { return Ok(None) };
        let Some(Membership { lease, term, published }) = &mut self.membership else { return Ok(None) };
        let operation = match correction {
            Correction::Put => Op::put(&key, &text, lease.id),
            Correction::Delete => Op::delete(&key),
            Correction::Forget => {
                published.remove(&key);
                return Ok(None);
            }
        };
        // Fenced: void if this node is no longer registered as it thinks it is. And void if somebody else has written meanwhile.
        let compare = vec![Compare::created(&self.keys.node(&self.node), *term), Compare::modified(&key, self.store.modified(&key))];
        let answer = self.client.txn(&TxnRequest { compare, success: vec![operation], ..TxnRequest::default() }).await?;
        if answer.succeeded {
            match correction {
                Correction::Put => published.insert(key),
                Correction::Delete | Correction::Forget => published.remove(&key),
            };
        }
        Ok(Some(answer.header.revision.0))
    }

    /// The first slice that is not as it is to be: its key, what to do, and its text.
    fn next_correction(&self) -> Option<(String, Correction, String)> {
        let published = &self.membership.as_ref()?.published;
        let report = self.reports.borrow();
        let key = |object: ObjectKey| self.keys.object(&object);
        let wanted = report.published.iter().map(|slice| (key(slice.object.key()), &slice.text));
        // One of before a restart is put again, to go with the present lease.
        let stale = |(key, text): &(String, &String)| self.store.value(key) != Some(text.as_str()) || !published.contains(key);
        if let Some((key, text)) = wanted.clone().filter(|(key, _)| !self.is_foreign(key)).find(stale) {
            return Some((key, Correction::Put, text.clone()));
        }
        let surplus = published.iter().find(|key| wanted.clone().all(|(wanted, _)| wanted != **key))?;
        let ours = self.store.value(surplus).is_some() && !self.is_foreign(surplus);
        Some((surplus.clone(), if ours { Correction::Delete } else { Correction::Forget }, String::new()))
    }

    /// Whether there is an object under `key` that this node did not publish.
    fn is_foreign(&self, key: &str) -> bool {
        match self.store.object(key) {
            Some(Object::EndpointSlice(slice)) => slice.publisher.as_deref() != Some(&*self.node),
            _ => self.store.value(key).is_some(),
        }
    }
}
