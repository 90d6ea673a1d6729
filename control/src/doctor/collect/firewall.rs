//! The firewall by the programs that write it: `nft` for nftables (and `iptables` in front of it), `iptables-legacy-save` for the older tables.

use std::io::ErrorKind;
use std::path::Path;
use std::process::{Command, Stdio};

use super::super::facts::Firewall;
use super::super::firewall::{Tool, read};

pub(super) fn look() -> Firewall {
    let mut firewall = Firewall::default();
    match output("nft", &["-j", "list", "ruleset"]) {
        Ok(json) => match read::nft(&json) {
            Ok(chains) => firewall.chains.extend(chains),
            Err(error) => firewall.unread.push(format!("`nft -j list ruleset` printed no JSON: {error}")),
        },
        Err(why) => {
            firewall.unread.push(format!("nftables: {why}"));
            for (program, family) in [("iptables-nft-save", "ip"), ("ip6tables-nft-save", "ip6")] {
                if let Ok(text) = output(program, &[]) {
                    firewall.chains.extend(read::save(Tool::Nftables, family, &text));
                }
            }
        }
    }
    for (tables, program, family) in
        [("/proc/net/ip_tables_names", "iptables-legacy-save", "ip"), ("/proc/net/ip6_tables_names", "ip6tables-legacy-save", "ip6")]
    {
        match std::fs::read_to_string(tables) {
            // Without the module, or without a table of this namespace's, there is no rule.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Ok(names) if names.trim().is_empty() => {}
            Err(error) => firewall.unread.push(format!("{tables}: {error}")),
            Ok(_) => match output(program, &[]) {
                Ok(text) => firewall.chains.extend(read::save(Tool::Legacy, family, &text)),
                Err(why) => firewall.unread.push(format!("legacy iptables: {why}")),
            },
        }
    }
    firewall
}

/// What a program prints; it is looked for on the path, and where the system's own are.
fn output(program: &str, arguments: &[&str]) -> Result<String, String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let directories = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    let found = directories.map(|directory| directory.join(program)).find(|path| Path::is_file(path));
    let found = found.ok_or_else(|| format!("there is no `{program}`"))?;
    let output = Command::new(found).args(arguments).stdin(Stdio::null()).output().map_err(|error| format!("`{program}`: {error}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("`{program}`: {}", said.lines().next().unwrap_or("it failed without a word")))
}
