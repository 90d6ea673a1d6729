//! The daemon, and what it says of itself.

use std::fs;

use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

use crate::{Fault, Try, Undo, Ward};

fn stopped<'a>(ward: &'a Ward<'a>) -> Try<Undo<'a>> {
    ward.node.end(Signal::SIGTERM)?;
    Ok(Box::new(|| {
        ward.node.launch(&ward.settings)?;
        Ok(ward.node.wait_ready()?)
    }))
}

fn process(ward: &Ward<'_>) -> Try<Pid> {
    Ok(Pid::from_raw(ward.node.pid().ok_or("no daemon")? as i32))
}

fn hanging<'a>(ward: &'a Ward<'a>) -> Try<Undo<'a>> {
    let daemon = process(ward)?;
    kill(daemon, Signal::SIGSTOP)?;
    Ok(Box::new(move || {
        kill(daemon, Signal::SIGCONT)?;
        Ok(ward.node.wait_ready()?)
    }))
}

/// One thread alone is stopped by who traces it; then something changes, which it cannot take.
fn hanging_worker<'a>(ward: &'a Ward<'a>) -> Try<Undo<'a>> {
    let tasks = format!("/proc/{}/task", process(ward)?);
    let is_first = |task: &fs::DirEntry| fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name.trim() == "worker-0");
    let task = fs::read_dir(tasks)?.flatten().find(is_first).ok_or("no thread of the name worker-0")?;
    let thread = Pid::from_raw(task.file_name().to_string_lossy().parse()?);
    ptrace::seize(thread, ptrace::Options::empty())?;
    ptrace::interrupt(thread)?;
    waitpid(thread, Some(WaitPidFlag::__WALL))?;
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: more, namespace: default}\nspec: {clusterIP: 10.96.7.7, ports: [{port: 80}]}\n";
    ward.node.write_manifest("more.yaml", service)?;
    Ok(Box::new(move || {
        ptrace::detach(thread, None)?;
        Ok(ward.node.remove_manifest("more.yaml")?)
    }))
}

pub const FAULTS: &[Fault] = &[
    Fault { name: "no daemon", make: stopped, check: "daemon", status: "failure", words: &["no daemon answers at", "podgate.sock", "podgate run"] },
    Fault {
        name: "what a daemon leaves",
        make: stopped,
        check: "leftovers",
        status: "warning",
        words: &["routing rules", "the interface podgate", "the gateway's namespace", "podgate cleanup"],
    },
    Fault { name: "a daemon that hangs", make: hanging, check: "daemon", status: "failure", words: &["did not answer", "log"] },
    Fault {
        name: "a worker that hangs",
        make: hanging_worker,
        check: "tables",
        status: "failure",
        words: &["has been waiting", "workers [0]", "restart"],
    },
    Fault {
        name: "a manifest that does not parse",
        make: |ward| {
            ward.node.write_manifest("odd.yaml", "kind: Service\nspec: [\n")?;
            Ok(Box::new(|| Ok(ward.node.remove_manifest("odd.yaml")?)))
        },
        check: "problems",
        status: "warning",
        words: &["odd.yaml", "podgate status"],
    },
    Fault {
        name: "a source that is gone",
        make: |ward| {
            let (here, away) = (ward.node.manifests(), ward.node.manifests().with_extension("away"));
            fs::rename(&here, &away)?;
            Ok(Box::new(move || Ok(fs::rename(&away, &here)?)))
        },
        check: "connected",
        status: "warning",
        words: &["does not follow its source (directory)"],
    },
];
