//! Plan: what should be, minus what is, as a list of writes that leave nothing to decide.
//!
//! # Why the order of a plan is safe
//!
//! Programs read the tables while a plan is being carried out, and the agent may die between any two steps.
//! The steps of all Services of a plan are therefore sorted into phases:
//!
//! 1. SERVICES names, then BACKENDS that are new or whose flags change. An index is free when nothing in the
//!    tables refers to it, so no packet can see the new value yet.
//! 2. SLOTS in free runs, SOURCES to add, IFACES, MASQUERADE, CONFIG, bits of SERVICE_PORTS to set. The slots belong to no frontend yet; more sources
//!    only let in who will be let in anyway.
//! 3. FRONTENDS put: the one write a packet notices. The value of a frontend names whole runs, so a packet
//!    sees the old list of endpoints or the new one. A destination that moves from one Service to another
//!    is one put as well, never a delete and a put. Then bits are added to ADDRESSES: the ports that
//!    a ClusterIP does not define are refused (P-21) only when those it defines stand.
//! 4. Bits are taken from ADDRESSES, then FRONTENDS that nobody wants are deleted: the reverse of 3; bits of SERVICE_PORTS
//!    that no frontend stands for go after them.
//! 5. What no frontend shows any more: BACKENDS retire (with a higher generation, by which flows notice) or
//!    turn draining, SOURCES, SERVICES, IFACES and MASQUERADE go.
//!
//! So after every prefix of every plan each slot that a frontend shows leads to a live backend of its own
//! Service ([`lint_prefix`] says it in full, and a property test runs it there).
//!
//! A program may have read a frontend just before it flipped. It can still follow the old run, so slots,
//! backend indices and service ids rest for [`GRACE_MS`] before they are used again.
//!
//! A Service port for which a table has no room is left as it is, whole, with a warning that names the
//! remedy; the others go on, and it is tried again with every later plan.

mod actual;
mod array;
mod batch;
mod capacity;
mod compile;
mod lint;
mod mirror;
mod name;
mod planner;
mod pool;
mod print;
mod step;

pub use actual::Actual;
pub use array::{Array, Element};
pub use capacity::Capacity;
pub use lint::{Violation, lint, lint_prefix};
pub use name::service_name;
pub use planner::{Planner, Proposal};
pub use pool::GRACE_MS;
pub use step::Step;

/// What to write, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// The writes. Done in this order, each prefix is safe.
    pub steps: Vec<Step>,
    /// What found no room, with the remedy: all of it, not only what is new.
    pub warnings: Vec<String>,
    /// Tables that found no room for something.
    pub short: Vec<&'static str>,
    /// When to plan again although nothing has changed: something found no room, and room comes free.
    pub retry_at_ms: Option<u64>,
}
