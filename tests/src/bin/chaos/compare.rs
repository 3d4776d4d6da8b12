//! `chaos compare`: what clients lose in situations that have broken service proxies, with the agent and with nftables
//! rules of kube-proxy's shape: counts, as a table and as JSON.

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, Subcommand, ValueEnum};
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use proxy_tests::chaos::report::Report;
use proxy_tests::chaos::scene::{Forwarder, Stage};
use proxy_tests::chaos::spoof::Kind;
use proxy_tests::chaos::{dns, flood, ports};

#[derive(Subcommand)]
pub(crate) enum Comparison {
    /// Spoofed SYNs to a NodePort whose endpoint is on another node, while others connect and stay connected.
    Flood(FloodArguments),
    /// Many short connections to a NodePort with one endpoint on another node.
    Ports(PortsArguments),
    /// Many questions over UDP, one from each port: to a NodePort, and from pods to a ClusterIP.
    Dns(DnsArguments),
}

#[derive(Args)]
struct Common {
    /// Also write the report to this file as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Play it only with this one.
    #[arg(long, value_enum)]
    only: Option<Who>,
    /// IPv6 instead of IPv4.
    #[arg(long)]
    ipv6: bool,
    /// The node's own `ip_local_port_range`; the kernel's own by default.
    #[arg(long, value_name = "FIRST-LAST", value_parser = port_range)]
    local_ports: Option<(u16, u16)>,
    /// A further flag for the agent, such as --agent-flag=--max-flows=65536; may be given more than once.
    #[arg(long, value_name = "FLAG", allow_hyphen_values = true)]
    agent_flag: Vec<String>,
    /// How long a client waits before it counts as a failure.
    #[arg(long, value_name = "MS", default_value_t = 5000, value_parser = clap::value_parser!(u64).range(10..=60_000))]
    timeout_ms: u64,
}

#[derive(Args)]
pub(crate) struct FloodArguments {
    #[command(flatten)]
    common: Common,
    /// Spoofed sources.
    #[arg(long, default_value_t = 450_000, value_parser = clap::value_parser!(u32).range(1..=2_000_000))]
    count: u32,
    /// Spoofed packets a second.
    #[arg(long, default_value_t = 30_000.0, value_parser = rate)]
    rate: f64,
    /// What each spoofed source sends.
    #[arg(long, value_enum, default_value_t = Sends::Syn)]
    kind: Sends,
    /// Honest new connections a second.
    #[arg(long, default_value_t = 50.0, value_parser = rate)]
    clients: f64,
    /// Seconds for which they go on after the flood.
    #[arg(long, value_name = "SECONDS", default_value_t = 20.0, value_parser = seconds)]
    after: f64,
    /// Honest connections that are open all the time.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=1000))]
    held: u16,
}

#[derive(Args)]
pub(crate) struct PortsArguments {
    #[command(flatten)]
    common: Common,
    /// New connections a second.
    #[arg(long, default_value_t = 300.0, value_parser = rate)]
    rate: f64,
    /// For how long. Less than two minutes shows little: so long the port of an ended connection may be held.
    #[arg(long, default_value_t = 120.0, value_parser = seconds)]
    seconds: f64,
}

#[derive(Args)]
pub(crate) struct DnsArguments {
    #[command(flatten)]
    common: Common,
    /// Questions a second.
    #[arg(long, default_value_t = 2200.0, value_parser = rate)]
    rate: f64,
    /// For how long.
    #[arg(long, default_value_t = 40.0, value_parser = seconds)]
    seconds: f64,
    /// Ports after which the first is used again; by default each is used once.
    #[arg(long)]
    sources: Option<u64>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Who {
    Agent,
    Nftables,
}

#[derive(Clone, Copy, ValueEnum)]
enum Sends {
    /// A SYN.
    Syn,
    /// A SYN, then an acknowledgment with a guessed number.
    BlindAck,
    /// A datagram to the same NodePort; who is honest asks over UDP, too.
    Datagram,
}

impl Common {
    fn stage(&self) -> Stage {
        let forwarders = match self.only {
            None => Forwarder::ALL.to_vec(),
            Some(Who::Agent) => vec![Forwarder::Agent],
            Some(Who::Nftables) => vec![Forwarder::Nftables],
        };
        Stage {
            forwarders,
            agent_flags: self.agent_flag.clone(),
            ipv6: self.ipv6,
            local_ports: self.local_ports,
        }
    }

    fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout_ms)
    }
}

/// How often a second; what is above can be made by no machine.
fn rate(text: &str) -> Result<f64, String> {
    number(text, 0.1..=1_000_000.0)
}

/// How long; nothing here lasts longer than an hour.
fn seconds(text: &str) -> Result<f64, String> {
    number(text, 0.1..=3600.0)
}

fn port_range(text: &str) -> Result<(u16, u16), String> {
    let parsed =
        text.split_once('-').and_then(|(first, last)| Some((first.parse().ok()?, last.parse().ok()?)));
    parsed
        .filter(|(first, last)| first < last)
        .ok_or_else(|| "not a range of ports like 1024-65535".to_owned())
}

fn number(text: &str, range: std::ops::RangeInclusive<f64>) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if range.contains(&value) {
        Ok(value)
    } else {
        Err(format!("not from {} to {}", range.start(), range.end()))
    }
}

/// Plays one.
pub(crate) fn run(comparison: &Comparison) -> Result<()> {
    let (common, report) = match comparison {
        Comparison::Flood(arguments) => (&arguments.common, flood::play(&flood_plan(arguments))?),
        Comparison::Ports(PortsArguments { common, rate, seconds }) => {
            let lasts = Duration::from_secs_f64(*seconds);
            let plan = ports::Plan { stage: common.stage(), rate: *rate, lasts, timeout: common.timeout() };
            (common, ports::play(&plan)?)
        }
        Comparison::Dns(DnsArguments { common, rate, seconds, sources }) => {
            let lasts = Duration::from_secs_f64(*seconds);
            let timeout = common.timeout();
            let plan = dns::Plan { stage: common.stage(), rate: *rate, lasts, sources: *sources, timeout };
            (common, dns::play(&plan)?)
        }
    };
    print(&report).context("writing the report")?;
    crate::save(common.json.as_deref(), &report)
}

fn flood_plan(arguments: &FloodArguments) -> flood::Plan {
    flood::Plan {
        stage: arguments.common.stage(),
        count: arguments.count,
        kind: match arguments.kind {
            Sends::Syn => Kind::Syn,
            Sends::BlindAck => Kind::SynThenBlindAck,
            Sends::Datagram => Kind::Datagram,
        },
        rate: arguments.rate,
        clients: arguments.clients,
        after: Duration::from_secs_f64(arguments.after),
        held: arguments.held.into(),
        timeout: arguments.common.timeout(),
    }
}

fn print(report: &Report) -> Result<()> {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(vec!["WITH", "WHAT", "TRIED", "FAILED", "SLOWEST", "WHY"]);
    for row in &report.rows {
        let reasons: Vec<String> =
            row.tally.reasons.iter().map(|(reason, count)| format!("{reason}: {count}")).collect();
        table.add_row(vec![
            row.forwarder.name().into(),
            row.what.clone(),
            row.tried.to_string(),
            row.tally.failed.to_string(),
            format!("{:.0} ms", row.tally.slowest_ms),
            reasons.join(", "),
        ]);
    }
    for (index, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if (2..5).contains(&index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let mut out = std::io::stdout().lock();
    for spoofed in &report.spoofed {
        let name = spoofed.forwarder.name();
        writeln!(out, "{name}: {} spoofed packets in {:.1} s", spoofed.packets, spoofed.seconds)?;
    }
    writeln!(out, "{}", table.trim_fmt())?;
    Ok(out.flush()?)
}
