//! Addresses compared with what is attached.

use super::*;

fn holder(n: usize, addresses: &[&str]) -> Holder {
    Holder { owner: owner(n), addresses: ips(addresses) }
}

/// The findings as one line each: kind, address, owner, whether it is mended.
fn short(findings: &[Finding]) -> Vec<String> {
    let line = |f: &Finding| format!("{:?} {} {}{}", f.kind, f.address, f.owner.name, if f.fixed { " fixed" } else { "" });
    findings.iter().map(line).collect()
}

#[test]
fn every_disagreement_is_found_and_what_can_be_is_mended() {
    // Pods 0 to 3 have .3 to .6. What is attached, what is found, what is left after mending.
    let all = ["10.244.1.3", "10.244.1.4", "10.244.1.5", "10.244.1.6"];
    let attached = |other: &[Holder]| {
        let mut attached: Vec<Holder> = (0..4).map(|n| holder(n, &[all[n]])).collect();
        for change in other {
            attached.retain(|holder| holder.owner != change.owner);
            attached.push(change.clone());
        }
        attached
    };
    for (case, attached, found, left) in [
        ("all is well", attached(&[]), &[][..], &[][..]),
        ("a leak", attached(&[])[1..].to_vec(), &["Leaked 10.244.1.3 pod-0"], &[]),
        ("not known", attached(&[holder(7, &["10.244.1.9"])]), &["Unleased 10.244.1.9 pod-7"], &[]),
        ("no address yet", attached(&[holder(7, &[])]), &[], &[]),
        ("another than given", attached(&[holder(0, &["10.244.1.9"])]), &["Leaked 10.244.1.3 pod-0", "Unleased 10.244.1.9 pod-0"], &[]),
        (
            "another's, who is gone",
            [&attached(&[])[1..], &[holder(7, &["10.244.1.3"])]].concat(),
            &["Leaked 10.244.1.3 pod-0", "Unleased 10.244.1.3 pod-7"],
            &[],
        ),
        (
            "two have changed places",
            attached(&[holder(0, &["10.244.1.4"]), holder(1, &["10.244.1.3"])]),
            &["Leaked 10.244.1.3 pod-0", "Unleased 10.244.1.3 pod-1", "Leaked 10.244.1.4 pod-1", "Unleased 10.244.1.4 pod-0"],
            &[],
        ),
        ("two of them use it", attached(&[holder(7, &["10.244.1.4"])]), &["Double 10.244.1.4 pod-1"], &["Double 10.244.1.4 pod-1"]),
        (
            "two use what nobody was given",
            attached(&[holder(7, &["10.244.1.9"]), holder(8, &["10.244.1.9"])]),
            &["Unleased 10.244.1.9 pod-7", "Double 10.244.1.9 pod-7"],
            &["Double 10.244.1.9 pod-7"],
        ),
        ("outside", attached(&[holder(7, &["192.0.2.7"])]), &["Unleased 192.0.2.7 pod-7", "Outside 192.0.2.7 pod-7"], &["Outside 192.0.2.7 pod-7"]),
    ] {
        let dir = scratch();
        let mut ipam = open(dir.path(), &["10.244.1.0/24"]);
        (0..4).for_each(|n| drop(ipam.any(&owner(n)).unwrap()));
        assert_eq!(short(&ipam.check(&attached)), found, "{case}");
        assert!(ipam.check(&attached).iter().all(|finding| !finding.fixed && !finding.problem.is_empty()));
        let fixed = ipam.fix(&attached).unwrap();
        let expected: Vec<String> = found.iter().map(|line| if left.contains(line) { line.to_string() } else { format!("{line} fixed") }).collect();
        assert_eq!(short(&fixed), expected, "{case}");
        assert_eq!(short(&ipam.check(&attached)), left, "{case}: what is left");
        // Nothing that is in use can be given to anybody now.
        drop(ipam);
        let mut ipam = open(dir.path(), &["10.244.1.0/24"]);
        assert_eq!(short(&ipam.check(&attached)), left, "{case}: after a restart");
        let used: BTreeSet<IpAddr> = attached.iter().flat_map(|holder| holder.addresses.clone()).collect();
        while let Ok(lease) = ipam.any(&owner(100 + ipam.leases().count())) {
            assert!(lease.addresses.iter().all(|address| !used.contains(address)), "{case}: {lease:?}");
        }
    }
}

#[test]
fn a_range_that_moved_away_is_told_of_what_is_attached() {
    let dir = scratch();
    let mut ipam = open(dir.path(), &["10.244.1.0/24"]);
    ipam.any(&owner(0)).unwrap();
    let attached = [holder(0, &["10.244.1.3"])];
    ipam.set_ranges(&cidrs(&["10.244.2.0/24"])).unwrap();
    let findings = ipam.fix(&attached).unwrap();
    assert_eq!(short(&findings), ["Outside 10.244.1.3 pod-0"]);
    assert_eq!(findings[0].problem, "it lies outside this node's ranges 10.244.2.0/24, so other nodes do not send to it; make the pod anew");
    // As long as the source has said nothing, nothing is outside.
    ipam.set_ranges(&[]).unwrap();
    assert_eq!(short(&ipam.check(&attached)), Vec::<String>::new());
}

#[test]
fn findings_say_what_to_do() {
    let dir = scratch();
    let mut ipam = open(dir.path(), &["10.244.1.0/24"]);
    ipam.any(&owner(0)).unwrap();
    ipam.any(&owner(1)).unwrap();
    let problems: Vec<String> =
        ipam.check(&[holder(1, &["10.244.1.4"]), holder(2, &["10.244.1.4"]), holder(3, &["10.244.1.3"])]).into_iter().map(|f| f.problem).collect();
    assert_eq!(
        problems,
        [
            "it is given out, but nothing of its owner is attached; --fix releases it",
            "it is in use, but given out to default/pod-0 (eth0, sandbox-0); --fix takes note of it",
            "default/pod-2 (eth0, sandbox-2) use it too; detach them, as with `podgate detach --netns sandbox-2 --ifname eth0`, and attach them again",
        ]
    );
}

#[test]
fn releasing_by_hand_takes_leaks_and_refuses_what_is_attached() {
    let dir = scratch();
    let mut ipam = open(dir.path(), &["10.244.1.0/24", "fd00:77:1::/64"]);
    for owner in [owner(0), owner(1), again(1), owner(2)] {
        ipam.any(&owner).unwrap();
    }
    let attached = [holder(1, &["10.244.1.4", "fd00:77:1::4"]), holder(2, &["10.244.1.6", "fd00:77:1::6"])];
    let mut release = |what: &str| ipam.release_by_hand(what, &attached).map(|a| error::list(&a)).map_err(|e| e.to_string());
    assert_eq!(release("fd00:77:1::3").unwrap(), "10.244.1.3, fd00:77:1::3", "all that its owner has");
    assert_eq!(release("default/pod-1").unwrap(), "10.244.1.5, fd00:77:1::5", "the sandbox that is not attached");
    let refusal = "is attached and uses 10.244.1.4, fd00:77:1::4; delete the pod, or detach it with `podgate detach --netns sandbox-1 --ifname eth0`";
    for what in ["default/pod-1", "10.244.1.4"] {
        assert_eq!(release(what).unwrap_err(), format!("default/pod-1 (eth0, sandbox-1) {refusal}"));
    }
    for what in ["10.244.1.3", "10.244.1.99", "default/nobody", "pod-2"] {
        let error = release(what).unwrap_err();
        assert!(error.starts_with(&format!("nobody has {what}: ")) && error.contains("`podgate ipam`"), "{error}");
    }
}
