//! The commands of whoever installs a gateway: init containers, units and packages.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use clap::{Args, CommandFactory, Subcommand};
use clap_complete::Shell;
use serde_json::{Value, json};

use super::{Cli, Exit, Output, put};
use crate::config::{Config, ConfigError, Given};
use crate::install_cni::Places;
use crate::logging::Form;

/// Which configuration, and what of this node it leaves out.
#[derive(Debug, Args)]
pub struct ConfigFile {
    /// The configuration file
    #[arg(long, value_name = "FILE", default_value = "/etc/podgate/podgate.yaml")]
    pub config: PathBuf,
    /// This node's name, where the file has none [default: the host's name]
    #[arg(long, value_name = "NAME", env = "PODGATE_NODE")]
    pub node: Option<String>,
    /// This node's underlay address, where the file has none: one, or one of each family
    #[arg(long, value_name = "IP,...", env = "PODGATE_UNDERLAY", value_delimiter = ',')]
    pub underlay: Vec<IpAddr>,
}

impl ConfigFile {
    /// Reads and checks it.
    pub fn load(&self) -> Result<Config, ConfigError> {
        Config::load_for(&self.config, &Given { node: self.node.clone(), underlay: self.underlay.clone() })
    }
}

/// Where a container runtime on this machine looks for plugins and configurations, as far as that is this command's to care for.
#[derive(Debug, Args)]
pub struct CniPlaces {
    /// The CNI plugin is kept here as well
    #[arg(long, value_name = "DIR")]
    pub cni_bin_dir: Option<PathBuf>,
    /// The CNI configuration is kept here as well
    #[arg(long, value_name = "DIR")]
    pub cni_conf_dir: Option<PathBuf>,
    /// The configuration's file name
    #[arg(long, value_name = "NAME", default_value = "10-podgate.conflist")]
    pub cni_conf_name: String,
}

impl CniPlaces {
    /// Both places; one that was not named is nowhere.
    pub fn places(&self) -> Places {
        Places {
            bin_dir: self.cni_bin_dir.clone().unwrap_or_default(),
            conf_dir: self.cni_conf_dir.clone().unwrap_or_default(),
            conf_name: self.cni_conf_name.clone(),
        }
    }
}

/// How the gateway is run.
#[derive(Debug, Args)]
pub struct Run {
    /// Which configuration
    #[command(flatten)]
    pub file: ConfigFile,
    /// If a gateway runs already, take over from it, instead of refusing
    ///
    /// It is asked to hand the node over, and waits from then on for this one's end. One that cannot be asked is waited for.
    #[arg(long)]
    pub take_over: bool,
    /// Be the process that starts the gateway, keeps its descriptors and starts it again when it ends: process 1 of a container
    ///
    /// SIGTERM ends both; SIGHUP starts the gateway again, with its configuration read anew. Under systemd the unit does this.
    #[arg(long)]
    pub supervise: bool,
    /// Put the CNI configuration into this directory as soon as the node is ready
    #[arg(long, value_name = "DIR")]
    pub cni_conf_dir: Option<PathBuf>,
    /// The configuration's file name
    #[arg(long, value_name = "NAME", default_value = "10-podgate.conflist")]
    pub cni_conf_name: String,
    /// The form of the log
    #[arg(long, value_enum, default_value_t = Form::Text)]
    pub log_format: Form,
}

/// What is prepared.
#[derive(Debug, Args)]
pub struct Prepare {
    /// Which configuration
    #[command(flatten)]
    pub file: ConfigFile,
    /// The plugin is installed, and a configuration of an earlier boot is taken away
    #[command(flatten)]
    pub cni: CniPlaces,
}

/// What is cleaned up.
#[derive(Debug, Args)]
pub struct Cleanup {
    /// Which configuration
    #[command(flatten)]
    pub file: ConfigFile,
    /// Both are taken away
    #[command(flatten)]
    pub cni: CniPlaces,
    /// Afterwards, wait for SIGTERM: a DaemonSet's container must not end
    #[arg(long)]
    pub stay: bool,
}

/// Things to do with a configuration.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Check a configuration without doing anything
    Check {
        /// Which configuration
        #[command(flatten)]
        file: ConfigFile,
    },
}

/// What the shell completes.
#[derive(Debug, Args)]
pub struct Completions {
    /// Which shell
    pub shell: Shell,
}

/// Where man pages go.
#[derive(Debug, Args)]
pub struct Man {
    /// Write one page for each command into this directory, instead of podgate(1) to stdout
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
}

/// `podgate config check`.
pub fn check(file: &ConfigFile) -> Exit {
    match file.load() {
        Ok(config) => {
            eprintln!("{}: right, for node {} with {} as its source", file.config.display(), config.node, config.source.kind());
            Exit::Ok
        }
        Err(error) => {
            eprintln!("podgate: {error}");
            Exit::Failed
        }
    }
}

/// What this program is.
pub fn version() -> Value {
    json!({
        "schemaVersion": 1,
        "version": env!("CARGO_PKG_VERSION"),
        "commit": option_env!("PODGATE_COMMIT"),
        "platform": format!("{}/{}", std::env::consts::OS, std::env::consts::ARCH),
        "overlay": "vxlan-gpe",
        "cniVersions": podgate_cni::result::VERSIONS,
    })
}

/// `podgate version`.
pub fn show_version(output: Output) -> Exit {
    let value = version();
    match output.format {
        super::Format::Json => put(&format!("{value:#}\n")),
        super::Format::Yaml => put(&super::table::render("version", &value, super::Format::Yaml)),
        super::Format::Table | super::Format::Wide => {
            let commit = value["commit"].as_str().map(|commit| format!(" ({commit})")).unwrap_or_default();
            put(&format!("podgate {}{commit}\n", env!("CARGO_PKG_VERSION")))
        }
    }
}

/// `podgate completions`.
pub fn completions(words: &Completions) -> Exit {
    let mut text = Vec::new();
    clap_complete::generate(words.shell, &mut Cli::command(), "podgate", &mut text);
    put(&String::from_utf8_lossy(&text))
}

/// `podgate man`.
pub fn man(words: &Man) -> Exit {
    let written = match &words.dir {
        Some(dir) => std::fs::create_dir_all(dir).and_then(|()| pages(dir)),
        None => {
            let mut text = Vec::new();
            match clap_mangen::Man::new(Cli::command()).render(&mut text) {
                Ok(()) => return put(&String::from_utf8_lossy(&text)),
                failed => failed,
            }
        }
    };
    match written {
        Ok(()) => Exit::Ok,
        Err(error) => {
            eprintln!("podgate: the pages cannot be written: {error}; name a directory that can be with --dir");
            Exit::Failed
        }
    }
}

/// A page for the program and one for each of its commands.
fn pages(dir: &Path) -> std::io::Result<()> {
    clap_mangen::generate_to(Cli::command(), dir)
}
