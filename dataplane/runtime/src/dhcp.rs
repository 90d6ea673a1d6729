//! A DHCP relay for pods: a routed pod has no link to a DHCP server, so its client's broadcasts are carried there and back.
//!
//! Each client has a socket in the gateway's namespace, bound to its veth: a broadcast from 0.0.0.0 is delivered to it before any route or
//! rule is asked (`ip_route_input_slow` in net/ipv4/route.c), and nothing else of a pod without an address is. Requests go on to the
//! servers from the gateway's address, which is also the relay's address in them (`giaddr`): so a server chooses from the node's
//! range, and its answers come back to the gateway's own stack, which hands them here. An answer reaches the pod as a broadcast on its
//! veth alone.
//!
//! A pod is believed nothing: its messages must carry its own Ethernet address and no other relay's, and only so many per second.
//! An answer is taken from a configured server alone.
//!
//! Read first: RFC 1542 §4, RFC 2131 §2.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsRawFd, RawFd};

use podgate_core::addr::Addr;
use podgate_core::flow::Now;
use podgate_core::icmp::TokenBucket;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{DhcpOpCode, DhcpPacket, EthernetAddress, IpProtocol, Ipv4Packet, Ipv4Repr, UdpPacket, UdpRepr};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::netns::Netns;

/// Where servers and relays listen.
const SERVER: u16 = 67;
/// Where clients listen.
const CLIENT: u16 = 68;
/// RFC 1542 §4.1.1: a message that has passed so many relays is dropped.
const HOPS_MAX: u8 = 16;
/// Messages that one client may send in a second. A client sends a handful in its life.
const REQUESTS_PER_SECOND: u32 = 20;
/// The longest message that is relayed, in bytes: an Ethernet frame's.
const MESSAGE_LEN_MAX: usize = 1500;

/// A pod whose DHCP client is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DhcpClient {
    /// The gateway's end of its veth.
    pub veth: String,
    /// The Ethernet address of the pod's end.
    pub mac: [u8; 6],
}

/// Why a client cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum DhcpError {
    /// Its socket could not be had.
    #[error("the DHCP relay cannot listen on {veth}: {source}")]
    Socket {
        /// The veth.
        veth: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The gateway's namespace could not be entered.
    #[error("the DHCP relay cannot enter the gateway's namespace: {0}")]
    Netns(io::Error),
}

/// A client and its socket.
#[derive(Debug)]
pub(crate) struct Served {
    client: DhcpClient,
    socket: Socket,
    budget: TokenBucket,
}

impl Served {
    /// Listens to `client`, in the namespace that has the veths.
    pub(crate) fn listen(netns: &Netns, client: &DhcpClient) -> Result<Served, DhcpError> {
        let open = || -> io::Result<Socket> {
            let socket = Socket::new(Domain::IPV4, Type::DGRAM.nonblocking().cloexec(), Some(Protocol::UDP))?;
            // Every client's socket has the same port, each on a device of its own.
            socket.set_reuse_address(true)?;
            socket.set_broadcast(true)?;
            socket.bind_device(Some(client.veth.as_bytes()))?;
            socket.bind(&SockAddr::from(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, SERVER)))?;
            Ok(socket)
        };
        let socket = netns.run(open).map_err(DhcpError::Netns)?.map_err(|source| DhcpError::Socket { veth: client.veth.clone(), source })?;
        Ok(Served { client: client.clone(), socket, budget: TokenBucket::new(REQUESTS_PER_SECOND, REQUESTS_PER_SECOND) })
    }
}

impl AsRawFd for Served {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

/// The relay of one node.
#[derive(Debug, Default)]
pub(crate) struct Relay {
    servers: Vec<Ipv4Addr>,
    served: Vec<Served>,
}

impl Relay {
    /// Asks these servers from now on.
    pub(crate) fn set_servers(&mut self, servers: Vec<Ipv4Addr>) {
        self.servers = servers;
    }

    /// Serves one more client.
    pub(crate) fn add(&mut self, served: Served) {
        self.served.push(served);
    }

