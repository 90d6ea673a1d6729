//! Addresses from other plugins: little ones made here, and those of containernetworking-plugins where they are installed.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use podgate_cni::Request;
use podgate_cni::protocol::{Addresses, Given};
use podgate_cni::result::{Ip, Route};
use serde_json::{Value, json};

use crate::peer::{Peer, Step, attached};
use crate::shim::Shim;
use crate::table::c1;

/// A plugin `name` in `peer`'s directory, which writes down each command and the configuration that it gets, and does `script` with
/// `$CNI_COMMAND`.
fn plugin(peer: &Peer, name: &str, script: &str) -> PathBuf {
    let directory = peer.directory().join("bin");
    std::fs::create_dir_all(&directory).unwrap();
    let path = directory.join(name);
    let log = log_of(&directory, name);
    let text = format!(
        "#!/bin/sh\nPATH=/usr/bin:/bin\necho $CNI_COMMAND $CNI_CONTAINERID $CNI_IFNAME $CNI_NETNS >>{0}\ncat >{0}.stdin\n{script}\n",
        log.display()
    );
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    directory
}

fn log_of(directory: &Path, name: &str) -> PathBuf {
    directory.join(format!("{name}.log"))
}

/// The commands that the plugin was run with.
fn commands(directory: &Path, name: &str) -> Vec<String> {
    let log = std::fs::read_to_string(log_of(directory, name)).unwrap_or_default();
    log.lines().map(|line| line.split(' ').next().unwrap().to_owned()).collect()
}

/// Gives an address to ADD, and succeeds with everything else.
const GIVES: &str = r#"[ $CNI_COMMAND = ADD ] && echo '{"cniVersion": "0.4.0", "ips": [{"version": "4", "address": "10.244.1.77/24", "gateway": "10.244.1.1"}], "routes": [{"dst": "192.0.2.0/24"}], "dns": {"nameservers": ["10.96.0.10"]}}'
exit 0"#;

/// What [`GIVES`] gives.
fn given(plugin: &str) -> Given {
    Given {
        plugin: plugin.into(),
        ips: vec![Ip { address: "10.244.1.77/24".into(), gateway: Some("10.244.1.1".parse().unwrap()), interface: None }],
        routes: vec![Route { dst: "192.0.2.0/24".into(), ..Route::default() }],
    }
}

fn add(peer: &Peer, name: &str, directory: &Path) -> Shim {
    Shim::new("ADD", "1.0.0", peer, json!({"ipam": {"type": name}, "timeoutSeconds": 4})).path(directory)
}

