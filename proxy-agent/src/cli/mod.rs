//! Tell: the command tree. Each command reads pinned tables; only `run` is the agent.
//!
//! What the commands need of the other rooms comes in through [`Rooms`], so that they are tested without BPF.

pub mod backend;
pub mod cleanup;
pub mod conntrack;
pub mod doctor;
#[cfg(test)]
mod memory;
mod pinned;
mod retire;
pub mod service;
pub mod status;
mod status_page;
pub mod table;
pub mod view;

use agent_kernel::datapath::store::pin::BpfRoot;
use proxy_common::abi::frontend;
use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{ArgAction, Args, Parser, Subcommand};
use serde::Serialize;

use crate::config::{Config, RunArgs, ThisHost};
use crate::logging;
use agent_kernel::datapath::attach::others::Others;
use agent_kernel::kube_proxy::{self, Cleaned};
use table::Output;
use view::{Now, View};

/// Pinned tables, if there are any.
pub type Opened = Result<Option<Box<dyn View>>>;

/// What the commands need of the rest of the agent.
pub struct Rooms {
    /// Runs the agent until it is told to end.
    pub run: fn(Config) -> Result<()>,
    /// Opens the pinned tables under a root; `None` when nothing is pinned there.
    pub open: fn(&Path) -> Opened,
    /// Detaches every program and unpins everything under a root; says what it removed.
    pub remove: fn(&Path) -> Result<Vec<String>>,
    /// What a kube-proxy has left on this node, a line each.
    pub leftovers: fn() -> Vec<String>,
    /// Takes that away.
    pub clean: fn() -> Cleaned,
    /// Loads the embedded programs and lets them go.
    pub trial: fn() -> doctor::Trial,
    /// Who else is at the hooks of what is pinned under a root.
    pub others: fn(&Path) -> Others,
    /// The embedded BPF object; empty when this binary was built without one.
    pub object: &'static [u8],
}

/// An eBPF service proxy for Kubernetes: one agent a node, in the place of kube-proxy.
#[derive(Parser, Debug)]
#[command(name = "proxy-agent", version, propagate_version = true, max_term_width = 100)]
pub struct Cli {
    /// Where the agent's maps and links are pinned.
    #[arg(long, global = true, value_name = "DIR", default_value = BpfRoot::DEFAULT)]
    pub bpf_root: PathBuf,
    /// Say more in the log: -v debug, -vv trace. RUST_LOG overrides it.
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub verbose: u8,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// How a listing is written.
#[derive(Args, Clone, Copy, Debug)]
pub struct Format {
    /// For people or for programs.
    #[arg(short, long, value_enum, default_value_t)]
    pub output: Output,
}

/// The commands.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Run the agent.
    Run(Box<RunArgs>),
    /// One page on how this node's proxy fares; exit 1 when it is not healthy.
    Status(Format),
    /// What is served.
    #[command(subcommand)]
    Service(ServiceCommand),
    /// Where it goes.
    #[command(subcommand)]
    Backend(BackendCommand),
    /// The flow table.
    #[command(subcommand)]
    Conntrack(ConntrackCommand),
    /// Whether this node is ready, with a remedy for what is not; exit 1 when a check fails.
    Doctor(Format),
    /// Leave what is new to another proxy on this node, such as kube-proxy; what lives goes on. Start that one first.
    Retire(retire::RetireArgs),
    /// Remove everything the agent has pinned or attached. Stop the agent first.
    Cleanup {
        /// Also remove what a kube-proxy has left: its rules of any mode, and IPVS. Stop kube-proxy first.
        #[arg(long)]
        kube_proxy: bool,
    },
}

/// `service`.
#[derive(Subcommand, Debug)]
pub enum ServiceCommand {
    /// Every frontend and its endpoints, with their state.
    List(Format),
}

/// `backend`.
#[derive(Subcommand, Debug)]
pub enum BackendCommand {
    /// Every endpoint, where it is used, and its live connections.
    List(Format),
}

/// `conntrack`.
#[derive(Subcommand, Debug)]
pub enum ConntrackCommand {
    /// One row a flow. Connections translated at their socket have none.
    List {
        /// Which flows.
        #[command(flatten)]
        filter: conntrack::Filter,
        /// How to write them.
        #[command(flatten)]
        format: Format,
    },
    /// Forget flows: their next packet is treated as a new flow's first.
    Flush(FlushArgs),
}

/// `conntrack flush`.
#[derive(Args, Debug)]
#[command(group(clap::ArgGroup::new("which").required(true).multiple(true)
    .args(["service", "endpoint", "client", "all"])))]
pub struct FlushArgs {
    /// Which flows.
    #[command(flatten)]
    pub filter: conntrack::Filter,
    /// All of them.
    #[arg(long, conflicts_with_all = ["service", "endpoint", "client"])]
    pub all: bool,
    /// How to write the result.
    #[command(flatten)]
    pub format: Format,
}

