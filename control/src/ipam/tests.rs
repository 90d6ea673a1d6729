//! Never twice, never lost: allocation, and the journal under every cut and every flipped bit.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

/// In memory where the machine has such a place: thousands of journals are opened here, each with its fsyncs.
fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

fn owner(n: usize) -> Owner {
    Owner { namespace: "default".into(), name: format!("pod-{n}"), netns: format!("4:{n}"), ifname: "eth0".into() }
}

fn cidrs(list: &[&str]) -> Vec<IpNetwork> {
    list.iter().map(|c| c.parse().unwrap()).collect()
}

fn open(dir: &Path, list: &[&str]) -> Ipam {
    Ipam::open(dir, &cidrs(list)).unwrap().0
}

fn address(lease: &Lease) -> String {
    lease.addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

#[test]
fn each_family_gives_one_and_the_reserved_ones_are_never_given() {
    let dir = scratch();
    let mut ipam = open(dir.path(), &["10.244.1.0/29", "fd00:77:1::/64"]);
    let given: Vec<String> = (0..4).map(|n| address(&ipam.allocate(&owner(n), &Wish::default()).unwrap())).collect();
    // Of eight: network, gateway, probe and broadcast are kept back.
    assert_eq!(given, ["10.244.1.3 fd00:77:1::3", "10.244.1.4 fd00:77:1::4", "10.244.1.5 fd00:77:1::5", "10.244.1.6 fd00:77:1::6"]);
    assert_eq!(
        ipam.allocate(&owner(4), &Wish::default()).unwrap_err().to_string(),
        "all 4 addresses of 10.244.1.0/29 are given out; see `podgate ipam`, and detach pods that are gone or give the node a larger range"
    );
    let view = ipam.list();
    assert_eq!((view.pools[0].capacity, view.pools[0].used, view.pools[1].used, view.leases.len()), (4, 4, 4, 4));
    assert_eq!(view.pools[0].gateway.to_string(), "10.244.1.1");
    assert_eq!(probe_address("10.244.1.0/29".parse().unwrap()).unwrap().to_string(), "10.244.1.2");
}

#[test]
fn asking_again_gives_the_same_and_releasing_twice_is_no_error() {
    let dir = scratch();
    let mut ipam = open(dir.path(), &["10.244.1.0/24"]);
    let lease = ipam.allocate(&owner(1), &Wish::default()).unwrap();
    assert_eq!(ipam.allocate(&owner(1), &Wish::default()).unwrap(), lease);
    assert_eq!(ipam.owner(lease.addresses[0]), Some(&owner(1)));
    assert_eq!(ipam.release(&owner(1)).unwrap(), Some(lease));
    assert_eq!(ipam.release(&owner(1)).unwrap(), None);
}

#[test]
fn a_freed_address_is_the_last_to_be_given_out_again_even_after_a_restart() {
    let dir = scratch();
    let mut ipam = open(dir.path(), &["10.244.1.0/29"]);
    let first = ipam.allocate(&owner(1), &Wish::default()).unwrap();
    ipam.release(&owner(1)).unwrap();
    drop(ipam);
    let mut ipam = open(dir.path(), &["10.244.1.0/29"]);
    ipam.compact().unwrap();
    drop(ipam);
    let mut ipam = open(dir.path(), &["10.244.1.0/29"]);
    let next: Vec<String> = (2..6).map(|n| address(&ipam.allocate(&owner(n), &Wish::default()).unwrap())).collect();
    assert_eq!(next, ["10.244.1.4", "10.244.1.5", "10.244.1.6", "10.244.1.3"]);
    assert_eq!(next[3], address(&first));
}

#[test]
fn what_is_given_out_is_known_after_a_restart() {
    let dir = scratch();
    let mut ipam = open(dir.path(), &["10.244.1.0/24", "fd00:77:1::/64"]);
    let leases: Vec<Lease> = (0..5).map(|n| ipam.allocate(&owner(n), &Wish::default()).unwrap()).collect();
    ipam.release(&owner(2)).unwrap();
    drop(ipam);
    let (mut ipam, messages) = Ipam::open(dir.path(), &cidrs(&["10.244.1.0/24", "fd00:77:1::/64"])).unwrap();
    assert_eq!(messages, Vec::<String>::new());
    assert_eq!(ipam.lease(&owner(2)), None);
    assert_eq!(ipam.allocate(&owner(1), &Wish::default()).unwrap(), leases[1]);
    assert_eq!(ipam.leases().count(), 4);
}

#[test]
fn a_second_daemon_is_refused() {
    let dir = scratch();
    let _first = open(dir.path(), &["10.244.1.0/24"]);
    let error = Ipam::open(dir.path(), &[]).unwrap_err().to_string();
    assert!(error.ends_with("another process uses this journal of addresses; give each daemon on a machine a stateDir of its own"), "{error}");
}

#[test]
fn a_range_without_room_and_no_range_at_all_are_named() {
    let dir = scratch();
    let error = Ipam::open(dir.path(), &cidrs(&["10.244.1.0/30"])).unwrap_err().to_string();
    assert_eq!(error, "the pod range 10.244.1.0/30 is too small: four of its addresses are kept back; give the node at least a /29");
    let error = open(dir.path(), &[]).allocate(&owner(1), &Wish::default()).unwrap_err().to_string();
    assert!(error.starts_with("this node has no pod range"), "{error}");
}

#[test]
fn a_long_journal_is_written_anew() {
    let dir = scratch();
    let mut ipam = open(dir.path(), &["10.244.1.0/24"]);
    ipam.allocate(&owner(0), &Wish::default()).unwrap();
    for n in 1..600 {
        ipam.allocate(&owner(n), &Wish::default()).unwrap();
        ipam.release(&owner(n)).unwrap();
    }
    assert!(ipam.journal.records() < 1100, "{}", ipam.journal.records());
    drop(ipam);
    assert_eq!(open(dir.path(), &["10.244.1.0/24"]).leases().count(), 1);
}

/// A journal of some history, and the owners that have been told of their address at each length of the file.
fn history() -> (Vec<u8>, Vec<(usize, BTreeSet<String>)>) {
    let dir = scratch();
    let path = dir.path().join("addresses.journal");
    let mut ipam = open(dir.path(), &["10.244.1.0/24"]);
    let mut told = Vec::new();
    let held = |ipam: &Ipam| ipam.leases().map(address).collect::<BTreeSet<_>>();
    told.push((std::fs::metadata(&path).unwrap().len() as usize, held(&ipam)));
    for n in 0..4 {
        ipam.allocate(&owner(n), &Wish::default()).unwrap();
        told.push((std::fs::metadata(&path).unwrap().len() as usize, held(&ipam)));
    }
    ipam.release(&owner(1)).unwrap();
    told.push((std::fs::metadata(&path).unwrap().len() as usize, held(&ipam)));
    (std::fs::read(&path).unwrap(), told)
}

#[test]
fn a_journal_cut_at_any_byte_recovers_everything_that_was_acknowledged() {
    let (bytes, told) = history();
    for cut in 0..=bytes.len() {
        let dir = scratch();
        std::fs::write(dir.path().join("addresses.journal"), &bytes[..cut]).unwrap();
        let (ipam, messages) = Ipam::open(dir.path(), &cidrs(&["10.244.1.0/24"])).unwrap_or_else(|e| panic!("cut at {cut}: {e}"));
        let held: BTreeSet<String> = ipam.leases().map(address).collect();
        // A record counts from its last byte but the newline.
        let acknowledged = told.iter().rev().find(|(len, _)| *len <= cut + 1).map(|(_, held)| held.clone()).unwrap_or_default();
        assert_eq!(held, acknowledged, "cut at {cut}");
        let whole = cut == 0 || told.iter().any(|(len, _)| *len == cut);
        assert_eq!(messages.is_empty(), whole, "cut at {cut}: {messages:?}");
        drop(ipam);
        let (_, messages) = Ipam::open(dir.path(), &[]).unwrap();
        assert!(messages.is_empty(), "it is mended once: {messages:?}");
    }
}

#[test]
fn a_flipped_bit_anywhere_is_refused_or_changes_nothing() {
    let (bytes, told) = history();
    let truth = &told.last().unwrap().1;
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let dir = scratch();
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << bit;
            std::fs::write(dir.path().join("addresses.journal"), &damaged).unwrap();
            match Ipam::open(dir.path(), &cidrs(&["10.244.1.0/24"])) {
                Ok((ipam, _)) => assert_eq!(ipam.leases().map(address).collect::<BTreeSet<_>>(), *truth, "byte {at}, bit {bit}"),
                Err(IpamError::Journal(JournalError::Corrupt { .. })) => {}
                Err(other) => panic!("byte {at}, bit {bit}: {other}"),
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn no_address_has_two_owners_whatever_happens(steps in prop::collection::vec((0..3u8, 0..8usize), 1..60)) {
        let dir = scratch();
        let list = ["10.244.1.0/29", "fd00:77:1::/125"];
        let mut ipam = open(dir.path(), &list);
        for (what, n) in steps {
            let before: Vec<Lease> = ipam.leases().cloned().collect();
            match what {
                0 => {
                    if let Ok(lease) = ipam.allocate(&owner(n), &Wish::default()) {
                        for other in before.iter().filter(|l| l.owner != owner(n)) {
                            prop_assert!(lease.addresses.iter().all(|a| !other.addresses.contains(a)));
                        }
                    } else {
                        prop_assert_eq!(before.len(), 4, "refused only when all are out");
                    }
                }
                1 => {
                    ipam.release(&owner(n)).unwrap();
                }
                _ => {
                    drop(ipam);
                    ipam = open(dir.path(), &list);
                    prop_assert_eq!(ipam.leases().cloned().collect::<Vec<_>>(), before, "a restart forgets nothing");
                }
            }
        }
    }
}
