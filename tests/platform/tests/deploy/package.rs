//! The Debian package and its units.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use podgate::lab::{Lab, Node, manifest as objects, wait_until};
use podgate_testbed::need::program;
use podgate_testbed::tool::{Ended, Running};
use podgate_testbed::traces::Host;
use podgate_testbed::{Bed, Outcome};

use crate::upgrade::pack;
use crate::{Try, deploy, workspace};

/// Where a unit's exposure must not be above, of ten (`systemd-analyze security`): CAP_SYS_ADMIN and CAP_NET_ADMIN alone make it 3.
const EXPOSURE_MAX: &str = "32";

/// What the maintainer scripts call, from busybox.
const APPLETS: [&str; 6] = ["chmod", "echo", "rm", "rmdir", "sh", "true"];

/// An empty root with a shell and an empty database of packages.
fn empty_root(root: &Path) -> Try<()> {
    for directory in ["bin", "dev/net", "proc", "sys", "run", "tmp", "var/lib/dpkg/info", "var/lib/dpkg/updates", "var/lib/dpkg/triggers", "etc"] {
        fs::create_dir_all(root.join(directory))?;
    }
    fs::copy(program("busybox").ok_or("no busybox")?, root.join("bin/busybox"))?;
    APPLETS.iter().try_for_each(|applet| symlink("busybox", root.join("bin").join(applet)))?;
    for file in ["status", "available"] {
        fs::write(root.join("var/lib/dpkg").join(file), "")?;
    }
    for directory in ["proc", "dev", "run"] {
        let from = Path::new("/").join(directory);
        mount(Some(&from), &root.join(directory), None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)?;
    }
    Ok(())
}

fn on(node: &Node, mut command: Command, patience: u64) -> Try<Ended> {
    // Maintainer scripts find what the package brought, and no service manager.
    command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    Ok(node.machine().run(|| Running::start(command, b""))??.end(Duration::from_secs(patience))?)
}

fn dpkg(node: &Node, root: &Path, arguments: &[&str]) -> Try<String> {
    let mut command = Command::new(program("dpkg").ok_or("no dpkg")?);
    command.arg(format!("--root={}", root.display())).args(["--force-bad-path", "--force-architecture"]).args(arguments);
    Ok(on(node, command, 120)?.success()?)
}

fn dpkg_deb(option: &str, package: &str) -> Try<String> {
    let mut command = Command::new("dpkg-deb");
    command.args([option, package]);
    Ok(Running::start(command, b"")?.end(Duration::from_secs(60))?.success()?)
}

fn installed(root: &Path, words: &[&str]) -> Command {
    let mut command = Command::new(program("chroot").unwrap_or_default());
    command.arg(root).args(words);
    command
}

/// Packs the Debian package into `directory`.
fn packed(directory: &Path) -> Try<PathBuf> {
    let directory = pack("deb", directory)?;
    let found = fs::read_dir(directory)?.flatten().map(|entry| entry.path()).find(|path| path.extension().is_some_and(|end| end == "deb"));
    Ok(found.ok_or("no package")?)
}

/// The Debian package, packed for the first test that asks.
pub fn deb(bed: &Bed) -> Try<PathBuf> {
    let directory = bed.sandbox().directory().join("deb");
    static PACKED: OnceLock<PathBuf> = OnceLock::new();
    if PACKED.get().is_none() {
        // Tests run one after the other, so nobody else has set it.
        let _ = PACKED.set(packed(&directory)?);
    }
    Ok(PACKED.get().cloned().ok_or("no package")?)
}

