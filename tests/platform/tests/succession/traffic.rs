//! Traffic of every kind through a node's gateway, each exchange accounted for.

use std::fmt;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use podgate::lab::program::bulk::Ticker;
use podgate::lab::program::client;
use podgate::lab::{Lab, Machine};
use podgate::netlink::Family;

use crate::Try;

/// Between two datagrams: a queue of a TUN holds a thousand.
const DATAGRAM_INTERVAL: Duration = Duration::from_millis(1);
/// How long an answer is waited for.
const PATIENCE: Duration = Duration::from_secs(5);
/// Where the echo is.
const ECHO: u16 = 7007;

/// Traffic that runs.
pub struct Traffic {
    stop: Arc<AtomicBool>,
    echoed: Arc<AtomicU64>,
    datagrams: JoinHandle<io::Result<(usize, Vec<Instant>)>>,
    echo: JoinHandle<()>,
    connections: Vec<(String, JoinHandle<Connected>)>,
    tickers: Vec<(String, Ticker)>,
}

/// Connections that were opened one after the other.
#[derive(Default)]
struct Connected {
    count: usize,
    slowest: Duration,
    failed: Vec<String>,
}

/// How it fared.
pub struct Summary {
    /// Datagrams that were sent.
    pub sent: usize,
    /// Those of them that did not come back.
    pub lost: usize,
    /// The longest time in which none came back.
    pub longest_silence: Duration,
    /// New connections, each with a question and an answer.
    pub connected: usize,
    /// The longest that one took, from its SYN to its end.
    pub slowest_connection: Duration,
    /// Which way that was.
    pub slowest_way: String,
    /// The longest that an open connection waited for an answer.
    pub longest_wait: Duration,
    /// What failed.
    pub broken: Vec<String>,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Summary { sent, lost, longest_silence, connected, slowest_connection, slowest_way, longest_wait, broken } = self;
        write!(
            f,
            "{lost} of {sent} datagrams lost, the longest silence {} ms; {connected} new connections, the slowest took {} ms ({slowest_way}); open ones waited {} ms at \
             most; {} failed",
            longest_silence.as_millis(),
            slowest_connection.as_millis(),
            longest_wait.as_millis(),
            broken.len()
        )
    }
}

impl Traffic {
    /// Starts it: datagrams and open connections between pods of both nodes, and new connections to a service and a node port.
    pub fn start(lab: &Lab) -> Try<Traffic> {
        let (a1, a2) = (lab.pod("a1")?, lab.pod("a2")?);
        let stop = Arc::new(AtomicBool::new(false));
        let echoed = Arc::new(AtomicU64::new(0));

        let far = SocketAddr::new(a2.machine().addresses().v4.into(), ECHO);
        let server = a2.machine().run(|| UdpSocket::bind(far))??;
        server.set_read_timeout(Some(Duration::from_millis(100)))?;
        let near = a1.machine().run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)))??;
        near.connect(far)?;
        let (its_stop, its_echoed) = (stop.clone(), echoed.clone());
        let datagrams = thread::spawn(move || send(&near, &its_stop, &its_echoed));
        let its_stop = stop.clone();
        // It outlives the sender, which stops first and waits for what is on its way.
        let echo = thread::spawn(move || echo(&server, &its_stop));

        let web = lab.service("web")?;
        let vip = |family| SocketAddr::new(web.vips.of(family), 80);
        let port = SocketAddr::new(lab.node(1).machine().address(Family::V4), web.node_port);
        let ways: [(&str, &Machine, SocketAddr); 4] = [
            ("a1 to the VIP", a1.machine(), vip(Family::V4)),
            ("a1 to the VIP", a1.machine(), vip(Family::V6)),
            ("a2 to a pod of the other node", a2.machine(), a1.machine().addresses().server(Family::V4)),
            ("outside to the node port", lab.outside(), port),
        ];
        let (mut connections, mut tickers) = (Vec::new(), Vec::new());
        for (name, machine, to) in ways {
            let name = format!("{name} ({to})");
            tickers.push((name.clone(), Ticker::start(machine.netns(), to, Duration::from_millis(5), PATIENCE)?));
            let (netns, its_stop) = (machine.netns().try_clone()?, stop.clone());
            let run = move || {
                netns.run(|| connect(to, &its_stop)).unwrap_or_else(|error| Connected { failed: vec![error.to_string()], ..Connected::default() })
            };
            connections.push((name, thread::spawn(run)));
        }
        let traffic = Traffic { stop, echoed, datagrams, echo, connections, tickers };
        podgate::lab::wait_until(PATIENCE, || "the first echoes".into(), || Ok((traffic.echoed() < 100).then(|| "too few".into())))?;
        Ok(traffic)
    }

    /// How many datagrams have come back.
    pub fn echoed(&self) -> u64 {
        self.echoed.load(Ordering::Relaxed)
    }

    /// Ends it.
    pub fn finish(self) -> Try<Summary> {
        self.stop.store(true, Ordering::Relaxed);
        let (sent, came) = self.datagrams.join().map_err(|_| "the sender panicked")??;
        self.echo.join().map_err(|_| "the echo panicked")?;
        let mut summary = Summary {
            sent,
            lost: sent - came.len(),
            longest_silence: came.windows(2).map(|two| two[1] - two[0]).max().unwrap_or_default(),
            connected: 0,
            slowest_connection: Duration::ZERO,
            slowest_way: String::new(),
            longest_wait: Duration::ZERO,
            broken: Vec::new(),
        };
        for (name, thread) in self.connections {
            let Connected { count, slowest, failed } = thread.join().map_err(|_| "a client panicked")?;
            summary.connected += count;
            if slowest > summary.slowest_connection {
                (summary.slowest_connection, summary.slowest_way) = (slowest, name.clone());
            }
            summary.broken.extend(failed.into_iter().map(|why| format!("{name}: {why}")));
        }
        for (name, ticker) in self.tickers {
            let report = ticker.finish();
            summary.longest_wait = summary.longest_wait.max(report.longest_gap);
            summary.broken.extend(report.broken.map(|why| format!("{name}, an open connection: {why}")));
        }
        Ok(summary)
    }
}

