//! The binary: binds the command line to the rooms.

use std::path::Path;
use std::process::ExitCode;

use agent_kernel::datapath::attach::others::others;
use agent_kernel::datapath::flow::sockets::give_back;
use agent_kernel::datapath::load::remove::remove_all;
use agent_kernel::datapath::load::{self, OBJECT};
use agent_kernel::datapath::pinned::{Pinned, PinnedError};
use agent_kernel::datapath::probe::Features;
use agent_kernel::datapath::store::pin::BpfRoot;
use agent_kernel::kube_proxy;
use anyhow::{Context, Result};
use proxy_agent::cli::doctor::Trial;
use proxy_agent::cli::{self, Opened, Rooms};
use proxy_agent::run::run;

fn open(root: &Path) -> Opened {
    match Pinned::open(&BpfRoot::new(root)) {
        Ok(pinned) => Ok(Some(Box::new(pinned))),
        Err(PinnedError::NoAgent { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn remove(root: &Path) -> Result<Vec<String>> {
    let root = BpfRoot::new(root);
    // While the programs are there that know what a socket was connected to.
    let given = give_back(&root, Path::new("/proc")).unwrap_or_else(|error| {
        tracing::warn!(
            "{:#}; such UDP sockets of host processes stay with their endpoint",
            anyhow::Error::from(error)
        );
        0
    });
    let removed = remove_all(&root)?;
    let lines = [(removed.links, "attached programs"), (removed.maps, "maps")];
    let mut lines: Vec<_> =
        lines.into_iter().filter(|(n, _)| *n != 0).map(|(n, what)| format!("{n} {what}")).collect();
    if given != 0 {
        lines.push(format!(
            "the endpoints of {given} UDP sockets of host processes, which are the other proxy's now"
        ));
    }
    if kube_proxy::stop_rewriting()
        .context("removing the nftables tables ebpf-proxy-nat and ebpf-proxy-takeover")?
    {
        lines.push("nftables tables of a takeover".to_owned());
    }
    Ok(lines)
}

fn trial() -> Trial {
    let features = Features::probe();
    let absent = features.list().into_iter().filter(|feature| !feature.present && !feature.required);
    Trial {
        outcome: load::trial(&features).map_err(|error| format!("{:#}", anyhow::Error::from(error))),
        fall_backs: absent.map(|feature| format!("{}: {}", feature.name, feature.when_absent)).collect(),
    }
}

/// See the command line.
pub(crate) fn main() -> ExitCode {
    cli::main(&Rooms {
        run,
        open,
        remove,
        trial,
        others: |root| others(&BpfRoot::new(root)),
        object: OBJECT,
        leftovers: kube_proxy::leftovers_text,
        clean: kube_proxy::clean,
    })
}
