//! The real programs and their maps in this kernel, loaded for one test and never attached to an interface: packets
//! go through them by `BPF_PROG_TEST_RUN`.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::Path;

use agent_core::datapath::Datapath as _;
use agent_core::plan::{Actual, Step};
use agent_kernel::datapath::flow::{Flows, Timeouts};
use agent_kernel::datapath::load::{Capacities, Loaded, ProgramLog};
use agent_kernel::datapath::probe::Features;
use agent_kernel::datapath::store::pin::BpfRoot;
use agent_kernel::datapath::tables::kernel::Kernel;
use anyhow::{Context, Result, bail, ensure};
use aya::Pod;
use aya::maps::{Array, HashMap, Map, MapData, PerCpuArray, Queue};
use aya::programs::{ProgramError, SchedClassifier, TestRun as _, TestRunOptions};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use proxy_common::abi::{Backend, Flow, FlowId, Hook, ask};
use proxy_common::testing::{ByteFrame, Outcome};
use proxy_common::wire::wrap;

/// Where `ingress_ifindex` and `ifindex` lie in `struct __sk_buff`, the context of a test run.
const INGRESS_IFINDEX_AT: usize = 36;
const IFINDEX_AT: usize = 40;
/// The interface of a test run that names none.
const LOOPBACK: u32 = 1;
/// Room for what a program makes of a packet.
const LONGEST: usize = 4096;

/// Programs and maps.
#[derive(Debug)]
pub struct Programs {
    loaded: Loaded,
    kernel: Kernel,
    flows: Flows,
    root: BpfRoot,
    /// What was written since the tables were empty.
    written: Vec<Step>,
}

