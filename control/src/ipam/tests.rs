//! Never twice, never lost: whom an address is given, and who is refused, and why.

mod checks;
mod journals;
mod model;

use std::cell::Cell;
use std::rc::Rc;

use super::*;

/// In memory where the machine has such a place: thousands of journals are opened here, each with its fsyncs.
fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// A clock that a test sets.
#[derive(Clone, Debug)]
struct Hand(Rc<Cell<u64>>);

impl Hand {
    fn at(seconds: u64) -> Hand {
        Hand(Rc::new(Cell::new(seconds)))
    }

    fn advance(&self, seconds: u64) {
        self.0.set(self.0.get() + seconds);
    }
}

impl Clock for Hand {
    fn unix_seconds(&self) -> u64 {
        self.0.get()
    }
}

const NOON: u64 = 1_700_000_000;

fn owner(n: usize) -> Owner {
    Owner { namespace: "default".into(), name: format!("pod-{n}"), netns: format!("sandbox-{n}"), ifname: "eth0".into() }
}

/// The same pod in another sandbox.
fn again(n: usize) -> Owner {
    Owner { netns: format!("sandbox-{n}-again"), ..owner(n) }
}

fn cidrs(list: &[&str]) -> Vec<IpNetwork> {
    list.iter().map(|c| c.parse().unwrap()).collect()
}

fn ips(list: &[&str]) -> Vec<IpAddr> {
    list.iter().map(|a| a.parse().unwrap()).collect()
}

fn open_with(dir: &Path, list: &[&str], settings: &IpamSettings, clock: &Hand) -> Ipam {
    Ipam::open(dir, &cidrs(list), settings, "boot-1", Box::new(clock.clone())).unwrap().0
}

fn open(dir: &Path, list: &[&str]) -> Ipam {
    open_with(dir, list, &IpamSettings::default(), &Hand::at(NOON))
}

fn address(lease: &Lease) -> String {
    error::list(&lease.addresses).replace(", ", " ")
}

impl Ipam {
    /// An address of any kind.
    fn any(&mut self, owner: &Owner) -> Result<Lease, IpamError> {
        self.allocate(owner, &Wish::default())
    }

    fn of_pool(&mut self, owner: &Owner, pool: &str) -> Result<Lease, IpamError> {
        self.allocate(owner, &Wish { pool: Some(pool.into()), ..Wish::default() })
    }

    fn exactly(&mut self, owner: &Owner, wanted: &[&str]) -> Result<Lease, IpamError> {
        self.allocate(owner, &Wish { wanted: ips(wanted), ..Wish::default() })
    }
}

fn settings() -> IpamSettings {
    IpamSettings {
        exclude: cidrs(&["10.244.1.0/29"]),
        reserve: BTreeMap::from([("default/pod-0".into(), ips(&["10.244.1.10", "fd00:77:1::10"]))]),
        pools: BTreeMap::from([("blue".into(), cidrs(&["10.244.1.16/30"])), ("far".into(), cidrs(&["10.244.9.0/24"]))]),
        cooldown_s: 60,
    }
}

#[test]
fn each_family_gives_one_and_the_reserved_ones_are_never_given() {
    let dir = scratch();
    let mut ipam = open(dir.path(), &["10.244.1.0/29", "fd00:77:1::/64"]);
    let given: Vec<String> = (0..4).map(|n| address(&ipam.any(&owner(n)).unwrap())).collect();
    // Of eight: network, gateway, probe and broadcast are kept back.
    assert_eq!(given, ["10.244.1.3 fd00:77:1::3", "10.244.1.4 fd00:77:1::4", "10.244.1.5 fd00:77:1::5", "10.244.1.6 fd00:77:1::6"]);
    let error = ipam.any(&owner(4)).unwrap_err();
    assert_eq!(error.code(), 11);
    assert_eq!(
        error.to_string(),
        "all 4 addresses of 10.244.1.0/29 are given out; see `podgate ipam`, and detach pods that are gone or give the node a larger range"
    );
    let view = ipam.list();
    assert_eq!((view.pools[0].capacity, view.pools[0].used, view.pools[1].used, view.leases.len()), (4, 4, 4, 4));
    assert_eq!(view.pools[0].gateway.unwrap().to_string(), "10.244.1.1");
    assert_eq!(probe_address("10.244.1.0/29".parse().unwrap()).unwrap().to_string(), "10.244.1.2");
}

