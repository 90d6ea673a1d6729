//! Sysctls of a network namespace: files below `/proc/sys/net` that show the namespace of the thread that opens them.

use podgate_runtime::netns::Netns;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// A sysctl below `/proc/sys`, as path: `net/ipv4/conf/eth0.100/forwarding` (a name with dots would be ambiguous for interfaces).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct Key(String);

impl Key {
    /// From a path such as `net/ipv4/ip_forward`.
    pub fn new(path: impl Into<String>) -> Key {
        Key(path.into())
    }

    /// An IPv4 setting of an interface.
    pub fn v4(device: &str, name: &str) -> Key {
        Key(format!("net/ipv4/conf/{device}/{name}"))
    }

    /// An IPv6 setting of an interface.
    pub fn v6(device: &str, name: &str) -> Key {
        Key(format!("net/ipv6/conf/{device}/{name}"))
    }

    /// The path below `/proc/sys`.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn file(&self) -> PathBuf {
        Path::new("/proc/sys").join(&self.0)
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A sysctl that could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum SysctlError {
    /// The namespace could not be entered.
    #[error("cannot enter the network namespace to reach sysctl {key}: {source}")]
    Enter {
        /// The sysctl.
        key: Key,
        /// The system's error.
        source: io::Error,
    },
    /// It could not be read.
    #[error("cannot read sysctl {key}: {source}")]
    Read {
        /// The sysctl.
        key: Key,
        /// The system's error.
        source: io::Error,
    },
    /// It could not be written.
    #[error("cannot set sysctl {key} to \"{value}\": {source}; is /proc/sys mounted read-only here?")]
    Write {
        /// The sysctl.
        key: Key,
        /// What it should become.
        value: String,
        /// The system's error.
        source: io::Error,
    },
}

impl SysctlError {
    /// Whether the sysctl does not exist: its interface is gone, or the kernel lacks the feature.
    pub fn is_missing(&self) -> bool {
        let (SysctlError::Enter { source, .. } | SysctlError::Read { source, .. } | SysctlError::Write { source, .. }) = self;
        source.kind() == io::ErrorKind::NotFound
    }
}

/// The value of `key` in `netns`.
pub fn read(netns: &Netns, key: &Key) -> Result<String, SysctlError> {
    entered(netns, key, || read_here(key))
}

/// Sets `key` in `netns`.
pub fn write(netns: &Netns, key: &Key, value: &str) -> Result<(), SysctlError> {
    entered(netns, key, || write_here(key, value))
}

/// Sets several in order, in one visit to the namespace; the first failure ends it.
pub fn write_all(netns: &Netns, settings: &[(Key, &str)]) -> Result<(), SysctlError> {
    let Some((first, _)) = settings.first() else { return Ok(()) };
    entered(netns, first, || settings.iter().try_for_each(|(key, value)| write_here(key, value)))
}

fn entered<T: Send>(netns: &Netns, key: &Key, work: impl FnOnce() -> Result<T, SysctlError> + Send) -> Result<T, SysctlError> {
    netns.run(work).map_err(|source| SysctlError::Enter { key: key.clone(), source })?
}

/// The value of `key` in the calling thread's namespace.
pub fn read_here(key: &Key) -> Result<String, SysctlError> {
    let text = std::fs::read_to_string(key.file()).map_err(|source| SysctlError::Read { key: key.clone(), source })?;
    Ok(text.trim_end_matches('\n').to_owned())
}

/// Sets `key` in the calling thread's namespace, unless it is so: some of IPv6's take the kernel's lock on all networking.
pub fn write_here(key: &Key, value: &str) -> Result<(), SysctlError> {
    if read_here(key).is_ok_and(|found| found == value) {
        return Ok(());
    }
    std::fs::write(key.file(), value).map_err(|source| SysctlError::Write { key: key.clone(), value: value.to_owned(), source })
}
