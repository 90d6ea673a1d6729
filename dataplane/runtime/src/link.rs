//! Two questions to rtnetlink about one interface, asked in the calling thread's namespace: what is it, and delete it.
//!
//! A TUN must know what already has its name before it takes a queue of it: of a multi-queue device the kernel gives a further queue
//! to anybody, and a queue that nobody reads swallows packets. The messages are few enough to be written by hand.
//!
//! Read first: rtnetlink(7); linux/if_link.h (`IFLA_TUN_*`).

use std::io::{self, Read, Write};

use socket2::{Domain, Protocol, Socket, Type};

/// What an interface is, as far as a TUN cares.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub(crate) struct Link {
    /// Its kind (`tun`, `veth`, …); empty for one without, such as a physical one.
    pub(crate) kind: String,
    /// `IFF_TUN` or `IFF_TAP`; 0 if it is no TUN device.
    pub(crate) tun_type: u8,
    /// Whether it was made with `IFF_MULTI_QUEUE`.
    pub(crate) multi_queue: bool,
    /// Queues that somebody holds, detached ones included.
    pub(crate) queues: u32,
    /// Packets that the interface dropped on their way in and out, as the kernel sees it.
    pub(crate) rx_dropped: u64,
    /// See `rx_dropped`.
    pub(crate) tx_dropped: u64,
}

const NLMSG_HEADER_LEN: usize = 16;
const IFINFO_LEN: usize = 16;
const TCMSG_LEN: usize = 20;
const ATTRIBUTE_HEADER_LEN: usize = 4;
const NESTED_MASK: u16 = 0x3fff;

/// linux/pkt_sched.h.
const TC_H_ROOT: u32 = 0xffff_ffff;
/// linux/rtnetlink.h.
const TCA_KIND: u16 = 1;

const IFLA_TUN_TYPE: u16 = 3;
const IFLA_TUN_MULTI_QUEUE: u16 = 7;
const IFLA_TUN_NUM_QUEUES: u16 = 8;
const IFLA_TUN_NUM_DISABLED_QUEUES: u16 = 9;

/// Places in `struct rtnl_link_stats64` (linux/if_link.h).
const STATS64_RX_DROPPED: usize = 6;
const STATS64_TX_DROPPED: usize = 7;

/// What the interface `name` is, if there is one.
pub(crate) fn find(name: &str) -> io::Result<Option<Link>> {
    match ask(libc::RTM_GETLINK, 0, name, None) {
        Ok(reply) => Ok(Some(parse_link(&reply))),
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Deletes the interface `name`.
pub(crate) fn delete(name: &str) -> io::Result<()> {
    ask(libc::RTM_DELLINK, libc::NLM_F_ACK as u16, name, None).map(|_| ())
}

/// Sets the length of the interface's queues, in packets. Unlike SIOCSIFTXQLEN, which only the machine's own root may use
/// (net/core/dev_ioctl.c), this works in a user namespace too.
pub(crate) fn set_queue_len(name: &str, packets: u32) -> io::Result<()> {
    ask(libc::RTM_NEWLINK, libc::NLM_F_ACK as u16, name, Some((libc::IFLA_TXQLEN, packets))).map(|_| ())
}

/// Takes the queueing discipline off the interface `name`, which is down and is never to have another: packets go straight to the driver. By
/// default a device of 256 queues has as many of 72 KiB (`pfifo_fast_init` in net/sched/sch_generic.c), used or not.
pub(crate) fn set_noqueue(name: &str) -> io::Result<()> {
    // linux/rtnetlink.h, struct tcmsg: family and padding, interface, handle, parent, info.
    const KIND: &[u8; 8] = b"noqueue\0";
    let len = NLMSG_HEADER_LEN + TCMSG_LEN + ATTRIBUTE_HEADER_LEN + KIND.len();
    let flags = libc::NLM_F_REQUEST | libc::NLM_F_ACK | libc::NLM_F_CREATE | libc::NLM_F_REPLACE;
    let mut request = Vec::with_capacity(len);
    request.extend((len as u32).to_ne_bytes());
    request.extend(libc::RTM_NEWQDISC.to_ne_bytes());
    request.extend((flags as u16).to_ne_bytes());
    request.extend([0; 8]); // sequence and port id
    request.extend([0; 4]);
    request.extend((nix::net::if_::if_nametoindex(name)? as i32).to_ne_bytes());
    request.extend(0u32.to_ne_bytes());
    request.extend(TC_H_ROOT.to_ne_bytes());
    request.extend(0u32.to_ne_bytes());
    request.extend(((ATTRIBUTE_HEADER_LEN + KIND.len()) as u16).to_ne_bytes());
    request.extend(TCA_KIND.to_ne_bytes());
    request.extend(KIND);
    exchange(&request).map(|_| ())
}

/// Sends one request about `name`, with a number to be set if there is one, and returns the payload of its answer.
fn ask(kind: u16, flags: u16, name: &str, number: Option<(u16, u32)>) -> io::Result<Vec<u8>> {
    let attribute_len = ATTRIBUTE_HEADER_LEN + name.len() + 1;
    let name_end = NLMSG_HEADER_LEN + IFINFO_LEN + attribute_len.next_multiple_of(4);
    let len = name_end + number.map_or(0, |_| ATTRIBUTE_HEADER_LEN + 4);
    let mut request = Vec::with_capacity(len);
    request.extend((len as u32).to_ne_bytes());
    request.extend(kind.to_ne_bytes());
    request.extend((libc::NLM_F_REQUEST as u16 | flags).to_ne_bytes());
    request.resize(NLMSG_HEADER_LEN + IFINFO_LEN, 0); // sequence, port id and struct ifinfomsg: all 0
    request.extend((attribute_len as u16).to_ne_bytes());
    request.extend(libc::IFLA_IFNAME.to_ne_bytes());
    request.extend(name.as_bytes());
    request.resize(name_end, 0);
    if let Some((attribute, value)) = number {
        request.extend((ATTRIBUTE_HEADER_LEN as u16 + 4).to_ne_bytes());
        request.extend(attribute.to_ne_bytes());
        request.extend(value.to_ne_bytes());
    }

    exchange(&request)
}

/// Sends one request and returns the payload of its answer.
fn exchange(request: &[u8]) -> io::Result<Vec<u8>> {
    let mut socket = Socket::new(Domain::from(libc::AF_NETLINK), Type::RAW, Some(Protocol::from(libc::NETLINK_ROUTE)))?;
    socket.write_all(request)?;
    // An answer about one interface takes one to four KiB, more with many virtual functions, which were not asked for.
    let mut reply = vec![0; 64 * 1024];
    let len = socket.read(&mut reply)?;
    reply.truncate(len);
    if len < NLMSG_HEADER_LEN + 4 {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "rtnetlink's answer is too short"));
    }
    if i32::from(u16_at(&reply, 4)) == libc::NLMSG_ERROR {
        let errno = i32::from_ne_bytes(reply[NLMSG_HEADER_LEN..NLMSG_HEADER_LEN + 4].try_into().expect("four bytes"));
        return if errno == 0 { Ok(Vec::new()) } else { Err(io::Error::from_raw_os_error(-errno)) };
    }
    Ok(reply.split_off(NLMSG_HEADER_LEN))
}

