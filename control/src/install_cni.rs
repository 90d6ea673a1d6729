//! `podgate install-cni`: the plugin and its network configuration where container runtimes look for them.
//!
//! The plugin first, the configuration last and only when the node is ready: a runtime takes the configuration for a promise that pods can
//! be attached. Both appear whole or not at all (written under another name, then renamed). Removal goes the other way round.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use podgate_cni::result::VERSIONS;
use serde_json::{Value, json};

/// The plugin's file name, and its type in a network configuration.
pub const PLUGIN: &str = "podgate-cni";

/// The version that the configuration is of: runtimes before CNI 1.1 must take it.
const CONFIGURATION_VERSION: &str = "1.0.0";

/// What is installed, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Places {
    /// Where runtimes look for plugins.
    pub bin_dir: PathBuf,
    /// Where they look for network configurations; they take the first by name.
    pub conf_dir: PathBuf,
    /// The configuration's file name.
    pub conf_name: String,
}

/// Why it could not be installed or removed.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// The plugin to install is not there.
    #[error("the plugin {path} cannot be read: {source}; name it with --plugin FILE (it is built and shipped beside `podgate`)", path = path.display())]
    Plugin {
        /// Where it was looked for.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A file or directory.
    #[error("cannot {operation} {path}: {source}; name other directories with --bin-dir and --conf-dir", path = path.display())]
    File {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// What is there is not ours to take away.
    #[error("{path} is no configuration of {PLUGIN}, and is left alone; name ours with --conf-name", path = path.display())]
    NotOurs {
        /// The file.
        path: PathBuf,
    },
}

/// The network configuration: a list of this plugin alone, with every capability that it has.
pub fn configuration(socket: &Path) -> Value {
    json!({
        "cniVersion": CONFIGURATION_VERSION,
        "cniVersions": VERSIONS,
        "name": "podgate",
        "plugins": [{
            "type": PLUGIN,
            "socket": socket,
            "ipam": {"type": "podgate"},
            "capabilities": {"portMappings": true, "bandwidth": true, "ips": true, "mac": true, "io.kubernetes.cri.pod-annotations": true},
        }],
    })
}

impl Places {
    /// The plugin's place.
    pub fn plugin(&self) -> PathBuf {
        self.bin_dir.join(PLUGIN)
    }

    /// The configuration's place.
    pub fn configuration(&self) -> PathBuf {
        self.conf_dir.join(&self.conf_name)
    }

    /// Puts the plugin in its place; whether that changed anything.
    pub fn install_plugin(&self, from: &Path) -> Result<bool, InstallError> {
        let bytes = fs::read(from).map_err(|source| InstallError::Plugin { path: from.to_owned(), source })?;
        write(&self.plugin(), &bytes, 0o755)
    }

    /// Puts the configuration in its place; whether that changed anything.
    pub fn install_configuration(&self, socket: &Path) -> Result<bool, InstallError> {
        let text = format!("{:#}\n", configuration(socket));
        write(&self.configuration(), text.as_bytes(), 0o644)
    }

    /// Configurations that a runtime takes before ours.
    pub fn before_ours(&self) -> Vec<PathBuf> {
        let ours = self.configuration();
        let found = fs::read_dir(&self.conf_dir).into_iter().flatten().flatten().map(|entry| entry.path());
        let is_one = |path: &PathBuf| path.extension().is_some_and(|e| e == "conf" || e == "conflist" || e == "json");
        let mut before: Vec<PathBuf> = found.filter(|path| is_one(path) && *path < ours).collect();
        before.sort();
        before
    }

    /// Takes away what was installed, the configuration first; what there was of it.
    pub fn remove(&self) -> Result<Vec<PathBuf>, InstallError> {
        let mut removed: Vec<PathBuf> = self.remove_configuration()?.into_iter().collect();
        removed.extend(self.remove_plugin()?);
        Ok(removed)
    }

    /// Takes the configuration away, if it is there and ours: runtimes take it for a promise.
    pub fn remove_configuration(&self) -> Result<Option<PathBuf>, InstallError> {
        let path = self.configuration();
        match fs::read(&path) {
            Ok(bytes) if !is_ours(&bytes) => Err(InstallError::NotOurs { path }),
            _ => remove(path),
        }
    }

    /// Takes the plugin away, if it is there.
    pub fn remove_plugin(&self) -> Result<Option<PathBuf>, InstallError> {
        remove(self.plugin())
    }
}

fn remove(path: PathBuf) -> Result<Option<PathBuf>, InstallError> {
    match fs::remove_file(&path) {
        Ok(()) => Ok(Some(path)),
        Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(InstallError::File { operation: "remove", path, source }),
    }
}

/// Whether a configuration has a plugin of ours in it.
fn is_ours(bytes: &[u8]) -> bool {
    let Ok(value) = serde_json::from_slice::<Value>(bytes) else { return false };
    let of_list = value["plugins"].as_array().into_iter().flatten();
    of_list.chain([&value]).any(|plugin| plugin["type"] == PLUGIN)
}

/// Writes a file as a whole, unless it is so already. A plugin that runs meanwhile goes on in the file that it was started from.
fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<bool, InstallError> {
    let file = |operation| {
        let path = path.to_owned();
        move |source| InstallError::File { operation, path, source }
    };
    let same_mode = fs::metadata(path).is_ok_and(|metadata| metadata.permissions().mode() & 0o777 == mode);
    if same_mode && fs::read(path).is_ok_and(|found| found == bytes) {
        return Ok(false);
    }
    let directory = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(directory).map_err(file("make the directory of"))?;
    // Runtimes pass over names that begin with a dot.
    let draft = directory.join(format!(".{}.{}", path.file_name().unwrap_or_default().to_string_lossy(), std::process::id()));
    let written = fs::write(&draft, bytes)
        .and_then(|()| fs::set_permissions(&draft, fs::Permissions::from_mode(mode)))
        .and_then(|()| fs::File::open(&draft)?.sync_all())
        .and_then(|()| fs::rename(&draft, path));
    if written.is_err() {
        let _ = fs::remove_file(&draft);
    }
    written.map_err(file("write"))?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(directory: &Path) -> Places {
        Places { bin_dir: directory.join("bin"), conf_dir: directory.join("net.d"), conf_name: "10-podgate.conflist".into() }
    }

    #[test]
    fn what_is_installed_is_whole_is_left_alone_the_second_time_and_goes_as_it_came() {
        let directory = tempfile::tempdir().unwrap();
        let places = places(directory.path());
        let plugin = directory.path().join("built");
        assert!(matches!(places.install_plugin(&plugin), Err(InstallError::Plugin { .. })));
        fs::write(&plugin, b"\x7fELF").unwrap();
        assert!(places.install_plugin(&plugin).unwrap());
        assert!(places.install_configuration(Path::new("/run/podgate/podgate.sock")).unwrap());
        assert!(!places.install_plugin(&plugin).unwrap() && !places.install_configuration(Path::new("/run/podgate/podgate.sock")).unwrap());
        assert_eq!(fs::metadata(places.plugin()).unwrap().permissions().mode() & 0o777, 0o755);
        let conf: Value = serde_json::from_slice(&fs::read(places.configuration()).unwrap()).unwrap();
        assert_eq!((&conf["plugins"][0]["type"], &conf["plugins"][0]["socket"]), (&json!(PLUGIN), &json!("/run/podgate/podgate.sock")));
        let left: Vec<_> =
            [&places.bin_dir, &places.conf_dir].iter().flat_map(|d| fs::read_dir(d).unwrap().flatten()).map(|e| e.file_name()).collect();
        assert_eq!(left, ["podgate-cni", "10-podgate.conflist"], "and no draft");
        assert_eq!(places.remove().unwrap(), [places.configuration(), places.plugin()]);
        assert!(places.remove().unwrap().is_empty());
    }

    #[test]
    fn another_configuration_of_that_name_is_not_taken_away_and_one_that_comes_first_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let places = places(directory.path());
        fs::create_dir_all(&places.conf_dir).unwrap();
        fs::write(places.configuration(), r#"{"name": "other", "plugins": [{"type": "bridge"}]}"#).unwrap();
        assert!(matches!(places.remove(), Err(InstallError::NotOurs { .. })));
        fs::write(places.conf_dir.join("05-other.conflist"), "{}").unwrap();
        fs::write(places.conf_dir.join("99-last.conflist"), "{}").unwrap();
        fs::write(places.conf_dir.join("00-notes.txt"), "").unwrap();
        assert_eq!(places.before_ours(), [places.conf_dir.join("05-other.conflist")]);
    }
}
