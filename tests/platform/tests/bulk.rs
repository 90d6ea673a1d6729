//! Bulk transfers on every path, compared byte for byte, in superframes; then with offloads off; then with several numbers of workers.
//!
//! `PODGATE_BULK_MIB=1024` moves 1 GiB on each path, `cargo test -p podgate-platform --release --test bulk` with the optimised binary.

use std::process::ExitCode;

use podgate::lab::matrix::{Check, Probe};
use podgate::lab::program::bulk;
use podgate::lab::{Lab, LabError, NodeSettings};
use podgate_runtime::ethtool::{Switch, set_features};
use podgate_testbed::{Bed, Outcome, all_hold, run};

fn main() -> ExitCode {
    run(|tests| {
        tests.add("bulk transfers on every path arrive with every byte right, in superframes", superframes);
        tests.add("bulk transfers arrive with the underlay's offloads off", without_offloads);
        tests.add("bulk transfers arrive with the pods' offloads off, every checksum made and verified by their kernels", without_pods_offloads);
        tests.add("one worker serves every path", |bed| workers(bed, 1));
        tests.add("three workers share the flows of every path", |bed| workers(bed, 3));
    })
}

fn len() -> u64 {
    std::env::var("PODGATE_BULK_MIB").ok().and_then(|text| text.parse::<u64>().ok()).map_or(bulk::LEN, |mib| mib << 20)
}

/// Transfers on every path; `after` is called after each.
fn transfer_all(lab: &Lab, after: &mut dyn FnMut(&Check) -> Result<(), LabError>) -> Outcome {
    let (checks, _) = lab.check_throughput(&lab.paths()?, len(), &mut |check| {
        eprintln!("    {:<75} {}", check.name, check.detail);
        after(check)
    })?;
    all_hold(&checks)
}

/// Without superframes no frame is longer than the MTU. Half of all are acknowledgements, and still the average must be twice that.
const SUPERFRAME_LEN: u64 = 2 * 1500;

fn superframes(bed: &Bed) -> Outcome {
    let lab = bed.lab()?;
    let (mut before, mut small) = (frames(lab)?, Vec::new());
    transfer_all(lab, &mut |check| {
        let now = frames(lab)?;
        let (packets, bytes) = (now.0 - before.0, now.1 - before.1);
        let average = bytes / packets.max(1);
        eprintln!("      {packets} frames of {average} bytes on average, acknowledgements included");
        if average < SUPERFRAME_LEN {
            small.push(format!("{}: {average} bytes", check.name));
        }
        before = now;
        Ok(())
    })?;
    assert!(small.is_empty(), "these are no superframes: {small:#?}");
    Ok(())
}

/// Frames and bytes that all workers of all nodes have read.
fn frames(lab: &Lab) -> Result<(u64, u64), LabError> {
    let mut sum = (0, 0);
    for node in lab.nodes() {
        let value = node.query(&["workers"])?;
        for worker in value["workers"].as_array().expect("`podgate workers` lists workers") {
            let number = |key: &str| worker[key].as_u64().unwrap_or_else(|| panic!("a worker without {key}: {worker}"));
            sum.0 += number("rxFrames");
            sum.1 += number("rxBytes");
        }
    }
    Ok(sum)
}

fn without_offloads(bed: &Bed) -> Outcome {
    const OFFLOADS: [&str; 6] =
        ["tx-udp-segmentation", "tx-generic-segmentation", "tx-tcp-segmentation", "tx-tcp6-segmentation", "rx-gro", "tx-checksum-ip-generic"];
    let lab = bed.lab()?;
    let switch = |to: Switch| -> Outcome {
        for node in lab.nodes() {
            lab.set_offloads(node, &OFFLOADS.map(|name| (name, to)))?;
        }
        Ok(())
    };
    switch(Switch::Off)?;
    // With checksums made and verified in software, a wrong one is dropped by the kernel and the transfer stands still.
    let outcome = transfer_all(lab, &mut |_| Ok(()));
    switch(Switch::On)?;
    outcome
}

/// Pods then send packets of MTU size with whole checksums, which translation must keep right, and check every one that they get.
fn without_pods_offloads(bed: &Bed) -> Outcome {
    const OFFLOADS: [&str; 6] =
        ["tx-checksum-ip-generic", "rx-checksum", "tx-tcp-segmentation", "tx-tcp6-segmentation", "tx-generic-segmentation", "rx-gro"];
    let lab = bed.lab()?;
    let switch = |to: Switch| -> Outcome {
        for pod in lab.pods() {
            pod.machine().run(|| set_features("eth0", &OFFLOADS.map(|name| (name, to))))??;
        }
        Ok(())
    };
    switch(Switch::Off)?;
    let outcome = transfer_all(lab, &mut |_| Ok(()));
    switch(Switch::On)?;
    outcome
}

fn workers(bed: &Bed, count: u16) -> Outcome {
    let settings = NodeSettings { workers: Some(count), ..NodeSettings::default() };
    let name = format!("workers-{count}");
    let lab = Lab::builder(bed.sandbox(), &bed.binary()).named(&name).settings(settings).build(&|_| {})?;
    for node in lab.nodes() {
        let value = node.query(&["workers"])?;
        assert_eq!(value["workers"].as_array().map(Vec::len), Some(count.into()), "{value}");
    }
    all_hold(&lab.check_paths(&lab.paths()?, &Probe::ALL, &|_, _| {})?)?;
    let (checks, _) = lab.check_throughput(&lab.paths()?, 16 << 20, &mut |_| Ok(()))?;
    all_hold(&checks)
}
