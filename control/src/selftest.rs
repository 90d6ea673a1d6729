//! Ready means proven: the gateway sends traffic to itself through the real interfaces, at the start and every ten seconds.
//!
//! | check | way | what fails it |
//! |---|---|---|
//! | `pods` | a namespace of the gateway's own → veth → TUN → worker → TUN → veth | workers, TUN, rules of the gateway's namespace |
//! | `host` | the node → VIP → a process on the node | rules and routes of the node; a firewall that drops INPUT |
//! | `forward` | a packet written to the TUN `host`, forwarded by the node back into it | forwarding switched off; a firewall that drops FORWARD |
//! | `source` | the same with the node's own address as source, as masqueraded traffic has | a reverse-path filter |
//!
//! Without `pods` nothing works: the node is not ready. The others leave part of it: the node is degraded, and says in which part.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use podgate_core::admit::PROBE_PORT;
use podgate_runtime::netns::Netns;
use serde::Serialize;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{IpProtocol, IpRepr, Ipv4Packet, Ipv4Repr, Ipv6Packet, Ipv6Repr, UdpPacket, UdpRepr};

/// How long one check may take: far above what a loaded machine needs, far below the interval.
const CHECK_TIMEOUT: Duration = Duration::from_secs(1);

/// One proven, or failed, stage.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Check {
    /// Which stage, and which family.
    pub name: String,
    /// Whether it held.
    pub ok: bool,
    /// How long it took, or what is wrong and what to do.
    pub detail: String,
    /// Whether the node can forward anything without it.
    #[serde(skip)]
    pub vital: bool,
}

/// One family's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Family {
    /// The gateway's address.
    pub gateway: IpAddr,
    /// The node's address.
    pub node: IpAddr,
}

/// What the checks need of the running gateway.
pub trait Gateway: Send + Sync {
    /// Writes a packet to the TUN `host`, as the workers do.
    fn inject_host(&self, packet: &[u8]) -> std::io::Result<()>;
    /// How many probes of this number have come back, over all workers.
    fn probes(&self, number: u8) -> u64;
}

/// Where the checks are made from.
pub struct SelfTest<G> {
    /// The running gateway.
    pub gateway: G,
    /// A namespace of its own, attached as pods are.
    pub probe: Netns,
    /// The node's namespace.
    pub node: Netns,
    /// The families in use.
    pub families: Vec<Family>,
    /// [`podgate_core::snapshot::NodeTables::probe_token`].
    pub token: u64,
    /// The port of the gateway's own service on the gateway's address.
    pub health_port: u16,
    /// A port that is the gateway's on the node's own address: the source of a probe that leaves as masqueraded traffic does.
    pub own_port: u16,
    /// The TUN's name on the node, for the remedies.
    pub device: String,
}

impl<G: Gateway> SelfTest<G> {
    /// Makes every check once. Blocks for as long as they take.
    pub fn run(&self) -> Vec<Check> {
        let mut checks = Vec::new();
        for family in &self.families {
            let (gateway, node) = (family.gateway, family.node);
            let (name, table) = if gateway.is_ipv4() { ("IPv4", "iptables") } else { ("IPv6", "ip6tables") };
            let number = if gateway.is_ipv4() { 0 } else { 2 };
            let device = &self.device;
            let mut check = |stage: &str, vital, result: Result<Duration, String>, remedy: String| {
                let ok = result.is_ok();
                let detail = match result {
                    Ok(took) => format!("{:.1} ms", took.as_secs_f64() * 1e3),
                    Err(e) => format!("{e}: {remedy}"),
                };
                checks.push(Check { name: format!("{stage} {name}"), ok, detail, vital });
            };
            check(
                "pods",
                true,
                self.status_page(&self.probe, SocketAddr::new(gateway, 80)),
                "pods of this node reach nothing; see the log and `podgate workers`".into(),
            );
            check(
                "host",
                false,
                self.status_page(&self.node, SocketAddr::new(gateway, self.health_port)),
                format!(
                    "the node does not hear what the gateway delivers to it (pods to node, services with backends on the node). If a firewall drops \
                     INPUT: {table} -I INPUT -i {device} -j ACCEPT"
                ),
            );
            check(
                "forward",
                false,
                self.probe_returns(number, (gateway, PROBE_PORT), gateway),
                format!(
                    "the node does not forward for the gateway (pods to outside, outside to node ports and pods). If a firewall drops FORWARD: \
                     {table} -I FORWARD -i {device} -j ACCEPT; {table} -I FORWARD -o {device} -j ACCEPT"
                ),
            );
            check(
                "source",
                false,
                self.probe_returns(number + 1, (node, self.own_port), gateway),
                format!(
                    "packets that leave from the node's address {node} through the gateway are dropped (masqueraded traffic, node ports). If `forward` \
                     holds, a reverse-path filter does it: except interface {device} from it (firewalld: IPv6_rpfilter=no; nftables: iifname {device} \
                     accept before the fib rule)"
                ),
            );
        }
        checks
    }

