//! What the server fills in.

use std::time::SystemTime;

use serde_json::{Value, json};

use crate::resources::Resource;

/// Name, namespace, uid and the time of creation. `number` makes them different from all others'.
pub(crate) fn identity(resource: &Resource, namespace: &str, object: &mut Value, number: u64) {
    object["apiVersion"] = json!(resource.api_version());
    object["kind"] = json!(resource.kind);
    let metadata = &mut object["metadata"];
    if metadata["name"].as_str().is_none_or(str::is_empty) {
        match metadata["generateName"].as_str() {
            Some(prefix) => metadata["name"] = json!(format!("{prefix}{number:05}")),
            None => metadata["name"] = json!(""),
        }
    }
    if resource.namespaced {
        metadata["namespace"] = json!(namespace);
    }
    metadata["uid"] = json!(format!("00000000-0000-4000-8000-{number:012x}"));
    let seconds = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    metadata["creationTimestamp"] = json!(rfc3339(seconds));
}

/// What follows from the rest. `taken` says whether a service has this at that place already.
pub(crate) fn fill(resource: &Resource, object: &mut Value, taken: impl Fn(&str, &Value) -> bool) {
    match resource.kind {
        "Service" => service(object, taken),
        "EndpointSlice" => {
            for port in object["ports"].as_array_mut().into_iter().flatten() {
                or_default(port, "name", json!(""));
                or_default(port, "protocol", json!("TCP"));
            }
        }
        "Namespace" => or_default(object, "status", json!({"phase": "Active"})),
        _ => {}
    }
}

fn service(object: &mut Value, taken: impl Fn(&str, &Value) -> bool) {
    let spec = &mut object["spec"];
    or_default(spec, "type", json!("ClusterIP"));
    or_default(spec, "sessionAffinity", json!("None"));
    let kind = spec["type"].as_str().unwrap_or_default().to_owned();
    if kind != "ExternalName" {
        or_default(spec, "internalTrafficPolicy", json!("Cluster"));
        if spec["clusterIP"].as_str().is_none_or(str::is_empty) {
            let free = (0..=u16::MAX).map(|n| json!(format!("10.96.{}.{}", 100 + (n >> 8), n & 255))).find(|ip| !taken("clusterIP", ip));
            spec["clusterIP"] = free.unwrap_or(Value::Null);
        }
        if spec["clusterIPs"].as_array().is_none_or(Vec::is_empty) {
            spec["clusterIPs"] = json!([spec["clusterIP"]]);
        }
        or_default(spec, "ipFamilies", json!(["IPv4"]));
        or_default(spec, "ipFamilyPolicy", json!("SingleStack"));
    }
    let exposed = kind == "NodePort" || kind == "LoadBalancer";
    if exposed {
        or_default(spec, "externalTrafficPolicy", json!("Cluster"));
    }
    let mut given = Vec::new();
    for port in spec["ports"].as_array_mut().into_iter().flatten() {
        or_default(port, "protocol", json!("TCP"));
        or_default(port, "targetPort", port["port"].clone());
        if exposed && port["nodePort"].as_u64().is_none_or(|number| number == 0) {
            let free = (31_000..32_768).map(|number| json!(number)).find(|number| !given.contains(number) && !taken("nodePort", number));
            port["nodePort"] = free.unwrap_or(Value::Null);
        }
        given.push(port["nodePort"].clone());
    }
    or_default(object, "status", json!({"loadBalancer": {}}));
}

/// What an update that does not name it leaves as it was.
pub(crate) fn carry_over(resource: &Resource, before: &Value, object: &mut Value) {
    if resource.kind == "Service" && object["spec"]["type"] != "ExternalName" {
        for field in ["clusterIP", "clusterIPs"] {
            if object["spec"].get(field).is_none_or(|value| value.is_null() || value == "") {
                object["spec"][field] = before["spec"][field].clone();
            }
        }
    }
}

fn or_default(object: &mut Value, field: &str, value: Value) {
    if object.get(field).is_none_or(Value::is_null) {
        object[field] = value;
    }
}

/// `seconds` of the Unix clock as RFC 3339 writes them. Days to a date: Hinnant, "chrono-compatible low-level date algorithms", `civil_from_days`.
fn rfc3339(seconds: u64) -> String {
    let (days, time) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", time / 3600, time / 60 % 60, time % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00Z");
        assert_eq!(rfc3339(1_709_210_096), "2024-02-29T12:34:56Z");
        assert_eq!(rfc3339(1_735_689_599), "2024-12-31T23:59:59Z");
    }
}
