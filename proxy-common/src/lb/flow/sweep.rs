//! The sweep, which ends flows that are silent for too long.

use super::end::enter_free;
use super::lost;
use crate::abi::{Flow, FlowId, Role, State, Timeouts};
use crate::lb::Subprograms;

/// Looks at one record: a new one becomes free, a flow that is silent for too long is taken apart, and so is
/// one that its packets cannot find any more. How many flows were taken apart.
#[inline(always)]
pub fn sweep<T: Subprograms>(tables: &T, index: u32, timeouts: &Timeouts) -> u32 {
    let now = tables.now();
    let found = tables.record(index, |flow| {
        let last = flow.last_seen().max(flow.last_reset());
        let idle = now.saturating_sub(last) > u64::from(timeouts.idle(flow)) * 1_000_000_000;
        (flow.state, flow.id, idle)
    });
    match found {
        Some((State::NEW, ..)) if index != 0 && tables.claim(index) => {
            let new = tables.record(index, |flow| {
                let new = flow.state == State::NEW;
                if new {
                    // One that has been used goes on counting.
                    let id = if flow.id == FlowId::NONE { FlowId(u64::from(index)) } else { flow.id };
                    flow.id = id.next();
                    flow.state = State::FREE;
                }
                new
            });
            tables.unclaim(index);
            if new == Some(true) {
                enter_free(tables, index);
            }
            0
        }
        Some((State::LIVE | State::LEFT, id, true)) | Some((State::ENDED, id, _)) => tables.take_apart(id),
        Some((State::LOST, id, _)) => lost::sweep(tables, id, now),
        Some((State::LIVE | State::LEFT, id, false)) => {
            let lost =
                |flow: &mut Flow| tables.leg(&flow.pairs[Role::OUTER.index()]).is_none_or(|leg| leg.id != id);
            if tables.record(index, lost) == Some(true) { tables.take_apart(id) } else { 0 }
        }
        _ => 0,
    }
}
