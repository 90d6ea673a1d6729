//! What the plugin refuses by itself: environment, configuration, namespace.

use serde_json::{Value, json};

use crate::peer::{Peer, Step, attached};
use crate::shim::{Shim, VERSIONS};

#[test]
fn a_command_that_is_missing_or_unknown_is_told_at_once() {
    let peer = Peer::down();
    let shim = Shim::new("ADD", "1.0.0", &peer, Value::Null);
    shim.clone().unset("CNI_COMMAND").run().failed("1.1.0", 4, "CNI_COMMAND is missing");
    for command in ["", "add", "REMOVE", "ADD "] {
        shim.clone().set("CNI_COMMAND", command).run().failed("1.1.0", 4, "CNI_COMMAND");
    }
}

#[test]
fn each_variable_that_a_command_needs_is_named_when_it_is_missing_or_empty() {
    let needed: [(&str, &[&str]); 4] = [
        ("ADD", &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"]),
        ("CHECK", &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"]),
        ("DEL", &["CNI_CONTAINERID", "CNI_IFNAME"]),
        ("GC", &["CNI_PATH"]),
    ];
    let mut peer = Peer::with([]);
    for version in VERSIONS {
        for (command, variables) in needed {
            let shim = Shim::new(command, version, &peer, Value::Null);
            for variable in variables {
                shim.clone().unset(variable).run().failed(version, 4, variable);
                shim.clone().set(variable, "").run().failed(version, 4, variable);
            }
            let all = variables.iter().fold(shim, |shim, variable| shim.unset(variable));
            all.run().failed(version, 4, &variables.join(","));
        }
    }
    assert_eq!(peer.requests(), []);
}

#[test]
fn names_that_the_specification_forbids_are_refused() {
    let mut peer = Peer::with([]);
    for command in ["ADD", "CHECK", "DEL"] {
        let shim = Shim::new(command, "1.1.0", &peer, Value::Null);
        for id in ["-c", "../../etc", "c 1", "c:1", "c\n1", &"c".repeat(254)] {
            shim.clone().set("CNI_CONTAINERID", id).run().failed("1.1.0", 4, "CNI_CONTAINERID");
        }
        for ifname in [".", "..", "a/b", "a:b", "a b", "sixteen-bytes-xx"] {
            shim.clone().set("CNI_IFNAME", ifname).run().failed("1.1.0", 4, "CNI_IFNAME");
        }
    }
    let shim = Shim::new("ADD", "1.1.0", &peer, Value::Null);
    for args in ["COLOUR=red", "x", "IP=ten", "MAC=ff:ff:ff:ff:ff:ff", "IgnoreUnknown=maybe"] {
        shim.clone().set("CNI_ARGS", args).run().failed("1.1.0", 4, "CNI_ARGS");
    }
    assert_eq!(peer.requests(), []);
}

#[test]
fn del_does_not_fail_for_arguments_or_settings_that_it_does_not_need() {
    let mut peer = Peer::with([Step::Ok(json!({"detached": true}))]);
    let config = json!({"mtu": "large", "runtimeConfig": {"portMappings": 7}, "prevResult": []});
    Shim::new("DEL", "1.0.0", &peer, config).set("CNI_ARGS", "COLOUR=red").run().silent();
    assert_eq!(peer.requests().len(), 1);
}

#[test]
fn what_is_no_network_namespace_is_refused_by_name() {
    let mut peer = Peer::with([]);
    for command in ["ADD", "CHECK"] {
        let previous = json!({"interfaces": [{"name": "eth0", "sandbox": "/ns"}], "ips": []});
        let shim = Shim::new(command, "1.0.0", &peer, json!({"prevResult": previous}));
        shim.clone().set("CNI_NETNS", "/nonexistent/ns").run().failed("1.0.0", 3, "/nonexistent/ns");
        shim.clone().set("CNI_NETNS", "/proc/self/status/net").run().failed("1.0.0", 3, "/proc/self/status/net");
        for path in ["/proc/self/ns/uts", "/etc/passwd", "/dev/null", "/proc"] {
            shim.clone().set("CNI_NETNS", path).run().failed("1.0.0", 4, "CNI_NETNS");
        }
    }
    assert_eq!(peer.requests(), []);
}

#[test]
fn a_mounted_namespace_is_known_by_what_it_was_mounted_from() {
    let directory = tempfile::tempdir().unwrap();
    let place = directory.path().join("ns");
    std::fs::write(&place, "").unwrap();
    // In a mount namespace of its own, so that nothing stays mounted.
    let under = |kind: &str| {
        let mut program = std::process::Command::new("/usr/bin/unshare");
        let script = format!("mount --bind /proc/self/ns/{kind} {} && exec {}", place.display(), env!("CARGO_BIN_EXE_podgate-cni"));
        program.args(["--mount", "/bin/sh", "-c", &script]);
        program
    };
    let allowed = std::process::Command::new("/usr/bin/unshare").args(["--mount", "/bin/true"]).output().is_ok_and(|output| output.status.success());
    if !allowed {
        eprintln!("skipped: no mount namespace can be made here (CAP_SYS_ADMIN)");
        return;
    }
    let mut peer = Peer::with([attached()]);
    let shim = Shim::new("ADD", "1.0.0", &peer, Value::Null).set("CNI_NETNS", place.to_str().unwrap()).set("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    assert!(shim.run_as(under("net")).success);
    shim.run_as(under("uts")).failed("1.0.0", 4, "CNI_NETNS");
    assert_eq!(peer.asked()[0].namespaces.len(), 1);
}

#[test]
fn a_configuration_that_is_no_json_object_cannot_be_decoded() {
    let peer = Peer::down();
    for command in ["ADD", "DEL", "CHECK", "GC", "STATUS"] {
        let shim = Shim::new(command, "1.1.0", &peer, Value::Null);
        for stdin in ["", "{", "[]", "7", "\"x\"", "{\"name\": \"x\"} {}", "\u{0}"] {
            shim.clone().stdin(stdin).run().failed("1.1.0", 6, "network configuration");
        }
        shim.clone().stdin([0xff, 0xfe]).run().failed("1.1.0", 6, "network configuration");
        shim.clone().stdin("[".repeat(100_000)).run().failed("1.1.0", 6, "network configuration");
        shim.clone().stdin(" ".repeat(1024 * 1024 + 1)).run().failed("1.1.0", 5, "longer than 1048576 bytes");
    }
}

#[test]
fn a_version_that_is_not_spoken_is_refused_and_those_that_are_named() {
    let mut peer = Peer::with([]);
    for command in ["ADD", "DEL", "CHECK", "GC", "STATUS"] {
        for version in ["0.1.0", "0.2.0", "0.3.0", "1.1.1", "2.0.0", "", "absent", "x"] {
            let outcome = Shim::new(command, version, &peer, Value::Null).run();
            outcome.failed("1.1.0", 1, "0.3.1, 0.4.0, 1.0.0, 1.1.0");
        }
    }
    assert_eq!(peer.requests(), []);
}

#[test]
fn a_key_of_the_wrong_type_or_value_is_named() {
    let mapping = |mapping: Value| json!({"runtimeConfig": {"portMappings": [mapping]}});
    let mut peer = Peer::with([]);
    for (config, key) in [
        (json!({"name": "absent"}), "`name`"),
        (json!({"name": ""}), "`name`"),
        (json!({"name": "a/b"}), "`name`"),
        (json!({"name": 7}), "`name`"),
        (json!({"type": 7}), "`type`"),
        (json!({"cniVersion": 1}), "`cniVersion`"),
        (json!({"socket": 7}), "`socket`"),
        (json!({"socket": "podgate.sock"}), "`socket`"),
        (json!({"socket": "/"}), "`socket`"),
        (json!({"timeoutSeconds": 0}), "`timeoutSeconds`"),
        (json!({"timeoutSeconds": 301}), "`timeoutSeconds`"),
        (json!({"timeoutSeconds": 1.5}), "`timeoutSeconds`"),
        (json!({"ipam": "podgate"}), "`ipam`"),
        (json!({"ipam": {"type": 7}}), "`ipam.type`"),
        (json!({"ipam": {"type": "../host-local"}}), "`ipam.type`"),
        (json!({"ipam": {"type": "/usr/lib/cni/static"}}), "`ipam.type`"),
        (json!({"ipam": {"type": ".."}}), "`ipam.type`"),
        (json!({"ipam": {"pool": 7}}), "`ipam.pool`"),
        (json!({"ipMasq": "yes"}), "`ipMasq`"),
        (json!({"isMasq": 1}), "`isMasq`"),
        (json!({"ipMasq": true, "isMasq": false}), "`isMasq`"),
        (json!({"isGateway": "yes"}), "`isGateway`"),
        (json!({"isDefaultGateway": []}), "`isDefaultGateway`"),
        (json!({"mtu": "1450"}), "`mtu`"),
        (json!({"mtu": -1}), "`mtu`"),
        (json!({"mtu": 67}), "`mtu`"),
        (json!({"mtu": 65536}), "`mtu`"),
        (json!({"mac": 7}), "`mac`"),
        (json!({"mac": "01:00:00:00:00:01"}), "`mac`"),
        (json!({"mac": "00:00:00:00:00:00"}), "`mac`"),
        (json!({"mac": "02:00:00:00:01"}), "`mac`"),
        (json!({"dns": []}), "`dns`"),
        (json!({"dns": {"nameservers": "10.96.0.10"}}), "`dns.nameservers`"),
        (json!({"dns": {"search": [7]}}), "`dns.search[0]`"),
        (json!({"dns": {"domain": 7}}), "`dns.domain`"),
        (json!({"routes": {}}), "`routes`"),
        (json!({"routes": ["0.0.0.0/0"]}), "`routes[0]`"),
        (json!({"routes": [{"gw": "10.0.0.1"}]}), "`routes[0].dst`"),
        (json!({"routes": [{"dst": "10.0.0.0"}]}), "`routes[0].dst`"),
        (json!({"routes": [{"dst": "10.0.0.0/33"}]}), "`routes[0].dst`"),
        (json!({"routes": [{"dst": "10.0.0.0/8"}, {"dst": "fd00::/8", "gw": "x"}]}), "`routes[1].gw`"),
        (json!({"routes": [{"dst": "10.0.0.0/8", "scope": 256}]}), "`routes[0].scope`"),
        (json!({"capabilities": []}), "`capabilities`"),
        (json!({"capabilities": {"portMappings": "yes"}}), "`capabilities.portMappings`"),
        (json!({"runtimeConfig": []}), "`runtimeConfig`"),
        (json!({"runtimeConfig": {"portMappings": {}}}), "`runtimeConfig.portMappings`"),
        (mapping(json!({"hostPort": 80})), "`runtimeConfig.portMappings[0].containerPort`"),
        (mapping(json!({"hostPort": 80, "containerPort": 0})), "`runtimeConfig.portMappings[0].containerPort`"),
        (mapping(json!({"hostPort": 65536, "containerPort": 80})), "`runtimeConfig.portMappings[0].hostPort`"),
        (mapping(json!({"hostPort": "80", "containerPort": 80})), "`runtimeConfig.portMappings[0].hostPort`"),
        (mapping(json!({"hostPort": 80, "containerPort": 80, "protocol": "icmp"})), "`runtimeConfig.portMappings[0].protocol`"),
        (mapping(json!({"hostPort": 80, "containerPort": 80, "hostIP": "node"})), "`runtimeConfig.portMappings[0].hostIP`"),
        (json!({"runtimeConfig": {"bandwidth": 7}}), "`runtimeConfig.bandwidth`"),
        (json!({"runtimeConfig": {"bandwidth": {"ingressRate": -1}}}), "`runtimeConfig.bandwidth.ingressRate`"),
        (json!({"runtimeConfig": {"bandwidth": {"egressRate": 8}}}), "egressRate"),
        (json!({"runtimeConfig": {"bandwidth": {"ingressBurst": 8}}}), "ingressRate"),
        (json!({"runtimeConfig": {"ips": "10.244.1.9"}}), "`runtimeConfig.ips`"),
        (json!({"runtimeConfig": {"ips": ["10.244.1.9/33"]}}), "`runtimeConfig.ips[0]`"),
        (json!({"runtimeConfig": {"mac": "x"}}), "`runtimeConfig.mac`"),
        (json!({"args": 7}), "`args`"),
        (json!({"args": {"cni": 7}}), "`args.cni`"),
        (json!({"args": {"cni": {"ips": [7]}}}), "`args.cni.ips[0]`"),
        (json!({"prevResult": "none"}), "`prevResult`"),
        (json!({"prevResult": {"ips": {}}}), "`prevResult.ips`"),
        (json!({"prevResult": {"interfaces": [7]}}), "`prevResult.interfaces[0]`"),
        (json!({"disableCheck": "yes"}), "`disableCheck`"),
        (json!({"disableGC": 0}), "`disableGC`"),
        (json!({"loadOnlyInlinedPlugins": "no"}), "`loadOnlyInlinedPlugins`"),
    ] {
        let outcome = Shim::new("ADD", "1.1.0", &peer, config.clone()).run();
        // The version of a configuration that names none is told in the newest.
        outcome.failed("1.1.0", 7, key);
    }
    for (config, key) in [
        (json!({}), "`cni.dev/valid-attachments`"),
        (json!({"cni.dev/valid-attachments": {}}), "`cni.dev/valid-attachments`"),
        (json!({"cni.dev/valid-attachments": [{"ifname": "eth0"}]}), "`cni.dev/valid-attachments[0].containerID`"),
        (json!({"cni.dev/valid-attachments": [{"containerID": "c1", "ifname": 7}]}), "`cni.dev/valid-attachments[0].ifname`"),
        (json!({"cni.dev/attachments": [{"containerID": "c1", "ifname": ""}]}), "`cni.dev/attachments[0].ifname`"),
    ] {
        Shim::new("GC", "1.1.0", &peer, config).run().failed("1.1.0", 7, key);
    }
    for (config, key) in [
        (json!({}), "`prevResult`"),
        (json!({"prevResult": null}), "`prevResult`"),
        (json!({"prevResult": {"interfaces": [{"name": "eth0"}]}}), "`prevResult.interfaces`"),
    ] {
        Shim::new("CHECK", "1.1.0", &peer, config).run().failed("1.1.0", 7, key);
    }
    Shim::new("STATUS", "1.1.0", &peer, json!({"mtu": "1450"})).run().failed("1.1.0", 7, "`mtu`");
    assert_eq!(peer.requests(), []);
}
