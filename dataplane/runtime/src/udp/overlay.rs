//! All sockets of a node's overlay, opened anew or gone on with.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use socket2::{Protocol, Socket, Type};

use super::{Receiver, SENDERS_PER_FAMILY, Sender, UdpError};
use crate::netns::{Netns, Question};
use crate::worker::rx::MESSAGES_MAX;

/// The overlay's sockets of a node: each worker's receiving ones, and the sending ones that they share.
#[derive(Debug)]
pub struct Overlay {
    pub(crate) receivers: Vec<Vec<Receiver>>,
    pub(crate) sender: Sender,
}

impl Overlay {
    /// Opens them in the calling thread's network namespace, for `workers` workers: on the underlay addresses given, at most one of each
    /// family, at `port`.
    ///
    /// `left` are sockets that a predecessor left open. Each is looked at, and what is none of these is closed. Receiving ones of which there
    /// are too many are read beside the first workers' own: what waits in them is not lost, and peers lead their flows to them still.
    pub fn open(underlay: &[IpAddr], port: u16, workers: u16, left: Vec<OwnedFd>) -> Result<Overlay, UdpError> {
        // Without a namespace to compare with, none is known to be ours.
        let here = Netns::current().ok();
        let mut left: Vec<(Socket, SocketAddr)> = left.into_iter().filter_map(|fd| plain_socket(fd, here.as_ref()?)).collect();
        let mut receivers: Vec<Vec<Receiver>> = (0..workers).map(|_| Vec::new()).collect();
        for address in underlay.iter().map(|ip| SocketAddr::new(*ip, port)) {
            let (ours, others): (Vec<_>, Vec<_>) = left.into_iter().partition(|(_, local)| *local == address);
            left = others;
            let mut ours = ours.into_iter().map(|(socket, _)| Receiver::settle(socket, address, MESSAGES_MAX));
            for own in &mut receivers {
                own.push(ours.next().unwrap_or_else(|| Receiver::bind(address, MESSAGES_MAX))?);
            }
            for (at, too_many) in ours.enumerate() {
                receivers[at % usize::from(workers)].push(too_many?);
            }
        }
        let sender = Sender::open_with(underlay, SENDERS_PER_FAMILY, left)?;
        Ok(Overlay { receivers, sender })
    }

    /// All of their descriptors.
    pub fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let senders = self.sender.v4.sockets.iter().chain(&self.sender.v6.sockets);
        self.receivers.iter().flatten().map(AsFd::as_fd).chain(senders.map(AsFd::as_fd))
    }
}

/// `fd` as a UDP socket of the namespace `here` that is bound and connected to nobody, with its address, if it is one.
fn plain_socket(fd: OwnedFd, here: &Netns) -> Option<(Socket, SocketAddr)> {
    if Netns::of(fd.as_fd(), Question::Socket).ok()? != *here {
        return None;
    }
    let socket = Socket::from(fd);
    let is_udp = socket.r#type().ok()? == Type::DGRAM && socket.protocol().ok()?? == Protocol::UDP;
    let local = socket.local_addr().ok()?.as_socket()?;
    // Blocking or not is the file's, which a predecessor's other handles share.
    socket.set_nonblocking(true).ok()?;
    (is_udp && local.port() != 0 && socket.peer_addr().is_err()).then_some((socket, local))
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::super::RECEIVE_LEN_MAX;
    use super::*;

    #[test]
    fn sockets_that_were_left_open_are_gone_on_with_and_what_waits_in_them_is_received() {
        let Some(netns) = crate::testing::loopback(1500) else { return };
        let check = || {
            let underlay: [IpAddr; 2] = ["127.0.0.1".parse().unwrap(), "::1".parse().unwrap()];
            let left = |overlay: &Overlay| overlay.descriptors().map(|fd| fd.try_clone_to_owned().unwrap()).collect::<Vec<_>>();
            let first = Overlay::open(&underlay, 4790, 2, Vec::new()).unwrap();
            let (ports, mut kept) = (first.sender.ports(true).collect::<Vec<_>>(), left(&first));
            assert_eq!(kept.len(), 2 * 2 + 2 * SENDERS_PER_FAMILY);
            drop(first);
            let stranger = UdpSocket::bind("127.0.0.1:0").unwrap();
            for byte in 0..64 {
                UdpSocket::bind("127.0.0.1:0").unwrap().send_to(&[byte], "127.0.0.1:4790").unwrap();
            }
            // What else is given is closed: files, sockets of other kinds, one that is connected, one of another namespace.
            let elsewhere = std::thread::spawn(|| crate::testing::loopback(1500).unwrap().run(|| UdpSocket::bind("127.0.0.1:4790").unwrap()));
            stranger.connect("127.0.0.1:4790").unwrap();
            kept.extend([stranger.into(), elsewhere.join().unwrap().unwrap().into(), std::fs::File::open("/dev/null").unwrap().into()]);
            kept.push(std::net::TcpListener::bind("127.0.0.1:0").unwrap().into());
            // Fewer workers: the one that is left reads the other's socket too.
            let mut fewer = Overlay::open(&underlay, 4790, 1, kept).unwrap();
            assert_eq!((fewer.receivers[0].len(), fewer.sender.ports(true).collect::<Vec<_>>()), (4, ports.clone()));
            let waiting = fewer.receivers[0].iter_mut().filter(|receiver| receiver.local().is_ipv4());
            let waiting: usize = waiting.map(|receiver| std::iter::from_fn(|| some(receiver)).sum::<usize>()).sum();
            assert_eq!(waiting, 64);
            // More: the port is shared as ever.
            let kept = left(&fewer);
            drop(fewer);
            let more = Overlay::open(&underlay, 4790, 3, kept).unwrap();
            assert!(more.receivers.iter().all(|receivers| receivers.len() == 2));
            assert_eq!(more.sender.ports(true).collect::<Vec<_>>(), ports);
        };
        netns.run(check).unwrap();
    }

    /// How many bytes come in one call, if any do.
    fn some(receiver: &mut Receiver) -> Option<usize> {
        let mut arena = vec![0u8; 8 * RECEIVE_LEN_MAX];
        let mut received = Vec::with_capacity(8);
        receiver.recv(arena.chunks_exact_mut(RECEIVE_LEN_MAX), &mut received).unwrap();
        (!received.is_empty()).then(|| received.iter().map(|message| message.len).sum())
    }
}
