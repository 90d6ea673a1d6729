//! The interface's own limit: what is read from a TUN is written back to it as it is, by one thread. No gateway between veth and TUN can do
//! less for a packet, so this is what ours is held against.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, poll};
use podgate_runtime::tun::Queue;

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
        let over = Arc::new(AtomicBool::new(false));
        let until = over.clone();
        let thread = thread::Builder::new().name("reflector".into()).spawn(move || reflect(&queue, &until))?;
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

fn reflect(queue: &Queue, over: &AtomicBool) -> io::Result<()> {
    let mut frame = vec![0; FRAME_LEN_MAX];
    while !over.load(Ordering::Relaxed) {
        match nix::unistd::read(queue, &mut frame) {
            Ok(len) => match nix::unistd::write(queue, &frame[..len]) {
                // A frame that the kernel does not take (nobody has its address) is lost, as it would be in a switch.
                Ok(_) | Err(nix::Error::EINVAL | nix::Error::ENOBUFS | nix::Error::ENOMEM) => {}
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
