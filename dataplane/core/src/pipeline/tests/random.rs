//! Random packets, whole and mutated, from every side, in a world with flows: what must hold of every one of them, whatever it was.

use super::*;

/// SplitMix64 (Steele, Lea, Flood 2014): the seed is the whole of it, so a failing run is named by its seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ word >> 31
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    fn of<T: Clone>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())].clone()
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

const V4: &[&str] = &[
    "10.32.1.10",
    "10.32.1.11",
    "10.32.1.10",
    "10.32.1.11",
    "10.32.2.10",
    "10.32.2.11",
    "192.0.2.1",
    "192.0.2.2",
    "203.0.113.9",
    "198.51.100.7",
    "10.96.0.10",
    "10.96.0.11",
    "10.96.0.12",
    "10.96.0.13",
    "10.96.0.14",
    "10.96.0.15",
    "10.96.0.16",
    "10.96.0.99",
    "10.96.7.7",
    "10.32.1.1",
    "10.32.2.1",
    "10.32.1.99",
    "10.32.9.9",
    "127.0.0.1",
    "169.254.1.1",
    "224.0.0.1",
    "0.0.0.0",
    "255.255.255.255",
];

const V6: &[&str] = &[
    "fd00:32:1::10",
    "fd00:32:1::11",
    "fd00:32:2::10",
    "fd00:32:2::11",
    "2001:db8::1",
    "2001:db8::2",
    "2001:db8:9::9",
    "fd00:96::10",
    "fd00:96::77",
    "fd00:32:1::1",
    "fd00:32:1::99",
    "fd00:32:9::9",
    "::1",
    "fe80::1",
    "ff02::1",
];

const PORTS: &[u16] = &[80, 80, 80, 5000, 5001, 8080, 9090, 30080, 30081, 30084, 30085, 4790, 61000, 65534, 443, 53, 9, 0];

const ELSEWHERE: Ingress = Ingress::Overlay(Outer { src: Addr::from_v4([192, 0, 2, 66]), ecn: 0, network: Network::Cluster });
const CONGESTED: Ingress = Ingress::Overlay(Outer { src: Addr::from_v4([192, 0, 2, 2]), ecn: 3, network: Network::Cluster });

const HANDED_ON: Ingress = Ingress::Overlay(Outer { src: Addr::from_v4([192, 0, 2, 2]), ecn: 0, network: Network::DirectReturn });

/// Whether a packet is as its sender made it, or was damaged afterwards.
#[derive(Clone, Copy, PartialEq)]
enum State {
    Whole,
    Damaged,
}

struct Traffic {
    random: Random,
    /// Whether pod .10 has a TUN of its own.
    own_tun: bool,
    /// What left lately: replies and ICMP errors are made from it.
    left: Vec<Vec<u8>>,
    /// The tuples that translated ones came with: connections go on.
    came: Vec<Tuple>,
}

impl Traffic {
    fn addresses(&mut self) -> (&'static str, &'static str) {
        let pool = if self.random.one_in(3) { V6 } else { V4 };
        (self.random.of(pool), self.random.of(pool))
    }

