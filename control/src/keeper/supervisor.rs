//! Starts the gateway, keeps its descriptors, and starts it again when it ends unasked: process 1 of the container.
//!
//! Where systemd runs it already does all of this, and `podgate run` speaks to it in the same words (see [`super`]); a container has nobody
//! else. This is a loop over two descriptors, one for signals and one for what the gateway says, without threads or a runtime: there is little
//! in it that could fail, and it must not.
//!
//! - The gateway ends unasked: what arrives waits in the queues and sockets that are kept here, and the next one, started at once, goes on with
//!   them. One that ends again and again is started after pauses that grow.
//! - It cannot even start (its configuration is wrong, say), and nothing is kept: this process ends as it did, and whoever started it knows
//!   what to do. With something kept, it is tried again, some times; then what is kept is closed, lest that be why.
//! - Its control thread falls silent: it is killed, and the next one goes on.
//! - SIGTERM and SIGINT are the gateway's to obey. SIGHUP has it end and start again, with its configuration read anew.
//!
//! Read first: sd_notify(3), signalfd(2), pid_namespaces(7) on process 1.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, geteuid};
use podgate_runtime::handed;

use super::wire;
use crate::cli::Exit;

/// A gateway that ran for so long was well: the next one is started at once again.
const WELL_AFTER: Duration = Duration::from_secs(10);

/// The pause before a third try, doubled for each further one.
const PAUSE_FIRST: Duration = Duration::from_millis(100);

/// The longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// After so many tries in a row that came to nothing, what is kept is closed; one that ended by itself will do so again.
const TRIES_MAX: u32 = 5;

/// A gateway that runs and says nothing for so long is stuck; it speaks twice in this time.
const WATCHDOG: Duration = Duration::from_secs(30);

/// The word on the command line that asks for a supervisor; the gateway that it starts is run with the others.
pub const WORD: &str = "--supervise";

/// Runs the gateway until it is to end; how the process is to exit. It is started as this process was, but for [`WORD`].
pub fn supervise(runtime_dir: &Path) -> anyhow::Result<ExitCode> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGCHLD] {
        signals.add(signal);
    }
    signals.thread_block()?;
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    let socket = Socket::bind(runtime_dir)?;
    let mut supervisor = Supervisor { socket, kept: Vec::new(), gateway: None, tries: 0, due: Some(Instant::now()), purpose: Purpose::Run };
    loop {
        if supervisor.due.is_some_and(|due| due <= Instant::now()) {
            supervisor.start()?;
        }
        let timeout = supervisor.next().map_or(PollTimeout::NONE, |due| {
            // Rounded up: a wait that is a little short would go round for nothing.
            PollTimeout::try_from(due.saturating_duration_since(Instant::now()) + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
        });
        let mut waiting = [PollFd::new(signals.as_fd(), PollFlags::POLLIN), PollFd::new(supervisor.socket.socket.as_fd(), PollFlags::POLLIN)];
        match poll(&mut waiting, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => anyhow::bail!("the supervisor cannot wait: {errno}"),
        }
        // What the gateway said before it ended comes before its end.
        supervisor.listen();
        supervisor.watch();
        while let Some(signal) = signals.read_signal()? {
            supervisor.heed(Signal::try_from(signal.ssi_signo as i32)?);
        }
        if let Some(code) = supervisor.reap() {
            return Ok(ExitCode::from(u8::try_from(code).unwrap_or(Exit::Failed as u8)));
        }
    }
}

/// What the gateway is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    Run,
    /// End, and be started again.
    Renew,
    /// End.
    End,
}

struct Supervisor {
    socket: Socket,
    /// By name, in the order in which they came.
    kept: Vec<(String, OwnedFd)>,
    gateway: Option<Gateway>,
    /// How many gateways in a row have ended before they were well.
    tries: u32,
    /// When the next one is to be started.
    due: Option<Instant>,
    purpose: Purpose,
}

struct Gateway {
    pid: Pid,
    started: Instant,
    ready: bool,
    /// When it last said anything.
    heard: Instant,
}

impl Supervisor {
    fn start(&mut self) -> anyhow::Result<()> {
        // Whatever has become of the file, this is the program that runs.
        let mut command = Command::new("/proc/self/exe");
        command
            .arg0(std::env::args_os().next().unwrap_or_default())
            .args(std::env::args_os().skip(1).filter(|word| word != WORD))
            .env("NOTIFY_SOCKET", &self.socket.path)
            .env("WATCHDOG_USEC", WATCHDOG.as_micros().to_string())
            .env_remove("WATCHDOG_PID");
        let child = handed::spawn(&mut command, self.kept.iter().map(|(name, fd)| (name.as_str(), fd.as_fd())))?;
        self.gateway = Some(Gateway { pid: Pid::from_raw(child.id() as i32), started: Instant::now(), ready: false, heard: Instant::now() });
        self.due = None;
        Ok(())
    }

    /// What the gateway wants kept, and what not any more. What anybody else says is not heard.
    fn listen(&mut self) {
        while let Ok(message) = wire::receive(&self.socket.socket) {
            let from_it = |gateway: &&mut Gateway| message.sender.is_some_and(|sender| sender.pid.as_raw_nonzero().get() == gateway.pid.as_raw());
            let same_user = message.sender.is_some_and(|sender| sender.uid.as_raw() == geteuid().as_raw());
            let Some(gateway) = self.gateway.as_mut().filter(from_it).filter(|_| same_user) else { continue };
            let text = String::from_utf8_lossy(&message.bytes);
            let value = |key: &str| text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
            gateway.heard = Instant::now();
            gateway.ready |= value("READY") == Some("1");
            let name = value("FDNAME").unwrap_or("stored").to_owned();
            if value("FDSTOREREMOVE") == Some("1") {
                self.kept.retain(|(kept, _)| *kept != name);
            }
            if value("FDSTORE") == Some("1") && !name.contains(':') {
                self.kept.extend(message.fds.into_iter().map(|fd| (name.clone(), fd)));
            }
        }
    }

