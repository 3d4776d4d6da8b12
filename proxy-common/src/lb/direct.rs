//! Direct server return: packets from outside go to the endpoint's node as they are, in a packet of their own, and that
//! node answers the client itself (ARCHITECTURE.md, section 3f).
//!
//! Of the node that the client has found: `way_to` and [`wrapping`]. Of the endpoint's node: [`inside`], `enter`.

use super::select::{self, Source};
use super::{Ring, Subprograms, Tables, Verdict, adopt};
use crate::abi::{Backend, FlowId, FrontendKey, Reason, Role, Run, Tunnel, TunnelKey, address, frontend};
use crate::addr::{Addr, Proto};
use crate::wire::{Edit, Kind, Packet, wrap};

/// How many places of the ring of such flows are looked at for a new one.
const PLACES: usize = 4;
/// How many slots are looked through for the endpoint that another node means: more endpoints of one Service a node
/// rarely has.
const SLOTS: u32 = 128;

/// Whether packets of this protocol are wrapped. SCTP's are not: its ends know all addresses of each other.
#[inline(always)]
const fn is_wrapped(proto: Proto) -> bool {
    matches!(proto, Proto::TCP | Proto::UDP)
}

/// The address of the endpoint's node, if a new flow from outside is to go there wrapped.
#[inline(always)]
pub(super) fn way_to<T: Tables>(tables: &T, packet: &Packet, flags: u32, backend: &Backend) -> Option<Addr> {
    if !tables.wraps() {
        return None;
    }
    let here = packet.wrapped != 0 || backend.is_local() || backend.node == 0;
    // Fragments are as long as their way allows, and would become too long.
    let fragment = matches!(packet.kind, Kind::FirstFragment);
    if flags & frontend::DSR == 0 || here || fragment || !is_wrapped(packet.tuple.proto) {
        return None;
    }
    let tunnel = tables.tunnel(&TunnelKey::new(backend.node, &packet.tuple.dst))?;
    // What the node itself asks for would come to it as from itself.
    (tunnel.is_ready() && !tunnel.to.same(&packet.tuple.src) && has_place(tables)).then_some(tunnel.to)
}

/// Whether there still is a way to a node, for a packet to a Service.
#[inline(always)]
pub(super) fn leads<T: Tables>(tables: &T, packet: &Packet, node: u32) -> bool {
    tables.tunnel(&TunnelKey::new(node, &packet.tuple.dst)).is_some_and(|tunnel| tunnel.ifindex != 0)
}

/// Whether there may be one more flow of which only the client's side passes here. There are no more than places in
/// their ring, and an old one keeps its place.
#[inline(always)]
fn has_place<T: Tables>(tables: &T) -> bool {
    for _ in 0..PLACES {
        let stands = tables.next_in_ring(Ring::DIRECT);
        let kept = stands != FlowId::NONE
            && tables.record(stands.index(), |flow| flow.is(stands) && flow.old != 0) == Some(true);
        if !kept {
            return true;
        }
        // The same again, and on to the next place.
        let _ = tables.put_in_ring(Ring::DIRECT, stands);
    }
    false
}

/// How a packet is to be wrapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrapping {
    /// By this way.
    By(Tunnel),
    /// Not at all: it may be so many bytes long at most.
    TooBig(u32),
    /// Not at all: no way is known any more.
    None,
}

/// How a packet with [`Verdict::Wrap`] is to be wrapped. `len` is its length from the IP header on, in bytes, or that of
/// the longest packet that will be made of it.
#[inline(always)]
pub fn wrapping<T: Tables>(tables: &T, packet: &Packet, edit: &Edit, len: u32) -> Wrapping {
    let Some(mut tunnel) = tables.tunnel(&TunnelKey::new(edit.out, &packet.tuple.dst)) else {
        return Wrapping::None;
    };
    if tunnel.ifindex == 0 {
        return Wrapping::None;
    }
    let room = tunnel.mtu.saturating_sub(wrap::length(packet.v4) as u32);
    if len > room {
        return Wrapping::TooBig(room);
    }
    // An answer in the name of a NodePort is that of the node which asks for it.
    if tables.address(&packet.tuple.dst) & (address::NODE_PORT | address::NODE) != 0 {
        tunnel.from = packet.tuple.dst;
    }
    Wrapping::By(tunnel)
}

/// Whether a packet may have another one inside that is ours: one whose header has nothing but what it must have.
#[inline(always)]
#[must_use]
pub const fn may_wrap(packet: &Packet) -> bool {
    matches!(packet.kind, Kind::Other)
        && packet.tuple.proto.0 == wrap::protocol(packet.v4).0
        && (packet.l4 - packet.l3) as usize == wrap::length(packet.v4)
}

