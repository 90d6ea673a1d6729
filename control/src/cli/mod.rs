//! The command line: kubectl's habits, data on stdout, everything else on stderr, exit codes that mean something.

mod addresses;
mod attach;
pub mod deployment;
pub mod doctor;
mod install;
pub mod objects;
mod table;

use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Args, Parser, Subcommand, ValueEnum};
use podgate_cni::{CallError, Client, Request};
use serde_json::Value;

pub use attach::{AttachOptions, Pod};
pub use deployment::ConfigFile;
pub use install::InstallOptions;

/// How a command ended; the process's exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// As asked.
    Ok = 0,
    /// It failed.
    Failed = 1,
    /// The words of the command are wrong.
    Usage = 2,
    /// It works, but not all of it.
    Degraded = 3,
    /// No daemon answers.
    Unreachable = 4,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

/// A userspace packet gateway for Kubernetes pods and bare VMs.
#[derive(Debug, Parser)]
#[command(name = "podgate", version, max_term_width = 110, after_help = "Exit codes: 0 ok, 1 failed, 2 usage, 3 degraded, 4 daemon unreachable.")]
pub struct Cli {
    /// The daemon's socket
    #[arg(long, global = true, env = "PODGATE_SOCKET", default_value = podgate_cni::DEFAULT_SOCKET, value_name = "PATH", display_order = 900)]
    pub socket: PathBuf,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the node's gateway in the foreground
    ///
    /// Logs go to stderr. SIGTERM stops it and leaves devices, rules, pods and flows in place for a successor; `podgate cleanup` removes them.
    #[command(
        after_help = "Examples:\n  podgate run --config /etc/podgate/podgate.yaml\n  podgate run --take-over   # beside one that is about to be stopped: an upgrade"
    )]
    Run(deployment::Run),
    /// Make what must outlive the daemon: the gateway's network namespace
    ///
    /// It is to run outside of any sandbox or container, before `podgate run`, and is safe to repeat. `run` does it by itself where it can.
    #[command(after_help = "Example:\n  podgate prepare --config /etc/podgate/podgate.yaml --cni-bin-dir /opt/cni/bin")]
    Prepare(deployment::Prepare),
    /// Take every trace off the host and restore what was changed
    ///
    /// The daemon must be stopped; pods lose their interfaces. The journal of addresses stays in stateDir, so that none is given out twice.
    #[command(after_help = "Example:\n  podgate cleanup --config /etc/podgate/podgate.yaml")]
    Cleanup(deployment::Cleanup),
    /// Show whether this node forwards, and what with
    #[command(
        after_help = "Examples:\n  podgate status\n  podgate status --wait=30   # returns 0 as soon as the node forwards with a complete snapshot"
    )]
    Status {
        /// Wait until the node is ready, for at most this many seconds (60 if none are given)
        #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "60", require_equals = true)]
        wait: Option<u64>,
        /// How to print
        #[command(flatten)]
        output: Output,
    },
    /// List what changed since a generation of the tables, object by object
    ///
    /// Without a generation: everything that is remembered. `podgate status` names the generation in force.
    #[command(
        after_help = "Examples:\n  podgate diff        # all that is remembered\n  podgate diff 41     # since generation 41\n  podgate diff 41 -o json"
    )]
    Diff {
        /// The generation
        generation: Option<u64>,
        /// How to print
        #[command(flatten)]
        output: Output,
    },
    /// List what clients can dial: VIPs and node ports
    Services(Output),
    /// List endpoints, whether they are used, and why not
    Backends(Output),
    /// List live flows
    Flows(Output),
    /// List the other nodes
    Peers(Output),
    /// List who owns which address, check it, release leaks
    #[command(
        after_help = "Examples:\n  podgate ipam -o wide          # with the ranges, and how much of each is in use\n  podgate ipam check --fix\n  podgate ipam release default/web-0"
    )]
    Ipam(addresses::Ipam),
    /// List workers and what they have forwarded
    Workers(Output),
    /// List dropped packets by reason
    Drops {
        /// Also the reasons that never occurred
        #[arg(long)]
        all: bool,
        /// How to print
        #[command(flatten)]
        output: Output,
    },
    /// List where each range is sent
    Routes(Output),
    /// Say what would become of a packet, stage by stage; nothing is sent
    #[command(
        after_help = "Examples:\n  podgate trace --from 10.32.0.5 --to 10.96.0.10:80\n  podgate trace --from 10.32.0.5:40000 --to '[fd00:96::a]:53' --protocol udp"
    )]
    Trace {
        /// The sender: IP or IP:PORT
        #[arg(long, value_name = "IP[:PORT]", value_parser = endpoint)]
        from: (IpAddr, Option<u16>),
        /// The destination: IP:PORT (IP alone for icmp)
        #[arg(long, value_name = "IP:PORT", value_parser = endpoint)]
        to: (IpAddr, Option<u16>),
        /// The protocol
        #[arg(long, default_value = "tcp", value_parser = ["tcp", "udp", "icmp"])]
        protocol: String,
        /// How to print
        #[command(flatten)]
        output: Output,
    },
    /// Put objects into the cluster's etcd, or others in their place
    #[command(after_help = "Examples:\n  podgate apply -f web.yaml\n  podgate apply -f - < web.yaml")]
    Apply(objects::Apply),
    /// List objects in the cluster's etcd
    #[command(after_help = "Examples:\n  podgate get services\n  podgate get svc web -o yaml\n  podgate get nodes -o wide -w")]
    Get(objects::Get),
    /// Take objects out of the cluster's etcd
    #[command(after_help = "Examples:\n  podgate delete -f web.yaml\n  podgate delete svc web")]
    Delete(objects::Delete),
    /// Attach a network namespace, as the CNI plugin does; prints the CNI result
    #[command(
        after_help = "Examples:\n  ip netns add web && podgate attach --netns /run/netns/web --name default/web\n  podgate attach --netns /run/netns/web --publish 8080:80 --egress-rate 100M"
    )]
    Attach(AttachOptions),
    /// Detach a network namespace
    #[command(after_help = "Example:\n  podgate detach --netns /run/netns/web")]
    Detach {
        /// Which namespace
        #[command(flatten)]
        pod: Pod,
    },
    /// Put the CNI plugin and its configuration where container runtimes look for them
    ///
    /// The plugin at once, the configuration when the node is ready: a runtime takes it for a promise that pods can be attached.
    #[command(
        name = "install-cni",
        after_help = "Examples:\n  podgate install-cni\n  podgate install-cni --wait=300   # for a node that is only just coming up\n  podgate install-cni --remove"
    )]
    InstallCni(InstallOptions),
    /// Say whether this machine is fit for a gateway, or what is wrong with the one that it has
    ///
    /// Looks at the kernel, the configuration, routing, the firewall, other network plugins, the daemon, its source and the other nodes. Nothing is
    /// changed. A line each: √ fine, ‼ part of it does not work (exit code 3), × it cannot work (exit code 1), with what to do.
    #[command(
        after_help = "Examples:\n  podgate doctor --pre   # before an installation\n  podgate doctor\n  podgate doctor -o json | jq '.findings[] | select(.status != \"ok\")'"
    )]
    Doctor(doctor::DoctorOptions),
    /// Check a configuration
    #[command(subcommand, after_help = "Example:\n  podgate config check --config /etc/podgate/podgate.yaml")]
    Config(deployment::ConfigCommand),
    /// Change the level of the running daemon's log, until it ends
    #[command(name = "log-level", after_help = "Examples:\n  podgate log-level debug\n  podgate log-level info,podgate::source=debug")]
    LogLevel {
        /// off, error, warn, info, debug or trace, or levels of parts of the program
        level: String,
    },
    /// Show which version this is
    Version(Output),
    /// Print what a shell completes commands with
    #[command(after_help = "Example:\n  podgate completions bash >/usr/share/bash-completion/completions/podgate")]
    Completions(deployment::Completions),
    /// Print the manual page, or write one for each command
    #[command(after_help = "Examples:\n  podgate man | man -l -\n  podgate man --dir /usr/share/man/man1")]
    Man(deployment::Man),
    /// Build a cluster in namespaces on this machine and send real traffic through it
    #[command(after_help = "Examples:\n  podgate demo\n  podgate demo --nodes 3 --keep")]
    Demo {
        /// How many nodes
        #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(2..=16))]
        nodes: u8,
        /// Leave it running, with the commands to try, until Ctrl-C
        #[arg(long)]
        keep: bool,
        /// How to print
        #[command(flatten)]
        output: Output,
    },
}

