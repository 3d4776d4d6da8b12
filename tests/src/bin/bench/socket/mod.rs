//! What the programs at the hooks of sockets add to a call: UDP sockets of a network namespace and three
//! cgroups of their own, one without programs, one with empty ones, one with ours.
//!
//! Measured is the processor time of the thread that calls, in a loop, of which the median batch counts. The
//! kernel's run-time statistics of programs would scatter less, but they leave out what costs most of a new
//! socket: that its storage is taken and given back with it. Processor time and not the clock, because the
//! machine may be shared. UDP, because its connect sends nothing: a handshake would be most of what is
//! measured. What is added to a connect over TCP is the same but for the socket's cookie, which only UDP needs.
//!
//! The sockets are the node's own, as those of pods are left to their packets when they connect over UDP.

mod calls;
mod home;

use std::fs::File;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use aya::maps::{MapData, PerCpuArray};
use aya_obj::generated::bpf_attach_type;
use proxy_agent::config::{Host as _, ThisHost};
use proxy_common::abi::{Reason, maps};
use proxy_tests::netns::Netns;

use self::calls::{AGAIN, Call, NEW};
use self::home::Home;
use crate::figure::{Figures, Goal, progress};
use crate::object::{self, array};
use crate::{raw, tables};

/// Turns are short, so that a busy moment of the machine meets all; there are this many times as many of them.
const TURNS: usize = 6;

/// Everything is routed to one interface, behind which nobody forwards.
const NOWHERE: &str = "\
link add eth0 type veth peer name nowhere
link set eth0 arp off
link set nowhere up
addr add 192.0.2.1/32 dev eth0
addr add 2001:db8::1/128 dev eth0 nodad
link set eth0 up
route add default dev eth0
route add ::/0 dev eth0
";

/// The programs whose calls are measured.
const HOOKS: [(&str, bpf_attach_type); 5] = [
    ("connect4", bpf_attach_type::BPF_CGROUP_INET4_CONNECT),
    ("connect6", bpf_attach_type::BPF_CGROUP_INET6_CONNECT),
    ("sendmsg4", bpf_attach_type::BPF_CGROUP_UDP4_SENDMSG),
    ("recvmsg4", bpf_attach_type::BPF_CGROUP_UDP4_RECVMSG),
    ("getpeername4", bpf_attach_type::BPF_CGROUP_INET4_GETPEERNAME),
];

/// Cgroups.
const NONE: usize = 0;
const EMPTY: usize = 1;
const OURS: usize = 2;

/// Calls that are measured.
struct Row {
    name: &'static str,
    call: Call,
    to: SocketAddr,
    /// How often a turn has its destination translated; 0 for one that is no Service's.
    translations: u64,
    goal: Option<f64>,
    /// Nanoseconds a call, in each cgroup.
    times: [Vec<f64>; 3],
}

pub(crate) fn measure(figures: &mut Figures, rounds: usize) -> Result<()> {
    progress("socket: calls of UDP sockets, without programs, with empty ones and with ours");
    let netns = Netns::new("socket")?;
    netns.ip(NOWHERE)?;
    let rows = netns.run_in(|| turns(rounds * TURNS))??;
    for row in &rows {
        let [none, empty, ours] = &row.times;
        let over = |some: &[f64], base: &[f64]| -> Vec<f64> {
            some.iter().zip(base).map(|(some, base)| some - base).collect()
        };
        let figure = figures.value(format!("{}: over an empty program", row.name), "ns", &over(ours, empty));
        if let Some(most) = row.goal {
            figure.within(Goal::Value(most));
        }
        figures.value(format!("{}: an empty program", row.name), "ns", &over(empty, none));
        figures.pair(format!("{}: the whole", row.name), "ns", ours, none);
    }
    Ok(())
}

