//! One gateway after the other on a node: whose turn it is, and how a running one hands the node over to its successor.
//!
//! A successor that was started beside a running gateway (`podgate run --take-over`) makes itself ready as far as it can alone: it knows the
//! cluster and has compiled its tables. Then it asks over a socket in the runtime directory:
//!
//! | successor | running gateway |
//! |---|---|
//! | `ask` | lets what it has begun come to its end, and stops its workers: from now on packets wait in the kernel |
//! | | `given`: the descriptors of its store, the lock among them, in one or more messages; or `refused` |
//! | starts its workers on them, then says `forwarding` | closes everything and the connection; from now on it waits for the successor's end as any other would, so that there is somebody if that one fails |
//! | does the rest (addresses, rules, API) | |
//!
//! Until it has heard `forwarding` the running gateway has everything that it needs to go on, and does so if the successor ends or takes longer
//! than [`HAND_OVER_MAX`]. A successor that fails afterwards ends, with that the lock is free, and its predecessor takes its turn.
//!
//! Only this user may connect: the socket's mode says so, and each peer is asked (`SO_PEERCRED`). The descriptors are looked at by those who make
//! use of them.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use podgate_runtime::runtime::Reserve;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::Daemon;
use super::lock::{self, Lock};
use crate::keeper::{Store, names, wire};

/// The socket's name in the runtime directory.
pub const SOCKET: &str = "handover.sock";

/// How long a successor may take from the last descriptor to its first packet. Meanwhile nothing is forwarded.
const HAND_OVER_MAX: Duration = Duration::from_secs(5);

/// The successor allows itself less, so that the two never work at once.
const TAKE_OVER_MAX: Duration = Duration::from_secs(4);

/// How long what was begun may take to come to its end; traffic passes meanwhile.
const QUIET_MAX: Duration = Duration::from_secs(5);

/// How long a peer may take for what costs it nothing.
const PEER_TIMEOUT: Duration = Duration::from_secs(1);

/// How often one that refused is asked again.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// What the names of one message may add up to.
const NAMES_LEN_MAX: usize = wire::LEN_MAX / 2;

/// What is done about a gateway that runs already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Predecessor {
    /// This one does not start.
    Refused,
    /// This one takes over from it: it asks, and waits for its end where it is not answered.
    Relieved,
    /// This one waits for its end: it was this one's successor.
    Awaited,
}

/// It is this process's turn.
pub struct Turn {
    /// The node's lock.
    pub lock: Lock,
    /// Whoever had it before and waits to hear that this process forwards.
    pub predecessor: Option<Taken>,
}

/// A node that has been handed over, with its workers stopped.
pub struct Taken {
    from: Connection,
    since: Instant,
}

/// What is said, in JSON. A later release may say more.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
enum Word {
    /// A successor asks for the node.
    Ask {
        /// How many workers it has.
        workers: u16,
    },
    /// It will not be had now.
    Refused {
        /// Why.
        why: String,
    },
    /// The descriptors beside this message, in this order.
    Given {
        /// What they are kept as.
        names: Vec<String>,
        /// Whether further ones come.
        more: bool,
    },
    /// The successor's workers run.
    Forwarding,
}

/// Takes this process's turn: at once, or when whoever has it has given it up.
pub async fn take(runtime_dir: &Path, predecessor: Predecessor, store: &Store, workers: u16) -> anyhow::Result<Turn> {
    // What was kept for this process includes the lock, which then nobody else can have.
    if let Some(lock) = kept_lock(runtime_dir, store) {
        return Ok(Turn { lock, predecessor: None });
    }
    if predecessor == Predecessor::Refused {
        return Ok(Turn { lock: lock::lock(runtime_dir)?, predecessor: None });
    }
    let mut said = false;
    let ended = lock::wait_for(runtime_dir);
    tokio::pin!(ended);
    loop {
        if let Some(lock) = lock::try_lock(runtime_dir)? {
            return Ok(Turn { lock, predecessor: None });
        }
        if predecessor == Predecessor::Relieved {
            match ask(runtime_dir, workers).await {
                Ok(Some((given, taken))) => {
                    store.add(given);
                    let lock = kept_lock(runtime_dir, store)
                        .ok_or_else(|| anyhow::anyhow!("the gateway before this one handed the node over without its lock"))?;
                    return Ok(Turn { lock, predecessor: Some(taken) });
                }
                Ok(None) => {}
                Err(error) => tracing::info!("the gateway that runs on this node does not hand it over: {error}"),
            }
        }
        if !std::mem::replace(&mut said, true) {
            tracing::info!("a gateway runs on this node; waiting for its end, to take over from it");
        }
        tokio::select! {
            lock = &mut ended => {
                tracing::info!("the gateway before this one has ended; taking over");
                return Ok(Turn { lock: lock?, predecessor: None });
            }
            () = tokio::time::sleep(ASK_AGAIN), if predecessor == Predecessor::Relieved => {}
        }
    }
}

