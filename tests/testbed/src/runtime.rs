//! A real container runtime on a node of the lab: podman, with its CNI backend, and containers from a root file system that is busybox
//! and nothing else.
//!
//! Podman keeps all that it has in the node's directory. What it would share with the machine is covered in the sandbox: a tmpfs over the
//! cache of CNI results, and a unified cgroup hierarchy (crun refuses hybrid ones), in which nothing is made (`cgroups=disabled`).

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use podgate::lab::{Node, Sandbox};
use podgate_runtime::netns::Netns;
use serde_json::{Value, json};

use crate::need::{self, Need};
use crate::tool::{Running, ToolError};

/// What [`Runtime`] needs (Debian: `podman crun conmon busybox-static`).
pub const NEEDED: Need =
    Need::All(&[Need::Root, Need::Program("podman"), Need::Program("crun"), Need::Program("conmon"), Need::StaticProgram("busybox")]);

/// How long a command of podman's has; a stop may wait for a container's end.
const PATIENCE: Duration = Duration::from_secs(60);

/// What containers find in `/bin`.
const APPLETS: [&str; 12] = ["cat", "echo", "httpd", "ip", "kill", "ls", "nc", "ping", "sh", "sleep", "traceroute", "wget"];

/// Podman's cache of results (libcni's `CacheDir`).
const CNI_CACHE: &str = "/var/lib/cni";

/// Podman on a node.
#[derive(Debug)]
pub struct Runtime {
    node: Netns,
    directory: PathBuf,
}

/// A container that podman made.
#[derive(Debug)]
pub struct Container {
    name: String,
    netns: Netns,
    networks: Value,
}

impl Runtime {
    /// Sets podman up on `node`, with `networks` as its CNI configurations (`.conflist`, the first being the default) and plugins from
    /// `plugins`. Safe to repeat.
    pub fn new(_: &Sandbox, node: &Node, networks: &[Value], plugins: &[PathBuf]) -> Result<Runtime, ToolError> {
        let directory = node.config().with_file_name("podman");
        let run = |source| ToolError::Run { what: "podman".into(), source };
        let runtime = Runtime { node: node.machine().netns().try_clone().map_err(run)?, directory };
        runtime.cover()?;
        runtime.make_rootfs()?;
        let [net_d, conf, storage] = ["net.d", "containers.conf", "storage.conf"].map(|name| runtime.directory.join(name));
        make_directory(&net_d)?;
        for network in networks {
            let name = network["name"].as_str().unwrap_or_default();
            write(&net_d.join(format!("{name}.conflist")), &network.to_string())?;
        }
        let default = networks.first().and_then(|network| network["name"].as_str()).unwrap_or("none");
        // JSON's strings and lists of strings are TOML's too. Podman would bind every published port itself, only to keep others from it; for UDP
        // that cannot be done twice, and a gateway that serves datagrams in fragments has bound it already.
        write(
            &conf,
            &format!(
                "[network]\nnetwork_backend = \"cni\"\ncni_plugin_dirs = {plugins}\nnetwork_config_dir = {net_d}\ndefault_network = \"{default}\"\n\
                 [engine]\nevents_logger = \"none\"\ncgroup_manager = \"cgroupfs\"\nruntime = \"crun\"\n\
                 enable_port_reservation = false\n\
                 [containers]\ncgroups = \"disabled\"\nlog_driver = \"k8s-file\"\n",
                plugins = json!(plugins),
                net_d = json!(net_d),
            ),
        )?;
        let [root, runroot] = ["root", "runroot"].map(|name| json!(runtime.directory.join(name)));
        write(&storage, &format!("[storage]\ndriver = \"vfs\"\ngraphroot = {root}\nrunroot = {runroot}\n"))?;
        Ok(runtime)
    }

    /// Runs `podman ARGS` on the node and gives what it printed.
    pub fn podman(&self, arguments: &[&str]) -> Result<String, ToolError> {
        let mut command = Command::new("podman");
        command.env("CONTAINERS_CONF", self.directory.join("containers.conf"));
        command.env("CONTAINERS_STORAGE_CONF", self.directory.join("storage.conf"));
        for (option, name) in [("--root", "root"), ("--runroot", "runroot"), ("--tmpdir", "tmp")] {
            command.arg(option).arg(self.directory.join(name));
        }
        command.args(arguments);
        let run = |source| ToolError::Run { what: format!("podman {}", arguments.join(" ")), source };
        self.node.run(|| Running::start(command, b"")).map_err(run)??.end(PATIENCE)?.success()
    }

