//! Spoofed packets to a NodePort whose endpoint is on another node, while somebody honest goes on connecting.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::load::{Closes, Held, Shared, connection, question, steady};
use super::progress;
use super::report::{Report, Spoofed, Tally};
use super::scene::{Cast, Forwarder, Scene, Stage, want_descriptors};
use super::spoof::{Flood, Kind, Sent};

/// How often progress is reported.
const REPORT: Duration = Duration::from_secs(5);
/// How often a line goes over half of the connections that are held.
const TALK: Duration = Duration::from_millis(500);

/// What can be chosen.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Who forwards, and how.
    pub stage: Stage,
    /// Spoofed sources.
    pub count: u32,
    /// What each sends.
    pub kind: Kind,
    /// Spoofed packets a second.
    pub rate: f64,
    /// Honest new connections a second; questions over UDP, where the flood is of datagrams.
    pub clients: f64,
    /// For how long they go on after the flood.
    pub after: Duration,
    /// Honest connections that are open all the time.
    pub held: usize,
    /// How long an honest client waits.
    pub timeout: Duration,
}

/// What the lines of the report are about.
pub const DURING: &str = "new ones during the flood";
/// The second.
pub const AFTER: &str = "new ones after the flood";
/// The third.
pub const HELD: &str = "connections open since before the flood";

/// Plays it with each forwarder.
pub fn play(plan: &Plan) -> Result<Report> {
    let mut report = Report::default();
    for forwarder in &plan.stage.forwarders {
        report.append(once(plan, *forwarder).with_context(|| format!("flood, {}", forwarder.name()))?);
    }
    Ok(report)
}

fn once(plan: &Plan, forwarder: Forwarder) -> Result<Report> {
    want_descriptors(outstanding(plan.clients, plan.timeout) + plan.held as u64)?;
    let cast = Cast {
        clients: vec!["honest".into(), "liar".into()],
        pods: Vec::new(),
        lasts: Duration::from_secs_f64(f64::from(plan.count) / plan.rate) * 6
            + plan.after
            + plan.timeout * 20,
    };
    let scene = Scene::raise(&plan.stage, forwarder, &cast)?;
    let (honest, liar, to) = (scene.place("honest"), scene.place("liar"), scene.node_port());
    let any = SocketAddr::new(honest.address_like(to.ip()), 0);
    let (kind, timeout) = (plan.kind, plan.timeout);
    let held = Held::open(honest, to, plan.held, plan.timeout)?;
    let flood = Flood::prepare(liar, scene.place("node1"), to, plan.kind, 0, plan.count)?;
    progress(&format!(
        "{}: {} spoofed sources at {:.0} packets a second, {:.0} honest connections a second",
        forwarder.name(),
        plan.count,
        plan.rate,
        plan.clients
    ));
    let (during, after) = (Shared::default(), Shared::default());
    let acts = Acts::default();
    let (sent, held) = std::thread::scope(|scope| {
        let clients = scope.spawn(|| {
            let made = steady(honest, plan.clients, |number| {
                let tally = match acts.now() {
                    Act::Flood => during.clone(),
                    Act::After => after.clone(),
                    Act::Over => return None,
                };
                // With the flood's own protocol.
                let ask = async move {
                    match kind {
                        Kind::Datagram => question(any, to, number, timeout).await,
                        _ => connection(None, to, Closes::Client, timeout).await,
                    }
                };
                Some(tally.count(ask))
            });
            acts.end();
            made
        });
        let talking = scope.spawn(|| talk(held, &acts));
        let sent = scope.spawn(|| flood.send(plan.rate));
        let watched = watch(plan, forwarder, &acts, || sent.is_finished(), (&during, &after));
        acts.end();
        // Every thread is joined, whatever has failed.
        let (sent, held, clients) = (sent.join(), talking.join(), clients.join());
        watched?;
        clients.map_err(panicked)??;
        Ok::<(Sent, Tally), anyhow::Error>((sent.map_err(panicked)??, held.map_err(panicked)?))
    })?;
    let mut report = Report::default();
    report.spoofed.push(Spoofed { forwarder, packets: sent.packets, seconds: sent.took.as_secs_f64() });
    report.row(forwarder, DURING, during.so_far());
    report.row(forwarder, AFTER, after.so_far());
    report.row(forwarder, HELD, held);
    Ok(report)
}

/// Leads from one act to the next, and tells how it goes.
fn watch(
    plan: &Plan,
    forwarder: Forwarder,
    acts: &Acts,
    mut flood_ended: impl FnMut() -> bool,
    (during, after): (&Shared, &Shared),
) -> Result<()> {
    let mut reported = Instant::now();
    let mut flood_end = None;
    loop {
        crate::stop::pause(Duration::from_millis(10))?;
        if acts.now() == Act::Over {
            return Ok(());
        }
        match flood_end {
            None if flood_ended() => {
                acts.flood_is_over();
                flood_end = Some(Instant::now());
            }
            Some(end) if Instant::now() >= end + plan.after => return Ok(()),
            _ => {}
        }
        if reported.elapsed() >= REPORT {
            reported = Instant::now();
            let (during, after) = (during.so_far(), after.so_far());
            let tried = during.tried() + after.tried();
            let when = if flood_end.is_some() { "after the flood" } else { "during the flood" };
            progress(&format!(
                "{}: {when}, {} of {tried} honest connections have failed",
                forwarder.name(),
                during.failed + after.failed
            ));
        }
    }
}

/// Keeps half of the connections talking until the play is over.
fn talk(mut held: Held, acts: &Acts) -> Tally {
    let mut next = Instant::now();
    while acts.now() != Act::Over {
        if Instant::now() >= next {
            held.talk();
            next = Instant::now() + TALK;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    held.end()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    Flood,
    After,
    Over,
}

/// The act that is being played, for all threads to see.
#[derive(Debug, Default)]
struct Acts {
    flooded: AtomicBool,
    over: AtomicBool,
}

impl Acts {
    fn now(&self) -> Act {
        match (self.over.load(Ordering::Relaxed), self.flooded.load(Ordering::Relaxed)) {
            (true, _) => Act::Over,
            (false, true) => Act::After,
            (false, false) => Act::Flood,
        }
    }

    fn flood_is_over(&self) {
        self.flooded.store(true, Ordering::Relaxed);
    }

    fn end(&self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

/// How many attempts can be open at a time, if all of them have to wait.
pub(super) fn outstanding(rate: f64, timeout: Duration) -> u64 {
    Duration::from_secs_f64(rate * timeout.as_secs_f64()).as_secs() + 1
}

pub(super) fn panicked(_: Box<dyn std::any::Any + Send>) -> anyhow::Error {
    anyhow::anyhow!("a thread of the play panicked")
}
