//! Kubernetes without a cluster: an unmodified `kubectl` against the conformance server, and two gateways that follow it.
//!
//! The gateways' token may do what `deploy/kubernetes/rbac.yaml` allows and nothing else.
//!
//! `PODGATE_APISERVER` does not count here, as it does in `control/tests/kubernetes.rs`: a real server cannot be reached from these namespaces, nor be
//! asked to go away, to forget its history or to tell what a token made use of.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::Signal;
use podgate::config::{Config, HostFacts, SourceConfig};
use podgate::lab::manifest::{self, EndpointSpec, SERVICE_PORT, ServiceSpec, TrafficPolicy};
use podgate::lab::program::bulk::Ticker;
use podgate::lab::program::client;
use podgate::lab::{Dual, Lab, LabError, Machine, Node, NodeSettings, wait_until};
use podgate::netlink::Family;
use podgate::source::{self, FirstLook, NodeReport};
use podgate_apiserver::{ApiServer, Rule, Use};
use podgate_testbed::need::program;
use podgate_testbed::serving::Serving;
use podgate_testbed::tool::{Ended, Running};
use podgate_testbed::{Bed, Need, Outcome, run};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use serde_json::Value;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;

const RBAC: &str = include_str!("../../../deploy/kubernetes/rbac.yaml");
const PATIENCE: Duration = Duration::from_secs(2);
const TICK: Duration = Duration::from_millis(10);
/// How long a connection may wait for an answer while its gateway is started anew.
const RESTART_PATIENCE: Duration = Duration::from_secs(20);
const PORT: u16 = 6443;

/// Tokens.
const ADMIN: &str = "all-powerful";
const GATEWAY: &str = "hush-hush-4711";

type Try<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> ExitCode {
    run(|tests| {
        let kubectl = Need::Program("kubectl");
        tests.add_if(kubectl, "kubectl lists, creates, edits, watches and deletes every kind that the server knows", kubectl_works);
        tests.add("the server must be who it says it is, and a token that is replaced in its file is taken up", over_tls);
        tests.add_if(
            kubectl,
            "two gateways follow an API server, lose nothing while it is away, even by a restart, and hear of removals afterwards",
            two_gateways,
        );
    })
}

/// Serves over TLS on a machine of the lab.
fn serve(server: &ApiServer, machine: &Machine, authority: &Authority) -> Result<Serving, LabError> {
    let (server, acceptor) = (server.clone(), authority.acceptor.clone());
    let address = SocketAddr::new(machine.addresses().of(Family::V4), PORT);
    Serving::start(machine, address, move |listener| async move { server.serve(Tls { listener, acceptor }).await })
}

/// `kubectl`, on a machine, as who holds a token.
struct Kubectl<'a> {
    machine: &'a Machine,
    program: PathBuf,
    kubeconfig: PathBuf,
}

