//! What the agent asks of the program `flows`, as bytes behind an Ethernet header: which work, its two
//! numbers, and what goes with it: the [`Timeouts`](super::Timeouts), ids, or a record. All words are in host
//! order.

/// Look through the records from the first number on, as many as the second says (at most [`MOST`]): free
/// those that are new, take apart those that have timed out. The answer is how many were taken apart.
pub const SWEEP: u32 = 1;
/// Take apart the flows whose ids follow; the first number says how many (at most [`MOST_IDS`]). The answer
/// is how many there were.
pub const END: u32 = 2;
/// Make a flow of the record that follows, but for its first [`RECORD_AT`] bytes, which are the record's own.
/// The answer is its index; 0 if a flow of ours has its outer pair and is newer, or [`NO_ROOM`].
pub const ADOPT: u32 = 3;
/// See [`ADOPT`].
pub const NO_ROOM: u32 = u32::MAX - 1;
/// With an index: it had been adopted before.
pub const KNOWN: u32 = 1 << 30;
/// With an index: another flow has its middle pair, so it can only stay with netfilter.
pub const ALONE: u32 = 1 << 29;
/// The flow that has been adopted, whose id is both numbers (the lower half first), is translated by us from
/// now on. The answer is 1 if it is.
pub const TAKE: u32 = 4;
/// The flows whose ids follow have lost their endpoint, and are to be reset if they are TCP's and have been
/// answered; the first number says how many (at most [`MOST_IDS`]). What their ends have last acknowledged is
/// written to their records. The answer is how many there were.
pub const LOSE: u32 = 5;
/// Make a flow of the record that follows, which comes from other tables, like [`ADOPT`]. If the first number
/// is 1, who has one of its pairs here makes room: it is what the other tables had before. The answer is that
/// of [`ADOPT`].
pub const CARRY: u32 = 6;
/// Count what other tables have counted since they were copied: the first number says which counter (a
/// [`Reason`](crate::abi::Reason), or [`STATS`] plus four times the id of a Service port plus 0 to 2 for
/// those of its [`ServiceStats`](crate::abi::ServiceStats), in their order); how often follows, in 64 bits.
/// Whoever counts at the same moment loses nothing.
pub const COUNT: u32 = 7;
/// See [`COUNT`].
pub const STATS: u32 = 1 << 16;
/// Where the record's own part ends: identity and claims.
pub const RECORD_AT: usize = 16;
/// Where the question begins.
pub const OFFSET: usize = 16;
/// Where that begins.
pub const BODY: usize = 32;
/// Records one sweep looks at.
pub const MOST: u32 = 512;
/// Flows that are ended at once.
pub const MOST_IDS: u32 = 64;
