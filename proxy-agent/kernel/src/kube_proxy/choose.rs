//! Which chains and rules of a table go: a plain function.
//!
//! A chain of kube-proxy goes with its rules and with the jumps to it from the built-in chains. One that a
//! foreign chain leads to stays, with all it leads to: rules of others are left as they are, to the letter.

use std::collections::{BTreeMap, HashSet};

use super::names;

/// A chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Chain {
    pub(super) name: String,
    /// Whether packets come to it without a jump.
    pub(super) base: bool,
}

/// A rule: where it is, where it leads to, and by what it is deleted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rule<R> {
    pub(super) chain: String,
    pub(super) leads_to: Vec<String>,
    pub(super) id: R,
}

/// What goes, and what does not.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Removal<R> {
    /// Rules outside the chains that go, which lead to them.
    pub(super) jumps: Vec<Rule<R>>,
    /// Chains that go.
    pub(super) chains: Vec<String>,
    /// Chains that stay, and the chain because of which each does.
    pub(super) held: BTreeMap<String, String>,
}

impl<R> Removal<R> {
    /// For a person.
    pub(super) fn describe(&self, table: &str, tool: &str) -> String {
        let rules = self.jumps.len();
        format!("{tool} table {table}: {} chains and {rules} rules that lead to them", self.chains.len())
    }
}

/// What is to be done in `table`.
pub(super) fn removal<R>(table: &str, chains: &[Chain], rules: Vec<Rule<R>>) -> Removal<R> {
    let own = |chain: &str| names::is_chain(table, chain);
    let bases: HashSet<&str> = chains.iter().filter(|c| c.base).map(|c| c.name.as_str()).collect();
    let mut held = BTreeMap::new();
    let mut todo: Vec<(String, String)> = Vec::new();
    let mut jumps: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for rule in &rules {
        for to in rule.leads_to.iter().filter(|to| own(to)) {
            match (own(&rule.chain), bases.contains(rule.chain.as_str())) {
                (true, _) => jumps.entry(&rule.chain).or_default().push(to),
                (false, true) => {}
                (false, false) => todo.push((to.clone(), rule.chain.clone())),
            }
        }
    }
    while let Some((chain, by)) = todo.pop() {
        if held.contains_key(&chain) {
            continue;
        }
        let next = jumps.get(chain.as_str()).into_iter().flatten().copied();
        // The mark alone masquerades nothing.
        let next = next.chain((chain == names::MARK_MASQ).then_some(names::POSTROUTING));
        todo.extend(next.map(|to| (to.to_owned(), chain.clone())));
        held.insert(chain, by);
    }
    let is_there = |name: &str| chains.iter().any(|chain| chain.name == name);
    held.retain(|chain, _| is_there(chain));
    let goes = |chain: &str| own(chain) && !held.contains_key(chain);
    let chains = chains.iter().filter(|chain| !chain.base && goes(&chain.name)).map(|c| c.name.clone());
    let chains = chains.collect();
    let leads_there = |rule: &Rule<R>| !goes(&rule.chain) && rule.leads_to.iter().any(|to| goes(to));
    let jumps = rules.into_iter().filter(leads_there).collect();
    Removal { jumps, chains, held }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chains(names: &[&str]) -> Vec<Chain> {
        let chain = |name: &&str| Chain { name: (*name).to_owned(), base: !name.contains('-') };
        names.iter().map(chain).collect()
    }

    fn rules(pairs: &[(&str, &str)]) -> Vec<Rule<usize>> {
        let rule = |(id, (from, to)): (usize, &(&str, &str))| Rule {
            chain: (*from).to_owned(),
            leads_to: vec![(*to).to_owned()],
            id,
        };
        pairs.iter().enumerate().map(rule).collect()
    }

    fn ids<R: Copy>(removal: &Removal<R>) -> Vec<R> {
        removal.jumps.iter().map(|rule| rule.id).collect()
    }

    #[test]
    fn chains_go_with_the_jumps_to_them_and_others_stay() {
        // Z-3.
        let chains = chains(&["PREROUTING", "KUBE-SERVICES", "KUBE-SVC-A", "KUBE-KUBELET-CANARY", "MY-OWN"]);
        let rules = rules(&[
            ("PREROUTING", "MY-OWN"),
            ("PREROUTING", "KUBE-SERVICES"),
            ("KUBE-SERVICES", "KUBE-SVC-A"),
            ("MY-OWN", "ACCEPT"),
        ]);
        let removal = removal("nat", &chains, rules);
        assert_eq!(removal.chains, ["KUBE-SERVICES", "KUBE-SVC-A"]);
        assert_eq!(ids(&removal), [1]);
        assert!(removal.held.is_empty());
    }

    #[test]
    fn what_a_foreign_chain_needs_stays() {
        let all = ["POSTROUTING", "KUBE-POSTROUTING", "KUBE-MARK-MASQ", "KUBE-SERVICES", "CNI-SETMARK"];
        let jumps = [
            ("POSTROUTING", "KUBE-POSTROUTING"),
            ("KUBE-SERVICES", "KUBE-MARK-MASQ"),
            ("CNI-SETMARK", "KUBE-MARK-MASQ"),
        ];
        let removal = removal("nat", &chains(&all), rules(&jumps));
        assert_eq!(removal.chains, ["KUBE-SERVICES"]);
        assert_eq!(ids(&removal), Vec::<usize>::new());
        let held: Vec<_> = removal.held.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
        assert_eq!(held, [("KUBE-MARK-MASQ", "CNI-SETMARK"), ("KUBE-POSTROUTING", "KUBE-MARK-MASQ")]);
    }

    #[test]
    fn without_such_chains_nothing_is_done() {
        let rules = rules(&[("PREROUTING", "MY-OWN")]);
        let removal = removal("nat", &chains(&["PREROUTING", "MY-OWN"]), rules);
        assert!(removal.chains.is_empty() && removal.jumps.is_empty());
    }
}
