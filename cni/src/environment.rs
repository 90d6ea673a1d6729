//! The environment of a call (CNI SPEC.md, section 2, "Parameters"): which command, for which interface of which container.

use std::ffi::OsString;
use std::net::IpAddr;

use crate::error::Error;
use crate::network::{parse_ip, parse_mac};

/// A command of the specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Attach a container.
    Add,
    /// Take an attachment away.
    Del,
    /// Is an attachment whole?
    Check,
    /// Take away what no container has any more.
    Gc,
    /// Can containers be attached?
    Status,
    /// Which versions are spoken?
    Version,
}

impl Command {
    /// As in `CNI_COMMAND`.
    pub fn name(self) -> &'static str {
        match self {
            Command::Add => "ADD",
            Command::Del => "DEL",
            Command::Check => "CHECK",
            Command::Gc => "GC",
            Command::Status => "STATUS",
            Command::Version => "VERSION",
        }
    }

    /// The first version of the specification that has it.
    pub fn since(self) -> &'static str {
        match self {
            Command::Check => "0.4.0",
            Command::Gc | Command::Status => "1.1.0",
            Command::Add | Command::Del | Command::Version => "0.3.1",
        }
    }

    /// From `CNI_COMMAND`.
    pub fn from_environment() -> Result<Command, Error> {
        let name = variable("CNI_COMMAND")?;
        let all = [Command::Add, Command::Del, Command::Check, Command::Gc, Command::Status, Command::Version];
        all.into_iter().find(|command| command.name() == name).ok_or_else(|| {
            let problem = match name.as_str() {
                "" => {
                    "CNI_COMMAND is missing: this is a CNI plugin, which a container runtime runs, with ADD, DEL, CHECK, GC, STATUS or VERSION".into()
                }
                _ => format!("unknown CNI_COMMAND: {name:?}; it is one of ADD, DEL, CHECK, GC, STATUS and VERSION"),
            };
            invalid("CNI_COMMAND", problem)
        })
    }

    /// The variables that it needs.
    fn required(self) -> &'static [&'static str] {
        match self {
            Command::Add | Command::Check => &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"],
            Command::Del => &["CNI_CONTAINERID", "CNI_IFNAME"],
            Command::Gc => &["CNI_PATH"],
            Command::Status | Command::Version => &[],
        }
    }
}

/// The variables of a call. Those that its command does not need may be empty.
#[derive(Clone, Debug)]
pub struct Environment {
    /// `CNI_CONTAINERID`.
    pub container: String,
    /// `CNI_NETNS`.
    pub netns: String,
    /// `CNI_IFNAME`.
    pub ifname: String,
    /// `CNI_ARGS`, not yet parsed: a DEL is not to fail for its sake.
    pub args: String,
    /// `CNI_PATH`.
    pub path: OsString,
}

impl Environment {
    /// What `command` needs of the environment, checked.
    pub fn of(command: Command) -> Result<Environment, Error> {
        let missing: Vec<&str> =
            command.required().iter().copied().filter(|name| std::env::var_os(name).is_none_or(|value| value.is_empty())).collect();
        if !missing.is_empty() {
            let variables = missing.join(",");
            let problem = format!("{} needs {variables}", command.name());
            return Err(Error::Environment { variables, problem });
        }
        let mut environment = Environment {
            container: String::new(),
            netns: String::new(),
            ifname: String::new(),
            args: String::new(),
            path: std::env::var_os("CNI_PATH").unwrap_or_default(),
        };
        if matches!(command, Command::Add | Command::Del | Command::Check) {
            environment.container = variable("CNI_CONTAINERID")?;
            environment.ifname = variable("CNI_IFNAME")?;
            environment.netns = variable("CNI_NETNS")?;
            environment.args = variable("CNI_ARGS")?;
            check_name(&environment.container).map_err(|problem| invalid("CNI_CONTAINERID", problem))?;
            check_ifname(&environment.ifname).map_err(|problem| invalid("CNI_IFNAME", problem))?;
        }
        Ok(environment)
    }
}

/// What `CNI_ARGS` asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Args {
    /// `K8S_POD_NAMESPACE` and `K8S_POD_NAME`, as `namespace/name`.
    pub pod: Option<String>,
    /// `IP`: these addresses.
    pub ips: Vec<IpAddr>,
    /// `MAC`: this Ethernet address.
    pub mac: Option<String>,
}

