//! An API server that speaks Kubernetes' protocol, for tests: an unmodified `kubectl` lists, creates, edits, watches and deletes with it, and
//! faults come to order, by seed.
//!
//! It keeps everything in memory and knows a handful of kinds ([`resources`]). What it is faithful in is what a client's correctness depends
//! on: versions, conflicts, consistent pages, watches with history, bookmarks, timeouts and 410 Gone, selectors, patches, `Status` errors,
//! bearer tokens and RBAC. What it lacks: validation of fields, field managers, finalizers, protobuf.
//!
//! Read first: "Kubernetes API Concepts" (kubernetes.io/docs/reference/using-api/api-concepts) and "API conventions"
//! (`contributors/devel/sig-architecture/api-conventions.md` in kubernetes/community).
//!
//! Time is tokio's, and chance is the seed's: in one process, on a paused clock, a history happens the same way each time.

mod access;
mod defaults;
mod discovery;
mod faults;
mod handler;
mod patch;
pub mod resources;
mod select;
mod status;
mod store;
mod watch;

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::body::Body;
use axum::http::{Request, Response};
use serde_json::Value;

pub use access::{Rule, RuleError, Use};
use faults::Dice;
pub use faults::Faults;
use store::Store;

/// A request with this header (of any value) meets no fault and no outage: a test's own, by which it makes and sees what is to be.
pub const PLAIN: &str = "x-podgate-plain";

/// The server. A clone is another handle on the same one.
#[derive(Clone)]
pub struct ApiServer {
    shared: Arc<Shared>,
}

struct Shared {
    store: Store,
    /// What each manager applied last, by the object's UID and the manager's name.
    applied: Mutex<HashMap<(String, String), serde_json::Value>>,
    access: Mutex<access::Access>,
    dice: Mutex<Dice>,
    /// Whether it answers at all.
    outage: tokio::sync::watch::Sender<bool>,
    /// Of these resources the next list is answered as if there were nothing.
    empty_lists: Mutex<BTreeSet<String>>,
    used: Mutex<BTreeSet<Use>>,
}

impl Default for ApiServer {
    fn default() -> ApiServer {
        ApiServer::new(Faults::none(1))
    }
}

impl ApiServer {
    /// Empty but for the namespaces that every cluster has.
    pub fn new(faults: Faults) -> ApiServer {
        let shared = Shared {
            store: Store::new(),
            applied: Mutex::default(),
            access: Mutex::default(),
            dice: Mutex::new(Dice::new(faults)),
            outage: tokio::sync::watch::Sender::new(false),
            empty_lists: Mutex::default(),
            used: Mutex::default(),
        };
        ApiServer { shared: Arc::new(shared) }
    }

    /// Answers one request; an error stands for a connection that cannot be made.
    pub async fn call(&self, request: Request<Body>) -> io::Result<Response<Body>> {
        if *self.shared.outage.borrow() && !request.headers().contains_key(PLAIN) {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        Ok(handler::answer(&self.shared, request).await)
    }

    /// Serves connections to `listener`, be it TCP or TLS, until it is dropped.
    pub async fn serve<L: axum::serve::Listener<Addr: std::fmt::Debug>>(&self, listener: L) -> io::Result<()> {
        let server = self.clone();
        let handler = move |request: Request<Body>| {
            let server = server.clone();
            async move {
                if *server.shared.outage.borrow() {
                    let what = "the server is away, by order of the test";
                    return status::Refusal::new(503, "ServiceUnavailable", what).response();
                }
                handler::answer(&server.shared, request).await
            }
        };
        axum::serve(listener, axum::Router::new().fallback(handler)).await
    }

    /// From now on other things go wrong.
    pub fn set_faults(&self, faults: Faults) {
        *lock(&self.shared.dice) = Dice::new(faults);
    }

    /// Begins or ends an outage: nothing is answered, and every watch breaks off. Over TCP every answer is 503
    /// meanwhile; for a server that cannot be reached, drop [`ApiServer::serve`] and its runtime.
    pub fn set_outage(&self, outage: bool) {
        self.shared.outage.send_replace(outage);
    }

    /// Forgets the history: what was seen until now can no longer be watched from, nor listed on (410 Gone).
    pub fn compact(&self) {
        self.shared.store.compact();
    }

    /// Answers the next list of a resource as if there were nothing, which is a fault that no client can see in one answer.
    pub fn lose_next_list(&self, plural: &str) {
        lock(&self.shared.empty_lists).insert(plural.to_owned());
    }

    /// Takes back what [`ApiServer::lose_next_list`] said.
    pub fn lose_no_list(&self) {
        lock(&self.shared.empty_lists).clear();
    }

    /// From now on a bearer token is asked for, and `token` may do what `rules` allow and nothing else. `None` allows everything.
    pub fn allow(&self, token: &str, rules: Option<Vec<Rule>>) {
        lock(&self.shared.access).allow(token, rules);
    }

    /// From now on `token` is nobody's.
    pub fn forbid(&self, token: &str) {
        lock(&self.shared.access).forbid(token);
    }

    /// What tokens with rules have made use of.
    pub fn used(&self) -> BTreeSet<Use> {
        lock(&self.shared.used).clone()
    }

    /// Puts an object in place as it is, whatever there was before: what a controller or kubelet would have done. A namespace that is not there
    /// is made.
    ///
    /// # Panics
    /// If it is of a kind that the server does not know, or has no name: a test is wrong then.
    pub fn put(&self, object: Value) {
        self.shared.store.put(object);
    }

    /// Takes an object away; whether it was there. `plural` is the resource's name in a path, `namespace` is empty for the whole cluster's.
    pub fn delete(&self, plural: &str, namespace: &str, name: &str) -> bool {
        self.shared.store.delete_named(plural, namespace, name)
    }

    /// Every object of a resource, as it is now.
    pub fn objects(&self, plural: &str) -> Vec<Value> {
        self.shared.store.objects(plural)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
