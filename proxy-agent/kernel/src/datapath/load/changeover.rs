//! From one generation of tables to the next, under way: nothing is lost, and packets that begin something wait for milliseconds.
//!
//! 1. While the old programs go on, everything is carried over to the new tables, flows until little has changed.
//! 2. PAUSE says until when nothing begins. It is one map for all generations, and a time: if the agent dies, it ends by itself.
//! 3. When no packet is under way any more that has begun something, the rest is carried over.
//! 4. The new generation is whole, and counts. Should the agent die from here on, the next one sees two of them, and does what
//!    is left to do.
//! 5. Every hook has its program exchanged, each in one step; then the pause ends.
//! 6. When no packet is under way any more in an old program, what these have noted last is carried over, and the old
//!    generation goes.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use proxy_common::abi::maps;
use proxy_common::lb::LONGEST_PAUSE;

use super::carry::{self, Counters};
use super::carry_flows::{FlowCarrier, Stage};
use super::carry_sockets::SocketCarrier;
use super::generation::{Fates, Generation};
use super::{Changeover, LoadError, Loaded};
use crate::datapath::attach::AttachError;
use crate::datapath::attach::exchange::any_at_hooks;
use crate::datapath::attach::grace::Expedited;
use crate::datapath::flow::sockets::SocketError;
use crate::datapath::flow::{Flows, now, wait_for_packets};
use crate::datapath::store::pin::BpfRoot;
use crate::datapath::store::table::TableError;
use crate::sys;

/// How often flows are looked through while nothing waits.
const ROUNDS: usize = 5;
/// From one try to stop what is new to the next.
const REST: Duration = Duration::from_millis(50);
/// So many that have changed are few.
const FEW: usize = 64;

impl Loaded {
    /// Carries over what is in the older generations, the newest first, to the one in the making, and exchanges the programs.
    pub(crate) fn change(&mut self, old: &[Generation], fates: &Fates) -> Result<Changeover, LoadError> {
        let begun = Instant::now();
        let making = self.root().in_making();
        let new = Generation::open(making.clone())?;
        let (newest, left) = old.split_first().map_or((None, old), |(newest, left)| (Some(newest), left));
        let mut change = Changeover::default();
        let number = self.root().next()?;
        let Some(newest) = newest else {
            self.root().commit(number)?;
            return Ok(change);
        };
        carry::tables(newest, &new, &fates.made)?;
        let sockets = self.sockets(newest, &new);
        self.try_sockets(&sockets, SocketCarrier::all);
        let mut counters = Counters::new(newest, &fates.made, &new);
        let flows = Flows::open(&making)?;
        counters.add_rest(&flows)?;
        let mut carrier = if fates.of_flows() { FlowCarrier::open(newest, &new, true)? } else { None };
        if let Some(carrier) = &mut carrier {
            for _ in 0..ROUNDS {
                if carrier.look(Stage::Before)? < FEW {
                    break;
                }
            }
        }
        carry::moving(newest, &new, &fates.made)?;
        counters.add_rest(&flows)?;
        // Where flows and what goes with them keep their tables, both programs may work side by side.
        let pause = match fates.of_flows() || carry::is_moving(&fates.made) {
            true => Some(Pause::begin(&new)?),
            false => None,
        };
        if let Some(carrier) = &mut carrier {
            carrier.look(Stage::Before)?;
            carrier.fill_rings(&new)?;
        }
        carry::moving(newest, &new, &fates.made)?;
        self.try_sockets(&sockets, SocketCarrier::all);
        self.root().commit(number)?;
        self.carry_left(left, &self.root().at(number))?;
        change.hooks = self.exchange()?;
        if let Some(pause) = pause {
            change.paused = pause.end()?;
        }
        wait_for_packets();
        if let Some(carrier) = &mut carrier {
            carrier.look(Stage::After)?;
            (change.flows, change.no_room) = carrier.counts();
        }
        carry::moving(newest, &new, &fates.made)?;
        self.try_sockets(&sockets, SocketCarrier::absent);
        counters.add_rest(&flows)?;
        for generation in old {
            generation.root.remove_generation()?;
        }
        change.took = begun.elapsed();
        Ok(change)
    }

    /// Does what an agent has left to do that died over it: some programs may still work with older tables.
    pub(crate) fn finish(
        &mut self,
        newest: &Generation,
        left: &[Generation],
    ) -> Result<Changeover, LoadError> {
        let begun = Instant::now();
        let sockets: Vec<_> = left.iter().map(|generation| self.sockets(generation, newest)).collect();
        // Where some programs have been exchanged already, what is new counts.
        let map = newest.map(maps::SOCKETS).map(|map| map.facts.id);
        let begins = map.map_or(Ok(false), |map| self.is_used(map).map(|used| !used))?;
        let carry = if begins { SocketCarrier::all } else { SocketCarrier::absent };
        let pause = Pause::begin(newest)?;
        self.carry_left(left, &newest.root)?;
        // The newest first, which then counts more.
        for (n, sockets) in sockets.iter().enumerate() {
            self.try_sockets(sockets, if n == 0 { carry } else { SocketCarrier::absent });
        }
        let hooks = self.exchange()?;
        let paused = pause.end()?;
        wait_for_packets();
        self.carry_left(left, &newest.root)?;
        sockets.iter().for_each(|sockets| self.try_sockets(sockets, SocketCarrier::absent));
        for generation in left {
            generation.root.remove_generation()?;
        }
        Ok(Changeover { hooks, paused, took: begun.elapsed(), ..Changeover::default() })
    }

