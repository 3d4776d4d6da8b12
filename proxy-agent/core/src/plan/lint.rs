//! What must hold of the tables, apart from the code that makes it so.

use std::collections::{BTreeMap, BTreeSet};

use proxy_common::abi::{Backend, FrontendKey, Run, address, frontend};
use proxy_common::addr::{Addr, Proto};

use super::Actual;
use super::mirror::Uses;
use super::print::Destination;

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// A reader would look again, and then drop.
    #[error("frontend {} has a seal that does not fit", Destination(.0))]
    Seal(FrontendKey),
    /// Nobody knows whose it is.
    #[error("frontend {} belongs to service id {service}, which has no name", Destination(.key))]
    FrontendUnnamed {
        key: FrontendKey,
        /// Its service id.
        service: u32,
    },
    /// A packet that chose this slot would be dropped.
    #[error("frontend {} shows slot {slot}, which leads to backend {backend}: {why}", Destination(.key))]
    Slot {
        key: FrontendKey,
        /// The slot.
        slot: u32,
        /// The index in it.
        backend: u32,
        /// What is wrong with that.
        why: &'static str,
    },
    /// The empty run begins at 0, every other one after it.
    #[error("frontend {} has the impossible run {}+{}", Destination(.key), .run.first, .run.count)]
    Run {
        key: FrontendKey,
        /// The run.
        run: Run,
    },
    /// The next change of one Service would write into another's slots.
    #[error("slots {}+{} of service id {one} overlap {}+{} of {other}", .run.first, .run.count, .with.first, .with.count)]
    Overlap {
        /// A service id.
        one: u32,
        /// Its run.
        run: Run,
        /// Another service id.
        other: u32,
        /// Its run.
        with: Run,
    },
    /// Everybody would be turned away.
    #[error("frontend {} asks for source ranges and service id {service} has none", Destination(.key))]
    NoSources {
        key: FrontendKey,
        /// Its service id.
        service: u32,
    },
    /// Nothing that comes there goes to another node, or nothing of its protocol is wrapped.
    #[error("frontend {} is answered by other nodes (DSR), and is a ClusterIP, of policy Local or neither TCP nor UDP", Destination(.0))]
    Direct(FrontendKey),
    /// A packet would be sent to another node while its endpoint is here.
    #[error("backend {index} is local and has the number {node:#x} of another node")]
    Elsewhere {
        /// The index.
        index: u32,
        /// The node's number.
        node: u32,
    },
    /// A live backend whose service id has no name.
    #[error("backend {index} is live and belongs to service id {service}, which has no name")]
    BackendUnnamed {
        /// The index.
        index: u32,
        /// Its service id.
        service: u32,
    },
    /// Ports that nobody defines would be refused at an address that is no ClusterIP.
    #[error("address {0} is marked as a ClusterIP and has no frontend")]
    AddressAlone(Addr),
    /// ADDRESSES say something else than FRONTENDS.
    #[error("address {addr} has the bits {is:#x} and should have {should:#x}")]
    Address {
        /// The address.
        addr: Addr,
        /// Its bits, without those of the node.
        is: u32,
        /// What the frontends there make of it.
        should: u32,
    },
    /// The node's own traffic from that port would be taken for a Service's answers.
    #[error("frontend {} has a port that SERVICE_PORTS does not name", Destination(.0))]
    PortUnnamed(FrontendKey),
    /// Every connection from that port would be remembered for nothing.
    #[error("SERVICE_PORTS names port {0}, which no frontend beside ClusterIPs has")]
    PortAlone(u32),
    /// A source range of nobody.
    #[error("a source range belongs to service id {0}, which has no name")]
    SourceUnnamed(u32),
    /// The frontends of one Service show different slots.
    #[error("frontend {} shows other slots than its siblings of service id {service}", Destination(.key))]
    Split {
        key: FrontendKey,
        /// Its service id.
        service: u32,
    },
    /// Two ids bear one name.
    #[error("service ids {0} and {1} have the same name")]
    NamedTwice(u32, u32),
}

/// Everything that is wrong with tables that are meant to be complete.
#[must_use]
pub fn lint(actual: &Actual) -> Vec<Violation> {
    let mut found = lint_prefix(actual);
    lint_addresses(actual, &mut found);
    lint_ports(actual, &mut found);
    lint_services(actual, &mut found);
    found
}

