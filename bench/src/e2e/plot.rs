//! Bars with their spread, as an SVG of its own: one group for each workload, one bar for each subject, a line from the least to the most.

use std::fmt::Write as _;

use super::report::Row;

const BAR_WIDTH: f64 = 44.0;
const GAP: f64 = 12.0;
const GROUP_GAP: f64 = 48.0;
const HEIGHT: f64 = 260.0;
const TOP: f64 = 56.0;
const LEFT: f64 = 64.0;
/// Colours that remain apart for colour-blind readers (Okabe and Ito).
const COLOURS: [&str; 5] = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9"];

/// The throughputs among `rows`.
pub fn bars(rows: &[Row]) -> String {
    let rows: Vec<&Row> = rows.iter().filter(|row| row.is_throughput()).collect();
    let most = rows.iter().map(|row| row.max).fold(1.0, f64::max);
    let step = step_of(most);
    let top_value = (most / step).ceil() * step;
    let y = |value: f64| TOP + HEIGHT * (1.0 - value / top_value);
    let mut subjects: Vec<&str> = Vec::new();
    for row in &rows {
        if !subjects.contains(&row.subject) {
            subjects.push(row.subject);
        }
    }
    let mut body = String::new();
    let mut x = LEFT + GROUP_GAP / 2.0;
    let mut group = (rows.first().map_or("", |row| row.workload), x);
    let label = |body: &mut String, (workload, from): (&str, f64), to: f64| {
        let _ = writeln!(body, r#"<text x="{:.1}" y="{:.1}" text-anchor="middle">{workload}</text>"#, (from + to) / 2.0, TOP + HEIGHT + 22.0);
    };
    for row in &rows {
        if row.workload != group.0 {
            label(&mut body, group, x - GAP);
            x += GROUP_GAP;
            group = (row.workload, x);
        }
        let colour = COLOURS[subjects.iter().position(|subject| *subject == row.subject).unwrap_or(0) % COLOURS.len()];
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
        let _ = writeln!(body, r#"<text x="{middle:.1}" y="{:.1}" text-anchor="middle">{:.1}</text>"#, y(row.max) - 5.0, row.median);
        x += BAR_WIDTH + GAP;
    }
    label(&mut body, group, x - GAP);
    let width = (x + GROUP_GAP / 2.0).max(LEFT + 130.0 * subjects.len() as f64);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width:.0}\" height=\"{:.0}\" font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
        TOP + HEIGHT + 40.0
    );
    let mut value = 0.0;
    while value <= top_value + step / 2.0 {
        let _ = writeln!(out, r##"<line x1="{LEFT}" y1="{0:.1}" x2="{width:.0}" y2="{0:.1}" stroke="#ddd"/>"##, y(value));
        let _ = writeln!(out, r#"<text x="{:.1}" y="{:.1}" text-anchor="end">{value}</text>"#, LEFT - 8.0, y(value) + 4.0);
        value += step;
    }
    let _ = writeln!(out, r#"<text x="8" y="{:.1}">Gb/s</text>"#, TOP - 12.0);
    for (at, subject) in subjects.iter().enumerate() {
        let x = LEFT + 130.0 * at as f64;
        let _ = writeln!(out, r#"<rect x="{x:.1}" y="10" width="12" height="12" fill="{}"/>"#, COLOURS[at % COLOURS.len()]);
        let _ = writeln!(out, r#"<text x="{:.1}" y="20">{subject}</text>"#, x + 18.0);
    }
    out + &body + "</svg>\n"
}

/// A round step that makes at most eight lines.
fn step_of(most: f64) -> f64 {
    [0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0].into_iter().find(|step| most / step <= 8.0).unwrap_or(100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(workload: &'static str, subject: &'static str, median: f64) -> Row {
        Row { workload, subject, unit: "Gb/s", median, min: median * 0.9, max: median * 1.1, ratios: Default::default() }
    }

    #[test]
    fn each_row_has_a_bar_and_each_workload_a_label() {
        let cpu = Row { unit: "CPU s/GB", ..row("a", "podgate", 1.0) };
        let svg = bars(&[row("a", "podgate", 8.0), row("a", "bridge", 11.0), cpu, row("b", "podgate", 3.0)]);
        assert_eq!(svg.matches("<title>").count(), 3);
        assert_eq!(svg.matches(">a</text>").count() + svg.matches(">b</text>").count(), 2);
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
    }

    #[test]
    fn nothing_measured_is_an_empty_plot() {
        assert!(bars(&[]).ends_with("</svg>\n"));
    }
}