    /// Starts the container `name` with further options of `podman run` and the command `command`.
    pub fn run(&self, name: &str, options: &[&str], command: &[&str]) -> Result<Container, ToolError> {
        let rootfs = self.directory.join("rootfs").display().to_string();
        // Process 1 has no default for SIGTERM, so a stop would have to wait.
        let always = ["run", "--detach", "--name", name, "--cgroups=disabled", "--stop-signal=SIGKILL", "--env"];
        let variable = format!("NAME={name}");
        let end = ["--rootfs", &rootfs];
        self.podman(&[&always[..], &[&variable], options, &end, command].concat())?;
        self.container(name)
    }

    /// The container `name` as it is now: a restarted one has another namespace and other addresses.
    pub fn container(&self, name: &str) -> Result<Container, ToolError> {
        let printed = self.podman(&["inspect", name])?;
        let unusable = |why: String| ToolError::Output { what: format!("podman inspect {name}"), why, printed: printed.clone() };
        let inspected: Value = serde_json::from_str(&printed).map_err(|error| unusable(error.to_string()))?;
        let settings = &inspected[0]["NetworkSettings"];
        let path = settings["SandboxKey"].as_str().filter(|path| !path.is_empty()).ok_or_else(|| unusable("no SandboxKey".into()))?;
        let netns = Netns::open(path).map_err(|error| unusable(error.to_string()))?;
        Ok(Container { name: name.to_owned(), netns, networks: settings["Networks"].clone() })
    }

    /// Runs a command inside the running container `name`.
    pub fn exec(&self, name: &str, command: &[&str]) -> Result<String, ToolError> {
        self.podman(&[&["exec", name], command].concat())
    }

    /// Options of [`Runtime::run`] that bring this very program into a container, and the words that start it there: it is linked
    /// dynamically, so its libraries and their loader come along.
    pub fn carry_self() -> Result<(Vec<String>, Vec<String>), ToolError> {
        let own = |source| ToolError::File { path: "/proc/self".into(), source };
        let program = fs::read_link("/proc/self/exe").map_err(own)?;
        let maps = fs::read_to_string("/proc/self/maps").map_err(own)?;
        let mut libraries: Vec<&Path> = maps.lines().filter_map(|line| line.find('/').map(|at| Path::new(&line[at..]))).collect();
        libraries.retain(|path| path.file_name().is_some_and(|name| name.to_string_lossy().contains(".so")));
        libraries.sort_unstable();
        libraries.dedup();
        let mut options = vec![format!("--volume={}:/bin/this:ro", program.display())];
        let mut command = vec!["/bin/this".to_owned()];
        for library in libraries {
            let name = library.file_name().unwrap_or_default().to_string_lossy();
            options.push(format!("--volume={}:/lib/{name}:ro", library.display()));
            if name.starts_with("ld-") {
                command = vec![format!("/lib/{name}"), "--library-path".into(), "/lib".into(), "/bin/this".into()];
            }
        }
        Ok((options, command))
    }

    fn cover(&self) -> Result<(), ToolError> {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let covered = |kind: &str, target: &str| mounts.lines().any(|line| line.starts_with(&format!("podgate-testbed {target} {kind} ")));
        for (kind, target) in [("cgroup2", "/sys/fs/cgroup"), ("tmpfs", CNI_CACHE)] {
            make_directory(Path::new(target))?;
            if !covered(kind, target) {
                let mounted = mount(Some("podgate-testbed"), target, Some(kind), MsFlags::empty(), None::<&str>);
                mounted.map_err(|errno| ToolError::File { path: target.into(), source: errno.into() })?;
            }
        }
        Ok(())
    }

    fn make_rootfs(&self) -> Result<(), ToolError> {
        let rootfs = self.directory.join("rootfs");
        let busybox = rootfs.join("bin/busybox");
        if busybox.exists() {
            return Ok(());
        }
        for name in ["bin", "dev", "etc", "lib", "proc", "run", "sys", "tmp", "www"] {
            make_directory(&rootfs.join(name))?;
        }
        let failed = |source| ToolError::File { path: busybox.clone(), source };
        fs::copy(need::program("busybox").unwrap_or_default(), &busybox).map_err(failed)?;
        APPLETS.iter().try_for_each(|applet| symlink("busybox", rootfs.join("bin").join(applet))).map_err(failed)
    }
}

impl Container {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its network namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// What podman says of its attachment to `network`, under docker's names (`IPAddress`, `GlobalIPv6Address`, `MacAddress` …).
    pub fn network(&self, network: &str) -> &Value {
        &self.networks[network]
    }
}

fn make_directory(path: &Path) -> Result<(), ToolError> {
    fs::create_dir_all(path).map_err(|source| ToolError::File { path: path.to_owned(), source })
}

fn write(path: &Path, text: &str) -> Result<(), ToolError> {
    fs::write(path, text).map_err(|source| ToolError::File { path: path.to_owned(), source })
}
