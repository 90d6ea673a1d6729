//! The gateway's own network namespace: who makes it, and how everybody else finds it.
//!
//! It must outlive the daemon, because every pod's interface hangs in it. A bind mount that is made inside a sandbox (systemd's
//! `Private…`/`Protect…`, a container without bidirectional propagation) dies with the sandbox, and every pod's interface with
//! it. So [`prepare`] is a command of its own, run outside of any sandbox, and the daemon only opens what it finds
//! ([`GatewayNs::open`]): an nsfs with the inode that was recorded in this boot. A second namespace is never made while one is
//! recorded: pods would be left behind in the first.
//!
//! [`may_prepare`] tells whether this process may do it by itself.

use crate::host_state::{boot_id, read_if_any, write_atomically};
use crate::netlink::Netlink;
use crate::routing::devices::{DeviceError, prepare_gateway};
use nix::fcntl::{Flock, FlockArg};
use podgate_runtime::netns::{Netns, NetnsError};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};

/// The mount point's name in the runtime directory.
pub const MOUNT: &str = "netns";
const RECORD: &str = "netns.json";
const LOCK: &str = "netns.lock";
/// With this runtime directory, `ip netns exec podgate` works as well.
const DEFAULT_RUNTIME_DIR: &str = "/run/podgate";
const NAMED: &str = "/run/netns/podgate";

/// Why the gateway's namespace could not be made or opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GatewayNsError {
    /// It was never made, or not in this boot.
    #[error(
        "the gateway's namespace {path} does not exist yet: run `podgate prepare` outside of any sandbox or container first \
         (systemd: the unit podgate-prepare.service; Kubernetes: the init container `prepare`)",
        path = path.display()
    )]
    NotPrepared {
        /// Where it should be.
        path: PathBuf,
    },
    /// It was made in this boot, but what is there now is not it.
    #[error(
        "the gateway's namespace {path} was made in this boot (inode {recorded}) but {found} is there now; the pods attached to it have lost \
         their network. Not making a second one: stop the gateway, run `podgate cleanup`, then `podgate prepare`, and attach the pods again",
        path = path.display()
    )]
    Lost {
        /// Where it should be.
        path: PathBuf,
        /// The inode it had.
        recorded: u64,
        /// What is there.
        found: String,
    },
    /// This process is in a sandbox.
    #[error("the gateway's namespace {path} is missing and cannot be made here: {reason}; run `podgate prepare` outside", path = path.display())]
    Sandboxed {
        /// Where it should be.
        path: PathBuf,
        /// How that was seen.
        reason: String,
    },
    /// A file of the runtime directory.
    #[error("cannot {operation} {path}: {source}", path = path.display())]
    File {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The record is not what was written.
    #[error("{path} is damaged: {source}; run `podgate cleanup`, then `podgate prepare`, and attach the pods again", path = path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// Where.
        source: serde_json::Error,
    },
    /// The namespace itself.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// Its interfaces and sysctls.
    #[error("the gateway's namespace: {0}")]
    Device(#[from] DeviceError),
}

/// The gateway's own namespace, open.
#[derive(Debug)]
pub struct GatewayNs {
    netns: Netns,
    path: PathBuf,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Record {
    schema_version: u32,
    boot_id: String,
    dev: u64,
    ino: u64,
}

impl GatewayNs {
    /// Opens the namespace that was prepared in this boot.
    pub fn open(runtime_dir: &Path) -> Result<GatewayNs, GatewayNsError> {
        let path = runtime_dir.join(MOUNT);
        let Some(record) = recorded(runtime_dir)? else { return Err(GatewayNsError::NotPrepared { path }) };
        let lost = |found: String| GatewayNsError::Lost { path: path.clone(), recorded: record.ino, found };
        match Netns::open(&path) {
            Ok(netns) if (netns.id().dev, netns.id().ino) == (record.dev, record.ino) => Ok(GatewayNs { netns, path }),
            Ok(netns) => Err(lost(format!("another namespace (inode {})", netns.inode()))),
            Err(NetnsError::NotANetns { found, .. }) => Err(lost(found.to_owned())),
            Err(NetnsError::Open { source, .. }) if source.kind() == io::ErrorKind::NotFound => Err(lost("nothing".to_owned())),
            Err(other) => Err(other.into()),
        }
    }

