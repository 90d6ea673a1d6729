//! A blocking client of the daemon, small enough for a CNI plugin.

use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use crate::protocol::{Request, Response};

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// Nobody listens there.
    #[error("no daemon answers at {socket}: {source}. Is `podgate run` running? Another socket is named with --socket or PODGATE_SOCKET")]
    Unreachable {
        /// The socket's path.
        socket: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The daemon hung up or did not answer in time.
    #[error("the daemon at {socket} did not answer: {source}. Look at its log")]
    Broken {
        /// The socket's path.
        socket: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The answer is not one of this protocol: another version of Podgate, or another program.
    #[error("what answers at {socket} does not speak this protocol: {source}. Are client and daemon of one version?")]
    Garbled {
        /// The socket's path.
        socket: PathBuf,
        /// What does not fit.
        source: serde_json::Error,
    },
    /// The daemon refused.
    #[error("{message}")]
    Refused {
        /// See [`Response::Error`].
        code: u32,
        /// Why.
        message: String,
    },
}

/// A client of the daemon.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
    timeout: Duration,
}

impl Client {
    /// For the daemon at `socket`; a call waits 30 s at most.
    pub fn new(socket: impl AsRef<Path>) -> Client {
        Client { socket: socket.as_ref().to_owned(), timeout: Duration::from_secs(30) }
    }

    /// The same with another bound on a call.
    pub fn with_timeout(self, timeout: Duration) -> Client {
        Client { timeout, ..self }
    }

    /// The daemon's socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Sends `request`, with `fds` beside it, and waits for the answer.
    pub fn call(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<serde_json::Value, CallError> {
        let broken = |source| CallError::Broken { socket: self.socket.clone(), source };
        let mut stream = UnixStream::connect(&self.socket).map_err(|source| CallError::Unreachable { socket: self.socket.clone(), source })?;
        stream.set_read_timeout(Some(self.timeout)).map_err(broken)?;
        stream.set_write_timeout(Some(self.timeout)).map_err(broken)?;
        let mut line = serde_json::to_vec(request).expect("a request is always JSON");
        line.push(b'\n');
        send_with(&stream, &line, fds).map_err(broken)?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).map_err(broken)?;
        if answer.is_empty() {
            return Err(broken(std::io::ErrorKind::UnexpectedEof.into()));
        }
        match serde_json::from_slice(&answer).map_err(|source| CallError::Garbled { socket: self.socket.clone(), source })? {
            Response::Ok(value) => Ok(value),
            Response::Error { code, message } => Err(CallError::Refused { code, message }),
        }
    }
}

/// Writes all of `bytes`, the descriptors with the first of them.
fn send_with(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> std::io::Result<()> {
    const FDS_MAX: usize = 4;
    assert!(fds.len() <= FDS_MAX, "a request carries {FDS_MAX} descriptors at most");
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(fds));
    }
    let mut sent = rustix::net::sendmsg(stream, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)?;
    while sent < bytes.len() {
        sent += rustix::net::send(stream, &bytes[sent..], SendFlags::NOSIGNAL)?;
    }
    Ok(())
}
