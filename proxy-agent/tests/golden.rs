//! Golden scenarios: one story a file, manifests in, plans and tables out.
//!
//! A file in `scenarios/` begins with `#` lines that tell its story and the rules it shows, then settings
//! (`key: value`), then blocks under titles like `-- plan --`. A story is a sequence of syncs; each has
//!
//! - what happens before it: `manifests [FILE]` (the text of a file in the manifest directory, new or in
//!   the place of the old one), `delete FILE`, `links` (all interfaces), `wait MILLISECONDS`, `restart` (the
//!   agent dies and another one begins with what it finds);
//! - what follows: `plan` (every write, in order), `warnings` and `health` (`healthCheckNodePort`s) where
//!   there are any, and `maps` (all tables) where the file asks for them and at the end.
//!
//! What follows is checked to the letter; `UPDATE_EXPECT=1` writes it anew. Beside that, the tables are linted
//! after every single write, and after every sync an agent that starts afresh must find nothing to do.

#![expect(clippy::unwrap_used, reason = "this is all test: what cannot be read or written ends it")]

use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{env, fs};

use agent_core::datapath::Datapath;
use agent_core::datapath::memory::Memory;
use agent_core::model::{Change, Kind};
use agent_core::model::{HealthCheck, Link, LoadBalancerMode, NodePortAddresses, Settings, World};
use agent_core::plan::{Capacity, Plan, Planner, lint, lint_prefix};
use agent_source::manifests::ManifestStore;
use proxy_common::abi::{FrontendKey, PortRange};
use proxy_common::addr::{Port, Proto};
use tempfile::TempDir;

