//! Programs at the drivers of interfaces to the outside (`--xdp`): what only passes the node is sent on from there.

use std::net::SocketAddr;
use std::time::Duration;

use agent_kernel::datapath::load::OBJECT;
use anyhow::{Context as _, Result, ensure};
use aya::Ebpf;
use aya::programs::{Xdp, XdpMode};
use proxy_tests::agent::Agent;
use proxy_tests::answer::Hold;
use proxy_tests::manifests::ManifestDir;
use proxy_tests::netns::Netns;
use proxy_tests::probe::{Ask, Runner, eventually, get, transfer};
use proxy_tests::test_cluster::{PodNetwork, TestCluster};

use crate::common::manifests;
use crate::scene::{SOON, agent, counted, in_network, seen_as, servers, service};

const MIB: u64 = 1 << 20;
/// A transfer starves rather than the test.
const PATIENT: Duration = Duration::from_secs(5);
/// From one question of a held connection to the next.
const OFTEN: Duration = Duration::from_millis(2);

/// Drivers of virtual cables see whole packets only if nobody leaves checksums and cutting to hardware that is not there, and
/// send only if the other end takes what they send, as it does with a program of its own.
fn like_hardware(cluster: &TestCluster) -> Result<Ebpf> {
    for place in ["node1", "node2", "outside", "a", "b", "c"] {
        let off = ["-K", "eth0", "tx", "off", "gso", "off", "tso", "off", "gro", "off"];
        cluster.place(place).netns.output("ethtool", &off)?;
    }
    pass_at(cluster.underlay(), "u-node1")
}

fn doors(cluster: &TestCluster) -> [SocketAddr; 2] {
    cluster.place("node1").at(30_002)
}

fn says(agent: &Agent, what: &str) -> Result<()> {
    // A driver that has refused is tried again after a pause that grows.
    eventually(4 * SOON, || {
        let status = agent.status_json()?;
        ensure!(status["notes"].to_string().contains(what), "{status}");
        Ok(())
    })
}

/// Two nodes, of which the first has no endpoint.
fn scene(cluster: &TestCluster, dir: &ManifestDir) -> Result<Ebpf> {
    service(dir, cluster, ("far", 2, 30_002), &["c"], |plan| plan)?;
    like_hardware(cluster)
}

/// Connections in both families and over both protocols that ask all the time.
fn holds(cluster: &TestCluster) -> Result<Vec<Runner<Hold>>> {
    let mut holds = Vec::new();
    for to in doors(cluster) {
        for ask in [Ask::tcp(to), Ask::udp(to)] {
            holds.push(Runner::hold(cluster.place("outside"), &ask, OFTEN, Duration::from_secs(60))?);
        }
    }
    Ok(holds)
}

/// They go on, so many questions further.
fn go_on(holds: &mut [Runner<Hold>]) -> Result<()> {
    for hold in holds {
        let before = hold.report()?.made;
        eventually(SOON, || {
            let report = hold.report()?;
            ensure!(report.made > before + 100 && report.failed == 0, "{report:?}");
            Ok(())
        })?;
    }
    Ok(())
}

/// Somebody else's program at a driver for as long as this is there: ours, over tables that are empty, passes everything.
fn pass_at(netns: &Netns, device: &str) -> Result<Ebpf> {
    netns.run_in(|| {
        let mut ebpf = Ebpf::load(OBJECT)?;
        let program: &mut Xdp = ebpf.program_mut("xdp_ingress").context("no such program")?.try_into()?;
        program.load()?;
        program.attach(device, XdpMode::Driver)?;
        anyhow::Ok(ebpf)
    })?
}

/// What is passed through at the driver grows by so much at least while this is done.
fn passes(agent: &Agent, least: u64, work: impl FnOnce() -> Result<()>) -> Result<()> {
    let before = counted(agent, "passed_through")?;
    work()?;
    let more = counted(agent, "passed_through")? - before;
    ensure!(more >= least, "{more} packets were sent on at the driver, not {least}");
    Ok(())
}

#[test]
fn what_only_passes_the_node_is_sent_on_at_its_driver_and_seen_as_before() -> Result<()> {
    in_network(PodNetwork::Routed, |cluster| {
        let dir = manifests()?;
        let _servers = servers(&cluster, &["c"])?;
        let _taken = scene(&cluster, &dir)?;
        let agent = agent(&cluster, "node1", &dir, &["--socket-lb", "off", "--xdp", "native"])?;
        says(&agent, "interface eth0: what only passes this node is sent on")?;
        let (outside, node1) = (cluster.place("outside"), cluster.place("node1"));
        for to in doors(&cluster) {
            // The answers of a transfer acknowledge what goes the other way: both directions pass.
            passes(&agent, 4_000, || transfer(outside, &Ask::tcp(to).timeout(PATIENT), 8 * MIB).map(drop))?;
            // Masqueraded as by the stack.
            seen_as(&get(outside, &Ask::tcp(to))?, [node1.v4.into(), node1.v6.into()])?;
        }
        let mut holds = holds(&cluster)?;
        passes(&agent, 200, || go_on(&mut holds))?;
        for hold in holds {
            let report = hold.stop()?;
            ensure!(report.failed == 0, "{report:?}");
        }
        // What is for nobody here is none of its business.
        for direct in cluster.place("c").at(8080) {
            ensure!(get(outside, &Ask::tcp(direct))?.name == "c");
        }
        Ok(())
    })
}

