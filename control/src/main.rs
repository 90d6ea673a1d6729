//! `podgate`: the gateway's daemon and command line.

use std::process::ExitCode;

use clap::parser::ValueSource;
use clap::{CommandFactory, FromArgMatches};
use podgate::cli::{self, Cli, Command, Exit};

fn main() -> ExitCode {
    let matches = Cli::command().get_matches();
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    if !cli.command.asks_the_daemon() && matches.value_source("socket") == Some(ValueSource::CommandLine) {
        eprintln!("podgate: --socket is for commands that ask the daemon; the daemon's own socket is <runtimeDir>/podgate.sock of its podgate.yaml");
        return Exit::Usage.into();
    }
    let done = match &cli.command {
        Command::Run(file) => run(file).map(|()| Exit::Ok),
        Command::Prepare(file) => prepare(file).map(|()| Exit::Ok),
        Command::Cleanup(file) => cleanup(file),
        Command::Doctor(options) => return cli::doctor::doctor(options, &cli.socket).into(),
        Command::Demo { nodes, keep, output } => return demo(*nodes, *keep, output.format),
        command => return cli::ask(&cli.socket, command).into(),
    };
    match done {
        Ok(exit) => exit.into(),
        Err(error) => {
            eprintln!("podgate: {}", cli::explain(&error));
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
    // The client of the API server logs each failed attempt as an error; the source says it once, and what it means.
    let filter = tracing_subscriber::EnvFilter::try_from_env("PODGATE_LOG").unwrap_or_else(|_| "info,kube_client=off".into());
    let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(ansi).with_target(false).init();
    // Whoever started this process may have blocked signals for itself, and the mask is inherited: SIGTERM must arrive.
    nix::sys::signal::SigSet::empty().thread_set_mask()?;
    let config = podgate::config::Config::load(&file.config)?;
    podgate::privileges::check()?;
    podgate::daemon::run(config)
}

fn prepare(file: &cli::ConfigFile) -> anyhow::Result<()> {
    let config = podgate::config::Config::load(&file.config)?;
    podgate::privileges::check()?;
    let gateway = podgate::gateway_ns::prepare(&config.runtime_dir)?;
    eprintln!("the gateway's namespace is at {}", gateway.path().display());
    Ok(())
}

fn cleanup(file: &cli::ConfigFile) -> anyhow::Result<Exit> {
    use podgate::host_state::{Traces, cleanup};
    let config = podgate::config::Config::load(&file.config)?;
    podgate::privileges::check()?;
    // Taking the lock makes these two: they are no traces then.
    let made_here: Vec<_> = [config.runtime_dir.clone(), config.runtime_dir.join("lock")].into_iter().filter(|path| !path.exists()).collect();
    let _lock = podgate::daemon::lock(&config.runtime_dir)?;
    let node = podgate_runtime::netns::Netns::current()?;
    podgate::daemon::refuse_beside_another(&podgate::netlink::Netlink::open(&node)?, &config.devices.host)?;
    let runtime_files = &["podgate.sock", "lock", "flows"];
    let traces = Traces { runtime_dir: &config.runtime_dir, runtime_files, state_dir: &config.state_dir, host_device: &config.devices.host };
    let mut cleaned = cleanup(&node, &traces)?;
    cleaned.removed.retain(|what| !made_here.iter().any(|path| *what == path.display().to_string()));
    if cleaned.removed.is_empty() && cleaned.kept.is_empty() {
        eprintln!("podgate: nothing to take away: no gateway of this configuration has been here");
    }
    let exit = cli::put(&cleaned.removed.iter().map(|what| format!("removed {what}\n")).collect::<String>());
    for what in &cleaned.kept {
        eprintln!("podgate: not restored: {what}");
    }
    match cleaned.kept.len() {
        0 => return Ok(exit),
        1 => eprintln!("podgate: one thing could not be restored; it is named above"),
        count => eprintln!("podgate: {count} things could not be restored; they are named above"),
    }
    Ok(Exit::Failed)
}
