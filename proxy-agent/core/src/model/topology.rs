//! Which endpoints get new flows: the cluster set, the local set, and whether any endpoint exists at all.
//!
//! Pure functions over conditions, hints and locality (P-1…P-13); addresses do not matter here.

use std::sync::Arc;

/// What the choice depends on, of one endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate<'a> {
    /// Gets new flows.
    pub ready: bool,
    /// Still answers.
    pub serving: bool,
    /// Is on its way out.
    pub terminating: bool,
    /// Runs on this node (E-19).
    pub local: bool,
    /// Zones it is meant for.
    pub zone_hints: &'a [Arc<str>],
    /// Nodes it is meant for.
    pub node_hints: &'a [Arc<str>],
}

impl Candidate<'_> {
    /// Not ready, but still serving while it terminates: the last resort (P-4, P-6).
    fn is_fallback(&self) -> bool {
        !self.ready && self.serving && self.terminating
    }
}

/// Which sets the destinations of a Service port need (S-19).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Uses {
    /// Some destination has policy Cluster, or is external (short-circuit, V-24).
    pub cluster: bool,
    /// Some destination has policy Local, or is served to clients of other nodes (direct server return).
    pub local: bool,
}

/// Indices into the candidates, in their order.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Chosen {
    /// The cluster set (P-4).
    pub cluster: Vec<usize>,
    /// The local set (P-6).
    pub local: Vec<usize>,
    /// Some endpoint of the cluster could serve (P-8).
    pub any: bool,
}

/// Chooses among `candidates` on the node `node` in `zone`.
#[must_use]
pub fn choose(candidates: &[Candidate<'_>], uses: Uses, node: &str, zone: Option<&str>) -> Chosen {
    let matching = |wanted: &dyn Fn(&Candidate<'_>) -> bool| -> Vec<usize> {
        candidates.iter().enumerate().filter(|(_, c)| wanted(c)).map(|(i, _)| i).collect()
    };
    let mut chosen = Chosen::default();
    if uses.cluster {
        let mode = Mode::of(candidates, node, zone);
        chosen.cluster = matching(&|c| c.ready && mode.admits(c));
        if chosen.cluster.is_empty() {
            chosen.cluster = matching(&|c| c.is_fallback()); // P-4: without the topology filter.
        }
    }
    if uses.local {
        chosen.local = matching(&|c| c.local && c.ready);
        if chosen.local.is_empty() {
            chosen.local = matching(&|c| c.local && c.is_fallback());
        }
    }
    // P-8 distinguishes two cases, but by P-4 and P-12 the cluster set is empty only when this is false.
    chosen.any = candidates.iter().any(|c| c.ready || c.is_fallback());
    chosen
}

/// Which hints count (P-11).
enum Mode<'a> {
    Everywhere,
    SameNode(&'a str),
    SameZone(&'a str),
}

impl<'a> Mode<'a> {
    fn of(candidates: &[Candidate<'_>], node: &'a str, zone: Option<&'a str>) -> Self {
        if !node.is_empty() && hints_agree(candidates, |c| c.node_hints, node) {
            return Self::SameNode(node);
        }
        match zone {
            Some(zone) if !zone.is_empty() && hints_agree(candidates, |c| c.zone_hints, zone) => {
                Self::SameZone(zone)
            }
            _ => Self::Everywhere,
        }
    }

    fn admits(&self, candidate: &Candidate<'_>) -> bool {
        match self {
            Self::Everywhere => true,
            Self::SameNode(node) => hinted(candidate.node_hints, node),
            Self::SameZone(zone) => hinted(candidate.zone_hints, zone),
        }
    }
}

/// Every ready endpoint has a hint, and at least one hints `here`. One without a hint disables the mode,
/// because hints that cover only some endpoints are being rolled out or taken back (P-13).
fn hints_agree<'a, 'b>(
    candidates: &'b [Candidate<'a>],
    hints: impl Fn(&'b Candidate<'a>) -> &'a [Arc<str>],
    here: &str,
) -> bool {
    let mut someone = false;
    for candidate in candidates.iter().filter(|c| c.ready) {
        let hints = hints(candidate);
        if hints.is_empty() {
            return false;
        }
        someone |= hinted(hints, here);
    }
    someone
}

fn hinted(hints: &[Arc<str>], here: &str) -> bool {
    hints.iter().any(|hint| **hint == *here)
}
