//! An OCI image from scratch: one layer with the two programs and the directories that things are mounted on.
//!
//! Read first: the OCI image specification 1.1 (`image-layout.md`, `manifest.md`, `config.md`).

use std::fs;
use std::path::Path;

use jiff::Timestamp;
use ring::digest::{SHA256, digest};
use serde_json::{Value, json};

use crate::PackageError;
use crate::archive::{Entry, Tree, gzip};
use crate::inputs::Inputs;

/// Directories that volumes are mounted on.
const MOUNT_POINTS: [&str; 10] =
    ["dev", "etc/cni/net.d", "etc/podgate", "opt/cni/bin", "proc", "run/podgate", "sys", "tmp", "var/lib/podgate", "var/run/secrets"];

/// The root file system.
fn root(inputs: &Inputs) -> Result<Tree, PackageError> {
    let mut tree = Tree::default();
    MOUNT_POINTS.iter().for_each(|path| tree.directory(path));
    tree.file("usr/bin/podgate", 0o755, inputs.podgate.clone());
    // Beside it, where `podgate prepare` takes it from.
    tree.file("usr/bin/podgate-cni", 0o755, inputs.plugin.clone());
    tree.file("usr/share/doc/podgate/LICENSE", 0o644, inputs.file("LICENSE")?);
    tree.file("usr/share/doc/podgate/sbom.cdx.json", 0o644, inputs.sbom.clone());
    Ok(tree)
}

/// Writes the layout, the archive and the list into `output`; what was written, a line each.
pub(crate) fn write(inputs: &Inputs, output: &Path) -> Result<Vec<String>, PackageError> {
    let (layout, digest) = layout(inputs)?;
    let directory = output.join("oci");
    if directory.exists() {
        fs::remove_dir_all(&directory).map_err(PackageError::file("remove", &directory))?;
    }
    for (path, entry) in layout.entries() {
        let path = directory.join(path);
        match entry {
            Entry::Directory { .. } => fs::create_dir_all(&path).map_err(PackageError::file("make", path))?,
            Entry::File { bytes, .. } => put(&path, bytes)?,
        }
    }
    let archive = output.join(format!("podgate-{}-oci.tar", inputs.version));
    put(&archive, &layout.tar("", inputs.time))?;
    put(&output.join("sbom.cdx.json"), &inputs.sbom)?;
    Ok(vec![format!("{} {digest}", directory.display()), archive.display().to_string(), output.join("sbom.cdx.json").display().to_string()])
}

/// The image layout, and the manifest's digest.
fn layout(inputs: &Inputs) -> Result<(Tree, String), PackageError> {
    let architecture = inputs.architecture()?;
    let tar = root(inputs)?.tar("", inputs.time);
    let labels = json!({
        "org.opencontainers.image.title": "podgate",
        "org.opencontainers.image.description": "Pod network, services and node ports from one userspace process on each node",
        "org.opencontainers.image.version": inputs.version,
        "org.opencontainers.image.licenses": "Apache-2.0",
    });
    let mut layout = Tree::default();
    let mut blob = |kind: &str, bytes: Vec<u8>| -> Value {
        let (name, size) = (sha256(&bytes), bytes.len());
        layout.file(&format!("blobs/sha256/{name}"), 0o644, bytes);
        json!({"mediaType": format!("application/vnd.oci.image.{kind}"), "digest": format!("sha256:{name}"), "size": size})
    };
    let created = rfc3339(inputs.time);
    let config = json!({
        "created": created,
        "architecture": architecture,
        "os": "linux",
        "config": {
            "Entrypoint": ["/usr/bin/podgate"],
            "Cmd": ["--help"],
            "Env": ["PATH=/usr/bin"],
            "Labels": labels,
        },
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{}", sha256(&tar))]},
        "history": [{"created": created, "created_by": "podgate-package image"}],
    });
    let layer = blob("layer.v1.tar+gzip", gzip(&tar));
    let config = blob("config.v1+json", config.to_string().into_bytes());
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config,
        "layers": [layer],
        "annotations": labels,
    });
    let mut manifest = blob("manifest.v1+json", manifest.to_string().into_bytes());
    let digest = manifest["digest"].as_str().unwrap_or_default().to_owned();
    manifest["platform"] = json!({"architecture": architecture, "os": "linux"});
    // The second name is what containerd imports it under: it stands for `podgate:VERSION` in a pod.
    manifest["annotations"] = json!({
        "org.opencontainers.image.ref.name": inputs.version,
        "io.containerd.image.name": format!("docker.io/library/podgate:{}", inputs.version),
    });
    let index = json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [manifest]});
    layout.file("index.json", 0o644, index.to_string());
    layout.file("oci-layout", 0o644, json!({"imageLayoutVersion": "1.0.0"}).to_string());
    Ok((layout, digest))
}

/// Writes a file and the directories above it.
pub(crate) fn put(path: &Path, bytes: &[u8]) -> Result<(), PackageError> {
    let directory = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(directory).map_err(PackageError::file("make", directory))?;
    fs::write(path, bytes).map_err(PackageError::file("write", path))
}

fn sha256(bytes: &[u8]) -> String {
    digest(&SHA256, bytes).as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Seconds of the Unix clock as RFC 3339 writes them; what lies beyond the calendar is its last moment.
fn rfc3339(seconds: u64) -> String {
    i64::try_from(seconds).ok().and_then(|seconds| Timestamp::from_second(seconds).ok()).unwrap_or(Timestamp::MAX).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inputs() -> Inputs {
        Inputs {
            podgate: b"daemon".to_vec(),
            podgate_path: "/nowhere".into(),
            plugin: b"plugin".to_vec(),
            version: "1.2.3",
            time: 1_709_210_096,
            sbom: b"{}".to_vec(),
        }
    }

    #[test]
    fn the_same_input_gives_the_same_digest_and_another_program_another() {
        let (_, first) = layout(&inputs()).unwrap();
        assert_eq!(layout(&inputs()).unwrap().1, first);
        let other = Inputs { plugin: b"another".to_vec(), ..inputs() };
        assert_ne!(layout(&other).unwrap().1, first);
    }

    #[test]
    fn every_descriptor_leads_to_a_blob_of_that_digest_and_size() {
        let (layout, digest_of_manifest) = layout(&inputs()).unwrap();
        let find = |path: &str| match layout.entries().find(|(known, _)| *known == path) {
            Some((_, Entry::File { bytes, .. })) => bytes.clone(),
            other => panic!("{path}: {other:?}"),
        };
        let blob = |descriptor: &Value| {
            let name = descriptor["digest"].as_str().unwrap().strip_prefix("sha256:").unwrap().to_owned();
            let bytes = find(&format!("blobs/sha256/{name}"));
            assert_eq!((sha256(&bytes), bytes.len() as u64), (name, descriptor["size"].as_u64().unwrap()));
            bytes
        };
        let parse = |bytes: Vec<u8>| serde_json::from_slice::<Value>(&bytes).unwrap();
        let index = parse(find("index.json"));
        assert_eq!(index["manifests"][0]["digest"], digest_of_manifest.as_str());
        let manifest = parse(blob(&index["manifests"][0]));
        let config = parse(blob(&manifest["config"]));
        blob(&manifest["layers"][0]);
        assert_eq!(config["created"], "2024-02-29T12:34:56Z");
        assert_eq!(config["rootfs"]["diff_ids"][0].as_str().unwrap(), format!("sha256:{}", sha256(&root(&inputs()).unwrap().tar("", inputs().time))));
    }
}
