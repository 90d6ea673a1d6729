//! Bulk transfers, compared byte for byte by the receiver, and long connections that tick.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use podgate_runtime::netns::Netns;
use socket2::{Protocol, Type};

use super::pattern::Pattern;
use super::{Answer, ExchangeError, connected, split_greeting};

/// How much a bulk transfer moves unless told otherwise: 64 MiB.
pub const LEN: u64 = 64 << 20;

/// A transfer that arrived whole.
#[derive(Clone, Debug)]
pub struct Transfer {
    /// Who took it, and whom it saw.
    pub answer: Answer,
    /// How many bytes.
    pub len: u64,
    /// From the first byte sent until the receiver said that it had compared the last.
    pub elapsed: Duration,
}

impl Transfer {
    /// In gigabits of payload per second.
    pub fn gbit_per_s(&self) -> f64 {
        self.len as f64 * 8.0 / self.elapsed.as_secs_f64() / 1e9
    }
}

/// Sends `len` bytes, which the server compares.
pub fn send(to: SocketAddr, len: u64, timeout: Duration) -> Result<Transfer, ExchangeError> {
    let seed = len ^ u64::from(to.port()) << 48;
    let pattern = Pattern::new(seed);
    let opening = Instant::now();
    let mut stream: TcpStream = OwnedFd::from(connected(Type::STREAM, Some(Protocol::TCP), to, timeout)?).into();
    let latency = opening.elapsed();
    let silent = ExchangeError::silent(to);
    let start = Instant::now();
    stream.write_all(&[b"B", &len.to_be_bytes()[..], &seed.to_be_bytes()[..]].concat()).map_err(&silent)?;
    let mut sent = 0;
    while sent < len {
        let piece = pattern.at(sent);
        let piece = &piece[..piece.len().min(256 * 1024).min(usize::try_from(len - sent).unwrap_or(usize::MAX))];
        stream.write_all(piece).map_err(&silent)?;
        sent += piece.len() as u64;
    }
    stream.shutdown(Shutdown::Write).map_err(&silent)?;
    let mut reply = Vec::new();
    stream.read_to_end(&mut reply).map_err(&silent)?;
    let elapsed = start.elapsed();
    match split_greeting(to, &reply, latency)? {
        (answer, b"ok\n") => Ok(Transfer { answer, len, elapsed }),
        (_, what) => Err(ExchangeError::Damaged { to, what: String::from_utf8_lossy(what).trim().to_owned() }),
    }
}

/// A connection that sends eight bytes every so often and expects them back: it shows whether a flow lives, and how long it stood
/// still.
pub struct Ticker {
    state: Arc<TickerState>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct TickerState {
    stop: AtomicBool,
    answered: AtomicU64,
    longest_gap_ns: AtomicU64,
    broken: std::sync::Mutex<Option<String>>,
}

/// How a ticking connection fared.
#[derive(Clone, Debug)]
pub struct TickerReport {
    /// How many ticks came back.
    pub answered: u64,
    /// The longest time between two answers, or since the last.
    pub longest_gap: Duration,
    /// Why the connection ended, if it did.
    pub broken: Option<String>,
}

impl Ticker {
    /// Connects from `netns` to `to` and ticks every `interval`; an answer that takes longer than `patience` breaks the connection.
    pub fn start(netns: &Netns, to: SocketAddr, interval: Duration, patience: Duration) -> Result<Ticker, ExchangeError> {
        let opened = netns.run(|| connected(Type::STREAM, Some(Protocol::TCP), to, Duration::from_secs(5)));
        let socket = opened.map_err(ExchangeError::local("enter the client's namespace"))??;
        socket.set_tcp_nodelay(true).map_err(ExchangeError::local("set an option"))?;
        socket.set_read_timeout(Some(patience)).map_err(ExchangeError::local("set a timeout"))?;
        let mut stream: TcpStream = OwnedFd::from(socket).into();
        // The first tick is answered here, so that a ticker which was started is one that works.
        let silent = ExchangeError::silent(to);
        stream.write_all(b"C").map_err(&silent)?;
        tick(&mut stream, 0).map_err(&silent)?;
        let state = Arc::new(TickerState::default());
        let its_state = Arc::clone(&state);
        let thread = thread::Builder::new().name("ticker".into()).spawn(move || run_ticker(&its_state, &mut stream, interval));
        Ok(Ticker { state, thread: Some(thread.map_err(ExchangeError::local("start a thread"))?) })
    }

    /// How many ticks have come back so far.
    pub fn answered(&self) -> u64 {
        self.state.answered.load(Ordering::Relaxed)
    }

    /// Ends it and says how it fared.
    pub fn finish(mut self) -> TickerReport {
        self.halt();
        TickerReport {
            answered: self.answered(),
            longest_gap: Duration::from_nanos(self.state.longest_gap_ns.load(Ordering::Relaxed)),
            broken: self.state.broken.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone(),
        }
    }

    fn halt(&mut self) {
        self.state.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // Its panic has been printed; the report then shows no more ticks.
            let _ = thread.join();
        }
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        self.halt();
    }
}

fn tick(stream: &mut TcpStream, number: u64) -> io::Result<()> {
    stream.write_all(&number.to_be_bytes())?;
    let mut back = [0; 8];
    stream.read_exact(&mut back)?;
    if u64::from_be_bytes(back) == number { Ok(()) } else { Err(io::Error::other("another tick came back than was sent")) }
}

fn run_ticker(state: &TickerState, stream: &mut TcpStream, interval: Duration) {
    let mut last = Instant::now();
    for number in 1.. {
        if state.stop.load(Ordering::Relaxed) {
            return;
        }
        let outcome = tick(stream, number);
        let gap = last.elapsed();
        state.longest_gap_ns.fetch_max(gap.as_nanos() as u64, Ordering::Relaxed);
        if let Err(error) = outcome {
            *state.broken.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(error.to_string());
            return;
        }
        last = Instant::now();
        state.answered.fetch_add(1, Ordering::Relaxed);
        thread::sleep(interval);
    }
}
