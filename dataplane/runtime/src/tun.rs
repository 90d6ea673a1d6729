//! The TUN devices `pods` and `host`: persistent, multi-queue, with a `virtio_net_hdr` before each frame.
//!
//! One frame may stand for 64 KiB of TCP (design D2), so reading and writing cost a system call per superframe, not per packet.
//! A frame is read behind its header, and written so if it lies in one piece; writes gather a merged frame from wherever its segments lie by `writev`. Payload is never
//! copied in user space.
//!
//! The crate `tun` opens neither several queues nor offloads, so each queue is opened here by a few ioctls and then handed to it
//! (`raw_fd`): it keeps the descriptor, makes it non-blocking and the device persistent, and configures the interface through a
//! control socket that lives in the device's namespace.
//!
//! Assumed: a device is used by one process at a time (the holder of the runtime directory's lock). A device that somebody holds
//! queues of is refused, because a queue without a reader loses packets; unless they were handed over ([`Tun::open_with`]): those are
//! gone on with, and what waits in them is read.
//!
//! Read first: Documentation/networking/tuntap.rst; linux/if_tun.h; drivers/net/tun.c.

use std::fs::OpenOptions;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use podgate_core::packet::Offload;
use tun::AbstractDevice;

use crate::link::{self, Link};
use crate::netns::{Netns, Question};
use crate::vnet::{VNET_HEADER_LEN, VnetHeader};

/// The most slices that one [`Queue::write`] takes: two for each of 64 segments, and some.
pub const WRITE_SLICES_MAX: usize = 135;

/// The most queues a device can have (`MAX_TAP_QUEUES`).
pub const QUEUES_MAX: u16 = 256;

/// Frames that may wait in each queue of a new device. The kernel's 500 overflow within a millisecond of small packets; each may hold
/// 64 KiB, so more than 2,000 would be memory that senders fill without ever being held back.
pub const QUEUE_LEN: u32 = 1000;

/// A TUN device with its queues, each of which one worker may take.
#[derive(Debug)]
pub struct Tun {
    /// The interface's name.
    pub name: String,
    /// Its queues, as many as were asked for; each attached queue needs a live reader.
    pub queues: Vec<Queue>,
    shared: Arc<Shared>,
}

/// One queue: a descriptor that one worker reads and writes.
pub struct Queue {
    device: tun::Device,
    shared: Arc<Shared>,
}

/// Which offloads are in use on a device. A feature that is off is neither taken from the kernel nor to be written to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Features {
    /// Checksums may be left unfinished.
    pub checksum: bool,
    /// TCP superframes, both families.
    pub tso: bool,
    /// UDP superframes, both families (Linux 6.2).
    pub uso: bool,
}

/// One offload, to be switched off when the kernel turns out not to keep what it promised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    /// Unfinished checksums; all others need it and go with it.
    Checksum,
    /// TCP superframes.
    Tso,
    /// UDP superframes.
    Uso,
}

/// Whether the kernel puts packets on a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attachment {
    /// It does.
    Attached,
    /// It does not: its flows go to the other queues, what it held is dropped, and reads find nothing.
    Detached,
}

/// Whether a device is to be there already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// It is made.
    New,
    /// It is there.
    Found,
}

/// What [`Tun::remove`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removed {
    /// It was there and is gone.
    Removed,
    /// There was none.
    Absent,
}

/// What the kernel dropped at a device since it was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Losses {
    /// Packets for the gateway that found their queue full, or no queue.
    pub queue_full: u64,
    /// Frames of the gateway that the kernel's stack did not take.
    pub not_taken: u64,
}

