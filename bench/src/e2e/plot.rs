//! The rows as pictures: one SVG with a panel for each kind of figure.
//!
//! Throughputs are bars with a line from the least to the most; latencies, the numbers of services, workers and flows are curves.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::report::Row;

const BAR_WIDTH: f64 = 44.0;
const GAP: f64 = 12.0;
const GROUP_GAP: f64 = 48.0;
const HEIGHT: f64 = 260.0;
const TOP: f64 = 76.0;
const LEFT: f64 = 84.0;
const LINES_WIDTH: f64 = 640.0;
const LEGEND_WIDTH: f64 = 150.0;
/// Colours that remain apart for colour-blind readers (Okabe and Ito).
const COLOURS: [&str; 8] = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#999999"];

/// A picture of its own size.
struct Panel {
    width: f64,
    height: f64,
    body: String,
}

/// A curve: its name, and points of x and y.
type Series = (String, Vec<(f64, f64)>);

/// Everything that `rows` say.
pub fn page(rows: &[Row]) -> String {
    let mut panels = Vec::new();
    for unit in ["Gb/s", "packets/s", "tx/s", "conn/s"] {
        // Of paced workloads the rate is given, not found.
        let of_unit: Vec<&Row> = rows.iter().filter(|row| row.unit == unit && leads(rows, row)).collect();
        if !of_unit.is_empty() {
            panels.push(bars(&of_unit));
        }
    }
    for workload in ["rr-1", "rr-32", "rr-32-paced", "rr-between-nodes-1", "rr-between-nodes-32"] {
        let quantiles = [("p50 µs", 50.0), ("p99 µs", 99.0), ("p99.9 µs", 99.9)];
        // Each nine is as far from the next.
        let series = curves(rows, workload, |row| {
            let (_, at) = quantiles.iter().find(|(unit, _)| *unit == row.unit)?;
            Some((row.subject.clone(), 100.0 / (100.0 - at)))
        });
        panels.extend(lines(&format!("{workload}: µs at p50, p99 and p99.9"), &series));
    }
    for (workload, unit) in [("first-packet", "p50 µs"), ("first-packet", "p99 µs"), ("crr-to-service-32", "conn/s"), ("crr-to-service-1", "conn/s")]
    {
        let series = curves(rows, workload, |row| (row.unit == unit).then(|| sized(&row.subject)).flatten());
        panels.extend(lines(&format!("{workload}: {unit} by number of services"), &series));
    }
    let series = curves(rows, "pipeline-workers", |row| (row.unit == "M packets/s").then(|| sized(&row.subject)).flatten());
    panels.extend(lines("pipeline-workers: M packets/s by number of workers", &series));
    let series = curves(rows, "pipeline-flows", |row| (row.unit == "M packets/s").then(|| sized(&row.subject)).flatten());
    panels.extend(lines("pipeline-flows: M packets/s of one core by number of flows", &series));
    stack(&panels)
}

/// Whether it is what its workload was for: the first of its subject's units.
fn leads(rows: &[Row], row: &Row) -> bool {
    rows.iter().find(|other| other.workload == row.workload).is_some_and(|first| first.unit == row.unit)
}

/// `nftables-1000` is the point 1,000 of the curve `nftables`; `podgate-2-workers` the point 2 of `podgate-workers`.
fn sized(subject: &str) -> Option<(String, f64)> {
    let (mut name, mut size) = (Vec::new(), None);
    for part in subject.split('-') {
        match part.parse::<f64>() {
            Ok(number) => size = Some(number),
            Err(_) => name.push(part),
        }
    }
    Some((name.join("-"), size?))
}

fn curves(rows: &[Row], workload: &str, point: impl Fn(&Row) -> Option<(String, f64)>) -> Vec<Series> {
    let mut series: BTreeMap<String, Vec<(f64, f64)>> = BTreeMap::new();
    for row in rows.iter().filter(|row| row.workload == workload) {
        if let Some((name, x)) = point(row) {
            series.entry(name).or_default().push((x, row.median));
        }
    }
    let mut series: Vec<Series> = series.into_iter().collect();
    for (_, points) in &mut series {
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
    }
    series
}

/// One below the other.
fn stack(panels: &[Panel]) -> String {
    let (width, height) = panels.iter().fold((320.0_f64, 0.0), |(width, height), panel| (width.max(panel.width), height + panel.height));
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width:.0}\" height=\"{height:.0}\" font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    let mut y = 0.0;
    for panel in panels {
        let _ = write!(out, "<g transform=\"translate(0 {y:.0})\">\n{}</g>\n", panel.body);
        y += panel.height;
    }
    out + "</svg>\n"
}

