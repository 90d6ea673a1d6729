//! `podgate doctor`.

use std::path::{Path, PathBuf};

use clap::Args;

use super::{Exit, Format, Output, put, table};
use crate::doctor::{self, Names, Stage, Status};
use crate::install_cni::Places;

/// What to look at, and how to print it.
#[derive(Debug, Args)]
pub struct DoctorOptions {
    /// Look only at what must be there before an installation
    #[arg(long)]
    pub pre: bool,
    /// The configuration file
    #[arg(long, value_name = "FILE", default_value = "/etc/podgate/podgate.yaml")]
    pub config: PathBuf,
    /// Where runtimes look for plugins
    #[arg(long, value_name = "DIR", default_value = "/opt/cni/bin")]
    pub bin_dir: PathBuf,
    /// Where they look for network configurations
    #[arg(long, value_name = "DIR", default_value = "/etc/cni/net.d")]
    pub conf_dir: PathBuf,
    /// The file name of our network configuration
    #[arg(long, value_name = "NAME", default_value = "10-podgate.conflist")]
    pub conf_name: String,
    /// How to print
    #[command(flatten)]
    pub output: Output,
}

/// Looks, and prints what was found. `socket` is the daemon's where the configuration cannot say it.
pub fn doctor(options: &DoctorOptions, socket: &Path) -> Exit {
    let report = doctor::examine(&doctor::Options {
        stage: if options.pre { Stage::Before } else { Stage::Installed },
        config: options.config.clone(),
        socket: socket.to_owned(),
        places: Places { bin_dir: options.bin_dir.clone(), conf_dir: options.conf_dir.clone(), conf_name: options.conf_name.clone() },
    });
    let printed = put(&match options.output.format {
        Format::Table => report.text(Names::Hidden),
        Format::Wide => report.text(Names::Shown),
        Format::Json | Format::Yaml => table::raw(&report.json(), options.output.format),
    });
    match report.status() {
        _ if printed != Exit::Ok => printed,
        Status::Ok => Exit::Ok,
        Status::Warning => Exit::Degraded,
        Status::Failure => Exit::Failed,
    }
}
