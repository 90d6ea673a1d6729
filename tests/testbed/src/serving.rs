//! Servers of this process on a machine of the lab, each in a thread and a runtime of its own.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::thread::{self, JoinHandle};

use podgate::lab::{LabError, Machine};
use tokio::sync::oneshot;

/// A server, until this is dropped. With its runtime every connection ends, in whatever it was about to say.
pub struct Serving {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Serving {
    /// Listens at `address` on `machine` and has `serve` serve whoever comes.
    pub fn start<S: Future<Output = io::Result<()>> + 'static>(
        machine: &Machine,
        address: SocketAddr,
        serve: impl FnOnce(tokio::net::TcpListener) -> S + Send + 'static,
    ) -> Result<Serving, LabError> {
        let failed = |source| LabError::Program { what: format!("a server at {address} on {}", machine.name()), source };
        // A socket belongs to the namespace that it was made in, whoever uses it.
        let listener = machine.run(|| TcpListener::bind(address))?.map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let (stop, stopped) = oneshot::channel::<()>();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let thread = thread::Builder::new().name(format!("serve-{}", machine.name())).spawn(move || {
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener).expect("a listener that does not block");
                tokio::select! {
                    served = serve(listener) => served.expect("the server serves"),
                    _ = stopped => {}
                }
            });
        });
        Ok(Serving { stop: Some(stop), thread: Some(thread.map_err(failed)?) })
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
