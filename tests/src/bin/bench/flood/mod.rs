//! A flood of packets from sources that do not exist, to a Service with an endpoint on the node: how many honest clients
//! still connect, and what a packet of the flood costs. Beside a node that only forwards, and beside rules.
//!
//! Every turn has a node of its own, whose tables nobody has filled before. What is sent at it are fewer sources than
//! `nf_conntrack` has room for by default: a flood that fills tables is what `cargo xtask chaos compare flood` plays.

mod node;

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use proxy_tests::chaos::spoof::Kind as Sends;

use self::node::{Client, Loud, Node, RATE, Who};
use crate::figure::{Figures, progress};
use crate::rulesets::Kind;

/// A round raises twelve nodes, one after the other, and lasts about a minute.
const ROUNDS: usize = 5;

/// What is flooded, and with what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Target {
    NodePortSyn,
    ClusterIpSyn,
    NodePortUdp,
}

impl Target {
    const ALL: [Self; 3] = [Self::NodePortSyn, Self::ClusterIpSyn, Self::NodePortUdp];

    const fn name(self) -> &'static str {
        match self {
            Self::NodePortSyn => "SYNs to a NodePort",
            Self::ClusterIpSyn => "SYNs to a ClusterIP",
            Self::NodePortUdp => "datagrams to a NodePort",
        }
    }

    const fn sends(self) -> Sends {
        match self {
            Self::NodePortSyn | Self::ClusterIpSyn => Sends::Syn,
            Self::NodePortUdp => Sends::Datagram,
        }
    }
}

/// A value a round.
#[derive(Default)]
struct Turns {
    clients: BTreeMap<Client, Honest>,
    /// Packets of the flood a second, while others connect.
    sent: Vec<f64>,
    /// Microseconds of processor time for each packet of a flood that has the node for itself.
    cost: Vec<f64>,
}

/// What honest clients of one kind have come to.
#[derive(Default)]
struct Honest {
    /// Connections a second.
    before: Vec<f64>,
    during: Vec<f64>,
    /// Of a hundred during the flood.
    failed: Vec<f64>,
}

pub(crate) fn measure(figures: &mut Figures, rounds: usize) -> Result<()> {
    for kind in [Kind::Nftables, Kind::Iptables] {
        kind.needs()?;
    }
    let mut all = BTreeMap::<(Target, Who), Turns>::new();
    let rounds = rounds.min(ROUNDS);
    for round in 0..rounds {
        progress(&format!("flood: round {} of {rounds}", round + 1));
        for target in Target::ALL {
            for who in Who::ALL {
                let turns = all.entry((target, who)).or_default();
                turn(who, target, turns).with_context(|| format!("{} with {}", target.name(), who.name()))?;
            }
        }
    }
    report(figures, &all);
    Ok(())
}

fn turn(who: Who, target: Target, turns: &mut Turns) -> Result<()> {
    let node = Node::raise(who)?;
    for client in Client::ALL {
        turns.clients.entry(client).or_default().before.push(node.honest(client)?.rate());
    }
    let Loud { clients, sent } = node.flood(target)?;
    for (client, came_to) in clients {
        let honest = turns.clients.entry(client).or_default();
        honest.during.push(came_to.rate());
        honest.failed.push(came_to.failed_percent());
    }
    turns.sent.push(sent);
    // The last one: nobody honest has to wait for what it leaves behind.
    turns.cost.push(node.flood_alone(target)?);
    Ok(())
}

fn report(figures: &mut Figures, all: &BTreeMap<(Target, Who), Turns>) {
    for ((target, who), turns) in all {
        let name = |what: &str| format!("{}, {}: {what}", target.name(), who.name());
        for (client, Honest { before, during, failed }) in &turns.clients {
            let rate = format!("{}, connections during the flood vs before it", client.name());
            figures.pair(name(&rate), "1/s", during, before);
            figures.value(name(&format!("{}, failed of them", client.name())), "%", failed);
        }
        figures.value(name(&format!("packets sent, of {RATE:.0}")), "1/s", &turns.sent);
        let cost = name("CPU of one packet");
        match all.get(&(*target, Who::Nobody)).filter(|_| *who != Who::Nobody) {
            Some(nobody) => figures.pair(format!("{cost} vs no proxy"), "us", &turns.cost, &nobody.cost),
            None => figures.value(cost, "us", &turns.cost),
        };
    }
}
