//! Connected UDP sockets of host processes: which of them came through a Service, and how one is led on when its
//! endpoint has gone.
//!
//! Such a socket is translated once, at `connect`, and no packet of the host passes a program that could do more. So
//! it would talk to nobody for ever. Its process is not asked: a second descriptor of the socket is taken from it
//! (`pidfd_getfd`) and connected to the Service again. That runs the hooks as the first `connect` did, keeps the
//! socket's port, and goes unseen. Where it cannot be done (the process is not in sight, or its memory is protected
//! from us) the socket is destroyed: its process gets `ECONNABORTED`, once, and then `EDESTADDRREQ` until it connects
//! again. Which sockets came through a Service is in their own storage, read by an iterator (`abi::SocketState`).
//! TCP connections are left alone here (C-1); see `streams`.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read as _};
use std::mem::offset_of;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use aya_obj::btf::{Btf, BtfError, BtfKind};
use nix::sys::socket::{SockaddrStorage, connect, getpeername};
use proxy_common::abi::{Config, SocketEntry, SocketState, Tuple, config, maps};
use proxy_common::addr::{Addr, Port, Proto};

use crate::datapath::store::pin::BpfRoot;
use crate::datapath::store::table::Table;
use crate::netlink::sock_diag::{UdpSocket, connected_udp};
use crate::sys;
use crate::sys::instruction::{DOUBLE, EXIT, Register, call, helper, load, set, skip_if_null};

/// The kernel's function that lists socket storage.
const LISTS_STORAGE: &str = "bpf_iter_bpf_sk_storage_map";
/// Writes to the reader each value whose cookie is not zero. The context holds four pointers:
/// `meta` (of which the first word is the file), the map, the socket, the value.
const WRITE_VALUES: [u64; 10] = [
    load(DOUBLE, Register::ARGUMENTS[1], Register::ARGUMENTS[0], 24),
    skip_if_null(Register::ARGUMENTS[1], 6),
    load(DOUBLE, Register::ARGUMENTS[2], Register::ARGUMENTS[1], offset_of!(SocketState, cookie) as i16),
    skip_if_null(Register::ARGUMENTS[2], 4),
    load(DOUBLE, Register::ARGUMENTS[0], Register::ARGUMENTS[0], 0),
    load(DOUBLE, Register::ARGUMENTS[0], Register::ARGUMENTS[0], 0),
    set(Register::ARGUMENTS[2], size_of::<SocketState>() as u32),
    call(helper::SEQ_WRITE),
    set(Register::RESULT, 0),
    EXIT,
];

/// Why sockets could not be looked through, led on or destroyed.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Their storage cannot be read.
    #[error("cannot read what sockets remember of their Services ({act})")]
    Storage {
        /// What was tried.
        act: &'static str,
        source: io::Error,
    },
    /// The kernel does not describe itself.
    #[error(
        "cannot read the kernel's types (CONFIG_DEBUG_INFO_BTF): which sockets came through a Service is not known"
    )]
    Types(#[from] BtfError),
    /// The list cannot be read.
    #[error("cannot list connected UDP sockets (CONFIG_INET_UDP_DIAG, module udp_diag)")]
    List(#[source] io::Error),
    /// A socket refused to go.
    #[error(
        "cannot destroy a socket connected to {endpoint}, which is gone: restart its process \
         (the kernel needs CONFIG_INET_DIAG_DESTROY, the agent CAP_NET_ADMIN)"
    )]
    Destroy {
        /// Where it is connected to.
        endpoint: SocketAddr,
        source: io::Error,
    },
}

/// A connected UDP socket of this network namespace that came through a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connected {
    /// What it remembers of that.
    pub entry: SocketEntry,
    socket: UdpSocket,
}

/// What became of sockets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LedOn {
    /// They are connected to another endpoint.
    pub moved: usize,
    /// They are destroyed.
    pub destroyed: usize,
    /// The Service takes none at the moment, or their process was quicker.
    pub left: usize,
}

/// The way to what sockets remember.
#[derive(Debug)]
pub struct Storage {
    link: OwnedFd,
}

impl Storage {
    /// Opens the way to what is pinned under `root`.
    pub fn open(root: &BpfRoot) -> Result<Self, SocketError> {
        Self::open_with(root, &WRITE_VALUES)
    }

    /// The same with a program that writes something else of each socket.
    pub(crate) fn open_with(root: &BpfRoot, program: &[u64]) -> Result<Self, SocketError> {
        let failed = |act| move |source| SocketError::Storage { act, source };
        let map = sys::obj_get(&root.map(maps::SOCKETS)).map_err(failed("opening the map"))?;
        Self::over(map.as_fd(), program)
    }

