//! Which frontend a destination means, which of its endpoints may be used, and which one it is to be.

use super::{Stat, Subprograms, Tables};
use crate::abi::{
    Affinity, AffinityKey, Backend, Config, Frontend, FrontendKey, Reason, Run, SourceKey, Tuple, address,
    backend, config, frontend, iface,
};
use crate::addr::{Addr, Port, Proto};

/// How often it is looked for a backend while tables are in the middle of a change.
pub(super) const LOOKS: usize = 2;

/// Who sends, as far as traffic policies care (docs/service-semantics.md, 0.2).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Source {
    /// A pod.
    Pod,
    /// This node itself.
    Host,
    /// Anybody else.
    External,
}

/// Who asks for a backend: a packet or a socket.
pub(super) trait Asker {
    /// What traffic policies take it for.
    fn source(&self) -> Source;
    /// The address that source ranges are about.
    fn address(&self) -> Addr;
    /// Whom session affinity knows it as.
    fn client(&self) -> Addr;
    /// Whether a frontend with these flags is decided about elsewhere.
    fn leaves(&self, flags: u32) -> bool;
    /// Of a packet that another node had wrapped, the endpoint that it means.
    fn hint(&self) -> Option<u16> {
        None
    }
    /// The word that chooses among the backends.
    fn hash<T: Tables>(&self, tables: &T) -> u32;
}

/// What was chosen.
pub(super) struct Selected {
    pub(super) frontend: Frontend,
    pub(super) index: u32,
    pub(super) backend: Backend,
}

/// A choice, as it passes between separately verified functions of the kernel programs.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Choice {
    /// The endpoint's address.
    pub(super) addr: Addr,
    /// Its port.
    pub(super) port: Port,
    /// Zero.
    pub(super) pad: u16,
    /// Index of the backend.
    pub(super) index: u32,
    /// Its generation.
    pub(super) generation: u32,
    /// Id of the Service port.
    pub(super) service: u32,
    /// Flags of the frontend.
    pub(super) flags: u32,
    /// 1 if the source must be rewritten on the way out.
    pub(super) masquerade: u32,
    /// If packets go there wrapped, the endpoint's node; then address and port are the node's address and the
    /// endpoint's hint. Else 0.
    pub(super) node: u32,
}

impl Choice {
    /// Nothing chosen.
    pub const NONE: Self = Self {
        addr: Addr::ANY_V6,
        port: Port(0),
        pad: 0,
        index: 0,
        generation: 0,
        service: 0,
        flags: 0,
        masquerade: 0,
        node: 0,
    };
}

/// Why nothing was chosen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Rejection {
    /// The destination is no Service, or [`Asker::leaves`] it.
    NotOurs,
    /// A ClusterIP without such a port.
    UndefinedPort,
    /// No endpoint anywhere.
    NoEndpoint(u32),
    /// Policy Local and no local endpoint.
    NoLocalEndpoint(u32),
    /// The Service does not admit the source.
    SourceRange(u32),
    /// The tables were rewritten under the reader each time it looked.
    Torn(Reason),
}

impl Rejection {
    /// Counts it; true when the sender gets a reject reply, false when its packet is dropped.
    #[inline(always)]
    pub(super) fn count<T: Tables>(self, tables: &T) -> bool {
        match self {
            Self::NotOurs => false,
            Self::UndefinedPort => {
                tables.count(Reason::UndefinedPort);
                true
            }
            Self::NoEndpoint(service) => {
                tables.count(Reason::NoEndpoint);
                tables.count_service(service, Stat::Rejected);
                true
            }
            Self::NoLocalEndpoint(service) => {
                tables.count(Reason::NoLocalEndpoint);
                tables.count_service(service, Stat::Dropped);
                false
            }
            Self::SourceRange(service) => {
                tables.count(Reason::SourceRange);
                tables.count_service(service, Stat::Dropped);
                false
            }
            Self::Torn(reason) => {
                tables.count(reason);
                false
            }
        }
    }
}

