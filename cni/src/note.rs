//! A note for a daemon that is down: this attachment is to go. The daemon carries notes out when it starts, before it answers anybody.

use std::fs::{DirBuilder, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use podgate_cni::{Attachment, NOTES};

/// The longest part of a file's name that a container's id may be. Longer ones are cut, and told apart by their hash.
const ID_LEN_MAX: usize = 128;

/// Where an attachment's note is, if there is one.
#[derive(Clone, Debug)]
pub struct Note {
    directory: PathBuf,
    name: String,
}

impl Note {
    /// Of `attachment`, for the daemon at `socket`.
    pub fn of(socket: &Path, attachment: &Attachment) -> Note {
        // Neither part can hold a ':' or a '/' (see `environment`), so no two attachments share a name; and the id begins with a letter or
        // digit, so that no note is taken for a temporary file.
        let id = match attachment.sandbox.as_str() {
            id if id.len() <= ID_LEN_MAX => id.to_owned(),
            id => format!("{}~{:016x}", &id[..ID_LEN_MAX - 32], fnv1a(id.as_bytes())),
        };
        let directory = socket.parent().unwrap_or(Path::new("/")).join(NOTES);
        Note { directory, name: format!("{id}:{}.json", attachment.ifname) }
    }

    /// Its path.
    pub fn path(&self) -> PathBuf {
        self.directory.join(&self.name)
    }

    /// Writes it: whole or not at all.
    pub fn write(&self, attachment: &Attachment) -> std::io::Result<()> {
        if let Some(runtime_dir) = self.directory.parent() {
            DirBuilder::new().recursive(true).mode(0o755).create(runtime_dir)?;
        }
        match DirBuilder::new().mode(0o700).create(&self.directory) {
            Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
        let temporary = self.directory.join(format!(".{}.{}", std::process::id(), &self.name));
        let written = (|| {
            // Left over from a process of the same number, which cannot be writing any more.
            let _ = std::fs::remove_file(&temporary);
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
            file.write_all(&serde_json::to_vec(attachment)?)?;
            file.sync_all()?;
            std::fs::rename(&temporary, self.path())
        })();
        if written.is_err() {
            let _ = std::fs::remove_file(&temporary);
        }
        written
    }

    /// Whether there is one.
    pub fn exists(&self) -> bool {
        self.path().exists()
    }

    /// Takes it away, if it is there.
    pub fn remove(&self) {
        let _ = std::fs::remove_file(self.path());
    }
}

/// FNV-1a of 64 bits (draft-eastlake-fnv). Ids are the runtime's own, so nobody looks for collisions.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn attachment(sandbox: &str, ifname: &str) -> Attachment {
        Attachment { sandbox: sandbox.into(), ifname: ifname.into(), ..Attachment::default() }
    }

    #[test]
    fn a_note_is_private_and_holds_the_attachment() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("not/yet/podgate.sock");
        let wanted = attachment("c1", "eth0");
        let note = Note::of(&socket, &wanted);
        assert!(!note.exists());
        note.write(&wanted).unwrap();
        note.write(&wanted).unwrap();
        let path = directory.path().join("not/yet/detach.d/c1:eth0.json");
        assert_eq!(note.path(), path);
        assert_eq!(serde_json::from_slice::<Attachment>(&std::fs::read(&path).unwrap()).unwrap(), wanted);
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "no temporary file stays");
        note.remove();
        assert!(!note.exists());
    }

    #[test]
    fn long_ids_have_names_of_their_own_that_a_file_system_takes() {
        let (one, two) = ("a".repeat(253), format!("{}b", "a".repeat(252)));
        let name = |id: &str| Note::of(Path::new("/s"), &attachment(id, "fifteen-bytes-x")).name;
        assert_ne!(name(&one), name(&two));
        assert!(name(&one).len() + ".4194304.".len() <= 255);
        assert_ne!(Note::of(Path::new("/s"), &attachment("a", "b.c")).name, Note::of(Path::new("/s"), &attachment("a.b", "c")).name);
    }
}
