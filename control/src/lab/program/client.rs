//! Clients of one exchange: everything that was sent must come back, from the address that was dialled.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use socket2::{Protocol, Type};

use super::pattern::Pattern;
use super::{Answer, ExchangeError, connected, domain, split_greeting};

/// Sends `len` bytes over one connection, ends its direction, and compares what comes back.
pub fn tcp(to: SocketAddr, len: usize, timeout: Duration) -> Result<Answer, ExchangeError> {
    let start = Instant::now();
    let mut stream: TcpStream = OwnedFd::from(connected(Type::STREAM, Some(Protocol::TCP), to, timeout)?).into();
    let latency = start.elapsed();
    let data = Pattern::new(u64::from(to.port()) ^ len as u64).take(len);
    let silent = ExchangeError::silent(to);
    stream.write_all(b"E").map_err(&silent)?;
    stream.write_all(&data).map_err(&silent)?;
    stream.shutdown(Shutdown::Write).map_err(&silent)?;
    let mut reply = Vec::with_capacity(len + 100);
    stream.read_to_end(&mut reply).map_err(&silent)?;
    let (answer, echoed) = split_greeting(to, &reply, latency)?;
    same(to, &data, echoed)?;
    Ok(answer)
}

/// Sends one datagram of `len` bytes and compares the one that comes back.
///
/// A datagram may be lost with good reason (a neighbour that is not known yet), so there are `tries`, each with `timeout`.
pub fn udp(to: SocketAddr, len: usize, tries: u32, timeout: Duration) -> Result<Answer, ExchangeError> {
    let mut outcome = udp_once(to, len, timeout);
    for _ in 1..tries {
        match outcome {
            Err(ExchangeError::NoAnswer { .. }) => outcome = udp_once(to, len, timeout),
            done => return done,
        }
    }
    outcome
}

fn udp_once(to: SocketAddr, len: usize, timeout: Duration) -> Result<Answer, ExchangeError> {
    let mut socket = connected(Type::DGRAM, Some(Protocol::UDP), to, timeout)?;
    // Room for the whole of a large datagram's reply, which is accounted with the kernel's overhead for each fragment.
    socket.set_recv_buffer_size(1 << 20).map_err(ExchangeError::local("set a buffer"))?;
    let data = Pattern::new(u64::from(to.port()) ^ len as u64).take(len);
    let silent = ExchangeError::silent(to);
    let start = Instant::now();
    socket.send(&data).map_err(&silent)?;
    let mut reply = vec![0; len + 200];
    let received = socket.read(&mut reply).map_err(&silent)?;
    let (answer, echoed) = split_greeting(to, &reply[..received], start.elapsed())?;
    same(to, &data, echoed)?;
    Ok(answer)
}

/// Sends the one datagram `payload` from wherever the kernel likes, and waits for nothing.
pub fn send(to: SocketAddr, payload: &[u8]) -> Result<(), ExchangeError> {
    let socket = socket2::Socket::new(domain(to.ip()), Type::DGRAM, Some(Protocol::UDP)).map_err(ExchangeError::local("open a socket"))?;
    socket.send_to(payload, &to.into()).map_err(ExchangeError::silent(to))?;
    Ok(())
}

pub(super) fn same(to: SocketAddr, sent: &[u8], received: &[u8]) -> Result<(), ExchangeError> {
    if sent == received {
        return Ok(());
    }
    let place = sent.iter().zip(received).position(|(a, b)| a != b);
    let what = match place {
        Some(place) => format!("byte {place} of {} differs", sent.len()),
        None => format!("{} bytes came back of {}", received.len(), sent.len()),
    };
    Err(ExchangeError::Damaged { to, what })
}
