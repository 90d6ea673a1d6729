//! What the daemon answers to its clients: the socket's requests, one by one.

use std::os::fd::OwnedFd;
use std::time::Instant;

use podgate_cni::{Attachment, Request, Response};
use podgate_core::addr::{Addr, Tuple, protocol};
use podgate_runtime::clock;
use serde_json::{Value, json};

use super::{Daemon, attachments, probe, views};
use crate::{api, guard_drops};

impl api::Handler for Daemon {
    async fn handle(&self, request: Request, mut fds: Vec<OwnedFd>) -> Response {
        // Waits while the node is being handed over. If that succeeds nobody answers here, and whoever asked asks the successor.
        let _changes = if changes_what_is_attached(&request) { Some(self.changes.read().await) } else { None };
        let answer = match request {
            Request::Show { table } => self.show(&table),
            Request::Trace { from, from_port, to, to_port, protocol } => self.dataplane().and_then(|dataplane| {
                let number = match (protocol.as_str(), to.is_ipv4()) {
                    ("tcp", _) => protocol::TCP,
                    ("udp", _) => protocol::UDP,
                    ("icmp", true) => protocol::ICMP,
                    ("icmp", false) => protocol::ICMPV6,
                    (other, _) => return Err(error(4, format!("protocol {other:?} is not known; tcp, udp or icmp"))),
                };
                if from.is_ipv4() != to.is_ipv4() {
                    return Err(error(4, format!("{from} and {to} are of different families")));
                }
                let tuple = Tuple { src: from.into(), dst: to.into(), src_port: from_port, dst_port: to_port, protocol: number };
                Ok(views::steps(&dataplane.snapshot(), &dataplane.flows(), tuple, clock::Instant::read().now()))
            }),
            Request::Diff { since } => self.diff(since),
            Request::Attach(request) => match fds.pop() {
                Some(netns) => self.attach(&request, netns).await,
                None => Err(no_namespace()),
            },
            Request::Assign { attachment, given } => match fds.pop() {
                Some(netns) => self.assign(&attachment, &given, netns).await,
                None => Err(no_namespace()),
            },
            Request::Detach(attachment) => self.detach(&attachment, fds.pop()).await,
            Request::Check { attachment, addresses } => match fds.pop() {
                Some(netns) => self.check(&attachment, &addresses, netns),
                None => Err(no_namespace()),
            },
            Request::Collect { network, valid } => self.collect(&network, &valid).await,
            Request::Ready => self.readiness(),
            Request::LogLevel { level } => crate::logging::set_filter(&level).map_err(|refused| error(4, refused.to_string())).map(|before| {
                tracing::info!(before, level, "the log's level was changed");
                json!({"schemaVersion": 1, "before": before, "level": level})
            }),
            Request::IpamCheck { fix } => self.ipam_check(fix),
            Request::IpamRelease { what } => self.ipam_release(&what),
        };
        answer.map_or_else(|refusal| refusal, Response::Ok)
    }

    async fn unheard(&self, attachment: Attachment) {
        let _changes = self.changes.read().await;
        if let Err(Response::Error { message, .. }) = self.detach(&attachment, None).await {
            tracing::error!(sandbox = %attachment.sandbox, "whoever asked for it has gone, and it could not be detached: {message}");
        }
    }
}

fn changes_what_is_attached(request: &Request) -> bool {
    match request {
        Request::Attach(_) | Request::Assign { .. } | Request::Detach(_) | Request::Collect { .. } => true,
        Request::IpamCheck { fix } => *fix,
        Request::IpamRelease { .. } => true,
        Request::Show { .. } | Request::Trace { .. } | Request::Diff { .. } | Request::Check { .. } | Request::Ready | Request::LogLevel { .. } => {
            false
        }
    }
}

impl Daemon {
    fn show(&self, table: &str) -> Result<Value, Response> {
        let dataplane = self.dataplane()?;
        Ok(match table {
            "status" => self.status()?,
            "services" => views::services(&self.inner.borrow().compiled),
            "backends" => views::backends(&self.inner.borrow().compiled),
            "flows" => views::flows(dataplane.flows(), clock::Instant::read().now(), &dataplane.snapshot()),
            "peers" => views::peers(&self.inner.borrow().compiled),
            "ipam" => {
                let inner = self.inner.borrow();
                views::ipam(&inner.ipam, &inner.pods)
            }
            "workers" => views::workers(&dataplane),
            "drops" => views::drops(&dataplane, guard_drops::read(&self.devices.gateway_netns).unwrap_or_default()),
            "routes" => views::routes(&dataplane.snapshot()),
            other => return Err(error(4, format!("there is no table {other:?}"))),
        })
    }

