//! A client of etcd's JSON gateway (`/v3/…` over HTTP), which every etcd since 3.4 serves on its client port.
//!
//! Not gRPC: its client library wants `protoc` at build time, and of etcd's API a gateway of pods needs six calls. One connection is kept for
//! calls and one is opened for each watch. A call tries every endpoint once, from the one that last worked; where etcd says that it is itself
//! unable (no leader, too busy), that counts as an endpoint that does not work.
//!
//! Nothing waits for ever: a connection has [`CONNECT_TIMEOUT`], a call [`CALL_TIMEOUT`] at each endpoint. A watch says nothing while nothing
//! happens, so whoever holds one must open it anew from time to time.

use std::future::Future;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::{Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::error::Elapsed;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::endpoint::{Endpoint, tls};
use super::wire::{
    AuthenticateRequest, AuthenticateResponse, Bytes64, Failure, Int, KeyValue, LeaseRequest, LeaseResponse, RangeRequest, RangeResponse, Streamed,
    TxnRequest, TxnResponse, WatchCreateRequest, WatchRequest, WatchResponse,
};
use crate::config::EtcdConfig;

/// How long an endpoint may take to accept a connection, TLS included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long an endpoint may take to answer a call: etcd itself gives up after 5 s and its elections' time.
const CALL_TIMEOUT: Duration = Duration::from_secs(7);
/// How many keys one page of a list has.
const PAGE_LEN: i64 = 500;
/// A line of a watch is no longer than this, in bytes: etcd limits a transaction to 1.5 MiB, and a watch that catches up sends many at once.
const LINE_LEN_MAX: usize = 256 << 20;

/// So many characters of a plain text are told.
const TEXT_LEN_MAX: usize = 200;
/// With users, etcd's gateway refuses every certificate that has a common name, whatever token comes with the request (seen with 3.4.23): the name
/// would be the user's, and the gateway cannot pass it on.
const COMMON_NAME: &str = "CommonName of client";

// Codes of gRPC (`google/rpc/code.proto`).
const INVALID_ARGUMENT: u32 = 3;
const DEADLINE_EXCEEDED: u32 = 4;
const NOT_FOUND: u32 = 5;
const PERMISSION_DENIED: u32 = 7;
const RESOURCE_EXHAUSTED: u32 = 8;
const OUT_OF_RANGE: u32 = 11;
const UNAVAILABLE: u32 = 14;
const UNAUTHENTICATED: u32 = 16;

/// Why etcd is of no use.
#[derive(Debug, thiserror::Error)]
pub enum EtcdError {
    /// An endpoint is no URL.
    #[error("source.etcd.endpoints: `{url}`: {problem}; write one as http://192.0.2.10:2379")]
    Endpoint {
        /// What is written.
        url: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A certificate or a key cannot be used.
    #[error("source.etcd.{key}: {path}: {problem}; name a PEM file that the daemon can read")]
    Credentials {
        /// The key of the configuration.
        key: &'static str,
        /// The file.
        path: String,
        /// What is wrong with it.
        problem: String,
    },
    /// No endpoint works.
    #[error("no endpoint of etcd answers: {tried}")]
    Unreachable {
        /// Each and what became of it.
        tried: String,
    },
    /// etcd refuses.
    #[error("etcd at {endpoint} refuses: {message}{}", remedy(*.code, .message))]
    Refused {
        /// The endpoint.
        endpoint: String,
        /// gRPC's status code.
        code: u32,
        /// What etcd says.
        message: String,
    },
    /// What was asked for is no longer kept, so everything must be listed anew.
    #[error("etcd has compacted its history beyond revision {from}")]
    Compacted {
        /// The first revision that was asked for.
        from: i64,
    },
    /// An answer that is none.
    #[error("etcd at {endpoint} answers what is not understood: {problem}; is it etcd 3.4 or later?")]
    Answer {
        /// The endpoint.
        endpoint: String,
        /// What is wrong.
        problem: String,
    },
    /// A stream ended.
    #[error("the watch of {endpoint} broke off: {problem}")]
    Broken {
        /// The endpoint.
        endpoint: String,
        /// How.
        problem: String,
    },
}

fn remedy(code: u32, message: &str) -> &'static str {
    match code {
        UNAUTHENTICATED => "; check source.etcd.user (name:password)",
        INVALID_ARGUMENT if message.contains("user name is empty") => "; it asks for a user: write source.etcd.user as name:password",
        INVALID_ARGUMENT if message.contains("authentication failed") => "; check source.etcd.user (name:password)",
        INVALID_ARGUMENT if message.contains(COMMON_NAME) => {
            "; where it has users it takes no certificate with a common name: make one without for source.etcd.cert"
        }
        // With a client certificate a request without a user is refused in this way, too.
        PERMISSION_DENIED => {
            "; grant the user's role read and write of every key under source.etcd.prefix; if none is named, write source.etcd.user as name:password"
        }
        RESOURCE_EXHAUSTED if message.contains("space exceeded") => "; compact and defragment it, then disarm its alarm (`etcdctl alarm disarm`)",
        _ => "",
    }
}

/// A client. Clones share the endpoint that works and the token.
#[derive(Clone)]
pub struct Client(Arc<Inner>);

struct Inner {
    endpoints: Vec<Endpoint>,
    tls: Option<TlsConnector>,
    user: Option<(String, String)>,
    /// The endpoint that last worked.
    current: AtomicUsize,
    token: Mutex<Option<String>>,
    /// A connection that is not in use, and to which endpoint.
    idle: Mutex<Option<(usize, Connection)>>,
}

type Connection = SendRequest<Full<Bytes>>;

/// What becomes of an attempt at one endpoint.
enum Attempt {
    /// The next one may do better.
    Unable(String),
    /// etcd says no.
    Refused { code: u32, message: String },
}

/// Everything under a prefix as of one revision.
#[derive(Debug)]
pub struct Listing {
    /// The revision.
    pub revision: i64,
    /// The keys and values, by key.
    pub kvs: Vec<KeyValue>,
}

impl Client {
    /// For what the configuration names. Nothing is connected to yet; credentials are read now.
    pub fn new(config: &EtcdConfig) -> Result<Client, EtcdError> {
        let endpoints = config.endpoints.iter().map(|url| Endpoint::parse(url)).collect::<Result<Vec<_>, _>>()?;
        let wants_tls = endpoints.iter().any(|endpoint| endpoint.tls.is_some());
        let inner = Inner {
            tls: wants_tls.then(|| tls(config)).transpose()?,
            user: config.user.as_deref().map(|user| user.split_once(':').unwrap_or((user, ""))).map(|(n, p)| (n.to_owned(), p.to_owned())),
            endpoints,
            current: AtomicUsize::new(0),
            token: Mutex::default(),
            idle: Mutex::default(),
        };
        Ok(Client(Arc::new(inner)))
    }

    /// Every key from `prefix` up to `end`, page by page, all as of one revision.
    pub async fn list(&self, prefix: &str, end: &str) -> Result<Listing, EtcdError> {
        let (mut kvs, mut revision, mut total): (Vec<KeyValue>, i64, i64) = (Vec::new(), 0, 0);
        loop {
            let key = match kvs.last() {
                None => Bytes64::from(prefix),
                // The first key behind the last one.
                Some(last) => Bytes64([last.key.0.as_slice(), &[0]].concat()),
            };
            let request = RangeRequest { key, range_end: Some(end.into()), limit: Int(PAGE_LEN), revision: Int(revision) };
            let page: RangeResponse = self.call("/v3/kv/range", &request).await?;
            if revision == 0 {
                (revision, total) = (page.header.revision.0, page.count.0);
            }
            let more = page.more && !page.kvs.is_empty();
            kvs.extend(page.kvs);
            if more {
                continue;
            }
            // A page that was cut short must not look like keys that are gone.
            return if kvs.len() as i64 == total {
                Ok(Listing { revision, kvs })
            } else {
                let problem = format!("a list has {} keys where {total} were announced", kvs.len());
                Err(EtcdError::Answer { endpoint: self.current().url.clone(), problem })
            };
        }
    }

    /// One key.
    pub async fn read(&self, key: &str) -> Result<Option<KeyValue>, EtcdError> {
        let request = RangeRequest { key: key.into(), ..RangeRequest::default() };
        let found: RangeResponse = self.call("/v3/kv/range", &request).await?;
        Ok(found.kvs.into_iter().next())
    }

    /// A transaction. It may have been carried out though an error is returned.
    pub async fn txn(&self, request: &TxnRequest) -> Result<TxnResponse, EtcdError> {
        self.call("/v3/kv/txn", request).await
    }

    /// A lease of so many seconds.
    pub async fn grant(&self, seconds: u64) -> Result<LeaseResponse, EtcdError> {
        self.call("/v3/lease/grant", &LeaseRequest { ttl: Some(Int(seconds as i64)), id: Int(0) }).await
    }

    /// Renews a lease; whether it was still there.
    pub async fn keep_alive(&self, lease: i64) -> Result<bool, EtcdError> {
        let renewed: Streamed<LeaseResponse> = self.call("/v3/lease/keepalive", &LeaseRequest { ttl: None, id: Int(lease) }).await?;
        Ok(renewed.result.is_some_and(|lease| lease.ttl.0 > 0))
    }

    /// Ends a lease, and takes away every key that goes with it. One that is over already is no error.
    pub async fn revoke(&self, lease: i64) -> Result<(), EtcdError> {
        match self.call::<serde_json::Value>("/v3/lease/revoke", &LeaseRequest { ttl: None, id: Int(lease) }).await {
            Err(EtcdError::Refused { code: NOT_FOUND, .. }) | Ok(_) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Watches every key from `prefix` up to `end`, from revision `from` on. It has begun when this returns.
    pub async fn watch(&self, prefix: &str, end: &str, from: i64) -> Result<Watch, EtcdError> {
        let create_request = WatchCreateRequest { key: prefix.into(), range_end: end.into(), start_revision: Int(from) };
        let body = encode(&WatchRequest { create_request });
        let mut tried = Vec::new();
        for at in self.order() {
            let begun = timeout(CALL_TIMEOUT, self.watch_at(at, body.clone(), from)).await;
            if let Some(begun) = self.settle(at, begun, &mut tried) {
                return begun?;
            }
        }
        Err(EtcdError::Unreachable { tried: tried.join("; ") })
    }

    async fn watch_at(&self, at: usize, body: Bytes, from: i64) -> Result<Result<Watch, EtcdError>, Attempt> {
        let connection = self.connect(at).await?;
        let (_, response) = self.exchange(at, connection, "/v3/watch", body).await?;
        let mut watch = Watch { body: response.into_body(), buffer: Vec::new(), searched: 0, endpoint: self.0.endpoints[at].url.clone(), from };
        match watch.next().await {
            Ok(first) if first.created => Ok(Ok(watch)),
            Ok(_) => Err(Attempt::Unable("it does not begin to watch".into())),
            // No other endpoint has more of the history.
            Err(error @ EtcdError::Compacted { .. }) => Ok(Err(error)),
            Err(error) => Err(Attempt::Unable(error.to_string())),
        }
    }

    /// A call that has one answer.
    async fn call<A: DeserializeOwned>(&self, path: &'static str, request: &impl Serialize) -> Result<A, EtcdError> {
        let body = encode(request);
        let mut tried = Vec::new();
        for at in self.order() {
            let answered = timeout(CALL_TIMEOUT, self.call_at(at, path, body.clone())).await;
            let Some(answer) = self.settle(at, answered, &mut tried) else { continue };
            // A streamed answer of one element is a line, which JSON takes for blank.
            return serde_json::from_slice(&answer?)
                .map_err(|error| EtcdError::Answer { endpoint: self.0.endpoints[at].url.clone(), problem: format!("{path}: {error}") });
        }
        Err(EtcdError::Unreachable { tried: tried.join("; ") })
    }

    /// Every endpoint, from the one that last worked.
    fn order(&self) -> impl Iterator<Item = usize> + use<> {
        let count = self.0.endpoints.len();
        // Relaxed: a hint, which orders nothing.
        let first = self.0.current.load(Ordering::Relaxed);
        (0..count).map(move |turn| (first + turn) % count)
    }

    /// What came of an attempt; nothing if the next endpoint is to be tried.
    fn settle<A>(&self, at: usize, attempt: Result<Result<A, Attempt>, Elapsed>, tried: &mut Vec<String>) -> Option<Result<A, EtcdError>> {
        let url = &self.0.endpoints[at].url;
        let done = match attempt {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(Attempt::Refused { code, message })) => Err(EtcdError::Refused { endpoint: url.clone(), code, message }),
            Ok(Err(Attempt::Unable(why))) => {
                tried.push(format!("{url}: {why}"));
                return None;
            }
            Err(_) => {
                tried.push(format!("{url}: no answer within {} s", CALL_TIMEOUT.as_secs()));
                return None;
            }
        };
        self.0.current.store(at, Ordering::Relaxed);
        Some(done)
    }

    async fn call_at(&self, at: usize, path: &'static str, body: Bytes) -> Result<Bytes, Attempt> {
        if let Some(connection) = self.idle(at) {
            // It may have been closed since; every call can be made twice, because what writes is conditional.
            match self.collect(at, connection, path, body.clone()).await {
                Err(Attempt::Unable(_)) => {}
                done => return done,
            }
        }
        let connection = self.connect(at).await?;
        self.collect(at, connection, path, body).await
    }

    /// Sends a request and reads the whole answer; the connection is kept for the next one.
    async fn collect(&self, at: usize, connection: Connection, path: &'static str, body: Bytes) -> Result<Bytes, Attempt> {
        let (connection, response) = self.exchange(at, connection, path, body).await?;
        let answer = response.into_body().collect().await.map_err(|error| Attempt::Unable(chain(&error)))?.to_bytes();
        *lock(&self.0.idle) = Some((at, connection));
        Ok(answer)
    }

    /// Sends a request, with a token if etcd asks for users; gives back a successful answer's head.
    async fn exchange(
        &self,
        at: usize,
        mut connection: Connection,
        path: &'static str,
        body: Bytes,
    ) -> Result<(Connection, Response<Incoming>), Attempt> {
        let mut fresh = false;
        loop {
            let known = lock(&self.0.token).clone();
            let token = match (&self.0.user, known) {
                (Some(user), None) => {
                    fresh = true;
                    Some(self.authenticate(at, &mut connection, user).await?)
                }
                (_, known) => known,
            };
            let response = self.send(at, &mut connection, path, token.as_deref(), body.clone()).await?;
            match failure(response).await {
                Ok(response) => return Ok((connection, response)),
                // Tokens end with time, and with every change of etcd's users.
                Err(Attempt::Refused { code, message }) if is_stale_token(code, &message) && self.0.user.is_some() && !fresh => {
                    *lock(&self.0.token) = None;
                }
                Err(attempt) => return Err(attempt),
            }
        }
    }

    async fn authenticate(&self, at: usize, connection: &mut Connection, (name, password): &(String, String)) -> Result<String, Attempt> {
        let body = encode(&AuthenticateRequest { name, password });
        let response = failure(self.send(at, connection, "/v3/auth/authenticate", None, body).await?).await?;
        let answer = response.into_body().collect().await.map_err(|error| Attempt::Unable(chain(&error)))?.to_bytes();
        let answer: AuthenticateResponse = serde_json::from_slice(&answer).map_err(|error| Attempt::Unable(error.to_string()))?;
        *lock(&self.0.token) = Some(answer.token.clone());
        Ok(answer.token)
    }

    async fn send(
        &self,
        at: usize,
        connection: &mut Connection,
        path: &str,
        token: Option<&str>,
        body: Bytes,
    ) -> Result<Response<Incoming>, Attempt> {
        let endpoint = &self.0.endpoints[at];
        let mut request = Request::post(path).header(header::HOST, endpoint.authority()).header(header::CONTENT_TYPE, "application/json");
        // A member that has lost its leader ends its watches instead of falling silent (etcd `rpctypes.MetadataRequireLeaderKey`).
        request = request.header("Grpc-Metadata-hasleader", "true");
        if let Some(token) = token {
            request = request.header(header::AUTHORIZATION, token);
        }
        let request = request.body(Full::new(body)).map_err(|error| Attempt::Unable(error.to_string()))?;
        connection.ready().await.map_err(|error| Attempt::Unable(chain(&error)))?;
        connection.send_request(request).await.map_err(|error| Attempt::Unable(chain(&error)))
    }

    fn idle(&self, at: usize) -> Option<Connection> {
        let (to, connection) = lock(&self.0.idle).take()?;
        (to == at && !connection.is_closed()).then_some(connection)
    }

    async fn connect(&self, at: usize) -> Result<Connection, Attempt> {
        let endpoint = &self.0.endpoints[at];
        let connecting = async {
            let stream = TcpStream::connect((endpoint.host.as_str(), endpoint.port)).await.map_err(|error| error.to_string())?;
            let socket = socket2::SockRef::from(&stream);
            // What was sent and is not acknowledged for so long is lost, and so is the connection (tcp(7)).
            let _ = socket.set_tcp_user_timeout(Some(CALL_TIMEOUT));
            let _ = socket.set_tcp_keepalive(&socket2::TcpKeepalive::new().with_time(CALL_TIMEOUT).with_interval(CONNECT_TIMEOUT));
            let _ = stream.set_nodelay(true);
            match (&endpoint.tls, &self.0.tls) {
                (Some(name), Some(tls)) => {
                    let stream = tls.connect(name.clone(), stream).await.map_err(|error| format!("TLS: {error}"))?;
                    handshake(stream).await
                }
                _ => handshake(stream).await,
            }
        };
        match timeout(CONNECT_TIMEOUT, connecting).await {
            Ok(connected) => connected.map_err(Attempt::Unable),
            Err(_) => Err(Attempt::Unable(format!("no connection within {} s", CONNECT_TIMEOUT.as_secs()))),
        }
    }

    fn current(&self) -> &Endpoint {
        &self.0.endpoints[self.0.current.load(Ordering::Relaxed)]
    }
}

async fn handshake(stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> Result<Connection, String> {
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|error| error.to_string())?;
    // It ends with its sender, or with the body that is being read of it.
    tokio::spawn(async move {
        let _ = connection.await;
    });
    Ok(sender)
}

/// Tells successes from failures, and failures of etcd from refusals.
async fn failure(response: Response<Incoming>) -> Result<Response<Incoming>, Attempt> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let body = response.into_body().collect().await.map_err(|error| Attempt::Unable(chain(&error)))?.to_bytes();
    let failure: Failure = serde_json::from_slice(&body).unwrap_or_default();
    if failure.text().is_empty() {
        // What stands before the gateway answers in plain text; a line of it says enough.
        let said: String = String::from_utf8_lossy(&body).lines().next().unwrap_or_default().chars().take(TEXT_LEN_MAX).collect();
        return Err(match said.contains(COMMON_NAME) {
            true => Attempt::Refused { code: INVALID_ARGUMENT, message: said },
            false => Attempt::Unable(format!("HTTP {status} {said}").trim_end().to_owned()),
        });
    }
    let unable = matches!(failure.code, UNAVAILABLE | DEADLINE_EXCEEDED) || status == StatusCode::SERVICE_UNAVAILABLE;
    let message = failure.text().to_owned();
    Err(if unable { Attempt::Unable(message) } else { Attempt::Refused { code: failure.code, message } })
}

fn is_stale_token(code: u32, message: &str) -> bool {
    code == UNAUTHENTICATED || message.contains("invalid auth token") || message.contains("revision of auth store is old")
}

/// A watch that has begun.
pub struct Watch {
    body: Incoming,
    buffer: Vec<u8>,
    /// So much of the buffer holds no end of a line.
    searched: usize,
    endpoint: String,
    from: i64,
}

impl Watch {
    /// What happened next. May be given up and called again: nothing is lost.
    pub async fn next(&mut self) -> Result<WatchResponse, EtcdError> {
        loop {
            if let Some(end) = self.buffer[self.searched..].iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=self.searched + end).collect();
                self.searched = 0;
                return self.read(&line);
            }
            self.searched = self.buffer.len();
            if self.buffer.len() > LINE_LEN_MAX {
                return Err(self.broken(format!("a line of more than {LINE_LEN_MAX} bytes")));
            }
            match self.body.frame().await {
                Some(Ok(frame)) => self.buffer.extend_from_slice(frame.data_ref().map_or(&[], |data| data)),
                Some(Err(error)) => return Err(self.broken(chain(&error))),
                None => return Err(self.broken("it was closed".into())),
            }
        }
    }

    fn read(&self, line: &[u8]) -> Result<WatchResponse, EtcdError> {
        let answer = |error: serde_json::Error| EtcdError::Answer { endpoint: self.endpoint.clone(), problem: format!("/v3/watch: {error}") };
        let read: Streamed<WatchResponse> = serde_json::from_slice(line).map_err(answer)?;
        let response = match (read.result, read.error) {
            (Some(response), None) => response,
            (_, Some(failure)) if failure.code == OUT_OF_RANGE => return Err(EtcdError::Compacted { from: self.from }),
            (_, failure) => return Err(self.broken(failure.unwrap_or_default().text().to_owned())),
        };
        match response {
            WatchResponse { canceled: true, compact_revision, .. } if compact_revision > Int(0) => Err(EtcdError::Compacted { from: self.from }),
            WatchResponse { canceled: true, cancel_reason, .. } => Err(self.broken(cancel_reason)),
            response => Ok(response),
        }
    }

    fn broken(&self, problem: String) -> EtcdError {
        EtcdError::Broken { endpoint: self.endpoint.clone(), problem }
    }
}

