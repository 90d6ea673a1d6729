//! The plugin and the daemon killed at random moments of ADD and DEL: afterwards a collection leaves what is valid and nothing else.
//!
//! `PODGATE_CNI_KILLS` says how many operations (40 unless it does), `PODGATE_CNI_SEED` which; the seed is printed, and a run of the same
//! seed makes the same choices, though the machine decides what they meet.

use std::collections::hash_map::RandomState;
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasher, Hasher};
use std::net::IpAddr;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use ipnetwork::IpNetwork;
use nix::sys::signal::Signal;
use podgate::lab::program::client;
use podgate::lab::{Lab, LabError, Node, wait_until};
use podgate::netlink::Family;
use podgate_testbed::cni::{Container, Plugin, Target, Verb, network};
use podgate_testbed::need::plugin_directories;
use podgate_testbed::traces::{Traces, leases};
use podgate_testbed::{Bed, Outcome, run};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(2);
/// How many containers come and go.
const CONTAINERS: usize = 8;
/// After so many operations all is compared.
const ROUND: u64 = 20;

type Try<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> ExitCode {
    run(|tests| tests.add("shim and daemon killed at any moment of ADD and DEL leave no address, no double and no interface after GC", kills))
}

/// Numbers by xorshift64 (Marsaglia 2003, p. 4).
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

/// Who is killed in an operation, if anybody.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Victim {
    Nobody,
    Shim,
    Daemon,
    Both,
}

/// What a runtime believes of its containers.
struct Runtime<'a> {
    lab: &'a Lab,
    node: &'a Node,
    plugin: Plugin,
    config: Value,
    containers: Vec<Container>,
    /// The addresses of those whose last call was a successful ADD.
    attached: BTreeMap<usize, Vec<IpAddr>>,
    /// What was done since the last comparison.
    history: Vec<String>,
    /// How long calls take at most, so that a moment in their midst can be chosen.
    longest: Duration,
}

fn kills(bed: &Bed) -> Outcome {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let operations = number("PODGATE_CNI_KILLS").unwrap_or(40);
    let seed = number("PODGATE_CNI_SEED").unwrap_or_else(|| RandomState::new().build_hasher().finish());
    eprintln!("    {operations} operations, PODGATE_CNI_SEED={seed}");
    let lab = bed.lab()?;
    let node = lab.node(1);
    let before = Traces::of(lab, node)?;
    let plugin = Plugin::new(bed.plugin(), &plugin_directories(), node.machine().netns())?;
    let directory = lab.directory().join("containers");
    let containers = (0..CONTAINERS).map(|number| Container::new(&directory, &format!("k{number}"))).collect::<Result<_, LabError>>()?;
    let config = network(node, "podgate", "1.1.0", &Value::Null);
    let mut runtime =
        Runtime { lab, node, plugin, config, containers, attached: BTreeMap::new(), history: Vec::new(), longest: Duration::from_millis(20) };
    let mut random = Random(seed.max(1));
    let mut outcomes: BTreeMap<(Victim, &str, &str), u64> = BTreeMap::new();
    for operation in 1..=operations {
        let told = |error: &dyn std::fmt::Display, history: &[String]| {
            format!("at operation {operation} of seed {seed}: {error}\nbefore it:\n{}\nthe daemon's log:\n{}", history.join("\n"), node.log_tail(60))
        };
        let outcome = runtime.operate(&mut random).map_err(|error| told(&error, &runtime.history))?;
        *outcomes.entry(outcome).or_default() += 1;
        if operation % ROUND == 0 || operation == operations {
            runtime.collect_and_compare(&before).map_err(|error| told(&error, &runtime.history))?;
            runtime.history.clear();
        }
    }
    for ((victim, verb, end), count) in &outcomes {
        eprintln!("    killed {victim:?} during {verb}: {count} {end}");
    }
    for number in 0..CONTAINERS {
        let target = runtime.containers[number].target("eth0");
        runtime.plugin.call(Verb::Del, &target, &runtime.config)?.success()?;
    }
    let left = Traces::of(lab, node)?.beyond(&before);
    if left.is_empty() { Ok(()) } else { Err(format!("left behind after DEL of all: {}", left.join(", ")).into()) }
}

