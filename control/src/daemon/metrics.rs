//! What is on the page of metrics. A scrape sums what workers count for themselves; nothing is counted for the page's sake on their path.

use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime};

use hdrhistogram::Histogram as Recorded;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeVal;
use podgate_core::counters::{Counters, Traffic};
use podgate_core::service::TrafficPolicy;
use podgate_core::verdict::DropReason;
use podgate_runtime::runtime::Runtime;

use super::{Daemon, Inner};
use crate::guard_drops;
use crate::health::Probe;
use crate::metrics::{self, Histogram, Kind, Page};

/// How long until a port that is taken is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// Answers scrapes for as long as the daemon lives. A port that is taken is a problem in status, not a reason to forward nothing.
pub async fn run(daemon: Rc<Daemon>) {
    let mut asked = loop {
        match metrics::serve(daemon.config.metrics).await {
            Ok(asked) => break asked,
            Err(error) => {
                if daemon.inner.borrow_mut().problems.insert(error.to_string()) {
                    tracing::error!("{error}");
                }
            }
        }
        tokio::time::sleep(RETRY).await;
    };
    daemon.inner.borrow_mut().problems.retain(|problem| !problem.starts_with("metrics"));
    while let Some(answer) = asked.recv().await {
        let _ = answer.send(daemon.page().await);
    }
}

impl Daemon {
    async fn page(&self) -> String {
        let mut page = Page::default();
        let dataplane = self.dataplane().ok();
        if let Some(dataplane) = &dataplane {
            // It waits for workers to look: not on the control thread.
            let workers = dataplane.clone();
            if let Ok(latency) = tokio::task::spawn_blocking(move || workers.latency()).await {
                let seconds = |ns: u64| ns as f64 / 1e9;
                // 100 ns, doubled up to 0.2 s.
                let bounds: Vec<u64> = (0..22).map(|n| 100 << n).collect();
                let help = "From a batch's read to its last write, divided by its packets; one value for each batch.";
                page.histogram("podgate_packet_latency_seconds", help, &rebin(&latency.packet_ns, &bounds, seconds));
                let help = "Of that, the pipeline alone.";
                page.histogram("podgate_pipeline_latency_seconds", help, &rebin(&latency.pipeline_ns, &bounds, seconds));
                let bounds: Vec<u64> = (0..9).map(|n| 1 << n).collect();
                page.histogram("podgate_batch_frames", "Frames in a batch.", &rebin(&latency.batch_len, &bounds, |frames| frames as f64));
            }
            of_workers(&mut page, dataplane);
            self.of_drops(&mut page, dataplane);
            let flows = dataplane.flows();
            page.family("podgate_flows", Kind::Gauge, "Live flows.").sample(&[], flows.len());
            page.family("podgate_flows_capacity", Kind::Gauge, "Flows that the table has room for.").sample(&[], flows.capacity());
        }
        let inner = self.inner.borrow();
        self.of_the_node(&mut page, &inner);
        self.of_kube_proxy(&mut page, &inner);
        of_the_process(&mut page);
        page.finish()
    }

    fn of_drops(&self, page: &mut Page, dataplane: &Runtime) {
        let drops = super::views::drops(dataplane, guard_drops::read(&self.devices.gateway_netns).unwrap_or_default());
        page.family("podgate_drops_packets_total", Kind::Counter, "Packets dropped, by reason; `podgate drops` says what each means.");
        for row in drops["drops"].as_array().into_iter().flatten() {
            page.sample(&[("reason", row["reason"].as_str().unwrap_or_default())], row["packets"].as_u64().unwrap_or_default());
        }
    }

