//! A rolling comparison of the configuration tables with what the agent has written, so that an entry that somebody else
//! has deleted, changed or added is found within a minute, a slice at a time.
//!
//! The agent is the only writer, and what it has written it knows: the planner's copy is what must stand there, to the
//! byte, slots and indices that rest included. So every difference is somebody else's, and is undone by the one write
//! that the entry takes. It is to be called between two passes, never within one.

use std::borrow::Borrow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::ops::Bound::{Excluded, Unbounded};
use std::sync::Arc;

use aya::Pod;
use proxy_common::abi::{
    Backend, Config, Frontend, FrontendKey, Iface, RouteKey, Secret, ServiceName, SourceKey, maps,
};
use proxy_common::addr::Addr;

use super::address_bits::AddressBits;
use super::kernel::{Kernel, KernelError, LISTED};
use crate::datapath::flow::now;
use crate::datapath::store::pin::BpfRoot;
use crate::datapath::store::table::{Cursor, Table};
use agent_core::plan::{Actual, Array, Element, Step};

/// Entries of a hash that are read at once: fewer than elsewhere, since each of them is looked for here, too.
const AT_ONCE: usize = 512;

/// What a comparison has found.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// The writes that undo it.
    pub steps: Vec<Step>,
    /// Words of tables that plans know nothing of (bits of addresses, SECRET, PAUSE) that were wrong, and have been written again.
    pub words: usize,
    /// Whether the last slice has been looked at.
    pub ended: bool,
}

/// How far it is.
#[derive(Debug)]
pub struct Comparison {
    at: At,
    secrets: Table<u32, Secret>,
    /// The random numbers that keys of flows are made with, as they were when the agent started: other ones would lead no
    /// flow of IPv6 to its record.
    secret: Secret,
    pauses: Table<u32, u64>,
}

/// The table that is being looked at, and where.
#[derive(Debug, Default)]
enum At {
    #[default]
    AddressBits,
    EndpointBits,
    ServicePorts,
    Ifaces(Half<u32, Iface>),
    Routes(Walk<RouteKey, Addr>),
    Services(Half<u32, ServiceName>),
    Backends(Cursor<u32, Backend>),
    Slots(Cursor<u32, u32>),
    Sources(Walk<SourceKey, u32>),
    Frontends(Half<FrontendKey, Frontend>),
    Addresses(Half<Addr, u32>),
    End,
}

/// A table with keys: first whether all that should be there is, then whether all that is there should be.
#[derive(Debug)]
enum Half<K, V> {
    Missing(Option<K>),
    Extra(Cursor<K, V>),
}

impl<K, V> Default for Half<K, V> {
    fn default() -> Self {
        Self::Missing(None)
    }
}

/// A trie, as far as it has been listed.
#[derive(Debug)]
struct Walk<K, V> {
    cursor: Cursor<K, V>,
    seen: BTreeSet<K>,
    /// What the agent had written when it began.
    writes: Option<u64>,
}

impl<K, V> Default for Walk<K, V> {
    fn default() -> Self {
        Self { cursor: Cursor::default(), seen: BTreeSet::new(), writes: None }
    }
}

/// One slice: entries looked at, and where the next one begins; `None` when the table is through.
type Slice<T> = Result<(usize, Option<T>), KernelError>;

impl Comparison {
    /// From the start, over what is pinned under `root`.
    pub fn open(root: &BpfRoot) -> Result<Self, KernelError> {
        let secrets = Table::open(root, maps::SECRET)?;
        let secret = secrets.get(&0)?.unwrap_or(Secret::NONE);
        let pauses = Table::open(root, maps::PAUSE)?;
        // An agent that died over an exchange may have left its own.
        pauses.put(&0, &0)?;
        Ok(Self { at: At::default(), secrets, secret, pauses })
    }

    /// Looks at what all traffic hangs on, three reads: CONFIG; SECRET, without which a sweep takes every flow of IPv6 for
    /// one that nobody can find; and PAUSE, which this agent sets only within an exchange, and never two of them at a time.
    pub fn settings(&self, kernel: &Kernel, actual: &Actual) -> Result<Found, KernelError> {
        let mut found = Found::default();
        if self.secrets.get(&0)? != Some(self.secret) {
            self.secrets.put(&0, &self.secret)?;
            found.words += 1;
        }
        let now = now()?;
        if self.pauses.get(&0)?.is_some_and(|until| until > now) {
            self.pauses.put(&0, &0)?;
            found.words += 1;
        }
        // All zeros before the first pass.
        if actual.config != Config::EMPTY && kernel.config.get(&0)? != Some(actual.config) {
            found.steps.push(Step::PutConfig(Box::new(actual.config)));
        }
        Ok(found)
    }