/// Why a TUN device could not be had.
#[derive(Debug, thiserror::Error)]
pub enum TunError {
    /// A name the kernel would not take.
    #[error("`{0}` cannot be an interface's name: 1 to 15 bytes without `/`, `%`, `:` or white space")]
    Name(String),
    /// A number of queues the kernel would not take.
    #[error("TUN {name}: {queues} queues were asked for; the kernel has 1 to {QUEUES_MAX}")]
    QueueCount {
        /// The interface.
        name: String,
        /// What was asked for.
        queues: u16,
    },
    /// `/dev/net/tun` is missing.
    #[error(
        "/dev/net/tun is missing: load the module (`modprobe tun`); in a container, pass the device in (`--device /dev/net/tun`, or a hostPath volume)"
    )]
    NoDriver,
    /// `/dev/net/tun` may not be opened.
    #[error(
        "/dev/net/tun may not be opened: run as root, or allow character device 10:200 to this container or unit (`DeviceAllow=/dev/net/tun rw`)"
    )]
    DriverDenied,
    /// No right to make or attach to the device.
    #[error("TUN {0}: not permitted; grant CAP_NET_ADMIN in the user namespace that owns the network namespace")]
    NotPermitted(String),
    /// Something else has the name.
    #[error("interface {name} exists and is {found}, not a multi-queue TUN: delete it (`ip link delete {name}`) or configure another name")]
    WrongKind {
        /// The interface.
        name: String,
        /// What it is.
        found: String,
    },
    /// Somebody holds queues of it.
    #[error("TUN {name} is in use: another process holds {queues} of its queues; stop that gateway first (`fuser /dev/net/tun` finds it)")]
    Busy {
        /// The interface.
        name: String,
        /// How many queues are held.
        queues: u32,
    },
    /// Anything else, with the step that failed.
    #[error("TUN {name}: {step} failed: {source}")]
    Io {
        /// The interface.
        name: String,
        /// What was being done.
        step: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

#[derive(Debug)]
struct Shared {
    name: String,
    /// Bits of `TUNSETOFFLOAD`; changed rarely, by whichever worker meets a refusal. Nothing else is ordered by it.
    offloads: AtomicU8,
}

impl Tun {
    /// Makes the device `name` in `netns`, or attaches to the persistent one that an earlier process left, with `queues` queues.
    ///
    /// The interface is left as it is found, down if it is new: bring it up when rules and routes stand.
    pub fn open(name: &str, queues: u16, netns: &Netns) -> Result<Tun, TunError> {
        Tun::open_with(name, queues, netns, Vec::new())
    }

    /// The same, with queues that a predecessor left open. Each is looked at: what is not a queue of this device is closed. If there are
    /// too many, what waits in the last ones is lost.
    pub fn open_with(name: &str, queues: u16, netns: &Netns, left: Vec<OwnedFd>) -> Result<Tun, TunError> {
        if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.contains(|c: char| c.is_whitespace() || "/%:\0".contains(c)) {
            return Err(TunError::Name(name.to_owned()));
        }
        if !(1..=QUEUES_MAX).contains(&queues) {
            return Err(TunError::QueueCount { name: name.to_owned(), queues });
        }
        let left: Vec<(Attachment, OwnedFd)> = left.into_iter().filter_map(|fd| Some((as_queue_of(&fd, name, netns)?, fd))).collect();
        netns.run(|| Tun::open_here(name, queues, left)).map_err(|source| TunError::Io {
            name: name.to_owned(),
            step: "entering its namespace",
            source,
        })?
    }

    /// Deletes the device `name` in `netns`, whoever holds it. An interface of another kind is not touched.
    pub fn remove(name: &str, netns: &Netns) -> Result<Removed, TunError> {
        let failed = |step| move |source| TunError::Io { name: name.to_owned(), step, source };
        let remove_here = || match link::find(name).map_err(failed("looking for it"))? {
            None => Ok(Removed::Absent),
            Some(link) if i32::from(link.tun_type) != libc::IFF_TUN => Err(wrong_kind(name, &link)),
            Some(_) => match link::delete(name) {
                Ok(()) => Ok(Removed::Removed),
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(Removed::Absent),
                Err(error) if error.raw_os_error() == Some(libc::EPERM) => Err(TunError::NotPermitted(name.to_owned())),
                Err(source) => Err(failed("deleting it")(source)),
            },
        };
        netns.run(remove_here).map_err(failed("entering its namespace"))?
    }

    /// What the kernel dropped at the device `name` in `netns`; `None` if there is no such device.
    pub fn losses(name: &str, netns: &Netns) -> Result<Option<Losses>, TunError> {
        let failed = |step| move |source| TunError::Io { name: name.to_owned(), step, source };
        let link = netns.run(|| link::find(name)).map_err(failed("entering its namespace"))?.map_err(failed("reading its statistics"))?;
        Ok(link.map(|link| Losses { queue_full: link.tx_dropped, not_taken: link.rx_dropped }))
    }

    /// Which offloads are in use.
    pub fn features(&self) -> Features {
        self.shared.features()
    }

    /// Sets the interface's MTU.
    pub fn set_mtu(&mut self, mtu: u16) -> Result<(), TunError> {
        self.configure("setting the MTU", |device| device.set_mtu(mtu))
    }

    /// The interface's MTU.
    pub fn mtu(&self) -> Result<u16, TunError> {
        let device = &self.queues.first().ok_or_else(|| self.no_queue())?.device;
        device.mtu().map_err(|error| self.shared.failed("reading the MTU")(error.into()))
    }

    /// Brings the interface up.
    pub fn bring_up(&mut self) -> Result<(), TunError> {
        self.configure("bringing it up", |device| device.enabled(true))
    }

    fn open_here(name: &str, queues: u16, mut left: Vec<(Attachment, OwnedFd)>) -> Result<Tun, TunError> {
        let shared = Arc::new(Shared { name: name.to_owned(), offloads: AtomicU8::new(0) });
        let found = link::find(name).map_err(shared.failed("looking for it"))?;
        match &found {
            Some(link) if i32::from(link.tun_type) != libc::IFF_TUN || !link.multi_queue => return Err(wrong_kind(name, link)),
            Some(link) if link.queues as usize > left.len() => {
                return Err(TunError::Busy { name: name.to_owned(), queues: link.queues - left.len() as u32 });
            }
            _ => {}
        }
        // Those in use first: something may wait in them.
        left.sort_by_key(|(attachment, _)| *attachment == Attachment::Detached);
        for (at, (attachment, fd)) in left.iter().enumerate() {
            // Others may have handles on one that is too many: as long as it is attached, packets are led to it.
            let wanted = if at < queues.into() { Attachment::Attached } else { Attachment::Detached };
            if *attachment != wanted {
                set_attachment(fd.as_raw_fd(), wanted).map_err(shared.failed("attaching or detaching a queue (TUNSETQUEUE)"))?;
            }
        }
        let mut left = left.into_iter();
        let queues = (0..queues).map(|_| left.next().map_or_else(|| Queue::open_here(&shared), |(_, fd)| Queue::wrap(&shared, fd)));
        let queues = queues.collect::<Result<Vec<_>, _>>()?;
        let mut tun = Tun { name: name.to_owned(), queues, shared };
        tun.queues[0].agree()?;
        if found.is_none() {
            // The queues that exist already are resized with it (drivers/net/tun.c, tun_queue_resize).
            link::set_queue_len(name, QUEUE_LEN).map_err(tun.shared.failed("setting the length of its queues"))?;
        }
        tun.configure("making it persistent", tun::Device::persist)?;
        Ok(tun)
    }

    fn configure(&mut self, step: &'static str, f: impl FnOnce(&mut tun::Device) -> tun::Result<()>) -> Result<(), TunError> {
        let missing = self.no_queue();
        let device = &mut self.queues.first_mut().ok_or(missing)?.device;
        f(device).map_err(|error| self.shared.failed(step)(error.into()))
    }

    fn no_queue(&self) -> TunError {
        self.shared.failed("configuring it")(io::Error::new(io::ErrorKind::NotFound, "its queues have been taken: do this before"))
    }
}

impl Queue {
    /// Reads one frame: `buf` gets its `virtio_net_hdr`, [`VNET_HEADER_LEN`] bytes, and behind it the packet, whose length is given back. `None`
    /// when there is none now.
    ///
    /// Errors are the kernel's, and two of ours, after which the frame is gone and the queue goes on: EMSGSIZE if the frame is longer
    /// than `buf` but for one byte (64 KiB hold every frame of an interface whose `gso_max_size` is the default), InvalidData if its header
    /// makes no sense.
    #[inline]
    pub fn read(&self, buf: &mut [u8]) -> io::Result<Option<(usize, Offload)>> {
        // SAFETY: `buf` is valid for writes of its length.
        let read = unsafe { libc::read(self.as_raw_fd(), buf.as_mut_ptr().cast(), buf.len()) };
        let len = match usize::try_from(read) {
            Ok(len) => len,
            Err(_) => {
                let error = io::Error::last_os_error();
                return if error.kind() == io::ErrorKind::WouldBlock { Ok(None) } else { Err(error) };
            }
        };
        // The kernel cuts a frame that does not fit and says nothing.
        if len == buf.len() {
            return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
        }
        let (header, packet) = buf[..len].split_first_chunk_mut().ok_or(io::ErrorKind::UnexpectedEof)?;
        let offload = VnetHeader::parse(header, packet).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        Ok(Some((packet.len(), offload)))
    }

    /// Writes one frame that lies in one piece: its `virtio_net_hdr` and the packet.
    #[inline]
    pub fn write_whole(&self, frame: &[u8]) -> io::Result<()> {
        // SAFETY: `frame` is valid for reads of its length.
        let written = unsafe { libc::write(self.as_raw_fd(), frame.as_ptr().cast(), frame.len()) };
        if written < 0 {
            return Err(io::Error::last_os_error());
        }
        debug_assert_eq!(written as usize, frame.len(), "a TUN takes a frame or refuses it, as in `write_some`");
        Ok(())
    }

    /// Writes one frame: `header`, then the packet in `slices`, at most [`WRITE_SLICES_MAX`], from its IP header on.
    #[inline]
    pub fn write(&self, header: &[u8; VNET_HEADER_LEN], slices: &[IoSlice<'_>]) -> io::Result<()> {
        match slices.len() {
            0..4 => self.write_some::<4>(header, slices),
            4..=WRITE_SLICES_MAX => self.write_some::<{ WRITE_SLICES_MAX + 1 }>(header, slices),
            _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "more slices than WRITE_SLICES_MAX")),
        }
    }

    #[inline]
    fn write_some<'a, const N: usize>(&self, header: &'a [u8; VNET_HEADER_LEN], slices: &[IoSlice<'a>]) -> io::Result<()> {
        let mut all = [IoSlice::new(&[]); N];
        all[0] = IoSlice::new(header);
        all[1..=slices.len()].copy_from_slice(slices);
        let count = slices.len() + 1;
        // SAFETY: IoSlice is an iovec by its documentation; the first `count` borrow memory that is valid for reads.
        let written = unsafe { libc::writev(self.as_raw_fd(), all.as_ptr().cast(), count as libc::c_int) };
        if written < 0 {
            return Err(io::Error::last_os_error());
        }
        // A TUN takes a frame or refuses it: tun_get_user returns the whole length.
        debug_assert_eq!(written as usize, all[..count].iter().map(|slice| slice.len()).sum::<usize>());
        Ok(())
    }

    /// Attaches the queue to the device or detaches it.
    pub fn set_attachment(&self, attachment: Attachment) -> io::Result<()> {
        set_attachment(self.as_raw_fd(), attachment)
    }

    /// Which offloads are in use on the device.
    #[inline]
    pub fn features(&self) -> Features {
        self.shared.features()
    }

    /// Switches one offload off on the device, for all its queues: the kernel segments and sums what it gives us from now on. What it
    /// had queued before may still come with it. Returns what is left.
    pub fn disable(&self, feature: Feature) -> io::Result<Features> {
        let off = match feature {
            Feature::Checksum => OFFLOAD_CHECKSUM | OFFLOAD_TSO | OFFLOAD_USO,
            Feature::Tso => OFFLOAD_TSO,
            Feature::Uso => OFFLOAD_USO,
        };
        self.set_offloads(self.shared.offloads.load(Ordering::Relaxed) & !off)?;
        Ok(self.features())
    }

    fn set_offloads(&self, offloads: u8) -> io::Result<()> {
        // SAFETY: the descriptor is an attached TUN queue; the argument is a set of flags, passed by value.
        unsafe { ioctl::set_offload(self.as_raw_fd(), offloads.into()) }?;
        // Relaxed: a hint to writers, see `Shared`.
        self.shared.offloads.store(offloads, Ordering::Relaxed);
        Ok(())
    }

    /// Opens `count` queues of the device `name` in the calling thread's namespace: of the persistent one that an earlier process left, or of a
    /// new one, which is down.
    pub(crate) fn open_for_pod(name: &str, count: u16, wanted: Wanted) -> Result<Vec<Queue>, TunError> {
        let shared = Arc::new(Shared { name: name.to_owned(), offloads: AtomicU8::new(0) });
        let found = link::find(name).map_err(shared.failed("looking for it"))?;
        match (&found, wanted) {
            (Some(link), Wanted::Found) if i32::from(link.tun_type) != libc::IFF_TUN || !link.multi_queue => return Err(wrong_kind(name, link)),
            (Some(link), Wanted::Found) if link.queues > 0 => return Err(TunError::Busy { name: name.to_owned(), queues: link.queues }),
            (Some(_), Wanted::New) => return Err(shared.failed("making it")(io::Error::from_raw_os_error(libc::EEXIST))),
            (None, Wanted::Found) => return Err(shared.failed("looking for it")(io::Error::from_raw_os_error(libc::ENODEV))),
            _ => {}
        }
        let mut queues = (0..count.max(1)).map(|_| Queue::open_here(&shared)).collect::<Result<Vec<_>, _>>()?;
        queues[0].agree()?;
        if found.is_none() {
            link::set_queue_len(name, QUEUE_LEN).map_err(shared.failed("setting the length of its queues"))?;
            link::set_noqueue(name).map_err(shared.failed("taking its queueing discipline away"))?;
        }
        queues[0].device.persist().map_err(|error| shared.failed("making it persistent")(error.into()))?;
        Ok(queues)
    }

    /// Takes over a queue that another process has opened.
    pub(crate) fn adopt(fd: OwnedFd) -> Result<Queue, TunError> {
        let (name, flags) = identify(&fd).map_err(unnamed("asking what it is (TUNGETIFF)"))?;
        if flags & (OURS | libc::IFF_TAP) != OURS {
            return Err(TunError::WrongKind { name, found: "a TUN that was opened in another way".to_owned() });
        }
        let shared = Arc::new(Shared { name, offloads: AtomicU8::new(0) });
        let queue = Queue::wrap(&shared, fd)?;
        queue.agree()?;
        Ok(queue)
    }

    /// Takes over another queue of the same device, which is in `netns`; `None` if it is something else.
    pub(crate) fn sibling(&self, fd: OwnedFd, netns: &Netns) -> Option<Queue> {
        let attached = as_queue_of(&fd, self.name(), netns) == Some(Attachment::Attached);
        if attached { Queue::wrap(&self.shared, fd).ok() } else { None }
    }

    /// Opens another queue of the same device, whose namespace is the calling thread's.
    pub(crate) fn further(&self) -> Result<Queue, TunError> {
        Queue::open_here(&self.shared)
    }

    /// Closes the queue, whoever still has this value: from now on it is one that says nothing and swallows everything.
    pub(crate) fn vacate(&self) -> io::Result<()> {
        let nothing = OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC).open("/dev/null")?;
        // SAFETY: both descriptors are open and stay ours; the second one's file changes, its number does not.
        let moved = unsafe { libc::dup3(nothing.as_raw_fd(), self.as_raw_fd(), libc::O_CLOEXEC) };
        if moved < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// The interface's name.
    pub(crate) fn name(&self) -> &str {
        &self.shared.name
    }

    /// Tells the kernel which header we read and write and which offloads we take: once for a device.
    fn agree(&self) -> Result<(), TunError> {
        let size = VNET_HEADER_LEN as libc::c_int;
        // SAFETY: the descriptor is an attached TUN queue; the kernel reads one int from the pointer.
        unsafe { ioctl::set_vnet_header_size(self.as_raw_fd(), &size) }
            .map_err(|errno| self.shared.failed("setting the header's size (TUNSETVNETHDRSZ)")(errno.into()))?;
        let base = OFFLOAD_CHECKSUM | OFFLOAD_TSO;
        // USO4 and USO6 go together or not at all (drivers/net/tun.c, set_offload).
        if self.set_offloads(base | OFFLOAD_USO).is_err() {
            self.set_offloads(base).map_err(self.shared.failed("offering offloads (TUNSETOFFLOAD)"))?;
        }
        Ok(())
    }

    fn open_here(shared: &Arc<Shared>) -> Result<Queue, TunError> {
        let name = &shared.name;
        let driver = OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC).open("/dev/net/tun").map_err(|source| {
            match source.raw_os_error() {
                Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => TunError::NoDriver,
                Some(libc::EACCES | libc::EPERM) => TunError::DriverDenied,
                _ => shared.failed("opening /dev/net/tun")(source),
            }
        })?;
        let fd = OwnedFd::from(driver);
        let mut request = request(name).map_err(shared.failed("naming it"))?;
        request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE) as libc::c_short;
        // SAFETY: the descriptor is /dev/net/tun, not attached yet; the kernel reads and writes one ifreq.
        unsafe { ioctl::set_interface(fd.as_raw_fd(), &mut request) }.map_err(|errno| match errno {
            nix::Error::EPERM => TunError::NotPermitted(name.clone()),
            nix::Error::EBUSY => TunError::Busy { name: name.clone(), queues: 1 },
            _ => shared.failed("opening a queue (TUNSETIFF)")(errno.into()),
        })?;
        Queue::wrap(shared, fd)
    }

    fn wrap(shared: &Arc<Shared>, fd: OwnedFd) -> Result<Queue, TunError> {
        let mut config = tun::Configuration::default();
        config.tun_name(&shared.name).raw_fd(fd.into_raw_fd());
        let wrapped = |error: tun::Error| shared.failed("wrapping a queue")(error.into());
        let device = tun::create(&config).map_err(wrapped)?;
        device.set_nonblock().map_err(shared.failed("making a queue non-blocking"))?;
        Ok(Queue { device, shared: shared.clone() })
    }
}

