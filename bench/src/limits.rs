//! Whether a pod's bandwidth limits hold: TCP and UDP through a limited pod, in both directions, beside the rate that was asked for.
//!
//! A limit counts IP packets, headers included, so payload is compared with its share of the rate: of a TCP segment all but 52 bytes
//! (IPv4 and timestamps), of a datagram all but 28. The pod sends to, and hears from, a pod of another node.

use std::net::{SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use podgate::lab::{Lab, Pod, Sandbox};
use serde_json::{Value, json};

use crate::e2e::load::{Ends, stream};

/// What `podgate-bench limits` can be told.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// A limit in bits per second; may be repeated [default: 10000000, 100000000 and 1000000000]
    #[arg(long = "rate", value_name = "BITS")]
    rates: Vec<u64>,
    /// Seconds of each measurement, after half a second to warm up
    #[arg(long, value_name = "SECONDS", default_value_t = 10.0)]
    seconds: f64,
    /// How far from the limit a row may be, in percent
    #[arg(long, value_name = "PERCENT", default_value_t = 5.0)]
    tolerance: f64,
    /// Write the rows there as JSON
    #[arg(long, value_name = "FILE.json")]
    output: Option<PathBuf>,
    /// The program under test [default: the `podgate` beside this program]
    #[arg(long, value_name = "FILE")]
    podgate: Option<PathBuf>,
}

/// One measurement.
struct Row {
    direction: &'static str,
    protocol: &'static str,
    rate: u64,
    /// Payload, in bits per second.
    payload: f64,
    /// The same with the headers of its packets.
    packets: f64,
    /// What a sender of datagrams got out, headers included; nothing for TCP, which offers what it can.
    offered: Option<f64>,
}

impl Row {
    fn ratio(&self) -> f64 {
        self.packets / self.rate as f64
    }

    /// Whether the limit was reached at all: a busy machine may not be able to send so much.
    fn tells(&self) -> bool {
        self.offered.is_none_or(|offered| offered >= self.rate as f64)
    }
}

/// Payload of one datagram, in bytes.
const DATAGRAM: usize = 1200;
/// IPv4 and UDP headers of each, in bytes.
const DATAGRAM_HEADERS: usize = 28;
/// IPv4 and TCP headers with timestamps, in bytes.
const SEGMENT_HEADERS: usize = 52;
/// How much more than the limit a sender of datagrams offers.
const OFFERED: f64 = 1.3;

/// Runs the measurements. Must be called while the process has one thread only.
pub fn main(options: &Options) -> ExitCode {
    crate::in_a_sandbox(|sandbox| run(options, sandbox))
}

fn run(options: &Options, sandbox: &Sandbox) -> anyhow::Result<()> {
    ensure!(options.seconds > 0.0 && options.seconds <= 3600.0, "--seconds takes more than 0 and at most 3600, not {}", options.seconds);
    let rates = if options.rates.is_empty() { vec![10_000_000, 100_000_000, 1_000_000_000] } else { options.rates.clone() };
    let duration = Duration::from_secs_f64(options.seconds);
    let binary = crate::e2e::binary(options.podgate.as_deref())?;
    let lab = Lab::builder(sandbox, &binary).pods(["a"]).build(&|what| eprintln!("{what}"))?;
    let far = lab.pods().into_iter().find(|pod| pod.node() == 1).context("the other node has a pod")?;
    let mut rows = Vec::new();
    for rate in rates {
        let text = rate.to_string();
        let limited = lab.attach_with(0, &format!("limited{rate}"), &["--ingress-rate", &text, "--egress-rate", &text])?;
        for (direction, from, to) in [("egress", &limited, &far), ("ingress", &far, &limited)] {
            rows.push(tcp(direction, rate, from, to, duration)?);
            eprintln!("{}", line(rows.last().expect("it was pushed")));
            rows.push(udp(direction, rate, from, to, duration)?);
            eprintln!("{}", line(rows.last().expect("it was pushed")));
        }
        lab.detach(limited.name())?;
    }
    println!("{:<9} {:<8} {:>12} {:>12} {:>12} {:>7}", "DIRECTION", "PROTOCOL", "LIMIT Mb/s", "PACKETS Mb/s", "PAYLOAD Mb/s", "RATIO");
    rows.iter().for_each(|row| println!("{}", line(row)));
    if let Some(path) = &options.output {
        let text = serde_json::to_string_pretty(&json!({"schemaVersion": 1, "rows": rows.iter().map(as_json).collect::<Vec<_>>()}))?;
        std::fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))?;
    }
    let off: Vec<String> = rows.iter().filter(|row| row.tells() && (row.ratio() - 1.0).abs() * 100.0 > options.tolerance).map(line).collect();
    if off.is_empty() { Ok(()) } else { bail!("not within {} % of the limit:\n{}", options.tolerance, off.join("\n")) }
}