impl Runtime<'_> {
    /// One call for one container, with somebody killed at some moment of it.
    fn operate(&mut self, random: &mut Random) -> Try<(Victim, &'static str, &'static str)> {
        let number = random.below(CONTAINERS as u64) as usize;
        let verb = if self.attached.contains_key(&number) { Verb::Del } else { Verb::Add };
        // A daemon that starts again takes its time, so it is killed less often.
        let victim = match random.below(10) {
            0 => Victim::Nobody,
            1 => Victim::Daemon,
            2 => Victim::Both,
            _ => Victim::Shim,
        };
        let moment = Duration::from_nanos(random.below(self.longest.as_nanos() as u64 * 5 / 4));
        let target = self.containers[number].target("eth0");
        let start = Instant::now();
        let mut calling = self.plugin.start(verb, &target, &self.config)?;
        let ended = victim == Victim::Nobody || calling.ends_within(moment)?;
        if matches!(victim, Victim::Shim | Victim::Both) && !ended {
            calling.kill()?;
        }
        if matches!(victim, Victim::Daemon | Victim::Both) {
            self.node.end(Signal::SIGKILL)?;
            self.node.launch(self.lab.settings())?;
        }
        let answer = calling.answer()?;
        if victim == Victim::Nobody {
            self.longest = self.longest.max(start.elapsed()).min(Duration::from_millis(200));
        }
        if matches!(victim, Victim::Daemon | Victim::Both) {
            self.node.wait_ready()?;
        }
        let end = match (verb, answer.status.success(), answer.status.code()) {
            (Verb::Add, true, _) => {
                self.attached.insert(number, addresses(&answer.json)?);
                "succeeded"
            }
            (_, true, _) => {
                self.attached.remove(&number);
                "succeeded"
            }
            // DEL must succeed whatever becomes of the daemon.
            (Verb::Del, false, Some(_)) => return Err(format!("DEL failed: {} {}", answer.json, answer.stderr).into()),
            (_, false, Some(_)) => "failed",
            (_, false, None) => "was killed",
        };
        self.history.push(format!(
            "{} of {}, killed {victim:?} after {} ms at most: {end} {}",
            verb.name(),
            target.container,
            moment.as_millis(),
            answer.json
        ));
        if victim == Victim::Nobody && !answer.status.success() {
            return Err(format!("{} failed although nobody was killed: {} {}", verb.name(), answer.json, answer.stderr).into());
        }
        if !answer.status.success() {
            self.attached.remove(&number);
            // As every runtime does after a failure; now and then it does not come to it, and only GC can help.
            if random.below(4) > 0 {
                self.plugin.call(Verb::Del, &target, &self.config)?.success()?;
                self.nothing_of(number)?;
            } else {
                self.replace(number)?;
            }
        } else if verb == Verb::Del && victim != Victim::Shim {
            self.replace(number)?;
        }
        Ok((victim, verb.name(), end))
    }

    /// After a DEL that succeeded nothing of the container is left.
    fn nothing_of(&self, number: usize) -> Outcome {
        let container = &self.containers[number];
        if container.netlink()?.link("eth0")?.is_some() {
            return Err(format!("eth0 is still in {} after DEL", container.id()).into());
        }
        Ok(())
    }

    /// The container's namespace ends, and another container comes in its place under a name of its own.
    fn replace(&mut self, number: usize) -> Outcome {
        let generation = self.containers[number].id().split('-').nth(1).and_then(|text| text.parse::<u64>().ok()).unwrap_or(0) + 1;
        let directory = self.lab.directory().join("containers");
        self.containers[number] = Container::new(&directory, &format!("k{number}-{generation}"))?;
        Ok(())
    }

    /// GC with what the runtime believes in; then the namespaces, the leases and the gateway must agree with it.
    fn collect_and_compare(&mut self, before: &Traces) -> Outcome {
        let valid: Vec<Value> = self.attached.keys().map(|number| json!({"containerID": self.containers[*number].id(), "ifname": "eth0"})).collect();
        let mut config = self.config.clone();
        config["cni.dev/valid-attachments"] = valid.into();
        self.plugin.call(Verb::Gc, &Target::default(), &config)?.success()?;
        let mut expected = BTreeSet::new();
        for (number, container) in self.containers.iter().enumerate() {
            let netlink = container.netlink()?;
            let eth0 = netlink.link("eth0")?;
            let Some(believed) = self.attached.get(&number) else {
                if eth0.is_some() {
                    return Err(format!("{} is not attached and has eth0", container.id()).into());
                }
                continue;
            };
            let index = eth0.ok_or_else(|| format!("{} is attached and has no eth0", container.id()))?.index;
            let has: BTreeSet<IpAddr> =
                netlink.addresses()?.into_iter().filter(|a| a.index == index).map(|a| a.address.ip()).filter(global).collect();
            if has != believed.iter().copied().collect() {
                return Err(format!("{} was given {believed:?} and has {has:?}", container.id()).into());
            }
            for address in has {
                if !expected.insert(address.to_string()) {
                    return Err(format!("{address} was given twice").into());
                }
                let to = self.lab.node(2).machine().addresses().server(Family::of(address));
                wait_until(
                    PATIENCE,
                    || format!("a way for {}", container.id()),
                    || Ok(container.run(|| client::udp(to, 10, 1, Duration::from_millis(300)))?.err().map(|error| error.to_string())),
                )?;
            }
        }
        let now = Traces::of(self.lab, self.node)?;
        let beyond = now.beyond(before);
        let veths = beyond.iter().filter(|trace| trace.starts_with("gateway link")).count();
        if veths != self.attached.len() {
            return Err(format!("{} containers are attached by {veths} interfaces: {}", self.attached.len(), beyond.join(", ")).into());
        }
        let leased: BTreeSet<String> = beyond.iter().filter_map(|trace| trace.strip_prefix("lease ")?.split(' ').next()).map(str::to_owned).collect();
        if leased != expected {
            return Err(format!("{expected:?} are in use, {leased:?} are leased: {:?}", leases(self.node)?).into());
        }
        Ok(())
    }
}

fn global(address: &IpAddr) -> bool {
    !matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local())
}

fn addresses(result: &Value) -> Try<Vec<IpAddr>> {
    let texts = result["ips"].as_array().into_iter().flatten().filter_map(|ip| ip["address"].as_str());
    Ok(texts.map(|text| text.parse::<IpNetwork>().map(|network| network.ip())).collect::<Result<_, _>>()?)
}