    /// The same over a map.
    pub(crate) fn over(map: BorrowedFd<'_>, program: &[u64]) -> Result<Self, SocketError> {
        let failed = |act| move |source| SocketError::Storage { act, source };
        let function = Btf::from_sys_fs()?.id_by_type_name_kind(LISTS_STORAGE, BtfKind::Func)?;
        let program =
            sys::iterator_load(function, program).map_err(failed("loading an iterator, Linux 5.9"))?;
        let link = sys::link_iterator(program.as_fd(), map).map_err(failed("attaching an iterator"))?;
        Ok(Self { link })
    }

    /// What the program has written.
    pub(crate) fn read(&self) -> Result<Vec<u8>, SocketError> {
        let mut bytes = Vec::new();
        sys::iterate(self.link.as_fd())
            .and_then(|mut file| file.read_to_end(&mut bytes))
            .map_err(|source| SocketError::Storage { act: "reading", source })?;
        Ok(bytes)
    }

    /// All sockets of the node that are connected over UDP through a Service.
    pub fn connected(&self) -> Result<Vec<Connected>, SocketError> {
        let bytes = self.read()?;
        let remembered: BTreeMap<u64, SocketState> =
            sys::values::<SocketState>(&bytes).into_iter().map(|state| (state.cookie, state)).collect();
        if remembered.is_empty() {
            return Ok(Vec::new());
        }
        let listed = connected_udp().map_err(SocketError::List)?.into_iter();
        Ok(listed
            .filter_map(|socket| {
                let state = remembered.get(&socket.cookie())?;
                let entry = *state.entries.iter().find(|entry| leads_to(entry, socket.peer()))?;
                Some(Connected { entry, socket })
            })
            .collect())
    }
}

fn leads_to(entry: &SocketEntry, peer: SocketAddr) -> bool {
    entry.backend != 0
        && entry.proto == Proto::UDP
        && entry.port.number() == peer.port()
        && IpAddr::from(entry.addr) == peer.ip()
}

/// Sockets of this network namespace that are connected to a Service itself: their `connect` was before programs of ours were
/// there, and somebody else leads their packets, or nobody.
pub fn untranslated(is_service: impl Fn(Addr, Port) -> bool) -> Result<Vec<Connected>, SocketError> {
    let to_service = |socket: UdpSocket| {
        let (vip, vport) = (Addr::from(socket.peer().ip()), Port::new(socket.peer().port()));
        is_service(vip, vport).then_some(Connected {
            entry: SocketEntry {
                vip,
                addr: vip,
                vport,
                port: vport,
                backend: 0,
                generation: 0,
                proto: Proto::UDP,
                pad: [0; 3],
            },
            socket,
        })
    };
    let listed = connected_udp().map_err(SocketError::List)?;
    Ok(listed.into_iter().filter_map(to_service).collect())
}

/// Has sockets go through our programs from now on, as [`lead_on`] does; those that there is no way to stay as they are. One answer
/// for each: whether it has been done.
#[must_use]
pub fn lead_in(sockets: &[Connected], proc: &Path) -> Vec<bool> {
    let owners = owners(proc, |inode| sockets.iter().any(|socket| socket.socket.inode == inode));
    let owners = |socket: &Connected| owners.get(&socket.socket.inode).map_or(&[][..], Vec::as_slice);
    sockets.iter().map(|socket| matches!(socket.reconnect(owners(socket)), Some(Ok(())))).collect()
}

/// Where what is new is left to another proxy, connects all sockets that came through a Service of what is pinned under `root` to
/// that Service again, so that they are the other proxy's; how many. Those that there is no way to stay with their endpoint.
pub fn give_back(root: &BpfRoot, proc: &Path) -> Result<usize, SocketError> {
    let config = Table::<u32, Config>::open(root, maps::CONFIG).and_then(|table| table.get(&0));
    // Without settings nothing is translated.
    if !config.is_ok_and(|config| config.is_some_and(|config| config.flags & config::LEAVE_NEW != 0)) {
        return Ok(0);
    }
    let sockets = Storage::open(root)?.connected()?;
    Ok(lead_in(&sockets, proc).into_iter().filter(|done| *done).count())
}

/// Leads sockets on to another endpoint of the Services that they came through; their processes are looked for in
/// the `/proc` that is mounted at `proc`.
pub fn lead_on(sockets: &[Connected], proc: &Path) -> Result<LedOn, SocketError> {
    let (mut done, mut failure) = (LedOn::default(), None);
    if sockets.is_empty() {
        return Ok(done);
    }
    let owners = owners(proc, |inode| sockets.iter().any(|socket| socket.socket.inode == inode));
    for socket in sockets {
        match socket.reconnect(owners.get(&socket.socket.inode).map_or(&[], Vec::as_slice)) {
            Some(Ok(())) => done.moved += 1,
            Some(Err(error)) => {
                tracing::debug!("a UDP socket stays connected to {}: {error}", socket.socket.peer());
                done.left += 1;
            }
            None => match socket.destroy() {
                Ok(()) => done.destroyed += 1,
                Err(error) => drop(failure.get_or_insert(error)),
            },
        }
    }
    failure.map_or(Ok(done), Err)
}

