//! What is in the programs: a CycloneDX list (specification 1.5) of every crate that is linked into them, with its licence and the checksum that
//! `Cargo.lock` has of it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Value, json};

use crate::{PackageError, inputs};

/// Of the programs of this workspace, as JSON.
pub(crate) fn of_workspace(root: &Path) -> Result<Vec<u8>, PackageError> {
    let lock_path = root.join("Cargo.lock");
    let lock = std::fs::read_to_string(&lock_path).map_err(PackageError::file("read", lock_path))?;
    let list = list(&inputs::crates(root)?, &checksums(&lock));
    Ok(format!("{list:#}\n").into_bytes())
}

fn list(tree: &str, checksums: &BTreeMap<(String, String), String>) -> Value {
    // A crate that appears again is marked with an asterisk.
    let crates: BTreeSet<(&str, &str, &str)> = tree
        .lines()
        .filter_map(|line| {
            let (package, license) = line.split_once('\t')?;
            let mut words = package.split_whitespace();
            Some((words.next()?, words.next()?.strip_prefix('v')?, license.trim_end_matches("(*)").trim()))
        })
        .collect();
    let component = |(name, version, license): &(&str, &str, &str)| {
        let purl = format!("pkg:cargo/{name}@{version}");
        let mut component = json!({"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl});
        if !license.is_empty() {
            // Some crates still write the slash for OR.
            component["licenses"] = json!([{"expression": license.replace('/', " OR ")}]);
        }
        if let Some(checksum) = checksums.get(&((*name).to_owned(), (*version).to_owned())) {
            component["hashes"] = json!([{"alg": "SHA-256", "content": checksum}]);
        }
        component
    };
    json!({
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": {
            "type": "application", "bom-ref": "podgate", "name": "podgate", "version": env!("CARGO_PKG_VERSION"),
            "licenses": [{"license": {"id": "Apache-2.0"}}],
        }},
        "components": crates.iter().map(component).collect::<Vec<_>>(),
    })
}

/// What a `Cargo.lock` has, by name and version. Its form is TOML as Cargo alone writes it: one key a line.
fn checksums(lock: &str) -> BTreeMap<(String, String), String> {
    let value = |package: &str, key: &str| {
        let line = package.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(" = \""))?;
        line.strip_suffix('"').map(str::to_owned)
    };
    let packages = lock.split("[[package]]").skip(1);
    packages.filter_map(|package| Some(((value(package, "name")?, value(package, "version")?), value(package, "checksum")?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_crate_is_listed_once_with_its_licence_and_checksum() {
        let lock = "version = 4\n\n[[package]]\nname = \"a\"\nversion = \"1.0.0\"\nsource = \"registry\"\nchecksum = \"00ff\"\n\n\
                    [[package]]\nname = \"own\"\nversion = \"0.1.0\"\ndependencies = [\n \"a\",\n]\n";
        let tree = "own v0.1.0 (/somewhere)\tApache-2.0\na v1.0.0\tMIT/Apache-2.0\na v1.0.0\tMIT/Apache-2.0 (*)\n\n";
        let list = list(tree, &checksums(lock));
        let components = list["components"].as_array().unwrap();
        assert_eq!(components.len(), 2);
        assert_eq!(components[0]["purl"], "pkg:cargo/a@1.0.0");
        assert_eq!(components[0]["hashes"][0]["content"], "00ff");
        assert_eq!(components[0]["licenses"][0]["expression"], "MIT OR Apache-2.0");
        assert!(components[1]["hashes"].is_null() && !list.to_string().contains("/somewhere"), "{list}");
    }

    #[test]
    fn the_list_of_this_workspace_names_what_is_linked_and_not_what_tests_use() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let list: Value = serde_json::from_slice(&of_workspace(&root).unwrap()).unwrap();
        let names: Vec<&str> = list["components"].as_array().unwrap().iter().filter_map(|c| c["name"].as_str()).collect();
        assert!(["podgate", "podgate-cni", "podgate-core", "tokio", "smoltcp"].iter().all(|name| names.contains(name)), "{names:?}");
        assert!(!names.contains(&"proptest") && !names.contains(&"criterion"), "{names:?}");
        assert!(list["components"].as_array().unwrap().iter().all(|c| c["licenses"].is_array()), "a crate without a licence");
    }
}