    fn packet(&mut self) -> Vec<u8> {
        let (src, dst) = self.addresses();
        let (from, to) = (self.random.of(PORTS), self.random.of(PORTS));
        let at = |ip: &str, port: u16| std::net::SocketAddr::new(ip.parse().unwrap(), port).to_string();
        let len = self.random.of(&[0, 1, 7, 100, 1400, 1436, 1480, 3000, 9000]);
        let payload = vec![self.random.next() as u8; len];
        match self.random.below(15) {
            0..=2 => {
                let flags = self.random.of(&[SYN, SYN, SYN, ACK, ACK, SYN | ACK, RST, RST | ACK, 0x11, 0, 0xff]);
                let options: &[u8] = if flags & SYN != 0 { &[1, 2, 4, 5, 180, 0, 0, 0] } else { &[] };
                testing::tcp_with_options(&at(src, from), &at(dst, to), flags, options, &payload)
            }
            3..=5 => testing::udp(&at(src, from), &at(dst, to), &payload),
            6 => testing::echo_request(src, dst, from, 1, &payload),
            7 => testing::echo_reply(src, dst, to, 1, &payload),
            8 if !self.left.is_empty() => {
                let whole = self.random.of(&self.left);
                let quoted = whole[..whole.len().min(500)].to_vec();
                let v4 = quoted[0] >> 4 == 4;
                let sender = if v4 { self.random.of(V4) } else { self.random.of(V6) };
                let receiver = if self.random.one_in(4) { if v4 { V4[0] } else { V6[0] }.to_string() } else { tuple_of(&whole).src.to_string() };
                let kind = if v4 { self.random.of(&[3, 11, 12, 5]) } else { self.random.of(&[1, 2, 3, 4]) };
                testing::icmp_error(sender, &receiver, kind, self.random.of(&[0, 3, 4]), 1400, &quoted)
            }
            9 | 10 if !self.left.is_empty() => {
                let tuple = tuple_of(&self.random.of(&self.left));
                match tuple.protocol {
                    protocol::TCP | protocol::UDP => reply(tuple.protocol, &tuple),
                    protocol::ICMP | protocol::ICMPV6 => {
                        testing::echo_reply(&tuple.dst.to_string(), &tuple.src.to_string(), tuple.src_port, 1, b"answer")
                    }
                    _ => testing::ip(&tuple.dst.to_string(), &tuple.src.to_string(), tuple.protocol, &payload),
                }
            }
            12..=14 if !self.came.is_empty() => {
                let tuple = self.random.of(&self.came);
                let (from, to) = (at(&tuple.src.to_string(), tuple.src_port), at(&tuple.dst.to_string(), tuple.dst_port));
                let flags = self.random.of(&[ACK, ACK, ACK, ACK | 0x08, ACK | 0x01, RST]);
                if tuple.protocol == protocol::TCP { testing::tcp(&from, &to, flags, &payload) } else { testing::udp(&from, &to, &payload) }
            }
            _ => testing::ip(src, dst, self.random.of(&[47, 132, 4, 41, 50]), &payload),
        }
    }

    /// A packet as it comes in: perhaps a fragment, perhaps damaged.
    fn arriving(&mut self) -> (State, Vec<u8>) {
        let mut bytes = self.packet();
        if self.random.one_in(8) && bytes[0] >> 4 == 6 {
            bytes = testing::with_extension(&bytes, 60, &[1, 4, 0, 0, 0, 0]);
        } else if self.random.one_in(4) && bytes.len() > 200 {
            let mut pieces = testing::fragments(&bytes, self.random.of(&[100, 576, 1280]), self.random.next() as u32 % 4);
            bytes = pieces.swap_remove(self.random.below(pieces.len()));
        }
        if self.random.one_in(16) {
            bytes = testing::with_ttl(bytes, self.random.of(&[0, 1, 2]));
        }
        if self.random.one_in(16) {
            let class = self.random.next() as u8;
            bytes = testing::with_traffic_class(bytes, class);
        }
        if !self.random.one_in(3) {
            return (State::Whole, bytes);
        }
        for _ in 0..=self.random.below(4) {
            match self.random.below(6) {
                0 => bytes.truncate(self.random.below(bytes.len() + 1).max(1)),
                1 => bytes.extend_from_slice(&[0xaa; 5]),
                _ => {
                    // Mostly in the headers, where it matters.
                    let end = if self.random.one_in(4) { bytes.len() } else { bytes.len().min(60) };
                    let (byte, bit) = (self.random.below(end), self.random.below(8));
                    bytes[byte] ^= 1 << bit;
                }
            }
        }
        (State::Damaged, bytes)
    }

