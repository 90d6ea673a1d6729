//! The daemon's Unix socket: one request line in, one response line out (see [`podgate_cni`]).
//!
//! The socket's mode is 0600: whoever may connect may attach pods. A peer that sends nothing, too much or garbage is told so and hung up on;
//! it holds nothing up, since each connection is a task of its own.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use podgate_cni::{Attachment, REQUEST_LEN_MAX, Request, Response};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::{UnixListener, UnixStream};

/// How long a client may take to send its request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Why the socket cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// It could not be made.
    #[error("the socket {path} cannot be made: {source}. Its directory must exist and be writable; `runtimeDir` in podgate.yaml names it")]
    Bind {
        /// The socket's path.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
}

/// What answers requests. Single-threaded, as the control thread is.
pub trait Handler {
    /// Answers `request`, which came with `fds`.
    fn handle(&self, request: Request, fds: Vec<OwnedFd>) -> impl Future<Output = Response>;

    /// Undoes an attachment whose client has gone before it could be told: nobody knows of it.
    fn unheard(&self, attachment: Attachment) -> impl Future<Output = ()>;
}

/// Makes the socket at `path` in place of whatever stands there: the caller holds the lock of the runtime directory, so nobody listens on it.
pub fn bind(path: &Path) -> Result<UnixListener, ApiError> {
    let error = |source| ApiError::Bind { path: path.to_owned(), source };
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(error(e)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(error)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(error)?;
    Ok(listener)
}

/// Serves `listener` for ever. Runs inside a `LocalSet`.
pub async fn serve<H: Handler + 'static>(listener: UnixListener, handler: Rc<H>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let handler = handler.clone();
                tokio::task::spawn_local(async move {
                    let mut attached = None;
                    let response = match tokio::time::timeout(REQUEST_TIMEOUT, receive(&stream)).await {
                        Ok(Ok((request, fds))) => {
                            attached = attachment_of(&request);
                            handler.handle(request, fds).await
                        }
                        Ok(Err(e)) => Response::Error { code: 6, message: e },
                        Err(_) => Response::Error { code: 6, message: "no request arrived in time".into() },
                    };
                    let heard = reply(stream, &response).await;
                    if let (Err(_), Response::Ok(_), Some(attachment)) = (heard, &response, attached) {
                        handler.unheard(attachment).await;
                    }
                });
            }
            // Out of descriptors, most likely: the clients that hold them must end first.
            Err(e) => {
                tracing::warn!(error = %e, "a client could not be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// What a request attaches, if it succeeds.
fn attachment_of(request: &Request) -> Option<Attachment> {
    match request {
        Request::Attach(request) => Some(request.attachment.clone()),
        Request::Assign { attachment, .. } => Some(attachment.clone()),
        _ => None,
    }
}

/// One request line and the descriptors beside it.
async fn receive(stream: &UnixStream) -> Result<(Request, Vec<OwnedFd>), String> {
    let (mut line, mut fds) = (Vec::new(), Vec::new());
    while !line.ends_with(b"\n") {
        let mut chunk = [0; 4096];
        let received = stream
            .async_io(Interest::READABLE, || {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
                let mut ancillary = RecvAncillaryBuffer::new(&mut space);
                let mut slices = [IoSliceMut::new(&mut chunk)];
                let received = rustix::net::recvmsg(stream, &mut slices, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
                for message in ancillary.drain() {
                    if let RecvAncillaryMessage::ScmRights(rights) = message {
                        fds.extend(rights);
                    }
                }
                Ok(received.bytes)
            })
            .await
            .map_err(|e| format!("the request could not be read: {e}"))?;
        if received == 0 {
            return Err("the request ends before its line does".into());
        }
        line.extend_from_slice(&chunk[..received]);
        if line.len() > REQUEST_LEN_MAX {
            return Err(format!("the request is longer than {REQUEST_LEN_MAX} bytes"));
        }
    }
    let request = serde_json::from_slice(&line).map_err(|e| format!("the request is not one of this protocol: {e}"))?;
    Ok((request, fds))
}

async fn reply(mut stream: UnixStream, response: &Response) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(response).expect("a response is always JSON");
    line.push(b'\n');
    stream.write_all(&line).await?;
    stream.shutdown().await
}
