//! Sockets that call: of a node and of a pod, in a cgroup that carries the socket programs. What they send leaves by
//! one interface, whatever the destination, and is seen there.

use std::fs;
use std::io::{ErrorKind, Read as _};
use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::path::PathBuf;

use agent_kernel::datapath::load::Loaded;
use anyhow::{Context as _, Result};
use nix::sched::{CloneFlags, setns};
use proxy_agent::config::{Host as _, ThisHost};
use proxy_common::addr::Proto;
use proxy_tests::cgroup::Tree;
use proxy_tests::netns::Netns;
use proxy_tests::packet::View;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::objects::{BRIDGE, UPLINK};
use super::oracle::Target;
use super::system::{Caller, Observed};

/// Everything is routed to one interface, loopback addresses included since `lo` has lost them; behind it nobody
/// forwards. Without ARP its frames are addressed to no machine.
const EVERYTHING_LEAVES: &str = "\
addr flush dev lo
link add name eth0 index UPLINK address MACHINE type veth peer name nowhere
link add name cni0 index BRIDGE address MACHINE type veth peer name nothing
link set eth0 arp off
link set nowhere up
addr add 192.0.2.1/32 dev eth0
addr add 2001:db8::1/128 dev eth0 nodad
link set eth0 up
route add default dev eth0
route add ::/0 dev eth0
";

/// Whom the frames of `proxy_common::testing` are addressed to.
const MACHINE: &str = "02:00:00:00:00:01";

/// The addresses of that interface.
const ADDRESSES: [&str; 2] = ["192.0.2.1", "2001:db8::1"];

/// Sockets of a node and a pod.
pub(crate) struct Sockets {
    host: Side,
    pod: Side,
    kept: Vec<(Caller, Socket)>,
    _cgroup: Inside,
}

/// A network namespace, and a packet socket that sees what leaves it.
struct Side {
    netns: Netns,
    cookie: u64,
    tap: Socket,
}

/// A packet that has left.
#[derive(Debug)]
struct Left {
    proto: u8,
    from: Target,
    to: Target,
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
        netns.ip(&numbers
            .iter()
            .fold(EVERYTHING_LEAVES.to_owned(), |batch, (name, index)| {
                batch.replace(name, &index.to_string())
            })
            .replace("MACHINE", MACHINE))?;
        let all = i32::from((libc::ETH_P_ALL as u16).to_be());
        let open = || Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(all)));
        let tap = netns.run_in(open)?.context("opening a packet socket")?;
        tap.set_nonblocking(true)?;
        Ok(Self { netns, cookie, tap })
    }

    /// The next packet that has left.
    fn next(&self) -> Option<Left> {
        loop {
            let mut bytes = [0; 2048];
            match (&self.tap).read(&mut bytes) {
                Ok(length) => {
                    if let Ok(view) = View::ethernet(&bytes[..length])
                        && let Some((source, destination)) = view.ports
                    {
                        let (from, to) = ((view.source, source), (view.destination, destination));
                        return Some(Left { proto: view.protocol, from, to });
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
        Ok(Self { host, pod, kept: Vec::new(), _cgroup: Inside::new(tree)? })
    }

    /// Cookie of the node's network namespace.
    pub(crate) fn host_netns(&self) -> u64 {
        self.host.cookie
    }

    /// One call of a new socket. SCTP sockets are not made (Z-14).
    pub(crate) fn call(&self, to: Target, proto: Proto, who: Caller, connect: bool) -> Option<Observed> {
        let kind = match proto {
            Proto::TCP => Type::STREAM,
            Proto::UDP => Type::DGRAM,
            _ => return None,
        };
        let socket = self.socket(who, Domain::for_address(to.into()), kind);
        let seen = self.observe(&socket, to, proto, who, |address| match (proto, connect) {
            (Proto::UDP, false) => socket.send_to(b"hello", address).map(drop),
            (Proto::UDP, true) => socket.connect(address).and_then(|()| socket.send(b"hello").map(drop)),
            _ => socket.connect(address),
        });
        if proto == Proto::UDP && connect && matches!(seen, Observed::Pass | Observed::Forward(..)) {
            // D-1, V-3: the process sees whom it has called.
            let peer = socket.peer_addr().ok().and_then(|peer| peer.as_socket());
            assert_eq!(peer, Some(SocketAddr::from(to)), "{who:?} to {to:?}: its peer");
        }
        Some(seen)
    }

    /// A UDP socket that is kept: its number.
    pub(crate) fn keep(&mut self, who: Caller, six: bool) -> usize {
        let socket = self.socket(who, if six { Domain::IPV6 } else { Domain::IPV4 }, Type::DGRAM);
        self.kept.push((who, socket));
        self.kept.len() - 1
    }

    /// A datagram of a kept socket.
    pub(crate) fn send(&self, number: usize, to: Target) -> Observed {
        let (who, socket) = &self.kept[number];
        self.observe(socket, to, Proto::UDP, *who, |address| socket.send_to(b"hello", address).map(drop))
    }

    /// Closes the kept sockets.
    pub(crate) fn close(&mut self) {
        self.kept.clear();
    }

    /// What a call comes to: an error, or a packet that leaves.
    fn observe(
        &self,
        socket: &Socket,
        to: Target,
        proto: Proto,
        who: Caller,
        call: impl FnOnce(&SockAddr) -> std::io::Result<()>,
    ) -> Observed {
        let side = self.side(who);
        while side.next().is_some() {}
        let done = call(&SocketAddr::from(to).into());
        match done.as_ref().err().map(std::io::Error::raw_os_error) {
            None | Some(Some(libc::EINPROGRESS)) => {}
            Some(Some(libc::ECONNREFUSED)) => return Observed::Refuse,
            Some(Some(libc::EPERM)) => return Observed::Drop,
            _ => panic!("{who:?} to {to:?}: {done:?}"),
        }
        let own = socket.local_addr().ok().and_then(|own| own.as_socket()).expect("an address of its own");
        let left = std::iter::from_fn(|| side.next())
            .find(|left| (left.proto, left.from.1) == (proto.0, own.port()))
            .unwrap_or_else(|| panic!("{who:?} to {to:?}: nothing has left"));
        if left.to == to {
            return Observed::Pass;
        }
        // D-11: translated before the way is chosen, so the source fits the way.
        assert!(ADDRESSES.contains(&left.from.0.to_string().as_str()), "{who:?} to {to:?}: {left:?}");
        Observed::Forward(left.to, None)
    }

    fn side(&self, who: Caller) -> &Side {
        match who {
            Caller::Host => &self.host,
            Caller::Pod => &self.pod,
        }
    }

    fn socket(&self, who: Caller, domain: Domain, kind: Type) -> Socket {
        let enter = |who: Caller| {
            setns(self.side(who).netns.file().as_fd(), CloneFlags::CLONE_NEWNET).expect("a namespace");
        };
        if who == Caller::Pod {
            enter(Caller::Pod);
        }
        let socket = Socket::new(domain, kind.nonblocking(), None).expect("a socket");
        if who == Caller::Pod {
            enter(Caller::Host);
        }
        socket
    }
}
