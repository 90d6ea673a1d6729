//! As much of a kubelet as it takes to run the pods of a DaemonSet on a node of the lab: podman starts the containers that the object describes,
//! with its arguments, environment, capabilities, volumes and mount propagation.
//!
//! The nodes of a lab share one file system, so a host path is a path below the node's own directory.

use std::fs;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use podgate::lab::Node;
use podgate_testbed::runtime::Runtime;
use serde_json::Value;

use crate::Try;

/// A node's kubelet.
pub struct Kubelet<'a> {
    node: &'a Node,
    runtime: Runtime,
    image: String,
    /// What the cluster gives to pods: ConfigMaps and the service account's token.
    given: PathBuf,
}

impl<'a> Kubelet<'a> {
    /// On `node`, with the image of the layout at `oci`, of this version.
    pub fn new(node: &'a Node, runtime: Runtime, oci: &Path, version: &str) -> Try<Kubelet<'a>> {
        // It prints the image's id.
        let image = runtime.podman(&["pull", "--quiet", &format!("oci:{}:{version}", oci.display())])?.trim().to_owned();
        let given = node.config().with_file_name("given");
        let kubelet = Kubelet { node, runtime, image, given };
        // Kubelet has it of the host: /run is a shared mount under systemd.
        let run = kubelet.host("/run/podgate");
        fs::create_dir_all(&run)?;
        mount(Some(&run), &run, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
        mount(None::<&str>, &run, None::<&str>, MsFlags::MS_SHARED, None::<&str>)?;
        Ok(kubelet)
    }

    /// Where a path of the host is in the lab.
    pub fn host(&self, path: &str) -> PathBuf {
        let directory = self.node.config().with_file_name("");
        match path {
            "/run/podgate" => directory.join("run"),
            "/var/lib/podgate" => directory.join("state"),
            "/dev/net/tun" => path.into(),
            other => directory.join("host").join(other.trim_start_matches('/')),
        }
    }

    /// Writes a ConfigMap's files.
    pub fn give(&self, name: &str, files: &[(&str, &str)]) -> Try<()> {
        let directory = self.given.join(name);
        fs::create_dir_all(&directory)?;
        Ok(files.iter().try_for_each(|(file, text)| fs::write(directory.join(file), text))?)
    }

    /// Runs a pod of the DaemonSet `set` under the name `name`: its init containers to their end, then its container, which goes on.
    pub fn run(&self, set: &Value, name: &str) -> Try<()> {
        let spec = &set["spec"]["template"]["spec"];
        for container in spec["initContainers"].as_array().into_iter().flatten() {
            let options = self.options(spec, container)?;
            let options: Vec<&str> = options.iter().map(String::as_str).collect();
            let words: Vec<&str> = container["args"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
            self.runtime.podman(&[&["run", "--rm"], &options[..], &[&self.image], &words].concat())?;
        }
        let container = &spec["containers"][0];
        let options = self.options(spec, container)?;
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let words: Vec<&str> = container["args"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        self.runtime.podman(&[&["run", "--detach", "--name", name], &options[..], &[&self.image], &words].concat())?;
        Ok(())
    }

    /// Ends a pod as kubelet does: SIGTERM, and SIGKILL when its time is over.
    pub fn end(&self, name: &str) -> Try<()> {
        self.runtime.podman(&["stop", "--time=30", name])?;
        Ok(())
    }

    /// What a pod's container has written, each line with its time and stream in front (the log driver k8s-file).
    pub fn logs(&self, name: &str) -> Try<String> {
        let path = self.runtime.podman(&["inspect", "--format", "{{.HostConfig.LogConfig.Path}}", name])?;
        Ok(fs::read_to_string(path.trim())?)
    }

    /// The process number of its container's process 1, as the node sees it.
    pub fn pid(&self, name: &str) -> Try<u32> {
        Ok(self.runtime.podman(&["inspect", "--format", "{{.State.Pid}}", name])?.trim().parse()?)
    }

    /// Whether it runs still.
    pub fn is_running(&self, name: &str) -> Try<bool> {
        Ok(self.runtime.podman(&["inspect", "--format", "{{.State.Running}}", name])?.trim() == "true")
    }

    fn options(&self, spec: &Value, container: &Value) -> Try<Vec<String>> {
        let context = &container["securityContext"];
        let mut options: Vec<String> = vec!["--network=host".into(), "--read-only-tmpfs=false".into(), "--cgroups=disabled".into()];
        assert_eq!(spec["hostNetwork"], true);
        if context["readOnlyRootFilesystem"] == true {
            options.push("--read-only".into());
        }
        if context["privileged"] == true {
            options.push("--privileged".into());
        } else {
            options.push("--security-opt=apparmor=unconfined".into());
            options.push("--security-opt=no-new-privileges".into());
            assert_eq!(context["allowPrivilegeEscalation"], false);
            // Podman's own filter is the runtime's default.
            assert_eq!(spec["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
        }
        for (list, option) in [("drop", "--cap-drop"), ("add", "--cap-add")] {
            for capability in context["capabilities"][list].as_array().into_iter().flatten() {
                options.push(format!("{option}={}", capability.as_str().unwrap_or_default()));
            }
        }
        for variable in container["env"].as_array().into_iter().flatten() {
            let value = match variable["valueFrom"]["fieldRef"]["fieldPath"].as_str() {
                Some("spec.nodeName") => self.node.name().to_owned(),
                Some("status.hostIP") => self.node.machine().addresses().v4.to_string(),
                Some(other) => return Err(format!("what is {other}?").into()),
                None => variable["value"].as_str().unwrap_or_default().to_owned(),
            };
            options.push(format!("--env={}={value}", variable["name"].as_str().unwrap_or_default()));
        }
        for wanted in container["volumeMounts"].as_array().into_iter().flatten() {
            let text = |key: &str| wanted[key].as_str().unwrap_or_default();
            let mut volumes = spec["volumes"].as_array().into_iter().flatten();
            let volume = volumes.find(|volume| volume["name"] == text("name")).ok_or_else(|| format!("no volume {}", text("name")))?;
            let source = match (volume["hostPath"]["path"].as_str(), volume["configMap"]["name"].as_str()) {
                (Some(path), None) => self.host(path),
                (None, Some(name)) => self.given.join(name),
                _ => return Err(format!("what is {volume}?").into()),
            };
            if volume["hostPath"]["type"] == "DirectoryOrCreate" {
                fs::create_dir_all(&source)?;
            }
            let propagation = match wanted["mountPropagation"].as_str() {
                Some("Bidirectional") => "rshared",
                Some("HostToContainer") => "rslave",
                _ => "rprivate",
            };
            let access = if wanted["readOnly"] == true { "ro" } else { "rw" };
            options.push(format!("--volume={}:{}:{access},rbind,{propagation}", source.display(), text("mountPath")));
        }
        if spec["automountServiceAccountToken"] != false {
            let token = self.given.join("token");
            options.push(format!("--volume={}:/var/run/secrets/kubernetes.io/serviceaccount:ro", token.display()));
        }
        Ok(options)
    }
}
