//! Delegated IPAM plugins (CNI SPEC.md, section 4): other programs on `CNI_PATH`, run with this call's environment and configuration.

use std::ffi::OsStr;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Program, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use podgate_cni::protocol::Given;
use podgate_cni::result::Ip;
use serde_json::{Map, Value};

use crate::environment::Command;
use crate::error::{DELEGATE_FAILED, Error};
use crate::network::{check_cidr, parse_dns, parse_optional_ip, parse_route};
use crate::section::Section;

/// The longest output of a delegated plugin, in bytes. One address takes a few hundred.
const OUTPUT_LEN_MAX: u64 = 1024 * 1024;

/// A plugin that gives addresses.
#[derive(Clone, Debug)]
pub struct Delegate {
    name: String,
    path: PathBuf,
}

impl Delegate {
    /// The first file called `name` in the directories of `CNI_PATH`.
    pub fn find(name: &str, cni_path: &OsStr) -> Result<Delegate, Error> {
        let directories = std::env::split_paths(cni_path).filter(|directory| !directory.as_os_str().is_empty());
        let path = directories.map(|directory| directory.join(name)).find(|path| path.is_file());
        let Some(path) = path else {
            let problem = format!("`ipam.type`: there is no plugin {name:?} in CNI_PATH, which is {:?}", cni_path.to_string_lossy());
            return Err(Error::config("ipam.type", problem));
        };
        // It would run itself, and so on for ever.
        let file = |path: &Path| std::fs::metadata(path).map(|file| (file.dev(), file.ino())).ok();
        if file(&path).is_some_and(|found| Some(found) == file(Path::new("/proc/self/exe"))) {
            return Err(Error::config("ipam.type", format!("`ipam.type`: {name:?} is this plugin itself; its own addresses are had without `type`")));
        }
        Ok(Delegate { name: name.into(), path })
    }

    /// Its ADD: the addresses and routes that it gives, and its `dns`.
    pub fn add(&self, config: &[u8], until: Instant) -> Result<(Given, Map<String, Value>), Error> {
        let output = self.run(Command::Add, config, until)?;
        self.parse_result(&output)
    }

    /// Another of its commands; what it prints does not matter.
    pub fn command(&self, command: Command, config: &[u8], until: Instant) -> Result<(), Error> {
        self.run(command, config, until).map(drop)
    }

    /// A command that came with a later version of the specification than the plugin may know: then there is nothing that it could do.
    pub fn command_if_known(&self, command: Command, config: &[u8], until: Instant) -> Result<(), Error> {
        match self.command(command, config, until) {
            // What plugins built on libcni say of a command, or of a command in this version, that they do not have.
            Err(Error::Delegate { code: 4, message, .. }) if message.contains("CNI_COMMAND") => Ok(()),
            Err(Error::Delegate { code: 1, message, .. }) if message.contains("does not allow") => Ok(()),
            other => other,
        }
    }

    fn run(&self, command: Command, config: &[u8], until: Instant) -> Result<Vec<u8>, Error> {
        let io = |doing: &str, source| Error::Io { doing: format!("{doing} the IPAM plugin {}", self.path.display()), source };
        let mut child = Running(self.spawn(command, until).map_err(|source| io("run", source))?);
        if let Some(mut stdin) = child.0.stdin.take() {
            let config = config.to_vec();
            // One that does not read its configuration (VERSION, say) hangs up: no error of ours.
            background(move || drop(stdin.write_all(&config))).map_err(|source| io("write to", source))?;
        }
        let output = match child.0.stdout.take() {
            Some(stdout) => read_bounded(stdout, OUTPUT_LEN_MAX, until).map_err(|source| io("read the output of", source))?,
            None => Vec::new(),
        };
        let success = child.wait(until).map_err(|source| io("wait for", source))?;
        if success { Ok(output) } else { Err(self.failure(command, &output)) }
    }

