//! The journal under every cut and every flipped bit, in its own boot and in the next.

use std::collections::BTreeSet;

use super::*;
use crate::ipam::journal::JournalError;

const RANGES: [&str; 2] = ["10.244.1.0/24", "fd00:77:1::/64"];

fn journal(dir: &Path) -> std::path::PathBuf {
    dir.join("addresses.journal")
}

fn mark(dir: &Path) -> std::path::PathBuf {
    dir.join("addresses.boot")
}

fn boot(dir: &Path, boot: &str) -> Result<(Ipam, Vec<String>), IpamError> {
    Ipam::open(dir, &cidrs(&RANGES), &IpamSettings::default(), boot, Box::new(Hand::at(NOON)))
}

fn held(ipam: &Ipam) -> BTreeSet<String> {
    ipam.leases().map(address).collect()
}

/// A journal of some history, what marks its boot, and what was given out at each length of the file.
struct History {
    bytes: Vec<u8>,
    mark: Vec<u8>,
    told: Vec<(usize, BTreeSet<String>)>,
    attached: Vec<Holder>,
}

impl History {
    /// It has seen a boot before, so that it begins with what is remembered of that.
    fn new() -> History {
        let dir = scratch();
        let mut ipam = boot(dir.path(), "boot-0").unwrap().0;
        ipam.any(&owner(7)).unwrap();
        drop(ipam);
        let mut ipam = boot(dir.path(), "boot-1").unwrap().0;
        let mut told = Vec::new();
        let mut note = |ipam: &Ipam| told.push((std::fs::metadata(journal(dir.path())).unwrap().len() as usize, held(ipam)));
        note(&ipam);
        for n in 0..3 {
            ipam.any(&owner(n)).unwrap();
            note(&ipam);
        }
        ipam.claim(&owner(3), &ips(&["10.244.1.99"]), "host-local").unwrap();
        note(&ipam);
        ipam.release(&owner(1)).unwrap();
        note(&ipam);
        ipam.any(&owner(7)).unwrap();
        note(&ipam);
        let attached = ipam.leases().map(|lease| Holder { owner: lease.owner.clone(), addresses: lease.addresses.clone() }).collect();
        let read = |path| std::fs::read(path).unwrap();
        History { bytes: read(journal(dir.path())), mark: read(mark(dir.path())), told, attached }
    }

    fn put(&self, dir: &Path, bytes: &[u8]) {
        std::fs::write(journal(dir), bytes).unwrap();
        std::fs::write(mark(dir), &self.mark).unwrap();
    }

    fn header_len(&self) -> usize {
        self.bytes.iter().position(|byte| *byte == b'\n').unwrap() + 1
    }

    /// After the daemon's start, which compares addresses with what is attached, nobody gets what somebody has.
    fn nothing_twice(&self, mut ipam: Ipam, case: &str) {
        let left = ipam.fix(&self.attached).unwrap();
        assert!(left.iter().all(|finding| finding.fixed), "{case}: {left:?}");
        let used: BTreeSet<IpAddr> = self.attached.iter().flat_map(|holder| holder.addresses.clone()).collect();
        for n in 100..110 {
            let lease = ipam.any(&owner(n)).unwrap();
            assert!(lease.addresses.iter().all(|address| !used.contains(address)), "{case}: {lease:?}");
        }
    }
}

#[test]
fn what_is_given_out_is_known_after_a_restart() {
    let dir = scratch();
    let mut ipam = boot(dir.path(), "boot-1").unwrap().0;
    let leases: Vec<Lease> = (0..5).map(|n| ipam.any(&owner(n)).unwrap()).collect();
    ipam.release(&owner(2)).unwrap();
    drop(ipam);
    let (mut ipam, messages) = boot(dir.path(), "boot-1").unwrap();
    assert_eq!(messages, Vec::<String>::new());
    assert_eq!(ipam.lease(&owner(2)), None);
    assert_eq!(ipam.any(&owner(1)).unwrap(), leases[1]);
    assert_eq!(ipam.leases().count(), 4);
}

#[test]
fn leases_end_with_the_boot_and_pods_that_come_back_get_what_they_had() {
    let dir = scratch();
    let mut ipam = boot(dir.path(), "boot-1").unwrap().0;
    let leases: Vec<Lease> = (0..3).map(|n| ipam.any(&owner(n)).unwrap()).collect();
    drop(ipam);
    let (mut ipam, messages) = boot(dir.path(), "boot-2").unwrap();
    assert_eq!(messages, ["3 leases of an earlier boot are over; the pods that come back get the same addresses"]);
    assert_eq!(ipam.leases().count(), 0);
    assert_eq!(address(&ipam.any(&owner(9)).unwrap()), "10.244.1.6 fd00:77:1::6", "what nobody had comes first");
    for n in [2, 0, 1] {
        assert_eq!(ipam.any(&again(n)).unwrap().addresses, leases[n].addresses);
    }
    drop(ipam);
    let (ipam, messages) = boot(dir.path(), "boot-2").unwrap();
    assert_eq!((ipam.leases().count(), messages), (4, Vec::new()));
}

