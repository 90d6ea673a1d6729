//! The control side in memory: from objects to tables that workers read.
//!
//! A cluster of many services is compiled from nothing; then one endpoint changes, from its event's bytes to the last worker's pin of the new
//! snapshot. Workers are threads that wait to be woken and then look for a new snapshot, as those of an idle gateway do.

use std::fs;
use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use podgate::compile::{Announcements, Compiled, LocalNode, Settings, compile};
use podgate::config::NodePortAddresses;
use podgate::model::{ClusterState, Object};
use podgate_core::fib::Pod;
use podgate_core::flow::Timeouts;
use podgate_core::snapshot::OutsideToPods;
use podgate_runtime::publish;
use serde_json::{Value, json};

/// Endpoints of each service.
pub const ENDPOINTS: u32 = 25;

/// A cluster and a node of it.
#[derive(Debug)]
pub struct Programming {
    local: Arc<LocalNode>,
    state: Arc<ClusterState>,
}

impl Programming {
    /// With so many services.
    pub fn new(services: u32) -> Programming {
        let objects = (0..services).flat_map(|number| [service(number), slice_object(number, 0)]);
        Programming { local: Arc::new(local()), state: Arc::new(objects.collect()) }
    }

    /// The tables, from nothing.
    pub fn cold(&self) -> Compiled {
        compile(&Compiled::empty(&self.local), &self.state, &self.local)
    }

    /// The event of a change of service `number`: its first endpoint is another one for each `turn`.
    pub fn event(&self, number: u32, turn: u32) -> Vec<u8> {
        slice(number, turn).to_string().into_bytes()
    }

    /// What an event makes of the tables.
    pub fn apply(&self, before: &Compiled, event: &[u8]) -> anyhow::Result<Compiled> {
        let object = Object::from_slice(&serde_json::from_slice(event).context("an event that is an EndpointSlice")?)?;
        let mut state = ClusterState::clone(before.inputs().0);
        state.insert(object);
        Ok(compile(before, &Arc::new(state), &self.local))
    }

    /// Milliseconds from each of `changes` events to the last of `workers` workers' pin. With an `interval` the events come at so many times of
    /// it, whether the one before is done with or not, and each is timed from when it was due; else one comes when the other is done.
    pub fn changes_to_pins(&self, workers: usize, changes: u32, interval: Option<Duration>) -> anyhow::Result<Vec<f64>> {
        let mut current = self.cold();
        let (mut publisher, readers) = publish::channel(Arc::new(current.snapshot.clone()), workers);
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            let workers: Vec<_> = readers
                .iter()
                .map(|reader| {
                    scope.spawn(|| {
                        let mut session = reader.enter();
                        while !over.load(Ordering::Relaxed) {
                            black_box(session.refresh().generation);
                            thread::park();
                        }
                    })
                })
                .collect();
            let wake = || workers.iter().for_each(|worker| worker.thread().unpark());
            let mut measure = || -> anyhow::Result<Vec<f64>> {
                let mut times = Vec::new();
                let begun = Instant::now();
                for turn in 1..=changes {
                    let event = self.event(turn % 7, turn % 1000);
                    let due = interval.map(|interval| begun + interval * turn);
                    if let Some(due) = due {
                        thread::sleep(due.saturating_duration_since(Instant::now()));
                    }
                    let start = due.unwrap_or_else(Instant::now);
                    let next = self.apply(&current, &event)?;
                    let generation = next.snapshot.generation;
                    publisher.publish(Arc::new(next.snapshot.clone()));
                    wake();
                    while publisher.seen().iter().any(|seen| *seen < generation) {
                        thread::yield_now();
                    }
                    times.push(start.elapsed().as_secs_f64() * 1e3);
                    // The predecessor's tables are freed here: as in the daemon, after the workers have the new ones.
                    current = next;
                    publisher.reclaim();
                }
                Ok(times)
            };
            let times = measure();
            over.store(true, Ordering::Relaxed);
            wake();
            times
        })
    }
}

