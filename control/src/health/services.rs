//! `healthCheckNodePort`: load balancers ask each node whether it has an endpoint of a service with `externalTrafficPolicy: Local`.
//!
//! Each such service has a server of its own on the addresses that answer node ports. Whatever is asked, the answer is 200 if at least
//! one *ready* endpoint is here and the gateway is healthy, else 503; the weight is the number of endpoints. Each answer closes its
//! connection, so that nobody goes on asking about a service that is gone.
//!
//! A port that is taken is a problem with a name ([`ServiceHealth::problems`]) and is tried again with each [`ServiceHealth::sync`].
//!
//! Upstream: Kubernetes `pkg/proxy/healthcheck/service_health.go`.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use axum::Router;
use axum::http::{HeaderName, header};
use axum::response::IntoResponse;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use super::{Health, JSON, status};
use crate::compile::view::HealthCheckView;

/// By it a load balancer weighs nodes by their number of endpoints.
const WEIGHT: HeaderName = HeaderName::from_static("x-load-balancing-endpoint-weight");

/// Every server, by the port and the service that it is for.
pub struct ServiceHealth {
    health: Arc<Health>,
    servers: BTreeMap<u16, Server>,
    problems: Vec<String>,
}

struct Server {
    check: Arc<Checked>,
    listeners: BTreeMap<IpAddr, JoinHandle<()>>,
}

/// What one server answers about.
struct Checked {
    namespace: String,
    name: String,
    local_endpoints: AtomicUsize,
    /// Whether the service has gone: somebody may have connected before.
    closed: AtomicBool,
}

impl ServiceHealth {
    /// No server yet.
    pub fn new(health: Arc<Health>) -> ServiceHealth {
        ServiceHealth { health, servers: BTreeMap::new(), problems: Vec::new() }
    }

    /// Ports that should be served and are not, each with its service, why, and what to do.
    pub fn problems(&self) -> &[String] {
        &self.problems
    }

    /// Opens, closes and moves servers until they are those of `checks` on `addresses`; the others are left alone. Runs inside a `LocalSet`.
    pub async fn sync(&mut self, checks: &[HealthCheckView], addresses: &[IpAddr]) {
        self.problems.clear();
        let mut wanted: BTreeMap<u16, &HealthCheckView> = BTreeMap::new();
        for check in checks {
            if let Some(first) = wanted.get(&check.port) {
                let problem = format!("Service {}/{} has it already; give one of them another healthCheckNodePort", first.namespace, first.name);
                self.problems.push(blame(check, &problem));
            } else {
                wanted.insert(check.port, check);
            }
        }
        // First all that goes, so that what comes finds its port free.
        let stays = |port: &u16, server: &Server| wanted.get(port).is_some_and(|check| server.check.is_about(check));
        for (port, server) in std::mem::take(&mut self.servers) {
            if stays(&port, &server) {
                self.servers.insert(port, server);
            } else {
                server.close().await;
                tracing::info!(port, service = %server.check.service(), "a health check's port is closed");
            }
        }
        for (port, check) in wanted {
            let server = self.servers.entry(port).or_insert_with(|| Server { check: Arc::new(Checked::of(check)), listeners: BTreeMap::new() });
            server.check.local_endpoints.store(check.local_endpoints, Ordering::Relaxed);
            let gone: Vec<IpAddr> = server.listeners.keys().copied().filter(|address| !addresses.contains(address)).collect();
            for address in gone {
                end(server.listeners.remove(&address)).await;
            }
            for address in addresses {
                if server.listeners.get(address).is_some_and(|listener| !listener.is_finished()) {
                    continue;
                }
                let at = SocketAddr::new(*address, port);
                match TcpListener::bind(at).await {
                    Ok(listener) => {
                        tracing::info!(%at, service = %server.check.service(), "a health check's port is open");
                        server.listeners.insert(*address, serve(listener, at, self.health.clone(), server.check.clone()));
                    }
                    Err(error) => self.problems.push(blame(check, &format!("{at}: {error}; end the program that has it, or change the service"))),
                }
            }
        }
    }
}

fn blame(check: &HealthCheckView, problem: &str) -> String {
    let HealthCheckView { namespace, name, port, .. } = check;
    format!("Service {namespace}/{name}: load balancers cannot ask for its health on healthCheckNodePort {port}: {problem}")
}

impl Server {
    async fn close(&self) {
        self.check.closed.store(true, Ordering::Relaxed);
        for listener in self.listeners.values() {
            listener.abort();
        }
        // The port is free when the task has been dropped.
        while self.listeners.values().any(|listener| !listener.is_finished()) {
            tokio::task::yield_now().await;
        }
    }
}

