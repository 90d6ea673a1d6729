//! A server that says who it is and whom it saw, over TCP and UDP, and that notes who pinged it.
//!
//! TCP: the first byte says what is wanted. `E`: everything up to the end of the stream comes back after a line `NAME CLIENT`.
//! `C`: each eight bytes come back as they are, for as long as the client likes. `B`: eight bytes of length and eight of seed, then
//! that much of [`Pattern`], which the server compares; its line is followed by `ok` or by what differed.
//! UDP: each datagram comes back after such a line, but one that begins with [`SPOOF_MARK`] is only noted.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use podgate_runtime::netns::Netns;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::pattern::Pattern;
use super::{PORT, plain};
use crate::lab::LabError;

/// How the payload of a datagram begins that must not arrive.
pub const SPOOF_MARK: &[u8] = b"podgate-spoof ";

/// How often a server's threads look whether they are to end. It only bounds how long a shutdown takes.
const POLL: Duration = Duration::from_millis(200);

/// How long a connection may stand still. Clients give up before, and say so.
const STALLED: Duration = Duration::from_secs(60);

/// A running server. It ends when this is dropped.
pub struct Server {
    notes: Arc<Notes>,
    threads: Vec<JoinHandle<()>>,
}

/// What a server saw.
#[derive(Default)]
struct Notes {
    stop: AtomicBool,
    echoes: Mutex<Vec<Echo>>,
    spoofs: Mutex<Vec<Delivery>>,
}

/// An echo request that arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Echo {
    /// From whom.
    pub source: IpAddr,
    /// The first eight bytes of its data, with which clients mark theirs.
    pub mark: u64,
}

/// A datagram that arrived although it should not have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delivery {
    /// The server it reached.
    pub server: String,
    /// The source it claimed.
    pub source: IpAddr,
    /// The rest of its payload.
    pub text: String,
}

impl Server {
    /// Starts the server `name` in `netns` on [`PORT`], for both families.
    pub fn start(name: &str, netns: &Netns) -> Result<Server, LabError> {
        let opened =
            netns.run(|| -> io::Result<_> { Ok((tcp_listener()?, udp_socket()?, echo_listener(Domain::IPV4)?, echo_listener(Domain::IPV6)?)) });
        let failed = |source| LabError::Program { what: format!("the server {name}"), source };
        let (tcp, udp, icmp, icmpv6) = opened.and_then(|inner| inner).map_err(failed)?;
        let notes = Arc::new(Notes::default());
        let mut server = Server { notes: Arc::clone(&notes), threads: Vec::new() };
        let spawn = |kind: &str, work: Box<dyn FnOnce() + Send>| thread::Builder::new().name(format!("{kind}-{name}")).spawn(work).map_err(failed);
        let (its_name, its_notes) = (name.to_owned(), Arc::clone(&notes));
        server.threads.push(spawn("tcp", Box::new(move || serve_tcp(&its_name, &tcp, &its_notes)))?);
        let (its_name, its_notes) = (name.to_owned(), Arc::clone(&notes));
        server.threads.push(spawn("udp", Box::new(move || serve_udp(&its_name, &udp, &its_notes)))?);
        for socket in [icmp, icmpv6] {
            let its_notes = Arc::clone(&notes);
            server.threads.push(spawn("icmp", Box::new(move || note_echoes(socket, &its_notes)))?);
        }
        Ok(server)
    }

    /// From whom the echo request marked `mark` came, if it arrived.
    pub fn pinged_by(&self, mark: u64) -> Option<IpAddr> {
        let echoes = self.notes.echoes.lock().unwrap_or_else(PoisonError::into_inner);
        echoes.iter().rev().find(|echo| echo.mark == mark).map(|echo| echo.source)
    }

    /// Every datagram that began with [`SPOOF_MARK`].
    pub fn spoofs(&self) -> Vec<Delivery> {
        self.notes.spoofs.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.notes.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // A server's panic has been printed already; nothing more can be done with it here.
            let _ = thread.join();
        }
    }
}

impl Notes {
    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

fn any(port: u16) -> SockAddr {
    SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port).into()
}

fn tcp_listener() -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP))?;
    socket.set_only_v6(false)?;
    socket.set_reuse_address(true)?;
    socket.bind(&any(PORT))?;
    socket.listen(1024)?;
    socket.set_read_timeout(Some(POLL))?;
    Ok(OwnedFd::from(socket).into())
}

fn udp_socket() -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::IPV6, Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_only_v6(false)?;
    socket.bind(&any(PORT))?;
    socket.set_recv_buffer_size(4 << 20)?;
    socket.set_read_timeout(Some(POLL))?;
    Ok(OwnedFd::from(socket).into())
}

/// A raw socket sees what the kernel answers by itself.
fn echo_listener(domain: Domain) -> io::Result<Socket> {
    let protocol = if domain == Domain::IPV4 { Protocol::ICMPV4 } else { Protocol::ICMPV6 };
    let socket = Socket::new(domain, Type::RAW, Some(protocol))?;
    socket.set_read_timeout(Some(POLL))?;
    Ok(socket)
}

fn serve_tcp(name: &str, listener: &TcpListener, notes: &Arc<Notes>) {
    while !notes.stopped() {
        // The listener's receive timeout bounds accept(2) too.
        let Ok((stream, client)) = listener.accept() else { continue };
        let (name, notes) = (name.to_owned(), Arc::clone(notes));
        // A connection that fails is the client's to report: it is the one that checks.
        let _ = thread::Builder::new().name(format!("conn-{name}")).spawn(move || serve_connection(&name, stream, plain(client), &notes));
    }
}

