//! A node whose agent watches an API server: pod `a` asks the Service `web`, `b` and `c` can serve, and `b` does at first.

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::Result;
use proxy_tests::agent::{Agent, Feed};
use proxy_tests::apiserver::ApiServer;
use proxy_tests::manifests::EndpointController;
use proxy_tests::pod::Place;
use proxy_tests::probe::Server;
use proxy_tests::test_cluster::TestCluster;

use crate::api_server::{connected, server};
use crate::common::web;
use crate::life::{FLAGS, answers, one_node, servers, service};

/// The node without its agent. Fields are dropped in order.
pub(crate) struct ApiScene {
    _servers: Vec<Server>,
    pub(crate) server: ApiServer,
    pub(crate) cluster: TestCluster,
}

impl ApiScene {
    /// With an API server in the node.
    pub(crate) fn raise() -> Result<Self> {
        let cluster = one_node(&["a", "b", "c"])?;
        let server = server(&cluster)?;
        Ok(Self { _servers: servers(&cluster, &["b", "c"])?, server, cluster })
    }

    /// Another API server of the same cluster, in the node.
    pub(crate) fn beside(&self, port: u16) -> Result<ApiServer> {
        let at = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        self.server.beside(self.cluster.place("node1").netns.listen(at)?)
    }

    /// The first server, then another one.
    pub(crate) fn urls(&self, other: &ApiServer) -> Feed {
        Feed::ApiServer(format!("{},{}", self.server.url(), other.url()))
    }

    /// Publishes the Service, with `b` as its endpoint.
    pub(crate) fn web(&self) -> Result<EndpointController<'_>> {
        web(&self.server, &self.cluster, "web", 1, &["b"], |plan| plan)
    }

    /// Starts the agent, and waits until `b` answers and it says that it is connected.
    pub(crate) fn agent(&self, feed: impl Into<Feed>) -> Result<Agent> {
        let agent = Agent::start(&self.cluster, "node1", feed, &FLAGS)?;
        answers(self.pod(), self.vip(), "b")?;
        connected(&agent, true)?;
        Ok(agent)
    }

    /// Who asks.
    pub(crate) fn pod(&self) -> &Place {
        self.cluster.place("a")
    }

    /// What it asks.
    pub(crate) fn vip(&self) -> SocketAddr {
        service(1)[0]
    }
}
