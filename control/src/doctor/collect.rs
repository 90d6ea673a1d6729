//! Looks at the machine, and changes nothing.

mod daemon;
mod files;
mod firewall;
mod host;
mod kernel;
mod origin;
mod peers;

use std::io::ErrorKind;
use std::path::Path;

use super::Options;
use super::facts::{Configuration, Daemon, Facts, Stage};
use crate::config::Config;

/// Everything that there is to see for this process, in the network namespace that it is in.
pub fn facts(options: &Options) -> Facts {
    let configuration = configuration(&options.config);
    let config = match &configuration {
        Configuration::Read(config) => Some(&**config),
        _ => None,
    };
    let socket = config.map_or_else(|| options.socket.clone(), Config::socket);
    let daemon = daemon::ask(&socket);
    let after = options.stage == Stage::Installed;
    let peers = match &daemon {
        Daemon::Answers(tables) if after => Some(peers::ask(&tables.peers)),
        _ => None,
    };
    Facts {
        stage: options.stage,
        kernel: kernel::look(),
        host: host::look(config),
        sockets: host::sockets(),
        rooms: config.map_or_else(Vec::new, files::rooms),
        firewall: firewall::look(),
        origin: config.map(origin::look),
        cni: files::cni(&options.places),
        peers,
        daemon,
        configuration,
    }
}

fn configuration(path: &Path) -> Configuration {
    match std::fs::metadata(path).and_then(|_| std::fs::File::open(path)) {
        Err(error) if error.kind() == ErrorKind::NotFound => Configuration::Missing(path.to_owned()),
        Err(error) if error.kind() == ErrorKind::PermissionDenied => Configuration::Denied(path.to_owned()),
        _ => match Config::load(path) {
            Ok(config) => Configuration::Read(Box::new(config)),
            Err(error) => Configuration::Refused(error.to_string()),
        },
    }
}
