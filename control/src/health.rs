//! `/healthz` and `/livez` over HTTP, where kube-proxy has them (port 10256).

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use tokio::net::TcpListener;

/// What the probes are told.
#[derive(Debug, Default)]
pub struct Health {
    ready: AtomicBool,
}

impl Health {
    /// Says whether the node forwards.
    pub fn set_ready(&self, ready: bool) {
        // Relaxed: a flag of its own, ordered with nothing.
        self.ready.store(ready, Ordering::Relaxed);
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
    let router = Router::new()
        .route(
            "/healthz",
            get(move || async move {
                if health.ready.load(Ordering::Relaxed) { (StatusCode::OK, "ok\n") } else { (StatusCode::SERVICE_UNAVAILABLE, "not ready\n") }
            }),
        )
        .route("/livez", get(|| async { "ok\n" }));
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
