//! What the kernel programs and the agent agree on, and every decision about a packet.
//!
//! Three rooms: [`abi`] is what lies in the maps, [`wire`] turns bytes into meaning, [`lb`] decides. The
//! same functions run inlined in the kernel, over hash maps in unit and property tests, and as the oracle
//! for runs of the real programs.
//!
//! Rules for code that a verifier reads: no allocation, no panic path (`get` instead of indexing, no
//! run-time divisor that may be zero), no unbounded loop, small frames, `#[inline(always)]` on all that
//! touches a packet.
#![cfg_attr(not(any(test, feature = "testing")), no_std)]

#[cfg(feature = "user")]
extern crate alloc;

pub mod abi;
pub mod addr;
pub mod lb;
pub mod wire;

#[cfg(any(test, feature = "testing"))]
pub mod testing;
