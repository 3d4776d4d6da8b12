//! A batch of connections passes from netfilter to us, in the order of ARCHITECTURE.md section 3b.

use std::collections::BTreeMap;
use std::io;

use agent_kernel::datapath::flow::{Flows, wait_for_packets};
use agent_kernel::kube_proxy::passing;
use agent_kernel::netlink::conntrack::{self, Connection};
use agent_kernel::netlink::is_absent;
use anyhow::{Context, Result};
use proxy_common::abi::{FlowId, Tuple};

pub(super) const CHANGING: &str = "changing the kernel's connection tracking";

/// A connection, and its ends between client and endpoint.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) connection: Connection,
    pub(super) between: Tuple,
    pub(super) masqueraded: bool,
    /// Connection tracking remembers one that is over between these ends.
    pub(super) remembered: bool,
}

impl Waiting {
    /// The entry to be forgotten: it would stay, and may have packets of this one leave under another port.
    pub(super) fn remembered(&self) -> Option<&Tuple> {
        self.remembered.then_some(&self.between)
    }
}

/// How often somebody may be at work on a flow just when it is to be taken.
const TRIES: usize = 8;

/// Takes all of these from netfilter; those that stay.
pub(super) fn take(flows: &Flows, batch: &BTreeMap<FlowId, Waiting>) -> Result<Vec<FlowId>> {
    let untracked = batch.values().filter(|waiting| !waiting.masqueraded).map(|waiting| &waiting.between);
    let of = |waiting: &Waiting| (waiting.connection.clone(), waiting.between);
    let masqueraded: Vec<_> = batch.values().filter(|waiting| waiting.masqueraded).map(of).collect();
    conntrack::forget(batch.values().filter(|waiting| waiting.masqueraded).filter_map(Waiting::remembered))
        .context(CHANGING)?;
    conntrack::add_plain(masqueraded.iter()).context(CHANGING)?;
    let untrackable = match passing::begin(untracked.clone()) {
        Err(error) if is_absent(&error) => false,
        done => done
            .context("keeping packets out of connection tracking (nftables table ebpf-proxy-takeover)")
            .map(|()| true)?,
    };
    let (mut taken, mut stay) = (Vec::new(), Vec::new());
    for (id, waiting) in batch {
        if (waiting.masqueraded || untrackable) && persist(|| flows.take(*id))? {
            taken.push(waiting);
        } else {
            stay.push(*id);
        }
    }
    wait_for_packets();
    let asked = taken.iter().map(|waiting| &waiting.connection.asked);
    let straight = || taken.iter().copied().filter(|waiting| !waiting.masqueraded);
    conntrack::forget(asked.chain(straight().filter_map(Waiting::remembered))).context(CHANGING)?;
    let plain: Vec<_> = straight().map(of).collect();
    conntrack::add_plain(plain.iter()).context(CHANGING)?;
    if untrackable {
        passing::end(untracked).context("tracking packets again (nftables table ebpf-proxy-takeover)")?;
    }
    Ok(stay)
}

/// Tries until it is done, but not for ever.
pub(super) fn persist<E>(mut work: impl FnMut() -> Result<bool, E>) -> Result<bool, E> {
    for _ in 1..TRIES {
        if work()? {
            return Ok(true);
        }
    }
    work()
}

/// Whether there is such a connection; what cannot be read has none.
pub(super) fn any(is_one: impl Fn(&Connection) -> bool) -> bool {
    let mut found = false;
    let read: io::Result<usize> = conntrack::connections(|connection| found |= is_one(connection));
    if let Err(error) = read {
        tracing::warn!(
            "connections of a kube-proxy are not looked for: connection tracking cannot be read: {error}"
        );
    }
    found
}
