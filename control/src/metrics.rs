//! Metrics over HTTP, in Prometheus' text format: kube-proxy's names, so that its dashboards go on working, and our own with units.
//!
//! What is counted elsewhere is not counted twice: a page is made when it is asked for, from the workers' own counters ([`Page`] is the
//! format, `daemon/metrics.rs` says what is on it). Only what has no other place is kept here: [`Programming`], how long changes take.
//!
//! Format: <https://prometheus.io/docs/instrumenting/exposition_formats/>, text version 0.0.4. Upstream names: Kubernetes
//! `pkg/proxy/metrics/metrics.go`.

mod page;

use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};

pub use page::{Kind, Page};

/// How many pages may be waited for at a time: each costs the control thread some milliseconds.
const WAITING_MAX: usize = 4;

/// A histogram with fixed upper bounds.
#[derive(Clone, Debug)]
pub struct Histogram {
    bounds: Vec<f64>,
    /// How many values lie between a bound and the one before it; behind the last one, those above all.
    counts: Vec<u64>,
    sum: f64,
}

impl Histogram {
    /// With these upper bounds, in ascending order.
    pub fn new(bounds: Vec<f64>) -> Histogram {
        let counts = vec![0; bounds.len() + 1];
        Histogram { bounds, counts, sum: 0.0 }
    }

    /// Counts a value. A bound belongs to what is below it.
    pub fn observe(&mut self, value: f64) {
        self.observe_many(value, 1);
    }

    /// Counts a value so many times.
    pub fn observe_many(&mut self, value: f64, times: u64) {
        self.counts[self.bounds.partition_point(|bound| *bound < value)] += times;
        self.sum += value * times as f64;
    }

    /// How many values there are at or below each bound, and at last how many at all.
    pub fn cumulated(&self) -> impl Iterator<Item = (Option<f64>, u64)> {
        let bounds = self.bounds.iter().copied().map(Some).chain([None]);
        bounds.zip(self.counts.iter().scan(0, |sum, count| {
            *sum += count;
            Some(*sum)
        }))
    }

    /// The sum of all values.
    pub fn sum(&self) -> f64 {
        self.sum
    }
}

/// How long changes take to reach the workers, in kube-proxy's terms.
#[derive(Debug)]
pub struct Programming {
    /// From the time that the endpoints controller notes on a slice until the workers have it, in seconds.
    pub network: Histogram,
    /// From the event until the workers have it, in seconds.
    pub sync: Histogram,
    /// When an update was last there to be applied.
    pub last_queued: Option<SystemTime>,
    /// When the workers last had all there was.
    pub last_synced: Option<SystemTime>,
    /// Changes of endpoint slices, and of services.
    pub changes: [Changes; 2],
    /// Before this nothing is measured: it waited for us to start.
    started: SystemTime,
    /// When what waits had happened.
    triggered: Vec<SystemTime>,
}

/// Changes of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// So far.
    pub total: u64,
    /// Of these, the workers do not have yet.
    pub pending: u64,
}

impl Programming {
    /// For a gateway that started at `started`.
    pub fn new(started: SystemTime) -> Programming {
        // Upstream's: 1 ms, doubled 14 times.
        let sync = (0..15).map(|n| 0.001 * f64::from(1 << n)).collect();
        // Upstream's: quarter seconds, seconds to a minute, five seconds to two minutes, half minutes to five.
        let ranges = [(25, 50, 25), (100, 5_900, 100), (6_000, 11_500, 500), (12_000, 30_000, 3_000)];
        let network = ranges.into_iter().flat_map(|(from, to, step)| (from..=to).step_by(step)).map(|cs: u32| f64::from(cs) / 100.0).collect();
        Programming {
            network: Histogram::new(network),
            sync: Histogram::new(sync),
            last_queued: None,
            last_synced: None,
            changes: [Changes::default(); 2],
            started,
            triggered: Vec::new(),
        }
    }

    /// Takes note of a slice that came or changed for something that had happened at `triggered`.
    pub fn slice_changed(&mut self, triggered: SystemTime) {
        if triggered >= self.started {
            self.triggered.push(triggered);
        }
    }

    /// Takes note of so many changed slices and services.
    pub fn queued(&mut self, now: SystemTime, slices: u64, services: u64) {
        self.last_queued = Some(now);
        for (changes, more) in self.changes.iter_mut().zip([slices, services]) {
            changes.total += more;
            changes.pending += more;
        }
    }

    /// Takes note that the workers have all there is. `waited` is how long the first of it waited.
    pub fn synced(&mut self, now: SystemTime, waited: Duration) {
        self.sync.observe(waited.as_secs_f64());
        self.settled(now);
        self.last_synced = Some(now);
    }