/// The backend for a destination. `known` is what is known of its address.
#[inline(always)]
pub(super) fn backend_for<T: Subprograms, A: Asker>(
    tables: &T,
    asker: &A,
    destination: (&Addr, Port, Proto),
    known: u32,
) -> Result<Selected, Rejection> {
    let mut torn = Reason::BadSlot;
    for _ in 0..LOOKS {
        match look(tables, asker, destination, known) {
            Err(Rejection::Torn(reason)) => torn = reason,
            found => return found,
        }
    }
    Err(Rejection::Torn(torn))
}

/// The same with one look at each table.
#[inline(always)]
pub(super) fn look<T: Subprograms, A: Asker>(
    tables: &T,
    asker: &A,
    (addr, port, proto): (&Addr, Port, Proto),
    known: u32,
) -> Result<Selected, Rejection> {
    let frontend = frontend_for(tables, addr, port, proto, known)?;
    if asker.leaves(frontend.flags) {
        return Err(Rejection::NotOurs);
    }
    if frontend.flags & frontend::SOURCE_RANGES != 0
        && !tables.source_allowed(&SourceKey::exact(frontend.service, asker.address()))
    {
        return Err(Rejection::SourceRange(frontend.service));
    }
    let (run, flag) = usable(&frontend, asker.source(), asker.hint().is_some())?;
    let chosen = meant(tables, &frontend, run, asker)
        .or_else(|| remembered(tables, &frontend, flag, asker.client()))
        .or_else(|| pick(tables, &frontend, run, asker.hash(tables)));
    // Looked up once more, so that two ways lead to a number and not to a whole backend.
    match chosen.and_then(|index| Some((index, tables.backend(index)?))) {
        Some((index, backend)) if backend.is_live() => Ok(Selected { frontend, index, backend }),
        _ => Err(Rejection::Torn(Reason::BadSlot)),
    }
}

/// The frontend for a destination: exact first, then the NodePort if the address accepts them (V-1, V-2).
#[inline(always)]
fn frontend_for<T: Tables>(
    tables: &T,
    addr: &Addr,
    port: Port,
    proto: Proto,
    known: u32,
) -> Result<Frontend, Rejection> {
    let mut key = FrontendKey::new(*addr, port, proto);
    let mut found = tables.frontend(&key);
    if found.is_none() && known & address::NODE_PORT != 0 {
        key.addr = addr.wildcard();
        found = tables.frontend(&key);
    }
    match found {
        Some(frontend) if frontend.is_sealed_for(&key) => Ok(frontend),
        Some(_) => Err(Rejection::Torn(Reason::TornFrontend)),
        None if known & address::CLUSTER_IP != 0 => Err(Rejection::UndefinedPort),
        None => Err(Rejection::NotOurs),
    }
}

/// The backend that another node means, which has wrapped the packet.
#[inline(always)]
fn meant<T: Subprograms, A: Asker>(tables: &T, frontend: &Frontend, run: Run, asker: &A) -> Option<u32> {
    let hint = asker.hint().filter(|hint| *hint != 0)?;
    Some(tables.hinted(run, frontend.service, hint)).filter(|index| *index != 0)
}

/// The run of slots a source may use (P-9), and the flag its backends carry. What comes wrapped goes to endpoints on
/// this node, if there are any.
#[inline(always)]
fn usable(frontend: &Frontend, source: Source, wrapped: bool) -> Result<(Run, u16), Rejection> {
    if wrapped && frontend.local.count != 0 {
        return Ok((frontend.local, backend::IN_LOCAL));
    }
    let internal = frontend.flags & frontend::INTERNAL != 0;
    let local = frontend.flags & frontend::LOCAL != 0 && (internal || matches!(source, Source::External));
    let (run, flag) =
        if local { (frontend.local, backend::IN_LOCAL) } else { (frontend.cluster, backend::IN_CLUSTER) };
    if run.count != 0 {
        Ok((run, flag))
    } else if frontend.flags & frontend::ANY != 0 {
        Err(Rejection::NoLocalEndpoint(frontend.service))
    } else {
        Err(Rejection::NoEndpoint(frontend.service))
    }
}

