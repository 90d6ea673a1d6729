//! `cargo run -p podgate-package -- image` and `... -- deb`: what is shipped, packed from the two static programs alone, without an engine, a
//! base image or any download. The same input gives the same bytes.
//!
//! In order: [`inputs`] builds or finds the programs, [`sbom`] says what is in them, [`image`] and [`deb`] pack them with [`archive`].

mod archive;
mod deb;
mod image;
mod inputs;
mod sbom;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "podgate-package", about = "Packs Podgate: an OCI image and a Debian package, without any other tool")]
struct Cli {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// An OCI image: a layout (`oci/`), the same as an archive (`podgate-VERSION-oci.tar`) and a list of what is in it (`sbom.cdx.json`)
    Image(Options),
    /// A Debian package (`podgate_VERSION_ARCH.deb`)
    Deb(Options),
}

/// What is packed, and where to.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Directory to write into
    #[arg(long, value_name = "DIR", default_value = "target/package")]
    output: PathBuf,
    /// Cargo profile that the programs are built in
    #[arg(long, default_value = "release")]
    profile: String,
    /// A static `podgate` that was built already
    #[arg(long, value_name = "FILE", requires = "podgate_cni")]
    podgate: Option<PathBuf>,
    /// A static `podgate-cni` that was built already
    #[arg(long, value_name = "FILE", requires = "podgate")]
    podgate_cni: Option<PathBuf>,
}

/// Why there is no package.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PackageError {
    /// A file or directory.
    #[error("cannot {operation} {path}: {source}")]
    File { operation: &'static str, path: PathBuf, source: std::io::Error },
    /// A program that is needed for it.
    #[error("`{command}` {how}; it must work in this workspace")]
    Program { command: String, how: String },
    /// A program that is not what it should be.
    #[error("{path} {what}: build it with `-C target-feature=+crt-static`, or leave --podgate and --podgate-cni out")]
    Unfit { path: PathBuf, what: &'static str },
    /// An architecture that has no name here.
    #[error("what is built for {0} cannot be packed: only x86_64 and aarch64 have a name in images and Debian packages here")]
    Architecture(&'static str),
}

impl PackageError {
    /// For `map_err` on an operation on a file.
    fn file(operation: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> PackageError {
        let path = path.into();
        move |source| PackageError::File { operation, path, source }
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let packed = match &cli.what {
        What::Image(options) => inputs::Inputs::of(options).and_then(|inputs| image::write(&inputs, &options.output)),
        What::Deb(options) => inputs::Inputs::of(options).and_then(|inputs| deb::write(&inputs, &options.output)),
    };
    match packed {
        Ok(lines) => {
            lines.iter().for_each(|line| println!("{line}"));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("podgate-package: {error}");
            ExitCode::FAILURE
        }
    }
}
