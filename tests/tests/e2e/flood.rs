//! What strangers and busy clients may not cost: ports, flows and connections of others. Beside the agent the same is
//! played with nftables rules of kube-proxy's shape.
//!
//! The node's own range of ports is wide in most of these, as operators make it: masquerading must not be left with
//! the few ports outside of it. That makes what runs out run out early where it does.

use std::time::Duration;

use anyhow::{Result, ensure};
use proxy_tests::chaos::report::Report;
use proxy_tests::chaos::scene::{Forwarder, Stage};
use proxy_tests::chaos::spoof::Kind;
use proxy_tests::chaos::{dns, flood, ports};

/// Longer than a lost SYN takes to be sent twice more, so that one unlucky port is not the end.
const PATIENCE: Duration = Duration::from_secs(4);
/// What a node with very many connections of its own sets.
const WIDE: Option<(u16, u16)> = Some((1024, 65535));

/// The agent lost nothing, and nothing more than nftables.
fn nothing_is_lost(report: &Report) -> Result<()> {
    let (ours, theirs) = (report.failed(Forwarder::Agent), report.failed(Forwarder::Nftables));
    ensure!(ours == 0, "{ours} failed with the agent, {theirs} with nftables: {report:#?}");
    ensure!(report.of(Forwarder::Agent).all(|row| row.tried > 0), "nothing was tried: {report:#?}");
    Ok(())
}

/// A flood of 7,000 from as many sources, and honest clients during and after it.
fn flooded(kind: Kind, stage: Stage) -> Result<()> {
    let report = flood::play(&flood::Plan {
        stage,
        count: 7000,
        kind,
        rate: 10_000.0,
        clients: 40.0,
        after: Duration::from_secs(2),
        held: 6,
        timeout: PATIENCE,
    })?;
    ensure!(report.spoofed.iter().all(|sent| sent.packets >= 7000), "{:?}", report.spoofed);
    nothing_is_lost(&report)
}

fn wide() -> Stage {
    Stage { local_ports: WIDE, ..Stage::default() }
}

fn agent_only() -> Stage {
    Stage { forwarders: vec![Forwarder::Agent], ..wide() }
}

/// Tables that what is sent here fills more than once.
fn small_tables() -> Vec<String> {
    vec!["--max-flows=4096".into(), "--max-young-flows=4096".into()]
}

#[test]
fn syns_from_spoofed_sources_cost_honest_clients_nothing() -> Result<()> {
    flooded(Kind::Syn, wide())
}

#[test]
fn syns_from_spoofed_ipv6_sources_cost_honest_clients_nothing() -> Result<()> {
    flooded(Kind::Syn, Stage { ipv6: true, ..agent_only() })
}

#[test]
fn a_blind_acknowledgment_after_a_spoofed_syn_establishes_nothing() -> Result<()> {
    flooded(Kind::SynThenBlindAck, agent_only())
}

#[test]
fn datagrams_from_spoofed_sources_cost_honest_clients_nothing_though_they_are_answered() -> Result<()> {
    flooded(Kind::Datagram, agent_only())
}

#[test]
fn more_spoofed_syns_than_there_are_ports_towards_an_endpoint_leave_ports_for_honest_clients() -> Result<()> {
    // With the kernel's usual range: 64,512 ports are all that any masquerading can have towards one endpoint.
    let report = flood::play(&flood::Plan {
        stage: Stage { forwarders: vec![Forwarder::Agent], ..Stage::default() },
        count: 70_000,
        kind: Kind::Syn,
        rate: 30_000.0,
        clients: 40.0,
        after: Duration::from_secs(2),
        held: 6,
        timeout: PATIENCE,
    })?;
    nothing_is_lost(&report)
}

#[test]
fn a_flood_that_overfills_the_tables_costs_honest_clients_nothing() -> Result<()> {
    flooded(Kind::Syn, Stage { agent_flags: small_tables(), ..Stage::default() })
}

/// 4,800 short connections in eight seconds.
fn short_connections(stage: Stage) -> Result<()> {
    nothing_is_lost(&ports::play(&ports::Plan {
        stage,
        rate: 600.0,
        lasts: Duration::from_secs(8),
        timeout: PATIENCE,
    })?)
}

#[test]
fn ports_of_ended_connections_are_used_again_at_once() -> Result<()> {
    short_connections(agent_only())
}

#[test]
fn a_node_with_nearly_all_ports_for_itself_masquerades_as_many_ipv6_connections() -> Result<()> {
    short_connections(Stage { local_ports: Some((1024, 60_999)), ipv6: true, ..agent_only() })
}

/// 4,800 questions in four seconds, each from a port of its own and answered once; to a NodePort, and from a pod to a
/// ClusterIP.
fn questions(stage: Stage) -> Result<()> {
    nothing_is_lost(&dns::play(&dns::Plan {
        stage,
        rate: 1200.0,
        lasts: Duration::from_secs(4),
        sources: None,
        timeout: PATIENCE,
    })?)
}

#[test]
fn questions_that_are_answered_once_hold_no_port_that_others_need() -> Result<()> {
    questions(agent_only())
}

#[test]
fn a_table_full_of_questions_that_are_over_is_as_good_as_empty() -> Result<()> {
    questions(Stage { agent_flags: small_tables(), ..Stage::default() })
}

#[test]
fn questions_over_ipv6_that_are_answered_once_hold_no_port_that_others_need() -> Result<()> {
    questions(Stage { ipv6: true, ..agent_only() })
}
