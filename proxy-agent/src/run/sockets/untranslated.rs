//! UDP sockets of host processes that were connected to a Service before programs of ours were there. Connection tracking leads
//! their packets on for as long as it remembers them; then nobody does, since no packet of the node's own passes a hook. So they
//! are connected again, as those are whose endpoint has gone (`datapath::sockets`), when nothing has been asked for some
//! time: an answer under way would find a socket that knows its sender no more.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use proxy_common::abi::Tuple;
use proxy_common::addr::{Addr, Port, Proto};

use agent_core::plan::Actual;
use agent_kernel::datapath::flow::sockets::{Connected, lead_in, untranslated};
use agent_kernel::netlink::conntrack::{self, Connection};

/// How long nobody has asked or answered.
const IDLE: Duration = Duration::from_secs(4);
/// A socket that cannot be led in, or stays as it is (its process is none of ours), is left alone for so long.
const AGAIN: Duration = Duration::from_secs(60);

/// What is known between two looks.
#[derive(Debug, Default)]
pub(in crate::run) struct Untranslated {
    seen: Option<Seen>,
    at_work: Option<JoinHandle<Seen>>,
}

/// By the cookie of a socket.
#[derive(Debug, Default)]
struct Seen {
    /// When it was last tried.
    tried: HashMap<u64, Instant>,
    /// For how many seconds connection tracking was to remember it, and when that was first so.
    idle: HashMap<u64, (u32, Instant)>,
}

impl Untranslated {
    /// Looks for such sockets; what is found is seen to by a thread, since it takes a walk through all processes.
    pub(in crate::run) fn look(&mut self, actual: &Actual) {
        let mut seen = match self.at_work.take() {
            Some(thread) if !thread.is_finished() => return self.at_work = Some(thread),
            Some(thread) => thread.join().unwrap_or_default(),
            None => self.seen.take().unwrap_or_default(),
        };
        let is_service = |addr: Addr, port: Port| actual.frontend_at(addr, port, Proto::UDP).is_some();
        let found = untranslated(is_service).unwrap_or_else(|error| {
            tracing::debug!("UDP sockets from before this proxy are not looked for: {error}");
            Vec::new()
        });
        seen.keep(&found.iter().map(Connected::cookie).collect());
        let due: Vec<Connected> = found.into_iter().filter(|socket| seen.may_try(socket.cookie())).collect();
        if due.is_empty() {
            self.seen = Some(seen);
            return;
        }
        let live = actual.backends.values().filter(|backend| backend.is_live());
        let mut ends: HashMap<u32, HashSet<(Addr, Port)>> = HashMap::new();
        for backend in live {
            ends.entry(backend.service).or_default().insert((backend.addr, backend.port));
        }
        let ends_of = |socket: &Connected| {
            let asks = socket.asks();
            let service =
                actual.frontend_at(asks.dst, asks.dport, Proto::UDP).map_or(0, |frontend| frontend.service);
            ends.get(&service).cloned().unwrap_or_default()
        };
        let due: Vec<_> = due
            .into_iter()
            .map(|socket| {
                let ends = ends_of(&socket);
                (socket, ends)
            })
            .collect();
        let work = move || {
            if let Err(error) = seen.lead(due) {
                tracing::warn!(
                    "UDP sockets of host processes that were connected before this proxy came may lead nowhere: {error:#}"
                );
            }
            seen
        };
        match std::thread::Builder::new().name("untranslated".into()).spawn(work) {
            Ok(thread) => self.at_work = Some(thread),
            Err(error) => tracing::warn!("no thread for UDP sockets from before this proxy: {error}"),
        }
    }
}

impl Seen {
    /// Others have been closed, or are translated.
    fn keep(&mut self, there: &HashSet<u64>) {
        self.tried.retain(|cookie, _| there.contains(cookie));
        self.idle.retain(|cookie, _| there.contains(cookie));
    }

    fn may_try(&self, cookie: u64) -> bool {
        self.tried.get(&cookie).is_none_or(|at| at.elapsed() >= AGAIN)
    }

