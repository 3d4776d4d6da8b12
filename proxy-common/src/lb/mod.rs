//! Decisions: what becomes of a packet or a socket call. Functions over [`Tables`], which
//! lend them data, and [`Subprograms`], through which they call each other where the kernel wants a call.
//!
//! The story of a packet: [`quick`] lets go on what can be told from little; [`ingress`] finds its flow or [`open`]s one and names the new destination;
//! [`egress`] finds the same flow by its tuple behind the stack and names the new source. [`socket`] is the
//! same story without packets, and [`through`] in one go for those that only pass the node. What is chosen and why is in [`select`]; how flows begin, live and end is in
//! [`flow`], and how those of another proxy become ours in [`adopt`]. Where the endpoint's node answers the client itself,
//! the packet goes there as [`direct`] says.

pub mod adopt;
pub mod direct;
#[cfg(test)]
mod direct_tests;
pub mod egress;
pub mod flow;
pub mod fragment;
pub mod ingress;
pub mod masquerade;
pub mod open;
pub mod quick;
pub mod select;
pub mod socket;
mod subprog;
mod tables;
pub mod through;
#[cfg(test)]
mod through_tests;

#[cfg(test)]
mod tests;

pub use flow::Entered;
pub use fragment::{FRAGMENTS_LIVE, Recalled};
pub use select::Choice;
pub use subprog::Subprograms;
pub use tables::{Inserted, Ring, Stat, Tables};

/// What to do with a packet.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum Verdict {
    /// Not ours: it goes on unchanged.
    Pass = 0,
    /// Apply the edit and let it go on.
    Rewrite,
    /// Discard it and send a reject reply.
    Reject,
    /// Discard it.
    Drop,
    /// Put it at the end of the queue, to come again.
    Wait,
    /// Send it to the endpoint's node in a packet of its own.
    Wrap,
}

impl Verdict {
    /// The verdict with this number; any other number drops.
    #[inline(always)]
    pub const fn from_number(number: u32) -> Self {
        match number {
            0 => Self::Pass,
            1 => Self::Rewrite,
            2 => Self::Reject,
            4 => Self::Wait,
            5 => Self::Wrap,
            _ => Self::Drop,
        }
    }
}

/// How far ahead an agent may set the end of a pause, in nanoseconds: it may die in it, and a busy node may
/// take a second where an idle one takes milliseconds. Never less than what older agents set.
pub const LONGEST_PAUSE: u64 = 5_000_000_000;

/// Whether nothing may begin yet if a pause ends at `until`. One that is longer than any agent's does
/// not count: it would stop all that is new for ever; the clock of packets may be some ticks behind the agent's.
#[inline(always)]
#[must_use]
pub const fn is_paused(now: u64, until: u64) -> bool {
    now < until && until - now < 2 * LONGEST_PAUSE
}
