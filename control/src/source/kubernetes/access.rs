//! How the API server is reached, and as whom.
//!
//! The configured address counts before any that a kubeconfig or the environment names: in a pod the environment names the `kubernetes`
//! VIP, which nobody serves before this gateway runs. Of errors only what cannot hold a secret is told: a parser quotes what it reads.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use kube::client::ClientBuilder;
use kube::config::{KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::{Client, Config};
use tower::util::MapRequestLayer;

use super::token::TokenFile;

/// How long a connection to the server may take to come about.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Where a pod finds the token of its service account.
const POD_TOKEN: &str = "/var/run/secrets/kubernetes.io/serviceaccount/token";

/// The API server and the credentials for it.
pub(super) struct Server {
    /// For people: its URL.
    pub url: String,
    configured: Option<Configured>,
    client: Mutex<Client>,
}

/// What the configuration says.
struct Configured {
    server: Option<String>,
    kubeconfig: Option<PathBuf>,
}

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// Nothing says where the server is.
    #[error("neither server nor kubeconfig is given, and this is no pod; write source: {{kubernetes: {{kubeconfig: /etc/podgate/kubeconfig}}}}")]
    Nowhere,
    /// The server is not a URL to be used.
    #[error("server: `{0}` is not a URL of an API server; write one as https://192.0.2.10:6443, without credentials")]
    Url(String),
    /// The kubeconfig cannot be used.
    #[error("kubeconfig: {path}: {reason}; `kubectl --kubeconfig {path} get nodes` should work on this machine")]
    Kubeconfig {
        /// The file.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The pod has no credentials.
    #[error("the pod's service account cannot be used: {0}; set automountServiceAccountToken, or give a kubeconfig")]
    ServiceAccount(String),
    /// The file of a token holds none.
    #[error("tokenFile: {path}: {reason}; it must hold the token and nothing else, readable by the daemon")]
    Token {
        /// The file.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// No client can be made of it.
    #[error("TLS cannot be set up: {0}; check the certificates that the kubeconfig names")]
    Tls(String),
}

impl Server {
    /// As configured. Files are read, the network is not touched.
    pub async fn open(server: Option<&str>, kubeconfig: Option<&Path>) -> Result<Server, AccessError> {
        let configured = Configured { server: server.map(str::to_owned), kubeconfig: kubeconfig.map(Path::to_owned) };
        let config = configured.config().await?;
        let url = config.cluster_url.to_string().trim_end_matches('/').to_owned();
        let client = make(config)?;
        Ok(Server { url, configured: Some(configured), client: Mutex::new(client) })
    }

    /// By a client that is there already.
    pub fn with(client: Client, url: &str) -> Server {
        Server { url: url.to_owned(), configured: None, client: Mutex::new(client) }
    }

    /// The client.
    pub fn client(&self) -> Client {
        self.client.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reads credentials again: certificates and tokens that stand in a kubeconfig are replaced there when they expire. (A token in a file
    /// of its own, as in a pod, is read for each request: [`TokenFile`].)
    pub async fn renew(&self) {
        let Some(configured) = &self.configured else { return };
        let renewed = match configured.config().await {
            Ok(config) => make(config),
            Err(error) => Err(error),
        };
        match renewed {
            Ok(client) => *self.client.lock().unwrap_or_else(PoisonError::into_inner) = client,
            Err(error) => tracing::warn!("source.kubernetes: {error}; the credentials known so far stay in use"),
        }
    }
}

impl Configured {
    async fn config(&self) -> Result<Config, AccessError> {
        let url = self.server.as_deref().map(url).transpose()?;
        let mut config = match (&self.kubeconfig, &url) {
            (Some(path), _) => from_kubeconfig(path).await?,
            // Whatever it names is replaced below: it need not even be in the environment.
            (None, Some(_)) if Path::new(POD_TOKEN).exists() => pod(Config::incluster_dns())?,
            (None, Some(url)) => Config::new(url.clone()),
            (None, None) if Path::new(POD_TOKEN).exists() => pod(Config::incluster_env())?,
            (None, None) => return Err(AccessError::Nowhere),
        };
        if let Some(url) = url {
            config.cluster_url = url;
        }
        config.connect_timeout = Some(CONNECT_TIMEOUT);
        // Every request has a time of its own, and one place decides what is tried again.
        config.read_timeout = None;
        config.default_retry = false;
        Ok(config)
    }
}

fn pod<E: std::fmt::Display>(config: Result<Config, E>) -> Result<Config, AccessError> {
    config.map_err(|error| AccessError::ServiceAccount(error.to_string()))
}

fn make(mut config: Config) -> Result<Client, AccessError> {
    let token = TokenFile::take(&mut config.auth_info)?;
    let builder = ClientBuilder::try_from(config).map_err(|error| AccessError::Tls(super::chain(&error)))?;
    Ok(match token {
        Some(mut token) => builder.with_layer(&MapRequestLayer::new(move |request| token.sign(request))).build(),
        None => builder.build(),
    })
}

/// A URL with a scheme and a host, and nobody's password in it.
fn url(text: &str) -> Result<http::Uri, AccessError> {
    let refused = || AccessError::Url(text.rsplit_once('@').map_or(text, |(_, host)| host).to_owned());
    let url: http::Uri = text.parse().map_err(|_| refused())?;
    let usable = matches!(url.scheme_str(), Some("http" | "https")) && url.authority().is_some_and(|authority| !authority.as_str().contains('@'));
    if usable { Ok(url) } else { Err(refused()) }
}

async fn from_kubeconfig(path: &Path) -> Result<Config, AccessError> {
    let failed = |error: KubeconfigError| {
        let reason = match error {
            // The parser's own words may quote the line, and that line may be a token.
            KubeconfigError::Parse(_) => "it is not YAML in a kubeconfig's form".to_owned(),
            KubeconfigError::ReadConfig(error, _) => error.to_string(),
            other => super::chain(&other),
        };
        AccessError::Kubeconfig { path: path.display().to_string(), reason }
    };
    let kubeconfig = Kubeconfig::read_from(path).map_err(failed)?;
    Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(server: Option<&str>, kubeconfig: Option<&Path>) -> Result<Server, AccessError> {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(Server::open(server, kubeconfig))
    }

    fn refusal(server: Option<&str>, kubeconfig: Option<&Path>) -> String {
        open(server, kubeconfig).map(|server| server.url).unwrap_err().to_string()
    }

    #[test]
    fn the_configured_server_counts_before_the_kubeconfigs() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kubeconfig");
        let text = "apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters: [{name: c, cluster: {server: 'https://10.96.0.1'}}]\n\
                    users: [{name: u, user: {token: hush}}]\ncontexts: [{name: c, context: {cluster: c, user: u}}]\n";
        std::fs::write(&path, text).unwrap();
        assert_eq!(open(None, Some(&path)).unwrap().url, "https://10.96.0.1");
        assert_eq!(open(Some("https://192.0.2.10:6443"), Some(&path)).unwrap().url, "https://192.0.2.10:6443");
        assert_eq!(open(Some("http://127.0.0.1:8001"), None).unwrap().url, "http://127.0.0.1:8001");
    }

    #[test]
    fn no_error_quotes_a_secret() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kubeconfig");
        std::fs::write(&path, "users:\n- name: u\n  user: {token: hush: hush}\n").unwrap();
        let said = refusal(None, Some(&path));
        assert!(said.starts_with("kubeconfig: ") && said.contains("it is not YAML in a kubeconfig's form") && !said.contains("hush"), "{said}");
        let said = refusal(Some("https://me:hush@192.0.2.10"), None);
        assert!(said.contains("192.0.2.10") && !said.contains("hush"), "{said}");
        assert!(refusal(Some("192.0.2.10"), None).contains("write one as https://"));
        let missing = dir.path().join("missing");
        assert!(refusal(None, Some(&missing)).contains("No such file"));
    }

    #[test]
    fn who_names_nothing_outside_of_a_pod_hears_what_to_write() {
        if !Path::new(POD_TOKEN).exists() {
            assert!(refusal(None, None).contains("neither server nor kubeconfig"));
        }
    }
}
