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
        Command::Run(words) => run(words),
        Command::Prepare(words) => prepare(words).map(|()| Exit::Ok.into()),
        Command::Cleanup(words) => cleanup(words).map(ExitCode::from),
        Command::Doctor(options) => return cli::doctor::doctor(options, &cli.socket).into(),
        Command::Demo { nodes, keep, output } => return demo(*nodes, *keep, output.format),
        command => return cli::ask(&cli.socket, command).into(),
    };
    match done {
        Ok(code) => code,
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

fn run(words: &cli::deployment::Run) -> anyhow::Result<ExitCode> {
    // First of all: the numbers must be those that this process was started with.
    let found = podgate_runtime::handed::inherited();
    podgate::logging::start(words.log_format);
    // Whoever started this process may have blocked signals for itself, and the mask is inherited: SIGTERM must arrive.
    nix::sys::signal::SigSet::empty().thread_set_mask()?;
    let config = words.file.load()?;
    podgate::privileges::check()?;
    if words.supervise {
        return podgate::keeper::supervisor::supervise(&config.runtime_dir);
    }
    podgate::privileges::open_sysctls()?;
    let predecessor = match words.take_over {
        true => podgate::daemon::Predecessor::Relieved,
        false => podgate::daemon::Predecessor::Refused,
    };
    let cni = words.cni_conf_dir.as_ref().map(|conf_dir| podgate::install_cni::Places {
        bin_dir: std::path::PathBuf::new(),
        conf_dir: conf_dir.clone(),
        conf_name: words.cni_conf_name.clone(),
    });
    let store = podgate::keeper::Store::new(podgate::notify::Notifier::from_environment()?, found);
    podgate::daemon::run(config, podgate::daemon::Start { predecessor, store, cni })?;
    Ok(Exit::Ok.into())
}

fn prepare(words: &cli::deployment::Prepare) -> anyhow::Result<()> {
    let config = words.file.load()?;
    podgate::privileges::check()?;
    let places = words.cni.places();
    // In a boot in which nothing was prepared yet, a configuration is one of the last boot: a promise that nobody keeps.
    if words.cni.cni_conf_dir.is_some()
        && podgate::gateway_ns::GatewayNs::open(&config.runtime_dir).is_err()
        && let Some(removed) = places.remove_configuration()?
    {
        eprintln!("removed {}, of an earlier boot", removed.display());
    }
    let gateway = podgate::gateway_ns::prepare(&config.runtime_dir)?;
    eprintln!("the gateway's namespace is at {}", gateway.path().display());
    if words.cni.cni_bin_dir.is_some() {
        let beside = std::env::current_exe()?.with_file_name(podgate::install_cni::PLUGIN);
        let done = if places.install_plugin(&beside)? { "installed" } else { "unchanged" };
        eprintln!("{done} {}", places.plugin().display());
    }
    Ok(())
}

fn cleanup(words: &cli::deployment::Cleanup) -> anyhow::Result<Exit> {
    // Whoever stops it meanwhile is heard at the end.
    let mut stop = nix::sys::signal::SigSet::empty();
    if words.stay {
        stop.add(nix::sys::signal::SIGTERM);
        stop.add(nix::sys::signal::SIGINT);
        stop.thread_block()?;
    }
    let exit = clean(words)?;
    if words.stay {
        eprintln!("podgate: done; waiting for SIGTERM");
        stop.wait()?;
    }
    Ok(exit)
}

fn clean(words: &cli::deployment::Cleanup) -> anyhow::Result<Exit> {
    use podgate::host_state::{Traces, cleanup};
    let config = words.file.load()?;
    podgate::privileges::check()?;
    // The configuration first: nobody is to be promised a network any more.
    let places = words.cni.places();
    let mut files = Vec::new();
    if words.cni.cni_conf_dir.is_some() {
        files.extend(places.remove_configuration()?);
    }
    if words.cni.cni_bin_dir.is_some() {
        files.extend(places.remove_plugin()?);
    }
    // Taking the lock makes these two: they are no traces then.
    let made_here: Vec<_> = [config.runtime_dir.clone(), config.runtime_dir.join("lock")].into_iter().filter(|path| !path.exists()).collect();
    let _lock = podgate::daemon::lock(&config.runtime_dir)?;
    let node = podgate_runtime::netns::Netns::current()?;
    podgate::daemon::refuse_beside_another(&podgate::netlink::Netlink::open(&node)?, &config.devices.host)?;
    podgate::keeper::supervisor::remove_abandoned(&config.runtime_dir);
    let runtime_files = &["podgate.sock", podgate::daemon::HANDOVER_SOCKET, "lock", "flows"];
    let traces = Traces { runtime_dir: &config.runtime_dir, runtime_files, state_dir: &config.state_dir, host_device: &config.devices.host };
    let (removed, kept) = podgate::pods::remove_tuns(&config.state_dir);
    let mut cleaned = cleanup(&node, &traces)?;
    cleaned.removed.splice(0..0, removed);
    cleaned.kept.extend(kept);
    cleaned.removed.extend(files.iter().map(|path| path.display().to_string()));
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