impl Shared {
    fn features(&self) -> Features {
        // Relaxed: see `offloads`.
        let offloads = self.offloads.load(Ordering::Relaxed);
        Features { checksum: offloads & OFFLOAD_CHECKSUM != 0, tso: offloads & OFFLOAD_TSO != 0, uso: offloads & OFFLOAD_USO != 0 }
    }

    fn failed(&self, step: &'static str) -> impl Fn(io::Error) -> TunError {
        let name = self.name.clone();
        move |source| TunError::Io { name: name.clone(), step, source }
    }
}

impl AsRawFd for Queue {
    #[inline]
    fn as_raw_fd(&self) -> RawFd {
        self.device.as_raw_fd()
    }
}

impl AsFd for Queue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the device owns the descriptor and closes it when it is dropped, after this borrow.
        unsafe { BorrowedFd::borrow_raw(self.device.as_raw_fd()) }
    }
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue").field("device", &self.shared.name).field("fd", &self.as_raw_fd()).finish()
    }
}

/// Bits of `TUNSETOFFLOAD`, linux/if_tun.h.
const OFFLOAD_CHECKSUM: u8 = 0x01;
/// TSO4, TSO6 and TSO_ECN.
const OFFLOAD_TSO: u8 = 0x02 | 0x04 | 0x08;
/// USO4 and USO6.
const OFFLOAD_USO: u8 = 0x20 | 0x40;

