//! What an ADD asks of the daemon for what its configuration says, and chains.

use podgate_cni::Request;
use podgate_cni::protocol::{Addresses, AttachMode, AttachRequest, Bandwidth, PortMapping};
use podgate_cni::result::Route;
use serde_json::{Value, json};

use crate::peer::{Peer, attached};
use crate::shim::Shim;

/// What is asked for `config` and `args`, apart from the attempt.
#[track_caller]
fn asked(config: Value, args: &str) -> AttachRequest {
    let mut peer = Peer::with([attached()]);
    let outcome = Shim::new("ADD", "1.1.0", &peer, config).set("CNI_ARGS", args).run();
    assert!(outcome.success, "{outcome:?}");
    match peer.requests().pop() {
        Some(Request::Attach(request)) => *request,
        other => panic!("{other:?}"),
    }
}

#[test]
fn without_settings_everything_is_the_daemons_choice() {
    for config in
        [json!({}), json!({"ipam": {}}), json!({"ipam": null}), json!({"ipam": {"type": "podgate"}}), json!({"ipam": {"type": ""}, "mtu": 0})]
    {
        let request = asked(config, "");
        let plain =
            AttachRequest { attachment: crate::table::c1(), attempt: request.attempt, netns: "/proc/self/ns/net".into(), ..AttachRequest::default() };
        assert_eq!(request, plain);
    }
}

#[test]
fn a_pod_says_how_it_is_attached_by_its_annotation_and_a_network_by_its_configuration() {
    let annotated = |mode: &str| json!({"io.kubernetes.cri.pod-annotations": {"podgate.io/attach": mode, "other": "x"}});
    for (config, mode) in [
        (json!({"attach": "tun"}), Some(AttachMode::Tun)),
        (json!({"attach": "veth"}), Some(AttachMode::Veth)),
        (json!({"attach": ""}), None),
        (json!({"runtimeConfig": annotated("tun")}), Some(AttachMode::Tun)),
        (json!({"attach": "tun", "runtimeConfig": annotated("veth")}), Some(AttachMode::Veth)),
        (json!({"attach": "tun", "runtimeConfig": annotated("")}), Some(AttachMode::Tun)),
        (json!({"runtimeConfig": {"io.kubernetes.cri.pod-annotations": null}}), None),
    ] {
        assert_eq!(asked(config.clone(), "").mode, mode, "{config}");
    }
}

#[test]
fn every_setting_arrives() {
    let config = json!({
        "ipam": {"type": "podgate", "pool": "blue"}, "ipMasq": false, "isDefaultGateway": true, "mtu": 1400, "mac": "02-00-00-00-00-0A",
        "routes": [{"dst": "192.0.2.0/24", "gw": "10.244.1.1", "mtu": 1300, "advmss": 1200, "priority": 5, "table": 7, "scope": 253}, {"dst": "fd01::/64", "gw": ""}],
        "capabilities": {"portMappings": true, "bandwidth": true, "ips": true},
        "runtimeConfig": {
            "portMappings": [
                {"hostPort": 8080, "containerPort": 80, "protocol": "TCP", "hostIP": "192.0.2.7"},
                {"hostPort": 0, "containerPort": 81, "protocol": "tcp"},
                {"hostPort": 53, "containerPort": 5353, "protocol": "UDP", "hostIP": ""},
                {"containerPort": 82},
                {"hostPort": 83, "containerPort": 83}
            ],
            "bandwidth": {"ingressRate": 1_000_000, "ingressBurst": 2_147_483_647_u64, "egressRate": 0, "egressBurst": 0},
            "ips": ["10.244.1.9/24", "fd00::9"],
            "io.kubernetes.cri.pod-annotations": {"a": "b"}, "dns": {"servers": []}
        },
        "args": {"cni": {"labels": []}}, "loadOnlyInlinedPlugins": false, "somebody": {"else": ["s"]}, "cni.dev/later": 1
    });
    let args = "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID=c1;K8S_POD_UID=u;COLOUR=red";
    let request = asked(config, args);
    let port = |host_port, container_port, protocol: &str, host_ip: Option<&str>| PortMapping {
        host_port,
        container_port,
        protocol: protocol.into(),
        host_ip: host_ip.map(|ip| ip.parse().unwrap()),
    };
    let mut attachment = crate::table::c1();
    attachment.name = Some("default/web-0".into());
    let expected = AttachRequest {
        attachment,
        attempt: request.attempt,
        netns: "/proc/self/ns/net".into(),
        addresses: Addresses::Own { pool: Some("blue".into()), wanted: vec!["10.244.1.9".parse().unwrap(), "fd00::9".parse().unwrap()] },
        masquerade: Some(false),
        default_route: Some(true),
        mtu: Some(1400),
        mac: Some("02:00:00:00:00:0a".into()),
        routes: vec![
            Route {
                dst: "192.0.2.0/24".into(),
                gw: Some("10.244.1.1".parse().unwrap()),
                mtu: Some(1300),
                advmss: Some(1200),
                priority: Some(5),
                table: Some(7),
                scope: Some(253),
            },
            Route { dst: "fd01::/64".into(), ..Route::default() },
        ],
        port_mappings: vec![port(8080, 80, "tcp", Some("192.0.2.7")), port(53, 5353, "udp", None), port(83, 83, "tcp", None)],
        bandwidth: Some(Bandwidth { ingress_rate: 1_000_000, ingress_burst: 2_147_483_647, ..Bandwidth::default() }),
        mode: None,
    };
    assert_eq!(request, expected);
}

