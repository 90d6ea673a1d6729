//! The workloads: what is sent, and who carries it.

use super::load::datagrams::{Form, Shape};
use super::load::transactions::Pace;
use super::subject::{Place, Subject};

/// What is built together, and torn down before the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// Two nodes, and what takes their place.
    Nodes,
    /// One node with services.
    Services,
    /// Nothing: it runs in this process.
    Memory,
}

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Load {
    /// TCP connections, as fast as they go.
    Stream(usize),
    /// The same by iperf3.
    Iperf,
    /// Transactions on so many connections that stay.
    Rr(usize, Pace),
    /// A connection for each transaction.
    Crr(usize),
    /// Connections begun at a rate: what a flow's first packets take.
    FirstPacket(f64),
    /// Datagrams.
    Datagrams(Shape),
    /// Twice the datagrams that can be carried, with probes.
    Overload(Shape),
    /// Transactions while one service's endpoint changes.
    Change,
    /// In memory.
    Pipeline,
    /// In memory.
    Programming,
}

impl Load {
    /// Reasons for which packets may be dropped here and nowhere else.
    pub const fn explains(self) -> &'static [&'static str] {
        match self {
            // A client's kernel uses a port again at once for another service. Where it is in use towards each of the endpoints, the new connection
            // takes the place of an old one, which is over, and a last acknowledgement that another worker is late with finds no flow. It takes
            // thousands of connections to several services of the same few endpoints. Connections that fail have a figure of their own.
            Load::Crr(_) | Load::FirstPacket(_) => &["no_flow"],
            _ => &[],
        }
    }
}

/// A kind of traffic.
#[derive(Clone, Debug)]
pub struct Workload {
    /// Its name on the command line and in reports.
    pub name: &'static str,
    /// From where to where.
    pub place: Place,
    /// What is done.
    pub load: Load,
    /// By whom, Podgate first.
    pub subjects: Vec<Subject>,
}

/// How large the service workloads are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scale {
    /// Numbers of services, in ascending order.
    pub services: [u32; 4],
    /// Endpoints of each, every one a pod.
    pub endpoints: u32,
    /// The most flows in memory.
    pub flows_max: u32,
}

impl Scale {
    /// As the goals are stated.
    pub const FULL: Scale = Scale { services: [1, 10, 1_000, 10_000], endpoints: 25, flows_max: 1_000_000 };
    /// Enough to see that it works.
    pub const QUICK: Scale = Scale { services: [1, 10, 50, 100], endpoints: 4, flows_max: 10_000 };
}

/// Payload that makes an IPv4 packet of 64 bytes.
const SMALL: usize = 64 - 28;
/// Payload that makes an IPv4 packet of 1,400 bytes.
const LARGE: usize = 1_400 - 28;

/// Transactions in a second of the paced workload: well below what any subject can do on one core.
const RR_RATE: f64 = 5_000.0;
/// New connections in a second of the first-packet workload.
const OPEN_RATE: f64 = 500.0;

