//! Bulk transfers on each path, compared byte for byte, in superframes; then with offloads off; then with several numbers of workers.
//!
//! `PODGATE_BULK_MIB=1024` moves 1 GiB on each path.

use std::process::ExitCode;

use podgate::lab::matrix::Probe;
use podgate::lab::program::bulk;
use podgate::lab::{Lab, NodeSettings};
use podgate_runtime::ethtool::{Switch, set_features};
use podgate_testbed::{Bed, Outcome, all_hold, run};

fn main() -> ExitCode {
    run(|tests| {
        tests.add("bulk transfers on every kind of path arrive with every byte right, in superframes", superframes);
        tests.add("bulk transfers arrive with the underlay's offloads off", without_offloads);
        tests.add("bulk transfers arrive with the pods' offloads off, every checksum made and verified by their kernels", without_pods_offloads);
        tests.add("one worker serves every path", |bed| workers(bed, 1));
        tests.add("three workers share the flows of every path", |bed| workers(bed, 3));
    })
}

fn len() -> u64 {
    std::env::var("PODGATE_BULK_MIB").ok().and_then(|text| text.parse::<u64>().ok()).map_or(bulk::LEN, |mib| mib << 20)
}

fn transfer_all(lab: &Lab) -> Outcome {
    let (checks, rows) = lab.check_throughput(&lab.paths()?, len(), &|_| {})?;
    for row in rows {
        eprintln!("    {:<60} {:>6.2} Gb/s", row.name, row.gbit_per_second);
    }
    all_hold(&checks)
}

fn superframes(bed: &Bed) -> Outcome {
    let lab = bed.lab()?;
    let before = frames(lab)?;
    transfer_all(lab)?;
    let after = frames(lab)?;
    let (packets, bytes) = (after.0 - before.0, after.1 - before.1);
    let average = bytes / packets.max(1);
    eprintln!("    {packets} frames of {average} bytes on average, acknowledgements included");
    // Half of all frames are acknowledgements, and still the average is several segments.
    assert!(average > 4 * 1500, "the average frame has {average} bytes: these are no superframes");
    Ok(())
}

/// Frames and bytes that all workers of all nodes have read.
fn frames(lab: &Lab) -> Result<(u64, u64), Box<dyn std::error::Error>> {
    let mut sum = (0, 0);
    for node in lab.nodes() {
        let value = node.query(&["workers"])?;
        for worker in value["workers"].as_array().ok_or("no workers in the answer")? {
            let number = |key: &str| worker[key].as_u64().ok_or_else(|| format!("a worker without {key}: {worker}"));
            sum.0 += number("rxFrames")?;
            sum.1 += number("rxBytes")?;
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
    let outcome = transfer_all(lab);
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
    let outcome = transfer_all(lab);
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
    let (checks, _) = lab.check_throughput(&lab.paths()?, 16 << 20, &|_| {})?;
    all_hold(&checks)
}
