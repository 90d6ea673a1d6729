//! The overlay's UDP sockets: superframes in one system call each way, and batches of them.
//!
//! Receiving: one `SO_REUSEPORT` socket per worker with `UDP_GRO`, read by `recvmmsg`. What arrives may be up to 64 datagrams of one
//! flow, joined, with their length beside them. Sending: a fixed set of sockets that only send, so that the outer source port spreads
//! flows over networks and receivers (design D5); one `sendmsg` with `UDP_SEGMENT` takes a whole superframe as alternating headers
//! and slices of payload.
//!
//! The outer checksum stays on: `UDP_SEGMENT` refuses a socket without it, and `UDP_GRO` joins only datagrams that carry one.
//! Datagrams carry DF, and the kernel keeps each path's MTU: a send that exceeds it fails with EMSGSIZE (with `UDP_SEGMENT` EINVAL
//! or EMSGSIZE, net/ipv4/udp.c `udp_send_skb`), and [`Sender::path_mtu`] tells what to go by.
//!
//! Sockets belong to the namespace of the thread that makes them. They hold what arrives while nobody reads them: a gateway that takes over
//! goes on with its predecessor's ([`Overlay::open`]).
//!
//! Read first: udp(7); Documentation/networking/segmentation-offloads.rst; net/ipv4/udp_offload.c.

mod overlay;

use std::io::{self, IoSlice};
use std::mem::zeroed;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

pub use self::overlay::Overlay;
use crate::sys::{self, Control, ControlWriter};

/// The most bytes that one receive can bring, joined datagrams included (`GRO_LEGACY_MAX_SIZE`), and so the least that each buffer
/// of [`Receiver::recv`] must hold.
pub const RECEIVE_LEN_MAX: usize = 65_536;

/// The most payload bytes of one send, `UDP_SEGMENT` or not: 65,535 less the IPv4 and the UDP header.
pub const SEND_LEN_MAX: usize = 65_507;

/// The most segments of one send: 64 before Linux 6.9 (`UDP_MAX_SEGMENTS`), 128 since.
pub const SEGMENTS_MAX: usize = 64;

/// The most slices of one send (`UIO_MAXIOV`).
pub const SEND_SLICES_MAX: usize = 1024;

/// Send-only sockets of each family: enough outer ports for networks and receivers to spread flows by.
pub const SENDERS_PER_FAMILY: usize = 32;

/// What a receive buffer is asked to hold: the default of 208 KiB is three superframes, this is a hundred.
const RECEIVE_BUFFER_LEN: u32 = 8 << 20;

/// What each sending socket may have on its way; a full one means EAGAIN, and so a named drop.
const SEND_BUFFER_LEN: u32 = 4 << 20;

/// One worker's receiving socket.
#[derive(Debug)]
pub struct Receiver {
    socket: Socket,
    local: SocketAddr,
    messages: Messages,
    truncated: u64,
}

/// What came in one buffer: a datagram, or several of one flow joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// The buffer's number in the order in which they were given.
    pub buffer: usize,
    /// Bytes in the buffer.
    pub len: usize,
    /// Bytes of each datagram but the last, which may be shorter: `len` if there is one only. Never 0.
    pub segment: usize,
    /// Who sent it, as the outer headers say.
    pub from: SocketAddr,
    /// The ECN field of the outer headers (the two low bits of the traffic class).
    pub ecn: u8,
}

/// The sending sockets, which all workers share: a flow's outer port is its own, whichever worker sends for it. Otherwise the peer's
/// worker for it would change with ours, so the worker of its answers, and with that ours again; what is on its way meanwhile is overtaken.
/// The kernel sends from one socket on several CPUs without a lock (net/ipv4/udp.c, `udp_sendmsg` without corking).
#[derive(Debug)]
pub struct Sender {
    v4: Family,
    v6: Family,
}

#[derive(Debug, Default)]
struct Family {
    local: Option<IpAddr>,
    sockets: Vec<Socket>,
}