    fn ingress(&mut self, bytes: &[u8]) -> Ingress {
        let anywhere = [Ingress::Pods, Ingress::Pod(own_tun::FIRST), Ingress::Host, Ingress::Socket, PEER, ELSEWHERE, CONGESTED, HANDED_ON];
        if self.random.one_in(4) {
            return self.random.of(&anywhere);
        }
        // Mostly where its source sits, so that it gets beyond the door.
        let mut copy = bytes.to_vec();
        let Ok(parsed) = parse(&testing::packet(&mut copy, Ingress::Pods)) else { return self.random.of(&anywhere) };
        let source = parsed.tuple.src.to_string();
        match source {
            _ if matches!(&*source, "10.32.1.10" | "fd00:32:1::10") && self.own_tun => Ingress::Pod(own_tun::FIRST),
            _ if source.starts_with("10.32.1.") || source.starts_with("fd00:32:1:") => Ingress::Pods,
            _ if source.starts_with("10.32.2.") || source.starts_with("fd00:32:2:") => PEER,
            _ if self.random.one_in(3) => HANDED_ON,
            _ => Ingress::Host,
        }
    }
}

/// What must hold of a packet that goes somewhere, by the addresses it goes with.
fn check_way(world: &World, ingress: Ingress, to: Egress, bytes: &[u8], what: &str) {
    let mut copy = bytes.to_vec();
    // An error about a packet of less than eight bytes quotes less than `parse` asks of an error; all else that leaves has passed it.
    let Ok(parsed) = parse(&testing::packet(&mut copy, Ingress::Pods)) else { return };
    let Tuple { src, dst, dst_port, protocol, .. } = parsed.tuple;
    let snapshot = &world.snapshot;
    let node = &snapshot.node;
    match to {
        Egress::Pods => assert!(snapshot.pods.get(dst).is_some_and(|pod| pod.tun.is_none()), "{what}: to a pod that is not there: {dst}"),
        Egress::Pod(tun) => assert!(snapshot.pods.get(dst).is_some_and(|pod| pod.tun == Some(tun)), "{what}: to another pod's TUN: {dst}"),
        Egress::Peer(_, Network::DirectReturn) => {
            assert!(node.direct_return.is_some() && matches!(ingress, Ingress::Host | Ingress::Socket), "{what}: handed on");
            assert!(node.owns(dst) || snapshot.is_vip(dst), "{what}: {dst} is handed on and no address of a service");
            assert!(!within(&node.cluster_pod_cidrs, src) && !node.owns(src) && !snapshot.is_vip(src), "{what}: {src} is handed on and inside");
        }
        Egress::Peer(peer, Network::Cluster) => {
            assert!(snapshot.peers[peer.0 as usize].prefixes.lookup(dst).is_some(), "{what}: to a peer that has not {dst}")
        }
        Egress::Host => {
            let comes_back = within(&node.cluster_pod_cidrs, dst) || within(&node.service_cidrs, dst);
            assert!(!comes_back, "{what}: {dst} is routed to `host`, so it would come back");
            assert!(!crate::wire::ip::Scope::of(dst).eq(&crate::wire::ip::Scope::Loopback), "{what}: to the node's loopback");
        }
    }
    let from_inside = matches!(ingress, Ingress::Pods | Ingress::Pod(_) | Ingress::Overlay(_));
    let to_a_node = node.owns(dst) || dst == addr("192.0.2.2");
    assert!(!(from_inside && to_a_node && protocol == protocol::UDP && dst_port == 4790), "{what}: to the overlay's port, from {src}");
}

/// Takes the stages one by one, whatever the packet, and says whether [`follow_known`] had a verdict for it.
fn step_by_step(world: &mut World, ingress: Ingress, bytes: &mut [u8]) -> (bool, Verdict) {
    world.outbox.clear();
    let env =
        Env { snapshot: &world.snapshot, flows: world.flows.table(), now: world.now, now_ns: world.now.0 * 1_000_000, counters: &world.counters };
    let mut copy = bytes.to_vec();
    let mut packet = testing::packet(bytes, ingress);
    let Ok(parsed) = parse(&packet).map_err(|reason| env.counters.dropped(reason, 1)) else { return (false, Verdict::Drop(DropReason::Truncated)) };
    let hash = env.flows.hash(&parsed.tuple);
    let likely = env.flows.likely(hash);
    let known = follow_known(&env, &mut testing::packet(&mut copy, ingress), &parsed, likely).is_some();
    let verdict = world.pipeline.judge(&env, &mut packet, &parsed, hash, &mut world.outbox).unwrap_or_else(|reason| {
        env.counters.dropped(reason, 1);
        Verdict::Drop(reason)
    });
    (known, verdict)
}

