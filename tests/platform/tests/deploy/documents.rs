//! The pages that say how VMs are set up, run as they stand on machines with a real systemd: each block of commands where the page says, what it
//! prints compared with what the page shows.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use podgate::lab::{Lab, LabError, Machine, wait_until};
use podgate_testbed::traces::Host;
use podgate_testbed::vm::Vm;
use podgate_testbed::{Bed, Outcome};

use crate::package::deb;
use crate::{Try, deploy};

/// What is shown may take so long to come about.
const PATIENCE: Duration = Duration::from_secs(20);

/// A block of shell commands.
#[derive(Debug, PartialEq, Eq)]
struct Step {
    /// The line of the page at which it begins.
    line: usize,
    /// Where it is run, one machine after the other.
    on: Vec<String>,
    commands: String,
    /// What the page shows of its output; `…` stands for anything on a line, and alone for any lines.
    shown: Option<Vec<String>>,
}

/// The blocks of a page. A block of commands is marked `sh`, and the paragraph above it has `On` with the names of machines, or with `every VM`; one
/// marked `text` is what the commands above it print. There is no other kind, so that nothing stands there unproven.
fn steps(page: &str, all: &[&str]) -> Try<Vec<Step>> {
    let mut steps: Vec<Step> = Vec::new();
    let mut paragraph = String::new();
    let mut lines = page.lines().enumerate();
    while let Some((at, line)) = lines.next() {
        let Some(kind) = line.strip_prefix("```") else {
            paragraph = if line.is_empty() { paragraph } else { line_after(&paragraph, line, page, at) };
            continue;
        };
        let block: Vec<String> = lines.by_ref().map(|(_, line)| line.to_owned()).take_while(|line| line != "```").collect();
        match (kind, steps.last_mut()) {
            ("sh", _) => {
                let named = paragraph.rsplit_once("On ").map(|(_, named)| named).ok_or_else(|| format!("line {}: it says not where", at + 1))?;
                let on: Vec<String> = match named.starts_with("every VM") {
                    true => all.iter().map(|name| (*name).to_owned()).collect(),
                    false => all.iter().filter(|name| named.contains(&format!("`{name}`"))).map(|name| (*name).to_owned()).collect(),
                };
                if on.is_empty() {
                    return Err(format!("line {}: there is no such machine: {named}", at + 1).into());
                }
                steps.push(Step { line: at + 1, on, commands: block.join("\n"), shown: None });
            }
            ("text", Some(step)) if step.shown.is_none() => step.shown = Some(block),
            (other, _) => return Err(format!("line {}: a block that is `{other}` here is neither run nor compared", at + 1).into()),
        }
    }
    Ok(steps)
}

/// A paragraph, one line longer; or another one, if an empty line was before.
fn line_after(paragraph: &str, line: &str, page: &str, at: usize) -> String {
    let before = at.checked_sub(1).and_then(|before| page.lines().nth(before)).unwrap_or_default();
    if before.is_empty() { line.to_owned() } else { format!("{paragraph} {line}") }
}

/// Whether lines are as they are shown.
fn alike(shown: &[String], lines: &[&str]) -> bool {
    match (shown, lines) {
        ([], []) => true,
        ([first, rest @ ..], _) if first.trim() == "…" => (0..=lines.len()).any(|skipped| alike(rest, &lines[skipped..])),
        ([first, rest @ ..], [line, more @ ..]) => line_is(first, line) && alike(rest, more),
        _ => false,
    }
}

fn line_is(shown: &str, line: &str) -> bool {
    let line = line.trim_end();
    match shown.split_once('…') {
        None => shown.trim_end() == line,
        Some((before, after)) => {
            line.strip_prefix(before).is_some_and(|rest| (0..=rest.len()).any(|at| rest.is_char_boundary(at) && line_is(after, &rest[at..])))
        }
    }
}

/// Runs a step on a machine. What it shows may take its time: the commands are given again until they print it, as somebody who waits would.
fn take(step: &Step, vm: &Vm) -> Outcome {
    let start = Instant::now();
    let Some(shown) = &step.shown else {
        vm.ok(&step.commands)?;
        return Ok(());
    };
    let mut first = None;
    let failed = |source: podgate_testbed::vm::VmError| LabError::Program { what: step.commands.clone(), source: std::io::Error::other(source) };
    wait_until(
        PATIENCE,
        || format!("on {}: {}\nto print\n{}\n", vm.name(), step.commands, shown.join("\n")),
        || {
            let printed = vm.sh(&step.commands).map_err(failed)?.stdout;
            let good = alike(shown, &printed.lines().collect::<Vec<_>>());
            let first = first.get_or_insert(printed.clone());
            Ok((!good).then(|| format!("at first it printed\n{first}\nand after {} s\n{printed}", start.elapsed().as_secs())))
        },
    )
    .map_err(|error| format!("{error}\n{}", vm.journal(40)).into())
}

