//! `status`: one page on how this node's proxy fares; its first line says healthy or what is wrong.

use std::collections::BTreeSet;

use anyhow::Result;
use proxy_common::abi::{AgentState, NOTE, PROBLEM, untext};
use serde::Serialize;

use super::view::{LinkInfo, MapFill, Now, View, span};
use agent_core::capacity::size_flag;
use agent_kernel::datapath::probe;

/// An agent that has not written its record for this long does not run.
pub const BEAT_LIMIT_MS: u64 = 15_000;
/// A sync that is wanted for this long is late (H-4).
const QUEUE_LIMIT_MS: u64 = 60_000;
/// A table fuller than this is about to refuse entries.
const FULL_PERCENT: u64 = 90;

/// The programs of socket LB.
pub(super) const SOCKET_PROGRAMS: [&str; 8] =
    ["connect4", "connect6", "sendmsg4", "sendmsg6", "recvmsg4", "recvmsg6", "getpeername4", "getpeername6"];

/// Something to know, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Remark {
    /// What is the case.
    pub text: String,
    /// What to do.
    pub remedy: String,
}

fn remark(text: impl Into<String>, remedy: impl Into<String>) -> Remark {
    Remark { text: text.into(), remedy: remedy.into() }
}

/// What the agent said last.
#[derive(Clone, Debug, Serialize)]
pub struct Agent {
    /// Whether it has said something lately.
    pub alive: bool,
    /// Its process id, in its own pid namespace.
    pub pid: u64,
    /// Its version.
    pub version: String,
    /// Its node's name.
    pub node: String,
    /// Where its Services come from.
    pub source: String,
    /// Whether the source answers.
    pub connected: bool,
    /// Whether every first list has arrived.
    pub synced: bool,
    /// Milliseconds since it last said anything.
    pub beat_age_ms: u64,
    /// Milliseconds since tables last equalled what is wanted; null when they never did.
    pub sync_age_ms: Option<u64>,
    /// Milliseconds a sync has been wanted without success; null when none is.
    pub queued_age_ms: Option<u64>,
    /// Syncs that changed a table.
    pub generation: u64,
    /// Services known.
    pub services: u32,
    /// Endpoints known.
    pub endpoints: u32,
    /// Objects left out.
    pub warnings: u32,
    /// Interfaces with programs.
    pub interfaces: u32,
    /// Interfaces that refused a program.
    pub interfaces_failed: u32,
}

/// A counter that is not zero.
#[derive(Clone, Debug, Serialize)]
pub struct ReasonCount {
    /// Its label.
    pub reason: &'static str,
    pub count: u64,
    /// What it means.
    pub meaning: &'static str,
}

/// Something that the kernel lacks and the agent does without.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FallBack {
    /// What is lacking.
    pub feature: &'static str,
    /// What that means.
    pub meaning: &'static str,
}

/// The page. This is the documented JSON form: fields are added, never renamed.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// Whether `problems` is empty.
    pub healthy: bool,
    /// What makes it unhealthy.
    pub problems: Vec<Remark>,
    /// What does not, but should be known.
    pub warnings: Vec<Remark>,
    /// Version of this command.
    pub version: &'static str,
    /// Release of the kernel.
    pub kernel: String,
    /// The agent; null when none has ever run here.
    pub agent: Option<Agent>,
    /// Frontends programmed.
    pub frontends: usize,
    /// Socket hooks attached.
    pub socket_hooks: Vec<String>,
    /// Pinned links.
    pub links: Vec<LinkInfo>,
    /// How full the tables are.
    pub tables: Vec<MapFill>,
    /// What the kernel lacks, as the agent found it.
    pub fall_backs: Vec<FallBack>,
    /// Counters that are not zero.
    pub reasons: Vec<ReasonCount>,
    /// Objects left out, in the agent's words.
    pub object_warnings: Vec<String>,
    /// What is as it should be, and should be known.
    pub notes: Vec<String>,
}

