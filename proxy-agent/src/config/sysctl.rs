//! What the kernel's connection tracking should be set to (Z-7…Z-10).
//!
//! Our own flows need none of it; what else masquerades on the node does.

use super::kube_proxy::duration::GoDuration;
use super::kube_proxy::v1alpha1::Conntrack;
use agent_kernel::datapath::flow::Timeouts;

/// No more entries than these, however many CPUs there are.
const CAP: u64 = 1 << 20;

/// The sysctls under `net.netfilter` to be set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sysctls {
    /// `nf_conntrack_max`; `None` leaves it alone, and the module's `hashsize`.
    pub conntrack_max: Option<u64>,
    /// The others: each belongs to the network namespace.
    pub others: Vec<(&'static str, u64)>,
}

impl Sysctls {
    /// What is to be set on a machine with so many CPUs.
    #[must_use]
    pub fn new(conntrack: &Conntrack, cpus: u64) -> Self {
        let number = |value: i64| u64::try_from(value).unwrap_or(0);
        let seconds = |duration: GoDuration| duration.positive().map_or(0, |duration| duration.as_secs());
        let others = [
            ("nf_conntrack_tcp_timeout_established", seconds(conntrack.tcp_established_timeout)),
            ("nf_conntrack_tcp_timeout_close_wait", seconds(conntrack.tcp_close_wait_timeout)),
            ("nf_conntrack_tcp_be_liberal", u64::from(conntrack.tcp_be_liberal)),
            ("nf_conntrack_udp_timeout", seconds(conntrack.udp_timeout)),
            ("nf_conntrack_udp_timeout_stream", seconds(conntrack.udp_stream_timeout)),
        ];
        Self {
            conntrack_max: conntrack_max(number(conntrack.max_per_core), number(conntrack.min), cpus),
            others: others.into_iter().filter(|(_, value)| *value != 0).collect(),
        }
    }
}

/// How many connections are to be tracked (Z-8). The cap comes before the minimum.
fn conntrack_max(per_core: u64, min: u64, cpus: u64) -> Option<u64> {
    match per_core.saturating_mul(cpus) {
        0 => None,
        scaled if scaled > CAP => Some(CAP),
        scaled => Some(scaled.max(min)),
    }
}

/// How long our own flows may be silent: what is set counts for them, too (C-16).
pub(super) fn flow_timeouts(conntrack: &Conntrack) -> Timeouts {
    let or = |duration: GoDuration, default: u32| {
        let secs =
            |duration: std::time::Duration| u32::try_from(duration.as_secs().max(1)).unwrap_or(u32::MAX);
        duration.positive().map_or(default, secs)
    };
    let default = Timeouts::CONNTRACK;
    Timeouts {
        tcp_established: or(conntrack.tcp_established_timeout, default.tcp_established),
        tcp_half_closed: or(conntrack.tcp_close_wait_timeout, default.tcp_half_closed),
        udp: or(conntrack.udp_timeout, default.udp),
        udp_stream: or(conntrack.udp_stream_timeout, default.udp_stream),
        ..default
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_size_of_conntrack_follows_the_cpus() {
        // Z-8, T-120…T-125.
        for (min, per_core, cpus, expected) in [
            (131_072, 0, 8, None),
            (0, 0, 1, None),
            (0, 1, 4, Some(4)),
            (131_072, 32_768, 2, Some(131_072)),
            (131_072, 32_768, 8, Some(262_144)),
            (131_072, 32_768, 64, Some(1_048_576)),
            (2_000_000, 32_768, 64, Some(1_048_576)),
        ] {
            assert_eq!(conntrack_max(per_core, min, cpus), expected, "{min} {per_core} {cpus}");
        }
    }

    #[test]
    fn only_what_is_asked_for_is_set_and_nothing_outside_conntrack() {
        // Z-9, Z-12, Z-13: neither route_localnet nor forwarding nor filters of the reverse path.
        let defaults = Conntrack::default();
        let established = ("nf_conntrack_tcp_timeout_established", 86_400);
        let close_wait = ("nf_conntrack_tcp_timeout_close_wait", 3_600);
        assert_eq!(Sysctls::new(&defaults, 8).others, [established, close_wait]);
        let zero = GoDuration::default();
        let all = Conntrack {
            tcp_established_timeout: zero,
            tcp_be_liberal: true,
            udp_timeout: GoDuration::secs(10),
            udp_stream_timeout: GoDuration::secs(20),
            ..defaults
        };
        let others = [
            close_wait,
            ("nf_conntrack_tcp_be_liberal", 1),
            ("nf_conntrack_udp_timeout", 10),
            ("nf_conntrack_udp_timeout_stream", 20),
        ];
        assert_eq!(Sysctls::new(&all, 8).others, others);
    }

    #[test]
    fn our_own_flows_keep_the_same_times() {
        // C-16, D-6.
        assert_eq!(flow_timeouts(&Conntrack::default()), Timeouts::CONNTRACK);
        let set = Conntrack {
            tcp_established_timeout: GoDuration::secs(7_200),
            tcp_close_wait_timeout: GoDuration::secs(60),
            udp_timeout: GoDuration::secs(10),
            udp_stream_timeout: GoDuration::secs(20),
            ..Conntrack::default()
        };
        let timeouts = flow_timeouts(&set);
        assert_eq!((timeouts.tcp_established, timeouts.tcp_half_closed), (7_200, 60));
        assert_eq!((timeouts.udp, timeouts.udp_stream), (10, 20));
        assert_eq!(timeouts.tcp_syn, Timeouts::CONNTRACK.tcp_syn);
    }
}