    /// Takes note that what changed asked nothing of the workers.
    pub fn settled(&mut self, now: SystemTime) {
        for triggered in std::mem::take(&mut self.triggered) {
            // Another machine's clock said when: it may be ahead of ours.
            self.network.observe(now.duration_since(triggered).unwrap_or_default().as_secs_f64());
        }
        self.changes.iter_mut().for_each(|changes| changes.pending = 0);
    }
}

/// Somebody who waits for a page.
pub type Waiting = oneshot::Sender<String>;

/// Why metrics cannot be served.
#[derive(Debug, thiserror::Error)]
#[error(
    "metrics cannot be served on {address}: {source}. Another program has the port (kube-proxy, perhaps), or the address is not this machine's; \
     `metrics.address` in podgate.yaml names it"
)]
pub struct MetricsError {
    address: SocketAddr,
    source: std::io::Error,
}

/// Listens on `address`. Each request for `/metrics` is handed on, and answered with what comes back. Runs inside a `LocalSet`.
pub async fn serve(address: SocketAddr) -> Result<mpsc::Receiver<Waiting>, MetricsError> {
    let listener = TcpListener::bind(address).await.map_err(|source| MetricsError { address, source })?;
    let (asks, asked) = mpsc::channel(WAITING_MAX);
    let router = Router::new().route("/metrics", get(move || page(asks.clone())));
    tokio::task::spawn_local(async move {
        if let Err(error) = axum::serve(listener, router).await {
            tracing::error!(%address, %error, "metrics are no longer served");
        }
    });
    Ok(asked)
}

async fn page(asks: mpsc::Sender<Waiting>) -> Response {
    let (answer, answered) = oneshot::channel();
    if asks.try_send(answer).is_err() {
        return (StatusCode::SERVICE_UNAVAILABLE, "too many ask at once\n").into_response();
    }
    match answered.await {
        Ok(text) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response(),
        Err(_) => (StatusCode::SERVICE_UNAVAILABLE, "the gateway is stopping\n").into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_millis(ms)
    }

    fn total(histogram: &Histogram) -> u64 {
        histogram.cumulated().last().unwrap().1
    }

    #[test]
    fn a_value_counts_at_its_own_bound_and_at_every_one_above() {
        let mut histogram = Histogram::new(vec![1.0, 2.0]);
        [0.5, 1.0, 1.5, 3.0].into_iter().for_each(|value| histogram.observe(value));
        assert_eq!(histogram.cumulated().collect::<Vec<_>>(), [(Some(1.0), 2), (Some(2.0), 3), (None, 4)]);
        assert_eq!(histogram.sum(), 6.0);
    }

    #[test]
    fn the_bounds_are_upstreams() {
        let programming = Programming::new(at(0));
        let network = &programming.network.bounds;
        assert_eq!(network.len(), 2 + 59 + 12 + 7);
        assert_eq!((network[0], network[1], network[2], network[60], network[61]), (0.25, 0.5, 1.0, 59.0, 60.0));
        assert_eq!((network[72], network[73], *network.last().unwrap()), (115.0, 120.0, 300.0));
        assert_eq!((programming.sync.bounds[0], programming.sync.bounds[14]), (0.001, 16.384));
    }

    #[test]
    fn programming_is_measured_from_the_trigger_once_the_workers_have_it() {
        let mut programming = Programming::new(at(1_000));
        programming.slice_changed(at(2_000));
        programming.queued(at(2_300), 1, 0);
        assert_eq!((total(&programming.network), programming.changes[0].pending), (0, 1));
        programming.synced(at(2_400), Duration::from_millis(100));
        assert_eq!((total(&programming.network), programming.network.sum()), (1, 0.4));
        assert_eq!((total(&programming.sync), programming.sync.sum()), (1, 0.1));
        assert_eq!(programming.changes[0], Changes { total: 1, pending: 0 });
        programming.synced(at(9_000), Duration::ZERO);
        assert_eq!(total(&programming.network), 1, "a change is measured once");
    }

    #[test]
    fn what_had_happened_before_the_start_is_not_measured() {
        let mut programming = Programming::new(at(1_000));
        programming.slice_changed(at(999));
        programming.synced(at(5_000), Duration::ZERO);
        assert_eq!(total(&programming.network), 0);
    }

    #[test]
    fn a_clock_that_is_ahead_makes_no_negative_time() {
        let mut programming = Programming::new(at(0));
        programming.slice_changed(at(8_000));
        programming.settled(at(5_000));
        assert_eq!((total(&programming.network), programming.network.sum()), (1, 0.0));
    }
}