/// Resident memory of this process, in bytes (proc(5), statm).
pub fn resident() -> anyhow::Result<u64> {
    let text = fs::read_to_string("/proc/self/statm").context("cannot read /proc/self/statm")?;
    let pages: u64 = text.split(' ').nth(1).and_then(|field| field.parse().ok()).context("statm has a second field")?;
    let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)?.context("pages have a size")?;
    Ok(pages * page as u64)
}

/// Time of `work`, and what it gave.
pub fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let start = Instant::now();
    let result = work();
    (result, start.elapsed())
}

fn service(number: u32) -> Object {
    let object = json!({"metadata": {"name": format!("service-{number}"), "namespace": "bench"},
        "spec": {"clusterIP": vip(number), "clusterIPs": [vip(number)], "ports": [{"name": "p", "protocol": "TCP", "port": 80}]}});
    Object::from_service(&serde_json::from_value(object).expect("a Service")).expect("a service that is right")
}

fn vip(number: u32) -> String {
    format!("10.96.{}.{}", number / 250, number % 250 + 1)
}

fn slice(number: u32, turn: u32) -> Value {
    let address = |n: u32| format!("10.244.{}.{}", 1 + n / 250 % 250, n % 250 + 2);
    let endpoints: Vec<Value> = (0..ENDPOINTS)
        .map(|at| if at == 0 { number + turn * 251 } else { number * ENDPOINTS + at })
        .map(|n| json!({"addresses": [address(n)], "nodeName": "node-2", "conditions": {"ready": true, "serving": true, "terminating": false}}))
        .collect();
    let name = format!("service-{number}");
    json!({"metadata": {"name": name, "namespace": "bench", "labels": {"kubernetes.io/service-name": name}}, "addressType": "IPv4",
        "ports": [{"name": "p", "protocol": "TCP", "port": 8080}], "endpoints": endpoints})
}

fn slice_object(number: u32, turn: u32) -> Object {
    Object::from_slice(&serde_json::from_value(slice(number, turn)).expect("an EndpointSlice")).expect("a slice that is right")
}

fn local() -> LocalNode {
    let network = |text: &str| text.parse().expect("a network as text");
    let address = |text: &str| text.parse().expect("an address as text");
    let settings = Settings {
        pod_cidrs: vec![network("10.244.0.0/16")],
        service_cidrs: vec![network("10.96.0.0/16")],
        node_ports: 30000..=32767,
        node_port_addresses: NodePortAddresses::Primary,
        masquerade: Some(vec![61000..=65534]),
        external_ips: Vec::new(),
        overlay_port: 4790,
        overlay_vni: 1,
        direct_return_vni: None,
        outside_to_pods: OutsideToPods::Allow,
        health_port: 10256,
        announcements: Announcements::Optional,
        timeouts: Timeouts::default(),
    };
    LocalNode {
        name: "node-1".into(),
        settings,
        addresses: vec![address("192.0.2.1")],
        underlay: vec![address("192.0.2.1")],
        underlay_mtu: 1500,
        path_mtus: Default::default(),
        outside_mtu: 1500,
        masquerade_sources: vec![address("192.0.2.1")],
        pods: (2..=111).map(|n| (address(&format!("10.244.1.{n}")), Pod::new(1444))).collect(),
        host_ports: Vec::new(),
        probe_token: 7,
        workers: 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_reaches_every_worker_and_makes_the_tables_that_a_fresh_start_would() {
        let programming = Programming::new(50);
        assert_eq!(programming.changes_to_pins(2, 5, None).unwrap().len(), 5);
        let before = programming.cold();
        assert!(before.service_ports().count() >= 50);
        let after = programming.apply(&before, &programming.event(3, 9)).unwrap();
        assert!(after.snapshot.generation > before.snapshot.generation);
        let changed = |compiled: &Compiled| {
            let ports: Vec<_> = compiled.service_ports().map(|port| (port.name.clone(), port.cluster.clone())).collect();
            ports
        };
        let (old, new) = (changed(&before), changed(&after));
        assert_eq!(old.iter().zip(&new).filter(|(old, new)| old != new).count(), 1, "one service differs");
    }
}
