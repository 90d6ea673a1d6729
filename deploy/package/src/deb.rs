//! A Debian package: the two programs, the units, an annotated configuration, completions and man pages. It depends on nothing.
//!
//! Read first: deb(5), deb-control(5), deb-conffiles(5); Debian policy §6 on what maintainer scripts are called with.

use std::path::Path;
use std::process::Command;

use crate::PackageError;
use crate::archive::{Entry, Tree, ar, gzip};
use crate::image::put;
use crate::inputs::{Inputs, output};

/// Where the configuration is, from the root.
const CONFIGURATION: &str = "etc/podgate/podgate.yaml";

/// Who answers for the package, where nobody else builds it.
const MAINTAINER: &str = "The Podgate authors <podgate@localhost>";

/// Writes the package into `directory`; what was written, a line each.
pub(crate) fn write(inputs: &Inputs, directory: &Path) -> Result<Vec<String>, PackageError> {
    let (data, architecture) = (data(inputs)?, inputs.architecture()?);
    let mut control = Tree::default();
    control.file("control", 0o644, about(inputs.version, architecture, &data));
    control.file("conffiles", 0o644, format!("/{CONFIGURATION}\n"));
    for script in ["postinst", "prerm", "postrm"] {
        control.file(script, 0o755, inputs.file(&format!("deploy/deb/{script}"))?);
    }
    let (control, data) = (gzip(&control.tar("./", inputs.time)), gzip(&data.tar("./", inputs.time)));
    let package = ar(&[("debian-binary", b"2.0\n"), ("control.tar.gz", &control), ("data.tar.gz", &data)], inputs.time);
    let path = directory.join(format!("podgate_{}_{architecture}.deb", inputs.version));
    put(&path, &package)?;
    Ok(vec![path.display().to_string()])
}

fn data(inputs: &Inputs) -> Result<Tree, PackageError> {
    let mut tree = Tree::default();
    tree.file("usr/bin/podgate", 0o755, inputs.podgate.clone());
    tree.file("usr/bin/podgate-cni", 0o755, inputs.plugin.clone());
    for unit in ["podgate-prepare.service", "podgate.service"] {
        tree.file(&format!("usr/lib/systemd/system/{unit}"), 0o644, inputs.file(&format!("deploy/systemd/{unit}"))?);
    }
    tree.file(CONFIGURATION, 0o644, inputs.file("deploy/podgate.yaml")?);
    tree.directory("etc/podgate/cluster.d");
    let about = |name: &str| format!("usr/share/doc/podgate/{name}");
    let copyright = "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\nUpstream-Name: podgate\n\n\
                     Files: *\nCopyright: The Podgate authors\nLicense: Apache-2.0\n See /usr/share/common-licenses/Apache-2.0\n";
    tree.file(&about("copyright"), 0o644, copyright);
    tree.file(&about("README.md.gz"), 0o644, gzip(&inputs.file("README.md")?));
    tree.file(&about("sbom.cdx.json.gz"), 0o644, gzip(&inputs.sbom));
    let ask = |words: &[&str]| output(Command::new(&inputs.podgate_path).args(words));
    for (shell, path) in [
        ("bash", "usr/share/bash-completion/completions/podgate"),
        ("zsh", "usr/share/zsh/vendor-completions/_podgate"),
        ("fish", "usr/share/fish/vendor_completions.d/podgate.fish"),
    ] {
        tree.file(path, 0o644, ask(&["completions", shell])?);
    }
    let scratch = std::env::temp_dir().join(format!("podgate-package-{}", std::process::id()));
    ask(&["man", "--dir", &scratch.display().to_string()])?;
    for page in std::fs::read_dir(&scratch).map_err(PackageError::file("read", &scratch))?.flatten() {
        let bytes = std::fs::read(page.path()).map_err(PackageError::file("read", page.path()))?;
        tree.file(&format!("usr/share/man/man1/{}.gz", page.file_name().to_string_lossy()), 0o644, gzip(&bytes));
    }
    std::fs::remove_dir_all(&scratch).map_err(PackageError::file("remove", &scratch))?;
    Ok(tree)
}

fn about(version: &str, architecture: &str, data: &Tree) -> String {
    let bytes: usize = data.entries().map(|(_, entry)| if let Entry::File { bytes, .. } = entry { bytes.len() } else { 0 }).sum();
    format!(
        "Package: podgate\nVersion: {version}\nArchitecture: {architecture}\nMaintainer: {MAINTAINER}\nInstalled-Size: {kib}\nSection: net\n\
         Priority: optional\nDescription: userspace packet gateway for Kubernetes pods and bare VMs\n \
         Pod addresses, traffic between pods on one node and between nodes, service VIPs,\n \
         node ports and masquerade from one process on each node, with no iptables or\n \
         nftables rule, no eBPF program and no kernel module beyond TUN and veth.\n",
        kib = bytes.div_ceil(1024)
    )
}
