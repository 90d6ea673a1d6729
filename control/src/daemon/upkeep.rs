//! Attachments, interfaces and addresses in step with each other, whatever died in between.
//!
//! A runtime that was told to delete a pod while no daemon ran was told that all is well; the shim left a note ([`NOTES`]), which is worked
//! off here. A pod whose interface is gone took its namespace with it, or lost its network for good: its address goes back. An address
//! without an attachment is one whose shim or daemon died half way.

use std::path::{Path, PathBuf};

use podgate_cni::Attachment;
use podgate_cni::protocol::Valid;
use podgate_cni::{NOTES, Response};
use serde_json::{Value, json};

use super::Daemon;
use super::answers::error;
use super::attachments::{holders, id_of};
use crate::pods::PodError;

impl Daemon {
    /// Does all of it. What fails is logged, stays and is tried again with the next audit.
    pub(super) async fn upkeep(&self) {
        for (path, attachment) in notes(&self.config.runtime_dir.join(NOTES)) {
            if let Some(attachment) = attachment {
                match self.detach(&attachment, None).await {
                    Ok(_) => tracing::info!(sandbox = %attachment.sandbox, ifname = %attachment.ifname, "detached, as asked for while no daemon ran"),
                    Err(Response::Error { message, .. }) => {
                        tracing::error!(sandbox = %attachment.sandbox, ifname = %attachment.ifname, "a detachment asked for earlier: {message}");
                        continue;
                    }
                    Err(_) => continue,
                }
            }
            if let Err(e) = std::fs::remove_file(&path) {
                tracing::warn!(path = %path.display(), error = %e, "a note that is done with cannot be removed");
            }
        }
        if let Err(e) = self.reap().await {
            tracing::error!(error = %e, "pods whose interface is gone");
        }
        self.open_tuns();
        self.settle_addresses();
    }

    /// Detaches pods whose interface is gone.
    async fn reap(&self) -> Result<(), PodError> {
        let lost: Vec<String> = self.inner.borrow().pods.lost()?.into_iter().map(|pod| pod.id.clone()).collect();
        for id in lost.iter().filter(|id| *id != super::probe::ID) {
            tracing::warn!(id, "its interface is gone");
            self.unplug(id, None).await?;
        }
        Ok(())
    }

    /// Makes addresses those of the attachments that there are.
    fn settle_addresses(&self) {
        if self.leaving.get() > 0 {
            return; // their addresses are still theirs; the next audit looks again
        }
        let inner = &mut *self.inner.borrow_mut();
        match inner.ipam.fix(&holders(&inner.pods)) {
            Ok(findings) => {
                for found in findings {
                    tracing::warn!(address = %found.address, owner = %found.owner, fixed = found.fixed, "{}", found.problem);
                }
            }
            Err(e) => tracing::error!(error = %e, "addresses and attachments"),
        }
    }

    /// CNI GC: takes away what a network has beside `valid`, and goes on past errors.
    pub(super) async fn collect(&self, network: &str, valid: &[Valid]) -> Result<Value, Response> {
        let is_valid = |id: &str| {
            valid.iter().any(|v| id_of(&Attachment { sandbox: v.sandbox.clone(), ifname: v.ifname.clone(), ..Attachment::default() }) == id)
        };
        let of_network: Vec<String> = {
            let inner = self.inner.borrow();
            inner.pods.list().filter(|pod| pod.network.as_deref() == Some(network)).map(|pod| pod.id.clone()).collect()
        };
        let (mut collected, mut failed) = (Vec::new(), Vec::new());
        for id in of_network.into_iter().filter(|id| !is_valid(id)) {
            match self.unplug(&id, None).await {
                Ok(_) => collected.push(id),
                Err(e) => failed.push(e.to_string()),
            }
        }
        if failed.is_empty() { Ok(json!({ "collected": collected })) } else { Err(error(100, failed.join("; "))) }
    }
}

/// The notes, with what each asks for; nothing where it cannot be understood, which is logged: such a note would stay for ever.
fn notes(directory: &Path) -> Vec<(PathBuf, Option<Attachment>)> {
    let found = std::fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
    let whole = found.filter(|path| path.extension().is_some_and(|e| e == "json") && !hidden(path));
    let read = |path: PathBuf| {
        let understood = std::fs::read(&path).map_err(|e| e.to_string()).and_then(|bytes| serde_json::from_slice(&bytes).map_err(|e| e.to_string()));
        if let Err(e) = &understood {
            tracing::error!(path = %path.display(), error = %e, "a note that cannot be understood");
        }
        (path, understood.ok())
    };
    whole.map(read).collect()
}

/// Half-written files have names that begin with a dot.
fn hidden(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'))
}
