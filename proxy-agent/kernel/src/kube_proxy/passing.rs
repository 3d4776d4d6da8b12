//! Packets that are in nobody's hands for a moment: while a connection passes from netfilter to us, those between its client and
//! its endpoint are not tracked, so that neither the entry that goes nor the one that comes is in their way.

use std::io;

use proxy_common::abi::Tuple;

use crate::netlink::nf_make::{change_untracked, make_untracked};
use crate::netlink::nf_tables::{self, Delete};
use agent_core::model::Family;

/// The table, which is there while connections are taken over.
const TABLE: &str = "ebpf-proxy-takeover";

/// Has packets between these ends tracked no longer.
pub fn begin<'a>(between: impl Iterator<Item = &'a Tuple> + Clone) -> io::Result<()> {
    each(between, |family, some| {
        if !is_there(family)? {
            make_untracked(family, TABLE)?;
        }
        change_untracked(family, TABLE, some.iter().copied(), true)
    })
}

/// Has them tracked again.
pub fn end<'a>(between: impl Iterator<Item = &'a Tuple> + Clone) -> io::Result<()> {
    each(between, |family, some| change_untracked(family, TABLE, some.iter().copied(), false))
}

/// Whether somebody has begun with it and not ended.
pub fn is_begun() -> io::Result<bool> {
    Ok(is_there(Family::V4)? || is_there(Family::V6)?)
}

/// Everything is tracked again; whether anything was not.
pub fn end_all() -> io::Result<bool> {
    let mut any = false;
    for family in [Family::V4, Family::V6] {
        if is_there(family)? {
            nf_tables::delete(family, &[Delete::Table(TABLE.to_owned())])?;
            any = true;
        }
    }
    Ok(any)
}

fn is_there(family: Family) -> io::Result<bool> {
    Ok(nf_tables::tables(family)?.iter().any(|name| name == TABLE))
}

/// Does it for each family that there are any of.
fn each<'a>(
    between: impl Iterator<Item = &'a Tuple> + Clone,
    change: impl Fn(Family, &[&'a Tuple]) -> io::Result<()>,
) -> io::Result<()> {
    for (family, v4) in [(Family::V4, true), (Family::V6, false)] {
        let some: Vec<&Tuple> = between.clone().filter(|tuple| tuple.src.is_v4() == v4).collect();
        if !some.is_empty() {
            change(family, &some)?;
        }
    }
    Ok(())
}
