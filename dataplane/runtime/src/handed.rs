//! Descriptors that a process is given when it is started, and gives to one that it starts: the descriptor store's half of sd_listen_fds(3).
//!
//! They have the numbers from 3 on; `LISTEN_FDS` says how many there are, and `LISTEN_FDNAMES` what each is called, in one text with colons
//! between. `LISTEN_PID` says whom they are for. Who starts a process cannot know its number before it runs, so [`spawn`] says nothing of it,
//! and a process that is told of none takes them for its own.
//!
//! Read first: sd_listen_fds(3), systemd.service(5) on `FileDescriptorStoreMax=`, fork(2) and signal-safety(7).

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

/// The first number (`SD_LISTEN_FDS_START`).
const FIRST: RawFd = 3;

/// The descriptors that this process was started with, each with its name; none if it has been asked before. They close on exec from now on.
///
/// To be called first of all in `main`, while no descriptor above standard error can have been opened by this process.
pub fn inherited() -> Vec<(String, OwnedFd)> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    let number = |name: &str| std::env::var(name).ok()?.parse::<u32>().ok();
    let count = number("LISTEN_FDS").and_then(|count| RawFd::try_from(count).ok()).unwrap_or(0);
    let mine = number("LISTEN_PID").is_none_or(|pid| pid == std::process::id());
    // Relaxed: whoever comes first has them, and nothing else is ordered by it.
    if count == 0 || !mine || TAKEN.swap(true, Ordering::Relaxed) {
        return Vec::new();
    }
    let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
    let mut names = names.split(':');
    let mut found = Vec::new();
    for number in FIRST..FIRST.saturating_add(count) {
        // SAFETY: it reads a flag of whatever has this number, and is answered with EBADF if nothing has.
        if unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
            break;
        }
        // SAFETY: the descriptor is open, was passed to this process by its parent under this number, and by this function's contract nobody
        // else has taken it: `TAKEN` lets one call through, and nothing was opened before it.
        let fd = unsafe { OwnedFd::from_raw_fd(number) };
        // What fails here fails for a number that is not open.
        let _ = fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC));
        found.push((names.next().unwrap_or("unknown").to_owned(), fd));
    }
    found
}

/// Starts `command` with `given`, each under its name. As long as `command` lives, it has handles on them.
pub fn spawn<'a>(command: &mut Command, given: impl IntoIterator<Item = (&'a str, BorrowedFd<'a>)>) -> io::Result<Child> {
    let (names, fds): (Vec<&str>, Vec<BorrowedFd<'_>>) = given.into_iter().unzip();
    let end = FIRST + fds.len() as RawFd;
    // Copies above the numbers that are to be had, so that no copy is overwritten before it was copied. The numbers below are filled: then
    // nothing that `Command` opens for itself lies where a descriptor is to be.
    let copies = fds.iter().map(|fd| copy_above(*fd, end)).collect::<io::Result<Vec<OwnedFd>>>()?;
    let mut fillers = Vec::new();
    while fillers.last().is_none_or(|filler: &File| filler.as_raw_fd() < end) {
        fillers.push(File::open("/dev/null")?);
    }
    command.env_remove("LISTEN_PID").env("LISTEN_FDS", fds.len().to_string()).env("LISTEN_FDNAMES", OsStr::new(&names.join(":")));
    let place = move || {
        for (to, copy) in (FIRST..).zip(&copies) {
            // SAFETY: dup2 is safe after fork (signal-safety(7)). What had the number `to` was a filler, or a descriptor of the parent's that
            // closes on exec, of which the child makes no use.
            if unsafe { libc::dup2(copy.as_raw_fd(), to) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: `place` runs between fork and exec; it makes system calls alone, and allocates and locks nothing.
    unsafe { command.pre_exec(place) };
    let child = command.spawn();
    drop(fillers);
    child
}

fn copy_above(fd: BorrowedFd<'_>, number: RawFd) -> io::Result<OwnedFd> {
    let copy = fcntl(fd.as_fd(), FcntlArg::F_DUPFD_CLOEXEC(number))?;
    // SAFETY: the kernel has just made it for this call.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    /// What this process was itself started with beyond one digit, and so hands on to every child.
    fn inherited_beyond_9() -> Vec<String> {
        let numbers = std::fs::read_dir("/proc/self/fd").unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut kept: Vec<String> = numbers
            .filter(|number| number.len() > 1)
            // SAFETY: it reads a flag of whatever has this number, and is answered with -1 if nothing has.
            .filter(|number| unsafe { libc::fcntl(number.parse().unwrap(), libc::F_GETFD) } == 0)
            .collect();
        kept.sort();
        kept
    }

    #[test]
    fn a_child_has_what_it_is_given_from_3_on_and_nothing_else() {
        // Numbers of one digit: dash knows no others.
        let pairs: Vec<(UnixStream, UnixStream)> = (0..7).map(|_| UnixStream::pair().unwrap()).collect();
        // Backwards, so that numbers of sources and of places cross.
        let given = pairs.iter().rev().map(|(_, theirs)| ("x/y", theirs.as_fd()));
        let mut command = Command::new("sh");
        let script = r#"for n in 3 4 5 6 7 8 9; do echo "$n" >&$n; done 2>&1
            for fd in /proc/self/fd/??*; do test ! -e "$fd" || echo "${fd##*/}"; done
            echo "$LISTEN_PID $LISTEN_FDS $LISTEN_FDNAMES""#;
        command.args(["-c", script]).stdout(std::process::Stdio::piped()).env("LISTEN_PID", "1");
        let child = spawn(&mut command, given).unwrap();
        let output = child.wait_with_output().unwrap();
        drop(command);
        let said = String::from_utf8(output.stdout).unwrap();
        let mut expected = inherited_beyond_9();
        expected.push(format!(" 7 {}", ["x/y"; 7].join(":")));
        assert_eq!(said.lines().collect::<Vec<_>>(), expected);
        for (number, (mut ours, theirs)) in (3..).zip(pairs.into_iter().rev()) {
            drop(theirs);
            let mut said = String::new();
            ours.read_to_string(&mut said).unwrap();
            assert_eq!(said, format!("{number}\n"));
            assert!(ours.write_all(b"x").is_err(), "nobody else has it");
        }
    }

    #[test]
    fn a_program_that_is_not_there_is_an_error_as_ever() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let error = spawn(&mut Command::new("/nowhere/at/all"), [("name", ours.as_fd())]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
