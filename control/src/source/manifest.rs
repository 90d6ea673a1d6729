//! One file of manifests: YAML documents in Kubernetes' own form, or JSON.
//!
//! The file is cut at its document markers first, so that every error has the file's line, and each document is read by itself.

use k8s_openapi::api::core::v1 as core_v1;
use k8s_openapi::api::discovery::v1 as discovery_v1;
use k8s_openapi::api::networking::v1 as networking_v1;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::SourceIssue;
use crate::model::{ModelError, Object, ObjectKey, ObjectName, UNENFORCED_KINDS};

/// An object and the line where its document starts.
pub(super) type Placed = (u64, Object);

/// Everything in `text`, the content of `file`; or everything that is wrong with it.
pub(super) fn parse(file: &str, text: &str) -> Result<Vec<Placed>, Vec<SourceIssue>> {
    let (mut objects, mut issues) = (Vec::new(), Vec::new());
    let documents = if file.ends_with(".json") { vec![(1, text)] } else { documents(text) };
    for (line, text) in documents {
        let document = Document { line, text, json: file.ends_with(".json") };
        if let Err((line, reason)) = document.read(&mut objects) {
            issues.push(SourceIssue { file: file.into(), line: Some(line), reason });
        }
    }
    if issues.is_empty() { Ok(objects) } else { Err(issues) }
}

/// The same of JSON, whatever it was read from is called.
pub(super) fn parse_json(name: &str, text: &str) -> Result<Vec<Placed>, Vec<SourceIssue>> {
    let mut objects = Vec::new();
    match (Document { line: 1, text, json: true }).read(&mut objects) {
        Ok(()) => Ok(objects),
        Err((line, reason)) => Err(vec![SourceIssue { file: name.into(), line: Some(line), reason }]),
    }
}

/// An object as it is written, checked as those are that a source reads.
#[derive(Clone, Debug)]
pub struct Written {
    /// What names it.
    pub key: ObjectKey,
    /// All of it.
    pub value: Value,
}

/// Every object in `text`, the content of `file`, for whoever passes them on; or everything that is wrong with them. Kinds that have nothing
/// to do with forwarding are wrong here: whoever names one expects it to do something.
pub fn parse_written(file: &str, text: &str) -> Result<Vec<Written>, Vec<SourceIssue>> {
    let (mut written, mut issues) = (Vec::new(), Vec::new());
    let json = file.ends_with(".json") || text.trim_start().starts_with('{');
    let documents = if json { vec![(1, text)] } else { documents(text) };
    for (line, text) in documents {
        if let Err((line, reason)) = (Document { line, text, json }).written(&mut written) {
            issues.push(SourceIssue { file: file.into(), line: Some(line), reason });
        }
    }
    if issues.is_empty() { Ok(written) } else { Err(issues) }
}

/// The documents and the line at which each starts. A marker is `---` or `...` at the beginning of a line (YAML 1.2 §9.1.2): no content of a
/// document can stand there.
fn documents(text: &str) -> Vec<(u64, &str)> {
    let mut documents = Vec::new();
    let (mut start, mut start_line, mut at) = (0, 1, 0);
    for (index, line) in text.split_inclusive('\n').enumerate() {
        let rest = line.strip_prefix("---").or_else(|| line.strip_prefix("..."));
        if rest.is_some_and(|r| r.is_empty() || r.starts_with(char::is_whitespace)) {
            documents.push((start_line, &text[start..at]));
            // What follows the marker on its own line belongs to the document (`--- {kind: List}`).
            (start, start_line) = (at + 3, index as u64 + 1);
        }
        at += line.len();
    }
    documents.push((start_line, &text[start..]));
    documents.retain(|(_, text)| text.lines().any(|line| !line.trim().is_empty() && !line.trim_start().starts_with('#')));
    documents
}

/// The line and the reason.
type Failure = (u64, String);

struct Document<'a> {
    line: u64,
    text: &'a str,
    json: bool,
}

/// What every object says of itself.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Head {
    #[serde(default)]
    api_version: String,
    #[serde(default)]
    kind: String,
    #[serde(default)]
    metadata: HeadMetadata,
    #[serde(default)]
    items: Vec<Value>,
}

