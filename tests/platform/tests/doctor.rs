//! `podgate doctor` at the bedside: on a healthy node every line is fine; then each fault that it claims to find is made, by the kernel's and the
//! system's own means, and must be found by name, with a remedy; then undone, after which every line must be fine again.
//!
//! What this kernel cannot be made to lack (veth, queues and superframes of a TUN, rules by port, datagrams in segments), a worker that is down
//! for good and a daemon of another version are judged by literal facts only (`control/src/doctor/judge/tests.rs`).

#[path = "doctor_faults/mod.rs"]
mod faults;

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use podgate::lab::{Lab, Node, NodeSettings, manifest, wait_until};
use podgate_testbed::{Bed, Need, Outcome, run};
use serde_json::Value;

type Try<T> = Result<T, Box<dyn std::error::Error>>;

/// The self-test comes every 10 s, and takes a second for each check that fails.
const PATIENCE: Duration = Duration::from_secs(45);

fn main() -> ExitCode {
    run(|tests| {
        let tools = Need::All(&[Need::Program("ip"), Need::Program("setpriv"), Need::Program("setarch"), Need::Program("unshare")]);
        let firewalls = Need::All(&[Need::Program("nft"), Need::Program("iptables-nft"), Need::Program("iptables-legacy")]);
        tests.add_if(tools, "on a healthy node every line is fine, and a node with everything has every group", healthy);
        tests.add_if(tools, "before an installation each thing that is missing or in the way is found", |bed| bare(bed, faults::bare::FAULTS));
        let etcd = Need::Program("etcd");
        tests.add_if(etcd, "an etcd that serves this node is fine, and one that was killed is found", |bed| bare(bed, faults::source::ETCD));
        tests.add("a source that does not serve this node is found, and a clock that is not the server's", |bed| bare(bed, faults::source::FAULTS));
        tests
            .add_if(tools, "on a running node each fault of routing, sysctls and other plugins is found", |bed| installed(bed, faults::host::FAULTS));
        tests.add_if(firewalls, "each rule of a firewall that drops is found, and its remedy mends it", |bed| {
            installed(bed, faults::firewall::FAULTS)
        });
        tests.add("each fault of the CNI installation is found", |bed| installed(bed, faults::cni::FAULTS));
        tests.add("a daemon that is down, hangs, is not ready or has a hanging worker is found", |bed| installed(bed, faults::daemon::FAULTS));
        tests.add("a daemon that does not know its node is not ready, and says why", not_ready);
        tests.add_if(tools, "a node that is silent, cut off, or behind a narrow path is found", |bed| installed(bed, faults::peers::FAULTS));
        let users = Need::All(&[Need::Program("setpriv"), Need::Root]);
        tests.add_if(users, "without root it says what it could not see, and finds no fault that is not there", without_root);
    })
}

/// A fault: how it is made, and the line that it must make.
pub struct Fault {
    /// What is done.
    name: &'static str,
    /// Does it, and gives what undoes it.
    make: for<'a> fn(&'a Ward<'a>) -> Try<Undo<'a>>,
    /// The line's check.
    check: &'static str,
    /// Its status.
    status: &'static str,
    /// Words of what is wrong and of its remedy.
    words: &'static [&'static str],
}

type Undo<'a> = Box<dyn FnOnce() -> Outcome + 'a>;

/// A node and how it is looked at.
pub struct Ward<'a> {
    bed: &'a Bed,
    lab: &'a Lab,
    node: &'a Node,
    settings: NodeSettings,
    places: PathBuf,
    visit: RefCell<Manner>,
}

/// How `podgate doctor` is run.
#[derive(Clone, Default)]
struct Manner {
    /// In front of it.
    wrapper: Vec<String>,
    /// Another configuration than the node's.
    config: Option<PathBuf>,
    /// Further words.
    further: Vec<String>,
}

/// What it printed.
struct Seen {
    code: Option<i32>,
    report: Value,
    printed: String,
}

