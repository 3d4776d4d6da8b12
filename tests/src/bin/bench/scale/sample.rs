//! What was measured of whom, and with how many Services.

use std::collections::BTreeMap;

use crate::figure::{Figures, median, rank};
use crate::rulesets::Kind;

/// Who forwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Who {
    /// From pod to pod, without a Service.
    Nobody,
    Agent,
    /// The same agent, asked by a process that its programs for sockets do not see.
    AgentTc,
    Rules(Kind),
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Measure {
    Rate,
    Connect,
    Change,
    Start,
    Memory,
    Process,
}

impl Who {
    pub(super) const ALL: [Self; 5] =
        [Self::Nobody, Self::Agent, Self::AgentTc, Self::Rules(Kind::Nftables), Self::Rules(Kind::Iptables)];
    /// Those that have a node.
    pub(super) const NODES: [Self; 4] =
        [Self::Nobody, Self::Agent, Self::Rules(Kind::Nftables), Self::Rules(Kind::Iptables)];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Nobody => "no proxy",
            Self::Agent => "agent",
            Self::AgentTc => "agent, TC",
            Self::Rules(kind) => kind.name(),
        }
    }

    /// On whose node it is measured.
    pub(super) const fn node(self) -> Self {
        match self {
            Self::AgentTc => Self::Agent,
            other => other,
        }
    }
}

impl Measure {
    pub(super) const ALL: [Self; 6] =
        [Self::Rate, Self::Connect, Self::Change, Self::Start, Self::Memory, Self::Process];

    /// As in files' names.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Rate => "rate",
            Self::Connect => "connect",
            Self::Change => "change",
            Self::Start => "start",
            Self::Memory => "memory",
            Self::Process => "process",
        }
    }

    pub(super) const fn title(self) -> &'static str {
        match self {
            Self::Rate => "new connections, pod to Service",
            Self::Connect => "connect: until the answer to the first packet",
            Self::Change => "one changed endpoint",
            Self::Start => "cold start",
            Self::Memory => "memory in the kernel",
            Self::Process => "memory of the agent's process",
        }
    }

    pub(super) const fn unit(self) -> &'static str {
        match self {
            Self::Rate => "1/s",
            Self::Connect => "us",
            Self::Change | Self::Start => "ms",
            Self::Memory | Self::Process => "MiB",
        }
    }

    /// With whom the others are compared.
    const fn baseline(self) -> Who {
        match self {
            Self::Rate | Self::Connect => Who::Nobody,
            Self::Change | Self::Start | Self::Memory | Self::Process => Who::Agent,
        }
    }
}

/// A value a round.
#[derive(Debug, Default)]
pub(super) struct Samples(BTreeMap<(u32, Measure, Who), Vec<f64>>);

/// The median of the rounds; a tenth of them lies below the one, a tenth above the other.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Point {
    pub(super) services: u32,
    pub(super) value: f64,
    pub(super) low: f64,
    pub(super) high: f64,
}

impl Samples {
    pub(super) fn add(&mut self, services: u32, measure: Measure, who: Who, value: f64) {
        self.0.entry((services, measure, who)).or_default().push(value);
    }

    /// One line of a drawing.
    pub(super) fn line(&self, measure: Measure, who: Who) -> Vec<Point> {
        let own = self.0.iter().filter(|((_, of, by), _)| (*of, *by) == (measure, who));
        own.map(|((services, _, _), rounds)| Point {
            services: *services,
            value: median(rounds),
            low: rank(rounds, 0.1),
            high: rank(rounds, 0.9),
        })
        .collect()
    }

    pub(super) fn report(&self, figures: &mut Figures) {
        for ((services, measure, who), rounds) in &self.0 {
            let baseline = measure.baseline();
            let name = format!("{services} Service(s), {}, {}", measure.title(), who.name());
            match self.0.get(&(*services, *measure, baseline)).filter(|_| *who != baseline) {
                Some(base) => {
                    figures.pair(format!("{name} vs {}", baseline.name()), measure.unit(), rounds, base)
                }
                None => figures.value(name, measure.unit(), rounds),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_the_median_of_each_size_in_order() {
        let mut samples = Samples::default();
        for (services, value) in [(100, 5.0), (1, 1.0), (100, 7.0), (100, 6.0)] {
            samples.add(services, Measure::Rate, Who::Agent, value);
        }
        samples.add(1, Measure::Rate, Who::Nobody, 9.0);
        let line: Vec<(u32, f64)> = samples
            .line(Measure::Rate, Who::Agent)
            .iter()
            .map(|point| (point.services, point.value))
            .collect();
        assert_eq!(line, [(1, 1.0), (100, 6.0)]);
    }
}
