//! The machine, before and beside the loop: what it must offer, what is set on it, and the file the settings came from.

pub(super) mod config_file;
pub(super) mod descriptors;
pub(super) mod require;
pub(super) mod sysctl;

use std::path::Path;

use anyhow::Result;

use super::Agent;
use crate::config::{Config, ConfigFile};

/// Sets what the node is expected to have set, before anything else (Z-7); says whether connection tracking was
/// there to be set.
pub(super) fn tune(config: &Config) -> Result<bool> {
    let root = Path::new("/");
    if let Err(error) = sysctl::oom_score_adj(root, config.oom_score_adj) {
        tracing::warn!("oom_score_adj is not set to {}: {error}", config.oom_score_adj);
    }
    set_conntrack(config)
}

fn set_conntrack(config: &Config) -> Result<bool> {
    match sysctl::apply(Path::new("/"), &config.sysctls)? {
        sysctl::Applied::Done(notes) => {
            notes.into_iter().for_each(|note| tracing::warn!("{note}"));
            Ok(true)
        }
        sysctl::Applied::Absent => Ok(false),
    }
}

/// Ends when the configuration file says something else; without one, never.
pub(super) async fn file_changed(file: Option<ConfigFile>) -> anyhow::Error {
    match file {
        Some(file) => config_file::changed(file).await,
        None => std::future::pending().await,
    }
}

impl Agent {
    /// Where connection tracking was not there at the start, it is set when it comes.
    pub(super) fn set_conntrack(&mut self) {
        if self.conntrack {
            return;
        }
        self.conntrack = set_conntrack(&self.config).unwrap_or_else(|error| {
            self.report.warn(format!("{error:#}"));
            true
        });
    }
}
