//! CNI results: of one shape inside, in the shape of each version of the specification outside (CNI SPEC.md, section 5).

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// What an attachment has, as version 1.1.0 says it. Without `cniVersion` and `dns`, which are the caller's.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Attached {
    /// The pod's interface, and before it the veth in the gateway's namespace, if it has one.
    pub interfaces: Vec<Interface>,
    /// The pod's addresses.
    pub ips: Vec<Ip>,
    /// Its routes.
    pub routes: Vec<Route>,
}

/// An interface.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its Ethernet address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// Its MTU, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// The path of the namespace that it is in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<String>,
}

/// An address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Ip {
    /// With its prefix length, as in `10.244.1.5/32`.
    pub address: String,
    /// The gateway's address in its range.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
    /// Index of its interface.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<usize>,
}

/// A route.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Route {
    /// Its destination, as in `0.0.0.0/0`.
    pub dst: String,
    /// Its next hop; by default, the gateway.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gw: Option<IpAddr>,
    /// Its MTU, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// The largest TCP segment that is announced, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advmss: Option<u32>,
    /// Its metric.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<u32>,
    /// Its table.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub table: Option<u32>,
    /// Its scope (`RT_SCOPE_…`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scope: Option<u8>,
}

/// The versions of the specification that are spoken, the oldest first.
pub const VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];

impl Attached {
    /// As a result of `version`, which is one of [`VERSIONS`]. What a version does not know is left out; of 0.3.1 and 0.4.0 each address
    /// names its family.
    pub fn to_json(&self, version: &str, dns: &Value) -> Value {
        self.to_json_after(None, version, dns)
    }

    /// The same behind the result of the plugins before this one in a chain (`prevResult`), which is passed on: interfaces, addresses and
    /// routes follow its own, so that the addresses' indices move, and its `dns` stands if it has one.
    pub fn to_json_after(&self, previous: Option<&Map<String, Value>>, version: &str, dns: &Value) -> Value {
        let before = |key: &str| previous.and_then(|previous| previous.get(key)).and_then(Value::as_array).cloned().unwrap_or_default();
        let interfaces = before("interfaces");
        let mut ours = self.clone();
        ours.ips.iter_mut().filter_map(|ip| ip.interface.as_mut()).for_each(|index| *index = index.saturating_add(interfaces.len()));
        let mut result = serde_json::to_value(ours).expect("plain data is always JSON");
        for (key, mut list) in [("interfaces", interfaces), ("ips", before("ips")), ("routes", before("routes"))] {
            list.extend(result[key].as_array().cloned().unwrap_or_default());
            result[key] = list.into();
        }
        conform(&mut result, version);
        result["cniVersion"] = version.into();
        let known = |dns: &&Value| dns.as_object().is_some_and(|dns| !dns.is_empty());
        let dns = previous.and_then(|previous| previous.get("dns")).filter(known).unwrap_or(dns);
        result["dns"] = if dns.is_object() { dns.clone() } else { json!({}) };
        result
    }
}

/// Leaves out of a result what `version` does not know, and puts in what only it asks for.
fn conform(result: &mut Value, version: &str) {
    let each = |list: &mut Value, edit: &dyn Fn(&mut Map<String, Value>)| {
        list.as_array_mut().into_iter().flatten().filter_map(Value::as_object_mut).for_each(edit);
    };
    if version != "1.1.0" {
        each(&mut result["interfaces"], &|interface| interface.retain(|key, _| matches!(key.as_str(), "name" | "mac" | "sandbox")));
        each(&mut result["routes"], &|route| route.retain(|key, _| matches!(key.as_str(), "dst" | "gw")));
    }
    each(&mut result["ips"], &|ip| {
        if version.starts_with("0.") {
            let v6 = ip.get("address").and_then(Value::as_str).is_some_and(|address| address.contains(':'));
            ip.insert("version".into(), json!(if v6 { "6" } else { "4" }));
        } else {
            ip.remove("version");
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_says_in_each_version_what_that_version_knows() {
        let attached = Attached {
            interfaces: vec![Interface { name: "eth0".into(), mac: Some("02:00:00:00:00:01".into()), mtu: Some(1450), sandbox: Some("/ns".into()) }],
            ips: vec![
                Ip { address: "10.244.1.5/32".into(), gateway: Some("10.244.1.1".parse().unwrap()), interface: Some(0) },
                Ip { address: "fd00::5/128".into(), gateway: None, interface: Some(0) },
            ],
            routes: vec![Route { dst: "0.0.0.0/0".into(), priority: Some(7), ..Route::default() }],
        };
        let of = |version| attached.to_json(version, &Value::Null);
        assert_eq!(
            of("1.1.0"),
            json!({
                "cniVersion": "1.1.0", "dns": {},
                "interfaces": [{"name": "eth0", "mac": "02:00:00:00:00:01", "mtu": 1450, "sandbox": "/ns"}],
                "ips": [{"address": "10.244.1.5/32", "gateway": "10.244.1.1", "interface": 0}, {"address": "fd00::5/128", "interface": 0}],
                "routes": [{"dst": "0.0.0.0/0", "priority": 7}],
            })
        );
        assert_eq!(
            of("1.0.0"),
            json!({
                "cniVersion": "1.0.0", "dns": {},
                "interfaces": [{"name": "eth0", "mac": "02:00:00:00:00:01", "sandbox": "/ns"}],
                "ips": [{"address": "10.244.1.5/32", "gateway": "10.244.1.1", "interface": 0}, {"address": "fd00::5/128", "interface": 0}],
                "routes": [{"dst": "0.0.0.0/0"}],
            })
        );
        for version in ["0.3.1", "0.4.0"] {
            assert_eq!(of(version)["ips"][0]["version"], "4");
            assert_eq!(of(version)["ips"][1]["version"], "6");
            assert_eq!(of(version)["interfaces"][0].get("mtu"), None);
        }
        assert_eq!(attached.to_json("1.0.0", &json!({"nameservers": ["10.96.0.10"]}))["dns"]["nameservers"][0], "10.96.0.10");
    }

    #[test]
    fn a_result_behind_others_passes_them_on_and_moves_its_indices() {
        let attached = Attached {
            interfaces: vec![Interface { name: "veth0".into(), ..Interface::default() }, Interface { name: "net1".into(), ..Interface::default() }],
            ips: vec![Ip { address: "10.244.1.5/32".into(), gateway: None, interface: Some(1) }],
            routes: vec![Route { dst: "10.0.0.0/8".into(), ..Route::default() }],
        };
        let previous = json!({
            "cniVersion": "0.4.0", "interfaces": [{"name": "eth0", "sandbox": "/ns", "mtu": 1400}], "dns": {"domain": "first"},
            "ips": [{"version": "4", "address": "192.0.2.9/24", "interface": 0}], "routes": [{"dst": "0.0.0.0/0", "priority": 3}],
        });
        let dns = json!({"domain": "second"});
        assert_eq!(
            attached.to_json_after(previous.as_object(), "1.0.0", &dns),
            json!({
                "cniVersion": "1.0.0", "dns": {"domain": "first"},
                "interfaces": [{"name": "eth0", "sandbox": "/ns"}, {"name": "veth0"}, {"name": "net1"}],
                "ips": [{"address": "192.0.2.9/24", "interface": 0}, {"address": "10.244.1.5/32", "interface": 2}],
                "routes": [{"dst": "0.0.0.0/0"}, {"dst": "10.0.0.0/8"}],
            })
        );
        assert_eq!(attached.to_json_after(json!({"dns": {}}).as_object(), "1.0.0", &dns)["dns"], dns);
    }
}