fn parse_link(payload: &[u8]) -> Link {
    let mut link = Link::default();
    let attribute = |wanted| attributes(payload.get(IFINFO_LEN..).unwrap_or_default()).find(|(kind, _)| *kind == wanted).map(|(_, value)| value);
    if let Some(stats) = attribute(libc::IFLA_STATS64) {
        let number = |index| stats.get(index * 8..index * 8 + 8).map_or(0, |word| u64::from_ne_bytes(word.try_into().expect("eight bytes")));
        (link.rx_dropped, link.tx_dropped) = (number(STATS64_RX_DROPPED), number(STATS64_TX_DROPPED));
    }
    for (kind, value) in attribute(libc::IFLA_LINKINFO).into_iter().flat_map(attributes) {
        match kind {
            libc::IFLA_INFO_KIND => link.kind = String::from_utf8_lossy(value).trim_end_matches('\0').to_owned(),
            libc::IFLA_INFO_DATA if link.kind == "tun" => {
                for (kind, value) in attributes(value) {
                    let word = value.first_chunk().map_or(0, |word| u32::from_ne_bytes(*word));
                    match (kind, value.first()) {
                        (IFLA_TUN_TYPE, Some(byte)) => link.tun_type = *byte,
                        (IFLA_TUN_MULTI_QUEUE, Some(byte)) => link.multi_queue = *byte != 0,
                        (IFLA_TUN_NUM_QUEUES | IFLA_TUN_NUM_DISABLED_QUEUES, _) => link.queues += word,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    link
}

fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        if bytes.len() < ATTRIBUTE_HEADER_LEN {
            return None;
        }
        let len = usize::from(u16_at(bytes, 0));
        let kind = u16_at(bytes, 2) & NESTED_MASK;
        let value = bytes.get(ATTRIBUTE_HEADER_LEN..len)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_ne_bytes([bytes[at], bytes[at + 1]])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_interface_is_found_and_is_no_tun() {
        let lo = find("lo").unwrap().unwrap();
        assert_eq!((lo.kind.as_str(), lo.tun_type, lo.multi_queue, lo.queues), ("", 0, false, 0));
    }

    #[test]
    fn an_interface_that_is_not_there_is_none() {
        assert_eq!(find("no-such-if").unwrap(), None);
    }
}
