//! `podgate doctor`: is this machine fit, and if not, what is to be done.
//!
//! In two parts. `collect` looks: netlink, `/proc`, the firewall's own programs, the daemon's socket, the origin of the cluster's objects,
//! echoes to peers. What it finds are `facts`, plain data. `judge` makes findings of them, purely: one line for everything that was
//! looked at, whatever came of it, so that what is fine can be told from what was not seen.
//!
//! Nothing on the machine is changed. What can only be known by trying (TUN, veth, rules by port, datagrams in segments) is tried in a network
//! namespace without a name, which goes with this process. Without root it sees less, and says what it did not see.
//!
//! In the manner of `linkerd check`.

mod collect;
mod facts;
mod firewall;
mod judge;

use std::fmt::Write as _;
use std::path::PathBuf;

use serde::Serialize;
use serde_json::{Value, json};

pub use facts::Stage;

/// The version of the JSON's shape: it grows when a key changes its meaning or goes.
const SCHEMA_VERSION: u32 = 1;

/// What to look at.
#[derive(Clone, Debug)]
pub struct Options {
    /// Before an installation, or at what runs.
    pub stage: Stage,
    /// The gateway's configuration file.
    pub config: PathBuf,
    /// The daemon's socket where the configuration cannot say it.
    pub socket: PathBuf,
    /// Where container runtimes look for plugins, and for configurations.
    pub places: crate::install_cni::Places,
}

/// How grave a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// Part of it does not work, or will not; or it could not be seen.
    Warning,
    /// It cannot work so.
    Failure,
}

impl Status {
    /// The mark in front of a line.
    pub fn mark(self) -> &'static str {
        match self {
            Status::Ok => "√",
            Status::Warning => "‼",
            Status::Failure => "×",
        }
    }
}

/// One line: what was looked at, and what is wrong with it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Finding {
    /// Which group of lines it stands in.
    pub group: &'static str,
    /// The check's name, for programs: it stays when the words change.
    pub check: &'static str,
    /// How grave it is.
    pub status: Status,
    /// What was looked at, or what is wrong.
    pub detail: String,
    /// What to do about it; none where nothing is wrong.
    pub remedy: Option<String>,
}

/// Everything that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The lines, group by group.
    pub findings: Vec<Finding>,
}

/// Looks at the machine, and says what is wrong with it.
pub fn examine(options: &Options) -> Report {
    Report { findings: judge::findings(&collect::facts(options)) }
}

impl Report {
    /// The gravest of its findings.
    pub fn status(&self) -> Status {
        self.findings.iter().map(|finding| finding.status).max().unwrap_or(Status::Ok)
    }

    fn count(&self, status: Status) -> usize {
        self.findings.iter().filter(|finding| finding.status == status).count()
    }

    /// For programs.
    pub fn json(&self) -> Value {
        json!({
            "schemaVersion": SCHEMA_VERSION,
            "status": self.status(),
            "failures": self.count(Status::Failure),
            "warnings": self.count(Status::Warning),
            "findings": self.findings,
        })
    }

    /// For people: groups of marked lines. With `names`, each line begins with its check's name.
    pub fn text(&self, names: Names) -> String {
        let (mut text, mut group) = (String::new(), "");
        for finding in &self.findings {
            if finding.group != group {
                group = finding.group;
                let blank = if text.is_empty() { "" } else { "\n" };
                let _ = writeln!(text, "{blank}{group}");
            }
            let name = if names == Names::Shown { format!("[{}] ", finding.check) } else { String::new() };
            let _ = writeln!(text, "  {} {name}{}", finding.status.mark(), finding.detail);
            if let Some(remedy) = &finding.remedy {
                let _ = writeln!(text, "      → {remedy}");
            }
        }
        let plural = |count: usize, what: &str| format!("{count} {what}{}", if count == 1 { "" } else { "s" });
        let summary = match (self.count(Status::Failure), self.count(Status::Warning)) {
            (0, 0) => "everything that was looked at is as it should be".to_owned(),
            (0, warnings) => plural(warnings, "warning"),
            (failures, 0) => plural(failures, "failure"),
            (failures, warnings) => format!("{}, {}", plural(failures, "failure"), plural(warnings, "warning")),
        };
        let _ = writeln!(text, "\n{summary}");
        text
    }
}

/// Whether the names of the checks are shown to people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Names {
    /// In front of each line.
    Shown,
    /// Not.
    Hidden,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let finding = |group, check, status, detail: &str, remedy: Option<&str>| Finding {
            group,
            check,
            status,
            detail: detail.into(),
            remedy: remedy.map(str::to_owned),
        };
        Report {
            findings: vec![
                finding("kernel", "kernel", Status::Ok, "Linux 6.18", None),
                finding("kernel", "veth", Status::Failure, "no veth", Some("modprobe veth")),
                finding("host", "room", Status::Warning, "little room", Some("make room")),
            ],
        }
    }

    #[test]
    fn lines_stand_in_groups_and_what_is_wrong_is_followed_by_its_remedy() {
        let text = report().text(Names::Hidden);
        assert_eq!(
            text,
            "kernel\n  √ Linux 6.18\n  × no veth\n      → modprobe veth\n\nhost\n  ‼ little room\n      → make room\n\n1 failure, 1 warning\n"
        );
        assert!(report().text(Names::Shown).contains("× [veth] no veth"));
    }

    #[test]
    fn the_gravest_finding_is_the_reports_status() {
        let mut report = report();
        assert_eq!(report.status(), Status::Failure);
        report.findings.remove(1);
        assert_eq!(report.status(), Status::Warning);
        report.findings.remove(1);
        assert_eq!((report.status(), report.json()["status"].as_str()), (Status::Ok, Some("ok")));
        assert!(report.text(Names::Hidden).ends_with("everything that was looked at is as it should be\n"));
    }
}
