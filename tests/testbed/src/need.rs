//! What not every machine has: a test that needs it is skipped, with the reason in its name.

use std::fs;
use std::path::{Path, PathBuf};

use podgate::lab::Sandbox;

/// Where distributions and installers put CNI plugins.
const PLUGIN_DIRECTORIES: [&str; 3] = ["/usr/lib/cni", "/opt/cni/bin", "/usr/libexec/cni"];

/// Something that not every machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// A program on the path.
    Program(&'static str),
    /// A program on the path that needs no library (`busybox` is such a one or not, depending on the package).
    StaticProgram(&'static str),
    /// A reference CNI plugin (Debian: `containernetworking-plugins`).
    Plugin(&'static str),
    /// A directory (of a package that has no program).
    Directory(&'static str),
    /// A sandbox made by root, without a user namespace.
    Root,
    /// That the real systemd can be booted in namespaces ([`crate::vm`]).
    Systemd,
    /// All of these.
    All(&'static [Need]),
}

impl Need {
    /// What is missing, for people; nothing if a test can run in `sandbox`.
    pub(crate) fn missing(self, sandbox: Option<&Sandbox>) -> Option<String> {
        match self {
            Need::Program(name) => program(name).is_none().then(|| format!("there is no `{name}` here")),
            Need::StaticProgram(name) => {
                (!program(name).is_some_and(|path| is_static(&path))).then(|| format!("there is no statically linked `{name}` here"))
            }
            Need::Plugin(name) => plugin(name).is_none().then(|| format!("there is no CNI plugin `{name}` here")),
            Need::Directory(path) => (!Path::new(path).is_dir()).then(|| format!("there is no {path} here")),
            Need::Root => sandbox.is_some_and(|sandbox| !sandbox.is_privileged()).then(|| "it needs root".to_owned()),
            Need::Systemd => Need::Root.missing(sandbox).or_else(|| sandbox.and_then(crate::vm::missing)),
            Need::All(needs) => needs.iter().find_map(|need| need.missing(sandbox)),
        }
    }
}

/// The program `name`, on the path or where the system's own are.
pub fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let directories = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    directories.map(|directory| directory.join(name)).find(|path| path.is_file())
}

/// Whether it names no loader of shared libraries, as every other program does (ELF: `PT_INTERP`).
fn is_static(program: &Path) -> bool {
    let loader = |name: &[u8]| fs::read(program).is_ok_and(|bytes| bytes.windows(name.len()).take(4096).any(|window| window == name));
    !loader(b"/ld-linux") && !loader(b"/ld-musl")
}

/// The reference plugin `name`.
pub fn plugin(name: &str) -> Option<PathBuf> {
    PLUGIN_DIRECTORIES.iter().map(|directory| Path::new(directory).join(name)).find(|path| path.is_file())
}

/// Where reference plugins may be (`CNI_PATH`).
pub fn plugin_directories() -> Vec<PathBuf> {
    PLUGIN_DIRECTORIES.iter().map(PathBuf::from).filter(|directory| directory.is_dir()).collect()
}
