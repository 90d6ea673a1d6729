//! Whatever it is given, the plugin ends by itself, and prints one JSON document or nothing.

use proptest::prelude::*;
use serde_json::{Value, json};

use crate::peer::Peer;
use crate::shim::Shim;

/// A value of the kind that configurations are made of.
fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        prop_oneof!["\\PC{0,12}", "10\\.[0-9]{1,3}\\.1\\.[0-9]/[0-9]{1,2}", "[0-9a-f:]{0,17}", "host-local|podgate|dhcp|\\.\\./x"]
            .prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 32, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            prop::collection::vec((key(), inner), 0..6).prop_map(|entries| Value::Object(entries.into_iter().collect())),
        ]
    })
}

/// The keys that are known, and others.
fn key() -> impl Strategy<Value = String> {
    const KNOWN: &[&str] = &[
        "cniVersion",
        "name",
        "type",
        "ipam",
        "pool",
        "ipMasq",
        "isMasq",
        "isGateway",
        "isDefaultGateway",
        "mtu",
        "mac",
        "dns",
        "nameservers",
        "routes",
        "dst",
        "gw",
        "capabilities",
        "runtimeConfig",
        "portMappings",
        "hostPort",
        "containerPort",
        "protocol",
        "hostIP",
        "bandwidth",
        "ingressRate",
        "ingressBurst",
        "ips",
        "args",
        "cni",
        "prevResult",
        "interfaces",
        "interface",
        "address",
        "sandbox",
        "disableCheck",
        "disableGC",
        "cni.dev/valid-attachments",
        "containerID",
        "ifname",
    ];
    prop_oneof![8 => prop::sample::select(KNOWN).prop_map(str::to_owned), 1 => "\\PC{0,8}"]
}

fn stdin() -> impl Strategy<Value = Vec<u8>> {
    let configuration = (prop::collection::vec((key(), value()), 0..10), any::<bool>(), prop::sample::select(&crate::shim::VERSIONS[..]));
    prop_oneof![
        1 => prop::collection::vec(any::<u8>(), 0..200),
        1 => value().prop_map(|value| value.to_string().into_bytes()),
        6 => configuration.prop_map(|(entries, sound, version)| {
            let mut map: serde_json::Map<String, Value> = entries.into_iter().collect();
            if sound {
                map.insert("cniVersion".into(), version.into());
                map.insert("name".into(), "podgate".into());
            }
            // Never waits, and never leaves anything: nobody listens, and no note can be left there.
            map.insert("timeoutSeconds".into(), 1.into());
            map.insert("socket".into(), json!("/dev/null/podgate.sock"));
            Value::Object(map).to_string().into_bytes()
        }),
    ]
}

fn variable(sound: &'static str) -> impl Strategy<Value = Option<String>> {
    prop_oneof![6 => Just(Some(sound.to_owned())), 1 => Just(None), 2 => "[^\\x00]{0,20}".prop_map(Some)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn whatever_it_is_given_it_prints_one_document_or_none(
        // Those that ask the daemon for a second are few, so that this takes seconds.
        command in prop_oneof![
            4 => prop::sample::select(&["DEL", "STATUS", "VERSION"][..]).prop_map(str::to_owned),
            1 => prop::sample::select(&["ADD", "CHECK", "GC"][..]).prop_map(str::to_owned),
            1 => "[^\\x00]{0,8}",
        ],
        container in variable("c1"),
        netns in variable("/proc/self/ns/net"),
        ifname in variable("eth0"),
        args in variable("IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web;IP=10.0.0.1"),
        path in variable("/nonexistent"),
        stdin in stdin(),
    ) {
        let mut shim = Shim::new(&command, "1.1.0", &Peer::down(), Value::Null).stdin(stdin);
        for (name, value) in [("CNI_CONTAINERID", container), ("CNI_NETNS", netns), ("CNI_IFNAME", ifname), ("CNI_ARGS", args), ("CNI_PATH", path)] {
            shim = match value {
                Some(value) => shim.set(name, &value),
                None => shim.unset(name),
            };
        }
        // Holds the output to one document, and the exit to 0 or 1.
        let outcome = shim.run();
        prop_assert!(outcome.success || outcome.json["code"].is_u64(), "{:?}", outcome);
        prop_assert!(!outcome.stderr.contains("panicked"), "{:?}", outcome);
    }
}
