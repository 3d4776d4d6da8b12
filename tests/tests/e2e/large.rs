//! Much data: segments to be cut later, checksums to be filled in later, paths that are too narrow, fragments.

use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, sendto, socket,
};
use proxy_tests::packet::Packet;
use proxy_tests::pod::Place;
use proxy_tests::probe::{Ask, eventually, get, transfer};
use proxy_tests::test_cluster::{PodNetwork, TestCluster};

use crate::common::{manifests, vips};
use crate::scene::{agent, at, counted, in_every_network, in_network, public, servers, service, soon};

const MIB: u64 = 1 << 20;
/// What a transfer starves on rather than the test.
const PATIENT: Duration = Duration::from_secs(5);

#[test]
fn bytes_and_fragments_arrive_as_they_were_sent_with_and_without_offloads() -> Result<()> {
    // D-3, D-4: GSO and partial checksums are how veths work by default; without them every packet is whole.
    in_every_network(|cluster| {
        let dir = manifests()?;
        let _servers = servers(&cluster, &["b", "c"])?;
        service(&dir, &cluster, ("near", 1, 30001), &["b"], |plan| plan)?;
        service(&dir, &cluster, ("far", 2, 30002), &["c"], |plan| plan)?;
        let _agent = agent(&cluster, "node1", &dir, &["--socket-lb", "off"])?;
        for offloads in [true, false] {
            if !offloads {
                switch_offloads_off(&cluster)?;
            }
            fragments(&cluster)?;
            for n in [1, 2] {
                for to in at(vips(n), 80) {
                    transfer(cluster.place("a"), &Ask::tcp(to).timeout(PATIENT), 8 * MIB)?;
                }
                for to in cluster.place("node1").at(30000 + u16::from(n)) {
                    transfer(cluster.place("outside"), &Ask::tcp(to).timeout(PATIENT), 8 * MIB)?;
                }
            }
            // Hairpin: both ends of both translations on one interface.
            for to in at(vips(1), 80) {
                transfer(cluster.place("b"), &Ask::tcp(to).timeout(PATIENT), 4 * MIB)?;
            }
        }
        Ok(())
    })
}

fn switch_offloads_off(cluster: &TestCluster) -> Result<()> {
    for place in ["a", "b", "c", "node1", "node2", "outside"] {
        let netns = &cluster.place(place).netns;
        let devices = netns.output("ip", &["-o", "link", "show", "type", "veth"])?;
        let names = devices.lines().filter_map(|line| line.split([':', '@']).nth(1)).map(str::trim);
        for name in names {
            let off = ["-K", name, "tx", "off", "rx", "off", "gso", "off", "gro", "off", "tso", "off"];
            netns.output("ethtool", &off)?;
        }
    }
    Ok(())
}

#[test]
fn a_path_that_is_too_narrow_is_told_to_both_ends_through_the_service() -> Result<()> {
    // D-2: "fragmentation needed" and "packet too big" about translated packets, in both directions.
    in_every_network(|cluster| {
        let dir = manifests()?;
        let _servers = servers(&cluster, &["c"])?;
        service(&dir, &cluster, ("web", 1, 30001), &["c"], |plan| plan.external_ips(&public(1)))?;
        let agent = agent(&cluster, "node1", &dir, &["--socket-lb", "off"])?;
        narrow(&cluster)?;
        let mut before = 0;
        let (a, outside) = (cluster.place("a"), cluster.place("outside"));
        for (client, targets) in
            [(a, at(vips(1), 80)), (outside, cluster.place("node1").at(30001)), (outside, at(public(1), 80))]
        {
            for to in targets {
                transfer(client, &Ask::tcp(to).timeout(PATIENT), MIB)?;
                let now = counted(&agent, "icmp_translated")?;
                ensure!(now > before, "no error was translated for {} asking {to}", client.name);
                before = now;
                forget_paths(&cluster)?;
            }
        }
        Ok(())
    })
}

/// The way from `node2` to `c` and back, and from `node1` to the outside client, takes 1300 bytes. The ends do not
/// know: their own links take 1500, so the segment sizes they offer are too large.
fn narrow(cluster: &TestCluster) -> Result<()> {
    let (c, outside) = (cluster.place("c"), cluster.place("outside"));
    let way = cluster.place("node2").netns.output("ip", &["-o", "route", "get", &c.v4.to_string()])?;
    let device = if way.contains("cni0") { "cni0" } else { "v-c" };
    cluster.place("node2").netns.ip(&format!(
        "route replace {}/32 dev {device} mtu lock 1300\nroute replace {}/128 dev {device} mtu lock 1300\n",
        c.v4, c.v6
    ))?;
    cluster.place("node1").netns.ip(&format!(
        "route replace {}/32 dev eth0 mtu lock 1300\nroute replace {}/128 dev eth0 mtu lock 1300\n",
        outside.v4, outside.v6
    ))
}