    fn of_the_node(&self, page: &mut Page, inner: &Inner) {
        let version = env!("CARGO_PKG_VERSION");
        page.family("podgate_info", Kind::Gauge, "This gateway.").sample(&[("node", &self.config.node), ("version", version)], true);
        page.family("podgate_ready", Kind::Gauge, "Whether the node forwards, as the self-test proved.").sample(&[], self.ready.get());
        page.family("podgate_self_test", Kind::Gauge, "Whether a check of the self-test holds.");
        for check in &inner.checks {
            page.sample(&[("check", &check.name)], check.ok);
        }
        page.family("podgate_uptime_seconds", Kind::Gauge, "Since the daemon started.").sample(&[], self.started.elapsed().as_secs_f64());
        page.family("podgate_generation", Kind::Gauge, "Generation of the tables.").sample(&[], inner.compiled.snapshot.generation.0);
        let pending = self.health.pending(Instant::now()).unwrap_or_default().as_secs_f64();
        page.family("podgate_update_pending_seconds", Kind::Gauge, "How long an update has been waiting for the workers; 0 if none is.")
            .sample(&[], pending);
        let source = &inner.source_status;
        page.family("podgate_source_connected", Kind::Gauge, "Whether the cluster's state is what its source says now.")
            .sample(&[("kind", source.kind)], source.connected);
        page.family("podgate_source_objects", Kind::Gauge, "Objects of the cluster.").sample(&[("kind", source.kind)], source.objects);
        page.family("podgate_source_errors", Kind::Gauge, "What is wrong in the source.").sample(&[("kind", source.kind)], source.errors.len());
        page.family("podgate_attachments", Kind::Gauge, "Interfaces that are attached; the self-test's own is one.")
            .sample(&[], inner.pods.list().count());
        page.family("podgate_peer_mtu_bytes", Kind::Gauge, "The largest packet that fits on the way to a peer.");
        for peer in inner.compiled.snapshot.peers.iter() {
            page.sample(&[("peer", &peer.name)], u64::from(peer.mtu));
        }
        page.family("podgate_ipam_addresses", Kind::Gauge, "Addresses of this node, by pool, range and what is made of them.");
        for pool in inner.ipam.list().pools {
            let (name, range) = (pool.pool.unwrap_or_default(), pool.cidr.to_string());
            for (state, count) in [
                ("capacity", pool.capacity as f64),
                ("used", pool.used as f64),
                ("reserved", pool.reserved as f64),
                ("excluded", pool.excluded as f64),
            ] {
                page.sample(&[("pool", &name), ("range", &range), ("state", state)], count);
            }
        }
    }

    fn of_kube_proxy(&self, page: &mut Page, inner: &Inner) {
        let programming = &inner.programming;
        let help = "In cluster network programming latency: from the endpoints' change until the workers have it.";
        page.histogram("kubeproxy_network_programming_duration_seconds", help, &programming.network);
        page.histogram("kubeproxy_sync_proxy_rules_duration_seconds", "From an event until the workers have it.", &programming.sync);
        let seconds = |at: Option<SystemTime>| at.and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok()).unwrap_or_default().as_secs_f64();
        page.family("kubeproxy_sync_proxy_rules_last_timestamp_seconds", Kind::Gauge, "When the workers last had all there was.")
            .sample(&[], seconds(programming.last_synced));
        page.family("kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds", Kind::Gauge, "When an update was last there to be applied.")
            .sample(&[], seconds(programming.last_queued));
        let [slices, services] = programming.changes;
        page.family("kubeproxy_sync_proxy_rules_endpoint_changes_total", Kind::Counter, "Changed endpoint slices.").sample(&[], slices.total);
        page.family("kubeproxy_sync_proxy_rules_endpoint_changes_pending", Kind::Gauge, "Of these, not with the workers yet.")
            .sample(&[], slices.pending);
        page.family("kubeproxy_sync_proxy_rules_service_changes_total", Kind::Counter, "Changed services.").sample(&[], services.total);
        page.family("kubeproxy_sync_proxy_rules_service_changes_pending", Kind::Gauge, "Of these, not with the workers yet.")
            .sample(&[], services.pending);
        page.family(
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
            Kind::Gauge,
            "Service ports with the Local policy and endpoints elsewhere alone.",
        );
        for (policy, count) in inner.compiled.without_local_endpoints() {
            page.sample(&[("traffic_policy", policy)], count);
        }
        for (probe, name, help) in [
            (Probe::Healthz, "kubeproxy_proxy_healthz_total", "Answers to /healthz, by status."),
            (Probe::Livez, "kubeproxy_proxy_livez_total", "Answers to /livez, by status."),
        ] {
            page.family(name, Kind::Counter, help)
                .sample(&[("code", "200")], self.health.answered(probe, true))
                .sample(&[("code", "503")], self.health.answered(probe, false));
        }
    }
}

