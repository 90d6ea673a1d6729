//! A place for a cluster that cannot leave anything behind: namespaces for processes, mounts and network, made before anything else.
//!
//! [`enter`] starts this very program again as process 1 of a new PID namespace, with mounts and a network of its own and a tmpfs
//! on `/run`. When that process ends, however it ends, the kernel ends every daemon of the cluster, and with the last of them go the
//! network namespaces, the bind mounts and the files. Nothing needs to be tidied up, so a panic, a `kill -9` and Ctrl-C are
//! all alike. Without root the same is done in a user namespace in which the caller is root.
//!
//! Read first: namespaces(7), pid_namespaces(7), user_namespaces(7).

use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::{Pid, getegid, geteuid};

/// Names the PID namespace of the process that made the sandbox, for the one inside.
const MARK: &str = "PODGATE_SANDBOX";

/// Proof that the calling process is inside a sandbox of its own.
#[derive(Debug)]
pub struct Sandbox {
    directory: PathBuf,
    outer_pid: u32,
    privileged: bool,
}

/// Where [`enter`] returned.
#[derive(Debug)]
pub enum Entered {
    /// In the sandbox: go on.
    Inside(Sandbox),
    /// Outside, with everything over: this is how the program is to exit.
    Outside(ExitCode),
}

/// Why there is no sandbox.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The TUN device cannot be had.
    #[error("cannot open /dev/net/tun: {source}; {hint}")]
    Tun {
        /// What the kernel said.
        source: io::Error,
        /// What to do.
        hint: &'static str,
    },
    /// Namespaces are refused.
    #[error("cannot make the namespaces for a cluster: {source}; {hint}")]
    Namespaces {
        /// What the kernel said.
        source: io::Error,
        /// What to do.
        hint: &'static str,
    },
    /// The user mapping is refused.
    #[error("cannot become root in a user namespace: {path}: {source}; run as root")]
    Mapping {
        /// The file.
        path: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// A mount is refused.
    #[error(
        "cannot mount {what} in the sandbox: {source}; in a container, run it privileged; elsewhere a security module may forbid it, so run as root"
    )]
    Mount {
        /// What.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// This program could not be started again.
    #[error("cannot {doing}: {source}")]
    Process {
        /// What was tried.
        doing: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Starts this program again inside a sandbox and waits for it, or finds itself inside.
///
/// Must be called before any thread is started: the kernel gives a user namespace to single-threaded processes only.
pub fn enter() -> Result<Entered, SandboxError> {
    let process = |doing| move |source| SandboxError::Process { doing, source };
    let own = fs::metadata("/proc/self/ns/pid").map_err(process("read /proc/self/ns/pid"))?.ino().to_string();
    match std::env::var(MARK).ok().as_deref().and_then(|mark| mark.split_once(' ')) {
        Some((outer_namespace, outer_pid)) if outer_namespace != own && nix::unistd::getpid().as_raw() == 1 => {
            inside(outer_pid.parse().unwrap_or(0)).map(Entered::Inside)
        }
        _ => outside(&own).map(Entered::Outside),
    }
}

impl Sandbox {
    /// A directory of the sandbox's own; nobody outside sees it but through `/proc/PID/root`.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// How a process outside reaches a file of the sandbox.
    pub fn path_from_outside(&self, path: &Path) -> PathBuf {
        let path = path.strip_prefix("/").unwrap_or(path);
        Path::new("/proc").join(self.outer_pid.to_string()).join("root").join(path)
    }

    /// Whether it was made by root, in no user namespace of its own.
    pub fn is_privileged(&self) -> bool {
        self.privileged
    }

    /// The process whose user and mount namespaces are the sandbox's, as seen from outside.
    pub fn outer_pid(&self) -> u32 {
        self.outer_pid
    }
}

fn outside(own: &str) -> Result<ExitCode, SandboxError> {
    check_tun()?;
    let process = |doing| move |source| SandboxError::Process { doing, source };
    let program = std::env::current_exe().map_err(process("find this program"))?;
    let (user, group) = (geteuid(), getegid());
    let mut flags = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWPID;
    if !user.is_root() {
        flags |= CloneFlags::CLONE_NEWUSER;
    }
    unshare(flags).map_err(|errno| SandboxError::Namespaces { source: errno.into(), hint: namespaces_hint(user.is_root()) })?;
    if !user.is_root() {
        let write = |path: &'static str, text: String| fs::write(path, text).map_err(|source| SandboxError::Mapping { path, source });
        // user_namespaces(7): without privilege a group can only be mapped once setgroups(2) is given up.
        write("/proc/self/setgroups", "deny".into())?;
        write("/proc/self/uid_map", format!("0 {user} 1"))?;
        write("/proc/self/gid_map", format!("0 {group} 1"))?;
    }
    // Waited for below, and let through again inside.
    let signals = signals();
    signals.thread_block().map_err(|errno| process("block signals")(errno.into()))?;
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    // This process stays in the sandbox's mount namespace, so its root directory shows the sandbox to the rest of the machine.
    let mark = format!("{own} {}", std::process::id());
    let mut child = Command::new(program).args(arguments).env(MARK, mark).spawn().map_err(process("start this program again"))?;
    let pid = Pid::from_raw(child.id() as i32);
    loop {
        let signal = signals.wait().map_err(|errno| process("wait for signals")(errno.into()))?;
        if signal != Signal::SIGCHLD {
            // It is process 1 of its namespace: with it everything else ends, whatever it was doing.
            let _ = kill(pid, Signal::SIGKILL);
            child.wait().map_err(process("wait for the sandbox"))?;
            return Ok(ExitCode::from(128 + signal as u8));
        }
        if let Some(status) = child.try_wait().map_err(process("wait for the sandbox"))? {
            let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
            return Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)));
        }
    }
}