/// Sends numbered datagrams until it is to stop, then waits for the last; how many, and when each echo came. One that comes twice is an error.
fn send(socket: &UdpSocket, stop: &AtomicBool, echoed: &AtomicU64) -> io::Result<(usize, Vec<Instant>)> {
    let (mut sent, mut came, mut seen) = (0u64, Vec::new(), std::collections::HashSet::new());
    let mut buffer = [0; 16];
    let mut due = Instant::now();
    let mut deadline = None;
    loop {
        if deadline.is_none() && due <= Instant::now() {
            // It fails where an ICMP error came back; the datagram counts as lost.
            let _ = socket.send(&sent.to_be_bytes());
            sent += 1;
            due += DATAGRAM_INTERVAL;
        }
        let wait = match deadline {
            None => due.saturating_duration_since(Instant::now()),
            Some(deadline) => Instant::saturating_duration_since(&deadline, Instant::now()),
        };
        if deadline.is_some() && (wait.is_zero() || came.len() as u64 == sent) {
            return Ok((sent as usize, came));
        }
        if deadline.is_none() && stop.load(Ordering::Relaxed) {
            deadline = Some(Instant::now() + Duration::from_secs(1));
        }
        socket.set_read_timeout(Some(wait.max(Duration::from_micros(1))))?;
        if let Ok(len) = socket.recv(&mut buffer) {
            if len != 8 || !seen.insert(buffer[..8].to_vec()) {
                return Err(io::Error::other("an echo that is none, or the second of one datagram"));
            }
            came.push(Instant::now());
            echoed.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Answers until a second of silence after it is to stop.
fn echo(socket: &UdpSocket, stop: &AtomicBool) {
    let mut buffer = [0; 16];
    let mut quiet = 0;
    while quiet < 5 {
        match socket.recv_from(&mut buffer) {
            Ok((len, from)) => {
                quiet = 0;
                let _ = socket.send_to(&buffer[..len], from);
            }
            Err(_) if stop.load(Ordering::Relaxed) => quiet += 1,
            Err(_) => {}
        }
    }
}

/// Opens one connection after the other.
fn connect(to: SocketAddr, stop: &AtomicBool) -> Connected {
    let mut all = Connected::default();
    while !stop.load(Ordering::Relaxed) {
        let start = Instant::now();
        match client::tcp(to, 100, PATIENCE) {
            Ok(_) => all.count += 1,
            Err(error) => all.failed.push(error.to_string()),
        }
        all.slowest = all.slowest.max(start.elapsed());
        // As many as a busy client makes; without a pause it would use up its ports.
        thread::sleep(Duration::from_millis(5));
    }
    all
}
