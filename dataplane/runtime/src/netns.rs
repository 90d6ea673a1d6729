//! Network namespaces as values: found by path, made, kept by bind mount, and entered for one piece of work at a time.
//!
//! The pods' veths and the TUN `pods` live in a namespace of the gateway's own, while the process stays in the node's. A namespace
//! belongs to a thread (setns(2)), so [`Netns::run`] does its work on a thread of its own that ends with it: no other thread ever
//! finds itself somewhere else, and nothing has to be switched back. What is opened inside (a socket, a TUN queue, a netlink
//! socket) stays bound to that namespace wherever it is used later.
//!
//! Read first: namespaces(7), network_namespaces(7), ioctl_ns(2).

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::panic;
use std::path::{Path, PathBuf};
use std::thread;

use nix::mount::{MntFlags, MsFlags};
use nix::sched::CloneFlags;

/// A network namespace, held open: it lives at least as long as this value.
#[derive(Debug)]
pub struct Netns {
    fd: OwnedFd,
    id: NetnsId,
}

/// What tells one namespace from another while both exist: device and inode of its nsfs file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NetnsId {
    /// The device number of the nsfs.
    pub dev: u64,
    /// The inode number.
    pub ino: u64,
}

/// Why a namespace could not be had.
#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    /// The path could not be opened.
    #[error("cannot open the network namespace {path}: {source}; make it first, or check the path")]
    Open {
        /// Where it was looked for.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The file is an ordinary one, as a bind mount's mount point is once the mount is gone.
    #[error(
        "{what} is not a network namespace (found {found}); if a namespace was mounted there, the mount is gone: remove the file and make it again"
    )]
    NotANetns {
        /// The path, or a description of the descriptor.
        what: String,
        /// What it is instead.
        found: &'static str,
    },
    /// A namespace could not be made.
    #[error("cannot make a network namespace: {0}; it needs CAP_SYS_ADMIN (run as root, or inside a user namespace)")]
    Make(io::Error),
    /// The bind mount failed.
    #[error("cannot mount the network namespace at {path}: {source}; it needs CAP_SYS_ADMIN and a writable directory")]
    Bind {
        /// The mount point.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The mount could not be taken away.
    #[error("cannot unmount the network namespace at {path}: {source}")]
    Unbind {
        /// The mount point.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The descriptor could not be examined.
    #[error("cannot examine {what}: {source}")]
    Examine {
        /// The path, or a description of the descriptor.
        what: String,
        /// What the kernel said.
        source: io::Error,
    },
}

impl Netns {
    /// The calling thread's own.
    pub fn current() -> Result<Netns, NetnsError> {
        // Not /proc/self: that names the main thread's namespace, whichever thread asks.
        Netns::open("/proc/thread-self/ns/net")
    }

    /// The one mounted at `path` (or `/proc/PID/ns/net`).
    pub fn open(path: impl AsRef<Path>) -> Result<Netns, NetnsError> {
        let path = path.as_ref();
        let file = OpenOptions::new()
            .read(true)
            // A path that names a FIFO or a terminal must neither block nor become ours.
            .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path)
            .map_err(|source| NetnsError::Open { path: path.to_owned(), source })?;
        Netns::checked(file.into(), || path.display().to_string())
    }

    /// The one behind a descriptor, for one received over a socket.
    pub fn from_fd(fd: OwnedFd) -> Result<Netns, NetnsError> {
        let raw = fd.as_raw_fd();
        Netns::checked(fd, || format!("descriptor {raw}"))
    }

    /// A new, empty one (a loopback interface that is down), held by this value alone until it is bound to a path.
    pub fn anonymous() -> Result<Netns, NetnsError> {
        let made = thread::scope(|scope| {
            let maker = thread::Builder::new().name("netns-make".into()).spawn_scoped(scope, || {
                nix::sched::unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| NetnsError::Make(errno.into()))?;
                Netns::current()
            });
            Ok(maker.map_err(NetnsError::Make)?.join().unwrap_or_else(|panic| panic::resume_unwind(panic)))
        });
        made?
    }

    /// Mounts it at `path`, which makes it outlive this process. The mount point (an empty file) is made if it is missing, its
    /// directory is not.
    ///
    /// The mount belongs to the calling process's mount namespace and to those it propagates to: in a sandbox of its own (systemd's
    /// `Private…`, a container without bidirectional propagation) it dies with the sandbox.
    pub fn bind(&self, path: impl AsRef<Path>) -> Result<(), NetnsError> {
        let path = path.as_ref();
        let failed = |source| NetnsError::Bind { path: path.to_owned(), source };
        OpenOptions::new().write(true).create(true).truncate(false).mode(0o444).open(path).or_else(tolerate_read_only(path)).map_err(failed)?;
        let source = format!("/proc/self/fd/{}", self.fd.as_raw_fd());
        nix::mount::mount(Some(source.as_str()), path, None::<&str>, MsFlags::MS_BIND, None::<&str>).map_err(|errno| failed(errno.into()))
    }

    /// Takes the mount at `path` and its mount point away. The namespace ends when nobody holds it any more. That there is nothing
    /// is no error.
    pub fn unbind(path: impl AsRef<Path>) -> Result<(), NetnsError> {
        let path = path.as_ref();
        let failed = |source| NetnsError::Unbind { path: path.to_owned(), source };
        loop {
            // Detached, since a process inside keeps it busy; again, in case it was mounted twice.
            match nix::mount::umount2(path, MntFlags::MNT_DETACH) {
                Ok(()) => continue,
                Err(nix::Error::EINVAL | nix::Error::ENOENT) => break,
                Err(errno) => return Err(failed(errno.into())),
            }
        }
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(error)),
            _ => Ok(()),
        }
    }

    /// What tells it from every other.
    pub fn id(&self) -> NetnsId {
        self.id
    }

    /// The inode of its nsfs file.
    pub fn inode(&self) -> u64 {
        self.id.ino
    }

    /// A second handle to it.
    pub fn try_clone(&self) -> io::Result<Netns> {
        Ok(Netns { fd: self.fd.try_clone()?, id: self.id })
    }

    /// Runs `f` inside, on a thread of its own, and waits for it. A panic of `f` goes on in the caller.
    ///
    /// Sockets, `/proc/sys/net`, `/proc/thread-self/net` and `/dev/net/tun` are the namespace's there; `/proc/net` and
    /// `/sys/class/net` are not.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> io::Result<T> {
        thread::scope(|scope| {
            let inside = thread::Builder::new().name("netns".into()).spawn_scoped(scope, || {
                nix::sched::setns(&self.fd, CloneFlags::CLONE_NEWNET)?;
                Ok(f())
            })?;
            inside.join().unwrap_or_else(|panic| panic::resume_unwind(panic))
        })
    }

    /// The one that a socket or a TUN queue belongs to. It takes CAP_NET_ADMIN there.
    pub(crate) fn of(file: BorrowedFd<'_>, question: Question) -> Result<Netns, NetnsError> {
        let what = || format!("descriptor {}", file.as_raw_fd());
        // SAFETY: neither request takes an argument; both give a new descriptor, and other files refuse them.
        let found = unsafe { libc::ioctl(file.as_raw_fd(), question as libc::Ioctl) };
        if found < 0 {
            return Err(NetnsError::Examine { what: what(), source: io::Error::last_os_error() });
        }
        // SAFETY: the kernel has just made it for this call.
        Netns::checked(unsafe { OwnedFd::from_raw_fd(found) }, what)
    }

    fn checked(fd: OwnedFd, what: impl Fn() -> String) -> Result<Netns, NetnsError> {
        let examine = |source| NetnsError::Examine { what: what(), source };
        let stat = nix::sys::statfs::fstatfs(&fd).map_err(|errno| examine(errno.into()))?;
        if stat.filesystem_type() != nix::sys::statfs::NSFS_MAGIC {
            return Err(NetnsError::NotANetns { what: what(), found: "another kind of file" });
        }
        // SAFETY: NS_GET_NSTYPE takes no argument and only reads the open nsfs file.
        let kind = unsafe { libc::ioctl(fd.as_raw_fd(), NS_GET_NSTYPE) };
        if kind < 0 {
            return Err(examine(io::Error::last_os_error()));
        }
        if kind != libc::CLONE_NEWNET {
            return Err(NetnsError::NotANetns { what: what(), found: "a namespace of another type" });
        }
        let file = File::from(fd);
        let metadata = file.metadata().map_err(examine)?;
        Ok(Netns { id: NetnsId { dev: metadata.dev(), ino: metadata.ino() }, fd: file.into() })
    }
}

