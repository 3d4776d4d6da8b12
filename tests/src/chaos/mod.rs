//! Situations that have broken service proxies, in numbers: a flood of spoofed SYNs, many short connections to one
//! endpoint, many questions that are answered once. And clients that come to ask nothing ([`crowd`]).
//! endpoint, many questions that are answered once. And what somebody else can do to an agent's hooks, pins and tables
//! ([`sabotage`]).
//!
//! Each is played twice in namespaces of the same build: with the agent on `node1`, and with nftables rules of the
//! shape that kube-proxy makes. What is counted is what clients see. Everything is bounded in number and in time, and
//! ends early when [`crate::stop`] says so.

pub mod bpf;
mod calls;
pub mod clients;
pub mod crowd;
pub mod dns;
pub mod fault;
pub mod flood;
pub mod ground;
pub mod load;
pub mod ports;
pub mod report;
mod rules;
pub mod sabotage;
pub mod scene;
pub mod services;
pub mod spoof;
mod trace;
pub mod trial;
pub mod upgrade;

/// Tells a person who waits what is going on.
fn progress(line: &str) {
    crate::say(&format!("chaos: {line}"));
}
