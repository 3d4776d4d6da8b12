//! The two tables that are made in nf_tables: one that only has to be there, and one that keeps packets between some ends out of
//! connection tracking.

use std::io;

use proxy_common::abi::Tuple;

use super::nf_tables::{SUBSYSTEM, header, transact};
use super::request::{ACK, message, put, put_text};
use agent_core::model::Family;

const MAKE_TABLE: u16 = SUBSYSTEM << 8;
const MAKE_CHAIN: u16 = SUBSYSTEM << 8 | 3;
const MAKE_RULE: u16 = SUBSYSTEM << 8 | 6;
const MAKE_SET: u16 = SUBSYSTEM << 8 | 9;
const MAKE_ELEMENTS: u16 = SUBSYSTEM << 8 | 12;
const DELETE_ELEMENTS: u16 = SUBSYSTEM << 8 | 14;
/// `NLM_F_CREATE`.
const CREATE: u16 = 0x400;
/// What holds other attributes.
const NESTED: u16 = 0x8000;
/// `NF_INET_PRE_ROUTING` and `NF_INET_LOCAL_OUT`, with the names that chains at these hooks have.
const HOOKS: [(u32, &str); 2] = [(0, "prerouting"), OUTPUT];
const OUTPUT: (u32, &str) = (3, "output");
/// `NF_IP_PRI_NAT_DST` and `NF_IP_PRI_RAW`.
const DESTINATION: i32 = -100;
const RAW: i32 = -300;
/// `NFT_REG32_00`: registers of four bytes begin here.
const REGISTER: u32 = 8;
/// The set in the table of those that are not tracked.
const SET: &str = "passing";

/// Makes a table whose only chain, of type `nat`, does nothing: it looks at the state of a connection, so that connections are
/// tracked. While it is there the kernel goes on rewriting those that it has begun to rewrite.
pub(crate) fn make_nat(family: Family, table: &str) -> io::Result<()> {
    /// `NFT_CT_STATE`.
    const STATE: u32 = 0;
    let state = expression("ct", &[(1, REGISTER), (2, STATE)]);
    transact(
        [
            message(MAKE_TABLE, CREATE, &named(family, table)),
            chain(family, table, OUTPUT, DESTINATION, "nat"),
            rule(family, table, OUTPUT.1, state, ACK),
        ]
        .into_iter(),
    )
}

/// Makes a table that keeps packets out of connection tracking whose ends are elements of its set, from whichever of both; none
/// yet.
pub(crate) fn make_untracked(family: Family, table: &str) -> io::Result<()> {
    // `NFT_PAYLOAD_NETWORK_HEADER` and `NFT_PAYLOAD_TRANSPORT_HEADER`.
    const NETWORK: u32 = 1;
    const TRANSPORT: u32 = 2;
    /// `NFT_META_L4PROTO`.
    const PROTOCOL: u32 = 16;
    // Where both addresses are in the header, and how long they are.
    let (at, length) = match family {
        Family::V4 => (12, 8),
        Family::V6 => (8, 32),
    };
    let ports = REGISTER + length / 4;
    let mut set = named(family, table);
    put_text(&mut set, 2, SET);
    // Flags, type (for people only), length of the key, and a number within this transaction.
    for (kind, number) in [(3, 0), (4, 0), (5, length + 8), (10, 1)] {
        put(&mut set, kind, &u32::to_be_bytes(number));
    }
    let mut messages =
        vec![message(MAKE_TABLE, CREATE, &named(family, table)), message(MAKE_SET, CREATE, &set)];
    for hook in HOOKS {
        let mut all = expression("payload", &[(1, REGISTER), (2, NETWORK), (3, at), (4, length)]);
        all.extend(expression("payload", &[(1, ports), (2, TRANSPORT), (3, 0), (4, 4)]));
        all.extend(expression("meta", &[(1, ports + 1), (2, PROTOCOL)]));
        let mut lookup = Vec::new();
        put_text(&mut lookup, 1, SET);
        put(&mut lookup, 2, &REGISTER.to_be_bytes());
        all.extend(expression_of("lookup", &lookup));
        all.extend(expression("notrack", &[]));
        messages.push(chain(family, table, hook, RAW, "filter"));
        messages.push(rule(family, table, hook.1, all, if hook == OUTPUT { ACK } else { 0 }));
    }
    transact(messages.into_iter())
}

