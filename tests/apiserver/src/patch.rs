//! Patches: JSON merge patch (RFC 7396), strategic merge patch (`sig-api-machinery/strategic-merge-patch.md` in kubernetes/community), and what
//! server-side apply takes away.

use serde_json::{Map, Value};

/// RFC 7396 §2.
pub(crate) fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    let target = object(target);
    for (key, value) in patch {
        if value.is_null() {
            target.remove(key);
        } else {
            merge(target.entry(key.clone()).or_insert(Value::Null), value);
        }
    }
}

/// How the elements of a list are told apart, where they are merged one by one and not replaced as a whole.
enum MergeKey {
    Field(&'static str),
    /// By themselves.
    Value,
}

/// The lists that have `patchStrategy=merge` in Kubernetes' types.
fn merge_key(plural: &str, path: &[&str]) -> Option<MergeKey> {
    match (plural, path) {
        (_, ["metadata", "finalizers"]) | ("nodes", ["spec", "podCIDRs"]) => Some(MergeKey::Value),
        (_, ["metadata", "ownerReferences"]) => Some(MergeKey::Field("uid")),
        ("services", ["spec", "ports"]) => Some(MergeKey::Field("port")),
        ("nodes", ["status", "addresses" | "conditions"]) => Some(MergeKey::Field("type")),
        _ => None,
    }
}

/// Takes out of `target` what its manager applied before (`last`) and no longer does (`now`). Fields that others own are none of it, for they
/// were not applied by this one; that two may own one field is not told apart.
pub(crate) fn withdraw(plural: &str, target: &mut Value, last: &Value, now: &Value) {
    withdraw_at(plural, &mut Vec::new(), target, last, now);
}

fn withdraw_at<'p>(plural: &str, path: &mut Vec<&'p str>, target: &mut Value, last: &'p Value, now: &Value) {
    let (Value::Object(target), Value::Object(last)) = (target, last) else { return };
    for (key, before) in last {
        let (Some(place), Some(now)) = (target.get_mut(key), now.get(key)) else {
            target.remove(key);
            continue;
        };
        path.push(key);
        match (place, before, merge_key(plural, path)) {
            (Value::Array(list), Value::Array(before), Some(by)) => {
                let still = |element: &Value| now.as_array().is_some_and(|now| now.iter().any(|kept| same(&by, kept, element)));
                list.retain(|element| !before.iter().any(|known| same(&by, known, element)) || still(element));
            }
            (place, before, _) => withdraw_at(plural, path, place, before, now),
        }
        path.pop();
    }
}

/// Strategic merge: as [`merge`], but for lists whose elements have a key, and for directives.
pub(crate) fn strategic(plural: &str, target: &mut Value, patch: &Value) {
    strategic_at(plural, &mut Vec::new(), target, patch);
}

fn strategic_at<'p>(plural: &str, path: &mut Vec<&'p str>, target: &mut Value, patch: &'p Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if patch.get("$patch").and_then(Value::as_str) == Some("replace") {
        *target = Value::Object(patch.iter().filter(|(key, _)| !key.starts_with('$')).map(|(key, value)| (key.clone(), value.clone())).collect());
        return;
    }
    let target = object(target);
    for (key, value) in patch.iter().filter(|(key, _)| !key.starts_with('$')) {
        if value.is_null() || value.get("$patch").and_then(Value::as_str) == Some("delete") {
            target.remove(key);
            continue;
        }
        path.push(key);
        let place = target.entry(key.clone()).or_insert(Value::Null);
        match (value, merge_key(plural, path)) {
            (Value::Array(elements), Some(by)) => merge_list(plural, path, &by, place, elements),
            _ => strategic_at(plural, path, place, value),
        }
        path.pop();
    }
    for (key, value) in patch.iter().filter(|(key, _)| key.starts_with('$')) {
        directive(plural, path, target, key, value);
    }
}

fn merge_list<'p>(plural: &str, path: &mut Vec<&'p str>, by: &MergeKey, target: &mut Value, elements: &'p [Value]) {
    let list = array(target);
    if elements.iter().any(|element| element.get("$patch").and_then(Value::as_str) == Some("replace")) {
        *list = elements.iter().filter(|element| element.get("$patch").is_none()).cloned().collect();
        return;
    }
    for element in elements {
        let at = list.iter().position(|known| same(by, known, element));
        match (at, element.get("$patch").and_then(Value::as_str)) {
            (Some(at), Some("delete")) => {
                list.remove(at);
            }
            (None, Some("delete")) => {}
            (Some(at), _) => strategic_at(plural, path, &mut list[at], element),
            (None, _) => list.push(element.clone()),
        }
    }
}

