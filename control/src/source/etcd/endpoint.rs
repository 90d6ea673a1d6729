//! Where etcd is, and what is needed to be let in by TLS.

use std::path::Path;
use std::sync::Arc;

use hyper::Uri;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{self, ClientConfig, RootCertStore};

use super::client::EtcdError;
use crate::config::EtcdConfig;

/// etcd's port for clients (IANA).
const PORT: u16 = 2379;

/// A member of the etcd cluster.
pub struct Endpoint {
    /// As it is configured.
    pub url: String,
    /// A name, or an address without brackets.
    pub host: String,
    /// The port.
    pub port: u16,
    /// With TLS, the name that its certificate must bear.
    pub tls: Option<ServerName<'static>>,
}

impl Endpoint {
    /// From its URL.
    pub fn parse(url: &str) -> Result<Endpoint, EtcdError> {
        let fail = |problem: &str| EtcdError::Endpoint { url: url.to_owned(), problem: problem.to_owned() };
        let uri: Uri = url.parse().map_err(|_| fail("it is not a URL"))?;
        let tls = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => return Err(fail("it begins with neither http:// nor https://")),
        };
        if !matches!(uri.path(), "" | "/") {
            return Err(fail("it has a path, and etcd is served at the root; `source.etcd.prefix` is for keys"));
        }
        let host = uri.host().filter(|host| !host.is_empty()).ok_or_else(|| fail("it has no host"))?.trim_matches(['[', ']']).to_owned();
        let name = ServerName::try_from(host.clone()).map_err(|_| fail("its host is neither a name nor an address"))?;
        Ok(Endpoint { url: url.to_owned(), port: uri.port_u16().unwrap_or(PORT), tls: tls.then_some(name), host })
    }

    /// Host and port, as HTTP writes them.
    pub fn authority(&self) -> String {
        if self.host.contains(':') { format!("[{}]:{}", self.host, self.port) } else { format!("{}:{}", self.host, self.port) }
    }
}

/// What connects with TLS, by the certificates that the configuration names.
pub fn tls(config: &EtcdConfig) -> Result<TlsConnector, EtcdError> {
    fn fail(key: &'static str, path: &Path) -> impl Fn(String) -> EtcdError {
        let path = path.display().to_string();
        move |problem| EtcdError::Credentials { key, path: path.clone(), problem }
    }
    fn certificates(key: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, EtcdError> {
        let found = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        let found = found.map_err(|error| fail(key, path)(error.to_string()))?;
        if found.is_empty() { Err(fail(key, path)("it holds no certificate".into())) } else { Ok(found) }
    }
    let mut roots = RootCertStore::empty();
    // The configuration is checked: where there is TLS there is a CA.
    if let Some(path) = &config.ca {
        for certificate in certificates("ca", path)? {
            roots.add(certificate).map_err(|error| fail("ca", path)(error.to_string()))?;
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let builder = builder.expect("the provider serves the default protocol versions").with_root_certificates(roots);
    let client = match (&config.cert, &config.key) {
        (Some(cert), Some(key)) => {
            let private = PrivateKeyDer::from_pem_file(key).map_err(|error| fail("key", key)(error.to_string()))?;
            builder.with_client_auth_cert(certificates("cert", cert)?, private).map_err(|error| fail("cert", cert)(error.to_string()))?
        }
        _ => builder.with_no_client_auth(),
    };
    Ok(TlsConnector::from(Arc::new(client)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_read_with_their_port_and_their_name_for_tls() {
        let read = |url: &str| Endpoint::parse(url).map(|e| (e.host, e.port, e.tls.is_some())).map_err(|e| e.to_string());
        assert_eq!(read("http://192.0.2.10:2379"), Ok(("192.0.2.10".into(), 2379, false)));
        assert_eq!(read("https://[2001:db8::1]:1234/"), Ok(("2001:db8::1".into(), 1234, true)));
        assert_eq!(read("https://etcd.example"), Ok(("etcd.example".into(), 2379, true)));
        for (url, problem) in [("192.0.2.10:2379", "neither http"), ("ftp://a", "neither http"), ("http://a/v3", "has a path")] {
            let error = read(url).unwrap_err();
            assert!(error.contains(problem) && error.contains("write one as http://192.0.2.10:2379"), "{error}");
        }
    }
}
