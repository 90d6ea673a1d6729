//! A daemon that is down, slow, ends in the middle or is another program: how long is waited, what is asked again, what is left behind.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::time::Duration;

use podgate_cni::{Attachment, Request};
use serde_json::{Value, json};

use crate::peer::{Peer, Step, attached};
use crate::shim::Shim;
use crate::table::c1;

/// What is noted for the daemon, by file name.
fn notes(peer: &Peer) -> Vec<(String, Attachment)> {
    let Ok(entries) = std::fs::read_dir(peer.notes()) else { return Vec::new() };
    let note = |path: std::path::PathBuf| serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    entries.map(|entry| entry.unwrap()).map(|entry| (entry.file_name().into_string().unwrap(), note(entry.path()))).collect()
}

#[test]
fn add_with_the_daemon_down_waits_a_few_seconds_and_says_try_again() {
    let peer = Peer::down();
    let outcome = Shim::new("ADD", "1.0.0", &peer, Value::Null).run();
    outcome.failed("1.0.0", 11, "nobody listens at");
    assert!(outcome.took > Duration::from_secs(3) && outcome.took < Duration::from_secs(10), "{:?}", outcome.took);
    assert!(!peer.notes().exists(), "nothing was asked, so nothing is to be taken back");
}

#[test]
fn add_waits_for_a_daemon_that_is_starting() {
    let peer = Peer::down();
    let shim = Shim::new("ADD", "1.0.0", &peer, Value::Null);
    let call = std::thread::spawn(move || shim.run());
    // The plugin may be here first or not: it asks until somebody listens.
    let listener = UnixListener::bind(&peer.socket).unwrap();
    let (stream, _) = listener.accept().unwrap();
    drop(stream);
    drop(listener);
    std::fs::remove_file(&peer.socket).unwrap();
    let listener = UnixListener::bind(&peer.socket).unwrap();
    let (mut stream, _) = listener.accept().unwrap();
    std::io::Write::write_all(&mut stream, b"{\"error\":{\"code\":50,\"message\":\"started\"}}\n").unwrap();
    // Hanging up with its request unread would take the answer away.
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    call.join().unwrap().failed("1.0.0", 50, "started");
}

#[test]
fn a_broken_connection_is_asked_again_with_the_same_attempt() {
    for broken in [Step::HangUp, Step::Close, Step::Bytes("{\"ok\":{\"interf")] {
        let mut peer = Peer::with([broken, Step::HangUp, attached()]);
        assert!(Shim::new("ADD", "1.0.0", &peer, Value::Null).run().success);
        let requests = peer.requests();
        assert!(requests.len() >= 2);
        assert!(requests.iter().all(|request| *request == requests[0]), "{requests:?}");
    }
}

#[test]
fn attempts_of_different_calls_differ() {
    let mut peer = Peer::with([attached(), attached()]);
    let shim = Shim::new("ADD", "1.0.0", &peer, Value::Null);
    assert!(shim.run().success && shim.run().success);
    let requests = peer.requests();
    assert_ne!(requests[0], requests[1]);
}

#[test]
fn add_that_is_not_answered_in_time_is_taken_back() {
    for slow in [Step::Silence, Step::Stall] {
        let mut peer = Peer::with([slow, Step::Ok(json!({"detached": true}))]);
        let outcome = Shim::new("ADD", "1.0.0", &peer, json!({"timeoutSeconds": 4})).run();
        outcome.failed("1.0.0", 11, "did not answer");
        assert!(outcome.took < Duration::from_secs(6), "{:?}", outcome.took);
        let requests = peer.requests();
        assert!(matches!(&requests[..], [Request::Attach(_), Request::Detach(attachment)] if *attachment == c1()), "{requests:?}");
        assert!(!peer.notes().exists());
    }
}

#[test]
fn add_whose_daemon_ended_in_the_middle_leaves_a_note() {
    let mut peer = Peer::with([Step::Bytes("{\"ok\":{}}\n"), Step::Silence]);
    let outcome = Shim::new("ADD", "1.0.0", &peer, json!({"timeoutSeconds": 1})).run();
    outcome.failed("1.0.0", 6, "not a result");
    assert_eq!(notes(&peer), [("c1:eth0.json".into(), c1())]);
    assert!(matches!(&peer.requests()[..], [Request::Attach(_), Request::Detach(_)]));
}

#[test]
fn an_answer_of_another_protocol_is_told_as_such() {
    for command in ["ADD", "CHECK", "GC"] {
        let previous = json!({"interfaces": [{"name": "eth0", "sandbox": "/ns"}]});
        let peer = Peer::with([Step::Bytes("HTTP/1.1 400 Bad Request\n"), Step::Ok(json!({}))]);
        let config = json!({"prevResult": previous, "cni.dev/valid-attachments": []});
        Shim::new(command, "1.1.0", &peer, config).run().failed("1.1.0", 6, "protocol");
    }
}

