//! What passes between Podgate's daemon and its clients, and a blocking client small enough for a CNI plugin.
//!
//! A connection to the daemon's Unix socket carries one request and its response, each one line of JSON. Descriptors (the network
//! namespace to attach) travel beside the request's bytes (`SCM_RIGHTS`, unix(7)), so the daemon needs no path and no mount of the
//! caller's.
//!
//! ```no_run
//! use podgate_cni::{Client, Request};
//!
//! let status = Client::new("/run/podgate/podgate.sock").call(&Request::Show { table: "status".into() }, &[])?;
//! println!("{status}");
//! # Ok::<(), podgate_cni::CallError>(())
//! ```
#![forbid(unsafe_code)]

use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::net::IpAddr;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde::{Deserialize, Serialize};

/// Where the daemon listens unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/podgate/podgate.sock";

/// The longest request that the daemon reads, in bytes.
pub const REQUEST_LEN_MAX: usize = 64 * 1024;

/// What a client asks of the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase", deny_unknown_fields)]
pub enum Request {
    /// One of the tables: `status`, `services`, `backends`, `flows`, `peers`, `ipam`, `workers`, `drops` or `routes`.
    Show {
        /// Its name.
        table: String,
    },
    /// What would become of a packet.
    Trace {
        /// Its source.
        from: IpAddr,
        /// Its source port.
        from_port: u16,
        /// Its destination.
        to: IpAddr,
        /// Its destination port.
        to_port: u16,
        /// `tcp`, `udp` or `icmp`.
        protocol: String,
    },
    /// Attaches the network namespace whose descriptor comes with the request.
    Attach(Attachment),
    /// Takes an attachment away; the namespace need not exist any more.
    Detach(Attachment),
}

/// Which interface of which pod.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Attachment {
    /// Names the sandbox: the container id of a CNI call, or the path of the namespace for an attachment by hand.
    pub sandbox: String,
    /// The interface's name inside the namespace.
    pub ifname: String,
    /// `namespace/name` of the pod, for people.
    #[serde(default)]
    pub name: Option<String>,
}

/// The daemon's answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Response {
    /// What was asked for.
    Ok(serde_json::Value),
    /// Why not.
    Error {
        /// One of the CNI specification's error codes (1 to 99), or 100 and above for this project's own.
        code: u32,
        /// What went wrong and what to do next.
        message: String,
    },
}

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
