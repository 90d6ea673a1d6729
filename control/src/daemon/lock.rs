//! Who may touch rules, routes, queues and sockets of a node: one process at a time, and the next one in its turn.
//!
//! The lock is the kernel's (flock(2)) on `<runtimeDir>/lock`, so it ends with its holder however that ends, and it holds between containers
//! that share the directory. It belongs to the open file, not to the process: who is handed the descriptor has the lock, and it ends when the
//! last handle is closed.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

/// The lock of the runtime directory, held.
#[derive(Debug)]
pub struct Lock(File);

impl Lock {
    /// The lock behind a descriptor that a predecessor left, if it is that of `runtime_dir`.
    pub(super) fn left(runtime_dir: &Path, fd: OwnedFd) -> Option<Lock> {
        let file = File::from(fd);
        let (found, wanted) = (file.metadata().ok()?, std::fs::metadata(path(runtime_dir)).ok()?);
        let same = found.is_file() && (found.dev(), found.ino()) == (wanted.dev(), wanted.ino());
        // The open file has it already, or can have it.
        (same && flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok()).then_some(Lock(file))
    }
}

impl AsFd for Lock {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Takes the lock of the runtime directory: whoever holds it may touch rules, routes, queues and sockets.
pub fn lock(runtime_dir: &Path) -> anyhow::Result<Lock> {
    match try_lock(runtime_dir)? {
        Some(lock) => Ok(lock),
        None => anyhow::bail!(
            "a running podgate holds {}: stop it first. A second gateway on this machine needs a network namespace, a `runtimeDir` and a `stateDir` of its own",
            path(runtime_dir).display()
        ),
    }
}

/// The lock, if nobody has it.
pub(super) fn try_lock(runtime_dir: &Path) -> anyhow::Result<Option<Lock>> {
    let file = open(runtime_dir)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(Lock(file))),
        Err(Errno::WOULDBLOCK) => Ok(None),
        Err(errno) => anyhow::bail!("{} cannot be locked: {errno}", path(runtime_dir).display()),
    }
}

/// The lock, as soon as whoever has it has ended. Dropping the future gives the turn up.
pub(super) async fn wait_for(runtime_dir: &Path) -> anyhow::Result<Lock> {
    let file = open(runtime_dir)?;
    // flock(2) knows no asynchronous form. A thread of its own, unlike tokio's, is not waited for when this process is stopped meanwhile. If
    // nobody waits any more when its turn comes, the file is closed and the turn is the next one's.
    let (done, locked) = tokio::sync::oneshot::channel();
    let wait = move || {
        let result = loop {
            match flock(&file, FlockOperation::LockExclusive) {
                Err(Errno::INTR) => {}
                other => break other,
            }
        };
        done.send(result.map(|()| Lock(file)))
    };
    std::thread::Builder::new().name("lock".into()).spawn(wait)?;
    locked.await?.map_err(|errno| anyhow::anyhow!("{} cannot be locked: {errno}", path(runtime_dir).display()))
}

fn path(runtime_dir: &Path) -> PathBuf {
    runtime_dir.join("lock")
}

fn open(runtime_dir: &Path) -> anyhow::Result<File> {
    use anyhow::Context;
    std::fs::create_dir_all(runtime_dir)
        .with_context(|| format!("{} cannot be made; `runtimeDir` in podgate.yaml names it", runtime_dir.display()))?;
    let path = path(runtime_dir);
    let file = std::fs::OpenOptions::new().create(true).truncate(false).write(true).open(&path);
    file.with_context(|| format!("{} cannot be opened for writing; are you root?", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lock_goes_with_its_descriptor_and_ends_with_the_last_handle() {
        let directory = tempfile::tempdir().unwrap();
        let first = lock(directory.path()).unwrap();
        let kept = first.as_fd().try_clone_to_owned().unwrap();
        drop(first);
        assert!(lock(directory.path()).unwrap_err().to_string().contains("a running podgate holds"));
        let second = Lock::left(directory.path(), kept).unwrap();
        assert!(try_lock(directory.path()).unwrap().is_none());
        drop(second);
        assert!(try_lock(directory.path()).unwrap().is_some());
    }

    #[test]
    fn a_descriptor_of_another_file_or_of_a_lock_that_somebody_has_is_none() {
        let (directory, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let _elsewhere = lock(other.path()).unwrap();
        let _held = lock(directory.path()).unwrap();
        assert!(Lock::left(directory.path(), open(other.path()).unwrap().into()).is_none());
        assert!(Lock::left(directory.path(), open(directory.path()).unwrap().into()).is_none());
        assert!(Lock::left(directory.path(), File::open("/dev/null").unwrap().into()).is_none());
    }
}
