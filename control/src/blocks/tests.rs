//! The rules on their own, and a store with nodes that join, leave, crash, lose sight and come back, in every order that chance finds.

use proptest::prelude::*;

use super::*;

fn cut(range: &str) -> Cut {
    Cut::of(range.parse().unwrap())
}

fn register(names: &[&str]) -> Register {
    names.iter().zip(1..).map(|(name, term)| (name.to_string(), Registration { machine: format!("m-{name}"), term })).collect()
}

fn record(name: &str, term: i64) -> Record {
    Record { node: name.into(), machine: format!("m-{name}"), term }
}

fn claim(record: Record, revision: i64) -> Claim {
    Claim { record, created: revision, modified: revision }
}

#[test]
fn ranges_are_cut_into_blocks_of_the_usual_size_where_there_are_enough_of_them() {
    for (range, first, last, blocks) in [
        ("10.32.0.0/12", "10.32.0.0/24", "10.47.255.0/24", 4096),
        ("10.244.0.0/16", "10.244.0.0/24", "10.244.255.0/24", 256),
        ("10.244.0.0/20", "10.244.0.0/26", "10.244.15.192/26", 64),
        ("10.244.0.0/24", "10.244.0.0/28", "10.244.0.240/28", 16),
        ("10.244.0.0/28", "10.244.0.0/28", "10.244.0.0/28", 1),
        ("0.0.0.0/0", "0.0.0.0/20", "255.255.240.0/20", 1 << 20),
        ("fd00:77::/48", "fd00:77::/64", "fd00:77:0:ffff::/64", 1 << 16),
        ("fd00:77::/64", "fd00:77::/72", "fd00:77:0:0:ff00::/72", 256),
        ("fd00:77::/32", "fd00:77::/52", "fd00:77:ffff:f000::/52", 1 << 20),
    ] {
        let cut = cut(range);
        assert_eq!((cut.block(0).to_string(), cut.block(cut.blocks() - 1).to_string(), cut.blocks()), (first.into(), last.into(), blocks), "{range}");
        for index in [0, cut.blocks() / 2, cut.blocks() - 1] {
            assert_eq!(cut.index(cut.block(index)), Some(index), "{range}");
        }
    }
    assert_eq!(cut("10.32.0.0/12").index("10.48.0.0/24".parse().unwrap()), None);
    assert_eq!(cut("10.32.0.0/12").index("10.32.0.0/25".parse().unwrap()), None);
    assert_eq!(cut("10.32.0.0/12").index("fd00::/64".parse().unwrap()), None);
}

#[test]
fn nodes_begin_at_equal_distances_and_then_take_from_the_end_of_what_is_left_to_others() {
    let cut = cut("10.244.0.0/16");
    let nodes = register(&["a", "b", "c"]);
    let mut ledger = Ledger::new();
    let mut take = |name: &str| {
        let index = choose(cut, &ledger, name, &nodes).unwrap();
        ledger.insert(cut.block(index), claim(record(name, 1), 1));
        index
    };
    assert_eq!([take("a"), take("b"), take("c")], [0, 85, 170]);
    assert_eq!([take("b"), take("a")], [86, 1]);
    // The rest of a's share, then the end of the richest, which is c's.
    for expected in 2..85 {
        assert_eq!(take("a"), expected);
    }
    assert_eq!([take("a"), take("a")], [255, 254]);
    assert_eq!(take("c"), 171);
}

#[test]
fn a_range_with_fewer_blocks_than_nodes_serves_as_many_as_it_can() {
    let cut = cut("10.244.0.0/28");
    let nodes = register(&["a", "b"]);
    let mut ledger = Ledger::new();
    assert_eq!(choose(cut, &ledger, "a", &nodes), Some(0));
    ledger.insert(cut.block(0), claim(record("a", 1), 1));
    assert_eq!(choose(cut, &ledger, "b", &nodes), None);
}

#[test]
fn the_oldest_block_of_a_node_stays_the_first() {
    let [low, high]: [IpNetwork; 2] = ["10.244.0.0/24".parse().unwrap(), "10.244.9.0/24".parse().unwrap()];
    let ledger: Ledger = [(low, claim(record("a", 5), 9)), (high, claim(record("a", 5), 7))].into();
    assert_eq!(held(&ledger, "a", "m-a"), [high, low]);
    assert!(held(&ledger, "a", "another machine").is_empty());
}

