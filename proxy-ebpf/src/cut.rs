//! The cut points of `proxy_common::lb::Tables` as global functions: the verifier checks each once, whatever its
//! callers know. They take numbers and the program's context only, since kernels before 5.12 allow no other pointers;
//! what they work on lies in [`Scratch`].

use aya_ebpf::bindings::__sk_buff;
use proxy_common::abi::{
    AffinityKey, FlowId, FragmentKey, FrontendKey, Leg, Role, RouteKey, SourceKey, Timeouts, capacity,
};
use proxy_common::addr::Port;
use proxy_common::lb::masquerade::Allowance;
use proxy_common::lb::{
    self, Choice, Entered, Inserted, Tables as _, Verdict, adopt, flow, ingress, lost, masquerade, open,
};
use proxy_common::wire::answer::Answer;
use proxy_common::wire::{Edit, End, Packet, crc32c, parse, rewrite_error};

use crate::maps;
use crate::skb::Skb;
use crate::tables::{Kernel, Socket};

/// Working storage of one CPU. TC programs are not interrupted by their like, so each has it for itself while it runs.
/// The program `flows` may be interrupted by them and touches only `timeouts`, and the time, which is off by a tick at most
/// for it.
#[repr(C)]
pub struct Scratch {
    /// The packet in hand.
    pub packet: Packet,
    /// What is to be done with it.
    pub edit: Edit,
    /// The backend that was chosen for it.
    pub choice: Choice,
    /// The leg that is being entered.
    pub leg: Leg,
    /// What is asked of the tables that have these keys.
    pub route: RouteKey,
    /// See above.
    pub frontend: FrontendKey,
    /// See above.
    pub source: SourceKey,
    /// See above.
    pub client: AffinityKey,
    /// See above.
    pub fragment: FragmentKey,
    /// What is asked of the node's sockets: a `bpf_sock_tuple`.
    pub asked: [u32; 9],
    /// A refusal in the making.
    pub answer: Answer,
    /// The time, and the tick at which it was read.
    pub now: u64,
    /// See above.
    pub tick: u64,
    /// The next place in each ring.
    pub places: [u32; lb::Ring::COUNT as usize],
    /// How far searches for source ports may still go.
    pub allowance: Allowance,
    /// What `flows` was told.
    pub timeouts: Timeouts,
}

/// Where the answer of [`cut_enter`] has what came of it: in the highest bits of the holder's index, of which so many
/// records there never are.
pub const ENTERED_AT: u32 = 29;
/// Those bits.
pub const ENTERED: u64 = 0x7 << ENTERED_AT;
const _: () = assert!(capacity::RECORDS < 1 << ENTERED_AT);

/// Words of 64 bits that hold a [`Scratch`].
pub const WORDS: usize = size_of::<Scratch>().div_ceil(8);

/// This CPU's working storage.
#[inline(always)]
pub fn scratch() -> Option<&'static mut Scratch> {
    // SAFETY: the value is as large and aligned as a Scratch, all of whose fields are integers and enums that were
    // written before they are read; see there for why nobody else has it.
    maps::SCRATCH.get_ptr_mut(0).and_then(|words| unsafe { words.cast::<Scratch>().as_mut() })
}

/// Parses a packet whose headers are longer than most, and not where they could be read; 0 for what is not ours to read.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn cut_parse(ctx: *mut __sk_buff, ethernet: u32) -> u32 {
    let Some(s) = scratch() else { return 0 };
    let skb = Skb(ctx);
    skb.pull_more();
    let parsed = if ethernet != 0 {
        parse::<_, true>(&skb, &mut s.packet)
    } else {
        parse::<_, false>(&skb, &mut s.packet)
    };
    parsed.is_some().into()
}