/// Why an overlay socket could not be had.
#[derive(Debug, thiserror::Error)]
pub enum UdpError {
    /// Somebody else has the port.
    #[error("{0} (UDP) is in use by another program: stop it (`ss -ulnp` names it; a kernel VXLAN device counts) or set another overlay port")]
    InUse(SocketAddr),
    /// The address is not this node's.
    #[error("{0} is not an address of this node: check the node's underlay addresses")]
    NoSuchAddress(IpAddr),
    /// Anything else, with the step that failed.
    #[error("UDP socket on {address}: {step} failed: {source}")]
    Io {
        /// Where it was to be bound.
        address: SocketAddr,
        /// What was being done.
        step: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

impl Receiver {
    /// A socket bound to `address`, together with those of other workers, that takes up to `batch_len_max` messages per call.
    pub fn bind(address: SocketAddr, batch_len_max: usize) -> Result<Receiver, UdpError> {
        let socket = open(address)?;
        // Before it is bound: the port is shared by those that say so.
        socket.set_reuse_port(true).map_err(|source| UdpError::Io { address, step: "sharing the port (SO_REUSEPORT)", source })?;
        let mut receiver = Receiver::settle(socket, address, batch_len_max)?;
        bind(&receiver.socket, address)?;
        receiver.local = receiver.socket.local_addr().ok().and_then(|local| local.as_socket()).unwrap_or(address);
        Ok(receiver)
    }

    /// Sets everything that a receiving socket needs, whether or not it had it.
    fn settle(socket: Socket, address: SocketAddr, batch_len_max: usize) -> Result<Receiver, UdpError> {
        let failed = |step| move |source| UdpError::Io { address, step, source };
        size_buffers(&socket, RECEIVE_BUFFER_LEN).map_err(failed("sizing its buffers"))?;
        if address.is_ipv4() {
            sys::set_option(&socket, libc::IPPROTO_IP, libc::IP_RECVTOS, 1)
        } else {
            sys::set_option(&socket, libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS, 1)
        }
        .map_err(failed("asking for the traffic class"))?;
        sys::set_option(&socket, libc::SOL_UDP, libc::UDP_GRO, 1).map_err(failed("joining datagrams (UDP_GRO, Linux 5.0)"))?;
        Ok(Receiver { socket, local: address, messages: Messages::new(batch_len_max.max(1)), truncated: 0 })
    }

    /// Where it is bound, with the port the kernel chose if 0 was asked for.
    pub fn local(&self) -> SocketAddr {
        self.local
    }

    /// Receives into as many of `buffers`, in order, as there are messages, and adds what came to `received`, which never holds
    /// more than it has room for. Each buffer holds at least [`RECEIVE_LEN_MAX`] bytes. Returns how many came: 0 if there is
    /// nothing now.
    ///
    /// A message of no bytes, or from no address, is left out, but takes its buffer.
    pub fn recv<'b>(&mut self, buffers: impl IntoIterator<Item = &'b mut [u8]>, received: &mut Vec<Received>) -> io::Result<usize> {
        let room = received.capacity() - received.len();
        let filled = self.messages.point_at(buffers, room)?;
        if filled == 0 {
            return Ok(0);
        }
        let count = loop {
            match self.messages.recv(&self.socket, filled) {
                Ok(count) => break count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(0),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        };
        for index in 0..count {
            match self.messages.received(index) {
                Some((_, true)) => self.truncated += 1,
                Some((message, false)) => received.push(message),
                None => {}
            }
        }
        Ok(count)
    }

    /// Datagrams that the kernel dropped because this socket's buffer was full (or their checksum wrong), since it was made.
    pub fn kernel_drops(&self) -> io::Result<u32> {
        sys::socket_drops(&self.socket)
    }

    /// Messages that were longer than their buffer, which the kernel's limits rule out.
    pub fn truncated(&self) -> u64 {
        self.truncated
    }

    /// The bytes that may wait in the socket, as the kernel counts them (data and its own overhead). Without CAP_NET_ADMIN it is
    /// held down by `net.core.rmem_max`.
    pub fn buffer_len(&self) -> io::Result<usize> {
        self.socket.recv_buffer_size()
    }
}

impl Received {
    /// How many datagrams it is.
    pub fn datagrams(&self) -> usize {
        self.len.div_ceil(self.segment)
    }
}

impl Sender {
    /// `count` sockets on each of the underlay addresses given, at most one of each family.
    pub fn open(addresses: &[IpAddr], count: usize) -> Result<Sender, UdpError> {
        Sender::open_with(addresses, count, Vec::new())
    }

    /// The same, with sockets that a predecessor left open, each with the address that it has: so flows keep their outer ports, and peers' workers
    /// their flows.
    fn open_with(addresses: &[IpAddr], count: usize, mut left: Vec<(Socket, SocketAddr)>) -> Result<Sender, UdpError> {
        let mut sender = Sender { v4: Family::default(), v6: Family::default() };
        for address in addresses {
            let mut ours = left.extract_if(.., |(_, local)| local.ip() == *address).map(|(socket, _)| settle_sending(socket, *address));
            let sockets = (0..count.max(1)).map(|_| ours.next().unwrap_or_else(|| send_only(*address))).collect::<Result<_, _>>()?;
            drop(ours);
            *sender.family_mut(address.is_ipv4()) = Family { local: Some(*address), sockets };
        }
        Ok(sender)
    }

    /// Sends `slices`, at most [`SEND_SLICES_MAX`] and [`SEND_LEN_MAX`] bytes, as one datagram, or with `segment_len` as datagrams
    /// of so many bytes, at most [`SEGMENTS_MAX`]. `traffic_class` is the outer DSCP and ECN. `flow` chooses the socket: packets
    /// of one flow must all give the same.
    ///
    /// The errors are the kernel's: EMSGSIZE or EINVAL may say that the path's MTU has become smaller, EAGAIN that too much is on
    /// its way, ENETUNREACH and EHOSTUNREACH that there is no route. ENOPROTOOPT is ours: no socket of this family.
    #[inline]
    pub fn send(&self, flow: u32, to: SocketAddr, traffic_class: u8, segment_len: Option<u16>, slices: &[IoSlice<'_>]) -> io::Result<()> {
        let family = self.family(to.is_ipv4());
        if family.sockets.is_empty() {
            return Err(io::Error::from_raw_os_error(libc::ENOPROTOOPT));
        }
        let socket = &family.sockets[flow as usize % family.sockets.len()];
        let address = SockAddr::from(to);
        let mut control = Control::EMPTY;
        let mut writer = ControlWriter::new(&mut control);
        let class = libc::c_int::from(traffic_class).to_ne_bytes();
        match to {
            SocketAddr::V4(_) => writer.push(libc::IPPROTO_IP, libc::IP_TOS, class),
            SocketAddr::V6(_) => writer.push(libc::IPPROTO_IPV6, libc::IPV6_TCLASS, class),
        }
        if let Some(len) = segment_len {
            writer.push(libc::SOL_UDP, libc::UDP_SEGMENT, len.to_ne_bytes());
        }
        let control_len = writer.len();
        // SAFETY: msghdr is a C struct of integers and pointers; all zeros is a value of it.
        let mut header: libc::msghdr = unsafe { zeroed() };
        header.msg_name = address.as_ptr().cast_mut().cast();
        header.msg_namelen = address.len();
        header.msg_iov = slices.as_ptr().cast_mut().cast();
        header.msg_iovlen = slices.len() as _;
        header.msg_control = control.as_mut_ptr();
        header.msg_controllen = control_len as _;
        // SAFETY: the header points to an address, to slices (IoSlice is an iovec by its documentation) and to control messages that
        // all outlive the call; sendmsg writes to none of them.
        let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const header, libc::MSG_NOSIGNAL) };
        // UDP takes all or nothing.
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// The MTU of the path to `to`, outer IP header included, as the kernel knows it now: the interface's, or less if a router said so.
    pub fn path_mtu(&self, to: SocketAddr) -> io::Result<u32> {
        let local = self.family(to.is_ipv4()).local.ok_or_else(|| io::Error::from_raw_os_error(libc::ENOPROTOOPT))?;
        let socket = Socket::new(Domain::for_address(to), Type::DGRAM.cloexec(), Some(Protocol::UDP))?;
        sys::attach_filter(&socket, &sys::REFUSE_ALL)?;
        dont_fragment(&socket, to.is_ipv4())?;
        socket.bind(&SocketAddr::new(local, 0).into())?;
        socket.connect(&to.into())?;
        let mtu: libc::c_int = match to {
            SocketAddr::V4(_) => sys::option(&socket, libc::IPPROTO_IP, libc::IP_MTU)?,
            SocketAddr::V6(_) => sys::option(&socket, libc::IPPROTO_IPV6, libc::IPV6_MTU)?,
        };
        u32::try_from(mtu).map_err(|_| io::ErrorKind::InvalidData.into())
    }

    /// The outer source ports in use for a family.
    pub fn ports(&self, v4: bool) -> impl Iterator<Item = u16> {
        self.family(v4).sockets.iter().filter_map(|socket| Some(socket.local_addr().ok()?.as_socket()?.port()))
    }

    #[inline]
    fn family(&self, v4: bool) -> &Family {
        if v4 { &self.v4 } else { &self.v6 }
    }

    fn family_mut(&mut self, v4: bool) -> &mut Family {
        if v4 { &mut self.v4 } else { &mut self.v6 }
    }
}

impl AsRawFd for Receiver {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl AsFd for Receiver {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The arrays that `recvmmsg` fills, made once.
struct Messages {
    headers: Box<[libc::mmsghdr]>,
    iovecs: Box<[libc::iovec]>,
    names: Box<[libc::sockaddr_storage]>,
    controls: Box<[Control]>,
}

// SAFETY: the raw pointers within are set by `point_at` and used by `recv` and `received` of the same call of `Receiver::recv`; no
// thread finds any that another has set.
unsafe impl Send for Messages {}

impl Messages {
    fn new(count: usize) -> Messages {
        // SAFETY: these are C structs of integers and pointers; all zeros is a value of each.
        let (header, iovec, name) = unsafe { (zeroed::<libc::mmsghdr>(), zeroed::<libc::iovec>(), zeroed::<libc::sockaddr_storage>()) };
        Messages {
            headers: vec![header; count].into(),
            iovecs: vec![iovec; count].into(),
            names: vec![name; count].into(),
            controls: vec![Control::EMPTY; count].into(),
        }
    }

    /// Prepares a message for each of `buffers`, at most `room`; returns how many.
    fn point_at<'b>(&mut self, buffers: impl IntoIterator<Item = &'b mut [u8]>, room: usize) -> io::Result<usize> {
        let mut filled = 0;
        // Not `zip(buffers)` first: that would take one buffer too many from an iterator that the caller goes on with.
        for (index, buffer) in (0..self.headers.len().min(room)).zip(buffers) {
            if buffer.len() < RECEIVE_LEN_MAX {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, "a receive buffer is smaller than RECEIVE_LEN_MAX"));
            }
            self.iovecs[index] = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
            let header = &mut self.headers[index].msg_hdr;
            header.msg_name = (&raw mut self.names[index]).cast();
            header.msg_namelen = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
            header.msg_iov = &raw mut self.iovecs[index];
            header.msg_iovlen = 1;
            header.msg_control = self.controls[index].as_mut_ptr();
            header.msg_controllen = size_of::<Control>() as _;
            header.msg_flags = 0;
            filled += 1;
        }
        Ok(filled)
    }

    fn recv(&mut self, socket: &Socket, count: usize) -> io::Result<usize> {
        // SAFETY: `point_at` has just pointed the first `count` headers at buffers that the caller of `Receiver::recv` lends for the
        // whole call, and at this value's own arrays.
        let result = unsafe {
            libc::recvmmsg(socket.as_raw_fd(), self.headers.as_mut_ptr(), count as libc::c_uint, libc::MSG_DONTWAIT as _, std::ptr::null_mut())
        };
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }

    /// What the kernel wrote for message `index`, and whether it was cut.
    #[inline]
    fn received(&self, index: usize) -> Option<(Received, bool)> {
        let message = &self.headers[index];
        let len = message.msg_len as usize;
        let from = sys::socket_address(&self.names[index])?;
        if len == 0 {
            return None;
        }
        let mut received = Received { buffer: index, len, segment: len, from, ecn: 0 };
        // SAFETY: recvmmsg has just filled this header, and its control buffer is this value's own.
        for (level, kind, data) in unsafe { sys::control_messages(&message.msg_hdr) } {
            let Some(number) = sys::control_number(data) else { continue };
            match (level, kind) {
                (libc::SOL_UDP, libc::UDP_GRO) => received.segment = usize::try_from(number).unwrap_or(0).clamp(1, len),
                (libc::IPPROTO_IP, libc::IP_TOS) | (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => received.ecn = number as u8 & 0b11,
                _ => {}
            }
        }
        Some((received, message.msg_hdr.msg_flags & libc::MSG_TRUNC != 0))
    }
}

impl std::fmt::Debug for Messages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Messages({})", self.headers.len())
    }
}

