//! The gateway's own network stack: what answers on the gateway addresses.
//!
//! smoltcp's interface and TCP sockets, without a device: packets that the pipeline found to be for a gateway address come in, answers
//! go out. ICMP and ICMPv6 echo are answered (fragmented ones too), TCP port 80 serves a status page as plain text to pods, and
//! anything else gets the reset or the port-unreachable that a host owes it. It runs on the thread of the port sockets, which may
//! allocate; workers only copy packets into its queue.
//!
//! Transport checksums of what comes in are not verified again: a frame of a pod may hold none yet (`NEEDS_CSUM`), and the gateway
//! takes no decision on what it reads here.

use std::collections::VecDeque;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::Duration;

use podgate_core::addr::Addr;
use podgate_core::packet::Network;
use podgate_core::snapshot::Snapshot;
use podgate_core::verdict::{DropReason, PeerId, Verdict};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{self, Checksum, Device, DeviceCapabilities, Medium};
use smoltcp::socket::tcp;
use smoltcp::time::Instant;
use smoltcp::wire::{HardwareAddress, IpAddress, IpCidr};

/// What makes the text of the status page.
pub type StatusPage = Arc<dyn Fn() -> String + Send + Sync>;

/// Connections to the status page that can be open at once.
pub const CONNECTIONS: usize = 8;

/// How long a client may take from its SYN to its last acknowledgement.
const CONNECTION_MS: u64 = 10_000;

/// The longest request head that is read. A browser's is below 2 KiB.
const REQUEST_LEN_MAX: usize = 4096;

/// Packets that wait for `poll`; more are dropped, as a socket's full buffer would.
const QUEUE_LEN_MAX: usize = 256;

/// Port of the status page.
const HTTP: u16 = 80;

/// Where a packet from a gateway address goes: to a pod, to the peer that has the destination, else through the node's own routing.
pub fn route_own(snapshot: &Snapshot, dst: Addr) -> Verdict {
    if let Some(pod) = snapshot.pods.get(dst) {
        pod.verdict()
    } else if snapshot.node.is_gateway(dst) {
        Verdict::Drop(DropReason::MartianDestination)
    } else if snapshot.node.owns(dst) {
        Verdict::ToHost
    } else if let Some(peer) = snapshot.routes.lookup(dst) {
        Verdict::ToPeer(PeerId(*peer), Network::Cluster)
    } else {
        Verdict::ToHost
    }
}

/// The stack.
pub struct Netstack {
    interface: Interface,
    device: Queues,
    sockets: SocketSet<'static>,
    connections: Vec<Connection>,
    page: StatusPage,
    addresses: (Option<Addr>, Option<Addr>),
}

/// One listening socket and what became of the connection on it.
struct Connection {
    handle: SocketHandle,
    request: Vec<u8>,
    answer: Option<(Vec<u8>, usize)>,
    opened_ms: Option<u64>,
}

impl Netstack {
    /// A stack without addresses, whose packets are at most `mtu` bytes long.
    pub fn new(mtu: usize, page: StatusPage, now_ms: u64) -> Netstack {
        let mut device = Queues { input: VecDeque::new(), output: VecDeque::new(), mtu };
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = RandomState::new().hash_one(now_ms);
        let interface = Interface::new(config, &mut device, instant(now_ms));
        let mut sockets = SocketSet::new(Vec::new());
        let connections = (0..CONNECTIONS)
            .map(|_| {
                let buffer = |len| tcp::SocketBuffer::new(vec![0; len]);
                let handle = sockets.add(tcp::Socket::new(buffer(REQUEST_LEN_MAX), buffer(16 * 1024)));
                Connection { handle, request: Vec::new(), answer: None, opened_ms: None }
            })
            .collect();
        Netstack { interface, device, sockets, connections, page, addresses: (None, None) }
    }

