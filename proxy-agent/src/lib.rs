//! The node agent: from what Kubernetes says to what the kernel does, in one straight line.
//!
//! `agent_source` brings changes, `agent_core` knows the world and lists the writes that are due, `agent_kernel` does them.
//! Here are the settings (`config`), the loop round the line (`run`), and what reports it (`serve`, `cli`, `logging`).

#![warn(clippy::cast_possible_truncation)] // Settings and sizes come from outside.

pub mod cli;
pub mod config;
pub mod logging;
pub mod run;
pub mod serve;
pub mod sync_runner;
