//! A machine of the lab with the real systemd as process 1 on a root of its own: a virtual machine, as far as packages and units can tell.
//!
//! Its root is an overlay of the machine's root, whatever is installed there and none of what is configured to run; what it writes is kept apart
//! and goes with it. Its cgroups are below one that is made for it. It is set up as systemd's container interface asks for
//! (<https://systemd.io/CONTAINER_INTERFACE/>): API file systems mounted, `/sys` read-only, `container` in the environment.
//!
//! Read first: namespaces(7), cgroup_namespaces(7), pivot_root(2), the kernel's `Documentation/filesystems/overlayfs.rst`.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, symlink};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use podgate::lab::{LabError, Machine, Sandbox};
use podgate_runtime::netns::{Netns, NetnsError};

use crate::need::program;
use crate::tool::{Ended, Running, ToolError};

/// How long systemd may take to start everything, and a command to end.
const PATIENCE: Duration = Duration::from_secs(60);

/// The service manager, where every distribution with one root for all has it.
const SYSTEMD: &str = "/lib/systemd/systemd";

/// What process 1 does before it becomes systemd: `/proc` is of its namespace only if it mounts it, and of the kernel's settings only those of its own
/// network are its to change.
const INIT: &str = "mount -t proc proc /proc
    mount --bind /proc/sys/net /run/host/net
    mount --bind /proc/sys /proc/sys
    mount -o remount,bind,ro /proc/sys
    mount --bind /run/host/net /proc/sys/net
    umount /run/host/net
    exec /lib/systemd/systemd --unit=multi-user.target";

/// Where every such machine's cgroup begins its name.
const CGROUP: &str = "podgate-vm-";

/// What is empty at first, whatever the machine has there: what it runs, what it logged, what it could download, and where people put things.
const EMPTY: [&str; 9] =
    ["etc/init.d", "etc/systemd/system", "root", "srv", "tmp", "var/lib/apt/lists", "var/lib/containers", "var/lib/etcd", "var/log"];

/// Units that would set up the machine which all of these share: its kernel's settings, modules, devices and clock.
const MASKED: [&str; 8] = [
    "systemd-hwdb-update.service",
    "systemd-modules-load.service",
    "systemd-random-seed.service",
    "systemd-sysctl.service",
    "systemd-timesyncd.service",
    "systemd-udev-trigger.service",
    "systemd-udevd.service",
    "sys-fs-fuse-connections.mount",
];

/// Why a machine could not be booted, or does not do what it is told.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// A file, a mount or a namespace could not be had.
    #[error("cannot {what} for {name}: {source}; it takes root, overlayfs and cgroup2")]
    Make {
        /// The machine.
        name: String,
        /// What was tried.
        what: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// It did not come up.
    #[error("{name} did not boot ({why}); it said: {said}")]
    Boot {
        /// The machine.
        name: String,
        /// What is known of it.
        why: String,
        /// What it wrote to its console and into its journal.
        said: String,
    },
    /// A command could not be run to its end, or failed.
    #[error(transparent)]
    Tool(Box<ToolError>),
    /// The machine of the lab could not be entered.
    #[error(transparent)]
    Lab(Box<LabError>),
}

impl From<ToolError> for VmError {
    fn from(error: ToolError) -> VmError {
        VmError::Tool(Box::new(error))
    }
}

impl From<LabError> for VmError {
    fn from(error: LabError) -> VmError {
        VmError::Lab(Box::new(error))
    }
}

/// A booted machine. It is switched off when this is dropped.
#[derive(Debug)]
pub struct Vm {
    name: String,
    upper: PathBuf,
    init: Child,
    cgroup: Cgroup,
}

