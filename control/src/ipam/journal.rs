//! An append-only file of records that a crash, a torn write or a flipped bit cannot turn into another truth.
//!
//! Each record is one line, `CCCCCCCC {json}`: the CRC-32 of the JSON in hexadecimal, a blank, the JSON. The first says in which boot the
//! file was begun: addresses that are given out belong to network namespaces, and those do not outlive a boot.
//!
//! **What is on the disk when.** A record is written, not synced: what was written survives the death of the process in the page cache, and
//! after the death of the machine it no longer matters who had which address. An fsync for each would cost more than all else of an
//! attachment (110 allocations: 117 ms at best with, 0.6 ms without, ext4 on a virtual disk) and protect nothing. What replaces a whole
//! file is synced before its rename, and the directory after it: a power cut leaves the old file or the new one, so that the memory of whose
//! an address was survives, and so that a file of this boot is never an empty one.
//!
//! **What a reader finds** in a file of this boot:
//!
//! - a last line without its newline: the write was torn and nobody was told of the record, so it is cut off, with a message (if all of it
//!   but the newline is there, it counts);
//! - any other line whose checksum does not fit: the file was damaged after it was written, and what it said might be an address that
//!   is in use. The reader refuses: giving that address out again would be worse than giving out none.
//!
//! In a file of another boot nothing of that is in use. What cannot be read is left out, with a message.
//!
//! Which of the two it is, the first line says; and if that itself cannot be read, `addresses.boot`: a file beside the journal that names
//! the boot, replaced once in each boot, after the journal was begun and before any address is given out. If it names this boot, the journal
//! may tell of addresses in use, and the reader refuses. If it names another, no address was given out in this one. If it cannot be read
//! either, the reader refuses.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{Lease, Owner, Pod};

/// One line of the journal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Record {
    /// The first line.
    Journal {
        /// Of this format.
        version: u32,
        /// The boot in which it was begun; version 1 does not say.
        #[serde(default)]
        boot: Option<String>,
    },
    /// Addresses were given out. What the owner had before is replaced.
    Lease(Lease),
    /// They were taken back.
    Release {
        /// From whom.
        #[serde(flatten)]
        owner: Owner,
        /// When, in Unix seconds.
        #[serde(default)]
        at: u64,
    },
    /// An address that somebody had, in the order of releases.
    Freed {
        /// Which.
        address: IpAddr,
        /// Whose it was.
        #[serde(default)]
        last: Option<Pod>,
        /// When it was released, in Unix seconds.
        at: u64,
    },
    /// The address given out last: only in version 1.
    Cursor(IpAddr),
}

/// The format's version. Files of version 1, which name no boot, are read as of this boot and written anew.
const VERSION: u32 = 2;

/// Why the journal cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The kernel refused.
    #[error("{path}: cannot {action}: {reason}; the journal of addresses must be writable: check space and permissions of stateDir")]
    Io {
        /// The file.
        path: String,
        /// What was tried.
        action: &'static str,
        /// What the kernel says.
        reason: String,
    },
    /// Another daemon has it.
    #[error("{path}: another process uses this journal of addresses; give each daemon on a machine a stateDir of its own")]
    Locked {
        /// The lock file.
        path: String,
    },
    /// A record was damaged after it was written.
    #[error("{path}:{line}: the journal of addresses is damaged: {problem}; restore it from a backup, or, if no pod runs on this node, move it away")]
    Corrupt {
        /// The file.
        path: String,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        problem: String,
    },
}

/// Whose addresses a journal that was found tells of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// There is none yet.
    New,
    /// This boot's: they are in use.
    ThisBoot,
    /// Another boot's: none is in use.
    OtherBoot,
}

/// A journal that was read, and locked against other processes, but not yet begun.
#[derive(Debug)]
pub struct Found {
    /// Whose.
    pub origin: Origin,
    /// Its records with their lines, but for the first.
    pub records: Vec<(usize, Record)>,
    /// What there is to say about its state.
    pub messages: Vec<String>,
    /// It can be appended to as it is.
    clean: bool,
    len: u64,
    count: usize,
    state_dir: PathBuf,
    boot: String,
    marked: bool,
    lock: Flock<File>,
}

/// The open journal. One process at a time has it.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    boot: String,
    file: File,
    /// How long the file is as far as it counts.
    len: u64,
    records: usize,
    /// A failed append may have left half a line behind that could not be cut off.
    torn: bool,
    _lock: Flock<File>,
}

