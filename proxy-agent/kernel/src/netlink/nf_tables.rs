//! nf_tables as far as taking things away goes: tables, chains, where rules lead to, and deletions that happen
//! all at once or not at all. `iptables` of today (`iptables-nft`) keeps its tables there, too.

use std::io;
use std::time::Duration;

use super::request::{self, ACK, Flags, News, Protocol, attributes, message, put, put_text, text_of};
use agent_core::model::Family;

/// `NFNL_SUBSYS_NFTABLES`, in the upper byte of every kind of message.
pub(super) const SUBSYSTEM: u16 = 10;
const DELETE_TABLE: u16 = SUBSYSTEM << 8 | 2;
const GET_TABLE: u16 = SUBSYSTEM << 8 | 1;
const GET_CHAIN: u16 = SUBSYSTEM << 8 | 4;
const DELETE_CHAIN: u16 = SUBSYSTEM << 8 | 5;
const GET_RULE: u16 = SUBSYSTEM << 8 | 7;
const DELETE_RULE: u16 = SUBSYSTEM << 8 | 8;
/// `NFNL_MSG_BATCH_BEGIN` and `NFNL_MSG_BATCH_END`.
const BATCH: [u16; 2] = [16, 17];
/// Length of `struct nfgenmsg`.
const HEADER: usize = 4;

/// A chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chain {
    pub(crate) table: String,
    pub(crate) name: String,
    /// Whether packets come to it by a hook and not by a jump.
    pub(crate) base: bool,
}

/// A rule, as far as it leads to other chains.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rule {
    pub(crate) chain: String,
    pub(crate) handle: u64,
    pub(crate) leads_to: Vec<String>,
}

/// Something to take away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Delete {
    /// A table with all that is in it.
    Table(String),
    /// One rule of a table and chain.
    Rule(String, String, u64),
    /// All rules of a table's chain.
    Rules(String, String),
    /// An empty chain that no rule leads to.
    Chain(String, String),
}

/// The names of all tables of a family; none where the kernel has no nf_tables.
pub(crate) fn tables(family: Family) -> io::Result<Vec<String>> {
    let bodies = match request::exchange(Protocol::Netfilter, GET_TABLE, Flags::Dump, &header(family)) {
        Err(error) if is_absent(&error) => return Ok(Vec::new()),
        answer => answer?,
    };
    Ok(bodies.iter().filter_map(|body| find(body, HEADER, 1).map(text_of)).collect())
}

/// Tells when anything has changed in nf_tables.
pub(crate) fn news(patience: Duration) -> io::Result<News> {
    /// `NFNLGRP_NFTABLES`.
    const GROUP: u32 = 7;
    News::of(Protocol::Netfilter, GROUP, patience)
}

/// All chains of a family.
pub(crate) fn chains(family: Family) -> io::Result<Vec<Chain>> {
    let bodies = request::exchange(Protocol::Netfilter, GET_CHAIN, Flags::Dump, &header(family))?;
    Ok(bodies.iter().filter_map(|body| chain(body)).collect())
}

/// All rules of a table.
pub(crate) fn rules(family: Family, table: &str) -> io::Result<Vec<Rule>> {
    let mut body = header(family).to_vec();
    put_text(&mut body, 1, table);
    let bodies = request::exchange(Protocol::Netfilter, GET_RULE, Flags::Dump, &body)?;
    // Kernels before 4.6 or so do not look at the name.
    let of_table = bodies.iter().filter(|body| find(body, HEADER, 1).map(text_of).as_deref() == Some(table));
    Ok(of_table.filter_map(|body| rule(body)).collect())
}

/// Takes all of these away, in this order, in one transaction: after an error everything is as it was.
pub(crate) fn delete(family: Family, what: &[Delete]) -> io::Result<()> {
    let Some((last, others)) = what.split_last() else { return Ok(()) };
    let deletes = others.iter().map(|delete| (delete, 0)).chain([(last, ACK)]);
    transact(deletes.map(|(delete, flags)| {
        let (kind, body) = encode(family, delete);
        message(kind, flags, &body)
    }))
}

/// Sends messages that are done all at once or not at all; the last of them asks for an acknowledgement.
pub(super) fn transact(messages: impl Iterator<Item = Vec<u8>>) -> io::Result<()> {
    let [begin, end] = BATCH;
    // Netlink's own family, version 0, and whose batch it is.
    let of_batch = [&[0, 0][..], &SUBSYSTEM.to_be_bytes()].concat();
    let mut batch = message(begin, 0, &of_batch);
    messages.for_each(|message| batch.extend(message));
    batch.extend(message(end, 0, &of_batch));
    request::ask(Protocol::Netfilter, &batch).map(drop)
}