    /// Makes these its addresses. Connections to addresses that it no longer has end.
    pub fn set_addresses(&mut self, v4: Option<Addr>, v6: Option<Addr>) {
        if self.addresses == (v4, v6) {
            return;
        }
        self.addresses = (v4, v6);
        self.interface.update_ip_addrs(|addresses| {
            addresses.clear();
            for address in [v4, v6].into_iter().flatten() {
                let ip = IpAddress::from(address.ip());
                let bits = if address.is_v4() { 32 } else { 128 };
                addresses.push(IpCidr::new(ip, bits)).expect("smoltcp holds at least two addresses");
            }
        });
        // On a link without neighbours the next hop is only a name; the stack needs some route to speak beyond its own /32.
        let routes = self.interface.routes_mut();
        if let Some(v4) = v4 {
            routes.add_default_ipv4_route(v4.v4_octets().into()).expect("smoltcp holds at least two routes");
        }
        if let Some(v6) = v6 {
            routes.add_default_ipv6_route(v6.v6_octets().into()).expect("smoltcp holds at least two routes");
        }
        for connection in &mut self.connections {
            self.sockets.get_mut::<tcp::Socket<'_>>(connection.handle).abort();
        }
    }

    /// Takes a packet in; false if too many wait already.
    pub fn input(&mut self, packet: Vec<u8>) -> bool {
        let room = self.device.input.len() < QUEUE_LEN_MAX;
        if room {
            self.device.input.push_back(packet);
        }
        room
    }

    /// Does what is due, hands every packet to send to `send`, and says how long nothing will be due without new input.
    pub fn poll(&mut self, now_ms: u64, mut send: impl FnMut(&[u8])) -> Option<Duration> {
        // Reading a request makes room and an answer, so the stack is asked again until nothing moves; bounded, so that no client
        // keeps the thread here.
        for _ in 0..16 {
            // First, so that a connection that ended makes room for the SYN that waits behind it.
            self.serve(now_ms);
            self.interface.poll(instant(now_ms), &mut self.device, &mut self.sockets);
            let moved = self.serve(now_ms);
            for packet in self.device.output.drain(..) {
                send(&packet);
            }
            if !moved && self.device.input.is_empty() {
                break;
            }
        }
        let delay = self.interface.poll_delay(instant(now_ms), &self.sockets).map(|delay| Duration::from_micros(delay.total_micros()));
        let deadline = self.connections.iter().filter_map(|c| c.opened_ms).min();
        let deadline = deadline.map(|opened| Duration::from_millis((opened + CONNECTION_MS).saturating_sub(now_ms)));
        [delay, deadline].into_iter().flatten().min()
    }

    /// One step of every connection; whether anything changed.
    fn serve(&mut self, now_ms: u64) -> bool {
        let mut moved = false;
        for connection in &mut self.connections {
            let socket = self.sockets.get_mut::<tcp::Socket<'_>>(connection.handle);
            moved |= connection.step(socket, &self.page, now_ms);
        }
        moved
    }
}

impl Connection {
    fn step(&mut self, socket: &mut tcp::Socket<'_>, page: &StatusPage, now_ms: u64) -> bool {
        if !socket.is_open() {
            self.request.clear();
            self.answer = None;
            self.opened_ms = None;
            return socket.listen(HTTP).is_ok();
        }
        if socket.is_listening() {
            return false;
        }
        let opened_ms = *self.opened_ms.get_or_insert(now_ms);
        if now_ms >= opened_ms + CONNECTION_MS || matches!(socket.state(), tcp::State::TimeWait) {
            // The address pair is free to be used again at once: the page is read-only, so an old duplicate does no harm.
            socket.abort();
            return true;
        }
        let mut moved = false;
        if self.answer.is_none() {
            while socket.can_recv() && self.request.len() < REQUEST_LEN_MAX {
                let room = REQUEST_LEN_MAX - self.request.len();
                let taken = socket.recv(|data| {
                    let n = data.len().min(room);
                    self.request.extend_from_slice(&data[..n]);
                    (n, n)
                });
                moved |= taken.is_ok_and(|n| n > 0);
            }
            self.answer = respond(&self.request, page).map(|answer| (answer, 0));
        } else {
            // What a client sends behind its request is read and forgotten: the connection closes after one answer.
            while socket.can_recv() {
                moved |= socket.recv(|data| (data.len(), data.len())).is_ok_and(|n| n > 0);
            }
        }
        match &mut self.answer {
            Some((answer, sent)) if *sent < answer.len() => {
                // Nothing while the client's window is closed; the deadline ends it if it never opens.
                let n = socket.send_slice(&answer[*sent..]).unwrap_or(0);
                *sent += n;
                moved |= n > 0;
            }
            Some(_) if socket.may_send() => {
                socket.close();
                moved = true;
            }
            None if !socket.may_recv() && socket.may_send() => {
                // The client closed before its request was whole.
                socket.close();
                moved = true;
            }
            _ => {}
        }
        moved
    }
}