/// What may happen.
#[derive(Clone, Debug)]
enum Act {
    /// Time passes, in seconds.
    Wait(u8),
    /// A node reads the whole store.
    Look(usize),
    /// A node takes the next step that seems right by what it last read.
    Step(usize),
    /// A node renews its lease.
    Renew(usize),
    /// A node registers, if it is not registered as far as it knows.
    Join(usize),
    /// A node needs more addresses, or no more.
    Demand(usize, bool),
    /// A node is cut off from the store, or no longer.
    Partition(usize, bool),
    /// A node's process dies and starts again: it knows only the disk.
    Crash(usize),
    /// A node is set up anew: another machine under the name.
    Reinstall(usize),
    /// A node ends for good.
    Leave(usize),
}

const NODES: usize = 4;
const TIMES: Times = Times { lease: Duration::from_secs(15), grace: Duration::from_secs(60) };

fn act() -> impl Strategy<Value = Act> {
    let node = 0..NODES;
    prop_oneof![
        4 => (1..40u8).prop_map(Act::Wait),
        6 => node.clone().prop_map(Act::Look),
        8 => node.clone().prop_map(Act::Step),
        6 => node.clone().prop_map(Act::Renew),
        4 => node.clone().prop_map(Act::Join),
        1 => (node.clone(), any::<bool>()).prop_map(|(node, on)| Act::Demand(node, on)),
        2 => (node.clone(), any::<bool>()).prop_map(|(node, on)| Act::Partition(node, on)),
        1 => node.clone().prop_map(Act::Crash),
        1 => node.clone().prop_map(Act::Reinstall),
        1 => node.prop_map(Act::Leave),
    ]
}

/// The store, as etcd keeps it: a revision for each write, and leases that take their keys with them.
#[derive(Clone, Debug, Default)]
struct Server {
    revision: i64,
    ledger: Ledger,
    register: Register,
    /// When the lease of each registration ends.
    leases: BTreeMap<String, Duration>,
}

impl Server {
    fn expire(&mut self, now: Duration) {
        let over: Vec<String> = self.leases.iter().filter(|(_, end)| **end <= now).map(|(node, _)| node.clone()).collect();
        for node in over {
            self.leases.remove(&node);
            self.register.remove(&node);
            self.revision += 1;
        }
    }

    /// A transaction, with the conditions under which the source puts it to etcd.
    fn commit(&mut self, me: &Record, step: &Step) {
        if self.register.get(&me.node).is_none_or(|registration| registration.term != me.term) {
            return;
        }
        let revision = self.revision + 1;
        match step {
            Step::Claim { block } if !self.ledger.contains_key(block) => {
                self.ledger.insert(*block, claim(me.clone(), revision));
            }
            Step::Renew { block, modified } if self.ledger.get(block).is_some_and(|claim| claim.modified == *modified) => {
                let created = self.ledger[block].created;
                self.ledger.insert(*block, Claim { record: me.clone(), created, modified: revision });
            }
            Step::TakeBack { block, modified } if self.ledger.get(block).is_some_and(|claim| claim.modified == *modified) => {
                self.ledger.remove(block);
            }
            _ => return,
        }
        self.revision = revision;
    }
}

/// A node: what it remembers, what it last read, and a clock that runs by so many per mille too fast or too slow.
#[derive(Clone, Debug)]
struct Machine {
    name: String,
    installed: u32,
    drift: i32,
    running: bool,
    partitioned: bool,
    short: bool,
    term: Option<i64>,
    /// By its own clock, when it last asked for a renewal that was granted.
    renewed: Duration,
    ledger: Ledger,
    register: Register,
    endings: Endings,
    /// The source's: blocks it says may be given out, and until when by its own clock.
    tenure: (Vec<IpNetwork>, Duration),
}

