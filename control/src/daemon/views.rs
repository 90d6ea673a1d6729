//! The tables that operators ask for, as JSON: camelCase, with a `schemaVersion`.

use std::net::SocketAddr;

use podgate_core::addr::{Addr, Tuple, protocol};
use podgate_core::counters::{Counters, Traffic};
use podgate_core::flow::{FlowTable, Kind, Now, Stage};
use podgate_core::snapshot::Snapshot;
use podgate_core::trace::trace;
use podgate_core::verdict::DropReason;
use podgate_runtime::runtime::{KernelDrops, Runtime};
use serde_json::{Value, json};

use crate::compile::Compiled;
use crate::guard_drops::GuardDrops;
use crate::ipam::{Finding, Ipam};
use crate::pods::Pods;

/// The version of the tables' shape: it grows when a key changes its meaning or goes.
pub const SCHEMA_VERSION: u32 = 1;

/// A table of `rows` under `name`.
pub fn table(name: &str, rows: Vec<Value>) -> Value {
    json!({ "schemaVersion": SCHEMA_VERSION, name: rows })
}

/// `podgate services`: a row for each thing that clients dial.
pub fn services(compiled: &Compiled) -> Value {
    let rows = compiled.services().into_iter().flat_map(|service| {
        let row = move |frontend: &crate::compile::view::FrontendView| {
            let dialled: Option<SocketAddr> = frontend.address.parse().ok();
            json!({
                "service": service.service,
                "face": frontend.face,
                "address": dialled.map_or_else(|| frontend.address.clone(), |at| at.ip().to_string()),
                "port": dialled.map(|at| at.port()),
                "protocol": service.protocol,
                "backends": service.cluster_backends,
                "localBackends": service.local_backends,
                "internalTrafficPolicy": service.internal_traffic_policy,
                "externalTrafficPolicy": service.external_traffic_policy,
                "sessionAffinitySeconds": service.session_affinity_seconds,
                "balance": service.balance,
                "sourceRanges": service.source_ranges,
                "healthCheckNodePort": service.health_check_node_port,
            })
        };
        service.frontends.clone().iter().map(row).collect::<Vec<_>>()
    });
    let mut value = table("services", rows.collect());
    value["skipped"] = json!(compiled.skipped());
    value
}

/// `podgate backends`.
pub fn backends(compiled: &Compiled) -> Value {
    let rows = compiled.backends().into_iter().map(|backend| {
        let mut row = json!(backend);
        let condition = |name: &'static str, holds: bool| holds.then_some(name);
        let conditions = [condition("ready", backend.ready), condition("serving", backend.serving), condition("terminating", backend.terminating)];
        row["conditions"] = json!(conditions.into_iter().flatten().collect::<Vec<_>>());
        row
    });
    table("backends", rows.collect())
}

/// `podgate peers`.
pub fn peers(compiled: &Compiled) -> Value {
    table("peers", compiled.peers().into_iter().map(|peer| json!(peer)).collect())
}

/// `podgate flows`.
pub fn flows(flows: FlowTable<'_>, now: Now, snapshot: &Snapshot) -> Value {
    let names: std::collections::HashMap<u64, &str> = snapshot.services.iter().map(|(_, f)| (f.service.id, &*f.service.name)).collect();
    let rows = flows.views(now).map(|view| {
        let flow = view.flow;
        json!({
            "protocol": protocol_name(flow.original.protocol),
            "client": endpoint(flow.original.src, flow.original.src_port),
            "dialled": endpoint(flow.original.dst, flow.original.dst_port),
            "backend": endpoint(flow.reply.src, flow.reply.src_port),
            "seenAs": endpoint(flow.reply.dst, flow.reply.dst_port),
            "state": match flow.stage {
                Stage::Opening => "opening",
                Stage::Established => "established",
                Stage::Closing => "closing",
                Stage::Reset => "reset",
            },
            "kind": match flow.kind {
                Kind::Service => "service",
                Kind::Masquerade => "masquerade",
                Kind::OutsideToPod => "outsideToPod",
                Kind::Relayed => "relayed",
                Kind::DirectReturn => "directReturn",
            },
            "service": names.get(&flow.service),
            "idleSeconds": view.idle_ms / 1000,
            "ageSeconds": view.age_ms / 1000,
        })
    });
    let mut rows: Vec<Value> = rows.collect();
    rows.sort_by_cached_key(|row| ["service", "protocol", "client", "dialled"].map(|key| row[key].as_str().unwrap_or_default().to_owned()));
    table("flows", rows)
}