fn kept_lock(runtime_dir: &Path, store: &Store) -> Option<Lock> {
    store.take(names::LOCK).into_iter().find_map(|fd| Lock::left(runtime_dir, fd))
}

/// Asks whoever runs; nothing if nobody can be asked.
async fn ask(runtime_dir: &Path, workers: u16) -> io::Result<Option<(Vec<(String, OwnedFd)>, Taken)>> {
    let Some(from) = Connection::to(&runtime_dir.join(SOCKET))? else { return Ok(None) };
    tracing::info!("a gateway runs on this node; asking it to hand the node over");
    from.say(&Word::Ask { workers }, &[]).await?;
    let mut all = Vec::new();
    loop {
        let (word, fds) = timeout(2 * QUIET_MAX, from.hear()).await??;
        match word {
            Word::Given { names, more } if names.len() == fds.len() => {
                all.extend(names.into_iter().zip(fds));
                if !more {
                    return Ok(Some((all, Taken { from, since: Instant::now() })));
                }
            }
            Word::Refused { why } => return Err(io::Error::other(why)),
            _ => return Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

impl Taken {
    /// Whether there is time left to start workers: after that the predecessor goes on itself.
    pub fn in_time(&self) -> anyhow::Result<()> {
        match self.since.elapsed() {
            elapsed if elapsed < TAKE_OVER_MAX => Ok(()),
            elapsed => anyhow::bail!(
                "taking the node over took {elapsed:?}, and the gateway before this one goes on by itself: this machine is too busy, try again"
            ),
        }
    }

    /// Tells the predecessor that this process forwards, and waits until it has closed everything.
    pub async fn forwarding(self) -> anyhow::Result<()> {
        let pause = self.since.elapsed();
        let told = self.from.say(&Word::Forwarding, &[]).await;
        if told.is_err() && self.since.elapsed() > TAKE_OVER_MAX {
            anyhow::bail!("the gateway before this one did not wait");
        }
        tracing::info!(pause_us = pause.as_micros(), "took over from the gateway before this one");
        // What comes is its end; one that has died has closed everything too.
        match timeout(HAND_OVER_MAX, self.from.hear()).await {
            Ok(_) => Ok(()),
            Err(_) => anyhow::bail!("the gateway before this one does not give up its files: stop it"),
        }
    }
}

/// Listens for successors, for as long as it lives.
pub struct Successors {
    asked: mpsc::Receiver<Successor>,
    path: PathBuf,
}

/// One that asks.
pub struct Successor {
    to: Connection,
    workers: u16,
}

impl Successors {
    /// Makes the socket in place of whatever stands there: the caller holds the lock, so nobody else listens. Runs inside a `LocalSet`.
    pub fn listen(runtime_dir: &Path) -> io::Result<Successors> {
        let path = runtime_dir.join(SOCKET);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let socket = seqpacket()?;
        rustix::net::bind(&socket, &SocketAddrUnix::new(&path)?)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
        rustix::net::listen(&socket, 4)?;
        // Tokio's listener does not care what kind of messages it is for.
        let socket = UnixListener::from_std(socket.into())?;
        let (asks, asked) = mpsc::channel(1);
        tokio::task::spawn_local(async move {
            loop {
                match Connection::accept(&socket).await {
                    Ok(to) => {
                        let asks = asks.clone();
                        tokio::task::spawn_local(async move {
                            if let Ok(Ok((Word::Ask { workers }, _))) = timeout(PEER_TIMEOUT, to.hear()).await {
                                let _ = asks.send(Successor { to, workers }).await;
                            }
                        });
                    }
                    Err(error) => {
                        tracing::warn!(%error, "a successor could not be heard");
                        tokio::time::sleep(PEER_TIMEOUT).await;
                    }
                }
            }
        });
        Ok(Successors { asked, path })
    }

    /// The next one.
    pub async fn next(&mut self) -> Option<Successor> {
        self.asked.recv().await
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Successor {
    async fn give(&self, mut all: Vec<(String, OwnedFd)>) -> io::Result<()> {
        loop {
            let mut len = 0;
            let part = all.iter().take(wire::FDS_MAX).take_while(|(name, _)| {
                len += name.len() + 8;
                len < NAMES_LEN_MAX
            });
            let part = part.count();
            let rest = all.split_off(part);
            let fds: Vec<BorrowedFd<'_>> = all.iter().map(|(_, fd)| fd.as_fd()).collect();
            let names = all.iter().map(|(name, _)| name.clone()).collect();
            self.to.say(&Word::Given { names, more: !rest.is_empty() }, &fds).await?;
            if rest.is_empty() {
                return Ok(());
            }
            all = rest;
        }
    }

    async fn refuse(self, why: &str) {
        tracing::warn!("a successor asked for the node in vain: {why}");
        // One that has gone needs no answer.
        let _ = self.to.say(&Word::Refused { why: why.to_owned() }, &[]).await;
    }

    /// Waits until it says that it forwards.
    async fn forwards(&self) -> io::Result<()> {
        match timeout(HAND_OVER_MAX, self.to.hear()).await?? {
            (Word::Forwarding, _) => Ok(()),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

impl Daemon {
    /// Hands the node over; gives the successor if it has it. The caller lets go of everything, and then of the successor. If it comes to
    /// nothing, the node is this process's as before.
    pub(super) async fn hand_over(&self, successor: Successor) -> Option<Successor> {
        let asked = Instant::now();
        let Ok(_quiet) = timeout(QUIET_MAX, self.changes.write()).await else {
            successor.refuse("an attachment is under way").await;
            return None;
        };
        let dataplane = self.dataplane.borrow_mut().take()?;
        // A self-test may hold it for another second, in which it forwards as ever.
        while Arc::strong_count(&dataplane) > 1 && asked.elapsed() < 2 * QUIET_MAX {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let Some(dataplane) = Arc::try_unwrap(dataplane).map_err(|held| *self.dataplane.borrow_mut() = Some(held)).ok() else {
            successor.refuse("the workers are being looked at").await;
            return None;
        };
        // Its ports are the successor's to listen on.
        self.service_health.lock().await.sync(&[], &[]).await;
        // In case that the successor fails: not to be waited for then.
        let reserve = Reserve::default();
        dataplane.leave_queues(successor.workers);
        let stopping = Instant::now();
        dataplane.stop();
        let handed = async {
            self.start.store.withdraw()?;
            successor.give(self.start.store.copies()?).await?;
            successor.forwards().await
        };
        match handed.await {
            Ok(()) => {
                tracing::info!(pause_us = stopping.elapsed().as_micros(), "handed the node over to a successor");
                Some(successor)
            }
            Err(error) => {
                tracing::error!(%error, "the successor did not take the node over; going on");
                drop(successor);
                self.go_on(reserve).await;
                tracing::info!(pause_ms = stopping.elapsed().as_millis(), "forwarding again");
                None
            }
        }
    }

    /// Starts the workers again on what was to be handed over.
    async fn go_on(&self, reserve: Reserve) {
        let mut reserve = Some(reserve);
        if let Err(error) = self.start.store.deposit() {
            tracing::warn!(%error, "what is to outlive this process is not kept");
        }
        while let Err(error) = self.open_dataplane(reserve.take().unwrap_or_default()) {
            tracing::error!(%error, "the dataplane");
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        self.serve_health_checks().await;
    }
}

/// One end of a connection that keeps messages apart. Tokio's stream is used for nothing but to wait: what it reads and writes are messages.
struct Connection(UnixStream);

impl Connection {
    /// To whoever listens at `path`; nothing if nobody does.
    fn to(path: &Path) -> io::Result<Option<Connection>> {
        use rustix::io::Errno;
        let socket = seqpacket()?;
        match rustix::net::connect(&socket, &SocketAddrUnix::new(path)?) {
            Ok(()) => Ok(Some(Connection(UnixStream::from_std(socket.into())?))),
            Err(Errno::NOENT | Errno::CONNREFUSED | Errno::PROTOTYPE) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// The next one of this user's.
    async fn accept(listener: &UnixListener) -> io::Result<Connection> {
        loop {
            let (socket, _) = listener.accept().await?;
            let user = socket.peer_cred()?.uid();
            if user == nix::unistd::geteuid().as_raw() {
                return Ok(Connection(socket));
            }
            tracing::warn!(user, "somebody who may not asked for the node");
        }
    }

    async fn say(&self, word: &Word, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let bytes = serde_json::to_vec(word)?;
        let send = || wire::send(&self.0, &bytes, fds).map_err(io::Error::from);
        timeout(PEER_TIMEOUT, self.0.async_io(Interest::WRITABLE, send)).await?
    }

    async fn hear(&self) -> io::Result<(Word, Vec<OwnedFd>)> {
        let message = self.0.async_io(Interest::READABLE, || wire::receive(&self.0).map_err(io::Error::from)).await?;
        if message.bytes.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok((serde_json::from_slice(&message.bytes)?, message.fds))
    }
}

fn seqpacket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?)
}
