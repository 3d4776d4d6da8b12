//! Tables begin small and grow before they are full, up to what memory they may take.

use anyhow::{Context, Result, ensure};
use proxy_tests::agent::Agent;
use proxy_tests::chaos::clients::Term;
use proxy_tests::chaos::ground::{Before, Ground, Source, raise_cluster};
use proxy_tests::chaos::services::publish_more;
use proxy_tests::manifests::ManifestDir;

use crate::growth_traffic::least;
use crate::life::{status_until, warns};
use crate::metrics::Scrape;

/// No sizes: those of an agent that has been given none.
const FLAGS: [&str; 1] = ["--cluster-cidr=10.244.0.0/16,fd00:244::/32"];

/// How many entries a table is made for.
pub(crate) fn size(agent: &Agent, table: &str) -> Result<u64> {
    let status = agent.status_json()?;
    let tables = status["tables"].as_array().context("tables")?;
    let found = tables.iter().find(|found| found["name"] == table).context("a table of this name")?;
    found["max"].as_u64().context("its size")
}

#[test]
fn tables_grow_under_load_before_they_are_full_and_nobody_notices() -> Result<()> {
    let (cluster, manifests) = (raise_cluster()?, ManifestDir::new()?);
    let mut ground = Ground::lay(&cluster, Source::Manifests(&manifests), &FLAGS, Before::Agent)?;
    ensure!(size(&ground.agent, "SERVICES")? == 4096, "it does not begin small");
    ground.crowd(Term::Play, true)?;
    ground.clients.step("900 Services come");
    // Four ports in the tables each: one of two families and two protocols.
    publish_more(&manifests, 900, cluster.place("c"))?;
    status_until(&ground.agent, "SERVICES has grown", |status| {
        let tables = status["tables"].as_array().map_or(&[][..], Vec::as_slice);
        tables
            .iter()
            .any(|table| table["name"] == "SERVICES" && table["max"] == 8192 && table["used"] == 3624)
    })?;
    ground.clients.check()?;
    let log = ground.agent.log_text();
    let (reported, done) = (log.find("table SERVICES has"), log.find("over to new tables"));
    ensure!(reported.is_some() && reported < done, "it was not reported before: {log}");
    ensure!(!log.contains("is full"), "something found no room: {log}");
    // What has grown stays so, and needs no change at the next start.
    ground.clients.step("another agent starts");
    ground.agent.stop()?;
    ground.agent.spawn()?;
    ground.agent.wait_ready()?;
    ensure!(size(&ground.agent, "SERVICES")? == 8192, "it has shrunk");
    ground.clients.end()?;
    let count = ground.clients.count();
    ensure!(count.lost == 0 && count.held >= 30 && count.requests > 100, "{count:?}");
    Ok(())
}

#[test]
fn memory_that_is_not_allowed_keeps_tables_small_and_says_so() -> Result<()> {
    let (cluster, manifests) = (raise_cluster()?, ManifestDir::new()?);
    let memory = format!("--map-memory={}", least()?);
    let ground = Ground::lay(&cluster, Source::Manifests(&manifests), &[FLAGS[0], &memory], Before::Agent)?;
    let agent = &ground.agent;
    ensure!(agent.status_json()?["notes"].to_string().contains("--map-memory allows"), "it says nothing");
    publish_more(&manifests, 900, cluster.place("c"))?;
    warns(agent, &["cannot grow", "raise --map-memory"], true)?;
    // Without an API server the log has the Event.
    let log = agent.log_text();
    ensure!(log.contains("event FailedToGrowTables about Node node1"), "{log}");
    let scrape = Scrape::of(agent.place())?;
    let [taken, limit] =
        ["", "limit_"].map(|which| scrape.value(&format!("proxy_agent_table_memory_{which}bytes")));
    let (taken, limit) = (taken?, limit?);
    ensure!(taken <= limit && limit < 64.0 * f64::from(1 << 20), "{taken} of {limit}");
    Ok(())
}
