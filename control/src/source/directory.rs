//! A directory of manifests, watched.
//!
//! Read: every `.yaml`, `.yml` and `.json` file in it whose name does not start with a dot (so a mounted ConfigMap works), not in its
//! subdirectories. inotify(7) says that something happened, never what: each time the whole directory is listed again, and a file is parsed
//! again if its content changed. It is listed every 30 seconds in any case.
//!
//! **The last good state stays in force, file by file.** A file with anything wrong in it keeps what it held when it was last right (nothing,
//! if it never was), whole; the others are not held up by it. A directory that cannot be read keeps everything. Files are best replaced by a
//! rename: who writes in place may be seen half-way.

use std::collections::{BTreeMap, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep};

use super::manifest::{self, Placed};
use super::{NodeReport, Source, SourceError, SourceIssue, SourceStatus, unix_now};
use crate::model::{ClusterState, ObjectKey};

/// How long nothing must happen before the directory is read: long enough for a handful of files to be copied.
const QUIET: Duration = Duration::from_millis(50);
/// How long a directory that never rests may put off the reading.
const PATIENCE: Duration = Duration::from_millis(500);
/// Whatever inotify missed is seen after this long.
const REREAD: Duration = Duration::from_secs(30);

/// Reads `path` and goes on watching it.
pub(super) async fn start(path: &Path, node: NodeReport) -> Result<Source, SourceError> {
    let watch_failed = |error: std::io::Error| SourceError::Watch { path: path.display().to_string(), reason: error.to_string() };
    let inotify = Watch(Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC).map_err(|e| watch_failed(e.into()))?);
    // Watched before it is read: what happens between is seen twice rather than never.
    let mut reader = Reader::new(path);
    watch_path(&inotify, path).map_err(|e| SourceError::Directory { path: path.display().to_string(), reason: e.desc().to_string() })?;
    #[expect(deprecated, reason = "its unsafe successor asks that the descriptor stays ours as long as it is registered: Watch owns it")]
    let inotify = AsyncFd::new(inotify).map_err(watch_failed)?;
    let first = reader.read();
    if !first.readable {
        let reason = first.issues.into_iter().next().map(|i| i.reason).unwrap_or_default();
        return Err(SourceError::Directory { path: path.display().to_string(), reason });
    }
    report(&[], &first.issues);
    let (states, state) = watch::channel(first.state.clone());
    let (statuses, status) = watch::channel(status_of(&first, Some(unix_now())));
    let task = tokio::spawn(follow(reader, inotify, states, statuses, first.issues));
    // What is told of this node is nobody's to hear: the files say it.
    let (report, _) = watch::channel(node);
    Ok(Source { state, status, announcement: None, forwards: watch::Sender::new(false), tenure: None, report, task })
}

/// Reads `path` once.
pub(super) fn read_once(path: &Path) -> Result<(ClusterState, Vec<SourceIssue>), SourceError> {
    let reading = Reader::new(path).read();
    if !reading.readable {
        let reason = reading.issues.into_iter().next().map(|i| i.reason).unwrap_or_default();
        return Err(SourceError::Directory { path: path.display().to_string(), reason });
    }
    Ok(((*reading.state).clone(), reading.issues))
}

/// An inotify descriptor that tokio can wait for.
struct Watch(Inotify);

impl AsRawFd for Watch {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

fn watch_path(inotify: &Watch, path: &Path) -> nix::Result<()> {
    // Not IN_MODIFY: a file that is being written is read when its writer closes it.
    let mask = AddWatchFlags::IN_CREATE
        | AddWatchFlags::IN_CLOSE_WRITE
        | AddWatchFlags::IN_DELETE
        | AddWatchFlags::IN_MOVED_FROM
        | AddWatchFlags::IN_MOVED_TO
        | AddWatchFlags::IN_ATTRIB
        | AddWatchFlags::IN_DELETE_SELF
        | AddWatchFlags::IN_MOVE_SELF
        | AddWatchFlags::IN_ONLYDIR;
    inotify.0.add_watch(path, mask).map(|_| ())
}

async fn follow(
    mut reader: Reader,
    inotify: AsyncFd<Watch>,
    states: watch::Sender<Arc<ClusterState>>,
    statuses: watch::Sender<SourceStatus>,
    mut issues: Vec<SourceIssue>,
) {
    let mut tick = interval_at(Instant::now() + REREAD, REREAD);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        // A directory that went away has no watch to tell of its return: then look every second.
        let lost = !statuses.borrow().connected;
        tokio::select! {
            _ = tick.tick() => {}
            () = sleep(Duration::from_secs(1)), if lost => {}
            ready = inotify.readable() => {
                if ready.is_err() {
                    return;
                }
                drop(ready);
                settle(&inotify).await;
            }
        }
        // The path may lead to another directory by now; for the same one this changes nothing.
        let _ = watch_path(inotify.get_ref(), &reader.directory);
        let read = tokio::task::spawn_blocking(move || {
            let reading = reader.read();
            (reader, reading)
        });
        let Ok((returned, reading)) = read.await else { return };
        reader = returned;
        report(&issues, &reading.issues);
        issues.clone_from(&reading.issues);
        let changed = *states.borrow() != reading.state;
        let last_change = if changed { Some(unix_now()) } else { statuses.borrow().last_change };
        let status = status_of(&reading, last_change);
        statuses.send_if_modified(|old| std::mem::replace(old, status.clone()) != status);
        if changed {
            states.send_replace(reading.state);
        }
    }
}

