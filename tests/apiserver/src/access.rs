//! Who may do what: bearer tokens and the rules of a `ClusterRole`.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use crate::resources::Resource;
use crate::status::Refusal;

/// A rule of a `ClusterRole` (`rbac.authorization.k8s.io/v1` `PolicyRule`).
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Rule {
    /// `""` is the core.
    pub api_groups: Vec<String>,
    /// With a subresource as `nodes/status`.
    pub resources: Vec<String>,
    /// `get`, `list`, `watch`, `create`, `update`, `patch`, `delete`.
    pub verbs: Vec<String>,
    /// On these alone, unless it is empty.
    #[serde(default)]
    pub resource_names: Vec<String>,
}

/// What a token made use of, as a rule would have to allow it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Use {
    /// The API group.
    pub group: String,
    /// The resource.
    pub resource: String,
    /// The verb.
    pub verb: String,
}

/// Why a manifest holds no rules.
#[derive(Debug, thiserror::Error)]
pub enum RuleError {
    /// It is not YAML.
    #[error("the manifest is not YAML: {0}")]
    Yaml(String),
    /// A rule does not have a rule's form.
    #[error("a rule of ClusterRole {0} cannot be read: {1}")]
    Rule(String, serde_json::Error),
    /// There is no role in it.
    #[error("the manifest holds no ClusterRole")]
    NoRole,
}

impl Rule {
    /// The rules of every `ClusterRole` in a manifest of several documents.
    pub fn of_manifest(text: &str) -> Result<Vec<Rule>, RuleError> {
        let documents: Vec<Value> = serde_saphyr::from_multiple(text).map_err(|error| RuleError::Yaml(error.to_string()))?;
        let mut rules = Vec::new();
        for role in documents.iter().filter(|document| document["kind"] == "ClusterRole") {
            let name = role["metadata"]["name"].as_str().unwrap_or_default();
            let read: Vec<Rule> = serde_json::from_value(role["rules"].clone()).map_err(|error| RuleError::Rule(name.to_owned(), error))?;
            rules.extend(read);
        }
        if rules.is_empty() { Err(RuleError::NoRole) } else { Ok(rules) }
    }

    /// Everything that it allows, one by one.
    pub fn uses(&self) -> impl Iterator<Item = Use> + '_ {
        self.api_groups.iter().flat_map(move |group| {
            self.resources.iter().flat_map(move |resource| {
                self.verbs.iter().map(move |verb| Use { group: group.clone(), resource: resource.clone(), verb: verb.clone() })
            })
        })
    }

    fn allows(&self, asked: &Use, name: Option<&str>) -> bool {
        let names = &self.resource_names;
        let named = names.is_empty() || name.is_some_and(|name| names.iter().any(|known| known == name));
        let has = |list: &[String], word: &str| list.iter().any(|known| known == word || known == "*");
        named && has(&self.api_groups, &asked.group) && has(&self.resources, &asked.resource) && has(&self.verbs, &asked.verb)
    }
}

/// Tokens and what they may do. Without any token everybody may do everything.
#[derive(Default)]
pub(crate) struct Access {
    tokens: BTreeMap<String, Option<Vec<Rule>>>,
}

impl Access {
    pub fn allow(&mut self, token: &str, rules: Option<Vec<Rule>>) {
        self.tokens.insert(token.to_owned(), rules);
    }

    pub fn forbid(&mut self, token: &str) {
        self.tokens.remove(token);
    }

    /// The rules that bind who sends this header; `None` for who may do everything.
    pub fn rules(&self, authorization: Option<&str>) -> Result<Option<Vec<Rule>>, Refusal> {
        if self.tokens.is_empty() {
            return Ok(None);
        }
        let token = authorization.and_then(|header| header.strip_prefix("Bearer "));
        token.and_then(|token| self.tokens.get(token.trim()).cloned()).ok_or_else(|| Refusal::new(401, "Unauthorized", "Unauthorized"))
    }
}

/// Refuses what no rule allows.
pub(crate) fn check(rules: &[Rule], asked: &Use, resource: &Resource, name: Option<&str>) -> Result<(), Refusal> {
    if rules.iter().any(|rule| rule.allows(asked, name)) {
        return Ok(());
    }
    let Use { group, resource: path, verb } = asked;
    let what = name.map_or_else(|| resource.qualified(), |name| format!("{} \"{name}\"", resource.qualified()));
    let message = format!("{what} is forbidden: User \"tester\" cannot {verb} resource \"{path}\" in API group \"{group}\" at the cluster scope");
    Err(Refusal::new(403, "Forbidden", message))
}
