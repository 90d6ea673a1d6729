//! Foreign programs, run to their end within a bounded time.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use podgate::lab::LabError;

/// Why a foreign program was of no use.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// It could not be started, fed or read.
    #[error("cannot run {what}: {source}")]
    Run {
        /// Its command line.
        what: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// It did not end in time, and was killed.
    #[error("{what} did not end within {seconds} s; it printed: {printed}")]
    TooLate {
        /// Its command line.
        what: String,
        /// How long it was waited for.
        seconds: u64,
        /// What it had said until then.
        printed: String,
    },
    /// It failed.
    #[error("{what} failed with {status}: {printed}")]
    Failed {
        /// Its command line.
        what: String,
        /// How it exited.
        status: ExitStatus,
        /// What it said.
        printed: String,
    },
    /// It printed what cannot be used.
    #[error("{what} printed what cannot be used ({why}): {printed}")]
    Output {
        /// Its command line.
        what: String,
        /// What is wrong with it.
        why: String,
        /// What it printed.
        printed: String,
    },
    /// A file that it needs could not be written.
    #[error("cannot prepare {path}: {source}")]
    File {
        /// Which.
        path: std::path::PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The lab failed.
    #[error(transparent)]
    Lab(#[from] LabError),
}

/// A program that runs, with its output in pipes.
pub struct Running {
    child: Child,
    what: String,
    started: Instant,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

/// How a program ended.
#[derive(Clone, Debug)]
pub struct Ended {
    /// Its command line.
    pub what: String,
    /// How it exited.
    pub status: ExitStatus,
    /// What it printed.
    pub stdout: String,
    /// What it complained of.
    pub stderr: String,
    /// From its start to its end.
    pub took: Duration,
}

impl Running {
    /// Starts `command` with `input` as its standard input, in the network namespace of the calling thread.
    pub fn start(mut command: Command, input: &[u8]) -> Result<Running, ToolError> {
        let what = format!("`{}`", show(&command));
        let failed = |source| ToolError::Run { what: what.clone(), source };
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let started = Instant::now();
        let mut child = command.spawn().map_err(failed)?;
        let written = child.stdin.take().map(|mut stdin| stdin.write_all(input));
        match written {
            // It may end without having read anything.
            Some(Err(error)) if error.kind() != io::ErrorKind::BrokenPipe => Err(failed(error)),
            _ => Ok(Running { child, what, started, stdout: Vec::new(), stderr: Vec::new() }),
        }
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for its end for `time` at most; whether it has ended.
    pub fn ends_within(&mut self, time: Duration) -> Result<bool, ToolError> {
        let deadline = Instant::now() + time;
        let failed = |what: &str, source| ToolError::Run { what: what.to_owned(), source };
        while self.child.stdout.is_some() || self.child.stderr.is_some() {
            let left = deadline.saturating_duration_since(Instant::now());
            let ready = readable([self.child.stdout.as_ref().map(AsFd::as_fd), self.child.stderr.as_ref().map(AsFd::as_fd)], left);
            let ready = ready.map_err(|source| failed(&self.what, source))?;
            if ready == [false, false] && Instant::now() >= deadline {
                return Ok(false);
            }
            if ready[0] && drain(self.child.stdout.as_mut(), &mut self.stdout).map_err(|source| failed(&self.what, source))? {
                self.child.stdout = None;
            }
            if ready[1] && drain(self.child.stderr.as_mut(), &mut self.stderr).map_err(|source| failed(&self.what, source))? {
                self.child.stderr = None;
            }
        }
        Ok(true)
    }

    /// Kills it with SIGKILL.
    pub fn kill(&mut self) -> Result<(), ToolError> {
        self.child.kill().map_err(|source| ToolError::Run { what: self.what.clone(), source })
    }

    /// Waits for its end; after `patience` it is killed, which is an error.
    pub fn end(mut self, patience: Duration) -> Result<Ended, ToolError> {
        let ended = self.ends_within(patience)?;
        let took = self.started.elapsed();
        if !ended {
            self.kill()?;
        }
        let status = self.child.wait().map_err(|source| ToolError::Run { what: self.what.clone(), source })?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let end = Ended { what: self.what, status, stdout: text(&self.stdout), stderr: text(&self.stderr), took };
        if ended { Ok(end) } else { Err(ToolError::TooLate { what: end.what.clone(), seconds: patience.as_secs(), printed: end.printed() }) }
    }
}

impl Ended {
    /// What it printed, provided that it succeeded.
    pub fn success(self) -> Result<String, ToolError> {
        if self.status.success() { Ok(self.stdout) } else { Err(ToolError::Failed { printed: self.printed(), what: self.what, status: self.status }) }
    }

    /// All that it said.
    pub fn printed(&self) -> String {
        [self.stdout.trim(), self.stderr.trim()].join("\n").trim().to_owned()
    }
}

/// Which of these can be read, or have ended, within `time`.
fn readable(files: [Option<BorrowedFd<'_>>; 2], time: Duration) -> io::Result<[bool; 2]> {
    let mut watched: Vec<PollFd<'_>> = files.iter().flatten().map(|file| PollFd::new(*file, PollFlags::POLLIN)).collect();
    // In whole milliseconds and not less than asked for.
    let time = PollTimeout::try_from(time + Duration::from_micros(999)).unwrap_or(PollTimeout::MAX);
    match poll(&mut watched, time) {
        Ok(_) | Err(nix::Error::EINTR) => {}
        Err(errno) => return Err(errno.into()),
    }
    let mut ready = watched.iter().map(|file| file.any().unwrap_or(true));
    Ok(files.map(|file| file.is_some() && ready.next().unwrap_or(false)))
}

/// Reads what there is; whether that was all there will ever be.
fn drain(file: Option<&mut impl Read>, into: &mut Vec<u8>) -> io::Result<bool> {
    let Some(file) = file else { return Ok(false) };
    let mut buffer = [0; 4096];
    let len = file.read(&mut buffer)?;
    into.extend_from_slice(&buffer[..len]);
    Ok(len == 0)
}

fn show(command: &Command) -> String {
    let words: Vec<_> = std::iter::once(command.get_program()).chain(command.get_args()).map(|word| word.to_string_lossy()).collect();
    words.join(" ")
}