#[test]
fn connections_go_on_while_programs_come_to_drivers_and_go() -> Result<()> {
    in_network(PodNetwork::Routed, |cluster| {
        let dir = manifests()?;
        let _servers = servers(&cluster, &["c"])?;
        let _taken = scene(&cluster, &dir)?;
        let mut agent = agent(&cluster, "node1", &dir, &["--socket-lb", "off"])?;
        let mut holds = holds(&cluster)?;
        go_on(&mut holds)?;
        ensure!(counted(&agent, "passed_through")? == 0);
        for (mode, least) in [("native", 200), ("native", 200), ("off", 0)] {
            agent.stop()?;
            agent.set("--xdp", mode);
            agent.spawn()?;
            agent.wait_ready()?;
            go_on(&mut holds)?;
            passes(&agent, least, || go_on(&mut holds)).with_context(|| format!("with --xdp {mode}"))?;
        }
        let at_driver = || cluster.place("node1").netns.output("ip", &["link", "show", "dev", "eth0"]);
        ensure!(!at_driver()?.contains("xdp"), "{}", at_driver()?);
        let before = counted(&agent, "passed_through")?;
        go_on(&mut holds)?;
        ensure!(counted(&agent, "passed_through")? == before);
        for hold in holds {
            let report = hold.stop()?;
            ensure!(report.failed == 0, "{report:?}");
        }
        Ok(())
    })
}

#[test]
fn a_driver_that_somebody_else_has_is_left_alone_until_it_is_free() -> Result<()> {
    in_network(PodNetwork::Routed, |cluster| {
        let dir = manifests()?;
        let _servers = servers(&cluster, &["c"])?;
        let _taken = scene(&cluster, &dir)?;
        let node1 = &cluster.place("node1").netns;
        let theirs = || node1.output("ip", &["-details", "link", "show", "dev", "eth0"]);
        let other = pass_at(node1, "eth0")?;
        let agent = agent(&cluster, "node1", &dir, &["--socket-lb", "off", "--xdp", "native"])?;
        says(&agent, "interface eth0: no program at its driver, so all goes by the stack")?;
        ensure!(theirs()?.contains("xdp"), "{}", theirs()?);
        let mut holds = holds(&cluster)?;
        go_on(&mut holds)?;
        ensure!(counted(&agent, "passed_through")? == 0);
        drop(other);
        says(&agent, "interface eth0: what only passes this node is sent on at its driver")?;
        passes(&agent, 200, || go_on(&mut holds))?;
        for hold in holds {
            let report = hold.stop()?;
            ensure!(report.failed == 0, "{report:?}");
        }
        Ok(())
    })
}

#[test]
fn a_driver_hands_packets_to_another_one_where_both_carry_programs_and_else_to_the_stack() -> Result<()> {
    in_network(PodNetwork::Routed, |cluster| {
        let dir = manifests()?;
        let _servers = servers(&cluster, &["c"])?;
        let _taken = scene(&cluster, &dir)?;
        // A network between the nodes alone, by which they reach each other's pods.
        let (node1, node2) = (&cluster.place("node1").netns, &cluster.place("node2").netns);
        node1.join("eth1", node2, "eth1")?;
        for (netns, own, other, pods) in [(node1, 11, 12, 2), (node2, 12, 11, 1)] {
            netns
                .output("ethtool", &["-K", "eth1", "tx", "off", "gso", "off", "tso", "off", "gro", "off"])?;
            netns.ip(&format!(
                "addr add 192.168.20.{own}/24 dev eth1\naddr add fd00:20::{own}/64 dev eth1 nodad\n\
                 route replace 10.244.{pods}.0/24 via 192.168.20.{other}\n\
                 route replace fd00:244:{pods}::/64 via fd00:20::{other}\n"
            ))?;
        }
        let mut agent = agent(&cluster, "node1", &dir, &["--socket-lb", "off", "--xdp", "native"])?;
        // Its other end does not take yet what this one would send.
        says(&agent, "interface eth1: no program at its driver")?;
        let outside = cluster.place("outside");
        let seen = ["192.168.20.11".parse()?, "fd00:20::11".parse()?];
        let mut holds = holds(&cluster)?;
        go_on(&mut holds)?;
        ensure!(counted(&agent, "passed_through")? == 0);
        let _ready = pass_at(node2, "eth1")?;
        says(&agent, "interface eth1: what only passes this node is sent on")?;
        passes(&agent, 200, || go_on(&mut holds))?;
        for to in doors(&cluster) {
            passes(&agent, 4_000, || transfer(outside, &Ask::tcp(to).timeout(PATIENT), 8 * MIB).map(drop))?;
            seen_as(&get(outside, &Ask::tcp(to))?, seen)?;
        }
        for hold in holds {
            let report = hold.stop()?;
            ensure!(report.failed == 0, "{report:?}");
        }
        agent.stop()?;
        Ok(())
    })
}