    /// Starts it. A plugin that is being written just now, as in an update, is waited for.
    fn spawn(&self, command: Command, until: Instant) -> std::io::Result<Child> {
        loop {
            let child = Program::new(&self.path).env("CNI_COMMAND", command.name()).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
            match child {
                Err(e) if e.kind() == ErrorKind::ExecutableFileBusy && Instant::now() < until => std::thread::sleep(Duration::from_millis(10)),
                other => return other,
            }
        }
    }

    /// The error that it printed, with its code and its words.
    fn failure(&self, command: Command, output: &[u8]) -> Error {
        let source = || format!("{} of the IPAM plugin {}", command.name(), self.path.display());
        let told: Value = serde_json::from_slice(output).unwrap_or_default();
        let text = |key: &str| told.get(key).and_then(Value::as_str).filter(|text| !text.is_empty()).map(str::to_owned);
        Error::Delegate {
            code: told.get("code").and_then(Value::as_u64).filter(|code| *code != 0).unwrap_or(DELEGATE_FAILED),
            message: text("msg").unwrap_or_else(|| format!("{} failed without a reason", source())),
            details: text("details").unwrap_or_else(source),
        }
    }

    fn parse_result(&self, output: &[u8]) -> Result<(Given, Map<String, Value>), Error> {
        let bad = |problem: String| Error::Undecodable { what: format!("the result of the IPAM plugin {}", self.path.display()), problem };
        let result: Map<String, Value> = serde_json::from_slice(output).map_err(|e| bad(format!("it is not a JSON object: {e}")))?;
        let top = Section::top(&result);
        let ip = |ip: &Section<'_>| {
            let address = ip.string("address")?.ok_or_else(|| ip.error("address", "is missing"))?;
            check_cidr(address).map_err(|problem| ip.error("address", format!("is not an address: {problem}")))?;
            Ok(Ip { address: address.into(), gateway: parse_optional_ip(ip, "gateway")?, interface: None })
        };
        let parsed = (|| {
            let ips = top.sections("ips")?.iter().map(ip).collect::<Result<Vec<_>, Error>>()?;
            let routes = top.sections("routes")?.iter().map(parse_route).collect::<Result<_, _>>()?;
            Ok((Given { plugin: self.name.clone(), ips, routes }, parse_dns(&top)?))
        })();
        let (given, dns) = parsed.map_err(|e: Error| bad(e.details()))?;
        if given.ips.is_empty() {
            return Err(bad("it gives no address".into()));
        }
        Ok((given, dns))
    }
}

/// A child process, which ends with us.
struct Running(Child);

impl Running {
    /// Waits for its end, and says whether it ended well. Its output has ended by now, so the wait is a short one.
    fn wait(&mut self, until: Instant) -> std::io::Result<bool> {
        loop {
            if let Some(status) = self.0.try_wait()? {
                return Ok(status.success());
            }
            if Instant::now() >= until {
                return Err(ErrorKind::TimedOut.into());
            }
            std::thread::sleep(Duration::from_micros(500));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Of no effect on one that has been waited for.
        if self.0.kill().is_ok() {
            let _ = self.0.wait();
        }
    }
}

/// Everything that `source` gives, `len_max` bytes at most, until `until`.
pub fn read_bounded(source: impl Read + Send + 'static, len_max: u64, until: Instant) -> std::io::Result<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    background(move || {
        let mut bytes = Vec::new();
        let read = source.take(len_max + 1).read_to_end(&mut bytes).map(|_| bytes);
        // Nobody waits any more, perhaps.
        let _ = sender.send(read);
    })?;
    match receiver.recv_timeout(until.saturating_duration_since(Instant::now())) {
        Ok(Ok(bytes)) if bytes.len() as u64 > len_max => {
            Err(std::io::Error::new(ErrorKind::FileTooLarge, format!("it is longer than {len_max} bytes")))
        }
        Ok(read) => read,
        Err(_) => Err(ErrorKind::TimedOut.into()),
    }
}

/// Runs `work` beside the rest; the process does not wait for it at its end.
fn background(work: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    std::thread::Builder::new().stack_size(64 * 1024).spawn(work).map(drop)
}
