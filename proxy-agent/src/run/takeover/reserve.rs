//! Source ports of ours, while another proxy serves what is new: it masquerades without knowing which address and port a flow of
//! ours has towards an endpoint, and answers to its connection would be taken for ours. So connection tracking is told of them.

use std::io;
use std::time::{Duration, Instant};

use proxy_common::abi::{Flow, State, Tuple};
use proxy_common::addr::Proto;

use agent_kernel::datapath::flow::Flows;
use agent_kernel::datapath::store::table::TableError;
use agent_kernel::netlink::conntrack::{self, Connection, ESTABLISHED, Status};

/// How long an entry lasts that nobody renews: no packet does, and an agent that has ended leaves none for long.
const LASTS: Duration = Duration::from_secs(90);
/// How often they are renewed.
const EVERY: Duration = Duration::from_secs(30);

/// When it is to be done.
#[derive(Debug, Default)]
pub(in crate::run) struct Reserve {
    /// When it was last done, and whether what is new was another's by then.
    done: Option<(Instant, bool)>,
}

/// Why it is not done.
#[derive(Debug, thiserror::Error)]
pub(in crate::run) enum ReserveError {
    /// The flows cannot be read.
    #[error(transparent)]
    Flows(#[from] TableError),
    /// The kernel refuses.
    #[error("cannot write to the kernel's connection tracking (CAP_NET_ADMIN, module nf_conntrack_netlink)")]
    Write(#[from] io::Error),
}

impl Reserve {
    /// Tells connection tracking of the source ports of all flows, if it is time; how many there are. `settled` says that no
    /// flows begin any more.
    pub(in crate::run) fn keep_up(&mut self, flows: &Flows, settled: bool) -> Result<usize, ReserveError> {
        if self.done.is_some_and(|(done, was)| was == settled && done.elapsed() < EVERY) {
            return Ok(0);
        }
        self.done = Some((Instant::now(), settled));
        let mut held = Vec::new();
        flows.scan(|flow| held.extend(entry(flow)))?;
        conntrack::add_plain(held.iter())?;
        Ok(held.len())
    }
}

/// The entry that holds a flow's source port; `None` if it is not masqueraded, or by netfilter.
fn entry(flow: &Flow) -> Option<(Connection, Tuple)> {
    if flow.state != State::LIVE || !flow.has_source() {
        return None;
    }
    let ((node, port), (endpoint, to)) = (flow.node(), flow.endpoint());
    let sent = Tuple::new(*node, port, *endpoint, to, flow.proto());
    let connection = Connection {
        asked: sent,
        answered: sent.reversed(),
        status: Status::SeenReply | Status::Assured,
        tcp: (flow.proto() == Proto::TCP).then_some(ESTABLISHED),
        timeout: u32::try_from(LASTS.as_secs()).unwrap_or(u32::MAX),
        mark: 0,
        zoned: false,
    };
    Some((connection, sent))
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use proxy_common::addr::{Addr, Port};

    use super::*;

    #[test]
    fn only_what_we_masquerade_holds_a_port() {
        let addr = |text: &str| -> Addr { text.parse::<IpAddr>().unwrap().into() };
        let end = |text, port| (addr(text), Port::new(port));
        let asked =
            Tuple::new(addr("198.51.100.9"), Port::new(5), addr("10.0.0.1"), Port::new(80), Proto::TCP);
        let flow =
            |source| Flow::adopted(&asked, end("10.244.2.7", 8080), source, [1, 2, 3], (true, true), 1);
        let left = flow(Some(end("10.0.0.1", 1024)));
        let ours = Flow { state: State::LIVE, ..left };
        let (connection, sent) = entry(&ours).unwrap();
        assert_eq!((sent.src, sent.sport.number()), (addr("10.0.0.1"), 1024));
        assert_eq!((sent.dst, sent.dport.number()), (addr("10.244.2.7"), 8080));
        assert_eq!((connection.answered, connection.tcp), (sent.reversed(), Some(ESTABLISHED)));
        assert_eq!(entry(&left), None);
        assert_eq!(entry(&Flow { state: State::LIVE, ..flow(None) }), None);
    }
}
