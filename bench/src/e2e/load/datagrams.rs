//! Datagrams at a rate, and the highest rate of which no more than one in a thousand is lost.
//!
//! The sender keeps to a schedule (what it missed it sends later, in one go), many datagrams for each system call; the receiver counts. The
//! search floods first, to learn what arrives at most, and then halves the interval. A step that fails is tried once more: on a machine that
//! others use, a burst of theirs loses packets too.

use std::io::{IoSlice, IoSliceMut};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrIn, recvmmsg, sendmmsg, setsockopt, sockopt};

use super::{DATAGRAM_PORT, Ends, Sample, cpu_time};

/// What is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Bytes of payload of each datagram.
    pub payload: usize,
    /// Source ports.
    pub flows: usize,
    /// How the programs hand them over.
    pub form: Form,
}

/// How datagrams are handed to the kernel and taken from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// One by one.
    Single,
    /// Many in one buffer, cut and joined by the kernel (`UDP_SEGMENT`, `UDP_GRO`).
    Superframes,
}

/// Of a thousand, at most so many may be lost.
const LOSS_MAX: f64 = 1e-3;

/// Steps of the search after the flood.
const STEPS: u32 = 7;

/// The shortest step.
const STEP_MIN: Duration = Duration::from_millis(60);

/// Datagrams of one `sendmmsg`.
const BATCH: usize = 32;

/// Room in the receiver's socket; what overflows here is no fault of the path.
const RECEIVE_BUFFER: usize = 16 << 20;

/// One run at one rate.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// Datagrams sent.
    pub sent: u64,
    /// Datagrams received.
    pub received: u64,
    /// The time of sending.
    pub elapsed: Duration,
    /// What the machine spent.
    pub cpu: Duration,
}

impl Step {
    /// The part that was lost.
    pub fn loss(&self) -> f64 {
        1.0 - (self.received as f64 / self.sent.max(1) as f64).min(1.0)
    }

    /// Datagrams received in a second.
    pub fn per_s(&self) -> f64 {
        self.received as f64 / self.elapsed.as_secs_f64()
    }

    /// Datagrams sent in a second.
    pub fn offered_per_s(&self) -> f64 {
        self.sent as f64 / self.elapsed.as_secs_f64()
    }
}

/// The best step of a search, and what arrived when all was sent that could be.
#[derive(Clone, Copy, Debug)]
pub struct Found {
    /// At the highest rate of which enough arrived.
    pub best: Step,
    /// Without any rate.
    pub flood: Step,
}

impl Found {
    /// The most that arrived in a second, whatever was lost.
    pub fn peak(&self) -> f64 {
        self.best.per_s().max(self.flood.per_s())
    }

    /// Packets in a second, for small packets.
    pub fn packets(&self) -> Sample {
        let cpu = self.best.cpu.as_secs_f64() * 1e6 / self.best.received as f64;
        let flood = self.flood.per_s();
        Sample(vec![("packets/s", self.best.per_s()), ("CPU µs/packet", cpu), ("loss %", self.best.loss() * 100.0), ("flooded packets/s", flood)])
    }

    /// Bits in a second, for large ones.
    pub fn bits(&self, payload: usize) -> Sample {
        let gbit = |step: &Step| step.per_s() * (payload * 8) as f64 / 1e9;
        let cpu = self.best.cpu.as_secs_f64() / (self.best.received as f64 * payload as f64 / 1e9);
        Sample(vec![("Gb/s", gbit(&self.best)), ("CPU s/GB", cpu), ("loss %", self.best.loss() * 100.0), ("flooded Gb/s", gbit(&self.flood))])
    }
}

