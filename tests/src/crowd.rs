//! A crowd of clients in one place: what it is told to do, and what it says. The test-pod program plays it, so that its
//! sockets are in the network and the cgroup of the place.

use std::net::SocketAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// What a crowd does.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Plan {
    /// Its name in losses.
    pub client: String,
    /// Whom it asks.
    pub targets: Vec<Target>,
    /// New requests a second, over all targets in turn.
    pub rate: f64,
    /// How long an answer may take.
    pub timeout_ms: u64,
}

/// Somebody to ask, over one protocol.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Target {
    /// The Service.
    pub service: String,
    /// Where it is asked.
    pub to: SocketAddr,
    /// UDP instead of TCP.
    pub udp: bool,
    /// Who may answer.
    pub servers: Vec<String>,
    /// Whether each packet is translated, and not the socket once: who speaks while nobody translates is answered by the node
    /// itself, with a reset.
    pub by_packet: bool,
    /// Whether all new requests must be answered by the same server.
    pub same: bool,
    /// Connections that are opened at the start and silent until they are checked.
    pub idle: u32,
    /// Connections that are opened at the start and used all the time.
    pub busy: u32,
}

/// What a crowd prints, one a line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Said {
    /// Something did not go as it should, at the moment when that was seen.
    Lost(Loss),
    /// The answer to an order.
    Count(Count),
}

/// One request or connection that was lost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loss {
    /// When the attempt began, in milliseconds since 1970.
    pub begun_ms: u64,
    /// When it was seen to be lost.
    pub ended_ms: u64,
    /// Who asked, whom and how.
    pub what: String,
    /// What should have come.
    pub expected: String,
    /// What came.
    pub came: String,
    /// Whether it was a connection that is held.
    pub held: bool,
}

/// What a crowd has done since its start.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Count {
    /// Connections that were opened at the start.
    pub held: u64,
    /// New requests, and exchanges over connections that are held.
    pub requests: u64,
    /// Losses.
    pub lost: u64,
    /// The longest time that an answer took.
    pub slowest_ms: f64,
}

impl Count {
    /// Adds what another crowd has done.
    pub fn add(&mut self, other: &Self) {
        self.held += other.held;
        self.requests += other.requests;
        self.lost += other.lost;
        self.slowest_ms = self.slowest_ms.max(other.slowest_ms);
    }
}

/// Milliseconds since 1970: the clock that all processes of a play share.
#[must_use]
pub fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
