//! What the daemon listens to beside its source: workers that find paths narrow, and the kernel's changes of rules, routes and devices.

use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use super::Daemon;
use crate::routing::{Event, Reconciler};

/// How often the workers are asked whether a path turned out narrow: until the answer is published, its packets are lost.
const PATHS_INTERVAL: Duration = Duration::from_millis(50);

/// Takes note of paths that workers found to be narrow.
pub async fn watch_paths(daemon: Rc<Daemon>) {
    let mut interval = tokio::time::interval(PATHS_INTERVAL);
    loop {
        interval.tick().await;
        if daemon.health.pending(Instant::now()).is_some() {
            daemon.settle();
        }
        if let Ok(dataplane) = daemon.dataplane() {
            dataplane.close_unplugged();
        }
        let found = daemon.dataplane().map_or(Vec::new(), |dataplane| dataplane.path_mtus());
        let narrow = &mut daemon.inner.borrow_mut().narrow_paths;
        for (peer, mtu) in found {
            if narrow.insert(peer, (mtu, Instant::now())).is_none_or(|(known, _)| known != mtu) {
                tracing::warn!(%peer, mtu, "the path to a peer is narrow");
                daemon.changed.notify_one();
            }
        }
    }
}

/// Keeps rules, routes and devices as they are to be, and takes note of what others change.
pub async fn watch_kernel(daemon: Rc<Daemon>, reconciler: Reconciler) {
    let (events, mut received) = mpsc::channel(64);
    let plan = daemon.plan.subscribe();
    tokio::task::spawn_local(async move {
        if let Err(error) = reconciler.run(plan, events).await {
            tracing::error!(%error, "rules and routes are no longer kept: restart the daemon");
        }
    });
    while let Some(event) = received.recv().await {
        match event {
            Event::Changed(side, changes) => {
                for what in &changes.added {
                    tracing::info!(%side, "put {what}");
                }
                for what in &changes.removed {
                    tracing::info!(%side, "took away {what}");
                }
                let prefix = format!("routing on {side}");
                let problems = &mut daemon.inner.borrow_mut().problems;
                problems.retain(|problem| !problem.starts_with(&prefix));
                problems.extend(changes.failed.iter().map(|failed| format!("{prefix}: {failed}")));
            }
            Event::DeviceLost(side) => {
                tracing::error!(%side, "the TUN is gone; opening it again");
                while let Err(error) = daemon.replace_dataplane().await {
                    tracing::error!(%error, "the dataplane");
                    tokio::time::sleep(Duration::from_millis(500)).await;
                }
                daemon.plan.send_modify(|_| {});
            }
            Event::DeviceBack(side) => tracing::info!(%side, "the TUN is back"),
            Event::NodeAddresses(_) => daemon.changed.notify_one(),
            Event::Failed(side, error) => tracing::error!(%side, %error, "rules and routes"),
        }
    }
}