    /// Looks at so many entries of the other tables more, or somewhat more than that.
    pub fn go_on(
        &mut self,
        kernel: &mut Kernel,
        actual: &Actual,
        entries: usize,
    ) -> Result<Found, KernelError> {
        let mut found = Found::default();
        let mut seen = 0;
        while seen < entries && !found.ended {
            // After an error the next round begins.
            let at = std::mem::take(&mut self.at);
            let (more, next) = slice(at, kernel, actual, entries - seen, &mut found)?;
            seen += more;
            self.at = next;
            if matches!(self.at, At::End) {
                self.at = At::default();
                found.ended = true;
            }
        }
        Ok(found)
    }
}

fn slice(
    at: At,
    kernel: &mut Kernel,
    actual: &Actual,
    room: usize,
    found: &mut Found,
) -> Result<(usize, At), KernelError> {
    let steps = &mut found.steps;
    let next = |slice: (usize, Option<At>), then: At| (slice.0, slice.1.unwrap_or(then));
    Ok(match at {
        At::AddressBits => (restore(&mut kernel.address_bits, found)?, At::EndpointBits),
        At::EndpointBits => (restore(&mut kernel.endpoint_bits, found)?, At::ServicePorts),
        At::ServicePorts => {
            let mut see =
                array(&actual.service_ports, |word, bits| steps.push(Step::PutServicePorts(word, bits)));
            let mut cursor = Cursor::default();
            while kernel.service_ports.chunk(&mut cursor, &mut see)? {}
            (kernel.service_ports.max() as usize, At::Ifaces(Half::default()))
        }
        At::Ifaces(half) => {
            let put = |key: &u32, value: &Iface| Step::PutIface(*key, *value);
            let done = hash(&kernel.ifaces, &actual.ifaces, half, room, steps, (put, Step::DeleteIface))?;
            next(map(done, At::Ifaces), At::Routes(Walk::default()))
        }
        At::Routes(walk) => {
            let put = |key: &RouteKey, value: &Addr| Step::PutRoute(*key, *value);
            let done =
                trie(&kernel.routes, &actual.routes, walk, kernel.writes, steps, (put, Step::DeleteRoute))?;
            next(map(done, At::Routes), At::Services(Half::default()))
        }
        At::Services(half) => {
            let put = |key: &u32, value: &ServiceName| Step::PutService(*key, Arc::new(*value));
            let done =
                hash(&kernel.services, &actual.services, half, room, steps, (put, Step::DeleteService))?;
            next(map(done, At::Services), At::Backends(Cursor::default()))
        }
        At::Backends(mut cursor) => {
            let see = array(&actual.backends, |index, backend| steps.push(Step::PutBackend(index, backend)));
            match part(&kernel.backends, &mut cursor, actual.backends.last(), see)? {
                (seen, true) => (seen, At::Backends(cursor)),
                (seen, false) => (seen, At::Slots(Cursor::default())),
            }
        }
        At::Slots(mut cursor) => {
            let see = array(&actual.slots, |slot, backend| steps.push(Step::PutSlot(slot, backend)));
            match part(&kernel.slots, &mut cursor, actual.slots.last(), see)? {
                (seen, true) => (seen, At::Slots(cursor)),
                (seen, false) => (seen, At::Sources(Walk::default())),
            }
        }
        At::Sources(walk) => {
            let wanted = actual.sources.iter().map(|key| (*key, LISTED)).collect();
            let put = |key: &SourceKey, _: &u32| Step::PutSource(*key);
            let done = trie(&kernel.sources, &wanted, walk, kernel.writes, steps, (put, Step::DeleteSource))?;
            next(map(done, At::Sources), At::Frontends(Half::default()))
        }
        At::Frontends(half) => {
            let put = |key: &FrontendKey, value: &Frontend| Step::PutFrontend(*key, *value);
            let done =
                hash(&kernel.frontends, &actual.frontends, half, room, steps, (put, Step::DeleteFrontend))?;
            next(map(done, At::Frontends), At::Addresses(Half::default()))
        }
        At::Addresses(half) => {
            let put = |key: &Addr, value: &u32| Step::PutAddress(*key, *value);
            let done =
                hash(&kernel.addresses, &actual.addresses, half, room, steps, (put, Step::DeleteAddress))?;
            next(map(done, At::Addresses), At::End)
        }
        At::End => (0, At::End),
    })
}