    /// The namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Makes the gateway's namespace if this boot has none, closed to everybody, and opens it. Safe to repeat and to run twice at once.
pub fn prepare(runtime_dir: &Path) -> Result<GatewayNs, GatewayNsError> {
    let file = |operation, path: &Path| {
        let path = path.to_owned();
        move |source| GatewayNsError::File { operation, path, source }
    };
    fs::create_dir_all(runtime_dir).map_err(file("make", runtime_dir))?;
    let lock = runtime_dir.join(LOCK);
    let lock_file = File::create(&lock).map_err(file("make", &lock))?;
    let _held = Flock::lock(lock_file, FlockArg::LockExclusive).map_err(|(_, errno)| file("lock", &lock)(errno.into()))?;
    let path = runtime_dir.join(MOUNT);
    if recorded(runtime_dir)?.is_none() {
        // A namespace that is mounted but not recorded is one whose making was interrupted.
        let (netns, interrupted) = match Netns::open(&path) {
            Ok(netns) => (netns, true),
            Err(_) => (Netns::anonymous()?, false),
        };
        if !interrupted {
            netns.bind(&path)?;
        }
        let record = Record { schema_version: 1, boot_id: boot_id(), dev: netns.id().dev, ino: netns.id().ino };
        let bytes = serde_json::to_vec_pretty(&record).expect("plain data is always JSON");
        let record_path = runtime_dir.join(RECORD);
        write_atomically(&record_path, &bytes).map_err(file("write", &record_path))?;
    }
    let gateway = GatewayNs::open(runtime_dir)?;
    let netlink = Netlink::open(&gateway.netns).map_err(DeviceError::from)?;
    close(&netlink)?;
    prepare_gateway(&gateway.netns, &netlink)?;
    if runtime_dir == Path::new(DEFAULT_RUNTIME_DIR) {
        name_for_iproute2(&path);
    }
    Ok(gateway)
}

/// [`prepare`] where this process may, else [`GatewayNs::open`]. If its mount is gone, it is one of `kept`, which a predecessor left.
pub fn open_or_prepare(runtime_dir: &Path, kept: Vec<OwnedFd>) -> Result<GatewayNs, GatewayNsError> {
    match (GatewayNs::open(runtime_dir), may_prepare()) {
        (Err(lost @ GatewayNsError::Lost { .. }), _) => kept_one(runtime_dir, kept)?.ok_or(lost),
        (Err(GatewayNsError::NotPrepared { .. }), Ok(())) => prepare(runtime_dir),
        (Err(GatewayNsError::NotPrepared { path }), Err(reason)) => Err(GatewayNsError::Sandboxed { path, reason }),
        (found, _) => found,
    }
}

/// The recorded namespace among `kept`. It is mounted again, if that can be seen outside.
fn kept_one(runtime_dir: &Path, kept: Vec<OwnedFd>) -> Result<Option<GatewayNs>, GatewayNsError> {
    let path = runtime_dir.join(MOUNT);
    let Some(record) = recorded(runtime_dir)? else { return Ok(None) };
    let is_it = |netns: &Netns| (netns.id().dev, netns.id().ino) == (record.dev, record.ino);
    let Some(netns) = kept.into_iter().filter_map(|fd| Netns::from_fd(fd).ok()).find(is_it) else { return Ok(None) };
    tracing::warn!(path = %path.display(), "the gateway's namespace is not mounted any more; going on with the one that was kept open");
    if may_prepare().is_ok() {
        netns.bind(&path)?;
    }
    Ok(Some(GatewayNs { netns, path }))
}

/// Takes the namespace away, and with it every pod's interface. Gives what was removed, if anything was there.
pub fn remove(runtime_dir: &Path) -> Result<Option<String>, GatewayNsError> {
    let path = runtime_dir.join(MOUNT);
    if fs::read_link(NAMED).is_ok_and(|target| target == path) {
        let _ = fs::remove_file(NAMED);
    }
    let there = path.exists();
    Netns::unbind(&path)?;
    for name in [RECORD, LOCK] {
        let path = runtime_dir.join(name);
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => return Err(GatewayNsError::File { operation: "remove", path, source }),
            _ => {}
        }
    }
    Ok(there.then(|| format!("namespace {}", path.display())))
}

/// `PROC_PID_INIT_INO` (`include/linux/proc_ns.h`): the inode of the machine's first PID namespace.
const INIT_PID_NAMESPACE: u64 = 0xEFFF_FFFC;

/// `MNT_NS_INIT_INO` (Linux 6.18, `include/uapi/linux/nsfs.h`): the inode of the machine's first mount namespace. Older kernels give
/// it any number.
const INIT_MOUNT_NAMESPACE: u64 = 0xEFFF_FFF8;

/// Whether a mount made by this process stays when the process is gone; else the reason why not.
///
/// Two signs are looked at. In another PID namespace than the machine's first, this is a container. With another mount namespace
/// than process 1's, this is a service with systemd's sandboxing, a container with `hostPID`, or a user namespace of somebody's.
/// Neither is proof that the mount would be lost (a container may have bidirectional propagation), so `podgate prepare` does it
/// regardless when told to; only `podgate run` asks here before it does so unbidden.
pub fn may_prepare() -> Result<(), String> {
    let inode = |path: &str| fs::metadata(path).map(|metadata| metadata.ino());
    if inode("/proc/self/ns/pid").is_ok_and(|inode| inode != INIT_PID_NAMESPACE) {
        return Err("this process is in a PID namespace of its own, so probably in a container".to_owned());
    }
    match (inode("/proc/self/ns/mnt"), inode("/proc/1/ns/mnt")) {
        (Ok(INIT_MOUNT_NAMESPACE), _) => Ok(()),
        (Ok(own), Ok(first)) if own == first => Ok(()),
        (Ok(_), Ok(_)) => Err("this process has another mount namespace than process 1, so it is probably sandboxed".to_owned()),
        (_, Err(error)) | (Err(error), _) => Err(format!("whether this process is sandboxed cannot be seen (/proc/1/ns/mnt: {error})")),
    }
}

/// The blackhole stands before anything else is in the namespace.
fn close(netlink: &Netlink) -> Result<(), GatewayNsError> {
    use crate::netlink::{Family, RuleAction, RuleSpec};
    for family in Family::BOTH {
        match netlink.add_rule(&RuleSpec::new(family, crate::routing::PREF_CLOSED, RuleAction::Blackhole)) {
            Err(error) if error.is_present_already() || matches!(error.errno(), Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP)) => {}
            other => other.map_err(DeviceError::from)?,
        }
    }
    Ok(())
}

