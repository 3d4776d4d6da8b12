//! The chaos scenarios themselves, small: every attempt is counted once, and where nothing is too much nothing fails.

use std::time::Duration;

use anyhow::{Result, ensure};
use proxy_tests::chaos::report::Report;
use proxy_tests::chaos::scene::{Forwarder, Stage};
use proxy_tests::chaos::spoof::Kind;
use proxy_tests::chaos::{dns, flood, ports};

/// The sums are right, and every forwarder answered all that it was asked.
fn adds_up(report: &Report, lines: &[&str]) -> Result<()> {
    for forwarder in Forwarder::ALL {
        let seen: Vec<&str> = report.of(forwarder).map(|row| row.what.as_str()).collect();
        ensure!(seen == lines, "{}: {seen:?}", forwarder.name());
        for row in report.of(forwarder) {
            let tally = &row.tally;
            ensure!(row.tried == tally.answered + tally.failed && row.tried > 0, "{row:?}");
            ensure!(tally.reasons.values().sum::<u64>() == tally.failed, "{row:?}");
            ensure!(tally.slowest_ms > 0.0, "{row:?}");
        }
        ensure!(report.failed(forwarder) == 0, "something failed: {report:#?}");
    }
    Ok(())
}

/// How often something was tried with each forwarder.
fn tried(report: &Report, what: &str) -> Vec<u64> {
    report.rows.iter().filter(|row| row.what == what).map(|row| row.tried).collect()
}

#[test]
fn a_trickle_of_spoofed_syns_is_counted_and_costs_nobody_anything() -> Result<()> {
    let report = flood::play(&flood::Plan {
        stage: Stage::default(),
        count: 2000,
        kind: Kind::Syn,
        rate: 2000.0,
        clients: 20.0,
        after: Duration::from_secs(1),
        held: 4,
        timeout: Duration::from_secs(5),
    })?;
    adds_up(&report, &[flood::DURING, flood::AFTER, flood::HELD])?;
    ensure!(report.spoofed.iter().all(|sent| sent.packets == 2000), "{:?}", report.spoofed);
    ensure!(report.spoofed.len() == 2 && tried(&report, flood::HELD) == [4, 4], "{report:#?}");
    Ok(())
}

#[test]
fn a_few_short_connections_are_all_counted_and_answered() -> Result<()> {
    let plan = ports::Plan {
        stage: Stage { ipv6: true, ..Stage::default() },
        rate: 50.0,
        lasts: Duration::from_secs(3),
        timeout: Duration::from_secs(5),
    };
    let report = ports::play(&plan)?;
    adds_up(&report, &[ports::SHORT])?;
    ensure!(tried(&report, ports::SHORT) == [150, 150], "{report:#?}");
    Ok(())
}

#[test]
fn a_few_questions_are_all_counted_and_answered_also_when_ports_are_used_again() -> Result<()> {
    let plan = dns::Plan {
        stage: Stage::default(),
        rate: 100.0,
        lasts: Duration::from_secs(2),
        sources: Some(120),
        timeout: Duration::from_millis(500),
    };
    let report = dns::play(&plan)?;
    adds_up(&report, &[dns::NODE_PORT, dns::CLUSTER_IP])?;
    for what in [dns::NODE_PORT, dns::CLUSTER_IP] {
        ensure!(tried(&report, what) == [200, 200], "{report:#?}");
    }
    Ok(())
}