impl Status {
    /// The page of a node where nothing is pinned.
    #[must_use]
    pub fn never_run(bpf_root: &std::path::Path, kernel: &str) -> Self {
        let problem = remark(
            format!("no agent has run here: nothing is pinned under {}", bpf_root.display()),
            "start it with `proxy-agent run`, or say with --bpf-root where its pins are",
        );
        Self {
            healthy: false,
            problems: vec![problem],
            warnings: vec![],
            version: env!("CARGO_PKG_VERSION"),
            kernel: kernel.to_owned(),
            agent: None,
            frontends: 0,
            socket_hooks: vec![],
            links: vec![],
            tables: vec![],
            fall_backs: vec![],
            reasons: vec![],
            object_warnings: vec![],
            notes: vec![],
        }
    }

    /// The page of this moment.
    pub fn read(view: &dyn View, kernel: &str, now: Now) -> Result<Self> {
        let state = view.agent()?;
        let (links, tables, lines) = (view.links()?, view.fill()?, view.warnings()?);
        let (notes, lines): (Vec<String>, Vec<String>) =
            lines.into_iter().partition(|line| line.starts_with(NOTE));
        let notes = notes.iter().filter_map(|line| line.strip_prefix(NOTE)).map(str::to_owned).collect();
        let (refusals, object_warnings): (Vec<String>, Vec<String>) =
            lines.into_iter().partition(|line| line.starts_with(PROBLEM));
        let agent = match state.started_ms {
            0 => None,
            _ => Some(agent(&state, view.is_running()?, now)),
        };
        let reasons = view.reasons()?.into_iter().filter(|(_, count)| *count != 0);
        let attached = links.iter().filter(|link| link.attached);
        let hooks: BTreeSet<_> = attached
            .map(|link| link.program.clone())
            .filter(|program| SOCKET_PROGRAMS.contains(&program.as_str()))
            .collect();
        let mut problems = problems(agent.as_ref(), &tables);
        problems.extend(refusals.iter().filter_map(|line| line.strip_prefix(PROBLEM)).map(refusal));
        let frontends = tables.iter().find(|fill| fill.name == proxy_common::abi::maps::FRONTENDS);
        Ok(Self {
            healthy: problems.is_empty(),
            problems,
            warnings: warnings(agent.as_ref(), &links, &object_warnings),
            version: env!("CARGO_PKG_VERSION"),
            kernel: kernel.to_owned(),
            agent,
            frontends: frontends.and_then(|fill| usize::try_from(fill.used).ok()).unwrap_or(0),
            socket_hooks: hooks.into_iter().collect(),
            links,
            tables,
            fall_backs: fall_backs(&state),
            reasons: reasons
                .map(|(reason, count)| ReasonCount {
                    reason: reason.label(),
                    count,
                    meaning: reason.meaning(),
                })
                .collect(),
            object_warnings,
            notes,
        })
    }
}

fn agent(state: &AgentState, running: bool, now: Now) -> Agent {
    let age = |then: u64| now.unix_ms.saturating_sub(then);
    let since = |then: u64| (then != 0).then(|| age(then));
    Agent {
        alive: running && age(state.beat_ms) < BEAT_LIMIT_MS,
        pid: state.pid,
        version: untext(&state.version).to_owned(),
        node: untext(&state.node).to_owned(),
        source: untext(&state.source).to_owned(),
        connected: state.connected != 0,
        synced: state.synced != 0,
        beat_age_ms: age(state.beat_ms),
        sync_age_ms: since(state.synced_ms),
        queued_age_ms: since(state.queued_ms),
        generation: state.generation,
        services: state.services,
        endpoints: state.endpoints,
        warnings: state.complaints,
        interfaces: state.interfaces,
        interfaces_failed: state.interfaces_failed,
    }
}

fn fall_backs(state: &AgentState) -> Vec<FallBack> {
    let absent = probe::fall_backs(state.absent).into_iter();
    absent.map(|feature| FallBack { feature: feature.name, meaning: feature.when_absent }).collect()
}

