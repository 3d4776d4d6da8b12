//! What a layout says of itself: for each table the names, places and sizes of the fields of its keys and values.
//!
//! Every generation of tables is pinned with this description, so that an agent of another layout, also an
//! older one that does not know it, reads the tables by the names of their fields: what it knows is taken
//! over, what it does not know is left out, and what is missing has its default.

use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use core::mem::size_of;

use super::{
    Affinity, AffinityKey, AgentState, Backend, Config, Device, Flow, FlowId, Fragment, FragmentKey,
    Frontend, FrontendKey, Iface, Key, Leg, PeerKey, Reason, RouteKey, Secret, ServiceName, ServiceStats,
    SocketEntry, SocketState, SourceKey, State, Tunnel, TunnelKey, Tuple, Warning, maps,
};
use crate::addr::{Addr, Port, Proto};

/// A field that is a number, or several numbers in a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Field {
    /// Its name, with those of the values that it is part of: `pairs.1.ends`.
    pub name: String,
    /// Where it begins.
    pub offset: usize,
    /// Bytes of a number.
    pub size: usize,
    /// How many numbers there are.
    pub count: usize,
}

/// A type that describes its fields.
pub trait Described {
    /// Whether it is a single number (or an address), so that several of them are one field.
    const NUMBER: bool = false;
    /// Adds the fields of a value of this name that begins at `offset`.
    fn describe(name: &str, offset: usize, fields: &mut Vec<Field>);
}

/// The name of a part of `whole`.
#[must_use]
pub fn part(whole: &str, name: &str) -> String {
    if whole.is_empty() { name.into() } else { format!("{whole}.{name}") }
}

macro_rules! numbers {
    ($($name:ty),*) => {$(
        impl Described for $name {
            const NUMBER: bool = true;
            fn describe(name: &str, offset: usize, fields: &mut Vec<Field>) {
                fields.push(Field { name: name.into(), offset, size: size_of::<Self>(), count: 1 });
            }
        }
    )*};
}

numbers!(u8, u16, u32, u64, Addr, Port, Proto, FlowId, State);

impl<T: Described, const N: usize> Described for [T; N] {
    fn describe(name: &str, offset: usize, fields: &mut Vec<Field>) {
        if T::NUMBER {
            fields.push(Field { name: name.into(), offset, size: size_of::<T>(), count: N });
            return;
        }
        for n in 0..N {
            T::describe(&part(name, &format!("{n}")), offset + n * size_of::<T>(), fields);
        }
    }
}

/// Keys or values of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Bytes of one.
    pub size: usize,
    /// Its fields.
    pub fields: Vec<Field>,
}

impl Shape {
    /// That of a type.
    #[must_use]
    pub fn of<T: Described>() -> Self {
        let mut fields = Vec::new();
        T::describe("", 0, &mut fields);
        Self { size: size_of::<T>(), fields }
    }
}

/// A table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// Its name: one of [`maps`].
    pub name: String,
    /// Its keys.
    pub key: Shape,
    /// Its values.
    pub value: Shape,
    /// Of an array whose elements have names: these, in the order of their indices.
    pub elements: Vec<String>,
}

fn table<K: Described, V: Described>(name: &str) -> Table {
    Table { name: name.into(), key: Shape::of::<K>(), value: Shape::of::<V>(), elements: Vec::new() }
}

/// Every table of [`maps::ALL`], in that order.
#[must_use]
pub fn tables() -> Vec<Table> {
    let mut reasons = table::<u32, u64>(maps::REASONS);
    reasons.elements = Reason::ALL.iter().map(|reason| reason.label().into()).collect();
    vec![
        table::<FrontendKey, Frontend>(maps::FRONTENDS),
        table::<u32, u32>(maps::SLOTS),
        table::<u32, Backend>(maps::BACKENDS),
        table::<u32, u64>(maps::ENDPOINT_BITS),
        table::<Tuple, u32>(maps::TAKEN),
        table::<Addr, u32>(maps::ADDRESSES),
        table::<u32, u64>(maps::ADDRESS_BITS),
        table::<SourceKey, u32>(maps::SOURCES),
        table::<u32, Iface>(maps::IFACES),
        table::<u32, Device>(maps::DEVICES),
        table::<RouteKey, Addr>(maps::MASQUERADE),
        table::<TunnelKey, Tunnel>(maps::TUNNELS),
        table::<u32, u64>(maps::SERVICE_PORTS),
        table::<u32, Config>(maps::CONFIG),
        table::<u32, ServiceName>(maps::SERVICES),
        table::<u32, u32>(maps::RETIRED),
        table::<u32, AgentState>(maps::AGENT),
        table::<u32, Warning>(maps::COMPLAINTS),
        table::<u32, u64>(maps::PAUSE),
        table::<Key, Leg>(maps::FLOWS),
        table::<u32, u64>(maps::FLOW_FILTER),
        table::<u32, Flow>(maps::RECORDS),
        table::<u32, Secret>(maps::SECRET),
        // A queue has no keys.
        Table { key: Shape { size: 0, fields: Vec::new() }, ..table::<u32, u32>(maps::FREE) },
        table::<u32, FlowId>(maps::RING),
        table::<FragmentKey, Fragment>(maps::FRAGMENTS),
        table::<AffinityKey, Affinity>(maps::AFFINITY),
        table::<u32, SocketState>(maps::SOCKETS),
        table::<PeerKey, SocketEntry>(maps::PEERS),
        reasons,
        table::<u32, ServiceStats>(maps::SERVICE_STATS),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_map_is_described_whole_and_in_order() {
        let tables = tables();
        let names: Vec<&str> = tables.iter().map(|table| table.name.as_str()).collect();
        assert_eq!(names, maps::ALL);
        for table in &tables {
            for shape in [&table.key, &table.value] {
                let sum: usize = shape.fields.iter().map(|field| field.size * field.count).sum();
                assert_eq!(sum, shape.size, "{}: a field is missing", table.name);
                let mut names: Vec<&str> = shape.fields.iter().map(|field| field.name.as_str()).collect();
                names.sort_unstable();
                names.dedup();
                assert_eq!(names.len(), shape.fields.len(), "{}: two fields of one name", table.name);
            }
        }
    }

    #[test]
    fn parts_of_parts_have_their_place() {
        let flow = Shape::of::<Flow>();
        let field = |name: &str| flow.fields.iter().find(|field| field.name == name).cloned();
        let ports = field("pairs.1.ports").unwrap();
        let pairs = core::mem::offset_of!(Flow, pairs);
        assert_eq!((ports.offset, ports.size, ports.count), (pairs + 40 + 32, 2, 2));
        assert_eq!(field("seen").unwrap().count, 2);
        assert!(field("pairs").is_none());
    }
}