#[test]
fn asking_again_gives_the_same_and_releasing_twice_is_no_error() {
    let dir = scratch();
    let clock = Hand::at(NOON);
    let mut ipam = open_with(dir.path(), &["10.244.1.0/24"], &IpamSettings::default(), &clock);
    let lease = ipam.any(&owner(1)).unwrap();
    assert_eq!((lease.since, lease.plugin.as_deref()), (NOON, None));
    clock.advance(5);
    assert_eq!(ipam.any(&owner(1)).unwrap(), lease);
    assert_eq!(ipam.exactly(&owner(1), &["10.244.1.3"]).unwrap(), lease);
    let error = ipam.exactly(&owner(1), &["10.244.1.4"]).unwrap_err();
    assert_eq!(
        (error.code(), error.to_string().as_str()),
        (7, "default/pod-1 (eth0, sandbox-1) has 10.244.1.3 already; detach it before it gets others")
    );
    assert_eq!(ipam.owner(lease.addresses[0]), Some(&owner(1)));
    assert_eq!(ipam.release(&owner(1)).unwrap(), Some(lease));
    assert_eq!(ipam.release(&owner(1)).unwrap(), None);
}

#[test]
fn sandbox_and_interface_tell_owners_apart_and_names_follow() {
    let dir = scratch();
    let mut ipam = open(dir.path(), &["10.244.1.0/24"]);
    let nameless = Owner { namespace: String::new(), name: "-".into(), ..owner(1) };
    let lease = ipam.any(&nameless).unwrap();
    assert_eq!(ipam.any(&owner(1)).unwrap(), Lease { owner: owner(1), ..lease.clone() });
    assert_eq!(ipam.any(&nameless).unwrap().owner, owner(1), "a name that is known is kept");
    let second = Owner { ifname: "net1".into(), ..owner(1) };
    assert_eq!(address(&ipam.any(&second).unwrap()), "10.244.1.4");
    drop(ipam);
    let mut ipam = open(dir.path(), &["10.244.1.0/24"]);
    assert_eq!(ipam.lease(&nameless).map(|lease| &lease.owner), Some(&owner(1)));
    assert_eq!(ipam.release(&nameless).unwrap().map(|lease| address(&lease)).as_deref(), Some("10.244.1.3"));
}

#[test]
fn a_freed_address_is_the_last_to_be_given_out_again_even_after_a_restart() {
    let dir = scratch();
    let mut ipam = open(dir.path(), &["10.244.1.0/29"]);
    let first = ipam.any(&owner(1)).unwrap();
    ipam.release(&owner(1)).unwrap();
    drop(ipam);
    let mut ipam = open(dir.path(), &["10.244.1.0/29"]);
    ipam.compact().unwrap();
    drop(ipam);
    let mut ipam = open(dir.path(), &["10.244.1.0/29"]);
    let next: Vec<String> = (2..6).map(|n| address(&ipam.any(&owner(n)).unwrap())).collect();
    assert_eq!(next, ["10.244.1.4", "10.244.1.5", "10.244.1.6", "10.244.1.3"]);
    assert_eq!(next[3], address(&first));
    // All have been used: now the order is that of their release.
    for n in [4, 2, 5] {
        ipam.release(&owner(n)).unwrap();
    }
    let next: Vec<String> = (6..9).map(|n| address(&ipam.any(&owner(n)).unwrap())).collect();
    assert_eq!(next, ["10.244.1.6", "10.244.1.4", "10.244.1.3"]);
}

#[test]
fn a_pod_that_comes_back_gets_what_it_had_unless_somebody_needs_it() {
    let dir = scratch();
    let mut ipam = open(dir.path(), &["10.244.1.0/29", "fd00:77:1::/64"]);
    let lease = ipam.any(&owner(1)).unwrap();
    // While its first sandbox has it, the second gets another; and that is what it gets when it comes back, being the latest.
    let second = ipam.any(&again(1)).unwrap();
    assert_eq!(address(&second), "10.244.1.4 fd00:77:1::4");
    ipam.release(&owner(1)).unwrap();
    ipam.release(&again(1)).unwrap();
    assert_eq!(ipam.any(&owner(1)).unwrap().addresses, second.addresses);
    assert_eq!(ipam.any(&again(1)).unwrap().addresses, lease.addresses);
    ipam.release(&owner(1)).unwrap();
    ipam.release(&again(1)).unwrap();
    // An interface of another name is another's.
    assert_eq!(address(&ipam.any(&Owner { ifname: "net1".into(), ..owner(1) }).unwrap()), "10.244.1.5 fd00:77:1::5");
    // Others take the rest, and then what it had, the one released first. Of IPv6 there is plenty: it gets its own.
    assert_eq!(address(&ipam.any(&owner(2)).unwrap()), "10.244.1.6 fd00:77:1::6");
    assert_eq!(address(&ipam.any(&owner(3)).unwrap()), "10.244.1.4 fd00:77:1::7");
    assert_eq!(address(&ipam.any(&owner(4)).unwrap()), "10.244.1.3 fd00:77:1::8");
    ipam.release(&owner(3)).unwrap();
    assert_eq!(address(&ipam.any(&owner(1)).unwrap()), "10.244.1.4 fd00:77:1::3");
}