/// What the process outside waits for. A process inherits its mask, so the one inside lets them through again.
fn signals() -> SigSet {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGCHLD, Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        signals.add(signal);
    }
    signals
}

fn inside(outer_pid: u32) -> Result<Sandbox, SandboxError> {
    let process = |doing| move |errno: nix::Error| SandboxError::Process { doing, source: errno.into() };
    signals().thread_unblock().map_err(process("let signals through"))?;
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).map_err(process("ask to end with the process outside"))?;
    // If that one ended before the line above, nobody will tell us.
    if nix::unistd::getppid().as_raw() != 0 {
        return Err(process("find the process outside")(nix::Error::ESRCH));
    }
    let try_mount = |what: &'static str, source: &str, target: &str, kind: Option<&str>, flags: MsFlags| {
        mount(Some(source), target, kind, flags, None::<&str>).map_err(|errno| SandboxError::Mount { what, source: errno.into() })
    };
    try_mount("a private view of the mounts", "none", "/", None, MsFlags::MS_REC | MsFlags::MS_PRIVATE)?;
    let guarded = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    try_mount("/proc", "proc", "/proc", Some("proc"), guarded)?;
    try_mount("a tmpfs on /run", "tmpfs", "/run", Some("tmpfs"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV)?;
    let directory = PathBuf::from("/run/lab");
    fs::create_dir(&directory).map_err(|source| SandboxError::Process { doing: "make the directory /run/lab", source })?;
    // "0 0 4294967295" is the mapping of a process in no user namespace of its own (user_namespaces(7)).
    let mapping = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    Ok(Sandbox { directory, outer_pid, privileged: mapping.split_whitespace().nth(2) == Some("4294967295") })
}

fn check_tun() -> Result<(), SandboxError> {
    let Err(source) = OpenOptions::new().read(true).write(true).open("/dev/net/tun") else { return Ok(()) };
    let hint = match source.kind() {
        io::ErrorKind::NotFound => "load the module with `modprobe tun`, or give the container the device (`--device /dev/net/tun`)",
        io::ErrorKind::PermissionDenied if !geteuid().is_root() => "run as root, or allow everybody to use it with `chmod 666 /dev/net/tun`",
        io::ErrorKind::PermissionDenied => "the container may not use it: give it the device (`--device /dev/net/tun`)",
        _ => "the kernel needs CONFIG_TUN: load the module with `modprobe tun`",
    };
    Err(SandboxError::Tun { source, hint })
}

fn namespaces_hint(root: bool) -> &'static str {
    if root {
        "it needs CAP_SYS_ADMIN: in a container, run it privileged"
    } else {
        "the machine does not let its users make namespaces (see kernel.unprivileged_userns_clone, \
         kernel.apparmor_restrict_unprivileged_userns and user.max_user_namespaces): run as root"
    }
}