fn serve_connection(name: &str, mut stream: TcpStream, client: SocketAddr, notes: &Notes) -> io::Result<()> {
    stream.set_nodelay(true)?;
    // Linux hands the listener's timeout down to what it accepts, and a retransmission alone takes as long.
    stream.set_read_timeout(Some(STALLED))?;
    let mut wanted = [0; 1];
    stream.read_exact(&mut wanted)?;
    let greeting = format!("{name} {client}\n");
    match wanted[0] {
        b'E' => {
            let mut data = Vec::new();
            stream.read_to_end(&mut data)?;
            stream.write_all(greeting.as_bytes())?;
            stream.write_all(&data)
        }
        b'C' => {
            stream.set_read_timeout(Some(POLL))?;
            let (mut tick, mut have) = ([0; 8], 0);
            while !notes.stopped() {
                match stream.read(&mut tick[have..]) {
                    Ok(0) => break,
                    Ok(len) => have += len,
                    Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => continue,
                    Err(error) => return Err(error),
                }
                if have == tick.len() {
                    stream.write_all(&tick)?;
                    have = 0;
                }
            }
            Ok(())
        }
        b'B' => {
            let verdict = receive_bulk(&mut stream)?;
            stream.write_all(greeting.as_bytes())?;
            stream.write_all(verdict.as_bytes())
        }
        _ => Ok(()),
    }
}

fn receive_bulk(stream: &mut TcpStream) -> io::Result<String> {
    let mut header = [0; 16];
    stream.read_exact(&mut header)?;
    let (len, seed) = header.split_at(8);
    let len = u64::from_be_bytes(len.try_into().expect("eight bytes"));
    let pattern = Pattern::new(u64::from_be_bytes(seed.try_into().expect("eight bytes")));
    let mut buffer = vec![0; 256 * 1024];
    let mut received = 0;
    while received < len {
        let room = buffer.len().min(usize::try_from(len - received).unwrap_or(usize::MAX));
        match stream.read(&mut buffer[..room])? {
            0 => return Ok(format!("the stream ended after {received} of {len} bytes\n")),
            count => {
                if let Some(at) = pattern.first_difference(received, &buffer[..count]) {
                    return Ok(format!("byte {at} differs\n"));
                }
                received += count as u64;
            }
        }
    }
    Ok("ok\n".to_owned())
}

fn serve_udp(name: &str, socket: &UdpSocket, notes: &Notes) {
    let mut buffer = vec![0; 65_536];
    while !notes.stopped() {
        let Ok((len, client)) = socket.recv_from(&mut buffer) else { continue };
        if let Some(text) = buffer[..len].strip_prefix(SPOOF_MARK) {
            let delivery = Delivery { server: name.to_owned(), source: plain(client).ip(), text: String::from_utf8_lossy(text).into_owned() };
            notes.spoofs.lock().unwrap_or_else(PoisonError::into_inner).push(delivery);
            continue;
        }
        let mut reply = format!("{name} {}\n", plain(client)).into_bytes();
        reply.extend_from_slice(&buffer[..len]);
        // A reply that cannot be sent is a missing answer to the client, which reports it.
        let _ = socket.send_to(&reply, client);
    }
}

fn note_echoes(mut socket: Socket, notes: &Notes) {
    let mut buffer = vec![0; 65_536];
    let v4 = socket.domain().is_ok_and(|domain| domain == Domain::IPV4);
    while !notes.stopped() {
        let Ok((len, source)) = receive_from(&mut socket, &mut buffer) else { continue };
        // RFC 792 and RFC 4443 §4.1: type 8 or 128, then code, checksum, identifier, sequence number: eight bytes before the data.
        // An IPv4 raw socket shows the IP header too (raw(7)).
        let header_len = if v4 { usize::from(buffer[0] & 0xf) * 4 } else { 0 };
        let Some(message) = buffer[..len].get(header_len..) else { continue };
        let request = if v4 { 8 } else { 128 };
        if message.len() < 16 || message[0] != request {
            continue;
        }
        let mark = u64::from_be_bytes(message[8..16].try_into().expect("eight bytes"));
        let mut echoes = notes.echoes.lock().unwrap_or_else(PoisonError::into_inner);
        echoes.push(Echo { source, mark });
        if echoes.len() > 10_000 {
            echoes.drain(..5_000);
        }
    }
}

/// `recv_from` into initialised memory, which socket2 offers for connected sockets only.
fn receive_from(socket: &mut Socket, buffer: &mut [u8]) -> io::Result<(usize, IpAddr)> {
    use nix::sys::socket::{SockaddrStorage, recvfrom};
    use std::os::fd::AsRawFd;
    let (len, source) = recvfrom::<SockaddrStorage>(socket.as_raw_fd(), buffer)?;
    let source = source.and_then(|source| match (source.as_sockaddr_in(), source.as_sockaddr_in6()) {
        (Some(v4), _) => Some(IpAddr::V4(v4.ip())),
        (_, Some(v6)) => Some(IpAddr::V6(v6.ip())),
        _ => None,
    });
    Ok((len, source.ok_or_else(|| io::Error::other("a packet without a source"))?))
}
