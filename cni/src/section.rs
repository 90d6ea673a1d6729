//! Reading a JSON object of known keys: a key of the wrong type is an error that names it by its path, and `null` is as good as no key.

use serde_json::{Map, Value};

use crate::error::Error;

/// An object within the network configuration.
#[derive(Clone, Debug)]
pub struct Section<'a> {
    /// Its path from the top, empty for the top itself.
    path: String,
    map: &'a Map<String, Value>,
}

impl<'a> Section<'a> {
    /// The whole configuration.
    pub fn top(map: &'a Map<String, Value>) -> Section<'a> {
        Section { path: String::new(), map }
    }

    /// A key's path from the top.
    pub fn path(&self, key: &str) -> String {
        if self.path.is_empty() { key.into() } else { format!("{}.{key}", self.path) }
    }

    /// An error about `key`.
    pub fn error(&self, key: &str, problem: impl AsRef<str>) -> Error {
        let path = self.path(key);
        let problem = format!("`{path}` {}", problem.as_ref());
        Error::config(path, problem)
    }

    /// An error about the whole section.
    pub fn invalid(&self, problem: impl AsRef<str>) -> Error {
        Error::config(&self.path, format!("`{}` {}", self.path, problem.as_ref()))
    }

    /// A value; none if it is absent or `null`.
    pub fn value(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn typed<T>(&self, key: &str, takes: &str, of: impl FnOnce(&'a Value) -> Option<T>) -> Result<Option<T>, Error> {
        let Some(value) = self.value(key) else { return Ok(None) };
        of(value).map(Some).ok_or_else(|| self.error(key, format!("is {}, but it takes {takes}", shown(value))))
    }

    /// A boolean.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, Error> {
        self.typed(key, "true or false", Value::as_bool)
    }

    /// A string.
    pub fn string(&self, key: &str) -> Result<Option<&'a str>, Error> {
        self.typed(key, "a string", Value::as_str)
    }

    /// A whole number between `min` and `max`.
    pub fn number(&self, key: &str, min: u64, max: u64) -> Result<Option<u64>, Error> {
        let takes = format!("a whole number from {min} to {max}");
        self.typed(key, &takes, |value| value.as_u64().filter(|number| (min..=max).contains(number)))
    }

    /// A section within this one.
    pub fn section(&self, key: &str) -> Result<Option<Section<'a>>, Error> {
        let map = self.typed(key, "an object", Value::as_object)?;
        Ok(map.map(|map| Section { path: self.path(key), map }))
    }

    /// A list's entries with their paths; an absent list is an empty one.
    fn list(&self, key: &str, takes: &str) -> Result<impl Iterator<Item = (String, &'a Value)> + use<'a>, Error> {
        let list = self.typed(key, takes, Value::as_array)?;
        let path = self.path(key);
        Ok(list.into_iter().flatten().enumerate().map(move |(at, value)| (format!("{path}[{at}]"), value)))
    }

    /// A list of strings, each with its path.
    pub fn strings(&self, key: &str) -> Result<Vec<(String, &'a str)>, Error> {
        self.list(key, "a list of strings")?
            .map(|(path, value)| match value.as_str() {
                Some(string) => Ok((path, string)),
                None => Err(Error::config(&path, format!("`{path}` is {}, but it takes a string", shown(value)))),
            })
            .collect()
    }

    /// A list of sections.
    pub fn sections(&self, key: &str) -> Result<Vec<Section<'a>>, Error> {
        self.list(key, "a list of objects")?
            .map(|(path, value)| match value.as_object() {
                Some(map) => Ok(Section { path, map }),
                None => Err(Error::config(&path, format!("`{path}` is {}, but it takes an object", shown(value)))),
            })
            .collect()
    }

    /// Its keys.
    pub fn keys(&self) -> impl Iterator<Item = &'a String> {
        self.map.keys()
    }
}

/// A value for a message: short, whatever was sent.
fn shown(value: &Value) -> String {
    match value {
        Value::Array(_) => "a list".into(),
        Value::Object(_) => "an object".into(),
        Value::String(string) if string.len() > 64 => "a long string".into(),
        _ => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_value_of_the_wrong_type_is_named_by_its_path() {
        let json = json!({"a": {"b": [{"c": "text"}, 7]}, "n": 5, "none": null});
        let top = Section::top(json.as_object().unwrap());
        let details = |error: Error| error.to_json("1.1.0")["details"].as_str().unwrap().to_owned();
        let a = top.section("a").unwrap().unwrap();
        assert_eq!(details(a.sections("b").unwrap_err()), "`a.b[1]` is 7, but it takes an object");
        assert_eq!(details(a.strings("b").unwrap_err()), "`a.b[0]` is an object, but it takes a string");
        assert_eq!(details(top.bool("n").unwrap_err()), "`n` is 5, but it takes true or false");
        assert_eq!(details(top.number("n", 6, 9).unwrap_err()), "`n` is 5, but it takes a whole number from 6 to 9");
        assert_eq!(top.number("n", 5, 5).unwrap(), Some(5));
        assert_eq!(top.string("none").unwrap(), None);
        assert!(top.strings("none").unwrap().is_empty());
    }
}
