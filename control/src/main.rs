//! `podgate`: the gateway's daemon and command line.

use std::process::ExitCode;

use clap::Parser;
use podgate::cli::{self, Cli, Command, Exit};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match &cli.command {
        Command::Run(file) => run(file),
        Command::Prepare(file) => prepare(file),
        Command::Cleanup(file) => cleanup(file),
        Command::Demo { nodes, keep, output } => return demo(*nodes, *keep, output.format),
        command => return cli::ask(&cli.socket, command).into(),
    };
    match done {
        Ok(()) => Exit::Ok.into(),
        Err(error) => {
            eprintln!("podgate: {error:#}");
            Exit::Failed.into()
        }
    }
}

fn demo(nodes: u8, keep: bool, format: cli::Format) -> ExitCode {
    use podgate::demo::{Afterwards, Format, Options, main};
    let afterwards = if keep { Afterwards::Keep } else { Afterwards::End };
    let format = match format {
        cli::Format::Json => Format::Json,
        cli::Format::Table | cli::Format::Wide => Format::Text,
        cli::Format::Yaml => {
            eprintln!("podgate: the demo prints a table or JSON: leave -o out, or say -o json");
            return Exit::Usage.into();
        }
    };
    main(&Options { nodes, afterwards, format, bulk_len: podgate::lab::program::bulk::LEN })
}

fn run(file: &cli::ConfigFile) -> anyhow::Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_from_env("PODGATE_LOG").unwrap_or_else(|_| "info".into());
    let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(ansi).with_target(false).init();
    // Whoever started this process may have blocked signals for itself, and the mask is inherited: SIGTERM must arrive.
    nix::sys::signal::SigSet::empty().thread_set_mask()?;
    let config = podgate::config::Config::load(&file.config)?;
    podgate::daemon::run(config)
}

fn prepare(file: &cli::ConfigFile) -> anyhow::Result<()> {
    let config = podgate::config::Config::load(&file.config)?;
    let gateway = podgate::gateway_ns::prepare(&config.runtime_dir)?;
    eprintln!("the gateway's namespace is at {}", gateway.path().display());
    Ok(())
}

fn cleanup(file: &cli::ConfigFile) -> anyhow::Result<()> {
    use podgate::host_state::{Traces, cleanup};
    let config = podgate::config::Config::load(&file.config)?;
    let _lock = podgate::daemon::lock(&config.runtime_dir)?;
    let node = podgate_runtime::netns::Netns::current()?;
    let runtime_files = &["podgate.sock", "lock", "flows"];
    let traces = Traces { runtime_dir: &config.runtime_dir, runtime_files, state_dir: &config.state_dir, host_device: &config.devices.host };
    let cleaned = cleanup(&node, &traces)?;
    for what in &cleaned.removed {
        println!("removed {what}");
    }
    for what in &cleaned.kept {
        eprintln!("podgate: not restored: {what}");
    }
    anyhow::ensure!(cleaned.kept.is_empty(), "{} things could not be restored; they are named above", cleaned.kept.len());
    Ok(())
}