/// The highest rate of which enough arrives.
pub fn search(ends: &Ends<'_>, shape: Shape, duration: Duration) -> anyhow::Result<Found> {
    let path = Path::open(ends, shape)?;
    let step = (duration / (STEPS + 1)).max(STEP_MIN);
    // The first packets of a flow, and of a process, are not what is measured.
    path.run(1_000.0, STEP_MIN)?;
    let flood = path.run(f64::INFINITY, step)?;
    ensure!(flood.received > 0, "of {} datagrams none arrived", flood.sent);
    if flood.loss() <= LOSS_MAX {
        return Ok(Found { best: flood, flood });
    }
    let (mut good, mut bad): (Option<Step>, f64) = (None, flood.per_s() * 1.5);
    for _ in 0..STEPS {
        let rate = good.map_or(bad / 2.0, |good| (good.offered_per_s() + bad) / 2.0);
        let mut tried = path.run(rate, step)?;
        if tried.loss() > LOSS_MAX {
            tried = path.run(rate, step)?;
        }
        if tried.loss() > LOSS_MAX {
            bad = rate;
        } else if good.is_none_or(|good| tried.per_s() > good.per_s()) {
            good = Some(tried);
        } else {
            // The sender itself gets no further.
            break;
        }
    }
    let best = good.with_context(|| format!("more than one datagram in a thousand is lost even at {bad:.0} a second"))?;
    Ok(Found { best, flood })
}

/// Sockets at both ends.
pub struct Path {
    shape: Shape,
    senders: Vec<UdpSocket>,
    receiver: UdpSocket,
}

