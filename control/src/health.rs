//! `/healthz` and `/livez` over HTTP, where kube-proxy has them (port 10256); [`services`] answers the health checks of load balancers.
//!
//! Both are about one thing: whether what the cluster wants reaches the workers. A node is unhealthy only while an update has waited too
//! long for that; whether its traffic passes is the self-test's to say (`podgate status`). `/healthz` says besides whether a load
//! balancer should still send something new here: not to a node that is about to go. `/livez` does not, since a node that drains must
//! not have its gateway restarted.
//!
//! Upstream: Kubernetes `pkg/proxy/healthcheck/proxy_health.go`.

pub mod services;

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime};

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use k8s_openapi::jiff::Timestamp;
use tokio::net::TcpListener;

/// How long an update may wait: kube-proxy's, twice its `syncPeriod` of 30 s.
pub const PENDING_MAX: Duration = Duration::from_secs(60);

/// What the probes are told. Shared with the tasks that answer.
#[derive(Debug)]
pub struct Health {
    state: Mutex<State>,
    /// How often each probe was answered with 200 and 503.
    answers: [[AtomicU64; 2]; 2],
}

#[derive(Debug)]
struct State {
    /// Since when an update has been waiting for the workers; the first of those that wait.
    pending_since: Option<Instant>,
    /// When the last one had reached them.
    last_applied: SystemTime,
    eligible: bool,
}

/// One of the two probes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    /// `/healthz`: shall load balancers send something new here?
    Healthz,
    /// `/livez`: does the gateway work?
    Livez,
}

impl Probe {
    /// Both.
    pub const ALL: [Probe; 2] = [Probe::Healthz, Probe::Livez];
}

/// What a probe is answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Whether with 200, or with 503.
    pub healthy: bool,
    /// The JSON.
    pub body: String,
}

