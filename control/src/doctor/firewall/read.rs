//! What `nft -j list ruleset` and `iptables-save` print, as chains. What is not understood becomes [`Condition::Unknown`].

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde_json::Value;

use super::{Action, Chain, Condition, Hook, Is, Policy, Rule, Tool};

/// Out of `nft -j list ruleset` (libnftables-json(5)).
pub fn nft(json: &str) -> Result<Vec<Chain>, serde_json::Error> {
    let value: Value = serde_json::from_str(json)?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut chains: Vec<Chain> = Vec::new();
    let objects = value["nftables"].as_array().into_iter().flatten();
    for object in objects {
        if let Some(table) = object.get("table") {
            // A table is seen by a chain, even if it has none.
            chains.push(empty(Tool::Nftables, text(&table["family"]), text(&table["name"]), String::new()));
        } else if let Some(chain) = object.get("chain") {
            let mut made = empty(Tool::Nftables, text(&chain["family"]), text(&chain["table"]), text(&chain["name"]));
            // Chains of another type (nat, route) drop nothing that is to be read here.
            made.hook = (chain["type"] == "filter").then(|| hook(chain["hook"].as_str().unwrap_or_default())).flatten();
            if chain["policy"] == "drop" {
                made.policy = Policy::Drop;
            }
            chains.push(made);
        } else if let Some(rule) = object.get("rule") {
            let [family, table, name] = ["family", "table", "chain"].map(|key| text(&rule[key]));
            let owner = chains.iter_mut().find(|chain| chain.family == family && chain.table == table && chain.name == name);
            if let Some(chain) = owner {
                chain.rules.extend(nft_rule(rule));
            }
        }
    }
    Ok(chains)
}

fn empty(tool: Tool, family: String, table: String, name: String) -> Chain {
    Chain { tool, family, table, name, hook: None, policy: Policy::Accept, rules: Vec::new() }
}

fn hook(name: &str) -> Option<Hook> {
    match name.to_ascii_lowercase().as_str() {
        "prerouting" => Some(Hook::Prerouting),
        "input" => Some(Hook::Input),
        "forward" => Some(Hook::Forward),
        _ => None,
    }
}

/// One rule; a verdict map is as many as it has entries.
fn nft_rule(rule: &Value) -> Vec<Rule> {
    let mut conditions = Vec::new();
    let mut words = Vec::new();
    for expression in rule["expr"].as_array().into_iter().flatten() {
        let Some((kind, inner)) = expression.as_object().and_then(|object| object.iter().next()) else { continue };
        let done = |action| vec![Rule { conditions: conditions.clone(), action, text: [words.clone(), vec![kind.clone()]].concat().join(" ") }];
        match (kind.as_str(), inner["type"].as_str(), inner["name"].as_str()) {
            ("accept", ..) => return done(Action::Accept),
            ("drop" | "reject", ..) => return done(Action::Drop),
            ("return", ..) => return done(Action::Return),
            ("jump", ..) => return done(Action::Jump(target(inner))),
            ("goto", ..) => return done(Action::Goto(target(inner))),
            // iptables in front of nftables: what has no counterpart is shown by its name alone.
            ("xt", Some("target"), Some("REJECT" | "DROP")) => return done(Action::Drop),
            ("xt", Some("match"), Some("rpfilter")) => {
                words.push("rpfilter".into());
                conditions.push(Condition::NoWayBack);
            }
            ("xt", Some("match"), Some("comment")) => {}
            ("xt", Some("match"), name) => {
                words.extend(name.map(str::to_owned));
                conditions.push(Condition::Unknown);
            }
            ("match", ..) => {
                words.push(shown(inner));
                conditions.push(nft_match(inner));
            }
            ("vmap", ..) => return verdict_map(&conditions, &words, inner),
            ("counter" | "log" | "limit" | "mangle" | "notrack", ..) => {
                // A limit holds for some packets only.
                conditions.extend((kind == "limit").then_some(Condition::Unknown));
            }
            _ => {}
        }
    }
    Vec::new()
}

fn target(inner: &Value) -> String {
    inner["target"].as_str().unwrap_or_default().to_owned()
}