fn same(by: &MergeKey, a: &Value, b: &Value) -> bool {
    match by {
        MergeKey::Field(field) => a.get(field).is_some() && a.get(field) == b.get(field),
        MergeKey::Value => a == b,
    }
}

fn directive<'p>(plural: &str, path: &mut Vec<&'p str>, target: &mut Map<String, Value>, key: &'p str, value: &Value) {
    let empty = Vec::new();
    let values = value.as_array().unwrap_or(&empty);
    if key == "$retainKeys" {
        target.retain(|key, _| values.iter().any(|kept| kept == key));
    } else if let Some(field) = key.strip_prefix("$deleteFromPrimitiveList/") {
        if let Some(Value::Array(list)) = target.get_mut(field) {
            list.retain(|element| !values.contains(element));
        }
    } else if let Some(field) = key.strip_prefix("$setElementOrder/") {
        path.push(field);
        if let (Some(by), Some(Value::Array(list))) = (merge_key(plural, path), target.get_mut(field)) {
            // Those that the order does not name stay behind those that it does.
            let place = |element: &Value| values.iter().position(|wanted| same(&by, wanted, element)).unwrap_or(values.len());
            list.sort_by_key(place);
        }
        path.pop();
    }
}

fn object(value: &mut Value) -> &mut Map<String, Value> {
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    value.as_object_mut().expect("it was made one just now")
}

fn array(value: &mut Value) -> &mut Vec<Value> {
    if !value.is_array() {
        *value = Value::Array(Vec::new());
    }
    value.as_array_mut().expect("it was made one just now")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn strategic_of(plural: &str, mut target: Value, patch: Value) -> Value {
        strategic(plural, &mut target, &patch);
        target
    }

    #[test]
    fn a_merge_patch_is_that_of_rfc_7396() {
        let mut target = json!({"a": "b", "c": {"d": "e", "f": "g"}});
        merge(&mut target, &json!({"a": "z", "c": {"f": null}}));
        assert_eq!(target, json!({"a": "z", "c": {"d": "e"}}));
        merge(&mut target, &json!({"a": ["x"], "c": null}));
        assert_eq!(target, json!({"a": ["x"]}));
    }

    #[test]
    fn ports_of_a_service_are_merged_by_their_number() {
        let target = json!({"spec": {"ports": [{"port": 80, "name": "a"}, {"port": 81}]}});
        let patch = json!({"spec": {
            "$setElementOrder/ports": [{"port": 82}, {"port": 80}],
            "ports": [{"port": 80, "targetPort": 8080}, {"port": 82}, {"port": 81, "$patch": "delete"}]
        }});
        let expected = json!({"spec": {"ports": [{"port": 82}, {"port": 80, "name": "a", "targetPort": 8080}]}});
        assert_eq!(strategic_of("services", target, patch), expected);
    }

    #[test]
    fn what_is_applied_no_more_goes_and_what_others_set_stays() {
        let mut target = json!({"metadata": {"labels": {"mine": "1", "theirs": "2"}}, "spec": {"type": "NodePort", "ports": [{"port": 80}, {"port": 81}, {"port": 82}]}});
        let last = json!({"metadata": {"labels": {"mine": "1"}}, "spec": {"type": "NodePort", "ports": [{"port": 80}, {"port": 81}]}});
        let now = json!({"metadata": {"labels": {}}, "spec": {"ports": [{"port": 81}]}});
        withdraw("services", &mut target, &last, &now);
        assert_eq!(target, json!({"metadata": {"labels": {"theirs": "2"}}, "spec": {"ports": [{"port": 81}, {"port": 82}]}}));
    }

    #[test]
    fn lists_without_a_key_are_replaced_and_directives_do_what_they_say() {
        let target = json!({"endpoints": [1, 2], "metadata": {"finalizers": ["a", "b"], "labels": {"x": "1"}}});
        let patch = json!({"endpoints": [3], "metadata": {"$deleteFromPrimitiveList/finalizers": ["a"], "finalizers": ["c"], "labels": {"$patch": "replace", "y": "2"}}});
        let expected = json!({"endpoints": [3], "metadata": {"finalizers": ["b", "c"], "labels": {"y": "2"}}});
        assert_eq!(strategic_of("endpointslices", target, patch), expected);
    }
}