    /// Whether any program at a hook works with this map.
    fn is_used(&self, map: u32) -> Result<bool, AttachError> {
        any_at_hooks(self.root(), |program| program.maps.contains(&map))
    }

    /// The way to carry over what sockets remember. Where there is none they forget it, which is no reason to stay with what
    /// an older agent has left.
    fn sockets(&mut self, old: &Generation, new: &Generation) -> Option<SocketCarrier> {
        SocketCarrier::open(old, new).unwrap_or_else(|error| {
            self.forgotten(&error);
            None
        })
    }

    fn try_sockets(
        &mut self,
        carrier: &Option<SocketCarrier>,
        act: fn(&SocketCarrier) -> Result<(), SocketError>,
    ) {
        if let Some(Err(error)) = carrier.as_ref().map(act) {
            self.forgotten(&error);
        }
    }

    fn forgotten(&mut self, error: &SocketError) {
        let source = std::error::Error::source(error).map(|source| format!(": {source}")).unwrap_or_default();
        self.warn(format!(
            "sockets have forgotten which Services they came through, as this kernel cannot carry that over to another layout \
             (Linux 5.11): host processes that are connected over UDP stay with their endpoint when it goes: {error}{source}"
        ));
    }

    /// Carries over what has begun in tables that should be nobody's any more, as far as programs still work with them. What is
    /// in the newest ones counts more.
    fn carry_left(&self, left: &[Generation], root: &BpfRoot) -> Result<(), LoadError> {
        for generation in left {
            let Some(records) = generation.map(maps::RECORDS) else { continue };
            let new = Generation::open(root.clone())?;
            let same = new.map(maps::RECORDS).is_some_and(|map| map.facts.id == records.facts.id);
            if same || !self.is_used(records.facts.id)? {
                continue;
            }
            if let Some(mut carrier) = FlowCarrier::open(generation, &new, false)? {
                carrier.look(Stage::Before)?;
            }
        }
        Ok(())
    }
}

/// Nothing begins as long as this lasts.
struct Pause<'a> {
    of: &'a Generation,
    begun: Instant,
    _haste: Haste,
}

/// What is done while others wait is done before everything else. Packets that wait keep processors busy, and so may other
/// programs: a pause of milliseconds would become one of seconds.
struct Haste {
    _grace: Option<Expedited>,
    first: bool,
}

impl Haste {
    fn make(root: &BpfRoot) -> Self {
        let first = sys::go_first(true);
        if let Err(error) = &first {
            tracing::debug!("a change of tables goes no faster than other work (CAP_SYS_NICE): {error}");
        }
        Self { _grace: Expedited::begin(root), first: first.is_ok() }
    }
}

impl Drop for Haste {
    fn drop(&mut self) {
        if self.first
            && let Err(error) = sys::go_first(false)
        {
            tracing::warn!("this thread still goes before all others: {error}; restart the agent");
        }
    }
}

/// How long packets may wait for those under way, each time that it is tried: who waits keeps a processor busy, and on a machine
/// that has none left grace periods take long.
const PATIENCE: [u64; 4] = [40_000_000, 80_000_000, 160_000_000, 320_000_000];

impl<'a> Pause<'a> {
    /// Begins, and waits until whatever had begun before is through. Where that takes too long packets go on, and it is tried
    /// again; the last time it takes as long as it takes.
    fn begin(of: &'a Generation) -> Result<Self, TableError> {
        for patience in PATIENCE.into_iter().chain([LONGEST_PAUSE]) {
            let pause = Self { of, begun: Instant::now(), _haste: Haste::make(&of.root) };
            let until = now()? + patience;
            pause.write(until)?;
            wait_for_packets();
            if now()? < until || patience == LONGEST_PAUSE {
                pause.write(now()? + LONGEST_PAUSE)?;
                return Ok(pause);
            }
            drop(pause);
            std::thread::sleep(REST);
        }
        unreachable!("the last time is waited for")
    }

    /// Ends; how long it has lasted.
    fn end(self) -> Result<Duration, TableError> {
        self.write(0)?;
        Ok(self.begun.elapsed())
    }

    fn write(&self, until: u64) -> Result<(), TableError> {
        let Some(map) = self.of.map(maps::PAUSE) else { return Ok(()) };
        sys::update(map.fd.as_fd(), &0_u32, &until).map_err(|source| TableError::Call {
            act: "write",
            object: "until when nothing begins".into(),
            map: maps::PAUSE,
            source,
        })
    }
}

impl Drop for Pause<'_> {
    fn drop(&mut self) {
        // After a failure, too, nothing is to wait longer than it must.
        self.write(0).ok();
    }
}