/// Takes events until none came for [`QUIET`], but for [`PATIENCE`] at most.
async fn settle(inotify: &AsyncFd<Watch>) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Ok(mut guard) = inotify.readable().await {
            // What happened does not matter, nor whether the queue overflowed: everything is read again.
            while inotify.get_ref().0.read_events().is_ok() {}
            guard.clear_ready();
        }
        let quiet = tokio::time::timeout_at((Instant::now() + QUIET).min(deadline), inotify.readable()).await.is_err();
        if quiet || Instant::now() >= deadline {
            return;
        }
    }
}

fn status_of(reading: &Reading, last_change: Option<u64>) -> SourceStatus {
    let (errors, objects) = (reading.issues.clone(), reading.state.len());
    SourceStatus { kind: "directory", connected: reading.readable, complete: reading.readable, errors, last_change, objects }
}

/// Logs what is wrong that was not wrong before, and what is mended.
fn report(before: &[SourceIssue], after: &[SourceIssue]) {
    for issue in after.iter().filter(|i| !before.contains(i)) {
        tracing::warn!("{issue}; the last good state of this file stays in force");
    }
    for issue in before.iter().filter(|i| !after.contains(i)) {
        tracing::info!(file = issue.file, "no longer: {}", issue.reason);
    }
}

/// What one reading found.
struct Reading {
    state: Arc<ClusterState>,
    issues: Vec<SourceIssue>,
    /// Whether the directory itself could be read.
    readable: bool,
}

/// What is remembered of the directory between readings.
struct Reader {
    directory: PathBuf,
    files: BTreeMap<String, FileState>,
    state: Arc<ClusterState>,
    known: HashMap<ObjectKey, ()>,
}

#[derive(Default)]
struct FileState {
    /// Of the content that was last parsed.
    digest: Option<u64>,
    /// What it held when it was last right.
    objects: Vec<Placed>,
    issues: Vec<SourceIssue>,
}

impl Reader {
    fn new(directory: &Path) -> Reader {
        Reader { directory: directory.into(), files: BTreeMap::new(), state: Arc::default(), known: HashMap::new() }
    }

