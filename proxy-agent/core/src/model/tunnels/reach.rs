//! How a node fares, and why it is not reached, in words for the operator.

use std::fmt;
use std::sync::Arc;

use crate::model::Family;

/// How a node fares, over one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// Its name.
    pub node: Arc<str>,
    /// Which family; `None` where none is known.
    pub family: Option<Family>,
    /// Whether it is reached.
    pub reach: Reach,
}

/// Why nobody is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Block {
    /// It is switched off.
    Off,
    /// Packets cannot be wrapped.
    NoRight,
}

/// Whether a node is reached, or why it is not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reach {
    /// It is.
    Directly,
    /// That is being found out.
    Asking,
    /// It does not answer.
    NoAnswer,
    /// It could not be asked.
    NotAsked(String),
    /// There is no way that could be used.
    NoWay(String),
    /// No endpoint of its agent is known.
    NoAgent,
    /// The table is full.
    Full,
    /// Nobody is asked.
    Blocked(Block),
}

impl Reach {
    /// Every label there is.
    pub const LABELS: [&str; 9] = [
        "ready",
        "asking",
        "no_answer",
        "not_asked",
        "no_route",
        "no_agent",
        "table_full",
        "off",
        "no_right",
    ];

    /// The label of metrics.
    #[must_use]
    pub fn label(&self) -> &'static str {
        match self {
            Self::Directly => "ready",
            Self::Asking => "asking",
            Self::NoAnswer => "no_answer",
            Self::NotAsked(_) => "not_asked",
            Self::NoWay(_) => "no_route",
            Self::NoAgent => "no_agent",
            Self::Full => "table_full",
            Self::Blocked(Block::Off) => "off",
            Self::Blocked(Block::NoRight) => "no_right",
        }
    }
}

impl fmt::Display for Reach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directly => f.write_str("it is reached directly"),
            Self::Asking => f.write_str("it has not answered often enough yet"),
            Self::NoAnswer => f.write_str(
                "no answer to wrapped packets: does an agent with the same --dsr-probe-port run there, and does the network \
                 pass IP protocols 4 and 41 between nodes?",
            ),
            Self::NotAsked(why) | Self::NoWay(why) => f.write_str(why),
            Self::NoAgent => f.write_str(
                "no endpoint of its agent is known: see that --agents-service names the Service of the agents, with a UDP \
                 port `dsr`",
            ),
            Self::Full => f.write_str("map TUNNELS is full, and its size is fixed"),
            Self::Blocked(Block::Off) => f.write_str("it is switched off here (--dsr-probe-port=0)"),
            Self::Blocked(Block::NoRight) => f.write_str("this agent lacks CAP_NET_RAW, without which it cannot ask"),
        }
    }
}
