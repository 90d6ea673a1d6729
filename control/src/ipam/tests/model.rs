//! The allocator against a slow and obvious model of it, in random sequences with restarts, reboots and crashes in the middle of a record.

use proptest::prelude::*;

use super::*;

const RANGES: [&str; 2] = ["10.244.1.0/28", "fd00:77:1::/124"];

fn settings() -> IpamSettings {
    IpamSettings {
        exclude: cidrs(&["10.244.1.4/31"]),
        reserve: BTreeMap::from([("default/pod-0".into(), ips(&["10.244.1.6", "fd00:77:1::6"])), ("default/pod-1".into(), ips(&["10.244.1.9"]))]),
        pools: BTreeMap::from([("blue".into(), cidrs(&["10.244.1.8/30", "fd00:77:1::8/126"]))]),
        cooldown_s: 60,
    }
}

/// Twelve sandboxes of five pods, and two of nobody.
fn owner(n: usize) -> Owner {
    let (namespace, name) = if n < 10 { ("default".into(), format!("pod-{}", n % 5)) } else { (String::new(), "-".into()) };
    Owner { namespace, name, netns: format!("sandbox-{n:02}"), ifname: "eth0".into() }
}

fn ip(v4: bool, host: u8) -> IpAddr {
    if v4 { format!("10.244.1.{host}").parse().unwrap() } else { format!("fd00:77:1::{host:x}").parse().unwrap() }
}

/// The pool of an address by its last octet: none if it is nobody's to give.
fn pool_of(v4: bool, host: u8) -> Option<&'static str> {
    match host {
        0..=2 | 15 => None,
        4 | 5 if v4 => None,
        8..=11 => Some("blue"),
        _ => Some(""),
    }
}

fn reserved(v4: bool, host: u8) -> Option<&'static str> {
    match (host, v4) {
        (6, _) => Some("default/pod-0"),
        (9, true) => Some("default/pod-1"),
        _ => None,
    }
}

#[derive(Clone, Debug, Default)]
struct Model {
    now: u64,
    leases: BTreeMap<usize, (Vec<IpAddr>, Option<String>)>,
    /// In the order of their release: the address, whose it was, when.
    released: Vec<(IpAddr, Option<String>, u64)>,
}

impl Model {
    fn holder(&self, address: IpAddr) -> Option<usize> {
        self.leases.iter().find(|(_, (addresses, _))| addresses.contains(&address)).map(|(n, _)| *n)
    }

    fn name(n: usize) -> Option<String> {
        (n < 10).then(|| owner(n).pod_name())
    }

    /// What is to be given, or the kind of refusal.
    fn choose(&self, n: usize, pool: &str) -> Result<Vec<IpAddr>, &'static str> {
        let mut chosen = Vec::new();
        for v4 in [true, false] {
            let kept: Vec<u8> =
                (0..16).filter(|h| reserved(v4, *h).map(Into::into) == Self::name(n) && (pool.is_empty() || pool_of(v4, *h) == Some(pool))).collect();
            if let Some(host) = kept.iter().filter(|_| n < 10).find(|h| self.holder(ip(v4, **h)).is_none()) {
                chosen.push(ip(v4, *host));
                continue;
            }
            if !kept.is_empty() && n < 10 {
                return Err("taken");
            }
            let free: Vec<IpAddr> = (0..16)
                .filter(|h| pool_of(v4, *h) == Some(pool) && reserved(v4, *h).is_none())
                .map(|h| ip(v4, h))
                .filter(|a| self.holder(*a).is_none())
                .collect();
            let had = self.released.iter().rev().find(|(a, who, _)| free.contains(a) && who.is_some() && *who == Self::name(n)).map(|(a, ..)| *a);
            let fresh = free.iter().find(|a| !self.released.iter().any(|(b, ..)| b == *a)).copied();
            let oldest = self.released.iter().find(|(a, ..)| free.contains(a)).map(|(a, ..)| *a);
            chosen.push(had.or(fresh).or(oldest).ok_or("exhausted")?);
        }
        Ok(chosen)
    }

    fn admit(&self, n: usize, pool: &str, v4: bool, host: u8) -> Result<Vec<IpAddr>, &'static str> {
        let address = ip(v4, host);
        let Some(lies_in) = pool_of(v4, host) else { return Err(if matches!(host, 4 | 5) { "excluded" } else { "kept back" }) };
        match reserved(v4, host) {
            Some(pod) if Self::name(n).as_deref() != Some(pod) => return Err("reserved"),
            Some(_) if pool.is_empty() => {}
            _ if lies_in != pool => return Err(if pool.is_empty() { "in pool" } else { "outside pool" }),
            _ => {}
        }
        if self.holder(address).is_some() {
            return Err("taken");
        }
        match self.released.iter().find(|(a, ..)| *a == address) {
            Some((_, who, at)) if (who.is_none() || *who != Self::name(n)) && self.now < at + 60 => Err("cooling"),
            _ => Ok(vec![address]),
        }
    }

    fn claimable(&self, n: usize, v4: bool, host: u8) -> Result<Vec<IpAddr>, &'static str> {
        if pool_of(v4, host).is_none() && !(v4 && matches!(host, 4 | 5)) {
            return Err("kept back");
        }
        if reserved(v4, host).is_some_and(|pod| Self::name(n).as_deref() != Some(pod)) {
            return Err("reserved");
        }
        if self.holder(ip(v4, host)).is_some() { Err("taken") } else { Ok(vec![ip(v4, host)]) }
    }

    fn give(&mut self, n: usize, addresses: &[IpAddr], plugin: Option<&str>) {
        self.released.retain(|(a, ..)| !addresses.contains(a));
        self.leases.insert(n, (addresses.to_vec(), plugin.map(Into::into)));
    }

    fn release(&mut self, n: usize) {
        if let Some((addresses, plugin)) = self.leases.remove(&n) {
            let who = Self::name(n).filter(|_| plugin.is_none());
            self.released.extend(addresses.into_iter().map(|a| (a, who.clone(), self.now)));
        }
    }
}

