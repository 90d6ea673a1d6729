//! The CNI plugin: there, alive, of this version; its configuration whole and the first.

use serde_json::Value;

use super::super::facts::{Configuration, Facts, Plugin, Same, Stage};
use super::{Lines, config};
use crate::config::SourceConfig;
use crate::install_cni::PLUGIN;

const INSTALL: &str = "podgate install-cni";

pub(super) fn judge(facts: &Facts, lines: &mut Lines) {
    let cni = &facts.cni;
    for path in &cni.before {
        lines.warn(
            "cni-order",
            format!("{} comes before the gateway's: container runtimes take the first by name", path.display()),
            format!("move it away, or install ours under an earlier name (`{INSTALL} --conf-name`)"),
        );
    }
    if facts.stage == Stage::Before {
        lines.ok_unless_found("cni-order", "no CNI configuration would come before the gateway's");
        return;
    }
    // Bare machines need none.
    let wanted = matches!(config(facts), Some(config) if matches!(config.source, SourceConfig::Kubernetes { .. }));
    if cni.found == Plugin::Missing && cni.text.is_none() && !wanted {
        return lines.ok("cni-plugin", "the CNI plugin is not installed (container runtimes need it; `podgate attach` does not)");
    }
    let plugin = cni.plugin.display();
    match &cni.found {
        Plugin::Missing => lines.fail("cni-plugin", format!("the CNI plugin {plugin} is missing"), INSTALL),
        Plugin::NotExecutable => {
            lines.fail("cni-plugin", format!("the CNI plugin {plugin} is not executable"), format!("chmod 755 {plugin}, or {INSTALL}"))
        }
        Plugin::Fails(why) => lines.fail("cni-plugin", format!("the CNI plugin {plugin} does not answer: {why}"), INSTALL),
        Plugin::Answers(Some(Same::Different)) => lines.warn(
            "cni-plugin",
            format!("the CNI plugin {plugin} is another one than that beside this program: of another version, most likely"),
            INSTALL,
        ),
        Plugin::Answers(Some(Same::Alike)) => lines.ok("cni-plugin", format!("the CNI plugin {plugin} answers, and is that of this version")),
        Plugin::Answers(None) => lines.ok("cni-plugin", format!("the CNI plugin {plugin} answers")),
    }
    let path = cni.configuration.display();
    match &cni.text {
        None => lines.fail("cni-config", format!("the CNI configuration {path} is missing: container runtimes do not know of the gateway"), INSTALL),
        Some(Err(why)) => lines.fail("cni-config", format!("the CNI configuration {path} cannot be read: {why}"), INSTALL),
        Some(Ok(text)) => match wrong(text, facts) {
            Some(wrong) => lines.fail("cni-config", format!("the CNI configuration {path} {wrong}"), INSTALL),
            None => lines.ok("cni-config", format!("the CNI configuration {path} is whole")),
        },
    }
    lines.ok_unless_found("cni-order", "the gateway's CNI configuration is the first");
}

fn wrong(text: &str, facts: &Facts) -> Option<String> {
    let value: Value = match serde_json::from_str(text) {
        Ok(value) => value,
        Err(error) => return Some(format!("is not JSON: {error}")),
    };
    let plugins = value["plugins"].as_array().into_iter().flatten();
    let Some(plugin) = plugins.chain([&value]).find(|plugin| plugin["type"] == PLUGIN) else {
        return Some(format!("names no plugin {PLUGIN}"));
    };
    if !value["name"].is_string() || !value["cniVersion"].is_string() {
        return Some("has no name or no cniVersion".into());
    }
    let socket = plugin["socket"].as_str().unwrap_or(podgate_cni::DEFAULT_SOCKET);
    match &facts.configuration {
        Configuration::Read(config) if config.socket() != std::path::Path::new(socket) => {
            Some(format!("names the socket {socket}, and the daemon's is {}", config.socket().display()))
        }
        _ => None,
    }
}
