//! What integration tests share: a sandbox around the whole test program, the `podgate` program itself, and a cluster that is built
//! when the first test needs it.
//!
//! The cluster is [`podgate::lab`]; this adds what only tests want. A test program has `harness = false` and
//!
//! ```no_run
//! fn main() -> std::process::ExitCode {
//!     podgate_testbed::run(|tests| {
//!         tests.add("a pod answers its node", |bed| {
//!             let lab = bed.lab()?;
//!             Ok(assert!(!lab.pods().is_empty()))
//!         });
//!     })
//! }
//! ```
//!
//! Tests of one program share a cluster and run one after the other; programs may run side by side, each in a sandbox of its own,
//! which takes everything away at its end, be it by panic or `kill -9`. What a machine cannot run is skipped with its reason in the test's name, and
//! counted by libtest as ignored; with `PODGATE_REQUIRE_LAB=1` in the environment, a missing sandbox is a failure.

pub mod cni;
pub mod etcd;
pub mod need;
pub mod runtime;
pub mod serving;
pub mod tickers;
pub mod tool;
pub mod traces;
pub mod vm;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::{Arc, OnceLock};

use libtest_mimic::{Arguments, Failed, Trial};
use podgate::lab::matrix::Check;
use podgate::lab::sandbox::{self, Entered};
use podgate::lab::{Lab, LabError, NodeSettings, Sandbox};

pub use need::Need;

/// What a test returns: any error fails it with its text.
pub type Outcome = Result<(), Box<dyn std::error::Error>>;

/// Collects the tests of a program.
pub struct Tests {
    bed: Arc<Bed>,
    trials: Vec<Trial>,
}

/// What a test works with.
pub struct Bed {
    sandbox: Option<Sandbox>,
    lab: OnceLock<Lab>,
    settings: OnceLock<NodeSettings>,
    binary: OnceLock<PathBuf>,
    plugin: OnceLock<PathBuf>,
}

impl Tests {
    /// Adds a test, whose name is a sentence.
    pub fn add(&mut self, name: &str, test: impl FnOnce(&Bed) -> Outcome + Send + 'static) {
        let bed = Arc::clone(&self.bed);
        let trial = Trial::test(name, move || test(&bed).map_err(|error| Failed::from(error.to_string())));
        self.trials.push(trial.with_ignored_flag(self.bed.sandbox.is_none()));
    }

    /// Adds a test that needs something which this machine may not have; without it the test is ignored, with the reason.
    pub fn add_if(&mut self, need: Need, name: &str, test: impl FnOnce(&Bed) -> Outcome + Send + 'static) {
        match need.missing(self.bed.sandbox.as_ref()) {
            None => self.add(name, test),
            Some(reason) => self.trials.push(Trial::test(format!("{name} [SKIPPED: {reason}]"), || Ok(())).with_ignored_flag(true)),
        }
    }

    /// Configures the daemons of the shared cluster; before the first test.
    pub fn configure(&mut self, settings: NodeSettings) {
        // The first wins: it is called once, from the program's list of tests.
        let _ = self.bed.settings.set(settings);
    }
}

impl Bed {
    /// The sandbox.
    pub fn sandbox(&self) -> &Sandbox {
        self.sandbox.as_ref().expect("without a sandbox every test is ignored")
    }

    /// The program's cluster: two nodes with two pods each, unless the program configured it. It is built by the first caller.
    pub fn lab(&self) -> Result<&Lab, LabError> {
        if self.lab.get().is_none() {
            let settings = self.settings.get().cloned().unwrap_or_default();
            let lab = Lab::builder(self.sandbox(), &self.binary()).settings(settings).build(&|what| eprintln!("    {what}"))?;
            // Tests run one after the other, so nobody else has set it.
            let _ = self.lab.set(lab);
        }
        Ok(self.lab.get().expect("it was set just now"))
    }

