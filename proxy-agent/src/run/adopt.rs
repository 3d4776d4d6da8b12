//! Taking over from a kube-proxy that has served this node: its connections become flows of ours before its rules go.
//!
//! At first everything new is left to its rules, so that both are at work and nothing begins between two looks. What connection
//! tracking has is adopted, then what is new becomes ours, then what has begun until then is adopted, too; and last the middle of
//! connections that nobody knows is a Service's again.

use std::io;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use proxy_common::abi::Tuple;
use proxy_common::abi::config::{LEAVE_MIDDLE, LEAVE_NEW};

use crate::datapath::flow::{Adopted, Flows, now, wait_for_packets};
use crate::kube_proxy::{Fate, Known, fate, has_rules};
use crate::netlink::conntrack::{self, Connection};
use crate::plan::Actual;

/// Connections whose packets wait at the same time.
const BATCH: usize = 64;
/// How often connection tracking is read until nothing is new.
const ROUNDS: usize = 4;
/// How long is waited for interfaces that refuse their programs.
const PATIENCE: Duration = Duration::from_secs(10);

const CHANGING: &str = "changing the kernel's connection tracking";

/// How far it is.
#[derive(Debug)]
pub(super) struct Adoption {
    /// Bits of the settings: what is left to kube-proxy.
    leave: u32,
    /// All of it is, because the operator wants it so.
    retired: bool,
    begun: Instant,
    done: Done,
}

/// What has been done.
#[derive(Debug, Default)]
struct Done {
    adopted: usize,
    forgotten: usize,
    of_node: usize,
    no_room: usize,
}

impl Adoption {
    /// What is to be done on this node: `served` says that programs of ours have served it already, with these tables.
    pub(super) fn plan(served: bool, actual: &Actual) -> Self {
        let known = Known::of(actual);
        let leave = match served {
            // Another agent has died over it.
            _ if actual.config.flags & LEAVE_NEW != 0 => LEAVE_NEW | LEAVE_MIDDLE,
            false if has_rules() => LEAVE_NEW | LEAVE_MIDDLE,
            // Rules have gone, and connections may have stayed.
            false if any(Connection::is_rewritten) => LEAVE_MIDDLE,
            true if any(|connection| {
                matches!(fate(&known, connection, 0), Fate::Adopt(..) | Fate::Forget)
            }) =>
            {
                LEAVE_MIDDLE
            }
            _ => 0,
        };
        Self { leave, retired: false, begun: Instant::now(), done: Done::default() }
    }

    /// The operator wants what is new left to kube-proxy, or taken back from it.
    pub(super) fn retire(&mut self, retired: bool) {
        let leave = LEAVE_NEW | LEAVE_MIDDLE;
        *self = Self { leave, retired, begun: Instant::now(), done: Done::default() };
    }

    /// Whether it is left to kube-proxy until the operator says something else.
    pub(super) fn is_retired(&self) -> bool {
        self.retired
    }

    /// What is left to kube-proxy now: bits of the settings.
    pub(super) fn leave(&self) -> u32 {
        self.leave
    }

    /// The settings are in the kernel, and the programs attached, to all interfaces that they should be at or not. Adopts what
    /// there is; true when another bit has gone.
    pub(super) fn go_on(&mut self, flows: &Flows, actual: &Actual, attached: bool) -> Result<bool> {
        // What was decided before has to be in the kernel.
        let written = actual.config.flags & (LEAVE_NEW | LEAVE_MIDDLE) == self.leave;
        let late = self.begun.elapsed() >= PATIENCE;
        if self.retired || self.leave == 0 || !written || !attached && !late {
            return Ok(false);
        }
        for _ in 0..ROUNDS {
            match self.round(flows, actual) {
                Ok(0) => break,
                Ok(_) => {}
                // The node must not go unserved for it.
                Err(error) if late => {
                    tracing::error!("connections of kube-proxy's rules are not all taken over: {error:#}");
                    break;
                }
                Err(error) => return Err(error),
            }
        }
        self.leave &= if self.leave & LEAVE_NEW != 0 { !LEAVE_NEW } else { 0 };
        if self.leave == 0 {
            self.done.tell();
        }
        Ok(true)
    }

