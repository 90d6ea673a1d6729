//! Packets that no honest socket would send: false sources, router advertisements, floods of solicitations.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd;

use nix::sys::socket::{self as nix_socket, AddressFamily, LinkAddr, MsgFlags, SockFlag, SockType};
use socket2::{Protocol, Socket, Type};

use super::server::SPOOF_MARK;
use super::{ExchangeError, domain};

const UDP: u8 = 17;
const ICMPV6: u8 = 58;

/// Sends the datagram [`SPOOF_MARK`] `text` to `to` as if it came from `source`.
pub fn spoof_udp(source: IpAddr, to: SocketAddr, text: &str) -> Result<(), ExchangeError> {
    send_ip(&udp_packet(source, to, &[SPOOF_MARK, text.as_bytes()].concat()), to.ip())
}

/// A whole IP packet with one datagram.
pub fn udp_packet(source: IpAddr, to: SocketAddr, payload: &[u8]) -> Vec<u8> {
    let len = (8 + payload.len()) as u16;
    // RFC 768: source port, destination port, length, checksum.
    let mut datagram = [5555_u16.to_be_bytes(), to.port().to_be_bytes(), len.to_be_bytes(), [0, 0]].concat();
    datagram.extend_from_slice(payload);
    let sum = transport_checksum(source, to.ip(), UDP, &datagram);
    datagram[6..8].copy_from_slice(&if sum == 0 { 0xffff_u16 } else { sum }.to_be_bytes());
    ip_packet(source, to.ip(), UDP, 64, &datagram)
}

/// Sends an echo request to `to` as if it came from `source`; `mark` is what the pinged server would note.
pub fn spoof_echo(source: IpAddr, to: IpAddr, mark: u64) -> Result<(), ExchangeError> {
    let mut message = super::ping::echo_request(to, 0x5555, 1, &mark.to_be_bytes());
    let protocol = if to.is_ipv4() { 1 } else { ICMPV6 };
    if to.is_ipv6() {
        let sum = transport_checksum(source, to, protocol, &message);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    send_ip(&ip_packet(source, to, protocol, 64, &message), to)
}

/// Sends the ICMPv6 message `body` (type first, checksum zero) with hop limit 255 from `source` to `to`.
pub fn icmpv6(source: Ipv6Addr, to: Ipv6Addr, body: &[u8]) -> Result<(), ExchangeError> {
    let (source, to) = (IpAddr::V6(source), IpAddr::V6(to));
    send_ip(&ip_packet(source, to, ICMPV6, 255, &with_checksum(source, to, body)), to)
}

/// Sends the whole IP packet `packet`, whose destination is `to`, the way the calling thread's namespace routes it.
pub fn send_ip(packet: &[u8], to: IpAddr) -> Result<(), ExchangeError> {
    // IPPROTO_RAW: the IP header is ours (raw(7); for IPv6 since Linux 4.5, IPV6_HDRINCL).
    let socket = Socket::new(domain(to), Type::RAW, Some(Protocol::from(255))).map_err(ExchangeError::local("open a raw socket"))?;
    if to.is_ipv6() {
        socket.set_header_included_v6(true).map_err(ExchangeError::local("send with a header of its own"))?;
    }
    let address = SocketAddr::new(to, 0);
    socket.send_to(packet, &address.into()).map_err(ExchangeError::silent(address))?;
    Ok(())
}

/// Sends `count` neighbour solicitations and as many ARP requests on `interface`, each from another made-up source that asks for
/// `target_v6` or `target_v4`.
pub fn neighbour_flood(interface: &str, target_v4: Ipv4Addr, target_v6: Ipv6Addr, count: u32) -> Result<(), ExchangeError> {
    let local = |doing| move |errno: nix::Error| ExchangeError::Local { doing, source: errno.into() };
    let link = link_address(interface)?;
    let mac = link.addr().unwrap_or_default();
    let socket = nix_socket::socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None).map_err(local("open a packet socket"))?;
    nix_socket::bind(socket.as_raw_fd(), &link).map_err(local("bind a packet socket"))?;
    for number in 0..count {
        let [a, b, c, d] = number.to_be_bytes();
        let source = Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0x5e, 0xed, 0, 0, a, b, c, d]);
        // RFC 4861 §4.3: type 135, then the target and the source link-layer address option.
        let body = [&[135, 0, 0, 0, 0, 0, 0, 0][..], &target_v6.octets()[..], &[1, 1][..], &mac[..]].concat();
        let message = with_checksum(source.into(), target_v6.into(), &body);
        let packet = ip_packet(source.into(), target_v6.into(), ICMPV6, 255, &message);
        let solicitation = [&[0xff; 6][..], &mac[..], &[0x86, 0xdd][..], &packet[..]].concat();
        // RFC 826: Ethernet, IPv4, request; sender, target.
        let arp =
            [&[0xff; 6][..], &mac[..], &[0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, 1][..], &mac[..], &[10, b, c, d][..], &[0; 6][..], &target_v4.octets()[..]]
                .concat();
        for frame in [solicitation, arp] {
            nix_socket::send(socket.as_raw_fd(), &frame, MsgFlags::empty()).map_err(local("send a frame"))?;
        }
    }
    Ok(())
}