#[test]
fn pools_exclusions_and_reservations_cut_the_range() {
    let dir = scratch();
    let mut ipam = open_with(dir.path(), &["10.244.1.0/27", "fd00:77:1::/64"], &settings(), &Hand::at(NOON));
    assert_eq!(address(&ipam.any(&owner(0)).unwrap()), "10.244.1.10 fd00:77:1::10", "what is reserved for it");
    assert_eq!(address(&ipam.any(&again(1)).unwrap()), "10.244.1.8 fd00:77:1::3", "behind what is excluded");
    assert_eq!(address(&ipam.any(&owner(2)).unwrap()), "10.244.1.9 fd00:77:1::4");
    assert_eq!(address(&ipam.any(&owner(3)).unwrap()), "10.244.1.11 fd00:77:1::5", "not what is reserved");
    let blue: Vec<String> = (4..8).map(|n| address(&ipam.of_pool(&owner(n), "blue").unwrap())).collect();
    assert_eq!(blue, ["10.244.1.16", "10.244.1.17", "10.244.1.18", "10.244.1.19"], "of the families that it has");
    let error = |result: Result<Lease, IpamError>| result.map_err(|e| (e.code(), e.to_string())).unwrap_err();
    assert_eq!(
        error(ipam.of_pool(&owner(8), "blue")),
        (
            11,
            "all 4 addresses of the pool `blue` (10.244.1.16/30) are given out; see `podgate ipam`, and detach pods that are gone or give the node a \
             larger range"
                .into()
        )
    );
    assert_eq!(error(ipam.of_pool(&owner(8), "green")), (7, "there is no pool `green`; podgate.yaml names blue, far (`ipam.pools`)".into()));
    assert_eq!(
        error(ipam.of_pool(&owner(8), "far")),
        (7, "no address of the pool `far` lies in this node's ranges 10.244.1.0/27, fd00:77:1::/64; see `ipam.pools` in podgate.yaml".into())
    );
    // The old sandbox of a pod with a reservation still has it: worth waiting for, not worth another address.
    assert_eq!(
        error(ipam.any(&again(0))),
        (11, "10.244.1.10 is in use by default/pod-0 (eth0, sandbox-0); detach that first, or choose another".into())
    );
    let second_interface = Owner { ifname: "net1".into(), ..owner(0) };
    assert_eq!(address(&ipam.any(&second_interface).unwrap()), "10.244.1.12 fd00:77:1::6");
    let pools: Vec<_> = ipam.list().pools.into_iter().map(|p| (p.pool, p.cidr.to_string(), p.capacity, p.used, p.excluded, p.reserved)).collect();
    let v6 = (1u128 << 64) - 4;
    assert_eq!(
        pools,
        [
            // 28 usable: .3 to .30; five of them (.3 to .7) excluded, four the pool's, one reserved.
            (None, "10.244.1.0/27".into(), 18, 5, 5, 1),
            (None, "fd00:77:1::/64".into(), v6 - 1, 5, 0, 1),
            (Some("blue".into()), "10.244.1.16/30".into(), 4, 4, 0, 0),
            (Some("far".into()), "10.244.9.0/24".into(), 0, 0, 0, 0),
        ]
    );
    assert_eq!(
        ipam.warnings(),
        ["ipam.pools.far 10.244.9.0/24 lies outside this node's ranges 10.244.1.0/27, fd00:77:1::/64 and has no effect here"]
    );
    // Other ranges: what lay outside lies inside, and the other way round. What is given out stays.
    ipam.set_ranges(&cidrs(&["10.244.9.0/24"])).unwrap();
    assert_eq!(address(&ipam.of_pool(&owner(8), "far").unwrap()), "10.244.9.3");
    assert_eq!(ipam.warnings().len(), 4, "{:?}", ipam.warnings());
    assert!(ipam.any(&owner(9)).unwrap_err().to_string().starts_with("all 0 addresses of 10.244.9.0/24"));
    assert_eq!(address(ipam.lease(&owner(0)).unwrap()), "10.244.1.10 fd00:77:1::10");
}

