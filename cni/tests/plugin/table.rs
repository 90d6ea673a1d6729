//! Every command in every version: what succeeds, what is asked of the daemon for it, and what is printed, key by key.

use podgate_cni::protocol::Valid;
use podgate_cni::{Attachment, Request};
use serde_json::{Value, json};

use crate::peer::{Peer, Step, attached};
use crate::shim::{Shim, VERSIONS};

/// The attachment of a call of [`Shim::new`].
pub fn c1() -> Attachment {
    Attachment { sandbox: "c1".into(), ifname: "eth0".into(), name: None, network: Some("podgate".into()) }
}

/// The result of an ADD that was answered with [`attached`].
fn result(version: &str) -> Value {
    let (mut interfaces, mut ips, mut routes) = (
        json!([{"name": "veth1", "mac": "02:00:00:00:00:01"}, {"name": "eth0", "mac": "02:00:00:00:00:02", "sandbox": "/proc/self/ns/net"}]),
        json!([{"address": "10.244.1.5/32", "gateway": "10.244.1.1", "interface": 1}, {"address": "fd00::5/128", "interface": 1}]),
        json!([{"dst": "0.0.0.0/0", "gw": "10.244.1.1"}]),
    );
    match version {
        "1.1.0" => {
            interfaces[0]["mtu"] = 1450.into();
            interfaces[1]["mtu"] = 1450.into();
            routes[0]["mtu"] = 1400.into();
            routes[0]["scope"] = 0.into();
        }
        "1.0.0" => {}
        _ => {
            ips[0]["version"] = "4".into();
            ips[1]["version"] = "6".into();
        }
    }
    json!({"cniVersion": version, "interfaces": interfaces, "ips": ips, "routes": routes, "dns": {}})
}

#[test]
fn add_prints_the_result_of_each_version() {
    let netns = std::fs::metadata("/proc/self/ns/net").map(|file| std::os::unix::fs::MetadataExt::ino(&file)).unwrap();
    for version in VERSIONS {
        let mut peer = Peer::with([attached()]);
        Shim::new("ADD", version, &peer, Value::Null).run().printed(&result(version));
        let asked = peer.asked();
        let [asked] = asked.as_slice() else { panic!("{asked:?}") };
        let Request::Attach(request) = &asked.request else { panic!("{asked:?}") };
        assert_eq!(request.attachment, c1());
        assert_eq!(asked.namespaces, [netns], "the namespace goes with the request");
        assert_eq!(request.netns, "/proc/self/ns/net");
        assert_ne!(request.attempt, 0);
    }
}

#[test]
fn del_is_silent_in_each_version() {
    for version in VERSIONS {
        for detached in [true, false] {
            let mut peer = Peer::with([Step::Ok(json!({"detached": detached}))]);
            Shim::new("DEL", version, &peer, json!({"prevResult": result(version)})).run().silent();
            assert_eq!(peer.requests(), [Request::Detach(c1())]);
        }
    }
}

#[test]
fn check_compares_the_addresses_of_our_interface_in_each_version_that_has_it() {
    for version in VERSIONS {
        let mut peer = Peer::with([Step::Ok(json!({}))]);
        let mut previous = result(version);
        previous["interfaces"].as_array_mut().unwrap().push(json!({"name": "net1", "sandbox": "/proc/self/ns/net"}));
        previous["ips"].as_array_mut().unwrap().push(json!({"version": "4", "address": "192.0.2.1/24", "interface": 2}));
        let outcome = Shim::new("CHECK", version, &peer, json!({"prevResult": previous})).run();
        if version == "0.3.1" {
            outcome.failed(version, 1, "does not allow CHECK");
            assert_eq!(peer.requests(), []);
        } else {
            outcome.silent();
            let addresses = vec!["10.244.1.5/32".into(), "fd00::5/128".into()];
            assert_eq!(peer.requests(), [Request::Check { attachment: c1(), addresses }]);
        }
    }
}