fn recorded(runtime_dir: &Path) -> Result<Option<Record>, GatewayNsError> {
    let path = runtime_dir.join(RECORD);
    let read = read_if_any(&path).map_err(|source| GatewayNsError::File { operation: "read", path: path.clone(), source })?;
    let Some(bytes) = read else { return Ok(None) };
    let record: Record = serde_json::from_slice(&bytes).map_err(|error| GatewayNsError::Damaged { path, source: error })?;
    Ok(Some(record).filter(|record| record.boot_id == boot_id()))
}

/// A convenience only: that it fails harms nobody.
fn name_for_iproute2(path: &Path) {
    let named = Path::new(NAMED);
    let _ = fs::create_dir_all(named.parent().unwrap_or(Path::new("/run/netns")));
    if fs::read_link(named).is_ok_and(|target| target != path) {
        let _ = fs::remove_file(named);
    }
    let _ = symlink(path, named);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::{Family, LinkState};

    /// A runtime directory of the test's own, with its mount taken away at the end, whatever happens.
    struct Place(PathBuf);

    impl Place {
        fn new(name: &str) -> Option<Place> {
            let place = Place(std::env::temp_dir().join(format!("podgate-gateway-ns-{name}-{}", std::process::id())));
            let trial = place.0.join("trial");
            fs::create_dir_all(&place.0).unwrap();
            let bound = Netns::anonymous().and_then(|netns| netns.bind(&trial));
            let unbound = Netns::unbind(&trial);
            match bound.and(unbound) {
                Ok(()) => Some(place),
                Err(error) => {
                    eprintln!("skipped: {error}");
                    None
                }
            }
        }
    }

    impl Drop for Place {
        fn drop(&mut self) {
            let _ = remove(&self.0);
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn preparing_twice_gives_one_namespace_that_is_closed() {
        let Some(place) = Place::new("twice") else { return };
        assert!(matches!(GatewayNs::open(&place.0), Err(GatewayNsError::NotPrepared { .. })));
        let first = prepare(&place.0).unwrap();
        let second = prepare(&place.0).unwrap();
        assert_eq!(first.netns().id(), second.netns().id());
        let netlink = Netlink::open(first.netns()).unwrap();
        assert_eq!(netlink.expect_link("lo").unwrap().state, LinkState::Up);
        assert!(netlink.addresses().unwrap().iter().any(|found| found.address.to_string() == "169.254.1.1/32"));
        for family in Family::BOTH {
            assert!(netlink.rules(family).unwrap().iter().any(|rule| rule.spec.to_string().ends_with("rule pref 30 blackhole")));
        }
    }

    #[test]
    fn a_namespace_that_was_lost_is_not_replaced_until_cleaned_up() {
        let Some(place) = Place::new("lost") else { return };
        let first = prepare(&place.0).unwrap().netns().id();
        Netns::unbind(place.0.join(MOUNT)).unwrap();
        let error = prepare(&place.0).unwrap_err();
        assert!(matches!(&error, GatewayNsError::Lost { found, .. } if found == "nothing"), "{error}");
        fs::write(place.0.join(MOUNT), "").unwrap();
        assert!(matches!(GatewayNs::open(&place.0), Err(GatewayNsError::Lost { .. })));
        let other = Netns::anonymous().unwrap();
        other.bind(place.0.join(MOUNT)).unwrap();
        let error = GatewayNs::open(&place.0).unwrap_err();
        assert!(error.to_string().contains("another namespace"), "{error}");
        remove(&place.0).unwrap();
        assert_ne!(prepare(&place.0).unwrap().netns().id(), first);
    }

    #[test]
    fn a_namespace_that_was_kept_open_is_gone_on_with_when_its_mount_is_gone() {
        use std::os::fd::AsFd;
        let Some(place) = Place::new("kept") else { return };
        let first = prepare(&place.0).unwrap();
        let handle = |netns: &Netns| netns.as_fd().try_clone_to_owned().unwrap();
        Netns::unbind(place.0.join(MOUNT)).unwrap();
        let others = vec![handle(&Netns::current().unwrap()), File::open("/dev/null").unwrap().into()];
        assert!(matches!(open_or_prepare(&place.0, others), Err(GatewayNsError::Lost { .. })));
        let found = open_or_prepare(&place.0, vec![handle(&Netns::current().unwrap()), handle(first.netns())]).unwrap();
        assert_eq!(found.netns().id(), first.netns().id());
    }

    #[test]
    fn a_record_of_another_boot_counts_for_nothing() {
        let Some(place) = Place::new("boot") else { return };
        let record = Record { schema_version: 1, boot_id: "another".into(), dev: 1, ino: 2 };
        fs::write(place.0.join(RECORD), serde_json::to_vec(&record).unwrap()).unwrap();
        fs::write(place.0.join(MOUNT), "").unwrap();
        assert!(matches!(GatewayNs::open(&place.0), Err(GatewayNsError::NotPrepared { .. })));
        prepare(&place.0).unwrap();
        assert!(remove(&place.0).unwrap().is_some());
        assert!(remove(&place.0).unwrap().is_none());
    }
}
