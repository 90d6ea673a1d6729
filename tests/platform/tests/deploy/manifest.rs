//! The manifest and the chart.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{ConfigMap, ServiceAccount};
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding};
use podgate::config::{Config, Given, HostFacts};
use podgate::lab::Lab;
use podgate_apiserver::{ApiServer, Rule};
use podgate_testbed::{Bed, Outcome};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::cluster::{Kubectl, serve};
use crate::{Try, deploy, workspace};

/// The plain manifest.
pub const MANIFEST: &str = "kubernetes/podgate.yaml";
const CLEANUP: &str = "kubernetes/cleanup.yaml";

/// The documents of a manifest by kind and name. What ConfigMaps hold is parsed as well: how it is laid out does not matter.
pub fn documents(text: &str) -> Try<BTreeMap<String, Value>> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(text).map_err(|error| error.to_string())?;
    let mut named = BTreeMap::new();
    for mut document in documents.into_iter().filter(|document| !document.is_null()) {
        for value in document["data"].as_object_mut().into_iter().flat_map(|data| data.values_mut()) {
            *value = serde_saphyr::from_str(value.as_str().unwrap_or_default()).map_err(|error| error.to_string())?;
        }
        let name = format!("{} {}", document["kind"].as_str().unwrap_or_default(), document["metadata"]["name"].as_str().unwrap_or_default());
        assert!(named.insert(name.clone(), document).is_none(), "{name} is there twice");
    }
    Ok(named)
}

/// Kubernetes' own types pass over keys that they do not know, so what comes out again is what they know.
fn known<T: DeserializeOwned + Serialize>(document: &Value) -> Try<Value> {
    let typed: T = serde_json::from_value(document.clone())?;
    let mut again = serde_json::to_value(typed)?;
    for key in ["apiVersion", "kind"] {
        again[key] = document[key].clone();
    }
    Ok(again)
}

pub fn every_key_is_known(_: &Bed) -> Outcome {
    for file in [MANIFEST, CLEANUP] {
        let documents: Vec<Value> = serde_saphyr::from_multiple(&deploy(file)?).map_err(|error| error.to_string())?;
        for document in &documents {
            let again = match document["kind"].as_str().unwrap_or_default() {
                "DaemonSet" => known::<DaemonSet>(document)?,
                "ConfigMap" => known::<ConfigMap>(document)?,
                "ServiceAccount" => known::<ServiceAccount>(document)?,
                "ClusterRole" => known::<ClusterRole>(document)?,
                "ClusterRoleBinding" => known::<ClusterRoleBinding>(document)?,
                other => return Err(format!("{file} has a {other}").into()),
            };
            assert_eq!(&again, document, "{file}");
        }
    }
    // What the gateways are held to elsewhere is what is installed.
    assert_eq!(Rule::of_manifest(&deploy(MANIFEST)?)?, Rule::of_manifest(&deploy("kubernetes/rbac.yaml")?)?);
    Ok(())
}

pub fn configurations(_: &Bed) -> Outcome {
    let host = HostFacts { name: "node-1".into(), ephemeral_ports: 32768..=60999 };
    let example = workspace("deploy/podgate.yaml");
    let config = Config::parse(&example, &fs::read_to_string(&example)?, &host)?;
    // What the example says is what would hold without it.
    let least = "underlay: {interface: eth0}\nsource: {directory: /etc/podgate/cluster.d}\n";
    assert_eq!(config, Config::parse(&example, least, &host)?);
    // And what is commented out in it is right as well, but for the sources that are not chosen and whoever names one of two addresses.
    for file in [MANIFEST, CLEANUP] {
        let documents: Vec<Value> = serde_saphyr::from_multiple(&deploy(file)?).map_err(|error| error.to_string())?;
        let map = documents.iter().find(|document| document["kind"] == "ConfigMap").ok_or("no ConfigMap")?;
        let text = map["data"]["podgate.yaml"].as_str().ok_or("no podgate.yaml")?;
        let given = Given { node: Some("worker-7".into()), underlay: vec!["192.0.2.7".parse()?] };
        let config = Config::parse_for(file.as_ref(), text, &host, &given)?;
        assert_eq!((config.node.as_str(), config.source.kind()), ("worker-7", "kubernetes"));
    }
    Ok(())
}

