//! What is in `deploy/`, taken at its word: the manifest and the chart, the image run as the manifest says, the Debian package and its units, the
//! rules for Prometheus.

mod cluster;
mod comfort;
mod documents;
mod kubelet;
mod manifest;
mod monitoring;
mod package;
mod systemd;
mod upgrade;

use std::path::PathBuf;
use std::process::ExitCode;

use podgate_testbed::{Need, run, runtime};

type Try<T> = Result<T, Box<dyn std::error::Error>>;

/// What renders Go templates (Debian: `golang-go`, and the libraries that `deploy/helm/render` names).
const GO: Need = Need::All(&[Need::Program("go"), Need::Directory("/usr/share/gocode/src/github.com/Masterminds/sprig")]);

const KUBECTL: Need = Need::Program("kubectl");
/// What runs the image (and `kubectl`).
const ENGINE: Need = Need::All(&[KUBECTL, runtime::NEEDED]);
/// Debian: `prometheus`.
const PROMETHEUS: Need = Need::All(&[Need::Program("prometheus"), Need::Program("promtool")]);
/// Debian: `systemd etcd-server etcd-client podman busybox-static curl`, which the pages install.
const VMS: Need = Need::All(&[
    Need::Systemd,
    Need::Program("apt"),
    Need::Program("curl"),
    Need::Program("etcd"),
    Need::Program("etcdctl"),
    Need::Program("podman"),
    Need::StaticProgram("busybox"),
]);
const DPKG: Need = Need::All(&[Need::Program("dpkg-deb"), Need::Program("setpriv"), Need::StaticProgram("busybox"), Need::Root]);

fn main() -> ExitCode {
    run(|tests| {
        tests.add("every key of the manifest is one that Kubernetes knows", manifest::every_key_is_known);
        tests.add("the ConfigMap and the annotated example hold configurations that the gateway takes", manifest::configurations);
        tests.add_if(GO, "the chart's defaults render to the manifest, and odd values are refused", manifest::chart);
        tests.add_if(KUBECTL, "kubectl applies the manifest, a second time without a change, and deletes it", manifest::applied);
        tests.add_if(
            ENGINE,
            "the image runs as the manifest says on two nodes, and is killed and rolled one node after the other under traffic",
            upgrade::rolled,
        );
        tests.add_if(DPKG, "the Debian package is built twice the same, installs, removes and purges into an empty root", package::debian);
        tests.add_if(Need::Program("systemd-analyze"), "systemd finds nothing wrong with the units, and the gateway's is a sandbox", package::units);
        tests.add_if(
            VMS,
            "under a real systemd the unit serves from its sandbox, comes back whatever ends it, and goes with the package without a trace",
            systemd::units,
        );
        tests.add("what the pages show is read as it is meant", documents::reading);
        tests.add_if(VMS, "one VM on a directory is set up, upgraded and cleared by the commands of its page", documents::one_vm);
        tests.add_if(VMS, "three VMs on etcd are set up, upgraded and cleared by the commands of their page", documents::three_vms);
        tests.add("the pages name commands and reasons of drops that there are", comfort::pages);
        tests.add("the level of the log is changed while the daemon runs, and a mistyped one is refused", comfort::level);
        tests.add("a gateway that takes over from another says so in JSON, and when it ends the other has the node again", comfort::json);
        tests.add_if(PROMETHEUS, "promtool takes the alert rules, and each fires when it should", monitoring::rules);
        tests.add_if(PROMETHEUS, "Prometheus reads the metrics and answers every query of the dashboard", monitoring::prometheus);
    })
}

/// A file of the workspace.
fn workspace(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..").join(path)
}

/// A file of `deploy/`, as text.
fn deploy(path: &str) -> Try<String> {
    let path = workspace("deploy").join(path);
    std::fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()).into())
}