    fn ipam_check(&self, fix: bool) -> Result<Value, Response> {
        if fix && self.leaving.get() > 0 {
            return Err(error(11, "a pod is being detached, and its address is still its own: try again".into()));
        }
        let inner = &mut *self.inner.borrow_mut();
        let holders = attachments::holders(&inner.pods);
        let findings = if fix { inner.ipam.fix(&holders).map_err(|e| error(e.code(), e.to_string()))? } else { inner.ipam.check(&holders) };
        for finding in findings.iter().filter(|finding| finding.fixed) {
            tracing::warn!(address = %finding.address, owner = %finding.owner, "mended: {}", finding.problem);
        }
        Ok(views::findings(&findings))
    }

    fn ipam_release(&self, what: &str) -> Result<Value, Response> {
        let inner = &mut *self.inner.borrow_mut();
        let holders = attachments::holders(&inner.pods);
        let released = inner.ipam.release_by_hand(what, &holders).map_err(|e| error(e.code(), e.to_string()))?;
        tracing::info!(what, ?released, "released by hand");
        Ok(json!({ "schemaVersion": views::SCHEMA_VERSION, "released": released }))
    }

    fn status(&self) -> Result<Value, Response> {
        let dataplane = self.dataplane()?;
        let now = Instant::now();
        let inner = self.inner.borrow();
        let (features, huge_pages) = (dataplane.features(), dataplane.huge_pages());
        let snapshot = dataplane.snapshot();
        let mut problems: Vec<String> = inner.problems.iter().cloned().collect();
        problems.extend(inner.checks.iter().filter(|check| !check.ok).map(|check| format!("{}: {}", check.name, check.detail)));
        problems.extend(inner.warned.iter().cloned());
        problems.extend(inner.health_check_problems.iter().cloned());
        if let Some(waiting) = self.health.pending(now).filter(|_| !self.health.is_healthy(now)) {
            problems.push(format!(
                "an update has been waiting for {} s: a worker does not take it; see `podgate workers` and the log",
                waiting.as_secs()
            ));
        }
        problems.extend(dataplane.port_problems().into_iter().map(|problem| format!("{}: {}", problem.what, problem.why)));
        let workers = dataplane.workers();
        for (number, worker) in workers.iter().enumerate().filter(|(_, worker)| !worker.alive) {
            problems.push(format!("worker {number} is down after {} restarts; see the log", worker.restarts));
        }
        let gateways: Vec<String> = [snapshot.node.gateway_v4, snapshot.node.gateway_v6].iter().flatten().map(Addr::to_string).collect();
        Ok(json!({
            "schemaVersion": views::SCHEMA_VERSION,
            "version": env!("CARGO_PKG_VERSION"),
            "node": self.config.node,
            "ready": self.ready.get(),
            "generation": snapshot.generation.0,
            "pending": self.pending(&inner),
            "workers": workers.len(),
            "spinMicroseconds": super::machine::spin(&self.config).as_micros() as u64,
            "source": {
                "kind": inner.source_status.kind,
                "connected": inner.source_status.connected,
                "errors": inner.source_status.errors.iter().map(ToString::to_string).collect::<Vec<_>>(),
            },
            "attachMode": self.config.attach,
            "podsInTunMode": inner.pods.list().filter(|pod| pod.tun().is_some()).count(),
            "offloads": {
                "tso": features.tso.on, "uso": features.uso.on, "udpSegment": features.udp_gso.on, "udpGro": features.udp_gro.on,
            },
            "addresses": inner.machine.addresses,
            "gateway": gateways,
            "podMtu": self.pod_mtu(&inner.machine),
            "pods": inner.pods.list().count().saturating_sub(inner.pods.find(probe::ID).map_or(0, |_| 1)),
            "services": inner.compiled.services().len(),
            "peers": snapshot.peers.len(),
            "flows": dataplane.flows().len(),
            "flowCapacity": dataplane.flows().capacity(),
            "flowHugePages": { "used": huge_pages.used, "room": huge_pages.room, "bytes": huge_pages.bytes },
            "uptimeSeconds": self.started.elapsed().as_secs(),
            "checks": inner.checks,
            "problems": problems,
        }))
    }
}

fn no_namespace() -> Response {
    error(4, "no network namespace came with the request".into())
}

/// A refusal, with one of the codes of [`Response::Error`].
pub(super) fn error(code: u32, message: String) -> Response {
    Response::Error { code, message }
}
