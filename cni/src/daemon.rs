//! Asking the daemon, for as long as there is time.

use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use podgate_cni::{CallError, Client, Request};
use serde_json::Value;

use crate::error::{Error, TRY_AGAIN};

/// How long a daemon that does not answer is asked again. A restart takes a second at most; who waits longer waits in vain, and a runtime
/// asks again by itself.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// The first pause between two tries, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(200));

/// How long a command has.
#[derive(Clone, Copy, Debug)]
pub struct Time {
    /// Until then it does its work.
    pub work: Instant,
    /// Until then it undoes what was done in vain.
    pub end: Instant,
}

impl Time {
    /// `total` from now on, a quarter of it kept for undoing.
    pub fn of(total: Duration) -> Time {
        let now = Instant::now();
        Time { work: now + total * 3 / 4, end: now + total }
    }
}

/// Why there is no good answer.
#[derive(Debug)]
pub struct Unanswered {
    /// The last try's error.
    pub error: CallError,
    /// Whether the daemon may have done what it was asked, now or a moment later.
    pub perhaps_done: bool,
}

impl Unanswered {
    /// What the runtime is told; `code` if the daemon does not answer.
    pub fn into_error(self, socket: &Path, code: u64) -> Error {
        match self.error {
            CallError::Refused { code, message } => Error::Refused { code: code.into(), message, socket: socket.into() },
            CallError::Garbled { source, .. } => {
                let problem = format!("it does not speak this plugin's protocol: {source}. Are plugin and daemon of one version?");
                Error::Undecodable { what: format!("the answer of the daemon at {}", socket.display()), problem }
            }
            CallError::Unreachable { source, .. } => {
                let problem = format!(
                    "nobody listens at {}: {source}. Is podgate running on this node? `socket` in the network configuration names another place",
                    socket.display()
                );
                Error::NoAnswer { code, problem }
            }
            CallError::Broken { source, .. } => {
                Error::NoAnswer { code, problem: format!("the daemon at {} did not answer: {source}. Look at its log", socket.display()) }
            }
        }
    }

    /// The same, where nothing but a later try helps.
    pub fn try_again(self, socket: &Path) -> Error {
        self.into_error(socket, TRY_AGAIN)
    }
}

/// The daemon of this node.
#[derive(Clone, Debug)]
pub struct Daemon {
    client: Client,
    /// Where it listens.
    pub socket: PathBuf,
}

impl Daemon {
    /// The one at `socket`.
    pub fn at(socket: &Path) -> Daemon {
        Daemon { client: Client::new(socket), socket: socket.into() }
    }

    /// Asks `request`, until `until` at the latest. Asks the same again where nobody listens or the connection breaks, for as long as
    /// `patience` says from the first such failure.
    pub fn ask(&self, request: &Request, fds: &[BorrowedFd<'_>], until: Instant, patience: Duration) -> Result<Value, Unanswered> {
        let mut give_up = None;
        let mut perhaps_done = false;
        let mut pause = PAUSES.0;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let error = match self.client.clone().with_timeout(left).call(request, fds) {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            match error {
                CallError::Refused { .. } => return Err(Unanswered { error, perhaps_done: false }),
                CallError::Garbled { .. } => return Err(Unanswered { error, perhaps_done: true }),
                CallError::Broken { .. } => perhaps_done = true,
                CallError::Unreachable { .. } => {}
            }
            let now = Instant::now();
            if now + pause >= *give_up.get_or_insert(until.min(now + patience)) {
                return Err(Unanswered { error, perhaps_done });
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(PAUSES.1);
        }
    }
}
