//! What those around the daemon are told of it: the service manager that it is alive, container runtimes that pods may come.

use super::Daemon;
use crate::notify::Notifier;

/// Tells the service manager, as often as it asks to be told, that this thread goes on.
pub(super) async fn watchdog(notifier: Notifier) {
    let Some(interval) = notifier.interval() else { return };
    let mut ticks = tokio::time::interval(interval);
    loop {
        ticks.tick().await;
        notifier.alive();
    }
}

impl Daemon {
    /// Puts the CNI configuration in its place: container runtimes take it for a promise that pods can be attached.
    pub(super) fn promise(&self) {
        let Some(places) = &self.cni else { return };
        match places.install_configuration(&self.config.socket()) {
            Ok(true) => tracing::info!(file = %places.configuration().display(), "the CNI configuration is installed"),
            Ok(false) => {}
            Err(error) => tracing::error!(%error, "the CNI configuration is not installed, so no pods will come"),
        }
        for other in places.before_ours() {
            tracing::warn!(file = %other.display(), "container runtimes take this CNI configuration before ours: move it away");
        }
    }
}