/// What was learnt of a path's MTU is forgotten, so that it must be reported again.
fn forget_paths(cluster: &TestCluster) -> Result<()> {
    for place in ["a", "c", "outside", "node1", "node2"] {
        for family in ["-4", "-6"] {
            cluster.place(place).netns.output("ip", &[family, "route", "flush", "cache"])?;
        }
    }
    Ok(())
}

/// Datagrams that arrive in pieces are answered in pieces (D-3).
fn fragments(cluster: &TestCluster) -> Result<()> {
    let node = cluster.place("node1");
    let (a, b, outside) = (cluster.place("a"), cluster.place("b"), cluster.place("outside"));
    let asks = [
        (a, at(vips(1), 80)),
        (a, at(vips(2), 80)),
        (b, at(vips(1), 80)),
        (a, node.at(30001)),
        (a, node.at(30002)),
        (outside, node.at(30001)),
        (outside, node.at(30002)),
    ];
    for (client, targets) in asks {
        for to in targets {
            // What is wider than the way to a pod is reported to the client, at the cost of a datagram.
            soon(|| get(client, &Ask::udp(to).payload(9000)).map(drop))?;
            for bytes in [1400, 2000, 9000, 60_000] {
                for ask in [Ask::udp(to), Ask::unconnected(to)] {
                    let answer = get(client, &ask.payload(bytes))?;
                    ensure!(answer.length == bytes, "{answer:?}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_datagram_whose_last_fragment_comes_first_arrives() -> Result<()> {
    // D-3. What the pod sends is handled by the other processor, so that the first fragment can be queued there before
    // the last one is looked at; when it is not, that datagram is lost, as it may be, and another one is sent.
    in_network(PodNetwork::Routed, |cluster| {
        let dir = manifests()?;
        let _controller = service(&dir, &cluster, ("far", 1, 0), &["c"], |plan| plan)?;
        let agent = agent(&cluster, "node1", &dir, &["--socket-lb", "off"])?;
        let (a, c, vip) = (cluster.place("a"), cluster.place("c"), at(vips(1), 80)[0]);
        let server = c.netns.run_in(|| UdpSocket::bind((c.v4, 8080)))??;
        server.set_read_timeout(Some(Duration::from_millis(20)))?;
        let raw = || socket(AddressFamily::Inet, SockType::Raw, SockFlag::empty(), SockProtocol::Raw);
        let sender = a.netns.run_in(raw)??;
        let SocketAddr::V4(to) = vip else { bail!("{vip} is not IPv4") };
        let mut id = 0;
        eventually(Duration::from_secs(30), || {
            id += 1;
            handled_by(&cluster, a, 1 << (id % 2))?;
            let from = SocketAddr::new(a.v4.into(), 5_555);
            let packet = Packet::udp(from, vip).payload(&[0xab; 40]).may_fragment().identification(id);
            for fragment in packet.without_ethernet().fragments(32).iter().rev() {
                sendto(sender.as_raw_fd(), fragment, &SockaddrIn::from(to), MsgFlags::empty())?;
            }
            let mut buffer = [0; 2_048];
            let (length, _) = server.recv_from(&mut buffer).context("nothing arrived")?;
            ensure!(buffer[..length] == [0xab; 40], "another datagram arrived: {length} bytes");
            Ok(())
        })?;
        ensure!(counted(&agent, "new_flow")? >= 1, "not through the Service");
        Ok(())
    })
}

/// Has what a pod sends handled by the processors of a mask.
fn handled_by(cluster: &TestCluster, pod: &Place, mask: u32) -> Result<()> {
    let interface = pod.host_interface.as_deref().context("a pod of the pod network")?;
    let steer = format!("echo {mask:x} > /sys/class/net/{interface}/queues/rx-0/rps_cpus");
    let node = cluster.place("node1").netns.name();
    pod.netns.output("ip", &["netns", "exec", node, "sh", "-c", &steer]).map(drop)
}