pub fn debian(bed: &Bed) -> Outcome {
    let lab = Lab::builder(bed.sandbox(), &bed.binary()).named("debian").nodes(1).machines()?;
    let node = lab.node(1);
    let (first, second) = (deb(bed)?, packed(&lab.directory().join("second"))?);
    assert!(fs::read(&first)? == fs::read(second)?, "the same input did not give the same package");
    let deb = first.display().to_string();
    let about = dpkg_deb("-I", &deb)?;
    for word in ["Package: podgate", "Section: net", "conffiles", "postinst", "prerm", "postrm"] {
        assert!(about.contains(word), "{about}");
    }
    let files = dpkg_deb("-c", &deb)?;
    for file in [
        "./usr/bin/podgate",
        "./usr/bin/podgate-cni",
        "./usr/lib/systemd/system/podgate.service",
        "./usr/lib/systemd/system/podgate-prepare.service",
        "./etc/podgate/podgate.yaml",
        "./usr/share/man/man1/podgate-run.1.gz",
        "./usr/share/bash-completion/completions/podgate",
        "./usr/share/doc/podgate/copyright",
    ] {
        assert!(files.lines().any(|line| line.ends_with(&format!(" {file}")) && line.contains("root/root")), "{file} is not in {files}");
    }

    let host = || Host::of(node.machine());
    let before = host()?;
    let root = lab.directory().join("root");
    empty_root(&root)?;
    dpkg(node, &root, &["--install", &deb])?;
    assert_eq!(on(node, installed(&root, &["/usr/bin/podgate", "version"]), 10)?.success()?.trim(), format!("podgate {}", env!("CARGO_PKG_VERSION")));
    // The node is described, as the package asks for, and the units' commands are run.
    let config = root.join("etc/podgate/podgate.yaml");
    let ranges = Lab::ranges();
    let text = format!(
        "node: {}\nunderlay: {{address: {}}}\npodCIDRs: {}\nserviceCIDRs: {}\nsource: {{directory: /etc/podgate/cluster.d}}\nworkers: {{count: 2}}\n",
        node.name(),
        node.machine().addresses().v4,
        ranges.pods,
        ranges.services
    );
    fs::write(&config, text)?;
    fs::write(root.join("etc/podgate/cluster.d/node.yaml"), objects::node(node.spec()))?;
    let commands = |unit: &str| -> Try<Vec<String>> {
        let unit = fs::read_to_string(root.join("usr/lib/systemd/system").join(unit))?;
        let line = unit.lines().find_map(|line| line.strip_prefix("ExecStart=")).ok_or("no ExecStart")?;
        Ok(line.split_whitespace().map(str::to_owned).collect())
    };
    let prepare = commands("podgate-prepare.service")?;
    on(node, installed(&root, &prepare.iter().map(String::as_str).collect::<Vec<_>>()), 20)?.success()?;
    let daemon = Daemon::start(node, &root, &commands("podgate.service")?)?;
    daemon.becomes_ready()?;
    assert_ne!(host()?, before);
    daemon.stop()?;
    assert_ne!(host()?, before, "a gateway that was stopped leaves everything to its successor");

    dpkg(node, &root, &["--remove", "podgate"])?;
    let left = host()?.differs(&before);
    assert!(left.is_empty(), "removing the package leaves something behind: {left:#?}");
    assert!(!root.join("usr/bin/podgate").exists() && config.exists() && root.join("var/lib/podgate").exists());
    dpkg(node, &root, &["--purge", "podgate"])?;
    assert!(!config.exists() && !root.join("var/lib/podgate").exists() && !root.join("run/podgate").exists());
    Ok(())
}

/// A gateway under a service manager, which this test plays.
struct Daemon {
    child: Child,
    manager: UnixDatagram,
}

