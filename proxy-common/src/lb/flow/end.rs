//! Flows end: their legs are deleted, and the record is given back.

use crate::abi::{FlowId, Reason, Role, State};
use crate::lb::{Subprograms, Tables};

/// Takes a flow apart. 0 if another CPU is changing it; then it stays for now. One that has ended already
/// counts as taken apart.
#[inline(always)]
pub fn take_apart<T: Subprograms>(tables: &T, id: FlowId) -> u32 {
    if !tables.claim(id.index()) {
        return 0;
    }
    if tables.record(id.index(), |flow| flow.id == id && flow.state.0 >= State::LIVE.0) == Some(true) {
        dissolve(tables, id);
    } else {
        tables.unclaim(id.index());
    }
    1
}

/// Ends a flow that the caller has claimed, deletes its legs, and gives its record back.
#[inline(always)]
pub fn dissolve<T: Tables>(tables: &T, id: FlowId) -> u32 {
    let _ = tables.record(id.index(), |flow| flow.state = State::ENDED);
    for role in [Role::OUTER, Role::MIDDLE, Role::INNER] {
        let _ = tables.record(id.index(), |flow| {
            // The inner leg may be there although the record does not say so yet.
            let pair = &flow.pairs[role.index()];
            if tables.leg(pair).is_some_and(|leg| leg.id == id) {
                tables.delete_leg(pair);
            }
        });
    }
    give_back(tables, id);
    1
}

/// Gives back the record of a flow that has no legs any more; its claim ends.
#[inline(always)]
pub(crate) fn give_back<T: Tables>(tables: &T, id: FlowId) {
    let index = id.index();
    let _ = tables.record(index, |flow| {
        flow.state = State::FREE;
        flow.id = id.next();
    });
    tables.unclaim(index);
    enter_free(tables, index);
}

/// Enters a record among the free ones.
#[inline(always)]
pub(crate) fn enter_free<T: Tables>(tables: &T, index: u32) {
    if !tables.give_record(index) {
        // The sweep enters it again, as if it had never been used.
        let _ = tables.record(index, |flow| flow.state = State::NEW);
    }
}

/// Whether the flow is there and young.
#[inline(always)]
fn is_young<T: Tables>(tables: &T, id: FlowId) -> bool {
    tables.record(id.index(), |flow| flow.is(id) && flow.old == 0) == Some(true)
}

/// Takes a flow apart if it is young: what stood in a place of the ring, or at a port that is wanted.
#[inline(always)]
pub(crate) fn displace<T: Subprograms>(tables: &T, id: FlowId) -> bool {
    let done = id != FlowId::NONE && is_young(tables, id) && tables.take_apart(id) != 0;
    if done {
        tables.count(Reason::Displaced);
    }
    done
}
