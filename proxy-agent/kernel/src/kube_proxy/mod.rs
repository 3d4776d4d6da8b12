//! What a kube-proxy has left on this node: found, and taken away (Z-1…Z-6).
//!
//! Its rules of any mode would shadow this proxy: they answer for Services that have changed since, and drop
//! packets of endpoints that they do not know. They are taken away once this proxy does their work, unless the
//! kube-proxy that wrote them is still at it. nf_tables, IP sets, IPVS and interfaces are spoken to through
//! netlink; only iptables of old (`iptables-legacy`) needs programs of that name.

mod choose;
mod connections;
mod legacy;
mod names;
pub mod passing;
mod rewriting;
mod running;
mod take_over;
mod xtables;

use std::fmt;
use std::io;

use crate::netlink::{ipvs, nf_tables};
use agent_core::model::Family;
use choose::Removal;
use nf_tables::Delete;

pub use connections::{Fate, Known, fate};
pub use rewriting::remove as stop_rewriting;
pub use running::{process, running};
pub use take_over::TakeOver;

/// The interface that holds the Service addresses in IPVS mode.
const INTERFACE: &str = "kube-ipvs0";
/// The table of nftables mode (Z-4).
const TABLE: &str = "kube-proxy";

/// Something that a kube-proxy has left.
#[derive(Debug)]
pub struct Leftover {
    what: String,
    act: Act,
}

/// How it is taken away.
#[derive(Debug)]
enum Act {
    NfTables(Family, Vec<Delete>),
    Legacy(legacy::Edit),
    Set(String),
    Ipvs,
    /// Not at all: the reason, and what to do.
    Not(String),
}

impl fmt::Display for Leftover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.act {
            Act::Not(why) => write!(f, "{}: {why}", self.what),
            _ => f.write_str(&self.what),
        }
    }
}

/// What was done about leftovers, a line each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cleaned {
    /// What is gone.
    pub removed: Vec<String>,
    /// What is still there, why, and what to do.
    pub left: Vec<String>,
}

/// Everything that a kube-proxy has left, in the order in which it can be taken away.
#[must_use]
pub fn leftovers() -> Vec<Leftover> {
    let mut found = Vec::new();
    for family in [Family::V4, Family::V6] {
        match of_nf_tables(family) {
            Ok(some) => found.extend(some),
            Err(error) => found.push(unknown(&format!("nf_tables ({})", name(family)), &error)),
        }
        found.extend(legacy::leftovers(family));
    }
    match ipvs::sets() {
        // After the rules that name them.
        Ok(sets) => found.extend(
            sets.into_iter()
                .filter(|set| names::is_set(set))
                .map(|set| Leftover { what: format!("IP set {set}"), act: Act::Set(set) }),
        ),
        Err(error) => found.push(unknown("IP sets", &error)),
    }
    // By its name and not through /sys, which shows the network namespace that it was mounted in.
    if nix::net::if_::if_nametoindex(INTERFACE).is_ok() {
        let what = format!("interface {INTERFACE} and the virtual servers of IPVS");
        found.push(Leftover { what, act: Act::Ipvs });
    }
    found
}

/// Whether there are rules of a kube-proxy that may serve this node.
pub fn has_rules() -> bool {
    leftovers().iter().any(|leftover| !matches!(leftover.act, Act::Not(_)))
}

/// Everything that a kube-proxy has left, a line each.
#[must_use]
pub fn leftovers_text() -> Vec<String> {
    leftovers().iter().map(ToString::to_string).collect()
}

/// Takes away what a kube-proxy has left. Doing it twice is doing it once.
#[must_use]
pub fn clean() -> Cleaned {
    clean_around(0)
}

