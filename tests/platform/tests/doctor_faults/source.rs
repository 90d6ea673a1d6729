//! Where the cluster's objects come from: a directory, an API server, an etcd.

use std::net::SocketAddr;

use axum::http::HeaderMap;
use axum::routing::get;
use podgate::netlink::Family;
use podgate_apiserver::{ApiServer, Faults};
use podgate_testbed::etcd;
use podgate_testbed::serving::Serving;
use serde_json::json;

use crate::{Fault, Try, Undo, Ward};

const PORT: u16 = 6443;

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
    let serving = Serving::start(ward.node.machine(), address(ward), move |listener| async move { server.serve(listener).await })?;
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
    let serving = Serving::start(ward.node.machine(), address(ward), move |listener| async move { axum::serve(listener, router).await })?;
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
    let mut etcd = etcd::start(ward.node.machine(), &ward.node.config().with_file_name("etcd"), &[url], &[])?;
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
