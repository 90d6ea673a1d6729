//! An API server on the outside machine of a lab, and `kubectl` there.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::JoinHandle;
use std::time::Duration;

use podgate::lab::Machine;
use podgate::netlink::Family;
use podgate_apiserver::ApiServer;
use podgate_testbed::tool::{Ended, Running};
use tokio::sync::oneshot;

use crate::Try;

const PORT: u16 = 6443;

/// A server, in a thread of its own, until this is dropped.
pub struct Serving {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// Where it listens.
pub fn address(machine: &Machine) -> SocketAddr {
    SocketAddr::new(machine.addresses().of(Family::V4), PORT)
}

impl Serving {
    /// Serves on `machine`.
    pub fn start(server: &ApiServer, machine: &Machine) -> Try<Serving> {
        // A socket belongs to the namespace that it was made in, whoever uses it.
        let listener = machine.run(|| TcpListener::bind(address(machine)))??;
        listener.set_nonblocking(true)?;
        let (stop, stopped) = oneshot::channel::<()>();
        let server = server.clone();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let thread = std::thread::spawn(move || {
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener).expect("a listener that does not block");
                tokio::select! {
                    served = server.serve(listener) => served.expect("the server serves"),
                    _ = stopped => {}
                }
            });
        });
        Ok(Serving { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic of the server's has been printed, and shows in what its clients lack.
            let _ = thread.join();
        }
    }
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