fn line(row: &Row) -> String {
    let mega = |bits: f64| bits / 1e6;
    format!(
        "{:<9} {:<8} {:>12.1} {:>12.2} {:>12.2} {:>7.3}{}",
        row.direction,
        row.protocol,
        mega(row.rate as f64),
        mega(row.packets),
        mega(row.payload),
        row.ratio(),
        if row.tells() { String::new() } else { format!("   (no more than {:.0} Mb/s were sent)", mega(row.offered.unwrap_or(0.0))) }
    )
}

fn as_json(row: &Row) -> Value {
    json!({
        "direction": row.direction, "protocol": row.protocol, "limitBitsPerSecond": row.rate,
        "packetBitsPerSecond": row.packets, "payloadBitsPerSecond": row.payload, "offeredBitsPerSecond": row.offered, "ratio": row.ratio(),
    })
}

fn tcp(direction: &'static str, rate: u64, from: &Pod, to: &Pod, duration: Duration) -> anyhow::Result<Row> {
    let ends = Ends::direct(from.machine().netns(), to.machine().netns(), to.machine().addresses().v4.into());
    let streamed = stream::measure(&ends, 1, duration)?;
    let payload = streamed.bytes as f64 * 8.0 / streamed.spent.elapsed.as_secs_f64();
    let mtu = from.machine().netns().run(|| mtu("eth0"))??.min(to.machine().netns().run(|| mtu("eth0"))??);
    let packets = payload * mtu as f64 / (mtu - SEGMENT_HEADERS) as f64;
    Ok(Row { direction, protocol: "TCP", rate, payload, packets, offered: None })
}

/// The interface's MTU in the calling thread's namespace.
fn mtu(name: &str) -> anyhow::Result<usize> {
    let netlink = podgate::netlink::Netlink::open(&podgate_runtime::netns::Netns::current()?)?;
    Ok(netlink.expect_link(name)?.mtu as usize)
}

fn udp(direction: &'static str, rate: u64, from: &Pod, to: &Pod, duration: Duration) -> anyhow::Result<Row> {
    let address = SocketAddr::new(to.machine().addresses().v4.into(), 0);
    let receiver = to.machine().run(|| UdpSocket::bind(address))?.context("cannot bind the receiver")?;
    receiver.set_read_timeout(Some(Duration::from_millis(100)))?;
    let target = receiver.local_addr()?;
    let sender = from.machine().run(|| UdpSocket::bind("0.0.0.0:0"))?.context("cannot bind the sender")?;
    sender.connect(target)?;
    let (over, received, sent) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let per_second = thread::scope(|scope| {
        scope.spawn(|| offer(&sender, rate as f64 * OFFERED, &sent, &over));
        scope.spawn(|| {
            let mut datagram = [0; DATAGRAM];
            while !over.load(Ordering::Relaxed) {
                if receiver.recv(&mut datagram).is_ok() {
                    received.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        thread::sleep(Duration::from_millis(500));
        let counts = || [received.load(Ordering::Relaxed), sent.load(Ordering::Relaxed)];
        let (start, before) = (Instant::now(), counts());
        thread::sleep(duration);
        let (elapsed, after) = (start.elapsed(), counts());
        over.store(true, Ordering::Relaxed);
        [0, 1].map(|which| (after[which] - before[which]) as f64 / elapsed.as_secs_f64())
    });
    let whole = ((DATAGRAM + DATAGRAM_HEADERS) * 8) as f64;
    let [received, sent] = per_second;
    let (payload, packets, offered) = (received * (DATAGRAM * 8) as f64, received * whole, Some(sent * whole));
    Ok(Row { direction, protocol: "UDP", rate, payload, packets, offered })
}

/// Sends datagrams at `rate` bits per second, headers included, catching up after each pause.
fn offer(socket: &UdpSocket, rate: f64, sent: &AtomicU64, over: &AtomicBool) {
    let (start, datagram) = (Instant::now(), [0x5a; DATAGRAM]);
    let mut tried = 0.0;
    while !over.load(Ordering::Relaxed) {
        let due = start.elapsed().as_secs_f64() * rate / 8.0;
        while tried < due && !over.load(Ordering::Relaxed) {
            // One that does not fit the socket's buffer is one that the pod's own kernel drops.
            sent.fetch_add(u64::from(socket.send(&datagram).is_ok()), Ordering::Relaxed);
            tried += (DATAGRAM + DATAGRAM_HEADERS) as f64;
        }
        thread::sleep(Duration::from_micros(500));
    }
}