impl Machine {
    fn new(at: usize) -> Machine {
        Machine {
            name: format!("node-{at}"),
            installed: 0,
            drift: [0, 100, -100, 50][at % 4],
            running: true,
            partitioned: false,
            short: false,
            term: None,
            renewed: Duration::ZERO,
            ledger: Ledger::new(),
            register: Register::new(),
            endings: Endings::default(),
            tenure: (Vec::new(), Duration::ZERO),
        }
    }

    fn clock(&self, now: Duration) -> Duration {
        now.mul_f64(f64::from(1000 + self.drift) / 1000.0)
    }

    fn me(&self) -> Option<Record> {
        Some(Record { node: self.name.clone(), machine: format!("{}-{}", self.name, self.installed), term: self.term? })
    }

    fn machine(&self) -> String {
        format!("{}-{}", self.name, self.installed)
    }

    /// As the source does it whenever anything changed.
    fn note(&mut self, now: Duration) {
        let own = self.clock(now);
        self.endings.note(&self.ledger, &self.register, own);
        if let Some(me) = self.me() {
            self.tenure = (proven(&self.ledger, &self.register, &me), self.renewed + TIMES.tenure());
        }
    }

    /// What it would give out addresses of.
    fn gives_out(&self, now: Duration) -> &[IpNetwork] {
        if self.running && self.clock(now) < self.tenure.1 { &self.tenure.0 } else { &[] }
    }
}

struct World {
    now: Duration,
    server: Server,
    nodes: Vec<Machine>,
    cuts: Vec<Cut>,
}

impl World {
    fn new(range: &str) -> World {
        World { now: Duration::from_secs(1), server: Server::default(), nodes: (0..NODES).map(Machine::new).collect(), cuts: vec![cut(range)] }
    }

    fn act(&mut self, act: &Act) {
        let World { now, server, nodes, cuts } = self;
        match *act {
            Act::Wait(seconds) => {
                *now += Duration::from_secs(seconds.into());
                server.expire(*now);
            }
            Act::Look(at) if nodes[at].running && !nodes[at].partitioned => {
                let node = &mut nodes[at];
                (node.ledger, node.register) = (server.ledger.clone(), server.register.clone());
                // Its keeper, or the watch, says that the registration is over.
                if node.term.is_some() && node.register.get(&node.name).map(|r| r.term) != node.term {
                    node.term = None;
                }
                node.note(*now);
            }
            Act::Step(at) if nodes[at].running && !nodes[at].partitioned => {
                let node = &nodes[at];
                let Some(me) = node.me() else { return };
                let view = View {
                    cuts,
                    ledger: &node.ledger,
                    register: &node.register,
                    endings: &node.endings,
                    me: &me,
                    short: [node.short; 2],
                    now: node.clock(*now),
                    times: TIMES,
                };
                if let Some(step) = next_step(&view) {
                    server.commit(&me, &step);
                }
            }
            Act::Renew(at) if nodes[at].running && !nodes[at].partitioned => {
                let node = &mut nodes[at];
                if node.term.is_some() && server.register.get(&node.name).map(|r| r.term) == node.term {
                    server.leases.insert(node.name.clone(), *now + TIMES.lease);
                    node.renewed = node.clock(*now);
                    node.note(*now);
                }
            }
            Act::Join(at) if nodes[at].running && !nodes[at].partitioned && nodes[at].term.is_none() => {
                let node = &mut nodes[at];
                let term = match server.register.get(&node.name) {
                    Some(found) if found.machine == node.machine() => found.term,
                    Some(_) => return,
                    None => {
                        server.revision += 1;
                        server.revision
                    }
                };
                server.register.insert(node.name.clone(), Registration { machine: node.machine(), term });
                server.leases.insert(node.name.clone(), *now + TIMES.lease);
                (node.term, node.renewed) = (Some(term), node.clock(*now));
                node.note(*now);
            }
            Act::Demand(at, short) => nodes[at].short = short,
            Act::Partition(at, cut_off) => nodes[at].partitioned = cut_off,
            Act::Crash(at) => {
                let node = &nodes[at];
                // What it read is on its disk.
                let kept = (node.ledger.clone(), node.register.clone());
                nodes[at] = Machine { installed: node.installed, partitioned: node.partitioned, short: node.short, ..Machine::new(at) };
                (nodes[at].ledger, nodes[at].register) = kept;
            }
            Act::Reinstall(at) => {
                let installed = nodes[at].installed + 1;
                nodes[at] = Machine { installed, partitioned: nodes[at].partitioned, ..Machine::new(at) };
            }
            Act::Leave(at) => nodes[at].running = false,
            _ => {}
        }
    }

