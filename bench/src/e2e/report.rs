//! What was measured: median, spread and paired ratios, as rows, as a table and as JSON.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};

use super::load::Sample;
use super::machine::Machine;

/// One figure of one subject in one workload.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The workload's name.
    pub workload: &'static str,
    /// The subject's name.
    pub subject: String,
    /// What is counted.
    pub unit: &'static str,
    /// Over all rounds.
    pub median: f64,
    /// The least of all rounds.
    pub min: f64,
    /// The most of all rounds.
    pub max: f64,
    /// The median of this subject's figure over the other's in the same round, by the other's name.
    pub ratios: BTreeMap<String, f64>,
}

/// All rows of a run.
#[derive(Debug)]
pub struct Report {
    machine: Machine,
    rounds: u32,
    duration: Duration,
    rows: Vec<Row>,
    notes: Vec<String>,
    faults: Vec<String>,
}

/// What these workloads explain. A stream or a flood that seeks its limit makes queues and socket buffers overflow; and a pod's own kernel
/// looks for routers from its link-local address, which no pod may send from. All else that is dropped is a fault.
const EXPLAINED: [&str; 7] = [
    "martian_source",
    "icmp_forbidden",
    "kernel_pods_queue",
    "kernel_host_queue",
    "kernel_overlay_sockets",
    "kernel_port_sockets",
    "kernel_refused_pod_source",
];

impl Report {
    /// An empty one.
    pub fn new(machine: Machine, rounds: u32, duration: Duration) -> Report {
        Report { machine, rounds, duration, rows: Vec::new(), notes: Vec::new(), faults: Vec::new() }
    }

    /// Adds the samples of a workload: for each subject one of each round.
    pub fn add(&mut self, workload: &'static str, subjects: &[String], samples: &[Vec<Sample>]) {
        let units = samples.iter().flatten().next().map(|sample| sample.0.iter().map(|(unit, _)| *unit).collect::<Vec<_>>());
        for unit in units.unwrap_or_default() {
            let all: Vec<Vec<f64>> = samples.iter().map(|samples| samples.iter().filter_map(|sample| sample.of(unit)).collect()).collect();
            for (subject, values) in subjects.iter().zip(&all).filter(|(_, values)| !values.is_empty()) {
                let ratio = |other: &[f64]| median(values.iter().zip(other).map(|(ours, theirs)| ours / theirs).collect());
                let others = subjects.iter().zip(&all).filter(|(other, _)| *other != subject);
                let ratios = others.map(|(other, values)| (other.clone(), ratio(values))).filter(|(_, ratio)| ratio.is_finite()).collect();
                let (min, max) = values.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(min, max), value| (min.min(*value), max.max(*value)));
                self.rows.push(Row { workload, subject: subject.clone(), unit, median: median(values.clone()), min, max, ratios });
            }
        }
    }

    /// Notes something for the reader.
    pub fn note(&mut self, note: String) {
        self.notes.push(note);
    }

    /// Notes something that must fail the run.
    pub fn fault(&mut self, fault: String) {
        self.faults.push(fault);
    }

    /// Notes packets that a node of Podgate's dropped during a workload, which may explain further reasons than all do.
    pub fn dropped(&mut self, workload: &str, explained: &[&str], node: &str, reason: &str, packets: u64) {
        self.notes.push(format!("{workload}: {node} dropped {packets} packets as {reason}"));
        if !EXPLAINED.contains(&reason) && !explained.contains(&reason) {
            self.faults.push(format!("{packets} packets were dropped as {reason} on {node} during {workload}, which nothing there explains"));
        }
    }

    /// All rows.
    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// What must fail the run: drops that no workload explains, and measurements that came to nothing.
    pub fn faults(&self) -> &[String] {
        &self.faults
    }

    /// As a table for people. Ratios are those of Podgate, in its various forms, to the others.
    pub fn table(&self) -> String {
        let (machine, rounds, seconds) = (&self.machine, self.rounds, self.duration.as_secs_f64());
        let mut out = format!("{machine}\n{rounds} rounds of {seconds:.1} s each, every subject in every round\n");
        let mut workload = "";
        for row in &self.rows {
            if row.workload != workload {
                workload = row.workload;
                let _ = writeln!(out, "\n{workload:<24} {:<22} {:>10} {:>10} {:>10}   ratio to", "unit", "median", "min", "max");
            }
            let told = row.ratios.iter().filter(|_| row.subject.starts_with("podgate"));
            let ratios: Vec<String> = told.map(|(other, ratio)| format!("{other} {ratio:.2}")).collect();
            let figure = |value: f64| if value >= 1000.0 { format!("{value:.0}") } else { format!("{value:.2}") };
            let figures = [row.median, row.min, row.max].map(figure);
            let line =
                format!("  {:<22} {:<22} {:>10} {:>10} {:>10}   {}", row.subject, row.unit, figures[0], figures[1], figures[2], ratios.join(", "));
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
            "machine": self.machine,
            "rounds": self.rounds,
            "seconds": self.duration.as_secs_f64(),
            "rows": self.rows,
            "notes": self.notes,
            "faults": self.faults,
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

    fn sample(gbit: f64) -> Sample {
        Sample(vec![("Gb/s", gbit), ("retransmits", 0.0)])
    }

    #[test]
    fn ratios_are_of_rounds_and_not_of_medians() {
        let mut report = Report::new(Machine::default(), 3, Duration::from_secs(1));
        // A slow round slows both: each ratio is 2, although the medians' would be 3.
        let (ours, theirs) = ([16.0, 48.0, 64.0], [8.0, 24.0, 32.0]);
        report.add("w", &["podgate".into(), "bridge".into()], &[ours.map(sample).to_vec(), theirs.map(sample).to_vec()]);
        let row = &report.rows()[0];
        assert_eq!((&*row.subject, row.unit, row.median, row.min, row.max), ("podgate", "Gb/s", 48.0, 16.0, 64.0));
        assert_eq!(row.ratios, [("bridge".to_owned(), 2.0)].into());
        let json = report.json();
        assert_eq!(json["rows"][0]["ratios"]["bridge"], 2.0);
        // Nothing over nothing is no ratio.
        assert!(report.rows().iter().filter(|row| row.unit == "retransmits").all(|row| row.ratios.is_empty()));
        assert!(report.table().contains("bridge 2.00"));
    }

    #[test]
    fn overflows_are_noted_and_other_drops_fail_the_run() {
        let mut report = Report::new(Machine::default(), 1, Duration::from_secs(1));
        report.dropped("w", &[], "node-1", "kernel_pods_queue", 3);
        report.dropped("w", &["no_flow"], "node-1", "no_flow", 1);
        assert!(report.faults().is_empty() && report.table().contains("3 packets"));
        report.dropped("w", &[], "node-1", "no_flow", 1);
        assert_eq!(report.faults().len(), 1);
    }

    #[test]
    fn a_median_of_two_lies_between() {
        assert_eq!(median(vec![1.0, 4.0]), 2.5);
        assert_eq!(median(vec![9.0, 1.0, 4.0]), 4.0);
    }
}
