//! `podgate demo` as a newcomer and as a script meet it, and that nothing of it is left, however it ends.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use nix::mount::{MsFlags, mount, umount};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::unistd::Pid;
use podgate::lab::wait_until;
use podgate_testbed::{Bed, Need, Outcome, run};
use serde_json::Value;

/// Generous for a busy machine: unoptimised and with a tenth of a CPU.
const PATIENCE: Duration = Duration::from_secs(120);

fn main() -> ExitCode {
    run(|tests| {
        tests.add("the demo as JSON has every check, stays with commands that work, and Ctrl-C takes it away", keep);
        tests.add("Ctrl-C while it is being built takes everything away", |bed| interrupted(bed, Signal::SIGINT));
        tests.add("kill -9 while it is being built takes everything away", |bed| interrupted(bed, Signal::SIGKILL));
        tests.add_if(Need::Program("setpriv"), "a user without privileges sees the same demo", rootless);
    })
}

/// A running demo.
struct Demo {
    child: Child,
    progress: Receiver<String>,
}

impl Demo {
    fn start(command: &mut Command) -> Result<Demo, Box<dyn std::error::Error>> {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let stderr = BufReader::new(child.stderr.take().ok_or("no stderr")?);
        let (lines, progress) = channel();
        std::thread::spawn(move || stderr.lines().map_while(Result::ok).try_for_each(|line| lines.send(line)));
        Ok(Demo { child, progress })
    }

    /// The lines of stderr up to one that holds `text`.
    fn until(&self, text: &str) -> Result<Vec<String>, Box<dyn std::error::Error>> {
        let mut lines = Vec::new();
        while !lines.last().is_some_and(|line: &String| line.contains(text)) {
            let line = self.progress.recv_timeout(PATIENCE).map_err(|_| format!("no line with {text:?} came after {lines:#?}"))?;
            lines.push(line);
        }
        Ok(lines)
    }

    /// The one JSON value on stdout, which may stay open.
    fn json(&mut self) -> Result<Value, Box<dyn std::error::Error>> {
        let stdout = self.child.stdout.take().ok_or("no stdout")?;
        let mut values = serde_json::Deserializer::from_reader(stdout).into_iter();
        Ok(values.next().ok_or("nothing on stdout")??)
    }

    /// Sends `signal`; every process of the demo must go.
    fn ends_with(mut self, signal: Signal) -> Result<Option<i32>, Box<dyn std::error::Error>> {
        let family = descendants(self.child.id());
        assert!(family.len() >= 2, "the demo has no processes: {family:?}");
        kill(Pid::from_raw(self.child.id() as i32), signal)?;
        let code = self.child.wait()?.code();
        wait_until(
            Duration::from_secs(5),
            || format!("the end of every process of the demo after {signal}"),
            || {
                let left: Vec<_> = parents().into_keys().filter(|pid| family.contains(pid)).collect();
                Ok((!left.is_empty()).then(|| format!("{left:?} of {family:?} are there")))
            },
        )?;
        Ok(code)
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        // Its namespaces end with it.
        let _ = self.child.kill().and_then(|()| self.child.wait());
    }
}

/// Every process that runs here, with its parent (proc_pid_stat(5)). What only waits to be reaped counts for nothing.
fn parents() -> BTreeMap<u32, u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter_map(|pid| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name before may hold anything, so what follows is counted from its end.
        let mut fields = stat.rsplit_once(") ")?.1.split(' ');
        (fields.next()? != "Z").then_some((pid, fields.next()?.parse().ok()?))
    })
    .collect()
}

fn descendants(root: u32) -> BTreeSet<u32> {
    let parents = parents();
    let mut found = BTreeSet::from([root]);
    loop {
        let more: Vec<u32> = parents.iter().filter(|(pid, parent)| found.contains(parent) && !found.contains(pid)).map(|(pid, _)| *pid).collect();
        if more.is_empty() {
            return found;
        }
        found.extend(more);
    }
}

