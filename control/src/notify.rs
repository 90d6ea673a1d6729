//! What a service manager is told: that the gateway runs, in what state it is, and that its control thread is alive; and what it is given to
//! keep.
//!
//! Read first: sd_notify(3), systemd.service(5) on `Type=notify`, `WatchdogSec=` and `FileDescriptorStoreMax=`. Where no manager asked (no
//! `NOTIFY_SOCKET`), nothing is said.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use crate::keeper::wire;

/// How long a manager that does not read may hold up what it is to keep.
const KEEP_TIMEOUT: Duration = Duration::from_secs(1);

/// Tells the service manager.
#[derive(Debug)]
pub struct Notifier {
    to: Option<(UnixDatagram, SocketAddr)>,
    watchdog: Option<Duration>,
}

impl Notifier {
    /// As the environment says (`NOTIFY_SOCKET`, `WATCHDOG_USEC`, `WATCHDOG_PID`).
    pub fn from_environment() -> io::Result<Notifier> {
        let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        let number = |name: &str| variable(name)?.to_str()?.parse::<u64>().ok();
        let Some(path) = variable("NOTIFY_SOCKET") else { return Ok(Notifier { to: None, watchdog: None }) };
        let mine = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        let watchdog = number("WATCHDOG_USEC").filter(|_| mine).map(Duration::from_micros);
        Notifier::to(&path, watchdog)
    }

    /// To a manager that listens at `path`, in the abstract namespace if it begins with `@`, and that takes silence of this length for a failure.
    pub fn to(path: &OsStr, watchdog: Option<Duration>) -> io::Result<Notifier> {
        let address = match path.as_bytes().strip_prefix(b"@") {
            Some(name) => SocketAddr::from_abstract_name(name)?,
            None => SocketAddr::from_pathname(path)?,
        };
        let socket = UnixDatagram::unbound()?;
        // A manager that does not read must not hold the control thread up.
        socket.set_nonblocking(true)?;
        Ok(Notifier { to: Some((socket, address)), watchdog })
    }

    /// How often the manager wants to hear that this process is alive: twice within the time after which it acts.
    pub fn interval(&self) -> Option<Duration> {
        self.to.as_ref()?;
        self.watchdog.map(|time| time / 2)
    }

    /// It runs.
    pub fn ready(&self) {
        self.say("READY=1");
    }

    /// It is about to end.
    pub fn stopping(&self) {
        self.say("STOPPING=1");
    }

    /// It is alive.
    pub fn alive(&self) {
        self.say("WATCHDOG=1");
    }

    /// It keeps these under `name`, until it is told to forget them, beside those that it keeps under that name already; when the service is
    /// started again, they are there (sd_listen_fds(3)). It is not to judge by their state whether they are of use (`FDPOLL=0`).
    pub fn keep(&self, name: &str, fds: &[OwnedFd]) -> io::Result<()> {
        let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        fds.chunks(wire::FDS_MAX).try_for_each(|fds| self.give(&format!("FDSTORE=1\nFDPOLL=0\nFDNAME={name}"), fds))
    }

    /// It closes what it keeps under `name`.
    pub fn forget(&self, name: &str) -> io::Result<()> {
        self.give(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), &[])
    }

    /// What it does, in a line for people (`systemctl status`).
    pub fn status(&self, text: &str) {
        self.say(&format!("STATUS={}", text.replace('\n', " ")));
    }

    /// Unlike what is only said, this must arrive: it waits for a manager that is busy.
    fn give(&self, text: &str, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let Some((_, address)) = &self.to else { return Ok(()) };
        let socket = UnixDatagram::unbound()?;
        socket.set_write_timeout(Some(KEEP_TIMEOUT))?;
        socket.connect_addr(address)?;
        Ok(wire::send(&socket, text.as_bytes(), fds)?)
    }

    fn say(&self, text: &str) {
        // Who does not hear it has its own remedy: the watchdog.
        if let Some((socket, address)) = &self.to {
            let _ = socket.send_to_addr(text.as_bytes(), address);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manager_hears_what_is_said_by_path_and_by_abstract_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let name = format!("podgate-notify-{}", std::process::id());
        let managers = [
            (path.clone().into_os_string(), UnixDatagram::bind(&path).unwrap()),
            (format!("@{name}").into(), UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap()),
        ];
        for (path, manager) in managers {
            let notifier = Notifier::to(&path, Some(Duration::from_secs(20))).unwrap();
            assert_eq!(notifier.interval(), Some(Duration::from_secs(10)));
            notifier.ready();
            notifier.status("forwarding\nby 2 workers");
            let mut buffer = [0; 64];
            let mut heard = || manager.recv(&mut buffer).map(|len| String::from_utf8_lossy(&buffer[..len]).into_owned()).unwrap();
            assert_eq!(heard(), "READY=1");
            assert_eq!(heard(), "STATUS=forwarding by 2 workers");
        }
    }

    #[test]
    fn a_manager_is_given_what_it_is_to_keep_a_part_at_a_time() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        let notifier = Notifier::to(path.as_os_str(), None).unwrap();
        let fds: Vec<OwnedFd> = (0..300).map(|_| std::fs::File::open("/dev/null").unwrap().into()).collect();
        notifier.keep("tun/pods", &fds).unwrap();
        notifier.forget("tun/pods").unwrap();
        let heard = || wire::receive(&manager).map(|message| (String::from_utf8(message.bytes).unwrap(), message.fds.len())).unwrap();
        assert_eq!(heard(), ("FDSTORE=1\nFDPOLL=0\nFDNAME=tun/pods".to_owned(), 253));
        assert_eq!(heard(), ("FDSTORE=1\nFDPOLL=0\nFDNAME=tun/pods".to_owned(), 47));
        assert_eq!(heard(), ("FDSTOREREMOVE=1\nFDNAME=tun/pods".to_owned(), 0));
    }

    #[test]
    fn without_a_manager_nothing_is_said_and_nothing_fails() {
        let silent = Notifier { to: None, watchdog: Some(Duration::from_secs(1)) };
        silent.alive();
        silent.keep("lock", &[]).and_then(|()| silent.forget("lock")).unwrap();
        assert_eq!(silent.interval(), None);
    }
}