/// Parses the command line, does what it says, and makes the exit code of it.
#[must_use]
pub fn main(rooms: &Rooms) -> ExitCode {
    let cli = Cli::parse_from(std::env::args_os().map(verbosity));
    let more = if let Command::Run(args) = &cli.command { args.verbosity() } else { 0 };
    if let Err(error) = logging::start(cli.verbose.saturating_add(more)) {
        writeln!(std::io::stderr(), "error: cannot start a thread for the log: {error}").ok();
        return ExitCode::FAILURE;
    }
    let code = match dispatch(cli, rooms, &mut std::io::stdout().lock()) {
        Ok(code) => code,
        Err(error) => {
            // The log may be filtered; why a command failed may not.
            logging::say(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    };
    logging::flush();
    code
}

/// Go's flags take `-v=2` for `--v=2`; here `-v` is counted.
fn verbosity(arg: OsString) -> OsString {
    match arg.to_str().and_then(|text| text.strip_prefix("-v=")) {
        Some(level) => format!("--v={level}").into(),
        None => arg,
    }
}

/// Does what the command line says.
pub fn dispatch(cli: Cli, rooms: &Rooms, out: &mut dyn Write) -> Result<ExitCode> {
    let root = cli.bpf_root.as_path();
    match cli.command {
        Command::Run(args) => {
            let config = Config::new(&args, root, &ThisHost)?;
            for warning in &config.warnings {
                tracing::warn!("{warning}");
            }
            if let Some(path) = args.write_config_to.filter(|path| !path.as_os_str().is_empty()) {
                let text = config.to_file().map_err(anyhow::Error::msg)?;
                std::fs::write(&path, text)
                    .with_context(|| format!("writing the configuration to {}", path.display()))?;
                return Ok(ExitCode::SUCCESS);
            }
            (rooms.run)(config)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Status(format) => {
            let status = read_status(rooms, root)?;
            show(out, format, &status, status_page::text)?;
            Ok(if status.healthy { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Command::Service(ServiceCommand::List(format)) => {
            let rows = service::rows(open(rooms, root)?.as_ref())?;
            show(out, format, &rows, |rows| service::text(rows))
        }
        Command::Backend(BackendCommand::List(format)) => {
            let rows = backend::rows(open(rooms, root)?.as_ref())?;
            show(out, format, &rows, |rows| backend::text(rows))
        }
        Command::Conntrack(ConntrackCommand::List { filter, format }) => {
            let rows = conntrack::rows(open(rooms, root)?.as_ref(), &filter, Now::read()?)?;
            show(out, format, &rows, |rows| conntrack::text(rows))
        }
        Command::Conntrack(ConntrackCommand::Flush(FlushArgs { filter, all: _, format })) => {
            let done = conntrack::flush(open(rooms, root)?.as_ref(), &filter, Now::read()?)?;
            show(out, format, &done, |done| {
                format!("removed {} flows ({} entries)\n", done.flows, done.entries)
            })
        }
        Command::Doctor(format) => {
            let agent = read_status(rooms, root);
            let node = doctor::Node {
                root: Path::new("/"),
                leftovers: &rooms.leftovers,
                trial: &rooms.trial,
                others: &|| (rooms.others)(root),
                direct: &|| is_direct(rooms, root),
                bpf_root: root,
            };
            let report = doctor::examine(&node, rooms.object, agent.as_ref().map_err(|e| format!("{e:#}")));
            show(out, format, &report, doctor::text)?;
            Ok(if report.ready { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Command::Retire(args) => {
            let process = kube_proxy::process(Path::new("/proc"));
            let another = process.is_some() || !(rooms.leftovers)().is_empty();
            let done = retire::retire(open(rooms, root)?.as_mut(), args, another, out)?;
            Ok(if done { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Command::Cleanup { kube_proxy } => clean_up(rooms, root, kube_proxy, out),
    }
}

/// Whether some Service asks for direct server return.
fn is_direct(rooms: &Rooms, root: &Path) -> bool {
    let actual = open(rooms, root).and_then(|view| view.actual());
    actual.is_ok_and(|actual| actual.frontends.values().any(|found| found.flags & frontend::DSR != 0))
}

fn clean_up(rooms: &Rooms, root: &Path, kube_proxy: bool, out: &mut dyn Write) -> Result<ExitCode> {
    // Tables that cannot be opened are no reason to keep them.
    if let Some(view) = (rooms.open)(root).ok().flatten() {
        cleanup::refuse_while_running(view.as_ref())?;
    }
    cleanup::refuse_ordinary_files(root, &cleanup::KernelFs)?;
    if kube_proxy {
        cleanup::refuse_beside_kube_proxy(Path::new("/proc"))?;
    }
    let mut removed = (rooms.remove)(root)?;
    removed.extend(cleanup::unmount(root, &cleanup::KernelFs)?);
    let left = match kube_proxy {
        true => {
            let done = (rooms.clean)();
            removed.extend(done.removed);
            done.left
        }
        false => Vec::new(),
    };
    table::write(out, &cleanup::text(&removed, root))?;
    match left.as_slice() {
        [] => Ok(ExitCode::SUCCESS),
        left => bail!("not everything that kube-proxy has left could be removed:\n  {}", left.join("\n  ")),
    }
}

fn read_status(rooms: &Rooms, root: &Path) -> Result<status::Status> {
    let kernel = nix::sys::utsname::uname().context("asking for the kernel's release")?;
    let kernel = kernel.release().to_string_lossy();
    match (rooms.open)(root).with_context(|| format!("opening the tables under {}", root.display()))? {
        Some(view) => status::Status::read(view.as_ref(), &kernel, Now::read()?),
        None => Ok(status::Status::never_run(root, &kernel)),
    }
}

fn open(rooms: &Rooms, root: &Path) -> Result<Box<dyn View>> {
    match (rooms.open)(root).with_context(|| format!("opening the tables under {}", root.display()))? {
        Some(view) => Ok(view),
        None => bail!(
            "nothing is pinned under {}: start `proxy-agent run`, or say with --bpf-root where its pins are",
            root.display()
        ),
    }
}

fn show<T: Serialize>(
    out: &mut dyn Write,
    format: Format,
    value: &T,
    text: impl Fn(&T) -> String,
) -> Result<ExitCode> {
    match format.output {
        Output::Table => table::write(out, &text(value))?,
        Output::Json => table::write_json(out, value)?,
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests;