impl Daemon {
    fn start(node: &Node, root: &Path, words: &[String]) -> Try<Daemon> {
        let notify = root.join("tmp/notify");
        let manager = UnixDatagram::bind(&notify)?;
        manager.set_read_timeout(Some(Duration::from_secs(20)))?;
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        // The unit's bounding set, without the means to get out of it.
        let unit = deploy("systemd/podgate.service")?;
        let capabilities = unit.lines().find_map(|line| line.strip_prefix("CapabilityBoundingSet=")).ok_or("no CapabilityBoundingSet")?;
        let names: String = capabilities.split_whitespace().map(|name| format!(",+{}", name.trim_start_matches("CAP_").to_lowercase())).collect();
        let inside = installed(root, &words);
        let mut command = Command::new(program("setpriv").ok_or("no setpriv")?);
        // To enter the root takes a capability that the gateway does not have: chroot(1) goes first, and setpriv is not in there. So the set is
        // the unit's and CAP_SYS_CHROOT.
        command.args([&format!("--bounding-set=-all{names},+sys_chroot"), "--inh-caps=-all", "--no-new-privs"]);
        command.arg(inside.get_program()).args(inside.get_args());
        command.env_clear().env("NOTIFY_SOCKET", "/tmp/notify").env("WATCHDOG_USEC", "2000000").stdin(Stdio::null());
        let log = fs::File::create(root.join("tmp/log"))?;
        command.stdout(Stdio::null()).stderr(log);
        Ok(Daemon { child: node.machine().run(|| command.spawn())??, manager })
    }

    fn hear(&self) -> Try<String> {
        let mut buffer = [0; 256];
        let len = self.manager.recv(&mut buffer).map_err(|error| format!("nothing was heard of the gateway: {error}"))?;
        Ok(String::from_utf8_lossy(&buffer[..len]).into_owned())
    }

    /// It says that it runs, then that it forwards, and again and again that it is alive.
    fn becomes_ready(&self) -> Outcome {
        let mut heard = Vec::new();
        while !(heard.contains(&"STATUS=forwarding".to_owned()) && heard.iter().filter(|text| *text == "WATCHDOG=1").count() >= 3) {
            heard.push(self.hear().map_err(|error| format!("{error}, after {heard:?}"))?);
        }
        let at = |text: &str| heard.iter().position(|known| known == text);
        assert!(at("READY=1") < at("STATUS=forwarding") && at("READY=1").is_some(), "{heard:?}");
        Ok(())
    }

    fn stop(mut self) -> Outcome {
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM)?;
        while self.hear()? != "STOPPING=1" {}
        let failed = |source| podgate::lab::LabError::Program { what: "the end of the gateway".into(), source };
        wait_until(
            Duration::from_secs(10),
            || "the end of the gateway".into(),
            || Ok(self.child.try_wait().map_err(failed)?.is_none().then(|| "it runs".into())),
        )?;
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill().and_then(|()| self.child.wait());
    }
}

pub fn units(bed: &Bed) -> Outcome {
    let root = bed.sandbox().directory().join("units");
    let units = root.join("usr/lib/systemd/system");
    fs::create_dir_all(&units)?;
    fs::create_dir_all(root.join("usr/bin"))?;
    fs::write(root.join("usr/bin/podgate"), "#!/bin/sh\n")?;
    fs::set_permissions(root.join("usr/bin/podgate"), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    for name in ["podgate-prepare.service", "podgate.service"] {
        fs::copy(workspace("deploy/systemd").join(name), units.join(name))?;
    }
    let gateway = units.join("podgate.service").display().to_string();
    let mut command = Command::new("systemd-analyze");
    command.args(["security", "--offline=true", &format!("--threshold={EXPOSURE_MAX}"), "--no-pager", &gateway]);
    let security = Running::start(command, b"")?.end(Duration::from_secs(30))?;
    let level = security.stdout.lines().find(|line| line.contains("Overall exposure level")).unwrap_or_default();
    eprintln!("    {}", level.trim());
    security.success()?;
    let mut command = Command::new("systemd-analyze");
    command.args(["verify", "--man=no", &format!("--root={}", root.display()), "podgate.service"]);
    let verified = Running::start(command, b"")?.end(Duration::from_secs(30))?;
    // What it says of units that this root does not have is not about ours.
    let ours: Vec<&str> =
        verified.stderr.lines().chain(verified.stdout.lines()).filter(|line| line.contains("podgate") && !line.contains("not found")).collect();
    assert!(ours.is_empty(), "{ours:#?}");
    Ok(())
}