/// Says how many packets of known flows took the short way.
fn run(seed: u64, packets: usize) -> u32 {
    // Some with a pod that has a TUN of its own, some with direct return.
    let own_tun = seed % 2 == 1;
    let new = || {
        let mut world = if own_tun { own_tun::world(&[("10", own_tun::FIRST)]) } else { World::new() };
        if seed % 4 >= 2 {
            world.return_directly();
        }
        world
    };
    // In the second no packet of a known flow takes the short way.
    let (mut world, mut twin) = (new(), new());
    let mut known = 0;
    let mut traffic = Traffic { random: Random(seed), own_tun, left: Vec::new(), came: Vec::new() };
    let mut delivered = 0;
    for n in 0..packets {
        let (state, mut bytes) = traffic.arriving();
        let ingress = traffic.ingress(&bytes);
        let what = format!("seed {seed}, packet {n}, from {ingress:?}: {bytes:02x?}");
        world.now.0 += traffic.random.of(&[0, 0, 1, 100, 3000]);
        let mut same = bytes.clone();
        let came = parse(&testing::packet(&mut bytes.clone(), ingress)).ok().map(|parsed| parsed.tuple);
        let before: u64 = DropReason::ALL.iter().map(|reason| world.counters.drops(*reason)).sum();
        let mut verdicts = Vec::new();
        world.outbox.clear();
        let env =
            Env { snapshot: &world.snapshot, flows: world.flows.table(), now: world.now, now_ns: world.now.0 * 1_000_000, counters: &world.counters };
        world.pipeline.run::<Touch>(&env, &mut [testing::packet(&mut bytes, ingress)], &mut verdicts, &mut world.outbox);
        assert_eq!(verdicts.len(), 1, "{what}");
        twin.now = world.now;
        let (short, verdict) = step_by_step(&mut twin, ingress, &mut same);
        known += u32::from(short);
        let refused = matches!((verdicts[0], verdict), (Verdict::Drop(_), Verdict::Drop(_)));
        assert!(refused || (verdicts[0], &bytes) == (verdict, &same), "{what}: {:?}, step by step {verdict:?} {same:02x?}", verdicts[0]);
        assert!(world.answers() == twin.answers() && world.drops() == twin.drops(), "{what}: {:?}, step by step {:?}", world.drops(), twin.drops());
        if n % 16 == 0 {
            let views = [&world, &twin].map(|world| world.flows.table().views(world.now).collect::<Vec<_>>());
            assert_eq!(views[0], views[1], "{what}");
            for World { snapshot, flows, counters, pipeline, now, .. } in [&mut world, &mut twin] {
                pipeline.tick(&Env { snapshot, flows: flows.table(), now: *now, now_ns: now.0 * 1_000_000, counters });
            }
        }
        let dropped = DropReason::ALL.iter().map(|reason| world.counters.drops(*reason)).sum::<u64>() - before;
        assert!(dropped >= u64::from(matches!(verdicts[0], Verdict::Drop(_))), "{what}: a drop is counted");
        let to = match verdicts[0] {
            Verdict::ToPods => Some(Egress::Pods),
            Verdict::ToPod(tun) => Some(Egress::Pod(tun)),
            Verdict::ToHost => Some(Egress::Host),
            Verdict::ToPeer(peer, network) => Some(Egress::Peer(peer, network)),
            _ => None,
        };
        if let Some(to) = to {
            delivered += 1;
            if state == State::Whole {
                testing::check(&bytes).unwrap_or_else(|e| panic!("{what}: {e}"));
                if traffic.left.len() == 64 {
                    traffic.left.clear();
                    traffic.came.clear();
                }
                let mut copy = bytes.clone();
                if parse(&testing::packet(&mut copy, ingress)).is_ok_and(|parsed| parsed.transport_kind != Transport::Tail) {
                    traffic.left.push(bytes.clone());
                    traffic.came.extend(came.filter(|tuple| matches!(tuple.protocol, protocol::TCP | protocol::UDP) && *tuple != tuple_of(&bytes)));
                }
            }
            let len = parse(&testing::packet(&mut bytes.clone(), Ingress::Pods)).map_or(bytes.len(), |parsed| parsed.len as usize);
            check_way(&world, ingress, to, &bytes[..len], &what);
        }
        for (to, sent) in world.outbox.iter() {
            if state == State::Whole {
                testing::check(sent).unwrap_or_else(|e| panic!("{what}: said {sent:02x?}: {e}"));
            }
            // What was held came from the side of its head; an answer goes back to the sender.
            check_way(&world, Ingress::Host, to, sent, &what);
        }
    }
    assert!(delivered > packets / 20, "seed {seed}: only {delivered} of {packets} got anywhere: {:?}", world.drops());
    known
}

