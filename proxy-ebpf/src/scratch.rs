//! The working storage of the TC and XDP programs.

use aya_ebpf::btf_maps::PerCpuArray;
use aya_ebpf::macros::btf_map;
use proxy_common::abi::{AffinityKey, FragmentKey, FrontendKey, Leg, RouteKey, SourceKey, Timeouts};
use proxy_common::lb::masquerade::Allowance;
use proxy_common::lb::{Choice, Ring};
use proxy_common::wire::reject::Reply;
use proxy_common::wire::{Edit, Packet};

/// Working storage of one CPU. TC and XDP programs are not interrupted by their like, so each has it for itself while
/// it runs. The program `flows` may be interrupted by them and touches only `timeouts`, and the time, which
/// is off by a tick at most for it.
#[repr(C)]
pub struct Scratch {
    pub packet: Packet,
    pub edit: Edit,
    /// Of a packet that is sent on at the driver: as it came, what its destination becomes, and to which neighbour it goes.
    pub arrived: Packet,
    pub enters: Edit,
    pub ethernet: [u32; 3],
    pub choice: Choice,
    pub leg: Leg,
    // What is asked of the tables that have these keys.
    pub route: RouteKey,
    pub frontend: FrontendKey,
    pub source: SourceKey,
    pub client: AffinityKey,
    pub fragment: FragmentKey,
    /// What is asked of the node's sockets: a `bpf_sock_tuple`.
    pub asked: [u32; 9],
    pub reply: Reply,
    /// The time, and the tick at which it was read.
    pub now: u64,
    pub tick: u64,
    /// The next place in each ring.
    pub places: [u32; Ring::COUNT as usize],
    /// How far searches for source ports may still go.
    pub allowance: Allowance,
    /// What `flows` was given.
    pub timeouts: Timeouts,
}

/// Words of 64 bits that hold a [`Scratch`].
const WORDS: usize = size_of::<Scratch>().div_ceil(8);

#[btf_map]
pub static SCRATCH: PerCpuArray<[u64; WORDS], 1> = PerCpuArray::new();

/// This CPU's working storage.
#[inline(always)]
pub fn scratch() -> Option<&'static mut Scratch> {
    // SAFETY: the value is as large and aligned as a Scratch, all of whose fields are integers and enums that
    // were written before they are read; see there for why nobody else has it.
    SCRATCH.get_ptr_mut(0).and_then(|words| unsafe { words.cast::<Scratch>().as_mut() })
}
