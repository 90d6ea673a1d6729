//! The gateway's own half of the store: what it has, and what whoever started it keeps.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::notify::Notifier;

/// What descriptors are kept as. A name holds for all descriptors of its kind, and has no colon in it (sd_notify(3) on `FDNAME=`).
pub mod names {
    /// Queues of the TUN `pods`.
    pub const PODS: &str = "tun/pods";
    /// Queues of the TUN `host`.
    pub const HOST: &str = "tun/host";
    /// The overlay's sockets, receiving and sending ones.
    pub const OVERLAY: &str = "overlay";
    /// The gateway's own network namespace.
    pub const NETNS: &str = "netns";
    /// The lock of the runtime directory.
    pub const LOCK: &str = "lock";
    /// The TUN of a pod, with its number behind.
    pub const POD_TUN: &str = "pod-tun";
}

/// Who keeps a descriptor beside the gateway itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keeper {
    /// Whoever started it: the descriptor outlives it, however it ends.
    Starter,
    /// Nobody: it goes to a successor that asks for it, and else ends with the gateway.
    Nobody,
}

/// Descriptors by name.
#[derive(Debug)]
pub struct Store {
    starter: Notifier,
    /// Whether the starter keeps what it is to keep. Not while the node may be somebody else's: what it had would make the next process that it
    /// starts believe that the node is its own.
    deposited: Cell<bool>,
    held: RefCell<BTreeMap<String, Held>>,
}

#[derive(Debug)]
struct Held {
    fds: Vec<OwnedFd>,
    keeper: Keeper,
    /// It was found, and nobody has asked for it yet.
    found: bool,
}

impl Store {
    /// With what this process was started with, `found`; whoever `starter` leads to keeps what is to be kept.
    pub fn new(starter: Notifier, found: Vec<(String, OwnedFd)>) -> Store {
        let store = Store { starter, deposited: Cell::new(true), held: RefCell::default() };
        store.put(found);
        store
    }

    /// Adds what a predecessor hands over. Whoever started this process keeps nothing of it until [`Store::deposit`].
    pub fn add(&self, found: Vec<(String, OwnedFd)>) {
        self.deposited.set(false);
        self.put(found);
    }

    fn put(&self, found: Vec<(String, OwnedFd)>) {
        let mut held = self.held.borrow_mut();
        for (name, fd) in found {
            held.entry(name).or_insert_with(|| Held { fds: Vec::new(), keeper: Keeper::Starter, found: true }).fds.push(fd);
        }
    }

    /// Takes out what is held under `name`: for its user to look at, and to [`Store::keep`] what is of use. Until then whoever started this
    /// process keeps what it has.
    pub fn take(&self, name: &str) -> Vec<OwnedFd> {
        self.held.borrow_mut().remove(&spelt(name)).map_or(Vec::new(), |held| held.fds)
    }

    /// Takes out what is held under `kind` with anything behind a slash, each name's by itself.
    pub fn take_kind(&self, kind: &str) -> Vec<Vec<OwnedFd>> {
        let of_kind = |name: &String| name.strip_prefix(kind).is_some_and(|rest| rest.starts_with('/'));
        let names: Vec<String> = self.names().into_iter().filter(of_kind).collect();
        names.iter().map(|name| self.take(name)).collect()
    }

    /// Holds these under `name` from now on, and no others.
    pub fn keep_all<'a>(&self, name: &str, fds: impl IntoIterator<Item = BorrowedFd<'a>>, keeper: Keeper) -> io::Result<()> {
        let name = spelt(name);
        let fds = fds.into_iter().map(|fd| fd.try_clone_to_owned()).collect::<io::Result<Vec<OwnedFd>>>()?;
        if keeper == Keeper::Starter && self.deposited.get() {
            // Removed first: who keeps them cannot tell a descriptor that it has from a new one.
            self.starter.forget(&name)?;
            self.starter.keep(&name, &fds)?;
        }
        self.held.borrow_mut().insert(name, Held { fds, keeper, found: false });
        Ok(())
    }

    /// Holds this one under `name` from now on, and no other.
    pub fn keep(&self, name: &str, fd: impl AsFd) -> io::Result<()> {
        self.keep_all(name, [fd.as_fd()], Keeper::Starter)
    }

    /// Holds nothing under `name` any more.
    pub fn forget(&self, name: &str) -> io::Result<()> {
        let name = spelt(name);
        let keeper = self.held.borrow_mut().remove(&name).map_or(Keeper::Starter, |held| held.keeper);
        if keeper == Keeper::Starter && self.deposited.get() { self.starter.forget(&name) } else { Ok(()) }
    }

    /// Closes what was found and has not been asked for: nobody in this release has a use for it. Gives the names.
    pub fn forget_unknown(&self) -> io::Result<Vec<String>> {
        let unknown: Vec<String> = self.held.borrow().iter().filter(|(_, held)| held.found).map(|(name, _)| name.clone()).collect();
        unknown.iter().try_for_each(|name| self.forget(name))?;
        Ok(unknown)
    }

    /// The names under which something is held.
    pub fn names(&self) -> Vec<String> {
        self.held.borrow().keys().cloned().collect()
    }

    /// Handles on all that is held, for a successor.
    pub fn copies(&self) -> io::Result<Vec<(String, OwnedFd)>> {
        let held = self.held.borrow();
        let all = held.iter().flat_map(|(name, held)| held.fds.iter().map(move |fd| (name, fd)));
        all.map(|(name, fd)| Ok((name.clone(), fd.try_clone()?))).collect()
    }

    /// Has whoever started this process keep nothing any more: the node is about to be somebody else's.
    pub fn withdraw(&self) -> io::Result<()> {
        self.deposited.set(false);
        self.held.borrow().iter().filter(|(_, held)| held.keeper == Keeper::Starter).try_for_each(|(name, _)| self.starter.forget(name))
    }

    /// Has it keep everything that it is to keep: the node is this process's.
    pub fn deposit(&self) -> io::Result<()> {
        self.deposited.set(true);
        self.held.borrow().iter().filter(|(_, held)| held.keeper == Keeper::Starter).try_for_each(|(name, held)| self.starter.keep(name, &held.fds))
    }

    /// Closes everything.
    pub fn clear(&self) {
        self.held.borrow_mut().clear();
    }
}

