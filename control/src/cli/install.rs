//! `podgate install-cni`.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use podgate_cni::{CallError, Client, Request};

use super::{Exit, put};
use crate::install_cni::{self, InstallError, Places};

/// What is installed, and where.
#[derive(Debug, Args)]
pub struct InstallOptions {
    /// Where runtimes look for plugins
    #[arg(long, value_name = "DIR", default_value = "/opt/cni/bin")]
    pub bin_dir: PathBuf,
    /// Where runtimes look for network configurations
    #[arg(long, value_name = "DIR", default_value = "/etc/cni/net.d")]
    pub conf_dir: PathBuf,
    /// The configuration's file name; runtimes take the first by name
    #[arg(long, value_name = "NAME", default_value = "10-podgate.conflist")]
    pub conf_name: String,
    /// The plugin to install [default: podgate-cni beside this program]
    #[arg(long, value_name = "FILE")]
    pub plugin: Option<PathBuf>,
    /// Wait until the node is ready, for at most this many seconds (60 if none are given)
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "60", require_equals = true)]
    pub wait: Option<u64>,
    /// Take both away again
    #[arg(long, conflicts_with_all = ["plugin", "wait"])]
    pub remove: bool,
}

/// Installs, or removes.
pub(super) fn install(client: &Client, options: &InstallOptions) -> Result<Exit, CallError> {
    let places = Places { bin_dir: options.bin_dir.clone(), conf_dir: options.conf_dir.clone(), conf_name: options.conf_name.clone() };
    let failed = |error: InstallError| {
        eprintln!("podgate: {error}");
        Ok(Exit::Failed)
    };
    let say = |done: bool, path: &Path| eprintln!("{} {}", if done { "installed" } else { "unchanged" }, path.display());
    if options.remove {
        return match places.remove() {
            Ok(removed) => Ok(put(&removed.iter().map(|path| format!("removed {}\n", path.display())).collect::<String>())),
            Err(error) => failed(error),
        };
    }
    let beside = || std::env::current_exe().unwrap_or_default().with_file_name(install_cni::PLUGIN);
    match places.install_plugin(&options.plugin.clone().unwrap_or_else(beside)) {
        Ok(done) => say(done, &places.plugin()),
        Err(error) => return failed(error),
    }
    let (start, wait) = (Instant::now(), Duration::from_secs(options.wait.unwrap_or(0)));
    while let Err(error) = client.call(&Request::Ready, &[]) {
        if start.elapsed() >= wait {
            eprintln!("podgate: the configuration is not installed, since no pod could be attached now; --wait=SECONDS waits for the node");
            return Err(error);
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    match places.install_configuration(client.socket()) {
        Ok(done) => say(done, &places.configuration()),
        Err(error) => return failed(error),
    }
    for path in places.before_ours() {
        eprintln!("podgate: runtimes take {} before this one: move it away, or choose an earlier --conf-name", path.display());
    }
    Ok(Exit::Ok)
}
