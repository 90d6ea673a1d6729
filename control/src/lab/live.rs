//! What operators do to a cluster that is in use: replacing a service's pods one by one, and losing a node.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use nix::sys::signal::Signal;

use super::manifest::{EndpointSpec, SERVICE_PORT, ServiceSpec};
use super::matrix::Check;
use super::program::bulk::Ticker;
use super::program::{ExchangeError, client};
use super::{Lab, LabError, OUTSIDE, Progress, checks};
use crate::netlink::Family;

/// How long a connection may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// How often a connection that stays says something.
const TICK: Duration = Duration::from_millis(5);

const ROLLING: &str = "a rolling update";
const LOSS: &str = "a node's loss";

/// Connections that were opened one after the other.
#[derive(Default)]
struct Dialled {
    answered: AtomicU64,
    failed: AtomicU64,
    stop: AtomicBool,
}

impl Dialled {
    fn run(&self, to: SocketAddr) {
        while !self.stop.load(Ordering::Relaxed) {
            match client::tcp(to, 1, PATIENCE) {
                Ok(_) => self.answered.fetch_add(1, Ordering::Relaxed),
                Err(_) => self.failed.fetch_add(1, Ordering::Relaxed),
            };
        }
    }

    fn check(&self, name: String) -> Check {
        let (answered, failed) = (self.answered.load(Ordering::Relaxed), self.failed.load(Ordering::Relaxed));
        let text = format!("{answered} connections, {failed} failed");
        checks::check(ROLLING, name, if failed == 0 && answered > 0 { Ok(text) } else { Err(text) })
    }
}

impl Lab {
    /// Replaces each pod of the service `web` by a new one, while a pod dials the service, somebody outside its node port, and others stay
    /// connected. No connection may fail; and in the end only the new pods answer.
    pub fn check_rolling_update(&self, progress: &Progress<'_>) -> Result<Vec<Check>, LabError> {
        let (before, web) = (self.services(), self.service("web")?);
        let ways = self.ways(&web)?;
        let dialled: Vec<Dialled> = ways.iter().map(|_| Dialled::default()).collect();
        let mut stayed = Vec::new();
        for (client, to) in ways.iter().chain(&ways) {
            let ticker = self.with_machine(client, |machine| Ticker::start(machine.netns(), *to, TICK, 10 * PATIENCE))?;
            stayed.push((format!("{client}, connected to {to}"), ticker));
        }
        let replaced = thread::scope(|scope| {
            for ((client, to), dialled) in ways.iter().zip(&dialled) {
                let dial = move || self.with_machine(client, |machine| machine.run(|| dialled.run(*to)));
                scope.spawn(dial);
            }
            let replaced = self.replace_pods(&web, &dialled, progress);
            dialled.iter().for_each(|dialled| dialled.stop.store(true, Ordering::Relaxed));
            replaced
        });
        let new = replaced?;
        let mut found: Vec<Check> =
            ways.iter().zip(&dialled).map(|((client, to), dialled)| dialled.check(format!("{client} goes on dialling {to}"))).collect();
        for (number, (name, ticker)) in stayed.into_iter().enumerate() {
            let outcome = ticker.map_err(|error| error.to_string()).and_then(|ticker| {
                let report = ticker.finish();
                let fared = format!("{} answers, the longest pause {} ms", report.answered, report.longest_gap.as_millis());
                report.broken.map_or(Ok(fared), Err)
            });
            found.push(checks::check(ROLLING, format!("{name} since before it, {}", number + 1), outcome));
        }
        let spread = self.spread(OUTSIDE, 40)?;
        let strangers: Vec<&str> =
            spread.backends.iter().filter(|(name, count)| **count > 0 && !new.contains(name)).map(|(name, _)| &**name).collect();
        let outcome = if spread.failed == 0 && strangers.is_empty() {
            Ok(format!("{} and no other", new.join(", ")))
        } else {
            Err(format!("{} failed, and these answered still: {}", spread.failed, strangers.join(", ")))
        };
        found.push(checks::check(ROLLING, "only the new pods answer in the end".into(), outcome));
        self.set_services(before)?;
        new.iter().try_for_each(|name| self.detach(name))?;
        Ok(found)
    }

