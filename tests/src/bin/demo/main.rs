//! The demo: a cluster of network namespaces, the real agent on `deploy/examples`, real traffic; what was promised
//! and what was measured.
//!
//! Every number shown was counted in this run. The demo itself plays the cluster's controllers: it edits its copy of
//! the example manifests as they would edit EndpointSlices.

mod answers;
mod cluster;
mod crash;
mod promise;
mod screen;
mod updates;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use proxy_tests::stop;

use crate::cluster::{Cluster, Files};
use crate::promise::Promises;
use crate::screen::Screen;

#[derive(Parser)]
#[command(about = "Shows the proxy at work on a cluster made of network namespaces (root)")]
struct Arguments {
    /// The example manifests; a copy of them is used and edited.
    #[arg(long, value_name = "DIR", default_value_os_t = examples())]
    examples: PathBuf,
}

fn examples() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/examples"))
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let screen = Screen::stdout();
    if !nix::unistd::geteuid().is_root() {
        eprintln!("The demo makes network namespaces and loads kernel programs, which needs root. Run:");
        eprintln!("    sudo -E env \"PATH=$PATH\" cargo xtask demo");
        return ExitCode::FAILURE;
    }
    stop::listen();
    match run(&arguments, &screen) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        // Whatever broke after Ctrl-C broke because of it.
        Err(_) if stop::wanted() => {
            eprintln!("Interrupted. Everything the demo made has been removed.");
            ExitCode::from(130)
        }
        Err(error) => {
            eprintln!("The demo could not go on: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether every promise was kept. When it returns, also with an error, everything has been taken down.
fn run(arguments: &Arguments, screen: &Screen) -> Result<bool> {
    let begun = std::time::Instant::now();
    screen.title("A service proxy at work")?;
    screen.text(
        "A cluster on this machine: two nodes, pods and a client outside, each a network namespace of its own. \
         Nothing leaves it, and all of it is removed at the end. On node1 runs the agent, with no Kubernetes API \
         server: it reads Services and EndpointSlices from a copy of deploy/examples. There is no iptables or \
         nftables rule in it.",
    )?;
    let mut promises = Promises::default();
    let cluster = Cluster::raise(&arguments.examples)?;
    let files = Files::open(&cluster.manifests)?;
    files.fit(&cluster.test_cluster)?;
    let pods = cluster.start_pods()?;
    let mut agent = cluster.start_agent()?;
    answers::show(screen, &cluster.test_cluster, &agent, &mut promises)?;
    let mut apps = files.adopt(pods)?;
    updates::rolling(screen, &cluster.test_cluster, &mut apps.webui, &mut promises)?;
    updates::blue_green(screen, &cluster.test_cluster, &mut apps.checkout, &mut promises)?;
    updates::recreate(screen, &cluster.test_cluster, &mut apps.api, &mut promises)?;
    crash::show(screen, &cluster.test_cluster, &mut agent, &mut promises)?;
    drop((agent, apps));
    let kept = promises.show(screen)?;
    screen.remark(&format!(
        "Measured in {:.0} seconds on this machine. On a node of yours: README.md.",
        begun.elapsed().as_secs_f64()
    ))?;
    Ok(kept)
}
