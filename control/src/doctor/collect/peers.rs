//! Echoes to the other nodes' gateways, through the overlay: a small one, and one as large as a pod's largest packet.
//!
//! The node's own packets to a gateway's address take the way of the pods' (routing table 233, the TUN, the overlay), and the gateway there
//! answers by itself. They must not be cut on their way (`IP_PMTUDISC_PROBE`, ip(7)), so the large one tells whether the path carries what
//! pods send. All of a round are sent at once, so that a hundred silent nodes cost no more time than one.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use ipnetwork::IpNetwork;
use rustix::net::sockopt::{Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery, set_ip_mtu_discover, set_ipv6_mtu_discover};
use serde_json::Value;
use socket2::{Domain, Protocol, Socket, Type};

use super::super::facts::{Look, Peer, Unseen};
use crate::compile::gateway_address;

/// How long a round waits for what has not come back.
const PATIENCE: Duration = Duration::from_secs(1);

/// So many times is asked: a single packet may be lost anywhere.
const ROUNDS: usize = 3;

/// Bytes of the headers in front of an echo's data: IPv4 or IPv6, then ICMP.
const HEADERS_V4: usize = 20 + 8;
const HEADERS_V6: usize = 40 + 8;

/// Data of a small echo.
const SMALL_LEN: usize = 16;

/// An echo that is to come back, by the sequence number that it has.
type Wanted = BTreeMap<u16, (IpAddr, usize)>;

/// Asks every gateway in the table of peers.
pub(super) fn ask(table: &Value) -> Look<Vec<Peer>> {
    let mut peers: Vec<Peer> = table["peers"].as_array().into_iter().flatten().flat_map(gateways).collect();
    if peers.is_empty() {
        return Ok(peers);
    }
    let data_len = |peer: &Peer| (peer.size as usize).saturating_sub(if peer.gateway.is_ipv4() { HEADERS_V4 } else { HEADERS_V6 });
    let small = rounds(&peers.iter().map(|peer| (peer.gateway, SMALL_LEN)).collect::<Vec<_>>())?;
    peers.iter_mut().zip(small).for_each(|(peer, took)| peer.small = took);
    let answering: Vec<usize> = (0..peers.len()).filter(|at| peers[*at].small.is_some()).collect();
    let full = rounds(&answering.iter().map(|at| (peers[*at].gateway, data_len(&peers[*at]))).collect::<Vec<_>>())?;
    answering.iter().zip(full).for_each(|(at, took)| peers[*at].full = took);
    let silent: Vec<usize> = (0..peers.len()).filter(|at| peers[*at].small.is_none()).collect();
    let beside = rounds(&silent.iter().map(|at| (peers[*at].underlay.ip(), SMALL_LEN)).collect::<Vec<_>>())?;
    silent.iter().zip(beside).for_each(|(at, took)| peers[*at].beside = took);
    Ok(peers)
}

/// A gateway has one address of each family: that of the node's first range.
fn gateways(row: &Value) -> Vec<Peer> {
    let (Some(node), Some(underlay)) = (row["node"].as_str(), row["underlay"].as_str().and_then(|text| text.parse::<SocketAddr>().ok())) else {
        return Vec::new();
    };
    let size = row["mtu"].as_u64().and_then(|mtu| u32::try_from(mtu).ok()).unwrap_or_default();
    let cidrs: Vec<IpNetwork> = row["podCIDRs"].as_array().into_iter().flatten().filter_map(|text| text.as_str()?.parse().ok()).collect();
    let first = |v4: bool| cidrs.iter().copied().filter(|cidr| cidr.is_ipv4() == v4).find_map(gateway_address);
    let peer = |gateway| Peer { node: node.to_owned(), gateway, underlay, small: None, full: None, size, beside: None };
    [first(true), first(false)].into_iter().flatten().map(peer).collect()
}

/// Sends an echo with so much data to each of `targets`, again where none comes back; how long each took.
fn rounds(targets: &[(IpAddr, usize)]) -> Look<Vec<Option<Duration>>> {
    let mut took = vec![None; targets.len()];
    for v4 in [true, false] {
        let of_family: Vec<usize> = (0..targets.len()).filter(|at| targets[*at].0.is_ipv4() == v4).collect();
        if of_family.is_empty() {
            continue;
        }
        let socket = open(v4).map_err(|error| Unseen(format!("an ICMP socket cannot be opened: {error}")))?;
        for _ in 0..ROUNDS {
            // Sequence numbers are of 16 bits: a cluster of more nodes is looked at in part.
            let missing: Wanted =
                of_family.iter().filter(|at| took[**at].is_none()).filter_map(|at| Some((u16::try_from(*at).ok()?, targets[*at]))).collect();
            if missing.is_empty() {
                break;
            }
            for (number, after) in round(&socket, &missing) {
                took[usize::from(number)].get_or_insert(after);
            }
        }
    }
    Ok(took)
}

