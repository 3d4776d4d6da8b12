//! Taking over from a kube-proxy that has served this node: its connections become flows of ours before its rules go.
//!
//! At first everything new is left to its rules, so that both are at work and nothing begins between two looks. What connection
//! tracking has is adopted, then what is new becomes ours, then what has begun until then is adopted, too; and last the middle of
//! connections that nobody knows is a Service's again. Connections that have been adopted are translated by netfilter as before,
//! whether there are rules or not. They are taken from it after that, some at a time: see [`Adoption::take`].

use super::handover::{CHANGING, Waiting, any, take};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use proxy_common::abi::config::{LEAVE_MIDDLE, LEAVE_NEW};
use proxy_common::abi::{Config, Flow, FlowId, Tuple};
use proxy_common::addr::Proto;

use agent_core::plan::Actual;
use agent_kernel::datapath::flow::{Adopted, Flows, now};
use agent_kernel::kube_proxy::{Fate, Known, fate, has_rules, passing};
use agent_kernel::netlink::conntrack::{self, Connection, Status};

/// Connections that are taken from netfilter at the same time.
const BATCH: usize = 256;
/// How long the loop may be kept from other work by that.
const BUDGET: Duration = Duration::from_millis(100);
/// How often connection tracking is read until nothing is new.
const ROUNDS: usize = 4;
/// How long is waited for interfaces that refuse their programs.
const PATIENCE: Duration = Duration::from_secs(10);

/// How far it is.
#[derive(Debug)]
pub(in crate::run) struct Adoption {
    /// Bits of the settings: what is left to kube-proxy.
    leave: u32,
    /// All of it is, because the operator wants it so.
    retired: bool,
    begun: Instant,
    done: Done,
    /// Connections that have been adopted and are to be taken from netfilter, by their flow.
    waiting: BTreeMap<FlowId, Waiting>,
    /// Those that stay with netfilter until they end.
    staying: Vec<FlowId>,
    /// Whether packets may be kept out of connection tracking, by us or by an agent that has died.
    untracked: bool,
    /// Why none are taken.
    warning: String,
}

/// What has been done.
#[derive(Debug, Default)]
struct Done {
    adopted: usize,
    forgotten: usize,
    of_node: usize,
    no_room: usize,
    taken: usize,
}

