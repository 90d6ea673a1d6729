//! What is packed: the two programs, built statically, and when and for which machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Options, PackageError};

/// Everything that a package is made of.
#[derive(Debug)]
pub(crate) struct Inputs {
    /// The daemon and command line.
    pub podgate: Vec<u8>,
    /// Where it lies: it is asked for its man pages and completions.
    pub podgate_path: PathBuf,
    /// The CNI plugin.
    pub plugin: Vec<u8>,
    /// Of all of it.
    pub version: &'static str,
    /// The time of everything in it, in seconds of the Unix clock: `SOURCE_DATE_EPOCH` (see reproducible-builds.org), or when the sources were
    /// last committed, or 0.
    pub time: u64,
    /// What is in the programs (CycloneDX).
    pub sbom: Vec<u8>,
}

impl Inputs {
    /// Builds the programs, unless they are given.
    pub fn of(options: &Options) -> Result<Inputs, PackageError> {
        let (podgate_path, plugin_path) = match (&options.podgate, &options.podgate_cni) {
            (Some(podgate), Some(plugin)) => (podgate.clone(), plugin.clone()),
            _ => {
                // The plugin has a profile of its own, which is that of a small release.
                let of_plugin = if options.profile == "release" { "cni" } else { &options.profile };
                (build("podgate", &options.profile)?, build("podgate-cni", of_plugin)?)
            }
        };
        Ok(Inputs {
            podgate: program(&podgate_path)?,
            plugin: program(&plugin_path)?,
            podgate_path,
            version: env!("CARGO_PKG_VERSION"),
            time: time(),
            sbom: crate::sbom::of_workspace(&root())?,
        })
    }

    /// The machine's name in images and Debian packages.
    pub fn architecture(&self) -> Result<&'static str, PackageError> {
        match std::env::consts::ARCH {
            "x86_64" => Ok("amd64"),
            "aarch64" => Ok("arm64"),
            other => Err(PackageError::Architecture(other)),
        }
    }

    /// A file of the workspace.
    pub fn file(&self, path: &str) -> Result<Vec<u8>, PackageError> {
        let path = root().join(path);
        fs::read(&path).map_err(PackageError::file("read", path))
    }
}

fn time() -> u64 {
    let given = std::env::var("SOURCE_DATE_EPOCH").ok().and_then(|text| text.parse().ok());
    // Sources that were unpacked from an archive have no history.
    let committed = || output(Command::new("git").current_dir(root()).args(["log", "-1", "--format=%ct"])).ok();
    given.or_else(|| String::from_utf8(committed()?).ok()?.trim().parse().ok()).unwrap_or(0)
}

/// The workspace.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn cargo() -> String {
    std::env::var("CARGO").unwrap_or_else(|_| "cargo".into())
}

/// Runs a command and gives what it prints.
pub(crate) fn output(command: &mut Command) -> Result<Vec<u8>, PackageError> {
    let failed = |how: String, command: &Command| PackageError::Program { command: format!("{command:?}").replace('"', ""), how };
    match command.output() {
        Ok(output) if output.status.success() => Ok(output.stdout),
        Ok(output) => Err(failed(format!("failed ({}): {}", output.status, String::from_utf8_lossy(&output.stderr).trim()), command)),
        Err(error) => Err(failed(format!("could not be started: {error}"), command)),
    }
}

/// `cargo tree` of what is shipped, a line for each crate: `name vVERSION (path)`, a tab, its licence.
pub(crate) fn crates(root: &Path) -> Result<String, PackageError> {
    let mut command = Command::new(cargo());
    command.current_dir(root).args(["tree", "--locked", "-e", "normal", "-p", "podgate", "-p", "podgate-cni", "--prefix", "none"]);
    output(command.args(["--format", "{p}\t{l}"])).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

fn build(name: &str, profile: &str) -> Result<PathBuf, PackageError> {
    let mut command = Command::new(cargo());
    command.current_dir(root()).args(["rustc", "--locked", "--quiet", "--profile", profile, "-p", name, "--bin", name, "--message-format=json"]);
    // Linked statically, it needs nothing of the system that it runs on.
    let messages = output(command.args(["--", "-C", "target-feature=+crt-static", "-C", "strip=debuginfo"]))?;
    // Cargo says where it put it (`reason: compiler-artifact`, in "Machine-readable output" of the Cargo book).
    let messages = String::from_utf8_lossy(&messages).into_owned();
    let artifacts = messages.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let found = artifacts.filter(|message| message["target"]["name"] == name).find_map(|message| message["executable"].as_str().map(PathBuf::from));
    found.ok_or_else(|| PackageError::Program { command: format!("{command:?}").replace('"', ""), how: "names no program".into() })
}

/// Its bytes, if it is a program that needs no library.
fn program(path: &Path) -> Result<Vec<u8>, PackageError> {
    let bytes = fs::read(path).map_err(PackageError::file("read", path))?;
    if !bytes.starts_with(b"\x7fELF") {
        return Err(PackageError::Unfit { path: path.to_owned(), what: "is no ELF program" });
    }
    if needs_an_interpreter(&bytes) {
        return Err(PackageError::Unfit { path: path.to_owned(), what: "needs shared libraries" });
    }
    Ok(bytes)
}

/// Whether a 64-bit little-endian ELF has a program header `PT_INTERP` (elf(5)).
fn needs_an_interpreter(elf: &[u8]) -> bool {
    const PT_INTERP: u64 = 3;
    let number =
        |at: usize, len: usize| -> Option<u64> { Some(elf.get(at..at + len)?.iter().rev().fold(0, |number, byte| (number << 8) | u64::from(*byte))) };
    let headers = || -> Option<(usize, usize, usize)> { Some((number(32, 8)? as usize, number(54, 2)? as usize, number(56, 2)? as usize)) };
    let Some((at, size, count)) = headers() else { return true };
    (0..count).any(|which| number(at + which * size, 4).is_none_or(|kind| kind == PT_INTERP))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_needs_libraries_is_refused() {
        // This test is such a one.
        let own = std::env::current_exe().unwrap();
        assert!(matches!(program(&own), Err(PackageError::Unfit { what: "needs shared libraries", .. })));
        let text = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
        assert!(matches!(program(&text), Err(PackageError::Unfit { what: "is no ELF program", .. })));
    }
}