fn problems(agent: Option<&Agent>, tables: &[MapFill]) -> Vec<Remark> {
    let Some(agent) = agent else {
        let text = "tables are pinned, but the agent has never written to them";
        return vec![remark(text, "look at the agent's log: it did not get as far as its first sync")];
    };
    let mut found = Vec::new();
    if !agent.alive && agent.beat_age_ms < BEAT_LIMIT_MS {
        found.push(remark(
            "the agent does not run",
            "start it; until then traffic flows as it was last programmed",
        ));
    } else if !agent.alive {
        found.push(remark(
            format!("no heartbeat of the agent for {}", span(agent.beat_age_ms)),
            "start it, or look at its log if it runs; until then traffic flows as it was last programmed",
        ));
    }
    if !agent.synced {
        found.push(remark(
            format!("the first list has not arrived from {}", agent.source),
            "see that the source can be reached from this node, and the agent's log for what it answers",
        ));
    } else if agent.sync_age_ms.is_none() {
        found.push(remark(
            "the tables have never been in step",
            "see the agent's log for what it cannot write",
        ));
    }
    if let Some(age) = agent.queued_age_ms.filter(|age| *age >= QUEUE_LIMIT_MS) {
        found.push(remark(
            format!("changes have been waiting for {} to be programmed", span(age)),
            "see the agent's log for what it cannot write",
        ));
    }
    if agent.interfaces_failed > 0 {
        found.push(remark(
            format!("interfaces that refused a program: {}", agent.interfaces_failed),
            "see the agent's log for which and why; leave them out with --devices if they carry no Services",
        ));
    }
    for table in tables.iter().filter(|table| table.percent() > FULL_PERCENT) {
        found.push(remark(
            format!("table {} is {}% full", table.name, table.percent()),
            match size_flag(table.name) {
                Some(flag) => format!("it grows up to {flag} and --map-memory: start the agent with more"),
                None => "its size is fixed: please report it".to_owned(),
            },
        ));
    }
    found
}

/// A hook that refuses its programs, in the agent's words.
fn refusal(line: &str) -> Remark {
    remark(line, "see `proxy-agent doctor` for who else is at the hook; the agent goes on trying")
}

