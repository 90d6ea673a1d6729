//! Checks beyond the table of paths: the gateways' own answers, the routes that packets take, the size that a path takes, false
//! sources, how connections spread, and bulk transfers.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::Duration;

use serde::Serialize;

use super::machine::{ETH0, v4_network, v6_network};
use super::manifest::SERVICE_PORT;
use super::matrix::{Check, Path, run_all};
use super::program::bulk::Transfer;
use super::program::route::{Hop, path_mtu, traceroute};
use super::program::{ExchangeError, PORT, bulk, client, ping, raw};
use super::{Lab, LabError, Machine, Node, OUTSIDE};
use crate::netlink::{Family, MissingIsFine, RouteSpec, TABLE_MAIN};

const PATIENCE: Duration = Duration::from_secs(2);

/// How many connections each backend got.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Spread {
    /// Who dialled what.
    pub name: String,
    /// Connections by backend.
    pub backends: BTreeMap<String, u32>,
    /// Those that failed.
    pub failed: u32,
}

/// A bulk transfer's outcome.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Throughput {
    /// The path.
    pub name: String,
    /// How much was moved.
    pub bytes: u64,
    /// Payload, in gigabits per second.
    pub gbit_per_second: f64,
}

pub(super) fn check(group: &str, name: String, outcome: Result<String, String>) -> Check {
    let (ok, detail) = match outcome {
        Ok(detail) => (true, detail),
        Err(detail) => (false, detail),
    };
    Check { group: group.to_owned(), name, ok, detail, latency_micros: None }
}

impl Lab {
    /// The gateways answer ping: to their pods, to their nodes, and to the pods of other nodes.
    pub fn check_gateways(&self) -> Result<Vec<Check>, LabError> {
        let mut work = Vec::new();
        for node in self.nodes() {
            work.push((node.name().to_owned(), node));
            work.extend(self.pods().iter().map(|pod| (pod.name().to_owned(), node)));
        }
        let work = work.into_iter().flat_map(|(client, node)| Family::BOTH.map(|family| (client.clone(), node, family))).collect();
        run_all(work, &|_, _| {}, |(client, node, family)| {
            let to = node.gateway().of(family);
            let reply = self.with_machine(&client, |machine| machine.run(|| ping::ping(to, 56, PATIENCE)))??;
            let micros = reply.as_ref().ok().map(|reply| reply.latency.as_micros() as u64);
            let outcome = reply.map(|_| format!("{to} answered")).map_err(|error| error.to_string());
            let name = format!("{client} pings the gateway of {}, {family}", node.name());
            Ok(Check { latency_micros: micros, ..check("gateways", name, outcome) })
        })
    }

    /// A traceroute along some paths: every router answers, in the terms of the dialled address, and the last one is the server.
    pub fn check_traceroutes(&self, paths: &[Path]) -> Result<Vec<Check>, LabError> {
        let traced = |path: &&Path| {
            path.name.starts_with("pod to pod") || path.name.starts_with("pod to VIP, backend on") || path.name == "pod to the outside"
        };
        let work = paths.iter().filter(traced).flat_map(|path| Family::BOTH.map(|family| (path, family))).collect();
        run_all(work, &|_, _| {}, |(path, family)| {
            let to = SocketAddr::new(path.target.of(family), path.port);
            let hops = self.with_machine(&path.client, |machine| machine.run(|| traceroute(to, 8, Duration::from_secs(1))))??;
            let outcome = match hops {
                Err(error) => Err(error.to_string()),
                Ok(hops) => {
                    let text = hops.iter().map(show_hop).collect::<Vec<_>>().join(" → ");
                    let (last, routers) = hops.split_last().unwrap_or((&Hop::Silent, &[]));
                    let good = *last == Hop::Destination && routers.iter().all(|hop| matches!(hop, Hop::Router(_)));
                    if good { Ok(text) } else { Err(format!("{} to {to}: {text}", path.client)) }
                }
            };
            Ok(check("routes and sizes", format!("traceroute, {}, {family}", path.name), outcome))
        })
    }