impl<'a> Ward<'a> {
    fn new(bed: &'a Bed, lab: &'a Lab, settings: NodeSettings, further: &[&str]) -> Ward<'a> {
        let manner = Manner { further: further.iter().map(|word| (*word).to_owned()).collect(), ..Manner::default() };
        Ward { bed, lab, node: lab.node(1), settings, places: lab.directory().join("places"), visit: RefCell::new(manner) }
    }

    fn bin_dir(&self) -> PathBuf {
        self.places.join("bin")
    }

    fn conf_dir(&self) -> PathBuf {
        self.places.join("net.d")
    }

    fn command(&self) -> Command {
        let Manner { wrapper, config, further } = self.visit.borrow().clone();
        let binary = self.bed.binary();
        let mut command = match wrapper.split_first() {
            None => Command::new(&binary),
            Some((program, words)) => {
                let mut command = Command::new(program);
                command.args(words).arg(&binary);
                command
            }
        };
        command.arg("doctor").arg("--config").arg(config.unwrap_or_else(|| self.node.config()));
        command.arg("--bin-dir").arg(self.bin_dir()).arg("--conf-dir").arg(self.conf_dir()).args(further);
        command.env("PODGATE_SOCKET", self.node.socket()).stdin(Stdio::null());
        command
    }

    fn look(&self) -> Try<Seen> {
        let mut command = self.command();
        command.args(["-o", "json"]);
        let output = self.node.machine().run(|| command.output())??;
        let printed = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        let report = serde_json::from_slice(&output.stdout).map_err(|error| format!("no JSON ({error}): {printed}"))?;
        Ok(Seen { code: output.status.code(), report, printed })
    }

    /// Looks until `objection` has none.
    fn look_until(&self, what: &str, objection: impl Fn(&Seen) -> Option<String>) -> Outcome {
        let look = || match self.look() {
            Ok(seen) => objection(&seen),
            Err(error) => Some(error.to_string()),
        };
        Ok(wait_until(PATIENCE, || what.to_owned(), || Ok(look()))?)
    }

    /// Runs a program on the node, which must succeed.
    fn tool(&self, words: &str) -> Outcome {
        self.shell(&format!("exec {words}"))
    }

    /// Has a shell on the node do this, which must succeed.
    fn shell(&self, text: &str) -> Outcome {
        let mut command = Command::new("sh");
        command.args(["-c", text]).stdin(Stdio::null());
        let output = self.node.machine().run(|| command.output())??;
        if output.status.success() { Ok(()) } else { Err(format!("{text}: {}", String::from_utf8_lossy(&output.stderr)).into()) }
    }

    /// Both: now, and to undo it.
    fn tools<'b>(&'b self, now: &str, later: &'static str) -> Try<Undo<'b>> {
        self.shell(now)?;
        Ok(Box::new(move || self.shell(later)))
    }

    /// Looks in another manner until it is undone.
    fn manner<'b>(&'b self, change: impl FnOnce(&mut Manner)) -> Try<Undo<'b>> {
        let before = self.visit.borrow().clone();
        change(&mut self.visit.borrow_mut());
        Ok(Box::new(move || {
            *self.visit.borrow_mut() = before;
            Ok(())
        }))
    }

    /// Looks by the node's configuration as `edit` changes it.
    fn configured<'b>(&'b self, edit: impl FnOnce(String) -> String) -> Try<Undo<'b>> {
        let path = self.node.config().with_file_name("edited.yaml");
        std::fs::write(&path, edit(std::fs::read_to_string(self.node.config())?))?;
        self.manner(|manner| manner.config = Some(path))
    }

    /// Looks from behind a program that changes what one may do or see.
    fn wrapped<'b>(&'b self, words: &[&str]) -> Try<Undo<'b>> {
        self.manner(|manner| manner.wrapper = words.iter().map(|word| (*word).to_owned()).collect())
    }

    /// The lines that are not fine.
    fn all_fine(&self) -> Outcome {
        self.look_until("a report without a fault", |seen| {
            let bad: Vec<String> = seen.findings().filter(|finding| finding["status"] != "ok").map(Value::to_string).collect();
            match (seen.code, bad.is_empty()) {
                (Some(0), true) => None,
                _ => Some(format!("exit code {:?}, {}", seen.code, if bad.is_empty() { seen.printed.clone() } else { bad.join("\n") })),
            }
        })
    }

    /// Makes each fault, looks, undoes it, looks again.
    fn each(&self, faults: &[Fault]) -> Outcome {
        self.all_fine()?;
        let mut wrong = Vec::new();
        for fault in faults {
            let undo = (fault.make)(self).map_err(|error| format!("{}: cannot be made: {error}", fault.name))?;
            let found = self.look_until(fault.name, |seen| seen.lacks(fault));
            // With the fault in place nothing else can be said of the node: an undoing that fails ends the test.
            undo().map_err(|error| format!("{}: cannot be undone: {error}", fault.name))?;
            if let Err(error) = found {
                wrong.push(error.to_string());
            }
            self.all_fine().map_err(|error| format!("after {:?}: {error}", fault.name))?;
        }
        eprintln!("    {} of {} faults found", faults.len() - wrong.len(), faults.len());
        if wrong.is_empty() { Ok(()) } else { Err(wrong.join("\n").into()) }
    }
}

impl Seen {
    fn findings(&self) -> impl Iterator<Item = &Value> {
        self.report["findings"].as_array().into_iter().flatten()
    }

    /// What the report lacks of the line that `fault` should make.
    fn lacks(&self, fault: &Fault) -> Option<String> {
        let text =
            |finding: &Value| format!("{} → {}", finding["detail"].as_str().unwrap_or_default(), finding["remedy"].as_str().unwrap_or_default());
        let line = self.findings().find(|finding| {
            let is_it = finding["check"] == fault.check && finding["status"] == fault.status && finding["remedy"].is_string();
            is_it && fault.words.iter().all(|word| text(finding).contains(word))
        });
        let worst = if self.findings().any(|finding| finding["status"] == "failure") { 1 } else { 3 };
        match line {
            Some(_) if self.code == Some(worst) => None,
            Some(_) => Some(format!("exit code {:?}, where it should be {worst}", self.code)),
            None => {
                let bad: Vec<String> = self.findings().filter(|finding| finding["status"] != "ok").map(Value::to_string).collect();
                Some(format!("no {} of {} with {:?} in:\n{}", fault.status, fault.check, fault.words, bad.join("\n")))
            }
        }
    }
}