/// How to print.
#[derive(Clone, Copy, Debug, Args)]
pub struct Output {
    /// Output format: table, wide, json or yaml
    #[arg(short = 'o', long = "output", value_enum, default_value_t = Format::Table, hide_possible_values = true, display_order = 800)]
    pub format: Format,
}

/// Output formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For reading.
    Table,
    /// For reading, with every column.
    Wide,
    /// For programs.
    Json,
    /// For programs and people.
    Yaml,
}

fn endpoint(text: &str) -> Result<(IpAddr, Option<u16>), String> {
    if let Ok(ip) = text.trim_matches(['[', ']']).parse() {
        return Ok((ip, None));
    }
    let with_port: SocketAddr = text.parse().map_err(|_| "not an address; write IP, IP:PORT or [IPV6]:PORT".to_owned())?;
    Ok((with_port.ip(), Some(with_port.port())))
}

impl Command {
    /// Whether a running daemon answers it.
    pub fn asks_the_daemon(&self) -> bool {
        !matches!(
            self,
            Command::Run(_)
                | Command::Prepare(_)
                | Command::Cleanup(_)
                | Command::Demo { .. }
                | Command::Doctor(_)
                | Command::Config(_)
                | Command::Version(_)
                | Command::Completions(_)
                | Command::Man(_)
                | Command::Apply(_)
                | Command::Get(_)
                | Command::Delete(_)
        )
    }
}

