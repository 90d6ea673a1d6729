//! One try of a check.
//!
//! As kubelet's probes have it (Kubernetes `pkg/probe/tcp`, `pkg/probe/http`): a TCP connection that is made is enough; over HTTP any status from
//! 200 to 399 is, redirects are not followed, and no more than 10 KiB of the answer are read.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::{Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::config::{Check, Probe};

/// So much of an answer is read, in bytes.
const BODY_LEN_MAX: usize = 10 << 10;

/// Why a try failed.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// No connection was made.
    #[error("no connection to {to}: {source}")]
    Connect {
        /// What was dialled.
        to: SocketAddr,
        /// What the kernel says.
        source: io::Error,
    },
    /// It took too long.
    #[error("{to} did not answer within {} s", after.as_secs())]
    Timeout {
        /// What was dialled.
        to: SocketAddr,
        /// How long it had.
        after: Duration,
    },
    /// What answered does not speak HTTP, or broke off.
    #[error("no HTTP answer from {to}: {source}")]
    Http {
        /// What was dialled.
        to: SocketAddr,
        /// What is wrong.
        source: hyper::Error,
    },
    /// It says that it does not work.
    #[error("{to}{path} answers {status}")]
    Status {
        /// What was dialled.
        to: SocketAddr,
        /// What was asked for.
        path: String,
        /// What it said.
        status: StatusCode,
    },
}

/// Tries once, at `address`.
pub async fn attempt(check: &Check, address: IpAddr) -> Result<(), CheckError> {
    let (port, tried) = match &check.probe {
        Probe::Tcp(port) => (*port, None),
        Probe::Http { port, path, host } => (*port, Some((path, host))),
    };
    let to = SocketAddr::new(address, port);
    let tried = async {
        let stream = TcpStream::connect(to).await.map_err(|source| CheckError::Connect { to, source })?;
        match tried {
            None => Ok(()),
            Some((path, host)) => get(stream, to, path, host.as_deref()).await,
        }
    };
    timeout(check.timeout, tried).await.unwrap_or(Err(CheckError::Timeout { to, after: check.timeout }))
}

async fn get(stream: TcpStream, to: SocketAddr, path: &str, host: Option<&str>) -> Result<(), CheckError> {
    let failed = |source| CheckError::Http { to, source };
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(failed)?;
    // Ends with this function, however it ends.
    let mut driver = JoinSet::new();
    driver.spawn(connection);
    let request = Request::get(path)
        .header(header::HOST, host.map_or_else(|| to.to_string(), str::to_owned))
        .header(header::USER_AGENT, concat!("podgate/", env!("CARGO_PKG_VERSION")))
        .header(header::CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .expect("path and host were checked with the configuration");
    let answer = sender.send_request(request).await.map_err(failed)?;
    let status = answer.status();
    // A server whose answer is not taken would log a client that broke off.
    let (mut body, mut read) = (answer.into_body(), 0);
    while let Some(Ok(frame)) = body.frame().await
        && read < BODY_LEN_MAX
    {
        read += frame.data_ref().map_or(0, Bytes::len);
    }
    if status.is_success() || status.is_redirection() {
        return Ok(());
    }
    Err(CheckError::Status { to, path: path.to_owned(), status })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    fn check(probe: Probe) -> Check {
        Check { probe, interval: Duration::from_secs(5), timeout: Duration::from_secs(1), healthy: 2, unhealthy: 3 }
    }

    /// What a check over HTTP comes to where a server answers so, and what it was asked; an empty answer is silence.
    fn asked(answer: &'static str, host: Option<&str>) -> (Result<(), String>, String) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let to = listener.local_addr().unwrap();
            let server = tokio::spawn(async move {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    request.push(stream.read_u8().await.unwrap());
                }
                stream.write_all(answer.as_bytes()).await.unwrap();
                if answer.is_empty() {
                    // Until the client gives up.
                    let _ = stream.read_u8().await;
                }
                String::from_utf8(request).unwrap()
            });
            let probe = Probe::Http { port: to.port(), path: "/healthz?full".into(), host: host.map(str::to_owned) };
            let result = attempt(&check(probe), to.ip()).await.map_err(|error| error.to_string().replace(&to.to_string(), "SERVER"));
            (result, server.await.unwrap().replace(&to.to_string(), "SERVER"))
        })
    }

    #[test]
    fn a_get_of_the_path_with_the_host_is_what_a_server_sees() {
        let (result, request) = asked("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok\n", Some("web.example"));
        assert_eq!(result, Ok(()));
        assert!(request.starts_with("GET /healthz?full HTTP/1.1\r\n") && request.contains("host: web.example\r\n"), "{request}");
        let (_, request) = asked("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", None);
        assert!(request.contains("host: SERVER\r\n"), "{request}");
    }

    #[test]
    fn statuses_up_to_399_are_success_and_all_others_failure() {
        for status in ["204 No Content", "302 Found", "399 Odd"] {
            let answer = format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n");
            assert_eq!(asked(answer.leak(), None).0, Ok(()), "{status}");
        }
        for status in ["404 Not Found", "503 Service Unavailable"] {
            let answer = format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n");
            assert_eq!(asked(answer.leak(), None).0, Err(format!("SERVER/healthz?full answers {status}")));
        }
    }

    #[test]
    fn what_is_silent_or_no_http_fails() {
        assert_eq!(asked("", None).0, Err("SERVER did not answer within 1 s".into()));
        let said = asked("SSH-2.0-OpenSSH_9.2\r\n", None).0.unwrap_err();
        assert!(said.starts_with("no HTTP answer from SERVER: "), "{said}");
    }

    #[test]
    fn a_port_that_listens_passes_a_tcp_check_and_a_closed_one_fails_it() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let to = listener.local_addr().unwrap();
            let check = check(Probe::Tcp(to.port()));
            attempt(&check, to.ip()).await.unwrap();
            drop(listener);
            let said = attempt(&check, to.ip()).await.unwrap_err().to_string();
            assert!(said.starts_with(&format!("no connection to {to}: ")), "{said}");
        });
    }
}