#[track_caller]
fn addresses(request: &Request) -> &Addresses {
    match request {
        Request::Attach(request) => &request.addresses,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_given_address_is_attached_and_the_plugin_sees_the_whole_call() {
    let mut peer = Peer::with([attached()]);
    let directory = plugin(&peer, "giver", GIVES);
    let config = json!({"cniVersion": "1.0.0", "name": "podgate", "socket": peer.socket, "ipam": {"type": "giver", "own": [1, 2]}, "other": "kept"});
    let stdin = format!(" {config}\n");
    let outcome = add(&peer, "giver", &directory).stdin(stdin.clone()).run();
    assert_eq!(outcome.json["dns"], json!({"nameservers": ["10.96.0.10"]}), "{outcome:?}");
    assert_eq!(addresses(&peer.requests()[0]), &Addresses::Given(given("giver")));
    assert_eq!(std::fs::read_to_string(log_of(&directory, "giver")).unwrap(), "ADD c1 eth0 /proc/self/ns/net\n");
    assert_eq!(std::fs::read_to_string(directory.join("giver.log.stdin")).unwrap(), stdin, "byte for byte");
}

#[test]
fn a_given_address_goes_back_when_the_daemon_refuses() {
    let refused = [Step::Error(7, "10.244.1.77 is outside the node's ranges"), Step::Error(100, "not attached")];
    let mut peer = Peer::with(refused);
    let directory = plugin(&peer, "giver", GIVES);
    add(&peer, "giver", &directory).run().failed("1.0.0", 7, "outside the node's ranges");
    assert_eq!(commands(&directory, "giver"), ["ADD", "DEL"]);
    assert!(matches!(&peer.requests()[..], [Request::Attach(_), Request::Check { .. }]));
}

#[test]
fn a_given_address_goes_back_when_the_daemon_is_down_or_silent() {
    let peer = Peer::down();
    let directory = plugin(&peer, "giver", GIVES);
    add(&peer, "giver", &directory).run().failed("1.0.0", 11, "nobody listens");
    assert_eq!(commands(&directory, "giver"), ["ADD", "DEL"]);

    let mut peer = Peer::with([Step::Silence, Step::Ok(json!({"detached": true})), Step::Error(100, "not attached")]);
    let directory = plugin(&peer, "giver", GIVES);
    add(&peer, "giver", &directory).run().failed("1.0.0", 11, "did not answer");
    assert_eq!(commands(&directory, "giver"), ["ADD", "DEL"]);
    assert!(matches!(&peer.requests()[..], [Request::Attach(_), Request::Detach(_), Request::Check { .. }]));
}

#[test]
fn a_second_add_of_one_interface_does_not_give_the_first_ones_address_back() {
    let peer = Peer::with([Step::Error(7, "eth0 is attached already"), Step::Ok(json!({}))]);
    let directory = plugin(&peer, "giver", GIVES);
    let outcome = add(&peer, "giver", &directory).run();
    outcome.failed("1.0.0", 7, "attached already");
    assert!(outcome.stderr.contains("its addresses are kept"), "{outcome:?}");
    assert_eq!(commands(&directory, "giver"), ["ADD"]);
}

#[test]
fn a_plugins_error_is_passed_on_with_its_code_and_text() {
    let peer = Peer::with([Step::Error(100, "not attached"), Step::Error(100, "not attached"), Step::Error(100, "not attached")]);
    for (script, code, words) in [
        (r#"echo '{"code": 11, "msg": "pool is full", "details": "of blue"}'; exit 1"#, 11, "pool is full | of blue"),
        (r#"echo '{"cniVersion": "1.0.0", "code": 137, "msg": "no lease"}'; exit 3"#, 137, "no lease | ADD of the IPAM plugin"),
        ("echo Segmentation fault; exit 139", 101, "failed without a reason"),
    ] {
        let directory = plugin(&peer, "giver", &format!("[ $CNI_COMMAND = DEL ] && exit 0\n{script}"));
        let _ = std::fs::remove_file(log_of(&directory, "giver"));
        add(&peer, "giver", &directory).run().failed("1.0.0", code, words);
        assert_eq!(commands(&directory, "giver"), ["ADD", "DEL"]);
    }
}

#[test]
fn a_plugin_that_gives_nonsense_is_told_to_take_it_back() {
    let peer = Peer::with((0..7).map(|_| Step::Error(100, "not attached")));
    for result in [
        "",
        "[]",
        "{}",
        r#"{"ips": []}"#,
        r#"{"ips": [{"address": "10.244.1.7"}]}"#,
        r#"{"ips": [{"address": "10.244.1.7/24", "gateway": 1}]}"#,
        r#"{"ips": [{"address": "10.244.1.7/24"}], "routes": [{"dst": "everywhere"}]}"#,
    ] {
        let directory = plugin(&peer, "giver", &format!("[ $CNI_COMMAND = DEL ] || echo '{result}'"));
        let _ = std::fs::remove_file(log_of(&directory, "giver"));
        add(&peer, "giver", &directory).run().failed("1.0.0", 6, "IPAM plugin");
        assert_eq!(commands(&directory, "giver"), ["ADD", "DEL"], "{result}");
    }
}

#[test]
fn a_plugin_that_says_too_much_or_nothing_is_ended() {
    let peer = Peer::with([Step::Error(100, "not attached"), Step::Error(100, "not attached")]);
    for (script, words) in [("exec cat /dev/zero", "longer than"), ("exec sleep 600", "timed out")] {
        let directory = plugin(&peer, "giver", &format!("[ $CNI_COMMAND = DEL ] && exit 0\necho $$ >{}/pid\n{script}", peer.directory().display()));
        let outcome = add(&peer, "giver", &directory).run();
        outcome.failed("1.0.0", 5, words);
        assert!(outcome.took.as_secs() < 10);
        let pid = std::fs::read_to_string(peer.directory().join("pid")).unwrap();
        assert!(!Path::new("/proc").join(pid.trim()).exists(), "it has been waited for");
    }
}

#[test]
fn a_plugin_that_is_not_there_fails_an_add_and_nothing_else() {
    let mut peer = Peer::with([Step::Ok(json!({"detached": true})), Step::Ok(json!({})), Step::Ok(json!({})), Step::Ok(json!({}))]);
    let previous = json!({"interfaces": [{"name": "eth0", "sandbox": "/ns"}]});
    let config = json!({"ipam": {"type": "no-such"}, "prevResult": previous, "cni.dev/valid-attachments": []});
    let shim = |command: &str| Shim::new(command, "1.1.0", &peer, config.clone());
    let outcome = shim("ADD").run();
    outcome.failed("1.1.0", 7, "no-such");
    outcome.failed("1.1.0", 7, "/nonexistent:/opt/none");
    for command in ["DEL", "CHECK", "GC"] {
        let outcome = shim(command).run();
        outcome.silent();
        assert!(outcome.stderr.contains("no-such"), "{outcome:?}");
    }
    // An ADD would fail, and STATUS is asked whether it would.
    shim("STATUS").run().failed("1.1.0", 50, "no-such");
    assert_eq!(peer.requests().len(), 4);
}

#[test]
fn this_plugin_does_not_delegate_to_itself() {
    let peer = Peer::with([]);
    let directory = peer.directory().join("bin");
    std::fs::create_dir(&directory).unwrap();
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_podgate-cni"), directory.join("again")).unwrap();
    add(&peer, "again", &directory).run().failed("1.0.0", 7, "this plugin itself");
}

#[test]
fn del_check_gc_and_status_reach_the_plugin_after_the_daemon() {
    let previous = json!({"interfaces": [{"name": "eth0", "sandbox": "/ns"}]});
    for command in ["DEL", "CHECK", "GC", "STATUS"] {
        let config = json!({"ipam": {"type": "giver"}, "prevResult": previous, "cni.dev/valid-attachments": []});
        let run = |step: Step, script: &str| {
            let peer = Peer::with([step]);
            let directory = plugin(&peer, "giver", script);
            let outcome = Shim::new(command, "1.1.0", &peer, config.clone()).path(&directory).run();
            (outcome, commands(&directory, "giver"))
        };
        let failing = r#"echo '{"code": 99, "msg": "store is locked"}'; exit 1"#;
        let (outcome, commands) = run(Step::Ok(json!({})), GIVES);
        outcome.silent();
        assert_eq!(commands, [command]);
        run(Step::Ok(json!({})), failing).0.failed("1.1.0", 99, "store is locked");
        let (outcome, commands) = run(Step::Error(5, "a veth is stuck"), failing);
        if command == "GC" {
            outcome.failed("1.1.0", 5, "a veth is stuck; store is locked");
        } else {
            // The address of an interface that stands is not given back.
            outcome.failed("1.1.0", 5, "a veth is stuck | the daemon at");
            assert_eq!(commands, [] as [&str; 0]);
        }
    }
}

#[test]
fn gc_and_status_pass_over_a_plugin_that_does_not_know_them() {
    for unknown in [
        r#"echo '{"code": 4, "msg": "unknown CNI_COMMAND: '$CNI_COMMAND'"}'; exit 1"#,
        r#"echo '{"code": 1, "msg": "config version does not allow '$CNI_COMMAND'"}'; exit 1"#,
    ] {
        for command in ["GC", "STATUS"] {
            let peer = Peer::with([Step::Ok(json!({}))]);
            let directory = plugin(&peer, "giver", unknown);
            let config = json!({"ipam": {"type": "giver"}, "cni.dev/valid-attachments": []});
            Shim::new(command, "1.1.0", &peer, config).path(&directory).run().silent();
        }
    }
}

#[test]
fn del_with_the_daemon_down_gives_the_address_back_too() {
    let peer = Peer::down();
    let directory = plugin(&peer, "giver", GIVES);
    Shim::new("DEL", "1.0.0", &peer, json!({"ipam": {"type": "giver"}})).path(&directory).unset("CNI_NETNS").run().silent();
    assert_eq!(commands(&directory, "giver"), ["DEL"]);
    assert!(peer.notes().join("c1:eth0.json").exists());
}

#[test]
fn dhcp_gets_its_address_through_the_interface_that_is_there_first() {
    let mut peer = Peer::with([attached(), attached()]);
    let directory = plugin(&peer, "dhcp", GIVES);
    let outcome = add(&peer, "dhcp", &directory).run();
    assert_eq!(outcome.json["ips"][0]["address"], "10.244.1.5/32", "{outcome:?}");
    let asked = peer.asked();
    assert_eq!(addresses(&asked[0].request), &Addresses::Later);
    assert_eq!(asked[1].request, Request::Assign { attachment: c1(), given: given("dhcp") });
    assert!(asked.iter().all(|asked| asked.namespaces.len() == 1));
    assert_eq!(commands(&directory, "dhcp"), ["ADD"]);
}

#[test]
fn dhcp_without_a_lease_undoes_both() {
    let detached = || Step::Ok(json!({"detached": true}));
    let mut peer = Peer::with([attached(), detached(), Step::Error(100, "not attached")]);
    let directory = plugin(&peer, "dhcp", r#"[ $CNI_COMMAND = DEL ] && exit 0; echo '{"code": 11, "msg": "no more tries"}'; exit 1"#);
    add(&peer, "dhcp", &directory).run().failed("1.0.0", 11, "no more tries");
    assert_eq!(commands(&directory, "dhcp"), ["ADD", "DEL"]);
    assert!(matches!(&peer.requests()[..], [Request::Attach(_), Request::Detach(_), Request::Check { .. }]));

    let mut peer = Peer::with([attached(), Step::Error(7, "outside"), detached(), Step::Error(100, "not attached")]);
    let directory = plugin(&peer, "dhcp", GIVES);
    add(&peer, "dhcp", &directory).run().failed("1.0.0", 7, "outside");
    assert_eq!(commands(&directory, "dhcp"), ["ADD", "DEL"]);
    assert!(matches!(&peer.requests()[..], [Request::Attach(_), Request::Assign { .. }, Request::Detach(_), Request::Check { .. }]));

    // Refused before there was an interface: nothing to undo.
    let peer = Peer::with([Step::Error(7, "eth0 is attached already")]);
    let directory = plugin(&peer, "dhcp", GIVES);
    add(&peer, "dhcp", &directory).run().failed("1.0.0", 7, "attached already");
    assert_eq!(commands(&directory, "dhcp"), [] as [&str; 0]);
}

/// Where Debian's containernetworking-plugins are; none, with the reason told, if they are not installed.
fn installed(name: &str) -> Option<&'static Path> {
    let directory = Path::new("/usr/lib/cni");
    if directory.join(name).is_file() {
        return Some(directory);
    }
    eprintln!("skipped: no {name} in {} (package containernetworking-plugins)", directory.display());
    None
}

#[test]
fn host_local_of_the_reference_plugins_gives_and_takes_back() {
    let Some(directory) = installed("host-local") else { return };
    let mut peer = Peer::with([attached(), Step::Error(7, "no"), Step::Error(100, "not attached"), Step::Ok(json!({})), Step::Ok(json!({}))]);
    let store = peer.directory().join("store");
    let ipam = json!({"type": "host-local", "dataDir": store, "ranges": [[{"subnet": "10.244.1.0/29"}]], "routes": [{"dst": "0.0.0.0/0"}]});
    let held = || {
        std::fs::read_dir(store.join("podgate"))
            .unwrap()
            .filter(|file| file.as_ref().unwrap().file_name().to_str().unwrap().starts_with("10."))
            .count()
    };
    let config: Value = json!({"ipam": ipam, "prevResult": {"interfaces": [{"name": "eth0", "sandbox": "/ns"}], "ips": [{"address": "10.244.1.2/29", "interface": 0}]}});
    let shim = |command: &str, container: &str| Shim::new(command, "1.0.0", &peer, config.clone()).path(directory).set("CNI_CONTAINERID", container);
    assert!(shim("ADD", "c1").run().success);
    assert_eq!(held(), 1);
    shim("ADD", "c2").run().failed("1.0.0", 7, "no");
    assert_eq!(held(), 1, "what c2 was given has gone back");
    shim("CHECK", "c1").run().silent();
    shim("DEL", "c1").run().silent();
    assert_eq!(held(), 0);
    let Addresses::Given(given) = addresses(&peer.requests()[0]).clone() else { panic!("not given") };
    assert_eq!((given.plugin.as_str(), given.ips[0].address.as_str()), ("host-local", "10.244.1.2/29"));
    assert_eq!(given.ips[0].gateway, Some("10.244.1.1".parse().unwrap()));
    assert_eq!(given.routes[0].dst, "0.0.0.0/0");
}

#[test]
fn static_of_the_reference_plugins_gives_what_it_is_told() {
    let Some(directory) = installed("static") else { return };
    let mut peer = Peer::with([attached()]);
    let ipam = json!({"type": "static", "addresses": [{"address": "10.244.1.9/24", "gateway": "10.244.1.1"}, {"address": "fd00::9/64"}]});
    let outcome = Shim::new("ADD", "0.4.0", &peer, json!({"ipam": ipam, "dns": {"domain": "ours"}})).path(directory).run();
    assert_eq!(outcome.json["dns"], json!({"domain": "ours"}), "{outcome:?}");
    let Addresses::Given(given) = addresses(&peer.requests()[0]).clone() else { panic!("not given") };
    assert_eq!(given.ips.iter().map(|ip| ip.address.as_str()).collect::<Vec<_>>(), ["10.244.1.9/24", "fd00::9/64"]);
}
