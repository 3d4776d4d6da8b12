//! What is done to the agent, one file each. A fault does the same thing in every round, at another moment or place.

mod api;
mod churn;
mod detach;
mod flood;
mod idle_clients;
mod kill;
mod retire;
mod soak;
mod syscalls;
mod takeover;
mod upgrade;

use std::time::Duration;

use anyhow::Result;

use super::ground::{Before, Ground};
use super::sabotage::Sabotage;
use crate::apiserver::Fault as ServerFault;
use syscalls::{Syscalls, What};

/// What is done to the agent.
pub trait Fault {
    /// Looks at the ground before anybody asks.
    fn begin(&mut self, ground: &mut Ground<'_>) -> Result<()> {
        ground.clients.receive()
    }

    /// Does it once. The agent runs before and after, or is about to; what is lost is reported to the ground's clients. An
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
    /// Somebody detaches, replaces, removes or changes what the agent has attached, pinned and written.
    Detach,
    /// The API servers close every connection.
    ApiDrop,
    /// They answer nothing any more, and watches fall silent.
    ApiHang,
    /// They accept watches, and do not answer them.
    ApiNoHeaders,
    /// Their watches begin and bring nothing.
    ApiSilent,
    /// Their watches end as soon as they have begun.
    ApiCut,
    /// They answer byte by byte.
    ApiSlow,
    /// They answer with pages for people.
    ApiGarbage,
    /// Their lists end in the middle.
    ApiHalf,
    /// They show an older state.
    ApiLie,
    /// They are busy: 429, with a time to come again.
    ApiBusy,
    /// They answer with status 500.
    ApiError,
    /// A thousand clients that never end a request, at each of the agent's HTTP ports.
    IdleClients,
    /// Endpoints and Services come and go: rolling, blue/green, recreate.
    Churn,
    /// 20,000 spoofed SYNs to a NodePort whose endpoint is on another node.
    Flood,
    /// The agent starts on a node that rules of kube-proxy's shape serve, and gives it back to them.
    Takeover,
    /// An agent that serves leaves what is new to such rules, and takes it back.
    Retire,
    /// An agent with another layout of the tables takes over, and is taken over from; every other time it is killed over it.
    Upgrade,
    /// Kills, churn, floods, sabotage, idle clients and faults of API servers at random; tables, memory and descriptors at
    /// begin and end.
    Soak,
}

/// What can be chosen.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Rounds; by default what the fault has by itself.
    pub rounds: Option<u64>,
    /// How long the soak lasts.
    pub lasts: Option<Duration>,
    /// Of system calls only those whose names begin so; all of them if there is none. A command of `bpf` is part of its name.
    pub calls: Vec<String>,
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

    /// Rounds by default.
    #[must_use]
    pub fn rounds(self) -> u64 {
        match self {
            Self::Kill => 1000,
            // Each once.
            Self::SyscallKill | Self::SyscallError => u64::MAX,
            // Until its time is over.
            Self::Soak => u64::MAX,
            // All of them twice.
            Self::Detach => 2 * Sabotage::ALL.len() as u64,
            Self::Upgrade => 100,
            Self::Churn => 20,
            Self::Flood | Self::IdleClients => 10,
            Self::Takeover | Self::Retire => 20,
            // Those of API servers.
            _ => 4,
        }
    }

    /// Who forwards when the clients begin.
    #[must_use]
    pub fn before(self) -> Before {
        match self {
            Self::Takeover => Before::Rules,
            Self::Retire => Before::AgentAndRules,
            _ => Before::Agent,
        }
    }

    /// Whether the agent watches API servers.
    #[must_use]
    pub fn needs_api_servers(self) -> bool {
        self == Self::Soak || self.of_api_servers().is_some()
    }

    /// What happens to API servers, if it is such a fault.
    #[must_use]
    pub fn of_api_servers(self) -> Option<ServerFault> {
        self.text().strip_prefix("api-")?.parse().ok()
    }

    /// Flags of the agent that it needs.
    #[must_use]
    pub fn flags(self) -> &'static [&'static str] {
        match self {
            // It is waited for until no flow is left, datagrams included.
            Self::Takeover => &["--conntrack-udp-timeout=20s", "--conntrack-udp-timeout-stream=20s"],
            // At the end it is waited for that nobody is left.
            Self::Soak => &[
                "--conntrack-udp-timeout=10s",
                "--conntrack-udp-timeout-stream=10s",
                "--conntrack-tcp-timeout-close-wait=10s",
            ],
            Self::Retire => &["--remove-kube-proxy-rules=false"],
            _ => &[],
        }
    }

    /// The fault, ready to be played.
    #[must_use]
    pub fn make(self, options: &Options) -> Box<dyn Fault> {
        match self {
            Self::Kill => Box::new(kill::Kill::new(options.seed)),
            Self::SyscallKill => Box::new(Syscalls::new(What::Kill, options)),
            Self::SyscallError => Box::new(Syscalls::new(What::Fail, options)),
            Self::Detach => Box::new(detach::Detach::new(Sabotage::ALL)),
            Self::IdleClients => Box::new(idle_clients::IdleClients::default()),
            Self::Upgrade => Box::new(upgrade::Upgrade::new(options.seed)),
            Self::Churn => Box::new(churn::Churn),
            Self::Flood => Box::new(flood::Flood::default()),
            Self::Takeover => Box::new(takeover::Takeover),
            Self::Retire => Box::new(retire::Retire),
            Self::Soak => Box::new(soak::Soak::new(options)),
            // Those of API servers.
            _ => Box::new(api::Api::new(self.of_api_servers().into_iter().collect())),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::*;

    #[test]
    fn every_fault_of_an_api_server_can_be_named() {
        let named = Name::value_variants().iter().filter(|name| name.text().starts_with("api-"));
        let named: Vec<_> = named.filter_map(|name| name.of_api_servers()).collect();
        assert_eq!(named.len(), ServerFault::NAMED.len());
        assert!(ServerFault::NAMED.iter().all(|(_, fault)| named.contains(fault)), "{named:?}");
    }
}
