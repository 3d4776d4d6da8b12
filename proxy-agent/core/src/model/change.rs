//! Change: one thing that a source, or netlink, says is different now.

use ipnet::IpNet;
use jiff::Timestamp;

use super::{Link, Node, ObjectName, Route, Service, Slice};

/// The kinds of object a source lists. Nothing is programmed before each of the first three has said it is complete (Y-17).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Kind {
    /// `v1` Services.
    Service,
    /// `discovery.k8s.io/v1` EndpointSlices, or legacy `Endpoints` from a directory.
    Slice,
    /// The node's own `v1` Node.
    Node,
    /// `networking.k8s.io/v1` ServiceCIDRs. Nobody waits for them: a server may not have them, or not tell us.
    ServiceCidr,
    /// `v1` Pods of the node, when their annotations count. Nobody waits for them.
    Pod,
}

/// One thing that a source reported.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// A Service as it is now; `None` when it is deleted or to be ignored (S-2, S-6).
    Service(ObjectName, Option<Service>),
    /// An EndpointSlice as it is now; `None` when it is deleted.
    Slice(ObjectName, Option<Slice>),
    /// When what changes this slice happened in the cluster; that change itself comes next (E-24).
    Triggered(ObjectName, Timestamp),
    /// An object was reported again, and says nothing new.
    Repeated(Kind),
    /// The node's own object.
    Node(Option<Node>),
    /// Ranges of ClusterIPs, by the name of the ServiceCIDR that has them (Y-16); `None` when it is deleted.
    ServiceRanges(String, Option<Vec<IpNet>>),
    /// A pod of this node whose sockets are left to their packets, with the UID that its cgroup is named after; `None`
    /// when it is deleted, or says so no more.
    Excluded(ObjectName, Option<String>),
    /// The first complete list of a kind has been delivered.
    Synced(Kind),
    /// What is wrong with an object, whole or in part; an empty list takes earlier warnings back.
    /// `object` is its name for a person: `Service default/web`, `web.yaml:12`.
    Warnings {
        object: String,
        /// One line each.
        lines: Vec<String>,
    },
    /// All interfaces of the node with their addresses, whenever one of them has changed (from `netlink`).
    Links(Vec<Link>),
    /// All routes that lead out of the node, whenever one of them has changed (from `netlink`).
    Routes(Vec<Route>),
    /// Whether everything there is has been understood at least once. While it is false, what is missing may
    /// only be unreadable: what an earlier agent has written is not taken away on such grounds.
    Whole(bool),
    /// Whether the source answers. A source that does not is retried for ever; the tables stay (Y-6).
    Connected(bool),
}
