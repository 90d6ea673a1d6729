//! Load generators, and what they share: where the traffic goes, when it is counted, and what the machine spent on it.
//!
//! They run beside what they measure, on the same few cores, so they are frugal: a thread for each end, readiness from one `epoll`, many
//! datagrams for each system call. Where a rate is meant, a transaction's time runs from when it was due, not from when the generator got
//! round to it: whoever stalls pays for all that should have happened meanwhile (Tene's "coordinated omission").

pub mod change;
pub mod datagrams;
pub mod iperf;
pub mod overload;
pub mod responder;
pub mod stream;
pub mod transactions;

use std::ffi::OsString;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use hdrhistogram::Histogram;
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::TcpCongestion;
use podgate_runtime::netns::Netns;

use super::awake;

/// Where streams are received.
pub const STREAM_PORT: u16 = 7000;
/// Where transactions are answered.
pub const ANSWER_PORT: u16 = 7001;
/// Where datagrams are counted.
pub const DATAGRAM_PORT: u16 = 7002;
/// What clients of a service dial.
pub const SERVICE_PORT: u16 = 80;

/// The VIP of the service whose one endpoint is the first server's [`STREAM_PORT`].
pub const STREAM_VIP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 100);

/// The VIP of service `number`, whose endpoints are every server's [`ANSWER_PORT`].
pub fn vip(number: u32) -> Ipv4Addr {
    let [high, low] = [number / 250 + 1, number % 250 + 1].map(|part| u8::try_from(part).expect("at most 63,500 services"));
    Ipv4Addr::new(10, 96, high, low)
}

/// Makes a socket, or those that a listener accepts, send as Linux does by default, whatever this machine's own default is (tcp(7),
/// `TCP_CONGESTION`): one that paces its segments measures its timer.
pub fn speak_cubic(socket: &impl AsFd) -> io::Result<()> {
    Ok(setsockopt(socket, TcpCongestion, &OsString::from("cubic"))?)
}

/// How long before a measurement of `duration` its traffic begins: slow start and the first steering of flows are not what is measured.
pub fn warm_up(duration: Duration) -> Duration {
    Duration::from_millis(500).min(duration / 2)
}

/// Who sends, who receives, and how the receivers are dialled.
#[derive(Clone, Debug)]
pub struct Ends<'a> {
    /// The sender's namespace.
    pub from: &'a Netns,
    /// The receivers; all but services have one.
    pub to: Vec<Server<'a>>,
    /// What is dialled.
    pub dial: Dial,
}

/// A receiver.
#[derive(Clone, Copy, Debug)]
pub struct Server<'a> {
    /// Its namespace.
    pub netns: &'a Netns,
    /// Its address there.
    pub address: IpAddr,
}

/// What is dialled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dial {
    /// The first receiver itself.
    Direct,
    /// One of so many services.
    Services(u32),
}

impl<'a> Ends<'a> {
    /// From one namespace to an address in another.
    pub fn direct(from: &'a Netns, to: &'a Netns, address: IpAddr) -> Ends<'a> {
        Ends { from, to: vec![Server { netns: to, address }], dial: Dial::Direct }
    }

    /// The first receiver.
    pub fn first(&self) -> Server<'a> {
        self.to[0]
    }

    /// What a stream dials.
    pub fn stream(&self) -> SocketAddr {
        match self.dial {
            Dial::Direct => SocketAddr::new(self.first().address, STREAM_PORT),
            Dial::Services(_) => SocketAddr::from((STREAM_VIP, SERVICE_PORT)),
        }
    }

    /// What transaction `number` dials: services in an order that no cache foresees.
    pub fn transaction(&self, number: u64) -> SocketAddr {
        match self.dial {
            Dial::Direct => SocketAddr::new(self.first().address, ANSWER_PORT),
            Dial::Services(count) => {
                // Knuth's MMIX generator, as a hash of the number.
                let mixed = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407) >> 33;
                SocketAddr::from((vip((mixed % u64::from(count)) as u32), SERVICE_PORT))
            }
        }
    }
}

/// The figures of one measurement: unit and value. The first one is what the measurement was for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sample(pub Vec<(&'static str, f64)>);

impl Sample {
    /// The one of `unit`.
    pub fn of(&self, unit: &str) -> Option<f64> {
        self.0.iter().find(|(name, _)| *name == unit).map(|(_, value)| *value)
    }
}

/// Where a measurement is: before, in, or after what counts.
#[derive(Debug, Default)]
pub struct Phase(AtomicU8);

impl Phase {
    /// Whether what happens now counts.
    pub fn counts(&self) -> bool {
        self.0.load(Ordering::Relaxed) == 1
    }

    /// Whether the generator is to end.
    pub fn over(&self) -> bool {
        self.0.load(Ordering::Relaxed) == 2
    }