    fn read(&mut self) -> Reading {
        let names = match self.list() {
            Ok(names) => names,
            Err(error) => {
                let issue = SourceIssue { file: self.directory.display().to_string(), line: None, reason: error.to_string() };
                return Reading { state: self.state.clone(), issues: vec![issue], readable: false };
            }
        };
        self.files.retain(|name, _| names.contains(name));
        for name in names {
            let path = self.directory.join(&name);
            match std::fs::read(&path) {
                Ok(bytes) => self.files.entry(name).or_default().update(&path.display().to_string(), &bytes),
                // It went between the listing and now: the next event tells.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => {
                    let file = self.files.entry(name).or_default();
                    file.digest = None;
                    file.issues = vec![SourceIssue { file: path.display().to_string(), line: None, reason: format!("cannot be read: {error}") }];
                }
            }
        }
        let duplicates = self.rebuild();
        let issues = self.files.values().flat_map(|f| f.issues.iter().cloned()).chain(duplicates).collect();
        Reading { state: self.state.clone(), issues, readable: true }
    }

    fn list(&self) -> std::io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.directory)? {
            let Ok(name) = entry?.file_name().into_string() else { continue };
            let manifest = [".yaml", ".yml", ".json"].iter().any(|ending| name.ends_with(ending));
            if manifest && !name.starts_with('.') && !self.directory.join(&name).is_dir() {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    /// Brings the state in line with what the files hold. Of an object that is there twice, the first counts: by file name, then by line.
    fn rebuild(&mut self) -> Vec<SourceIssue> {
        let mut issues = Vec::new();
        let mut first: HashMap<ObjectKey, String> = HashMap::new();
        let mut next = (*self.state).clone();
        for (name, file) in &self.files {
            for (line, object) in &file.objects {
                let place = format!("{}:{line}", self.directory.join(name).display());
                let key = object.key();
                if let Some(earlier) = first.get(&key) {
                    let reason = format!("{key} is in {earlier} already, and that one counts; take one of them away");
                    issues.push(SourceIssue { file: self.directory.join(name).display().to_string(), line: Some(*line), reason });
                    continue;
                }
                // What is there already is left alone, so that the state shares it with the one before.
                if !next.holds(object) {
                    next.insert(object.clone());
                }
                first.insert(key, place);
            }
        }
        for gone in self.known.keys().filter(|key| !first.contains_key(key)) {
            next.remove(gone);
        }
        self.known = first.into_keys().map(|key| (key, ())).collect();
        if next != *self.state {
            self.state = Arc::new(next);
        }
        issues
    }
}

impl FileState {
    fn update(&mut self, file: &str, bytes: &[u8]) {
        let mut hasher = DefaultHasher::new();
        bytes.hash(&mut hasher);
        let digest = hasher.finish();
        if self.digest == Some(digest) {
            return;
        }
        self.digest = Some(digest);
        let text = std::str::from_utf8(bytes).map_err(|error| {
            let line = bytes[..error.valid_up_to()].iter().filter(|b| **b == b'\n').count() as u64 + 1;
            vec![SourceIssue { file: file.into(), line: Some(line), reason: "it is not UTF-8".into() }]
        });
        match text.and_then(|text| manifest::parse(file, text)) {
            Ok(objects) => (self.objects, self.issues) = (objects, Vec::new()),
            Err(issues) => self.issues = issues,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::SourceConfig;
    use crate::model::ObjectName;

    fn service(name: &str, ip: &str) -> String {
        format!("apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{clusterIP: {ip}, ports: [{{port: 80}}]}}\n")
    }

    fn names(state: &ClusterState) -> Vec<String> {
        state.services().keys().map(|n| n.name.to_string()).collect()
    }

    #[test]
    fn a_file_that_breaks_keeps_its_last_good_state_and_holds_up_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        write("a.yaml", &service("a", "10.96.0.1"));
        write("b.yml", "kind: Service\napiVersion: v1\nmetadata: {name: never}\nspec: {clusterIP: oops}\n");
        write(".hidden.yaml", &service("hidden", "10.96.0.9"));
        write("notes.txt", "kind: nothing");
        let mut reader = Reader::new(dir.path());
        let reading = reader.read();
        assert_eq!(names(&reading.state), ["a"]);
        let issue = reading.issues[0].to_string();
        assert!(issue.ends_with("b.yml:1: Service default/never: spec.clusterIPs: `oops` is not an IP address"), "{issue}");

        write("a.yaml", &format!("{}---\nkind: [\n", service("a", "10.96.0.2")));
        write("b.yml", &service("b", "10.96.0.3"));
        let reading = reader.read();
        assert_eq!(names(&reading.state), ["a", "b"]);
        let a = &reading.state.services()[&ObjectName::new("default", "a")];
        assert_eq!(a.cluster_ips[0].to_string(), "10.96.0.1", "the last good state stays in force");
        assert_eq!(reading.issues.len(), 1);

        std::fs::remove_file(dir.path().join("a.yaml")).unwrap();
        let reading = reader.read();
        assert_eq!(names(&reading.state), ["b"], "a file that is taken away takes its objects with it");
        assert!(reading.issues.is_empty());
    }

    #[test]
    fn an_unchanged_object_keeps_its_pointer_when_its_file_is_written_anew() {
        let dir = tempfile::tempdir().unwrap();
        let write = |text: String| std::fs::write(dir.path().join("a.yaml"), text).unwrap();
        write(format!("{}---\n{}", service("a", "10.96.0.1"), service("b", "10.96.0.2")));
        let mut reader = Reader::new(dir.path());
        let before = reader.read().state;
        write(format!("{}---\n{}", service("a", "10.96.0.1"), service("b", "10.96.0.3")));
        let after = reader.read().state;
        let [a, b] = ["a", "b"].map(|n| ObjectName::new("default", n));
        assert!(Arc::ptr_eq(&before.services()[&a], &after.services()[&a]));
        assert!(!Arc::ptr_eq(&before.services()[&b], &after.services()[&b]));
        write(format!("# a comment\n{}---\n{}", service("a", "10.96.0.1"), service("b", "10.96.0.3")));
        assert!(Arc::ptr_eq(&after, &reader.read().state), "nothing that matters changed");
    }

    #[test]
    fn an_object_that_is_there_twice_is_named_with_both_places() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a.yaml"), service("a", "10.96.0.1")).unwrap();
        std::fs::write(dir.path().join("b.yaml"), service("a", "10.96.0.2")).unwrap();
        let (state, issues) = read_once(dir.path()).unwrap();
        assert_eq!(state.services()[&ObjectName::new("default", "a")].cluster_ips[0].to_string(), "10.96.0.1");
        let (a, b) = (dir.path().join("a.yaml"), dir.path().join("b.yaml"));
        let expected = format!("{}:1: Service default/a is in {}:1 already, and that one counts; take one of them away", b.display(), a.display());
        assert_eq!(issues.iter().map(ToString::to_string).collect::<Vec<_>>(), [expected]);
    }

    #[test]
    fn a_missing_directory_is_a_clear_error() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let host = crate::config::HostFacts { name: "n".into(), ephemeral_ports: 32768..=60999 };
        let start = |source: SourceConfig| {
            let text = "underlay: {address: 192.0.2.1}\nsource: {directory: /}\n";
            let mut config = crate::config::Config::parse("podgate.yaml".as_ref(), text, &host).unwrap();
            config.source = source;
            runtime
                .block_on(async { super::super::start(&config, NodeReport::default(), super::super::FirstLook::ForNews).await })
                .unwrap_err()
                .to_string()
        };
        assert_eq!(
            start(SourceConfig::Directory("/nonexistent/cluster.d".into())),
            "source.directory: /nonexistent/cluster.d: No such file or directory; \
             make the directory, readable by the daemon, and put the cluster's manifests into it"
        );
    }

    #[test]
    fn a_watched_directory_tells_of_changes_by_itself() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cluster.d");
        std::fs::create_dir(&path).unwrap();
        std::fs::write(path.join("a.yaml"), service("a", "10.96.0.1")).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let patience = Duration::from_secs(20);
        runtime.block_on(async {
            let mut source = start(&path, NodeReport::default()).await.unwrap();
            assert_eq!(names(&source.state.borrow()), ["a"], "the first state is there from the start");
            // In place, by a rename, and gone.
            std::fs::write(path.join("b.yaml"), service("b", "10.96.0.2")).unwrap();
            let both = source.state.wait_for(|s| names(s) == ["a", "b"]);
            tokio::time::timeout(patience, both).await.expect("a new file is seen").unwrap();
            std::fs::write(dir.path().join("new"), service("c", "10.96.0.3")).unwrap();
            std::fs::rename(dir.path().join("new"), path.join("b.yaml")).unwrap();
            let renamed = source.state.wait_for(|s| names(s) == ["a", "c"]);
            tokio::time::timeout(patience, renamed).await.expect("a renamed file is seen").unwrap();
            std::fs::write(path.join("a.yaml"), "kind: [").unwrap();
            let broken = source.status.wait_for(|s| s.errors.len() == 1);
            tokio::time::timeout(patience, broken).await.expect("an error is told").unwrap();
            assert_eq!(names(&source.state.borrow()), ["a", "c"]);
            // The whole directory goes away: everything stays in force, and its return is seen.
            std::fs::rename(&path, dir.path().join("aside")).unwrap();
            let lost = source.status.wait_for(|s| !s.connected);
            tokio::time::timeout(patience, lost).await.expect("the loss is told").unwrap();
            assert_eq!(names(&source.state.borrow()), ["a", "c"]);
            std::fs::create_dir(&path).unwrap();
            std::fs::write(path.join("d.yaml"), service("d", "10.96.0.4")).unwrap();
            let back = source.state.wait_for(|s| names(s) == ["d"]);
            tokio::time::timeout(patience, back).await.expect("the return is seen").unwrap();
            assert!(source.status.borrow().connected);
        });
    }
}
