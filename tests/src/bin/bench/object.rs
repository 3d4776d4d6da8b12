//! The embedded programs and their maps, of their default sizes and not pinned.

use std::fs::File;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::Path;

use agent_kernel::datapath::load::OBJECT;
use agent_kernel::datapath::probe::Features;
use anyhow::{Context, Result, ensure};
use aya::maps::{Array, HashMap, Map, MapData};
use aya::programs::{CgroupAttachMode, CgroupSockAddr, SchedClassifier};
use aya::{Ebpf, EbpfLoader, Pod};
use proxy_common::abi::{capacity, maps};

/// The object, of which no program is in the kernel yet.
pub(crate) fn load() -> Result<Ebpf> {
    ensure!(!OBJECT.is_empty(), "no BPF object inside: run `cargo xtask build-ebpf`, then build again");
    let (bits, quiet) = (Features::probe().bits(), 0_u8);
    let cpus = u32::try_from(aya::util::nr_cpus().map_or(1, |n| n))?;
    EbpfLoader::new()
        .override_global("FEATURES", &bits, false)
        .override_global("CPUS", &cpus, false)
        .map_max_entries(maps::RING, capacity::RING as u32 * cpus)
        .override_global("AYA_LOG_LEVEL", &quiet, false)
        .load(OBJECT)
        .context("loading the BPF object")
}

/// Loads programs of TC.
pub(crate) fn load_classifiers(ebpf: &mut Ebpf, names: &[&str]) -> Result<()> {
    for name in names {
        let program =
            ebpf.program_mut(name).with_context(|| format!("the BPF object has no program {name}"))?;
        let program: &mut SchedClassifier = program.try_into()?;
        program.load().with_context(|| format!("loading {name}"))?;
    }
    Ok(())
}

/// Loads programs of sockets, and puts them on the hooks of a cgroup for as long as the object is there.
pub(crate) fn attach_sockets(ebpf: &mut Ebpf, names: &[&str], cgroup: &Path) -> Result<()> {
    let directory = File::open(cgroup).with_context(|| format!("opening {}", cgroup.display()))?;
    for name in names {
        let program =
            ebpf.program_mut(name).with_context(|| format!("the BPF object has no program {name}"))?;
        let program: &mut CgroupSockAddr = program.try_into()?;
        program.load().with_context(|| format!("loading {name}"))?;
        program
            .attach(&directory, CgroupAttachMode::Single)
            .with_context(|| format!("attaching {name} to {}", cgroup.display()))?;
    }
    Ok(())
}

/// A loaded program of TC.
pub(crate) fn classifier<'e>(ebpf: &'e Ebpf, name: &str) -> Result<BorrowedFd<'e>> {
    let program = ebpf.program(name).with_context(|| format!("the BPF object has no program {name}"))?;
    let program: &SchedClassifier = program.try_into()?;
    Ok(program.fd()?.as_fd())
}

pub(crate) fn hash<'e, K: Pod, V: Pod>(
    ebpf: &'e mut Ebpf,
    name: &str,
) -> Result<HashMap<&'e mut MapData, K, V>> {
    map(ebpf, name)?.try_into().with_context(|| format!("opening the map {name}"))
}

pub(crate) fn array<'e, V: Pod>(ebpf: &'e mut Ebpf, name: &str) -> Result<Array<&'e mut MapData, V>> {
    map(ebpf, name)?.try_into().with_context(|| format!("opening the map {name}"))
}

fn map<'e>(ebpf: &'e mut Ebpf, name: &str) -> Result<&'e mut Map> {
    ebpf.map_mut(name).with_context(|| format!("the BPF object has no map {name}"))
}
