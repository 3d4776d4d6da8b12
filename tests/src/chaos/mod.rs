//! What must cost clients nothing, and what has broken service proxies.
//!
//! Faults ([`fault`], played by [`trial`]) happen to the agent while clients hold connections and ask; what is lost is reported
//! one by one. Comparisons ([`flood`], [`ports`], [`dns`]) are played twice in namespaces of the same build: with the agent on
//! `node1`, and with nftables rules of the shape that kube-proxy makes; what is counted is what clients see.
//!
//! Everything is bounded in number and in time, and ends early when [`crate::stop`] says so.

pub mod bpf;
mod calls;
pub mod clients;
pub mod crowd;
pub mod dns;
pub mod fault;
mod figures;
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

/// Tells a person who waits what is going on.
fn progress(line: &str) {
    crate::say(&format!("chaos: {line}"));
}
