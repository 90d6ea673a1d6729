//! What the server fills in.

use jiff::Timestamp;
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
    metadata["creationTimestamp"] = json!(rfc3339(Timestamp::now().as_second()));
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

/// `seconds` of the Unix clock as RFC 3339 writes them.
fn rfc3339(seconds: i64) -> String {
    // The clock of this machine is within the calendar.
    Timestamp::from_second(seconds).unwrap_or_default().to_string()
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
