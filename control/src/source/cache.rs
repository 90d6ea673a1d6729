//! What an origin held when it was last seen, on this machine's disk: a node that starts while the origin is away serves what it knew.
//!
//! One line of JSON for the origin, one for each entry, and one that counts them: a file that was torn, or is another origin's, is nothing.

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// How long a start waits for the origin where something is kept. Nothing is forwarded meanwhile, so it is short; an origin that is there has
/// said by then what there is, or says it soon after.
pub(super) const KNOWN_LOOK: Duration = Duration::from_millis(500);

/// The first line.
#[derive(Serialize, Deserialize)]
struct Head {
    origin: String,
}

/// The last line.
#[derive(Serialize, Deserialize)]
struct End {
    entries: u64,
}

/// Why nothing can be made of a file.
#[derive(Debug, thiserror::Error)]
enum Unusable {
    #[error("{0}")]
    Read(#[from] io::Error),
    #[error("it is of {0}")]
    Foreign(String),
    #[error("line {line}: {source}")]
    Entry { line: u64, source: serde_json::Error },
    #[error("its end is missing")]
    Torn,
}

/// A file in which the entries of one origin are kept.
#[derive(Clone, Debug)]
pub struct Cache {
    path: PathBuf,
    origin: String,
}

impl Cache {
    /// In the file `name` of `state_dir`, of `origin` and no other.
    pub fn new(state_dir: &Path, name: &str, origin: &str) -> Cache {
        Cache { path: state_dir.join(name), origin: origin.to_owned() }
    }

    /// What was kept, as `read` makes it of each entry; nothing where there is nothing that can be used.
    pub fn load<T: DeserializeOwned, R>(&self, read: impl FnMut(T) -> R) -> Vec<R> {
        match self.try_load(read) {
            Ok(entries) => entries,
            Err(Unusable::Read(error)) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            // It is written anew as soon as the origin answers.
            Err(error) => {
                tracing::warn!(path = %self.path.display(), "what is kept of {} cannot be used: {error}", self.origin);
                Vec::new()
            }
        }
    }

    fn try_load<T: DeserializeOwned, R>(&self, mut read: impl FnMut(T) -> R) -> Result<Vec<R>, Unusable> {
        let mut lines = BufReader::new(File::open(&self.path)?).lines();
        let parsed = |line: u64| move |source| Unusable::Entry { line, source };
        let head: Head = serde_json::from_str(&lines.next().ok_or(Unusable::Torn)??).map_err(parsed(1))?;
        if head.origin != self.origin {
            return Err(Unusable::Foreign(head.origin));
        }
        let (mut entries, mut last) = (Vec::new(), None::<String>);
        for next in lines {
            if let Some(line) = last.replace(next?) {
                entries.push(read(serde_json::from_str(&line).map_err(parsed(entries.len() as u64 + 2))?));
            }
        }
        let end = last.and_then(|line| serde_json::from_str::<End>(&line).ok());
        if end.is_some_and(|end| end.entries == entries.len() as u64) { Ok(entries) } else { Err(Unusable::Torn) }
    }

    /// Keeps `entries`, as a whole or not at all.
    pub fn save<T: Serialize>(&self, entries: impl IntoIterator<Item = T>) {
        let saved = replace(&self.path, |out| {
            line(out, &Head { origin: self.origin.clone() })?;
            let mut end = End { entries: 0 };
            for entry in entries {
                line(out, &entry)?;
                end.entries += 1;
            }
            line(out, &end)
        });
        if let Err(error) = saved {
            tracing::warn!(path = %self.path.display(), %error, "what {} holds cannot be kept for the next start", self.origin);
        }
    }
}

fn line(out: &mut impl Write, entry: &impl Serialize) -> io::Result<()> {
    serde_json::to_writer(&mut *out, entry)?;
    out.write_all(b"\n")
}

/// Puts what `write` writes in place of the file `path`, in one step for whoever reads it.
pub(super) fn replace(path: &Path, write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>) -> io::Result<()> {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    let draft = path.with_extension("draft");
    let mut out = BufWriter::new(File::create(&draft)?);
    write(&mut out)?;
    out.into_inner().map_err(io::IntoInnerError::into_error)?;
    std::fs::rename(&draft, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_kept_is_loaded_for_the_same_origin_alone_and_a_file_that_lacks_a_byte_is_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(dir.path(), "kept.json", "etcd under /podgate");
        let load = |cache: &Cache| cache.load(|entry: (String, u64)| entry);
        let entries = [("a".to_owned(), 1), ("two\nlines".to_owned(), 2)];
        assert!(load(&cache).is_empty());
        cache.save(&entries);
        assert_eq!(load(&cache), entries);
        assert!(load(&Cache::new(dir.path(), "kept.json", "etcd under /other")).is_empty());
        cache.save([("b", 3)]);
        assert_eq!(load(&cache), [("b".to_owned(), 3)]);
        let path = dir.path().join("kept.json");
        let whole = std::fs::read(&path).unwrap();
        // The last byte of all is the end of the last line.
        for len in 0..whole.len() - 1 {
            std::fs::write(&path, &whole[..len]).unwrap();
            assert!(load(&cache).is_empty(), "with {len} of {} bytes", whole.len());
        }
    }
}
