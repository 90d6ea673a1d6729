//! The command line: kubectl's habits, data on stdout, everything else on stderr, exit codes that mean something.

mod table;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Args, Parser, Subcommand, ValueEnum};
use podgate_cni::{Attachment, CallError, Client, Request};
use serde_json::Value;

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
    #[arg(long, global = true, env = "PODGATE_SOCKET", default_value = podgate_cni::DEFAULT_SOCKET, value_name = "PATH")]
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
    #[command(after_help = "Example:\n  podgate run --config /etc/podgate/podgate.yaml")]
    Run(ConfigFile),
    /// Make what must outlive the daemon: the gateway's network namespace
    Prepare(ConfigFile),
    /// Take every trace off the host and restore what was changed
    Cleanup(ConfigFile),
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
    /// List what clients can dial: VIPs and node ports
    Services(Output),
    /// List endpoints, whether they are used, and why not
    Backends(Output),
    /// List live flows
    Flows(Output),
    /// List the other nodes
    Peers(Output),
    /// List who owns which address
    Ipam(Output),
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
    /// Attach a network namespace, as the CNI plugin does; prints the CNI result
    #[command(after_help = "Example:\n  ip netns add web && podgate attach --netns /run/netns/web --name default/web")]
    Attach {
        /// Which namespace
        #[command(flatten)]
        pod: Pod,
        /// The pod's name, for people: NAMESPACE/NAME
        #[arg(long, value_name = "NS/NAME")]
        name: Option<String>,
    },
    /// Detach a network namespace
    Detach {
        /// Which namespace
        #[command(flatten)]
        pod: Pod,
    },
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

/// Which configuration.
#[derive(Debug, Args)]
pub struct ConfigFile {
    /// The configuration file
    #[arg(long, value_name = "FILE", default_value = "/etc/podgate/podgate.yaml")]
    pub config: PathBuf,
}

/// Which namespace.
#[derive(Debug, Args)]
pub struct Pod {
    /// The network namespace, as a path
    #[arg(long, value_name = "PATH")]
    pub netns: PathBuf,
    /// The interface to make in it
    #[arg(long, default_value = "eth0")]
    pub ifname: String,
}

/// How to print.
#[derive(Clone, Copy, Debug, Args)]
pub struct Output {
    /// Output format
    #[arg(short = 'o', long = "output", value_enum, default_value_t = Format::Table)]
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

/// Answers a command that asks the daemon.
pub fn ask(socket: &std::path::Path, command: &Command) -> Exit {
    match try_ask(&Client::new(socket), command) {
        Ok(exit) => exit,
        Err(error) => {
            eprintln!("podgate: {error}");
            if matches!(error, CallError::Unreachable { .. }) { Exit::Unreachable } else { Exit::Failed }
        }
    }
}

fn try_ask(client: &Client, command: &Command) -> Result<Exit, CallError> {
    let show = |table: &str, output: &Output| {
        let value = client.call(&Request::Show { table: table.into() }, &[])?;
        table::print(table, &value, output.format);
        Ok(Exit::Ok)
    };
    match command {
        Command::Status { wait, output } => status(client, wait.map(Duration::from_secs), *output),
        Command::Services(output) => show("services", output),
        Command::Backends(output) => show("backends", output),
        Command::Flows(output) => show("flows", output),
        Command::Peers(output) => show("peers", output),
        Command::Ipam(output) => show("ipam", output),
        Command::Workers(output) => show("workers", output),
        Command::Routes(output) => show("routes", output),
        Command::Drops { all, output } => {
            let mut value = client.call(&Request::Show { table: "drops".into() }, &[])?;
            if let (false, Format::Table | Format::Wide) = (all, output.format)
                && let Some(rows) = value["drops"].as_array_mut()
            {
                rows.retain(|row| row["packets"] != 0);
            }
            table::print("drops", &value, output.format);
            Ok(Exit::Ok)
        }
        Command::Trace { from, to, protocol, output } => {
            let request = Request::Trace {
                from: from.0,
                from_port: from.1.unwrap_or(40_000),
                to: to.0,
                to_port: to.1.unwrap_or(0),
                protocol: protocol.clone(),
            };
            if protocol != "icmp" && to.1.is_none() {
                eprintln!("podgate: --to needs a port for {protocol}, as in --to {}", SocketAddr::new(to.0, 80));
                return Ok(Exit::Usage);
            }
            let value = client.call(&request, &[])?;
            table::print("steps", &value, output.format);
            Ok(Exit::Ok)
        }
        Command::Attach { pod, name } => {
            let netns = match std::fs::File::open(&pod.netns) {
                Ok(file) => file,
                Err(e) => {
                    eprintln!(
                        "podgate: the network namespace {} cannot be opened: {e}. `ip netns add NAME` makes /run/netns/NAME",
                        pod.netns.display()
                    );
                    return Ok(Exit::Failed);
                }
            };
            use std::os::fd::AsFd;
            let request = Request::Attach(Attachment { name: name.clone(), ..attachment(pod) });
            let result = client.call(&request, &[netns.as_fd()])?;
            println!("{}", serde_json::to_string_pretty(&result).expect("a value is always JSON"));
            Ok(Exit::Ok)
        }
        Command::Detach { pod } => {
            client.call(&Request::Detach(attachment(pod)), &[])?;
            Ok(Exit::Ok)
        }
        Command::Run(_) | Command::Prepare(_) | Command::Cleanup(_) | Command::Demo { .. } => unreachable!("answered without a daemon"),
    }
}

fn attachment(pod: &Pod) -> Attachment {
    Attachment { sandbox: pod.netns.to_string_lossy().into_owned(), ifname: pod.ifname.clone(), name: None }
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
            table::print_status(&value, output.format);
            let degraded = value["problems"].as_array().is_some_and(|problems| !problems.is_empty());
            return Ok(match (ready, degraded) {
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