    /// Kills a node's gateway for good, lets the cluster take note, and brings the node back.
    pub fn check_node_loss(&self, progress: &Progress<'_>) -> Result<Vec<Check>, LabError> {
        let (before, web) = (self.services(), self.service("web")?);
        let (Some(lost), true) = (self.nodes().last(), self.nodes().len() > 1) else { return Ok(Vec::new()) };
        progress(&format!("killing the gateway of {}", lost.name()));
        lost.end(Signal::SIGKILL)?;
        let of_the_rest = |service: ServiceSpec| {
            let endpoints = service.endpoints.into_iter().filter(|endpoint| endpoint.node != lost.name()).collect();
            ServiceSpec { endpoints, ..service }
        };
        self.set_services(before.iter().cloned().map(of_the_rest).collect())?;
        let mut found = Vec::new();
        // The first pod is on the first node, which is dialled by the outside as well.
        for (client, to) in self.ways(&web)? {
            found.push(self.check_answers(&client, to, format!("{client} to {to} without {}", lost.name()))?);
        }
        progress(&format!("{} comes back", lost.name()));
        lost.launch(self.settings())?;
        lost.wait_ready()?;
        self.set_services(before)?;
        for (client, to) in self.ways(&web)? {
            found.push(self.check_answers(&client, to, format!("{client} to {to} with {} again", lost.name()))?);
        }
        let spread = self.spread(OUTSIDE, 60)?;
        let backends = spread.backends.values().filter(|count| **count > 0).count();
        let text = format!("{backends} of {} backends answer", web.endpoints.len());
        let whole = backends == web.endpoints.len() && spread.failed == 0;
        found.push(checks::check(
            LOSS,
            format!("every backend serves again, those of {} too", lost.name()),
            if whole { Ok(text) } else { Err(text) },
        ));
        Ok(found)
    }

    /// Who dials `service`, and where: the first pod its VIPs, the outside its node port on the first node.
    fn ways(&self, service: &ServiceSpec) -> Result<Vec<(String, SocketAddr)>, LabError> {
        let first = self.pods().first().map(|pod| pod.name().to_owned()).unwrap_or_default();
        let vip = |family| (first.clone(), SocketAddr::new(service.vips.of(family), SERVICE_PORT));
        let node = self.node(1).machine().address(Family::V4);
        Ok(vec![vip(Family::V4), vip(Family::V6), (OUTSIDE.to_owned(), SocketAddr::new(node, service.node_port))])
    }

    /// Adds a new pod to the service beside each old one, then takes the old one out; the names of the new.
    fn replace_pods(&self, web: &ServiceSpec, dialled: &[Dialled], progress: &Progress<'_>) -> Result<Vec<String>, LabError> {
        let mut names = Vec::new();
        let mut endpoints = web.endpoints.clone();
        for (at, old) in web.endpoints.iter().enumerate() {
            let index = self.nodes().iter().position(|node| node.name() == old.node).unwrap_or(0);
            let name = format!("new-{}", at + 1);
            let pod = self.attach(index, &name)?;
            pod.machine().serve()?;
            endpoints.push(EndpointSpec { addresses: pod.machine().addresses(), node: old.node.clone() });
            self.set_endpoints("web", endpoints.clone())?;
            endpoints.retain(|endpoint| endpoint != old);
            self.set_endpoints("web", endpoints.clone())?;
            let sum = |count: fn(&Dialled) -> &AtomicU64| dialled.iter().map(|dialled| count(dialled).load(Ordering::Relaxed)).sum::<u64>();
            let (answered, failed) = (sum(|dialled| &dialled.answered), sum(|dialled| &dialled.failed));
            progress(&format!("  {} has taken the place of {}: {answered} new connections so far, {failed} failed", name, old.addresses.v4));
            names.push(name);
        }
        Ok(names)
    }

    fn set_endpoints(&self, name: &str, endpoints: Vec<EndpointSpec>) -> Result<(), LabError> {
        let mut services = self.services();
        services.iter_mut().filter(|service| service.name == name).for_each(|service| service.endpoints.clone_from(&endpoints));
        self.set_services(services)
    }

    fn check_answers(&self, client: &str, to: SocketAddr, name: String) -> Result<Check, LabError> {
        const CONNECTIONS: usize = 20;
        let dial = || (0..CONNECTIONS).map(|_| client::tcp(to, 1, PATIENCE)).collect::<Vec<Result<_, ExchangeError>>>();
        let answers = self.with_machine(client, |machine| machine.run(dial))??;
        let failed: Vec<String> = answers.iter().filter_map(|answer| Some(answer.as_ref().err()?.to_string())).collect();
        let outcome = match failed.first() {
            None => Ok(format!("{CONNECTIONS} connections")),
            Some(error) => Err(format!("{} of {CONNECTIONS} failed: {error}", failed.len())),
        };
        Ok(checks::check(LOSS, name, outcome))
    }
}