    /// Path MTU discovery through the overlay: the path between two nodes is made narrower, and a pod that sends more with "don't
    /// fragment" is told the size and then gets through.
    pub fn check_path_mtu(&self) -> Result<Vec<Check>, LabError> {
        if self.nodes().len() < 2 {
            return Ok(Vec::new());
        }
        const NARROW: u32 = 1400;
        const TOO_LARGE: usize = 1430;
        let (from, to) = (self.node(1).machine(), self.node(2).machine());
        let netlink = from.netlink()?;
        let routes = [v4_network(to.addresses().v4, 32), v6_network(to.addresses().v6, 128)];
        let routes = routes.map(|destination| RouteSpec::unicast(TABLE_MAIN, destination, ETH0).mtu(NARROW));
        for route in &routes {
            netlink.add_route(route).map_err(from.failed())?;
        }
        let (client, server) = (self.pod("a1")?, self.pod("a2")?);
        let mut checks = Vec::new();
        for family in Family::BOTH {
            let to = server.machine().addresses().server(family);
            let found = client.machine().run(|| path_mtu(to, TOO_LARGE, Duration::from_secs(1)))?;
            let outcome = match found {
                Err(error) => Err(error.to_string()),
                Ok(found) => {
                    let text = format!("sent {TOO_LARGE}, was told {:?}, delivered: {}", found.reported, found.delivered);
                    let told = found.reported.last().is_some_and(|(size, _)| *size < NARROW);
                    if told && found.delivered { Ok(text) } else { Err(text) }
                }
            };
            checks.push(check("routes and sizes", format!("path MTU discovery through the overlay, {family}"), outcome));
        }
        for route in &routes {
            netlink.delete_route(route).or_missing().map_err(from.failed())?;
        }
        Ok(checks)
    }

    /// Nothing is delivered that a pod sends from an address it does not own, and every such packet is counted.
    pub fn check_pod_spoofs(&self, pod: &str) -> Result<Vec<Check>, LabError> {
        let liar = self.pod(pod)?;
        let node = &self.nodes()[liar.node()];
        let others = self.pods();
        let other = others.iter().find(|other| other.node() == liar.node() && other.name() != pod);
        let vips = self.services().first().map(|service| service.vips);
        let mut checks = Vec::new();
        for family in Family::BOTH {
            let mut sources = vec![("its node's", node.machine().address(family)), ("its gateway's", node.gateway().of(family))];
            sources.extend(other.map(|other| ("another pod's", other.machine().address(family))));
            sources.extend(vips.map(|vips| ("a VIP", vips.of(family))));
            let made_up = match family {
                Family::V4 => [("loopback", "127.0.0.1"), ("link-local", "169.254.7.7"), ("multicast", "224.0.0.5"), ("foreign", "198.51.100.7")],
                Family::V6 => [("loopback", "::1"), ("link-local", "fe80::7"), ("multicast", "ff02::5"), ("foreign", "2001:db8:7::7")],
            };
            sources.extend(made_up.map(|(what, address)| (what, address.parse().expect("an address in the table"))));
            let mut targets = vec![node.machine().addresses().server(family), self.outside().addresses().server(family)];
            targets.extend(other.map(|other| other.machine().addresses().server(family)));
            for (what, source) in sources {
                let sent = targets.len() as u64;
                let outcome = self.lie(liar.machine(), node, source, &targets, sent)?;
                checks.push(check("false sources", format!("a pod sends as {what} ({source}), {family}"), outcome));
            }
        }
        Ok(checks)
    }

    /// The same for packets that arrive on the underlay and claim to be a pod, a gateway or a VIP.
    pub fn check_wire_spoofs(&self) -> Result<Vec<Check>, LabError> {
        let node = self.node(1);
        let pods = self.pods();
        let (Some(victim), Some(service)) = (pods.iter().find(|pod| pod.node() == 0), self.services().into_iter().next()) else {
            return Ok(Vec::new());
        };
        let outside = self.outside();
        let netlink = outside.netlink()?;
        let gateway = node.gateway();
        let routes = [
            RouteSpec::unicast(TABLE_MAIN, v4_network(gateway.v4, 24), ETH0).via(node.machine().address(Family::V4)),
            RouteSpec::unicast(TABLE_MAIN, v6_network(gateway.v6, 64), ETH0).via(node.machine().address(Family::V6)),
        ];
        for route in &routes {
            netlink.replace_route(route).map_err(outside.failed())?;
        }
        let mut checks = Vec::new();
        for family in Family::BOTH {
            let to_pod = victim.machine().addresses().server(family);
            let to_node_port = SocketAddr::new(node.machine().address(family), service.node_port);
            let other = pods.iter().find(|pod| pod.name() != victim.name()).unwrap_or(victim);
            let sources = [("a pod", other.machine().address(family)), ("a gateway", gateway.of(family)), ("a VIP", service.vips.of(family))];
            for (what, source) in sources {
                let outcome = self.lie(outside, node, source, &[to_pod, to_node_port], 2)?;
                checks.push(check("false sources", format!("somebody on the wire sends as {what} ({source}), {family}"), outcome));
            }
        }
        for route in &routes {
            netlink.delete_route(route).or_missing().map_err(outside.failed())?;
        }
        Ok(checks)
    }

