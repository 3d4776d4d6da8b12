//! Connections that a kube-proxy's rules have led to an endpoint, and that netfilter goes on with: those of this node's own
//! processes, no packet of which passes a hook of ours before netfilter has rewritten it, and those of others that have not become
//! ours yet.
//!
//! It does so without rules, as long as somebody has a chain of type `nat`: a table of ours, which has nothing else, sees to that
//! until the last of these connections has ended.

use std::collections::HashSet;
use std::io;
use std::net::IpAddr;

use proxy_common::addr::Addr;

use crate::netlink::conntrack::{self, Status};
use crate::netlink::nf_make::make_nat;
use crate::netlink::nf_tables::{self, Delete};
use agent_core::model::Family;

use super::passing;

const TABLE: &str = "ebpf-proxy-nat";

/// Keeps netfilter rewriting if there is such a connection, and `rules` that are about to go or have gone, else no longer; how
/// many there are. Of those that are not the node's own there are `others`.
pub(super) fn keep(rules: bool, others: usize) -> io::Result<usize> {
    if !rules && !is_there(Family::V4)? && !is_there(Family::V6)? {
        return Ok(0);
    }
    let own = own_addresses()?;
    let mut count = others;
    conntrack::connections(|connection| {
        let of_node = connection.asked.src.is_loopback() || own.contains(&connection.asked.src);
        count += usize::from(of_node && connection.is_rewritten());
    })?;
    for family in [Family::V4, Family::V6] {
        match (count != 0, is_there(family)?) {
            (true, false) => make_nat(family, TABLE)?,
            (false, true) => nf_tables::delete(family, &[Delete::Table(TABLE.to_owned())])?,
            _ => {}
        }
    }
    Ok(count)
}

/// How many connections IPVS leads, which it tells nobody but by their answers.
pub(super) fn led_by_ipvs() -> io::Result<usize> {
    let mut count = 0;
    conntrack::connections(|connection| {
        count += usize::from(connection.is_rewritten() && !connection.status.contains(Status::DstNat));
    })?;
    Ok(count)
}

/// Takes the tables away, and that of connections that are just being taken over: what still relies on them ends. Whether there were any.
pub fn remove() -> io::Result<bool> {
    let mut any = passing::end_all()?;
    for family in [Family::V4, Family::V6] {
        if is_there(family)? {
            nf_tables::delete(family, &[Delete::Table(TABLE.to_owned())])?;
            any = true;
        }
    }
    Ok(any)
}

/// Whether a table is missing that was there; one that cannot be looked for is not.
pub(super) fn has_gone() -> bool {
    [Family::V4, Family::V6].into_iter().any(|family| matches!(is_there(family), Ok(false)))
}

fn is_there(family: Family) -> io::Result<bool> {
    Ok(nf_tables::tables(family)?.iter().any(|name| name == TABLE))
}

fn own_addresses() -> io::Result<HashSet<Addr>> {
    let addresses = nix::ifaddrs::getifaddrs().map_err(io::Error::from)?.filter_map(|one| {
        let address = one.address?;
        let v4 = address.as_sockaddr_in().map(|v4| IpAddr::from(v4.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|v6| v6.ip().into()))
    });
    Ok(addresses.map(Addr::from).collect())
}