/// `PODGATE_SEEDS=from-to` runs others, for hours if need be.
#[test]
fn whatever_comes_in_what_leaves_is_whole_and_goes_where_it_may() {
    let seeds = std::env::var("PODGATE_SEEDS").unwrap_or_else(|_| "0-16".into());
    let (from, to) = seeds.split_once('-').expect("PODGATE_SEEDS is from-to");
    let seeds = from.parse::<u64>().unwrap()..to.parse().unwrap();
    let known: Vec<u32> = seeds.map(|seed| run(seed, 2_000)).collect();
    assert!(known.iter().sum::<u32>() as usize > 20 * known.len(), "few packets of known flows: {known:?}");
}

/// What `trace` says of a first packet is what becomes of it.
#[test]
fn trace_says_what_happens() {
    let mut random = Random(77);
    let mut verdicts = std::collections::HashSet::new();
    for _ in 0..3_000 {
        let pool = if random.one_in(3) { V6 } else { V4 };
        let (src, dst) = (random.of(pool), random.of(pool));
        let at = |ip: &str, port: u16| std::net::SocketAddr::new(ip.parse().unwrap(), port).to_string();
        let (from, to) = (random.of(PORTS), random.of(PORTS));
        let bytes = match random.below(4) {
            0 => opener(protocol::TCP, &at(src, from), &at(dst, to)),
            1 => opener(protocol::UDP, &at(src, from), &at(dst, to)),
            2 => testing::echo_request(src, dst, from, 1, b"ping"),
            _ => testing::ip(src, dst, 47, &[0; 8]),
        };
        let mut copy = bytes.clone();
        // What `parse` refuses has no tuple to trace.
        let Ok(parsed) = parse(&testing::packet(&mut copy, Ingress::Pods)) else { continue };
        let mut world = World::new();
        let steps = crate::trace::trace(&world.snapshot, &world.flows.table(), parsed.tuple, world.now);
        let said = &steps.last().unwrap().detail;
        let ingress = if world.snapshot.pods.get(parsed.tuple.src).is_some() {
            Ingress::Pods
        } else if world.snapshot.routes.lookup(parsed.tuple.src).is_some() {
            PEER
        } else {
            Ingress::Host
        };
        let (verdict, left) = world.send(ingress, bytes);
        let expected = match verdict {
            Verdict::ToNetstack => "answered by the gateway's own network stack".to_owned(),
            Verdict::Drop(reason) => format!("dropped as {}", reason.name()),
            _ if parsed.transport_kind == Transport::EchoRequest
                && parsed.tuple.src != parsed.tuple.dst
                && tuple_of(&left).src == parsed.tuple.dst =>
            {
                "answered on the spot".to_owned()
            }
            Verdict::ToPods => "written to the TUN of the pods".to_owned(),
            Verdict::ToHost => "written to the TUN of the host".to_owned(),
            Verdict::ToPeer(..) => "encapsulated and sent".to_owned(),
            other => panic!("{other:?}"),
        };
        assert!(said.starts_with(&expected), "{:?} from {ingress:?}: {verdict:?}, but trace says {said}", parsed.tuple);
        verdicts.insert(expected);
    }
    assert!(verdicts.len() > 12, "{verdicts:?}");
}