impl Adoption {
    /// What is to be done on this node: `served` says that programs of ours have served it already, with these tables.
    pub(in crate::run) fn plan(served: bool, actual: &Actual) -> Self {
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
            _ if passing::is_begun().unwrap_or(false) => LEAVE_MIDDLE,
            _ => 0,
        };
        Self::begin(leave, false)
    }

    fn begin(leave: u32, retired: bool) -> Self {
        Self {
            leave,
            retired,
            begun: Instant::now(),
            done: Done::default(),
            waiting: BTreeMap::new(),
            staying: Vec::new(),
            untracked: true,
            warning: String::new(),
        }
    }

    /// The operator wants what is new left to kube-proxy, or taken back from it.
    pub(in crate::run) fn retire(&mut self, retired: bool) {
        *self = Self::begin(LEAVE_NEW | LEAVE_MIDDLE, retired);
    }

    /// Whether it is left to kube-proxy until the operator says something else.
    pub(in crate::run) fn is_retired(&self) -> bool {
        self.retired
    }

    /// What is left to kube-proxy now: bits of the settings.
    pub(in crate::run) fn leave(&self) -> u32 {
        self.leave
    }

    /// The settings are in the kernel, and the programs attached, to all interfaces that they should be at or not. Adopts what
    /// there is; true when another bit has gone.
    pub(in crate::run) fn go_on(&mut self, flows: &Flows, actual: &Actual, attached: bool) -> Result<bool> {
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
            self.done.log();
        }
        Ok(true)
    }

    /// Reads connection tracking once; how many connections were new, or are gone.
    fn round(&mut self, flows: &Flows, actual: &Actual) -> Result<usize> {
        let (mut adopt, mut forget, mut of_node) = (Vec::new(), Vec::new(), 0);
        let mut beside = HashMap::new();
        let mut seen = HashSet::new();
        let (known, now) = (Known::of(actual), now()?);
        conntrack::connections(|connection| match fate(&known, connection, now) {
            Fate::None => {}
            Fate::OfNode => of_node += 1,
            Fate::Adopt(flow, between) => {
                seen.insert(connection.asked);
                adopt.push((connection.clone(), between, flow));
            }
            Fate::Forget => forget.push(connection.asked),
            Fate::Beside(over) => drop(beside.insert(connection.asked, over)),
        })
        .context("reading the kernel's connection tracking (CAP_NET_ADMIN, module nf_conntrack_netlink)")?;
        self.done.of_node = of_node;
        self.done.no_room = 0;
        let mut adopted = 0;
        for (connection, between, flow) in adopt {
            let other = beside.get(&between).copied();
            let stays = other == Some(false) || stays(&connection, &flow, &actual.config);
            let flow = if other == Some(false) { flow.known_by_its_service() } else { *flow };
            let waits = |id| {
                let (masqueraded, remembered) = (flow.has_source(), other == Some(true));
                (id, Waiting { connection: connection.clone(), between, masqueraded, remembered })
            };
            let mut answer = flows.adopt(&flow)?;
            if let Adopted::Known(id) = answer
                && flow.fin != [0, 0]
                && flows.is_left(id)?
            {
                // It may have been closed before the flow was there.
                flows.end(&[id])?;
                self.waiting.remove(&id);
                answer = match flows.adopt(&flow)? {
                    Adopted::Done(id) => Adopted::Known(id),
                    other => other,
                };
            }
            match answer {
                Adopted::Done(id) | Adopted::Alone(id) if stays => {
                    self.staying.push(id);
                    adopted += 1;
                }
                Adopted::Alone(id) => {
                    self.staying.push(id);
                    adopted += 1;
                }
                Adopted::Done(id) => {
                    self.wait(waits(id));
                    adopted += 1;
                }
                // One that is ours already is seen here because an agent has died over it: the other entry is its own.
                Adopted::Known(id) if !stays || !flows.is_left(id)? => self.wait(waits(id)),
                Adopted::Known(_) => {}
                Adopted::Replaced => forget.push(connection.asked),
                Adopted::NoRoom => self.done.no_room += 1,
            }
        }
        self.end_what_has_gone(flows, &seen)?;
        self.done.adopted += adopted;
        self.done.forgotten += forget.len();
        for some in forget.chunks(BATCH) {
            conntrack::forget(some.iter()).context(CHANGING)?;
        }
        Ok(adopted + forget.len())
    }

    /// Ends flows that are netfilter's but are not among these any more: they had ended before the flow was there.
    fn end_what_has_gone(&mut self, flows: &Flows, seen: &HashSet<Tuple>) -> Result<()> {
        let mut gone = Vec::new();
        flows.scan(|flow| {
            let ((client, port), (vip, to)) = (flow.client(), flow.vip());
            let asked = Tuple::new(*client, port, *vip, to, flow.proto());
            if flow.is_left(flow.id) && !seen.contains(&asked) {
                gone.push(flow.id);
            }
        })?;
        flows.end(&gone)?;
        for id in &gone {
            self.waiting.remove(id);
        }
        Ok(())
    }

    fn wait(&mut self, (id, waiting): (FlowId, Waiting)) {
        if !self.staying.contains(&id) {
            self.waiting.insert(id, waiting);
        }
    }

    /// How many connections are netfilter's still, of those that have been adopted.
    pub(in crate::run) fn left(&self) -> usize {
        self.waiting.len() + self.staying.len()
    }

    /// Takes connections from netfilter, for some time. In this order no packet is ever without somebody who translates it, and
    /// an agent that ends anywhere leaves something that works, and that the next one goes on from:
    ///
    /// 1. Packets between client and endpoint are tracked no longer. The client's go on to the Service, and netfilter translates
    ///    them; answers pass netfilter as they are, and a program translates them where they leave.
    /// 2. The flow is ours: the client's packets are translated where they enter, and are not tracked either.
    /// 3. When no packet is on its way to netfilter any more, its entry is replaced by one from client to endpoint, so that rules
    ///    of others that look at the state of a connection know it.
    /// 4. They are tracked again.
    ///
    /// Behind a masquerade connection tracking has another tuple before and after, so the second entry is made first, and
    /// steps 1 and 4 are not needed.
    ///
    /// What fails is tried again the next time; until then netfilter goes on with them.
    pub(in crate::run) fn take(&mut self, flows: &Flows) {
        if self.retired || self.leave != 0 || self.waiting.is_empty() && !self.untracked {
            return;
        }
        if let Err(error) = self.take_some(flows) {
            let warning = format!("{error:#}");
            if self.warning != warning {
                tracing::warn!("connections of kube-proxy's rules stay with netfilter for now: {warning}");
                self.warning = warning;
            }
        }
    }

    fn take_some(&mut self, flows: &Flows) -> Result<()> {
        let begun = Instant::now();
        while begun.elapsed() < BUDGET && !self.waiting.is_empty() {
            let rest = match self.waiting.keys().nth(BATCH).copied() {
                Some(next) => self.waiting.split_off(&next),
                None => BTreeMap::new(),
            };
            let batch = std::mem::replace(&mut self.waiting, rest);
            self.untracked = true;
            match take(flows, &batch) {
                Ok(stay) => {
                    self.done.taken += batch.len() - stay.len();
                    self.staying.extend(stay);
                }
                Err(error) => {
                    self.waiting.extend(batch);
                    return Err(error);
                }
            }
        }
        if !self.waiting.is_empty() {
            return Ok(());
        }
        passing::end_all().context("removing the nftables table ebpf-proxy-takeover")?;
        self.untracked = false;
        if self.done.taken != 0 {
            tracing::info!(
                "{} connections of kube-proxy's rules are translated by this proxy now; {} stay with netfilter until they end",
                self.done.taken,
                self.staying.len()
            );
        }
        Ok(())
    }

    /// The flows are in other tables, under other ids. Those that are netfilter's still are looked for again; whether there are
    /// any.
    pub(in crate::run) fn move_on(&mut self) -> bool {
        let any = self.left() != 0 && !self.retired;
        if any {
            *self = Self { done: std::mem::take(&mut self.done), ..Self::begin(LEAVE_MIDDLE, false) };
        }
        any
    }

    /// Those that had to stay with netfilter and have ended are forgotten.
    pub(in crate::run) fn tidy(&mut self, flows: &Flows) {
        self.staying.retain(|id| flows.is_left(*id).unwrap_or(true));
    }
}

