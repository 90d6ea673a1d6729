//! What a frame costs to be read from a TUN and to be written to one: by a vector for header and packet, by one piece, and by `io_uring` in
//! batches. The figures behind the choice in `tun.rs`.
//!
//! `cargo build --release -p podgate-runtime --example tun_io`, then, in a namespace that it makes itself (root, or a user namespace):
//!
//!     taskset -c 1 target/release/examples/tun_io
//!
//! Read first: io_uring(7), io_uring_setup(2) (`IORING_SETUP_SINGLE_ISSUER`, `IORING_SETUP_DEFER_TASKRUN`).

use std::io::{self, IoSlice, IoSliceMut};
use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::process::Command;
use std::time::Instant;

use io_uring::{IoUring, opcode, types};
use podgate_runtime::netns::Netns;
use podgate_runtime::tun::{Queue, Tun};
use podgate_runtime::vnet::VNET_HEADER_LEN;

/// Frames that wait in the TUN's queue for a round of reads, or are written in one.
const FRAMES: usize = 480;
/// Operations of one submission.
const BATCH: usize = 32;
/// The least of so many rounds counts.
const ROUNDS: usize = 60;
/// From one frame's place to the next.
const PLACE: usize = 4096;
/// Its index among the ring's registered files.
const QUEUE: types::Fixed = types::Fixed(0);

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let netns = Netns::anonymous()?;
    let mut tun = Tun::open("t0", 1, &netns)?;
    tun.bring_up()?;
    let address = netns.run(|| Command::new("ip").args(["address", "add", "10.9.0.1/24", "dev", "t0"]).status())??;
    assert!(address.success(), "`ip address add` failed (Debian: iproute2)");
    let (outside, inside) = netns.run(|| io::Result::Ok((UdpSocket::bind("10.9.0.1:700")?, UdpSocket::bind("10.9.0.1:0")?)))??;
    outside.set_nonblocking(true)?;
    let bench = Bench { queue: &tun.queues[0], receiver: outside, sender: inside };
    println!("ns for a frame of 64 and of 1,400 bytes, the least of {ROUNDS} rounds of {FRAMES}");
    let (reads, writes) = (|way, len| bench.reads(way, len), |way, len| bench.writes(way, len));
    for (verb, measure) in [("read", &reads as &dyn Fn(Way, usize) -> io::Result<f64>), ("write", &writes)] {
        for (name, way) in [("in vectors", Way::Vectors), ("in one piece", Way::Piece), ("io_uring, 32 at a time", Way::Ring)] {
            println!("{verb:<5} {name:<24} {:>6.0} {:>6.0}", measure(way, 64)?, measure(way, 1400)?);
        }
    }
    Ok(())
}

#[derive(Clone, Copy)]
enum Way {
    Vectors,
    Piece,
    Ring,
}

struct Bench<'a> {
    queue: &'a Queue,
    receiver: UdpSocket,
    sender: UdpSocket,
}