impl Connected {
    /// The address that its process named.
    #[must_use]
    pub fn named(&self) -> SocketAddr {
        SocketAddr::new(IpAddr::from(self.entry.vip), self.entry.vport.number())
    }

    /// What the kernel knows it by, as long as it is there.
    #[must_use]
    pub fn cookie(&self) -> u64 {
        self.socket.cookie()
    }

    /// From its own end to what its process named.
    #[must_use]
    pub fn asks(&self) -> Tuple {
        let SocketEntry { vip, vport, .. } = self.entry;
        let local = self.socket.local();
        Tuple::new(Addr::from(local.ip()), Port::new(local.port()), vip, vport, Proto::UDP)
    }

    /// Connects it again through one of its owners' descriptors; `None` when there is no way to it.
    fn reconnect(&self, owners: &[(i32, RawFd)]) -> Option<io::Result<()>> {
        let own = owners.iter().find_map(|(process, descriptor)| {
            let own = sys::descriptor_of(*process, *descriptor).ok()?;
            // The number may stand for something else by now.
            let cookie = sys::socket_u64(own.as_fd(), libc::SOL_SOCKET, libc::SO_COOKIE).ok()?;
            (cookie == self.socket.cookie()).then_some(own)
        })?;
        // Its process may have connected it elsewhere.
        let named = self.named();
        let mapped = match named.ip() {
            IpAddr::V4(ip) if self.socket.is_v6() => {
                SocketAddr::new(ip.to_ipv6_mapped().into(), named.port())
            }
            _ => named,
        };
        match getpeername::<SockaddrStorage>(own.as_raw_fd()) {
            Ok(peer) if socket_addr(&peer) == Some(mapped) => {}
            _ => return Some(Err(io::ErrorKind::NotConnected.into())),
        }
        Some(connect(own.as_raw_fd(), &SockaddrStorage::from(mapped)).map_err(io::Error::from))
    }

    fn destroy(&self) -> Result<(), SocketError> {
        let destroyed = self.socket.destroy().map(drop);
        destroyed.map_err(|source| SocketError::Destroy { endpoint: self.socket.peer(), source })
    }
}

fn socket_addr(address: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = address.as_sockaddr_in().map(|v4| SocketAddr::new(v4.ip().into(), v4.port()));
    v4.or_else(|| address.as_sockaddr_in6().map(|v6| SocketAddr::new(v6.ip().into(), v6.port())))
}

/// Processes and their descriptors of the sockets with these inodes, as `/proc` at `proc` shows them.
fn owners(proc: &Path, wanted: impl Fn(u32) -> bool) -> BTreeMap<u32, Vec<(i32, RawFd)>> {
    let numbers = |directory: PathBuf| {
        let entries = fs::read_dir(directory).into_iter().flatten().flatten();
        entries.filter_map(|entry| Some((entry.file_name().to_str()?.parse::<i32>().ok()?, entry.path())))
    };
    let mut owners: BTreeMap<u32, Vec<(i32, RawFd)>> = BTreeMap::new();
    for (process, path) in numbers(proc.to_owned()) {
        for (descriptor, path) in numbers(path.join("fd")) {
            let inode = fs::read_link(path)
                .ok()
                .and_then(|link| link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok());
            if let Some(inode) = inode.filter(|inode| wanted(*inode)) {
                owners.entry(inode).or_default().push((process, descriptor));
            }
        }
    }
    owners
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn owners_of_a_socket_are_found_among_processes() {
        let proc = tempfile::tempdir().unwrap();
        for (process, descriptor, what) in [
            ("1", "0", "/dev/null"),
            ("12", "5", "socket:[77]"),
            ("13", "9", "socket:[77]"),
            ("13", "3", "socket:[78]"),
        ] {
            let directory = proc.path().join(process).join("fd");
            fs::create_dir_all(&directory).unwrap();
            symlink(what, directory.join(descriptor)).unwrap();
        }
        fs::create_dir(proc.path().join("sys")).unwrap();
        let mut found = owners(proc.path(), |inode| inode == 77).remove(&77).unwrap();
        found.sort_unstable();
        assert_eq!(found, [(12, 5), (13, 9)]);
    }
}