/// `podgate ipam`: a row for each address that somebody has.
pub fn ipam(ipam: &Ipam, pods: &Pods) -> Value {
    let view = ipam.list();
    let mut leased: Vec<_> = view.leases.iter().flat_map(|lease| lease.addresses.iter().map(move |address| (*address, lease))).collect();
    leased.sort_by_key(|(address, _)| *address);
    let rows = leased.into_iter().map(|(address, lease)| {
        let pod = pods.list().find(|pod| pod.addresses.contains(&address));
        json!({
            "address": address,
            "owner": lease.owner.pod_name(),
            "ifname": lease.owner.ifname,
            "sandbox": lease.owner.netns,
            "since": lease.since,
            "ageSeconds": view.now.saturating_sub(lease.since),
            "plugin": lease.plugin,
            "pool": ipam.pool_of(address),
            "mode": pod.map(|pod| pod.mode),
        })
    });
    let mut value = table("ipam", rows.collect());
    value["pools"] = json!(view.pools);
    value
}

/// `podgate ipam check`: a row for each disagreement.
pub fn findings(findings: &[Finding]) -> Value {
    let rows = findings.iter().map(|finding| {
        json!({
            "kind": finding.kind,
            "address": finding.address,
            "owner": finding.owner.pod_name(),
            "ifname": finding.owner.ifname,
            "sandbox": finding.owner.netns,
            "problem": finding.problem,
            "fixed": finding.fixed,
        })
    });
    table("findings", rows.collect())
}

/// `podgate drops`: the named reasons of the pipeline, and beside them what the kernel dropped on our devices and sockets.
pub fn drops(runtime: &Runtime, guard: GuardDrops) -> Value {
    let total = |reason| runtime.counters().iter().map(|counters| counters.drops(reason)).sum::<u64>();
    let mut rows: Vec<Value> =
        DropReason::ALL.iter().map(|reason| json!({"reason": reason.name(), "packets": total(*reason), "help": reason.help()})).collect();
    let kernel = runtime.kernel_drops().unwrap_or_default();
    let KernelDrops { pods_queue, host_queue, overlay_sockets, port_sockets } = kernel;
    for (reason, packets, help) in [
        (
            "kernel_refused_pod_source",
            guard.refused,
            "The kernel let a pod's packet no further: its source is not that pod's, or is nobody's; or the pod has no rule (yet).",
        ),
        ("kernel_bad_header", guard.header_errors, "A pod's packet had a header that the kernel refused, or no hop left (the pod was told)."),
        (
            "kernel_pods_queue",
            pods_queue,
            "The kernel found the queue of the TUN `pods`, or of a pod's own, full: workers are too slow for what pods send.",
        ),
        ("kernel_host_queue", host_queue, "The kernel found the queue of the TUN `host` full: workers are too slow for what the node sends."),
        ("kernel_overlay_sockets", overlay_sockets, "The kernel found an overlay socket's buffer full: workers are too slow for what peers send."),
        ("kernel_port_sockets", port_sockets, "The kernel found a socket for fragments or ICMP full: more of them arrived than are looked at."),
    ] {
        rows.push(json!({"reason": reason, "packets": packets, "help": help}));
    }
    table("drops", rows)
}

/// `podgate workers`.
pub fn workers(runtime: &Runtime) -> Value {
    let latency = runtime.latency();
    let rows = runtime.workers().into_iter().zip(runtime.counters()).enumerate().map(|(number, (worker, counters))| {
        let counters: &Counters = counters;
        let rx = [&counters.pods_rx, &counters.host_rx, &counters.overlay_rx];
        let tx = [&counters.pods_tx, &counters.host_tx, &counters.overlay_tx];
        let sum = |side: [&Traffic; 3], value: fn(&Traffic) -> u64| side.into_iter().map(value).sum::<u64>();
        let (frames, bytes) = (sum(rx, |t| t.frames.value()), sum(rx, |t| t.bytes.value()));
        json!({
            "worker": number,
            "cpu": worker.cpu,
            "pinned": worker.pinned,
            "state": if worker.alive { "running" } else { "down" },
            "restarts": worker.restarts,
            "generation": worker.generation.0,
            "batches": worker.batches,
            "rxFrames": frames,
            "rxPackets": sum(rx, |t| t.packets.value()),
            "rxBytes": bytes,
            "txFrames": sum(tx, |t| t.frames.value()),
            "txPackets": sum(tx, |t| t.packets.value()),
            "txBytes": sum(tx, |t| t.bytes.value()),
            "averageFrameBytes": bytes.checked_div(frames),
            "sides": {
                "podsRx": traffic(&counters.pods_rx), "podsTx": traffic(&counters.pods_tx),
                "hostRx": traffic(&counters.host_rx), "hostTx": traffic(&counters.host_tx),
                "overlayRx": traffic(&counters.overlay_rx), "overlayTx": traffic(&counters.overlay_tx),
            },
            "answers": counters.answers.value(),
            "flowsCreated": counters.flows_created.value(),
            "flowsExpired": counters.flows_expired.value(),
            "drops": DropReason::ALL.iter().map(|reason| counters.drops(*reason)).sum::<u64>(),
            "readError": worker.read_error,
        })
    });
    let mut value = table("workers", rows.collect());
    let quantiles = |h: &hdrhistogram::Histogram<u64>| json!({"p50": h.value_at_quantile(0.5), "p99": h.value_at_quantile(0.99), "p999": h.value_at_quantile(0.999), "max": h.max(), "batches": h.len()});
    value["latency"] = json!({
        "packetNs": quantiles(&latency.packet_ns),
        "pipelineNs": quantiles(&latency.pipeline_ns),
        "batchFrames": quantiles(&latency.batch_len),
    });
    value
}