/// Whether netfilter goes on with it until it ends, even if it is the only one between client and endpoint. Verification tags are
/// what the kernel knows of SCTP, and an entry cannot be made with them; nor can one be taken away that a flow table of netfilter's
/// has. And a port that the node gives out itself may become that of one of its sockets, towards the same endpoint: netfilter would
/// give that another one, and we cannot.
fn stays(connection: &Connection, flow: &Flow, config: &Config) -> bool {
    connection.status.contains(Status::Offload)
        || flow.proto() == Proto::SCTP
        || flow.has_source() && !config.is_snat_port(flow.node().1)
}

impl Done {
    fn log(&self) {
        let Self { adopted, forgotten, of_node, no_room, .. } = self;
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

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use proxy_common::abi::PortRange;
    use proxy_common::addr::{Addr, Port};

    use super::*;

    #[test]
    fn what_cannot_be_taken_or_would_be_in_a_socket_s_way_stays_with_netfilter() {
        let addr = |text: &str| -> Addr { text.parse::<IpAddr>().unwrap().into() };
        let end = |text, port| (addr(text), Port::new(port));
        let config = Config::EMPTY.with_snat_ports(&[PortRange { first: 1024, count: 28_976 }]);
        let of = |proto, source, status| {
            let asked =
                Tuple::new(addr("198.51.100.9"), Port::new(5), addr("10.0.0.1"), Port::new(80), proto);
            let flow = Flow::adopted(&asked, end("10.244.2.7", 8080), source, [1, 2, 3], (true, true), 1);
            let connection = Connection {
                asked,
                answered: asked.reversed(),
                status,
                tcp: None,
                timeout: 60,
                mark: 0,
                zoned: false,
            };
            stays(&connection, &flow, &config)
        };
        let usual = Status::SeenReply | Status::DstNat;
        assert!(!of(Proto::TCP, None, usual), "not masqueraded");
        assert!(!of(Proto::UDP, Some(end("10.0.0.1", 1024)), usual), "with a port of ours");
        assert!(of(Proto::UDP, Some(end("10.0.0.1", 40_000)), usual), "with one of the node's own range");
        assert!(of(Proto::SCTP, None, usual));
        assert!(of(Proto::TCP, None, usual | Status::Offload), "in a flow table");
    }
}