    /// Sends one datagram from `source` to each target; `node` must count all of them and no server may get any.
    fn lie(&self, liar: &Machine, node: &Node, source: IpAddr, targets: &[SocketAddr], sent: u64) -> Result<Result<String, String>, LabError> {
        let before: u64 = node.drops()?.iter().map(|(_, packets)| packets).sum();
        let mark = format!("{} as {source}", liar.name());
        let outcome = liar.run(|| targets.iter().try_for_each(|to| raw::spoof_udp(source, *to, &mark)))?;
        if let Err(error) = outcome {
            return Ok(Err(format!("the false packet could not be sent: {error}")));
        }
        // An event to wait for there is only if it is counted, as it should be.
        let mut counted = 0;
        for _ in 0..50 {
            counted = node.drops()?.iter().map(|(_, packets)| packets).sum::<u64>() - before;
            if counted >= sent {
                break;
            }
            thread::sleep(Duration::from_millis(20));
        }
        let delivered: Vec<_> = self.spoofs_delivered()?.into_iter().filter(|delivery| delivery.contains(&mark)).collect();
        let text = format!(
            "{sent} sent, {counted} counted as drops, delivered: {}",
            if delivered.is_empty() { "none".into() } else { delivered.join(", ") }
        );
        Ok(if delivered.is_empty() && counted >= sent { Ok(text) } else { Err(text) })
    }

    /// Every false datagram that reached any server.
    pub fn spoofs_delivered(&self) -> Result<Vec<String>, LabError> {
        let mut names = vec![OUTSIDE.to_owned()];
        names.extend(self.nodes().iter().map(|node| node.name().to_owned()));
        names.extend(self.pods().iter().map(|pod| pod.name().to_owned()));
        let mut delivered = Vec::new();
        for name in names {
            let spoofs = self.with_machine(&name, |machine| machine.server().map(|server| server.spoofs()).unwrap_or_default())?;
            delivered.extend(spoofs.into_iter().map(|spoof| format!("{} got \"{}\" from {}", spoof.server, spoof.text, spoof.source)));
        }
        Ok(delivered)
    }

    /// Opens `connections` to the service `web` from `client`, by VIP (port 80) or, from the outside, by node port.
    pub fn spread(&self, client: &str, connections: u32) -> Result<Spread, LabError> {
        let service = self.service("web")?;
        let (to, dialled) = if client == OUTSIDE {
            let address = self.node(1).machine().address(Family::V4);
            (SocketAddr::new(address, service.node_port), format!("node-1:{}", service.node_port))
        } else {
            (SocketAddr::new(service.vips.of(Family::V4), SERVICE_PORT), format!("web, {}", service.vips.v4))
        };
        let answers = self.with_machine(client, |machine| {
            machine.run(|| (0..connections).map(|_| client::tcp(to, 1, PATIENCE)).collect::<Vec<Result<_, ExchangeError>>>())
        })??;
        let mut spread = Spread { name: format!("{client} to {dialled}"), backends: BTreeMap::new(), failed: 0 };
        spread.backends.extend(self.pods().iter().map(|pod| (pod.name().to_owned(), 0)));
        for answer in answers {
            match answer {
                Ok(answer) => *spread.backends.entry(answer.server).or_default() += 1,
                Err(_) => spread.failed += 1,
            }
        }
        Ok(spread)
    }

    /// A bulk transfer of `len` bytes along `path`.
    pub fn transfer(&self, path: &Path, family: Family, len: u64) -> Result<Result<Transfer, ExchangeError>, LabError> {
        let to = SocketAddr::new(path.target.of(family), path.port);
        self.with_machine(&path.client, |machine| machine.run(|| bulk::send(to, len, Duration::from_secs(30))))?
    }