/// The same, but for virtual servers of IPVS as long as it leads so many connections: it drops the packets of those whose server has
/// gone, and nobody else can go on with them as netfilter does.
fn clean_around(led_by_ipvs: usize) -> Cleaned {
    let mut done = Cleaned::default();
    // Others write rules as well: what has changed under our hands is looked at once more.
    for _ in 0..2 {
        done.left.clear();
        let mut failed = false;
        for leftover in leftovers() {
            if led_by_ipvs != 0 && matches!(leftover.act, Act::Ipvs) {
                done.left.push(format!(
                    "{leftover}: they stay until {led_by_ipvs} connections of theirs have ended"
                ));
                continue;
            }
            match remove(&leftover) {
                Ok(true) => done.removed.push(leftover.what),
                Ok(false) => done.left.push(leftover.to_string()),
                Err(error) => {
                    failed = true;
                    done.left.push(format!("{}: {error}", leftover.what));
                }
            }
        }
        if !failed {
            break;
        }
    }
    done
}

/// Whether it could be taken away at all.
fn remove(leftover: &Leftover) -> io::Result<bool> {
    match &leftover.act {
        Act::NfTables(family, deletes) => nf_tables::delete(*family, deletes)?,
        Act::Legacy(edit) => legacy::apply(edit)?,
        Act::Set(name) => ipvs::destroy_set(name)?,
        Act::Ipvs => {
            ipvs::flush_virtual_servers()?;
            ipvs::delete_link(INTERFACE)?;
        }
        Act::Not(_) => return Ok(false),
    }
    Ok(true)
}

fn unknown(what: &str, error: &dyn fmt::Display) -> Leftover {
    let why = format!("cannot be looked at: {error}; run this as root (CAP_NET_ADMIN)");
    Leftover { what: what.to_owned(), act: Act::Not(why) }
}

/// The table of nftables mode and the chains of `iptables-nft`, one transaction together; and what stays.
fn of_nf_tables(family: Family) -> io::Result<Vec<Leftover>> {
    let tables = nf_tables::tables(family)?;
    let (mut what, mut deletes, mut held) = (Vec::new(), Vec::new(), Vec::new());
    if tables.iter().any(|table| table == TABLE) {
        what.push(format!("nftables table {} {TABLE}", nft_family(family)));
        deletes.push(Delete::Table(TABLE.to_owned()));
    }
    let chains = match tables.is_empty() {
        true => Vec::new(),
        false => nf_tables::chains(family)?,
    };
    for table in names::TABLES.into_iter().filter(|table| tables.iter().any(|found| found == table)) {
        let chains = chains.iter().filter(|chain| chain.table == table);
        let chains: Vec<_> = chains.map(|c| choose::Chain { name: c.name.clone(), base: c.base }).collect();
        if !chains.iter().any(|chain| names::is_chain(table, &chain.name)) {
            continue;
        }
        let rules = nf_tables::rules(family, table)?.into_iter();
        let rules = rules.map(|r| choose::Rule { chain: r.chain, leads_to: r.leads_to, id: r.handle });
        let removal = choose::removal(table, &chains, rules.collect());
        held.extend(stays(table, "iptables-nft", family, &removal));
        if !removal.chains.is_empty() {
            what.push(removal.describe(table, "iptables-nft"));
            deletes.extend(in_order(table, removal));
        }
    }
    if !deletes.is_empty() {
        let what = format!("{} ({})", what.join(", "), name(family));
        held.insert(0, Leftover { what, act: Act::NfTables(family, deletes) });
    }
    Ok(held)
}

/// The jumps, then what is in the chains, then the chains.
fn in_order(table: &str, removal: Removal<u64>) -> Vec<Delete> {
    let own = || table.to_owned();
    let jumps = removal.jumps.into_iter().map(|rule| Delete::Rule(own(), rule.chain, rule.id));
    let rules = removal.chains.iter().map(|chain| Delete::Rules(own(), chain.clone()));
    let chains = removal.chains.iter().map(|chain| Delete::Chain(own(), chain.clone()));
    jumps.chain(rules).chain(chains).collect()
}

/// The chains that others use.
fn stays<R>(table: &str, tool: &str, family: Family, removal: &Removal<R>) -> Vec<Leftover> {
    let one = |(chain, by): (&String, &String)| Leftover {
        what: format!("{tool} chain {chain} of table {table} ({})", name(family)),
        act: Act::Not(format!(
            "stays, because chain {by} leads to it: remove that rule, then clean up again"
        )),
    };
    removal.held.iter().map(one).collect()
}

fn name(family: Family) -> &'static str {
    match family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    }
}

fn nft_family(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}
