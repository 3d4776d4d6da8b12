//! Which nodes are reached directly, and why others are not: for `status` and the metrics.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};

use proxy_common::abi::NOTE;

use super::Report;
use crate::run::dsr::News;
use agent_core::model::Family;
use agent_core::model::tunnels::{Reach, Standing};

/// Nodes that `status` names.
const NAMED: usize = 8;

impl Report {
    /// What is known of them now.
    pub(in crate::run) fn direct(&mut self, news: &News) {
        self.nodes = lines(news);
        let mut snapshot = self.snapshot.lock().unwrap_or_else(PoisonError::into_inner);
        snapshot.dsr_nodes = counts(&news.standings);
        snapshot.probes = news.counts;
    }
}

/// The nodes by name: reached over every family that they are known by, or the first that they are not reached over.
fn by_node(standings: &[Standing]) -> BTreeMap<&Arc<str>, &Standing> {
    let mut nodes: BTreeMap<&Arc<str>, &Standing> = BTreeMap::new();
    for standing in standings {
        let known = nodes.entry(&standing.node).or_insert(standing);
        if known.reach == Reach::Directly {
            *known = standing;
        }
    }
    nodes
}

/// How many nodes there are of each label.
fn counts(standings: &[Standing]) -> BTreeMap<&'static str, u64> {
    let mut counts: BTreeMap<&'static str, u64> = Reach::LABELS.iter().map(|label| (*label, 0)).collect();
    for standing in by_node(standings).values() {
        *counts.entry(standing.reach.label()).or_default() += 1;
    }
    counts
}

fn lines(news: &News) -> Vec<String> {
    let News { standings, warnings, .. } = news;
    let nodes = by_node(standings);
    let mut lines = warnings.clone();
    if nodes.is_empty() {
        return lines;
    }
    let reached = nodes.values().filter(|standing| standing.reach == Reach::Directly).count();
    lines.push(format!(
        "{NOTE}direct server return: {reached} of {} nodes with endpoints for it are reached directly",
        nodes.len()
    ));
    // Who has only just been asked will be reached soon.
    let all = standings.iter().filter(|s| !matches!(s.reach, Reach::Directly | Reach::Asking));
    let missing: Vec<&Standing> = all.collect();
    for Standing { node, family, reach } in missing.iter().take(NAMED) {
        let over = family.map_or(String::new(), |family| format!(" over {}", Family::name(family)));
        lines.push(format!(
            "node {node} is not reached directly{over} (its clients are masqueraded): {reach}"
        ));
    }
    if let more @ 1.. = missing.len().saturating_sub(NAMED) {
        lines.push(format!("and {more} more that are not reached directly"));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use agent_core::model::tunnels::Block;

    fn standing(node: &str, family: Option<Family>, reach: Reach) -> Standing {
        Standing { node: node.into(), family, reach }
    }

    fn news(standings: Vec<Standing>) -> News {
        News { standings, ..News::default() }
    }

    #[test]
    fn a_node_counts_as_reached_if_it_is_over_all_its_families() {
        let v4 = |node, reach| standing(node, Some(Family::V4), reach);
        let v6 = |node, reach| standing(node, Some(Family::V6), reach);
        let standings = vec![
            v4("a", Reach::Directly),
            v6("a", Reach::Directly),
            v4("b", Reach::Directly),
            v6("b", Reach::NoAnswer),
            v4("c", Reach::Asking),
            standing("d", None, Reach::NoAgent),
        ];
        let counts = counts(&standings);
        let of = |label| counts[label];
        assert_eq!((of("ready"), of("no_answer"), of("asking"), of("no_agent"), of("off")), (1, 1, 1, 1, 0));
        let lines = lines(&news(standings));
        assert_eq!(
            lines[0],
            format!("{NOTE}direct server return: 1 of 4 nodes with endpoints for it are reached directly")
        );
        assert!(lines[1].starts_with("node b is not reached directly over IPv6 (its clients"), "{lines:?}");
        assert!(lines[2].starts_with("node d is not reached directly (its clients"), "{lines:?}");
        assert_eq!(lines.len(), 3, "{lines:?}");
    }

    #[test]
    fn of_many_nodes_some_are_named_and_without_any_nothing_is_said() {
        assert_eq!(lines(&News::default()), [""; 0]);
        let off = |n: u32| standing(&format!("n{n:02}"), Some(Family::V4), Reach::Blocked(Block::Off));
        let lines = lines(&news((0..20).map(off).collect()));
        assert_eq!(lines.len(), 1 + NAMED + 1);
        assert_eq!(lines.last().unwrap(), "and 12 more that are not reached directly");
    }

    #[test]
    fn what_is_wrong_here_comes_first() {
        let news = News { warnings: vec!["no port".into()], ..News::default() };
        assert_eq!(lines(&news), ["no port"]);
    }
}
