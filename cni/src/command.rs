//! The six commands. Each is asked of the daemon; addresses that another plugin gives are fetched around that.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::Write;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use podgate_cni::protocol::{Addresses, AttachRequest};
use podgate_cni::result::{Attached, VERSIONS};
use podgate_cni::{Attachment, Request};
use serde_json::{Map, Value, json};

use crate::daemon::{Daemon, PATIENCE, Time};
use crate::delegate::Delegate;
use crate::environment::{Args, Command, Environment};
use crate::error::{Error, UNREACHABLE};
use crate::namespace::Namespace;
use crate::network::{Ipam, Network, Settings};
use crate::note::Note;

/// The delegated plugin that needs the interface before it can give an address.
const DHCP: &str = "dhcp";

/// A call of this plugin.
#[derive(Debug)]
pub struct Call<'a> {
    environment: Environment,
    network: Network,
    /// The configuration's bytes, as a delegated plugin gets them.
    config: &'a [u8],
    daemon: Daemon,
    time: Time,
}

/// VERSION: what is spoken, said in the version of the question, whichever that is.
pub fn version(question: &Value) -> Result<Value, Error> {
    let asked = match question.get("cniVersion") {
        None | Some(Value::Null) => VERSIONS[VERSIONS.len() - 1],
        Some(Value::String(version)) if version.len() <= 32 => version,
        Some(_) => return Err(Error::config("cniVersion", "`cniVersion` is not a version")),
    };
    Ok(json!({"cniVersion": asked, "supportedVersions": VERSIONS}))
}

/// Runs `command`, and gives what is to be printed.
pub fn run(command: Command, environment: Environment, question: Value, config: &[u8]) -> Result<Option<Value>, Error> {
    let network = Network::parse(question, command)?;
    let call = Call { daemon: Daemon::at(&network.socket), time: Time::of(network.timeout), environment, network, config };
    match command {
        Command::Add => call.add().map(Some),
        Command::Del => call.del().map(|()| None),
        Command::Check => call.check().map(|()| None),
        Command::Gc => call.gc().map(|()| None),
        Command::Status => call.status().map(|()| None),
        Command::Version => Ok(None),
    }
}

