//! Which chains the tables of iptables of old hold, read from the kernel without its programs.
//!
//! Such a table is one piece of memory: entries one after the other, and a chain of a user's own begins with an
//! entry whose target `ERROR` carries the chain's name (`linux/netfilter/x_tables.h`).

use std::io;
use std::os::fd::AsFd;

use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};

use crate::sys;
use agent_core::model::Family;

/// `IPT_SO_GET_INFO` and `IPT_SO_GET_ENTRIES`, the same for both families.
const GET_INFO: i32 = 64;
const GET_ENTRIES: i32 = 65;
/// `struct ipt_getinfo`, and where the size of all entries stands in it.
const INFO: usize = 84;
const SIZE_AT: usize = 80;
/// `struct ipt_get_entries` before the entries: name, size, padding.
const HEADER: usize = 40;
/// Room for the name of a table.
const TABLE_NAME: usize = 32;
/// `struct xt_entry_target` before what the target keeps, and where its name stands.
const TARGET: usize = 32;
const TARGET_NAME_AT: usize = 2;

/// Names of the user-defined chains of a table that is in use.
pub(super) fn chains(family: Family, table: &str) -> io::Result<Vec<String>> {
    let (domain, level, offsets_at) = match family {
        Family::V4 => (AddressFamily::Inet, libc::SOL_IP, 88),
        Family::V6 => (AddressFamily::Inet6, libc::SOL_IPV6, 140),
    };
    let asker = socket(domain, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Raw)?;
    let mut info = named(table, INFO)?;
    sys::socket_bytes(asker.as_fd(), level, GET_INFO, &mut info)?;
    let size = info.get(SIZE_AT..SIZE_AT + 4).unwrap_or_default();
    let length = u32::from_ne_bytes(size.try_into().unwrap_or_default()) as usize;
    let mut entries = named(table, HEADER + length)?;
    entries.get_mut(TABLE_NAME..TABLE_NAME + 4).unwrap_or_default().copy_from_slice(size);
    // A table that has changed in between is refused: then its size is another.
    sys::socket_bytes(asker.as_fd(), level, GET_ENTRIES, &mut entries)?;
    Ok(names(entries.get(HEADER..).unwrap_or_default(), offsets_at))
}

/// A request of this length that begins with the table's name.
fn named(table: &str, length: usize) -> io::Result<Vec<u8>> {
    let mut request = vec![0; length];
    let name = request.get_mut(..table.len()).filter(|name| name.len() < TABLE_NAME);
    name.ok_or(io::ErrorKind::InvalidInput)?.copy_from_slice(table.as_bytes());
    Ok(request)
}

/// The names in a table's entries; in each, the offsets of its target and of the next entry stand at `offsets_at`.
fn names(mut entries: &[u8], offsets_at: usize) -> Vec<String> {
    let number = |bytes: &[u8], at: usize| {
        let bytes = bytes.get(at..at + 2)?.try_into().ok()?;
        Some(usize::from(u16::from_ne_bytes(bytes)))
    };
    let text = |bytes: &[u8], at: usize| {
        let bytes = bytes.get(at..)?.split(|byte| *byte == 0).next()?;
        Some(String::from_utf8_lossy(bytes).into_owned())
    };
    let mut found = Vec::new();
    while let (Some(target), Some(next)) = (number(entries, offsets_at), number(entries, offsets_at + 2)) {
        // The table ends with an entry of that target, too, which is called like it.
        if text(entries, target + TARGET_NAME_AT).as_deref() == Some("ERROR") {
            found.extend(text(entries, target + TARGET).filter(|name| name != "ERROR"));
        }
        match entries.get(next..) {
            Some(rest) if next != 0 => entries = rest,
            _ => break,
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An entry of an IPv4 table with a target that keeps `text`.
    fn entry(target: &str, text: &str) -> Vec<u8> {
        let mut entry = vec![0; 112 + TARGET + 32];
        entry[88..90].copy_from_slice(&112_u16.to_ne_bytes());
        let next = entry.len() as u16;
        entry[90..92].copy_from_slice(&next.to_ne_bytes());
        entry[114..114 + target.len()].copy_from_slice(target.as_bytes());
        entry[144..144 + text.len()].copy_from_slice(text.as_bytes());
        entry
    }

    #[test]
    fn only_the_heads_of_chains_have_names() {
        let parts =
            [("", "x"), ("ERROR", "KUBE-SERVICES"), ("MARK", "y"), ("ERROR", "MINE"), ("ERROR", "ERROR")];
        let entries: Vec<u8> = parts.iter().flat_map(|(target, text)| entry(target, text)).collect();
        assert_eq!(names(&entries, 88), ["KUBE-SERVICES", "MINE"]);
        assert_eq!(names(&entries[..200], 88), Vec::<String>::new(), "cut off");
        assert_eq!(names(&[0; 300], 88), Vec::<String>::new(), "no way on");
    }

    #[test]
    fn a_name_that_is_too_long_is_no_table() {
        assert!(named(&"x".repeat(32), 84).is_err());
    }
}
