//! Session affinity: [`AffinityKey`] → [`Affinity`].

#[cfg(feature = "next-layout")]
pub use super::next::Affinity;
use super::table_type;
use crate::addr::Addr;

table_type! {
    /// A client of a Service port. A socket that has no address yet is known by its network
    /// namespace's cookie in the low words.
    pub struct AffinityKey {
        /// Client.
        pub client: Addr,
        /// Id of the Service port.
        pub service: u32,
    }
}

#[cfg(not(feature = "next-layout"))]
table_type! {
    /// Where the client went last.
    pub struct Affinity {
        /// Backend index.
        pub backend: u32,
        /// Its generation then.
        pub generation: u32,
        /// When the last new flow was assigned.
        pub last_seen: u64,
    }
}