/// How `fd` is a queue of the device `name` in `netns`, opened as ours are, if it is one.
fn as_queue_of(fd: &OwnedFd, name: &str, netns: &Netns) -> Option<Attachment> {
    let (its_name, flags) = identify(fd).ok()?;
    let fits = flags & (OURS | libc::IFF_TAP) == OURS && its_name == name;
    if !fits || Netns::of(fd.as_fd(), Question::Tun).ok()? != *netns {
        return None;
    }
    Some(if flags & libc::IFF_DETACH_QUEUE == 0 { Attachment::Attached } else { Attachment::Detached })
}

/// How a queue of ours was opened (`IFF_*`).
const OURS: libc::c_int = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;

/// The device that a descriptor is a queue of, by name, and how it was opened. Only files of TUN's driver are asked: the request's number may
/// mean something else to others.
fn identify(fd: &OwnedFd) -> io::Result<(String, libc::c_int)> {
    use nix::sys::stat::{fstat, major, minor};
    let stat = fstat(fd)?;
    if stat.st_mode & libc::S_IFMT != libc::S_IFCHR || (major(stat.st_rdev), minor(stat.st_rdev)) != DRIVER {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no TUN queue"));
    }
    let mut found = request("")?;
    // SAFETY: the descriptor is open and the TUN driver's; the kernel writes one ifreq.
    unsafe { ioctl::interface(fd.as_raw_fd(), &mut found) }?;
    let name: Vec<u8> = found.ifr_name.iter().map(|byte| *byte as u8).take_while(|byte| *byte != 0).collect();
    // SAFETY: TUNGETIFF has written the flags, and any bits are a value of them.
    let flags = libc::c_int::from(unsafe { found.ifr_ifru.ifru_flags } as u16);
    Ok((String::from_utf8_lossy(&name).into_owned(), flags))
}