impl Args {
    /// Parses `CNI_ARGS`: pairs `KEY=value` between semicolons. A key that is not known is refused, unless `IgnoreUnknown` is `1` or `true`.
    pub fn parse(args: &str) -> Result<Args, Error> {
        let bad = |problem: String| invalid("CNI_ARGS", problem);
        let mut parsed = Args::default();
        let (mut namespace, mut name) = (None, None);
        let (mut ignore_unknown, mut unknown) = (false, Vec::new());
        for pair in args.split(';').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').ok_or_else(|| bad(format!("CNI_ARGS: {pair:?} is not KEY=value")))?;
            match key {
                "IgnoreUnknown" => {
                    ignore_unknown = match value.to_ascii_lowercase().as_str() {
                        "1" | "true" => true,
                        "0" | "false" => false,
                        _ => return Err(bad(format!("CNI_ARGS: IgnoreUnknown={value:?} is neither 1, true, 0 nor false"))),
                    }
                }
                "IP" => {
                    parsed.ips = value
                        .split(',')
                        .filter(|ip| !ip.is_empty())
                        .map(|ip| parse_ip(ip).map_err(|problem| bad(format!("CNI_ARGS: IP: {problem}"))))
                        .collect::<Result<_, _>>()?;
                }
                "MAC" => parsed.mac = Some(parse_mac(value).map_err(|problem| bad(format!("CNI_ARGS: MAC: {problem}")))?),
                "K8S_POD_NAMESPACE" => namespace = Some(value),
                "K8S_POD_NAME" => name = Some(value),
                "K8S_POD_INFRA_CONTAINER_ID" | "K8S_POD_UID" => {}
                _ => unknown.push(key),
            }
        }
        if !ignore_unknown && !unknown.is_empty() {
            return Err(bad(format!("CNI_ARGS: unknown: {}; add IgnoreUnknown=1 to have them ignored", unknown.join(", "))));
        }
        if let (Some(namespace), Some(name)) = (namespace, name)
            && !namespace.is_empty()
            && !name.is_empty()
        {
            for part in [namespace, name] {
                check_name(part).map_err(|problem| bad(format!("CNI_ARGS: the pod's name: {problem}")))?;
            }
            parsed.pod = Some(format!("{namespace}/{name}"));
        }
        Ok(parsed)
    }
}

/// The longest name of a container, network or pod, in bytes. The specification sets no bound; a file's name (NAME_MAX) does, and runtimes
/// use 64.
const NAME_LEN_MAX: usize = 253;

/// Checks the name of a container or of a network: it begins with a letter or digit and goes on with these, `_`, `.` and `-`.
pub fn check_name(name: &str) -> Result<(), String> {
    let inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    if name.len() > NAME_LEN_MAX {
        Err(format!("it is longer than {NAME_LEN_MAX} bytes"))
    } else if name.starts_with(|c: char| c.is_ascii_alphanumeric()) && name.chars().all(inner) {
        Ok(())
    } else {
        Err(format!("{name:?} does not begin with a letter or digit and go on with these, '_', '.' and '-'"))
    }
}

/// Checks an interface's name as the kernel does (`dev_valid_name`, net/core/dev.c): 1 to 15 bytes, neither `.` nor `..`, no `/`, `:` or space.
fn check_ifname(name: &str) -> Result<(), String> {
    if name.is_empty() || name.len() > 15 {
        Err(format!("{name:?} is not of 1 to 15 bytes"))
    } else if matches!(name, "." | "..") || name.contains(|c: char| matches!(c, '/' | ':' | '\0') || c.is_whitespace()) {
        Err(format!("{name:?} is not an interface's name: no '.', '..', '/', ':' or space"))
    } else {
        Ok(())
    }
}

/// A variable's value; none is empty.
fn variable(name: &'static str) -> Result<String, Error> {
    std::env::var_os(name).unwrap_or_default().into_string().map_err(|_| invalid(name, format!("{name} is not UTF-8")))
}

fn invalid(variable: &str, problem: String) -> Error {
    Error::Environment { variables: variable.into(), problem }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_held_to_the_specification() {
        for good in ["a", "0", "cri-o_1.x", &"f".repeat(253)] {
            assert_eq!(check_name(good), Ok(()), "{good}");
        }
        for bad in ["", "-a", ".a", "_a", "a/b", "a b", "ä", "a\n", &"f".repeat(254)] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
        for good in ["e", "eth0", "net1.100", "fifteen-bytes-x", "ö"] {
            assert_eq!(check_ifname(good), Ok(()), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "a:b", "a b", "a\tb", "sixteen-bytes-xx", "a\u{a0}b"] {
            assert!(check_ifname(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn args_name_the_pod_and_ask_for_addresses() {
        let args =
            Args::parse("IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0;IP=10.244.1.9/24,fd00::9;MAC=02-00-00-00-00-0A;X=y=z").unwrap();
        let ips = vec!["10.244.1.9".parse().unwrap(), "fd00::9".parse().unwrap()];
        assert_eq!(args, Args { pod: Some("default/web-0".into()), ips, mac: Some("02:00:00:00:00:0a".into()) });
        assert_eq!(Args::parse("").unwrap(), Args::default());
        assert_eq!(Args::parse(";K8S_POD_NAMESPACE=;K8S_POD_NAME=;").unwrap(), Args::default());
    }

    #[test]
    fn args_that_are_unknown_or_malformed_are_refused_by_name() {
        for (args, told) in [
            ("COLOUR=red", "COLOUR"),
            ("IgnoreUnknown=false;COLOUR=red", "COLOUR"),
            ("IgnoreUnknown=perhaps", "IgnoreUnknown"),
            ("IP", "\"IP\""),
            ("IP=ten", "\"ten\""),
            ("MAC=02:00", "\"02:00\""),
            ("K8S_POD_NAMESPACE=a/b;K8S_POD_NAME=c", "a/b"),
        ] {
            let error = Args::parse(args).unwrap_err();
            assert_eq!(error.code(), 4);
            assert!(error.to_json("1.1.0").to_string().contains(&told.replace('"', "\\\"")), "{error:?}");
        }
    }
}
