//! One fault, played: clients begin, the fault does its rounds, and what was lost is counted.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::clients::Term;
use super::fault::{Name, Next, Options};
use super::ground::{Before, Ground, Source, raise_api_servers, raise_cluster};
use super::progress;
use super::scene::want_descriptors;
use crate::agent::FLAGS;
use crate::manifests::ManifestDir;

/// How often progress is reported.
const REPORT: Duration = Duration::from_secs(20);
/// Connections of all crowds at a time, at most.
const SOCKETS: u64 = 2000;

/// What a fault came to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Its name.
    pub fault: String,
    /// How often it was done.
    pub rounds: u64,
    /// Connections that were held meanwhile.
    pub held: u64,
    /// Requests: new ones, exchanges over connections that are held, and looks at the agent.
    pub requests: u64,
    /// What was lost of either.
    pub lost: u64,
    /// The longest time that an answer took.
    pub slowest_ms: f64,
    /// What else is to be said.
    pub remarks: Vec<String>,
}

/// Plays a fault.
pub fn play(name: Name, options: &Options) -> Result<Outcome> {
    want_descriptors(SOCKETS)?;
    let (cluster, manifests) = (raise_cluster()?, ManifestDir::new()?);
    let servers = name.needs_api_servers().then(|| raise_api_servers(&cluster)).transpose()?;
    let source = servers.as_ref().map_or(Source::Manifests(&manifests), Source::ApiServers);
    let further = options.agent_flags.iter().map(String::as_str);
    let flags: Vec<&str> = FLAGS.iter().chain(name.flags()).copied().chain(further).collect();
    let mut ground = Ground::lay(&cluster, source, &flags, name.before())?;
    play_on(&mut ground, name, options).with_context(|| name.text())
}

fn play_on(ground: &mut Ground<'_>, name: Name, options: &Options) -> Result<Outcome> {
    let mut fault = name.make(options);
    fault.begin(ground)?;
    // What rules have begun is held by the round that ends it.
    ground.crowd(Term::Play, name.before() != Before::Rules)?;
    let wanted = options.rounds.unwrap_or(name.rounds());
    let (mut rounds, mut reported) = (0, Instant::now());
    while rounds < wanted {
        if crate::stop::wanted() {
            bail!("interrupted");
        }
        let next = fault.round(ground, rounds)?;
        if next == Next::Over {
            break;
        }
        rounds += 1;
        ground.clients.receive()?;
        if reported.elapsed() >= REPORT {
            reported = Instant::now();
            ground.clients.order("report")?;
            let count = ground.clients.count();
            progress(&format!(
                "{}: round {rounds}, {} of {} requests lost",
                name.text(),
                count.lost,
                count.requests
            ));
        }
    }
    let remarks = fault.end(ground)?;
    ground.clients.step(format!("{}: the end", name.text()));
    ground.clients.end()?;
    let count = ground.clients.count();
    Ok(Outcome {
        fault: name.text(),
        rounds,
        held: count.held,
        requests: count.requests,
        lost: count.lost,
        slowest_ms: count.slowest_ms,
        remarks,
    })
}