/// A socket that can send and never holds a packet: each one that arrives is refused by a filter before it is queued. Errors that
/// come back are noted in the kernel's routes and reach no socket, since it is connected to nobody and does not ask (`IP_RECVERR`).
fn send_only(address: IpAddr) -> Result<Socket, UdpError> {
    let any_port = SocketAddr::new(address, 0);
    let socket = settle_sending(open(any_port)?, address)?;
    bind(&socket, any_port)?;
    Ok(socket)
}

/// Sets everything that a sending socket needs, whether or not it had it.
fn settle_sending(socket: Socket, address: IpAddr) -> Result<Socket, UdpError> {
    let address = SocketAddr::new(address, 0);
    let failed = |step| move |source| UdpError::Io { address, step, source };
    size_buffers(&socket, 0).map_err(failed("sizing its buffers"))?;
    sys::attach_filter(&socket, &sys::REFUSE_ALL).map_err(failed("refusing arrivals (SO_ATTACH_FILTER)"))?;
    dont_fragment(&socket, address.is_ipv4()).map_err(failed("setting DF (IP_MTU_DISCOVER)"))?;
    Ok(socket)
}

fn open(address: SocketAddr) -> Result<Socket, UdpError> {
    let failed = |step| move |source| UdpError::Io { address, step, source };
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM.nonblocking().cloexec(), Some(Protocol::UDP)).map_err(failed("opening it"))?;
    if address.is_ipv6() {
        socket.set_only_v6(true).map_err(failed("restricting it to IPv6"))?;
    }
    Ok(socket)
}