impl Call<'_> {
    fn add(&self) -> Result<Value, Error> {
        let args = Args::parse(&self.environment.args)?;
        let settings = self.network.settings(&args)?;
        let previous = self.network.previous()?;
        let namespace = Namespace::open(&self.environment.netns)?;
        let attachment = self.attachment(args.pod);
        let delegate = match &self.network.ipam {
            Ipam::Own { .. } => None,
            Ipam::Delegated(name) => Some(Delegate::find(name, &self.environment.path)?),
        };
        self.carry_note_out(&attachment)?;
        let request = self.attach_request(&settings, attachment);
        let (attached, dns) = match (&self.network.ipam, delegate) {
            (Ipam::Delegated(name), Some(delegate)) if name == DHCP => self.attach_then_assign(request, &delegate, &namespace)?,
            (_, Some(delegate)) => self.attach_given(request, &delegate, &namespace)?,
            (_, None) => (self.attach(request, &namespace)?, Map::new()),
        };
        let dns = if settings.dns.is_empty() { dns } else { settings.dns };
        Ok(attached.to_json_after(previous, self.network.version, &Value::Object(dns)))
    }

    fn del(&self) -> Result<(), Error> {
        // A DEL does not fail for the sake of arguments that it does not need.
        let attachment = self.attachment(Args::parse(&self.environment.args).map(|args| args.pod).unwrap_or_default());
        if matches!(&self.network.ipam, Ipam::Delegated(name) if name == DHCP) {
            // It tells the server through the interface, so it goes first; and the interface goes whatever comes of that.
            let released = self.delegate_if_there(Command::Del);
            return self.detach(&attachment, self.time.work).and(released);
        }
        self.detach(&attachment, self.time.work)?;
        self.delegate_if_there(Command::Del)
    }

    fn check(&self) -> Result<(), Error> {
        if self.network.disable_check {
            return Ok(());
        }
        let args = Args::parse(&self.environment.args)?;
        let Some(previous) = self.network.previous()? else {
            return Err(Error::config("prevResult", "`prevResult` is missing: CHECK compares the container with the result of its ADD"));
        };
        let addresses = addresses_of(previous, &self.environment.ifname).ok_or_else(|| {
            let problem = format!("`prevResult.interfaces` has no interface {:?} in a container", self.environment.ifname);
            Error::config("prevResult.interfaces", problem)
        })?;
        let namespace = Namespace::open(&self.environment.netns)?;
        let request = Request::Check { attachment: self.attachment(args.pod), addresses };
        self.daemon.ask(&request, &[namespace.as_fd()], self.time.work, PATIENCE).map_err(|unanswered| unanswered.try_again(&self.daemon.socket))?;
        self.delegate_if_there(Command::Check)
    }

    fn gc(&self) -> Result<(), Error> {
        if self.network.disable_gc {
            return Ok(());
        }
        let request = Request::Collect { network: self.network.name.clone(), valid: self.network.valid_attachments()? };
        // Goes on past errors, and tells all of them.
        let mut errors = Vec::new();
        if let Err(unanswered) = self.daemon.ask(&request, &[], self.time.work, PATIENCE) {
            errors.push(unanswered.try_again(&self.daemon.socket));
        }
        errors.extend(self.delegate_if_there(Command::Gc).err());
        Error::all(errors)
    }

    fn status(&self) -> Result<(), Error> {
        self.network.settings(&Args::default())?;
        self.daemon.ask(&Request::Ready, &[], self.time.work, Duration::ZERO).map_err(|unanswered| {
            match unanswered.into_error(&self.daemon.socket, UNREACHABLE) {
                Error::Undecodable { what, problem } => Error::Unavailable { problem: format!("{what}: {problem}") },
                error => error,
            }
        })?;
        match self.delegate() {
            Some(Ok(delegate)) => delegate.command_if_known(Command::Status, self.config, self.time.end),
            Some(Err(missing)) => Err(Error::Unavailable { problem: missing.details() }),
            None => Ok(()),
        }
    }

    fn attachment(&self, pod: Option<String>) -> Attachment {
        Attachment {
            sandbox: self.environment.container.clone(),
            ifname: self.environment.ifname.clone(),
            name: pod,
            network: Some(self.network.name.clone()),
        }
    }

    fn attach_request(&self, settings: &Settings, attachment: Attachment) -> AttachRequest {
        let pool = match &self.network.ipam {
            Ipam::Own { pool } => pool.clone(),
            Ipam::Delegated(_) => None,
        };
        AttachRequest {
            attachment,
            // Keyed at random, so what comes out is random too. 0 stands for none.
            attempt: RandomState::new().build_hasher().finish().max(1),
            netns: self.environment.netns.clone(),
            addresses: Addresses::Own { pool, wanted: settings.wanted.clone() },
            masquerade: settings.masquerade,
            default_route: settings.default_route,
            mtu: settings.mtu,
            mac: settings.mac.clone(),
            routes: settings.routes.clone(),
            port_mappings: settings.port_mappings.clone(),
            bandwidth: settings.bandwidth,
            mode: settings.mode,
        }
    }

    /// The plugin that gives addresses, if it is another one; an error if it is not there.
    fn delegate(&self) -> Option<Result<Delegate, Error>> {
        match &self.network.ipam {
            Ipam::Own { .. } => None,
            Ipam::Delegated(name) => Some(Delegate::find(name, &self.environment.path)),
        }
    }

    /// Has the other plugin, if there is one, do its part of `command`. Where it has been uninstalled there is nothing that it could do, and
    /// the container is not to suffer for it.
    fn delegate_if_there(&self, command: Command) -> Result<(), Error> {
        match self.delegate() {
            Some(Ok(delegate)) if command == Command::Gc => delegate.command_if_known(command, self.config, self.time.end),
            Some(Ok(delegate)) => delegate.command(command, self.config, self.time.end),
            Some(Err(missing)) => {
                say(missing.details());
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// A note of an earlier DEL that the daemon has not seen, because it was not down but slow: a container of the same id has been started
    /// again, and what is left of the old one goes first, lest the note be carried out on the new one.
    fn carry_note_out(&self, attachment: &Attachment) -> Result<(), Error> {
        let note = Note::of(&self.daemon.socket, attachment);
        if note.exists() {
            let answer = self.daemon.ask(&Request::Detach(attachment.clone()), &[], self.time.work, PATIENCE);
            answer.map_err(|unanswered| unanswered.try_again(&self.daemon.socket))?;
            note.remove();
        }
        Ok(())
    }

    /// Attaches. Where it is not known whether the daemon has, the attachment is taken back.
    fn attach(&self, request: AttachRequest, namespace: &Namespace) -> Result<Attached, Error> {
        let attachment = request.attachment.clone();
        self.ask_for_result(&Request::Attach(Box::new(request)), namespace).map_err(|(error, perhaps_done)| {
            if perhaps_done {
                self.undo_attach(&attachment);
            }
            error
        })
    }

    /// Attaches with addresses that `delegate` gives.
    fn attach_given(&self, request: AttachRequest, delegate: &Delegate, namespace: &Namespace) -> Result<(Attached, Map<String, Value>), Error> {
        let attachment = request.attachment.clone();
        let attached = delegate.add(self.config, self.time.work).and_then(|(given, dns)| {
            let attached = self.attach(AttachRequest { addresses: Addresses::Given(given), ..request }, namespace)?;
            Ok((attached, dns))
        });
        attached.inspect_err(|_| self.undo_delegate(delegate, &attachment, namespace))
    }

    /// Attaches without addresses, then assigns those that `delegate` gets through the new interface.
    fn attach_then_assign(
        &self,
        request: AttachRequest,
        delegate: &Delegate,
        namespace: &Namespace,
    ) -> Result<(Attached, Map<String, Value>), Error> {
        let attachment = request.attachment.clone();
        self.attach(AttachRequest { addresses: Addresses::Later, ..request }, namespace)?;
        let assigned = delegate.add(self.config, self.time.work).and_then(|(given, dns)| {
            let request = Request::Assign { attachment: attachment.clone(), given };
            let attached = self.ask_for_result(&request, namespace).map_err(|(error, _)| error)?;
            Ok((attached, dns))
        });
        assigned.inspect_err(|_| {
            self.undo_attach(&attachment);
            self.undo_delegate(delegate, &attachment, namespace);
        })
    }

    /// Asks for an attachment's result. With the error, whether the daemon may have done what was asked all the same.
    fn ask_for_result(&self, request: &Request, namespace: &Namespace) -> Result<Attached, (Error, bool)> {
        let answer = self.daemon.ask(request, &[namespace.as_fd()], self.time.work, PATIENCE).map_err(|unanswered| {
            let perhaps_done = unanswered.perhaps_done;
            (unanswered.try_again(&self.daemon.socket), perhaps_done)
        })?;
        serde_json::from_value(answer).map_err(|e| {
            let what = format!("the answer of the daemon at {}", self.daemon.socket.display());
            (Error::Undecodable { what, problem: format!("it is not a result: {e}. Are plugin and daemon of one version?") }, true)
        })
    }

    /// Takes an attachment away, or leaves a note that it is to go. Only a daemon that refuses makes this fail.
    fn detach(&self, attachment: &Attachment, until: Instant) -> Result<(), Error> {
        let note = Note::of(&self.daemon.socket, attachment);
        let ask = |patience| match self.daemon.ask(&Request::Detach(attachment.clone()), &[], until, patience) {
            Ok(_) => {
                note.remove();
                Ok(Ok(()))
            }
            Err(unanswered) => match unanswered.try_again(&self.daemon.socket) {
                refused @ Error::Refused { .. } => Err(refused),
                error => Ok(Err(error)),
            },
        };
        let Err(error) = ask(PATIENCE_OF_DETACH)? else { return Ok(()) };
        match note.write(attachment) {
            // A daemon that started meanwhile may have looked for notes before this one was there: then it listens by now.
            Ok(()) => ask(Duration::ZERO).map(drop),
            Err(e) => {
                say(format!("{error}: {}", error.details()));
                say(format!("nor can a note be left at {}: {e}. `podgate ipam check --fix` mends what stays", note.path().display()));
                Ok(())
            }
        }
    }

    fn undo_attach(&self, attachment: &Attachment) {
        if let Err(error) = self.detach(attachment, self.time.end) {
            say(format!("what was attached in vain could not be taken back: {error}"));
        }
    }

    /// Gives the addresses of a failed ADD back. But not where the attachment stands: then this was a second ADD of the same interface, and
    /// what the delegated plugin has under its name are the addresses of the first.
    fn undo_delegate(&self, delegate: &Delegate, attachment: &Attachment, namespace: &Namespace) {
        let check = Request::Check { attachment: attachment.clone(), addresses: Vec::new() };
        if self.daemon.ask(&check, &[namespace.as_fd()], self.time.end, Duration::ZERO).is_ok() {
            say("the interface is attached already, so its addresses are kept");
        } else if let Err(error) = delegate.command(Command::Del, self.config, self.time.end) {
            say(format!("the address given in vain could not be given back: {error}: {}", error.details()));
        }
    }
}

/// How long a daemon is asked again to detach: a planned restart takes 100 ms. Longer is of no use, as a note does the same.
const PATIENCE_OF_DETACH: Duration = Duration::from_millis(300);

/// The addresses that a result gives the container's interface; none if it has no such interface.
fn addresses_of(result: &Map<String, Value>, ifname: &str) -> Option<Vec<String>> {
    let list = |key: &str| result.get(key).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let text = |value: &Value, key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let index = list("interfaces").iter().position(|interface| text(interface, "name") == ifname && !text(interface, "sandbox").is_empty())?;
    let ours = |ip: &&Value| ip.get("interface").and_then(Value::as_u64) == Some(index as u64);
    Some(list("ips").iter().filter(ours).map(|ip| text(ip, "address")).collect())
}

/// A line for the runtime's log. Nobody reading it is no reason to fail.
pub fn say(what: impl std::fmt::Display) {
    let _ = writeln!(std::io::stderr(), "podgate-cni: {what}");
}
