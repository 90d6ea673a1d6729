//! What was measured: median, spread and paired ratios, as rows, as a table and as JSON.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};

use super::stream::Sample;
use super::subject::Subject;

/// One figure of one subject in one workload.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The workload's name.
    pub workload: &'static str,
    /// The subject's name.
    pub subject: &'static str,
    /// What is counted.
    pub unit: &'static str,
    /// Over all rounds.
    pub median: f64,
    /// The least of all rounds.
    pub min: f64,
    /// The most of all rounds.
    pub max: f64,
    /// The median of this subject's figure over the peer's in the same round, by the peer's name.
    pub ratios: BTreeMap<&'static str, f64>,
}

/// All rows of a run.
#[derive(Debug)]
pub struct Report {
    rounds: u32,
    duration: Duration,
    rows: Vec<Row>,
    notes: Vec<String>,
    unexplained: Vec<String>,
}

/// What these workloads explain. A TCP stream that seeks its limit makes queues and socket buffers overflow, and slows down; and a pod's own
/// kernel looks for routers from its link-local address, which no pod may send from. All else that is dropped is a fault.
const EXPLAINED: [&str; 6] =
    ["martian_source", "kernel_pods_queue", "kernel_host_queue", "kernel_overlay_sockets", "kernel_port_sockets", "kernel_refused_pod_source"];

/// A figure of a sample, and its unit.
type Figure = (&'static str, fn(&Sample) -> f64);

const GBIT: &str = "Gb/s";
const FIGURES: [Figure; 3] = [(GBIT, Sample::gbit_per_s), ("CPU s/GB", Sample::cpu_s_per_gbyte), ("retransmits", |sample| sample.retransmits as f64)];

impl Row {
    /// Whether more is better and a bar of it says something.
    pub fn is_throughput(&self) -> bool {
        self.unit == GBIT
    }
}

impl Report {
    /// An empty one.
    pub fn new(rounds: u32, duration: Duration) -> Report {
        Report { rounds, duration, rows: Vec::new(), notes: Vec::new(), unexplained: Vec::new() }
    }

    /// Adds the samples of a workload: for each subject one of each round.
    pub fn add(&mut self, workload: &'static str, subjects: &[Subject], samples: &[Vec<Sample>]) {
        for (unit, figure) in FIGURES {
            let all: Vec<Vec<f64>> = samples.iter().map(|samples| samples.iter().map(figure).collect()).collect();
            for (subject, values) in subjects.iter().zip(&all) {
                let ratio = |peer: &[f64]| median(values.iter().zip(peer).map(|(ours, theirs)| ours / theirs).collect());
                let peers = subjects.iter().zip(&all).filter(|(peer, _)| *peer != subject && **peer != Subject::Podgate);
                let ratios = peers.map(|(peer, values)| (peer.name(), ratio(values))).filter(|(_, ratio)| ratio.is_finite()).collect();
                let (min, max) = values.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(min, max), value| (min.min(*value), max.max(*value)));
                self.rows.push(Row { workload, subject: subject.name(), unit, median: median(values.clone()), min, max, ratios });
            }
        }
    }

    /// Notes packets that a node of Podgate's dropped during a workload.
    pub fn dropped(&mut self, workload: &str, node: &str, reason: &str, packets: u64) {
        self.notes.push(format!("{workload}: {node} dropped {packets} packets as {reason}"));
        if !EXPLAINED.contains(&reason) {
            self.unexplained.push(format!("{packets} as {reason} on {node} during {workload}"));
        }
    }

    /// All rows.
    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// Drops that no workload explains.
    pub fn unexplained(&self) -> &[String] {
        &self.unexplained
    }

    /// As a table for people.
    pub fn table(&self) -> String {
        let mut out = format!("{} rounds of {:.1} s each, every subject in every round\n", self.rounds, self.duration.as_secs_f64());
        let mut workload = "";
        for row in &self.rows {
            if row.workload != workload {
                workload = row.workload;
                let _ = writeln!(out, "\n{workload:<24} {:<12} {:>9} {:>9} {:>9}   ratio to", "unit", "median", "min", "max");
            }
            let ratios: Vec<String> = row.ratios.iter().map(|(peer, ratio)| format!("{peer} {ratio:.2}")).collect();
            let figure = |value: f64| if value >= 1000.0 { format!("{value:.0}") } else { format!("{value:.2}") };
            let figures = [row.median, row.min, row.max].map(figure);
            let line =
                format!("  {:<22} {:<12} {:>9} {:>9} {:>9}   {}", row.subject, row.unit, figures[0], figures[1], figures[2], ratios.join(", "));
            let _ = writeln!(out, "{}", line.trim_end());
        }
        if !self.notes.is_empty() {
            let _ = writeln!(out, "\n{}", self.notes.join("\n"));
        }
        out
    }

    /// As JSON for programs.
    pub fn json(&self) -> Value {
        json!({
            "schemaVersion": 1,
            "rounds": self.rounds,
            "seconds": self.duration.as_secs_f64(),
            "rows": self.rows,
            "notes": self.notes,
        })
    }
}

/// The middle value, or the mean of the two in the middle.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        len if len % 2 == 1 => values[len / 2],
        len => (values[len / 2 - 1] + values[len / 2]) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(bytes: u64) -> Sample {
        Sample { bytes, elapsed: Duration::from_secs(1), cpu: Duration::from_millis(500), retransmits: 0 }
    }

    #[test]
    fn ratios_are_of_rounds_and_not_of_medians() {
        let mut report = Report::new(3, Duration::from_secs(1));
        // A slow round slows both: each ratio is 2, although the medians' would be 3.
        let (ours, theirs) = ([2_000_000_000, 6_000_000_000, 8_000_000_000], [1_000_000_000, 3_000_000_000, 4_000_000_000]);
        report.add("w", &[Subject::Podgate, Subject::Bridge], &[ours.map(sample).to_vec(), theirs.map(sample).to_vec()]);
        let row = &report.rows()[0];
        assert_eq!((row.subject, row.unit, row.median, row.min, row.max), ("podgate", "Gb/s", 48.0, 16.0, 64.0));
        assert_eq!(row.ratios, [("bridge", 2.0)].into());
        assert!(report.rows()[1].ratios.is_empty(), "a peer is not held against us");
        let json = report.json();
        assert_eq!(json["rows"][0]["ratios"]["bridge"], 2.0);
        // Nothing over nothing is no ratio.
        assert!(report.rows().iter().filter(|row| row.unit == "retransmits").all(|row| row.ratios.is_empty()));
        assert!(report.table().contains("bridge 2.00"));
    }

    #[test]
    fn overflows_are_noted_and_other_drops_fail_the_run() {
        let mut report = Report::new(1, Duration::from_secs(1));
        report.dropped("w", "node-1", "kernel_pods_queue", 3);
        assert!(report.unexplained().is_empty() && report.table().contains("3 packets"));
        report.dropped("w", "node-1", "no_flow", 1);
        assert_eq!(report.unexplained().len(), 1);
    }

    #[test]
    fn a_median_of_two_lies_between() {
        assert_eq!(median(vec![1.0, 4.0]), 2.5);
        assert_eq!(median(vec![9.0, 1.0, 4.0]), 4.0);
    }
}