/// The answer to a request (RFC 9112), or `None` while its head is not whole.
fn respond(request: &[u8], page: &StatusPage) -> Option<Vec<u8>> {
    let whole = request.windows(4).any(|window| window == b"\r\n\r\n");
    let (status, body) = if whole {
        match request.split(|b| *b == b' ').next() {
            Some(b"GET") => ("200 OK", page()),
            Some(b"HEAD") => ("200 OK", String::new()),
            _ => ("405 Method Not Allowed", "this page answers GET\n".to_owned()),
        }
    } else if request.len() >= REQUEST_LEN_MAX {
        ("431 Request Header Fields Too Large", "the request's head is too long\n".to_owned())
    } else {
        return None;
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {}\r\nAllow: GET, HEAD\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n",
        body.len()
    );
    Some((head + &body).into_bytes())
}

fn instant(ms: u64) -> Instant {
    Instant::from_millis(i64::try_from(ms).expect("milliseconds since boot fit 63 bits"))
}

/// smoltcp's device: two queues.
struct Queues {
    input: VecDeque<Vec<u8>>,
    output: VecDeque<Vec<u8>>,
    mtu: usize,
}

impl Device for Queues {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _timestamp: Instant) -> Option<(Received, Sending<'_>)> {
        let packet = self.input.pop_front()?;
        Some((Received(packet), Sending(&mut self.output)))
    }

    fn transmit(&mut self, _timestamp: Instant) -> Option<Sending<'_>> {
        (self.output.len() < QUEUE_LEN_MAX).then_some(Sending(&mut self.output))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = self.mtu;
        capabilities.checksum.tcp = Checksum::Tx;
        capabilities.checksum.udp = Checksum::Tx;
        capabilities
    }
}

struct Received(Vec<u8>);

impl phy::RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

struct Sending<'a>(&'a mut VecDeque<Vec<u8>>);

impl phy::TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut packet = vec![0; len];
        let result = f(&mut packet);
        self.0.push_back(packet);
        result
    }
}

#[cfg(test)]
mod tests {
    use smoltcp::wire::{IpEndpoint, IpListenEndpoint};

    use super::*;

    const CLIENT: [u8; 4] = [10, 244, 1, 2];
    const GATEWAY: [u8; 4] = [10, 244, 1, 1];

    fn gateway(page: &'static str) -> Netstack {
        let mut stack = Netstack::new(1500, Arc::new(move || page.to_owned()), 0);
        stack.set_addresses(Some(Addr::from_v4(GATEWAY)), Some("fd00::1".parse::<std::net::Ipv6Addr>().unwrap().into()));
        stack
    }

    /// A client of smoltcp's on a link of its own, joined to `gateway` packet by packet, in virtual time.
    struct Client {
        interface: Interface,
        device: Queues,
        sockets: SocketSet<'static>,
        now_ms: u64,
    }

