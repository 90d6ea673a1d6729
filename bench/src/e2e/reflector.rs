//! The interface's own limit: what is read from a TUN is written back to it as it is, by one thread. No gateway between veth and TUN can do
//! less for a packet, so this is what ours is held against. The same by tun-rs' offload path, which cuts and joins what it carries, is what
//! another library makes of that interface.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, poll};
use podgate_runtime::tun::Queue;
use tun_rs::{GROTable, IDEAL_BATCH_SIZE, SyncDevice, VIRTIO_NET_HDR_LEN};

/// The thread, which ends with this value.
#[derive(Debug)]
pub struct Reflector {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

/// Room for a `virtio_net_hdr` and the longest frame.
const FRAME_LEN_MAX: usize = 10 + (64 << 10);

/// How long it waits for a frame before it looks whether it is over.
const WAIT: Duration = Duration::from_millis(100);

impl Reflector {
    /// Begins to reflect what `queue` brings.
    pub fn start(queue: Queue) -> io::Result<Reflector> {
        Reflector::spawn(move |over| reflect(&queue, over))
    }

    /// The same by tun-rs.
    pub fn start_tun_rs(device: SyncDevice) -> io::Result<Reflector> {
        device.set_nonblocking(true)?;
        Reflector::spawn(move |over| reflect_by_tun_rs(&device, over))
    }

    fn spawn(work: impl FnOnce(&AtomicBool) -> io::Result<()> + Send + 'static) -> io::Result<Reflector> {
        let over = Arc::new(AtomicBool::new(false));
        let until = over.clone();
        let thread = thread::Builder::new().name("reflector".into()).spawn(move || work(&until))?;
        Ok(Reflector { over, thread: Some(thread) })
    }
}

impl Drop for Reflector {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(Ok(Err(error))) = self.thread.take().map(JoinHandle::join) {
            eprintln!("podgate-bench: the reflector ended early: {error}");
        }
    }
}

/// A frame that the kernel does not take (nobody has its address) is lost, as it would be in a switch.
const NOT_TAKEN: [nix::Error; 3] = [nix::Error::EINVAL, nix::Error::ENOBUFS, nix::Error::ENOMEM];

fn reflect(queue: &Queue, over: &AtomicBool) -> io::Result<()> {
    let mut frame = vec![0; FRAME_LEN_MAX];
    while !over.load(Ordering::Relaxed) {
        match nix::unistd::read(queue, &mut frame) {
            Ok(len) => match nix::unistd::write(queue, &frame[..len]) {
                Ok(_) => {}
                Err(errno) if NOT_TAKEN.contains(&errno) => {}
                Err(errno) => return Err(errno.into()),
            },
            Err(nix::Error::EAGAIN) => {
                poll(&mut [PollFd::new(queue.as_fd(), PollFlags::POLLIN)], WAIT.as_millis() as u16)?;
            }
            Err(nix::Error::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

fn reflect_by_tun_rs(device: &SyncDevice, over: &AtomicBool) -> io::Result<()> {
    let mut frame = vec![0; FRAME_LEN_MAX];
    let mut packets = vec![vec![0; VIRTIO_NET_HDR_LEN + (64 << 10)]; IDEAL_BATCH_SIZE];
    let mut sizes = vec![0; IDEAL_BATCH_SIZE];
    let mut table = GROTable::default();
    while !over.load(Ordering::Relaxed) {
        match device.recv_multiple(&mut frame, &mut packets, &mut sizes, VIRTIO_NET_HDR_LEN) {
            Ok(count) => {
                for (packet, size) in packets.iter_mut().zip(&sizes[..count]) {
                    packet.truncate(VIRTIO_NET_HDR_LEN + size);
                }
                let sent = device.send_multiple(&mut table, &mut packets[..count], VIRTIO_NET_HDR_LEN);
                packets[..count].iter_mut().for_each(|packet| packet.resize(VIRTIO_NET_HDR_LEN + (64 << 10), 0));
                match sent {
                    Ok(_) => {}
                    Err(error) if error.raw_os_error().is_some_and(|errno| NOT_TAKEN.contains(&nix::Error::from_raw(errno))) => {}
                    Err(error) => return Err(error),
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                poll(&mut [PollFd::new(device.as_fd(), PollFlags::POLLIN)], WAIT.as_millis() as u16)?;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