/// A name as sd_notify(3) wants it.
fn spelt(name: &str) -> String {
    name.replace(':', "/")
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::net::UnixDatagram;

    use super::*;
    use crate::keeper::wire;

    /// A store, and what its starter hears: the words and how many descriptors came with them.
    struct Bench {
        starter: UnixDatagram,
        store: Store,
        _directory: tempfile::TempDir,
    }

    impl Bench {
        fn new(found: &[&str]) -> Bench {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("notify");
            let starter = UnixDatagram::bind(&path).unwrap();
            starter.set_nonblocking(true).unwrap();
            let found = found.iter().map(|name| ((*name).to_owned(), file())).collect();
            Bench { starter, store: Store::new(Notifier::to(path.as_os_str(), None).unwrap(), found), _directory: directory }
        }

        fn heard(&self) -> Vec<String> {
            std::iter::from_fn(|| wire::receive(&self.starter).ok())
                .map(|message| format!("{} {}", String::from_utf8(message.bytes).unwrap().replace('\n', " "), message.fds.len()))
                .collect()
        }
    }

    fn file() -> OwnedFd {
        File::open("/dev/null").unwrap().into()
    }

    #[test]
    fn what_is_kept_is_told_to_the_starter_in_place_of_what_it_had() {
        let bench = Bench::new(&["tun/pods", "tun/pods", "lock"]);
        let queues = bench.store.take("tun/pods");
        assert_eq!((queues.len(), bench.store.take("tun/pods").len()), (2, 0));
        bench.store.keep_all("tun/pods", queues[..1].iter().map(AsFd::as_fd), Keeper::Starter).unwrap();
        bench.store.keep("pod-tun:eth0", file()).unwrap();
        assert_eq!(
            bench.heard(),
            [
                "FDSTOREREMOVE=1 FDNAME=tun/pods 0",
                "FDSTORE=1 FDPOLL=0 FDNAME=tun/pods 1",
                "FDSTOREREMOVE=1 FDNAME=pod-tun/eth0 0",
                "FDSTORE=1 FDPOLL=0 FDNAME=pod-tun/eth0 1"
            ]
        );
        bench.store.keep_all("api", [file().as_fd()], Keeper::Nobody).unwrap();
        assert_eq!(bench.heard(), [""; 0]);
        let copies: Vec<String> = bench.store.copies().unwrap().into_iter().map(|(name, _)| name).collect();
        assert_eq!(copies, ["api", "lock", "pod-tun/eth0", "tun/pods"]);
        assert_eq!((bench.store.take_kind("pod").len(), bench.store.take_kind("pod-tun").len()), (0, 1));
        bench.store.keep("pod-tun:eth0", file()).unwrap();
        assert_eq!(bench.heard().len(), 2);
        // What was found and nobody asked for goes.
        assert_eq!(bench.store.forget_unknown().unwrap(), ["lock"]);
        assert_eq!(bench.heard(), ["FDSTOREREMOVE=1 FDNAME=lock 0"]);
        bench.store.forget("pod-tun:eth0").unwrap();
        assert_eq!(
            (bench.heard(), bench.store.names()),
            (vec!["FDSTOREREMOVE=1 FDNAME=pod-tun/eth0 0".to_owned()], vec!["api".to_owned(), "tun/pods".to_owned()])
        );
    }

    #[test]
    fn the_starter_keeps_nothing_of_a_node_that_is_not_yet_or_no_longer_this_process_s() {
        let bench = Bench::new(&[]);
        bench.store.add(vec![("lock".to_owned(), file())]);
        let lock = bench.store.take("lock").pop().unwrap();
        bench.store.keep("lock", &lock).unwrap();
        assert_eq!(bench.heard(), [""; 0], "it may yet go back to the predecessor");
        bench.store.deposit().unwrap();
        assert_eq!(bench.heard(), ["FDSTORE=1 FDPOLL=0 FDNAME=lock 1"]);
        bench.store.withdraw().unwrap();
        bench.store.keep("netns", file()).unwrap();
        assert_eq!(bench.heard(), ["FDSTOREREMOVE=1 FDNAME=lock 0"]);
        bench.store.deposit().unwrap();
        assert_eq!(bench.heard(), ["FDSTORE=1 FDPOLL=0 FDNAME=lock 1", "FDSTORE=1 FDPOLL=0 FDNAME=netns 1"]);
    }
}
