//! The cookie of the network namespace we are in, by which socket hooks tell the host's sockets from pods'.
//!
//! A socket tells it since 5.14 (`SO_NETNS_COOKIE`). Programs can ask since 5.8: before 5.14 one is attached for an
//! instant, and tells what it sees of a socket of ours.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use aya_obj::generated::{bpf_attach_type, bpf_map_type, bpf_prog_type};

use crate::sys;
use crate::sys::instruction::{self, EXIT, Register, call, helper, move_register, set};

/// Sockets that may be noted while the program is attached: ours, and those of whoever shares its cgroup.
const NOTED: u32 = 1024;
/// Nobody is asked: to connect a datagram socket sends nothing. The port is that of `discard`.
const NOWHERE: [SocketAddr; 2] = [
    SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 9),
    SocketAddr::new(std::net::IpAddr::V6(Ipv6Addr::LOCALHOST), 9),
];

/// The cookie of this thread's network namespace; `None` when neither way tells it.
#[must_use]
pub fn cookie() -> Option<u64> {
    by_option().or_else(by_program)
}

/// As a socket tells it (Linux 5.14; socket(7)).
#[must_use]
pub fn by_option() -> Option<u64> {
    let socket = socket()?;
    sys::socket_u64(socket.as_fd(), libc::SOL_SOCKET, libc::SO_NETNS_COOKIE).ok()
}

/// As a program tells it (Linux 5.8). The program lets every call pass, and is gone when this returns.
#[must_use]
pub fn by_program() -> Option<u64> {
    super::raise_memlock();
    let mount = super::cgroup2_mount()?;
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let mut cgroups: Vec<PathBuf> = own_cgroup(&own, &mount).into_iter().collect();
    // Sockets of a process that version 1 classifies belong to no other (before 5.15).
    cgroups.push(mount);
    cgroups.iter().find_map(|cgroup| seen_in(cgroup).ok().flatten())
}

/// A socket that is bound to no address: loopback may be down.
fn socket() -> Option<UdpSocket> {
    UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).or_else(|_| UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))).ok()
}

/// The cgroup of this process (cgroups(7): `0::/path`), as far as it can be seen below this mount.
fn own_cgroup(text: &str, mount: &Path) -> Option<PathBuf> {
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let below = mount.join(path);
    (!path.is_empty() && below.is_dir()).then_some(below)
}

/// What a program on the sockets of this cgroup sees of ours; nothing when ours is not among them.
fn seen_in(cgroup: &Path) -> io::Result<Option<u64>> {
    let Some(socket) = socket() else { return Ok(None) };
    let to = if socket.local_addr()?.is_ipv4() { NOWHERE[0] } else { NOWHERE[1] };
    let hook = if to.is_ipv4() {
        bpf_attach_type::BPF_CGROUP_INET4_CONNECT
    } else {
        bpf_attach_type::BPF_CGROUP_INET6_CONNECT
    };
    let noted = sys::map_create(bpf_map_type::BPF_MAP_TYPE_HASH, size_of::<u64>(), size_of::<u64>(), NOTED)?;
    let program = note_cookies(noted.as_fd(), hook)?;
    let cgroup = fs::File::open(cgroup)?;
    let link = sys::link_cgroup(program.as_fd(), cgroup.as_fd(), hook)?;
    // The program is asked before the way there is looked up: whether there is one does not matter.
    socket.connect(to).ok();
    drop(link);
    // Others in this cgroup may have connected meanwhile: each socket has an entry of its own.
    let own = sys::socket_u64(socket.as_fd(), libc::SOL_SOCKET, libc::SO_COOKIE)?;
    let mut cookie = [0_u64];
    let found = sys::lookup(noted.as_fd(), &own, &mut cookie)?;
    Ok(found.then_some(cookie[0]).filter(|cookie| *cookie != 0))
}

/// Notes each socket's own cookie and that of its network namespace.
fn note_cookies(map: BorrowedFd<'_>, hook: bpf_attach_type) -> io::Result<OwnedFd> {
    let (key, value) = (-8, -16);
    let [map_low, map_high] = instruction::map(Register::ARGUMENTS[0], map.as_raw_fd());
    let body = [
        // Calls leave nothing in the registers for arguments.
        move_register(Register::KEPT, Register::ARGUMENTS[0]),
        call(helper::GET_SOCKET_COOKIE),
        instruction::store(Register::FRAME, key, Register::RESULT),
        move_register(Register::ARGUMENTS[0], Register::KEPT),
        call(helper::GET_NETNS_COOKIE),
        instruction::store(Register::FRAME, value, Register::RESULT),
        map_low,
        map_high,
        move_register(Register::ARGUMENTS[1], Register::FRAME),
        instruction::add(Register::ARGUMENTS[1], i32::from(key)),
        move_register(Register::ARGUMENTS[2], Register::FRAME),
        instruction::add(Register::ARGUMENTS[2], i32::from(value)),
        set(Register::ARGUMENTS[3], 0),
        call(helper::MAP_UPDATE),
        // Let it pass.
        set(Register::RESULT, 1),
        EXIT,
    ];
    sys::program_load(bpf_prog_type::BPF_PROG_TYPE_CGROUP_SOCK_ADDR, Some(hook), 0, &body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_cgroup_is_the_one_of_version_two_below_the_mount() {
        let mount = tempfile::tempdir().unwrap();
        fs::create_dir_all(mount.path().join("kubepods/pod1")).unwrap();
        let found = own_cgroup("12:cpu:/x\n0::/kubepods/pod1\n", mount.path());
        assert_eq!(found, Some(mount.path().join("kubepods/pod1")));
        // In a namespace of cgroups the path may lead out of it, or be its root.
        assert_eq!(own_cgroup("0::/elsewhere\n", mount.path()), None);
        assert_eq!(own_cgroup("0::/\n", mount.path()), None);
        assert_eq!(own_cgroup("3:net_cls:/\n", mount.path()), None);
    }
}