/// What is inside a packet.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Inside {
    /// Nothing of ours: the packet is the stack's, such as a CNI's tunnel.
    Other = 0,
    /// A packet to a Service.
    Ours,
    /// The question of another node's agent whether packets get through.
    Probe,
}

/// [`Packet::wrapped`]: another node has wrapped it.
pub const WRAPPED: u8 = 1 << 0;
/// With that: it is for the address that the wrapping has come from, where NodePorts count.
pub const NODE_PORT: u8 = 1 << 1;

/// What `packet`, which has been read inside `outer`, is; if it is ours, it is marked, and has the hint. Nothing counts
/// that could not have been sent to this node as it is.
#[inline(always)]
pub fn inside<T: Tables>(tables: &T, outer: &Packet, hint: u16, packet: &mut Packet) -> Inside {
    let tuple = &packet.tuple;
    if outer.v4 != packet.v4
        || tables.address(&outer.tuple.dst) & address::NODE == 0
        || !is_wrapped(tuple.proto)
        || matches!(packet.kind, Kind::Other)
    {
        return Inside::Other;
    }
    let Some(config) = tables.config() else { return Inside::Other };
    // A pod is no node: what it wraps is not looked into, or it could speak in others' names.
    if matches!(select::source_of(tables, config, &outer.tuple.src, outer.ifindex), Source::Pod) {
        return Inside::Other;
    }
    let port = config.probe_port;
    if tuple.proto == Proto::UDP
        && matches!(packet.kind, Kind::Whole)
        && tuple.dport == port
        && port.0 != 0
        && tuple.dst.same(&outer.tuple.dst)
    {
        // Who leaves what is new to another proxy does not say that packets get through.
        return if adopt::leaves_new(tables) { Inside::Other } else { Inside::Probe };
    }
    let node_port = tuple.dst.same(&outer.tuple.src);
    let known = tables.address(&tuple.dst);
    let external = known & address::EXTERNAL != 0;
    let ours = if matches!(packet.kind, Kind::LaterFragment) {
        external || node_port
    } else {
        let mut key = FrontendKey::new(tuple.dst, tuple.dport, tuple.proto);
        external && tables.frontend(&key).is_some()
            || node_port && {
                key.addr = tuple.dst.wildcard();
                tables.frontend(&key).is_some()
            }
            || known & address::CLUSTER_IP == 0 && has_flow(tables, packet)
    };
    if !ours {
        return Inside::Other;
    }
    packet.wrapped = WRAPPED | if node_port { NODE_PORT } else { 0 };
    packet.hint = hint;
    Inside::Ours
}

/// Whether a client's packet belongs to a flow, which may have outlived its Service.
#[inline(always)]
fn has_flow<T: Tables>(tables: &T, packet: &Packet) -> bool {
    let (key, source) = tables.key_of(packet);
    tables.leg_at(&key).is_some_and(|(leg, _)| leg.role() == Role::OUTER && leg.near() == source)
}

/// A packet that was wrapped and belongs to no flow. It never goes on as it is: it would come back by the routes.
#[inline(always)]
pub(super) fn enter<T: Subprograms>(tables: &T, packet: &Packet, edit: &mut Edit) -> Verdict {
    let known = tables.address(&packet.tuple.dst) & address::EXTERNAL
        | if packet.wrapped & NODE_PORT != 0 { address::NODE_PORT } else { 0 };
    // Another proxy on this node knows an external address, but not another node's.
    let passes = packet.wrapped & NODE_PORT == 0 && adopt::leaves_new(tables);
    match tables.open(packet, known, edit) {
        // Nor can it wait: it would come again as something else.
        Verdict::Pass | Verdict::Wait if !passes => {
            tables.count(Reason::WrapFailed);
            Verdict::Drop
        }
        verdict => verdict,
    }
}

/// The backend among the slots of a run that another node means by its hint; 0 if there is none.
#[inline(always)]
pub fn hinted<T: Subprograms>(tables: &T, run: Run, service: u32, hint: u16) -> u32 {
    // Little in the loop: the verifier walks through all of it.
    for n in 0..SLOTS {
        if n >= run.count {
            break;
        }
        let index = tables.meant(run.first.wrapping_add(n), service, hint);
        if index != 0 {
            return index;
        }
    }
    0
}

/// The backend in a slot, if another node means it by its hint; else 0.
#[inline(always)]
pub fn meant<T: Tables>(tables: &T, slot: u32, service: u32, hint: u16) -> u32 {
    let index = tables.slot(slot).unwrap_or(0);
    let found = tables.backend(index).is_some_and(|backend| {
        backend.is_live() && backend.service == service && wrap::hint(&backend.addr, backend.port) == hint
    });
    if found { index } else { 0 }
}
