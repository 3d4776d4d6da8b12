//! What Kubernetes' own end-to-end tests demand of a service proxy, on three nodes made of namespaces: a real agent on
//! each, all fed by one API server, dual-stack.
//!
//! Modules are named after upstream's files, tests after upstream's titles; each test cites the line of Kubernetes 1.36.1's
//! `test/e2e/` that it mirrors. Waiting times are shortened, demands are not. What is not mirrored is said with the
//! reason at the head of each module; for files without a module here:
//!
//! * `network/kube_proxy.go`: 74 (CLOSE_WAIT) is in the test target `e2e`, module `configuration`; 276 counts in iptables
//!   and skips without them.
//! * `network/hostport.go`: 63 is the CNI's hostPort, with which a service proxy has nothing to do.
//! * SCTP (`service.go`:3776 apart): the kernels these tests run on may have no SCTP sockets; that SCTP is translated is
//!   shown by packets in the test target `packet`.

#[cfg(test)]
mod cluster;
#[cfg(test)]
mod conntrack;
#[cfg(test)]
mod daemon_restart;
#[cfg(test)]
mod dual_stack;
#[cfg(test)]
mod endpointslice;
#[cfg(test)]
mod granular;
#[cfg(test)]
mod http;
#[cfg(test)]
mod loadbalancer;
#[cfg(test)]
mod networking;
#[cfg(test)]
mod pod_lifecycle;
#[cfg(test)]
mod reach;
#[cfg(test)]
mod service;
#[cfg(test)]
mod service_cidrs;
#[cfg(test)]
mod service_latency;
#[cfg(test)]
mod topology;