/// Runs `work` on a thread with mounts of its own, and gives it a directory: the bpffs that is mounted there ends
/// with the thread, however that ends.
pub fn with_own_mounts<T: Send>(work: impl FnOnce(&Path) -> Result<T> + Send) -> Result<T> {
    let prefix = format!("{}-", crate::unique());
    let directory = tempfile::Builder::new().prefix(&prefix).tempdir().context("making a directory")?;
    let alone = || {
        unshare(CloneFlags::CLONE_NEWNS).context("making a mount namespace")?;
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
            .context("keeping mounts to ourselves")?;
        work(directory.path())
    };
    std::thread::scope(|scope| {
        scope.spawn(alone).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

impl Programs {
    /// Loads the embedded object, with its pins below the directory of [`with_own_mounts`]. All records are free then.
    pub fn load(directory: &Path, capacities: &Capacities) -> Result<Self> {
        ensure!(nix::unistd::geteuid().is_root(), "this runs the real programs: run it as root");
        let root = BpfRoot::new(directory.join("bpf"));
        let mut loaded = Loaded::open(&root, &Features::probe(), capacities, ProgramLog::Off)?;
        loaded.load_rest()?;
        let (kernel, flows) = (Kernel::open(&root)?, Flows::open(&root)?);
        let programs = Self { loaded, kernel, flows, root, written: Vec::new() };
        programs.sweep()?;
        Ok(programs)
    }

    /// Every living flow.
    pub fn flows(&self) -> Result<Vec<Flow>> {
        let mut found = Vec::new();
        self.flows.scan(|flow| found.push(*flow))?;
        Ok(found)
    }

    /// Ends the living flows that are `unwanted`.
    pub fn end_flows(&self, unwanted: impl Fn(&Flow) -> bool) -> Result<()> {
        let ids: Vec<FlowId> =
            self.flows()?.iter().filter(|flow| unwanted(flow)).map(|flow| flow.id).collect();
        let ended = self.flows.end(&ids)? as usize;
        ensure!(ended == ids.len(), "{ended} of {} flows were ended", ids.len());
        Ok(())
    }

    /// Ends the flows with these ids, if they are there; how many were.
    pub fn end_ids(&self, ids: &[FlowId]) -> Result<u32> {
        Ok(self.flows.end(ids)?)
    }

    /// Looks through all records once, as the agent does; how many flows were over.
    pub fn sweep(&self) -> Result<u32> {
        let starts = (0..self.flows.max()).step_by(ask::MOST as usize);
        starts.map(|from| Ok(self.flows.sweep(from, ask::MOST, &Timeouts::CONNTRACK)?)).sum()
    }

    /// Reads the configuration tables.
    pub fn read(&mut self) -> Result<Actual> {
        Ok(self.kernel.read()?)
    }

    /// The programs.
    pub fn loaded(&mut self) -> &mut Loaded {
        &mut self.loaded
    }

    /// A hash map that packets write; while its pin is there.
    pub fn hash<K: Pod, V: Pod>(&self, name: &str) -> Result<HashMap<MapData, K, V>> {
        Ok(Map::from_map_data(self.open(name)?)?.try_into()?)
    }

    /// An array; while its pin is there.
    pub fn array<V: Pod>(&self, name: &str) -> Result<Array<MapData, V>> {
        Ok(Map::from_map_data(self.open(name)?)?.try_into()?)
    }

    /// A queue; while its pin is there.
    pub fn queue<V: Pod>(&self, name: &str) -> Result<Queue<MapData, V>> {
        Ok(Map::from_map_data(self.open(name)?)?.try_into()?)
    }

    /// A map of counters; while its pin is there.
    pub fn counters<V: Pod>(&self, name: &str) -> Result<PerCpuArray<MapData, V>> {
        Ok(Map::from_map_data(self.open(name)?)?.try_into()?)
    }

    fn open(&self, name: &str) -> Result<MapData> {
        MapData::from_pin(self.root.map(name)).with_context(|| format!("opening map {name}"))
    }

    /// Takes everything out of the configuration tables but the settings.
    pub fn empty(&mut self) -> Result<()> {
        let steps: Vec<Step> = self.written.drain(..).filter_map(|step| undo(&step)).collect();
        self.write(&steps)
    }

    /// Writes to the configuration tables.
    pub fn apply(&mut self, steps: &[Step]) -> Result<()> {
        self.written.extend_from_slice(steps);
        self.write(steps)
    }

    fn write(&mut self, steps: &[Step]) -> Result<()> {
        self.kernel
            .apply(steps)
            .map_err(|(done, error)| anyhow::Error::new(error).context(steps[done].to_string()))
    }

    /// Runs the program of a hook on a packet at an interface of this network namespace. `None` when the kernel
    /// does not take so short a packet.
    pub fn run(&self, bytes: &[u8], hook: Hook, ethernet: bool, ifindex: u32) -> Result<Option<Outcome>> {
        self.run_from(0, bytes, hook, ethernet, ifindex)
    }

    /// The same with a packet that has come in by the interface `from`, or was sent by this node itself if that is 0.
    pub fn run_from(
        &self,
        from: u32,
        bytes: &[u8],
        hook: Hook,
        ethernet: bool,
        ifindex: u32,
    ) -> Result<Option<Outcome>> {
        let mut context = [0; IFINDEX_AT + 4];
        context[INGRESS_IFINDEX_AT..IFINDEX_AT].copy_from_slice(&from.to_ne_bytes());
        context[IFINDEX_AT..].copy_from_slice(&ifindex.to_ne_bytes());
        let mut out = vec![0; LONGEST];
        let options = TestRunOptions {
            data_in: Some(bytes),
            data_out: Some(&mut out),
            ctx_in: (ifindex != LOOPBACK || from != 0).then_some(&context[..]),
            ..Default::default()
        };
        let done = match self.classifier(hook, ethernet)?.test_run(options) {
            Ok(done) => done,
            // Without an Ethernet header, or with nothing behind it, there is no skb.
            Err(error) if is_invalid(&error) && bytes.len() < 14 + 40 => return Ok(None),
            Err(error) => {
                return Err(error).with_context(|| format!("a test run with {} bytes", bytes.len()));
            }
        };
        out.truncate(done.data_size_out as usize);
        let changed = out != bytes;
        let frame = ByteFrame { bytes: out, partial: false };
        Ok(Some(match (done.return_value as i32, changed) {
            (-1, false) => Outcome::Passed,
            (-1, true) => Outcome::Rewritten(frame),
            (2, _) => Outcome::Dropped,
            // Behind the stack nothing is refused: an answer leaves by another interface.
            (7, true) if hook == Hook::EGRESS => Outcome::Rewritten(frame),
            (7, true) if is_longer(&frame.bytes, bytes, ethernet) => Outcome::Wrapped(frame),
            (7, true) => Outcome::Rejected(frame),
            (7, false) => Outcome::Waits,
            (other, _) => bail!("the program returned {other}"),
        }))
    }

    fn classifier(&self, hook: Hook, ethernet: bool) -> Result<&SchedClassifier> {
        let name = match (hook, ethernet) {
            (Hook::INGRESS, true) => "tc_ingress",
            (Hook::INGRESS, false) => "tc_ingress_l3",
            (_, true) => "tc_egress",
            (_, false) => "tc_egress_l3",
        };
        self.loaded.classifier(name).with_context(|| format!("the BPF object has no program {name}"))
    }
}

/// What takes a written element away again.
fn undo(step: &Step) -> Option<Step> {
    Some(match *step {
        Step::PutIface(index, _) => Step::DeleteIface(index),
        Step::PutRoute(key, _) => Step::DeleteRoute(key),
        Step::PutServicePorts(word, _) => Step::PutServicePorts(word, 0),
        Step::PutService(id, _) => Step::DeleteService(id),
        Step::PutBackend(index, _) => Step::PutBackend(index, Backend::retired(0)),
        Step::PutSlot(slot, _) => Step::PutSlot(slot, 0),
        Step::PutSource(key) => Step::DeleteSource(key),
        Step::PutFrontend(key, _) => Step::DeleteFrontend(key),
        Step::PutAddress(addr, _) => Step::DeleteAddress(addr),
        _ => return None,
    })
}

/// Whether a packet is another one with an IP header before it.
fn is_longer(is: &[u8], was: &[u8], ethernet: bool) -> bool {
    let at = if ethernet { 14 } else { 0 };
    let header = is.len().saturating_sub(was.len());
    [wrap::length(true), wrap::length(false)].contains(&header) && is.get(at + header..) == was.get(at..)
}

fn is_invalid(error: &ProgramError) -> bool {
    let ProgramError::SyscallError(error) = error else { return false };
    error.io_error.kind() == ErrorKind::InvalidInput
}

/// Removes every element of a hash map.
pub fn clear<K: Pod, V: Pod>(map: &mut HashMap<MapData, K, V>) -> Result<()> {
    let keys = map.keys().collect::<Result<Vec<K>, _>>()?;
    keys.iter().try_for_each(|key| Ok(map.remove(key)?))
}

/// Every element of a hash map.
pub fn entries<K: Pod + Ord, V: Pod>(map: &HashMap<MapData, K, V>) -> Result<BTreeMap<K, V>> {
    Ok(map.iter().collect::<Result<_, _>>()?)
}