#[derive(Deserialize, Default)]
struct HeadMetadata {
    #[serde(default)]
    name: String,
    #[serde(default)]
    namespace: String,
}

/// Something that can be read as an object of whatever kind it says it is.
trait Decode {
    fn decode<T: DeserializeOwned>(&self) -> Result<T, Failure>;
    /// Where its own faults are.
    fn line(&self) -> u64;
}

/// One object of a `kind: List`.
struct Item {
    line: u64,
    value: Value,
}

impl Decode for Item {
    fn decode<T: DeserializeOwned>(&self) -> Result<T, Failure> {
        serde_json::from_value(self.value.clone()).map_err(|error| (self.line, error.to_string()))
    }

    fn line(&self) -> u64 {
        self.line
    }
}

impl Decode for Document<'_> {
    fn decode<T: DeserializeOwned>(&self) -> Result<T, Failure> {
        if self.json {
            return serde_json::from_str(self.text).map_err(|error| (error.line() as u64, error.to_string()));
        }
        let options = serde_saphyr::options! { with_snippet: false };
        serde_saphyr::from_str_with_options(self.text, options).map_err(|error| {
            let line = error.location().map_or(1, |at| at.line());
            let problem = error.to_string();
            // The parser counts from the document's first line; the true one stands before the reason already.
            let problem = problem.split_once(" at line ").map_or(problem.as_str(), |(problem, _)| problem).to_string();
            (self.line + line - 1, problem)
        })
    }

    fn line(&self) -> u64 {
        self.line
    }
}

impl Document<'_> {
    fn read(&self, objects: &mut Vec<Placed>) -> Result<(), Failure> {
        let head: Head = self.decode()?;
        if head.kind != "List" {
            objects.extend(object(&head, self)?.map(|o| (self.line, o)));
            return Ok(());
        }
        for (index, value) in head.items.into_iter().enumerate() {
            let item = Item { line: self.line, value };
            let object = item.decode().and_then(|head: Head| object(&head, &item));
            let object = object.map_err(|(line, reason)| (line, format!("item {index} of the List: {reason}")))?;
            objects.extend(object.map(|o| (self.line, o)));
        }
        Ok(())
    }
}

impl Document<'_> {
    fn written(&self, written: &mut Vec<Written>) -> Result<(), Failure> {
        let head: Head = self.decode()?;
        let value: Value = self.decode()?;
        let mut push = |head: &Head, text: &dyn Fn() -> Result<Option<Object>, Failure>, value: Value| match text()? {
            Some(object) => {
                written.push(Written { key: object.key(), value });
                Ok(())
            }
            None => Err((self.line, format!("a {} is not stored; there are Service, EndpointSlice, Node and NetworkPolicy", head.kind))),
        };
        if head.kind != "List" {
            return push(&head, &|| object(&head, self), value);
        }
        for (index, value) in head.items.into_iter().enumerate() {
            let item = Item { line: self.line, value: value.clone() };
            let pushed = item.decode().and_then(|head: Head| push(&head, &|| object(&head, &item), value));
            pushed.map_err(|(line, reason)| (line, format!("item {index} of the List: {reason}")))?;
        }
        Ok(())
    }
}

