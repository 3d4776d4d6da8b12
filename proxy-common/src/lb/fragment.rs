//! Fragments of a datagram: only the first one has the ports; they are kept for those that follow.

use super::Tables;
use crate::abi::{Fragment, FragmentKey};
use crate::addr::Port;
use crate::wire::Packet;

/// How often fragments of one datagram wait for its first one. Each time lets what the processor has queued go
/// first, a batch of up to 64 packets: enough for what was sent in one go and came in another order, and a
/// bound on what a flood of such fragments costs.
const WAITS: u32 = 4;
/// How long what is known of a datagram counts, in nanoseconds: its identification comes round again, and after
/// this time it is more likely another one's.
pub const FRAGMENTS_LIVE: u64 = 5_000_000_000;

/// What is known of a later fragment.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Recalled {
    /// Nothing, and it has waited enough.
    Unknown = 0,
    /// The first fragment came before it: the packet has its ports now.
    Known,
    /// Nothing yet.
    Waiting,
}

impl Recalled {
    /// The result with this number; any other number knows nothing.
    #[inline(always)]
    pub const fn from_number(number: u32) -> Self {
        match number {
            1 => Self::Known,
            2 => Self::Waiting,
            _ => Self::Unknown,
        }
    }
}

/// Gives a later fragment the ports that the first one had at this hook.
#[inline(always)]
pub fn recall<T: Tables>(tables: &T, packet: &mut Packet) -> Recalled {
    let key = key_of(packet);
    let now = tables.now();
    let waits = tables.with_fragment(&key, |fragment| {
        if now.saturating_sub(fragment.since) > FRAGMENTS_LIVE {
            *fragment = Fragment { sport: Port(0), dport: Port(0), waits: 1, since: now };
        } else if fragment.waits == 0 {
            packet.tuple.sport = fragment.sport;
            packet.tuple.dport = fragment.dport;
        } else {
            fragment.waits += 1;
        }
        fragment.waits
    });
    match waits {
        Some(0) => Recalled::Known,
        Some(1..=WAITS) => Recalled::Waiting,
        Some(_) => Recalled::Unknown,
        None => {
            let first_wait = Fragment { sport: Port(0), dport: Port(0), waits: 1, since: now };
            tables.set_fragment(&key, &first_wait, false);
            Recalled::Waiting
        }
    }
}

/// Remembers the ports of a first fragment.
#[inline(always)]
pub fn remember<T: Tables>(tables: &T, packet: &Packet) -> u32 {
    let ports =
        Fragment { sport: packet.tuple.sport, dport: packet.tuple.dport, waits: 0, since: tables.now() };
    tables.set_fragment(&key_of(packet), &ports, true);
    1
}

#[inline(always)]
fn key_of(packet: &Packet) -> FragmentKey {
    FragmentKey {
        src: packet.tuple.src,
        dst: packet.tuple.dst,
        id: packet.fragment_id,
        proto: packet.tuple.proto,
        pad: [0; 3],
    }
}