/// Everything that is wrong with tables in the middle of a plan: what a packet would suffer from.
#[must_use]
pub fn lint_prefix(actual: &Actual) -> Vec<Violation> {
    let mut found = Vec::new();
    let mut runs = BTreeSet::new();
    let mut standing = BTreeSet::new();
    let sourced: BTreeSet<u32> = actual.sources.iter().map(|key| u32::from_be(key.service)).collect();
    for (key, value) in &actual.frontends {
        let (key, service) = (*key, value.service);
        standing.insert(key.addr);
        if !value.is_sealed_for(&key) {
            found.push(Violation::Seal(key));
        }
        if !actual.services.contains_key(&service) {
            found.push(Violation::FrontendUnnamed { key, service });
        }
        if value.flags & frontend::SOURCE_RANGES != 0 && !sourced.contains(&service) {
            found.push(Violation::NoSources { key, service });
        }
        if value.flags & frontend::INTERNAL == 0 && !is_named(actual, key.port.number().into()) {
            found.push(Violation::PortUnnamed(key));
        }
        let elsewhere = frontend::INTERNAL | frontend::LOCAL;
        let wrapped = matches!(key.proto, Proto::TCP | Proto::UDP);
        if value.flags & frontend::DSR != 0 && (value.flags & elsewhere != 0 || !wrapped) {
            found.push(Violation::Direct(key));
        }
        for run in BTreeSet::from([value.cluster, value.local]) {
            if (run.first == 0) != (run.count == 0) || run.first.checked_add(run.count).is_none() {
                found.push(Violation::Run { key, run });
            } else if run.count != 0 {
                runs.insert((run, service));
                lint_run(actual, key, service, run, &mut found);
            }
        }
    }
    lint_overlap(&runs, &mut found);
    let live = actual.backends.iter().filter(|(_, backend)| backend.is_live());
    for (index, backend) in live {
        let Backend { service, node, .. } = backend;
        if backend.is_local() && *node != 0 {
            found.push(Violation::Elsewhere { index, node: *node });
        }
        if !actual.services.contains_key(service) {
            found.push(Violation::BackendUnnamed { index, service: *service });
        }
    }
    let cluster_ips = actual.addresses.iter().filter(|(_, bits)| **bits & address::CLUSTER_IP != 0);
    let alone = cluster_ips.filter(|(addr, _)| !standing.contains(addr));
    found.extend(alone.map(|(addr, _)| Violation::AddressAlone(*addr)));
    found
}

fn lint_run(actual: &Actual, key: FrontendKey, service: u32, run: Run, found: &mut Vec<Violation>) {
    for (slot, backend) in (run.first..).zip(actual.run(run)) {
        let why = match actual.backends.get(backend) {
            None => "there is none",
            Some(value) if !value.is_live() => "it is retired",
            Some(value) if value.service != service => "it belongs to another Service",
            Some(_) if backend == 0 => "index 0 is never used",
            Some(_) => continue,
        };
        found.push(Violation::Slot { key, slot, backend, why });
    }
}

fn lint_overlap(runs: &BTreeSet<(Run, u32)>, found: &mut Vec<Violation>) {
    // In order of their first slots a run can only overlap one that reaches beyond its beginning.
    let mut reaching: Vec<(Run, u32)> = Vec::new();
    for (run, one) in runs {
        reaching.retain(|(with, _)| with.first + with.count > run.first);
        for (with, other) in reaching.iter().filter(|(_, other)| other != one) {
            found.push(Violation::Overlap { one: *one, run: *run, other: *other, with: *with });
        }
        reaching.push((*run, *one));
    }
}

fn lint_addresses(actual: &Actual, found: &mut Vec<Violation>) {
    let mut uses: BTreeMap<Addr, Uses> = actual.addresses.keys().map(|a| (*a, Uses::default())).collect();
    for (key, value) in &actual.frontends {
        uses.entry(key.addr).or_default().add(value.flags);
    }
    for (addr, uses) in uses {
        let bits = actual.addresses.get(&addr).copied();
        let is = bits.unwrap_or(0) & (address::CLUSTER_IP | address::EXTERNAL);
        let should = uses.bits();
        if is != should || bits == Some(0) {
            found.push(Violation::Address { addr, is, should });
        }
    }
}

fn is_named(actual: &Actual, port: u32) -> bool {
    actual.service_ports.get(port / 64).is_some_and(|bits| bits >> (port % 64) & 1 != 0)
}

fn lint_ports(actual: &Actual, found: &mut Vec<Violation>) {
    let external = actual.frontends.iter().filter(|(_, value)| value.flags & frontend::INTERNAL == 0);
    let used: BTreeSet<u32> = external.map(|(key, _)| key.port.number().into()).collect();
    let named = actual.service_ports.iter().flat_map(|(word, _)| word * 64..word * 64 + 64);
    let alone = named.filter(|port| is_named(actual, *port) && !used.contains(port));
    found.extend(alone.map(Violation::PortAlone));
}

fn lint_services(actual: &Actual, found: &mut Vec<Violation>) {
    let owners: BTreeSet<u32> = actual.sources.iter().map(|key| u32::from_be(key.service)).collect();
    let nobodys = owners.into_iter().filter(|id| !actual.services.contains_key(id));
    found.extend(nobodys.map(Violation::SourceUnnamed));
    let mut names = BTreeMap::new();
    for (id, name) in &actual.services {
        if let Some(first) = names.insert(name, *id) {
            found.push(Violation::NamedTwice(first, *id));
        }
    }
    let mut shown = BTreeMap::new();
    for (key, value) in &actual.frontends {
        let first = *shown.entry(value.service).or_insert((value.cluster, value.local));
        if first != (value.cluster, value.local) {
            found.push(Violation::Split { key: *key, service: value.service });
        }
    }
}
