//! Where the cluster's objects come from: asked as the daemon would ask.

use std::path::Path;
use std::time::Duration;

use k8s_openapi::jiff::{Timestamp, fmt::rfc2822};

use super::super::facts::{Origin, Tried};
use crate::config::{Config, EtcdConfig, SourceConfig};
use crate::source;
use crate::source::etcd::client::Client;

/// How long an answer may take.
const TIMEOUT: Duration = Duration::from_secs(10);

pub(super) fn look(config: &Config) -> Origin {
    match &config.source {
        SourceConfig::Directory(path) => Origin::Directory(path.clone(), manifests(path)),
        SourceConfig::Kubernetes { server, kubeconfig } => {
            let named = server.clone().unwrap_or_else(|| "the API server".into());
            match in_time(source::kubernetes::reach(server.as_deref(), kubeconfig.as_deref())) {
                Ok((url, date)) => Origin::Server(url, Ok(date.and_then(|date| ahead(&date)))),
                Err(why) => Origin::Server(named, Err(why)),
            }
        }
        SourceConfig::Etcd(etcd) => Origin::Server(etcd.endpoints.join(", "), in_time(etcd_answers(etcd)).map(|()| None)),
    }
}

/// One key is read, which need not be there: the way, the credentials and the permission are those of the daemon.
async fn etcd_answers(config: &EtcdConfig) -> Result<(), String> {
    let client = Client::new(config).map_err(|error| error.to_string())?;
    client.read(&config.prefix).await.map(|_| ()).map_err(|error| error.to_string())
}

fn in_time<T>(asked: impl Future<Output = Result<T, String>>) -> Tried<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| error.to_string())?;
    runtime
        .block_on(async { tokio::time::timeout(TIMEOUT, asked).await.unwrap_or_else(|_| Err(format!("no answer within {} s", TIMEOUT.as_secs()))) })
}

fn manifests(path: &Path) -> Tried<usize> {
    let entries = std::fs::read_dir(path).map_err(|error| error.to_string())?;
    let is_one = |path: &Path| path.extension().is_some_and(|extension| extension == "yaml" || extension == "yml");
    Ok(entries.flatten().filter(|entry| is_one(&entry.path())).count())
}

/// How far a server's clock is ahead of this machine's, in seconds, by the date of its answer (RFC 9110 §6.6.1).
fn ahead(date: &str) -> Option<i64> {
    let theirs = rfc2822::parse(date).ok()?.timestamp();
    Some(theirs.as_second() - Timestamp::now().as_second())
}
