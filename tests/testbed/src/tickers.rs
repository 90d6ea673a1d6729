//! Connections that must live through something.

use std::time::Duration;

use podgate::lab::program::bulk::Ticker;
use podgate::lab::wait_until;

/// Waits until each connection, known by its name, has gone on after what was done to it; ends them, prints the longest pause of each, and gives
/// those that broke with the reason.
pub fn outlived(tickers: Vec<(String, Ticker)>) -> Result<Vec<String>, Box<dyn std::error::Error>> {
    let counts: Vec<u64> = tickers.iter().map(|(_, ticker)| ticker.answered()).collect();
    wait_until(
        Duration::from_secs(10),
        || "ticks on every connection".into(),
        || {
            let still = tickers.iter().zip(&counts).find(|((_, ticker), before)| ticker.answered() < **before + 5);
            Ok(still.map(|((name, _), _)| format!("none on {name}")))
        },
    )?;
    let mut broken = Vec::new();
    for (name, ticker) in tickers {
        let report = ticker.finish();
        eprintln!("      {name}: {} ms", report.longest_gap.as_millis());
        broken.extend(report.broken.map(|reason| format!("{name}: {reason}")));
    }
    Ok(broken)
}
