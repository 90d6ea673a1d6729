//! Tables for people, made from the same JSON that programs get.

use serde_json::Value;

use super::Format;

/// A column: its title, the field it shows, and whether only `-o wide` shows it.
struct Column(&'static str, &'static str, Shown);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Shown {
    Always,
    Wide,
}
use Shown::{Always, Wide};

fn columns(table: &str) -> &'static [Column] {
    match table {
        "services" => &[
            Column("SERVICE", "service", Always),
            Column("FACE", "face", Always),
            Column("ADDRESS", "address", Always),
            Column("PORT", "port", Always),
            Column("PROTOCOL", "protocol", Always),
            Column("BACKENDS", "backends", Always),
            Column("LOCAL", "localBackends", Always),
            Column("INTERNAL", "internalTrafficPolicy", Wide),
            Column("EXTERNAL", "externalTrafficPolicy", Wide),
        ],
        "backends" => &[
            Column("SERVICE", "service", Always),
            Column("PROTOCOL", "protocol", Always),
            Column("ADDRESS", "address", Always),
            Column("NODE", "node", Always),
            Column("USED", "used", Always),
            Column("USED-LOCALLY", "usedLocally", Wide),
            Column("REASON", "reason", Always),
            Column("PLACE", "place", Wide),
            Column("CONDITIONS", "conditions", Wide),
        ],
        "flows" => &[
            Column("PROTOCOL", "protocol", Always),
            Column("CLIENT", "client", Always),
            Column("DIALLED", "dialled", Always),
            Column("BACKEND", "backend", Always),
            Column("STATE", "state", Always),
            Column("SERVICE", "service", Always),
            Column("IDLE", "idleSeconds", Always),
            Column("AGE", "ageSeconds", Wide),
            Column("SEEN-AS", "seenAs", Wide),
            Column("KIND", "kind", Wide),
        ],
        "peers" => &[
            Column("NODE", "node", Always),
            Column("UNDERLAY", "underlay", Always),
            Column("MTU", "mtu", Always),
            Column("POD-CIDRS", "podCIDRs", Always),
            Column("ADDRESSES", "addresses", Wide),
        ],
        "ipam" => &[
            Column("ADDRESS", "address", Always),
            Column("OWNER", "owner", Always),
            Column("INTERFACE", "ifname", Always),
            Column("SANDBOX", "sandbox", Always),
        ],
        "workers" => &[
            Column("WORKER", "worker", Always),
            Column("CPU", "cpu", Always),
            Column("STATE", "state", Always),
            Column("GENERATION", "generation", Always),
            Column("RX-PACKETS", "rxPackets", Always),
            Column("TX-PACKETS", "txPackets", Always),
            Column("RX-BYTES", "rxBytes", Always),
            Column("AVG-FRAME", "averageFrameBytes", Always),
            Column("DROPS", "drops", Always),
            Column("TX-BYTES", "txBytes", Wide),
            Column("FLOWS-CREATED", "flowsCreated", Wide),
            Column("RESTARTS", "restarts", Wide),
        ],
        "drops" => &[Column("REASON", "reason", Always), Column("PACKETS", "packets", Always), Column("WHAT IT MEANS", "help", Always)],
        "routes" => &[Column("DESTINATION", "destination", Always), Column("VIA", "via", Always), Column("DETAIL", "detail", Always)],
        "steps" => &[Column("STAGE", "stage", Always), Column("WHAT HAPPENS", "detail", Always)],
        other => unreachable!("no table {other}"),
    }
}

/// Prints the table `name` out of the daemon's answer.
pub fn print(name: &str, value: &Value, format: Format) {
    match format {
        Format::Json | Format::Yaml => print_raw(value, format),
        Format::Table | Format::Wide => {
            let rows = value[name].as_array().map_or(&[][..], Vec::as_slice);
            let columns: Vec<&Column> = columns(name).iter().filter(|c| c.2 == Always || format == Format::Wide).collect();
            print!("{}", render(&columns, rows));
            if rows.is_empty() {
                eprintln!("No {name} found.");
            }
        }
    }
}

/// Prints `status`: one screen.
pub fn print_status(value: &Value, format: Format) {
    if let Format::Json | Format::Yaml = format {
        return print_raw(value, format);
    }
    let ready = if value["ready"] == true { "ready" } else { "NOT READY" };
    println!("{}  {ready}, generation {}, up {} s", cell(&value["node"]), cell(&value["generation"]), cell(&value["uptimeSeconds"]));
    let source = &value["source"];
    let connected = if source["connected"] == true { "connected" } else { "NOT CONNECTED" };
    println!("  source    {} ({connected})", cell(&source["kind"]));
    println!("  workers   {}, attach mode {}", cell(&value["workers"]), cell(&value["attachMode"]));
    println!("  addresses {}", cell(&value["addresses"]));
    println!("  gateway   {}", cell(&value["gateway"]));
    println!(
        "  pods      {}, services {}, peers {}, flows {}",
        cell(&value["pods"]),
        cell(&value["services"]),
        cell(&value["peers"]),
        cell(&value["flows"])
    );
    let offloads = value["offloads"].as_object().into_iter().flatten();
    println!("  offloads  {}", offloads.map(|(name, on)| format!("{name} {}", if on == true { "on" } else { "OFF" })).collect::<Vec<_>>().join(", "));
    for check in value["checks"].as_array().into_iter().flatten() {
        let mark = if check["ok"] == true { "√" } else { "×" };
        println!("  {mark} {}  {}", cell(&check["name"]), cell(&check["detail"]));
    }
    for problem in value["problems"].as_array().into_iter().flatten() {
        println!("  ‼ {}", cell(problem));
    }
}

fn print_raw(value: &Value, format: Format) {
    if format == Format::Json {
        println!("{}", serde_json::to_string_pretty(value).expect("a value is always JSON"));
    } else {
        print!("{}", serde_saphyr::to_string(value).expect("a value is always YAML"));
    }
}

/// Columns as wide as their widest cell, three blanks between, as kubectl prints them.
fn render(columns: &[&Column], rows: &[Value]) -> String {
    let mut cells: Vec<Vec<String>> = vec![columns.iter().map(|c| c.0.to_owned()).collect()];
    cells.extend(rows.iter().map(|row| columns.iter().map(|c| cell(&row[c.1])).collect()));
    let widths: Vec<usize> = (0..columns.len()).map(|at| cells.iter().map(|row| row[at].chars().count()).max().unwrap_or(0)).collect();
    let mut text = String::new();
    for row in &cells {
        let mut line = String::new();
        for (value, width) in row.iter().zip(&widths) {
            line.push_str(&format!("{value:width$}   "));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// A cell: text without quotes, lists with commas, nothing as `-`.
fn cell(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        Value::String(text) => text.clone(),
        Value::Array(items) if items.is_empty() => "-".into(),
        Value::Array(items) => items.iter().map(cell).collect::<Vec<_>>().join(","),
        Value::Bool(true) => "yes".into(),
        Value::Bool(false) => "no".into(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell_and_no_line_ends_in_blanks() {
        let rows = [
            json!({"destination": "10.0.0.0/24", "via": "pods", "detail": null}),
            json!({"destination": "::/0", "via": "host", "detail": ["a", "b"]}),
        ];
        let columns: Vec<&Column> = columns("routes").iter().collect();
        assert_eq!(render(&columns, &rows), "DESTINATION   VIA    DETAIL\n10.0.0.0/24   pods   -\n::/0          host   a,b\n");
    }
}