/// The shared cluster, with the plugin installed beside node-1.
fn installed_ward(bed: &Bed) -> Try<Ward<'_>> {
    let lab = bed.lab()?;
    let ward = Ward::new(bed, lab, lab.settings().clone(), &[]);
    let plugin = bed.plugin().display().to_string();
    let (bin, conf) = (ward.bin_dir().display().to_string(), ward.conf_dir().display().to_string());
    ward.node.podgate(&["install-cni", "--bin-dir", &bin, "--conf-dir", &conf, "--plugin", &plugin, "--wait=20"])?;
    Ok(ward)
}

fn installed(bed: &Bed, faults: &[Fault]) -> Outcome {
    installed_ward(bed)?.each(faults)
}

/// A node that is described, without a daemon or anything of one.
fn bare(bed: &Bed, faults: &[Fault]) -> Outcome {
    let lab = Lab::builder(bed.sandbox(), &bed.binary()).named("bare").nodes(1).machines()?;
    let settings = NodeSettings::default();
    lab.node(1).configure(&settings, &Lab::ranges())?;
    lab.node(1).write_manifest("nodes.yaml", &manifest::node(lab.node(1).spec()))?;
    Ward::new(bed, &lab, settings, &["--pre"]).each(faults)
}

fn healthy(bed: &Bed) -> Outcome {
    let ward = installed_ward(bed)?;
    ward.all_fine()?;
    let seen = ward.look()?;
    assert_eq!((&seen.report["schemaVersion"], &seen.report["status"]), (&Value::from(1), &Value::from("ok")), "{}", seen.printed);
    let groups: Vec<&str> = seen.findings().filter_map(|finding| finding["group"].as_str()).collect();
    for group in ["kernel", "configuration", "host", "firewall", "cluster", "cni", "daemon", "peers"] {
        assert!(groups.contains(&group), "no {group} in {groups:?}");
    }
    // What people see: a mark and nothing to do on every line.
    let mut command = ward.command();
    let output = ward.node.machine().run(|| command.output())??;
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.lines().filter(|line| line.starts_with("  ")).all(|line| line.starts_with("  √ ")), "{text}");
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    eprintln!("{text}");
    Ok(())
}

/// A node whose source has no word of it gets no pod range.
fn not_ready(bed: &Bed) -> Outcome {
    let lab = Lab::builder(bed.sandbox(), &bed.binary()).named("unknown").nodes(1).machines()?;
    let settings = NodeSettings::default();
    let node = lab.node(1);
    node.configure(&settings, &Lab::ranges())?;
    node.prepare()?;
    node.launch(&settings)?;
    let ward = Ward::new(bed, &lab, settings, &[]);
    let expected = |check, status, words| Fault { name: "", make: |_| unreachable!("it is there already"), check, status, words };
    for fault in [
        expected("ready", "failure", &["node-1 is not ready"]),
        expected("self-test", "warning", &["has not run yet"]),
        expected("problems", "warning", &["no pod range"]),
    ] {
        ward.look_until(fault.check, |seen| seen.lacks(&fault))?;
    }
    node.write_manifest("nodes.yaml", &manifest::node(node.spec()))?;
    node.wait_ready()?;
    ward.all_fine()
}

fn without_root(bed: &Bed) -> Outcome {
    let ward = installed_ward(bed)?;
    // The binary lies where only root may go, perhaps; a copy does not.
    let copy = Path::new("/run/podgate-of-all");
    std::fs::copy(bed.binary(), copy)?;
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"]).arg(copy).arg("doctor").arg("--config");
    command.arg(ward.node.config()).args(["-o", "json"]).stdin(Stdio::null());
    let output = ward.node.machine().run(|| command.output())??;
    let report: Value = serde_json::from_slice(&output.stdout).map_err(|error| format!("{error}: {output:?}"))?;
    let findings: Vec<&Value> = report["findings"].as_array().into_iter().flatten().collect();
    let of = |check: &str, status: &str| findings.iter().any(|finding| finding["check"] == check && finding["status"] == status);
    for (check, status) in [("capabilities", "warning"), ("namespaces", "warning"), ("daemon", "warning"), ("kernel", "ok"), ("local-rule", "ok")] {
        assert!(of(check, status), "no {status} of {check}: {report:#}");
    }
    assert!(findings.iter().all(|finding| finding["status"] != "failure"), "{report:#}");
    assert_eq!(output.status.code(), Some(3), "{report:#}");
    Ok(())
}
