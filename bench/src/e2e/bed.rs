//! Every subject of a group of workloads, built and idle.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::thread;

use anyhow::Context;
use podgate::lab::machine::ETH0;
use podgate::lab::node::NodeSettings;
use podgate::lab::{Lab, Node, Pod, Sandbox};
use podgate::netlink::Family;

use super::load::overload::Probe;
use super::load::{Dial, Ends, Server};
use super::peer::{self, Peer, Rules};
use super::services;
use super::subject::{Place, Subject};
use super::workload::Scale;

/// The clusters and peers of a group.
pub struct Bed {
    clusters: BTreeMap<Subject, Lab>,
    peers: BTreeMap<Subject, Peer>,
    unbuilt: Vec<String>,
}

/// Packets dropped so far, by node and reason.
pub type Drops = BTreeMap<(String, String), u64>;

/// What a bed is made of.
#[derive(Clone, Copy, Debug)]
pub struct Plan<'a> {
    /// Where everything lives.
    pub sandbox: &'a Sandbox,
    /// The program under test.
    pub binary: &'a Path,
    /// Workers of each gateway.
    pub workers: u16,
    /// How large the service workloads are.
    pub scale: Scale,
}

impl Bed {
    /// Builds `subjects`.
    pub fn build(plan: Plan<'_>, subjects: &[Subject]) -> anyhow::Result<Bed> {
        let mut bed = Bed { clusters: BTreeMap::new(), peers: BTreeMap::new(), unbuilt: Vec::new() };
        for subject in subjects {
            let cluster = match subject {
                Subject::Podgate | Subject::PodgateTun | Subject::PodgateSegmented | Subject::PodgateCard => plan.nodes(*subject),
                Subject::PodgateServices(count) | Subject::PodgateTunServices(count) => services::cluster(plan, *subject, *count),
                _ => continue,
            };
            bed.clusters.insert(*subject, cluster.with_context(|| format!("cannot build {}", subject.name()))?);
        }
        // The same MTU for everybody, or segments would differ in number.
        let pod = bed.clusters.values().next().and_then(|lab| lab.pods().first().cloned()).context("no cluster of Podgate's was asked for")?;
        let mtu = pod.machine().netlink()?.expect_link(ETH0)?.mtu;
        // Side by side, since ten thousand services take the tools of either kind minutes.
        let built: Vec<(Subject, anyhow::Result<Peer>)> = thread::scope(|scope| {
            let building: Vec<_> = subjects
                .iter()
                .filter(|subject| subject.peer().is_some() && !bed.clusters.contains_key(subject))
                .map(|subject| (*subject, scope.spawn(move || plan.peer(*subject, mtu))))
                .collect();
            building.into_iter().map(|(subject, thread)| (subject, thread.join().expect("building does not panic"))).collect()
        });
        for (subject, peer) in built {
            match peer.with_context(|| format!("cannot build {}", subject.name())) {
                Ok(peer) => drop(bed.peers.insert(subject, peer)),
                Err(error) => bed.unbuilt.push(format!("{error:#}")),
            }
        }
        Ok(bed)
    }

    /// Peers that could not be built, and why.
    pub fn unbuilt(&self) -> &[String] {
        &self.unbuilt
    }

