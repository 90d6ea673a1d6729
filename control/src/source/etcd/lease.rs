//! The lease that a node's registration goes with, renewed by a task of its own: nothing else that the source waits for can make it late.

use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::sleep;

use super::client::{Client, EtcdError};

/// How a lease is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// A renewal that was asked for then was granted.
    Renewed(Instant),
    /// It is over.
    Lost,
}

/// A lease. Dropping it leaves it to end by itself: a successor may come in time.
#[derive(Debug)]
pub struct Lease {
    /// Its number in etcd.
    pub id: i64,
    /// How it is.
    pub standing: watch::Receiver<Standing>,
    keeper: JoinHandle<()>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.keeper.abort();
    }
}

impl Lease {
    /// A new one of `length`, in whole seconds.
    pub async fn grant(client: &Client, length: Duration) -> Result<Lease, EtcdError> {
        let asked = Instant::now();
        let id = client.grant(length.as_secs()).await?.id.0;
        let (sender, standing) = watch::channel(Standing::Renewed(asked));
        let keeper = tokio::spawn(keep(client.clone(), id, length, sender));
        Ok(Lease { id, standing, keeper })
    }

    /// How it is now.
    pub fn now(&self) -> Standing {
        *self.standing.borrow()
    }
}

/// Renews the lease three times within its length, and sooner again after a failure, until it is over.
async fn keep(client: Client, id: i64, length: Duration, standing: watch::Sender<Standing>) {
    let mut pause = length / 3;
    loop {
        sleep(pause).await;
        let asked = Instant::now();
        match client.keep_alive(id).await {
            Ok(true) => {
                standing.send_replace(Standing::Renewed(asked));
                pause = length / 3;
            }
            Ok(false) => {
                standing.send_replace(Standing::Lost);
                return;
            }
            Err(error) => {
                tracing::debug!(%error, "the lease of this node could not be renewed");
                pause = length / 10;
            }
        }
    }
}
