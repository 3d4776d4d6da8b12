//! The tables of an agent that has written nothing yet, and its settings.

use agent_core::datapath::Datapath as _;
use agent_core::model::Settings;
use agent_core::plan::Step;
use agent_kernel::datapath::load::remove::remove_all;
use agent_kernel::datapath::load::{Capacities, Loaded, ProgramLog};
use agent_kernel::datapath::probe::Features;
use agent_kernel::datapath::store::pin::BpfRoot;
use agent_kernel::datapath::tables::kernel::Kernel;
use anyhow::{Context, Result, anyhow};
use proxy_common::abi::PortRange;
use tempfile::TempDir;

/// Empty maps on a bpffs of their own; gone on drop.
pub(crate) struct Empty {
    pub(crate) root: BpfRoot,
    _directory: TempDir,
}

impl Empty {
    pub(crate) fn new(sizes: &Capacities) -> Result<Self> {
        proxy_tests::sweep::once();
        let directory = tempfile::Builder::new()
            .prefix(&format!("{}-bench-", proxy_tests::unique()))
            .tempdir()
            .context("making a directory for bpffs")?;
        let root = BpfRoot::new(directory.path().join("bpf"));
        let tables = Self { root, _directory: directory };
        let features = Features::probe();
        drop(Loaded::open(&tables.root, &features, sizes, ProgramLog::Off)?);
        Ok(tables)
    }
}

impl Drop for Empty {
    fn drop(&mut self) {
        // What cannot be removed now is swept by the next run.
        remove_all(&self.root).ok();
        nix::mount::umount2(self.root.path(), nix::mount::MntFlags::MNT_DETACH).ok();
    }
}

/// Writes all steps of a plan.
pub(crate) fn apply(kernel: &mut Kernel, steps: &[Step]) -> Result<()> {
    kernel
        .apply(steps)
        .map_err(|(done, error)| anyhow!(error).context(format!("step {} of the plan", done + 1)))
}

/// Those of a node.
pub(crate) fn settings() -> Settings {
    Settings {
        host_netns: 0,
        snat_ports: vec![PortRange { first: 61_000, count: 1_000 }],
        seed: 7,
        ..Settings::of_node("node1")
    }
}