async fn end(listener: Option<JoinHandle<()>>) {
    if let Some(listener) = listener {
        listener.abort();
        let _ = listener.await;
    }
}

impl Checked {
    fn of(check: &HealthCheckView) -> Checked {
        let HealthCheckView { namespace, name, local_endpoints, .. } = check.clone();
        Checked { namespace, name, local_endpoints: local_endpoints.into(), closed: AtomicBool::new(false) }
    }

    fn is_about(&self, check: &HealthCheckView) -> bool {
        self.namespace == check.namespace && self.name == check.name
    }

    fn service(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    fn answer(&self, health: &Health) -> impl IntoResponse + use<> {
        // Relaxed: figures of their own, ordered with nothing.
        let closed = self.closed.load(Ordering::Relaxed);
        let endpoints = if closed { 0 } else { self.local_endpoints.load(Ordering::Relaxed) };
        let healthy = health.is_healthy(Instant::now());
        let body = json!({
            "service": {"namespace": self.namespace, "name": self.name},
            "localEndpoints": endpoints,
            "serviceProxyHealthy": healthy,
        });
        let own = [(WEIGHT, endpoints.to_string()), (header::CONNECTION, "close".into())];
        (status(endpoints > 0 && healthy), JSON, own, body.to_string())
    }
}

fn serve(listener: TcpListener, at: SocketAddr, health: Arc<Health>, check: Arc<Checked>) -> JoinHandle<()> {
    let router = Router::new().fallback(move || async move { check.answer(&health) });
    tokio::task::spawn_local(async move {
        if let Err(error) = axum::serve(listener, router).await {
            tracing::error!(%at, %error, "a health check is no longer answered");
        }
    })
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use podgate_runtime::netns::Netns;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;
    use crate::health::PENDING_MAX;
    use crate::netlink::{LinkSettings, Netlink};

    const HERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    /// Runs `test` in a network namespace of its own with a loopback.
    fn alone<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send) {
        let Ok(netns) = Netns::anonymous().inspect_err(|error| eprintln!("skipped: {error}")) else { return };
        Netlink::open(&netns).unwrap().set_link("lo", &LinkSettings::new().up()).unwrap();
        let run = || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            tokio::task::LocalSet::new().block_on(&runtime, test());
        };
        netns.run(run).unwrap();
    }

    fn check(name: &str, port: u16, local_endpoints: usize) -> HealthCheckView {
        HealthCheckView { namespace: "shop".into(), name: name.into(), port, local_endpoints }
    }

    /// The answer on a port: head and body; nothing if nobody listens.
    async fn ask(port: u16) -> Option<(String, serde_json::Value)> {
        let mut stream = TcpStream::connect((HERE, port)).await.ok()?;
        stream.write_all(b"GET /anything HTTP/1.1\r\nHost: node\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        // It ends because the server closes.
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        Some((head.to_ascii_lowercase(), serde_json::from_str(body).unwrap()))
    }

    async fn code(port: u16) -> Option<u16> {
        Some(ask(port).await?.0.split(' ').nth(1)?.parse().unwrap())
    }

    fn healthy() -> Arc<Health> {
        Arc::new(Health::new(SystemTime::now()))
    }

    #[test]
    fn the_answer_is_kube_proxys_to_the_letter_of_its_headers() {
        alone(|| async {
            let mut servers = ServiceHealth::new(healthy());
            servers.sync(&[check("web", 32000, 18)], &[HERE]).await;
            let (head, body) = ask(32000).await.unwrap();
            for line in [
                "http/1.1 200 ok",
                "content-type: application/json",
                "x-content-type-options: nosniff",
                "x-load-balancing-endpoint-weight: 18",
                "connection: close",
            ] {
                assert!(head.lines().any(|l| l == line), "{line:?} in {head}");
            }
            let expected = json!({"service": {"namespace": "shop", "name": "web"}, "localEndpoints": 18, "serviceProxyHealthy": true});
            assert_eq!(body, expected);
        });
    }

    // The history of upstream's `TestServer`.
    #[test]
    fn servers_are_opened_closed_and_moved_as_services_change() {
        alone(|| async {
            let mut servers = ServiceHealth::new(healthy());
            servers.sync(&[], &[HERE]).await;
            assert_eq!(code(32000).await, None);
            servers.sync(&[check("b", 32000, 0)], &[HERE]).await;
            assert_eq!(code(32000).await, Some(503), "no endpoint here");
            servers.sync(&[check("b", 32000, 18)], &[HERE]).await;
            assert_eq!(code(32000).await, Some(200));
            servers.sync(&[check("b", 32000, 0)], &[HERE]).await;
            assert_eq!(code(32000).await, Some(503));
            servers.sync(&[check("b", 32000, 9), check("d", 32001, 3), check("f", 32002, 7)], &[HERE]).await;
            assert_eq!([code(32000).await, code(32001).await, code(32002).await], [Some(200); 3]);
            // One goes, one stays, one moves, one comes; and one comes to where another was.
            servers.sync(&[check("d", 32001, 3), check("f", 32003, 0), check("h", 32000, 6)], &[HERE]).await;
            assert_eq!([code(32001).await, code(32002).await, code(32003).await], [Some(200), None, Some(503)]);
            assert_eq!(ask(32000).await.unwrap().1["service"]["name"], "h");
            servers.sync(&[check("f", 32001, 1), check("d", 32003, 1)], &[HERE]).await;
            assert_eq!(ask(32001).await.unwrap().1["service"]["name"], "f", "two services have changed places");
            servers.sync(&[], &[HERE]).await;
            assert_eq!([code(32000).await, code(32001).await, code(32003).await], [None; 3]);
            assert!(servers.problems().is_empty());
        });
    }

    #[test]
    fn an_unhealthy_gateway_fails_every_check() {
        alone(|| async {
            let health = healthy();
            let mut servers = ServiceHealth::new(health.clone());
            servers.sync(&[check("web", 32000, 7)], &[HERE]).await;
            let Some(long_ago) = Instant::now().checked_sub(PENDING_MAX) else { return };
            health.queued(long_ago);
            let (head, body) = ask(32000).await.unwrap();
            assert!(head.starts_with("http/1.1 503"), "{head}");
            assert_eq!((&body["localEndpoints"], &body["serviceProxyHealthy"]), (&json!(7), &json!(false)));
            health.applied(SystemTime::now());
            assert_eq!(code(32000).await, Some(200));
        });
    }

    #[test]
    fn whoever_connected_before_a_service_went_is_hung_up_on() {
        alone(|| async {
            let mut servers = ServiceHealth::new(healthy());
            servers.sync(&[check("web", 32000, 7)], &[HERE]).await;
            let mut early = TcpStream::connect((HERE, 32000)).await.unwrap();
            // The server has taken the connection once it has answered another that came later.
            assert_eq!(code(32000).await, Some(200));
            servers.sync(&[], &[HERE]).await;
            // Nobody waits for it to ask: axum hangs up on what has no request under way.
            let mut answer = String::new();
            early.read_to_string(&mut answer).await.unwrap();
            assert_eq!(answer, "");
        });
    }

    #[test]
    fn a_busy_port_is_a_problem_by_name_until_it_is_free() {
        alone(|| async {
            let mut servers = ServiceHealth::new(healthy());
            let other = TcpListener::bind((HERE, 32000)).await.unwrap();
            let checks = [check("a", 32000, 1), check("b", 32001, 1), check("c", 32001, 1)];
            servers.sync(&checks, &[HERE]).await;
            let problems = servers.problems().join("\n");
            for part in [
                "Service shop/a: load balancers cannot ask for its health on healthCheckNodePort 32000: 127.0.0.1:32000: Address already in use",
                "Service shop/c: load balancers cannot ask for its health on healthCheckNodePort 32001: Service shop/b has it already",
            ] {
                assert!(problems.contains(part), "{part:?} in {problems}");
            }
            assert_eq!(code(32001).await, Some(200), "the others are served");
            drop(other);
            servers.sync(&checks[..2], &[HERE]).await;
            assert!(servers.problems().is_empty());
            assert_eq!(code(32000).await, Some(200));
        });
    }

    #[test]
    fn servers_follow_the_nodes_addresses() {
        alone(|| async {
            let mut servers = ServiceHealth::new(healthy());
            let v6: IpAddr = "::1".parse().unwrap();
            servers.sync(&[check("web", 32000, 1)], &[HERE, v6]).await;
            assert!(TcpStream::connect((v6, 32000)).await.is_ok());
            servers.sync(&[check("web", 32000, 1)], &[v6]).await;
            assert!(TcpStream::connect((v6, 32000)).await.is_ok());
            assert_eq!(code(32000).await, None);
            tokio::time::timeout(Duration::from_secs(5), servers.sync(&[], &[])).await.unwrap();
            assert!(TcpStream::connect((v6, 32000)).await.is_err());
        });
    }
}
