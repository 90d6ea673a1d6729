//! `podgate-bench`: Podgate end to end, beside its peers.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use podgate_bench::{attach, e2e, limits};

#[derive(Debug, Parser)]
#[command(name = "podgate-bench", version, about = "Podgate's figures, beside what else could carry the packets")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Real traffic through real devices in namespaces made for it, each subject in turn (needs root, or user namespaces)
    E2e(e2e::Options),
    /// Many containers attached at once, beside the reference CNI plugins (needs root, or user namespaces)
    Attach(attach::Options),
    /// Whether pods' bandwidth limits hold, TCP and UDP, both directions (needs root, or user namespaces)
    Limits(limits::Options),
}

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::E2e(options) => e2e::main(&options),
        Command::Attach(options) => attach::main(&options),
        Command::Limits(options) => limits::main(&options),
    }
}
