//! The command line as its users meet it: the real binary, given wrong words, wrong files and wrong daemons. What it says on stderr must name
//! what is wrong and where, and its exit code must tell a script what kind of failure it is.
//!
//! Nothing here needs privileges or touches the network: every configuration is refused before anything is done, and daemons are played by
//! a socket in a directory of the test's own.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread::JoinHandle;

use serde_json::{Value, json};

fn podgate() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_podgate"));
    command.env_remove("PODGATE_SOCKET").env_remove("PODGATE_LOG").stdin(Stdio::null());
    command
}

/// What came of it: its exit code, stdout and stderr.
fn ended(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (output.status.code().expect("no signal ended it"), text(&output.stdout), text(&output.stderr))
}

fn podgate_with(words: &[&str]) -> (i32, String, String) {
    ended(&podgate().args(words).output().unwrap())
}

#[track_caller]
fn refused(words: &[&str], code: i32, parts: &[&str]) {
    let (exit, stdout, stderr) = podgate_with(words);
    assert_eq!((exit, stdout.as_str()), (code, ""), "{words:?}: {stderr}");
    for part in parts {
        assert!(stderr.contains(part), "{words:?}: {part:?} is not in {stderr}");
    }
    assert!(!stderr.contains("panicked"), "{words:?}: {stderr}");
}

/// A daemon that gives one answer.
struct Daemon {
    socket: PathBuf,
    asked: JoinHandle<Value>,
    _directory: tempfile::TempDir,
}

fn daemon(answer: impl FnOnce() -> String + Send + 'static) -> Daemon {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("podgate.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let asked = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut line = String::new();
        BufReader::new(stream.try_clone().unwrap()).read_line(&mut line).unwrap();
        let _ = stream.write_all(answer().as_bytes());
        serde_json::from_str(&line).unwrap()
    });
    Daemon { socket, asked, _directory: directory }
}

fn answering(value: &Value) -> Daemon {
    let line = format!("{}\n", json!({ "ok": value }));
    daemon(move || line)
}

impl Daemon {
    fn asked_with(self, words: &[&str]) -> (i32, String, String) {
        let output = podgate().arg("--socket").arg(&self.socket).args(words).output().unwrap();
        self.asked.join().unwrap();
        ended(&output)
    }
}

fn file(directory: &Path, text: &str) -> PathBuf {
    let path = directory.join("podgate.yaml");
    std::fs::write(&path, text).unwrap();
    path
}

#[test]
fn wrong_words_are_usage_errors() {
    refused(&[], 2, &["Usage:"]);
    refused(&["frobnicate"], 2, &["unrecognized subcommand 'frobnicate'"]);
    refused(&["status", "--colour"], 2, &["unexpected argument '--colour'"]);
    refused(&["flows", "-o", "xml"], 2, &["invalid value 'xml'", "json"]);
    refused(&["status", "--wait=soon"], 2, &["'soon'"]);
    refused(&["attach"], 2, &["--netns <PATH>"]);
    refused(&["attach", "--netns", "/run/netns/x", "--ifname", "averyverylongname0"], 2, &["1 to 15 characters"]);
    refused(&["attach", "--netns", "/run/netns/x", "--ifname", "a/b"], 2, &["1 to 15 characters"]);
    refused(&["ipam", "release"], 2, &["<ADDRESS|NAMESPACE/NAME>"]);
    refused(&["ipam", "frob"], 2, &["'frob'"]);
    refused(&["ipam", "-o", "json", "check"], 2, &["cannot be used with"]);
    refused(&["demo", "--nodes", "1"], 2, &["2..=16"]);
    refused(&["demo", "-o", "yaml"], 2, &["-o json"]);
    refused(&["run", "--socket", "/tmp/x.sock"], 2, &["<runtimeDir>/podgate.sock"]);
}

#[test]
fn a_trace_of_what_is_no_packet_is_a_usage_error() {
    refused(&["trace", "--from", "web", "--to", "10.96.0.10:80"], 2, &["'web'", "write IP, IP:PORT or [IPV6]:PORT"]);
    refused(&["trace", "--from", "10.32.0.5"], 2, &["--to <IP:PORT>"]);
    refused(&["trace", "--from", "10.32.0.5", "--to", "10.96.0.10"], 2, &["--to 10.96.0.10:80"]);
    refused(&["trace", "--from", "10.32.0.5", "--to", "[fd00::1]:80"], 2, &["different families"]);
    refused(&["trace", "--from", "10.32.0.5", "--to", "10.96.0.10:80", "--protocol", "sctp"], 2, &["tcp, udp, icmp"]);
}

