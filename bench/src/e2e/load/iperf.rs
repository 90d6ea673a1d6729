//! iperf3 over the same ends, as a cross-check of our own streams.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};
use podgate_testbed::need::program;

use super::{Ends, STREAM_PORT, Sample};

/// Why it cannot be asked, if it cannot.
pub fn missing() -> Option<&'static str> {
    program("iperf3").is_none().then_some("there is no iperf3 here (Debian: iperf3)")
}

/// What iperf3 measures with one stream, in whole seconds.
pub fn measure(ends: &Ends<'_>, duration: Duration) -> anyhow::Result<Sample> {
    let server = ends.first();
    let (address, port) = (server.address.to_string(), STREAM_PORT.to_string());
    let mut listening = Command::new("iperf3");
    listening.args(["--server", "--one-off", "--forceflush", "--bind", &address, "--port", &port]);
    listening.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut listening = server.netns.run(|| listening.spawn())?.context("cannot start iperf3")?;
    // It says so when it listens.
    let stdout = listening.stdout.take().context("iperf3's output is a pipe")?;
    let mut lines = BufReader::new(stdout).lines();
    let heard = lines.by_ref().map_while(Result::ok).any(|line| line.contains("listening"));
    let outcome = heard.then(|| {
        let seconds = duration.as_secs().max(1).to_string();
        let mut client = Command::new("iperf3");
        client
            .args(["--client", &address, "--port", &port, "--time", &seconds, "--omit", "1", "--json", "--congestion", "cubic"])
            .stdin(Stdio::null());
        ends.from.run(|| client.output())
    });
    // With its one client gone it ends by itself; without one it must be made to.
    let _ = listening.kill();
    listening.wait()?;
    let output = outcome.context("iperf3 does not listen")??.context("cannot start iperf3")?;
    ensure!(output.status.success(), "iperf3 failed: {}", String::from_utf8_lossy(&output.stdout));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).context("iperf3 prints no JSON")?;
    let bits = report["end"]["sum_received"]["bits_per_second"].as_f64().context("iperf3 does not say what arrived")?;
    let retransmits = report["end"]["sum_sent"]["retransmits"].as_f64().unwrap_or(0.0);
    Ok(Sample(vec![("Gb/s", bits / 1e9), ("retransmits", retransmits)]))
}
