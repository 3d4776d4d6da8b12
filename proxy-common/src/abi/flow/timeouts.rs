//! How long a flow may be silent.

use super::{FORWARD, Flow, REPLY};
use crate::abi::table_type;
use crate::addr::Proto;

table_type! {
    /// How long a flow may be silent, in seconds (D-6, C-16).
    pub struct Timeouts {
        /// TCP, open.
        pub tcp_established: u32,
        /// TCP, one direction closed.
        pub tcp_half_closed: u32,
        /// TCP, both directions closed.
        pub tcp_closed: u32,
        /// TCP, reset.
        pub tcp_reset: u32,
        /// TCP, young: the client has not acknowledged the endpoint.
        pub tcp_syn: u32,
        /// UDP, young.
        pub udp: u32,
        /// UDP, old: traffic both ways after two seconds.
        pub udp_stream: u32,
        /// SCTP, old: its shutdown is not followed.
        pub sctp_established: u32,
        /// SCTP, young.
        pub sctp_init: u32,
        /// Zero.
        pub pad: u32,
    }
}

/// Seconds that an open TCP connection may be silent of which one side is seen: longer than the two hours after which
/// keep-alive speaks (`tcp_keepalive_time` of the kernel's ip-sysctl.rst), and its probes.
const ONE_SIDED: u32 = 8_100;

impl Timeouts {
    /// As numbers in the order of the fields, for the program that sweeps.
    #[must_use]
    pub const fn words(&self) -> [u32; 10] {
        [
            self.tcp_established,
            self.tcp_half_closed,
            self.tcp_closed,
            self.tcp_reset,
            self.tcp_syn,
            self.udp,
            self.udp_stream,
            self.sctp_established,
            self.sctp_init,
            self.pad,
        ]
    }

    /// From [`Self::words`].
    #[must_use]
    #[inline(always)]
    pub const fn from_words(words: [u32; 10]) -> Self {
        let [tcp_established, tcp_half_closed, tcp_closed, tcp_reset, tcp_syn, ..] = words;
        let [.., udp, udp_stream, sctp_established, sctp_init, pad] = words;
        Self {
            tcp_established,
            tcp_half_closed,
            tcp_closed,
            tcp_reset,
            tcp_syn,
            udp,
            udp_stream,
            sctp_established,
            sctp_init,
            pad,
        }
    }

    /// The defaults of the kernel's connection tracking, except that an open TCP connection is kept for a day.
    pub const CONNTRACK: Self = Self {
        tcp_established: 86_400,
        tcp_half_closed: 3_600,
        tcp_closed: 120,
        tcp_reset: 10,
        tcp_syn: 60,
        udp: 30,
        udp_stream: 120,
        sctp_established: 86_400,
        sctp_init: 60,
        pad: 0,
    };

    /// Seconds of silence that end a flow.
    #[inline(always)]
    #[must_use]
    pub const fn idle(&self, flow: &Flow) -> u32 {
        let young = flow.old == 0;
        let fins = flow.fin[FORWARD] + flow.fin[REPLY];
        match flow.proto() {
            // What the endpoint does is not seen: neither its FIN nor its RST.
            Proto::TCP if flow.is_direct() && fins > 0 => self.tcp_closed,
            Proto::TCP if flow.is_direct() && !young && !flow.is_reset() => {
                if self.tcp_established < ONE_SIDED { self.tcp_established } else { ONE_SIDED }
            }
            Proto::TCP if flow.is_reset() => self.tcp_reset,
            Proto::TCP if fins > 1 => self.tcp_closed,
            Proto::TCP if young => self.tcp_syn,
            Proto::TCP if fins == 1 => self.tcp_half_closed,
            Proto::TCP => self.tcp_established,
            Proto::SCTP if young => self.sctp_init,
            Proto::SCTP => self.sctp_established,
            _ if young => self.udp,
            _ => self.udp_stream,
        }
    }
}

impl Default for Timeouts {
    fn default() -> Self {
        Self::CONNTRACK
    }
}