#[test]
fn status_tells_a_daemon_that_is_down_from_one_that_is_not_ready() {
    let outcome = Shim::new("STATUS", "1.1.0", &Peer::down(), Value::Null).run();
    outcome.failed("1.1.0", 51, "nobody listens at");
    assert!(outcome.took < Duration::from_secs(3), "{:?}", outcome.took);
    let silent = Peer::with([Step::Silence]);
    Shim::new("STATUS", "1.1.0", &silent, json!({"timeoutSeconds": 1})).run().failed("1.1.0", 51, "did not answer");
    let other = Peer::with([Step::Bytes("hello\n")]);
    Shim::new("STATUS", "1.1.0", &other, Value::Null).run().failed("1.1.0", 50, "protocol");
    let not_ready = Peer::with([Step::Error(50, "no snapshot yet")]);
    Shim::new("STATUS", "1.1.0", &not_ready, Value::Null).run().failed("1.1.0", 50, "no snapshot yet");
}

#[test]
fn check_and_gc_with_the_daemon_down_say_try_again() {
    for command in ["CHECK", "GC"] {
        let previous = json!({"interfaces": [{"name": "eth0", "sandbox": "/ns"}]});
        let config = json!({"prevResult": previous, "cni.dev/valid-attachments": [], "timeoutSeconds": 1});
        Shim::new(command, "1.1.0", &Peer::down(), config).run().failed("1.1.0", 11, "nobody listens at");
    }
}

#[test]
fn del_succeeds_with_the_namespace_gone_without_a_result_and_twice() {
    let mut peer = Peer::with([Step::Ok(json!({"detached": true})), Step::Ok(json!({"detached": false})), Step::Ok(json!({"detached": false}))]);
    let shim = Shim::new("DEL", "1.0.0", &peer, Value::Null);
    shim.clone().set("CNI_NETNS", "/nonexistent/ns").run().silent();
    shim.clone().set("CNI_NETNS", "").run().silent();
    shim.unset("CNI_NETNS").unset("CNI_PATH").run().silent();
    assert_eq!(peer.requests(), [Request::Detach(c1()), Request::Detach(c1()), Request::Detach(c1())]);
}

#[test]
fn del_with_the_daemon_down_leaves_a_private_note() {
    let peer = Peer::down();
    let shim = Shim::new("DEL", "1.0.0", &peer, Value::Null).set("CNI_ARGS", "K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0");
    let outcome = shim.run();
    outcome.silent();
    assert!(outcome.took < Duration::from_secs(3), "{:?}", outcome.took);
    shim.run().silent();
    let named = Attachment { name: Some("default/web-0".into()), ..c1() };
    assert_eq!(notes(&peer), [("c1:eth0.json".into(), named)]);
    let mode = |path: std::path::PathBuf| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(peer.notes()), mode(peer.notes().join("c1:eth0.json"))), (0o700, 0o600));
}

#[test]
fn del_that_is_not_answered_leaves_a_note_and_the_next_add_carries_it_out() {
    let silent = Peer::with([Step::Silence]);
    Shim::new("DEL", "1.0.0", &silent, json!({"timeoutSeconds": 1})).run().silent();
    assert_eq!(notes(&silent).len(), 1);
    drop(silent);

    let mut peer = Peer::with([Step::Ok(json!({"detached": true})), attached()]);
    std::fs::create_dir(peer.notes()).unwrap();
    std::fs::write(peer.notes().join("c1:eth0.json"), serde_json::to_vec(&c1()).unwrap()).unwrap();
    assert!(Shim::new("ADD", "1.0.0", &peer, Value::Null).run().success);
    assert_eq!(notes(&peer), []);
    let requests = peer.requests();
    assert!(matches!(&requests[..], [Request::Detach(attachment), Request::Attach(_)] if *attachment == c1()), "{requests:?}");
}

#[test]
fn a_note_that_a_starting_daemon_may_have_missed_is_asked_for_as_well() {
    let mut peer = Peer::with([Step::HangUpUntilNoted]);
    Shim::new("DEL", "1.0.0", &peer, Value::Null).run().silent();
    assert_eq!(notes(&peer), []);
    assert!(peer.requests().len() >= 2);
}

#[test]
fn del_that_the_daemon_answers_takes_an_older_note_away() {
    let peer = Peer::with([Step::Ok(json!({"detached": true}))]);
    std::fs::create_dir(peer.notes()).unwrap();
    std::fs::write(peer.notes().join("c1:eth0.json"), "{}").unwrap();
    Shim::new("DEL", "1.0.0", &peer, Value::Null).run().silent();
    assert!(!peer.notes().join("c1:eth0.json").exists());
}

#[test]
fn del_succeeds_where_no_note_can_be_left_and_says_so() {
    let peer = Peer::down();
    std::fs::write(peer.notes(), "not a directory").unwrap();
    let outcome = Shim::new("DEL", "1.0.0", &peer, Value::Null).run();
    outcome.silent();
    assert!(outcome.stderr.contains("nor can a note be left at"), "{outcome:?}");
    // And where not even the directory of the socket can be made.
    let socket = peer.notes().join("podgate.sock");
    Shim::new("DEL", "1.0.0", &peer, json!({"socket": socket})).run().silent();
}

#[test]
fn a_configuration_that_never_ends_is_not_waited_for_for_ever() {
    let (reader, writer) = std::io::pipe().unwrap();
    let mut program = std::process::Command::new(env!("CARGO_BIN_EXE_podgate-cni"));
    let start = std::time::Instant::now();
    let output = program.env("CNI_COMMAND", "STATUS").stdin(reader).output().unwrap();
    assert!(start.elapsed() < Duration::from_secs(10));
    assert_eq!(serde_json::from_slice::<Value>(&output.stdout).unwrap()["code"], 5);
    drop(writer);
}
