//! Connected UDP sockets of host processes follow their Service (C-4 to C-13).
//!
//! Whether one has lost its endpoint is read off the tables, each time when a UDP endpoint has gone, and with every
//! change while there is one that no endpoint could be found for. To lead sockets on can take a walk through all
//! processes, so a thread does that.

pub(super) mod untranslated;

use super::Agent;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use proxy_common::abi::SocketEntry;
use proxy_common::addr::Proto;

use crate::serve::metrics::Metrics;
use agent_core::model::Family;
use agent_core::plan::{Actual, Planner, Step};
use agent_kernel::datapath::flow::sockets::{Connected, LedOn, SocketError, Storage, lead_on};
use agent_kernel::datapath::store::pin::BpfRoot;

/// What is known between two syncs.
pub(super) struct Sockets {
    root: BpfRoot,
    /// Opened when it is needed first: that takes the kernel's types.
    storage: Option<Storage>,
    metrics: Arc<Metrics>,
    /// There may be sockets that lead nowhere and could not be led on.
    pending: Arc<AtomicBool>,
    at_work: Option<JoinHandle<()>>,
}

impl Sockets {
    pub(super) fn new(root: BpfRoot, metrics: Arc<Metrics>) -> Self {
        // An endpoint may have gone while no agent ran.
        let pending = Arc::new(AtomicBool::new(true));
        Self { root, storage: None, metrics, pending, at_work: None }
    }

    /// Looks for sockets that the steps have taken the endpoint from, once the tables are as the planner knows them.
    pub(super) fn follow(&mut self, planner: &Planner, retired: bool, changed: bool) {
        let started = Instant::now();
        let at_work = self.at_work.as_ref().is_some_and(|thread| !thread.is_finished());
        let due = retired || changed && self.pending.load(Ordering::Relaxed);
        if at_work || !due {
            // What is at work now may have read older tables.
            self.pending.fetch_or(at_work && retired, Ordering::Relaxed);
            self.count(started, [0; 2]);
            return;
        }
        let lost = self.connected().map(|sockets| choose(planner, sockets));
        let (lost, stuck) = lost.unwrap_or_else(|error| {
            warn(&error);
            (Vec::new(), false)
        });
        self.pending.store(stuck, Ordering::Relaxed);
        if lost.is_empty() {
            self.count(started, [0; 2]);
            return;
        }
        let (metrics, pending) = (self.metrics.clone(), self.pending.clone());
        let work = move || {
            let (v4, v6): (Vec<_>, Vec<_>) = lost.into_iter().partition(|socket| socket.named().is_ipv4());
            let done = [v4, v6].map(|sockets| {
                let done = lead_on(&sockets, Path::new("/proc")).unwrap_or_else(|error| {
                    warn(&error);
                    LedOn::default()
                });
                log(done);
                pending.fetch_or(done.left != 0, Ordering::Relaxed);
                done.moved + done.destroyed
            });
            count(&metrics, started, done);
        };
        match std::thread::Builder::new().name("sockets".into()).spawn(work) {
            Ok(thread) => self.at_work = Some(thread),
            Err(error) => {
                tracing::warn!("no thread for sockets whose endpoint has gone: {error}");
                self.pending.store(true, Ordering::Relaxed);
            }
        }
    }

    fn connected(&mut self) -> Result<Vec<Connected>, SocketError> {
        let storage = match self.storage.take() {
            Some(storage) => storage,
            None => Storage::open(&self.root)?,
        };
        self.storage.insert(storage).connected()
    }

    fn count(&self, started: Instant, done: [usize; 2]) {
        count(&self.metrics, started, done);
    }
}

fn count(metrics: &Metrics, started: Instant, done: [usize; 2]) {
    for (family, done) in [Family::V4, Family::V6].into_iter().zip(done) {
        metrics.syncs().reconciled(family, done, started.elapsed());
    }
}

fn warn(error: &SocketError) {
    tracing::warn!(
        error = error as &dyn std::error::Error,
        "UDP sockets of host processes may still lead to endpoints that have gone"
    );
}

fn log(done: LedOn) {
    let LedOn { moved, destroyed, left: _ } = done;
    if moved != 0 {
        tracing::info!("{moved} UDP sockets of host processes led to endpoints that have gone: led on");
    }
    if destroyed != 0 {
        tracing::info!(
            "{destroyed} UDP sockets of host processes led to endpoints that have gone: closed, since there is no way \
             to them (the agent needs the host's process ids and CAP_SYS_PTRACE)"
        );
    }
}

/// Whether steps retire an endpoint of a UDP port.
pub(super) fn retires_udp(before: &Actual, steps: &[Step]) -> bool {
    steps.iter().any(|step| match step {
        Step::PutBackend(index, backend) if !backend.is_live() => before
            .backends
            .get(*index)
            .filter(|old| old.is_live())
            .and_then(|old| before.services.get(&old.service))
            .is_some_and(|name| name.proto == Proto::UDP),
        _ => false,
    })
}

/// The sockets that have lost their endpoint and have another one to go to; and whether there are any that have not.
fn choose(planner: &Planner, sockets: Vec<Connected>) -> (Vec<Connected>, bool) {
    let mut stuck = false;
    let lost = sockets.into_iter().filter(|socket| has_lost(planner.actual(), &socket.entry));
    let lost = lost.filter(|socket| match fate(planner, &socket.entry) {
        Fate::Stays => false,
        Fate::Moves => true,
        Fate::Waits => {
            stuck = true;
            false
        }
    });
    let lost = lost.collect();
    (lost, stuck)
}

