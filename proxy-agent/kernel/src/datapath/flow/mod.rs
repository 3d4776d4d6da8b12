//! The flows from user space: read from their records, ended by the kernel program `flows`.
//!
//! Nothing is written from here. The program takes a flow apart as a whole (see `proxy_common::lb::flow`), so an agent
//! that is killed leaves nothing half done, and the decision when a flow is over is made in one place.

pub mod sockets;
pub mod streams;

use std::io;
use std::mem::offset_of;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

pub use proxy_common::abi::Timeouts;
use proxy_common::abi::{Flow, FlowId, State, ask, flow_flags, maps};
use proxy_common::addr::Proto;

use crate::datapath::store::pin::BpfRoot;
use crate::datapath::store::table::{Cursor, Table, TableError};
use crate::sys;

/// One second in the unit of [`Flow`]'s times.
const SECOND: u64 = 1_000_000_000;

/// The program that no hook carries: its name in the object, and that of its pin beside the tables that it works on.
pub const PROGRAM: &str = "flows";

/// The flows of this node.
#[derive(Debug)]
pub struct Flows {
    program: OwnedFd,
    records: Table<u32, Flow>,
}

impl Flows {
    /// Opens what is pinned.
    pub fn open(root: &BpfRoot) -> Result<Self, TableError> {
        let path = root.program(PROGRAM);
        let program =
            sys::obj_get(&path).map_err(|source| TableError::Open { map: maps::RECORDS, path, source })?;
        Ok(Self { program, records: Table::open(root, maps::RECORDS)? })
    }

    /// Flows there may be.
    #[must_use]
    pub fn max(&self) -> u32 {
        self.records.max()
    }

    /// Shows every living flow, those that are left to netfilter too, a chunk at a time.
    pub fn scan(&self, mut see: impl FnMut(&Flow)) -> Result<(), TableError> {
        self.records(|flow| {
            if matches!(flow.state, State::LIVE | State::LEFT) {
                see(flow);
            }
        })
    }

    fn records(&self, mut see: impl FnMut(&Flow)) -> Result<(), TableError> {
        let mut cursor = Cursor::default();
        while self.records.chunk(&mut cursor, &mut |_, flow: Flow| see(&flow))? {}
        Ok(())
    }

    /// How many living flows there are. Reads a word of each record in place.
    pub fn count(&self) -> Result<u64, TableError> {
        let elements = self.records.elements()?;
        let lives = |index: &u32| state_of(&elements, *index) == State::LIVE;
        Ok((0..self.max()).filter(lives).count() as u64)
    }

