//! The container's network namespace: opened here, where the runtime's paths hold, and handed to the daemon as a descriptor.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::thread::LinkNameSpaceType;

use crate::error::Error;

/// The file system that namespaces are files of (`NSFS_MAGIC`, include/uapi/linux/magic.h).
const NSFS_MAGIC: u64 = 0x6e73_6673;

/// An open network namespace.
#[derive(Debug)]
pub struct Namespace(OwnedFd);

impl Namespace {
    /// Opens the one at `path`, which is `/proc/PID/ns/net` or something mounted from there.
    pub fn open(path: &str) -> Result<Namespace, Error> {
        let io = |doing: &str, source: std::io::Error| Error::Io { doing: format!("{doing} the network namespace {path:?}"), source };
        // Not to wait for a writer, should the path be a pipe's.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| match errno {
            Errno::NOENT | Errno::NOTDIR => Error::NoNamespace { path: path.into() },
            errno => io("open", errno.into()),
        })?;
        let magic = rustix::fs::fstatfs(&fd).map_err(|errno| io("read", errno.into()))?.f_type as u64;
        if magic != NSFS_MAGIC || !is_of_network(fd.as_fd()).map_err(|source| io("read the kind of", source))? {
            return Err(Error::Environment { variables: "CNI_NETNS".into(), problem: format!("CNI_NETNS: {path:?} is not a network namespace") });
        }
        Ok(Namespace(fd))
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Whether a namespace is one of the network. `NS_GET_NSTYPE` (ioctl_ns(2)) would say so, but is not to be had without `unsafe`. What the
/// kernel prints as the file's path does for `/proc/PID/ns/net`. Of one that is mounted elsewhere it prints the place, so there a thread of its
/// own enters it, as a network namespace or not at all (setns(2)): that costs 0.1 ms, and looking it up among 500 mounts 1 ms.
fn is_of_network(fd: BorrowedFd<'_>) -> std::io::Result<bool> {
    let path = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    if let Some(text) = path.to_str()
        && !text.starts_with('/')
    {
        return Ok(text.starts_with("net:["));
    }
    std::thread::scope(|scope| {
        let enter = || rustix::thread::move_into_link_name_space(fd, Some(LinkNameSpaceType::Network));
        let entered = std::thread::Builder::new().stack_size(64 * 1024).spawn_scoped(scope, enter)?.join();
        // Without the capability for it (CAP_SYS_ADMIN) it is left to the daemon, which enters it too.
        Ok(entered.is_ok_and(|entered| entered != Err(Errno::INVAL)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_network_namespace_is_taken_for_one() {
        Namespace::open("/proc/self/ns/net").unwrap();
        for (path, code) in [("/proc/self/ns/uts", 4), ("/proc/self/status", 4), ("/dev/null", 4), ("/proc", 4), ("/nonexistent/net", 3), ("", 3)] {
            assert_eq!(Namespace::open(path).unwrap_err().code(), code, "{path}");
        }
    }

    #[test]
    fn a_pipe_without_a_writer_is_refused_and_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, Mode::RUSR, 0).unwrap();
        assert_eq!(Namespace::open(path.to_str().unwrap()).unwrap_err().code(), 4);
    }
}
