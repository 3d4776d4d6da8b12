//! Every way out of the decisions: counter index, metric label and log word.

/// Declares [`Reason`] with its label and meaning, so that none can lack one.
macro_rules! reasons {
    ($($(#[$meta:meta])* $name:ident = $label:literal, $meaning:literal;)*) => {
        /// Why a packet or socket call left the programs as it did.
        #[repr(u32)]
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
        pub enum Reason {
            $(#[doc = $meaning] $(#[$meta])* $name,)*
        }

        impl Reason {
            /// Every reason, in the order of its counter.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The word for metrics and logs.
            #[must_use]
            pub const fn label(self) -> &'static str {
                match self { $(Self::$name => $label,)* }
            }

            /// One line for a person.
            #[must_use]
            pub const fn meaning(self) -> &'static str {
                match self { $(Self::$name => $meaning,)* }
            }
        }
    };
}

reasons! {
    NewFlow = "new_flow", "A packet opened a flow to a Service.";
    SocketTranslated = "socket_translated", "A connect or sendmsg was given an endpoint.";
    Reselected = "reselected", "A flow's endpoint had been removed and another was chosen.";
    NoEndpoint = "no_endpoint", "Rejected: the Service has no endpoint (P-14).";
    UndefinedPort = "undefined_port", "Rejected: the ClusterIP has no such port (P-21).";
    NoLocalEndpoint = "no_local_endpoint", "Dropped: policy Local and no endpoint on this node (P-15, P-16).";
    SourceRange = "source_range", "Dropped: the source is not in loadBalancerSourceRanges (V-17).";
    TornFrontend = "torn_frontend", "Dropped: a frontend was rewritten twice while it was read.";
    BadSlot = "bad_slot", "Dropped: a slot led to no live backend.";
    FlowTableFull = "flow_table_full", "Dropped: there is no room for another flow.";
    FlowInsert = "flow_insert", "Dropped: a flow entry could not be written.";
    FlowCollision = "flow_collision", "A flow got another source port: its tuple behind the Service was taken.";
    NoSourcePort = "no_source_port", "Dropped: no free source port for masquerading.";
    NoSourceAddress = "no_source_address", "Dropped: the interface has no address to masquerade with.";
    FragmentUnknown = "fragment_unknown", "Dropped: a fragment to a Service whose first one did not come, or was not forwarded.";
    IcmpTranslated = "icmp_translated", "An ICMP error about a flow was translated.";
    RewriteFailed = "rewrite_failed", "Dropped: a packet could not be rewritten.";
    RejectFailed = "reject_failed", "Dropped: a reject reply could not be sent.";
    SocketStorage = "socket_storage", "A socket had no room to remember its Service: a pod's is left to TC.";
    ConfigMissing = "config_missing", "Ignored: the agent has not written its settings.";
    UnallocatedClusterIp = "unallocated_cluster_ip", "Dropped: an address inside a ServiceCIDR that is no Service's (P-22).";
    Displaced = "displaced", "A young flow made room for a newer one.";
    FlowBusy = "flow_busy", "Dropped: another packet was changing the flow at that moment.";
    EntryRestored = "entry_restored", "A flow's missing entry was written again.";
    NodeTraffic = "node_traffic", "The node's own traffic from a port of a Service, or through somebody's masquerade, was noted.";
    ReplyRedirected = "reply_redirected", "An answer was sent out of the interface that the question had come in by.";
    CollisionUnresolved = "collision_unresolved", "Dropped: no free tuple behind the Service was found.";
    EndpointLost = "endpoint_lost", "Rejected: the endpoint of the connection has left, and its Service wants it reset.";
    PassedThrough = "passed_through", "A packet from outside to an endpoint elsewhere, or back, was sent on at the driver (XDP).";
    Wrapped = "wrapped", "A packet was sent to its endpoint's node, which answers the client itself (DSR).";
    Unwrapped = "unwrapped", "A packet that another node had wrapped was unwrapped (DSR).";
    WrapFailed = "wrap_failed", "Dropped: a packet could not be wrapped, unwrapped or sent to its endpoint's node.";
    TooBig = "too_big", "Answered with an ICMP error: wrapped, the packet would be too long for its way.";
}

impl Reason {
    /// Number of reasons: the size of the counter array.
    pub const COUNT: usize = Self::ALL.len();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_distinct_words_in_counter_order() {
        for (n, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, n);
            assert!(reason.label().bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{reason:?}");
            assert!(Reason::ALL.iter().filter(|r| r.label() == reason.label()).count() == 1);
        }
    }
}
