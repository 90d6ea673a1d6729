//! Transactions: a byte asked and a byte answered, on connections that stay (RR) or on one of its own for each (CRR), as fast as they go or at
//! a given rate. One thread and one `epoll` for all connections.
//!
//! At a rate, a timer says how many transactions have become due; each counts from its own due time, whether or not a connection was free.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use hdrhistogram::Histogram;
use mio::event::Source;
use mio::net::TcpStream;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use super::responder::{AGAIN, LAST, Responder};
use super::{Ends, Phase, Sample, Spent, latencies, observe, quantile, record, speak_cubic};

/// How transactions follow one another.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pace {
    /// So many at once, each followed by the next.
    AtOnce(usize),
    /// So many in a second, whatever becomes of them.
    Rate(f64),
}

/// What a measurement saw.
#[derive(Clone, Debug)]
pub struct Transacted {
    /// Transactions completed.
    pub done: u64,
    /// Connections that were refused, reset or lost.
    pub failed: u64,
    /// Of each transaction, from when it was due: to the answer (RR), or to the connection's being there (CRR).
    pub latencies: Histogram<u64>,
    /// Meanwhile.
    pub spent: Spent,
}

impl Transacted {
    /// In a second.
    pub fn per_s(&self) -> f64 {
        self.done as f64 / self.spent.elapsed.as_secs_f64()
    }

    fn cpu_us(&self) -> f64 {
        self.spent.cpu.as_secs_f64() * 1e6 / self.done as f64
    }

    /// RR: transactions in a second, and how long they took.
    pub fn answered(&self) -> Sample {
        let quantiles = [("p50 µs", 0.5), ("p99 µs", 0.99), ("p99.9 µs", 0.999)].map(|(unit, at)| (unit, quantile(&self.latencies, at)));
        Sample([&[("tx/s", self.per_s())], &quantiles[..], &[("CPU µs/tx", self.cpu_us())]].concat())
    }

    /// RR at a rate: how long they took is what counts.
    pub fn paced(&self) -> Sample {
        let mut sample = self.answered();
        sample.0.rotate_left(1);
        sample
    }

    /// CRR: connections in a second, and how long they took to be made.
    pub fn connected(&self) -> Sample {
        let quantiles = [("SYN p50 µs", 0.5), ("SYN p99 µs", 0.99)].map(|(unit, at)| (unit, quantile(&self.latencies, at)));
        Sample([&[("conn/s", self.per_s())], &quantiles[..], &[("CPU µs/conn", self.cpu_us()), ("failed", self.failed as f64)]].concat())
    }

    /// Connections at a rate: how long they took to be made is what counts.
    pub fn opened(&self) -> Sample {
        let quantiles = [("p50 µs", 0.5), ("p99 µs", 0.99), ("p99.9 µs", 0.999)].map(|(unit, at)| (unit, quantile(&self.latencies, at)));
        Sample([&quantiles[..], &[("conn/s", self.per_s()), ("failed", self.failed as f64)]].concat())
    }
}

/// Transactions on `connections` connections that stay.
pub fn rr(ends: &Ends<'_>, connections: usize, pace: Pace, duration: Duration) -> anyhow::Result<Transacted> {
    let _responder = Responder::start(&ends.to)?;
    rr_with(ends, connections, pace, duration)
}

/// The same where somebody answers already.
pub fn rr_with(ends: &Ends<'_>, connections: usize, pace: Pace, duration: Duration) -> anyhow::Result<Transacted> {
    let (seen, spent) = observe(ends.from, duration, |phase| {
        let mut client = Client::new(ends, phase, pace)?;
        for number in 0..connections {
            let (to, patience) = (ends.transaction(number as u64), Duration::from_secs(5));
            let stream = std::net::TcpStream::connect_timeout(&to, patience).with_context(|| format!("cannot connect to {to}"))?;
            speak_cubic(&stream)?;
            stream.set_nodelay(true)?;
            stream.set_nonblocking(true)?;
            client.keep(TcpStream::from_std(stream))?;
        }
        client.run(Client::ask)
    })?;
    finish(seen, spent)
}

/// A connection for each transaction: made, asked once, answered, and ended by the server, so that its port is soon free again.
pub fn crr(ends: &Ends<'_>, pace: Pace, duration: Duration) -> anyhow::Result<Transacted> {
    let _responder = Responder::start(&ends.to)?;
    let (seen, spent) = observe(ends.from, duration, |phase| Client::new(ends, phase, pace)?.run(Client::open))?;
    finish(seen, spent)
}

fn finish(seen: Seen, spent: Spent) -> anyhow::Result<Transacted> {
    ensure!(seen.done > 0, "not one transaction was completed ({} failed)", seen.failed);
    Ok(Transacted { done: seen.done, failed: seen.failed, latencies: seen.latencies, spent })
}

struct Seen {
    done: u64,
    failed: u64,
    latencies: Histogram<u64>,
}

