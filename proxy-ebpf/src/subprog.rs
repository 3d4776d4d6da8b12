//! [`Subprograms`] as global functions: the verifier checks each once, whatever its callers know. They take
//! numbers and the program's context only, since kernels before 5.12 allow no other pointers; what they work
//! on lies in [`Scratch`].

use aya_ebpf::bindings::__sk_buff;
use proxy_common::abi::{FlowId, Role, Run, Timeouts, capacity, feature};
use proxy_common::addr::Port;
use proxy_common::lb::{
    Choice, Entered, Inserted, Recalled, Ring, Subprograms, Tables as _, Verdict, adopt, direct, flow,
    fragment, masquerade, open,
};
use proxy_common::wire::{Edit, End, Packet, parse, rewrite_error};

use crate::feature::has;
use crate::scratch::scratch;
use crate::skb::Skb;
use crate::tables::{MapTables, SocketTables, TcTables};

impl<const PACKET: bool> Subprograms for MapTables<PACKET> {
    #[inline(always)]
    fn snat_port(&self, n: u32) -> Port {
        Port(subprog_snat_port(n) as u16)
    }

    #[inline(always)]
    fn is_snat_port(&self, port: Port) -> bool {
        subprog_is_snat_port(port.0.into()) != 0
    }

    #[inline(always)]
    fn open(&self, _packet: &Packet, known: u32, _edit: &mut Edit) -> Verdict {
        Verdict::from_number(subprog_open(known))
    }

    #[inline(always)]
    fn choose(
        &self,
        _packet: &Packet,
        known: u32,
        attempt: u32,
        last: bool,
        _choice: &mut Choice,
    ) -> Option<Verdict> {
        match subprog_choose(known, attempt, last.into()) {
            UNDECIDED => None,
            number => Some(Verdict::from_number(number)),
        }
    }

    #[inline(always)]
    fn hinted(&self, run: Run, service: u32, hint: u16) -> u32 {
        subprog_hinted(run.first, run.count, service, hint.into())
    }

    #[inline(always)]
    fn meant(&self, slot: u32, service: u32, hint: u16) -> u32 {
        subprog_meant(slot, service, hint.into())
    }

    /// The choice is the one that lies in the working storage, from the call before.
    #[inline(always)]
    fn make(&self, _packet: &Packet, _choice: &Choice, middle_port: Port, id: FlowId) -> u32 {
        subprog_make(middle_port.0.into(), id.0)
    }

    #[inline(always)]
    fn take(&self, ring: Ring) -> FlowId {
        FlowId(subprog_take_record(ring.0))
    }

    #[inline(always)]
    fn join(&self, _packet: &Packet, id: FlowId) -> Inserted {
        Inserted::from_number(subprog_join(id.0))
    }

    #[inline(always)]
    fn progress(&self, _packet: &Packet, id: FlowId, forward: bool) -> u32 {
        subprog_progress(id.0, forward.into())
    }

    #[inline(always)]
    fn look_after(&self, id: FlowId) -> u32 {
        subprog_look_after(id.0)
    }

    #[inline(always)]
    fn enter(&self, id: FlowId, role: Role, holder: &mut FlowId) -> Entered {
        let answer = match PACKET {
            true => subprog_enter(id.0, role.0.into()),
            false => subprog_enter_adopted(id.0, role.0.into()),
        };
        *holder = FlowId(answer & !ENTERED);
        Entered::from_number(((answer & ENTERED) >> ENTERED_AT) as u32)
    }

    #[inline(always)]
    fn dissolve(&self, id: FlowId) -> u32 {
        subprog_dissolve(id.0)
    }

    #[inline(always)]
    fn take_apart(&self, id: FlowId) -> u32 {
        subprog_take_apart(id.0)
    }

    #[inline(always)]
    fn make_own(&self, _packet: &Packet, guest: bool) -> FlowId {
        FlowId(subprog_make_own(guest.into()))
    }

    #[inline(always)]
    fn join_own(&self, id: FlowId) -> u32 {
        subprog_join_own(id.0)
    }

