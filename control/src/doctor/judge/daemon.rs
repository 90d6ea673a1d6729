//! The daemon: whether it answers, is ready, and has what it needs; in its own words where it has some.

use serde_json::Value;

use super::super::facts::{Daemon, Facts, Stage, Tables};
use super::{AS_ROOT, Lines};

/// How long an update may wait for the workers before it is worth a line; they take some milliseconds.
const PENDING_SECONDS: f64 = 5.0;

pub(super) fn judge(facts: &Facts, lines: &mut Lines) {
    match &facts.daemon {
        // Whether one runs already is not what was asked.
        _ if facts.stage == Stage::Before => {}
        Daemon::Down(socket) => lines.fail(
            "daemon",
            format!("no daemon answers at {}", socket.display()),
            "start it (`systemctl start podgate`, `podgate run`); if it ended by itself, the last line of its log says why",
        ),
        Daemon::Denied(socket) => lines.warn("daemon", format!("the daemon's socket {} is not for this user", socket.display()), AS_ROOT),
        Daemon::Mute(why) => lines.fail("daemon", why.clone(), "look at its log, and start it again if it hangs: what it forwards by stays in force"),
        Daemon::Answers(tables) => answers(tables, lines),
    }
}

fn answers(tables: &Tables, lines: &mut Lines) {
    let status = &tables.status;
    let own = env!("CARGO_PKG_VERSION");
    match status["version"].as_str() {
        Some(version) if version != own => lines.warn(
            "version",
            format!("the daemon is of version {version}, this program of {own}"),
            "restart the daemon, if the newer one is installed; connections live through it",
        ),
        _ => lines.ok("version", format!("the daemon is of this version, {own}")),
    }
    let node = status["node"].as_str().unwrap_or_default();
    if status["ready"] == true {
        lines.ok("ready", format!("{node} forwards, with generation {} of the tables", status["generation"]));
    } else {
        lines.fail(
            "ready",
            format!("{node} is not ready: pods have no network, or not all of the cluster is known yet"),
            "see what fails below, and the daemon's log",
        );
    }
    let said = self_test(status, lines);
    problems(status, &said, lines);
    pending(status, lines);
    workers(&tables.workers, lines);
}

/// Gives the texts that `problems` has again.
fn self_test(status: &Value, lines: &mut Lines) -> Vec<String> {
    let mut said = Vec::new();
    for check in status["checks"].as_array().into_iter().flatten().filter(|check| check["ok"] != true) {
        let (name, detail) = (check["name"].as_str().unwrap_or_default(), check["detail"].as_str().unwrap_or_default());
        said.push(format!("{name}: {detail}"));
        // In its detail what is wrong is followed by what to do (`selftest`).
        let (what, remedy) = detail.split_once(": ").unwrap_or((detail, "see the daemon's log"));
        let what = format!("the self-test `{name}` fails: {what}");
        if name.starts_with("pods") { lines.fail("self-test", what, remedy) } else { lines.warn("self-test", what, remedy) }
    }
    if status["checks"].as_array().is_none_or(Vec::is_empty) {
        lines.warn("self-test", "the self-test has not run yet", "ask again in some seconds; if it stays so, see the daemon's log");
    }
    lines.ok_unless_found(
        "self-test",
        "the gateway's own traffic passes: to a pod, to the node, through the node's forwarding, from the node's address",
    );
    said
}

fn problems(status: &Value, said: &[String], lines: &mut Lines) {
    if status["source"]["connected"] != true {
        let kind = status["source"]["kind"].as_str().unwrap_or("source");
        lines.warn(
            "connected",
            format!("the daemon does not follow its source ({kind}) at present: it forwards by what it heard last"),
            "see the lines on the source, and what follows",
        );
    }
    lines.ok_unless_found("connected", "the daemon follows its source");
    for problem in status["problems"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        if !said.iter().any(|said| said == problem) {
            lines.warn("problems", problem.to_owned(), "the daemon says so (`podgate status`); its log has more");
        }
    }
    lines.ok_unless_found("problems", "the daemon reports no problem");
}

fn pending(status: &Value, lines: &mut Lines) {
    let pending = &status["pending"];
    match pending["seconds"].as_f64() {
        Some(seconds) if seconds > PENDING_SECONDS => lines.fail(
            "tables",
            format!("generation {} of the tables has been waiting for {seconds:.0} s for workers {}", pending["generation"], pending["workers"]),
            "those workers hang: see `podgate workers` and the daemon's log, and restart it; connections live through it",
        ),
        _ => lines.ok("tables", "every worker has the newest tables"),
    }
}

fn workers(workers: &Value, lines: &mut Lines) {
    let rows = workers["workers"].as_array().map_or(&[][..], Vec::as_slice);
    for row in rows.iter().filter(|row| row["state"] != "running") {
        lines.fail("workers", format!("worker {} is down after {} restarts", row["worker"], row["restarts"]), "see the daemon's log, and restart it");
    }
    lines.ok_unless_found("workers", format!("{} workers run", rows.len()));
}