impl Bench<'_> {
    fn ring(&self) -> io::Result<IoUring> {
        let ring = IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(2 * BATCH as u32)?;
        ring.submitter().register_files(&[self.queue.as_raw_fd()])?;
        Ok(ring)
    }

    fn drain(&self) {
        let mut buffer = [0; PLACE];
        while nix::unistd::read(self.queue, &mut buffer).is_ok() {}
        while self.receiver.recv(&mut buffer).is_ok() {}
    }

    fn reads(&self, way: Way, len: usize) -> io::Result<f64> {
        let (mut places, mut ring) = (vec![0; BATCH * PLACE], self.ring()?);
        let (payload, mut least) = (vec![7; len - 28], f64::INFINITY);
        for _ in 0..ROUNDS {
            self.drain();
            for _ in 0..FRAMES {
                self.sender.send_to(&payload, "10.9.0.2:900")?;
            }
            let start = Instant::now();
            let mut read = 0;
            while let got @ 1.. = self.read(way, &mut places, &mut ring)? {
                read += got;
            }
            assert!(read >= FRAMES, "{read} frames came");
            least = least.min(start.elapsed().as_nanos() as f64 / read as f64);
        }
        Ok(least)
    }

    /// Reads up to a batch; how many there were.
    fn read(&self, way: Way, places: &mut [u8], ring: &mut IoUring) -> io::Result<usize> {
        let fd = self.queue.as_raw_fd();
        if let Way::Ring = way {
            for (index, place) in places.chunks_exact_mut(PLACE).enumerate() {
                let entry = opcode::Read::new(QUEUE, place.as_mut_ptr(), PLACE as u32).rw_flags(libc::RWF_NOWAIT).build().user_data(index as u64);
                // SAFETY: the place outlives the operation: all of them are waited for below.
                unsafe { ring.submission().push(&entry) }.map_err(io::Error::other)?;
            }
            return self.complete(ring);
        }
        let mut count = 0;
        for place in places.chunks_exact_mut(PLACE) {
            let (header, packet) = place.split_at_mut(VNET_HEADER_LEN);
            let read = match way {
                Way::Vectors => {
                    let mut beyond = [0; 1];
                    let mut slices = [IoSliceMut::new(header), IoSliceMut::new(packet), IoSliceMut::new(&mut beyond)];
                    // SAFETY: IoSliceMut is an iovec by its documentation, and the three borrow memory that is valid for writes.
                    unsafe { libc::readv(fd, slices.as_mut_ptr().cast(), 3) }
                }
                // SAFETY: `place` is valid for writes of its length.
                _ => unsafe { libc::read(fd, place.as_mut_ptr().cast(), PLACE) },
            };
            if read < 0 {
                break;
            }
            count += 1;
        }
        Ok(count)
    }

    fn writes(&self, way: Way, len: usize) -> io::Result<f64> {
        let mut ring = self.ring()?;
        let mut frame = vec![0; VNET_HEADER_LEN];
        frame.extend(datagram(len));
        let mut least = f64::INFINITY;
        for _ in 0..ROUNDS {
            self.drain();
            let start = Instant::now();
            for _ in 0..FRAMES / BATCH {
                self.write(way, &frame, &mut ring)?;
            }
            least = least.min(start.elapsed().as_nanos() as f64 / FRAMES as f64);
        }
        Ok(least)
    }

    /// Writes a batch.
    fn write(&self, way: Way, frame: &[u8], ring: &mut IoUring) -> io::Result<()> {
        let fd = self.queue.as_raw_fd();
        if let Way::Ring = way {
            for index in 0..BATCH {
                let entry = opcode::Write::new(QUEUE, frame.as_ptr(), frame.len() as u32).build().user_data(index as u64);
                // SAFETY: the frame outlives the operation: all of them are waited for below.
                unsafe { ring.submission().push(&entry) }.map_err(io::Error::other)?;
            }
            let written = self.complete(ring)?;
            assert_eq!(written, BATCH, "a frame was refused");
            return Ok(());
        }
        let (header, packet) = frame.split_at(VNET_HEADER_LEN);
        for _ in 0..BATCH {
            let written = match way {
                // SAFETY: IoSlice is an iovec by its documentation, and both borrow memory that is valid for reads.
                Way::Vectors => unsafe { libc::writev(fd, [IoSlice::new(header), IoSlice::new(packet)].as_ptr().cast(), 2) },
                // SAFETY: `frame` is valid for reads of its length.
                _ => unsafe { libc::write(fd, frame.as_ptr().cast(), frame.len()) },
            };
            assert_eq!(written, frame.len() as isize, "{}", io::Error::last_os_error());
        }
        Ok(())
    }

    /// Submits a batch and waits for it; how many operations came to something.
    fn complete(&self, ring: &mut IoUring) -> io::Result<usize> {
        ring.submit_and_wait(BATCH)?;
        Ok(ring.completion().filter(|completion| completion.result() > 0).count())
    }
}

/// A datagram of `len` bytes to the socket that counts them.
fn datagram(len: usize) -> Vec<u8> {
    let mut packet = Vec::new();
    let builder = etherparse::PacketBuilder::ipv4([10, 9, 0, 2], [10, 9, 0, 1], 64).udp(900, 700);
    builder.write(&mut packet, &vec![7; len - 28]).expect("a vector takes all");
    packet
}
