//! What is done to the agent, one file each. A fault does the same thing in every round, at another moment or place.

mod churn;
mod flood;
mod kill;

use anyhow::Result;

use super::ground::{Before, Ground};

/// What is done to the agent.
pub trait Fault {
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
    /// Endpoints and Services come and go: rolling, blue/green, recreate.
    Churn,
    /// 20,000 spoofed SYNs to a NodePort whose endpoint is on another node.
    Flood,
}

/// What can be chosen.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Rounds; what the fault has by itself unless told.
    pub rounds: Option<u64>,
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
            Self::Churn => 20,
            Self::Flood => 10,
        }
    }

    /// Who forwards when the clients begin.
    #[must_use]
    pub fn before(self) -> Before {
        match self {
            Self::Kill | Self::Churn | Self::Flood => Before::Agent,
        }
    }

    /// The fault, ready to be played.
    #[must_use]
    pub fn make(self, options: &Options) -> Box<dyn Fault> {
        match self {
            Self::Kill => Box::new(kill::Kill::new(options.seed)),
            Self::Churn => Box::new(churn::Churn),
            Self::Flood => Box::new(flood::Flood::default()),
        }
    }
}