fn encode(family: Family, delete: &Delete) -> (u16, Vec<u8>) {
    let mut body = header(family).to_vec();
    let kind = match delete {
        Delete::Table(table) => {
            put_text(&mut body, 1, table);
            DELETE_TABLE
        }
        Delete::Rule(table, chain, handle) => {
            put_text(&mut body, 1, table);
            put_text(&mut body, 2, chain);
            put(&mut body, 3, &handle.to_be_bytes());
            DELETE_RULE
        }
        Delete::Rules(table, chain) => {
            put_text(&mut body, 1, table);
            put_text(&mut body, 2, chain);
            DELETE_RULE
        }
        Delete::Chain(table, chain) => {
            put_text(&mut body, 1, table);
            put_text(&mut body, 3, chain);
            DELETE_CHAIN
        }
    };
    (kind, body)
}

/// `struct nfgenmsg`: `NFPROTO_IPV4` or `NFPROTO_IPV6`, version 0, no resource.
pub(super) fn header(family: Family) -> [u8; HEADER] {
    let family = match family {
        Family::V4 => 2,
        Family::V6 => 10,
    };
    [family, 0, 0, 0]
}

/// Whether an error says that the kernel knows nothing of the kind.
pub fn is_absent(error: &io::Error) -> bool {
    let absent = [libc::EINVAL, libc::EOPNOTSUPP, libc::EPROTONOSUPPORT, libc::ENOPROTOOPT];
    error.raw_os_error().is_some_and(|code| absent.contains(&code))
}

fn find(body: &[u8], at: usize, wanted: u16) -> Option<&[u8]> {
    attributes(body, at).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
}

fn chain(body: &[u8]) -> Option<Chain> {
    let text = |kind| find(body, HEADER, kind).map(text_of);
    Some(Chain { table: text(1)?, name: text(3)?, base: find(body, HEADER, 4).is_some() })
}

fn rule(body: &[u8]) -> Option<Rule> {
    let handle = find(body, HEADER, 3).and_then(|value| value.try_into().ok()).map(u64::from_be_bytes)?;
    let expressions = find(body, HEADER, 4).unwrap_or_default();
    let leads_to = attributes(expressions, 0).filter_map(|(_, expression)| verdict_chain(expression));
    Some(Rule { chain: find(body, HEADER, 2).map(text_of)?, handle, leads_to: leads_to.collect() })
}

/// The chain that an `immediate` expression jumps or goes to: data (2), verdict (2), chain (2).
fn verdict_chain(expression: &[u8]) -> Option<String> {
    (text_of(find(expression, 0, 1)?) == "immediate").then_some(())?;
    let data = find(find(expression, 0, 2)?, 0, 2)?;
    find(find(data, 0, 2)?, 0, 2).map(text_of)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_is_read_as_the_kernel_writes_it() {
        let nested = |parts: &[(u16, &[u8])]| {
            let mut body = Vec::new();
            parts.iter().for_each(|(kind, value)| put(&mut body, *kind, value));
            body
        };
        let verdict = nested(&[(1, &(-3_i32).to_be_bytes()), (2, b"KUBE-SERVICES\0")]);
        let data = nested(&[(1, &0_u32.to_be_bytes()), (2, &nested(&[(2, &verdict)]))]);
        let jump = nested(&[(1, b"immediate\0"), (2, &data)]);
        let counter = nested(&[(1, b"counter\0"), (2, &nested(&[(1, &[0; 8])]))]);
        let mut body = header(Family::V4).to_vec();
        put_text(&mut body, 1, "nat");
        put_text(&mut body, 2, "PREROUTING");
        put(&mut body, 3, &7_u64.to_be_bytes());
        put(&mut body, 4, &nested(&[(1, &counter), (1, &jump)]));
        let expected =
            Rule { chain: "PREROUTING".into(), handle: 7, leads_to: vec!["KUBE-SERVICES".to_owned()] };
        assert_eq!(rule(&body), Some(expected));
    }

    #[test]
    fn nothing_to_delete_is_done_without_asking() {
        delete(Family::V4, &[]).unwrap();
    }
}
