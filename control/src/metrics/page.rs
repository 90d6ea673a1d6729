//! A page of metrics as text.

use std::fmt::Write;

use super::Histogram;

/// What a metric is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It only grows.
    Counter,
    /// It goes up and down.
    Gauge,
}

/// A page that is being written: families one after the other, each with all its samples.
#[derive(Debug, Default)]
pub struct Page {
    text: String,
    family: &'static str,
}

impl Page {
    /// Begins a family; what follows are its samples.
    pub fn family(&mut self, name: &'static str, kind: Kind, help: &str) -> &mut Page {
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
        };
        self.head(name, kind, help)
    }

    fn head(&mut self, name: &'static str, kind: &str, help: &str) -> &mut Page {
        self.family = name;
        let _ = writeln!(self.text, "# HELP {name} {}\n# TYPE {name} {kind}", help.replace('\\', "\\\\").replace('\n', "\\n"));
        self
    }

    /// A sample of the family.
    pub fn sample(&mut self, labels: &[(&str, &str)], value: impl Into<Number>) -> &mut Page {
        let name = self.family;
        self.line(name, "", labels, None, value.into());
        self
    }

    /// A family of one histogram.
    pub fn histogram(&mut self, name: &'static str, help: &str, histogram: &Histogram) {
        self.head(name, "histogram", help);
        let mut total = 0;
        for (bound, count) in histogram.cumulated() {
            let bound = bound.map_or("+Inf".to_owned(), |bound| bound.to_string());
            self.line(name, "_bucket", &[], Some(("le", &bound)), count.into());
            total = count;
        }
        self.line(name, "_sum", &[], None, histogram.sum().into());
        self.line(name, "_count", &[], None, total.into());
    }

    fn line(&mut self, name: &str, suffix: &str, labels: &[(&str, &str)], last: Option<(&str, &str)>, value: Number) {
        self.text.push_str(name);
        self.text.push_str(suffix);
        for (at, (label, value)) in labels.iter().copied().chain(last).enumerate() {
            let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            let _ = write!(self.text, "{}{label}=\"{value}\"", if at == 0 { '{' } else { ',' });
        }
        if !labels.is_empty() || last.is_some() {
            self.text.push('}');
        }
        let _ = match value {
            Number::Whole(value) => writeln!(self.text, " {value}"),
            Number::Real(value) => writeln!(self.text, " {value}"),
        };
    }

    /// The text.
    pub fn finish(self) -> String {
        self.text
    }
}

/// A value: whole ones are written without loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Number {
    /// Of a count.
    Whole(u64),
    /// Of a measurement.
    Real(f64),
}

impl From<u64> for Number {
    fn from(value: u64) -> Number {
        Number::Whole(value)
    }
}

impl From<usize> for Number {
    fn from(value: usize) -> Number {
        Number::Whole(value as u64)
    }
}

impl From<bool> for Number {
    fn from(value: bool) -> Number {
        Number::Whole(value.into())
    }
}

impl From<f64> for Number {
    fn from(value: f64) -> Number {
        Number::Real(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_written_as_prometheus_reads_it() {
        let mut page = Page::default();
        page.family("drops_total", Kind::Counter, "Dropped,\nby \\ reason").sample(&[("reason", "a\"b\\c\nd"), ("worker", "0")], 7_u64);
        page.family("ready", Kind::Gauge, "Whether").sample(&[], true);
        let mut histogram = Histogram::new(vec![0.001, 0.25]);
        histogram.observe(0.2);
        histogram.observe(9.0);
        page.histogram("took_seconds", "How long", &histogram);
        let expected = r#"# HELP drops_total Dropped,\nby \\ reason
# TYPE drops_total counter
drops_total{reason="a\"b\\c\nd",worker="0"} 7
# HELP ready Whether
# TYPE ready gauge
ready 1
# HELP took_seconds How long
# TYPE took_seconds histogram
took_seconds_bucket{le="0.001"} 0
took_seconds_bucket{le="0.25"} 1
took_seconds_bucket{le="+Inf"} 2
took_seconds_sum 9.2
took_seconds_count 2
"#;
        assert_eq!(page.finish(), expected);
    }
}
