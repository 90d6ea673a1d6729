//! What can go wrong in the plugin, and how the runtime is told (CNI SPEC.md, section 5, "Error").

use std::path::PathBuf;

use serde_json::{Value, json};

/// What the daemon did not do for an unnamed reason of a delegated plugin: its exit status says so, its output does not say why. From 100 on
/// the codes are a plugin's own.
pub const DELEGATE_FAILED: u64 = 101;

/// Why a command fails.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration is of a version that is not spoken, or that has no such command.
    #[error("incompatible CNI version {version:?}")]
    Version {
        /// What the configuration says.
        version: String,
        /// What it does not allow and what would.
        problem: String,
    },
    /// The container's network namespace is not there.
    #[error("the network namespace {path:?} does not exist")]
    NoNamespace {
        /// As in `CNI_NETNS`.
        path: String,
    },
    /// Environment variables are missing or invalid.
    #[error("invalid environment: {variables}")]
    Environment {
        /// Their names, which the specification wants in the message.
        variables: String,
        /// What is wrong with them.
        problem: String,
    },
    /// Something could not be read, written or run.
    #[error("cannot {doing}")]
    Io {
        /// What was to be done, and with what.
        doing: String,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// What was read is not what it should be.
    #[error("{what} cannot be decoded")]
    Undecodable {
        /// What was read.
        what: String,
        /// What does not fit.
        problem: String,
    },
    /// The network configuration cannot be used.
    #[error("invalid network configuration: {key}")]
    Config {
        /// The key, as a path from the top (`runtimeConfig.portMappings[0].hostPort`).
        key: String,
        /// What is wrong with it and what it takes.
        problem: String,
    },
    /// The daemon does not answer now; it may later.
    #[error("podgate does not answer")]
    NoAnswer {
        /// [`TRY_AGAIN`], or [`UNREACHABLE`] for STATUS.
        code: u64,
        /// What was tried.
        problem: String,
    },
    /// Pods cannot be attached (STATUS).
    #[error("pods cannot be attached")]
    Unavailable {
        /// What is missing and what to do.
        problem: String,
    },
    /// The daemon refused.
    #[error("{message}")]
    Refused {
        /// The daemon's code.
        code: u64,
        /// The daemon's words.
        message: String,
        /// Where it listens.
        socket: PathBuf,
    },
    /// A delegated plugin failed.
    #[error("{message}")]
    Delegate {
        /// The plugin's code.
        code: u64,
        /// The plugin's message.
        message: String,
        /// The plugin's details, or which plugin it was.
        details: String,
    },
    /// Several of the above, in the order in which they arose.
    #[error("{}", .0.iter().map(Error::to_string).collect::<Vec<_>>().join("; "))]
    Several(Vec<Error>),
}

/// The daemon does not answer now (code 11).
pub const TRY_AGAIN: u64 = 11;
/// The daemon does not answer, so attached pods may have no network either (code 51).
pub const UNREACHABLE: u64 = 51;

impl Error {
    /// An error of the configuration's `key`.
    pub fn config(key: impl Into<String>, problem: impl Into<String>) -> Error {
        Error::Config { key: key.into(), problem: problem.into() }
    }

    /// None of `errors`, one of them, or all.
    pub fn all(mut errors: Vec<Error>) -> Result<(), Error> {
        match errors.len() {
            0 => Ok(()),
            1 => Err(errors.remove(0)),
            _ => Err(Error::Several(errors)),
        }
    }

    /// Its number (CNI SPEC.md, section 5).
    pub fn code(&self) -> u64 {
        match self {
            Error::Version { .. } => 1,
            Error::NoNamespace { .. } => 3,
            Error::Environment { .. } => 4,
            Error::Io { .. } => 5,
            Error::Undecodable { .. } => 6,
            Error::Config { .. } => 7,
            Error::Unavailable { .. } => 50,
            Error::NoAnswer { code, .. } | Error::Refused { code, .. } | Error::Delegate { code, .. } => *code,
            Error::Several(errors) => errors.first().map_or(DELEGATE_FAILED, Error::code),
        }
    }

    /// The longer message.
    pub fn details(&self) -> String {
        match self {
            Error::NoNamespace { .. } => "the container has ended, or CNI_NETNS names it wrongly".into(),
            Error::Io { source, .. } => source.to_string(),
            Error::Version { problem, .. }
            | Error::Environment { problem, .. }
            | Error::Undecodable { problem, .. }
            | Error::Config { problem, .. }
            | Error::NoAnswer { problem, .. }
            | Error::Unavailable { problem } => problem.clone(),
            Error::Refused { socket, .. } => format!("the daemon at {} refused", socket.display()),
            Error::Delegate { details, .. } => details.clone(),
            Error::Several(errors) => errors.iter().map(Error::details).collect::<Vec<_>>().join("; "),
        }
    }

    /// As the runtime reads it.
    pub fn to_json(&self, version: &str) -> Value {
        json!({"cniVersion": version, "code": self.code(), "msg": self.to_string(), "details": self.details()})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_errors_are_told_with_the_code_of_the_first() {
        let refused = Error::Refused { code: 5, message: "veth kept".into(), socket: "/s".into() };
        let delegate = Error::Delegate { code: 99, message: "store locked".into(), details: "by another".into() };
        assert_eq!(
            Error::all(vec![refused, delegate]).unwrap_err().to_json("1.1.0"),
            json!({"cniVersion": "1.1.0", "code": 5, "msg": "veth kept; store locked", "details": "the daemon at /s refused; by another"})
        );
        assert!(Error::all(Vec::new()).is_ok());
    }
}