/// Runs a page on fresh machines, all of which must be at its end what they were before.
fn run(bed: &Bed, page: &str, machines: u8) -> Outcome {
    let name = page.strip_suffix(".md").unwrap_or(page);
    let lab = Lab::builder(bed.sandbox(), &bed.binary()).named(name).nodes(machines).machines()?;
    let names: Vec<&str> = lab.nodes().iter().map(|node| node.name()).collect();
    let steps = steps(&deploy(&format!("docs/{page}"))?, &names).map_err(|error| format!("{page}, {error}"))?;
    if steps.is_empty() {
        return Err(format!("{page} has no commands").into());
    }
    let package = deb(bed)?;
    let vms =
        lab.nodes().iter().map(|node| boot(node.machine(), &lab.directory().join("vm").join(node.name()), &package)).collect::<Try<Vec<_>>>()?;
    let before = lab.nodes().iter().map(|node| Host::of(node.machine())).collect::<Result<Vec<_>, _>>()?;
    let files = vms.iter().map(written).collect::<Try<Vec<_>>>()?;
    for step in &steps {
        for vm in vms.iter().filter(|vm| step.on.iter().any(|name| name == vm.name())) {
            let start = Instant::now();
            take(step, vm).map_err(|error| format!("{page}, line {}: {error}", step.line))?;
            eprintln!("    {page}:{} on {}: {} ms", step.line, vm.name(), start.elapsed().as_millis());
        }
    }
    for (vm, before) in vms.iter().zip(files) {
        let now = written(vm)?;
        let left: Vec<_> = now.iter().filter(|file| !before.contains(file)).chain(before.iter().filter(|file| !now.contains(file))).collect();
        assert!(left.is_empty(), "{page} leaves on {}: {left:#?}", vm.name());
    }
    for (node, before) in lab.nodes().iter().zip(before) {
        let left = Host::of(node.machine())?.differs(&before);
        assert!(left.is_empty(), "{page} leaves on {}: {left:#?}", node.name());
    }
    Ok(())
}

/// What was written on a machine's disk, but for what apt and podman keep for themselves, and etcd's settings, which stay with it.
fn written(vm: &Vm) -> Try<Vec<String>> {
    Ok(vm.written(&["/etc/cni", "/etc/default/etcd", "/var/cache", "/var/lib/PackageKit", "/var/lib/apt", "/var/lib/cni", "/var/lib/dpkg"])?)
}

/// A machine as a reader has it, with the package in root's home; and podman able to run where it is not the first to lay a root over another.
pub fn boot(machine: &Machine, directory: &Path, package: &Path) -> Try<Vm> {
    let vm = Vm::boot(machine, directory)?;
    fs::copy(package, vm.path("/root").join(package.file_name().unwrap_or_default()))?;
    // To index manual pages takes seconds.
    let _ = fs::remove_file(vm.path("/var/lib/man-db/auto-update"));
    fs::create_dir_all(vm.path("/etc/containers"))?;
    fs::write(
        vm.path("/etc/containers/storage.conf"),
        "[storage]\ndriver = \"vfs\"\nrunroot = \"/run/containers/storage\"\ngraphroot = \"/var/lib/containers/storage\"\n",
    )?;
    // The controllers of cgroups are the machine's, which may have given them to none.
    fs::write(vm.path("/etc/containers/containers.conf"), "[containers]\ncgroups = \"disabled\"\n[engine]\nevents_logger = \"file\"\n")?;
    Ok(vm)
}

pub fn one_vm(bed: &Bed) -> Outcome {
    run(bed, "one-vm-on-a-directory.md", 1)
}

pub fn three_vms(bed: &Bed) -> Outcome {
    run(bed, "three-vms-on-etcd.md", 3)
}

pub fn reading(_: &Bed) -> Outcome {
    let page = "# A page\n\nSomething.\n\nOn `b`, and\nnot here:\n\n```sh\none\ntwo\n```\n\nIt prints:\n\n```text\n1…\n```\n\nOn every VM:\n\n```sh\nthree\n```\n";
    let step = |line, on: &[&str], commands: &str, shown: Option<&str>| Step {
        line,
        on: on.iter().map(|name| (*name).to_owned()).collect(),
        commands: commands.to_owned(),
        shown: shown.map(|shown| vec![shown.to_owned()]),
    };
    assert_eq!(steps(page, &["a", "b"])?, [step(8, &["b"], "one\ntwo", Some("1…")), step(21, &["a", "b"], "three", None)]);
    for (wrong, why) in [
        ("```sh\none\n```\n", "not where"),
        ("On `c`:\n\n```sh\none\n```\n", "no such machine"),
        ("On `a`:\n\n```yaml\none\n```\n", "neither run nor compared"),
        ("```text\none\n```\n", "neither run nor compared"),
    ] {
        let error = steps(wrong, &["a", "b"]).err().ok_or("it was taken")?.to_string();
        assert!(error.contains(why), "{error}");
    }
    let alike = |shown: &[&str], lines: &[&str]| alike(&shown.iter().map(|line| (*line).to_owned()).collect::<Vec<_>>(), lines);
    assert!(alike(&["a … c", "…", "z"], &["a b c ", "1", "2", "z"]) && alike(&["…"], &[]) && alike(&["…1…"], &["0123"]));
    assert!(!alike(&["a … c"], &["a b d"]) && !alike(&["a", "…", "z"], &["a", "z", "y"]) && !alike(&["a"], &["a", "b"]) && !alike(&["a"], &[]));
    Ok(())
}