    /// The times are those that lie in the working storage.
    #[inline(always)]
    fn sweep(&self, index: u32, _timeouts: &Timeouts) -> u32 {
        subprog_sweep(index)
    }

    #[inline(always)]
    fn find_source(&self, _packet: &mut Packet) -> u32 {
        subprog_find_source(self.0)
    }

    #[inline(always)]
    fn find_port(&self, _packet: &mut Packet, start: u32, call: u32) -> u32 {
        subprog_find_port(self.0, start, call)
    }

    #[inline(always)]
    fn price(&self, _packet: &mut Packet, at: u32) -> u64 {
        subprog_price(self.0, at)
    }

    #[inline(always)]
    fn enter_source(&self, _packet: &Packet, id: FlowId) -> Entered {
        Entered::from_number(subprog_enter_source(id.0))
    }

    #[inline(always)]
    fn recall_fragment(&self, _packet: &mut Packet) -> Recalled {
        Recalled::from_number(subprog_recall_fragment())
    }

    #[inline(always)]
    fn remember_fragment(&self, _packet: &Packet) -> u32 {
        subprog_remember_fragment()
    }
}

/// What [`subprog_choose`] says of no verdict.
const UNDECIDED: u32 = u32::MAX;
/// Where the answer of [`subprog_enter`] has what came of it: in the highest bits of the holder's index, of
/// which so many records there never are.
pub const ENTERED_AT: u32 = 29;
/// Those bits.
pub const ENTERED: u64 = 0x7 << ENTERED_AT;
const _: () = assert!(capacity::RECORDS < 1 << ENTERED_AT);