impl Path {
    /// Opens them.
    pub fn open(ends: &Ends<'_>, shape: Shape) -> anyhow::Result<Path> {
        let to = SocketAddr::new(ends.first().address, DATAGRAM_PORT);
        let receiver = ends.first().netns.run(|| UdpSocket::bind(to))?.with_context(|| format!("cannot bind {to}"))?;
        // Without privilege the limit of the machine (net.core.rmem_max) is what there is.
        setsockopt(&receiver, sockopt::RcvBufForce, &RECEIVE_BUFFER).or_else(|_| setsockopt(&receiver, sockopt::RcvBuf, &RECEIVE_BUFFER))?;
        receiver.set_read_timeout(Some(Duration::from_millis(20)))?;
        let mut senders = Vec::new();
        for _ in 0..shape.flows {
            let sender = ends.from.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)))??;
            sender.connect(to)?;
            if shape.form == Form::Superframes {
                setsockopt(&sender, sockopt::UdpGsoSegment, &i32::try_from(shape.payload)?).context("the kernel cannot cut datagrams")?;
            }
            senders.push(sender);
        }
        if shape.form == Form::Superframes {
            setsockopt(&receiver, sockopt::UdpGroSegment, &true).context("the kernel cannot join datagrams")?;
        }
        Ok(Path { shape, senders, receiver })
    }

    /// Sends `rate` datagrams in a second for `duration`, and says what became of them.
    pub fn run(&self, rate: f64, duration: Duration) -> anyhow::Result<Step> {
        let (received, over) = (AtomicU64::new(0), AtomicBool::new(false));
        thread::scope(|scope| {
            let receiver = scope.spawn(|| self.receive(&received, &over));
            let cpu = cpu_time()?;
            let sender = scope.spawn(|| self.send(rate, duration));
            let sent = sender.join().expect("a sender does not panic");
            let cpu = cpu_time()?.saturating_sub(cpu);
            // What is on its way arrives while the receiver still finds something.
            let mut before = u64::MAX;
            while received.load(Ordering::Relaxed) != before {
                before = received.load(Ordering::Relaxed);
                thread::sleep(Duration::from_millis(30));
            }
            over.store(true, Ordering::Relaxed);
            receiver.join().expect("a receiver does not panic")?;
            let (sent, elapsed) = sent?;
            Ok(Step { sent, received: received.load(Ordering::Relaxed), elapsed, cpu })
        })
    }

    /// How many datagrams one system call sends of one flow.
    fn batch(&self) -> usize {
        match self.shape.form {
            Form::Single => (BATCH * 2 / self.shape.flows.min(8)).min(BATCH),
            // What fits in one IP packet, in at most 64 segments (UDP_MAX_SEGMENTS in linux/udp.h; 128 since Linux 6.9).
            Form::Superframes => (61_000 / self.shape.payload).min(64),
        }
    }

    fn send(&self, rate: f64, duration: Duration) -> anyhow::Result<(u64, Duration)> {
        let batch = self.batch();
        let buffer = vec![0x5a_u8; self.shape.payload * if self.shape.form == Form::Superframes { batch } else { 1 }];
        let mut headers: MultiHeaders<SockaddrIn> = MultiHeaders::preallocate(BATCH, None);
        let (start, mut sent, mut turn) = (Instant::now(), 0_u64, 0);
        loop {
            let elapsed = start.elapsed();
            if elapsed >= duration {
                return Ok((sent, elapsed));
            }
            let due = (elapsed.as_secs_f64() * rate).min(9e15) as u64;
            let wanted = usize::try_from(due.saturating_sub(sent)).unwrap_or(usize::MAX).min(batch);
            if wanted == 0 || (self.shape.form == Form::Superframes && wanted < batch && rate.is_finite()) {
                // Shorter than a batch takes to become due at any rate that costs something.
                thread::sleep(Duration::from_micros(50));
                continue;
            }
            let socket = &self.senders[turn % self.senders.len()];
            turn += 1;
            let gone = match self.shape.form {
                Form::Single => {
                    let slices = vec![[IoSlice::new(&buffer)]; wanted];
                    let addresses = vec![None; wanted];
                    sendmmsg(socket.as_raw_fd(), &mut headers, &slices, &addresses, [], MsgFlags::empty()).map(Iterator::count)
                }
                Form::Superframes => nix::sys::socket::send(socket.as_raw_fd(), &buffer, MsgFlags::empty()).map(|len| len / self.shape.payload),
            };
            match gone {
                Ok(count) => sent += count as u64,
                // The interface's queue was full, or an ICMP error came back for an earlier one: this one is not sent.
                Err(Errno::ENOBUFS | Errno::ECONNREFUSED | Errno::EAGAIN) => {}
                Err(errno) => return Err(anyhow::Error::from(errno).context("cannot send datagrams")),
            }
        }
    }

    fn receive(&self, received: &AtomicU64, over: &AtomicBool) -> anyhow::Result<()> {
        let (room, len) = if self.shape.form == Form::Superframes { (4, 64 << 10) } else { (64, 2_048) };
        let mut buffers = vec![vec![0_u8; len]; room];
        let mut headers: MultiHeaders<SockaddrIn> = MultiHeaders::preallocate(room, None);
        while !over.load(Ordering::Relaxed) {
            let mut slices: Vec<_> = buffers.iter_mut().map(|buffer| [IoSliceMut::new(buffer)]).collect();
            let read = recvmmsg(self.receiver.as_raw_fd(), &mut headers, slices.iter_mut(), MsgFlags::MSG_WAITFORONE, None);
            match read {
                Ok(messages) => {
                    let datagrams: usize = messages.map(|message| message.bytes.div_ceil(self.shape.payload)).sum();
                    received.fetch_add(datagrams as u64, Ordering::Relaxed);
                }
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                Err(errno) => return Err(anyhow::Error::from(errno).context("cannot receive datagrams")),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use podgate_runtime::netns::Netns;

    use super::super::tests::loopback;
    use super::*;

    #[test]
    fn datagrams_arrive_at_the_rate_that_was_meant() {
        let here = Netns::current().unwrap();
        let ends = loopback(&here);
        for form in [Form::Single, Form::Superframes] {
            let path = Path::open(&ends, Shape { payload: 1_000, flows: 2, form }).unwrap();
            let step = path.run(5_000.0, Duration::from_millis(200)).unwrap();
            assert!((800..=1_000).contains(&step.sent), "{step:?}");
            assert_eq!(step.received, step.sent, "{form:?}");
        }
    }

    #[test]
    fn what_is_lost_is_a_part_of_what_was_sent() {
        let step = Step { sent: 1_000, received: 990, elapsed: Duration::from_secs(2), cpu: Duration::ZERO };
        assert!((step.loss() - 0.01).abs() < 1e-9);
        assert_eq!((step.per_s(), step.offered_per_s()), (495.0, 500.0));
    }
}