fn kind(error: &IpamError) -> &'static str {
    match error {
        IpamError::Exhausted { .. } => "exhausted",
        IpamError::Taken { .. } => "taken",
        IpamError::Excluded { .. } => "excluded",
        IpamError::KeptBack { .. } => "kept back",
        IpamError::Reserved { .. } => "reserved",
        IpamError::InPool { .. } => "in pool",
        IpamError::OutsidePool { .. } => "outside pool",
        IpamError::Cooling { .. } => "cooling",
        IpamError::HasOthers { .. } => "has others",
        _ => "something else",
    }
}

#[derive(Clone, Debug)]
enum Step {
    Allocate { n: usize, blue: bool },
    Exactly { n: usize, blue: bool, v4: bool, host: u8 },
    Claim { n: usize, v4: bool, host: u8 },
    Release { n: usize },
    Wait { seconds: u64 },
    Compact,
    Reopen,
    Reboot,
}

fn step() -> impl Strategy<Value = Step> {
    let (n, host) = (|| 0..12usize, || 0..16u8);
    prop_oneof![
        6 => (n(), any::<bool>()).prop_map(|(n, blue)| Step::Allocate { n, blue }),
        3 => (n(), any::<bool>(), any::<bool>(), host()).prop_map(|(n, blue, v4, host)| Step::Exactly { n, blue, v4, host }),
        2 => (n(), any::<bool>(), host()).prop_map(|(n, v4, host)| Step::Claim { n, v4, host }),
        6 => n().prop_map(|n| Step::Release { n }),
        2 => (0..90u64).prop_map(|seconds| Step::Wait { seconds }),
        1 => Just(Step::Compact),
        1 => Just(Step::Reopen),
        1 => Just(Step::Reboot),
    ]
}

/// All that the allocator knows, without the numbers of turns, which a restart counts anew.
fn digest(ipam: &Ipam) -> (Vec<Record>, Vec<(space::Intervals, Vec<Addr>)>) {
    let sides = ipam.space.pools().iter().flat_map(|pool| &pool.sides);
    (ipam.state.records(), sides.map(|side| (side.fresh.clone(), side.freed.values().copied().collect())).collect())
}