    /// Reads connection tracking once; how many connections have changed hands.
    fn round(&mut self, flows: &Flows, actual: &Actual) -> Result<usize> {
        let (mut adopt, mut forget, mut of_node) = (Vec::new(), Vec::new(), 0);
        let (known, now) = (Known::of(actual), now()?);
        conntrack::connections(|connection| match fate(&known, connection, now) {
            Fate::None => {}
            Fate::OfNode => of_node += 1,
            Fate::Adopt(flow, between) => adopt.push(((connection.clone(), between), flow)),
            Fate::Forget => forget.push(connection.clone()),
        })
        .context("reading the kernel's connection tracking (CAP_NET_ADMIN, module nf_conntrack_netlink)")?;
        self.done.of_node = of_node;
        let (mut adopted, mut no_room) = (0, 0);
        for some in adopt.chunks(BATCH) {
            let (begun, mut batch) = (Instant::now(), Batch::default());
            // Those that are masqueraded have two entries for a while: these have no tuple in common.
            let masqueraded =
                some.iter().filter(|(_, flow)| flow.has_source()).map(|(connection, _)| connection);
            conntrack::add_plain(masqueraded).context(CHANGING)?;
            for (connection, flow) in some {
                match flows.adopt(flow)? {
                    Adopted::Done(_) if flow.has_source() => batch.gone.push(&connection.0),
                    Adopted::Done(index) => batch.hold(index, connection),
                    Adopted::Replaced => batch.gone.push(&connection.0),
                    Adopted::NoRoom => no_room += 1,
                }
            }
            let count = batch.finish(flows)?;
            tracing::debug!(
                "{count} connections changed hands in {:.1} ms",
                begun.elapsed().as_secs_f64() * 1000.0
            );
            adopted += count;
        }
        self.done.adopted += adopted;
        self.done.no_room = no_room;
        self.done.forgotten += forget.len();
        for some in forget.chunks(BATCH) {
            conntrack::forget(some.iter().map(|connection| &connection.asked)).context(CHANGING)?;
        }
        Ok(adopted + forget.len())
    }
}

/// Connections that change hands at the same time.
#[derive(Default)]
struct Batch<'a> {
    /// Records of those whose packets wait.
    held: Vec<u32>,
    /// The same connections.
    waiting: Vec<&'a (Connection, Tuple)>,
    /// Others that connection tracking is to let go of.
    gone: Vec<&'a Connection>,
}

impl<'a> Batch<'a> {
    fn hold(&mut self, index: u32, connection: &'a (Connection, Tuple)) {
        self.held.push(index);
        self.waiting.push(connection);
    }

    /// How many there were.
    fn finish(self, flows: &Flows) -> Result<usize> {
        let Self { held, waiting, gone } = self;
        if held.is_empty() && gone.is_empty() {
            return Ok(0);
        }
        wait_for_packets();
        // A packet that had passed before may have made an entry under another port.
        let between = waiting.iter().map(|(_, between)| between);
        let rewritten = gone.iter().copied().chain(waiting.iter().map(|(connection, _)| connection));
        let forgotten = conntrack::forget(rewritten.map(|connection| &connection.asked).chain(between));
        let added = conntrack::add_plain(waiting.iter().copied());
        // Whatever has become of that: their packets must not wait longer.
        flows.release(&held)?;
        forgotten.and(added).context(CHANGING)?;
        Ok(held.len() + gone.len())
    }
}

/// Whether there is such a connection; what cannot be read has none.
fn any(is_one: impl Fn(&Connection) -> bool) -> bool {
    let mut found = false;
    let read: io::Result<usize> = conntrack::connections(|connection| found |= is_one(connection));
    if let Err(error) = read {
        tracing::warn!(
            "connections of a kube-proxy are not looked for: connection tracking cannot be read: {error}"
        );
    }
    found
}

impl Done {
    fn tell(&self) {
        let Self { adopted, forgotten, of_node, no_room } = self;
        if adopted + forgotten + of_node != 0 {
            tracing::info!(
                "took over {adopted} connections from kube-proxy's rules; {forgotten} that had ended were removed from \
                 connection tracking, which keeps {of_node} of this node's own processes until they end"
            );
        }
        if *no_room != 0 {
            tracing::warn!(
                "{no_room} connections of kube-proxy's rules found no room among the flows, and may break: start the agent \
                 with a larger --max-flows"
            );
        }
    }
}