/// The shape that scripts rely on, and that everything of the demo is in it.
fn complete(report: &Value) -> Outcome {
    let checks = report["checks"].as_array().ok_or("no checks")?;
    let failed: Vec<&Value> = checks.iter().filter(|check| check["ok"] != true).collect();
    assert!(report["ok"] == true && failed.is_empty(), "{failed:#?}");
    let names: BTreeSet<&str> = checks.iter().filter_map(|check| check["name"].as_str()).collect();
    assert_eq!(names.len(), checks.len(), "every check has a name of its own");
    assert!(checks.iter().all(|check| check["detail"].as_str().is_some_and(|detail| !detail.is_empty())), "every check says what was seen");
    assert!(report["schemaVersion"].is_u64());
    // A bug in the table of paths could only make it shorter.
    let paths = checks.iter().filter(|check| check["latencyMicros"].is_u64() && check["group"] != "gateways").count();
    assert_eq!(paths, 31 * 5 * 2, "31 paths, 5 probes, 2 families");
    for key in ["nodes", "spread", "throughput", "workers", "drops"] {
        assert!(report[key].as_array().is_some_and(|rows| !rows.is_empty()), "{key}: {}", report[key]);
    }
    for worker in report["workers"].as_array().into_iter().flatten() {
        assert!(worker["averageFrameBytes"].as_u64() > Some(1500), "no superframes: {worker}");
    }
    Ok(())
}

fn keep(bed: &Bed) -> Outcome {
    let mut demo = Demo::start(Command::new(bed.binary()).args(["demo", "--keep", "-o", "json"]))?;
    complete(&demo.json()?)?;
    let lines = demo.until("Every machine's namespace is in")?;
    let commands: Vec<&str> = lines.iter().filter_map(|line| line.strip_prefix("  ")?.split('#').next()).collect();
    let mut tried = 0;
    for command in commands.iter().filter(|command| command.contains(" --socket ") || command.starts_with("ls ")) {
        let output = Command::new("sh").args(["-c", command]).env_remove("PATH").env("PATH", "/bin:/usr/bin").output()?;
        assert!(output.status.success() && !output.stdout.is_empty(), "{command}: {output:?}");
        tried += 1;
    }
    assert_eq!(tried, 4, "status, flows, trace and ls are offered: {lines:#?}");
    // 128 and the signal's number, as shells have it.
    assert_eq!(demo.ends_with(Signal::SIGINT)?, Some(130));
    Ok(())
}

fn interrupted(bed: &Bed, signal: Signal) -> Outcome {
    let demo = Demo::start(Command::new(bed.binary()).arg("demo"))?;
    demo.until("attaching pods")?;
    let code = demo.ends_with(signal)?;
    assert_eq!(code, if signal == Signal::SIGKILL { None } else { Some(130) });
    Ok(())
}

/// `/dev/net` with a TUN that everybody may open, as most distributions have it, until this is dropped.
struct OpenTun;

impl OpenTun {
    fn new() -> nix::Result<OpenTun> {
        mount(Some("none"), "/dev/net", Some("tmpfs"), MsFlags::empty(), None::<&str>)?;
        let open = OpenTun;
        let everybody = Mode::from_bits_truncate(0o666);
        // Documentation/admin-guide/devices.txt: 10:200.
        mknod("/dev/net/tun", SFlag::S_IFCHR, everybody, makedev(10, 200))?;
        fs::set_permissions("/dev/net/tun", fs::Permissions::from_mode(0o666)).map_err(|_| nix::Error::EPERM)?;
        Ok(open)
    }
}

impl Drop for OpenTun {
    fn drop(&mut self) {
        // What stays mounted goes with the sandbox.
        let _ = umount("/dev/net");
    }
}

fn rootless(bed: &Bed) -> Outcome {
    if !bed.sandbox().is_privileged() {
        eprintln!("    all of these tests ran without privileges");
        return Ok(());
    }
    let _tun = OpenTun::new()?;
    // Where the workspace lies need not be open to everybody, and a demo hides `/run` from itself.
    let binary = Path::new("/dev/net/podgate");
    fs::copy(bed.binary(), binary)?;
    fs::set_permissions(binary, fs::Permissions::from_mode(0o755))?;
    let mut command = Command::new("setpriv");
    command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]).arg(binary).args(["demo", "-o", "json"]).current_dir("/");
    let mut demo = Demo::start(&mut command)?;
    let report = demo.json()?;
    let refused = report["checks"][0]["detail"].as_str().filter(|detail| detail.contains("does not let its users make namespaces"));
    if let Some(refused) = refused {
        eprintln!("    not tried, for this kernel refuses: {refused}");
        return Ok(());
    }
    complete(&report)?;
    assert!(demo.child.wait()?.success());
    Ok(())
}
