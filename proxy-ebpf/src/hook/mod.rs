//! The programs and where they attach.
//!
//! | program | attach point | does |
//! |---|---|---|
//! | `connect4`, `connect6` | node cgroup | translates the destination of a connect |
//! | `sendmsg4`, `sendmsg6` | node cgroup | the same for each datagram of an unconnected socket |
//! | `recvmsg4`, `recvmsg6` | node cgroup | shows the sender as the Service that was addressed |
//! | `getpeername4`, `getpeername6` | node cgroup | the same for the peer |
//! | `exclude_socket` | cgroups of pods that are left to their packets | marks their sockets |
//! | `tc_ingress`, `tc_egress` | every interface but `lo` | translates packets, before and behind the stack |
//! | `tc_ingress_l3`, `tc_egress_l3` | interfaces without Ethernet header | the same; loaded with the first of them |
//! | `xdp_ingress`, `xdp_ingress_sg` | drivers of interfaces to the outside, where wanted | sends on what only passes the node |
//! | `flows` | none: the agent runs it | makes flows and takes them apart |

mod cgroup;
mod direct;
mod flows;
mod tc;
mod xdp;
