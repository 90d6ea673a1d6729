//! What etcd held when it was last seen, on this machine's disk: a node that starts while etcd is away serves what it knew.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::store::Pair;

const FILE: &str = "etcd.json";
const MACHINE: &str = "machine";

#[derive(Serialize, Deserialize)]
struct Kept {
    /// Of another cluster or prefix nothing is believed.
    prefix: String,
    pairs: Vec<Pair>,
}

/// Where it is kept.
#[derive(Clone, Debug)]
pub struct Cache {
    path: PathBuf,
    prefix: String,
}

impl Cache {
    /// In `state_dir`, for what is under `prefix`.
    pub fn new(state_dir: &Path, prefix: &str) -> Cache {
        Cache { path: state_dir.join(FILE), prefix: prefix.to_owned() }
    }

    /// What was kept; nothing where there is nothing that can be used.
    pub fn load(&self) -> Vec<Pair> {
        let bytes = match std::fs::read(&self.path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Vec::new(),
            Err(error) => {
                tracing::warn!(path = %self.path.display(), %error, "what etcd held before cannot be read");
                return Vec::new();
            }
        };
        match serde_json::from_slice::<Kept>(&bytes) {
            Ok(kept) if kept.prefix == self.prefix => kept.pairs,
            Ok(_) => Vec::new(),
            // Torn, most likely: it is written anew as soon as etcd answers.
            Err(error) => {
                tracing::warn!(path = %self.path.display(), %error, "what etcd held before cannot be understood");
                Vec::new()
            }
        }
    }

    /// Keeps `pairs`, as a whole or not at all.
    pub fn save(&self, pairs: Vec<Pair>) {
        let bytes = serde_json::to_vec(&Kept { prefix: self.prefix.clone(), pairs }).expect("pairs are always JSON");
        if let Err(error) = write(&self.path, &bytes) {
            tracing::warn!(path = %self.path.display(), %error, "what etcd holds cannot be kept for the next start");
        }
    }
}

/// This machine's own name, which no other has: made once, kept in `state_dir`.
pub fn machine(state_dir: &Path) -> io::Result<String> {
    let path = state_dir.join(MACHINE);
    match std::fs::read_to_string(&path) {
        Ok(text) if !text.trim().is_empty() => return Ok(text.trim().to_owned()),
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // random(4): a new one with each reading.
    let machine = std::fs::read_to_string("/proc/sys/kernel/random/uuid")?.trim().to_owned();
    write(&path, machine.as_bytes())?;
    Ok(machine)
}

fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    let draft = path.with_extension("draft");
    std::fs::write(&draft, bytes)?;
    std::fs::rename(&draft, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_kept_is_loaded_under_the_same_prefix_alone_and_a_torn_file_is_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let pairs = vec![Pair { key: "/podgate/cluster".into(), value: "x".into(), created: 1, modified: 2 }];
        let cache = Cache::new(dir.path(), "/podgate");
        assert!(cache.load().is_empty());
        cache.save(pairs.clone());
        assert_eq!(cache.load(), pairs);
        assert!(Cache::new(dir.path(), "/other").load().is_empty());
        std::fs::write(dir.path().join(FILE), "{\"prefix\":").unwrap();
        assert!(cache.load().is_empty());
    }

    #[test]
    fn a_machine_keeps_its_name_and_two_have_different_ones() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let name = machine(one.path()).unwrap();
        assert_eq!(machine(one.path()).unwrap(), name);
        assert_ne!(machine(two.path()).unwrap(), name);
    }
}
