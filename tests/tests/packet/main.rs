//! Packet vectors: stories of packets, each played to the decisions over tables in memory and to the real
//! programs in this kernel (`BPF_PROG_TEST_RUN`), which must agree in verdict, bytes, counters and flows.
//!
//! A test's name is the story's sentence. [`stage::story`] runs it three times: Ethernet frames and bare IP
//! packets through host and kernel, and frames with a checksum left to the hardware through the host alone,
//! since a test run in the kernel knows complete checksums only. Expected packets are built from scratch, so
//! every updated checksum is compared with one that is computed anew. [`fuzz`] makes stories up.
#![expect(clippy::unwrap_used, reason = "all of this file is tests, helpers included")]

mod clusterip;
mod direct;
mod fragments;
mod fuzz;
mod icmp;
mod malformed;
mod node;
mod nodeport;
mod policy;
mod pressure;
mod real;
mod reject;
mod reply;
mod stage;
mod two_cpus;