/// More outstanding connections than this at once are not begun: what is due waits, and its time runs.
const OUTSTANDING_MAX: usize = 2_048;

/// How long what has begun may take to come to its end.
const LEAVE_TAKING: Duration = Duration::from_millis(500);

const TIMER: Token = Token(usize::MAX);

struct Client<'a> {
    ends: &'a Ends<'a>,
    phase: &'a Phase,
    poll: Poll,
    pace: Pace,
    timer: Option<TimerFd>,
    /// When the timer's first expiry was due, and how many have been seen.
    origin: Instant,
    ticks: u64,
    /// When those were due that found no connection free.
    waiting: VecDeque<Instant>,
    slots: Vec<Slot>,
    /// Slots that may begin a transaction.
    idle: Vec<usize>,
    begun: u64,
    seen: Seen,
}

#[derive(Default)]
struct Slot {
    stream: Option<TcpStream>,
    state: State,
}

#[derive(Clone, Copy, Default)]
enum State {
    /// Nothing is asked.
    #[default]
    Idle,
    /// A connection is being made, which was due then.
    Opening(Instant),
    /// Something was asked, which was due then; nothing if the connection's making was the time that counts.
    Asked(Option<Instant>),
}

impl<'a> Client<'a> {
    fn new(ends: &'a Ends<'a>, phase: &'a Phase, pace: Pace) -> anyhow::Result<Client<'a>> {
        let poll = Poll::new().context("cannot make an epoll")?;
        let timer = match pace {
            Pace::AtOnce(_) => None,
            Pace::Rate(_) => {
                let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)?;
                poll.registry().register(&mut SourceFd(&timer.as_fd().as_raw_fd()), TIMER, Interest::READABLE)?;
                Some(timer)
            }
        };
        let seen = Seen { done: 0, failed: 0, latencies: latencies() };
        Ok(Client {
            ends,
            phase,
            poll,
            pace,
            timer,
            origin: Instant::now(),
            ticks: 0,
            waiting: VecDeque::new(),
            slots: Vec::new(),
            idle: Vec::new(),
            begun: 0,
            seen,
        })
    }

    /// Takes a connection that stays.
    fn keep(&mut self, mut stream: TcpStream) -> io::Result<()> {
        stream.register(self.poll.registry(), Token(self.slots.len()), Interest::READABLE)?;
        self.idle.push(self.slots.len());
        self.slots.push(Slot { stream: Some(stream), state: State::Idle });
        Ok(())
    }

    fn run(mut self, begin: fn(&mut Client<'a>, usize, Instant) -> io::Result<()>) -> anyhow::Result<Seen> {
        if self.slots.is_empty() {
            let count = if let Pace::AtOnce(count) = self.pace { count } else { OUTSTANDING_MAX };
            self.slots.resize_with(count, Slot::default);
            self.idle = (0..count).rev().collect();
        }
        let mut events = Events::with_capacity(256);
        self.origin = Instant::now();
        if let (Some(timer), Pace::Rate(rate)) = (&self.timer, self.pace) {
            timer.set(Expiration::Interval(TimeSpec::from_duration(Duration::from_secs_f64(1.0 / rate))), TimerSetTimeFlags::empty())?;
        }
        let mut last_moment = None;
        loop {
            if self.phase.over() {
                // What has begun is brought to its end, or a late answer would meet a socket that is gone.
                let until = *last_moment.get_or_insert_with(|| Instant::now() + LEAVE_TAKING);
                if self.idle.len() == self.slots.len() {
                    break;
                }
                if Instant::now() > until {
                    self.seen.failed += (self.slots.len() - self.idle.len()) as u64;
                    break;
                }
            } else {
                self.begin_due(begin)?;
            }
            // Long enough to cost nothing, short enough to see the end.
            match self.poll.poll(&mut events, Some(Duration::from_millis(50))) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                result => result?,
            }
            for event in &events {
                if event.token() == TIMER {
                    self.tick()?;
                } else {
                    self.ready(event.token().0)?;
                }
            }
        }
        Ok(self.seen)
    }