fn size_buffers(socket: &Socket, receive_buffer_len: u32) -> io::Result<()> {
    // The forced form needs CAP_NET_ADMIN in the namespace's user namespace and goes beyond the sysctls' limits; the other never fails.
    for (force, plain, len) in [(libc::SO_RCVBUFFORCE, libc::SO_RCVBUF, receive_buffer_len), (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF, SEND_BUFFER_LEN)]
    {
        if sys::set_option(socket, libc::SOL_SOCKET, force, len).is_err() {
            sys::set_option(socket, libc::SOL_SOCKET, plain, len)?;
        }
    }
    Ok(())
}

fn bind(socket: &Socket, address: SocketAddr) -> Result<(), UdpError> {
    socket.bind(&address.into()).map_err(|source| match source.raw_os_error() {
        Some(libc::EADDRINUSE) => UdpError::InUse(address),
        Some(libc::EADDRNOTAVAIL) => UdpError::NoSuchAddress(address.ip()),
        _ => UdpError::Io { address, step: "binding it", source },
    })
}

fn dont_fragment(socket: &Socket, v4: bool) -> io::Result<()> {
    if v4 {
        sys::set_option(socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DO)
    } else {
        sys::set_option(socket, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DO)
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;

    const LOOPBACKS: [&str; 2] = ["127.0.0.1", "::1"];

    fn pair(loopback: &str) -> Option<(Receiver, Sender)> {
        let ip: IpAddr = loopback.parse().unwrap();
        let receiver = match Receiver::bind((ip, 0).into(), 8) {
            Err(UdpError::NoSuchAddress(_)) if ip.is_ipv6() => {
                eprintln!("skipped: no IPv6 here");
                return None;
            }
            receiver => receiver.unwrap(),
        };
        Some((receiver, Sender::open(&[ip], 4).unwrap()))
    }

    /// Receives until `bytes` have come: what came, with its bytes.
    fn receive(receiver: &mut Receiver, bytes: usize) -> Vec<(Received, Vec<u8>)> {
        let mut arena = vec![0u8; 8 * RECEIVE_LEN_MAX];
        let (mut received, mut all, mut total) = (Vec::with_capacity(8), Vec::new(), 0);
        while total < bytes {
            let ready = poll(&mut [PollFd::new(receiver.as_fd(), PollFlags::POLLIN)], PollTimeout::from(5000u16)).unwrap();
            assert!(ready > 0, "{total} of {bytes} bytes within 5 s");
            received.clear();
            receiver.recv(arena.chunks_exact_mut(RECEIVE_LEN_MAX), &mut received).unwrap();
            for message in &received {
                total += message.len;
                all.push((*message, arena[message.buffer * RECEIVE_LEN_MAX..][..message.len].to_vec()));
            }
        }
        all
    }

    #[test]
    fn a_superframe_is_sent_in_one_call_and_arrives_with_its_segments_and_ecn() {
        for loopback in LOOPBACKS {
            let Some((mut receiver, sender)) = pair(loopback) else { continue };
            // Forty datagrams, each a header of its own and a slice of one payload.
            let headers: Vec<[u8; 8]> = (0..40u64).map(|number| number.to_be_bytes()).collect();
            let payload: Vec<u8> = (0..40 * 1392u32).map(|at| (at * 7 % 251) as u8).collect();
            let slices: Vec<IoSlice<'_>> =
                headers.iter().zip(payload.chunks(1392)).flat_map(|(header, chunk)| [IoSlice::new(header), IoSlice::new(chunk)]).collect();
            sender.send(9, receiver.local(), 0b1010_0011, Some(1400), &slices).unwrap();
            let received = receive(&mut receiver, 40 * 1400);
            for (message, _) in &received {
                assert_eq!((message.segment, message.ecn, message.from.ip().to_string()), (1400, 0b11, loopback.to_owned()));
            }
            assert_eq!(received.iter().map(|(message, _)| message.datagrams()).sum::<usize>(), 40);
            let bytes: Vec<u8> = received.into_iter().flat_map(|(_, bytes)| bytes).collect();
            let expected: Vec<u8> = headers.iter().zip(payload.chunks(1392)).flat_map(|(header, chunk)| [&header[..], chunk].concat()).collect();
            assert!(bytes == expected, "byte for byte");
        }
    }

    #[test]
    fn several_datagrams_come_in_one_call_and_room_is_respected() {
        let Some((mut receiver, sender)) = pair(LOOPBACKS[0]) else { return };
        for number in 0..5u8 {
            sender.send(number.into(), receiver.local(), 0, None, &[IoSlice::new(&[number; 100])]).unwrap();
        }
        let mut arena = vec![0u8; 8 * RECEIVE_LEN_MAX];
        let mut received = Vec::with_capacity(3);
        assert_eq!(receiver.recv(arena.chunks_exact_mut(RECEIVE_LEN_MAX), &mut received).unwrap(), 3);
        assert_eq!(
            received.iter().map(|message| (message.buffer, message.len, message.segment)).collect::<Vec<_>>(),
            [(0, 100, 100), (1, 100, 100), (2, 100, 100)]
        );
        received.clear();
        assert_eq!(receiver.recv(arena.chunks_exact_mut(RECEIVE_LEN_MAX), &mut received).unwrap(), 2);
        received.clear();
        assert_eq!(receiver.recv(arena.chunks_exact_mut(RECEIVE_LEN_MAX), &mut received).unwrap(), 0);
        assert_eq!(receiver.recv([&mut arena[..100]], &mut received).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!((receiver.kernel_drops().unwrap(), receiver.truncated()), (0, 0));
    }

    #[test]
    fn a_flow_keeps_its_port_and_flows_use_all_ports() {
        let Some((mut receiver, sender)) = pair(LOOPBACKS[0]) else { return };
        for flow in [3, 3, 0, 1, 2] {
            sender.send(flow, receiver.local(), 0, None, &[IoSlice::new(b"x")]).unwrap();
        }
        let from: Vec<u16> = receive(&mut receiver, 5).into_iter().map(|(message, _)| message.from.port()).collect();
        assert_eq!(from[0], from[1]);
        let ports: Vec<u16> = sender.ports(true).collect();
        assert_eq!(from[1..], [ports[3], ports[0], ports[1], ports[2]]);
    }

    #[test]
    fn a_sending_socket_keeps_nothing_and_is_not_poisoned_by_refusals() {
        let Some((receiver, sender)) = pair(LOOPBACKS[0]) else { return };
        let nobody = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        for _ in 0..3 {
            sender.send(0, nobody, 0, None, &[IoSlice::new(b"refused by ICMP")]).unwrap();
        }
        let ours = ("127.0.0.1", sender.ports(true).next().unwrap());
        UdpSocket::bind("127.0.0.1:0").unwrap().send_to(b"unasked", ours).unwrap();
        assert_eq!(sys::socket_drops(&sender.v4.sockets[0]).unwrap(), 1);
        assert_eq!(sender.v4.sockets[0].recv(&mut [std::mem::MaybeUninit::uninit(); 1]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert_eq!(receiver.kernel_drops().unwrap(), 0);
    }

    #[test]
    fn what_exceeds_the_path_is_refused_and_the_path_is_known() {
        let Some(netns) = crate::testing::loopback(1400) else { return };
        let check = || {
            for (ip, headers) in [("127.0.0.1", 28), ("::1", 48)] {
                let ip: IpAddr = ip.parse().unwrap();
                let sender = Sender::open(&[ip], 1).unwrap();
                let receiver = Receiver::bind((ip, 0).into(), 1).unwrap();
                let to = receiver.local();
                let largest = 1400 - headers;
                assert_eq!(sender.path_mtu(to).unwrap(), 1400);
                sender.send(0, to, 0, None, &[IoSlice::new(&vec![0; largest])]).unwrap();
                let error = sender.send(0, to, 0, None, &[IoSlice::new(&vec![0; largest + 1])]).unwrap_err();
                assert_eq!(error.raw_os_error(), Some(libc::EMSGSIZE));
                sender.send(0, to, 0, Some(largest as u16), &[IoSlice::new(&vec![0; largest * 2])]).unwrap();
                let error = sender.send(0, to, 0, Some(largest as u16 + 1), &[IoSlice::new(&vec![0; largest * 2 + 2])]).unwrap_err();
                assert!(matches!(error.raw_os_error(), Some(libc::EMSGSIZE | libc::EINVAL)), "{error}");
            }
            let sender = Sender::open(&["127.0.0.1".parse().unwrap()], 1).unwrap();
            let error = sender.send(0, "[::1]:4790".parse().unwrap(), 0, None, &[]).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::ENOPROTOOPT));
        };
        netns.run(check).unwrap();
    }

    #[test]
    fn a_port_in_use_and_a_foreign_address_are_named() {
        let holder = UdpSocket::bind("127.0.0.1:0").unwrap();
        let taken = holder.local_addr().unwrap();
        assert!(matches!(Receiver::bind(taken, 1), Err(UdpError::InUse(address)) if address == taken));
        drop(holder);
        assert!(matches!(Receiver::bind("192.0.2.1:0".parse().unwrap(), 1), Err(UdpError::NoSuchAddress(_))));
        let first = Receiver::bind(taken, 1).unwrap();
        assert_eq!(Receiver::bind(taken, 1).unwrap().local(), first.local());
    }
}
