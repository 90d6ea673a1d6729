//! The log: what of it is written, and in which form.
//!
//! Lines go to stderr, for a journal or a container runtime to keep. The filter is the environment's (`PODGATE_LOG`, `info` by default) until
//! `podgate log-level` changes it, which lasts until the daemon ends.

use std::sync::OnceLock;

use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt, reload};

/// The variable that names the filter.
pub const VARIABLE: &str = "PODGATE_LOG";

/// The client of the API server logs each failed attempt as an error; the source says it once, and what it means.
const DEFAULT: &str = "info,kube_client=off";

/// What a filter may be besides a list of directives.
const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

static FILTER: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();

/// The form of a line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Form {
    /// For reading.
    #[default]
    Text,
    /// One JSON object a line: `timestamp`, `level`, `fields`.
    Json,
}

/// Why the filter stays as it was.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FilterError {
    /// It is no filter.
    #[error("`{0}` is no level of the log: write off, error, warn, info, debug or trace, or levels of parts as in info,podgate::source=debug")]
    Unknown(String),
    /// There is no log to filter.
    #[error("the filter of the log cannot be changed: {0}")]
    Fixed(String),
}

/// Begins the log of this process, in this form.
pub fn start(form: Form) {
    let filter = std::env::var(VARIABLE).ok().and_then(|text| parse(&text).ok()).unwrap_or_else(|| EnvFilter::new(DEFAULT));
    let (filter, handle) = reload::Layer::new(filter);
    let lines = match form {
        Form::Text => {
            let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr());
            fmt::layer().with_writer(std::io::stderr).with_ansi(ansi).with_target(false).boxed()
        }
        Form::Json => fmt::layer().json().with_writer(std::io::stderr).with_target(false).boxed(),
    };
    // Another log of this process's would be one that a test began.
    if tracing_subscriber::registry().with(filter).with(lines).try_init().is_ok() {
        let _ = FILTER.set(handle);
    }
}

/// Changes the filter, and gives the one that was in force.
pub fn set_filter(text: &str) -> Result<String, FilterError> {
    let filter = parse(text)?;
    let handle = FILTER.get().ok_or_else(|| FilterError::Fixed("this process began no log".into()))?;
    let failed = |error: reload::Error| FilterError::Fixed(error.to_string());
    let before = handle.with_current(ToString::to_string).map_err(failed)?;
    handle.reload(filter).map_err(failed)?;
    Ok(before)
}

/// `EnvFilter` takes any word for the name of a target, so a mistyped level would silence everything.
fn parse(text: &str) -> Result<EnvFilter, FilterError> {
    let unknown = || FilterError::Unknown(text.to_owned());
    let known = |part: &str| {
        let level = part.rsplit_once('=').map_or(part, |(_, level)| level);
        LEVELS.contains(&level.trim().to_ascii_lowercase().as_str())
    };
    if !text.split(',').all(known) {
        return Err(unknown());
    }
    EnvFilter::try_new(text).map_err(|_| unknown())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mistyped_level_is_refused_and_what_is_written_in_the_help_is_not() {
        for right in ["debug", "INFO", "off", "info,podgate::source=debug"] {
            assert_eq!(parse(right).map(|_| ()), Ok(()), "{right}");
        }
        for wrong in ["", "debgu", "7", "info,", "podgate", "podgate::source=loud"] {
            assert_eq!(parse(wrong).map(|_| ()), Err(FilterError::Unknown(wrong.into())), "{wrong}");
        }
    }
}
