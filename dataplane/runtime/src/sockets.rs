//! The node's sockets that bring what no port rule can: datagrams that came in fragments, and ICMP.
//!
//! A port rule matches no fragment, not even the first (design D1): a fragmented datagram to a NodePort stays on the node. So each
//! such UDP port, and each live UDP masquerade port, has a socket that takes it after the kernel has put it together; raw sockets
//! take ICMP and ICMPv6, which has no port at all. Each is handed on as a whole IP packet, rebuilt where the kernel took the headers
//! off, so that it goes through the pipeline as if it had come through the TUN `host` (`Ingress::Socket`).
//!
//! What the gateway itself writes to `host` for the node reaches these sockets too; it would go round for ever, so what came in
//! through that interface is passed over ([`Ignored`]). Raw sockets get copies: the kernel deals with each message as well.
//!
//! Sockets belong to the namespace of the thread that makes them.
//!
//! Read first: ip(7) and raw(7) for `IP_PKTINFO` and `ICMP_FILTER`; RFC 3542 §3 and §6 for IPv6; net/ipv4/ip_fragment.c
//! (`ip_frag_reasm`) for what a reassembled header looks like.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::{Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use podgate_core::addr::{Addr, protocol};
use podgate_core::wire::checksum::{Sum, pseudo_header};
use podgate_core::wire::ip::Family;
use podgate_core::wire::{ipv4, ipv6, set_u16, udp};
use socket2::{Domain, Protocol, Socket, Type};

use crate::sys;

/// The longest packet that [`PortSockets::recv`] and [`IcmpSocket::recv`] make: an IPv6 header and its largest payload. Buffers hold
/// at least so much.
pub const PACKET_LEN_MAX: usize = ipv6::HEADER_LEN + 65_535;

/// Bytes that may wait in each socket: a few of the largest datagrams.
const RECEIVE_BUFFER_LEN: u32 = 1 << 20;

/// Sockets asked about at once.
const READY_MAX: usize = 32;

/// Interfaces, by index, whose packets are passed over: the TUN `host`.
pub type Ignored = Vec<u32>;

/// UDP sockets bound to ports of the node. One descriptor ([`AsRawFd`]) becomes readable when any of them does; it stays so until
/// [`PortSockets::recv`] has brought `None`.
#[derive(Debug)]
pub struct PortSockets {
    epoll: Epoll,
    ignored: Ignored,
    sockets: HashMap<u64, PortSocket>,
    tokens: HashMap<SocketAddr, u64>,
    next_token: u64,
    ready: [EpollEvent; READY_MAX],
    ready_len: usize,
    next_id: u16,
    /// Drops of sockets that have been released.
    past_drops: u64,
}

#[derive(Debug)]
struct PortSocket {
    socket: Socket,
    local: SocketAddr,
}

/// A raw socket that brings the ICMP messages a gateway must translate: echo replies and errors.
#[derive(Debug)]
pub struct IcmpSocket {
    socket: Socket,
    family: Family,
    ignored: Ignored,
}

/// Why there is no ICMP socket.
#[derive(Debug, thiserror::Error)]
pub enum IcmpError {
    /// No right to open it.
    #[error("a raw ICMP socket is not permitted: grant CAP_NET_RAW; without it, ping and ICMP errors of masqueraded and NodePort flows are lost")]
    NotPermitted,
    /// The node has no IPv6.
    #[error("this node has no {0:?}")]
    NoFamily(Family),
    /// Anything else, with the step that failed.
    #[error("raw ICMP socket: {step} failed: {source}")]
    Io {
        /// What was being done.
        step: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// What the kernel says beside a datagram.
#[derive(Clone, Copy, Default)]
struct Beside {
    interface: u32,
    destination: Option<Ipv6Addr>,
    ttl: u8,
    traffic_class: u8,
}

impl PortSockets {
    /// None yet.
    pub fn new(ignored: Ignored) -> io::Result<PortSockets> {
        Ok(PortSockets {
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            ignored,
            sockets: HashMap::new(),
            tokens: HashMap::new(),
            next_token: 0,
            ready: [EpollEvent::empty(); READY_MAX],
            ready_len: 0,
            next_id: 0,
            past_drops: 0,
        })
    }

    /// Other interfaces to be passed over, for when the TUN `host` was made anew.
    pub fn ignore(&mut self, ignored: Ignored) {
        self.ignored = ignored;
    }

    /// Makes the sockets those of `wanted`: releases the others, binds what is missing. What could not be bound is returned with the
    /// reason (EADDRINUSE: a program of the node has the port) and can be tried again; everything else is in force.
    pub fn set(&mut self, wanted: &[SocketAddr]) -> Vec<(SocketAddr, io::Error)> {
        let keep: HashSet<&SocketAddr> = wanted.iter().collect();
        let gone: Vec<SocketAddr> = self.tokens.keys().filter(|address| !keep.contains(address)).copied().collect();
        for address in gone {
            self.release(address);
        }
        wanted.iter().filter_map(|address| self.bind_one(*address).err().map(|error| (*address, error))).collect()
    }

    /// Binds one more; nothing to do if it is there.
    pub fn bind_one(&mut self, address: SocketAddr) -> io::Result<()> {
        if self.tokens.contains_key(&address) { Ok(()) } else { self.adopt(address, bind_port(address)?) }
    }

    /// Takes in a socket that [`bind_port`] has bound to `address`, and what waits in it.
    pub(crate) fn adopt(&mut self, address: SocketAddr, socket: Socket) -> io::Result<()> {
        let token = self.next_token;
        self.next_token += 1;
        self.epoll.add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, token))?;
        self.sockets.insert(token, PortSocket { socket, local: address });
        self.tokens.insert(address, token);
        Ok(())
    }

