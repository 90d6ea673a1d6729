//! An API server on the outside machine of a lab, and `kubectl` there.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use podgate::lab::{LabError, Machine};
use podgate::netlink::Family;
use podgate_apiserver::ApiServer;
use podgate_testbed::serving::Serving;
use podgate_testbed::tool::{Ended, Running};

use crate::Try;

const PORT: u16 = 6443;

/// Where it listens.
pub fn address(machine: &Machine) -> SocketAddr {
    SocketAddr::new(machine.addresses().of(Family::V4), PORT)
}

/// Serves on `machine`.
pub fn serve(server: &ApiServer, machine: &Machine) -> Result<Serving, LabError> {
    let server = server.clone();
    Serving::start(machine, address(machine), move |listener| async move { server.serve(listener).await })
}

/// `kubectl`, on a machine, as whom nobody asks: the server is one without TLS, to which it shows no token.
pub struct Kubectl<'a> {
    machine: &'a Machine,
    kubeconfig: PathBuf,
}

impl<'a> Kubectl<'a> {
    /// Its files are in `directory`.
    pub fn new(machine: &'a Machine, directory: &Path) -> Try<Kubectl<'a>> {
        let kubeconfig = directory.join("admin.kubeconfig");
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters: [{{name: c, cluster: {{server: \"http://{}\"}}}}]\n\
             users: [{{name: u, user: {{}}}}]\ncontexts: [{{name: c, context: {{cluster: c, user: u}}}}]\n",
            address(machine)
        );
        fs::write(&kubeconfig, text)?;
        Ok(Kubectl { machine, kubeconfig })
    }

    /// Runs it to its end.
    pub fn end(&self, arguments: &[&str], input: &str) -> Try<Ended> {
        let mut command = Command::new("kubectl");
        command.args(arguments).env("KUBECONFIG", &self.kubeconfig).env("HOME", self.kubeconfig.with_file_name("home"));
        let running = self.machine.run(|| Running::start(command, input.as_bytes()))??;
        Ok(running.end(Duration::from_secs(30))?)
    }

    /// The same, and it must succeed.
    pub fn ok(&self, arguments: &[&str], input: &str) -> Try<String> {
        Ok(self.end(arguments, input)?.success()?)
    }
}
