//! ICMP and ICMPv6 echo by raw sockets: no program and no `ping_group_range` is needed.

use std::io::Read;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use socket2::{Protocol, Type};

use super::client::same;
use super::pattern::Pattern;
use super::{ExchangeError, connected};

/// An echo that came back.
#[derive(Clone, Copy, Debug)]
pub struct Reply {
    /// How long it took.
    pub latency: Duration,
    /// The first eight bytes of the request's data, by which the pinged server knows it.
    pub mark: u64,
    /// The hop limit that was left of the answer; for IPv4 only.
    pub ttl: Option<u8>,
}

/// Numbers the requests of this process, so that programs which share a namespace do not take each other's answers.
static NEXT: AtomicU64 = AtomicU64::new(1);

/// Sends one echo request with `len` bytes of data (at least eight) and compares what comes back, which the kernel delivers only
/// if it comes from `to` (the socket is connected).
pub fn ping(to: IpAddr, len: usize, timeout: Duration) -> Result<Reply, ExchangeError> {
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let mark = number | u64::from(std::process::id()) << 32;
    let (identifier, sequence) = ((number >> 16) as u16 ^ std::process::id() as u16, number as u16);
    let mut data = Pattern::new(mark).take(len.max(8));
    data[..8].copy_from_slice(&mark.to_be_bytes());
    let protocol = if to.is_ipv4() { Protocol::ICMPV4 } else { Protocol::ICMPV6 };
    let address = SocketAddr::new(to, 0);
    let mut socket = connected(Type::RAW, Some(protocol), address, timeout)?;
    socket.set_recv_buffer_size(1 << 20).map_err(ExchangeError::local("set a buffer"))?;
    let silent = ExchangeError::silent(address);
    let start = Instant::now();
    socket.send(&echo_request(to, identifier, sequence, &data)).map_err(&silent)?;
    let mut buffer = vec![0; 65_536];
    loop {
        let received = socket.read(&mut buffer).map_err(&silent)?;
        let latency = start.elapsed();
        // An IPv4 raw socket shows the IP header too (raw(7)).
        let (header_len, reply, ttl) = if to.is_ipv4() { (usize::from(buffer[0] & 0xf) * 4, 0, Some(buffer[8])) } else { (0, 129, None) };
        let message = buffer[..received].get(header_len..).unwrap_or_default();
        let expected = [identifier.to_be_bytes(), sequence.to_be_bytes()].concat();
        if message.len() >= 8 && message[0] == reply && message[4..8] == expected {
            same(address, &data, &message[8..])?;
            return Ok(Reply { latency, mark, ttl });
        }
        if start.elapsed() > timeout {
            return Err(silent(std::io::ErrorKind::TimedOut.into()));
        }
    }
}

/// RFC 792 p. 14, RFC 4443 §4.1. The kernel fills in the checksum of ICMPv6 (RFC 3542 §3.1), for IPv4 it is ours.
pub(super) fn echo_request(to: IpAddr, identifier: u16, sequence: u16, data: &[u8]) -> Vec<u8> {
    let mut message = vec![if to.is_ipv4() { 8 } else { 128 }, 0, 0, 0];
    message.extend_from_slice(&identifier.to_be_bytes());
    message.extend_from_slice(&sequence.to_be_bytes());
    message.extend_from_slice(data);
    if to.is_ipv4() {
        let sum = super::raw::checksum(&[&message]);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    message
}
