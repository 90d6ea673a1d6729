//! TCP streams: as fast as they go, from threads in one namespace to threads in another, counted by the receivers.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use podgate_runtime::netns::Netns;

/// Where a stream goes.
#[derive(Clone, Copy, Debug)]
pub struct Ends<'a> {
    /// The sender's namespace.
    pub from: &'a Netns,
    /// The receiver's.
    pub to: &'a Netns,
    /// The receiver's address.
    pub address: IpAddr,
}

/// One measurement.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// Payload bytes received.
    pub bytes: u64,
    /// In this time.
    pub elapsed: Duration,
    /// CPU time that the whole machine spent on anything meanwhile, interrupts included.
    pub cpu: Duration,
    /// Segments that the senders sent again.
    pub retransmits: u64,
}

impl Sample {
    /// Gigabits of payload per second.
    pub fn gbit_per_s(&self) -> f64 {
        self.bytes as f64 * 8.0 / self.elapsed.as_secs_f64() / 1e9
    }

    /// CPU seconds per gigabyte of payload.
    pub fn cpu_s_per_gbyte(&self) -> f64 {
        self.cpu.as_secs_f64() / (self.bytes as f64 / 1e9)
    }
}

/// Bytes of one read or write: what bulk programs use (iperf3: 128 KiB).
const CHUNK_LEN: usize = 128 << 10;

/// Slow start and the first steering of flows are not what is measured.
const WARM_UP: Duration = Duration::from_millis(500);

const CONNECT_PATIENCE: Duration = Duration::from_secs(5);

/// Sends over `flows` connections for `duration`, and says what arrived.
pub fn measure(ends: Ends<'_>, flows: usize, duration: Duration) -> anyhow::Result<Sample> {
    let listener = ends.to.run(|| TcpListener::bind(SocketAddr::new(ends.address, 0)))?.context("cannot listen")?;
    let to = listener.local_addr()?;
    let connect = || -> io::Result<(TcpStream, TcpStream)> {
        let sender = ends.from.run(|| TcpStream::connect_timeout(&to, CONNECT_PATIENCE))??;
        Ok((sender, listener.accept()?.0))
    };
    let pairs = (0..flows).map(|_| connect()).collect::<io::Result<Vec<_>>>().with_context(|| format!("cannot connect to {to}"))?;
    let received = AtomicU64::new(0);
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let mut threads = Vec::new();
        for (sender, receiver) in &pairs {
            threads.push(scope.spawn(|| send(sender, &over)));
            threads.push(scope.spawn(|| receive(receiver, &received)));
        }
        let sample = watch(ends.from, &received, duration);
        over.store(true, Ordering::Relaxed);
        for (sender, _) in &pairs {
            // A sender that is stuck in a full window ends by it; one that has ended already does not mind.
            let _ = sender.shutdown(Shutdown::Both);
        }
        for thread in threads {
            thread.join().expect("a stream's thread does not panic").context("a stream broke")?;
        }
        sample
    })
}

fn watch(from: &Netns, received: &AtomicU64, duration: Duration) -> anyhow::Result<Sample> {
    thread::sleep(WARM_UP);
    let (start, cpu, bytes, retransmits) = (Instant::now(), cpu_time()?, received.load(Ordering::Relaxed), retransmits(from)?);
    thread::sleep(duration);
    Ok(Sample {
        bytes: received.load(Ordering::Relaxed) - bytes,
        elapsed: start.elapsed(),
        cpu: cpu_time()?.saturating_sub(cpu),
        retransmits: self::retransmits(from)?.saturating_sub(retransmits),
    })
}

fn send(mut stream: &TcpStream, over: &AtomicBool) -> io::Result<()> {
    let chunk = vec![0x5a; CHUNK_LEN];
    while !over.load(Ordering::Relaxed) {
        match stream.write(&chunk) {
            Ok(_) => {}
            Err(_) if over.load(Ordering::Relaxed) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn receive(mut stream: &TcpStream, received: &AtomicU64) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK_LEN];
    loop {
        match stream.read(&mut chunk) {
            Ok(0) => return Ok(()),
            Ok(len) => {
                received.fetch_add(len as u64, Ordering::Relaxed);
            }
            // The sender left with data on its way.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

/// CPU time of all cores since boot in anything but idling: user, nice, system, irq and softirq of `/proc/stat` (proc(5)).
fn cpu_time() -> anyhow::Result<Duration> {
    let text = fs::read_to_string("/proc/stat").context("cannot read /proc/stat")?;
    let fields: Vec<u64> = text.lines().next().unwrap_or_default().split_whitespace().skip(1).filter_map(|field| field.parse().ok()).collect();
    let [user, nice, system, _idle, _iowait, irq, softirq, ..] = fields[..] else {
        anyhow::bail!("/proc/stat does not begin with the CPU times: {text:.80}");
    };
    // USER_HZ, which is 100 on every architecture of today.
    Ok(Duration::from_millis((user + nice + system + irq + softirq) * 10))
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
mod tests {
    use super::*;

    #[test]
    fn a_stream_over_the_loopback_is_measured() {
        let here = Netns::current().unwrap();
        let ends = Ends { from: &here, to: &here, address: "127.0.0.1".parse().unwrap() };
        let sample = measure(ends, 2, Duration::from_millis(200)).unwrap();
        assert!(sample.bytes > 0 && sample.elapsed >= Duration::from_millis(200), "{sample:?}");
        assert!(sample.gbit_per_s() > 0.0 && sample.cpu_s_per_gbyte() >= 0.0);
    }
}