    /// Gives one port back; nothing to do if it is not there.
    pub fn release(&mut self, address: SocketAddr) {
        if let Some(released) = self.tokens.remove(&address).and_then(|token| self.sockets.remove(&token)) {
            self.past_drops += u64::from(sys::socket_drops(&released.socket).unwrap_or(0));
            // Closing it takes it out of the epoll set: nobody else has its descriptor.
        }
    }

    /// The addresses bound.
    pub fn bound(&self) -> impl Iterator<Item = SocketAddr> {
        self.tokens.keys().copied()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.sockets.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.sockets.is_empty()
    }

    /// Datagrams that the kernel dropped at these sockets, those released since included.
    pub fn kernel_drops(&self) -> u64 {
        self.past_drops + self.sockets.values().map(|port| u64::from(sys::socket_drops(&port.socket).unwrap_or(0))).sum::<u64>()
    }

    /// The next datagram, as a whole IP packet with full checksums at the start of `buffer`: its length, or `None` if there is none.
    /// Sockets take turns.
    pub fn recv(&mut self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        check_room(buffer)?;
        loop {
            if self.ready_len == 0 {
                self.ready_len = self.epoll.wait(&mut self.ready, EpollTimeout::ZERO)?;
                if self.ready_len == 0 {
                    return Ok(None);
                }
            }
            self.ready_len -= 1;
            let Some(port) = self.sockets.get(&self.ready[self.ready_len].data()) else { continue };
            if let Some(len) = port.recv(buffer, &self.ignored, self.next_id)? {
                self.next_id = self.next_id.wrapping_add(1);
                return Ok(Some(len));
            }
        }
    }
}

/// A socket for one port, bound. Allocates nothing, so a worker may call it.
pub(crate) fn bind_port(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM.nonblocking().cloexec(), Some(Protocol::UDP))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    ask_beside(&socket, Family::of(address.ip().into()))?;
    size_receive_buffer(&socket)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

impl PortSocket {
    fn recv(&self, buffer: &mut [u8], ignored: &Ignored, id: u16) -> io::Result<Option<usize>> {
        let family = Family::of(self.local.ip().into());
        let payload_at = ip_header_len(family) + udp::HEADER_LEN;
        let mut beside = Beside::default();
        let Some((payload_len, from)) = sys::receive(&self.socket, &mut buffer[payload_at..], |level, kind, data| beside.see(level, kind, data))?
        else {
            return Ok(None);
        };
        if ignored.contains(&beside.interface) {
            return Ok(None);
        }
        let (src, dst) = (Addr::from(from.ip()), Addr::from(self.local.ip()));
        let len = write_header(buffer, family, src, dst, protocol::UDP, udp::HEADER_LEN + payload_len, &beside, id);
        let datagram = &mut buffer[ip_header_len(family)..len];
        set_u16(datagram, udp::PORTS, from.port());
        set_u16(datagram, udp::PORTS + 2, self.local.port());
        set_u16(datagram, udp::LEN, (udp::HEADER_LEN + payload_len) as u16);
        set_u16(datagram, udp::CHECKSUM, 0);
        let sum = pseudo_header(src, dst, protocol::UDP, datagram.len() as u32) + Sum::of(datagram);
        set_u16(datagram, udp::CHECKSUM, sum.finish_udp().0);
        Ok(Some(len))
    }
}