/// What is missing on this machine for it, if anything is.
pub(crate) fn missing(sandbox: &Sandbox) -> Option<String> {
    if !Path::new(SYSTEMD).is_file() {
        return Some("there is no systemd here".into());
    }
    if let Some(name) = ["nsenter", "systemctl"].into_iter().find(|name| program(name).is_none()) {
        return Some(format!("there is no `{name}` here"));
    }
    // The two that not every kernel or container has, tried where nobody sees it.
    let tried = std::thread::scope(|scope| {
        let directory = sandbox.directory().join("vm-trial");
        let thread = scope.spawn(move || -> Result<(), VmError> {
            let failed = failed("a trial");
            unshare(CloneFlags::CLONE_NEWNS).map_err(|errno| failed("unshare the mounts".into(), errno.into()))?;
            let root = root(&directory, &failed)?;
            if !root.join(SYSTEMD.trim_start_matches('/')).exists() {
                // What is mounted below the root is not in an overlay of it.
                return Err(failed(format!("find {SYSTEMD} on the root's own file system"), io::ErrorKind::NotFound.into()));
            }
            let cgroup = Cgroup::make("trial", &directory)?;
            cgroup.remove();
            Ok(())
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    tried.err().map(|error| format!("systemd cannot be booted here: {error}"))
}

impl Vm {
    /// Boots systemd on `machine`, in its network, with `directory` for what it writes; returns when everything is started.
    pub fn boot(machine: &Machine, directory: &Path) -> Result<Vm, VmError> {
        let name = machine.name().to_owned();
        let failed = failed(&name);
        let start = Instant::now();
        // A thread with namespaces of its own makes the root and becomes its inhabitant; the child is born as process 1.
        let cgroup = Cgroup::make(&name, directory)?;
        let (init, manager) = machine.run(|| -> Result<(Child, UnixDatagram), VmError> {
            let flags = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWIPC;
            unshare(flags).map_err(|errno| failed("make namespaces".into(), errno.into()))?;
            let root = root(directory, &failed)?;
            nix::unistd::sethostname(&name).map_err(|errno| failed("set the host's name".into(), errno.into()))?;
            furnish(&root, &name, &failed)?;
            let manager = UnixDatagram::bind(root.join("run/host/notify")).map_err(|source| failed("listen to systemd".into(), source))?;
            let console = File::create(directory.join("console")).and_then(|file| Ok([file.try_clone()?, file]));
            let console = console.map_err(|source| failed("make its console".into(), source))?;
            Ok((cgroup.birth(&root, console, &failed)?, manager))
        })??;
        let vm = Vm { name, upper: directory.join("upper"), init, cgroup };
        vm.wait_booted(&manager)?;
        eprintln!("    {} booted systemd in {} ms", vm.name, start.elapsed().as_millis());
        Ok(vm)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where a path of its is seen from here.
    pub fn path(&self, path: &str) -> PathBuf {
        Path::new("/proc").join(self.init.id().to_string()).join("root").join(path.trim_start_matches('/'))
    }

    /// A network namespace that is mounted in it.
    pub fn netns(&self, path: &str) -> Result<Netns, NetnsError> {
        Netns::open(self.path(path))
    }

    /// Runs shell commands as root, in root's home; the first that fails ends it. All that it prints is in one piece, as a terminal shows it.
    pub fn sh(&self, script: &str) -> Result<Ended, VmError> {
        let mut command = Command::new(program("nsenter").unwrap_or_default());
        command.args(["--target", &self.init.id().to_string(), "--all", "--wdns=/root", "sh", "-ec", &format!("exec 2>&1\n{script}")]);
        command.env_clear().envs([
            ("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
            ("HOME", "/root"),
            ("LANG", "C.UTF-8"),
            ("DEBIAN_FRONTEND", "noninteractive"),
        ]);
        // Its processes belong to it as those of a login do.
        let running = self
            .cgroup
            .inside("init.scope", || Running::start(command, b""))
            .map_err(|source| failed(&self.name)("enter its cgroup".into(), source))?;
        Ok(running?.end(PATIENCE)?)
    }

    /// The same, which must succeed; what it printed.
    pub fn ok(&self, script: &str) -> Result<String, VmError> {
        let ended = self.sh(script)?;
        if ended.status.success() {
            return Ok(ended.stdout);
        }
        let printed = format!("{}\n{}", ended.printed(), self.journal(40));
        Err(ToolError::Failed { what: format!("on {}: {script}", self.name), status: ended.status, printed }.into())
    }

    /// The last lines of its journal.
    pub fn journal(&self, lines: usize) -> String {
        self.sh(&format!("journalctl --no-pager --boot --lines={lines}")).map_or_else(|error| error.to_string(), |ended| ended.stdout)
    }

    /// The files, directories and links that it has made, changed or removed, with what is known of each, except below `but`.
    pub fn written(&self, but: &[&str]) -> io::Result<Vec<String>> {
        let mut found = Vec::new();
        let mut left = vec![self.upper.clone()];
        while let Some(directory) = left.pop() {
            for entry in fs::read_dir(&directory)? {
                let (entry, path) = entry.map(|entry| (entry.metadata(), entry.path()))?;
                let (entry, shown) = (entry?, path.strip_prefix(&self.upper).unwrap_or(&path).to_owned());
                if but.iter().any(|but| shown.starts_with(but.trim_start_matches('/'))) {
                    continue;
                }
                if entry.is_dir() {
                    left.push(path);
                    // One that holds something new is there as well, with what it was before.
                    let before = fs::symlink_metadata(Path::new("/").join(&shown));
                    if !before.is_ok_and(|before| before.mode() == entry.mode()) {
                        found.push(format!("/{} {:o}", shown.display(), entry.mode()));
                    }
                } else {
                    found.push(format!("/{} {:o} {} bytes", shown.display(), entry.mode(), entry.len()));
                }
            }
        }
        found.sort();
        Ok(found)
    }

    /// systemd says READY=1 when everything that belongs to its target has been started.
    fn wait_booted(&self, manager: &UnixDatagram) -> Result<(), VmError> {
        let said = || fs::read_to_string(self.upper.with_file_name("console")).unwrap_or_default();
        let failed = |why: String| VmError::Boot { name: self.name.clone(), why, said: format!("{}\n{}", said(), self.journal(60)) };
        let deadline = Instant::now() + PATIENCE;
        let mut buffer = [0; 4096];
        loop {
            let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            manager.set_read_timeout(Some(left)).map_err(|error| failed(error.to_string()))?;
            let len = manager.recv(&mut buffer).map_err(|error| failed(format!("nothing was heard of it: {error}")))?;
            if String::from_utf8_lossy(&buffer[..len]).lines().any(|line| line == "READY=1") {
                return Ok(());
            }
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // With process 1 everything in it ends, and the kernel has ended it all when that one can be waited for (pid_namespaces(7)).
        let _ = self.init.kill().and_then(|()| self.init.wait());
        self.cgroup.remove();
    }
}

/// For `map_err`: what was tried for the machine `name`, and what the kernel said.
fn failed(name: &str) -> impl Fn(String, io::Error) -> VmError + use<> {
    let name = name.to_owned();
    move |what, source| VmError::Make { name: name.clone(), what, source }
}

type Fail<'a> = dyn Fn(String, io::Error) -> VmError + 'a;

fn put(kind: &str, at: &Path, flags: MsFlags, data: &str, failed: &Fail<'_>) -> Result<(), VmError> {
    fs::create_dir_all(at).map_err(|source| failed(format!("make {}", at.display()), source))?;
    mount(Some(kind), at, Some(kind), flags, Some(data)).map_err(|errno| failed(format!("mount {kind} on {}", at.display()), errno.into()))
}

/// Mounts the root in `directory`, as far as it is an overlay, and gives its place. To be called in a mount namespace of its own.
fn root(directory: &Path, failed: &Fail<'_>) -> Result<PathBuf, VmError> {
    let [upper, work, root] = ["upper", "work", "root"].map(|name| directory.join(name));
    for path in [&upper, &work] {
        fs::create_dir_all(path).map_err(|source| failed(format!("make {}", path.display()), source))?;
    }
    put("overlay", &root, MsFlags::empty(), &format!("lowerdir=/,upperdir={},workdir={}", upper.display(), work.display()), failed)?;
    Ok(root)
}

/// Mounts what a kernel gives a booting machine, and hides what the machine is configured to run.
fn furnish(root: &Path, name: &str, failed: &Fail<'_>) -> Result<(), VmError> {
    let none = MsFlags::empty();
    put("sysfs", &root.join("sys"), MsFlags::MS_RDONLY, "", failed)?;
    put("tmpfs", &root.join("dev"), none, "mode=755", failed)?;
    put("devpts", &root.join("dev/pts"), none, "newinstance,ptmxmode=0666,mode=620", failed)?;
    put("tmpfs", &root.join("dev/shm"), none, "mode=1777", failed)?;
    put("tmpfs", &root.join("run"), none, "mode=755", failed)?;
    for directory in EMPTY.map(|directory| root.join(directory)) {
        // Whose it is stays: some belong to a service's user.
        let options = fs::metadata(&directory).map(|is| format!("mode={:o},uid={},gid={}", is.mode() & 0o7777, is.uid(), is.gid()));
        put("tmpfs", &directory, none, &options.unwrap_or_default(), failed)?;
    }
    let bind = |from: &Path, at: &Path, flags: MsFlags| {
        mount(Some(from), at, None::<&str>, MsFlags::MS_BIND | flags, None::<&str>)
            .map_err(|errno| failed(format!("mount {} on {}", from.display(), at.display()), errno.into()))
    };
    for device in ["full", "net/tun", "null", "random", "tty", "urandom", "zero"] {
        let at = root.join("dev").join(device);
        let made = fs::create_dir_all(at.parent().unwrap_or(root)).and_then(|()| File::create(&at));
        made.map_err(|source| failed(format!("make {}", at.display()), source))?;
        bind(&Path::new("/dev").join(device), &at, none)?;
    }
    let link = |to: &str, at: &str| symlink(to, root.join(at)).map_err(|source| failed(format!("link {at}"), source));
    let write = |at: &str, text: &str| fs::write(root.join(at), text).map_err(|source| failed(format!("write {at}"), source));
    let host = root.join("run/host/net");
    fs::create_dir_all(&host).map_err(|source| failed(format!("make {}", host.display()), source))?;
    link("pts/ptmx", "dev/ptmx")?;
    for unit in MASKED {
        link("/dev/null", &format!("etc/systemd/system/{unit}"))?;
    }
    write("etc/fstab", "")?;
    write("etc/machine-id", "")?;
    write("etc/hostname", &format!("{name}\n"))
}

/// The cgroup that is the root of such a machine's, in the unified hierarchy. A descriptor that is locked says that it is in use.
#[derive(Debug)]
struct Cgroup {
    path: PathBuf,
    hierarchy: PathBuf,
    _lock: Flock<File>,
}

impl Cgroup {
    /// For the machine `name`. What is left of those whose test was killed is swept up.
    fn make(name: &str, directory: &Path) -> Result<Cgroup, VmError> {
        let failed = failed(name);
        let hierarchy = directory.join("cgroup");
        put("cgroup2", &hierarchy, MsFlags::empty(), "", &failed)?;
        for entry in fs::read_dir(&hierarchy).map_err(|source| failed("read the cgroups".into(), source))?.flatten() {
            if entry.file_name().to_string_lossy().starts_with(CGROUP)
                && let Ok(left) = File::open(entry.path())
                && let Ok(_lock) = Flock::lock(left, FlockArg::LockExclusiveNonblock)
            {
                remove_cgroups(&entry.path());
            }
        }
        // The namespace of the sandbox tells it from other tests'.
        let own = fs::metadata("/proc/self/ns/pid").map_err(|source| failed("read /proc/self/ns/pid".into(), source))?.ino();
        let path = hierarchy.join(format!("{CGROUP}{own}-{name}"));
        // Another test may sweep it up before it is locked.
        loop {
            match fs::create_dir(&path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(format!("make {}", path.display()), error)),
                _ => {}
            }
            let Ok(made) = File::open(&path) else { continue };
            let lock = Flock::lock(made, FlockArg::LockExclusive).map_err(|(_, errno)| failed("lock its cgroup".into(), errno.into()))?;
            if path.exists() {
                return Ok(Cgroup { path, hierarchy, _lock: lock });
            }
        }
    }

    /// Starts systemd on `root`, which becomes the root of the calling thread, in this cgroup, which becomes that of its namespace.
    fn birth(&self, root: &Path, console: [File; 2], failed: &Fail<'_>) -> Result<Child, VmError> {
        let nix = |what: &'static str| move |errno: nix::Error| failed(what.into(), errno.into());
        let [console, console_too] = console;
        let born = self.inside("", || -> Result<Child, VmError> {
            unshare(CloneFlags::CLONE_NEWCGROUP).map_err(nix("make a namespace for cgroups"))?;
            put("cgroup2", &root.join("sys/fs/cgroup"), MsFlags::empty(), "", failed)?;
            // pivot_root(2): the old root on top of the new one, then away.
            nix::unistd::chdir(root).map_err(nix("enter its root"))?;
            nix::unistd::pivot_root(".", ".").map_err(nix("change the root"))?;
            umount2(".", MntFlags::MNT_DETACH).map_err(nix("leave the old root"))?;
            nix::unistd::chdir("/").map_err(nix("enter its root"))?;
            let mut command = Command::new("/bin/sh");
            command.args(["-ec", INIT]).env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
            command.env("container", "podgate-testbed").env("NOTIFY_SOCKET", "/run/host/notify");
            command.stdin(Stdio::null()).stdout(console).stderr(console_too);
            command.spawn().map_err(|source| failed("start systemd".into(), source))
        });
        born.map_err(|source| failed("enter its cgroup".into(), source))?
    }

    /// Has this process in the cgroup for as long as `work` takes: a process is born where its parent is.
    fn inside<T>(&self, below: &str, work: impl FnOnce() -> T) -> io::Result<T> {
        // Opened now: `work` may change what is mounted.
        let open = |path: &Path| fs::OpenOptions::new().write(true).open(path.join("cgroup.procs"));
        let move_to = |mut file: File| io::Write::write_all(&mut file, b"0");
        let text = fs::read_to_string("/proc/self/cgroup")?;
        let own = text.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
        let (there, back) = (open(&self.path.join(below))?, open(&self.hierarchy.join(own))?);
        move_to(there)?;
        let done = work();
        move_to(back)?;
        Ok(done)
    }

    fn remove(&self) {
        remove_cgroups(&self.path);
    }
}

/// Removes an empty cgroup and those below it. One that is in use stays.
fn remove_cgroups(path: &Path) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten().filter(|entry| entry.path().is_dir()) {
        remove_cgroups(&entry.path());
    }
    let _ = fs::remove_dir(path);
}