#[test]
fn no_daemon_is_an_exit_code_of_its_own() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("none.sock");
    let socket = socket.to_str().unwrap();
    for words in [
        &["status"][..],
        &["status", "--wait=0"],
        &["flows", "-o", "json"],
        &["detach", "--netns", "/run/netns/x"],
        &["ipam"],
        &["ipam", "check"],
        &["ipam", "release", "10.32.0.5"],
    ] {
        refused(&[&["--socket", socket], words].concat(), 4, &[socket, "Is `podgate run` running?"]);
    }
    let output = podgate().env("PODGATE_SOCKET", socket).arg("drops").output().unwrap();
    assert!(ended(&output).2.contains(socket));
}

#[test]
fn a_namespace_that_is_not_there_is_named_before_anybody_is_asked() {
    refused(&["attach", "--netns", "/nonexistent/netns"], 1, &["/nonexistent/netns", "ip netns add"]);
}

#[test]
fn a_configuration_is_refused_with_file_place_and_remedy() {
    let directory = tempfile::tempdir().unwrap();
    let good = "underlay: {address: 192.0.2.1}\nsource: {directory: /etc/podgate/cluster.d}\n";
    let elsewhere = "underlay: {address: 192.0.2.1}\n";
    for (text, parts) in [
        (format!("{good}nodeports: 1-2\n"), &["podgate.yaml:3:1: unknown key `nodeports`", "`nodePorts`"][..]),
        (format!("{good}podCIDRs: 10.244.0.0/16\n"), &["podgate.yaml:3:", "podCIDRs: expected a list"]),
        (format!("{good}podCIDRs: [10.244.0.0/33]\n"), &["podgate.yaml:3:", "podCIDRs: `10.244.0.0/33` is not a range of addresses"]),
        (format!("{good}overlay: {{vni: -1}}\n"), &["podgate.yaml:3:16: vni: not a number from 0 to 4294967295"]),
        (format!("{good}overlay: {{port: 70000}}\n"), &["podgate.yaml:3:", "port: not a number from 0 to 65535"]),
        (format!("{good}health: {{address: here}}\n"), &["podgate.yaml:3:", "address: not an address with a port"]),
        (format!("{good}nodePorts: 61000-62000\n"), &["masquerade.ports and nodePorts"]),
        (format!("{good}podCIDRs: [10.244.0.0/16]\nserviceCIDRs: [10.244.128.0/17]\n"), &["podCIDRs and serviceCIDRs", "overlaps"]),
        (format!("{good}node: a\nnode: b\n"), &["podgate.yaml:4:1: the key `node` is written twice"]),
        (format!("{good}ipam: {{pool: {{}}}}\n"), &["podgate.yaml:3:8: unknown key `pool`; did you mean `pools`?"]),
        (format!("{good}ipam: {{exclude: [10.0.0.0/24]}}\n"), &["ipam.exclude and podCIDRs: 10.0.0.0/24 lies outside 10.32.0.0/12"]),
        (elsewhere.to_owned(), &["source: is missing", "write exactly one"]),
        (format!("{elsewhere}source: {{directory: /x, etcd: {{endpoints: []}}}}\n"), &["names directory and etcd", "write exactly one"]),
        ("hello\n".to_owned(), &["podgate.yaml:1:1: expected keys and values"]),
        (String::new(), &["underlay: says neither address nor interface"]),
    ] {
        let path = file(directory.path(), &text);
        for command in ["run", "prepare", "cleanup"] {
            let (exit, stdout, stderr) = podgate_with(&[command, "--config", path.to_str().unwrap()]);
            assert_eq!((exit, stdout.as_str(), stderr.lines().count()), (1, "", 1), "{command} {text}: {stderr}");
            for part in parts {
                assert!(stderr.contains(part), "{text}: {part:?} is not in {stderr}");
            }
        }
    }
    refused(&["run", "--config", "/nonexistent/podgate.yaml"], 1, &["/nonexistent/podgate.yaml: cannot be read", "--config"]);
    refused(&["run", "--config", directory.path().to_str().unwrap()], 1, &["cannot be read"]);
}