    impl Client {
        fn new() -> Client {
            let mut device = Queues { input: VecDeque::new(), output: VecDeque::new(), mtu: 1500 };
            let mut interface = Interface::new(Config::new(HardwareAddress::Ip), &mut device, instant(0));
            interface.update_ip_addrs(|a| a.push(IpCidr::new(IpAddress::from(std::net::IpAddr::from(CLIENT)), 24)).unwrap());
            Client { interface, device, sockets: SocketSet::new(Vec::new()), now_ms: 0 }
        }

        fn connect(&mut self, port: u16) -> SocketHandle {
            let buffer = || tcp::SocketBuffer::new(vec![0; 65535]);
            let mut socket = tcp::Socket::new(buffer(), buffer());
            let remote: IpEndpoint = (std::net::IpAddr::from(GATEWAY), HTTP).into();
            let local: IpListenEndpoint = port.into();
            socket.connect(self.interface.context(), remote, local).unwrap();
            self.sockets.add(socket)
        }

        fn socket(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
            self.sockets.get_mut(handle)
        }

        fn step(&mut self, gateway: &mut Netstack) {
            self.now_ms += 20;
            self.interface.poll(instant(self.now_ms), &mut self.device, &mut self.sockets);
            for packet in self.device.output.drain(..) {
                assert!(gateway.input(packet));
            }
            gateway.poll(self.now_ms, |packet| self.device.input.push_back(packet.to_vec()));
        }
    }

    #[test]
    fn more_clients_than_sockets_each_get_the_whole_page_in_turn() {
        let mut gateway = gateway("podgate node-1\nready\n");
        let mut client = Client::new();
        let mut open: Vec<_> = (0..CONNECTIONS as u16).map(|i| client.connect(40_000 + i)).collect();
        let (mut done, mut refused) = (0, 0);
        let mut text = std::collections::HashMap::<SocketHandle, Vec<u8>>::new();
        let mut asked = std::collections::HashSet::new();
        for _ in 0..500 {
            client.step(&mut gateway);
            for handle in open.clone() {
                let socket = client.socket(handle);
                if socket.can_send() && asked.insert(handle) {
                    socket.send_slice(b"GET / HTTP/1.1\r\nHost: gateway\r\n\r\n").unwrap();
                }
                while socket.can_recv() {
                    socket.recv(|data| (data.len(), text.entry(handle).or_default().extend_from_slice(data))).unwrap();
                }
                if !socket.is_open() && !text.contains_key(&handle) {
                    // Every socket was busy: the gateway refused, and a client tries again.
                    refused += 1;
                    open.retain(|h| *h != handle);
                    open.push(client.connect(42_000 + refused));
                } else if !socket.may_recv() && text.contains_key(&handle) {
                    let answer = String::from_utf8(text.remove(&handle).unwrap()).unwrap();
                    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
                    assert!(answer.ends_with("\r\n\r\npodgate node-1\nready\n"), "{answer}");
                    socket.close();
                    done += 1;
                    open.retain(|h| *h != handle);
                    if done < 20 {
                        open.push(client.connect(41_000 + done));
                    }
                }
            }
            if open.is_empty() {
                break;
            }
        }
        assert_eq!(done as usize, 20 + CONNECTIONS - 1);
    }

    #[test]
    fn a_client_that_never_finishes_its_request_is_cut_off() {
        let mut gateway = gateway("page");
        let mut client = Client::new();
        let handle = client.connect(40_000);
        while !client.socket(handle).may_send() {
            client.step(&mut gateway);
            assert!(client.now_ms < CONNECTION_MS);
        }
        client.socket(handle).send_slice(b"GET / HT").unwrap();
        while client.socket(handle).is_open() {
            client.step(&mut gateway);
            assert!(client.now_ms < 2 * CONNECTION_MS);
        }
        assert!(client.now_ms >= CONNECTION_MS);
    }