impl<'a> Kubectl<'a> {
    fn new(machine: &'a Machine, directory: &Path, authority: &Authority) -> Try<Kubectl<'a>> {
        let kubeconfig = kubeconfig(directory, machine, authority, ADMIN)?;
        Ok(Kubectl { machine, program: program("kubectl").ok_or("no kubectl")?, kubeconfig })
    }

    fn start(&self, arguments: &[&str], input: &str, environment: &[(&str, &str)]) -> Try<Running> {
        let mut command = Command::new(&self.program);
        command.args(arguments).env("KUBECONFIG", &self.kubeconfig).env("HOME", self.kubeconfig.with_file_name("home"));
        command.envs(environment.iter().copied());
        Ok(self.machine.run(|| Running::start(command, input.as_bytes()))??)
    }

    fn end(&self, arguments: &[&str], input: &str) -> Try<Ended> {
        Ok(self.start(arguments, input, &[])?.end(Duration::from_secs(30))?)
    }

    fn ok(&self, arguments: &[&str], input: &str) -> Try<String> {
        Ok(self.end(arguments, input)?.success()?)
    }
}

/// A kubeconfig for who holds this token. With TLS: over anything else `kubectl` sends no token.
fn kubeconfig(directory: &Path, machine: &Machine, authority: &Authority, token: &str) -> Try<PathBuf> {
    let path = directory.join(if token == ADMIN { "admin.kubeconfig" } else { "gateway.kubeconfig" });
    let certificate = path.with_extension("pem");
    fs::write(&certificate, &authority.pem)?;
    let server = SocketAddr::new(machine.addresses().of(Family::V4), PORT);
    let text = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\n\
         clusters: [{{name: c, cluster: {{server: \"https://{server}\", certificate-authority: {}}}}}]\n\
         users: [{{name: u, user: {{token: {token}}}}}]\ncontexts: [{{name: c, context: {{cluster: c, user: u}}}}]\n",
        certificate.display()
    );
    fs::write(&path, text)?;
    Ok(path)
}

const OBJECTS: &str = "
apiVersion: v1
kind: Service
metadata: {name: web, labels: {app: web}}
spec: {ports: [{name: http, port: 80}, {name: more, port: 81}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints: [{addresses: [10.244.1.3], nodeName: n1}]
---
apiVersion: v1
kind: Node
metadata: {name: n1}
spec: {podCIDRs: [10.244.1.0/24]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny}
spec: {podSelector: {}}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: settings}
data: {color: red}
";

fn kubectl_works(bed: &Bed) -> Outcome {
    let lab = Lab::builder(bed.sandbox(), &bed.binary()).named("kubectl").nodes(1).machines()?;
    let (server, outside) = (ApiServer::default(), lab.outside());
    let authority = Authority::new(outside.addresses().of(Family::V4))?;
    let _serving = serve(&server, outside, &authority)?;
    let kubectl = Kubectl::new(outside, lab.directory(), &authority)?;
    assert!(kubectl.ok(&["version"], "")?.contains("podgate-test"));
    let known = kubectl.ok(&["api-resources", "--no-headers"], "")?;
    for kind in ["Service", "EndpointSlice", "Node", "ConfigMap", "NetworkPolicy"] {
        assert!(known.contains(kind), "{known}");
    }
    let created = kubectl.ok(&["create", "-f", "-"], OBJECTS)?;
    let names = ["service/web", "endpointslice.discovery.k8s.io/web-1", "node/n1", "networkpolicy.networking.k8s.io/deny", "configmap/settings"];
    for name in names {
        assert!(created.contains(&format!("{name} created")), "{created}");
        assert_eq!(kubectl.ok(&["get", name, "-o", "name"], "")?.trim(), name);
    }
    let again = kubectl.end(&["create", "-f", "-"], OBJECTS)?;
    assert!(!again.status.success() && again.stderr.contains("AlreadyExists"), "{}", again.printed());

    // By selectors of both kinds, and what is missing as kubectl knows it.
    let listed = |arguments: &[&str]| -> Try<String> { kubectl.ok(&[&["get", "-o", "name"], arguments].concat(), "") };
    assert_eq!(listed(&["svc", "-A", "-l", "app in (web),!gone"])?.trim(), "service/web");
    assert_eq!(listed(&["svc", "-l", "app=db"])?, "");
    assert_eq!(listed(&["cm", "--field-selector", "metadata.name=settings"])?.trim(), "configmap/settings");
    let missing = kubectl.end(&["get", "svc", "nowhere"], "")?;
    assert!(missing.stderr.contains("Error from server (NotFound): services \"nowhere\" not found"), "{}", missing.printed());
    for number in 0..30 {
        server
            .put(serde_json::json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": format!("cm-{number:02}"), "namespace": "many"}}));
    }
    assert_eq!(listed(&["cm", "-n", "many", "--chunk-size", "7"])?.lines().count(), 30);

    // A watch hears of what the next commands do.
    let mut watching =
        kubectl.start(&["get", "svc", "--watch", "--output-watch-events", "-o", "jsonpath={.type} {.object.metadata.name}{\"\\n\"}"], "", &[])?;
    // Each patch in its own way: edit and apply by strategic merge, patch by merge, apply on the server's side.
    let edited = kubectl.start(&["edit", "svc", "web"], "", &[("KUBE_EDITOR", "sed -i s/name:.more/name:\\ less/")])?.end(Duration::from_secs(30))?;
    assert!(edited.success()?.contains("service/web edited"));
    let ports = kubectl.ok(&["get", "svc", "web", "-o", "jsonpath={.spec.ports[*].name}"], "")?;
    assert_eq!(ports, "http less");
    let second = OBJECTS.split("---").next().unwrap_or_default().replace("port: 81", "port: 82");
    kubectl.ok(&["apply", "-f", "-"], &second)?;
    kubectl.ok(&["apply", "-f", "-"], &second.replace("app: web", "app: shop"))?;
    let labelled = kubectl.ok(&["get", "svc", "web", "-o", "jsonpath={.metadata.labels.app} {.spec.ports[*].port}"], "")?;
    assert!(labelled.starts_with("shop 80 "), "{labelled}");
    kubectl.ok(&["apply", "--server-side", "--force-conflicts", "-f", "-"], OBJECTS)?;
    kubectl.ok(
        &[
            "patch",
            "node",
            "n1",
            "--subresource=status",
            "--type=merge",
            "-p",
            "{\"status\":{\"addresses\":[{\"type\":\"InternalIP\",\"address\":\"192.0.2.1\"}]}}",
        ],
        "",
    )?;
    kubectl.ok(&["annotate", "node", "n1", "podgate.io/overlay=none"], "")?;
    let node: Value = serde_json::from_str(&kubectl.ok(&["get", "node", "n1", "-o", "json"], "")?)?;
    assert_eq!(
        (&node["status"]["addresses"][0]["address"], &node["metadata"]["annotations"]["podgate.io/overlay"]),
        (&"192.0.2.1".into(), &"none".into())
    );
    // Who replaces an old version is told.
    let old: Value = serde_json::from_str(&kubectl.ok(&["get", "cm", "settings", "-o", "json"], "")?)?;
    kubectl.ok(&["patch", "cm", "settings", "--type=merge", "-p", "{\"data\":{\"color\":\"blue\"}}"], "")?;
    let conflict = kubectl.end(&["replace", "-f", "-"], &old.to_string())?;
    assert!(!conflict.status.success() && conflict.stderr.contains("Conflict"), "{}", conflict.printed());

    kubectl.ok(&["delete", "svc/web", "endpointslice/web-1", "node/n1", "netpol/deny", "cm/settings"], "")?;
    for name in names {
        assert!(kubectl.end(&["get", name], "")?.stderr.contains("NotFound"));
    }
    kubectl.ok(&["delete", "namespace", "many"], "")?;
    assert_eq!(server.objects("configmaps").len(), 0);
    // It runs until it is ended; what it printed until then is all that counts.
    assert!(!watching.ends_within(Duration::from_millis(200))?, "the watch ended by itself");
    watching.kill()?;
    let seen = watching.end(PATIENCE)?.stdout;
    assert!(seen.starts_with("ADDED web") && seen.contains("MODIFIED web") && seen.trim_end().ends_with("DELETED web"), "{seen}");
    Ok(())
}

/// Takes connections by TLS.
struct Tls {
    listener: tokio::net::TcpListener,
    acceptor: TlsAcceptor,
}

impl axum::serve::Listener for Tls {
    type Io = tokio_rustls::server::TlsStream<tokio::net::TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            // Who does not trust the certificate breaks off.
            if let Ok((stream, from)) = self.listener.accept().await
                && let Ok(stream) = self.acceptor.accept(stream).await
            {
                return (stream, from);
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A certificate authority, and a server by it.
struct Authority {
    /// The authority's certificate.
    pem: String,
    acceptor: TlsAcceptor,
}

impl Authority {
    /// For a server at `address`.
    fn new(address: IpAddr) -> Try<Authority> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate()?;
        let pem = params.self_signed(&key)?.pem();
        let issuer = Issuer::new(params, key);
        let key = KeyPair::generate()?;
        let certificate = CertificateParams::new(vec![address.to_string()])?.signed_by(&key, &issuer)?;
        let key = PrivateKeyDer::try_from(key.serialize_der())?;
        let config = ServerConfig::builder().with_no_client_auth().with_single_cert(vec![certificate.der().clone()], key)?;
        Ok(Authority { pem, acceptor: TlsAcceptor::from(Arc::new(config)) })
    }
}

fn over_tls(bed: &Bed) -> Outcome {
    let lab = Lab::builder(bed.sandbox(), &bed.binary()).named("tls").nodes(1).machines()?;
    let (directory, outside) = (lab.directory().to_owned(), lab.outside());
    let ip = outside.addresses().of(Family::V4);
    let address = SocketAddr::new(ip, PORT);
    let (Authority { pem: trusted, acceptor }, stranger) = (Authority::new(ip)?, Authority::new(ip)?.pem);
    let token = directory.join("token");
    fs::write(&token, "first\n")?;
    let configured = |name: &str, authority: &str| -> Try<Config> {
        let (file, path) = (directory.join(format!("{name}.pem")), directory.join(format!("{name}.kubeconfig")));
        fs::write(&file, authority)?;
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters: [{{name: c, cluster: {{server: 'https://10.96.0.1', certificate-authority: {}}}}}]\n\
             users: [{{name: u, user: {{tokenFile: {}}}}}]\ncontexts: [{{name: c, context: {{cluster: c, user: u}}}}]\n",
            file.display(),
            token.display()
        );
        fs::write(&path, text)?;
        let state = directory.join(name);
        let text = format!("node: n1\nunderlay: {{address: 192.0.2.1}}\nstateDir: {}\nsource: {{directory: /}}\n", state.display());
        let config = Config::parse("podgate.yaml".as_ref(), &text, &HostFacts::read())?;
        let source = SourceConfig::Kubernetes { server: Some(format!("https://{address}")), kubeconfig: Some(path) };
        Ok(Config { source, ..config })
    };
    let (right, wrong) = (configured("right", &trusted)?, configured("wrong", &stranger)?);
    let server = ApiServer::default();
    let rules = Rule::of_manifest(RBAC)?;
    server.allow("first", Some(rules.clone()));
    let listener = outside.run(|| TcpListener::bind(address))??;
    listener.set_nonblocking(true)?;
    let work = async {
        let listener = tokio::net::TcpListener::from_std(listener).map_err(|error| error.to_string())?;
        let serving = server.clone();
        tokio::spawn(async move { serving.serve(Tls { listener, acceptor }).await });
        let refused = tokio::time::timeout(Duration::from_secs(2), source::start(&wrong, NodeReport::default(), FirstLook::ForNews)).await;
        assert!(refused.is_err() && server.used().is_empty(), "a server with a stranger's certificate was believed");
        let started = tokio::time::timeout(Duration::from_secs(10), source::start(&right, NodeReport::default(), FirstLook::ForNews)).await;
        let mut source = started.map_err(|_| "not within 10 s over TLS")?.map_err(|error| error.to_string())?;
        assert!(source.status.borrow().connected);
        // Another token from now on; the old one is nobody's, and every watch has to begin anew.
        fs::write(&token, "second\n").map_err(|error| error.to_string())?;
        server.allow("second", Some(rules));
        server.forbid("first");
        server.set_outage(true);
        let lost = tokio::time::timeout(Duration::from_secs(10), source.status.wait_for(|status| !status.connected)).await;
        lost.map_err(|_| "the loss was not told")?.map_err(|error| error.to_string())?;
        server.set_outage(false);
        let back = tokio::time::timeout(Duration::from_secs(20), source.status.wait_for(|status| status.connected)).await;
        back.map_err(|_| "the new token was not taken up")?.map_err(|error| error.to_string())?;
        Ok::<(), String>(())
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    outside.run(|| runtime.block_on(work))??;
    Ok(())
}

/// What the test of two gateways works with.
struct Stand<'a> {
    lab: &'a Lab,
    server: ApiServer,
    kubectl: Kubectl<'a>,
}

fn service(name: &str, number: u8, endpoints: Vec<EndpointSpec>) -> ServiceSpec {
    let vips = Dual { v4: [10, 96, 1, number].into(), v6: [0xfd00, 0x96, 0, 0, 0, 0, 1, number.into()].into() };
    ServiceSpec { name: name.into(), vips, node_port: 30100 + u16::from(number), policy: TrafficPolicy::Cluster, endpoints }
}

impl Stand<'_> {
    fn status(&self, node: &Node) -> Result<Value, LabError> {
        node.query(&["status"])
    }

    fn wait(&self, what: &str, patience: u64, holds: impl Fn(&Node) -> Result<bool, LabError>) -> Outcome {
        for node in self.lab.nodes() {
            let what = || format!("{what} on {}", node.name());
            wait_until(Duration::from_secs(patience), what, || {
                Ok(if holds(node)? { None } else { Some(format!("status: {}\n{}", self.status(node)?, node.log_tail(20))) })
            })?;
        }
        Ok(())
    }

    /// Services and slices come by watches of their own, in either order: a service is there when its endpoints are.
    fn wait_for_services(&self, patience: u64, there: &[&ServiceSpec], gone: &[&str]) -> Outcome {
        self.wait("the services as they are declared", patience, |node| {
            let listed = node.podgate(&["services", "-o", "json"])?;
            let backends = node.query(&["backends"])?;
            let rows: Vec<String> = backends["backends"].as_array().into_iter().flatten().map(Value::to_string).collect();
            let has = |name: &str| listed.contains(&format!("default/{name}:"));
            let whole = |spec: &&ServiceSpec| {
                let row = |address: IpAddr| {
                    let (service, address) = (format!("default/{}:", spec.name), address.to_string());
                    rows.iter().any(|row| row.contains(&service) && row.contains(&address))
                };
                has(&spec.name) && spec.endpoints.iter().all(|endpoint| Family::BOTH.into_iter().all(|family| row(endpoint.addresses.of(family))))
            };
            Ok(there.iter().all(whole) && !gone.iter().any(|name| has(name)))
        })
    }

    /// A service answers the outside client at every node's port, and every pod at its VIPs.
    fn works(&self, spec: &ServiceSpec) -> Outcome {
        let Dual { v4, v6 } = spec.vips;
        for pod in self.lab.pods() {
            for vip in [IpAddr::V4(v4), IpAddr::V6(v6)] {
                let answer = pod.machine().run(|| client::tcp(SocketAddr::new(vip, SERVICE_PORT), 20_000, PATIENCE))?;
                answer.map_err(|error| {
                    let drops: Vec<String> = self.lab.nodes().iter().map(|node| node.podgate(&["drops"]).unwrap_or_default()).collect();
                    format!("{} from {}: {error}\n{}", spec.name, pod.name(), drops.join("\n"))
                })?;
            }
        }
        for node in self.lab.nodes() {
            let to = SocketAddr::new(node.machine().addresses().of(Family::V4), spec.node_port);
            self.lab.outside().run(|| client::tcp(to, 20_000, PATIENCE))??;
        }
        Ok(())
    }

    /// While the server is away a gateway is killed and started: its connections go on, and new ones are led by what it knew.
    fn restarts_without_the_server(&self, services: &[&ServiceSpec]) -> Outcome {
        let mut tickers = Vec::new();
        for (pod, spec) in self.lab.pods().iter().zip(services) {
            let to = SocketAddr::new(IpAddr::V4(spec.vips.v4), SERVICE_PORT);
            tickers.push((format!("{} to {}", pod.name(), spec.name), Ticker::start(pod.machine().netns(), to, TICK, RESTART_PATIENCE)?));
        }
        let node = &self.lab.nodes()[0];
        self.lab.restart(node, Signal::SIGKILL)?;
        let source = &self.status(node)?["source"];
        assert_eq!(source["connected"], false, "{source}");
        services.iter().try_for_each(|spec| self.works(spec))?;
        for (what, ticker) in &tickers {
            // One answer may still be of before.
            let before = ticker.answered();
            let missing = || Ok((ticker.answered() < before + 2).then(|| "no further answer".to_owned()));
            wait_until(RESTART_PATIENCE, || format!("answers on the connection of before, {what}"), missing)?;
        }
        assert!(node.log().contains("what it said before this start is in force"), "{}", node.log_tail(20));
        for (what, ticker) in tickers {
            let report = ticker.finish();
            eprintln!("      {what}: {} answers, the longest pause {} ms", report.answered, report.longest_gap.as_millis());
            assert!(report.broken.is_none() && report.answered > 0, "{what}: {:?}", report.broken);
        }
        Ok(())
    }

    fn refused(&self, spec: &ServiceSpec) -> Outcome {
        for pod in self.lab.pods() {
            let to = SocketAddr::new(IpAddr::V4(spec.vips.v4), SERVICE_PORT);
            let answer = pod.machine().run(|| client::tcp(to, 100, Duration::from_millis(500)))?;
            assert!(answer.is_err(), "{} still reaches {}, which is no more", pod.name(), spec.name);
        }
        Ok(())
    }
}

fn two_gateways(bed: &Bed) -> Outcome {
    let rules = Rule::of_manifest(RBAC)?;
    let lab = Lab::builder(bed.sandbox(), &bed.binary()).named("gateways").nodes(2).machines()?;
    let server = ApiServer::default();
    server.allow(ADMIN, None);
    server.allow(GATEWAY, Some(rules.clone()));
    let authority = Authority::new(lab.outside().addresses().of(Family::V4))?;
    let kubectl = Kubectl::new(lab.outside(), lab.directory(), &authority)?;
    let stand = Stand { lab: &lab, server, kubectl };
    let serving = serve(&stand.server, lab.outside(), &authority)?;
    let nodes: String = lab.nodes().iter().map(|node| manifest::node(node.spec())).collect();
    stand.kubectl.ok(&["create", "-f", "-"], &nodes)?;
    let address = SocketAddr::new(lab.outside().addresses().of(Family::V4), PORT);
    let kubeconfig = kubeconfig(lab.directory(), lab.outside(), &authority, GATEWAY)?;
    let source = format!("kubernetes: {{server: \"https://{address}\", kubeconfig: {}}}", kubeconfig.display());
    let settings = NodeSettings { source: Some(source), ..NodeSettings::default() };
    for node in lab.nodes() {
        node.configure(&settings, &Lab::ranges())?;
        node.prepare()?;
        node.launch(&settings)?;
    }
    for node in lab.nodes() {
        node.wait_ready()?;
    }
    // Each knows the other by its announcement alone.
    stand.wait("the other node as a peer", 10, |node| Ok(node.query(&["peers"])?["peers"].as_array().is_some_and(|peers| peers.len() == 1)))?;
    let mut endpoints = Vec::new();
    for number in 0..2 {
        let pod = lab.attach(number, &format!("a{}", number + 1))?;
        pod.machine().serve()?;
        endpoints.push(EndpointSpec { addresses: pod.machine().addresses(), node: lab.nodes()[number].name().to_owned() });
    }
    let (web, far, later) = (service("web", 1, endpoints.clone()), service("far", 2, endpoints[1..].to_vec()), service("later", 3, endpoints));
    for spec in [&web, &far] {
        stand.kubectl.ok(&["apply", "-f", "-"], &manifest::service(spec))?;
    }
    stand.wait_for_services(10, &[&web, &far], &["later"])?;
    stand.works(&web)?;
    stand.works(&far)?;

    // The server goes away, in the midst of every watch, and the cluster changes meanwhile.
    drop(serving);
    stand.wait("that the source is not connected", 35, |node| Ok(stand.status(node)?["source"]["connected"] == false))?;
    stand.works(&web)?;
    stand.works(&far)?;
    stand.wait("all that is known on the disk", 10, |node| {
        let kept = fs::read_to_string(node.config().with_file_name("state").join("kubernetes.json")).unwrap_or_default();
        let parts = ["web", "web-ipv4", "web-ipv6", "far", "far-ipv4", "far-ipv6"];
        Ok(parts.iter().all(|name| kept.contains(&format!("\"name\":\"{name}\",\"namespace\""))))
    })?;
    stand.restarts_without_the_server(&[&web, &far])?;
    for family in ["ipv4", "ipv6"] {
        assert!(stand.server.delete("endpointslices", "default", &format!("web-{family}")));
    }
    assert!(stand.server.delete("services", "default", "web"));
    stand.server.compact();
    let serving = serve(&stand.server, lab.outside(), &authority)?;
    stand.kubectl.ok(&["apply", "-f", "-"], &manifest::service(&later))?;
    stand.wait("that the source is connected", 60, |node| Ok(stand.status(node)?["source"]["connected"] == true))?;
    stand.wait_for_services(10, &[&far, &later], &["web"])?;
    stand.works(&far)?;
    stand.works(&later)?;
    stand.refused(&web)?;

    // What is wrong with its announcement is mended while it runs.
    stand.kubectl.ok(&["annotate", "node", lab.nodes()[0].name(), "podgate.io/overlay-", "podgate.io/underlay-"], "")?;
    let name = lab.nodes()[0].name();
    stand.wait("that the announcement is put back", 10, |_| {
        let nodes = stand.server.objects("nodes");
        let own = nodes.iter().find(|node| node["metadata"]["name"] == name);
        Ok(own.is_some_and(|node| node["metadata"]["annotations"]["podgate.io/overlay"] == "port=4790,vni=1,mtu=1500"))
    })?;
    let shipped: BTreeSet<Use> = rules.iter().flat_map(Rule::uses).collect();
    assert_eq!(stand.server.used(), shipped, "what the gateways made use of is not what the shipped rules allow");
    for node in lab.nodes() {
        assert!(!node.log().contains(GATEWAY), "the log of {} shows the token", node.name());
    }
    drop(serving);
    Ok(())
}