    fn set(&self, phase: u8) {
        self.0.store(phase, Ordering::Relaxed);
    }
}

/// What the machine spent during a measurement.
#[derive(Clone, Copy, Debug)]
pub struct Spent {
    /// Time.
    pub elapsed: Duration,
    /// CPU time of all cores on anything but idling, interrupts included.
    pub cpu: Duration,
    /// TCP segments that the sender sent again.
    pub retransmits: u64,
}

/// Runs `work` on a thread of its own in `from`'s namespace, and tells it when to count: after [`warm_up`], for `duration`.
pub fn observe<T: Send>(from: &Netns, duration: Duration, work: impl FnOnce(&Phase) -> anyhow::Result<T> + Send) -> anyhow::Result<(T, Spent)> {
    let phase = Phase::default();
    thread::scope(|scope| {
        let worker = scope.spawn(|| from.run(|| work(&phase)));
        let spent = watch(from, duration, &phase);
        phase.set(2);
        let result = worker.join().expect("a load generator does not panic").context("cannot enter the sender's namespace")??;
        Ok((result, spent?))
    })
}

/// The clock of a measurement whose traffic others make.
pub fn watch(from: &Netns, duration: Duration, phase: &Phase) -> anyhow::Result<Spent> {
    thread::sleep(warm_up(duration));
    let (start, cpu, before) = (Instant::now(), cpu_time()?, retransmits(from)?);
    phase.set(1);
    thread::sleep(duration);
    phase.set(0);
    let elapsed = start.elapsed();
    Ok(Spent { elapsed, cpu: cpu_time()?.saturating_sub(cpu), retransmits: retransmits(from)?.saturating_sub(before) })
}

/// Latencies in nanoseconds, up to a minute, to three digits.
pub fn latencies() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 60_000_000_000, 3).expect("bounds in order and three digits")
}

/// Adds a latency.
pub fn record(histogram: &mut Histogram<u64>, latency: Duration) {
    histogram.saturating_record(u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX));
}

/// A quantile in microseconds.
pub fn quantile(histogram: &Histogram<u64>, quantile: f64) -> f64 {
    histogram.value_at_quantile(quantile) as f64 / 1e3
}

/// CPU time of all cores since boot in anything but idling, or keeping awake: user, nice, system, irq and softirq of `/proc/stat` (proc(5)).
pub fn cpu_time() -> anyhow::Result<Duration> {
    let text = fs::read_to_string("/proc/stat").context("cannot read /proc/stat")?;
    let fields: Vec<u64> = text.lines().next().unwrap_or_default().split_whitespace().skip(1).filter_map(|field| field.parse().ok()).collect();
    let [user, nice, system, _idle, _iowait, irq, softirq, ..] = fields[..] else {
        anyhow::bail!("/proc/stat does not begin with the CPU times: {text:.80}");
    };
    // USER_HZ, which is 100 on every architecture of today.
    Ok(Duration::from_millis((user + nice + system + irq + softirq) * 10).saturating_sub(awake::spent()))
}

/// TCP segments sent again in a namespace so far (RFC 4022, `tcpRetransSegs`).
fn retransmits(netns: &Netns) -> anyhow::Result<u64> {
    let text = netns.run(|| fs::read_to_string("/proc/thread-self/net/snmp"))?.context("cannot read net/snmp")?;
    let mut tcp = text.lines().filter_map(|line| line.strip_prefix("Tcp: "));
    let (names, values) = (tcp.next().unwrap_or_default(), tcp.next().unwrap_or_default());
    let value = names.split(' ').zip(values.split(' ')).find(|(name, _)| *name == "RetransSegs").and_then(|(_, value)| value.parse().ok());
    value.context("net/snmp does not tell RetransSegs")
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::HashSet;

    use super::*;

    /// Over this machine's own loopback.
    pub(crate) fn loopback(here: &Netns) -> Ends<'_> {
        Ends::direct(here, here, Ipv4Addr::LOCALHOST.into())
    }

    #[test]
    fn each_of_ten_thousand_services_has_an_address_of_its_own() {
        let all: HashSet<Ipv4Addr> = (0..10_000).map(vip).chain([STREAM_VIP]).collect();
        assert_eq!(all.len(), 10_001);
        assert!(all.iter().all(|vip| vip.octets()[..2] == [10, 96]));
    }

    #[test]
    fn transactions_meet_most_services_and_no_others() {
        let here = Netns::current().unwrap();
        let ends = Ends { dial: Dial::Services(100), ..loopback(&here) };
        let dialled: HashSet<SocketAddr> = (0..1_000).map(|number| ends.transaction(number)).collect();
        let known: HashSet<SocketAddr> = (0..100).map(|number| SocketAddr::from((vip(number), SERVICE_PORT))).collect();
        assert!(dialled.is_subset(&known) && dialled.len() > 90, "{} of 100", dialled.len());
    }
}