#[test]
fn status_says_by_its_exit_code_whether_the_node_forwards() {
    let status = |ready: bool, problems: &[&str]| json!({"node": "node-1", "ready": ready, "problems": problems});
    assert_eq!(answering(&status(true, &[])).asked_with(&["status"]).0, 0);
    let (exit, stdout, _) = answering(&status(true, &["host IPv4: no answer"])).asked_with(&["status"]);
    assert!(exit == 3 && stdout.contains("‼ host IPv4: no answer"), "{exit} {stdout}");
    assert_eq!(answering(&status(false, &[])).asked_with(&["status"]).0, 3);
    assert_eq!(answering(&status(true, &["host IPv4: no answer"])).asked_with(&["status", "--wait=5"]).0, 0);
    let (exit, _, stderr) = answering(&status(false, &[])).asked_with(&["status", "--wait=0"]);
    assert!(exit == 1 && stderr.contains("not ready after 0 s"), "{exit} {stderr}");
}

#[test]
fn tables_are_data_on_stdout_and_nothing_else() {
    let drops = json!({"schemaVersion": 1, "drops": [
        {"reason": "no_flow", "packets": 3, "help": "It is part of no flow."}, {"reason": "truncated", "packets": 0, "help": "It is cut off."}
    ]});
    let (exit, stdout, stderr) = answering(&drops).asked_with(&["drops"]);
    assert_eq!((exit, stdout.as_str(), stderr.as_str()), (0, "REASON    PACKETS   WHAT IT MEANS\nno_flow   3         It is part of no flow.\n", ""));
    assert_eq!(answering(&drops).asked_with(&["drops", "--all"]).1.lines().count(), 3);
    let (_, stdout, _) = answering(&drops).asked_with(&["drops", "-o", "json"]);
    assert_eq!(serde_json::from_str::<Value>(&stdout).unwrap(), drops);
    assert!(answering(&drops).asked_with(&["drops", "-o", "yaml"]).1.contains("reason: no_flow"));
    let (exit, stdout, stderr) = answering(&json!({"schemaVersion": 1, "peers": []})).asked_with(&["peers"]);
    assert_eq!((exit, stdout.lines().count(), stderr.as_str()), (0, 1, "No other nodes found.\n"));
}

#[test]
fn addresses_are_listed_with_their_age_and_on_request_with_the_ranges() {
    let ipam = json!({"schemaVersion": 1, "ipam": [
        {"address": "10.32.0.5", "owner": "default/web", "ifname": "eth0", "sandbox": "/run/netns/web", "since": 1, "ageSeconds": 11_520,
         "plugin": null, "pool": null, "mode": "veth"},
        {"address": "10.32.0.9", "owner": "vm", "ifname": "net1", "sandbox": "c0ffee", "since": 2, "ageSeconds": 300, "plugin": "host-local",
         "pool": "blue", "mode": "tun"},
    ], "pools": [
        {"pool": null, "cidr": "10.32.0.0/24", "gateway": "10.32.0.1", "capacity": 248, "used": 1, "reserved": 0, "excluded": 4},
        {"pool": "blue", "cidr": "10.32.0.8/30", "gateway": null, "capacity": 4, "used": 1, "reserved": 0, "excluded": 0},
    ]});
    let (exit, stdout, stderr) = answering(&ipam).asked_with(&["ipam"]);
    let table = "ADDRESS     OWNER         INTERFACE   AGE     PLUGIN       SANDBOX\n\
                 10.32.0.5   default/web   eth0        3h12m   -            /run/netns/web\n\
                 10.32.0.9   vm            net1        5m      host-local   c0ffee\n";
    assert_eq!((exit, stdout.as_str(), stderr.as_str()), (0, table, ""));
    let (_, stdout, _) = answering(&ipam).asked_with(&["ipam", "-o", "wide"]);
    let ranges = "POOL   RANGE          GATEWAY     CAPACITY   USED   RESERVED   EXCLUDED\n\
                  -      10.32.0.0/24   10.32.0.1   248        1      0          4\n\
                  blue   10.32.0.8/30   -           4          1      0          0\n";
    assert!(stdout.ends_with(&format!("\n\n{ranges}")) && stdout.contains("c0ffee           blue   tun\n"), "{stdout}");
    let (_, stdout, _) = answering(&ipam).asked_with(&["ipam", "-o", "json"]);
    assert_eq!(serde_json::from_str::<Value>(&stdout).unwrap(), ipam, "as the daemon says it");
}