#[test]
fn a_long_journal_is_written_anew() {
    let dir = scratch();
    let mut ipam = boot(dir.path(), "boot-1").unwrap().0;
    ipam.any(&owner(0)).unwrap();
    for n in 1..2000 {
        ipam.any(&owner(n)).unwrap();
        ipam.release(&owner(n)).unwrap();
    }
    // 253 addresses of IPv4 and the 1,999 of IPv6 are remembered.
    assert!(ipam.journal.records() < 2 * (253 + 2000) + 1024, "{}", ipam.journal.records());
    let records = ipam.state.records();
    drop(ipam);
    let ipam = boot(dir.path(), "boot-1").unwrap().0;
    assert_eq!(ipam.leases().count(), 1);
    assert_eq!(ipam.state.records(), records);
}

#[test]
fn a_journal_cut_at_any_byte_recovers_everything_that_was_acknowledged() {
    let history = History::new();
    for cut in 0..=history.bytes.len() {
        let case = format!("cut at {cut}");
        let dir = scratch();
        history.put(dir.path(), &history.bytes[..cut]);
        let (ipam, messages) = match boot(dir.path(), "boot-1") {
            Ok(opened) => opened,
            // A journal of this boot was never without its first line, and what it said is not known.
            Err(IpamError::Journal(JournalError::Corrupt { line: 1, .. })) if cut < history.header_len() - 1 => continue,
            Err(other) => panic!("{case}: {other}"),
        };
        // A record counts from its last byte but the newline.
        let acknowledged = history.told.iter().rev().find(|(len, _)| *len <= cut + 1).map(|(_, held)| held.clone()).unwrap_or_default();
        assert_eq!(held(&ipam), acknowledged, "{case}");
        let whole = history.bytes[cut.saturating_sub(1)] == b'\n';
        assert_eq!(messages.is_empty(), whole, "{case}: {messages:?}");
        drop(ipam);
        let (ipam, messages) = boot(dir.path(), "boot-1").unwrap();
        assert!(messages.is_empty(), "{case}: it is mended once: {messages:?}");
        history.nothing_twice(ipam, &case);
    }
}

#[test]
fn a_flipped_bit_anywhere_is_refused_or_changes_nothing() {
    let history = History::new();
    let truth = &history.told.last().unwrap().1;
    let dir = scratch();
    let mut accepted = 0;
    for at in 0..history.bytes.len() {
        for bit in 0..8 {
            let mut damaged = history.bytes.clone();
            damaged[at] ^= 1 << bit;
            history.put(dir.path(), &damaged);
            match boot(dir.path(), "boot-1") {
                Ok((ipam, _)) => {
                    assert_eq!(held(&ipam), *truth, "byte {at}, bit {bit}");
                    history.nothing_twice(ipam, &format!("byte {at}, bit {bit}"));
                    accepted += 1;
                }
                Err(IpamError::Journal(JournalError::Corrupt { .. })) => {}
                Err(other) => panic!("byte {at}, bit {bit}: {other}"),
            }
        }
    }
    assert_eq!(accepted, 8, "only in the last newline");
}

#[test]
fn no_damage_keeps_the_next_boot_from_starting() {
    let history = History::new();
    let dir = scratch();
    let reopen = |case: &str| {
        let (mut ipam, _) = boot(dir.path(), "boot-2").unwrap_or_else(|e| panic!("{case}: {e}"));
        assert_eq!(held(&ipam), BTreeSet::new(), "{case}");
        let lease = ipam.any(&owner(0)).unwrap();
        drop(ipam);
        let (ipam, messages) = boot(dir.path(), "boot-2").unwrap();
        assert_eq!((ipam.lease(&owner(0)), messages), (Some(&lease), Vec::new()), "{case}");
    };
    for at in 0..history.bytes.len() {
        history.put(dir.path(), &history.bytes[..at]);
        reopen(&format!("cut at {at}"));
        // A torn sector: what stands behind is whole again.
        let mut damaged = history.bytes.clone();
        damaged[at] ^= 0x10;
        history.put(dir.path(), &damaged);
        reopen(&format!("byte {at}"));
    }
    // All of it zeros, as a file system may leave what was not synced.
    history.put(dir.path(), &vec![0; history.bytes.len()]);
    reopen("zeros");
    // What can be read is still remembered.
    let mut damaged = history.bytes.clone();
    damaged[history.told[1].0 + 3] ^= 1;
    history.put(dir.path(), &damaged);
    let (mut ipam, messages) = boot(dir.path(), "boot-2").unwrap();
    let line = damaged[..history.told[1].0].iter().filter(|byte| **byte == b'\n').count() + 1;
    let said = format!("{}:{line}: 1 records of an earlier boot cannot be read; ", journal(dir.path()).display());
    assert!(messages[0].starts_with(&said), "{messages:?}");
    assert_eq!(messages[1], "4 leases of an earlier boot are over; the pods that come back get the same addresses");
    assert_eq!(address(&ipam.any(&owner(2)).unwrap()), "10.244.1.6 fd00:77:1::6");
}