impl Found {
    /// Reads the journal in `state_dir`, which is made if it is missing. `boot` is the kernel's name for this boot
    /// (`/proc/sys/kernel/random/boot_id`).
    pub fn read(state_dir: &Path, boot: &str) -> Result<Found, JournalError> {
        std::fs::create_dir_all(state_dir).map_err(|e| io(state_dir, "make the directory", e))?;
        let lock_path = state_dir.join("addresses.lock");
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(&lock_path).map_err(|e| io(&lock_path, "open", e))?;
        let lock = Flock::lock(lock, FlockArg::LockExclusiveNonblock).map_err(|_| JournalError::Locked { path: lock_path.display().to_string() })?;
        let (path, mark_path) = (journal_path(state_dir), mark_path(state_dir));
        let bytes = read_if_any(&path)?;
        let mark = read_if_any(&mark_path)?;
        let marked_boot: Option<String> = mark.as_deref().and_then(|bytes| decode(bytes.strip_suffix(b"\n")?));
        let marked = marked_boot.as_deref() == Some(boot);
        let mut found = Found {
            origin: Origin::New,
            records: Vec::new(),
            messages: Vec::new(),
            clean: false,
            len: 0,
            count: 0,
            state_dir: state_dir.to_owned(),
            boot: boot.to_owned(),
            marked,
            lock,
        };
        match bytes {
            None if marked => {
                let path = path.display();
                found.messages.push(format!("{path}: it is gone; `podgate ipam check --fix` takes note of the addresses of what is attached"));
            }
            None => {}
            // Never left behind by us, but by somebody's hand; nothing was given out in this boot.
            Some(bytes) if bytes.is_empty() && mark.is_none() => {}
            Some(bytes) => found.understand(&path, &bytes, marked_boot.as_deref())?,
        }
        Ok(found)
    }

    fn understand(&mut self, path: &Path, bytes: &[u8], marked_boot: Option<&str>) -> Result<(), JournalError> {
        let corrupt = |line: usize, problem: &str| corrupt(path, line, problem.to_owned());
        self.len = bytes.len() as u64;
        let first = bytes.split_inclusive(|byte| *byte == b'\n').next().unwrap_or_default();
        let header = match decode_line(first) {
            Some((Record::Journal { version: version @ 1..=VERSION, boot }, _)) => Some((version, boot)),
            Some((Record::Journal { version, .. }, _)) => {
                return Err(corrupt(1, &format!("it is of version {version}, this program writes {VERSION}")));
            }
            _ => None,
        };
        self.origin = match &header {
            Some((1, _)) | Some((_, None)) => Origin::ThisBoot,
            Some((_, Some(boot))) if *boot == self.boot => Origin::ThisBoot,
            Some(_) if self.marked => return Err(corrupt(1, "it is another boot's, and this boot has had one already")),
            Some(_) => Origin::OtherBoot,
            None if self.marked || marked_boot.is_none() => {
                return Err(corrupt(1, "the first line, which says in which boot it was begun, cannot be read"));
            }
            None => Origin::OtherBoot,
        };
        let mut damaged: Vec<usize> = Vec::new();
        self.clean = self.origin == Origin::ThisBoot && header.is_some_and(|(version, _)| version == VERSION);
        for (index, line) in bytes.split_inclusive(|byte| *byte == b'\n').enumerate() {
            let number = index + 1;
            let strict = self.origin == Origin::ThisBoot;
            let last = !line.ends_with(b"\n");
            match decode_line(line) {
                Some((Record::Journal { .. }, _)) if number > 1 && strict => {
                    return Err(corrupt(number, "only the first line may say what the file is"));
                }
                Some((record, whole)) => {
                    self.count += 1;
                    if !whole {
                        self.clean = false;
                        self.messages.push(format!("{}:{number}: the last record was without its newline, and kept", path.display()));
                    }
                    if !matches!(record, Record::Journal { .. }) {
                        self.records.push((number, record));
                    }
                }
                None if strict && last => {
                    self.clean = false;
                    self.messages.push(format!("{}:{number}: the last record was torn, and cut off: nobody had been given it", path.display()));
                }
                None if strict => return Err(corrupt(number, "its checksum does not fit")),
                None => damaged.push(number),
            }
        }
        if let Some(line) = damaged.first() {
            let (path, count) = (path.display(), damaged.len());
            self.messages.push(format!(
                "{path}:{line}: {count} records of an earlier boot cannot be read; nobody uses their addresses any more, but whose they were is forgotten"
            ));
        }
        Ok(())
    }

    /// An error about one line.
    pub fn corrupt(&self, line: usize, problem: String) -> JournalError {
        corrupt(&journal_path(&self.state_dir), line, problem)
    }

    /// Opens it for this boot's records; `records` are what it is to say if it is not good to be appended to as it is.
    pub fn begin(self, records: &[Record]) -> Result<Journal, JournalError> {
        let path = journal_path(&self.state_dir);
        let (file, len, count) = if self.clean {
            (OpenOptions::new().append(true).open(&path).map_err(|e| io(&path, "open", e))?, self.len, self.count)
        } else {
            let (file, len) = write_anew(&path, &self.boot, records)?;
            (file, len, records.len() + 1)
        };
        if !self.marked {
            replace(&mark_path(&self.state_dir), &encode(&self.boot))?;
        }
        Ok(Journal { path, boot: self.boot, file, len, records: count, torn: false, _lock: self.lock })
    }
}