impl Health {
    /// Healthy, with every update applied by `now`; the node counts as staying until its object says otherwise.
    pub fn new(now: SystemTime) -> Health {
        Health { state: Mutex::new(State { pending_since: None, last_applied: now, eligible: true }), answers: Default::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Each change is one assignment: whoever panicked in between left nothing half done.
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// There is an update, since `now`, that the workers do not have yet. Of several, the first one's time counts.
    pub fn queued(&self, now: Instant) {
        self.state().pending_since.get_or_insert(now);
    }

    /// The workers have all there is.
    pub fn applied(&self, now: SystemTime) {
        let mut state = self.state();
        state.pending_since = None;
        state.last_applied = now;
    }

    /// Whether load balancers may go on sending something new to this node.
    pub fn set_eligible(&self, eligible: bool) {
        self.state().eligible = eligible;
    }

    /// How long an update has been waiting, if one is.
    pub fn pending(&self, now: Instant) -> Option<Duration> {
        self.state().pending_since.map(|since| now.saturating_duration_since(since))
    }

    /// Whether no update has been waiting for too long.
    pub fn is_healthy(&self, now: Instant) -> bool {
        self.pending(now).is_none_or(|waiting| waiting < PENDING_MAX)
    }

    /// What `probe` is answered, in the words of kube-proxy's answers.
    pub fn answer(&self, probe: Probe, now: Instant, wall: SystemTime) -> Answer {
        let working = self.is_healthy(now);
        let (last_applied, eligible) = {
            let state = self.state();
            (state.last_applied, state.eligible)
        };
        let healthy = working && (eligible || probe == Probe::Livez);
        // Of a healthy one it is recent, whether or not anything changed: so kube-proxy has it.
        let last = if healthy { wall } else { last_applied };
        let times = format!(r#""lastUpdated": "{}","currentTime": "{}""#, as_go_prints(last), as_go_prints(wall));
        let body = match probe {
            Probe::Healthz => format!(r#"{{{times}, "nodeEligible": {eligible}}}"#),
            Probe::Livez => format!("{{{times}}}"),
        };
        Answer { healthy, body }
    }

    /// How often `probe` was answered over HTTP with this status.
    pub fn answered(&self, probe: Probe, healthy: bool) -> u64 {
        // Relaxed: a counter of its own, ordered with nothing.
        self.answers[probe as usize][usize::from(healthy)].load(Ordering::Relaxed)
    }

    fn respond(&self, probe: Probe) -> impl IntoResponse + use<> {
        let Answer { healthy, body } = self.answer(probe, Instant::now(), SystemTime::now());
        self.answers[probe as usize][usize::from(healthy)].fetch_add(1, Ordering::Relaxed);
        (status(healthy), JSON, body)
    }
}

/// What kube-proxy says of each of its answers.
const JSON: [(header::HeaderName, &str); 2] = [(header::CONTENT_TYPE, "application/json"), (header::X_CONTENT_TYPE_OPTIONS, "nosniff")];

fn status(healthy: bool) -> StatusCode {
    if healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

/// As Go's `time.Time` prints itself, which is what kube-proxy's answers hold.
fn as_go_prints(time: SystemTime) -> String {
    let nanoseconds = time.duration_since(SystemTime::UNIX_EPOCH).ok().and_then(|since| i128::try_from(since.as_nanos()).ok());
    match nanoseconds.and_then(|nanoseconds| Timestamp::from_nanosecond(nanoseconds).ok()) {
        Some(time) => time.strftime("%Y-%m-%d %H:%M:%S.%9f +0000 UTC").to_string(),
        // Before 1970 or after the year 9999: Go's zero time.
        None => "0001-01-01 00:00:00 +0000 UTC".into(),
    }
}

/// Why health cannot be served.
#[derive(Debug, thiserror::Error)]
#[error(
    "health cannot be served on {address}: {source}. Another program has the port, or the address is not this machine's; `health.address` in podgate.yaml names it"
)]
pub struct HealthError {
    address: SocketAddr,
    source: std::io::Error,
}

/// Listens on `address`; on every IPv4 address also means on the node's IPv6 addresses.
pub async fn serve(address: SocketAddr, node_addresses: &[IpAddr], health: Arc<Health>) -> Result<(), HealthError> {
    let mut addresses = vec![address];
    if address.ip().is_unspecified() && address.is_ipv4() {
        let v6 = |ip: &&IpAddr| matches!(ip, IpAddr::V6(ip) if *ip != Ipv6Addr::UNSPECIFIED);
        addresses.extend(node_addresses.iter().filter(v6).map(|ip| SocketAddr::new(*ip, address.port())));
    }
    let answer = |probe: Probe| {
        let health = health.clone();
        get(move || async move { health.respond(probe) })
    };
    let router = Router::new().route("/healthz", answer(Probe::Healthz)).route("/livez", answer(Probe::Livez));
    for address in addresses {
        let listener = TcpListener::bind(address).await.map_err(|source| HealthError { address, source })?;
        let router = router.clone();
        tokio::task::spawn_local(async move {
            if let Err(error) = axum::serve(listener, router).await {
                tracing::error!(%address, %error, "health is no longer served");
            }
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn healthy(health: &Health, now: Instant) -> [bool; 2] {
        Probe::ALL.map(|probe| health.answer(probe, now, SystemTime::UNIX_EPOCH).healthy)
    }

    // The cases of upstream's `healthcheck_test.go`, for the one dataplane that serves both families here.

    #[test]
    fn a_gateway_is_healthy_while_it_starts_and_as_long_as_no_update_waits_too_long() {
        let (start, health) = (Instant::now(), Health::new(SystemTime::UNIX_EPOCH));
        assert_eq!(healthy(&health, start), [true, true]);
        assert_eq!(healthy(&health, start + 1000 * PENDING_MAX), [true, true], "nothing waits, however long");
        health.queued(start);
        assert_eq!(healthy(&health, start + PENDING_MAX - SECOND), [true, true]);
        assert_eq!(healthy(&health, start + PENDING_MAX), [false, false]);
        health.applied(SystemTime::UNIX_EPOCH);
        assert_eq!(healthy(&health, start + PENDING_MAX), [true, true]);
    }

    #[test]
    fn a_later_update_does_not_excuse_an_earlier_one() {
        let (start, health) = (Instant::now(), Health::new(SystemTime::UNIX_EPOCH));
        health.queued(start);
        health.queued(start + PENDING_MAX / 2);
        assert_eq!(health.pending(start + PENDING_MAX), Some(PENDING_MAX));
        assert_eq!(healthy(&health, start + PENDING_MAX), [false, false]);
    }

    #[test]
    fn a_node_that_is_about_to_go_fails_healthz_and_not_livez() {
        let (start, health) = (Instant::now(), Health::new(SystemTime::UNIX_EPOCH));
        health.set_eligible(false);
        assert_eq!(healthy(&health, start), [false, true]);
        assert!(health.is_healthy(start), "its load balancers' health checks do not ask for it");
        health.set_eligible(true);
        assert_eq!(healthy(&health, start), [true, true]);
    }

    #[test]
    fn the_answers_are_kube_proxys() {
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::new(seconds, 5);
        let (start, health) = (Instant::now(), Health::new(at(86_400)));
        let body = |probe, now| health.answer(probe, now, at(90_061)).body;
        let now = "1970-01-02 01:01:01.000000005 +0000 UTC";
        assert_eq!(body(Probe::Livez, start), format!(r#"{{"lastUpdated": "{now}","currentTime": "{now}"}}"#));
        health.queued(start);
        let late = start + PENDING_MAX;
        let then = "1970-01-02 00:00:00.000000005 +0000 UTC";
        let expected = format!(r#"{{"lastUpdated": "{then}","currentTime": "{now}", "nodeEligible": true}}"#);
        assert_eq!(body(Probe::Healthz, late), expected);
        serde_json::from_str::<serde_json::Value>(&expected).unwrap();
    }
}
