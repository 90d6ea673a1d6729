//! What a path says about itself: the routers on it and the size that it takes, read from the socket's error queue
//! (`IP_RECVERR`, ip(7)), as traceroute and tracepath do.

use std::io::{self, IoSliceMut, Read};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;
use std::time::Duration;

use nix::libc;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, setsockopt, sockopt};
use socket2::{Protocol, Socket, Type};

use super::pattern::Pattern;
use super::{ExchangeError, connected};

/// What came back for one hop limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hop {
    /// A router said that the hop limit was used up.
    Router(IpAddr),
    /// The destination answered.
    Destination,
    /// Somebody said that it cannot be reached.
    Unreachable(IpAddr),
    /// Nothing came back in time.
    Silent,
}

/// Sends datagrams with growing hop limits to `to`, where a server answers, until it does or `hops_max` is reached.
pub fn traceroute(to: SocketAddr, hops_max: u32, timeout: Duration) -> Result<Vec<Hop>, ExchangeError> {
    let mut hops = Vec::new();
    for limit in 1..=hops_max {
        let mut socket = watchful(to, timeout)?;
        let set = if to.is_ipv4() { socket.set_ttl_v4(limit) } else { socket.set_unicast_hops_v6(limit) };
        set.map_err(ExchangeError::local("set a hop limit"))?;
        socket.send(b"traceroute").map_err(ExchangeError::silent(to))?;
        let hop = match socket.read(&mut [0; 2048]) {
            Ok(_) => Hop::Destination,
            Err(_) => match queued_error(&socket).map_err(ExchangeError::local("read the error queue"))? {
                None => Hop::Silent,
                // RFC 792 and RFC 4443 §3.3: time exceeded is type 11 and type 3.
                Some(error) if error.kind == (if to.is_ipv4() { 11 } else { 3 }) => error.from.map_or(Hop::Silent, Hop::Router),
                Some(error) => error.from.map_or(Hop::Silent, Hop::Unreachable),
            },
        };
        hops.push(hop);
        if matches!(hop, Hop::Destination | Hop::Unreachable(_)) {
            break;
        }
    }
    Ok(hops)
}

/// What a path did with datagrams that may not be cut on the way.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PathMtu {
    /// The sizes that were reported, and by whom.
    pub reported: Vec<(u32, Option<IpAddr>)>,
    /// Whether a datagram of the asked size came through in the end, cut by the sender as it had learned.
    pub delivered: bool,
}

/// Sends a datagram that makes a packet of `packet_len` bytes, with "don't fragment", as often as errors report another size.
pub fn path_mtu(to: SocketAddr, packet_len: usize, timeout: Duration) -> Result<PathMtu, ExchangeError> {
    let mut socket = watchful(to, timeout)?;
    let payload = Pattern::new(packet_len as u64).take(packet_len - if to.is_ipv4() { 28 } else { 48 });
    let mut outcome = PathMtu::default();
    for _ in 0..4 {
        // The kernel's default is to set DF and to heed what it learns (IP_PMTUDISC_WANT).
        let sent = socket.send(&payload);
        let heard = sent.and_then(|_| socket.read(&mut vec![0; packet_len + 200]));
        if heard.is_ok() {
            outcome.delivered = true;
            return Ok(outcome);
        }
        match queued_error(&socket).map_err(ExchangeError::local("read the error queue"))? {
            Some(error) if error.errno == libc::EMSGSIZE as u32 => outcome.reported.push((error.info, error.from)),
            Some(error) => return Err(ExchangeError::silent(to)(io::Error::from_raw_os_error(error.errno as i32))),
            None => {}
        }
    }
    Ok(outcome)
}

fn watchful(to: SocketAddr, timeout: Duration) -> Result<Socket, ExchangeError> {
    let socket = connected(Type::DGRAM, Some(Protocol::UDP), to, timeout)?;
    let set = if to.is_ipv4() { setsockopt(&socket, sockopt::Ipv4RecvErr, &true) } else { setsockopt(&socket, sockopt::Ipv6RecvErr, &true) };
    set.map_err(|errno| ExchangeError::Local { doing: "ask for errors", source: errno.into() })?;
    Ok(socket)
}

struct QueuedError {
    errno: u32,
    kind: u8,
    info: u32,
    from: Option<IpAddr>,
}

fn queued_error(socket: &Socket) -> io::Result<Option<QueuedError>> {
    let mut data = [0; 2048];
    let mut iov = [IoSliceMut::new(&mut data)];
    let mut control = nix::cmsg_space!(libc::sock_extended_err, libc::sockaddr_in6, [u8; 64]);
    let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
    let message = match recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut iov, Some(&mut control), flags) {
        Ok(message) => message,
        Err(nix::Error::EAGAIN) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    for control in message.cmsgs()? {
        let (error, from) = match control {
            ControlMessageOwned::Ipv4RecvErr(error, from) => (error, from.map(|from| IpAddr::from(from.sin_addr.s_addr.to_ne_bytes()))),
            ControlMessageOwned::Ipv6RecvErr(error, from) => (error, from.map(|from| IpAddr::from(from.sin6_addr.s6_addr))),
            _ => continue,
        };
        // An error made by this very host names no offender (SO_EE_ORIGIN_LOCAL).
        let from = from.filter(|from| !from.is_unspecified());
        return Ok(Some(QueuedError { errno: error.ee_errno, kind: error.ee_type, info: error.ee_info, from }));
    }
    Ok(None)
}