fn open(v4: bool) -> io::Result<Socket> {
    let (domain, protocol) = if v4 { (Domain::IPV4, Protocol::ICMPV4) } else { (Domain::IPV6, Protocol::ICMPV6) };
    // Raw for root; a ping socket where the machine lets users have one (`ping_group_range`, icmp(7)).
    let socket = Socket::new(domain, Type::RAW, Some(protocol)).or_else(|_| Socket::new(domain, Type::DGRAM, Some(protocol)))?;
    match v4 {
        true => set_ip_mtu_discover(&socket, Ipv4PathMtuDiscovery::PROBE)?,
        false => set_ipv6_mtu_discover(&socket, Ipv6PathMtuDiscovery::PROBE)?,
    }
    // For answers of thousands at once.
    let _ = socket.set_recv_buffer_size(4 << 20);
    Ok(socket)
}

fn round(socket: &Socket, missing: &Wanted) -> Vec<(u16, Duration)> {
    // By this an answer is known as one of this round's: a ping socket has an identifier of the kernel's choice.
    let mark = RandomState::new().hash_one(std::process::id()).to_be_bytes();
    let start = Instant::now();
    for (number, (to, len)) in missing {
        // What cannot be sent does not come back: that is the answer.
        let _ = socket.send_to(&echo_request(to.is_ipv4(), *number, &data(mark, *number, *len)), &SocketAddr::new(*to, 0).into());
    }
    let mut found = BTreeMap::new();
    let mut buffer = vec![0; 65_536];
    while found.len() < missing.len() {
        let left = PATIENCE.saturating_sub(start.elapsed());
        if left.is_zero() || socket.set_read_timeout(Some(left.max(Duration::from_millis(1)))).is_err() {
            break;
        }
        // A read that runs into its time, or an ICMP error that somebody reports: the clock decides.
        let Ok(received) = (&*socket).read(&mut buffer) else { continue };
        if let Some((number, echoed)) = echo_reply(&buffer[..received])
            && missing.get(&number).is_some_and(|(_, len)| echoed == data(mark, number, *len))
        {
            found.entry(number).or_insert_with(|| start.elapsed());
        }
    }
    found.into_iter().collect()
}

/// What an echo carries: the round's mark, its number, and as much else as makes `len` bytes.
fn data(mark: [u8; 8], number: u16, len: usize) -> Vec<u8> {
    let mut data = [&mark[..], &number.to_be_bytes()].concat();
    data.resize(len.max(SMALL_LEN), b'p');
    data
}

/// The sequence number and the data of an echo reply. A raw IPv4 socket shows the IP header as well (raw(7)), others do not.
fn echo_reply(packet: &[u8]) -> Option<(u16, &[u8])> {
    let header_len = if packet.first()? >> 4 == 4 { usize::from(packet[0] & 0xf) * 4 } else { 0 };
    let message = packet.get(header_len..)?;
    match message {
        [0 | 129, _, _, _, _, _, high, low, data @ ..] => Some((u16::from_be_bytes([*high, *low]), data)),
        _ => None,
    }
}

/// RFC 792 p. 14, RFC 4443 §4.1. The kernel fills in the checksum of ICMPv6 (RFC 3542 §3.1), for IPv4 it is ours.
fn echo_request(v4: bool, number: u16, data: &[u8]) -> Vec<u8> {
    let mut message = vec![if v4 { 8 } else { 128 }, 0, 0, 0];
    message.extend((std::process::id() as u16).to_be_bytes());
    message.extend(number.to_be_bytes());
    message.extend(data);
    if v4 {
        let sum: u32 = message.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]))).sum();
        let folded = (sum & 0xffff) + (sum >> 16);
        let checksum = !(((folded & 0xffff) + (folded >> 16)) as u16);
        message[2..4].copy_from_slice(&checksum.to_be_bytes());
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_gateway_has_one_address_of_each_family_in_its_nodes_first_range() {
        let row = json!({"node": "node-2", "underlay": "192.0.2.2:4790", "mtu": 1450,
            "podCIDRs": ["10.244.2.0/24", "fd00:77:2::/64", "10.244.9.0/24"], "addresses": []});
        let found: Vec<String> = gateways(&row).iter().map(|peer| format!("{} {}", peer.gateway, peer.size)).collect();
        assert_eq!(found, ["10.244.2.1 1450", "fd00:77:2::1 1450"]);
    }

    #[test]
    fn an_echo_request_has_a_checksum_that_comes_to_nothing() {
        let message = echo_request(true, 7, &data([1, 2, 3, 4, 5, 6, 7, 8], 7, 17));
        let sum: u32 = message.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]))).sum();
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff, "RFC 1071");
        assert_eq!(message.len(), 8 + 17);
    }

    #[test]
    fn a_reply_is_read_with_the_ip_header_of_a_raw_socket_and_without() {
        let reply = [0, 0, 0xab, 0xcd, 0, 1, 0, 7, b'd'];
        let raw = [&[0x45; 20][..], &reply].concat();
        assert_eq!(echo_reply(&reply), Some((7, &b"d"[..])));
        assert_eq!(echo_reply(&raw), Some((7, &b"d"[..])));
        assert_eq!(echo_reply(&[129, 0, 0, 0, 0, 1, 0, 7]), Some((7, &[][..])));
        assert_eq!(echo_reply(&[8, 0, 0, 0, 0, 1, 0, 7]), None, "a request");
        assert_eq!(echo_reply(&[]), None);
    }
}