    /// Fetches a page: a TCP connection, data both ways.
    fn status_page(&self, from: &Netns, at: SocketAddr) -> Result<Duration, String> {
        let fetch = || -> std::io::Result<Duration> {
            let start = Instant::now();
            let mut stream = TcpStream::connect_timeout(&at, CHECK_TIMEOUT)?;
            stream.set_read_timeout(Some(CHECK_TIMEOUT))?;
            write!(stream, "GET /livez HTTP/1.1\r\nHost: gateway\r\nConnection: close\r\n\r\n")?;
            let mut answer = [0; 8];
            stream.read_exact(&mut answer)?;
            if answer.starts_with(b"HTTP/1.") { Ok(start.elapsed()) } else { Err(std::io::Error::other("something else answers there")) }
        };
        from.run(fetch).and_then(|result| result).map_err(|e| format!("no answer from {at} ({e})"))
    }

    /// Writes a probe to the TUN `host` and waits for the node to forward it back.
    fn probe_returns(&self, number: u8, src: (IpAddr, u16), dst: IpAddr) -> Result<Duration, String> {
        let before = self.gateway.probes(number);
        let start = Instant::now();
        let packet = probe_packet(src, dst, self.token, number);
        self.gateway.inject_host(&packet).map_err(|e| format!("the probe could not be written to {} ({e})", self.device))?;
        while self.gateway.probes(number) == before {
            if start.elapsed() > CHECK_TIMEOUT {
                return Err(format!("a probe from {} did not come back", src.0));
            }
            // A worker counts it; there is nothing to be woken by.
            std::thread::sleep(Duration::from_micros(500));
        }
        Ok(start.elapsed())
    }
}

/// A probe: UDP to the discard port of the gateway's address, the token, then its number.
fn probe_packet((src, src_port): (IpAddr, u16), dst: IpAddr, token: u64, number: u8) -> Vec<u8> {
    let mut payload = token.to_be_bytes().to_vec();
    payload.push(number);
    let udp = UdpRepr { src_port, dst_port: PROBE_PORT };
    let payload_len = udp.header_len() + payload.len();
    let checksums = ChecksumCapabilities::default();
    let (ip, mut packet) = match (src, dst) {
        (IpAddr::V4(src_addr), IpAddr::V4(dst_addr)) => {
            let repr = Ipv4Repr { src_addr, dst_addr, next_header: IpProtocol::Udp, payload_len, hop_limit: 64 };
            let mut packet = vec![0; repr.buffer_len() + payload_len];
            repr.emit(&mut Ipv4Packet::new_unchecked(&mut packet), &checksums);
            (IpRepr::Ipv4(repr), packet)
        }
        (IpAddr::V6(src_addr), IpAddr::V6(dst_addr)) => {
            let repr = Ipv6Repr { src_addr, dst_addr, next_header: IpProtocol::Udp, payload_len, hop_limit: 64 };
            let mut packet = vec![0; repr.buffer_len() + payload_len];
            repr.emit(&mut Ipv6Packet::new_unchecked(&mut packet));
            (IpRepr::Ipv6(repr), packet)
        }
        _ => unreachable!("a family has addresses of one kind"),
    };
    let header_len = packet.len() - payload_len;
    udp.emit(
        &mut UdpPacket::new_unchecked(&mut packet[header_len..]),
        &ip.src_addr(),
        &ip.dst_addr(),
        payload.len(),
        |to| to.copy_from_slice(&payload),
        &checksums,
    );
    packet
}