/// Applies the edit to an ICMP error, to its destination or its source; 0 when that fails.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn cut_rewrite_error(ctx: *mut __sk_buff, dst: u32) -> u32 {
    let Some(s) = scratch() else { return 0 };
    let mut skb = Skb(ctx);
    skb.pull_more();
    rewrite_error(&mut skb, &s.packet, if dst != 0 { End::Dst } else { End::Src }, &s.edit).into()
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn cut_slow(known: u32) -> u32 {
    let Some(s) = scratch() else { return Verdict::Drop as u32 };
    ingress::slow(&Kernel::NOWHERE, &s.packet, known, &mut s.edit, &mut s.choice) as u32
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn cut_choose(known: u32, attempt: u32) -> u32 {
    let Some(s) = scratch() else { return Verdict::Drop as u32 };
    open::choose(&Kernel::NOWHERE, &s.packet, known, attempt, &mut s.choice) as u32
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn cut_make(middle_port: u32) -> u64 {
    let Some(s) = scratch() else { return 0 };
    flow::make(&Kernel::NOWHERE, &s.packet, &s.choice, Port(middle_port as u16)).0
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn cut_join(id: u64) -> u32 {
    let Some(s) = scratch() else { return Inserted::Full as u32 };
    flow::join(&Kernel::NOWHERE, &s.packet, FlowId(id)) as u32
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn cut_progress(id: u64, forward: u32) -> u32 {
    let Some(s) = scratch() else { return 0 };
    flow::progress(&Kernel::NOWHERE, &s.packet, FlowId(id), forward != 0)
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn cut_look_after(id: u64) -> u32 {
    flow::look_after(&Kernel::NOWHERE, FlowId(id))
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn cut_enter(id: u64, role: u32) -> u64 {
    let mut holder = FlowId::NONE;
    let entered = flow::enter(&Kernel::NOWHERE, FlowId(id), Role(role as u8), &mut holder);
    holder.0 & !ENTERED | (entered as u64) << ENTERED_AT
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn cut_dissolve(id: u64) -> u32 {
    flow::dissolve(&Kernel::NOWHERE, FlowId(id))
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn cut_take_apart(id: u64) -> u32 {
    flow::take_apart(&Kernel::NOWHERE, FlowId(id))
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn cut_make_own(guest: u32) -> u64 {
    let Some(s) = scratch() else { return 0 };
    flow::make_own(&Kernel::NOWHERE, &s.packet, guest != 0).0
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn cut_join_own(id: u64) -> u32 {
    flow::join_own(&Kernel::NOWHERE, FlowId(id))
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn cut_snat_port(n: u32) -> u32 {
    Kernel::NOWHERE.config().map_or(0, |config| config.snat_port(n).0.into())
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn cut_is_snat_port(port: u32) -> u32 {
    Kernel::NOWHERE.config().is_some_and(|config| config.is_snat_port(Port(port as u16))).into()
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn cut_find_source(ctx: *mut __sk_buff) -> u32 {
    let Some(s) = scratch() else { return 0 };
    masquerade::find_source(&Kernel::new(ctx), &mut s.packet)
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn cut_port(ctx: *mut __sk_buff, at: u32) -> u32 {
    let Some(s) = scratch() else { return 0 };
    masquerade::find_port(&Kernel::new(ctx), &mut s.packet, at)
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn cut_price(ctx: *mut __sk_buff) -> u64 {
    let Some(s) = scratch() else { return u64::MAX };
    masquerade::price(&Kernel::new(ctx), &s.packet)
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn cut_source(id: u64) -> u32 {
    let Some(s) = scratch() else { return Entered::Full as u32 };
    masquerade::enter_source(&Kernel::NOWHERE, &s.packet, FlowId(id)) as u32
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn cut_sweep(index: u32) -> u32 {
    let Some(s) = scratch() else { return 0 };
    flow::sweep(&Kernel::NOWHERE, index, &s.timeouts)
}

/// Makes a flow of the record that lies in the packet from `at` on. Like all of `flows` it has no working storage.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn cut_adopt(ctx: *mut __sk_buff, at: u32, from: u32) -> u32 {
    let from = match from {
        FROM_TABLES => adopt::From::Tables,
        FROM_OLD_TABLES => adopt::From::OldTables,
        _ => adopt::From::Proxy,
    };
    adopt::adopt(&Socket::NOWHERE, from, |flow| Skb(ctx).copy_record(at, flow))
}

/// See [`adopt::From::Tables`].
pub const FROM_TABLES: u32 = 1;
/// See [`adopt::From::OldTables`].
pub const FROM_OLD_TABLES: u32 = 2;

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn cut_enter_adopted(id: u64, role: u32) -> u64 {
    let mut holder = FlowId::NONE;
    let entered = flow::enter(&Socket::NOWHERE, FlowId(id), Role(role as u8), &mut holder);
    holder.0 & !ENTERED | (entered as u64) << ENTERED_AT
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn cut_take(id: u64) -> u32 {
    adopt::take(&Socket::NOWHERE, FlowId(id))
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn cut_lose(id: u64) -> u32 {
    lost::lose(&Socket::NOWHERE, FlowId(id))
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn cut_recall() -> u32 {
    let Some(s) = scratch() else { return 0 };
    lb::recall_fragment(&Kernel::NOWHERE, &mut s.packet) as u32
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn cut_remember() -> u32 {
    let Some(s) = scratch() else { return 0 };
    lb::remember_fragment(&Kernel::NOWHERE, &s.packet)
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn cut_crc(diff: u32, following: u32) -> u32 {
    crc32c::difference(diff, following)
}
