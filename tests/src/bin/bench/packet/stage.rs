//! Where a packet stands before each run: as the case has it, and one of the next flow.
//!
//! A run finds the packet as the run before has left it. So each run begins with a small program that writes
//! the headers anew, turns one address to that of the next flow, and calls the program that is measured. What
//! this costs is in the same run of an empty program, which is taken off.

use std::ops::Range;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};

use anyhow::{Context as _, Result};
use aya_obj::generated::bpf_map_type;

use super::ideal::{DATA, DATA_END};
use crate::asm::{Alu, Code, If, R1, R2, R3, R4, R5, R6, R7, Width};
use crate::raw;

/// `mark` in `struct __sk_buff`, which no program of ours looks at: the number of the flow.
const MARK: i16 = 8;
/// `tc_index`, in which a program leaves its mark at what it has rewritten.
const TC_INDEX: i16 = 44;
/// `bpf_tail_call`.
const TAIL_CALL: i32 = 12;
/// From one flow to the next: coprime to the number of flows, so that all have their turn, and far enough
/// that none is beside the one before in memory.
const STEP: i32 = 7919;
/// What is returned when there was nothing to call: TCX_DROP.
const BROKEN: i32 = 2;

/// A packet as a case has it, and how it becomes one of other flows.
pub(super) struct Frame {
    /// The packet of flow 0.
    pub(super) packet: Vec<u8>,
    /// Where headers begin and end that are written anew; whole words of 32 bits.
    pub(super) headers: Range<usize>,
    /// Where the transport's checksum is.
    pub(super) checksum: usize,
    /// Where the last word of the address is that turns.
    pub(super) turns: usize,
    /// Flows.
    pub(super) flows: u32,
}

/// A program that is called with packets of a frame.
pub(super) struct Stage {
    program: OwnedFd,
    /// The kernel empties the array when its last descriptor is closed.
    _called: OwnedFd,
}

impl Stage {
    pub(super) fn new(frame: &Frame, program: BorrowedFd<'_>) -> Result<Self> {
        let called = raw::create_map(bpf_map_type::BPF_MAP_TYPE_PROG_ARRAY, 4, 4, 1)
            .context("making an array of programs")?;
        raw::update(called.as_fd(), &0_u32.to_ne_bytes(), &program.as_raw_fd().to_ne_bytes())
            .context("filling an array of programs")?;
        let stage =
            raw::load(&code(frame, called.as_fd())?).context("loading a program that makes packets")?;
        Ok(Self { program: stage, _called: called })
    }

    pub(super) fn program(&self) -> BorrowedFd<'_> {
        self.program.as_fd()
    }
}

fn code(frame: &Frame, called: BorrowedFd<'_>) -> Result<Vec<u64>> {
    let (flows, step) = (i32::try_from(frame.flows)?, if frame.flows == 1 { 1 } else { STEP });
    let mut code = Code::new();
    // The context survives in R6, the number of the flow is in R7.
    code.copy(R6, R1).load(Width::Word, R7, R6, MARK).alu_number(Alu::Add, R7, step);
    code.skip_if_number(If::Below, R7, flows, 1).alu_number(Alu::Sub, R7, flows);
    code.store(Width::Word, R6, MARK, R7);
    code.set(R5, 0).store(Width::Word, R6, TC_INDEX, R5);
    code.load(Width::Word, R2, R6, DATA).load(Width::Word, R3, R6, DATA_END);
    code.copy(R4, R2).alu_number(Alu::Add, R4, i32::try_from(frame.checksum + 2)?);
    code.leave_if(If::Above, R4, R3);
    for at in frame.headers.clone().step_by(4) {
        let word = i32::from_ne_bytes(frame.packet[at..at + 4].try_into()?);
        if at != frame.turns {
            code.store_number(Width::Word, R2, i16::try_from(at)?, word);
        }
    }
    let checksum = u16::from_ne_bytes(frame.packet[frame.checksum..][..2].try_into()?);
    code.store_number(Width::Half, R2, i16::try_from(frame.checksum)?, checksum.into());
    let first = i32::from_be_bytes(frame.packet[frame.turns..][..4].try_into()?);
    code.alu_number(Alu::Add, R7, first).network_order(R7);
    code.store(Width::Word, R2, i16::try_from(frame.turns)?, R7);
    // Does not return, if there is a program.
    code.copy(R1, R6).map(R2, called).set(R3, 0).call(TAIL_CALL);
    Ok(code.returns(BROKEN))
}
