//! What lies in the maps: the table of tables.
//!
//! | map | kind | key → value | written by | read by | when full |
//! |---|---|---|---|---|---|
//! | [`maps::FRONTENDS`] | hash | [`FrontendKey`] → [`Frontend`] | agent | all hooks | the agent reports the Service and goes on without it |
//! | [`maps::SLOTS`] | array | slot → backend index | agent | all hooks | as above |
//! | [`maps::BACKENDS`] | array | backend index → [`Backend`] | agent | all hooks | as above |
//! | [`maps::ENDPOINT_BITS`] | array | [`Addr::place`] / 64 → bits of the endpoints' addresses | agent | TC, agent | bits are shared: a conversation more is noted |
//! | [`maps::TAKEN`] | hash | [`Tuple`] → 1 | agent | TC | the agent says so; what finds no room may lose its source port to a masqueraded flow |
//! | [`maps::ADDRESSES`] | hash | [`Addr`] → [`address`] flags | agent | TC, socket hooks | as above |
//! | [`maps::ADDRESS_BITS`] | array | [`Addr::place`] / 64 → bits of the addresses that may be in ADDRESSES | agent | all hooks | bits are shared: a look more |
//! | [`maps::SOURCES`] | LPM trie | [`SourceKey`] → 1 | agent | all hooks | as above |
//! | [`maps::IFACES`] | hash | ifindex → [`Iface`] | agent | TC | the agent says so; answers leave as the routes say, pods of that interface are strangers |
//! | [`maps::DEVICES`] | hash | ifindex → [`Device`] | agent | XDP | the agent says so; what comes in there goes by the stack |
//! | [`maps::MASQUERADE`] | LPM trie | [`RouteKey`] → [`Addr`] | agent | TC | the agent says so; single routes leave under the address of the shorter ones, a new interface masquerades nothing (counted) |
//! | [`maps::TUNNELS`] | hash | [`TunnelKey`] → [`Tunnel`] | agent | TC | the agent says so; flows to endpoints on that node are masqueraded |
//! | [`maps::SERVICE_PORTS`] | array | port / 64 → bits of the ports that are a frontend's beside ClusterIPs | agent | TC | – |
//! | [`maps::CONFIG`] | array of 1 | → [`Config`] | agent | all hooks | – |
//! | [`maps::SERVICES`] | hash | service id → [`ServiceName`] | agent | agent at start, command line | as FRONTENDS |
//! | [`maps::RETIRED`] | array of 1 | → 1 while the agent is to leave what is new to another proxy | command line | agent, command line | – |
//! | [`maps::AGENT`] | array of 1 | → [`AgentState`] | agent | command line | – |
//! | [`maps::COMPLAINTS`] | array | n → [`Warning`] | agent | command line | the newest are kept |
//! | [`maps::PAUSE`] | array of 1 | → until when nothing new begins, on the clock of flows | agent, while it exchanges the programs | TC | – |
//! | [`maps::FLOWS`] | hash | [`Key`] → [`Leg`] | TC, `flows` | TC | young flows make room, else new ones are dropped and counted |
//! | [`maps::FLOW_FILTER`] | array | [`FilterPlace::word`] → how many legs FLOWS has at each of eight [places](Key::place); zero is certain | TC, `flows` | TC | counts are shared: a look more |
//! | [`maps::RECORDS`] | array | index → [`Flow`] | TC, `flows` | TC, agent, command line | as FLOWS |
//! | [`maps::SECRET`] | array of 1 | → [`Secret`] | agent, once | TC, `flows` | – |
//! | [`maps::FREE`] | queue | index | TC, `flows` | TC, `flows` | holds every index |
//! | [`maps::RING`] | array | place → [`FlowId`] | TC, each CPU its own part | TC | goes round: the oldest young flow is taken apart |
//! | [`maps::SCRATCH`] | per-CPU array of 1 | working storage of the TC programs | TC | TC | – |
//! | [`maps::FRAGMENTS`] | LRU hash | [`FragmentKey`] → [`Fragment`] | TC | TC | the oldest goes |
//! | [`maps::AFFINITY`] | LRU hash | [`AffinityKey`] → [`Affinity`] | all hooks | all hooks | the oldest client may move |
//! | [`maps::SOCKETS`] | socket storage | socket → [`SocketState`] | socket hooks | socket hooks | lives and dies with the socket |
//! | [`maps::PEERS`] | LRU hash | [`PeerKey`] → [`SocketEntry`] | socket hooks | socket hooks | the oldest answer shows its endpoint |
//! | [`maps::REASONS`] | per-CPU array | [`Reason`] → count | all hooks | agent, command line | – |
//! | [`maps::SERVICE_STATS`] | array | service id → [`ServiceStats`] | all hooks | agent, command line | ids past the end are not counted |
//! | [`maps::LAYOUT`] | array of 1 | → what [`layout`] says of all these, as text | agent, when it makes the tables | the next agent | – |
//!
//! Numbers in values are in host byte order; addresses and ports are in network order, as their types say.
//! Times are nanoseconds of `CLOCK_MONOTONIC_COARSE`.