fn turns(turns: usize) -> Result<Vec<Row>> {
    let mut ebpf = object::load()?;
    tables::fill(&mut ebpf)?;
    array(&mut ebpf, maps::CONFIG)?.set(0, tables::config(true, ThisHost.netns_cookie()), 0)?;
    let home = Home::new()?;
    let cgroups = [home.cgroup("none")?, home.cgroup("empty")?, home.cgroup("ours")?];
    object::attach_sockets(&mut ebpf, &HOOKS.map(|(name, _)| name), &cgroups[OURS])?;
    let _empty = attach_empty(&cgroups[EMPTY])?;
    let reasons = ebpf.take_map(maps::REASONS).context("the BPF object has no map REASONS")?;
    let reasons: PerCpuArray<MapData, u64> = reasons.try_into()?;
    let mut rows = rows();
    // The first turn warms up.
    for turn in 0..=turns {
        for row in &mut rows {
            let mut order = [NONE, EMPTY, OURS];
            if turn % 2 == 1 {
                order.reverse();
            }
            for which in order {
                home.enter(&cgroups[which])?;
                let before = translated(&reasons)?;
                let took = (row.call)(row.to).with_context(|| format!("{} to {}", row.name, row.to))?;
                let count = translated(&reasons)? - before;
                let wanted = if which == OURS { row.translations } else { 0 };
                ensure!(count == wanted, "{}: {count} of {wanted} calls were translated", row.name);
                if turn > 0 {
                    row.times[which].push(took);
                }
            }
        }
    }
    Ok(rows)
}

/// Empty programs at all hooks of a cgroup, for as long as what is returned lives.
fn attach_empty(cgroup: &Path) -> Result<Vec<OwnedFd>> {
    let directory = File::open(cgroup).with_context(|| format!("opening {}", cgroup.display()))?;
    let attach = |(name, hook): (&str, bpf_attach_type)| {
        let program = raw::load_empty_at(hook).with_context(|| format!("loading an empty {name}"))?;
        raw::attach(program.as_fd(), directory.as_fd(), hook)
            .with_context(|| format!("attaching an empty {name} to {}", cgroup.display()))
    };
    HOOKS.into_iter().map(attach).collect()
}

/// How many calls our programs have translated.
fn translated(reasons: &PerCpuArray<MapData, u64>) -> Result<u64> {
    let counts = reasons.get(&(Reason::SocketTranslated as u32), 0).context("reading REASONS")?;
    Ok(counts.iter().sum())
}

fn rows() -> Vec<Row> {
    let other = |v4: bool| -> SocketAddr {
        if v4 {
            (Ipv4Addr::new(172, 16, 0, 1), 443).into()
        } else {
            (Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1), 443).into()
        }
    };
    let service = |v4| tables::service(v4, 4711);
    let row = |name, call: Call, to, translations, goal| Row {
        name,
        call,
        to,
        translations,
        goal,
        times: [const { Vec::new() }; 3],
    };
    let (new, again) = (u64::from(NEW), u64::from(AGAIN));
    vec![
        row("connect4, new socket, no Service", calls::connect_new, other(true), 0, Some(30.0)),
        row("connect4, new socket, ClusterIP", calls::connect_new, service(true), new, Some(600.0)),
        row("connect6, new socket, no Service", calls::connect_new, other(false), 0, Some(30.0)),
        row("connect6, new socket, ClusterIP", calls::connect_new, service(false), new, Some(600.0)),
        row("connect4, same socket, no Service", calls::connect_again, other(true), 0, Some(30.0)),
        row("connect4, same socket, ClusterIP", calls::connect_again, service(true), again, None),
        row("sendmsg4, no Service", calls::send, other(true), 0, None),
        row("sendmsg4, ClusterIP", calls::send, service(true), 1, None),
        row("recvmsg4, has sent to no Service", calls::receive, other(true), 0, None),
        row("recvmsg4, has sent to a ClusterIP", calls::receive, service(true), 1, None),
        row("getpeername4, connected to no Service", calls::peer, other(true), 0, None),
        row("getpeername4, connected to a ClusterIP", calls::peer, service(true), 1, None),
    ]
}