#[test]
fn a_wish_is_met_exactly_or_refused_by_name() {
    let dir = scratch();
    let clock = Hand::at(NOON);
    let mut ipam = open_with(dir.path(), &["10.244.1.0/27", "fd00:77:1::/64"], &settings(), &clock);
    assert_eq!(address(&ipam.exactly(&owner(1), &["10.244.1.20"]).unwrap()), "10.244.1.20", "that one alone, of one family");
    assert_eq!(address(&ipam.exactly(&owner(0), &["fd00:77:1::10"]).unwrap()), "fd00:77:1::10", "what is reserved for it");
    let blue = Wish { pool: Some("blue".into()), wanted: ips(&["10.244.1.17"]) };
    assert_eq!(address(&ipam.allocate(&owner(2), &blue).unwrap()), "10.244.1.17");
    ipam.exactly(&owner(4), &["10.244.1.21"]).unwrap();
    ipam.release(&owner(4)).unwrap();
    for (pool, wanted, code, said) in [
        (None, &["10.244.1.20"][..], 11, "10.244.1.20 is in use by default/pod-1 (eth0, sandbox-1); detach that first, or choose another"),
        (None, &["10.244.1.5"], 7, "10.244.1.5 is excluded (10.244.1.0/29 in `ipam.exclude` of podgate.yaml); choose another"),
        (None, &["10.244.1.10"], 7, "10.244.1.10 is reserved for default/pod-0 (`ipam.reserve` in podgate.yaml); choose another"),
        (None, &["10.244.1.0"], 7, "10.244.1.0 is the network's own address of 10.244.1.0/27, and no pod's; choose another"),
        (None, &["10.244.1.1"], 7, "10.244.1.1 is the gateway of 10.244.1.0/27, and no pod's; choose another"),
        (None, &["10.244.1.2"], 7, "10.244.1.2 is the self-test's address of 10.244.1.0/27, and no pod's; choose another"),
        (None, &["10.244.1.31"], 7, "10.244.1.31 is the last address of 10.244.1.0/27, and no pod's; choose another"),
        (None, &["192.0.2.1"], 7, "192.0.2.1 lies outside this node's ranges 10.244.1.0/27, fd00:77:1::/64; other nodes would not send to it"),
        (None, &["10.244.1.18"], 7, "10.244.1.18 belongs to the pool `blue`; ask for that pool by name, or choose an address outside it"),
        (Some("blue"), &["10.244.1.22"], 7, "10.244.1.22 does not belong to the pool `blue`; choose one that does, or ask for no pool"),
        (None, &["10.244.1.22", "10.244.1.23"], 7, "10.244.1.22 and 10.244.1.23 are of one family; an interface gets one of each"),
        (
            None,
            &["10.244.1.21"],
            11,
            "10.244.1.21 was default/pod-4 (eth0)'s until a moment ago, and is given to nobody else for another 60 s (`ipam.cooldown`); try again then",
        ),
    ] {
        let wish = Wish { pool: pool.map(Into::into), wanted: ips(wanted) };
        let error = ipam.allocate(&owner(3), &wish).unwrap_err();
        assert_eq!((error.code(), error.to_string().as_str()), (code, said), "{wanted:?}");
    }
    assert_eq!(ipam.lease(&owner(3)), None);
    // The pod itself need not wait; others must, to the second.
    assert!(ipam.exactly(&again(4), &["10.244.1.21"]).is_ok());
    ipam.release(&again(4)).unwrap();
    clock.advance(59);
    assert!(matches!(ipam.exactly(&owner(3), &["10.244.1.21"]), Err(IpamError::Cooling { seconds: 1, .. })));
    // A clock that is set back an hour does not make it an hour longer.
    clock.0.set(NOON - 3600);
    assert!(matches!(ipam.exactly(&owner(3), &["10.244.1.21"]), Err(IpamError::Cooling { seconds: 60, .. })));
    clock.advance(60);
    assert!(ipam.exactly(&owner(3), &["10.244.1.21"]).is_ok());
}

#[test]
fn a_cooling_address_is_given_out_rather_than_none() {
    let dir = scratch();
    let mut ipam = open(dir.path(), &["10.244.1.0/29"]);
    (0..4).for_each(|n| drop(ipam.any(&owner(n)).unwrap()));
    ipam.release(&owner(2)).unwrap();
    assert_eq!(address(&ipam.any(&owner(9)).unwrap()), "10.244.1.5");
}

