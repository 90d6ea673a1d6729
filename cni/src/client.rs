//! A blocking client of the daemon, small enough for a CNI plugin.

use std::io::{ErrorKind, IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::net::sockopt::Timeout;
use rustix::net::{AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType};

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

    /// Sends `request`, with `fds` beside it, and waits for the answer. The bound holds for the whole of it: a daemon that is stopped, or
    /// that answers a byte at a time, holds nobody up for longer.
    pub fn call(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<serde_json::Value, CallError> {
        let end = Instant::now() + self.timeout;
        let broken = |source| CallError::Broken { socket: self.socket.clone(), source };
        let mut stream = self.connect(end).map_err(|source| CallError::Unreachable { socket: self.socket.clone(), source })?;
        let mut line = serde_json::to_vec(request).expect("a request is always JSON");
        line.push(b'\n');
        stream.set_write_timeout(Some(left(end).map_err(broken)?)).map_err(broken)?;
        send_with(&stream, &line, fds).map_err(broken)?;
        let answer = receive(&mut stream, end).map_err(broken)?;
        match serde_json::from_slice(&answer) {
            Ok(Response::Ok(value)) => Ok(value),
            Ok(Response::Error { code, message }) => Err(CallError::Refused { code, message }),
            // Half an answer: the daemon ended while it wrote.
            Err(e) if e.is_eof() => Err(broken(ErrorKind::UnexpectedEof.into())),
            Err(source) => Err(CallError::Garbled { socket: self.socket.clone(), source }),
        }
    }

    /// Connects until `end`: with the listener's queue full, connect(2) waits for as long as the socket's send timeout says (unix(7)).
    fn connect(&self, end: Instant) -> std::io::Result<UnixStream> {
        let address = SocketAddrUnix::new(&self.socket)?;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        rustix::net::sockopt::set_socket_timeout(&socket, Timeout::Send, Some(left(end)?))?;
        rustix::net::connect(&socket, &address)?;
        Ok(UnixStream::from(socket))
    }
}

/// What is left until `end`, which is more than nothing: a socket's timeout of nothing means for ever.
fn left(end: Instant) -> std::io::Result<Duration> {
    match end.saturating_duration_since(Instant::now()) {
        Duration::ZERO => Err(ErrorKind::TimedOut.into()),
        // Below a microsecond the kernel would round it down to nothing.
        left => Ok(left.max(Duration::from_millis(1))),
    }
}

/// Everything until the daemon hangs up.
fn receive(stream: &mut UnixStream, end: Instant) -> std::io::Result<Vec<u8>> {
    let mut answer = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        stream.set_read_timeout(Some(left(end)?))?;
        match stream.read(&mut chunk) {
            Ok(0) if answer.is_empty() => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(0) => return Ok(answer),
            Ok(read) => answer.extend_from_slice(&chunk[..read]),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) if e.kind() == ErrorKind::WouldBlock => return Err(ErrorKind::TimedOut.into()),
            Err(e) => return Err(e),
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