/// One step of both, and that they agree.
fn take(ipam: &mut Ipam, model: &mut Model, step: &Step) -> Result<(), TestCaseError> {
    let pool = |blue: bool| if blue { "blue" } else { "" };
    let (n, expected, got, plugin) = match *step {
        Step::Allocate { n, blue } => {
            let expected = model.leases.get(&n).map_or_else(|| model.choose(n, pool(blue)), |(addresses, _)| Ok(addresses.clone()));
            (n, expected, ipam.allocate(&owner(n), &Wish { pool: blue.then(|| "blue".into()), wanted: Vec::new() }), None)
        }
        Step::Exactly { n, blue, v4, host } => {
            let wanted = vec![ip(v4, host)];
            let expected = match model.leases.get(&n) {
                Some((addresses, _)) => {
                    if *addresses == wanted {
                        Ok(wanted.clone())
                    } else {
                        Err("has others")
                    }
                }
                None => model.admit(n, pool(blue), v4, host),
            };
            (n, expected, ipam.allocate(&owner(n), &Wish { pool: blue.then(|| "blue".into()), wanted }), None)
        }
        Step::Claim { n, v4, host } => {
            let given = vec![ip(v4, host)];
            let expected = match model.leases.get(&n) {
                Some((addresses, _)) => {
                    if *addresses == given {
                        Ok(given.clone())
                    } else {
                        Err("has others")
                    }
                }
                None => model.claimable(n, v4, host),
            };
            (n, expected, ipam.claim(&owner(n), &given, "host-local"), Some("host-local"))
        }
        Step::Release { n } => {
            let had = ipam.release(&owner(n)).unwrap().map(|lease| lease.addresses);
            prop_assert_eq!(had, model.leases.get(&n).map(|(addresses, _)| addresses.clone()));
            model.release(n);
            return Ok(());
        }
        _ => return Ok(()),
    };
    let got = got.map(|lease| lease.addresses).map_err(|error| kind(&error));
    prop_assert_eq!(&got, &expected, "{:?}", step);
    if let (Ok(addresses), false) = (got, model.leases.contains_key(&n)) {
        model.give(n, &addresses, plugin);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_it_does_what_the_model_does(steps in prop::collection::vec((step(), prop::option::weighted(0.15, any::<u16>())), 1..120)) {
        let (dir, clock) = (scratch(), Hand::at(NOON));
        let path = dir.path().join("addresses.journal");
        let mut boot = 1;
        let open = |boot: i32| Ipam::open(dir.path(), &cidrs(&RANGES), &settings(), &format!("boot-{boot}"), Box::new(clock.clone())).unwrap();
        let (mut ipam, mut model) = (open(boot).0, Model { now: NOON, ..Model::default() });
        for (step, crash) in steps {
            let (before, len) = (model.clone(), std::fs::metadata(&path).unwrap().len());
            match step {
                Step::Wait { seconds } => {
                    clock.advance(seconds);
                    model.now += seconds;
                }
                Step::Compact => ipam.compact().unwrap(),
                Step::Reopen => {
                    let known = digest(&ipam);
                    drop(ipam);
                    let (opened, messages) = open(boot);
                    ipam = opened;
                    prop_assert_eq!(messages, Vec::<String>::new());
                    prop_assert_eq!(digest(&ipam), known, "what is read is what was known");
                }
                Step::Reboot => {
                    drop(ipam);
                    boot += 1;
                    let (opened, messages) = open(boot);
                    ipam = opened;
                    prop_assert_eq!(messages.is_empty(), model.leases.is_empty());
                    let over: Vec<usize> = model.leases.keys().copied().collect();
                    over.into_iter().for_each(|n| model.release(n));
                }
                ref other => take(&mut ipam, &mut model, other)?,
            }
            let written = std::fs::metadata(&path).unwrap().len();
            if let (Some(at), true, false) = (crash, written > len, matches!(step, Step::Compact | Step::Reopen | Step::Reboot)) {
                // Killed while it wrote that record: after some of its bytes.
                drop(ipam);
                let cut = len + u64::from(at) % (written - len);
                std::fs::File::options().write(true).open(&path).unwrap().set_len(cut).unwrap();
                ipam = open(boot).0;
                if cut < written - 1 {
                    model = before;
                }
            }
            let leases: BTreeMap<usize, (Vec<IpAddr>, Option<String>)> = ipam
                .leases()
                .map(|lease| (lease.owner.netns["sandbox-".len()..].parse().unwrap(), (lease.addresses.clone(), lease.plugin.clone())))
                .collect();
            prop_assert_eq!(&leases, &model.leases);
            let all: Vec<IpAddr> = leases.values().flat_map(|(addresses, _)| addresses.clone()).collect();
            prop_assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), all.len(), "no address twice");
            let released: Vec<(IpAddr, u64)> = ipam.state.memory.iter().map(|(address, freed)| (address.ip(), freed.at)).collect();
            prop_assert_eq!(released, model.released.iter().map(|(address, _, at)| (*address, *at)).collect::<Vec<_>>());
        }
    }
}