    /// Serves no others than `clients`.
    pub(crate) fn keep(&mut self, clients: &[DhcpClient]) {
        self.served.retain(|served| clients.contains(&served.client));
    }

    /// What clients have sent, as packets for the servers, from `gateway`. Each client's turn is bounded: true if one may have more.
    pub(crate) fn requests(&mut self, gateway: Option<Addr>, now: Now, mut send: impl FnMut(&[u8])) -> bool {
        let mut more = false;
        let mut message = [0; MESSAGE_LEN_MAX];
        for served in &mut self.served {
            let mut left = REQUESTS_PER_SECOND;
            // What is longer than a message may be is cut, and no longer one.
            while left > 0
                && let Ok(len) = io::Read::read(&mut &served.socket, &mut message)
            {
                left -= 1;
                let Some(gateway) = gateway.filter(|gateway| gateway.is_v4()).map(|gateway| Ipv4Addr::from(gateway.v4_octets())) else { continue };
                if served.budget.take(now) && stamp(&mut message[..len], &served.client.mac, gateway).is_some() {
                    for server in &self.servers {
                        send(&datagram(gateway, *server, &message[..len]));
                    }
                }
            }
            more |= left == 0;
        }
        more
    }

    /// Takes an answer of a server to its client. False if the packet is none, and somebody else's.
    pub(crate) fn answer(&self, packet: &[u8]) -> bool {
        let Some((server, gateway, message)) = from_server(packet) else { return false };
        if !self.servers.contains(&server) {
            return false;
        }
        if let Some(mac) = client_of(message, gateway)
            && let Some(served) = self.served.iter().find(|served| served.client.mac == mac)
        {
            // That it cannot be sent is as if it were lost: the client asks again.
            let _ = served.socket.send_to(message, &SockAddr::from(SocketAddrV4::new(Ipv4Addr::BROADCAST, CLIENT)));
        }
        true
    }
}

/// Makes a client's message one that `relay` has passed on. Nothing if it is not the client's to send.
fn stamp(message: &mut [u8], mac: &[u8; 6], relay: Ipv4Addr) -> Option<()> {
    let mut packet = DhcpPacket::new_checked(message).ok()?;
    let its_own = packet.client_hardware_address() == EthernetAddress(*mac);
    let first = packet.relay_agent_ip().is_unspecified();
    if packet.opcode() != DhcpOpCode::Request || !its_own || !first || packet.hops() >= HOPS_MAX {
        return None;
    }
    packet.set_hops(packet.hops() + 1);
    packet.set_relay_agent_ip(relay);
    Some(())
}

/// The server, the relay and the message of a datagram from a server's port to a relay's.
fn from_server(packet: &[u8]) -> Option<(Ipv4Addr, Ipv4Addr, &[u8])> {
    let ip = Ipv4Packet::new_checked(packet).ok().filter(|ip| ip.next_header() == IpProtocol::Udp)?;
    let udp = UdpPacket::new_checked(ip.payload()).ok()?;
    ((udp.src_port(), udp.dst_port()) == (SERVER, SERVER)).then(|| (ip.src_addr(), ip.dst_addr(), udp.payload()))
}

/// Whom a server's message is for, if it is an answer by way of `relay`.
fn client_of(message: &[u8], relay: Ipv4Addr) -> Option<[u8; 6]> {
    let packet = DhcpPacket::new_checked(message).ok()?;
    let ours = packet.opcode() == DhcpOpCode::Reply && packet.relay_agent_ip() == relay;
    ours.then(|| packet.client_hardware_address().0)
}

/// A datagram from one relay's or server's port to another's.
fn datagram(src_addr: Ipv4Addr, dst_addr: Ipv4Addr, message: &[u8]) -> Vec<u8> {
    let udp = UdpRepr { src_port: SERVER, dst_port: SERVER };
    let payload_len = udp.header_len() + message.len();
    let ip = Ipv4Repr { src_addr, dst_addr, next_header: IpProtocol::Udp, payload_len, hop_limit: 64 };
    let mut packet = vec![0; ip.buffer_len() + payload_len];
    let checksums = ChecksumCapabilities::default();
    ip.emit(&mut Ipv4Packet::new_unchecked(&mut packet), &checksums);
    let mut datagram = UdpPacket::new_unchecked(&mut packet[ip.buffer_len()..]);
    udp.emit(&mut datagram, &src_addr.into(), &dst_addr.into(), message.len(), |to| to.copy_from_slice(message), &checksums);
    packet
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
    const RELAY: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 1);
    const SERVER_ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 53);

    /// A BOOTP message of that kind from that station: RFC 951 §3, RFC 2131 §2, with the magic cookie and the end option.
    fn message(op: u8, mac: [u8; 6], hops: u8, relay: Ipv4Addr) -> Vec<u8> {
        let mut bytes = vec![0; 236];
        (bytes[0], bytes[1], bytes[2], bytes[3]) = (op, 1, 6, hops);
        bytes[24..28].copy_from_slice(&relay.octets());
        bytes[28..34].copy_from_slice(&mac);
        bytes.extend([99, 130, 83, 99, 53, 1, 1, 255]);
        bytes
    }

    #[test]
    fn a_clients_own_message_is_passed_on_in_the_relays_name() {
        let mut bytes = message(1, MAC, 0, Ipv4Addr::UNSPECIFIED);
        stamp(&mut bytes, &MAC, RELAY).unwrap();
        assert_eq!(bytes, message(1, MAC, 1, RELAY));
        let packet = datagram(RELAY, SERVER_ADDRESS, &bytes);
        let sliced = etherparse::SlicedPacket::from_ip(&packet).unwrap();
        let etherparse::TransportSlice::Udp(udp) = sliced.transport.unwrap() else { panic!("{packet:?}") };
        assert_eq!((udp.source_port(), udp.destination_port(), udp.payload()), (67, 67, &bytes[..]));
    }

    #[test]
    fn what_is_not_the_clients_to_send_is_not_passed_on() {
        let own = message(1, MAC, 0, Ipv4Addr::UNSPECIFIED);
        for (bytes, why) in [
            (message(2, MAC, 0, Ipv4Addr::UNSPECIFIED), "an answer"),
            (message(1, [2, 0, 0, 0, 0, 8], 0, Ipv4Addr::UNSPECIFIED), "another's address"),
            (message(1, MAC, 0, Ipv4Addr::new(10, 244, 1, 9)), "another relay's"),
            (message(1, MAC, 16, Ipv4Addr::UNSPECIFIED), "too many relays"),
            (own[..200].to_vec(), "cut"),
            (Vec::new(), "empty"),
        ] {
            assert_eq!(stamp(&mut bytes.clone(), &MAC, RELAY), None, "{why}");
        }
    }

    #[test]
    fn an_answer_finds_its_client_and_nothing_else_is_taken_for_one() {
        let answer = message(2, MAC, 1, RELAY);
        let packet = datagram(SERVER_ADDRESS, RELAY, &answer);
        assert_eq!(from_server(&packet), Some((SERVER_ADDRESS, RELAY, &answer[..])));
        assert_eq!(client_of(&answer, RELAY), Some(MAC));
        assert_eq!(client_of(&message(1, MAC, 1, RELAY), RELAY), None, "a request");
        assert_eq!(client_of(&answer, SERVER_ADDRESS), None, "by another relay");
        let mut to_status_page = packet.clone();
        to_status_page[23] = 80;
        assert_eq!(from_server(&to_status_page), None);
        for len in 0..packet.len() {
            let _ = from_server(&packet[..len]).and_then(|(_, gateway, message)| client_of(message, gateway));
        }
        let relay = Relay { servers: vec![SERVER_ADDRESS], served: Vec::new() };
        assert!(relay.answer(&packet), "with its client gone it is nobody else's either");
        assert!(!relay.answer(&datagram(Ipv4Addr::new(192, 0, 2, 54), RELAY, &answer)));
    }
}
