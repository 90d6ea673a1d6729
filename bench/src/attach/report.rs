//! What was measured: percentiles of all rounds together, and ratios of the rounds, as a table and as JSON.

use std::fmt::Write as _;
use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};

use super::{Sample, Subject, millis};

/// One figure of one subject, in milliseconds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Row {
    /// What was done: `add`, `del` or `all` (from the first start of an ADD to the last exit).
    pub(crate) workload: &'static str,
    /// The subject's name.
    pub(crate) subject: &'static str,
    /// Always `ms`.
    pub(crate) unit: &'static str,
    /// The middle one of all calls of all rounds.
    pub(crate) p50: f64,
    /// What 99 of 100 calls of all rounds do not exceed.
    pub(crate) p99: f64,
    /// The longest.
    pub(crate) max: f64,
    /// The median over rounds of this subject's p99 over the peer's in the same round, by the peer's name.
    pub(crate) ratios: std::collections::BTreeMap<&'static str, f64>,
}

/// All that was measured in a run.
#[derive(Debug)]
pub(crate) struct Report {
    pods: u16,
    rounds: u32,
    dual: bool,
    samples: Vec<(Subject, Vec<Sample>)>,
}

impl Report {
    /// An empty one.
    pub(crate) fn new(pods: u16, rounds: u32, dual: bool) -> Report {
        Report { pods, rounds, dual, samples: Vec::new() }
    }

    /// Adds a round of a subject.
    pub(crate) fn add(&mut self, subject: Subject, sample: Sample) {
        match self.samples.iter_mut().find(|(known, _)| *known == subject) {
            Some((_, samples)) => samples.push(sample),
            None => self.samples.push((subject, vec![sample])),
        }
    }

    /// Every row.
    pub(crate) fn rows(&self) -> Vec<Row> {
        type Figure = (&'static str, fn(&Sample) -> &[Duration]);
        const FIGURES: [Figure; 3] =
            [("add", |sample| &sample.add), ("del", |sample| &sample.del), ("all", |sample| std::slice::from_ref(&sample.all))];
        let mut rows = Vec::new();
        for (workload, figure) in FIGURES {
            let p99s = |samples: &[Sample]| samples.iter().map(|sample| percentile(figure(sample), 99)).collect::<Vec<_>>();
            for (subject, samples) in &self.samples {
                let all: Vec<Duration> = samples.iter().flat_map(|sample| figure(sample).iter().copied()).collect();
                let peers = self.samples.iter().filter(|(peer, _)| peer != subject && *peer != Subject::Podgate);
                let ratio = |peer: &[Sample]| {
                    let mut ratios: Vec<f64> = p99s(samples).iter().zip(p99s(peer)).map(|(ours, theirs)| ours / theirs).collect();
                    ratios.sort_by(f64::total_cmp);
                    ratios.get(ratios.len() / 2).copied()
                };
                rows.push(Row {
                    workload,
                    subject: subject.name(),
                    unit: "ms",
                    p50: percentile(&all, 50),
                    p99: percentile(&all, 99),
                    max: percentile(&all, 100),
                    ratios: peers.filter_map(|(peer, samples)| Some((peer.name(), ratio(samples)?))).collect(),
                });
            }
        }
        rows
    }

    /// As a table for people.
    pub(crate) fn table(&self) -> String {
        let families = if self.dual { "both families" } else { "IPv4; podgate both families" };
        let mut out = format!("{} containers at once, {} rounds, every subject in every round ({families})\n", self.pods, self.rounds);
        let mut workload = "";
        for row in self.rows() {
            if row.workload != workload {
                workload = row.workload;
                let title = match workload {
                    "add" => "ADD, start to exit",
                    "del" => "DEL, start to exit",
                    _ => "until all are attached",
                };
                // Writing to a string cannot fail.
                let _ = writeln!(out, "\n{title:<24} {:>9} {:>9} {:>9}   p99 over that of", "p50 ms", "p99 ms", "max ms");
            }
            let ratios: Vec<String> = row.ratios.iter().map(|(peer, ratio)| format!("{peer} {ratio:.2}")).collect();
            let line = format!("  {:<22} {:>9.1} {:>9.1} {:>9.1}   {}", row.subject, row.p50, row.p99, row.max, ratios.join(", "));
            let _ = writeln!(out, "{}", line.trim_end());
        }
        out
    }

    /// As JSON for programs.
    pub(crate) fn json(&self) -> Value {
        json!({"schemaVersion": 1, "pods": self.pods, "rounds": self.rounds, "dual": self.dual, "rows": self.rows()})
    }
}

/// The smallest that so many of a hundred do not exceed, in milliseconds (the nearest rank).
fn percentile(durations: &[Duration], percent: usize) -> f64 {
    let mut sorted = durations.to_vec();
    sorted.sort_unstable();
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).map_or(f64::NAN, |duration| millis(*duration))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(millis: impl Iterator<Item = u64>) -> Vec<Duration> {
        millis.map(Duration::from_millis).collect()
    }

    #[test]
    fn a_percentile_is_one_of_the_values_that_were_measured() {
        let hundred_and_ten = all((1..=110).rev());
        assert_eq!([50, 99, 100].map(|percent| percentile(&hundred_and_ten, percent)), [55.0, 109.0, 110.0]);
        assert_eq!(percentile(&all([7].into_iter()), 99), 7.0);
        assert!(percentile(&[], 50).is_nan());
    }

    #[test]
    fn ratios_are_of_rounds() {
        let mut report = Report::new(2, 3, false);
        // Each round of the peer's takes twice as long, whatever the machine did meanwhile.
        for factor in [1, 10, 100] {
            let sample = |millis| Sample { add: all([millis, millis].into_iter()), del: all([1].into_iter()), all: Duration::from_millis(millis) };
            report.add(Subject::Podgate, sample(factor));
            report.add(Subject::Ptp, sample(2 * factor));
        }
        let rows = report.rows();
        let row = rows.iter().find(|row| (row.workload, row.subject) == ("add", "podgate")).unwrap();
        assert_eq!((row.p50, row.max, row.ratios["ptp"]), (10.0, 100.0, 0.5));
        assert!(rows.iter().filter(|row| row.subject == "ptp").all(|row| row.ratios.is_empty()), "a peer is not held against us");
        assert!(report.table().contains("ptp 0.50"));
        assert_eq!(report.json()["rows"][0]["workload"], "add");
    }
}
