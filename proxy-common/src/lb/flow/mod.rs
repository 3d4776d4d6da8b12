//! The life of a flow: found by its packets, begun whole, taken apart whole.

mod begin;
mod end;
mod leg;
mod lost;
mod progress;
mod sweep;
mod touch;

#[cfg(test)]
mod lost_tests;
#[cfg(test)]
mod race_tests;
#[cfg(test)]
mod tests;

pub use begin::{join, join_own, make, make_own, take};
pub use end::{dissolve, take_apart};
pub use leg::{Entered, enter, look_after};
pub use lost::lose;
pub use progress::progress;
pub use sweep::sweep;

pub(crate) use end::{displace, enter_free, give_back};
pub(crate) use leg::enter_for;
pub(crate) use progress::care_for;
#[cfg(test)]
use touch::BELIEVED;
pub(crate) use touch::{Touch, Touched, goes_on, touch};