#[test]
fn what_a_plugin_gave_is_kept_from_others_and_refused_where_it_cannot_be() {
    let dir = scratch();
    let mut ipam = open_with(dir.path(), &["10.244.1.0/27"], &settings(), &Hand::at(NOON));
    // An excluded part is how a plugin is given a part of the range for itself.
    let lease = ipam.claim(&owner(1), &ips(&["10.244.1.5"]), "host-local").unwrap();
    assert_eq!((address(&lease).as_str(), lease.plugin.as_deref(), lease.since), ("10.244.1.5", Some("host-local"), NOON));
    assert_eq!(ipam.claim(&owner(1), &ips(&["10.244.1.5"]), "host-local").unwrap(), lease);
    ipam.claim(&owner(2), &ips(&["10.244.1.8", "10.244.1.9"]), "static").unwrap();
    assert_eq!(address(&ipam.any(&owner(3)).unwrap()), "10.244.1.11");
    let mut said = |n: usize, addresses: &[&str]| {
        let error = ipam.claim(&owner(n), &ips(addresses), "host-local").unwrap_err();
        (error.code(), error.to_string())
    };
    assert_eq!(said(4, &["192.0.2.1"]).0, 7);
    assert_eq!(said(4, &["10.244.1.1"]).0, 7);
    assert_eq!(said(4, &["10.244.1.10"]).0, 7, "reserved for another");
    assert_eq!(
        said(4, &["10.244.1.12", "10.244.1.5"]),
        (11, "10.244.1.5 is in use by default/pod-1 (eth0, sandbox-1); detach that first, or choose another".into())
    );
    assert_eq!(said(1, &["10.244.1.12"]).0, 7, "it has others");
    assert_eq!(said(4, &[]), (7, "the IPAM plugin host-local gave no address; see its configuration (`ipam` in the network's)".into()));
    // The plugin chooses whom it gives an address again: that pod has no claim to it here.
    ipam.release(&owner(2)).unwrap();
    assert_eq!(address(&ipam.any(&owner(2)).unwrap()), "10.244.1.12");
    drop(ipam);
    let ipam = open_with(dir.path(), &["10.244.1.0/27"], &settings(), &Hand::at(NOON + 9));
    assert_eq!(ipam.lease(&owner(1)), Some(&lease));
}

#[test]
fn a_second_daemon_is_refused() {
    let dir = scratch();
    let _first = open(dir.path(), &["10.244.1.0/24"]);
    let error = Ipam::open(dir.path(), &[], &IpamSettings::default(), "boot-1", Box::new(SystemClock)).unwrap_err().to_string();
    assert!(error.ends_with("another process uses this journal of addresses; give each daemon on a machine a stateDir of its own"), "{error}");
}

#[test]
fn a_range_without_room_and_no_range_at_all_are_named() {
    let dir = scratch();
    let mut ipam = open(dir.path(), &[]);
    let error = ipam.set_ranges(&cidrs(&["10.244.1.0/30"])).unwrap_err().to_string();
    assert_eq!(error, "the pod range 10.244.1.0/30 is too small: four of its addresses are kept back; give the node at least a /29");
    for error in [ipam.any(&owner(1)).unwrap_err(), ipam.claim(&owner(1), &ips(&["10.244.1.5"]), "static").unwrap_err()] {
        assert!(error.to_string().starts_with("this node has no pod range"), "{error}");
    }
}

#[test]
fn a_range_of_ipv6_beyond_jsons_numbers_can_be_shown() {
    let dir = scratch();
    let mut ipam = open(dir.path(), &["fd00:77::/48"]);
    assert_eq!(address(&ipam.any(&owner(1)).unwrap()), "fd00:77::3");
    let view = serde_json::to_value(ipam.list()).unwrap();
    assert_eq!((&view["pools"][0]["capacity"], &view["pools"][0]["used"]), (&u64::MAX.into(), &1.into()));
}

#[test]
fn a_whole_slash_16_is_given_out_without_walking_along_it() {
    let dir = scratch();
    let mut ipam = open(dir.path(), &["10.0.0.0/16"]);
    let start = std::time::Instant::now();
    for n in 0..65_532 {
        ipam.any(&owner(n)).unwrap();
    }
    assert!(ipam.any(&owner(65_532)).is_err());
    // Every third goes, so that what is free lies in pieces; then they come back in another order.
    for n in (0..65_532).step_by(3) {
        ipam.release(&owner(n)).unwrap();
    }
    for n in (0..65_532).step_by(3) {
        ipam.any(&again(65_532 - n)).unwrap();
    }
    println!("65,532 addresses, a third of them twice: {:?}", start.elapsed());
    assert_eq!(ipam.leases().count(), 65_532);
    // A walk would be 2·10⁹ steps. This takes a second of CPU unoptimised; the bound is for machines that are busy.
    assert!(start.elapsed().as_secs() < 30, "{:?}", start.elapsed());
}