    /// Leads those in that nobody else leads to an endpoint of their Service, or that rest.
    fn lead(&mut self, sockets: Vec<(Connected, HashSet<(Addr, Port)>)>) -> Result<()> {
        let mut tracked: HashMap<Tuple, Option<Connection>> =
            sockets.iter().map(|(socket, _)| (socket.asks(), None)).collect();
        conntrack::connections(|connection| {
            if let Some(entry) = tracked.get_mut(&connection.asked) {
                *entry = Some(connection.clone());
            }
        })
        .context("reading the kernel's connection tracking (CAP_NET_ADMIN, module nf_conntrack_netlink)")?;
        let entry = |socket: &Connected| tracked.get(&socket.asks()).and_then(Option::as_ref);
        let due: Vec<Connected> = sockets
            .into_iter()
            .filter(|(socket, ends)| self.is_due(socket.cookie(), entry(socket), ends, Instant::now()))
            .map(|(socket, _)| socket)
            .collect();
        if due.is_empty() {
            return Ok(());
        }
        let done = lead_in(&due, Path::new("/proc"));
        self.tried.extend(due.iter().map(|socket| (socket.cookie(), Instant::now())));
        let led: Vec<&Connected> =
            due.iter().zip(&done).filter_map(|(socket, done)| done.then_some(socket)).collect();
        // An entry would own the ends that the socket has now.
        let old = led.iter().filter_map(|socket| entry(socket).map(|entry| &entry.asked));
        conntrack::forget(old).context("changing the kernel's connection tracking")?;
        tracing::info!(
            "{} UDP sockets of host processes were connected to a Service before this proxy came: {} connected again{}",
            due.len(),
            led.len(),
            if led.len() == due.len() {
                ""
            } else {
                "; to the others there is no way, or no endpoint (the agent needs the host's process ids and \
                 CAP_SYS_PTRACE): restart their processes"
            }
        );
        Ok(())
    }

    /// Whether it is to be led in now: nobody leads it, or not to an endpoint, or nobody has used it for a while.
    fn is_due(
        &mut self,
        cookie: u64,
        entry: Option<&Connection>,
        ends: &HashSet<(Addr, Port)>,
        now: Instant,
    ) -> bool {
        let Some(entry) = entry else { return true };
        if !entry.is_rewritten() || !ends.contains(&(entry.answered.src, entry.answered.sport)) {
            return true;
        }
        let (timeout, since) = self.idle.entry(cookie).or_insert((entry.timeout, now));
        let passed = now.duration_since(*since);
        // Whole seconds are told; a packet begins them anew.
        if u64::from(entry.timeout) + passed.as_secs() > u64::from(*timeout) + 1 {
            (*timeout, *since) = (entry.timeout, now);
            return false;
        }
        passed >= IDLE
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use agent_kernel::netlink::conntrack::Status;

    use super::*;

    fn end(text: &str, port: u16) -> (Addr, Port) {
        (text.parse::<IpAddr>().unwrap().into(), Port::new(port))
    }

    fn entry(answers: (Addr, Port), timeout: u32) -> Connection {
        let (node, vip) = (end("192.168.10.1", 40_000), end("10.96.0.10", 53));
        Connection {
            asked: Tuple::new(node.0, node.1, vip.0, vip.1, Proto::UDP),
            answered: Tuple::new(answers.0, answers.1, node.0, node.1, Proto::UDP),
            status: Status::DstNat | Status::SeenReply,
            tcp: None,
            timeout,
            mark: 0,
            zoned: false,
        }
    }

    #[test]
    fn what_nobody_leads_to_an_endpoint_is_led_in_at_once() {
        let (endpoint, vip) = (end("10.244.1.7", 53), end("10.96.0.10", 53));
        let (mut seen, now) = (Seen::default(), Instant::now());
        let ends = HashSet::from([endpoint]);
        assert!(seen.is_due(1, None, &ends, now), "forgotten");
        assert!(seen.is_due(1, Some(&entry(vip, 100)), &ends, now), "a packet went nowhere");
        assert!(seen.is_due(1, Some(&entry(endpoint, 100)), &HashSet::new(), now), "the endpoint has gone");
        assert!(!seen.is_due(1, Some(&entry(endpoint, 100)), &ends, now), "in use");
    }

    #[test]
    fn what_is_in_use_rests_first() {
        let endpoint = end("10.244.1.7", 53);
        let ends = HashSet::from([endpoint]);
        let (mut seen, begun) = (Seen::default(), Instant::now());
        let mut due = |timeout, secs| {
            seen.is_due(7, Some(&entry(endpoint, timeout)), &ends, begun + Duration::from_secs(secs))
        };
        assert!(!due(118, 0));
        assert!(!due(120, 4), "something was asked between");
        assert!(!due(117, 7));
        assert!(due(116, 8), "four seconds without");
        assert!(!due(119, 12), "and used again");
    }

    #[test]
    fn what_cannot_be_led_in_is_left_alone_for_a_while() {
        let mut seen = Seen::default();
        seen.tried.insert(1, Instant::now());
        assert!(!seen.may_try(1) && seen.may_try(2));
        seen.keep(&HashSet::from([2]));
        assert!(seen.may_try(1), "another socket of that cookie");
    }
}
