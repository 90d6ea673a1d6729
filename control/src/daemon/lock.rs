//! Who may touch rules, routes, queues and sockets of a node: one process at a time, and the next one in its turn.
//!
//! The lock is the kernel's (flock(2)) on `<runtimeDir>/lock`, so it ends with its holder however that ends, and it holds between containers
//! that share the directory.

use std::fs::File;
use std::path::{Path, PathBuf};

/// The lock of the runtime directory, held.
pub type Lock = nix::fcntl::Flock<File>;

/// What is done about a gateway that runs already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Predecessor {
    /// This one does not start.
    Refused,
    /// This one waits for its end, and takes over.
    Awaited,
}

/// Takes the lock of the runtime directory: whoever holds it may touch rules, routes, queues and sockets.
pub fn lock(runtime_dir: &Path) -> anyhow::Result<Lock> {
    let (path, file) = lock_file(runtime_dir)?;
    nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        nix::errno::Errno::EWOULDBLOCK => anyhow::anyhow!(
            "a running podgate holds {}: stop it first. A second gateway on this machine needs a network namespace, a `runtimeDir` and a `stateDir` of its own",
            path.display()
        ),
        other => anyhow::anyhow!("{} cannot be locked: {other}", path.display()),
    })
}

/// Takes the lock, at once or as soon as whoever holds it has ended.
pub(super) async fn take(runtime_dir: &Path, predecessor: Predecessor) -> anyhow::Result<Lock> {
    match predecessor {
        Predecessor::Refused => lock(runtime_dir),
        Predecessor::Awaited => lock_in_turn(runtime_dir).await,
    }
}

async fn lock_in_turn(runtime_dir: &Path) -> anyhow::Result<Lock> {
    use nix::fcntl::{Flock, FlockArg};
    let (path, file) = lock_file(runtime_dir)?;
    let file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => return Ok(lock),
        Err((file, nix::errno::Errno::EWOULDBLOCK)) => file,
        Err((_, other)) => anyhow::bail!("{} cannot be locked: {other}", path.display()),
    };
    tracing::info!("a gateway runs on this node; waiting for its end, to take over from it");
    // flock(2) knows no asynchronous form. A thread of its own, unlike tokio's, is not waited for when this process is stopped meanwhile.
    let (done, locked) = tokio::sync::oneshot::channel();
    std::thread::Builder::new().name("lock".into()).spawn(move || done.send(Flock::lock(file, FlockArg::LockExclusive)))?;
    let lock = locked.await?.map_err(|(_, errno)| anyhow::anyhow!("{} cannot be locked: {errno}", path.display()))?;
    tracing::info!("the gateway before this one has ended; taking over");
    Ok(lock)
}

fn lock_file(runtime_dir: &Path) -> anyhow::Result<(PathBuf, File)> {
    use anyhow::Context;
    std::fs::create_dir_all(runtime_dir)
        .with_context(|| format!("{} cannot be made; `runtimeDir` in podgate.yaml names it", runtime_dir.display()))?;
    let path = runtime_dir.join("lock");
    let file = std::fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| format!("{} cannot be opened for writing; are you root?", path.display()))?;
    Ok((path, file))
}