fn has_lost(actual: &Actual, entry: &SocketEntry) -> bool {
    let backend = actual.backends.get(entry.backend);
    !backend.is_some_and(|backend| backend.is_live() && backend.generation == entry.generation)
}

/// What is to become of a socket whose backend has been retired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// What it was connected to leads there again (P-28).
    Stays,
    /// There is another endpoint.
    Moves,
    /// There is none (C-6), or no such Service (C-9).
    Waits,
}

fn fate(planner: &Planner, entry: &SocketEntry) -> Fate {
    let Some(frontend) = planner.actual().frontend_at(entry.vip, entry.vport, Proto::UDP) else {
        return Fate::Waits;
    };
    let mut fate = Fate::Waits;
    for end in planner.endpoints_of(frontend.service) {
        if end == (entry.addr, entry.port) {
            return Fate::Stays;
        }
        fate = Fate::Moves;
    }
    fate
}

impl Agent {
    /// Host processes whose UDP socket was connected before this proxy came are led through it.
    pub(super) fn lead_in(&mut self) {
        let ours = self.adoption.as_ref().is_some_and(|adoption| adoption.leave() == 0);
        if let (true, Some(_), Some(planner)) = (ours, &self.cgroup_root, &self.planner) {
            self.untranslated.look(planner.actual());
        }
    }

    /// Host processes whose connected UDP socket leads to an endpoint that has gone are led on; flows that pass an
    /// interface need no such thing.
    pub(super) fn follow_sockets(&mut self, retired: bool, changed: bool) {
        if let Some(planner) = &self.planner {
            self.sockets.follow(planner, retired, changed);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use agent_core::plan::Capacity;
    use proxy_common::abi::{Backend, Frontend, FrontendKey, Run, address};
    use proxy_common::addr::{Addr, Port};

    use super::*;

    fn addr(text: &str) -> Addr {
        text.parse::<IpAddr>().unwrap().into()
    }

    fn entry(vip: &str, end: &str) -> SocketEntry {
        SocketEntry {
            vip: addr(vip),
            vport: Port::new(53),
            addr: addr(end),
            port: Port::new(5353),
            backend: 1,
            generation: 1,
            proto: Proto::UDP,
            pad: [0; 3],
        }
    }

    /// Services by their address, with the endpoints that they have.
    fn tables(services: &[(&str, &[&str])]) -> Actual {
        let mut actual = Actual::default();
        for (service, (vip, ends)) in (1..).zip(services) {
            let key = FrontendKey::new(addr(vip), Port::new(53), Proto::UDP);
            let value = Frontend {
                service,
                cluster: Run::EMPTY,
                local: Run::EMPTY,
                flags: 0,
                affinity_secs: 0,
                seal: 0,
            };
            actual.frontends.insert(key, value.sealed(&key));
            for (n, end) in (0..).zip(*ends) {
                let (addr, port) = (addr(end), Port::new(5353));
                let backend = Backend { addr, port, flags: 0, generation: 1, service, node: 0 };
                actual.backends.insert(service * 10 + n, backend);
            }
        }
        actual.backends.insert(1, Backend::retired(2));
        actual.addresses.insert(addr("192.168.10.11"), address::NODE | address::NODE_PORT);
        actual.addresses.insert(addr("192.168.10.12"), address::NODE);
        actual
    }

    fn fate_of(actual: &Actual, entry: &SocketEntry) -> Fate {
        fate(&Planner::new(actual, Capacity::default()), entry)
    }

    #[test]
    fn a_socket_moves_only_when_what_it_was_connected_to_leads_elsewhere() {
        let (a, b) = (entry("10.96.0.1", "10.244.1.7"), entry("10.96.0.2", "10.244.1.7"));
        let actual = tables(&[("10.96.0.1", &["10.244.1.8"]), ("10.96.0.2", &["10.244.1.7"])]);
        assert_eq!(fate_of(&actual, &a), Fate::Moves);
        assert_eq!(fate_of(&actual, &b), Fate::Stays);
        let actual = tables(&[("10.96.0.1", &[])]);
        assert_eq!(fate_of(&actual, &a), Fate::Waits, "no endpoint");
        assert_eq!(fate_of(&actual, &b), Fate::Waits, "no Service");
    }

    #[test]
    fn node_ports_are_told_from_other_ports_of_the_node() {
        let actual = tables(&[("0.0.0.0", &["10.244.1.8"]), ("::", &["fd00::8"])]);
        for (vip, fate) in [
            ("192.168.10.11", Fate::Moves),
            ("127.0.0.1", Fate::Moves),
            ("192.168.10.12", Fate::Waits),
            ("10.96.0.1", Fate::Waits),
        ] {
            assert_eq!(fate_of(&actual, &entry(vip, "10.244.1.7")), fate, "{vip}");
        }
        assert_eq!(fate_of(&actual, &entry("::1", "fd00::7")), Fate::Moves);
    }

    #[test]
    fn a_backend_of_another_generation_is_lost() {
        let mut actual = tables(&[("10.96.0.1", &["10.244.1.8"])]);
        let mut entry = entry("10.96.0.1", "10.244.1.8");
        assert!(has_lost(&actual, &entry));
        entry.backend = 10;
        assert!(!has_lost(&actual, &entry));
        let newer = Backend { generation: 2, ..*actual.backends.get(10).unwrap() };
        actual.backends.insert(10, newer);
        assert!(has_lost(&actual, &entry));
    }
}
