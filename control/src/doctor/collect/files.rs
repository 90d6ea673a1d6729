//! Directories and files: room, and what belongs to CNI.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use ipnetwork::IpNetwork;
use nix::sys::statvfs::statvfs;
use serde_json::Value;

use super::super::facts::{Cni, Plugin, Room, Same};
use crate::config::Config;
use crate::install_cni::{PLUGIN, Places};

/// What a flow costs in the mapped file, in bytes, with all that stands beside its record; rounded up (`runtime/src/flow_file.rs`).
const FLOW_LEN: u64 = 224;

/// What the address journal, the records of pods and small files may take, in bytes.
const SMALL_FILES_LEN: u64 = 4 << 20;

/// How long the plugin may take to say its versions.
const PLUGIN_TIMEOUT: Duration = Duration::from_secs(5);

pub(super) fn rooms(config: &Config) -> Vec<Room> {
    // A flow table that is there has all its blocks already.
    let flows = if config.runtime_dir.join("flows").exists() { 0 } else { u64::from(config.flows.capacity) * FLOW_LEN };
    let room = |path: &Path, key, needed| {
        // What is not there yet will be in the file system of what it is to be in.
        let there = path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
        let free = statvfs(there).map_err(|errno| format!("{}: {errno}", there.display()));
        // A file system without a count of files (btrfs) has 0 of them.
        let files = |found: &nix::sys::statvfs::Statvfs| if found.files() == 0 { u64::MAX } else { found.files_available() };
        Room { path: path.to_owned(), key, needed, free: free.map(|found| (found.blocks_available() * found.fragment_size(), files(&found))) }
    };
    vec![room(&config.runtime_dir, "runtimeDir", flows), room(&config.state_dir, "stateDir", SMALL_FILES_LEN)]
}

pub(super) fn cni(places: &Places) -> Cni {
    let ours = places.configuration();
    let entries = fs::read_dir(&places.conf_dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let is_one = |path: &std::path::PathBuf| path.extension().is_some_and(|e| e == "conf" || e == "conflist" || e == "json");
    let mut others: Vec<_> = entries.filter(|path| is_one(path) && *path != ours).map(|path| (path.clone(), subnets(&path))).collect();
    others.sort();
    let text = match fs::read_to_string(&ours) {
        Ok(text) => Some(Ok(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => Some(Err(error.to_string())),
    };
    Cni { found: plugin(&places.plugin()), plugin: places.plugin(), configuration: ours, text, before: places.before_ours(), others }
}

/// The ranges that a configuration gives addresses from: every `subnet` in it, however deep (`host-local` has two places for them).
fn subnets(path: &Path) -> Vec<IpNetwork> {
    fn gather(value: &Value, found: &mut Vec<IpNetwork>) {
        match value {
            Value::Object(map) => {
                found.extend(map.get("subnet").and_then(Value::as_str).and_then(|text| text.parse::<IpNetwork>().ok()));
                map.values().for_each(|value| gather(value, found));
            }
            Value::Array(list) => list.iter().for_each(|value| gather(value, found)),
            _ => {}
        }
    }
    let mut found = Vec::new();
    if let Some(value) = fs::read(path).ok().and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok()) {
        gather(&value, &mut found);
    }
    found
}

fn plugin(path: &Path) -> Plugin {
    match fs::metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Plugin::Missing,
        Err(error) => return Plugin::Fails(error.to_string()),
        Ok(found) if !found.is_file() || found.permissions().mode() & 0o111 == 0 => return Plugin::NotExecutable,
        Ok(_) => {}
    }
    if let Err(why) = versions(path) {
        return Plugin::Fails(why);
    }
    let beside = std::env::current_exe().unwrap_or_default().with_file_name(PLUGIN);
    let alike = |a: &[u8], b: &[u8]| if a == b { Same::Alike } else { Same::Different };
    Plugin::Answers(match (fs::read(path), fs::read(&beside)) {
        (Ok(installed), Ok(shipped)) => Some(alike(&installed, &shipped)),
        _ => None,
    })
}

/// Asks the plugin for the versions that it speaks (CNI SPEC.md, VERSION), which touches nothing.
fn versions(path: &Path) -> Result<(), String> {
    let mut command = Command::new(path);
    command.env_clear().env("CNI_COMMAND", "VERSION").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().map_err(|error| error.to_string())?;
    if let Some(mut stdin) = child.stdin.take() {
        // Whoever does not read it may have answered already.
        let _ = stdin.write_all(br#"{"cniVersion": "1.0.0"}"#);
    }
    let start = Instant::now();
    while child.try_wait().map_err(|error| error.to_string())?.is_none() {
        if start.elapsed() > PLUGIN_TIMEOUT {
            let _ = child.kill().and_then(|()| child.wait());
            return Err(format!("it says nothing within {} s", PLUGIN_TIMEOUT.as_secs()));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let output = child.wait_with_output().map_err(|error| error.to_string())?;
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let speaks = answer["supportedVersions"].as_array().is_some_and(|versions| versions.iter().any(|version| version == "1.0.0"));
    if speaks { Ok(()) } else { Err(format!("its answer to VERSION names no version 1.0.0 ({})", output.status)) }
}