fn traffic(traffic: &Traffic) -> Value {
    let (frames, bytes) = (traffic.frames.value(), traffic.bytes.value());
    json!({"frames": frames, "packets": traffic.packets.value(), "bytes": bytes, "averageFrameBytes": bytes.checked_div(frames)})
}

/// `podgate routes`: which range goes where.
pub fn routes(snapshot: &Snapshot) -> Value {
    let row = |destination: String, via: &str, detail: String| json!({"destination": destination, "via": via, "detail": detail});
    let node = &snapshot.node;
    let mut rows = Vec::new();
    let mut pods: Vec<_> = snapshot.pods.iter().collect();
    pods.sort_by_key(|(addr, _)| *addr);
    rows.extend(pods.into_iter().map(|(addr, pod)| row(addr.to_string(), "pods", format!("a pod of this node, MTU {}", pod.mtu))));
    for gateway in [node.gateway_v4, node.gateway_v6].into_iter().flatten() {
        rows.push(row(gateway.to_string(), "netstack", "this gateway's own address".into()));
    }
    rows.extend(node.addresses.iter().map(|addr| row(addr.to_string(), "host", "this node's own address".into())));
    for (first, last, peer) in snapshot.routes.ranges() {
        let peer = &snapshot.peers[*peer as usize];
        let destination = if first == last { first.to_string() } else { format!("{first}-{last}") };
        rows.push(row(destination, "overlay", format!("{} at {}:{}, MTU {}", peer.name, peer.underlay, peer.port, peer.mtu)));
    }
    for cidr in &node.service_cidrs {
        rows.push(row(
            cidr.to_string(),
            "services",
            format!("{} frontends; addresses that no service has are dropped", snapshot.services.iter().count()),
        ));
    }
    for cidr in node.node_pod_cidrs.iter().chain(&node.cluster_pod_cidrs) {
        rows.push(row(cidr.to_string(), "-", "unreachable where no pod and no node has the address".into()));
    }
    let outside = match &node.masquerade {
        Some(masquerade) => {
            let sources: Vec<String> = [masquerade.source_v4, masquerade.source_v6].iter().flatten().map(Addr::to_string).collect();
            format!("by the node's own routing, masqueraded as {}", sources.join(", "))
        }
        None => "by the node's own routing, not masqueraded".into(),
    };
    rows.push(row("everything else".into(), "host", format!("{outside}, MTU {}", node.outside_mtu)));
    table("routes", rows)
}

/// `podgate trace`.
pub fn steps(snapshot: &Snapshot, flows: &FlowTable<'_>, tuple: Tuple, now: Now) -> Value {
    let steps = trace(snapshot, flows, tuple, now);
    let verdict = steps.iter().rfind(|step| step.stage == "verdict").map(|step| step.detail.clone());
    let mut value = table("steps", steps.into_iter().map(|step| json!({"stage": step.stage, "detail": step.detail})).collect());
    value["generation"] = json!(snapshot.generation.0);
    value["verdict"] = json!(verdict);
    value
}

fn protocol_name(number: u8) -> String {
    match number {
        protocol::TCP => "TCP".into(),
        protocol::UDP => "UDP".into(),
        protocol::SCTP => "SCTP".into(),
        protocol::ICMP => "ICMP".into(),
        protocol::ICMPV6 => "ICMPv6".into(),
        other => other.to_string(),
    }
}

fn endpoint(addr: Addr, port: u16) -> String {
    SocketAddr::new(addr.ip(), port).to_string()
}
