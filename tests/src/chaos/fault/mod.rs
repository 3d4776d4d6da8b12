//! What is done to the agent, one file each. A fault does the same thing in every round, at another moment or place.

mod churn;
mod flood;
mod kill;
mod retire;
mod soak;
mod syscalls;
mod takeover;

use std::time::Duration;

use anyhow::Result;

use super::ground::{Before, Ground};
use syscalls::{Syscalls, What};

/// What is done to the agent.
pub trait Fault {
    /// Looks at the ground before anybody asks.
    fn begin(&mut self, ground: &mut Ground<'_>) -> Result<()> {
        ground.clients.hear()
    }

    /// Does it once. The agent runs before and after, or is about to; what is lost is told to the ground's clients. An
    /// error means that the play itself is broken.
    fn round(&mut self, ground: &mut Ground<'_>, number: u64) -> Result<Next>;

    /// What is to be said at the end, besides the line of the table; and the last thing that is done.
    fn end(&mut self, ground: &mut Ground<'_>) -> Result<Vec<String>> {
        ground.settle();
        Ok(Vec::new())
    }
}

/// Whether there is another round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// As many as are wanted.
    More,
    /// Everything has been done once.
    Over,
}

/// The faults there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Name {
    /// SIGKILL at a random moment of a start or of a sync, while endpoints change.
    Kill,
    /// SIGKILL at each system call of a start and of a sync.
    SyscallKill,
    /// An error of each system call of a start and of a sync.
    SyscallError,
    /// Endpoints and Services come and go: rolling, blue/green, recreate.
    Churn,
    /// 20,000 spoofed SYNs to a NodePort whose endpoint is on another node.
    Flood,
    /// The agent starts on a node that rules of kube-proxy's shape serve, and gives it back to them.
    Takeover,
    /// An agent that serves leaves what is new to such rules, and takes it back.
    Retire,
    /// Kills, churn and floods at random; tables, memory and descriptors at begin and end.
    Soak,
}

/// What can be chosen.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Rounds; what the fault has by itself unless told.
    pub rounds: Option<u64>,
    /// How long the soak lasts.
    pub lasts: Option<Duration>,
    /// What random choices follow from.
    pub seed: u64,
    /// Further flags for the agent.
    pub agent_flags: Vec<String>,
}

impl Name {
    /// How it is called.
    #[must_use]
    pub fn text(self) -> String {
        let value = clap::ValueEnum::to_possible_value(&self);
        value.map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    /// Rounds unless told.
    #[must_use]
    pub fn rounds(self) -> u64 {
        match self {
            Self::Kill => 1000,
            // Each once.
            Self::SyscallKill | Self::SyscallError => u64::MAX,
            // Until its time is over.
            Self::Soak => u64::MAX,
            Self::Churn => 20,
            Self::Flood => 10,
            Self::Takeover | Self::Retire => 20,
        }
    }

    /// Who forwards when the clients begin.
    #[must_use]
    pub fn before(self) -> Before {
        match self {
            Self::Kill | Self::SyscallKill | Self::SyscallError | Self::Churn | Self::Flood | Self::Soak => {
                Before::Agent
            }
            Self::Takeover => Before::Rules,
            Self::Retire => Before::AgentAndRules,
        }
    }

    /// Flags of the agent that it needs.
    #[must_use]
    pub fn flags(self) -> Vec<String> {
        let flags: &[&str] = match self {
            // It is waited for until no flow is left, datagrams included.
            Self::Takeover => &["--conntrack-udp-timeout=20s", "--conntrack-udp-timeout-stream=20s"],
            // At the end it is waited for that nobody is left.
            Self::Soak => &["--conntrack-udp-timeout=10s", "--conntrack-udp-timeout-stream=10s"],
            Self::Retire => &["--remove-kube-proxy-rules=false"],
            Self::Kill | Self::SyscallKill | Self::SyscallError | Self::Churn | Self::Flood => &[],
        };
        flags.iter().map(ToString::to_string).collect()
    }

    /// The fault, ready to be played.
    #[must_use]
    pub fn make(self, options: &Options) -> Box<dyn Fault> {
        match self {
            Self::Kill => Box::new(kill::Kill::new(options.seed)),
            Self::SyscallKill => Box::new(Syscalls::new(What::Kill, options)),
            Self::SyscallError => Box::new(Syscalls::new(What::Fail, options)),
            Self::Churn => Box::new(churn::Churn),
            Self::Flood => Box::new(flood::Flood::default()),
            Self::Takeover => Box::new(takeover::Takeover),
            Self::Retire => Box::new(retire::Retire),
            Self::Soak => Box::new(soak::Soak::new(options)),
        }
    }
}
