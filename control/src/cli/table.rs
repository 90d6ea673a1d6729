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
            Column("BALANCE", "balance", Wide),
            Column("AFFINITY(S)", "sessionAffinitySeconds", Wide),
            Column("SOURCE-RANGES", "sourceRanges", Wide),
            Column("HEALTH-CHECK", "healthCheckNodePort", Wide),
        ],
        "backends" => &[
            Column("SERVICE", "service", Always),
            Column("PROTOCOL", "protocol", Always),
            Column("ADDRESS", "address", Always),
            Column("NODE", "node", Always),
            Column("USED", "used", Always),
            Column("USED-LOCALLY", "usedLocally", Wide),
            Column("WHY-LOCALLY", "localReason", Wide),
            Column("REASON", "reason", Always),
            Column("PLACE", "place", Wide),
            Column("WEIGHT", "weight", Wide),
            Column("CONDITIONS", "conditions", Wide),
        ],
        "changes" => &[
            Column("KIND", "kind", Always),
            Column("NAME", "name", Always),
            Column("CHANGE", "change", Always),
            Column("GENERATIONS", "generations", Wide),
            Column("AGE(S)", "ageSeconds", Always),
            Column("DETAIL", "detail", Always),
        ],
        "flows" => &[
            Column("PROTOCOL", "protocol", Always),
            Column("CLIENT", "client", Always),
            Column("DIALLED", "dialled", Always),
            Column("BACKEND", "backend", Always),
            Column("STATE", "state", Always),
            Column("SERVICE", "service", Always),
            Column("IDLE(S)", "idleSeconds", Always),
            Column("AGE(S)", "ageSeconds", Wide),
            Column("SEEN-AS", "seenAs", Wide),
            Column("KIND", "kind", Wide),
        ],
        "peers" => &[
            Column("NODE", "node", Always),
            Column("UNDERLAY", "underlay", Always),
            Column("MTU", "mtu", Always),
            Column("POD-CIDRS", "podCIDRs", Always),
            Column("ADDRESSES", "addresses", Wide),
            Column("DIRECT-RETURN", "directReturn", Wide),
        ],
        "ipam" => &[
            Column("ADDRESS", "address", Always),
            Column("OWNER", "owner", Always),
            Column("INTERFACE", "ifname", Always),
            Column("AGE", "age", Always),
            Column("PLUGIN", "plugin", Always),
            Column("SANDBOX", "sandbox", Always),
            Column("POOL", "pool", Wide),
            Column("MODE", "mode", Wide),
        ],
        "pools" => &[
            Column("POOL", "pool", Always),
            Column("RANGE", "cidr", Always),
            Column("GATEWAY", "gateway", Always),
            Column("CAPACITY", "capacity", Always),
            Column("USED", "used", Always),
            Column("RESERVED", "reserved", Always),
            Column("EXCLUDED", "excluded", Always),
        ],
        "findings" => &[
            Column("ADDRESS", "address", Always),
            Column("KIND", "kind", Always),
            Column("OWNER", "owner", Always),
            Column("FIXED", "fixed", Always),
            Column("PROBLEM", "problem", Always),
            Column("INTERFACE", "ifname", Wide),
            Column("SANDBOX", "sandbox", Wide),
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

/// The table `name` out of the daemon's answer.
pub fn render(name: &str, value: &Value, format: Format) -> String {
    match format {
        Format::Json | Format::Yaml => raw(value, format),
        Format::Table | Format::Wide => {
            let columns: Vec<&Column> = columns(name).iter().filter(|c| c.2 == Always || format == Format::Wide).collect();
            align(&columns, rows(name, value))
        }
    }
}

/// Whether the table has no row.
pub fn is_empty(name: &str, value: &Value) -> bool {
    rows(name, value).is_empty()
}

/// What is said of a table without rows.
pub fn nothing(name: &str) -> String {
    match name {
        "changes" => "Nothing changed.".into(),
        "drops" => "Nothing was dropped.".into(),
        "ipam" => "No address is in use.".into(),
        "findings" => "Addresses agree with what is attached.".into(),
        "peers" => "No other nodes found.".into(),
        other => format!("No {other} found."),
    }
}

fn rows<'a>(name: &str, value: &'a Value) -> &'a [Value] {
    value[name].as_array().map_or(&[][..], Vec::as_slice)
}

