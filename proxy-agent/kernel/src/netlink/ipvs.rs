//! What IPVS mode of kube-proxy needs of the kernel, taken away: IP sets, virtual servers, an interface.

use std::io;

use super::nf_tables::{header, is_absent};
use super::request::{Flags, Protocol, attributes, exchange, put, put_text, text_of};
use agent_core::model::Family;

/// `NFNL_SUBSYS_IPSET`, in the upper byte of the kinds of message.
const SETS: u16 = 6 << 8;
const DESTROY_SET: u16 = SETS | 3;
const LIST_SETS: u16 = SETS | 7;
/// The protocol of sets that every kernel in use speaks.
const SET_PROTOCOL: [u8; 1] = [6];
/// `GENL_ID_CTRL`, `CTRL_CMD_GETFAMILY`, and the attributes of a family's id and name.
const CONTROL: u16 = 16;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;
/// `IPVS_CMD_FLUSH`.
const FLUSH: u8 = 17;
/// Length of `struct genlmsghdr`.
const GENERIC_HEADER: usize = 4;
/// `RTM_DELLINK`, the length of `struct ifinfomsg`, and `IFLA_IFNAME`.
const DELETE_LINK: u16 = 17;
const LINK_HEADER: usize = 16;
const LINK_NAME: u16 = 3;

/// The names of all IP sets; none where the kernel has no sets.
pub(crate) fn sets() -> io::Result<Vec<String>> {
    /// `IPSET_ATTR_FLAGS` with `IPSET_FLAG_LIST_SETNAME`: names without their members.
    const NAMES_ONLY: (u16, u32) = (6, 2);
    let mut body = header(Family::V4).to_vec();
    put(&mut body, 1, &SET_PROTOCOL);
    put(&mut body, NAMES_ONLY.0 | 0x4000, &NAMES_ONLY.1.to_be_bytes());
    let bodies = match exchange(Protocol::Netfilter, LIST_SETS, Flags::Dump, &body) {
        Err(error) if is_absent(&error) => return Ok(Vec::new()),
        answer => answer?,
    };
    let name = |body: &Vec<u8>| attributes(body, 4).find(|(kind, _)| *kind == 2).map(|(_, v)| text_of(v));
    Ok(bodies.iter().filter_map(name).collect())
}

/// Removes a set that no rule names.
pub(crate) fn destroy_set(name: &str) -> io::Result<()> {
    let mut body = header(Family::V4).to_vec();
    put(&mut body, 1, &SET_PROTOCOL);
    put_text(&mut body, 2, name);
    exchange(Protocol::Netfilter, DESTROY_SET, Flags::Ack, &body).map(drop)
}

/// Removes all virtual servers; a kernel without IPVS has none.
pub(crate) fn flush_virtual_servers() -> io::Result<()> {
    let mut body = generic(GET_FAMILY, 1);
    put_text(&mut body, FAMILY_NAME, "IPVS");
    let family = match exchange(Protocol::Generic, CONTROL, Flags::Ack, &body) {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(()),
        answer => answer?,
    };
    let id = family.iter().flat_map(|body| attributes(body, GENERIC_HEADER));
    let id = id.filter(|(kind, _)| *kind == FAMILY_ID).find_map(|(_, id)| id.try_into().ok());
    let id = u16::from_ne_bytes(id.ok_or(io::ErrorKind::InvalidData)?);
    exchange(Protocol::Generic, id, Flags::Ack, &generic(FLUSH, 1)).map(drop)
}

/// Removes an interface by its name.
pub(crate) fn delete_link(name: &str) -> io::Result<()> {
    let mut body = vec![0; LINK_HEADER];
    put_text(&mut body, LINK_NAME, name);
    exchange(Protocol::Route, DELETE_LINK, Flags::Ack, &body).map(drop)
}

fn generic(command: u8, version: u8) -> Vec<u8> {
    vec![command, version, 0, 0]
}