impl PartialEq for Netns {
    fn eq(&self, other: &Netns) -> bool {
        self.id == other.id
    }
}

impl Eq for Netns {}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Requests by which a file says to which namespace it belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Question {
    /// `SIOCGSKNS`, linux/sockios.h.
    Socket = 0x894C,
    /// `TUNGETDEVNETNS`, linux/if_tun.h: `_IO('T', 227)`.
    Tun = 0x54E3,
}

/// linux/nsfs.h: `_IO(0xb7, 0x3)`.
const NS_GET_NSTYPE: libc::Ioctl = nix::request_code_none!(0xb7, 0x3) as libc::Ioctl;

/// A mount point that is there already may be a namespace, which nobody can open for writing; mounting over it is allowed.
fn tolerate_read_only(path: &Path) -> impl FnOnce(io::Error) -> io::Result<File> {
    move |error| if path.exists() { File::open(path) } else { Err(error) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_current_namespace_equals_itself_and_is_where_it_was() {
        let current = Netns::current().unwrap();
        assert_eq!(current, Netns::open("/proc/self/ns/net").unwrap());
        assert_eq!(current.inode(), fs::metadata("/proc/self/ns/net").unwrap().ino());
    }

    #[test]
    fn an_ordinary_file_and_another_kind_of_namespace_are_refused() {
        assert!(matches!(Netns::open("/etc/hostname"), Err(NetnsError::NotANetns { .. } | NetnsError::Open { .. })));
        assert!(matches!(Netns::open("/proc/self/ns/mnt"), Err(NetnsError::NotANetns { .. })));
        assert!(matches!(Netns::open("/proc/self/ns/nothing"), Err(NetnsError::Open { .. })));
    }

    #[test]
    fn work_runs_inside_and_the_caller_stays_outside() {
        let Some(inside) = anonymous_or_skip() else { return };
        let before = Netns::current().unwrap();
        assert_ne!(inside, before);
        assert_eq!(inside.run(|| Netns::current().unwrap().id()).unwrap(), inside.id());
        assert_eq!(Netns::current().unwrap(), before);
        let devices = inside.run(|| fs::read_to_string("/proc/thread-self/net/dev").unwrap()).unwrap();
        assert_eq!(devices.lines().skip(2).count(), 1, "only lo: {devices}");
    }

    #[test]
    fn a_panic_inside_goes_on_outside() {
        let Some(inside) = anonymous_or_skip() else { return };
        let panic = panic::catch_unwind(panic::AssertUnwindSafe(|| inside.run(|| panic!("as meant")))).unwrap_err();
        assert_eq!(panic.downcast_ref(), Some(&"as meant"));
    }

    #[test]
    fn a_bound_namespace_outlives_its_handle_and_unbinding_twice_is_fine() {
        let Some(inside) = anonymous_or_skip() else { return };
        let path = std::env::temp_dir().join(format!("podgate-netns-test-{}", std::process::id()));
        let id = inside.id();
        if let Err(error) = inside.bind(&path) {
            eprintln!("skipped: {error}");
            let _ = fs::remove_file(&path);
            return;
        }
        drop(inside);
        assert_eq!(Netns::open(&path).unwrap().id(), id);
        Netns::unbind(&path).unwrap();
        assert!(!path.exists());
        Netns::unbind(&path).unwrap();
    }

    fn anonymous_or_skip() -> Option<Netns> {
        Netns::anonymous().inspect_err(|error| eprintln!("skipped: {error}")).ok()
    }
}