/// The internet checksum of `parts` one after the other (RFC 1071); each but the last must have an even length.
pub fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0_u32;
    for part in parts {
        for word in part.chunks(2) {
            sum += u32::from(word[0]) << 8 | u32::from(word.get(1).copied().unwrap_or(0));
        }
    }
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    !(sum as u16)
}

fn with_checksum(source: IpAddr, to: IpAddr, body: &[u8]) -> Vec<u8> {
    let mut message = body.to_vec();
    let sum = transport_checksum(source, to, ICMPV6, &message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    message
}

/// Over the pseudo-header of RFC 793 §3.1 or RFC 8200 §8.1 and the message, whose own field is zero.
fn transport_checksum(source: IpAddr, to: IpAddr, protocol: u8, message: &[u8]) -> u16 {
    let tail = [0, protocol, (message.len() >> 8) as u8, message.len() as u8];
    checksum(&[&octets(source), &octets(to), &tail, message])
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn ip_packet(source: IpAddr, to: IpAddr, protocol: u8, hops: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet;
    if to.is_ipv4() {
        // RFC 791 §3.1.
        let len = ((20 + payload.len()) as u16).to_be_bytes();
        packet = vec![0x45, 0, len[0], len[1], 0, 0, 0, 0, hops, protocol, 0, 0];
        packet.extend(octets(source));
        packet.extend(octets(to));
        let sum = checksum(&[&packet]);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
    } else {
        // RFC 8200 §3.
        let len = (payload.len() as u16).to_be_bytes();
        packet = vec![0x60, 0, 0, 0, len[0], len[1], protocol, hops];
        packet.extend(octets(source));
        packet.extend(octets(to));
    }
    packet.extend_from_slice(payload);
    packet
}

fn link_address(interface: &str) -> Result<LinkAddr, ExchangeError> {
    let list = |source| ExchangeError::Local { doing: "list the interfaces", source };
    let interfaces = nix::ifaddrs::getifaddrs().map_err(|errno| list(errno.into()))?;
    let mut links = interfaces.filter(|entry| entry.interface_name == interface).filter_map(|entry| entry.address);
    let link = links.find_map(|address| address.as_link_addr().copied());
    link.ok_or_else(|| list(std::io::Error::new(std::io::ErrorKind::NotFound, format!("there is no {interface}"))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_of_the_example_in_rfc_1071_is_right() {
        assert_eq!(checksum(&[&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]]), !0xddf2);
    }

    #[test]
    fn a_header_with_its_checksum_sums_to_zero() {
        let packet = ip_packet("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap(), UDP, 64, b"data");
        assert_eq!(checksum(&[&packet[..20]]), 0);
    }
}