#[test]
fn the_mark_of_the_boot_decides_only_where_the_journal_cannot_say() {
    let history = History::new();
    let truth = &history.told.last().unwrap().1;
    let dir = scratch();
    let mut headless = history.bytes.clone();
    headless[3] ^= 1;
    let marks = (0..history.mark.len()).flat_map(|at| {
        let mut flipped = history.mark.clone();
        flipped[at] ^= 1;
        [history.mark[..at].to_vec(), flipped]
    });
    for damaged in marks.map(Some).chain([None]) {
        let put = |bytes: &[u8]| {
            history.put(dir.path(), bytes);
            match &damaged {
                Some(mark_bytes) => std::fs::write(mark(dir.path()), mark_bytes).unwrap(),
                None => std::fs::remove_file(mark(dir.path())).unwrap(),
            }
        };
        put(&history.bytes);
        assert_eq!(held(&boot(dir.path(), "boot-1").unwrap().0), *truth);
        assert_eq!(std::fs::read(mark(dir.path())).unwrap(), history.mark, "it is mended");
        put(&history.bytes);
        assert_eq!(held(&boot(dir.path(), "boot-2").unwrap().0), BTreeSet::new());
        // Neither says which boot it is: it may be this one.
        put(&headless);
        assert!(matches!(boot(dir.path(), "boot-1"), Err(IpamError::Journal(JournalError::Corrupt { line: 1, .. }))));
    }
    // A journal of an earlier boot, where this boot had one of its own: somebody put it there.
    history.put(dir.path(), &history.bytes);
    drop(boot(dir.path(), "boot-2").unwrap());
    std::fs::write(journal(dir.path()), &history.bytes).unwrap();
    let error = boot(dir.path(), "boot-2").unwrap_err().to_string();
    assert!(error.contains(":1: the journal of addresses is damaged: it is another boot's, and this boot has had one already"), "{error}");
    // Moved away, as the refusal says: what is attached is taken note of.
    std::fs::remove_file(journal(dir.path())).unwrap();
    let (ipam, messages) = boot(dir.path(), "boot-2").unwrap();
    assert!(messages[0].contains("it is gone; `podgate ipam check --fix`"), "{messages:?}");
    history.nothing_twice(ipam, "moved away");
}

#[test]
fn a_journal_that_gives_one_address_to_two_is_refused() {
    let dir = scratch();
    let mut ipam = boot(dir.path(), "boot-1").unwrap().0;
    let lease = ipam.any(&owner(0)).unwrap();
    ipam.journal.append(&[Record::Lease(Lease { owner: owner(1), ..lease })]).unwrap();
    drop(ipam);
    let error = boot(dir.path(), "boot-1").unwrap_err().to_string();
    assert!(
        error.contains("addresses.journal:3: the journal of addresses is damaged: gives 10.244.1.3 to default/pod-1 (eth0, sandbox-1) while"),
        "{error}"
    );
    assert!(boot(dir.path(), "boot-2").is_ok());
}

#[test]
fn a_journal_of_version_1_is_of_this_boot() {
    let line = |json: &str| format!("{:08x} {json}\n", crc32fast::hash(json.as_bytes()));
    let of = |n: usize| format!(r#"{{"namespace":"default","name":"pod-{n}","netns":"sandbox-{n}","ifname":"eth0"}}"#);
    let lease = |n: usize, address: &str| line(&format!(r#"{{"lease":{{"owner":{},"addresses":["{address}"]}}}}"#, of(n)));
    let text = [
        line(r#"{"journal":{"version":1}}"#),
        lease(0, "10.244.1.3"),
        lease(1, "10.244.1.4"),
        line(&format!(r#"{{"release":{}}}"#, of(0))),
        line(r#"{"cursor":"10.244.1.4"}"#),
    ];
    let dir = scratch();
    std::fs::write(journal(dir.path()), text.concat()).unwrap();
    for _ in 0..2 {
        let (ipam, messages) = boot(dir.path(), "boot-1").unwrap();
        assert_eq!((held(&ipam), messages), (BTreeSet::from(["10.244.1.4".to_owned()]), Vec::new()));
    }
    assert_eq!(held(&boot(dir.path(), "boot-2").unwrap().0), BTreeSet::new());
}

#[test]
fn a_full_disk_gives_out_nothing_and_loses_nothing() {
    let dir = scratch();
    let mut ipam = boot(dir.path(), "boot-1").unwrap().0;
    ipam.any(&owner(0)).unwrap();
    // A file that takes no more, in the journal's place.
    let Ok(full) = std::fs::File::options().append(true).open("/dev/full") else { return };
    let good = ipam.journal.swap(full);
    let error = ipam.any(&owner(1)).unwrap_err();
    assert!(error.code() == 5 && error.to_string().contains("check space and permissions of stateDir"), "{error}");
    assert!(ipam.release(&owner(0)).is_err());
    assert_eq!((ipam.leases().count(), ipam.lease(&owner(0)).is_some()), (1, true), "what could not be written did not happen");
    ipam.journal.swap(good);
    assert_eq!(address(&ipam.any(&owner(1)).unwrap()), "10.244.1.4 fd00:77:1::4");
}
