//! Where the cluster's objects come from: a directory, an API server, an etcd.

use std::net::{SocketAddr, TcpListener};
use std::process::{Command, Stdio};
use std::thread::JoinHandle;

use axum::http::HeaderMap;
use axum::routing::get;
use podgate::netlink::Family;
use podgate_apiserver::{ApiServer, Faults};
use podgate_testbed::need::program;
use serde_json::json;
use tokio::sync::oneshot;

use crate::{Fault, Try, Undo, Ward};

const PORT: u16 = 6443;

/// What serves on a machine of the lab, in a thread of its own, until it is dropped.
struct Serving(Option<(oneshot::Sender<()>, JoinHandle<()>)>);

impl Serving {
    fn start<S: Future + 'static>(ward: &Ward<'_>, serve: impl FnOnce(tokio::net::TcpListener) -> S + Send + 'static) -> Try<Serving> {
        let address = address(ward);
        let listener = ward.node.machine().run(|| TcpListener::bind(address))??;
        listener.set_nonblocking(true)?;
        let (stop, stopped) = oneshot::channel();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let thread = std::thread::spawn(move || {
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener).expect("a listener that does not block");
                tokio::select! {
                    _ = serve(listener) => {}
                    _ = stopped => {}
                }
            });
        });
        Ok(Serving(Some((stop, thread))))
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.0.take() {
            drop(stop);
            let _ = thread.join();
        }
    }
}

fn address(ward: &Ward<'_>) -> SocketAddr {
    SocketAddr::new(ward.node.machine().address(Family::V4), PORT)
}

/// Looks by a configuration with this source.
fn source<'a>(ward: &'a Ward<'a>, source: &str) -> Try<Undo<'a>> {
    ward.configured(|text| {
        let lines = text.lines().map(|line| if line.starts_with("  directory:") { format!("  {source}") } else { line.to_owned() });
        lines.collect::<Vec<_>>().join("\n") + "\n"
    })
}

/// An API server that knows one token, and a kubeconfig with another.
fn api_server<'a>(ward: &'a Ward<'a>, token: &str) -> Try<Undo<'a>> {
    let server = ApiServer::new(Faults::none(1));
    server.allow("good", None);
    // It may be known, and may do nothing.
    server.allow("weak", Some(Vec::new()));
    let serving = Serving::start(ward, move |listener| async move { server.serve(listener).await })?;
    let kubeconfig = ward.node.config().with_file_name("kubeconfig");
    let text = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters: [{{name: c, cluster: {{server: \"http://{}\"}}}}]\n\
         users: [{{name: u, user: {{token: {token}}}}}]\ncontexts: [{{name: c, context: {{cluster: c, user: u}}}}]\n",
        address(ward)
    );
    std::fs::write(&kubeconfig, text)?;
    let undo = source(ward, &format!("kubernetes: {{kubeconfig: {}}}", kubeconfig.display()))?;
    Ok(Box::new(move || {
        drop(serving);
        undo()
    }))
}

/// A server whose clock stands still in a year long past: nothing of a real one could be made to, this machine's clock being everybody's.
fn late<'a>(ward: &'a Ward<'a>) -> Try<Undo<'a>> {
    let answer = || async {
        let mut headers = HeaderMap::new();
        headers.insert("date", "Thu, 01 Jan 2015 00:00:00 GMT".parse().expect("a header's value"));
        (headers, json!({"kind": "NodeList", "apiVersion": "v1", "metadata": {}, "items": []}).to_string())
    };
    let router = axum::Router::new().route("/api/v1/nodes", get(answer));
    let serving = Serving::start(ward, move |listener| async move { axum::serve(listener, router).await })?;
    let undo = source(ward, &format!("kubernetes: {{server: \"http://{}\"}}", address(ward)))?;
    Ok(Box::new(move || {
        drop(serving);
        undo()
    }))
}

/// First that all is well with credentials that are.
fn strangers<'a>(ward: &'a Ward<'a>) -> Try<Undo<'a>> {
    let undo = api_server(ward, "good")?;
    ward.all_fine()?;
    undo()?;
    api_server(ward, "bad")
}

/// An etcd that serves this node, of which the doctor finds nothing to say, and is then killed.
fn killed_etcd<'a>(ward: &'a Ward<'a>) -> Try<Undo<'a>> {
    let url = "http://192.0.2.1:2379";
    let mut command = Command::new(program("etcd").ok_or("no etcd")?);
    // It refuses to run on a machine of another kind than it is tested on unless told so.
    command.env("ETCD_UNSUPPORTED_ARCH", std::env::consts::ARCH.replace("aarch64", "arm64"));
    command.arg("--data-dir").arg(ward.node.config().with_file_name("etcd")).args(["--listen-peer-urls", "http://127.0.0.1:0"]);
    command.args(["--listen-client-urls", url, "--advertise-client-urls", url]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut etcd = ward.node.machine().run(|| command.spawn())??;
    let undo = source(ward, &format!("etcd: {{endpoints: [\"{url}\"]}}"));
    let fine = undo.as_ref().map_err(ToString::to_string).and_then(|_| ward.all_fine().map_err(|error| error.to_string()));
    etcd.kill()?;
    etcd.wait()?;
    fine?;
    undo
}

const fn fault(name: &'static str, make: for<'a> fn(&'a Ward<'a>) -> Try<Undo<'a>>, words: &'static [&'static str]) -> Fault {
    Fault { name, make, check: "source", status: "failure", words }
}

pub const FAULTS: &[Fault] = &[
    fault("no directory of manifests", |ward| source(ward, "directory: /run/nowhere"), &["/run/nowhere cannot be read", "source.directory"]),
    fault(
        "an API server that is not there",
        |ward| source(ward, &format!("kubernetes: {{server: \"http://{}\"}}", address(ward))),
        &["http://192.0.2.1:6443", "does not serve this node"],
    ),
    fault("an API server that does not know us", strangers, &["401"]),
    fault("an API server that lets us do nothing", |ward| api_server(ward, "weak"), &["403", "rbac.yaml"]),
    fault(
        "an etcd that never was there",
        |ward| source(ward, "etcd: {endpoints: [\"http://192.0.2.1:2379\"]}"),
        &["http://192.0.2.1:2379", "does not serve this node"],
    ),
    Fault {
        name: "a server of another time",
        make: late,
        check: "clock",
        status: "warning",
        words: &["ahead of that of http://192.0.2.1:6443", "chrony"],
    },
];

pub const ETCD: &[Fault] = &[fault("an etcd that was killed", killed_etcd, &["http://192.0.2.1:2379", "does not serve this node"])];