    fn begin_due(&mut self, begin: fn(&mut Client<'a>, usize, Instant) -> io::Result<()>) -> io::Result<()> {
        while let Some(slot) = self.idle.pop() {
            let due = match self.pace {
                Pace::AtOnce(_) => Instant::now(),
                Pace::Rate(_) => match self.waiting.pop_front() {
                    Some(due) => due,
                    None => {
                        self.idle.push(slot);
                        return Ok(());
                    }
                },
            };
            self.begun += 1;
            begin(self, slot, due)?;
        }
        Ok(())
    }

    /// Puts down what has become due since the timer was looked at last.
    fn tick(&mut self) -> io::Result<()> {
        let (Some(timer), Pace::Rate(rate)) = (&self.timer, self.pace) else { return Ok(()) };
        let mut expiries = [0; 8];
        match nix::unistd::read(timer, &mut expiries) {
            Ok(_) => {}
            Err(nix::Error::EAGAIN) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
        for _ in 0..u64::from_ne_bytes(expiries) {
            self.ticks += 1;
            self.waiting.push_back(self.origin + Duration::from_secs_f64(self.ticks as f64 / rate));
        }
        Ok(())
    }

    /// Asks on a connection that stays.
    fn ask(&mut self, slot: usize, due: Instant) -> io::Result<()> {
        let Slot { stream, state } = &mut self.slots[slot];
        *state = State::Asked(Some(due));
        stream.as_mut().expect("a connection that stays").write_all(&[AGAIN])
    }

    /// Begins a connection.
    fn open(&mut self, slot: usize, due: Instant) -> io::Result<()> {
        let to: SocketAddr = self.ends.transaction(self.begun);
        match TcpStream::connect(to) {
            Ok(mut stream) => {
                stream.register(self.poll.registry(), Token(slot), Interest::READABLE | Interest::WRITABLE)?;
                self.slots[slot] = Slot { stream: Some(stream), state: State::Opening(due) };
            }
            Err(_) => self.free(slot, false),
        }
        Ok(())
    }

    fn ready(&mut self, slot: usize) -> io::Result<()> {
        let Slot { stream, state } = &mut self.slots[slot];
        // An event of a connection that ended earlier in this batch.
        let Some(stream) = stream else { return Ok(()) };
        if let State::Opening(due) = *state {
            match (stream.take_error(), stream.peer_addr()) {
                (Ok(None), Ok(_)) => {
                    if self.phase.counts() {
                        record(&mut self.seen.latencies, due.elapsed());
                    }
                    *state = State::Asked(None);
                    if stream.write_all(&[LAST]).is_err() {
                        self.free(slot, false);
                        return Ok(());
                    }
                }
                (Ok(None), Err(error)) if error.kind() == ErrorKind::NotConnected => return Ok(()),
                _ => {
                    self.free(slot, false);
                    return Ok(());
                }
            }
        }
        let Slot { stream: Some(stream), state } = &mut self.slots[slot] else { return Ok(()) };
        let mut answer = [0; 16];
        loop {
            match (stream.read(&mut answer), *state) {
                (Ok(1..), State::Asked(Some(due))) => {
                    if self.phase.counts() {
                        record(&mut self.seen.latencies, due.elapsed());
                        self.seen.done += 1;
                    }
                    *state = State::Idle;
                    self.idle.push(slot);
                    return Ok(());
                }
                // What is left is the end of the connection.
                (Ok(1..), _) => {}
                (Ok(0), State::Asked(None)) => {
                    self.free(slot, true);
                    return Ok(());
                }
                (Err(error), _) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                (Err(error), _) if error.kind() == ErrorKind::Interrupted => {}
                (Err(_), State::Asked(None)) => {
                    self.free(slot, false);
                    return Ok(());
                }
                (Ok(0), _) => return Err(io::Error::other("a connection that was to stay was ended")),
                (Err(error), _) => return Err(error),
            }
        }
    }

    /// Gives back the slot of a connection that is over.
    fn free(&mut self, slot: usize, well: bool) {
        self.slots[slot] = Slot::default();
        self.idle.push(slot);
        // A connection that fails before or after what counts is as much a fault.
        self.seen.failed += u64::from(!well);
        if self.phase.counts() {
            self.seen.done += u64::from(well);
        }
    }
}

#[cfg(test)]
mod tests {
    use podgate_runtime::netns::Netns;

    use super::super::tests::loopback;
    use super::*;

    const SHORT: Duration = Duration::from_millis(300);

    /// One after the other, since all want the same port.
    #[test]
    fn transactions_over_the_loopback_are_counted_and_timed() {
        let netns = Netns::anonymous().expect("root, or user namespaces");
        let up = netns.run(|| std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status()).unwrap().unwrap();
        assert!(up.success());
        let ends = loopback(&netns);

        let fast = rr(&ends, 4, Pace::AtOnce(4), SHORT).unwrap();
        assert!(fast.done > 100 && fast.failed == 0 && fast.latencies.len() == fast.done, "{} done", fast.done);

        let paced = rr(&ends, 4, Pace::Rate(500.0), SHORT).unwrap();
        assert!((100..=200).contains(&paced.done), "500 a second for 0.3 s: {}", paced.done);

        let connections = crr(&ends, Pace::AtOnce(8), SHORT).unwrap();
        assert!(connections.done > 50 && connections.failed == 0, "{} done, {} failed", connections.done, connections.failed);

        let opened = crr(&ends, Pace::Rate(200.0), SHORT).unwrap();
        assert!((40..=80).contains(&opened.done), "200 a second for 0.3 s: {}", opened.done);
    }

    #[test]
    fn nobody_who_answers_is_an_error() {
        let here = Netns::current().unwrap();
        let ends = Ends::direct(&here, &here, "127.0.0.77".parse().unwrap());
        assert!(rr_with(&ends, 1, Pace::AtOnce(1), SHORT).is_err());
    }
}