#[test]
fn checking_addresses_says_by_its_exit_code_whether_anything_is_left() {
    let finding = |fixed: bool| {
        json!({"kind": "leaked", "address": "10.32.0.5", "owner": "default/web", "ifname": "eth0", "sandbox": "c0ffee", "fixed": fixed,
               "problem": "it is given out, but nothing of its owner is attached; --fix releases it"})
    };
    let findings = |list: &[Value]| json!({"schemaVersion": 1, "findings": list});
    let (exit, stdout, stderr) = answering(&findings(&[])).asked_with(&["ipam", "check"]);
    assert_eq!((exit, stdout.lines().count(), stderr.as_str()), (0, 1, "Addresses agree with what is attached.\n"));
    let (exit, stdout, stderr) = answering(&findings(&[finding(false)])).asked_with(&["ipam", "check"]);
    assert_eq!((exit, stderr.as_str()), (3, ""));
    assert!(stdout.contains("10.32.0.5   leaked   default/web   no      it is given out"), "{stdout}");
    assert_eq!(answering(&findings(&[finding(true)])).asked_with(&["ipam", "check", "--fix"]).0, 0);
    let both = findings(&[finding(true), finding(false)]);
    let (exit, stdout, _) = answering(&both).asked_with(&["ipam", "check", "--fix", "-o", "json"]);
    assert_eq!((exit, serde_json::from_str::<Value>(&stdout).unwrap()), (3, both));
    for (words, asked) in [(&["ipam", "check"][..], false), (&["ipam", "check", "--fix"], true)] {
        let daemon = answering(&findings(&[]));
        let output = podgate().arg("--socket").arg(&daemon.socket).args(words).output().unwrap();
        assert_eq!((ended(&output).0, daemon.asked.join().unwrap()), (0, json!({"ipamCheck": {"fix": asked}})));
    }
}

#[test]
fn released_addresses_are_printed_and_a_refusal_is_a_failure() {
    let daemon = answering(&json!({"schemaVersion": 1, "released": ["10.32.0.5", "fd00::5"]}));
    let output = podgate().arg("--socket").arg(&daemon.socket).args(["ipam", "release", "default/web"]).output().unwrap();
    assert_eq!(ended(&output), (0, "10.32.0.5\nfd00::5\n".to_owned(), String::new()));
    assert_eq!(daemon.asked.join().unwrap(), json!({"ipamRelease": {"what": "default/web"}}));
    let refusal = || format!("{}\n", json!({"error": {"code": 11, "message": "default/web (eth0, c0ffee) is attached"}}));
    let (exit, stdout, stderr) = self::daemon(refusal).asked_with(&["ipam", "release", "10.32.0.5"]);
    assert_eq!((exit, stdout.as_str()), (1, ""));
    assert!(stderr.contains("is attached"), "{stderr}");
}

#[test]
fn a_daemon_that_refuses_or_speaks_nonsense_is_a_failure_with_a_reason() {
    let refusal = || format!("{}\n", json!({"error": {"code": 11, "message": "this node has no pod range yet"}}));
    let (exit, stdout, stderr) = daemon(refusal).asked_with(&["attach", "--netns", "/proc/self/ns/net"]);
    assert_eq!((exit, stdout.as_str()), (1, ""));
    assert!(stderr.contains("this node has no pod range yet"), "{stderr}");
    let (exit, _, stderr) = daemon(|| "HTTP/1.1 400 Bad Request\r\n".into()).asked_with(&["flows"]);
    assert!(exit == 1 && stderr.contains("does not speak this protocol"), "{exit} {stderr}");
    let (exit, _, stderr) = daemon(String::new).asked_with(&["flows"]);
    assert!(exit == 1 && stderr.contains("did not answer"), "{exit} {stderr}");
}

#[test]
fn detaching_what_was_never_attached_is_said_and_is_no_failure() {
    let (exit, stdout, stderr) = answering(&json!({"detached": false})).asked_with(&["detach", "--netns", "/run/netns/nobody"]);
    assert_eq!((exit, stdout.as_str()), (0, ""));
    assert!(stderr.contains("nothing was attached as eth0 of /run/netns/nobody"), "{stderr}");
}

