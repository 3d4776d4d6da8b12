//! Legs are entered where there is none, or where the one that is there belongs to no flow any more.

use crate::abi::{FlowId, Reason, Role};
use crate::lb::{Inserted, Subprograms, Tables};

/// What came of entering a leg.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Entered {
    /// It is there now.
    Done = 0,
    /// It was there already.
    Kept,
    /// The pair belongs to another flow, which has ended.
    Ended,
    /// The pair belongs to another flow.
    Taken,
    /// No room.
    Full,
}

impl Entered {
    /// The result with this number; any other number means full.
    #[inline(always)]
    pub const fn from_number(number: u32) -> Self {
        match number {
            0 => Self::Done,
            1 => Self::Kept,
            2 => Self::Ended,
            3 => Self::Taken,
            _ => Self::Full,
        }
    }
}

/// Enters the leg of a flow that the caller has claimed, whose pair stands in the record; `holder` becomes
/// the flow that has the pair, if another one has.
#[inline(always)]
pub fn enter<T: Tables>(tables: &T, id: FlowId, role: Role, holder: &mut FlowId) -> Entered {
    *holder = FlowId::NONE;
    for attempt in 0..3 {
        let tried = tables.record(id.index(), |flow| {
            let pair = &flow.pairs[role.index()];
            match tables.insert_leg(flow, role) {
                Inserted::Done => Ok(Entered::Done),
                Inserted::Full | Inserted::Raced => Ok(Entered::Full),
                Inserted::Exists => {
                    let found = tables.leg(pair).map(|found| found.id);
                    // Deleted again, or written at this moment; if that lasts, it is no whole leg and belongs
                    // to no flow.
                    if found.is_none() && attempt != 0 && tables.is_broken(pair) {
                        tables.delete_leg(pair);
                    }
                    Err(found)
                }
            }
        });
        let found = match tried {
            Some(Ok(entered)) => return entered,
            Some(Err(Some(found))) => found,
            Some(Err(None)) => continue,
            None => return Entered::Taken,
        };
        if found == id {
            return Entered::Kept;
        }
        let now = tables.now();
        let state =
            tables.record(found.index(), |flow| (flow.id == found, flow.lives(found), flow.is_closed(now)));
        if let Some((true, lives, closed)) = state {
            *holder = found;
            return if lives && !closed { Entered::Taken } else { Entered::Ended };
        }
        // Its flow has ended, and it is not certain that anybody else removes it; it may be another one by now.
        let _ = tables.record(id.index(), |flow| {
            let pair = &flow.pairs[role.index()];
            if tables.leg(pair).is_some_and(|leg| leg.id == found) {
                tables.delete_leg(pair);
            }
        });
    }
    Entered::Taken
}

/// The same; a flow that has ended makes room.
#[inline(always)]
pub(crate) fn enter_for<T: Subprograms>(tables: &T, id: FlowId, role: Role, holder: &mut FlowId) -> Entered {
    for _ in 0..2 {
        let entered = tables.enter(id, role, holder);
        if entered != Entered::Ended {
            return entered;
        }
        if tables.take_apart(*holder) == 0 {
            break;
        }
    }
    *holder = FlowId::NONE;
    Entered::Taken
}

/// Checks that all legs of a flow are there. One that was deleted is written again; if another flow has taken
/// its place, this one ends.
#[inline(always)]
pub fn look_after<T: Subprograms>(tables: &T, id: FlowId) -> u32 {
    // Under the claim the flow cannot be taken apart, so no leg can be left behind.
    if !tables.claim(id.index()) {
        return 0;
    }
    let mut lost = false;
    for role in [Role::OUTER, Role::MIDDLE, Role::INNER, Role::OWN] {
        if tables.record(id.index(), |flow| flow.is(id) && flow.has(role)) == Some(true) {
            match tables.enter(id, role, &mut FlowId(0)) {
                Entered::Kept => {}
                Entered::Done => tables.count(Reason::EntryRestored),
                Entered::Ended | Entered::Taken | Entered::Full => lost = true,
            }
        }
    }
    if lost {
        tables.dissolve(id);
    } else {
        tables.unclaim(id.index());
    }
    0
}