impl Journal {
    /// How many records the file holds.
    pub fn records(&self) -> usize {
        self.records
    }

    /// Adds records. When this returns they are written, as the module says; if it fails, none of them is in the journal.
    pub fn append(&mut self, records: &[Record]) -> Result<(), JournalError> {
        if self.torn {
            self.cut()?;
        }
        let bytes: Vec<u8> = records.iter().flat_map(encode).collect();
        if let Err(error) = self.file.write_all(&bytes) {
            self.torn = true;
            // What was half written must not stand before the next record. If even that fails, the next append tries again first.
            let _ = self.cut();
            return Err(io(&self.path, "write", error));
        }
        self.len += bytes.len() as u64;
        self.records += records.len();
        Ok(())
    }

    /// Replaces the whole journal, at once.
    pub fn rewrite(&mut self, records: &[Record]) -> Result<(), JournalError> {
        let (file, len) = write_anew(&self.path, &self.boot, records)?;
        (self.file, self.len, self.records, self.torn) = (file, len, records.len() + 1, false);
        Ok(())
    }

    fn cut(&mut self) -> Result<(), JournalError> {
        self.file.set_len(self.len).map_err(|e| io(&self.path, "cut off a torn record", e))?;
        self.torn = false;
        Ok(())
    }
}

fn journal_path(state_dir: &Path) -> PathBuf {
    state_dir.join("addresses.journal")
}

fn mark_path(state_dir: &Path) -> PathBuf {
    state_dir.join("addresses.boot")
}

fn corrupt(path: &Path, line: usize, problem: String) -> JournalError {
    JournalError::Corrupt { path: path.display().to_string(), line, problem }
}

fn io(path: &Path, action: &'static str, error: std::io::Error) -> JournalError {
    JournalError::Io { path: path.display().to_string(), action, reason: error.to_string() }
}

fn read_if_any(path: &Path) -> Result<Option<Vec<u8>>, JournalError> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io(path, "read", error)),
    }
}

/// Replaces a file, so that even after a power cut it is the old one or the new one.
fn replace(path: &Path, bytes: &[u8]) -> Result<(), JournalError> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let temporary = PathBuf::from(temporary);
    let mut file = File::create(&temporary).map_err(|e| io(&temporary, "write", e))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(|e| io(&temporary, "write", e))?;
    std::fs::rename(&temporary, path).map_err(|e| io(path, "replace", e))?;
    // The rename itself is on the disk only when its directory is.
    let directory = path.parent().unwrap_or(Path::new("."));
    File::open(directory).and_then(|d| d.sync_all()).map_err(|e| io(directory, "write", e))
}

fn write_anew(path: &Path, boot: &str, records: &[Record]) -> Result<(File, u64), JournalError> {
    let mut bytes = encode(&Record::Journal { version: VERSION, boot: Some(boot.to_owned()) });
    records.iter().for_each(|record| bytes.extend(encode(record)));
    replace(path, &bytes)?;
    let file = OpenOptions::new().append(true).open(path).map_err(|e| io(path, "open", e))?;
    Ok((file, bytes.len() as u64))
}

fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    let json = serde_json::to_string(value).expect("records have string keys and finite numbers only");
    format!("{:08x} {json}\n", crc32fast::hash(json.as_bytes())).into_bytes()
}

fn decode<T: DeserializeOwned>(line: &[u8]) -> Option<T> {
    let (crc, json) = std::str::from_utf8(line).ok()?.split_at_checked(8)?;
    let json = json.strip_prefix(' ')?;
    // Exactly as written: `from_str_radix` alone would take capitals and a sign, and so a flipped bit.
    let fits = crc == format!("{:08x}", crc32fast::hash(json.as_bytes()));
    if fits { serde_json::from_str(json).ok() } else { None }
}

/// The record of a line, and whether its newline is there. Whole but for its newline, or with a damaged byte in the newline's place: it may
/// have been acknowledged, so it counts.
fn decode_line(line: &[u8]) -> Option<(Record, bool)> {
    match line.strip_suffix(b"\n") {
        Some(line) => Some((decode(line)?, true)),
        None => Some((decode(line).or_else(|| decode(line.split_last()?.1))?, false)),
    }
}

#[cfg(test)]
impl Journal {
    /// Goes on with another file; the one that it had.
    pub(super) fn swap(&mut self, file: File) -> File {
        std::mem::replace(&mut self.file, file)
    }
}