/// Every file in `scenarios/`, each a test of its own.
macro_rules! scenarios {
    ($($name:ident)*) => {
        $(#[test] fn $name() { check(&stringify!($name).replace('_', "-")); })*

        const NAMES: &[&str] = &[$(stringify!($name)),*];
    };
}

scenarios! {
    affinity affinity_off all_terminating blue_green broken_file cluster_ip_reused clusterip direct_return direct_return_flag dual_stack
    external_ips external_name graceful_termination hand_written_endpoints headless health_node_port
    internal_policy_local loadbalancer masquerade multiple_slices multiport name_collision
    named_target_port nodeport nodeport_addresses not_ready odd_addresses odd_ports port_renumbered
    prefer_same_node recreate restart_after_delete restart_unchanged rolling_update scale_to_zero sctp
    service_recreated slice_moved source_ranges source_ranges_unrestricted tables_full topology_zone
    topology_zone_fallback traffic_policy_local type_changes udp_endpoint_gone unlabelled_ignored
}

#[test]
fn every_file_is_a_test() {
    let mut files: Vec<String> = fs::read_dir(folder())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .map(|file| file.trim_end_matches(".txt").replace('-', "_"))
        .collect();
    files.sort();
    assert_eq!(files, NAMES, "a scenario needs a file in {} and its name in golden.rs", folder().display());
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scenarios")
}

fn check(name: &str) {
    let path = folder().join(format!("{name}.txt"));
    let written = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let played = play(&Scenario::read(name, &written));
    if written == played {
        return;
    }
    if env::var_os("UPDATE_EXPECT").is_some_and(|value| value == "1") {
        fs::write(&path, played).unwrap();
        return;
    }
    panic!(
        "{} ends otherwise than it is written (- written, + as it is now):\n{}\n\
         if it is right now: UPDATE_EXPECT=1 cargo test --package proxy-agent --test golden, then read the diff",
        path.display(),
        diff(&written, &played)
    );
}

/// A file, taken apart.
struct Scenario {
    head: String,
    settings: Settings,
    capacity: Capacity,
    links: Vec<Link>,
    blocks: Vec<Block>,
}

/// `-- TITLE --` and the lines under it.
struct Block {
    title: String,
    body: String,
}

impl Scenario {
    fn read(name: &str, text: &str) -> Self {
        let mut blocks: Vec<Block> = Vec::new();
        let mut head = String::new();
        for line in text.lines() {
            let title = line.strip_prefix("-- ").and_then(|rest| rest.strip_suffix(" --"));
            if let Some(title) = title {
                blocks.push(Block { title: title.to_owned(), body: String::new() });
            } else {
                let into = blocks.last_mut().map_or(&mut head, |block| &mut block.body);
                writeln!(into, "{line}").unwrap();
            }
        }
        assert!(head.starts_with("# "), "{name}: the first line tells the story and its rules");
        let (settings, capacity) = (settings(), Capacity::default());
        let mut scenario = Self { head, settings, capacity, links: Vec::new(), blocks };
        for line in scenario.head.clone().lines().filter(|line| !line.starts_with('#')) {
            let (key, value) = line.split_once(": ").unwrap_or_else(|| panic!("{name}: `{line}`: no colon"));
            scenario.set(key, value);
        }
        scenario
    }

    fn set(&mut self, key: &str, value: &str) {
        let Self { settings, capacity, .. } = self;
        match key {
            "node-name" => settings.node_name = value.into(),
            "cluster-cidr" => settings.cluster_cidrs = list(value),
            "loadbalancer-mode" => {
                settings.loadbalancer_mode = match value {
                    "snat" => LoadBalancerMode::Snat,
                    "dsr" => LoadBalancerMode::Dsr,
                    _ => panic!("`{value}` is no mode"),
                };
            }
            "masquerade-all" => settings.masquerade_all = value.parse().unwrap(),
            "nodeport-addresses" => {
                settings.nodeport_addresses = NodePortAddresses::Ranges(list(value));
            }
            "link" => self.links.push(link(value)),
            "max-frontends" => capacity.frontends = value.parse().unwrap(),
            "max-slots" => capacity.slots = value.parse().unwrap(),
            "max-backends" => capacity.backends = value.parse().unwrap(),
            "max-sources" => capacity.sources = value.parse().unwrap(),
            "max-services" => capacity.services = value.parse().unwrap(),
            _ => panic!("`{key}` is not a setting"),
        }
    }
}

/// A node called n1 with nothing set.
fn settings() -> Settings {
    Settings {
        host_netns: 1,
        snat_ports: vec![PortRange { first: 61_000, count: 4_000 }],
        seed: 7,
        ..Settings::of_node("n1")
    }
}

fn list<T: std::str::FromStr<Err: std::fmt::Debug>>(text: &str) -> Vec<T> {
    text.split(',')
        .map(|part| part.parse().unwrap_or_else(|e| panic!("`{part}` in `{text}`: {e:?}")))
        .collect()
}

/// `2 eth0 192.0.2.1/24 …`; the word `layer3` for an interface without Ethernet header.
fn link(text: &str) -> Link {
    let mut words = text.split_whitespace();
    let index = words.next().unwrap().parse().unwrap();
    let name: Arc<str> = words.next().unwrap().into();
    let (layer3, addresses): (Vec<&str>, Vec<&str>) = words.partition(|word| *word == "layer3");
    Link {
        index,
        loopback: &*name == "lo",
        name,
        up: true,
        layer3: !layer3.is_empty(),
        addresses: addresses.into_iter().flat_map(list).collect(),
        ..Link::default()
    }
}

/// The file as it should be written.
fn play(scenario: &Scenario) -> String {
    let mut played = scenario.head.clone();
    let mut stage = Stage::new(scenario);
    let mut blocks = scenario.blocks.iter().peekable();
    while blocks.peek().is_some() {
        while let Some(block) = blocks.next_if(|block| !is_outcome(&block.title)) {
            stage.happen(&block.title, &block.body);
            put(&mut played, &block.title, &block.body);
        }
        let outcome = stage.sync();
        let mut maps = false;
        while let Some(block) = blocks.next_if(|block| is_outcome(&block.title)) {
            maps |= block.title == "maps";
            if blocks.peek().is_some_and(|next| next.title == "plan") {
                break;
            }
        }
        put(&mut played, "plan", if outcome.plan.is_empty() { "(nothing)\n" } else { &outcome.plan });
        for (title, body) in [("warnings", &outcome.warnings), ("health", &outcome.health)] {
            if !body.is_empty() {
                put(&mut played, title, body);
            }
        }
        if maps || blocks.peek().is_none() {
            put(&mut played, "maps", &stage.memory.actual.dump());
        }
    }
    played
}

fn is_outcome(title: &str) -> bool {
    ["plan", "warnings", "health", "maps"].contains(&title)
}

fn put(out: &mut String, title: &str, body: &str) {
    write!(out, "-- {title} --\n{body}").unwrap();
}

/// A node: its tables, which stay, and the agent, which may die.
struct Stage {
    directory: TempDir,
    settings: Settings,
    capacity: Capacity,
    links: Vec<Link>,
    memory: Memory,
    now_ms: u64,
    store: ManifestStore,
    world: World,
    planner: Option<Planner>,
}

/// What follows from one sync.
struct Outcome {
    plan: String,
    warnings: String,
    health: String,
}

impl Stage {
    fn new(scenario: &Scenario) -> Self {
        let directory = TempDir::new().unwrap();
        let settings = scenario.settings.clone();
        Self {
            capacity: scenario.capacity,
            links: scenario.links.clone(),
            memory: Memory::new(scenario.capacity),
            now_ms: 10_000,
            store: ManifestStore::new(directory.path().to_owned(), settings.node_name.clone()),
            world: World::new(settings.clone()),
            planner: None,
            settings,
            directory,
        }
    }

    /// Does what a block says happens before a sync.
    fn happen(&mut self, title: &str, body: &str) {
        let file = |name: &str| self.directory.path().join(name);
        match title.split_once(' ').unwrap_or((title, "")) {
            ("manifests", "") => fs::write(file("manifests.yaml"), body).unwrap(),
            ("manifests", name) => fs::write(file(name), body).unwrap(),
            ("delete", name) => fs::remove_file(file(name)).unwrap(),
            ("links", "") => self.links = body.lines().map(link).collect(),
            ("wait", time) => self.now_ms += time.parse::<u64>().unwrap(),
            ("restart", "") => {
                self.store =
                    ManifestStore::new(self.directory.path().to_owned(), self.settings.node_name.clone());
                self.world = World::new(self.settings.clone());
                self.planner = None;
            }
            _ => panic!("no such block: -- {title} --"),
        }
    }

    /// Applies changes, plans and writes, as the agent's loop does.
    fn sync(&mut self) -> Outcome {
        let now_ms = self.now_ms;
        for change in self.store.refresh().unwrap() {
            self.world.apply(change);
        }
        self.world.apply(Change::Links(self.links.clone()));
        let proposal = match self.planner.take() {
            None => {
                for kind in [Kind::Service, Kind::Slice, Kind::Node] {
                    self.world.apply(Change::Synced(kind));
                }
                assert!(self.world.synced());
                let planner = Planner::new(&self.memory.read().unwrap(), self.capacity);
                planner.full(&self.world.take_desired(), now_ms)
            }
            Some(planner) => planner.dirty(&self.world.take_dirty(), Some(&self.world.node()), now_ms),
        };
        let plan: String = proposal.plan.steps.iter().map(|step| format!("{step}\n")).collect();
        for step in &proposal.plan.steps {
            self.memory.apply(std::slice::from_ref(step)).unwrap();
            let found = lint_prefix(&self.memory.actual);
            assert_eq!(found, [], "after `{step}` of\n{plan}\n{}", self.memory.actual.dump());
        }
        assert_eq!(lint(&self.memory.actual), [], "after\n{plan}\n{}", self.memory.actual.dump());
        // What waits for numbers that rest now is served at once by an agent that starts.
        let waits = proposal.plan.retry_at_ms.is_some();
        let warnings = self.warnings(&proposal.plan);
        let planner = proposal.applied(now_ms).0;
        assert_eq!(planner.actual(), &self.memory.actual, "what the planner believes is not what is");
        self.planner = Some(planner);
        self.now_ms += 1_000;
        if !waits {
            self.a_restart_plans_nothing();
        }
        Outcome { plan, warnings, health: self.health() }
    }

    fn a_restart_plans_nothing(&self) {
        let planner = Planner::new(&self.memory.actual, self.capacity);
        let steps = planner.full(&self.world.desired(), self.now_ms).plan.steps;
        let lines: String = steps.iter().map(|step| format!("{step}\n")).collect();
        assert_eq!(lines, "", "an agent that starts now would write");
    }

    fn warnings(&self, plan: &Plan) -> String {
        let world =
            self.world.warnings().into_iter().map(|warning| format!("{}: {}", warning.object, warning.line));
        let again = plan.retry_at_ms.map(|time| format!("tried again in {} ms", time - self.now_ms));
        let lines = world.chain(plan.warnings.iter().cloned()).chain(again);
        lines.map(|line| format!("{line}\n")).collect()
    }

    fn health(&self) -> String {
        let checks = self.world.health_checks().into_iter();
        let line = |check: HealthCheck| {
            let HealthCheck { service, family, port, local_endpoints } = check;
            format!("{service} {family:?} port {port}: {local_endpoints} local endpoints\n")
        };
        checks.map(line).collect()
    }
}

/// Lines that differ and those next to them; lines that are new have the numbers they will have.
fn diff(written: &str, played: &str) -> String {
    let (old, new): (Vec<&str>, Vec<&str>) = (written.lines().collect(), played.lines().collect());
    // Longest common tail of every pair of tails: the files are short.
    let mut common = vec![vec![0_usize; new.len() + 1]; old.len() + 1];
    for i in (0..old.len()).rev() {
        for j in (0..new.len()).rev() {
            common[i][j] = match old[i] == new[j] {
                true => common[i + 1][j + 1] + 1,
                false => common[i + 1][j].max(common[i][j + 1]),
            };
        }
    }
    let (mut i, mut j, mut lines) = (0, 0, Vec::new());
    while i < old.len() || j < new.len() {
        if i < old.len() && j < new.len() && old[i] == new[j] {
            lines.push((i + 1, ' ', old[i]));
            (i, j) = (i + 1, j + 1);
        } else if j == new.len() || i < old.len() && common[i + 1][j] >= common[i][j + 1] {
            lines.push((i + 1, '-', old[i]));
            i += 1;
        } else {
            lines.push((j + 1, '+', new[j]));
            j += 1;
        }
    }
    let near =
        |n: usize| lines[n.saturating_sub(2)..(n + 3).min(lines.len())].iter().any(|line| line.1 != ' ');
    let shown = (0..lines.len()).filter(|n| near(*n)).map(|n| lines[n]);
    shown.map(|(number, sign, line)| format!("{number:4} {sign} {line}\n")).collect()
}

#[test]
fn a_difference_shows_what_was_written_and_what_is() {
    let shown = diff("a\nb\nc\nd\ne\nf\n", "a\nb\nc\nd\nE\nf\ng\n");
    assert_eq!(shown, "   3   c\n   4   d\n   5 - e\n   5 + E\n   6   f\n   7 + g\n");
}

/// All of `deploy/examples` as one cluster, then what each `.next` file makes of it.
#[test]
fn the_examples_load_without_a_warning_and_go_through_their_next_step() {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/examples");
    let text = "# deploy/examples\nnode-name: node1\nlink: 2 eth0 192.0.2.10/24\n";
    let mut stage = Stage::new(&Scenario::read("examples", text));
    let mut next = Vec::new();
    for entry in fs::read_dir(&examples).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let text = fs::read_to_string(examples.join(&name)).unwrap();
        match name.strip_suffix(".next") {
            Some(name) => next.push((format!("manifests {name}"), text)),
            None => stage.happen(&format!("manifests {name}"), &text),
        }
    }
    let endpoints = |stage: &Stage, ip: &str| -> Vec<String> {
        let actual = &stage.memory.actual;
        let key = FrontendKey::new(ip.parse::<IpAddr>().unwrap().into(), Port::new(80), Proto::TCP);
        actual.endpoints(actual.frontends[&key].cluster).map(|(addr, _)| addr.to_string()).collect()
    };

    let outcome = stage.sync();
    assert_eq!(outcome.warnings, "");
    assert_eq!(outcome.health, "default/shopfront V4 port 30909: 1 local endpoints\n");
    assert_eq!(endpoints(&stage, "10.100.100.150"), ["10.244.1.81", "10.244.1.82", "10.244.2.81"]);
    assert_eq!(endpoints(&stage, "10.100.100.160"), ["10.244.1.91", "10.244.2.91"]);
    let names: Vec<_> = stage.world.services().map(|(name, _)| name.to_string()).collect();
    assert!(names.iter().any(|name| name == "default/legacy"), "{names:?}");
    for ignored in ["default/database", "default/queue"] {
        assert!(!names.iter().any(|name| name == ignored), "{names:?}");
    }

    assert!(!next.is_empty(), "there are examples of rollouts");
    next.iter().for_each(|(title, text)| stage.happen(title, text));
    let outcome = stage.sync();
    assert_eq!(outcome.warnings, "");
    // The endpoint that terminates is out of it, the one that still starts not yet in.
    assert_eq!(endpoints(&stage, "10.100.100.150"), ["10.244.1.82", "10.244.1.83", "10.244.2.81"]);
    assert_eq!(endpoints(&stage, "10.100.100.160"), ["10.244.1.95", "10.244.2.95"]);
    let outcome = stage.sync();
    assert_eq!(outcome.plan, "", "nothing has happened since");
}
