//! `podgate-bench`: Podgate end to end, beside its peers.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use podgate_bench::e2e::{self, Options};

#[derive(Debug, Parser)]
#[command(name = "podgate-bench", version, about = "Podgate's figures, beside what else could carry the packets")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Real traffic through real devices in namespaces made for it, each subject in turn (needs root, or user namespaces)
    E2e(Options),
}

fn main() -> ExitCode {
    let Cli { command: Command::E2e(options) } = Cli::parse();
    e2e::main(&options)
}