/// Adds the packets between these ends to the set, or takes them out of it: all of one family, and all at once or none.
pub(crate) fn change_untracked<'a>(
    family: Family,
    table: &str,
    between: impl Iterator<Item = &'a Tuple>,
    add: bool,
) -> io::Result<()> {
    let mut list = Vec::new();
    for tuple in between.flat_map(|tuple| [*tuple, tuple.reversed()]) {
        let (mut data, mut element) = (Vec::new(), Vec::new());
        put(&mut data, 1, &key(&tuple));
        put(&mut element, 1 | NESTED, &data);
        put(&mut list, 1 | NESTED, &element);
    }
    if list.is_empty() {
        return Ok(());
    }
    let mut body = named(family, table);
    put_text(&mut body, 2, SET);
    put(&mut body, 3 | NESTED, &list);
    let (kind, flags) = if add { (MAKE_ELEMENTS, CREATE) } else { (DELETE_ELEMENTS, 0) };
    transact(std::iter::once(message(kind, flags | ACK, &body)))
}

/// What the rules of [`make_untracked`] read from a packet: addresses, ports and protocol, each filling its registers.
fn key(tuple: &Tuple) -> Vec<u8> {
    let octets = |addr: proxy_common::addr::Addr| match std::net::IpAddr::from(addr) {
        std::net::IpAddr::V4(v4) => v4.octets().to_vec(),
        std::net::IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    let mut key = [octets(tuple.src), octets(tuple.dst)].concat();
    key.extend(tuple.sport.number().to_be_bytes());
    key.extend(tuple.dport.number().to_be_bytes());
    key.extend([tuple.proto.0, 0, 0, 0]);
    key
}

/// The beginning of a body: the family and the table.
fn named(family: Family, table: &str) -> Vec<u8> {
    let mut body = header(family).to_vec();
    put_text(&mut body, 1, table);
    body
}

fn chain(family: Family, table: &str, (number, name): (u32, &str), priority: i32, kind: &str) -> Vec<u8> {
    /// `NFTA_CHAIN_HOOK`.
    const HOOK: u16 = 4 | NESTED;
    let mut hook = Vec::new();
    put(&mut hook, 1, &number.to_be_bytes());
    put(&mut hook, 2, &priority.to_be_bytes());
    let mut body = named(family, table);
    put_text(&mut body, 3, name);
    put(&mut body, HOOK, &hook);
    put_text(&mut body, 7, kind);
    message(MAKE_CHAIN, CREATE, &body)
}

fn rule(family: Family, table: &str, chain: &str, expressions: Vec<u8>, flags: u16) -> Vec<u8> {
    /// `NFTA_RULE_EXPRESSIONS`.
    const EXPRESSIONS: u16 = 4 | NESTED;
    let mut body = named(family, table);
    put_text(&mut body, 2, chain);
    put(&mut body, EXPRESSIONS, &expressions);
    message(MAKE_RULE, CREATE | flags, &body)
}

/// One expression of a rule, whose attributes are numbers.
fn expression(name: &str, numbers: &[(u16, u32)]) -> Vec<u8> {
    let mut data = Vec::new();
    numbers.iter().for_each(|(kind, number)| put(&mut data, *kind, &number.to_be_bytes()));
    expression_of(name, &data)
}

fn expression_of(name: &str, data: &[u8]) -> Vec<u8> {
    let (mut expression, mut element) = (Vec::new(), Vec::new());
    put_text(&mut expression, 1, name);
    put(&mut expression, 2 | NESTED, data);
    put(&mut element, 1 | NESTED, &expression);
    element
}