/// A match in nft's own words, as far as that goes.
fn shown(inner: &Value) -> String {
    let left = &inner["left"];
    let name = left["meta"]["key"].as_str().or(left["payload"]["field"].as_str()).or(left["ct"]["key"].as_str());
    if left.get("fib").is_some() {
        return "fib saddr ... oif missing".into();
    }
    let right = match &inner["right"] {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let not = if inner["op"] == "!=" { "!= " } else { "" };
    format!("{} {not}{right}", name.unwrap_or("..."))
}

fn nft_match(inner: &Value) -> Condition {
    let (left, right) = (&inner["left"], &inner["right"]);
    let is = match inner["op"].as_str() {
        Some("==" | "in") => Is::So,
        Some("!=") => Is::NotSo,
        _ => return Condition::Unknown,
    };
    if let Some(fib) = left.get("fib") {
        let source = fib["flags"].as_array().is_some_and(|flags| flags.iter().any(|flag| flag == "saddr"));
        let missing = right == &Value::Bool(false) || right == "0" || right == &Value::from(0);
        return if source && fib["result"] == "oif" && missing && is == Is::So { Condition::NoWayBack } else { Condition::Unknown };
    }
    match (left["meta"]["key"].as_str(), left["ct"]["key"].as_str(), left["payload"]["field"].as_str()) {
        (Some("iifname" | "iif"), ..) => names(right).map_or(Condition::Unknown, |names| Condition::In(names, is)),
        (Some("oifname" | "oif"), ..) => names(right).map_or(Condition::Unknown, |names| Condition::Out(names, is)),
        (Some("nfproto"), ..) if right == "ipv4" || right == "ipv6" => Condition::V4((right == "ipv4") == (is == Is::So)),
        (_, Some("state"), _) => {
            let new = names(right).is_some_and(|states| states.iter().any(|state| state == "new"));
            Condition::New(new == (is == Is::So))
        }
        (.., Some("saddr")) => networks(right).map_or(Condition::Unknown, |nets| Condition::From(nets, is)),
        (.., Some("daddr")) => networks(right).map_or(Condition::Unknown, |nets| Condition::To(nets, is)),
        _ => Condition::Unknown,
    }
}

/// One thing, or the members of an anonymous set.
fn members(right: &Value) -> Vec<&Value> {
    match (right.get("set").and_then(Value::as_array), right.as_array()) {
        (Some(set), _) | (None, Some(set)) => set.iter().collect(),
        _ => vec![right],
    }
}

fn names(right: &Value) -> Option<Vec<String>> {
    // `@name` is a set that stands elsewhere.
    members(right).into_iter().map(|member| member.as_str().filter(|name| !name.starts_with('@')).map(str::to_owned)).collect()
}

fn networks(right: &Value) -> Option<Vec<IpNetwork>> {
    let network = |member: &Value| match (member.as_str(), &member["prefix"]) {
        (Some(text), _) => text.parse().ok(),
        (None, prefix) => {
            let address: IpAddr = prefix["addr"].as_str()?.parse().ok()?;
            IpNetwork::new(address, u8::try_from(prefix["len"].as_u64()?).ok()?).ok()
        }
    };
    members(right).into_iter().map(network).collect()
}

fn verdict_map(conditions: &[Condition], words: &[String], inner: &Value) -> Vec<Rule> {
    let key = &inner["key"];
    let entries = inner["data"]["set"].as_array().into_iter().flatten();
    let rule = |entry: &Value| {
        let (what, verdict) = (&entry[0], entry[1].as_object()?.iter().next()?);
        let condition = match (key["meta"]["key"].as_str(), key["ct"]["key"].as_str()) {
            (Some("iifname" | "iif"), _) => Condition::In(names(what)?, Is::So),
            (Some("oifname" | "oif"), _) => Condition::Out(names(what)?, Is::So),
            (_, Some("state")) => Condition::New(what == "new"),
            _ => Condition::Unknown,
        };
        let action = match verdict.0.as_str() {
            "accept" => Action::Accept,
            "drop" => Action::Drop,
            "return" => Action::Return,
            "jump" => Action::Jump(target(verdict.1)),
            "goto" => Action::Goto(target(verdict.1)),
            _ => Action::Nothing,
        };
        let text = [words, &[format!("vmap {what} : {}", verdict.0)]].concat().join(" ");
        Some(Rule { conditions: [conditions, &[condition]].concat(), action, text })
    };
    entries.filter_map(rule).collect()
}

/// Out of `iptables-save` or `ip6tables-save`, whose `family` is `ip` or `ip6`.
pub fn save(tool: Tool, family: &str, text: &str) -> Vec<Chain> {
    let mut chains: Vec<Chain> = Vec::new();
    let mut table = "";
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('*') {
            table = name.trim();
        } else if let Some(declared) = line.strip_prefix(':') {
            let mut words = declared.split_whitespace();
            let (name, policy) = (words.next().unwrap_or_default(), words.next());
            let mut chain = empty(tool, family.to_owned(), table.to_owned(), name.to_owned());
            // `-` is the policy of a chain that others call. The table nat drops nothing.
            chain.hook = (policy != Some("-") && table != "nat").then(|| hook(name)).flatten();
            if policy == Some("DROP") {
                chain.policy = Policy::Drop;
            }
            chains.push(chain);
        } else if let Some(rule) = line.strip_prefix("-A ") {
            let (name, words) = rule.split_once(' ').unwrap_or((rule, ""));
            if let Some(chain) = chains.iter_mut().find(|chain| chain.table == table && chain.name == name) {
                chain.rules.push(save_rule(words));
            }
        }
    }
    chains
}