impl IcmpSocket {
    /// For one family.
    pub fn open(family: Family, ignored: Ignored) -> Result<IcmpSocket, IcmpError> {
        let failed = |step| move |source| IcmpError::Io { step, source };
        let (domain, protocol) = match family {
            Family::V4 => (Domain::IPV4, Protocol::ICMPV4),
            Family::V6 => (Domain::IPV6, Protocol::ICMPV6),
        };
        let socket = Socket::new(domain, Type::RAW.nonblocking().cloexec(), Some(protocol)).map_err(|source| match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => IcmpError::NotPermitted,
            Some(libc::EAFNOSUPPORT) => IcmpError::NoFamily(family),
            _ => failed("opening it")(source),
        })?;
        filter_types(&socket, family).map_err(failed("choosing the messages"))?;
        ask_beside(&socket, family).map_err(failed("asking for header fields"))?;
        size_receive_buffer(&socket).map_err(failed("sizing its buffer"))?;
        Ok(IcmpSocket { socket, family, ignored })
    }

    /// Other interfaces to be passed over, for when the TUN `host` was made anew.
    pub fn ignore(&mut self, ignored: Ignored) {
        self.ignored = ignored;
    }

    /// The next message, as a whole IP packet at the start of `buffer`: its length, or `None` if there is none.
    pub fn recv(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        check_room(buffer)?;
        loop {
            let mut beside = Beside::default();
            // Over IPv4 the header comes with it; over IPv6 it never does (RFC 3542 §3).
            let at = if self.family == Family::V4 { 0 } else { ipv6::HEADER_LEN };
            let received = sys::receive(&self.socket, &mut buffer[at..], |level, kind, data| beside.see(level, kind, data))?;
            let Some((len, from)) = received else { return Ok(None) };
            if self.ignored.contains(&beside.interface) {
                continue;
            }
            let packet_len = match self.family {
                Family::V4 => settle_v4(&mut buffer[..len]),
                Family::V6 => beside.destination.map(|destination| {
                    let (src, dst) = (from.ip().into(), destination.into());
                    // Its checksum was verified by the kernel and covers the same addresses: it stays.
                    write_header(buffer, Family::V6, src, dst, protocol::ICMPV6, len, &beside, 0)
                }),
            };
            if packet_len.is_some() {
                return Ok(packet_len);
            }
        }
    }

    /// Messages that the kernel dropped at this socket.
    pub fn kernel_drops(&self) -> io::Result<u32> {
        sys::socket_drops(&self.socket)
    }
}

impl AsRawFd for PortSockets {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.0.as_raw_fd()
    }
}

impl AsFd for PortSockets {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}