#[test]
fn gc_names_the_attachments_that_stay_in_each_version_that_has_it() {
    let named = json!([{"containerID": "c1", "ifname": "eth0"}, {"containerID": "c2", "ifname": "net1"}]);
    let of = |sandbox: &str, ifname: &str| Valid { sandbox: sandbox.into(), ifname: ifname.into() };
    for (key, list, valid) in [
        ("cni.dev/valid-attachments", named.clone(), vec![of("c1", "eth0"), of("c2", "net1")]),
        ("cni.dev/attachments", named, vec![of("c1", "eth0"), of("c2", "net1")]),
        ("cni.dev/valid-attachments", json!([]), vec![]),
        ("cni.dev/valid-attachments", Value::Null, vec![]),
    ] {
        for version in VERSIONS {
            let mut peer = Peer::with([Step::Ok(json!({"collected": []}))]);
            let outcome = Shim::new("GC", version, &peer, json!({key: list})).run();
            if version == "1.1.0" {
                outcome.silent();
                assert_eq!(peer.requests(), [Request::Collect { network: "podgate".into(), valid: valid.clone() }]);
            } else {
                outcome.failed(version, 1, "does not allow GC");
                assert_eq!(peer.requests(), []);
            }
        }
    }
}

#[test]
fn status_is_silent_in_each_version_that_has_it() {
    for version in VERSIONS {
        let mut peer = Peer::with([Step::Ok(json!({}))]);
        let outcome = Shim::new("STATUS", version, &peer, Value::Null).unset("CNI_PATH").run();
        if version == "1.1.0" {
            outcome.silent();
            assert_eq!(peer.requests(), [Request::Ready]);
        } else {
            outcome.failed(version, 1, "does not allow STATUS");
            assert_eq!(peer.requests(), []);
        }
    }
}

#[test]
fn version_says_what_is_spoken_in_the_version_of_the_question() {
    let peer = Peer::down();
    let shim = Shim::new("VERSION", "1.0.0", &peer, Value::Null).unset("CNI_PATH");
    for version in ["0.1.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0", "2.0.0"] {
        let question = json!({"cniVersion": version}).to_string();
        shim.clone().stdin(question).run().printed(&json!({"cniVersion": version, "supportedVersions": VERSIONS}));
    }
    for question in ["", "\n", "{}", "null"] {
        shim.clone().stdin(question).run().printed(&json!({"cniVersion": "1.1.0", "supportedVersions": VERSIONS}));
    }
    shim.clone().stdin("{").run().failed("1.1.0", 6, "not JSON");
    shim.stdin("{\"cniVersion\": 1}").run().failed("1.1.0", 7, "cniVersion");
}

#[test]
fn what_the_daemon_refuses_is_told_with_its_code_in_each_version() {
    for version in VERSIONS {
        for (command, since) in [("ADD", "0.3.1"), ("DEL", "0.3.1"), ("CHECK", "0.4.0"), ("GC", "1.1.0"), ("STATUS", "1.1.0")] {
            for code in [3, 5, 7, 11, 50, 51, 100, 137] {
                if version < since {
                    continue;
                }
                let mut peer = Peer::with([Step::Error(code, "no address is free in 10.244.1.0/24")]);
                let config = json!({"prevResult": result(version), "cni.dev/valid-attachments": []});
                let outcome = Shim::new(command, version, &peer, config).run();
                outcome.failed(version, code.into(), "no address is free in 10.244.1.0/24");
                assert_eq!(outcome.json["msg"], "no address is free in 10.244.1.0/24");
                assert_eq!(peer.requests().len(), 1, "{command}: a refusal is not asked again");
                assert!(!peer.notes().exists());
            }
        }
    }
}

#[test]
fn check_and_gc_do_nothing_where_they_are_disabled() {
    let mut peer = Peer::with([]);
    Shim::new("CHECK", "1.1.0", &peer, json!({"disableCheck": true})).run().silent();
    Shim::new("GC", "1.1.0", &peer, json!({"disableGC": true})).run().silent();
    assert_eq!(peer.requests(), []);
}
