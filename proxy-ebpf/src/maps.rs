//! One static per map, in the order of the table in `proxy_common::abi`, which says for each who writes it,
//! who reads it and what happens when it is full. SCRATCH is in [`crate::scratch`], beside what lies in it.

use aya_ebpf::Global;
use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC};
use aya_ebpf::btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, Queue, SkStorage};
use aya_ebpf::macros::btf_map;
use proxy_common::abi::{
    Affinity, AffinityKey, AgentState, Backend, Config, Device, Flow, FlowId, Fragment, FragmentKey,
    Frontend, FrontendKey, Iface, Key, Leg, PeerKey, Reason, Secret, ServiceName, ServiceStats, SocketEntry,
    SocketState, Tunnel, TunnelKey, Tuple, Warning, capacity,
};
use proxy_common::addr::Addr;
use proxy_common::lb;

/// Written only by the agent, in low numbers: memory is taken as entries come.
const SPARSE: usize = BPF_F_NO_PREALLOC as usize;

#[btf_map]
pub static FRONTENDS: HashMap<FrontendKey, Frontend, { capacity::FRONTENDS }, SPARSE> = HashMap::new();
#[btf_map]
pub static SLOTS: Array<u32, { capacity::SLOTS }> = Array::new();
#[btf_map]
pub static BACKENDS: Array<Backend, { capacity::BACKENDS }> = Array::new();
#[btf_map]
pub static ENDPOINT_BITS: Array<u64, { capacity::ENDPOINT_BITS }> = Array::new();
#[btf_map]
pub static TAKEN: HashMap<Tuple, u32, { capacity::TAKEN }, SPARSE> = HashMap::new();
#[btf_map]
pub static ADDRESSES: HashMap<Addr, u32, { capacity::ADDRESSES }, SPARSE> = HashMap::new();
#[btf_map]
pub static ADDRESS_BITS: Array<u64, { capacity::ADDRESS_BITS }> = Array::new();
#[btf_map]
pub static SOURCES: LpmTrie<[u32; 5], u32, { capacity::SOURCES }> = LpmTrie::new();
#[btf_map]
pub static IFACES: HashMap<u32, Iface, { capacity::IFACES }, SPARSE> = HashMap::new();
#[btf_map]
pub static DEVICES: HashMap<u32, Device, { capacity::DEVICES }, SPARSE> = HashMap::new();
#[btf_map]
pub static MASQUERADE: LpmTrie<[u32; 5], Addr, { capacity::MASQUERADE }> = LpmTrie::new();
#[btf_map]
pub static TUNNELS: HashMap<TunnelKey, Tunnel, { capacity::TUNNELS }, SPARSE> = HashMap::new();
#[btf_map]
pub static SERVICE_PORTS: Array<u64, { capacity::SERVICE_PORTS }> = Array::new();
#[btf_map]
pub static CONFIG: Array<Config, 1> = Array::new();
#[btf_map]
pub static SERVICES: HashMap<u32, ServiceName, { capacity::SERVICES }, SPARSE> = HashMap::new();
#[btf_map]
pub static RETIRED: Array<u32, 1> = Array::new();
#[btf_map]
pub static AGENT: Array<AgentState, 1> = Array::new();
#[btf_map]
pub static COMPLAINTS: Array<Warning, { capacity::COMPLAINTS }> = Array::new();
#[btf_map]
pub static PAUSE: Array<u64, 1> = Array::new();
/// Preallocated: a packet must not wait for memory.
#[btf_map]
pub static FLOWS: HashMap<Key, Leg, { capacity::FLOWS }> = HashMap::new();
#[btf_map]
pub static FLOW_FILTER: Array<u64, { capacity::FLOW_FILTER }> = Array::new();
/// Such a map begins at a page, so that each record begins at a cache line.
#[btf_map]
pub static RECORDS: Array<Flow, { capacity::RECORDS }, { BPF_F_MMAPABLE as usize }> = Array::new();
#[btf_map]
pub static SECRET: Array<Secret, 1> = Array::new();
#[btf_map]
pub static FREE: Queue<u32, { capacity::RECORDS }> = Queue::new();
#[btf_map]
pub static RING: Array<FlowId, { capacity::RING }> = Array::new();
#[btf_map]
pub static FRAGMENTS: LruHashMap<FragmentKey, Fragment, { capacity::FRAGMENTS }> = LruHashMap::new();
#[btf_map]
pub static AFFINITY: LruHashMap<AffinityKey, Affinity, { capacity::AFFINITY }> = LruHashMap::new();
#[btf_map]
pub static SOCKETS: SkStorage<SocketState> = SkStorage::new();
#[btf_map]
pub static PEERS: LruHashMap<PeerKey, SocketEntry, { capacity::PEERS }> = LruHashMap::new();
#[btf_map]
pub static REASONS: PerCpuArray<u64, { Reason::COUNT }> = PerCpuArray::new();
/// All CPUs count in one place, once for each connection: a place for each of them would take a hundred MiB on large machines.
#[btf_map]
pub static SERVICE_STATS: Array<ServiceStats, { capacity::SERVICES }> = Array::new();

/// Bits of `proxy_common::abi::feature`, set by the agent when it loads the object. Frozen, so the verifier
/// removes what the kernel lacks before it looks at it.
#[unsafe(no_mangle)]
pub static FEATURES: Global<u32> = Global::new(0);

/// Places in one ring of one CPU, and how many CPUs have rings; set by the agent when it loads the object.
#[unsafe(no_mangle)]
pub static PLACES: Global<u32> = Global::new(capacity::RING as u32 / lb::Ring::COUNT);
/// Of the places in a ring those for flows whose packets are wrapped, of which one side alone is seen: these never are more
/// than a part of all flows.
#[unsafe(no_mangle)]
pub static DIRECT_PLACES: Global<u32> = Global::new(capacity::RING as u32 / lb::Ring::COUNT);
#[unsafe(no_mangle)]
pub static CPUS: Global<u32> = Global::new(1);

/// How many ticks a window has, as a power of two; set by the agent when it loads the object.
#[unsafe(no_mangle)]
pub static WINDOW_SHIFT: Global<u32> = Global::new(4);

// Maps that only user space touches would otherwise be dropped from the object.
#[used]
static KEEP_SERVICES: &HashMap<u32, ServiceName, { capacity::SERVICES }, SPARSE> = &SERVICES;
#[used]
static KEEP_RETIRED: &Array<u32, 1> = &RETIRED;
#[used]
static KEEP_AGENT: &Array<AgentState, 1> = &AGENT;
#[used]
static KEEP_COMPLAINTS: &Array<Warning, { capacity::COMPLAINTS }> = &COMPLAINTS;
