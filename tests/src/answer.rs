//! What the test-pod program prints: one JSON object a line, read by [`crate::probe`].

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// What a server says to a request: who it is and whom it saw. Also its first line once it listens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The server's name.
    pub name: String,
    /// The client's address as the server saw it.
    pub peer: SocketAddr,
    /// The server's own address: for UDP the one it is bound to.
    pub local: SocketAddr,
    /// Bytes of the request (without the line's end).
    pub length: usize,
}

/// One request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// The answer; absent when the request failed.
    pub answer: Option<Answer>,
    /// What failed and why: `connect ECONNREFUSED`, `receive timeout`.
    pub failure: Option<String>,
    /// What `getpeername` said once connected.
    pub peer_name: Option<SocketAddr>,
    /// Where the datagram's answer came from, by `recvfrom`.
    pub received_from: Option<SocketAddr>,
    /// The client's own address.
    pub local: Option<SocketAddr>,
}

/// Many requests, each with a new connection (or a new UDP socket).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Load {
    /// Requests answered.
    pub made: u64,
    /// Requests that failed.
    pub failed: u64,
    /// Failures by reason.
    pub reasons: BTreeMap<String, u64>,
    /// Answers by the server's name.
    pub names: BTreeMap<String, u64>,
    /// The longest time from `connect` to the whole answer.
    pub slowest_ms: f64,
    /// The longest time from `connect` to a failure.
    pub slowest_failure_ms: f64,
}

/// One socket that is used for long.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Hold {
    /// Exchanges answered.
    pub made: u64,
    /// Exchanges that failed: for TCP at most one, which ends it.
    pub failed: u64,
    /// Failures by reason.
    pub reasons: BTreeMap<String, u64>,
    /// Answers by the server's name.
    pub names: BTreeMap<String, u64>,
    /// Who answered last.
    pub last: Option<Answer>,
    /// Why the TCP connection ended, if it did.
    pub broke: Option<String>,
    /// What `getpeername` says now.
    pub peer_name: Option<SocketAddr>,
}

/// Many bytes over one TCP connection, sent back by the server.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transfer {
    /// Bytes that came back as they were sent.
    pub echoed: u64,
    /// What failed and why; absent when both directions were closed in order.
    pub failure: Option<String>,
}

/// What a measured client does as fast as it can.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Work {
    /// New connections: connect, one request, one answer, close.
    Connections,
    /// Requests and answers of a few bytes, one after the other over one connection.
    Requests,
    /// Bytes to the server over one connection, counted in mebibytes.
    Bulk,
}

impl Work {
    /// As on the command line, and as the first byte of a connection says it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Connections => "connections",
            Self::Requests => "requests",
            Self::Bulk => "bulk",
        }
    }
}

/// How fast a client was.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Rate {
    /// Connections or requests that were answered, or mebibytes that were received.
    pub done: u64,
    /// Those that failed.
    pub failed: u64,
    /// Why the last of them failed.
    pub failure: Option<String>,
    /// How long it took.
    pub seconds: f64,
    /// Processor time of the client.
    pub cpu_seconds: f64,
    /// Microseconds that half of the connections took at most until they were made; 0 if none was.
    pub connect_us: f64,
}

/// What a measured server has used.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Used {
    /// Processor time since it started.
    pub cpu_seconds: f64,
}