mod affinity;
mod agent;
pub mod backend;
pub mod config;
pub mod device;
mod flow;
mod fragment;
pub mod frontend;
#[cfg(feature = "user")]
pub mod layout;
#[cfg(feature = "next-layout")]
mod next;
mod reason;
mod route;
pub mod socket;
mod source;
pub mod tunnel;

pub use affinity::{Affinity, AffinityKey};
pub use agent::{
    AgentState, NOTE, PROBLEM, ServiceName, ServiceStats, TEXT_LEN, Warning, absent, text, untext,
};
pub use backend::Backend;
pub use config::{Config, Iface, PORT_RANGES, PortRange, Range, SERVICE_RANGES, address, feature, iface};
pub use device::Device;
pub use flow::{
    FORWARD, FilterPlace, Flow, FlowId, Hook, Key, Leg, Notes, Pair, REPLY, Role, SILENCE, Secret, State,
    TELL, Timeouts, Tuple, ask, flow_flags, window,
};
pub use fragment::{Fragment, FragmentKey};
pub use frontend::{Frontend, FrontendKey, Run};
pub use reason::Reason;
pub use route::RouteKey;
pub use socket::{PeerKey, SOCKET_ENTRIES, SocketEntry, SocketState};
pub use source::SourceKey;
pub use tunnel::{Tunnel, TunnelKey};

#[cfg(any(doc, feature = "user"))]
use crate::addr::Addr;

/// Any change of a byte in this room changes this number. It is for people: agents compare what layouts say
/// of themselves.
pub const ABI_VERSION: u32 = if cfg!(feature = "next-layout") { 10 } else { 9 };

