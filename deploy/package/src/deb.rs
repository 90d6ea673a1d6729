//! A Debian package: the two programs, the units, an annotated configuration, completions and man pages. It depends on nothing.
//!
//! Read first: deb(5), deb-control(5), deb-conffiles(5); Debian policy §6 on what maintainer scripts are called with.

use std::path::Path;
use std::process::Command;

use jiff::Timestamp;
use jiff::fmt::rfc2822;
use jiff::tz::TimeZone;

use crate::PackageError;
use crate::archive::{Entry, Tree, ar, gzip};
use crate::image::put;
use crate::inputs::{Inputs, output};

/// Where the configuration is, from the root.
const CONFIGURATION: &str = "etc/podgate/podgate.yaml";

/// Who answers for the package, unless the environment says who builds it (`DEBFULLNAME` and `DEBEMAIL`, as devscripts(1) has them).
fn maintainer() -> String {
    let variable = |name: &str, default: &str| std::env::var(name).ok().filter(|text| !text.is_empty()).unwrap_or_else(|| default.to_owned());
    format!("{} <{}>", variable("DEBFULLNAME", "The Podgate authors"), variable("DEBEMAIL", "podgate@localhost"))
}

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
                     Files: *\nCopyright: 2026 The Podgate authors\nLicense: Apache-2.0\n See /usr/share/common-licenses/Apache-2.0\n";
    tree.file(&about("copyright"), 0o644, copyright);
    tree.file(&about("changelog.gz"), 0o644, gzip(changelog(inputs).as_bytes()));
    tree.file("usr/share/lintian/overrides/podgate", 0o644, inputs.file("deploy/deb/lintian-overrides")?);
    tree.file("usr/share/man/man8/podgate-cni.8.gz", 0o644, gzip(&inputs.file("deploy/deb/podgate-cni.8")?));
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

/// One entry: what changed in detail is in the history of the sources (deb-changelog(5)).
fn changelog(inputs: &Inputs) -> String {
    let at = Timestamp::from_second(i64::try_from(inputs.time).unwrap_or(0)).unwrap_or_default();
    let at = rfc2822::to_string(&at.to_zoned(TimeZone::UTC)).unwrap_or_default();
    format!(
        "podgate ({version}) unstable; urgency=medium\n\n  * Podgate {version}, as it is built from its sources.\n\n -- {maintainer}  {at}\n",
        version = inputs.version,
        maintainer = maintainer()
    )
}

fn about(version: &str, architecture: &str, data: &Tree) -> String {
    let bytes: usize = data.entries().map(|(_, entry)| if let Entry::File { bytes, .. } = entry { bytes.len() } else { 0 }).sum();
    format!(
        "Package: podgate\nVersion: {version}\nArchitecture: {architecture}\nMaintainer: {maintainer}\nInstalled-Size: {kib}\nSection: net\n\
         Priority: optional\nDescription: userspace packet gateway for Kubernetes pods and bare VMs\n \
         Pod addresses, traffic between pods on one node and between nodes, service\n \
         VIPs, node ports and masquerade from one process on each node, with no\n \
         iptables or nftables rule, no eBPF program and no kernel module beyond TUN\n \
         and veth.\n",
        maintainer = maintainer(),
        kib = bytes.div_ceil(1024)
    )
}
