//! Sockets that call: of a node and of a pod, in a cgroup that carries the socket programs. What they send leaves by
//! one interface, whatever the destination, and is seen there.

use std::fs;
use std::io::{ErrorKind, Read as _};
use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use nix::sched::{CloneFlags, setns};
use proxy_agent::config::{Host as _, ThisHost};
use proxy_agent::datapath::load::Loaded;
use proxy_common::addr::Proto;
use proxy_tests::cgroup::Tree;
use proxy_tests::netns::Netns;
use proxy_tests::packet::View;
use socket2::{Domain, Protocol, Socket, Type};

use super::objects::{BRIDGE, UPLINK};
use super::oracle::Target;
use super::system::{Caller, Observed};

/// Everything is routed to one interface, loopback addresses included since `lo` has lost them; behind it nobody
/// forwards. Without ARP its frames are addressed to no machine.
const EVERYTHING_LEAVES: &str = "\
addr flush dev lo
link add name eth0 index UPLINK type veth peer name nowhere
link add name cni0 index BRIDGE type veth peer name nothing
link set eth0 arp off
link set nowhere up
addr add 192.0.2.1/32 dev eth0
addr add 2001:db8::1/128 dev eth0 nodad
link set eth0 up
route add default dev eth0
route add ::/0 dev eth0
";

/// Sockets of a node and a pod.
pub(crate) struct Sockets {
    host: Side,
    pod: Side,
    _cgroup: Inside,
}

/// A network namespace, and a packet socket that sees what leaves it.
struct Side {
    netns: Netns,
    cookie: u64,
    tap: Socket,
}

/// This process in a cgroup of its own, for as long as this lives.
struct Inside {
    _tree: Tree,
    home: PathBuf,
}

impl Inside {
    fn new(tree: Tree) -> Result<Self> {
        let own = fs::read_to_string("/proc/self/cgroup").context("asking for our cgroup")?;
        let path = own.lines().find_map(|line| line.strip_prefix("0::/")).context("we are in no cgroup2")?;
        let home = proxy_tests::require::cgroup2()?.join(path).join("cgroup.procs");
        fs::write(tree.root().join("cgroup.procs"), "0").context("entering a cgroup")?;
        Ok(Self { _tree: tree, home })
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        // The tree kills who is still in it.
        fs::write(&self.home, "0").expect("the way back to our cgroup");
    }
}

impl Side {
    fn new(label: &str) -> Result<Self> {
        let netns = Netns::new(label)?;
        let cookie = netns.run_in(|| ThisHost.netns_cookie())?;
        let numbers = [("UPLINK", UPLINK), ("BRIDGE", BRIDGE)];
        netns.ip(&numbers.iter().fold(EVERYTHING_LEAVES.to_owned(), |batch, (name, index)| {
            batch.replace(name, &index.to_string())
        }))?;
        let all = i32::from((libc::ETH_P_ALL as u16).to_be());
        let open = || Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(all)));
        let tap = netns.run_in(open)?.context("opening a packet socket")?;
        tap.set_nonblocking(true)?;
        Ok(Self { netns, cookie, tap })
    }

    /// The next packet that has left: its protocol, source port and destination.
    fn next(&self) -> Option<(u8, u16, Target)> {
        loop {
            let mut bytes = [0; 2048];
            match (&self.tap).read(&mut bytes) {
                Ok(length) => {
                    if let Ok(view) = View::ethernet(&bytes[..length])
                        && let Some((source, destination)) = view.ports
                    {
                        return Some((view.protocol, source, (view.destination, destination)));
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return None,
                Err(error) => panic!("reading from a packet socket: {error}"),
            }
        }
    }
}

impl Sockets {
    /// Attaches the socket programs to a cgroup of this process, which is in the node's network namespace from
    /// now on as far as this thread goes.
    pub(crate) fn new(programs: &mut Loaded) -> Result<Self> {
        let (host, pod) = (Side::new("host")?, Side::new("pod")?);
        let tree = Tree::new(&proxy_tests::unique())?;
        programs.attach_cgroup(tree.root())?;
        setns(host.netns.file().as_fd(), CloneFlags::CLONE_NEWNET).context("entering the node")?;
        Ok(Self { host, pod, _cgroup: Inside::new(tree)? })
    }

    /// Cookie of the node's network namespace.
    pub(crate) fn host_netns(&self) -> u64 {
        self.host.cookie
    }

    /// One call of a new socket. SCTP sockets are not made (Z-14).
    pub(crate) fn call(&self, to: Target, proto: Proto, who: Caller, connect: bool) -> Option<Observed> {
        let side = if who == Caller::Host { &self.host } else { &self.pod };
        let kind = match proto {
            Proto::TCP => Type::STREAM,
            Proto::UDP => Type::DGRAM,
            _ => return None,
        };
        let socket = self.socket(side, Domain::for_address(to.into()), kind);
        while side.next().is_some() {}
        let address = SocketAddr::from(to).into();
        let done = match (proto, connect) {
            (Proto::UDP, false) => socket.send_to(b"hello", &address).map(drop),
            (Proto::UDP, true) => socket.connect(&address).and_then(|()| socket.send(b"hello").map(drop)),
            _ => socket.connect(&address),
        };
        match done.as_ref().err().and_then(std::io::Error::raw_os_error) {
            None if done.is_ok() => {}
            Some(libc::EINPROGRESS) => {}
            Some(libc::ECONNREFUSED) => return Some(Observed::Refuse),
            Some(libc::EPERM) => return Some(Observed::Drop),
            _ => panic!("{who:?} to {to:?}: {done:?}"),
        }
        let own = socket.local_addr().ok().and_then(|own| own.as_socket()).expect("an address of its own");
        let (_, _, there) = std::iter::from_fn(|| side.next())
            .find(|(its, source, _)| (*its, *source) == (proto.0, own.port()))
            .unwrap_or_else(|| panic!("{who:?} to {to:?}: nothing has left"));
        if proto == Proto::UDP && connect {
            // D-1, V-3: the process sees whom it has called.
            let peer = socket.peer_addr().ok().and_then(|peer| peer.as_socket());
            assert_eq!(peer, Some(SocketAddr::from(to)), "{who:?} to {to:?}: its peer");
        }
        Some(if there == to { Observed::Pass } else { Observed::Forward(there, None) })
    }

    fn socket(&self, side: &Side, domain: Domain, kind: Type) -> Socket {
        let enter =
            |side: &Side| setns(side.netns.file().as_fd(), CloneFlags::CLONE_NEWNET).expect("a namespace");
        let elsewhere = !std::ptr::eq(side, &raw const self.host);
        if elsewhere {
            enter(side);
        }
        let socket = Socket::new(domain, kind.nonblocking(), None).expect("a socket");
        if elsewhere {
            enter(&self.host);
        }
        socket
    }
}
