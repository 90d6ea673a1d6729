//! This machine's own name among the nodes.

use std::io::{self, Write};
use std::path::Path;

use crate::source::cache::replace;

const FILE: &str = "machine";

/// This machine's own name, which no other has: made once, kept in `state_dir`.
pub fn name(state_dir: &Path) -> io::Result<String> {
    let path = state_dir.join(FILE);
    match std::fs::read_to_string(&path) {
        Ok(text) if !text.trim().is_empty() => return Ok(text.trim().to_owned()),
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // random(4): a new one with each reading.
    let machine = std::fs::read_to_string("/proc/sys/kernel/random/uuid")?.trim().to_owned();
    replace(&path, |out| out.write_all(machine.as_bytes()))?;
    Ok(machine)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_keeps_its_name_and_two_have_different_ones() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let kept = name(one.path()).unwrap();
        assert_eq!(name(one.path()).unwrap(), kept);
        assert_ne!(name(two.path()).unwrap(), kept);
    }
}