/// Map names as `bpftool map` shows them: at most 15 bytes. The table of [`abi`](self) says what is in each.
pub mod maps {
    macro_rules! pinned {
        ($($name:ident)*) => {
            $(#[expect(missing_docs, reason = "the table says it")] pub const $name: &str = stringify!($name);)*
            /// Every map of the programs that is pinned, in the order of the table.
            pub const ALL: [&str; 31] = [$($name),*];
        };
    }

    pinned! {
        FRONTENDS
        SLOTS
        BACKENDS
        ENDPOINT_BITS
        TAKEN
        ADDRESSES
        ADDRESS_BITS
        SOURCES
        IFACES
        DEVICES
        MASQUERADE
        TUNNELS
        SERVICE_PORTS
        CONFIG
        SERVICES
        RETIRED
        AGENT
        COMPLAINTS
        PAUSE
        FLOWS
        FLOW_FILTER
        RECORDS
        SECRET
        FREE
        RING
        FRAGMENTS
        AFFINITY
        SOCKETS
        PEERS
        REASONS
        SERVICE_STATS
    }

    /// Each processor's own, and not pinned.
    pub const SCRATCH: &str = "SCRATCH";
    /// The agent's own: no program knows it.
    pub const LAYOUT: &str = "LAYOUT";
}

/// Entries a map is made for, unless the agent says otherwise when it loads the programs.
pub mod capacity {
    /// Frontends: addresses × ports of all Services.
    pub const FRONTENDS: usize = 131_072;
    /// Slots of all runs, retired runs included.
    pub const SLOTS: usize = 1_048_576;
    /// Backends: endpoints counted once per Service port.
    pub const BACKENDS: usize = 262_144;
    /// Words of 64 bits: one bit for each [`Addr::place`](crate::addr::Addr::place).
    pub const ENDPOINT_BITS: usize = 4_096;
    /// Connections to endpoints that the kernel's connection tracking knows under an address of this node.
    pub const TAKEN: usize = 65_536;
    /// Service and node addresses.
    pub const ADDRESSES: usize = 65_536;
    /// Words of 64 bits, likewise.
    pub const ADDRESS_BITS: usize = 4_096;
    /// Source ranges of all Services.
    pub const SOURCES: usize = 65_536;
    /// Interfaces of the node.
    pub const IFACES: usize = 4_096;
    /// Interfaces with a program at their driver.
    pub const DEVICES: usize = 256;
    /// Routes that ask for a source of their own.
    pub const MASQUERADE: usize = 16_384;
    /// Nodes with endpoints that answer clients themselves, twice: for each family.
    pub const TUNNELS: usize = 16_384;
    /// Words of 64 ports each: all there are.
    pub const SERVICE_PORTS: usize = 1_024;
    /// Service ports with a name and counters.
    pub const SERVICES: usize = 65_536;
    /// Warnings kept for the operator.
    pub const COMPLAINTS: usize = 64;
    /// Flows; index 0 is never used.
    pub const RECORDS: usize = 163_840;
    /// Legs of flows: two a flow, three of a masqueraded one.
    pub const FLOWS: usize = 524_288;
    /// Words of eight bytes each, a byte for each [`Key::place`](super::Key::place).
    pub const FLOW_FILTER: usize = 65_536;
    /// Places for young flows on one CPU, a quarter each for TCP, for other protocols, and for the node's own
    /// conversations (see `lb::Ring`). At 300,000 new flows a second on one CPU each has more than 100 ms to
    /// show that it is meant. The agent makes the map as large as there are CPUs.
    pub const RING: usize = 131_072;
    /// Datagrams in fragments under way.
    pub const FRAGMENTS: usize = 16_384;
    /// Clients with an affinity.
    pub const AFFINITY: usize = 131_072;
    /// Destinations that sockets of the node have no room for: two for each. The agent makes the map larger where many CPUs
    /// set entries aside.
    pub const PEERS: usize = 8_192;
}

/// Declares a table type: C layout, no implicit padding (checked at compile time), `aya::Pod` in user space.
macro_rules! table_type {
    ($(#[$meta:meta])* pub struct $name:ident { $($(#[$fmeta:meta])* pub $field:ident: $ty:ty,)* }) => {
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name { $($(#[$fmeta])* pub $field: $ty,)* }
        const _: () = assert!(
            core::mem::size_of::<$name>() == 0 $(+ core::mem::size_of::<$ty>())*,
            concat!(stringify!($name), " has implicit padding: stack garbage would reach a map")
        );
        #[cfg(feature = "user")]
        #[expect(unsafe_code, reason = "aya asks for the promise that any bytes are a value")]
        // SAFETY: repr(C), made of integers alone and free of padding, as asserted above.
        unsafe impl aya::Pod for $name {}
        #[cfg(feature = "user")]
        impl $crate::abi::layout::Described for $name {
            fn describe(
                name: &str,
                offset: usize,
                fields: &mut alloc::vec::Vec<$crate::abi::layout::Field>,
            ) {
                $(<$ty as $crate::abi::layout::Described>::describe(
                    &$crate::abi::layout::part(name, stringify!($field)),
                    offset + core::mem::offset_of!($name, $field),
                    fields,
                );)*
            }
        }
    };
}
pub(crate) use table_type;

#[cfg(feature = "user")]
#[expect(unsafe_code, reason = "aya asks for the promise that any bytes are a value")]
// SAFETY: repr(C) around an array of integers.
unsafe impl aya::Pod for Addr {}

#[cfg(test)]
mod tests {
    use core::mem::{align_of, size_of};

    use super::*;

    /// A changed byte here is a changed ABI: raise [`ABI_VERSION`] with it.
    #[test]
    fn the_layout_is_the_one_of_this_version() {
        let sizes = [
            ("FrontendKey", size_of::<FrontendKey>(), align_of::<FrontendKey>()),
            ("Frontend", size_of::<Frontend>(), align_of::<Frontend>()),
            ("Backend", size_of::<Backend>(), align_of::<Backend>()),
            ("SourceKey", size_of::<SourceKey>(), align_of::<SourceKey>()),
            ("Iface", size_of::<Iface>(), align_of::<Iface>()),
            ("Device", size_of::<Device>(), align_of::<Device>()),
            ("RouteKey", size_of::<RouteKey>(), align_of::<RouteKey>()),
            ("TunnelKey", size_of::<TunnelKey>(), align_of::<TunnelKey>()),
            ("Tunnel", size_of::<Tunnel>(), align_of::<Tunnel>()),
            ("Config", size_of::<Config>(), align_of::<Config>()),
            ("Tuple", size_of::<Tuple>(), align_of::<Tuple>()),
            ("Pair", size_of::<Pair>(), align_of::<Pair>()),
            ("Key", size_of::<Key>(), align_of::<Key>()),
            ("Secret", size_of::<Secret>(), align_of::<Secret>()),
            ("Leg", size_of::<Leg>(), align_of::<Leg>()),
            ("Flow", size_of::<Flow>(), align_of::<Flow>()),
            ("FragmentKey", size_of::<FragmentKey>(), align_of::<FragmentKey>()),
            ("Fragment", size_of::<Fragment>(), align_of::<Fragment>()),
            ("AffinityKey", size_of::<AffinityKey>(), align_of::<AffinityKey>()),
            ("Affinity", size_of::<Affinity>(), align_of::<Affinity>()),
            ("SocketState", size_of::<SocketState>(), align_of::<SocketState>()),
            ("PeerKey", size_of::<PeerKey>(), align_of::<PeerKey>()),
            ("ServiceName", size_of::<ServiceName>(), align_of::<ServiceName>()),
            ("ServiceStats", size_of::<ServiceStats>(), align_of::<ServiceStats>()),
            ("AgentState", size_of::<AgentState>(), align_of::<AgentState>()),
        ];
        assert_eq!(ABI_VERSION, 9);
        assert_eq!(
            sizes,
            [
                ("FrontendKey", 20, 4),
                ("Frontend", 32, 4),
                ("Backend", 32, 4),
                ("SourceKey", 24, 4),
                ("Iface", 16, 4),
                ("Device", 8, 2),
                ("RouteKey", 24, 4),
                ("TunnelKey", 8, 4),
                ("Tunnel", 48, 4),
                ("Config", 400, 8),
                ("Tuple", 40, 4),
                ("Pair", 40, 4),
                ("Key", 16, 8),
                ("Secret", 144, 8),
                ("Leg", 32, 8),
                ("Flow", 256, 8),
                ("FragmentKey", 40, 4),
                ("Fragment", 16, 8),
                ("AffinityKey", 20, 4),
                ("Affinity", 16, 8),
                ("SocketState", 208, 8),
                ("PeerKey", 32, 8),
                ("ServiceName", 196, 1),
                ("ServiceStats", 24, 8),
                ("AgentState", 248, 8),
            ]
        );
    }

    #[test]
    fn map_names_fit_what_the_kernel_keeps() {
        for name in maps::ALL {
            assert!(name.len() <= 15, "{name}");
        }
    }
}