    /// No block is given out by two, nor by one while the ledger has it as another's.
    fn check(&self) -> Result<(), String> {
        let mut givers: BTreeMap<IpNetwork, &str> = BTreeMap::new();
        for node in &self.nodes {
            for block in node.gives_out(self.now) {
                if let Some(other) = givers.insert(*block, &node.name) {
                    return Err(format!("{block} is given out by {other} and {}", node.name));
                }
                match self.server.ledger.get(block) {
                    Some(claim) if claim.record.node == node.name && claim.record.machine == node.machine() => {}
                    other => return Err(format!("{block} is given out by {} and the ledger has {other:?}", node.name)),
                }
            }
        }
        Ok(())
    }

    /// Everybody is there and sees everything, for as long as it takes.
    fn settle(&mut self) {
        for at in 0..NODES {
            self.act(&Act::Partition(at, false));
            self.nodes[at].running = true;
        }
        for _ in 0..100 {
            for at in 0..NODES {
                [Act::Look(at), Act::Join(at), Act::Look(at), Act::Renew(at), Act::Step(at), Act::Look(at)].iter().for_each(|act| self.act(act));
            }
            self.act(&Act::Wait(5));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]

    #[test]
    fn no_block_is_ever_given_out_by_two_nodes(acts in prop::collection::vec(act(), 1..250)) {
        // Few blocks, so that every one is fought for.
        let mut world = World::new("10.244.0.0/25");
        for (at, act) in acts.iter().enumerate() {
            world.act(act);
            if let Err(what) = world.check() {
                prop_assert!(false, "after {at} {act:?}: {what}");
            }
        }
    }

}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn when_all_is_quiet_every_node_has_a_block_that_it_can_prove_and_nobody_gone_has_one(acts in prop::collection::vec(act(), 1..120)) {
        let mut world = World::new("10.244.0.0/24");
        acts.iter().for_each(|act| world.act(act));
        world.nodes.iter_mut().for_each(|node| node.short = false);
        world.settle();
        prop_assert_eq!(world.check(), Ok(()));
        for node in &world.nodes {
            prop_assert!(!node.gives_out(world.now).is_empty(), "{} has none: {:?}", node.name, world.server);
        }
        let there: BTreeSet<String> = world.nodes.iter().map(Machine::machine).collect();
        for claim in world.server.ledger.values() {
            prop_assert!(there.contains(&claim.record.machine), "{:?}", claim);
            prop_assert!(!is_over(&claim.record, &world.server.register), "{:?}", claim);
        }
    }
}

#[test]
fn a_node_in_want_takes_back_what_a_node_that_is_gone_left_but_not_before_its_time() {
    let mut world = World::new("10.244.0.0/28");
    let step = |world: &mut World, at: usize| [Act::Look(at), Act::Step(at), Act::Look(at)].iter().for_each(|act| world.act(act));
    for at in [0, 1] {
        world.act(&Act::Join(at));
        step(&mut world, at);
    }
    assert_eq!(world.nodes[0].gives_out(world.now).len(), 1);
    assert!(world.nodes[1].gives_out(world.now).is_empty(), "there is one block");
    world.act(&Act::Partition(0, true));
    let mut waited = 0;
    while world.nodes[1].gives_out(world.now).is_empty() {
        world.act(&Act::Wait(5));
        waited += 5;
        world.act(&Act::Renew(1));
        step(&mut world, 1);
        step(&mut world, 1);
        assert_eq!(world.check(), Ok(()));
        assert!(waited < 200);
    }
    assert!((TIMES.lease + TIMES.grace).as_secs() <= waited + 5, "{waited} s");
    // It comes back, and finds that it has none.
    world.act(&Act::Partition(0, false));
    [Act::Look(0), Act::Join(0), Act::Look(0)].iter().for_each(|act| world.act(act));
    step(&mut world, 0);
    assert!(world.nodes[0].gives_out(world.now).is_empty());
}
