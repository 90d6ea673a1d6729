//! An append-only file of records that a crash, a torn write or a flipped bit cannot turn into another truth.
//!
//! Each record is one line, `CCCCCCCC {json}`: the CRC-32 of the JSON in hexadecimal, a blank, the JSON. A record is on the disk (fsync)
//! before it counts. What a reader finds:
//!
//! - a last line without its newline: the write was torn and nobody was told of the record, so it is cut off, with a message (if all of it
//!   but the newline is there, it counts);
//! - any other line whose checksum does not fit: the file was damaged after it was written, and what it said might be an address that
//!   is in use. The reader refuses: giving that address out again would be worse than giving out none.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::{Lease, Owner};

/// One line of the journal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Record {
    /// The first line.
    Journal {
        /// Of this format.
        version: u32,
    },
    /// Addresses were given out.
    Lease(Lease),
    /// They were taken back.
    Release(Owner),
    /// The address given out last, so that a compacted journal still goes round.
    Cursor(IpAddr),
}

/// The format's version.
const VERSION: u32 = 1;

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

/// The open journal. One process at a time has it.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    /// How long the file is as far as it counts.
    len: u64,
    records: usize,
    /// A failed append may have left half a line behind that could not be cut off.
    torn: bool,
    _lock: Flock<File>,
}

type Opened = (Journal, Vec<(usize, Record)>, Vec<String>);

impl Journal {
    /// Opens the journal in `state_dir`, which is made if it is missing: the journal, its records with their lines, and messages about what
    /// was mended.
    pub fn open(state_dir: &Path) -> Result<Opened, JournalError> {
        std::fs::create_dir_all(state_dir).map_err(|e| io(state_dir, "make the directory", e))?;
        let lock_path = state_dir.join("addresses.lock");
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(&lock_path).map_err(|e| io(&lock_path, "open", e))?;
        let lock = Flock::lock(lock, FlockArg::LockExclusiveNonblock).map_err(|_| JournalError::Locked { path: lock_path.display().to_string() })?;
        let path = state_dir.join("addresses.journal");
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(io(&path, "read", error)),
        };
        let (records, tail) = read(&path, &bytes)?;
        let file = OpenOptions::new().create(true).append(true).open(&path).map_err(|e| io(&path, "open", e))?;
        let mut journal = Journal { path, file, len: bytes.len() as u64, records: records.len(), torn: false, _lock: lock };
        let messages: Vec<String> = tail.into_iter().collect();
        if records.is_empty() || !messages.is_empty() {
            let kept: Vec<Record> = records.iter().map(|(_, r)| r.clone()).filter(|r| !matches!(r, Record::Journal { .. })).collect();
            journal.rewrite(&kept)?;
        }
        Ok((journal, records, messages))
    }

    /// How many records the file holds.
    pub fn records(&self) -> usize {
        self.records
    }

    /// Adds a record. When this returns, it is on the disk; if it fails, it is not in the journal.
    pub fn append(&mut self, record: &Record) -> Result<(), JournalError> {
        if self.torn {
            self.cut()?;
        }
        let line = encode(record);
        let written = self.file.write_all(&line).and_then(|()| self.file.sync_data());
        if let Err(error) = written {
            self.torn = true;
            // What was half written must not stand before the next record. If even that fails, the next append tries again first.
            let _ = self.cut();
            return Err(io(&self.path, "write", error));
        }
        self.len += line.len() as u64;
        self.records += 1;
        Ok(())
    }

    /// Replaces the whole journal, at once.
    pub fn rewrite(&mut self, records: &[Record]) -> Result<(), JournalError> {
        let temporary = self.path.with_extension("journal.new");
        let mut bytes = encode(&Record::Journal { version: VERSION });
        records.iter().for_each(|record| bytes.extend(encode(record)));
        let mut file = File::create(&temporary).map_err(|e| io(&temporary, "write", e))?;
        file.write_all(&bytes).and_then(|()| file.sync_all()).map_err(|e| io(&temporary, "write", e))?;
        std::fs::rename(&temporary, &self.path).map_err(|e| io(&self.path, "replace", e))?;
        // The rename itself is on the disk only when its directory is.
        let directory = self.path.parent().unwrap_or(Path::new("."));
        File::open(directory).and_then(|d| d.sync_all()).map_err(|e| io(directory, "write", e))?;
        self.file = OpenOptions::new().append(true).open(&self.path).map_err(|e| io(&self.path, "open", e))?;
        (self.len, self.records, self.torn) = (bytes.len() as u64, records.len() + 1, false);
        Ok(())
    }

    /// An error about one line.
    pub fn corrupt(&self, line: usize, problem: String) -> JournalError {
        JournalError::Corrupt { path: self.path.display().to_string(), line, problem }
    }

    fn cut(&mut self) -> Result<(), JournalError> {
        self.file.set_len(self.len).and_then(|()| self.file.sync_data()).map_err(|e| io(&self.path, "cut off a torn record", e))?;
        self.torn = false;
        Ok(())
    }
}

fn io(path: &Path, action: &'static str, error: std::io::Error) -> JournalError {
    JournalError::Io { path: path.display().to_string(), action, reason: error.to_string() }
}

fn encode(record: &Record) -> Vec<u8> {
    let json = serde_json::to_string(record).expect("records have string keys and finite numbers only");
    format!("{:08x} {json}\n", crc32fast::hash(json.as_bytes())).into_bytes()
}

fn decode(line: &[u8]) -> Option<Record> {
    let (crc, json) = std::str::from_utf8(line).ok()?.split_at_checked(8)?;
    let json = json.strip_prefix(' ')?;
    // Exactly as written: `from_str_radix` alone would take capitals and a sign, and so a flipped bit.
    let fits = crc == format!("{:08x}", crc32fast::hash(json.as_bytes()));
    if fits { serde_json::from_str(json).ok() } else { None }
}

/// The records with their lines, and what there is to say about the end of the file.
#[allow(clippy::type_complexity)]
fn read(path: &Path, bytes: &[u8]) -> Result<(Vec<(usize, Record)>, Option<String>), JournalError> {
    let corrupt = |line: usize, problem: String| JournalError::Corrupt { path: path.display().to_string(), line, problem };
    let mut records = Vec::new();
    let mut tail = None;
    for (index, line) in bytes.split_inclusive(|byte| *byte == b'\n').enumerate() {
        let number = index + 1;
        let record = match line.strip_suffix(b"\n") {
            Some(line) => decode(line).ok_or_else(|| corrupt(number, "its checksum does not fit".into()))?,
            None => {
                // Whole but for its newline, or with a damaged byte in the newline's place: it may have been acknowledged, so it counts.
                let whole = decode(line).or_else(|| decode(&line[..line.len() - 1]));
                let what = if whole.is_some() { "without its newline, and kept" } else { "torn, and cut off: nobody had been given it" };
                tail = Some(format!("{}:{number}: the last record was {what}", path.display()));
                match whole {
                    Some(record) => record,
                    None => break,
                }
            }
        };
        match (&record, number) {
            (Record::Journal { version: VERSION }, 1) => {}
            (Record::Journal { version }, 1) => return Err(corrupt(1, format!("it is of version {version}, this program writes {VERSION}"))),
            (Record::Journal { .. }, _) | (_, 1) => return Err(corrupt(number, "the first line, and no other, must say what the file is".into())),
            _ => {}
        }
        records.push((number, record));
    }
    Ok((records, tail))
}