    /// The ends of `subject`, which was built and carries between such places.
    pub fn with_ends<T>(&self, subject: Subject, place: Place, work: impl FnOnce(&Ends<'_>) -> T) -> anyhow::Result<T> {
        if let Some(peer) = self.peers.get(&subject) {
            return Ok(work(&peer.ends()));
        }
        let (cluster, dial) = match subject {
            Subject::PodgateServices(count) | Subject::PodgateTunServices(count) => (subject, Dial::Services(count)),
            Subject::PodgateDirect(count) => (Subject::PodgateServices(count), Dial::Direct),
            _ => (subject, Dial::Direct),
        };
        let pods = self.clusters.get(&cluster).with_context(|| format!("{} could not be built", subject.name()))?.pods();
        let to: Vec<&Arc<Pod>> = match (cluster, place) {
            (Subject::PodgateServices(_) | Subject::PodgateTunServices(_), _) => pods[1..].iter().collect(),
            (_, Place::SameNode) => vec![&pods[1]],
            (_, Place::BetweenNodes) => vec![&pods[2]],
        };
        let to = to.into_iter().map(|pod| Server { netns: pod.machine().netns(), address: pod.machine().address(Family::V4) }).collect();
        Ok(work(&Ends { from: pods[0].machine().netns(), to, dial }))
    }

    /// Traffic beside that of the first pods of `subject`'s two nodes: of other pods, of a node and its own pod, and of the nodes themselves.
    pub fn with_probes<T>(&self, subject: Subject, work: impl FnOnce(&[Probe<'_>]) -> T) -> anyhow::Result<T> {
        let lab = &self.clusters[&subject];
        let [near, far] = [lab.pod("b1")?, lab.pod("b2")?];
        let [node, other] = [lab.node(1).machine(), lab.node(2).machine()];
        let to = |machine: &podgate::lab::Machine| machine.address(Family::V4);
        let probes = [
            Probe {
                ends: Ends::direct(near.machine().netns(), far.machine().netns(), to(far.machine())),
                units: ["pods' p99 ms", "pods' missing %"],
            },
            Probe { ends: Ends::direct(node.netns(), near.machine().netns(), to(near.machine())), units: ["health p99 ms", "health missing %"] },
            Probe { ends: Ends::direct(node.netns(), other.netns(), to(other)), units: ["hosts' p99 ms", "hosts' missing %"] },
        ];
        Ok(work(&probes))
    }

    /// The first node of `subject`'s cluster.
    pub fn node(&self, subject: Subject) -> &Node {
        self.clusters[&subject].node(1)
    }

    /// The cluster of `subject`.
    pub fn cluster(&self, subject: Subject) -> &Lab {
        &self.clusters[&subject]
    }

    /// What Podgate's nodes have dropped so far.
    pub fn drops(&self) -> anyhow::Result<Drops> {
        let mut drops = Drops::new();
        for (subject, lab) in &self.clusters {
            for node in lab.nodes() {
                let name = format!("{} of {}", node.name(), subject.name());
                drops.extend(node.drops()?.into_iter().map(|(reason, packets)| ((name.clone(), reason), packets)));
            }
        }
        Ok(drops)
    }

    /// What they have dropped since: node, reason, packets.
    pub fn drops_since(&self, before: &Drops) -> anyhow::Result<Vec<(String, String, u64)>> {
        let since = |(key, packets): ((String, String), u64)| {
            let packets = packets.saturating_sub(before.get(&key).copied().unwrap_or(0));
            (packets > 0).then_some((key.0, key.1, packets))
        };
        Ok(self.drops()?.into_iter().filter_map(since).collect())
    }
}

impl Plan<'_> {
    /// Two nodes with Podgate, two pods on each.
    fn nodes(self, subject: Subject) -> anyhow::Result<Lab> {
        let attach = subject.attach().to_owned();
        let settings = NodeSettings { workers: Some(self.workers), attach, ..NodeSettings::default() };
        let lab = Lab::builder(self.sandbox, self.binary).named(&subject.name()).settings(settings).build(&|_| {})?;
        subject.uplink().set_up(&lab)?;
        Ok(lab)
    }

    fn peer(self, subject: Subject, mtu: u32) -> anyhow::Result<Peer> {
        let Plan { sandbox, binary, scale, .. } = self;
        match subject {
            Subject::Bridge => peer::bridge(mtu),
            Subject::Reflector => peer::reflector(mtu),
            Subject::TunRs => peer::tun_rs(mtu),
            Subject::Vxlan | Subject::VxlanSegmented | Subject::VxlanCard => peer::vxlan(sandbox, binary, subject, mtu),
            Subject::Underlay => peer::underlay(sandbox, binary),
            Subject::WireguardGo => peer::wireguard(sandbox, binary),
            Subject::Nebula => peer::nebula(sandbox, binary),
            Subject::Nftables(count) => peer::kube_proxy(Rules::Nftables, count, scale.endpoints, mtu),
            Subject::Iptables(count) => peer::kube_proxy(Rules::Iptables, count, scale.endpoints, mtu),
            other => anyhow::bail!("{} is no peer", other.name()),
        }
    }
}
