use super::*;

/// As `nft -j list ruleset` 1.0.6 printed it (handles and counters left out).
fn nft(objects: &str) -> Vec<Chain> {
    let metainfo = r#"{"metainfo": {"version": "1.0.6", "json_schema_version": 1}}"#;
    read::nft(&format!(r#"{{"nftables": [{metainfo}, {objects}]}}"#)).unwrap()
}

const GUARD: &str = r#"{"table": {"family": "inet", "name": "host", "handle": 1}},
    {"chain": {"family": "inet", "table": "host", "name": "guard", "type": "filter", "hook": "forward", "prio": 0, "policy": "drop"}}"#;

fn guard(expressions: &[&str]) -> Vec<Chain> {
    let rules = expressions.iter().map(|e| format!(r#", {{"rule": {{"family": "inet", "table": "host", "chain": "guard", "expr": [{e}]}}}}"#));
    nft(&format!("{GUARD}{}", rules.collect::<String>()))
}

fn forwarded() -> Packet<'static> {
    let from = Some("192.0.2.1".parse().unwrap());
    Packet { hook: Hook::Forward, iif: "podgate", oif: Some("eth0"), v4: true, from, to: None }
}

/// The chain, and the rule if it is one, of the first that drops the packet.
fn dropper(chains: &[Chain], packet: &Packet<'_>) -> Option<String> {
    droppers(chains, packet).first().map(|dropped| match dropped.rule {
        Some(rule) => format!("{}: {}", dropped.chain.name, rule.text),
        None => format!("{}: policy", dropped.chain.name),
    })
}

#[test]
fn a_policy_drops_what_no_rule_accepts() {
    assert_eq!(dropper(&guard(&[]), &forwarded()).as_deref(), Some("guard: policy"));
    let accept = r#"{"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": "podgate"}}, {"accept": null}"#;
    assert_eq!(dropper(&guard(&[accept]), &forwarded()), None);
    let input = Packet { hook: Hook::Input, ..forwarded() };
    assert_eq!(dropper(&guard(&[]), &input), None, "another hook");
}

#[test]
fn interfaces_are_compared_by_name_by_beginning_by_set_and_the_other_way_round() {
    let rule = |op: &str, key: &str, right: &str| {
        format!(r#"{{"match": {{"op": "{op}", "left": {{"meta": {{"key": "{key}"}}}}, "right": {right}}}}}, {{"accept": null}}"#)
    };
    for (op, key, right, accepted) in [
        ("==", "iifname", r#""pod*""#, true),
        ("==", "iifname", r#""pods""#, false),
        ("==", "iifname", r#"{"set": ["a", "podgate"]}"#, true),
        ("!=", "iifname", r#""lo""#, true),
        ("!=", "oifname", r#""eth0""#, false),
        ("==", "oif", r#""eth0""#, true),
        ("==", "iifname", r#""@trusted""#, false), // a set that stands elsewhere
    ] {
        let chains = guard(&[&rule(op, key, right)]);
        assert_eq!(dropper(&chains, &forwarded()).is_none(), accepted, "{op} {key} {right}");
    }
}

#[test]
fn an_acceptance_of_some_packets_is_none_of_all_and_neither_is_a_refusal() {
    let established = r#"{"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": ["established", "related"]}}, {"accept": null}"#;
    let port = r#"{"match": {"op": "==", "left": {"payload": {"protocol": "tcp", "field": "dport"}}, "right": 22}}, {"accept": null}"#;
    let marked = r#"{"match": {"op": "==", "left": {"meta": {"key": "mark"}}, "right": 1}}, {"accept": null}"#;
    assert_eq!(dropper(&guard(&[established, port, marked]), &forwarded()).as_deref(), Some("guard: policy"));
    let new = r#"{"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": ["established", "new"]}}, {"accept": null}"#;
    assert_eq!(dropper(&guard(&[new]), &forwarded()), None);
    let refused = [port.replace("accept", "drop"), r#"{"accept": null}"#.to_owned()];
    assert_eq!(dropper(&guard(&refused.each_ref().map(String::as_str)), &forwarded()), None);
}

#[test]
fn sources_and_destinations_count_where_the_packet_has_one_in_particular() {
    let from = |addr: &str, len: u8| {
        format!(
            r#"{{"match": {{"op": "==", "left": {{"payload": {{"protocol": "ip", "field": "saddr"}}}}, "right": {{"prefix": {{"addr": "{addr}", "len": {len}}}}}}}}}, {{"accept": null}}"#
        )
    };
    assert_eq!(dropper(&guard(&[&from("192.0.2.0", 24)]), &forwarded()), None);
    assert!(dropper(&guard(&[&from("10.0.0.0", 8)]), &forwarded()).is_some());
    let anywhere = Packet { from: None, ..forwarded() };
    assert!(dropper(&guard(&[&from("192.0.2.0", 24)]), &anywhere).is_some());
}

#[test]
fn called_chains_decide_and_goto_does_not_come_back() {
    let sub = r#"{"chain": {"family": "inet", "table": "host", "name": "sub"}},
        {"rule": {"family": "inet", "table": "host", "chain": "sub", "expr": [{"match": {"op": "==", "left": {"meta": {"key": "nfproto"}}, "right": "ipv6"}}, {"reject": {"type": "icmpx"}}]}}"#;
    let call = |how: &str| {
        let rule = |e: &str| format!(r#"{{"rule": {{"family": "inet", "table": "host", "chain": "guard", "expr": [{e}]}}}}"#);
        nft(&format!("{GUARD}, {sub}, {}, {}", rule(&format!(r#"{{"{how}": {{"target": "sub"}}}}"#)), rule(r#"{"accept": null}"#)))
    };
    let v6 = Packet { v4: false, from: None, ..forwarded() };
    assert_eq!(dropper(&call("jump"), &forwarded()), None);
    assert_eq!(dropper(&call("jump"), &v6).as_deref(), Some("sub: nfproto ipv6 reject"));
    assert_eq!(dropper(&call("goto"), &forwarded()).as_deref(), Some("guard: policy"));
}

#[test]
fn a_verdict_map_is_a_rule_for_each_entry() {
    let map = r#"{"vmap": {"key": {"meta": {"key": "iifname"}}, "data": {"set": [["x", {"drop": null}], ["podgate", {"accept": null}]]}}}"#;
    assert_eq!(dropper(&guard(&[map]), &forwarded()), None);
    let states = r#"{"vmap": {"key": {"ct": {"key": "state"}}, "data": {"set": [["invalid", {"drop": null}], ["established", {"accept": null}]]}}}"#;
    assert_eq!(dropper(&guard(&[states]), &forwarded()).as_deref(), Some("guard: policy"));
}

#[test]
fn chains_that_call_each_other_for_ever_are_left_alone() {
    let chains = guard(&[r#"{"jump": {"target": "guard"}}"#]);
    assert_eq!(dropper(&chains, &forwarded()).as_deref(), Some("guard: policy"));
}

#[test]
fn a_reverse_path_rule_drops_the_nodes_own_address() {
    let chain = r#"{"chain": {"family": "inet", "table": "host", "name": "pre", "type": "filter", "hook": "prerouting", "prio": -300, "policy": "accept"}},
        {"rule": {"family": "inet", "table": "host", "chain": "pre", "expr": [{"match": {"op": "==", "left": {"meta": {"key": "nfproto"}}, "right": "ipv6"}}, {"match": {"op": "==", "left": {"fib": {"result": "oif", "flags": ["saddr", "mark", "iif"]}}, "right": false}}, {"drop": null}]}}"#;
    let packet = Packet { hook: Hook::Prerouting, oif: None, v4: false, from: None, ..forwarded() };
    assert_eq!(dropper(&nft(chain), &packet).as_deref(), Some("pre: nfproto ipv6 fib saddr ... oif missing drop"));
    assert_eq!(dropper(&nft(chain), &Packet { v4: true, ..packet }), None);
}

#[test]
fn what_iptables_in_front_of_nftables_prints_is_read() {
    let text = r#"{"chain": {"family": "ip", "table": "raw", "name": "PREROUTING", "type": "filter", "hook": "prerouting", "prio": -300, "policy": "accept"}},
        {"rule": {"family": "ip", "table": "raw", "chain": "PREROUTING", "expr": [{"xt": {"type": "match", "name": "rpfilter"}}, {"counter": {"packets": 0, "bytes": 0}}, {"drop": null}]}},
        {"chain": {"family": "ip6", "table": "filter", "name": "INPUT", "type": "filter", "hook": "input", "prio": 0, "policy": "accept"}},
        {"rule": {"family": "ip6", "table": "filter", "chain": "INPUT", "expr": [{"xt": {"type": "match", "name": "conntrack"}}, {"accept": null}]}},
        {"rule": {"family": "ip6", "table": "filter", "chain": "INPUT", "expr": [{"counter": {"packets": 0, "bytes": 0}}, {"xt": {"type": "target", "name": "REJECT"}}]}}"#;
    let chains = nft(text);
    let pre = Packet { hook: Hook::Prerouting, oif: None, ..forwarded() };
    assert_eq!(dropper(&chains, &pre).as_deref(), Some("PREROUTING: rpfilter drop"));
    let input = Packet { hook: Hook::Input, oif: None, v4: false, from: None, ..forwarded() };
    assert_eq!(dropper(&chains, &input).as_deref(), Some("INPUT: xt"));
    assert_eq!(dropper(&chains, &Packet { v4: true, ..input }), None);
}

/// As iptables-legacy-save 1.8.9 printed it.
const SAVED: &str = r#"# Generated by iptables-save v1.8.9
*raw
:PREROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
-A PREROUTING -m rpfilter --invert -j DROP
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:KUBE-SERVICES - [0:0]
COMMIT
*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:DOCKER-USER - [0:0]
-A INPUT ! -i foo+ -o bar -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -j DOCKER-USER
-A FORWARD -i docker0 -j ACCEPT
-A DOCKER-USER -m comment --comment "for the gateway" -i podg+ -s 192.0.2.0/24 -m conntrack --ctstate NEW -j ACCEPT
-A DOCKER-USER -j RETURN
COMMIT
"#;

#[test]
fn the_older_tables_are_read_as_iptables_saves_them() {
    let chains = read::save(Tool::Legacy, "ip", SAVED);
    assert_eq!(chains.len(), 8);
    assert_eq!(dropper(&chains, &forwarded()), None, "by the user's own chain");
    let other = Packet { iif: "eth0", oif: Some("podgate"), from: None, ..forwarded() };
    assert_eq!(dropper(&chains, &other).as_deref(), Some("FORWARD: policy"));
    let pre = Packet { hook: Hook::Prerouting, oif: None, ..forwarded() };
    assert_eq!(dropper(&chains, &pre).as_deref(), Some("PREROUTING: -m rpfilter --invert -j DROP"));
    assert_eq!(dropper(&chains, &Packet { v4: false, from: None, ..other }), None, "ip6tables has tables of its own");
    let without_invert = SAVED.replace(" --invert", "");
    assert_eq!(dropper(&read::save(Tool::Legacy, "ip", &without_invert), &pre), None);
}

#[test]
fn what_is_no_json_is_said_to_be_none() {
    assert!(read::nft("table inet host {}").is_err());
    assert_eq!(nft(r#"{"something": {"new": 1}}"#), []);
}
