//! What agents ask each other, and the table that follows from it: the wrapped bytes on a wire, answers, ways, and TUNNELS.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use agent_core::model::tunnels::Way;
use agent_kernel::datapath::tables::tunnels::{Brought, Tunnels};
use agent_kernel::netlink::{WayError, way};
use agent_kernel::tunnel::{Heard, LENGTH, Listener, Probe, Wrapper, wrapped};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::socket::{MsgFlags, recv};
use proxy_common::abi::tunnel::{READY, V4, V6};
use proxy_common::abi::{Tunnel, TunnelKey, maps};
use socket2::{Domain, Protocol, Socket, Type};

use super::{Room, addr, ip};

const PORT: u16 = 10_261;

fn ip_of(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// Another machine behind a cable: a network namespace of the test's own, with no name.
struct Peer(std::fs::File);

impl Peer {
    /// This thread's end is 10.9.0.1 and fd09::1, the other one's 10.9.0.2 and fd09::2.
    fn new(room: &Room) -> Self {
        let own = std::fs::File::open("/proc/thread-self/ns/net").unwrap();
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let other = std::fs::File::open("/proc/thread-self/ns/net").unwrap();
        setns(&own, CloneFlags::CLONE_NEWNET).unwrap();
        room.veth("wire0", "wire1");
        let address = |family: &str, address: &str, device: &str| {
            let mut all = vec![family, "address", "add", address, "dev", device];
            // Nobody else could have it, and what is tentative is no source.
            all.extend((family == "-6").then_some("nodad"));
            ip(&all);
        };
        address("-4", "10.9.0.1/24", "wire0");
        address("-6", "fd09::1/64", "wire0");
        // By this path `ip` finds a namespace that has no name.
        let there = format!("/proc/{}/fd/{}", std::process::id(), other.as_raw_fd());
        ip(&["link", "set", "wire1", "netns", &there]);
        let peer = Self(other);
        peer.inside(|| {
            ip(&["link", "set", "wire1", "up"]);
            address("-4", "10.9.0.2/24", "wire1");
            address("-6", "fd09::2/64", "wire1");
        });
        peer
    }

    /// Does something on the other machine.
    fn inside<T>(&self, work: impl FnOnce() -> T) -> T {
        let own = std::fs::File::open("/proc/thread-self/ns/net").unwrap();
        setns(&self.0, CloneFlags::CLONE_NEWNET).unwrap();
        let done = work();
        setns(&own, CloneFlags::CLONE_NEWNET).unwrap();
        done
    }
}

/// The next packet of a protocol that comes in, without its IPv6 header, with its IPv4 header.
fn next_packet(socket: &Socket) -> Vec<u8> {
    let mut room = [0; 512];
    let length = recv(socket.as_raw_fd(), &mut room, MsgFlags::empty()).expect("a wrapped packet");
    room[..length].to_vec()
}

#[test]
fn a_question_is_wrapped_on_the_wire_between_the_two_nodes_own_addresses() {
    let room = Room::new();
    let peer = Peer::new(&room);
    let raw = |domain, protocol: i32| {
        let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(protocol))).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        socket
    };
    let ears = peer.inside(|| [raw(Domain::IPV4, 4), raw(Domain::IPV6, 41)]);
    let wrapper = Wrapper::open(true).unwrap();
    let question = Probe::Question(0x0123_4567_89ab_cdef).bytes();
    for (to, ears, header) in [("10.9.0.2", &ears[0], 20), ("fd09::2", &ears[1], 0)] {
        let to = SocketAddr::new(ip_of(to), PORT);
        let found = way(to.ip()).unwrap();
        let packet = wrapped(found.from, PORT, to, &question).unwrap();
        wrapper.send(&packet, to.ip()).unwrap();
        let came = next_packet(ears);
        let inside = &packet[if to.is_ipv4() { 20 } else { 40 }..];
        assert_eq!(came[header..], *inside, "{to}");
        if to.is_ipv4() {
            assert_eq!((came[9], &came[12..20]), (4, &[10, 9, 0, 1, 10, 9, 0, 2][..]));
        }
        assert!(came.ends_with(&question));
    }
}

/// What unwrapping makes of a question is one that comes plainly: it is heard, and answered from the address that it was for.
#[test]
fn questions_are_heard_and_answered_from_the_address_that_was_asked() {
    let room = Room::new();
    let peer = Peer::new(&room);
    // An address that the routes would not choose.
    ip(&["address", "add", "10.9.0.9/24", "dev", "wire0"]);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let listener = runtime.block_on(async { Listener::open(PORT, true) }).unwrap();
    assert_eq!(listener.port(), PORT);
    for (own, asked) in [("10.9.0.2", "10.9.0.9"), ("fd09::2", "fd09::1")] {
        let asker = peer.inside(|| UdpSocket::bind(SocketAddr::new(ip_of(own), 0))).unwrap();
        asker.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let question = Probe::Question(7).bytes();
        asker.send_to(&question, SocketAddr::new(ip_of(asked), PORT)).unwrap();
        let heard = runtime.block_on(listener.hear()).unwrap();
        let from = asker.local_addr().unwrap();
        assert_eq!(heard, Heard { bytes: question.to_vec(), from, at: ip_of(asked) });
        listener.answer(&heard, &Probe::Answer(7).bytes()).unwrap();
        let mut bytes = [0; LENGTH + 1];
        let (length, by) = asker.recv_from(&mut bytes).unwrap();
        assert_eq!(
            (Probe::read(&bytes[..length]), by),
            (Some(Probe::Answer(7)), SocketAddr::new(ip_of(asked), PORT))
        );
        // A question may be longer, as long as its way allows; an answer may not.
        for (bytes, read) in [(question, Some(Probe::Question(7))), (Probe::Answer(7).bytes(), None)] {
            asker.send_to(&[&bytes[..], &[0; 1000]].concat(), SocketAddr::new(ip_of(asked), PORT)).unwrap();
            let heard = runtime.block_on(listener.hear()).unwrap();
            assert_eq!(Probe::read(&heard.bytes), read);
        }
    }
    let taken = runtime.block_on(async { Listener::open(PORT, true) }).unwrap_err();
    assert_eq!(taken.raw_os_error(), Some(nix::errno::Errno::EADDRINUSE as i32));
}

