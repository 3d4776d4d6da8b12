//! Many short connections to a NodePort with one endpoint on another node: each takes a port towards that endpoint,
//! and ends.

use std::time::Duration;

use anyhow::{Context, Result};

use super::flood::{outstanding, panicked};
use super::load::{Closes, Shared, Sources, connection};
use super::progress;
use super::report::{Report, Tally};
use super::scene::{Cast, Forwarder, Scene, Stage, want_descriptors};
use crate::pod::Place;

/// How often progress is reported.
const REPORT: Duration = Duration::from_secs(10);

/// What can be chosen.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Who forwards, and how.
    pub stage: Stage,
    /// New connections a second.
    pub rate: f64,
    /// For how long.
    pub lasts: Duration,
    /// How long a client waits.
    pub timeout: Duration,
}

/// What the line of the report is about.
pub const SHORT: &str = "short connections, closed by client and server in turns";

/// Plays it with each forwarder.
pub fn play(plan: &Plan) -> Result<Report> {
    let mut report = Report::default();
    for forwarder in &plan.stage.forwarders {
        let tally = once(plan, *forwarder).with_context(|| format!("ports, {}", forwarder.name()))?;
        report.row(*forwarder, SHORT, tally);
    }
    Ok(report)
}

fn once(plan: &Plan, forwarder: Forwarder) -> Result<Tally> {
    want_descriptors(outstanding(plan.rate, plan.timeout))?;
    let attempts = attempts(plan.rate, plan.lasts);
    let sources = Sources::new(attempts)?;
    let names = sources.names();
    let cast = Cast { clients: names.clone(), lasts: plan.lasts + plan.timeout, ..Cast::default() };
    let scene = Scene::raise(&plan.stage, forwarder, &cast)?;
    let clients: Vec<&Place> = names.iter().map(|name| scene.place(name)).collect();
    let to = scene.node_port();
    let lasts = plan.lasts.as_secs_f64();
    progress(&format!("{}: {:.0} connections a second for {lasts:.0} s", forwarder.name(), plan.rate));
    let tally = Shared::default();
    watched(forwarder, &tally, || {
        sources.steady(&clients, to.ip(), (plan.rate, attempts), |number, from| {
            // A connection that the server closes leaves its port busy there, the others here.
            let closes = if number % 2 == 0 { Closes::Client } else { Closes::Server };
            tally.clone().count(connection(Some(from), to, closes, plan.timeout))
        })
    })?;
    Ok(tally.so_far())
}

/// How many attempts there are in this time.
pub(super) fn attempts(rate: f64, lasts: Duration) -> u64 {
    // Through whole nanoseconds: 0.1 s of 30 a second are three, not 2.9999.
    Duration::from_secs_f64(rate * lasts.as_secs_f64() + 1e-6).as_secs()
}

/// Does the work on a thread of its own and tells how it goes.
pub(super) fn watched(
    forwarder: Forwarder,
    tally: &Shared,
    work: impl FnOnce() -> Result<()> + Send,
) -> Result<()> {
    std::thread::scope(|scope| {
        let worker = scope.spawn(work);
        let mut reported = std::time::Instant::now();
        while !worker.is_finished() {
            // Ctrl-C ends the work, which is waited for.
            std::thread::sleep(Duration::from_millis(10));
            if reported.elapsed() >= REPORT {
                reported = std::time::Instant::now();
                let so_far = tally.so_far();
                progress(&format!(
                    "{}: {} of {} have failed",
                    forwarder.name(),
                    so_far.failed,
                    so_far.tried()
                ));
            }
        }
        worker.join().map_err(panicked)?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_are_counted_whole() {
        assert_eq!(attempts(300.0, Duration::from_secs(60)), 18_000);
        assert_eq!(attempts(30.0, Duration::from_millis(100)), 3);
        assert_eq!(attempts(2_200.0, Duration::from_secs(40)), 88_000);
        assert_eq!(attempts(0.5, Duration::from_secs(1)), 0);
    }
}