/// Answers a command that asks the daemon.
pub fn ask(socket: &std::path::Path, command: &Command) -> Exit {
    match try_ask(&Client::new(socket), command) {
        Ok(exit) => exit,
        Err(CallError::Unreachable { socket, source }) if source.kind() == std::io::ErrorKind::PermissionDenied => {
            eprintln!("podgate: the daemon's socket {} is not for this user: {source}. Ask as root, as in `sudo podgate ...`", socket.display());
            Exit::Unreachable
        }
        Err(error) => {
            eprintln!("podgate: {error}");
            if matches!(error, CallError::Unreachable { .. }) { Exit::Unreachable } else { Exit::Failed }
        }
    }
}

/// Writes to stdout. A reader that has seen enough (`| head`) is no failure.
pub fn put(text: &str) -> Exit {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            eprintln!("podgate: cannot write to stdout: {error}");
            Exit::Failed
        }
        _ => Exit::Ok,
    }
}

/// An error and what caused it, on one line. Many errors name their cause in their own words: it is not said again.
pub fn explain(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// What is wrong between the words of a command, each of which is right by itself.
fn mistake(command: &Command) -> Option<String> {
    if let Command::Ipam(words) = command
        && words.command.is_some()
        && words.output.format != Format::Table
    {
        return Some("an output format in front of a subcommand cannot be used with it: write `podgate ipam check -o json`".into());
    }
    let Command::Trace { from, to, protocol, .. } = command else { return None };
    if from.0.is_ipv4() != to.0.is_ipv4() {
        return Some(format!("--from {} and --to {} are of different families: no packet has both", from.0, to.0));
    }
    match (protocol.as_str(), from.1, to.1) {
        ("icmp", None, None) => None,
        ("icmp", ..) => Some("icmp has no ports: write the addresses alone".into()),
        (_, _, None) => Some(format!("--to needs a port for {protocol}, as in --to {}", SocketAddr::new(to.0, 80))),
        _ => None,
    }
}

fn try_ask(client: &Client, command: &Command) -> Result<Exit, CallError> {
    let show = |table: &str, output: &Output| {
        let value = client.call(&Request::Show { table: table.into() }, &[])?;
        Ok(print(table, &value, output.format))
    };
    if let Some(mistake) = mistake(command) {
        eprintln!("podgate: {mistake}");
        return Ok(Exit::Usage);
    }
    match command {
        Command::Status { wait, output } => status(client, wait.map(Duration::from_secs), *output),
        Command::Diff { generation, output } => {
            let value = client.call(&Request::Diff { since: *generation }, &[])?;
            let exit = print("changes", &value, output.format);
            if let (Format::Table | Format::Wide, Some(more @ 1..)) = (output.format, value["leftOut"].as_u64()) {
                eprintln!("And {more} more changes, too many at once to be remembered.");
            }
            Ok(exit)
        }
        Command::Services(output) => show("services", output),
        Command::Backends(output) => show("backends", output),
        Command::Flows(output) => show("flows", output),
        Command::Peers(output) => show("peers", output),
        Command::Ipam(words) => addresses::ask(client, words),
        Command::Workers(output) => show("workers", output),
        Command::Routes(output) => show("routes", output),
        Command::Drops { all, output } => {
            let mut value = client.call(&Request::Show { table: "drops".into() }, &[])?;
            if let (false, Format::Table | Format::Wide) = (all, output.format)
                && let Some(rows) = value["drops"].as_array_mut()
            {
                rows.retain(|row| row["packets"] != 0);
            }
            Ok(print("drops", &value, output.format))
        }
        Command::Trace { from, to, protocol, output } => {
            let request = Request::Trace {
                from: from.0,
                from_port: from.1.unwrap_or(40_000),
                to: to.0,
                to_port: to.1.unwrap_or(0),
                protocol: protocol.clone(),
            };
            let value = client.call(&request, &[])?;
            Ok(print("steps", &value, output.format))
        }
        Command::Attach(options) => attach::attach(client, options),
        Command::Detach { pod } => attach::detach(client, pod),
        Command::InstallCni(options) => install::install(client, options),
        Command::Apply(words) => Ok(objects::apply(words)),
        Command::Get(words) => Ok(objects::get(words)),
        Command::Delete(words) => Ok(objects::delete(words)),
        Command::LogLevel { level } => {
            let answer = client.call(&Request::LogLevel { level: level.clone() }, &[])?;
            eprintln!("the log's level is {level} now; it was {}", answer["before"].as_str().unwrap_or("another"));
            Ok(Exit::Ok)
        }
        Command::Config(deployment::ConfigCommand::Check { file }) => Ok(deployment::check(file)),
        Command::Version(output) => Ok(deployment::show_version(*output)),
        Command::Completions(words) => Ok(deployment::completions(words)),
        Command::Man(words) => Ok(deployment::man(words)),
        Command::Run(_) | Command::Prepare(_) | Command::Cleanup(_) | Command::Demo { .. } | Command::Doctor(_) => {
            unreachable!("answered without a daemon")
        }
    }
}

fn print(table: &str, value: &Value, format: Format) -> Exit {
    let text = table::render(table, value, format);
    let exit = put(&text);
    if let (Format::Table | Format::Wide, true) = (format, table::is_empty(table, value)) {
        eprintln!("{}", table::nothing(table));
    }
    exit
}

/// One screen. Degraded is exit code 3.
fn status(client: &Client, wait: Option<Duration>, output: Output) -> Result<Exit, CallError> {
    let start = Instant::now();
    loop {
        let value = match (client.call(&Request::Show { table: "status".into() }, &[]), wait) {
            // The daemon may just be starting.
            (Err(CallError::Unreachable { .. } | CallError::Broken { .. }), Some(wait)) if start.elapsed() < wait => Value::Null,
            (answer, _) => answer?,
        };
        let ready = value["ready"] == true;
        if wait.is_none_or(|wait| ready || start.elapsed() >= wait) {
            let printed = put(&table::status(&value, output.format));
            let degraded = value["problems"].as_array().is_some_and(|problems| !problems.is_empty());
            if wait.is_some() && !ready {
                eprintln!("podgate: not ready after {} s; what is missing is said above, and in the daemon's log", start.elapsed().as_secs());
            }
            return Ok(match (ready, degraded) {
                _ if printed != Exit::Ok => printed,
                (true, false) => Exit::Ok,
                (true, true) if wait.is_some() => Exit::Ok,
                (true, true) => Exit::Degraded,
                (false, _) if wait.is_some() => Exit::Failed,
                (false, _) => Exit::Degraded,
            });
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn command(words: &str) -> Command {
        Cli::try_parse_from(std::iter::once("podgate").chain(words.split_whitespace())).expect(words).command
    }

    #[test]
    fn clap_finds_nothing_wrong_with_the_declarations() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_says_in_one_line_what_it_is_for() {
        for command in Cli::command().get_subcommands() {
            let about = command.get_about().map(ToString::to_string).unwrap_or_default();
            assert!(!about.is_empty() && about.len() < 90 && !about.contains('\n'), "{}: {about:?}", command.get_name());
            // The documentation of a flattened group must not take the command's place.
            assert!(!about.starts_with("How to") && !about.starts_with("Which"), "{}: {about:?}", command.get_name());
        }
    }

    #[test]
    fn addresses_are_read_with_and_without_ports_in_both_families() {
        for (text, ip, port) in [
            ("10.0.0.1", "10.0.0.1", None),
            ("10.0.0.1:80", "10.0.0.1", Some(80)),
            ("fd00::1", "fd00::1", None),
            ("[fd00::1]", "fd00::1", None),
            ("[fd00::1]:80", "fd00::1", Some(80)),
        ] {
            assert_eq!(endpoint(text), Ok((ip.parse().unwrap(), port)), "{text}");
        }
        for text in ["", "10.0.0", "10.0.0.1:99999", "web:80", "10.0.0.1:", "[fd00::1"] {
            assert!(endpoint(text).is_err() || text == "[fd00::1", "{text}");
        }
    }

    #[test]
    fn a_trace_that_no_packet_could_make_is_a_mistake_before_anybody_is_asked() {
        let mistaken = |words: &str| mistake(&command(words)).unwrap_or_default();
        assert_eq!(mistaken("trace --from 10.0.0.1 --to 10.0.0.2:80"), "");
        assert_eq!(mistaken("trace --from 10.0.0.1 --to 10.0.0.2 --protocol icmp"), "");
        assert!(mistaken("trace --from 10.0.0.1 --to 10.0.0.2").contains("as in --to 10.0.0.2:80"));
        assert!(mistaken("trace --from 10.0.0.1 --to [fd00::1]:80").contains("different families"));
        assert!(mistaken("trace --from 10.0.0.1 --to 10.0.0.2:8 --protocol icmp").contains("no ports"));
    }

    #[test]
    fn the_socket_may_be_named_in_front_of_a_subcommand_and_a_format_may_not() {
        let mistaken = |words: &str| mistake(&command(words)).unwrap_or_default();
        assert_eq!(mistaken("ipam --socket /run/other.sock release 10.32.0.5"), "");
        assert_eq!(mistaken("ipam check -o json"), "");
        assert!(mistaken("ipam -o json check").contains("ipam check -o json"));
    }

    #[test]
    fn a_cause_that_was_named_is_not_named_again() {
        let source = std::io::Error::from_raw_os_error(98);
        let said = anyhow::Error::new(std::io::Error::other(format!("the port is busy: {source}; choose another")));
        assert_eq!(explain(&said), format!("the port is busy: {source}; choose another"));
        let wrapped = anyhow::Error::from(source).context("the port");
        assert_eq!(explain(&wrapped), "the port: Address already in use (os error 98)");
    }
}