#[test]
fn a_way_is_what_the_routes_say_now() {
    let room = Room::new();
    let _peer = Peer::new(&room);
    let index = nix::net::if_::if_nametoindex("wire0").unwrap();
    let said = |to: &str| way(ip_of(to));
    let is = |from: &str, mtu| Way { from: ip_of(from), link: index, mtu };
    assert_eq!(said("10.9.0.2").unwrap(), is("10.9.0.1", 1500));
    assert_eq!(said("fd09::2").unwrap(), is("fd09::1", 1500));
    ip(&["route", "add", "10.77.0.0/16", "via", "10.9.0.2", "mtu", "1400"]);
    ip(&["-6", "route", "add", "fd77::/64", "via", "fd09::2", "mtu", "1300"]);
    assert_eq!(said("10.77.1.1").unwrap(), is("10.9.0.1", 1400));
    assert_eq!(said("fd77::1").unwrap(), is("fd09::1", 1300));
    ip(&["link", "set", "wire0", "mtu", "1280"]);
    assert_eq!([said("10.77.1.1").unwrap().mtu, said("fd77::1").unwrap().mtu], [1280, 1280]);

    assert!(matches!(said("10.88.0.1").unwrap_err(), WayError::None { .. }));
    assert!(matches!(said("10.9.0.1").unwrap_err(), WayError::Own { .. }));
    assert!(matches!(said("fd09::1").unwrap_err(), WayError::Own { .. }));
    ip(&["route", "add", "unreachable", "10.89.0.0/16"]);
    assert!(matches!(said("10.89.0.1").unwrap_err(), WayError::None { .. }));
    ip(&["tuntap", "add", "mode", "tun", "name", "bare0"]);
    ip(&["address", "add", "10.90.0.1/24", "dev", "bare0"]);
    ip(&["link", "set", "bare0", "up"]);
    let bare = said("10.90.0.2").unwrap_err();
    assert!(matches!(&bare, WayError::NoEthernet { name, .. } if name == "bare0"), "{bare}");
}

fn tunnel(to: &str, flags: u32) -> Tunnel {
    Tunnel { to: addr(to), from: addr("10.9.0.1"), ifindex: 2, mtu: 1500, flags, pad: 0 }
}

#[test]
fn ways_are_written_only_where_they_differ_survive_a_restart_and_are_restored() {
    let room = Room::new();
    let loaded = room.load();
    let mut table = Tunnels::open(&room.root).unwrap();
    let key = |node, family| TunnelKey { node, family };
    let mut wanted = BTreeMap::from([
        (key(1, V4), tunnel("10.9.0.2", READY)),
        (key(1, V6), tunnel("fd09::2", 0)),
        (key(2, V4), tunnel("10.9.0.3", 0)),
    ]);
    let brought = |writes, repairs| Brought { writes, repairs, refused: vec![] };
    assert_eq!(table.bring(&wanted).unwrap(), brought(3, 0));
    assert_eq!(table.bring(&wanted).unwrap(), brought(0, 0));
    wanted.remove(&key(2, V4));
    wanted.insert(key(1, V6), tunnel("fd09::2", READY));
    assert_eq!(table.bring(&wanted).unwrap(), brought(2, 0));

    // Somebody else changes one, adds one, and removes one.
    let other = aya::maps::MapData::from_pin(room.root.map(maps::TUNNELS)).unwrap();
    let mut other: aya::maps::HashMap<_, TunnelKey, Tunnel> =
        aya::maps::Map::HashMap(other).try_into().unwrap();
    other.insert(key(1, V4), tunnel("10.9.0.66", READY), 0).unwrap();
    other.insert(key(9, V4), tunnel("10.9.0.67", READY), 0).unwrap();
    other.remove(&key(1, V6)).unwrap();
    assert_eq!(table.bring(&wanted).unwrap(), brought(3, 3));
    assert_eq!(table.read().unwrap(), wanted);

    // The next agent finds what this one has left, and has nothing to write.
    drop((table, loaded));
    let _loaded = room.load();
    let mut table = Tunnels::open(&room.root).unwrap();
    assert_eq!(table.read().unwrap(), wanted);
    assert_eq!(table.bring(&wanted).unwrap(), brought(0, 0));
}

#[test]
fn a_full_table_says_which_ways_found_no_room() {
    let room = Room::new();
    let _loaded = room.load();
    let mut table = Tunnels::open(&room.root).unwrap();
    let room_for = proxy_common::abi::capacity::TUNNELS as u32;
    let all = |extra: u32| -> BTreeMap<TunnelKey, Tunnel> {
        (1..=room_for + extra).map(|node| (TunnelKey { node, family: V4 }, tunnel("10.9.0.2", 0))).collect()
    };
    let brought = table.bring(&all(2)).unwrap();
    assert_eq!(brought.writes, room_for as usize);
    assert_eq!(brought.refused.iter().map(|key| key.node).collect::<Vec<_>>(), [room_for + 1, room_for + 2]);
    assert_eq!(table.bring(&all(0)).unwrap(), Brought::default());
}