    /// The `podgate` program, built from this workspace in the profile of the tests unless `PODGATE_BINARY` names one.
    pub fn binary(&self) -> PathBuf {
        self.binary.get_or_init(|| find_binary("podgate", "podgate", "PODGATE_BINARY")).clone()
    }

    /// The CNI plugin, built in the same way unless `PODGATE_CNI_BINARY` names one.
    pub fn plugin(&self) -> PathBuf {
        self.plugin.get_or_init(|| find_binary("podgate-cni", "podgate-cni", "PODGATE_CNI_BINARY")).clone()
    }
}

/// Runs the tests that `list` adds, inside a sandbox. Must be the first thing that `main` does.
pub fn run(list: impl FnOnce(&mut Tests)) -> ExitCode {
    let arguments = Arguments::from_args();
    // To list tests is what editors and test runners do; it needs nothing.
    let sandbox = if arguments.list { None } else { enter(&arguments) };
    let sandbox = match sandbox {
        Some(Entered::Outside(code)) => return code,
        Some(Entered::Inside(sandbox)) => Some(sandbox),
        None => None,
    };
    let bed = Bed { sandbox, lab: OnceLock::new(), settings: OnceLock::new(), binary: OnceLock::new(), plugin: OnceLock::new() };
    let mut tests = Tests { bed: Arc::new(bed), trials: Vec::new() };
    list(&mut tests);
    let arguments = Arguments { test_threads: Some(1), ..arguments };
    libtest_mimic::run(&arguments, tests.trials).exit_code()
}

fn enter(arguments: &Arguments) -> Option<Entered> {
    match sandbox::enter() {
        Ok(entered) => Some(entered),
        Err(error) if std::env::var_os("PODGATE_REQUIRE_LAB").is_some() || arguments.ignored || arguments.include_ignored => {
            eprintln!("{error}");
            Some(Entered::Outside(ExitCode::FAILURE))
        }
        Err(error) => {
            eprintln!("SKIPPED, all of it: {error}");
            None
        }
    }
}

/// Fails with the checks that did not hold, if there are any; prints how many did.
pub fn all_hold(checks: &[Check]) -> Outcome {
    let failed: Vec<String> = checks.iter().filter(|check| !check.ok).map(|check| format!("  {}: {}", check.name, check.detail)).collect();
    eprintln!("    {} of {} checks hold", checks.len() - failed.len(), checks.len());
    if failed.is_empty() { Ok(()) } else { Err(format!("{} of {} checks do not hold:\n{}", failed.len(), checks.len(), failed.join("\n")).into()) }
}

/// The test program lies in `target/PROFILE/deps`, the binary one directory above.
fn find_binary(package: &str, name: &str, variable: &str) -> PathBuf {
    if let Some(binary) = std::env::var_os(variable) {
        return binary.into();
    }
    let own = std::env::current_exe().expect("a running program has a path");
    let profile = own.parent().and_then(Path::parent).expect("a test program lies in target/PROFILE/deps");
    let binary = profile.join(name);
    // Under cargo the program is brought up to date, as cargo itself does for a package's own tests.
    if let Some(cargo) = std::env::var_os("CARGO") {
        let mut build = Command::new(cargo);
        // Together with the tests' package: libraries with the features that they have there are not built a second time.
        build.args(["build", "--quiet", "-p", package, "-p", "podgate-platform", "--bin", name, "--manifest-path"]);
        build.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../Cargo.toml"));
        build.env("CARGO_TARGET_DIR", profile.parent().unwrap_or(profile));
        if profile.file_name().is_some_and(|name| name == "release") {
            build.arg("--release");
        }
        let built = build.status().is_ok_and(|status| status.success());
        assert!(built, "`cargo build -p {package}` failed: build it first, or name the program with {variable}");
    }
    assert!(binary.is_file(), "there is no {}: run `cargo build -p {package}`, or name the program with {variable}", binary.display());
    binary
}
