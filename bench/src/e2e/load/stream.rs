//! TCP streams: as fast as they go, from threads in one namespace to threads in another, counted by the receivers.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::Context;

use super::{Ends, Phase, STREAM_PORT, Sample, Spent, speak_cubic, watch};

/// One measurement.
#[derive(Clone, Copy, Debug)]
pub struct Streamed {
    /// Payload bytes received.
    pub bytes: u64,
    /// Meanwhile.
    pub spent: Spent,
}

impl Streamed {
    /// Gigabits of payload per second.
    pub fn gbit_per_s(&self) -> f64 {
        self.bytes as f64 * 8.0 / self.spent.elapsed.as_secs_f64() / 1e9
    }

    /// CPU seconds per gigabyte of payload.
    pub fn cpu_s_per_gbyte(&self) -> f64 {
        self.spent.cpu.as_secs_f64() / (self.bytes as f64 / 1e9)
    }

    /// Its figures.
    pub fn sample(&self) -> Sample {
        Sample(vec![("Gb/s", self.gbit_per_s()), ("CPU s/GB", self.cpu_s_per_gbyte()), ("retransmits", self.spent.retransmits as f64)])
    }
}

/// Bytes of one read or write: what bulk programs use (iperf3: 128 KiB).
const CHUNK_LEN: usize = 128 << 10;

const CONNECT_PATIENCE: Duration = Duration::from_secs(5);

/// Sends over `flows` connections for `duration`, and says what arrived.
pub fn measure(ends: &Ends<'_>, flows: usize, duration: Duration) -> anyhow::Result<Streamed> {
    let server = ends.first();
    let listener = server.netns.run(|| TcpListener::bind(SocketAddr::new(server.address, STREAM_PORT)))?.context("cannot listen")?;
    let to = ends.stream();
    let connect = || -> io::Result<(TcpStream, TcpStream)> {
        let sender = ends.from.run(|| TcpStream::connect_timeout(&to, CONNECT_PATIENCE))??;
        speak_cubic(&sender)?;
        Ok((sender, listener.accept()?.0))
    };
    let pairs = (0..flows).map(|_| connect()).collect::<io::Result<Vec<_>>>().with_context(|| format!("cannot connect to {to}"))?;
    let received = AtomicU64::new(0);
    let over = AtomicBool::new(false);
    let phase = Phase::default();
    thread::scope(|scope| {
        let mut threads = Vec::new();
        for (sender, receiver) in &pairs {
            threads.push(scope.spawn(|| send(sender, &over)));
            threads.push(scope.spawn(|| receive(receiver, &received, &phase)));
        }
        let spent = watch(ends.from, duration, &phase);
        over.store(true, Ordering::Relaxed);
        for (sender, _) in &pairs {
            // A sender that is stuck in a full window ends by it; one that has ended already does not mind.
            let _ = sender.shutdown(Shutdown::Both);
        }
        for thread in threads {
            thread.join().expect("a stream's thread does not panic").context("a stream broke")?;
        }
        Ok(Streamed { bytes: received.load(Ordering::Relaxed), spent: spent? })
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

fn receive(mut stream: &TcpStream, received: &AtomicU64, phase: &Phase) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK_LEN];
    loop {
        match stream.read(&mut chunk) {
            Ok(0) => return Ok(()),
            Ok(len) if phase.counts() => {
                received.fetch_add(len as u64, Ordering::Relaxed);
            }
            Ok(_) => {}
            // The sender left with data on its way.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use podgate_runtime::netns::Netns;

    use super::super::tests::loopback;
    use super::*;

    #[test]
    fn a_stream_over_the_loopback_is_measured() {
        let here = Netns::current().unwrap();
        let streamed = measure(&loopback(&here), 2, Duration::from_millis(200)).unwrap();
        assert!(streamed.bytes > 0 && streamed.spent.elapsed >= Duration::from_millis(200), "{streamed:?}");
        assert!(streamed.gbit_per_s() > 0.0 && streamed.cpu_s_per_gbyte() >= 0.0);
    }
}