fn save_rule(text: &str) -> Rule {
    let words = split(text);
    let (mut conditions, mut action) = (Vec::new(), Action::Nothing);
    let (mut at, mut is) = (0, Is::So);
    let networks = |text: &str| text.split(',').map(|part| part.parse().ok()).collect::<Option<Vec<IpNetwork>>>();
    while at < words.len() {
        let value = words.get(at + 1).map_or("", String::as_str);
        let (condition, taken) = match words[at].as_str() {
            "!" => {
                (at, is) = (at + 1, Is::NotSo);
                continue;
            }
            "-i" => (Some(Condition::In(vec![value.into()], is)), 2),
            "-o" => (Some(Condition::Out(vec![value.into()], is)), 2),
            "-s" => (Some(networks(value).map_or(Condition::Unknown, |nets| Condition::From(nets, is))), 2),
            "-d" => (Some(networks(value).map_or(Condition::Unknown, |nets| Condition::To(nets, is))), 2),
            "--ctstate" | "--state" => (Some(Condition::New(value.split(',').any(|state| state == "NEW") == (is == Is::So))), 2),
            "--comment" => (None, 2),
            "-m" if value == "rpfilter" => (Some(Condition::NoWayBack), 2),
            "-m" if matches!(value, "conntrack" | "state" | "comment") => (None, 2),
            // Without it, rpfilter matches what does have a way back.
            "--invert" | "--loose" | "--validmark" | "--accept-local" => (None, 1),
            "-j" | "-g" => {
                action = match (words[at].as_str(), value) {
                    (_, "ACCEPT") => Action::Accept,
                    (_, "DROP" | "REJECT") => Action::Drop,
                    (_, "RETURN") => Action::Return,
                    ("-g", chain) => Action::Goto(chain.into()),
                    // A target that is no chain (LOG, MARK) is called in vain.
                    (_, chain) => Action::Jump(chain.into()),
                };
                break; // what follows are the target's options
            }
            _ => (Some(Condition::Unknown), 1),
        };
        conditions.extend(condition);
        (at, is) = (at + taken, Is::So);
    }
    if conditions.contains(&Condition::NoWayBack) && !words.iter().any(|word| word == "--invert") {
        conditions.push(Condition::Unknown);
    }
    Rule { conditions, action, text: text.to_owned() }
}

/// Words, of which one in quotes is one.
fn split(text: &str) -> Vec<String> {
    let (mut words, mut word, mut quoted) = (Vec::new(), String::new(), false);
    for c in text.chars() {
        match c {
            '"' => quoted = !quoted,
            ' ' if !quoted => words.extend((!word.is_empty()).then(|| std::mem::take(&mut word))),
            c => word.push(c),
        }
    }
    words.extend((!word.is_empty()).then_some(word));
    words
}
