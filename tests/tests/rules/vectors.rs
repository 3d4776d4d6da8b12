//! The ready-made vectors, listed once for all systems that they are put to.

/// Hands the list of all vectors to a macro.
macro_rules! every_vector {
    ($to:ident) => {
        $to! {
            outcomes::packet_outcomes,
            outcomes::short_cuts,
            outcomes::refused_everywhere,
            outcomes::other_ports,
            outcomes::no_second_translation,
            outcomes::masqueraded_ports_are_unique,
            outcomes::unallocated_cluster_ips,
            outcomes::source_ranges,
            outcomes::bound_or_not,
            lasting::flows_follow_their_endpoints,
            lasting::older_than_the_service,
            lasting::affinity_lasts_its_time,
            lasting::affinity_needs_endpoints,
        }
    };
}
pub(crate) use every_vector;
