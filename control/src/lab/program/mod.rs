//! The programs that talk through a cluster: servers that say who they are and whom they saw, and clients that check every byte.
//!
//! They run as threads of this process. A socket belongs for ever to the network namespace in which it was opened, so a program
//! opens its socket through [`podgate_runtime::netns::Netns::run`] and is then an ordinary thread. All clients use connected
//! sockets: an answer from any address but the one dialled is no answer.

pub mod bulk;
pub mod client;
pub mod pattern;
pub mod ping;
pub mod raw;
pub mod route;
pub mod server;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};

/// The port on which every pod, every node and the outside client serve TCP and UDP.
pub const PORT: u16 = 8080;

/// What went wrong in an exchange, in the client's terms.
#[derive(Debug, thiserror::Error)]
pub enum ExchangeError {
    /// A socket of this machine could not be used at all.
    #[error("cannot {doing}: {source}")]
    Local {
        /// What was tried.
        doing: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The connection was not made.
    #[error("no connection to {to}: {source}")]
    Refused {
        /// Whom it dialled.
        to: SocketAddr,
        /// What the kernel said.
        source: io::Error,
    },
    /// Nothing came back in time, or the kernel reported an error instead.
    #[error("no answer from {to}: {source}")]
    NoAnswer {
        /// Whom it asked.
        to: SocketAddr,
        /// What the kernel said.
        source: io::Error,
    },
    /// An answer came, but not the bytes that were sent.
    #[error("{to} answered with damaged data: {what}")]
    Damaged {
        /// Whom it asked.
        to: SocketAddr,
        /// What differs.
        what: String,
    },
}

impl ExchangeError {
    pub(super) fn local(doing: &'static str) -> impl Fn(io::Error) -> ExchangeError {
        move |source| ExchangeError::Local { doing, source }
    }

    pub(super) fn silent(to: SocketAddr) -> impl Fn(io::Error) -> ExchangeError {
        move |source| ExchangeError::NoAnswer { to, source: readable_timeout(source) }
    }
}

/// What a server says about itself and about the client that it saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The server's name.
    pub server: String,
    /// The client's address, as the server saw it.
    pub seen: SocketAddr,
    /// TCP: how long the connection took to open. UDP and ICMP: how long the answer took.
    pub latency: Duration,
}

/// `::ffff:a.b.c.d` as the IPv4 address that it is.
pub fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

pub(super) fn domain(address: IpAddr) -> Domain {
    if address.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 }
}

/// A socket connected to `to`, with `timeout` for connecting, sending and receiving.
pub(super) fn connected(kind: Type, protocol: Option<Protocol>, to: SocketAddr, timeout: Duration) -> Result<Socket, ExchangeError> {
    let socket = Socket::new(domain(to.ip()), kind, protocol).map_err(ExchangeError::local("open a socket"))?;
    socket.set_read_timeout(Some(timeout)).map_err(ExchangeError::local("set a timeout"))?;
    socket.set_write_timeout(Some(timeout)).map_err(ExchangeError::local("set a timeout"))?;
    if matches!(protocol, Some(Protocol::TCP | Protocol::UDP)) {
        bind_fresh(&socket, to.ip());
    }
    socket.connect_timeout(&to.into(), timeout).map_err(|source| ExchangeError::Refused { to, source })?;
    Ok(socket)
}

/// Gives the socket a port that no exchange of this process has had. A flow outlives its socket, and a client that comes back from the same
/// port by another way to the same backend has its source replaced, which is right but not what a table of expected sources is about.
fn bind_fresh(socket: &Socket, like: IpAddr) {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let any: IpAddr = if like.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    for _ in 0..100 {
        // Between node ports and masquerade ports, both of which are the gateway's.
        let port = 33_000 + NEXT.fetch_add(1, Ordering::Relaxed) % 27_000;
        if socket.bind(&SocketAddr::new(any, port).into()).is_ok() {
            return;
        }
    }
    // A hundred in a row are taken: the kernel knows a free one.
}

/// A receive timeout is reported as "resource temporarily unavailable", which tells a reader nothing.
fn readable_timeout(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => io::Error::new(io::ErrorKind::TimedOut, "timed out"),
        _ => error,
    }
}

/// Splits the first line, which says `SERVER CLIENT`, from what follows.
pub(super) fn split_greeting(to: SocketAddr, reply: &[u8], latency: Duration) -> Result<(Answer, &[u8]), ExchangeError> {
    let damaged = |what: &str| ExchangeError::Damaged { to, what: what.to_owned() };
    let end = reply.iter().position(|byte| *byte == b'\n').ok_or_else(|| damaged("it does not say who it is"))?;
    let line = std::str::from_utf8(&reply[..end]).map_err(|_| damaged("its name is not text"))?;
    let (server, seen) = line.split_once(' ').ok_or_else(|| damaged("it does not say whom it saw"))?;
    let seen = seen.parse().map_err(|_| damaged("the client's address does not parse"))?;
    Ok((Answer { server: server.to_owned(), seen, latency }, &reply[end + 1..]))
}

/// The middle one of several measurements.
pub fn median(mut samples: Vec<Duration>) -> Option<Duration> {
    samples.sort_unstable();
    samples.get(samples.len() / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_greeting_is_split_from_the_data_that_follow() {
        let to = "192.0.2.1:80".parse().unwrap();
        let (answer, rest) = split_greeting(to, b"a1 [fd00::2]:4242\nhello\n", Duration::ZERO).unwrap();
        assert_eq!((answer.server.as_str(), answer.seen, rest), ("a1", "[fd00::2]:4242".parse().unwrap(), &b"hello\n"[..]));
        assert!(split_greeting(to, b"no line", Duration::ZERO).is_err());
    }

    #[test]
    fn an_ipv4_mapped_address_is_shown_as_ipv4() {
        assert_eq!(plain("[::ffff:10.0.0.1]:80".parse().unwrap()), "10.0.0.1:80".parse().unwrap());
    }
}
