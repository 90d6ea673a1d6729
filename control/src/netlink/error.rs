//! What can go wrong between us and the kernel's routing tables, said so that a person can act on it.

use std::io;

/// A failed operation on the kernel's links, addresses, routes, rules or neighbours.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetlinkError {
    /// The kernel refused; `message` is its own explanation (extended acknowledgement), where it gave one.
    #[error("cannot {operation} {object}: {}{}", io::Error::from_raw_os_error(*errno), explanation(message))]
    Refused {
        /// What was tried, as a verb: "add", "delete", "list".
        operation: &'static str,
        /// On what: the rule, route, link or address in the form `ip` shows it.
        object: String,
        /// The kernel's errno, positive.
        errno: i32,
        /// The kernel's extended acknowledgement.
        message: Option<String>,
    },
    /// The netlink socket itself failed.
    #[error("netlink socket: cannot {operation}: {source}")]
    Socket {
        /// What was tried, as a verb.
        operation: &'static str,
        /// The system's error.
        source: io::Error,
    },
    /// The kernel sent something that cannot be understood.
    #[error("netlink: the kernel's answer to \"{operation} {object}\" is malformed: {detail}")]
    Malformed {
        /// What was tried, as a verb.
        operation: &'static str,
        /// On what.
        object: String,
        /// What is wrong with it.
        detail: String,
    },
}

fn explanation(message: &Option<String>) -> String {
    message.as_ref().map(|text| format!(" (kernel: {text})")).unwrap_or_default()
}

impl NetlinkError {
    /// The kernel's errno, if it was the kernel that refused.
    pub fn errno(&self) -> Option<i32> {
        match self {
            NetlinkError::Refused { errno, .. } => Some(*errno),
            NetlinkError::Socket { source, .. } => source.raw_os_error(),
            NetlinkError::Malformed { .. } => None,
        }
    }

    /// Whether what was to be deleted or looked up is not there. Each table has an errno of its own for it: rules and neighbours
    /// `ENOENT`, routes `ESRCH`, links `ENODEV`, addresses `EADDRNOTAVAIL`.
    pub fn is_missing(&self) -> bool {
        matches!(self.errno(), Some(libc::ENOENT | libc::ESRCH | libc::ENODEV | libc::EADDRNOTAVAIL))
    }

    /// Whether what was to be added is there already.
    pub fn is_present_already(&self) -> bool {
        self.errno() == Some(libc::EEXIST)
    }
}

/// Turns "it is not there" into success, for deletions that must succeed twice.
pub trait MissingIsFine {
    /// `Ok(())` for success and for "not there"; every other error is kept.
    fn or_missing(self) -> Result<(), NetlinkError>;
}

impl MissingIsFine for Result<(), NetlinkError> {
    fn or_missing(self) -> Result<(), NetlinkError> {
        match self {
            Err(error) if error.is_missing() => Ok(()),
            other => other,
        }
    }
}