/// Parses a packet whose headers are longer than most, and not where they could be read; 0 for what is not
/// ours to read.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn subprog_parse(ctx: *mut __sk_buff, ethernet: u32) -> u32 {
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
pub extern "C" fn subprog_rewrite_error(ctx: *mut __sk_buff, dst: u32) -> u32 {
    let Some(s) = scratch() else { return 0 };
    let mut skb = Skb(ctx);
    skb.pull_more();
    rewrite_error(&mut skb, &s.packet, if dst != 0 { End::Dst } else { End::Src }, &s.edit).into()
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn subprog_open(known: u32) -> u32 {
    let Some(s) = scratch() else { return Verdict::Drop as u32 };
    open::open(&TcTables::NO_PACKET, &s.packet, known, &mut s.edit, &mut s.choice) as u32
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn subprog_choose(known: u32, attempt: u32, last: u32) -> u32 {
    let Some(s) = scratch() else { return Verdict::Drop as u32 };
    let verdict = open::choose(&TcTables::NO_PACKET, &s.packet, known, attempt, last != 0, &mut s.choice);
    verdict.map_or(UNDECIDED, |verdict| verdict as u32)
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn subprog_hinted(first: u32, count: u32, service: u32, hint: u32) -> u32 {
    if !has(feature::WRAP) {
        return 0;
    }
    direct::hinted(&TcTables::NO_PACKET, Run { first, count }, service, hint as u16)
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn subprog_meant(slot: u32, service: u32, hint: u32) -> u32 {
    direct::meant(&TcTables::NO_PACKET, slot, service, hint as u16)
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn subprog_take_record(ring: u32) -> u64 {
    flow::take(&TcTables::NO_PACKET, Ring(ring)).0
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn subprog_make(middle_port: u32, id: u64) -> u32 {
    let Some(s) = scratch() else { return 0 };
    flow::make(&TcTables::NO_PACKET, &s.packet, &s.choice, Port(middle_port as u16), FlowId(id))
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn subprog_join(id: u64) -> u32 {
    let Some(s) = scratch() else { return Inserted::Full as u32 };
    flow::join(&TcTables::NO_PACKET, &s.packet, FlowId(id)) as u32
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn subprog_progress(id: u64, forward: u32) -> u32 {
    let Some(s) = scratch() else { return 0 };
    flow::progress(&TcTables::NO_PACKET, &s.packet, FlowId(id), forward != 0)
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn subprog_look_after(id: u64) -> u32 {
    flow::look_after(&TcTables::NO_PACKET, FlowId(id))
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn subprog_enter(id: u64, role: u32) -> u64 {
    let mut holder = FlowId::NONE;
    let entered = flow::enter(&TcTables::NO_PACKET, FlowId(id), Role(role as u8), &mut holder);
    holder.0 & !ENTERED | (entered as u64) << ENTERED_AT
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn subprog_dissolve(id: u64) -> u32 {
    flow::dissolve(&TcTables::NO_PACKET, FlowId(id))
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn subprog_take_apart(id: u64) -> u32 {
    flow::take_apart(&TcTables::NO_PACKET, FlowId(id))
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn subprog_make_own(guest: u32) -> u64 {
    let Some(s) = scratch() else { return 0 };
    flow::make_own(&TcTables::NO_PACKET, &s.packet, guest != 0).0
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn subprog_join_own(id: u64) -> u32 {
    flow::join_own(&TcTables::NO_PACKET, FlowId(id))
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn subprog_snat_port(n: u32) -> u32 {
    TcTables::NO_PACKET.config().map_or(0, |config| config.snat_port(n).0.into())
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn subprog_is_snat_port(port: u32) -> u32 {
    TcTables::NO_PACKET.config().is_some_and(|config| config.is_snat_port(Port(port as u16))).into()
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn subprog_find_source(ctx: *mut __sk_buff) -> u32 {
    let Some(s) = scratch() else { return 0 };
    masquerade::find_source(&TcTables::new(ctx), &mut s.packet)
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn subprog_find_port(ctx: *mut __sk_buff, start: u32, call: u32) -> u32 {
    let Some(s) = scratch() else { return 0 };
    masquerade::find_port(&TcTables::new(ctx), &mut s.packet, start, call)
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn subprog_price(ctx: *mut __sk_buff, at: u32) -> u64 {
    let Some(s) = scratch() else { return u64::MAX };
    masquerade::price(&TcTables::new(ctx), &mut s.packet, at)
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn subprog_enter_source(id: u64) -> u32 {
    let Some(s) = scratch() else { return Entered::Full as u32 };
    masquerade::enter_source(&TcTables::NO_PACKET, &s.packet, FlowId(id)) as u32
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn subprog_sweep(index: u32) -> u32 {
    let Some(s) = scratch() else { return 0 };
    flow::sweep(&TcTables::NO_PACKET, index, &s.timeouts)
}

/// Makes a flow of the record that lies in the packet from `at` on. Like all of `flows` it has no working
/// storage.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn subprog_adopt(ctx: *mut __sk_buff, at: u32, from: u32) -> u32 {
    let from = match from {
        FROM_TABLES => adopt::From::Tables,
        FROM_OLD_TABLES => adopt::From::OldTables,
        _ => adopt::From::Proxy,
    };
    adopt::adopt(&SocketTables::NO_PACKET, from, |flow| Skb(ctx).copy_record(at, flow))
}

/// See [`adopt::From::Tables`].
pub const FROM_TABLES: u32 = 1;
/// See [`adopt::From::OldTables`].
pub const FROM_OLD_TABLES: u32 = 2;

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn subprog_enter_adopted(id: u64, role: u32) -> u64 {
    let mut holder = FlowId::NONE;
    let entered = flow::enter(&SocketTables::NO_PACKET, FlowId(id), Role(role as u8), &mut holder);
    holder.0 & !ENTERED | (entered as u64) << ENTERED_AT
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn subprog_take(id: u64) -> u32 {
    adopt::take(&SocketTables::NO_PACKET, FlowId(id))
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn subprog_lose(id: u64) -> u32 {
    flow::lose(&SocketTables::NO_PACKET, FlowId(id))
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn subprog_recall_fragment() -> u32 {
    let Some(s) = scratch() else { return 0 };
    fragment::recall(&TcTables::NO_PACKET, &mut s.packet) as u32
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn subprog_remember_fragment() -> u32 {
    let Some(s) = scratch() else { return 0 };
    fragment::remember(&TcTables::NO_PACKET, &s.packet)
}
