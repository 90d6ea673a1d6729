//! Archives, byte for byte the same for the same content: POSIX ustar, `ar` as dpkg reads it, gzip without a time.
//!
//! Read first: POSIX.1-2017, pax, "ustar Interchange Format"; deb(5); RFC 1952.

use std::io::Write;

use flate2::{Compression, GzBuilder};

/// A tar block, in bytes.
const BLOCK: usize = 512;

/// What a tar holds under one path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// A directory.
    Directory { mode: u32 },
    /// A file.
    File { mode: u32, bytes: Vec<u8> },
}

/// A tree of files that belong to root, in the order of their paths. Directories above a file are made with it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tree(std::collections::BTreeMap<String, Entry>);

impl Tree {
    /// Adds a directory that anybody may read.
    pub fn directory(&mut self, path: &str) {
        self.add(path, Entry::Directory { mode: 0o755 });
    }

    /// Adds a file.
    pub fn file(&mut self, path: &str, mode: u32, bytes: impl Into<Vec<u8>>) {
        self.add(path, Entry::File { mode, bytes: bytes.into() });
    }

    fn add(&mut self, path: &str, entry: Entry) {
        for (at, _) in path.match_indices('/') {
            self.0.entry(path[..at].to_owned()).or_insert(Entry::Directory { mode: 0o755 });
        }
        self.0.insert(path.to_owned(), entry);
    }

    /// Paths and what they hold.
    pub fn entries(&self) -> impl Iterator<Item = (&str, &Entry)> {
        self.0.iter().map(|(path, entry)| (path.as_str(), entry))
    }

    /// As a tar archive, each path behind `prefix`, at the time `mtime` (seconds of the Unix clock).
    pub fn tar(&self, prefix: &str, mtime: u64) -> Vec<u8> {
        let mut out = Vec::new();
        for (path, entry) in self.entries() {
            match entry {
                Entry::Directory { mode } => out.extend(header(&format!("{prefix}{path}/"), *mode, 0, mtime, b'5')),
                Entry::File { mode, bytes } => {
                    out.extend(header(&format!("{prefix}{path}"), *mode, bytes.len(), mtime, b'0'));
                    out.extend(bytes);
                    out.resize(out.len().next_multiple_of(BLOCK), 0);
                }
            }
        }
        // Two blocks of zeroes end an archive.
        out.resize(out.len() + 2 * BLOCK, 0);
        out
    }
}

/// The header of an entry. Every path of ours fits the first name field.
fn header(path: &str, mode: u32, len: usize, mtime: u64, kind: u8) -> [u8; BLOCK] {
    assert!(path.len() <= 100, "{path} is too long for a name of ustar");
    let mut header = [0; BLOCK];
    let mut put = |at: usize, text: &str| header[at..at + text.len()].copy_from_slice(text.as_bytes());
    put(0, path);
    put(100, &format!("{mode:07o}"));
    put(108, "0000000");
    put(116, "0000000");
    put(124, &format!("{len:011o}"));
    put(136, &format!("{mtime:011o}"));
    // The checksum is computed with its own field full of spaces.
    put(148, "        ");
    put(257, "ustar\x0000");
    put(265, "root");
    put(297, "root");
    header[156] = kind;
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header
}

/// Compressed, with neither name nor time in it.
pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzBuilder::new().mtime(0).write(Vec::new(), Compression::best());
    let written = encoder.write_all(bytes).and_then(|()| encoder.finish());
    written.expect("writing to memory does not fail")
}

/// An `ar` archive of these members (deb(5)).
pub(crate) fn ar(members: &[(&str, &[u8])], mtime: u64) -> Vec<u8> {
    let mut out = b"!<arch>\n".to_vec();
    for (name, bytes) in members {
        out.extend(format!("{name:<16}{mtime:<12}{:<6}{:<6}{:<8}{:<10}`\n", 0, 0, "100644", bytes.len()).as_bytes());
        out.extend(*bytes);
        if bytes.len() % 2 == 1 {
            out.push(b'\n');
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    fn piped(program: &str, arguments: &[&str], input: &[u8]) -> String {
        let mut child = Command::new(program).args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(input).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{program} does not read it");
        String::from_utf8(output.stdout).unwrap()
    }

    #[test]
    fn tar_and_gzip_read_what_was_packed() {
        let mut tree = Tree::default();
        tree.file("usr/bin/podgate", 0o755, "program");
        tree.file("usr/share/empty", 0o644, "");
        tree.directory("run/podgate");
        let packed = gzip(&tree.tar("./", 1_700_000_000));
        assert_eq!(packed, gzip(&tree.tar("./", 1_700_000_000)), "not the same twice");
        let listed = piped("tar", &["-tzvf", "-", "--utc", "--full-time"], &packed);
        let names: Vec<&str> = listed.lines().filter_map(|line| line.split_whitespace().last()).collect();
        assert_eq!(names, ["./run/", "./run/podgate/", "./usr/", "./usr/bin/", "./usr/bin/podgate", "./usr/share/", "./usr/share/empty"]);
        let program = listed.lines().find(|line| line.ends_with("/podgate")).unwrap();
        assert!(program.starts_with("-rwxr-xr-x root/root") && program.contains(" 7 2023-11-14 22:13:20"), "{program}");
        assert_eq!(piped("tar", &["-xzOf", "-", "./usr/bin/podgate"], &packed), "program");
    }

    #[test]
    fn a_member_of_odd_length_is_padded() {
        let packed = ar(&[("debian-binary", b"2.0\n"), ("odd", b"abc"), ("last", b"z!")], 0);
        assert_eq!(&packed[..24], b"!<arch>\ndebian-binary   ");
        assert_eq!(packed.len(), 8 + (60 + 4) + (60 + 4) + (60 + 2));
    }
}