    /// When there is something to do though nothing happens.
    fn next(&self) -> Option<Instant> {
        self.due.or_else(|| self.gateway.as_ref().filter(|gateway| gateway.ready).map(|gateway| gateway.heard + WATCHDOG))
    }

    /// Kills a gateway that is stuck.
    fn watch(&mut self) {
        if let Some(gateway) = self.gateway.as_mut().filter(|gateway| gateway.ready && gateway.heard.elapsed() >= WATCHDOG) {
            tracing::error!("supervisor: the gateway has said nothing for {WATCHDOG:?}; killing it");
            let _ = kill(gateway.pid, Signal::SIGKILL);
            gateway.heard = Instant::now();
        }
    }

    fn heed(&mut self, signal: Signal) {
        let purpose = match signal {
            Signal::SIGTERM | Signal::SIGINT => Purpose::End,
            Signal::SIGHUP if self.purpose == Purpose::Run => Purpose::Renew,
            _ => return,
        };
        self.purpose = purpose;
        if let Some(gateway) = &self.gateway {
            tracing::info!(%signal, "supervisor: telling the gateway to end");
            // One that has ended meanwhile is about to be reaped.
            let _ = kill(gateway.pid, Signal::SIGTERM);
        }
    }

    /// Takes note of who has ended, orphans too; the exit code, if this process is to end.
    fn reap(&mut self) -> Option<i32> {
        while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            if status == WaitStatus::StillAlive {
                break;
            }
            if let Some(gateway) = self.gateway.take_if(|gateway| status.pid() == Some(gateway.pid))
                && let Some(code) = self.after(&gateway, status)
            {
                return Some(code);
            }
        }
        // Nobody runs, and nobody is to.
        (self.purpose == Purpose::End && self.gateway.is_none()).then_some(0)
    }

    /// What follows from the gateway's end: the exit code, or when it is started again.
    fn after(&mut self, gateway: &Gateway, status: WaitStatus) -> Option<i32> {
        let code = match status {
            WaitStatus::Exited(_, code) => Some(code),
            _ => None,
        };
        match (self.purpose, code) {
            (Purpose::End, code) => return Some(code.unwrap_or(0)),
            (Purpose::Renew, _) => {
                self.purpose = Purpose::Run;
                self.tries = 0;
                self.due = Some(Instant::now());
                return None;
            }
            // It was told by somebody else to end, or it will never be able to run.
            (Purpose::Run, Some(code)) if code == Exit::Ok as i32 || code == Exit::Usage as i32 => return Some(code),
            (Purpose::Run, Some(code)) if !gateway.ready && self.kept.is_empty() => return Some(code),
            (Purpose::Run, _) => {}
        }
        let lived = gateway.started.elapsed();
        self.tries = if gateway.ready && lived >= WELL_AFTER { 1 } else { self.tries + 1 };
        let pause = match self.tries {
            0 | 1 => Duration::ZERO,
            tries => PAUSE_MAX.min(PAUSE_FIRST * 2u32.saturating_pow(tries - 2)),
        };
        tracing::error!(
            ?status,
            lived_ms = lived.as_millis(),
            kept = self.kept.len(),
            "supervisor: the gateway has ended; starting it again in {pause:?}"
        );
        if self.tries >= TRIES_MAX && !gateway.ready {
            self.kept.clear();
            if code.is_some() {
                return code;
            }
        }
        self.due = Some(Instant::now() + pause);
        None
    }
}

/// Where the gateway says what it has to say. The file's mode keeps others out, and senders are asked who they are.
struct Socket {
    socket: UnixDatagram,
    path: PathBuf,
}

impl Socket {
    /// In `runtime_dir`, under a name of its own: in an upgrade there are two supervisors.
    fn bind(runtime_dir: &Path) -> anyhow::Result<Socket> {
        use anyhow::Context;
        let failed =
            || format!("the supervisor's socket in {} cannot be made; `runtimeDir` in podgate.yaml names the directory", runtime_dir.display());
        fs::create_dir_all(runtime_dir).with_context(failed)?;
        remove_abandoned(runtime_dir);
        let random = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), std::process::id());
        let path = runtime_dir.join(format!("supervisor-{random:016x}.sock"));
        let socket = UnixDatagram::bind(&path).with_context(failed)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).with_context(failed)?;
        socket.set_nonblocking(true)?;
        rustix::net::sockopt::set_socket_passcred(&socket, true)?;
        Ok(Socket { socket, path })
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

fn is_supervisors(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    name.starts_with("supervisor-") && name.ends_with(".sock")
}

/// Removes sockets of supervisors that were killed: nobody listens there.
pub fn remove_abandoned(runtime_dir: &Path) {
    for entry in fs::read_dir(runtime_dir).into_iter().flatten().flatten() {
        let path = entry.path();
        let abandoned = || UnixDatagram::unbound()?.connect(&path);
        if is_supervisors(&path) && abandoned().is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused) {
            let _ = fs::remove_file(&path);
        }
    }
}