fn map<T>((seen, next): (usize, Option<T>), wrap: impl Fn(T) -> At) -> (usize, Option<At>) {
    (seen, next.map(wrap))
}

fn restore(bits: &mut AddressBits, found: &mut Found) -> Result<usize, KernelError> {
    let (seen, wrong) = bits.restore()?;
    found.words += wrong;
    Ok(seen)
}

/// Shows each element of an array that differs to `put`, with what it should be.
fn array<V: Element>(wanted: &Array<V>, mut put: impl FnMut(u32, V)) -> impl FnMut(u32, V) {
    move |index, value| {
        let should = wanted.get(index).copied().unwrap_or(V::NEVER);
        if value != should {
            put(index, should);
        }
    }
}

/// The next chunk of an array, and whether there is more of what matters: nobody is led past the last element that was
/// ever written.
fn part<V: Pod>(
    table: &Table<u32, V>,
    cursor: &mut Cursor<u32, V>,
    last: Option<u32>,
    mut see: impl FnMut(u32, V),
) -> Result<(usize, bool), KernelError> {
    let (mut seen, mut highest) = (0, 0);
    let more = table.chunk(cursor, |index, value| {
        (seen, highest) = (seen + 1, index);
        see(index, value);
    })?;
    Ok((seen, more && last.is_some_and(|last| highest < last)))
}

fn hash<K, V, W>(
    table: &Table<K, V>,
    wanted: &BTreeMap<K, W>,
    half: Half<K, V>,
    room: usize,
    steps: &mut Vec<Step>,
    (put, delete): (impl Fn(&K, &V) -> Step, impl Fn(K) -> Step),
) -> Slice<Half<K, V>>
where
    K: Pod + Ord + Debug,
    V: Pod + PartialEq,
    W: Borrow<V>,
{
    match half {
        Half::Missing(last) => {
            let from = last.map_or(Unbounded, Excluded);
            let (mut seen, mut at) = (0, None);
            for (key, value) in wanted.range((from, Unbounded)).take(room) {
                if table.get(key)?.is_none() {
                    steps.push(put(key, value.borrow()));
                }
                (seen, at) = (seen + 1, Some(*key));
            }
            let whole = seen < room;
            Ok((seen, Some(if whole { Half::Extra(Cursor::of(AT_ONCE)) } else { Half::Missing(at) })))
        }
        Half::Extra(mut cursor) => {
            let mut seen = 0;
            let more = table.chunk(&mut cursor, |key, value| {
                seen += 1;
                steps.extend(undo(wanted.get(&key).map(W::borrow), &key, &value, (&put, &delete)));
            })?;
            Ok((seen, more.then_some(Half::Extra(cursor))))
        }
    }
}

/// What undoes an entry that is there, if anything.
fn undo<K: Copy, V: PartialEq>(
    should: Option<&V>,
    key: &K,
    value: &V,
    (put, delete): (impl Fn(&K, &V) -> Step, impl Fn(K) -> Step),
) -> Option<Step> {
    match should {
        None => Some(delete(*key)),
        Some(should) => (should != value).then(|| put(key, should)),
    }
}

/// The same for a trie: it answers with the longest prefix of what it is asked for, so that a missing key shows only when
/// all that are there have been listed.
fn trie<K, V>(
    table: &Table<K, V>,
    wanted: &BTreeMap<K, V>,
    mut walk: Walk<K, V>,
    writes: u64,
    steps: &mut Vec<Step>,
    (put, delete): (impl Fn(&K, &V) -> Step, impl Fn(K) -> Step),
) -> Slice<Walk<K, V>>
where
    K: Pod + Ord + Debug,
    V: Pod + PartialEq,
{
    let since = *walk.writes.get_or_insert(writes);
    let mut seen = 1;
    let more = table.chunk(&mut walk.cursor, |key, value| {
        seen += 1;
        walk.seen.insert(key);
        steps.extend(undo(wanted.get(&key), &key, &value, (&put, &delete)));
    })?;
    if more {
        return Ok((seen, Some(walk)));
    }
    // What has been written meanwhile may have been missed.
    if since == writes {
        let missing = wanted.iter().filter(|(key, _)| !walk.seen.contains(key));
        steps.extend(missing.map(|(key, value)| put(key, value)));
    }
    Ok((seen, None))
}
