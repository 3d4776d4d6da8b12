//! The node agent: from what Kubernetes says to what the kernel does, in one straight line.
//!
//! `source` hears of changes, `model` knows the world and says what should be, `plan` compares that with
//! what is and lists the writes, `datapath` does them, `serve` and `cli` tell, `logging` writes. `run` is the loop round it,
//! and `aside` does what would hold it up.

pub mod aside;
pub mod cli;
pub mod config;
pub mod datapath;
pub mod kube_proxy;
pub mod logging;
pub mod model;
pub mod netlink;
pub mod pace;
pub mod plan;
pub mod run;
pub mod serve;
pub mod source;