#[test]
fn a_reader_that_has_seen_enough_is_no_failure() {
    let rows: Vec<Value> = (0..100).map(|n| json!({"destination": format!("10.0.0.{n}"), "via": "pods", "detail": ""})).collect();
    for format in ["table", "json", "yaml"] {
        let (closed, wait) = std::sync::mpsc::channel();
        let line = format!("{}\n", json!({ "ok": {"schemaVersion": 1, "routes": rows} }));
        let daemon = daemon(move || {
            wait.recv().unwrap();
            line
        });
        let words = ["routes", "-o", format];
        let mut child = podgate().arg("--socket").arg(&daemon.socket).args(words).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        closed.send(()).unwrap();
        let (exit, _, stderr) = ended(&child.wait_with_output().unwrap());
        assert_eq!((exit, stderr.as_str()), (0, ""), "{format}");
        daemon.asked.join().unwrap();
    }
}

#[test]
fn a_full_disk_is_a_failure() {
    let Ok(full) = std::fs::File::options().write(true).open("/dev/full") else { return };
    let daemon = answering(&json!({"schemaVersion": 1, "peers": []}));
    let output = podgate().arg("--socket").arg(&daemon.socket).arg("peers").stdout(full).stderr(Stdio::piped()).output().unwrap();
    let (exit, _, stderr) = ended(&output);
    assert!(exit == 1 && stderr.contains("cannot write to stdout"), "{exit} {stderr}");
}

#[test]
fn a_configuration_is_checked_without_anything_being_done() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("podgate.yaml");
    let path = file.to_str().unwrap();
    std::fs::write(&file, "source: {directory: /etc/podgate/cluster.d}\n").unwrap();
    // What a pod's environment says of its node is as good as the file's word.
    refused(&["config", "check", "--config", path], 1, &["underlay: says neither address nor interface"]);
    let (exit, stdout, stderr) = podgate_with(&["config", "check", "--config", path, "--node", "worker-7", "--underlay", "192.0.2.7,2001:db8::7"]);
    assert_eq!((exit, stdout.as_str()), (0, ""), "{stderr}");
    assert!(stderr.contains("right, for node worker-7 with directory as its source"), "{stderr}");
    let output = podgate().args(["config", "check", "--config", path]).env("PODGATE_UNDERLAY", "192.0.2.7,192.0.2.8").output().unwrap();
    let (exit, _, stderr) = ended(&output);
    assert!(exit == 1 && stderr.contains("has 2 IPv4 and 0 IPv6 addresses"), "{stderr}");
    std::fs::write(&file, "underlay: {address: 192.0.2.1}\nsorce: {directory: /etc}\n").unwrap();
    refused(&["config", "check", "--config", path], 1, &[":2:1: unknown key `sorce`; did you mean `source`?"]);
}

#[test]
fn the_version_is_told_to_people_and_to_programs() {
    let (exit, stdout, _) = podgate_with(&["version"]);
    assert_eq!((exit, stdout.split_whitespace().next()), (0, Some("podgate")));
    let (exit, stdout, _) = podgate_with(&["version", "-o", "json"]);
    let value: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!((exit, &value["version"], &value["schemaVersion"]), (0, &json!(env!("CARGO_PKG_VERSION")), &json!(1)));
    let (_, stdout, _) = podgate_with(&["version", "-o", "yaml"]);
    assert!(stdout.contains("schemaVersion: 1"), "{stdout}");
}

#[test]
fn completions_and_manual_pages_know_every_command() {
    for shell in ["bash", "zsh", "fish"] {
        let (exit, stdout, stderr) = podgate_with(&["completions", shell]);
        assert!(exit == 0 && stdout.contains("install-cni") && stdout.contains("log-level"), "{shell}: {stderr}");
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("man1");
    let (exit, ..) = podgate_with(&["man", "--dir", path.to_str().unwrap()]);
    assert_eq!(exit, 0);
    let page = std::fs::read_to_string(path.join("podgate-run.1")).unwrap();
    assert!(page.contains("take\\-over") && path.join("podgate-config-check.1").exists(), "{page}");
    let (exit, stdout, _) = podgate_with(&["man"]);
    assert!(exit == 0 && stdout.contains(".TH podgate 1"), "{stdout}");
}