/// Character device of `/dev/net/tun` (`TUN_MINOR`, include/linux/miscdevice.h).
const DRIVER: (u64, u64) = (10, 200);

fn set_attachment(queue: RawFd, attachment: Attachment) -> io::Result<()> {
    let mut request = request("")?;
    request.ifr_ifru.ifru_flags = match attachment {
        Attachment::Attached => libc::IFF_ATTACH_QUEUE,
        Attachment::Detached => libc::IFF_DETACH_QUEUE,
    } as libc::c_short;
    // SAFETY: the descriptor is a queue of a TUN; the kernel reads one ifreq from the pointer.
    unsafe { ioctl::set_queue(queue, &request) }?;
    Ok(())
}

/// What went wrong with a descriptor whose interface is not known.
fn unnamed(step: &'static str) -> impl Fn(io::Error) -> TunError {
    move |source| TunError::Io { name: "behind a descriptor".to_owned(), step, source }
}

fn wrong_kind(name: &str, link: &Link) -> TunError {
    let found = match (link.kind.as_str(), i32::from(link.tun_type)) {
        ("tun", libc::IFF_TUN) => "a TUN with a single queue".to_owned(),
        ("tun", _) => "a TAP".to_owned(),
        ("", _) => "a device of the system".to_owned(),
        (kind, _) => format!("of kind {kind}"),
    };
    TunError::WrongKind { name: name.to_owned(), found }
}

pub(crate) fn request(name: &str) -> io::Result<libc::ifreq> {
    if name.len() >= libc::IFNAMSIZ {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: ifreq is a C struct of integers and a union of such; all zeros is a value of it.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

/// linux/if_tun.h. Their numbers are of `int` although some take an `ifreq`.
mod ioctl {
    use std::mem::size_of;

    use libc::{c_int, ifreq};

    nix::ioctl_readwrite_bad!(set_interface, nix::request_code_write!(b'T', 202, size_of::<c_int>()), ifreq);
    nix::ioctl_write_int!(set_offload, b'T', 208);
    nix::ioctl_read_bad!(interface, nix::request_code_read!(b'T', 210, size_of::<libc::c_uint>()), ifreq);
    nix::ioctl_write_ptr!(set_vnet_header_size, b'T', 216, c_int);
    nix::ioctl_write_ptr_bad!(set_queue, nix::request_code_write!(b'T', 217, size_of::<c_int>()), ifreq);
}

#[cfg(test)]
mod tests;
