//! The chaos scenarios, small: each fault in a few rounds, in which nothing may be lost; and the comparisons, in which
//! every attempt is counted once, and where nothing is too much nothing fails.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use proxy_tests::chaos::clients::{Clients, Term};
use proxy_tests::chaos::fault::{Name, Options};
use proxy_tests::chaos::report::Report;
use proxy_tests::chaos::sabotage::Sabotage;
use proxy_tests::chaos::scene::{Forwarder, Stage};
use proxy_tests::chaos::spoof::Kind;
use proxy_tests::chaos::trial;
use proxy_tests::chaos::{dns, flood, ports};
use proxy_tests::crowd::Target;
use proxy_tests::probe::{Server, eventually};
use proxy_tests::test_cluster::Plan;

/// A fault of so many rounds, in which nothing is lost.
fn nothing_is_lost(fault: Name, rounds: u64) -> Result<trial::Outcome> {
    nothing_is_lost_with(fault, Options { rounds: Some(rounds), ..Options::default() })
}

fn nothing_is_lost_with(fault: Name, options: Options) -> Result<trial::Outcome> {
    let outcome = trial::play(fault, &options)?;
    // Which losses there were has been reported one by one.
    ensure!(outcome.lost == 0, "{outcome:?}");
    ensure!(outcome.rounds > 0 && outcome.held > 50 && outcome.requests > 500, "{outcome:?}");
    Ok(outcome)
}

#[test]
fn an_agent_that_is_killed_while_it_starts_and_while_it_writes_costs_nothing() -> Result<()> {
    nothing_is_lost(Name::Kill, 8).map(drop)
}

#[test]
fn endpoints_and_services_that_come_and_go_cost_nothing() -> Result<()> {
    nothing_is_lost(Name::Churn, 4).map(drop)
}

#[test]
fn a_flood_costs_those_nothing_who_hold_connections() -> Result<()> {
    nothing_is_lost(Name::Flood, 2).map(drop)
}

#[test]
fn an_agent_that_is_killed_at_any_system_call_costs_nothing() -> Result<()> {
    let outcome = nothing_is_lost(Name::SyscallKill, 6)?;
    // A place that is recognised by what an earlier call has left on the stack may not come again.
    ensure!(!outcome.remarks.iter().any(|line| line.contains(" 0 were hit")), "{outcome:?}");
    Ok(())
}

#[test]
fn an_agent_goes_on_or_says_why_not_when_a_system_call_fails_and_nothing_is_lost() -> Result<()> {
    nothing_is_lost(Name::SyscallError, 6).map(drop)
}

#[test]
fn an_agent_that_retires_and_comes_back_costs_nothing() -> Result<()> {
    nothing_is_lost(Name::Retire, 2).map(drop)
}

#[test]
fn a_node_that_rules_serve_is_taken_over_and_given_back_and_nothing_is_lost() -> Result<()> {
    nothing_is_lost(Name::Takeover, 1).map(drop)
}

#[test]
fn what_somebody_detaches_replaces_or_unpins_breaks_no_connection() -> Result<()> {
    // Those that are undone within seconds; entries take up to a minute.
    let quick =
        Sabotage::ALL.iter().take_while(|sabotage| sabotage.undone_within() < Duration::from_secs(30));
    nothing_is_lost(Name::Detach, quick.count() as u64).map(drop)
}

#[test]
fn a_thousand_idle_clients_at_each_port_cost_nobody_anything() -> Result<()> {
    nothing_is_lost(Name::IdleClients, 1).map(drop)
}

/// Each fault once of all API servers, and once of the one in use.
fn changes_are_followed(faults: &[Name]) -> Result<()> {
    faults.iter().try_for_each(|fault| nothing_is_lost(*fault, 2).map(drop).with_context(|| fault.text()))
}

#[test]
fn api_servers_that_do_not_answer_cost_nothing_and_changes_are_followed() -> Result<()> {
    changes_are_followed(&[Name::ApiDrop, Name::ApiHang, Name::ApiNoHeaders, Name::ApiCut])
}

#[test]
fn api_servers_that_answer_badly_cost_nothing_and_changes_are_followed() -> Result<()> {
    changes_are_followed(&[Name::ApiSlow, Name::ApiGarbage, Name::ApiHalf, Name::ApiError])
}

#[test]
fn api_servers_that_answer_but_keep_changes_from_us_cost_nothing_and_changes_are_followed() -> Result<()> {
    changes_are_followed(&[Name::ApiLie, Name::ApiBusy, Name::ApiSilent])
}

#[test]
fn nothing_breaks_when_the_table_layout_changes_there_and_back_also_when_the_agent_is_killed() -> Result<()> {
    nothing_is_lost(Name::Upgrade, 4).map(drop)
}

#[test]
fn neither_tables_nor_the_agent_grow_while_everything_happens_to_it() -> Result<()> {
    let options = Options { lasts: Some(Duration::from_secs(10)), ..Options::default() };
    nothing_is_lost_with(Name::Soak, options).map(drop)
}

#[test]
fn clients_notice_what_is_lost() -> Result<()> {
    let cluster = Plan::default().node("node1", &["a", "b"]).raise()?;
    let server = Server::start(cluster.place("b"), &[8080])?;
    let target = |to: SocketAddr, udp: bool, servers: &[&str]| Target {
        service: "web".into(),
        to,
        udp,
        servers: servers.iter().map(ToString::to_string).collect(),
        by_packet: false,
        same: false,
        idle: 1,
        busy: 1,
    };
    let to = cluster.place("b").at(8080);
    let targets =
        to.into_iter().flat_map(|to| [target(to, false, &["b"]), target(to, true, &["b"])]).collect();
    let mut clients = Clients::default();
    clients.start(Term::Play, &[(cluster.place("a"), targets)], 100.0)?;
    clients.check()?;
    let count = clients.count();
    ensure!(count.lost == 0 && count.held == 8 && count.requests >= 4, "{count:?}");
    // A strange answer is a loss, and so is none.
    drop(server);
    let _stranger = Server::named(cluster.place("b"), "stranger", &[8080])?;
    eventually(Duration::from_secs(20), || {
        clients.check()?;
        let count = clients.count();
        // Eight connections, and new ones.
        if count.lost < 20 { bail!("{count:?}") } else { Ok(()) }
    })
}

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
