//! What sockets remember of their Services outlives a change of its layout.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use proxy_tests::probe::{Remote, eventually};
use proxy_tests::test_cluster::PodNetwork;

use crate::common::{manifests, two_nodes, vips};
use crate::life::SOON;
use crate::scene::{agent, at, servers, service};

/// A socket that has come through the Service, and what it asked for.
struct Came {
    what: String,
    to: SocketAddr,
    connected: bool,
    tcp: bool,
    socket: Remote,
}

impl Came {
    fn send(&mut self) -> Result<()> {
        let (verb, to) =
            if self.connected { ("send", String::new()) } else { ("send-to", self.to.to_string()) };
        self.socket.done(verb, &to).map(drop).with_context(|| self.what.clone())
    }

    /// The next answer; its process sees nobody but the Service. Who has answered.
    fn receives(&mut self) -> Result<String> {
        let received = self.socket.done("receive", "").with_context(|| self.what.clone())?;
        let from = if self.connected { received.peer_name } else { received.received_from };
        ensure!(from == Some(self.to), "{}: from {from:?}", self.what);
        Ok(received.answer.context("an answer")?.name)
    }
}

#[test]
fn sockets_know_their_services_after_the_layout_of_their_storage_has_changed_there_and_back() -> Result<()> {
    let cluster = two_nodes(PodNetwork::Routed)?;
    let dir = manifests()?;
    let _servers = servers(&cluster, &["b", "c"])?;
    let mut web = service(&dir, &cluster, ("web", 1, 0), &["b"], |plan| plan)?;
    let mut agent = agent(&cluster, "node1", &dir, &[])?;
    let binaries = [proxy_tests::require::next_agent_binary()?, proxy_tests::require::agent_binary()?];
    // At first all with b, then all with c.
    for (next, [old, new]) in binaries.into_iter().zip([["b", "c"], ["c", "b"]]) {
        let mut all = Vec::new();
        let ways = [
            ("a", "tcp", true),
            ("a", "udp", false),
            ("h1", "tcp", true),
            ("h1", "udp", true),
            ("h1", "udp", false),
        ];
        for (place, kind, connected) in ways {
            for to in at(vips(1), 80) {
                let family = if to.is_ipv4() { "inet" } else { "inet6" };
                let mut socket = Remote::open(cluster.place(place), family, kind)?;
                let what = format!("{place}, {kind}, connected: {connected}, {to}");
                if connected {
                    socket.done("connect", &to.to_string()).with_context(|| what.clone())?;
                }
                all.push(Came { what, to, connected, tcp: kind == "tcp", socket });
            }
        }
        // The answer to the second comes in before the change, and is read after it.
        for came in &mut all {
            came.send()?;
            ensure!(came.receives()? == old, "{}", came.what);
            came.send()?;
        }
        agent.stop()?;
        agent.becomes(&next);
        agent.spawn()?;
        agent.wait_ready()?;
        ensure!(!agent.log_text().contains("have forgotten"), "{}", agent.log_text());
        for came in &mut all {
            ensure!(came.receives()? == old, "{}", came.what);
            came.send()?;
            ensure!(came.receives()? == old, "{}", came.what);
        }
        // Those of the host that are connected over UDP can only be led on by who knows that they came through it.
        web.replace(&[cluster.place(new)])?;
        for came in all.iter_mut().filter(|came| !came.tcp) {
            eventually(SOON, || {
                came.send()?;
                let name = came.receives()?;
                ensure!(name == new, "{}: {name}", came.what);
                Ok(())
            })?;
        }
    }
    Ok(())
}