impl crate::compile::Compiled {
    /// How many service ports of each policy have endpoints, none of them here, though the policy is Local.
    fn without_local_endpoints(&self) -> [(&'static str, usize); 2] {
        let without = |policy: fn(&podgate_core::service::ServicePort) -> TrafficPolicy| {
            self.service_ports().filter(|port| policy(port) == TrafficPolicy::Local && port.local.is_empty() && !port.cluster.is_empty()).count()
        };
        [("internal", without(|port| port.internal_policy)), ("external", without(|port| port.external_policy))]
    }
}

fn of_workers(page: &mut Page, dataplane: &Runtime) {
    let (states, counters) = (dataplane.workers(), dataplane.counters());
    // Behind those of the workers are those of the thread beside them.
    let names: Vec<String> = (0..counters.len()).map(|at| if at < states.len() { at.to_string() } else { "netstack".into() }).collect();
    type Side = fn(&Counters) -> &Traffic;
    let sides: [(&str, &str, Side); 6] = [
        ("pods", "rx", |c| &c.pods_rx),
        ("pods", "tx", |c| &c.pods_tx),
        ("host", "rx", |c| &c.host_rx),
        ("host", "tx", |c| &c.host_tx),
        ("overlay", "rx", |c| &c.overlay_rx),
        ("overlay", "tx", |c| &c.overlay_tx),
    ];
    type Value = fn(&Traffic) -> u64;
    let values: [(&'static str, &str, Value); 3] = [
        ("podgate_frames_total", "Frames read and written by a worker; a superframe is one.", |t| t.frames.value()),
        ("podgate_packets_total", "Packets as they are on a wire; a superframe counts its segments.", |t| t.packets.value()),
        ("podgate_bytes_total", "Bytes of IP packets, headers included.", |t| t.bytes.value()),
    ];
    for (name, help, value) in values {
        page.family(name, Kind::Counter, help);
        for (worker, counters) in names.iter().zip(counters) {
            for (device, direction, side) in sides {
                page.sample(&[("worker", worker), ("device", device), ("direction", direction)], value(side(counters)));
            }
        }
    }
    type Own = fn(&Counters) -> u64;
    let own: [(&'static str, &str, Own); 4] = [
        ("podgate_answers_packets_total", "Packets that the gateway itself made: ICMP errors, resets, echoes.", |c| c.answers.value()),
        ("podgate_flows_created_total", "Flows created.", |c| c.flows_created.value()),
        ("podgate_flows_expired_total", "Flows that expired.", |c| c.flows_expired.value()),
        ("podgate_worker_drops_packets_total", "Packets dropped, by worker.", |c| DropReason::ALL.iter().map(|reason| c.drops(*reason)).sum()),
    ];
    for (name, help, value) in own {
        page.family(name, Kind::Counter, help);
        for (worker, counters) in names.iter().zip(counters) {
            page.sample(&[("worker", worker)], value(counters));
        }
    }
    page.family("podgate_worker_up", Kind::Gauge, "Whether a worker runs.");
    for (worker, state) in names.iter().zip(&states) {
        page.sample(&[("worker", worker)], state.alive);
    }
    page.family("podgate_worker_restarts_total", Kind::Counter, "How often a worker was started again.");
    for (worker, state) in names.iter().zip(&states) {
        page.sample(&[("worker", worker)], state.restarts);
    }
    page.family("podgate_worker_generation", Kind::Gauge, "Generation of the tables that a worker reads.");
    for (worker, state) in names.iter().zip(&states) {
        page.sample(&[("worker", worker)], state.generation.0);
    }
}

/// What was recorded, by coarser bounds. Each value counts as the highest one that was not told apart from it.
fn rebin(recorded: &Recorded<u64>, bounds: &[u64], scale: impl Fn(u64) -> f64) -> Histogram {
    let mut histogram = Histogram::new(bounds.iter().map(|bound| scale(*bound)).collect());
    for step in recorded.iter_recorded() {
        histogram.observe_many(scale(step.value_iterated_to()), step.count_since_last_iteration());
    }
    histogram
}

/// What every Prometheus client says of its process (getrusage(2), proc(5)).
fn of_the_process(page: &mut Page) {
    if let Ok(usage) = getrusage(UsageWho::RUSAGE_SELF) {
        let seconds = |time: TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
        let total = seconds(usage.user_time()) + seconds(usage.system_time());
        page.family("process_cpu_seconds_total", Kind::Counter, "User and system CPU time.").sample(&[], total);
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    if let Some(kib) = resident {
        page.family("process_resident_memory_bytes", Kind::Gauge, "Resident memory.").sample(&[], kib * 1024);
    }
    if let Ok(files) = std::fs::read_dir("/proc/self/fd") {
        page.family("process_open_fds", Kind::Gauge, "Open file descriptors.").sample(&[], files.count());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recorded_histogram_keeps_its_count_and_lies_below_the_right_bounds() {
        let mut recorded: Recorded<u64> = Recorded::new_with_bounds(1, 1_000_000_000, 2).unwrap();
        recorded.record_n(90, 5).unwrap();
        recorded.record(1_000).unwrap();
        recorded.record(900_000_000).unwrap();
        let histogram = rebin(&recorded, &[100, 2_000], |ns| ns as f64);
        assert_eq!(histogram.cumulated().collect::<Vec<_>>(), [(Some(100.0), 5), (Some(2_000.0), 6), (None, 7)]);
        assert!(histogram.sum() >= 900_001_450.0);
    }

    #[test]
    fn a_process_has_memory_and_files() {
        let mut page = Page::default();
        of_the_process(&mut page);
        let text = page.finish();
        let value = |name: &str| {
            let line = text.lines().find(|line| line.starts_with(&format!("{name} "))).unwrap();
            line.rsplit_once(' ').unwrap().1.parse::<f64>().unwrap()
        };
        assert!(value("process_resident_memory_bytes") > 1e6 && value("process_open_fds") >= 3.0, "{text}");
    }
}
