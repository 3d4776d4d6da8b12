//! What the agent leaves in the kernel for the command line and for its own next start.

#[cfg(feature = "next-layout")]
pub use super::next::ServiceStats;
use super::table_type;
use crate::addr::Proto;

/// Room for a Kubernetes name (at most 63 bytes, RFC 1123 label) and its end.
pub const TEXT_LEN: usize = 64;

/// `s` in a field of `N` bytes, cut at a character if too long, padded with zeros.
#[must_use]
pub fn text<const N: usize>(s: &str) -> [u8; N] {
    let mut field = [0; N];
    let mut end = s.len().min(N.saturating_sub(1));
    while !s.is_char_boundary(end) {
        end -= 1;
    }
    for (to, from) in field.iter_mut().zip(s.as_bytes().iter().take(end)) {
        *to = *from;
    }
    field
}

/// The text in a field written by [`text`]; what is not UTF-8 reads as `?`.
#[must_use]
pub fn untext(field: &[u8]) -> &str {
    let end = field.iter().position(|b| *b == 0).unwrap_or(field.len());
    core::str::from_utf8(field.get(..end).unwrap_or(&[])).unwrap_or("?")
}

table_type! {
    /// The name behind a service id.
    pub struct ServiceName {
        /// Namespace.
        pub namespace: [u8; TEXT_LEN],
        /// Name of the Service.
        pub name: [u8; TEXT_LEN],
        /// Name of its port; empty when unnamed.
        pub port: [u8; TEXT_LEN],
        /// Protocol of the port.
        pub proto: Proto,
        /// 4 or 6.
        pub family: u8,
        /// Zero.
        pub pad: [u8; 2],
    }
}

#[cfg(not(feature = "next-layout"))]
table_type! {
    /// Counters of one Service port on one CPU.
    pub struct ServiceStats {
        /// Flows and connects that got a backend.
        pub chosen: u64,
        /// Rejected: no endpoint anywhere.
        pub refused: u64,
        /// Dropped: policy, source ranges, or nothing local.
        pub dropped: u64,
    }
}

impl ServiceStats {
    /// Nothing counted.
    pub const NONE: Self = Self {
        chosen: 0,
        refused: 0,
        dropped: 0,
        #[cfg(feature = "next-layout")]
        next: 0,
    };
}

table_type! {
    /// How the agent fares, rewritten after each sync. Unix times in milliseconds.
    pub struct AgentState {
        /// Process id in the agent's own pid namespace.
        pub pid: u64,
        /// When the agent started.
        pub started_ms: u64,
        /// When the agent last wrote this record (a heartbeat every few seconds).
        pub beat_ms: u64,
        /// When tables last equalled what is wanted.
        pub synced_ms: u64,
        /// When the sync was first due that has not succeeded yet; 0 when none is.
        pub queued_ms: u64,
        /// Syncs so far that changed a table.
        pub generation: u64,
        /// Services known.
        pub services: u32,
        /// Endpoints known.
        pub endpoints: u32,
        /// Warnings: objects left out because they are wrong, and what else is amiss.
        pub complaints: u32,
        /// 1 when every source has delivered its first complete list.
        pub synced: u32,
        /// 1 when the source answers, 0 when it is being retried.
        pub connected: u32,
        /// Interfaces that carry programs.
        pub interfaces: u32,
        /// Interfaces that a program could not be attached to.
        pub interfaces_failed: u32,
        /// What the kernel lacks and the agent does without: bits of [`absent`].
        pub absent: u32,
        /// Version of the agent.
        pub version: [u8; 32],
        /// Node name.
        pub node: [u8; 64],
        /// Where the Services come from.
        pub source: [u8; 72],
    }
}

/// How the text of a [`Warning`] begins that only informs.
pub const NOTE: &str = "note: ";

/// How the text of one begins because of which traffic is not served.
pub const PROBLEM: &str = "problem: ";

/// Bits of [`AgentState::absent`]: what a kernel may lack, and what something else stands in for.
pub mod absent {
    /// The just-in-time compiler.
    pub const JIT: u32 = 1 << 0;
    /// The description of the kernel's own types.
    pub const BTF: u32 = 1 << 1;
    /// TC links.
    pub const TCX: u32 = 1 << 2;
    /// The cheap clock.
    pub const COARSE_CLOCK: u32 = 1 << 3;
    /// Errors that a socket hook chooses.
    pub const SET_RETVAL: u32 = 1 << 4;
    /// Hardware checksums of IPv6 that stay true when an address is rewritten.
    pub const CSUM_IPV6: u32 = 1 << 5;
    /// Cookies of network namespaces, for socket hooks.
    pub const NETNS_COOKIE: u32 = 1 << 6;
    /// The cookie of the host's own namespace, for the agent.
    pub const HOST_NETNS: u32 = 1 << 7;
    /// The way from a subflow to its MPTCP socket, for socket hooks.
    pub const MPTCP_SOCKET: u32 = 1 << 8;
    /// Direct server return.
    pub const WRAP: u32 = 1 << 9;
}

table_type! {
    /// One object that was left out, or one thing that went wrong: text for a person.
    pub struct Warning {
        /// Zero-padded UTF-8.
        pub text: [u8; 256],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_cut_at_a_character() {
        assert_eq!(untext(&text::<8>("webui")), "webui");
        assert_eq!(untext(&text::<8>("abcdefghij")), "abcdefg");
        assert_eq!(untext(&text::<4>("aéé")), "aé");
        assert_eq!(untext(&text::<3>("aé")), "a");
    }
}