fn colour(at: usize) -> &'static str {
    COLOURS[at % COLOURS.len()]
}

fn legend<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let mut out = String::new();
    for (at, name) in names.enumerate() {
        let (x, y) = (LEFT + LEGEND_WIDTH * (at % 6) as f64, 24.0 + 16.0 * (at / 6) as f64);
        let _ = writeln!(out, r#"<rect x="{x:.1}" y="{y:.1}" width="12" height="12" fill="{}"/>"#, colour(at));
        let _ = writeln!(out, r#"<text x="{:.1}" y="{:.1}">{name}</text>"#, x + 18.0, y + 10.0);
    }
    out
}

fn title(text: &str) -> String {
    format!("<text x=\"8\" y=\"16\" font-weight=\"bold\">{text}</text>\n")
}

/// Bars of rows that have one unit, in groups of their workloads.
fn bars(rows: &[&Row]) -> Panel {
    let most = rows.iter().map(|row| row.max).fold(f64::MIN_POSITIVE, f64::max);
    let step = step_of(most);
    let top_value = (most / step).ceil() * step;
    let y = |value: f64| TOP + HEIGHT * (1.0 - value / top_value);
    let mut subjects: Vec<&str> = Vec::new();
    for row in rows {
        if !subjects.contains(&&*row.subject) {
            subjects.push(&row.subject);
        }
    }
    let mut body = String::new();
    let mut x = LEFT + GROUP_GAP / 2.0;
    let mut group = (rows.first().map_or("", |row| row.workload), x);
    let label = |body: &mut String, (workload, from): (&str, f64), to: f64| {
        let _ = writeln!(body, r#"<text x="{:.1}" y="{:.1}" text-anchor="middle">{workload}</text>"#, (from + to) / 2.0, TOP + HEIGHT + 22.0);
    };
    for row in rows {
        if row.workload != group.0 {
            label(&mut body, group, x - GAP);
            x += GROUP_GAP;
            group = (row.workload, x);
        }
        let colour = colour(subjects.iter().position(|subject| *subject == row.subject).unwrap_or(0));
        let middle = x + BAR_WIDTH / 2.0;
        let _ = writeln!(
            body,
            r#"<rect x="{x:.1}" y="{:.1}" width="{BAR_WIDTH}" height="{:.1}" fill="{colour}"><title>{} {}: {:.2} (min {:.2}, max {:.2}) {}</title></rect>"#,
            y(row.median),
            y(0.0) - y(row.median),
            row.workload,
            row.subject,
            row.median,
            row.min,
            row.max,
            row.unit
        );
        for (x1, y1, x2, y2) in [
            (middle, y(row.min), middle, y(row.max)),
            (middle - 6.0, y(row.min), middle + 6.0, y(row.min)),
            (middle - 6.0, y(row.max), middle + 6.0, y(row.max)),
        ] {
            let _ = writeln!(body, r#"<line x1="{x1:.1}" y1="{y1:.1}" x2="{x2:.1}" y2="{y2:.1}" stroke="black"/>"#);
        }
        let _ = writeln!(body, r#"<text x="{middle:.1}" y="{:.1}" text-anchor="middle">{}</text>"#, y(row.max) - 5.0, short(row.median));
        x += BAR_WIDTH + GAP;
    }
    label(&mut body, group, x - GAP);
    let width = (x + GROUP_GAP / 2.0).max(LEFT + LEGEND_WIDTH * subjects.len().min(6) as f64);
    let mut grid = title(rows.first().map_or("", |row| row.unit));
    let mut value = 0.0;
    while value <= top_value + step / 2.0 {
        let _ = writeln!(grid, r##"<line x1="{LEFT}" y1="{0:.1}" x2="{width:.0}" y2="{0:.1}" stroke="#ddd"/>"##, y(value));
        let _ = writeln!(grid, r#"<text x="{:.1}" y="{:.1}" text-anchor="end">{value}</text>"#, LEFT - 8.0, y(value) + 4.0);
        value += step;
    }
    Panel { width, height: TOP + HEIGHT + 44.0, body: grid + &legend(subjects.into_iter()) + &body }
}

/// Curves over a logarithmic x, from zero up; nothing if no curve has two points.
fn lines(heading: &str, series: &[Series]) -> Option<Panel> {
    let points = || series.iter().flat_map(|(_, points)| points.iter().copied());
    if series.iter().all(|(_, points)| points.len() < 2) {
        return None;
    }
    let (left, right) = points().fold((f64::INFINITY, f64::MIN_POSITIVE), |(left, right), (x, _)| (left.min(x), right.max(x)));
    let most = points().map(|(_, y)| y).fold(f64::MIN_POSITIVE, f64::max);
    let step = step_of(most);
    let top_value = (most / step).ceil() * step;
    let x = |value: f64| LEFT + 24.0 + (LINES_WIDTH - 48.0) * (value / left).ln() / (right / left).ln();
    let y = |value: f64| TOP + HEIGHT * (1.0 - value / top_value);
    let mut body = title(heading) + &legend(series.iter().map(|(name, _)| &**name));
    let mut value = 0.0;
    while value <= top_value + step / 2.0 {
        let _ = writeln!(body, r##"<line x1="{LEFT}" y1="{0:.1}" x2="{1:.0}" y2="{0:.1}" stroke="#ddd"/>"##, y(value), LEFT + LINES_WIDTH);
        let _ = writeln!(body, r#"<text x="{:.1}" y="{:.1}" text-anchor="end">{value}</text>"#, LEFT - 8.0, y(value) + 4.0);
        value += step;
    }
    let mut marks: Vec<f64> = points().map(|(x, _)| x).collect();
    marks.sort_by(f64::total_cmp);
    marks.dedup();
    for mark in marks {
        let _ = writeln!(body, r#"<text x="{:.1}" y="{:.1}" text-anchor="middle">{mark:.0}</text>"#, x(mark), TOP + HEIGHT + 18.0);
    }
    for (at, (name, points)) in series.iter().enumerate() {
        let path: Vec<String> = points.iter().map(|(px, py)| format!("{:.1},{:.1}", x(*px), y(*py))).collect();
        let _ = writeln!(body, r#"<polyline points="{}" fill="none" stroke="{}" stroke-width="2"/>"#, path.join(" "), colour(at));
        for (px, py) in points {
            let _ = writeln!(
                body,
                r#"<circle cx="{:.1}" cy="{:.1}" r="3" fill="{}"><title>{name} {px:.0}: {py:.2}</title></circle>"#,
                x(*px),
                y(*py),
                colour(at)
            );
        }
    }
    Some(Panel { width: LEFT + LINES_WIDTH + 24.0, height: TOP + HEIGHT + 44.0, body })
}

/// A figure as a bar has room for it.
fn short(value: f64) -> String {
    if value >= 10_000.0 {
        format!("{:.0}k", value / 1e3)
    } else if value >= 100.0 {
        format!("{value:.0}")
    } else {
        format!("{value:.1}")
    }
}

/// A round step (1, 2 or 5 times a power of ten) that makes at most eight lines.
fn step_of(most: f64) -> f64 {
    let decade = 10_f64.powf((most / 8.0).log10().floor());
    [1.0, 2.0, 5.0].into_iter().map(|digit| digit * decade).find(|step| most / step <= 8.0).unwrap_or(10.0 * decade)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(workload: &'static str, subject: &str, unit: &'static str, median: f64) -> Row {
        Row { workload, subject: subject.to_owned(), unit, median, min: median * 0.9, max: median * 1.1, ratios: Default::default() }
    }

    #[test]
    fn each_throughput_has_a_bar_and_each_workload_a_label() {
        let rows = [
            row("a", "podgate", "Gb/s", 8.0),
            row("a", "bridge", "Gb/s", 11.0),
            row("a", "podgate", "CPU s/GB", 1.0),
            row("b", "podgate", "Gb/s", 3.0),
        ];
        let svg = page(&rows);
        assert_eq!(svg.matches("<title>").count(), 3);
        assert_eq!(svg.matches(">a</text>").count() + svg.matches(">b</text>").count(), 2);
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
    }

    #[test]
    fn subjects_of_several_sizes_are_a_curve() {
        let of = |subject: &str, median: f64| row("first-packet", subject, "p99 µs", median);
        let svg = page(&[of("podgate-10", 100.0), of("podgate-10000", 110.0), of("nftables-1", 90.0), of("nftables-1000", 95.0)]);
        assert_eq!(svg.matches("<polyline").count(), 2);
        assert!(svg.contains("<title>podgate 10000: 110.00</title>"), "{svg}");
        assert_eq!(sized("podgate-2-workers"), Some(("podgate-workers".into(), 2.0)));
        assert_eq!(sized("bridge"), None);
    }

    #[test]
    fn nothing_measured_is_an_empty_page() {
        assert!(page(&[]).ends_with("</svg>\n"));
    }

    #[test]
    fn steps_are_round() {
        assert_eq!([step_of(7.0), step_of(11.0), step_of(120_000.0)], [1.0, 2.0, 20_000.0]);
    }
}