/// All of them, in the order in which they run.
pub fn all(scale: Scale) -> Vec<Workload> {
    use Place::{BetweenNodes, SameNode};
    use Subject::*;
    let one_node = [Podgate, Bridge, Reflector, PodgateTun];
    let streams = [&one_node[..], &[TunRs]].concat();
    let tunnels = [Podgate, Vxlan, VxlanSegmented, PodgateSegmented, VxlanCard, PodgateCard];
    let small = |flows| Shape { payload: SMALL, flows, form: Form::Single };
    let large = |form| Shape { payload: LARGE, flows: 1, form };
    let [one, ten, some, many] = scale.services;
    let curve = [PodgateServices(one), PodgateServices(ten), PodgateServices(some), PodgateServices(many)];
    let at = |count| [PodgateServices(count), Nftables(count), Iptables(count), PodgateTunServices(count)];
    let proxies = [Nftables(one), Nftables(some), Nftables(many), Iptables(one), Iptables(some), Iptables(many)];
    let cores = u16::try_from(std::thread::available_parallelism().map_or(1, usize::from)).unwrap_or(u16::MAX);
    // Ratios to ten thousand, which is what the goals are stated for, stand in every row.
    let flows: Vec<Subject> = [10_000, 1, 100, 1_000, 100_000, 1_000_000].into_iter().filter(|flows| *flows <= scale.flows_max).map(Flows).collect();
    let workload = |name, place, load, subjects: &[Subject]| Workload { name, place, load, subjects: subjects.to_vec() };
    vec![
        workload("stream-same-node", SameNode, Load::Stream(1), &streams),
        workload("stream-same-node-4", SameNode, Load::Stream(4), &streams),
        workload("stream-same-node-64", SameNode, Load::Stream(64), &streams),
        workload("stream-iperf3", SameNode, Load::Iperf, &[Podgate, Bridge, PodgateTun]),
        workload("stream-between-nodes", BetweenNodes, Load::Stream(1), &[&tunnels[..], &[WireguardGo, Nebula, PodgateTun]].concat()),
        workload("stream-between-nodes-4", BetweenNodes, Load::Stream(4), &[&tunnels[..], &[WireguardGo, Nebula]].concat()),
        workload("stream-between-nodes-64", BetweenNodes, Load::Stream(64), &tunnels[..3]),
        workload("rr-1", SameNode, Load::Rr(1, Pace::AtOnce(1)), &one_node),
        workload("rr-32", SameNode, Load::Rr(32, Pace::AtOnce(32)), &one_node),
        workload("rr-32-paced", SameNode, Load::Rr(32, Pace::Rate(RR_RATE)), &one_node),
        workload("rr-between-nodes-1", BetweenNodes, Load::Rr(1, Pace::AtOnce(1)), &[Podgate, Vxlan, WireguardGo, Nebula, PodgateTun]),
        workload("rr-between-nodes-32", BetweenNodes, Load::Rr(32, Pace::AtOnce(32)), &[Podgate, Vxlan, WireguardGo, Nebula]),
        workload("udp-64-one-flow", SameNode, Load::Datagrams(small(1)), &one_node),
        workload("udp-64-many-flows", SameNode, Load::Datagrams(small(64)), &one_node),
        workload("udp-1400", SameNode, Load::Datagrams(large(Form::Single)), &one_node),
        workload("udp-1400-uso", SameNode, Load::Datagrams(large(Form::Superframes)), &one_node),
        workload("udp-1400-uso-between-nodes", BetweenNodes, Load::Datagrams(large(Form::Superframes)), &[Podgate, Vxlan, Underlay]),
        workload("overload", BetweenNodes, Load::Overload(small(8)), &[Podgate]),
        workload(
            "stream-to-service",
            SameNode,
            Load::Stream(1),
            &[PodgateServices(some), PodgateDirect(some), Nftables(some), Iptables(some), PodgateTunServices(some)],
        ),
        workload("crr-to-service-1", SameNode, Load::Crr(1), &[at(one), at(some), at(many)].concat()),
        workload("crr-to-service-32", SameNode, Load::Crr(32), &[at(one), at(some), at(many)].concat()),
        workload("first-packet", SameNode, Load::FirstPacket(OPEN_RATE), &[&curve[..], &proxies].concat()),
        workload("churn", SameNode, Load::Change, &[PodgateServices(many)]),
        workload("pipeline-workers", SameNode, Load::Pipeline, &(1..=cores.min(64)).map(Workers).collect::<Vec<_>>()),
        workload("pipeline-flows", SameNode, Load::Pipeline, &flows),
        workload("programming", SameNode, Load::Programming, &[Compiler(many), Compiler(some), Compiler(ten)]),
    ]
}

/// Their names.
pub fn names() -> Vec<&'static str> {
    all(Scale::FULL).iter().map(|workload| workload.name).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn workloads_have_names_of_their_own_and_subjects_of_one_group() {
        for scale in [Scale::FULL, Scale::QUICK] {
            let all = all(scale);
            assert_eq!(all.iter().map(|workload| workload.name).collect::<HashSet<_>>().len(), all.len());
            for workload in &all {
                let names: HashSet<String> = workload.subjects.iter().map(|subject| subject.name()).collect();
                assert_eq!(names.len(), workload.subjects.len(), "{}", workload.name);
                assert!(workload.subjects[0].name().starts_with("podgate"), "{}", workload.name);
                assert!(workload.subjects.iter().all(|subject| subject.group() == workload.subjects[0].group()), "{}", workload.name);
            }
        }
    }

    #[test]
    fn every_peer_takes_part_somewhere() {
        let taking_part: HashSet<&str> =
            all(Scale::QUICK).iter().flat_map(|workload| &workload.subjects).filter_map(|subject| subject.peer()).collect();
        assert_eq!(taking_part, Subject::PEERS.into());
    }
}