    /// The paths that differ in what the gateways do with a long stream; every other path is one of these with another name.
    pub fn kinds_of_path(&self) -> Result<Vec<Path>, LabError> {
        const KINDS: [&str; 9] = [
            "pod to pod, same node",
            "pod to pod, other node",
            "pod to VIP, backend on the same node",
            "pod to VIP, backend on another node",
            "node to its pod",
            "pod to its node",
            "outside to node port, backend on that node",
            "outside to node port, backend on another node",
            "pod to the outside",
        ];
        let paths = self.paths()?;
        Ok(KINDS.iter().filter_map(|name| paths.iter().find(|path| path.name == *name).cloned()).collect())
    }

    /// Bulk transfers of `len` bytes, one after the other, along each of `paths` over both families: every byte must arrive, at the
    /// right server, which must see the right client. `after` is called after each.
    pub fn check_throughput(
        &self,
        paths: &[Path],
        len: u64,
        after: &mut dyn FnMut(&Check) -> Result<(), LabError>,
    ) -> Result<(Vec<Check>, Vec<Throughput>), LabError> {
        let (mut checks, mut rows) = (Vec::new(), Vec::new());
        for path in paths {
            for family in Family::BOTH {
                let name = format!("{}, {family}", path.name);
                let outcome = match self.transfer(path, family, len)? {
                    Ok(transfer) => {
                        let gbit_per_second = transfer.gbit_per_s();
                        rows.push(Throughput { name: name.clone(), bytes: len, gbit_per_second });
                        let (server, seen) = (&transfer.answer.server, transfer.answer.seen.ip());
                        let right = *server == path.server && seen == path.seen.of(family);
                        let text = format!("{} MiB arrived at {server} from {seen} with every byte right, {gbit_per_second:.2} Gb/s", len >> 20);
                        if right { Ok(text) } else { Err(format!("{text}; it should be {} from {}", path.server, path.seen.of(family))) }
                    }
                    Err(error) => Err(error.to_string()),
                };
                checks.push(check("bulk transfers", format!("bulk, {name}"), outcome));
                checks.last().map_or(Ok(()), &mut *after)?;
            }
        }
        Ok((checks, rows))
    }

    /// The check that goes with a [`Spread`]: every backend got a share and no connection failed.
    pub fn check_spread(spread: &Spread) -> Check {
        let shares = spread.backends.iter().map(|(name, count)| format!("{name} {count}")).collect::<Vec<_>>().join(", ");
        let good = spread.failed == 0 && spread.backends.values().all(|count| *count > 0);
        let text = if spread.failed == 0 { shares } else { format!("{shares}; {} failed", spread.failed) };
        check("spread", format!("connections spread, {}", spread.name), if good { Ok(text) } else { Err(text) })
    }

    /// A pod's flood of neighbour solicitations and ARP requests leaves no entry in its gateway's neighbour table.
    pub fn check_neighbour_flood(&self, pod: &str, count: u32) -> Result<Check, LabError> {
        let liar = self.pod(pod)?;
        let node = &self.nodes()[liar.node()];
        let gateway = self.gateway_netlink(node)?;
        let dynamic = || -> Result<usize, LabError> {
            let neighbours = gateway.neighbours().map_err(node.machine().failed())?;
            Ok(neighbours.iter().filter(|neighbour| !neighbour.permanent).count())
        };
        let before = dynamic()?;
        let (v4, v6) = ("169.254.1.1".parse().expect("an address"), "fe80::1".parse().expect("an address"));
        let flooded = liar.machine().run(|| raw::neighbour_flood(ETH0, v4, v6, count))?;
        // What follows the flood on the same veth is handled after it.
        let alive = liar.machine().run(|| ping::ping(node.gateway().v4.into(), 56, PATIENCE))?;
        let after = dynamic()?;
        let outcome = match (flooded, alive) {
            (Err(error), _) => Err(format!("the flood could not be sent: {error}")),
            (_, Err(error)) => Err(format!("the gateway does not answer after it: {error}")),
            _ if after > before => Err(format!("{before} dynamic entries became {after}")),
            _ => Ok(format!("{} frames, {after} dynamic entries before and after", 2 * count)),
        };
        Ok(check("false sources", "a pod's flood of neighbour solicitations and ARP requests".to_owned(), outcome))
    }
}

fn show_hop(hop: &Hop) -> String {
    match hop {
        Hop::Router(address) => address.to_string(),
        Hop::Destination => "the server".to_owned(),
        Hop::Unreachable(address) => format!("{address} says unreachable"),
        Hop::Silent => "*".to_owned(),
    }
}

/// A target on [`PORT`], for tests that dial by hand.
pub fn server_at(address: IpAddr) -> SocketAddr {
    SocketAddr::new(address, PORT)
}