fn encode(request: &impl Serialize) -> Bytes {
    serde_json::to_vec(request).expect("a request is always JSON").into()
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An error and its causes: hyper's own text leaves out the kernel's.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// Waits before the next attempt: twice as long each time, between half of it and all of it by chance, so that nodes do not come all at once.
#[derive(Debug, Default)]
pub struct Backoff(u32);

impl Backoff {
    const FIRST: Duration = Duration::from_millis(200);
    const LONGEST: Duration = Duration::from_secs(10);

    /// All is well again.
    pub fn reset(&mut self) {
        self.0 = 0;
    }

    /// How long to wait now.
    pub fn next(&mut self) -> Duration {
        let whole = Backoff::LONGEST.min(Backoff::FIRST * 2u32.saturating_pow(self.0));
        self.0 = self.0.saturating_add(1).min(16);
        // Keyed anew by each RandomState: no generator of random numbers is needed for this.
        let chance = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), self.0) % 1024;
        whole / 2 + whole.mul_f64(chance as f64 / 2048.0)
    }

    /// Waits.
    pub fn wait(&mut self) -> impl Future<Output = ()> + use<> {
        tokio::time::sleep(self.next())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_doubles_up_to_its_end_and_begins_anew_after_success() {
        let mut backoff = Backoff::default();
        for _ in 0..3 {
            let waits: Vec<Duration> = (0..12).map(|_| backoff.next()).collect();
            assert!(waits[0] >= Backoff::FIRST / 2 && waits[0] <= Backoff::FIRST, "{waits:?}");
            assert!(waits[11] >= Backoff::LONGEST / 2 && waits[11] <= Backoff::LONGEST, "{waits:?}");
            backoff.reset();
        }
    }
}