fn warnings(agent: Option<&Agent>, links: &[LinkInfo], object_warnings: &[String]) -> Vec<Remark> {
    let mut found = Vec::new();
    let Some(agent) = agent else { return found };
    if agent.synced && !agent.connected {
        found.push(remark(
            format!("{} does not answer", agent.source),
            "traffic flows as it was last programmed; see that the source can be reached from this node",
        ));
    }
    if agent.interfaces == 0 && agent.interfaces_failed == 0 {
        found.push(remark(
            "no interface carries programs",
            "see that --devices matches this node's interfaces",
        ));
    }
    for link in links.iter().filter(|link| !link.attached) {
        found.push(remark(
            format!("link {} ({}) is attached to nothing", link.name, link.program),
            "a running agent attaches it again within seconds: see its log if it does not",
        ));
    }
    if !object_warnings.is_empty() {
        found.push(remark(
            format!("warnings about objects: {}, listed below", object_warnings.len()),
            "correct the objects; everything else is served",
        ));
    }
    if agent.version != env!("CARGO_PKG_VERSION") {
        found.push(remark(
            format!("the agent has version {}, this command {}", agent.version, env!("CARGO_PKG_VERSION")),
            "use the command of the agent's own image",
        ));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::super::memory::{Memory, NOW, golden, small_cluster};
    use super::super::status_page::text;
    use super::*;

    fn read(memory: &Memory) -> Status {
        Status::read(memory, "6.12.0", NOW).unwrap()
    }

    fn problems_of(change: impl FnOnce(&mut Memory)) -> Vec<String> {
        let mut memory = small_cluster();
        change(&mut memory);
        let status = read(&memory);
        assert_eq!(status.healthy, status.problems.is_empty());
        status.problems.into_iter().map(|problem| problem.text).collect()
    }

    #[test]
    fn a_healthy_node_fits_on_one_page() {
        golden("status_healthy", &text(&read(&small_cluster())));
    }

    #[test]
    fn an_unhealthy_node_says_what_is_wrong_first() {
        let mut memory = small_cluster();
        memory.agent.beat_ms = NOW.unix_ms - 15_000;
        memory.agent.connected = 0;
        memory.agent.interfaces_failed = 1;
        memory.warnings = vec!["Service default/bad: port 0 is out of range".to_owned()];
        memory.links[1].attached = false;
        golden("status_unhealthy", &text(&read(&memory)));
    }

    #[test]
    fn what_the_kernel_lacks_is_told_with_what_it_means_and_is_no_ailment() {
        use proxy_common::abi::absent;
        let mut memory = small_cluster();
        memory.agent.absent = absent::TCX | absent::SET_RETVAL | absent::HOST_NETNS;
        let status = read(&memory);
        assert!(status.healthy);
        golden("status_old_kernel", &text(&status));
        let json = serde_json::to_value(status).unwrap();
        assert_eq!(json["fall_backs"][0]["feature"], "TCX links");
    }

    #[test]
    fn each_ailment_is_a_problem() {
        assert_eq!(problems_of(|_| {}), Vec::<String>::new());
        assert_eq!(
            problems_of(|m| m.agent.beat_ms = NOW.unix_ms - 20_000),
            ["no heartbeat of the agent for 20s"]
        );
        assert_eq!(problems_of(|m| m.agent.beat_ms = NOW.unix_ms - 14_999), Vec::<String>::new());
        assert_eq!(
            problems_of(|m| m.agent.synced = 0),
            ["the first list has not arrived from manifests /etc/services"]
        );
        assert_eq!(problems_of(|m| m.agent.synced_ms = 0), ["the tables have never been in step"]);
        assert_eq!(
            problems_of(|m| m.agent.queued_ms = NOW.unix_ms - 60_000),
            ["changes have been waiting for 1m0s to be programmed"]
        );
        assert_eq!(problems_of(|m| m.agent.queued_ms = NOW.unix_ms - 59_999), Vec::<String>::new());
        assert_eq!(problems_of(|m| m.agent.interfaces_failed = 2), ["interfaces that refused a program: 2"]);
        assert_eq!(
            problems_of(|m| m.fill[1] = MapFill { name: "FLOWS", used: 91, max: 100 }),
            ["table FLOWS is 91% full"]
        );
        assert_eq!(
            problems_of(|m| m.agent.started_ms = 0),
            ["tables are pinned, but the agent has never written to them"]
        );
    }

    #[test]
    fn a_node_where_nothing_ran_says_how_to_start() {
        let status = Status::never_run(std::path::Path::new("/bpf"), "6.12.0");
        assert!(!status.healthy && status.agent.is_none());
        assert!(
            text(&status).starts_with("not healthy: no agent has run here: nothing is pinned under /bpf\n")
        );
    }

    #[test]
    fn the_json_form_keeps_its_names() {
        let json = serde_json::to_value(read(&small_cluster())).unwrap();
        let keys: Vec<_> = json.as_object().unwrap().keys().map(String::as_str).collect();
        let mut expected = [
            "healthy",
            "problems",
            "warnings",
            "version",
            "kernel",
            "agent",
            "frontends",
            "socket_hooks",
            "links",
            "tables",
            "fall_backs",
            "reasons",
            "object_warnings",
            "notes",
        ];
        expected.sort_unstable();
        let mut sorted = keys.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, expected);
        assert_eq!(json["agent"]["beat_age_ms"], 2000);
        assert_eq!(json["agent"]["queued_age_ms"], serde_json::Value::Null);
        assert_eq!(json["tables"][0], serde_json::json!({"name": "FRONTENDS", "used": 3, "max": 131_072}));
        assert_eq!(json["reasons"][0]["reason"], "new_flow");
        assert_eq!(json["links"][0]["attached"], true);
    }
}