/// Renders the chart, with these values above its own.
fn render(directory: &Path, values: Option<&str>) -> Try<Output> {
    let mut command = Command::new("go");
    command.arg("run").arg(workspace("deploy/helm/render/main.go")).arg(workspace("deploy/helm/podgate"));
    if let Some(values) = values {
        let path = directory.join("values.yaml");
        fs::write(&path, values)?;
        command.arg(path);
    }
    command.env("GO111MODULE", "off").env("GOPATH", "/usr/share/gocode").env("GOFLAGS", "").env("GOCACHE", directory.join("go"));
    Ok(command.output()?)
}

fn rendered(directory: &Path, values: Option<&str>) -> Try<String> {
    let output = render(directory, values)?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

pub fn chart(bed: &Bed) -> Outcome {
    let directory = bed.sandbox().directory().join("chart");
    fs::create_dir_all(&directory)?;
    let (plain, chart) = (documents(&deploy(MANIFEST)?)?, documents(&rendered(&directory, None)?)?);
    assert_eq!(plain.keys().collect::<Vec<_>>(), chart.keys().collect::<Vec<_>>());
    for (name, document) in &plain {
        assert_eq!(&chart[name], document, "{name}: the chart's, then the manifest's");
    }
    let changed = documents(&rendered(
        &directory,
        Some(
            "config: {overlay: {port: 4800}, masquerade: false, workers: {count: 3}, health: {address: \"[::]:10356\"}}\nlogLevel: debug\nlogFormat: json\n\
             image: {repository: registry.example/podgate, tag: v9}\ncni: {binDir: /var/lib/cni/bin}\npodAnnotations: {a.b/c: d}\n",
        ),
    )?)?;
    let config = &changed["ConfigMap podgate"]["data"]["podgate.yaml"];
    assert_eq!((&config["overlay"]["port"], &config["overlay"]["vni"]), (&4800.into(), &1.into()));
    assert_eq!((&config["masquerade"], &config["workers"]["count"]), (&false.into(), &3.into()));
    let template = &changed["DaemonSet podgate"]["spec"]["template"];
    let (prepare, gateway) = (&template["spec"]["initContainers"][0], &template["spec"]["containers"][0]);
    assert_eq!(gateway["image"], "registry.example/podgate:v9");
    assert_eq!(gateway["livenessProbe"]["httpGet"]["port"], 10356);
    assert_eq!(template["metadata"]["annotations"]["a.b/c"], "d");
    let has = |container: &Value, word: &str| container["args"].as_array().is_some_and(|words| words.iter().any(|known| known == word));
    assert!(has(gateway, "--log-format=json") && has(prepare, "--cni-bin-dir=/var/lib/cni/bin"), "{template}");
    assert!(gateway["env"].as_array().is_some_and(|env| env.iter().any(|one| one["name"] == "PODGATE_LOG" && one["value"] == "debug")));
    for (values, key) in [
        ("config: {overlay: {port: 0}}", "config.overlay.port"),
        ("config: {attach: bridge}", "config.attach"),
        ("config: {podCIDR: [10.0.0.0/8]}", "podCIDR"),
        ("config: {podCIDRs: [ten]}", "config.podCIDRs.0"),
        ("cni: {confName: podgate.txt}", "cni.confName"),
        ("workers: 2", "workers"),
    ] {
        let output = render(&directory, Some(values))?;
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(key), "{values}: {said}");
    }
    Ok(())
}

pub fn applied(bed: &Bed) -> Outcome {
    let lab = Lab::builder(bed.sandbox(), &bed.binary()).named("manifest").nodes(1).machines()?;
    let server = ApiServer::default();
    let _serving = serve(&server, lab.outside())?;
    let kubectl = Kubectl::new(lab.outside(), lab.directory())?;
    for file in [MANIFEST, CLEANUP] {
        let path = workspace("deploy").join(file).display().to_string();
        let names: Vec<String> = documents(&deploy(file)?)?.into_keys().collect();
        let first = kubectl.ok(&["apply", "-f", &path], "")?;
        assert_eq!(first.lines().filter(|line| line.ends_with(" created")).count(), names.len(), "{first}");
        let second = kubectl.ok(&["apply", "-f", &path], "")?;
        assert_eq!(second.lines().filter(|line| line.ends_with(" unchanged")).count(), names.len(), "{second}");
        let deleted = kubectl.ok(&["delete", "-f", &path], "")?;
        assert_eq!(deleted.lines().filter(|line| line.contains(" deleted")).count(), names.len(), "{deleted}");
    }
    Ok(())
}