    /// Whether a TCP connection lives that another proxy has begun. Reads two words of each record in place.
    pub fn has_adopted_streams(&self) -> Result<bool, TableError> {
        let elements = self.records.elements()?;
        let may_be = |index: &u32| {
            let flags = byte_of(&elements, *index, offset_of!(Flow, flags));
            let state = state_of(&elements, *index);
            flags & flow_flags::ADOPTED != 0 && matches!(state, State::LIVE | State::LEFT)
        };
        for index in (0..self.max()).filter(may_be) {
            let lives = |flow: Flow| flow.proto() == Proto::TCP && flow.fin != [1, 1] && !flow.is_reset();
            if self.records.get(&index)?.is_some_and(lives) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Looks through some records and ends the flows that are over, or silent for too long; how many there were. At
    /// most [`ask::MOST`] records at once.
    pub fn sweep(&self, from: u32, count: u32, timeouts: &Timeouts) -> Result<u32, TableError> {
        let told = timeouts.words();
        self.ask("sweep", [ask::SWEEP, from, count], told.into_iter().flat_map(u32::to_ne_bytes).collect())
    }

    /// Ends the flows with these ids; how many there were.
    pub fn end(&self, ids: &[FlowId]) -> Result<u32, TableError> {
        let mut ended = 0;
        for some in ids.chunks(ask::MOST_IDS as usize) {
            let bytes = some.iter().flat_map(|id| id.0.to_ne_bytes()).collect();
            ended += self.ask("end", [ask::END, some.len() as u32, 0], bytes)?;
        }
        Ok(ended)
    }

    /// Makes a flow of a connection that another proxy has begun (see [`Flow::adopted`]), which is left to netfilter until
    /// [`Self::take`].
    pub fn adopt(&self, flow: &Flow) -> Result<Adopted, TableError> {
        let answer = self.ask("adopt", [ask::ADOPT, 0, 0], sys::bytes(flow).to_vec())?;
        Ok(match answer {
            0 => Adopted::Replaced,
            ask::NO_ROOM => Adopted::NoRoom,
            index if index & ask::KNOWN != 0 => Adopted::Known(self.id(index & !ask::KNOWN)?),
            index if index & ask::ALONE != 0 => Adopted::Alone(self.id(index & !ask::ALONE)?),
            index => Adopted::Done(self.id(index)?),
        })
    }

    /// Has the packets of a flow translated by us that has been adopted; whether they are.
    pub fn take(&self, id: FlowId) -> Result<bool, TableError> {
        Ok(self.ask("take", [ask::TAKE, id.index(), (id.0 >> 32) as u32], Vec::new())? != 0)
    }

    /// Whether a flow is left to netfilter.
    pub fn is_left(&self, id: FlowId) -> Result<bool, TableError> {
        Ok(self.records.get(&id.index())?.is_some_and(|flow| flow.is_left(id)))
    }

    /// Which flow is in a record.
    fn id(&self, index: u32) -> Result<FlowId, TableError> {
        Ok(self.records.get(&index)?.map_or(FlowId::NONE, |flow| flow.id))
    }

    /// Has the TCP flows of these backends (by index and generation) reset, and notes what their ends have last acknowledged;
    /// all that are lost now, those from before included. They are looked for each time: other tables have other ids.
    pub fn lose(&self, is_lost: impl Fn(u32, u32) -> bool) -> Result<Vec<FlowId>, TableError> {
        let mut found = Vec::new();
        self.records(|flow| {
            let lives = matches!(flow.state, State::LIVE | State::LEFT | State::LOST);
            if lives && flow.proto() == Proto::TCP && is_lost(flow.backend, flow.generation) {
                found.push(flow.id);
            }
        })?;
        for some in found.chunks(ask::MOST_IDS as usize) {
            let bytes = some.iter().flat_map(|id| id.0.to_ne_bytes()).collect();
            self.ask("lose", [ask::LOSE, some.len() as u32, 0], bytes)?;
        }
        Ok(found)
    }

    /// A flow that has lost its endpoint, as long as it is told so.
    pub fn lost(&self, id: FlowId) -> Result<Option<Flow>, TableError> {
        Ok(self.records.get(&id.index())?.filter(|flow| flow.is_lost(id)))
    }

    /// Makes a flow of one of other tables, of this layout already. With `newer` it is what these have at this moment, and who
    /// has one of its pairs here is what they had before; else who is here stays.
    pub(crate) fn carry(&self, flow: &[u8], newer: bool) -> Result<Adopted, TableError> {
        Ok(match self.ask("carry over", [ask::CARRY, newer.into(), 0], flow.to_vec())? {
            0 => Adopted::Replaced,
            ask::NO_ROOM => Adopted::NoRoom,
            index => Adopted::Done(self.id(index & !ask::ALONE)?),
        })
    }

    /// Adds to a counter; see [`ask::COUNT`].
    pub(crate) fn add_count(&self, which: u32, more: u64) -> Result<(), TableError> {
        self.ask("count", [ask::COUNT, which, 0], more.to_ne_bytes().to_vec()).map(drop)
    }

    fn ask(&self, act: &'static str, question: [u32; 3], body: Vec<u8>) -> Result<u32, TableError> {
        let failed = |source| TableError::Call { act, object: "flows".into(), map: maps::RECORDS, source };
        let mut bytes = vec![0; ask::OFFSET];
        bytes.extend(question.into_iter().flat_map(u32::to_ne_bytes));
        bytes.resize(ask::BODY, 0);
        bytes.extend(body);
        let answer = sys::program_run(self.program.as_fd(), &bytes).map_err(failed)?;
        if answer == u32::MAX {
            return Err(failed(io::ErrorKind::InvalidInput.into()));
        }
        Ok(answer)
    }
}

/// A byte of a record, read in place.
fn byte_of(records: &sys::Elements, index: u32, at: usize) -> u8 {
    let word = records.get(index as usize * (size_of::<Flow>() / 8) + at / 8);
    (word >> (at % 8 * 8)) as u8
}

fn state_of(records: &sys::Elements, index: u32) -> State {
    State(byte_of(records, index, offset_of!(Flow, state)))
}

/// What has become of a connection that was to be adopted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Adopted {
    /// It is this flow.
    Done(FlowId),
    /// It has been before.
    Known(FlowId),
    /// It is one that can only stay with netfilter.
    Alone(FlowId),
    /// A flow of ours has taken its place.
    Replaced,
    /// The tables are full.
    NoRoom,
}

/// Waits until every packet that has passed a program is through the stack, as far as it goes without a queue.
pub fn wait_for_packets() {
    /// Longer than that takes, by far.
    const LONG: Duration = Duration::from_millis(20);
    // It fails with `nohz_full`.
    if sys::wait_for_grace().is_err() {
        std::thread::sleep(LONG);
    }
}

/// Records that the agent has looked at in a second: the default table in five seconds, a larger one in as many times
/// that. So much of a processor is spent on it, and no more.
pub const SWEPT_A_SECOND: u32 = 32_768;

/// Looks through the flows a few thousand records at a time.
#[derive(Debug)]
pub struct Sweeper {
    flows: Flows,
    at: u32,
    timeouts: Timeouts,
}

impl Sweeper {
    /// A sweeper over what is pinned.
    pub fn open(root: &BpfRoot, timeouts: Timeouts) -> Result<Self, TableError> {
        Ok(Self { flows: Flows::open(root)?, at: 0, timeouts })
    }

    /// Looks through all records once: those that have never been used are free from then on.
    pub fn all(&mut self) -> Result<u32, TableError> {
        self.look(self.flows.max().div_ceil(ask::MOST))
    }

    /// Looks at the records whose turn has come after a time; how many flows were over.
    pub fn tick(&mut self, after: Duration) -> Result<u32, TableError> {
        let records = after.as_secs_f64() * f64::from(SWEPT_A_SECOND);
        self.look((records as u32).div_ceil(ask::MOST))
    }

    /// Looks at the next records, so many times [`ask::MOST`]; how many flows were over.
    fn look(&mut self, times: u32) -> Result<u32, TableError> {
        let mut ended = 0;
        for _ in 0..times {
            ended += self.flows.sweep(self.at, ask::MOST, &self.timeouts)?;
            self.at = if self.at + ask::MOST < self.flows.max() { self.at + ask::MOST } else { 0 };
        }
        Ok(ended)
    }

    /// The flows it looks through.
    #[must_use]
    pub fn flows(&self) -> &Flows {
        &self.flows
    }
}

/// Now, on the clock of [`Flow`]'s times.
pub fn now() -> Result<u64, TableError> {
    let time =
        nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).map_err(|errno| TableError::Call {
            act: "read the clock for",
            object: "flows".into(),
            map: maps::RECORDS,
            source: errno.into(),
        })?;
    Ok(time.tv_sec() as u64 * SECOND + time.tv_nsec() as u64)
}
