//! The plugin and its configuration.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use crate::{Fault, Try, Undo, Ward};

const fn fault(
    name: &'static str,
    make: for<'a> fn(&'a Ward<'a>) -> Try<Undo<'a>>,
    check: &'static str,
    status: &'static str,
    words: &'static [&'static str],
) -> Fault {
    Fault { name, make, check, status, words }
}

/// Puts `bytes` with `mode` in a file's place, or nothing; to undo it puts back what was there.
fn replaced<'a>(path: PathBuf, bytes: Option<Vec<u8>>, mode: u32) -> Try<Undo<'a>> {
    let kept = path.with_extension("kept");
    let there = path.exists();
    if there {
        fs::rename(&path, &kept)?;
    }
    if let Some(bytes) = bytes {
        fs::write(&path, bytes)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
    }
    Ok(Box::new(move || {
        match there {
            true => fs::rename(&kept, &path)?,
            false => fs::remove_file(&path)?,
        }
        Ok(())
    }))
}

fn plugin(ward: &Ward<'_>) -> PathBuf {
    ward.bin_dir().join("podgate-cni")
}

fn configuration(ward: &Ward<'_>) -> PathBuf {
    ward.conf_dir().join("10-podgate.conflist")
}

fn edited<'a>(ward: &Ward<'_>, edit: impl FnOnce(String) -> String) -> Try<Undo<'a>> {
    let path = configuration(ward);
    let text = fs::read_to_string(&path)?;
    replaced(path, Some(edit(text).into_bytes()), 0o644)
}

pub const FAULTS: &[Fault] = &[
    fault("no plugin", |ward| replaced(plugin(ward), None, 0), "cni-plugin", "failure", &["is missing", "podgate install-cni"]),
    fault(
        "a plugin that is not executable",
        |ward| replaced(plugin(ward), Some(fs::read(plugin(ward))?), 0o644),
        "cni-plugin",
        "failure",
        &["not executable", "chmod 755"],
    ),
    fault(
        "a plugin that fails",
        |ward| replaced(plugin(ward), Some(b"#!/bin/sh\nexit 1\n".to_vec()), 0o755),
        "cni-plugin",
        "failure",
        &["does not answer", "install-cni"],
    ),
    fault(
        "a plugin for another machine",
        |ward| replaced(plugin(ward), Some(b"\x7fELF of some other kind".to_vec()), 0o755),
        "cni-plugin",
        "failure",
        &["does not answer"],
    ),
    fault(
        "a plugin of another build",
        // What stands behind an ELF file's last section is nobody's business but a comparison's.
        |ward| replaced(plugin(ward), Some([fs::read(plugin(ward))?, vec![0; 8]].concat()), 0o755),
        "cni-plugin",
        "warning",
        &["another one than that beside this program"],
    ),
    fault("no configuration", |ward| replaced(configuration(ward), None, 0), "cni-config", "failure", &["is missing", "podgate install-cni"]),
    fault("half a configuration", |ward| edited(ward, |text| text[..text.len() / 2].to_owned()), "cni-config", "failure", &["is not JSON"]),
    fault(
        "another plugin's configuration in its place",
        |ward| edited(ward, |text| text.replace("podgate-cni", "bridge")),
        "cni-config",
        "failure",
        &["names no plugin podgate-cni"],
    ),
    fault(
        "a configuration for another daemon",
        |ward| edited(ward, |text| text.replace("podgate.sock", "other.sock")),
        "cni-config",
        "failure",
        &["other.sock"],
    ),
    fault(
        "a configuration that comes first",
        |ward| replaced(ward.conf_dir().join("05-other.conflist"), Some(b"{}".to_vec()), 0o644),
        "cni-order",
        "warning",
        &["05-other.conflist comes before", "--conf-name"],
    ),
    fault(
        "another plugin that gives addresses from the pod range",
        |ward| {
            let text =
                r#"{"name": "other", "plugins": [{"type": "bridge", "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.244.9.0/24"}]]}}]}"#;
            replaced(ward.conf_dir().join("99-other.conflist"), Some(text.into()), 0o644)
        },
        "ranges",
        "warning",
        &["10.244.9.0/24", "99-other.conflist"],
    ),
];
