//! Label and field selectors.

use serde_json::Value;

use crate::status::Refusal;

/// What a request restricts itself to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Selector {
    labels: Vec<(String, Test)>,
    fields: Vec<(String, Test)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Test {
    In(Vec<String>),
    NotIn(Vec<String>),
    Exists,
    Absent,
}

impl Selector {
    /// From the two query parameters.
    pub fn parse(labels: &str, fields: &str) -> Result<Selector, Refusal> {
        let labels = split(labels).into_iter().map(|term| label_test(&term)).collect::<Result<_, _>>()?;
        let fields: Vec<(String, Test)> = split(fields).into_iter().map(|term| equality(&term)).collect::<Result<_, _>>()?;
        if let Some((unknown, _)) = fields.iter().find(|(field, _)| !matches!(field.as_str(), "metadata.name" | "metadata.namespace")) {
            return Err(Refusal::bad_request(format!("field label not supported: {unknown}")));
        }
        Ok(Selector { labels, fields })
    }

    pub fn matches(&self, object: &Value) -> bool {
        let metadata = &object["metadata"];
        let label = |name: &String| metadata["labels"].get(name).and_then(Value::as_str);
        let field = |path: &String| metadata[path.trim_start_matches("metadata.")].as_str();
        self.labels.iter().all(|(name, test)| test.holds(label(name))) && self.fields.iter().all(|(path, test)| test.holds(field(path)))
    }
}

impl Test {
    fn holds(&self, value: Option<&str>) -> bool {
        match self {
            Test::In(values) => value.is_some_and(|value| values.iter().any(|known| known == value)),
            Test::NotIn(values) => value.is_none_or(|value| values.iter().all(|known| known != value)),
            Test::Exists => value.is_some(),
            Test::Absent => value.is_none(),
        }
    }
}

/// At the commas that are not in parentheses.
fn split(text: &str) -> Vec<String> {
    let (mut terms, mut depth) = (vec![String::new()], 0);
    for c in text.chars() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            _ => {}
        }
        if c == ',' && depth == 0 {
            terms.push(String::new());
        } else if let Some(term) = terms.last_mut() {
            term.push(c);
        }
    }
    terms.retain(|term| !term.trim().is_empty());
    terms
}

fn label_test(term: &str) -> Result<(String, Test), Refusal> {
    let term = term.trim();
    for (word, make) in [(" notin ", Test::NotIn as fn(Vec<String>) -> Test), (" in ", Test::In)] {
        if let Some((name, values)) = term.split_once(word) {
            let values = values.trim().trim_start_matches('(').trim_end_matches(')').split(',').map(|value| value.trim().to_owned()).collect();
            return Ok((name.trim().to_owned(), make(values)));
        }
    }
    if term.contains('=') {
        return equality(term);
    }
    Ok(match term.strip_prefix('!') {
        Some(name) => (name.trim().to_owned(), Test::Absent),
        None => (term.to_owned(), Test::Exists),
    })
}

fn equality(term: &str) -> Result<(String, Test), Refusal> {
    let (name, rest) = term.split_once('=').ok_or_else(|| Refusal::bad_request(format!("invalid selector: '{term}'")))?;
    let value = vec![rest.trim_start_matches('=').trim().to_owned()];
    Ok(match name.strip_suffix('!') {
        Some(name) => (name.trim().to_owned(), Test::NotIn(value)),
        None => (name.trim().to_owned(), Test::In(value)),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn selectors_choose_as_kubernetes_does() {
        let object = json!({"metadata": {"name": "a", "namespace": "shop", "labels": {"app": "web", "tier": "front"}}});
        let holds = |labels: &str, fields: &str| Selector::parse(labels, fields).unwrap().matches(&object);
        assert!(holds("", "") && holds("app=web,tier==front", "metadata.name=a,metadata.namespace!=x") && holds("app in (db, web),!gone,tier", ""));
        assert!(!holds("app!=web", "") && !holds("app notin (web)", "") && !holds("gone", "") && !holds("", "metadata.name=b"));
        assert!(holds("gone!=x", "") && holds("gone notin (x)", ""), "who lacks a label has not that value");
        assert!(Selector::parse("", "spec.nodeName=x").is_err());
    }
}
