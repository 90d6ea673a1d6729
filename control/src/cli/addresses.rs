//! `podgate ipam`: who has which address, whether that agrees with what is attached, and taking back what leaked.

use clap::{Args, Subcommand};
use podgate_cni::{CallError, Client, Request};
use serde_json::{Value, json};

use super::{Exit, Format, Output, put, table};

/// The words of `podgate ipam`.
#[derive(Debug, Args)]
pub struct Ipam {
    /// What else than listing
    #[command(subcommand)]
    pub command: Option<IpamCommand>,
    /// How to print
    #[command(flatten)]
    pub output: Output,
}

/// What else than listing.
#[derive(Debug, Subcommand)]
pub enum IpamCommand {
    /// Compare addresses with what is attached: leaks, doubles, addresses outside the node's ranges
    ///
    /// Exit code 3 if anything is left that is not as it should be.
    Check {
        /// Release what nobody uses, and take note of what somebody does
        #[arg(long)]
        fix: bool,
        /// How to print
        #[command(flatten)]
        output: Output,
    },
    /// Take back the addresses of a pod that is no longer attached
    Release {
        /// One of its addresses, or its name
        #[arg(value_name = "ADDRESS|NAMESPACE/NAME")]
        what: String,
    },
}

pub(super) fn ask(client: &Client, words: &Ipam) -> Result<Exit, CallError> {
    match &words.command {
        None => {
            let value = client.call(&Request::Show { table: "ipam".into() }, &[])?;
            Ok(list(value, words.output.format))
        }
        Some(IpamCommand::Check { fix, output }) => {
            let value = client.call(&Request::IpamCheck { fix: *fix }, &[])?;
            let printed = super::print("findings", &value, output.format);
            let left = value["findings"].as_array().is_some_and(|findings| findings.iter().any(|finding| finding["fixed"] != true));
            Ok(if printed == Exit::Ok && left { Exit::Degraded } else { printed })
        }
        Some(IpamCommand::Release { what }) => {
            let value = client.call(&Request::IpamRelease { what: what.clone() }, &[])?;
            let released = value["released"].as_array().into_iter().flatten().filter_map(Value::as_str);
            Ok(put(&released.map(|address| format!("{address}\n")).collect::<String>()))
        }
    }
}

/// The table of addresses; with `-o wide`, that of ranges behind it.
fn list(mut value: Value, format: Format) -> Exit {
    if let Format::Json | Format::Yaml = format {
        return super::print("ipam", &value, format);
    }
    for row in value["ipam"].as_array_mut().into_iter().flatten() {
        row["age"] = row["ageSeconds"].as_u64().map_or(Value::Null, |seconds| json!(age(seconds)));
    }
    let exit = super::print("ipam", &value, format);
    let ranges = value["pools"].as_array().is_some_and(|pools| !pools.is_empty());
    if exit != Exit::Ok || format == Format::Table || !ranges {
        return exit;
    }
    put(&format!("\n{}", table::render("pools", &value, format)))
}

/// How long ago, as kubectl prints it (`k8s.io/apimachinery` `pkg/util/duration`, `HumanDuration`).
fn age(seconds: u64) -> String {
    let (minutes, hours) = (seconds / 60, seconds / 3600);
    let with = |number: u64, unit: &str, rest: u64, rest_unit: &str| match rest {
        0 => format!("{number}{unit}"),
        rest => format!("{number}{unit}{rest}{rest_unit}"),
    };
    match () {
        () if seconds < 120 => format!("{seconds}s"),
        () if minutes < 10 => with(minutes, "m", seconds % 60, "s"),
        () if minutes < 180 => format!("{minutes}m"),
        () if hours < 8 => with(hours, "h", minutes % 60, "m"),
        () if hours < 48 => format!("{hours}h"),
        () if hours < 8 * 24 => with(hours / 24, "d", hours % 24, "h"),
        () if hours < 2 * 365 * 24 => format!("{}d", hours / 24),
        () if hours < 8 * 365 * 24 => with(hours / 24 / 365, "y", hours / 24 % 365, "d"),
        () => format!("{}y", hours / 24 / 365),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_as_kubectl_prints_them() {
        let (minute, hour, day, year) = (60, 3600, 86_400, 365 * 86_400);
        for (seconds, text) in [
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (5 * minute, "5m"),
            (5 * minute + 7, "5m7s"),
            (10 * minute - 1, "9m59s"),
            (10 * minute + 7, "10m"),
            (179 * minute, "179m"),
            (3 * hour, "3h"),
            (3 * hour + 12 * minute, "3h12m"),
            (8 * hour + 59 * minute, "8h"),
            (47 * hour, "47h"),
            (48 * hour, "2d"),
            (7 * day + 3 * hour, "7d3h"),
            (8 * day + 3 * hour, "8d"),
            (729 * day, "729d"),
            (2 * year, "2y"),
            (2 * year + 5 * day, "2y5d"),
            (9 * year + 5 * day, "9y"),
        ] {
            assert_eq!(age(seconds), text, "{seconds}");
        }
    }
}