    #[test]
    fn a_request_that_is_not_get_is_refused_and_one_without_end_too() {
        let page: StatusPage = Arc::new(|| "page".to_owned());
        let text = |request: &[u8]| respond(request, &page).map(|a| String::from_utf8(a).unwrap());
        assert_eq!(text(b"GET / HTTP/1.1\r\nHost: a\r\n"), None);
        assert!(text(b"POST / HTTP/1.1\r\n\r\n").unwrap().starts_with("HTTP/1.1 405 "));
        assert!(text(&[b'x'; REQUEST_LEN_MAX]).unwrap().starts_with("HTTP/1.1 431 "));
        assert!(text(b"HEAD / HTTP/1.1\r\n\r\n").unwrap().ends_with("\r\n\r\n"));
    }

    /// An IPv4 echo request of `len` payload bytes, checksums done.
    fn echo_v4(len: usize) -> Vec<u8> {
        use smoltcp::wire::{Icmpv4Packet, Icmpv4Repr, Ipv4Packet, Ipv4Repr};
        let data: Vec<u8> = (0..len).map(|i| i as u8).collect();
        let icmp = Icmpv4Repr::EchoRequest { ident: 7, seq_no: 1, data: &data };
        let ip = Ipv4Repr {
            src_addr: CLIENT.into(),
            dst_addr: GATEWAY.into(),
            next_header: smoltcp::wire::IpProtocol::Icmp,
            payload_len: icmp.buffer_len(),
            hop_limit: 64,
        };
        let mut bytes = vec![0; 20 + icmp.buffer_len()];
        let caps = phy::ChecksumCapabilities::default();
        ip.emit(&mut Ipv4Packet::new_unchecked(&mut bytes[..]), &caps);
        icmp.emit(&mut Icmpv4Packet::new_unchecked(&mut bytes[20..]), &caps);
        bytes
    }

    #[test]
    fn an_echo_request_is_answered_with_its_own_bytes() {
        let mut gateway = gateway("page");
        let request = echo_v4(1000);
        assert!(gateway.input(request.clone()));
        let mut answers = Vec::new();
        gateway.poll(0, |packet| answers.push(packet.to_vec()));
        assert_eq!(answers.len(), 1);
        assert_eq!(answers[0][12..16], GATEWAY);
        assert_eq!(answers[0][16..20], CLIENT);
        assert_eq!(answers[0][20], 0, "echo reply");
        assert_eq!(answers[0][24..], request[24..], "identifier, sequence and data");
    }

    #[test]
    fn a_fragmented_echo_request_is_answered_in_fragments() {
        let mut gateway = gateway("page");
        let whole = echo_v4(4000);
        let mut sent = 0;
        for (offset, len) in [(0usize, 1480usize), (1480, 1480), (2960, 4008 - 2960)] {
            let mut bytes = whole[..20].to_vec();
            bytes.extend_from_slice(&whole[20 + offset..20 + offset + len]);
            let mut ip = smoltcp::wire::Ipv4Packet::new_unchecked(&mut bytes[..]);
            ip.set_total_len((20 + len) as u16);
            ip.set_ident(99);
            ip.set_dont_frag(false);
            ip.set_more_frags(offset + len < 4008);
            ip.set_frag_offset(offset as u16);
            ip.fill_checksum();
            assert!(gateway.input(bytes));
            sent += len;
        }
        assert_eq!(sent, 4008);
        let mut data = vec![0; 4008];
        let mut now_ms = 0;
        let mut got = 0;
        while got < 4008 {
            gateway.poll(now_ms, |packet| {
                let ip = smoltcp::wire::Ipv4Packet::new_checked(packet).unwrap();
                assert!(packet.len() <= 1500);
                let at = ip.frag_offset() as usize;
                data[at..at + ip.payload().len()].copy_from_slice(ip.payload());
                got += ip.payload().len();
            });
            now_ms += 1;
            assert!(now_ms < 100, "only {got} bytes came back");
        }
        assert_eq!(data[4..], whole[24..]);
    }
}