/// `status`: one screen.
pub fn status(value: &Value, format: Format) -> String {
    if let Format::Json | Format::Yaml = format {
        return raw(value, format);
    }
    if value.is_null() {
        return String::new();
    }
    let ready = if value["ready"] == true { "ready" } else { "NOT READY" };
    let source = &value["source"];
    let connected = if source["connected"] == true { "connected" } else { "NOT CONNECTED" };
    let offloads = value["offloads"].as_object().into_iter().flatten();
    let offloads: Vec<String> = offloads.map(|(name, on)| format!("{name} {}", if on == true { "on" } else { "OFF" })).collect();
    let [node, generation, uptime, kind, workers, mode, addresses, gateway, mtu, pods, services, peers, flows] = [
        &value["node"],
        &value["generation"],
        &value["uptimeSeconds"],
        &source["kind"],
        &value["workers"],
        &value["attachMode"],
        &value["addresses"],
        &value["gateway"],
        &value["podMtu"],
        &value["pods"],
        &value["services"],
        &value["peers"],
        &value["flows"],
    ]
    .map(cell);
    let mut text = format!(
        "{node}  {ready}, generation {generation}, up {uptime} s\n\
        \x20 source    {kind} ({connected})\n\
        \x20 workers   {workers}, attach mode {mode}\n\
        \x20 addresses {addresses}\n\
        \x20 gateway   {gateway}, pod MTU {mtu}\n\
        \x20 pods      {pods}, services {services}, peers {peers}, flows {flows}\n\
        \x20 offloads  {}\n",
        offloads.join(", ")
    );
    if let Some(pending) = value["pending"].as_object() {
        let seconds = pending["seconds"].as_f64().unwrap_or_default();
        let [generation, workers, objects] = ["generation", "workers", "objects"].map(|key| cell(&pending[key]));
        let more = pending["objectsMore"].as_u64().filter(|more| *more > 0).map(|more| format!(" and {more} more")).unwrap_or_default();
        text.push_str(&format!("  pending   generation {generation} for {seconds:.1} s at workers {workers}: {objects}{more}\n"));
    }
    for check in value["checks"].as_array().into_iter().flatten() {
        let mark = if check["ok"] == true { "√" } else { "×" };
        text.push_str(&format!("  {mark} {}  {}\n", cell(&check["name"]), cell(&check["detail"])));
    }
    for problem in value["problems"].as_array().into_iter().flatten() {
        text.push_str(&format!("  ‼ {}\n", cell(problem)));
    }
    text
}

/// For programs.
pub fn raw(value: &Value, format: Format) -> String {
    if format == Format::Yaml {
        return serde_saphyr::to_string(value).expect("a value is always YAML");
    }
    let mut text = serde_json::to_string_pretty(value).expect("a value is always JSON");
    text.push('\n');
    text
}

/// A table of these columns (title and field), every one of them shown.
pub(super) fn plain(columns: &[(&'static str, &'static str)], rows: &[Value]) -> String {
    let columns: Vec<Column> = columns.iter().map(|(title, field)| Column(title, field, Always)).collect();
    align(&columns.iter().collect::<Vec<_>>(), rows)
}

/// Columns as wide as their widest cell, three blanks between, as kubectl prints them.
fn align(columns: &[&Column], rows: &[Value]) -> String {
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
        assert_eq!(align(&columns, &rows), "DESTINATION   VIA    DETAIL\n10.0.0.0/24   pods   -\n::/0          host   a,b\n");
    }

    #[test]
    fn the_screen_names_every_problem_and_marks_every_check() {
        let value = json!({
            "node": "node-1", "ready": false, "generation": 3, "uptimeSeconds": 9, "workers": 2, "attachMode": "veth", "podMtu": 1464,
            "source": {"kind": "directory", "connected": false}, "offloads": {"tso": true, "uso": false}, "addresses": ["192.0.2.1"],
            "gateway": [], "pods": 0, "services": 1, "peers": 0, "flows": 0,
            "checks": [{"name": "pods IPv4", "ok": true, "detail": "0.5 ms"}, {"name": "host IPv4", "ok": false, "detail": "no answer"}],
            "problems": ["source: gone"],
        });
        let screen = status(&value, Format::Table);
        for part in [
            "node-1  NOT READY, generation 3",
            "directory (NOT CONNECTED)",
            "tso on, uso OFF",
            "√ pods IPv4",
            "× host IPv4  no answer",
            "‼ source: gone",
        ] {
            assert!(screen.contains(part), "{part:?} in\n{screen}");
        }
        assert!(serde_json::from_str::<Value>(&status(&value, Format::Json)).is_ok_and(|read| read == value));
    }

    #[test]
    fn an_empty_table_has_its_titles_and_is_known_to_be_empty() {
        let value = json!({"schemaVersion": 1, "peers": []});
        assert_eq!(render("peers", &value, Format::Table), "NODE   UNDERLAY   MTU   POD-CIDRS\n");
        assert!(is_empty("peers", &value));
    }
}