impl AsRawFd for IcmpSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl AsFd for IcmpSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Beside {
    fn see(&mut self, level: libc::c_int, kind: libc::c_int, data: &[u8]) {
        match (level, kind) {
            // struct in_pktinfo: the interface, then two addresses.
            (libc::IPPROTO_IP, libc::IP_PKTINFO) => self.interface = sys::control_number(data).unwrap_or(0) as u32,
            // struct in6_pktinfo: the destination, then the interface.
            (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                if let Some((destination, interface)) = data.split_first_chunk::<16>() {
                    self.destination = Some(Ipv6Addr::from(*destination));
                    self.interface = sys::control_number(interface).unwrap_or(0) as u32;
                }
            }
            (libc::IPPROTO_IP, libc::IP_TTL) | (libc::IPPROTO_IPV6, libc::IPV6_HOPLIMIT) => {
                self.ttl = sys::control_number(data).unwrap_or(0) as u8;
            }
            (libc::IPPROTO_IP, libc::IP_TOS) | (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => {
                self.traffic_class = sys::control_number(data).unwrap_or(0) as u8;
            }
            _ => {}
        }
    }
}

fn ip_header_len(family: Family) -> usize {
    match family {
        Family::V4 => ipv4::HEADER_LEN,
        Family::V6 => ipv6::HEADER_LEN,
    }
}

/// Writes the IP header before a payload that lies behind it already. Returns the packet's length.
#[allow(clippy::too_many_arguments)]
fn write_header(buffer: &mut [u8], family: Family, src: Addr, dst: Addr, protocol: u8, payload_len: usize, beside: &Beside, id: u16) -> usize {
    match family {
        Family::V4 => {
            let header = &mut buffer[..ipv4::HEADER_LEN];
            header.fill(0);
            header[0] = 0x45;
            header[ipv4::TRAFFIC_CLASS] = beside.traffic_class;
            set_u16(header, ipv4::TOTAL_LEN, (ipv4::HEADER_LEN + payload_len) as u16);
            // It may be cut again, so it needs one (RFC 6864 §4.1); DF stays clear.
            set_u16(header, ipv4::ID, id);
            header[ipv4::TTL] = beside.ttl;
            header[ipv4::PROTOCOL] = protocol;
            header[ipv4::SRC..ipv4::DST].copy_from_slice(&src.v4_octets());
            header[ipv4::DST..].copy_from_slice(&dst.v4_octets());
            ipv4::fill_checksum(header);
            ipv4::HEADER_LEN + payload_len
        }
        Family::V6 => {
            let header = &mut buffer[..ipv6::HEADER_LEN];
            header.fill(0);
            header[0] = 0x60 | beside.traffic_class >> 4;
            header[1] = beside.traffic_class << 4;
            set_u16(header, ipv6::PAYLOAD_LEN, payload_len as u16);
            header[ipv6::NEXT_HEADER] = protocol;
            header[ipv6::HOP_LIMIT] = beside.ttl;
            header[ipv6::SRC..ipv6::DST].copy_from_slice(&src.v6_octets());
            header[ipv6::DST..].copy_from_slice(&dst.v6_octets());
            ipv6::HEADER_LEN + payload_len
        }
    }
}

/// Makes a header that the kernel passed whole: the length is what came, and nothing says fragment any more. The length in it is in
/// network order and right on Linux; other systems' raw sockets differ, so nothing is lost by writing it. `None` if it is no header.
fn settle_v4(packet: &mut [u8]) -> Option<usize> {
    let header = packet.first_chunk::<{ ipv4::HEADER_LEN }>()?;
    let header_len = ipv4::header_len(header);
    if !(ipv4::HEADER_LEN..=packet.len()).contains(&header_len) || packet.len() > 65_535 {
        return None;
    }
    let dont_fragment = ipv4::flags_offset(header) & ipv4::DONT_FRAGMENT;
    set_u16(packet, ipv4::TOTAL_LEN, packet.len() as u16);
    set_u16(packet, ipv4::FLAGS_OFFSET, dont_fragment);
    ipv4::fill_checksum(packet);
    Some(packet.len())
}

/// Has the kernel say beside each datagram what its IP header said.
fn ask_beside(socket: &Socket, family: Family) -> io::Result<()> {
    let (level, options) = match family {
        Family::V4 => (libc::IPPROTO_IP, [libc::IP_PKTINFO, libc::IP_RECVTTL, libc::IP_RECVTOS]),
        Family::V6 => (libc::IPPROTO_IPV6, [libc::IPV6_RECVPKTINFO, libc::IPV6_RECVHOPLIMIT, libc::IPV6_RECVTCLASS]),
    };
    options.into_iter().try_for_each(|option| sys::set_option(socket, level, option, 1))
}

/// Lets only echo replies and errors through. In both filters a set bit blocks its type.
fn filter_types(socket: &Socket, family: Family) -> io::Result<()> {
    match family {
        Family::V4 => {
            let blocked = ICMP_TYPES.iter().fold(u32::MAX, |mask, kind| mask & !(1 << kind));
            sys::set_option(socket, libc::SOL_RAW, ICMP_FILTER, blocked)
        }
        Family::V6 => {
            let mut blocked = [u32::MAX; 8];
            for kind in ICMPV6_TYPES {
                blocked[usize::from(kind) / 32] &= !(1 << (kind % 32));
            }
            sys::set_option(socket, libc::SOL_ICMPV6, ICMPV6_FILTER, blocked)
        }
    }
}

/// linux/icmp.h, and in it: echo reply, destination unreachable, time exceeded, parameter problem.
const ICMP_FILTER: libc::c_int = 1;
const ICMP_TYPES: [u8; 4] = [0, 3, 11, 12];
/// linux/icmpv6.h, and in it: destination unreachable, packet too big, time exceeded, parameter problem, echo reply.
const ICMPV6_FILTER: libc::c_int = 1;
const ICMPV6_TYPES: [u8; 5] = [1, 2, 3, 4, 129];

fn size_receive_buffer(socket: &Socket) -> io::Result<()> {
    sys::set_option(socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, RECEIVE_BUFFER_LEN)
        .or_else(|_| sys::set_option(socket, libc::SOL_SOCKET, libc::SO_RCVBUF, RECEIVE_BUFFER_LEN))
}

fn check_room(buffer: &[u8]) -> io::Result<()> {
    if buffer.len() < PACKET_LEN_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the buffer is smaller than PACKET_LEN_MAX"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr, UdpSocket};

    use super::*;
    use crate::testing::{loopback, wait};

    /// Reads a UDP packet as an independent parser does: header checksum, UDP checksum, source, payload.
    fn check_udp(packet: &[u8], dst: SocketAddr, payload: &[u8]) -> (u8, SocketAddr) {
        let parsed = etherparse::SlicedPacket::from_ip(packet).unwrap();
        let Some(etherparse::TransportSlice::Udp(udp)) = parsed.transport else { panic!("{parsed:?}") };
        let header = udp.to_header();
        let (ttl, src) = match parsed.net.unwrap() {
            etherparse::NetSlice::Ipv4(ip) => {
                let ip_header = ip.header();
                assert_eq!(ip_header.to_header().calc_header_checksum(), ip_header.header_checksum());
                assert!(!ip_header.dont_fragment() && !ip_header.more_fragments() && ip_header.fragments_offset().value() == 0);
                assert_eq!(usize::from(ip_header.total_len()), packet.len());
                assert_eq!(header.calc_checksum_ipv4(&ip_header.to_header(), udp.payload()).unwrap(), header.checksum);
                assert_eq!(IpAddr::V4(ip_header.destination_addr()), dst.ip());
                (ip_header.ttl(), IpAddr::V4(ip_header.source_addr()))
            }
            etherparse::NetSlice::Ipv6(ip) => {
                assert_eq!(header.calc_checksum_ipv6(&ip.header().to_header(), udp.payload()).unwrap(), header.checksum);
                assert_eq!(IpAddr::V6(ip.header().destination_addr()), dst.ip());
                (ip.header().hop_limit(), IpAddr::V6(ip.header().source_addr()))
            }
            other => panic!("{other:?}"),
        };
        assert_eq!(header.destination_port, dst.port());
        assert!(udp.payload() == payload);
        (ttl, (src, header.source_port).into())
    }

    #[test]
    fn datagrams_up_to_the_largest_come_as_whole_packets() {
        let Some(netns) = loopback(65_536) else { return };
        netns
            .run(|| {
                let mut ports = PortSockets::new(vec![]).unwrap();
                let mut buffer = vec![0; PACKET_LEN_MAX];
                for (address, largest) in [("127.0.0.1:3000", 65_507), ("[::1]:3000", 65_527)] {
                    let address: SocketAddr = address.parse().unwrap();
                    ports.bind_one(address).unwrap();
                    let client = UdpSocket::bind((address.ip(), 0)).unwrap();
                    for len in [0, 1, 1472, 9000, 9001, largest] {
                        let payload: Vec<u8> = (0..len).map(|at| (at * 31 % 253) as u8).collect();
                        client.send_to(&payload, address).unwrap();
                        wait(&ports);
                        let len = ports.recv(&mut buffer).unwrap().unwrap();
                        assert_eq!(check_udp(&buffer[..len], address, &payload), (64, client.local_addr().unwrap()));
                        assert_eq!(ports.recv(&mut buffer).unwrap(), None);
                    }
                }
                assert_eq!((ports.len(), ports.kernel_drops()), (2, 0));
            })
            .unwrap();
    }

    #[test]
    fn the_set_of_ports_follows_what_is_wanted_and_names_what_is_taken() {
        let Some(netns) = loopback(65_536) else { return };
        netns
            .run(|| {
                let mut ports = PortSockets::new(vec![]).unwrap();
                let address = |port| SocketAddr::from(([127, 0, 0, 1], port));
                let taken = UdpSocket::bind(address(3002)).unwrap();
                let failed = ports.set(&[address(3001), address(3002), address(3003)]);
                assert_eq!(failed.len(), 1);
                assert_eq!((failed[0].0, failed[0].1.raw_os_error()), (address(3002), Some(libc::EADDRINUSE)));
                drop(taken);
                assert!(ports.set(&[address(3002), address(3003)]).is_empty());
                let mut bound: Vec<_> = ports.bound().map(|address| address.port()).collect();
                bound.sort();
                assert_eq!(bound, [3002, 3003]);
                UdpSocket::bind(address(3001)).unwrap();
                ports.release(address(3003));
                assert_eq!(ports.len(), 1);
                assert!(ports.set(&[]).is_empty() && ports.is_empty());
            })
            .unwrap();
    }

    #[test]
    fn what_came_through_an_ignored_interface_is_passed_over() {
        let Some(netns) = loopback(65_536) else { return };
        netns
            .run(|| {
                // The loopback interface is the first of each namespace.
                let mut ports = PortSockets::new(vec![1]).unwrap();
                let address: SocketAddr = "127.0.0.1:3000".parse().unwrap();
                ports.bind_one(address).unwrap();
                let client = UdpSocket::bind("127.0.0.1:0").unwrap();
                client.send_to(b"ours", address).unwrap();
                wait(&ports);
                let mut buffer = vec![0; PACKET_LEN_MAX];
                assert_eq!(ports.recv(&mut buffer).unwrap(), None);
                ports.ignore(vec![7]);
                client.send_to(b"theirs", address).unwrap();
                wait(&ports);
                assert!(ports.recv(&mut buffer).unwrap().is_some());
            })
            .unwrap();
    }

    #[test]
    fn port_unreachable_comes_as_a_whole_packet_in_both_families() {
        let Some(netns) = loopback(65_536) else { return };
        netns
            .run(|| {
                let mut buffer = vec![0; PACKET_LEN_MAX];
                for (family, loopback) in [(Family::V4, "127.0.0.1"), (Family::V6, "::1")] {
                    let loopback: IpAddr = loopback.parse().unwrap();
                    let socket = IcmpSocket::open(family, vec![]).unwrap();
                    let client = UdpSocket::bind((loopback, 0)).unwrap();
                    client.send_to(b"to nobody", (loopback, 9)).unwrap();
                    wait(&socket);
                    let len = socket.recv(&mut buffer).unwrap().unwrap();
                    let packet = buffer[..len].to_vec();
                    let parsed = etherparse::SlicedPacket::from_ip(&packet).unwrap();
                    match (parsed.net.unwrap(), parsed.transport.unwrap()) {
                        (etherparse::NetSlice::Ipv4(ip), etherparse::TransportSlice::Icmpv4(icmp)) => {
                            assert_eq!(ip.header().to_header().calc_header_checksum(), ip.header().header_checksum());
                            assert_eq!(usize::from(ip.header().total_len()), len);
                            assert_eq!((IpAddr::V4(ip.header().destination_addr()), icmp.type_u8(), icmp.code_u8()), (loopback, 3, 3));
                        }
                        (etherparse::NetSlice::Ipv6(ip), etherparse::TransportSlice::Icmpv6(icmp)) => {
                            assert_eq!((IpAddr::V6(ip.header().destination_addr()), icmp.type_u8(), icmp.code_u8()), (loopback, 1, 4));
                            assert!(icmp.is_checksum_valid(ip.header().source(), ip.header().destination()));
                            assert_eq!(ip.header().hop_limit(), 64);
                        }
                        other => panic!("{other:?}"),
                    }
                    assert_eq!(socket.recv(&mut buffer).unwrap(), None);
                    assert_eq!(socket.kernel_drops().unwrap(), 0);
                }
            })
            .unwrap();
    }

    #[test]
    fn a_reassembled_echo_reply_is_no_fragment_and_echo_requests_do_not_come() {
        let Some(netns) = loopback(1500) else { return };
        netns
            .run(|| {
                let socket = IcmpSocket::open(Family::V4, vec![]).unwrap();
                let pinger = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4)).unwrap();
                // An echo request of 3,000 bytes, in fragments over a loopback of 1,500.
                sys::set_option(&pinger, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DONT).unwrap();
                let mut echo = vec![0x5a; 3000];
                echo[..8].copy_from_slice(&[8, 0, 0, 0, 0x12, 0x34, 0, 1]);
                let sum = Sum::of(&echo).finish().to_bytes();
                echo[2..4].copy_from_slice(&sum);
                pinger.send_to(&echo, &SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).unwrap();
                wait(&socket);
                let mut buffer = vec![0; PACKET_LEN_MAX];
                let len = socket.recv(&mut buffer).unwrap().unwrap();
                assert_eq!((len, buffer[20]), (3020, 0), "an echo reply");
                let header = buffer.first_chunk().unwrap();
                assert_eq!((usize::from(ipv4::total_len(header)), ipv4::flags_offset(header) & !ipv4::DONT_FRAGMENT), (3020, 0));
                assert!(Sum::of(&buffer[..20]).is_whole() && Sum::of(&buffer[20..len]).is_whole());
                assert_eq!(socket.recv(&mut buffer).unwrap(), None);
            })
            .unwrap();
    }
}