#[test]
fn the_default_route_follows_both_gateway_keys() {
    for (config, default_route) in [
        (json!({"isGateway": true}), None),
        (json!({"isGateway": false}), Some(false)),
        (json!({"isGateway": false, "isDefaultGateway": true}), Some(true)),
        (json!({"isGateway": true, "isDefaultGateway": true}), Some(true)),
        (json!({"isGateway": true, "isDefaultGateway": false}), Some(false)),
        (json!({"isDefaultGateway": false}), Some(false)),
    ] {
        assert_eq!(asked(config.clone(), "").default_route, default_route, "{config}");
    }
    for (config, masquerade) in [
        (json!({"ipMasq": true}), Some(true)),
        (json!({"isMasq": false}), Some(false)),
        (json!({"ipMasq": true, "isMasq": true}), Some(true)),
        (json!({"ipMasq": null}), None),
    ] {
        assert_eq!(asked(config.clone(), "").masquerade, masquerade, "{config}");
    }
}

#[test]
fn the_runtime_is_heard_before_args_and_these_before_the_configuration() {
    let wanted = |config: Value, args: &str| match asked(config, args).addresses {
        Addresses::Own { wanted, .. } => wanted.iter().map(ToString::to_string).collect::<Vec<_>>(),
        other => panic!("{other:?}"),
    };
    let args = "IP=10.244.1.1;MAC=02:00:00:00:00:01";
    let of_args = json!({"args": {"cni": {"ips": ["10.244.1.2"], "mac": "02:00:00:00:00:02"}}, "mac": "02:00:00:00:00:09"});
    let mut of_runtime = of_args.clone();
    of_runtime["runtimeConfig"] = json!({"ips": ["10.244.1.3/24"], "mac": "02:00:00:00:00:03"});
    let of_config = json!({"mac": "02:00:00:00:00:09", "runtimeConfig": {"ips": []}});
    assert_eq!(wanted(of_config.clone(), ""), [] as [&str; 0]);
    assert_eq!(wanted(of_config.clone(), args), ["10.244.1.1"]);
    assert_eq!(wanted(of_args.clone(), args), ["10.244.1.2"]);
    assert_eq!(wanted(of_runtime.clone(), args), ["10.244.1.3"]);
    for (config, args, last) in [(of_config.clone(), "", "09"), (of_config, args, "01"), (of_args, args, "02"), (of_runtime, args, "03")] {
        assert_eq!(asked(config, args).mac, Some(format!("02:00:00:00:00:{last}")));
    }
}

#[test]
fn dns_of_the_configuration_is_passed_on() {
    let peer = Peer::with([attached()]);
    let dns = json!({"nameservers": ["10.96.0.10"], "domain": "cluster.local", "search": ["svc.cluster.local"], "options": []});
    let outcome = Shim::new("ADD", "1.0.0", &peer, json!({"dns": dns})).run();
    assert_eq!(outcome.json["dns"], json!({"nameservers": ["10.96.0.10"], "domain": "cluster.local", "search": ["svc.cluster.local"]}));
}

#[test]
fn behind_another_plugin_the_result_is_both() {
    let previous = json!({
        "cniVersion": "0.4.0", "dns": {"domain": "first"},
        "interfaces": [{"name": "eth0", "sandbox": "/proc/self/ns/net", "mac": "02:00:00:00:00:09"}],
        "ips": [{"version": "4", "address": "192.0.2.9/24", "interface": 0}], "routes": [{"dst": "0.0.0.0/0", "gw": "192.0.2.1"}],
    });
    let peer = Peer::with([attached()]);
    let config = json!({"prevResult": previous, "dns": {"domain": "second"}});
    Shim::new("ADD", "0.4.0", &peer, config).set("CNI_IFNAME", "net1").run().printed(&json!({
        "cniVersion": "0.4.0", "dns": {"domain": "first"},
        "interfaces": [
            {"name": "eth0", "sandbox": "/proc/self/ns/net", "mac": "02:00:00:00:00:09"}, {"name": "veth1", "mac": "02:00:00:00:00:01"},
            {"name": "eth0", "mac": "02:00:00:00:00:02", "sandbox": "/proc/self/ns/net"}
        ],
        "ips": [
            {"version": "4", "address": "192.0.2.9/24", "interface": 0},
            {"version": "4", "address": "10.244.1.5/32", "gateway": "10.244.1.1", "interface": 2},
            {"version": "6", "address": "fd00::5/128", "interface": 2}
        ],
        "routes": [{"dst": "0.0.0.0/0", "gw": "192.0.2.1"}, {"dst": "0.0.0.0/0", "gw": "10.244.1.1"}],
    }));
}