/// The backend in the slot that `hash` falls on.
#[inline(always)]
fn pick<T: Tables>(tables: &T, frontend: &Frontend, run: Run, hash: u32) -> Option<u32> {
    // A multiplication spreads like a remainder, without a division.
    let slot = run.first + ((u64::from(hash) * u64::from(run.count)) >> 32) as u32;
    let index = tables.slot(slot)?;
    let backend = tables.backend(index)?;
    (backend.is_live() && backend.service == frontend.service).then_some(index)
}

/// The backend a client went to before, while it may still be used.
#[inline(always)]
fn remembered<T: Tables>(tables: &T, frontend: &Frontend, flag: u16, client: Addr) -> Option<u32> {
    if frontend.flags & frontend::AFFINITY == 0 {
        return None;
    }
    let last = tables.affinity(&AffinityKey { client, service: frontend.service })?;
    let idle = tables.now().saturating_sub(last.last_seen);
    if idle > u64::from(frontend.affinity_secs) * 1_000_000_000 {
        return None;
    }
    let backend = tables.backend(last.backend)?;
    let usable = backend.generation == last.generation
        && backend.service == frontend.service
        && backend.is_live()
        && backend.flags & flag != 0;
    usable.then_some(last.backend)
}

/// Remembers where a client of a Service with affinity goes.
#[inline(always)]
pub(super) fn remember<T: Tables>(tables: &T, service: u32, index: u32, generation: u32, client: Addr) {
    tables.set_affinity(
        &AffinityKey { client, service },
        &Affinity {
            backend: index,
            generation,
            last_seen: tables.now(),
            #[cfg(feature = "next-layout")]
            next: 0,
        },
    );
}

/// Who sends from `addr`, through the interface with this index.
#[inline(always)]
pub(super) fn source_of<T: Tables>(tables: &T, config: &Config, addr: &Addr, ifindex: u32) -> Source {
    let pod = if config.flags & config::POD_INTERFACES != 0 {
        tables.iface(ifindex).is_some_and(|iface| iface.flags & iface::POD != 0)
    } else {
        config.is_pod(addr)
    };
    if pod {
        Source::Pod
    } else if tables.address(addr) & address::NODE != 0 {
        Source::Host
    } else {
        Source::External
    }
}

/// A hash of the 5-tuple, the same on every node with the same seed: a flow whose entry was lost finds its
/// endpoint again while the set is unchanged.
#[inline(always)]
pub(super) fn flow_hash(key: &Tuple, seed: u32) -> u32 {
    let ports = u32::from(key.sport.0) << 16 | u32::from(key.dport.0);
    let mut h = seed ^ u32::from(key.proto.0);
    h = mix(h, key.src.0[0] ^ key.src.0[1].rotate_left(13));
    h = mix(h, key.src.0[2] ^ key.src.0[3].rotate_left(7));
    h = mix(h, key.dst.0[0] ^ key.dst.0[1].rotate_left(13));
    h = mix(h, key.dst.0[2] ^ key.dst.0[3].rotate_left(7));
    scramble(mix(h, ports))
}

#[inline(always)]
fn mix(h: u32, word: u32) -> u32 {
    (h ^ word).wrapping_mul(0x9e37_79b1).rotate_left(15)
}

/// Spreads every input bit over the whole word (the finaliser of a 32-bit multiplicative hash).
#[inline(always)]
pub(super) fn scramble(mut h: u32) -> u32 {
    h ^= h >> 16;
    h = h.wrapping_mul(0x85eb_ca6b);
    h ^= h >> 13;
    h = h.wrapping_mul(0xc2b2_ae35);
    h ^ h >> 16
}