/// The object that `head` announces; `None` for kinds that have nothing to do with forwarding.
fn object(head: &Head, text: &impl Decode) -> Result<Option<Object>, Failure> {
    let fail = |reason: String| Err((text.line(), reason));
    let wanted = match head.kind.as_str() {
        "Node" | "Service" => "v1",
        "EndpointSlice" => "discovery.k8s.io/v1",
        "ServiceCIDR" => "networking.k8s.io/v1",
        "" => return fail("the document has no kind; write apiVersion and kind as in any manifest".into()),
        "Endpoints" => return fail("Endpoints are not read; write a discovery.k8s.io/v1 EndpointSlice".into()),
        kind if UNENFORCED_KINDS.contains(&kind) => {
            let namespace = if kind == "NetworkPolicy" && head.metadata.namespace.is_empty() { "default" } else { &head.metadata.namespace };
            let name = ObjectName::new(namespace, &head.metadata.name);
            return Ok(Some(Object::Unenforced(ObjectKey { kind: kind.into(), name })));
        }
        _ => return Ok(None),
    };
    if head.api_version != wanted {
        return fail(format!("apiVersion `{}` of {} is not read; write {wanted}", head.api_version, head.kind));
    }
    let object = match head.kind.as_str() {
        "Node" => Object::from_node(&text.decode::<core_v1::Node>()?),
        "Service" => Object::from_service(&text.decode::<core_v1::Service>()?),
        "ServiceCIDR" => Object::from_service_cidr(&text.decode::<networking_v1::ServiceCIDR>()?),
        _ => Object::from_slice(&text.decode::<discovery_v1::EndpointSlice>()?),
    };
    object.map(Some).map_err(|error: ModelError| (text.line(), error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVICE: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {clusterIP: 10.96.0.1, ports: [{port: 80}]}\n";

    fn keys(file: &str, text: &str) -> Vec<String> {
        parse(file, text).unwrap().iter().map(|(line, o)| format!("{line} {}", o.key())).collect()
    }

    fn errors(text: &str) -> Vec<String> {
        parse("a.yaml", text).unwrap_err().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn documents_and_lists_of_every_kind_are_read() {
        let text = format!(
            "# a comment\n---\n{SERVICE}--- # another\n\n---\napiVersion: v1\nkind: Node\nmetadata: {{name: n1}}\n...\n---\n\
             kind: List\napiVersion: v1\nitems:\n- apiVersion: discovery.k8s.io/v1\n  kind: EndpointSlice\n  metadata: {{name: web-1}}\n  addressType: IPv4\n  endpoints: []\n\
             - {{kind: Deployment, apiVersion: apps/v1, metadata: {{name: x}}}}\n---\n\
             kind: NetworkPolicy\napiVersion: networking.k8s.io/v1\nmetadata: {{name: deny}}\nspec: {{podSelector: {{}}}}\n"
        );
        let expected = ["2 Service default/web", "9 Node n1", "14 EndpointSlice default/web-1", "24 NetworkPolicy default/deny"];
        assert_eq!(keys("a.yaml", &text), expected);
    }

    #[test]
    fn json_is_read_too() {
        let text = "{\"apiVersion\": \"v1\",\n\t\"kind\": \"Node\", \"metadata\": {\"name\": \"n1\"}}";
        assert_eq!(keys("a.json", text), ["1 Node n1"]);
        assert_eq!(keys("a.yaml", &text.replace('\t', " ")), ["1 Node n1"]);
    }

    #[test]
    fn every_error_has_its_line_and_says_what_to_do() {
        let text = format!("{SERVICE}---\nkind: Service\napiVersion: v1\nmetadata:\n  name: x\nspec:\n  ports:\n  - port: many\n");
        let [error] = &errors(&text)[..] else { panic!("one error") };
        assert!(error.starts_with("a.yaml:12: "), "{error}");
        assert_eq!(
            errors("apiVersion: discovery.k8s.io/v1beta1\nkind: EndpointSlice\n"),
            ["a.yaml:1: apiVersion `discovery.k8s.io/v1beta1` of EndpointSlice is not read; write discovery.k8s.io/v1"]
        );
        assert_eq!(errors("a: b\n"), ["a.yaml:1: the document has no kind; write apiVersion and kind as in any manifest"]);
        assert_eq!(
            errors("---\nkind: Node\napiVersion: v1\nmetadata: {name: n1}\nspec: {podCIDRs: [10.244]}\n"),
            ["a.yaml:1: Node n1: spec.podCIDRs: `10.244` is not a CIDR; write one as 10.244.1.0/24 or fd00::/64"]
        );
        assert!(errors("kind: [\n")[0].starts_with("a.yaml:"));
        assert!(parse("a.json", "{\n\n!").unwrap_err()[0].to_string().starts_with("a.json:3: "));
        assert!(errors("kind: List\nitems: [{kind: Service, apiVersion: v2}]\n")[0].contains("item 0 of the List: apiVersion `v2`"));
    }

    #[test]
    fn a_marker_inside_an_indented_text_is_content() {
        let text = "apiVersion: v1\nkind: Node\nmetadata:\n  name: n1\n  annotations:\n    note: |\n      ---\n      more\n";
        assert_eq!(keys("a.yaml", text), ["1 Node n1"]);
    }
}
