//! What is said of hooks: attached, refused, restored, left to packets.

use std::path::PathBuf;
use std::sync::Arc;

use agent_core::model::AtDriver;
use agent_kernel::datapath::attach::{AttachError, Attached};
use jiff::Timestamp;
use proxy_common::abi::NOTE;

use super::Report;

impl Report {
    pub(in crate::run) fn interfaces(&mut self, results: Vec<(Arc<str>, Result<Attached, AttachError>)>) {
        let results = results.into_iter().map(|(name, result)| (format!("interface {name}"), result));
        self.retried(results.collect());
    }

    /// What came of attaching programs, to interfaces and to the cgroup root.
    pub(in crate::run) fn retried(&mut self, results: Vec<(String, Result<Attached, AttachError>)>) {
        for (hook, result) in results {
            match result {
                Ok(Attached::Kept) => {}
                Ok(Attached::New) if self.refusing.iter().any(|line| line.starts_with(&hook)) => {
                    tracing::info!("{hook}: programs attached at last");
                }
                Ok(Attached::New) => tracing::debug!("{hook}: programs attached"),
                Ok(Attached::Updated) => tracing::info!("{hook}: programs replaced"),
                Err(error) if error.is_of_something_gone() => tracing::debug!("{hook}: it has gone"),
                Err(error) => {
                    let line = format!("{hook}: {:#}", anyhow::Error::from(error));
                    if self.logged.is_new(&line) {
                        tracing::error!("{line}; trying again");
                    }
                }
            }
        }
    }

    /// How many interfaces carry programs and how many refuse them; and which hooks refuse, and why.
    pub(in crate::run) fn hooks(&mut self, (carry, refuse): (usize, usize), refusing: &[String]) {
        self.state.interfaces = u32::try_from(carry).unwrap_or(u32::MAX);
        self.state.interfaces_failed = u32::try_from(refuse).unwrap_or(u32::MAX);
        self.health.unserved(!refusing.is_empty());
        if self.refusing != refusing {
            self.refusing = refusing.to_vec();
        }
    }

    /// What came of attaching programs at drivers, and which carry one now.
    pub(in crate::run) fn drivers<'a>(
        &mut self,
        wanted: &[AtDriver],
        results: Vec<(Arc<str>, Result<Attached, AttachError>)>,
        carry: impl Iterator<Item = &'a str>,
    ) {
        self.refusing_drivers.retain(|name, _| wanted.iter().any(|driver| driver.name == *name));
        for (name, result) in results {
            match result {
                Ok(Attached::Kept) => {}
                Ok(_) => {
                    tracing::info!("interface {name}: what only passes this node is sent on at its driver");
                }
                Err(error) if error.is_of_something_gone() => {}
                Err(error) => {
                    let line = format!(
                        "interface {name}: no program at its driver, so all goes by the stack: {:#}",
                        anyhow::Error::from(error)
                    );
                    if self.logged.is_new(&line) {
                        tracing::warn!("{line}");
                    }
                    self.refusing_drivers.insert(name, line);
                }
            }
        }
        let mut lines = Vec::new();
        for name in carry {
            self.refusing_drivers.remove(name);
            lines.push(format!(
                "{NOTE}interface {name}: what only passes this node is sent on at its driver (XDP)"
            ));
        }
        lines.extend(self.refusing_drivers.values().map(|line| format!("{NOTE}{line}")));
        self.at_drivers = lines;
    }

    /// So much of a kind that somebody else had removed or changed was restored.
    pub(in crate::run) fn repaired(&self, what: &'static str, number: usize) {
        self.metrics.repairs().count(what, number);
    }

    /// What that was, in words.
    pub(in crate::run) fn restored(&mut self, line: &str) {
        let times = self.restored.take().map_or(0, |(times, _)| times) + 1;
        let at = Timestamp::now().strftime("%Y-%m-%d %H:%M:%SZ");
        self.restored = Some((times, format!("{at}: {line}")));
    }

    /// Cgroups whose sockets are left to their packets.
    pub(in crate::run) fn excluded(&mut self, results: Vec<(PathBuf, Result<Attached, AttachError>)>) {
        for (cgroup, result) in results {
            let cgroup = cgroup.display();
            match result {
                Ok(Attached::Kept | Attached::Updated) => {}
                Ok(Attached::New) => {
                    tracing::info!("new sockets in cgroup {cgroup} are left to their packets");
                }
                Err(error) => {
                    let line = format!(
                        "sockets in cgroup {cgroup} are not left to their packets: {:#}",
                        anyhow::Error::from(error)
                    );
                    if self.logged.is_new(&line) {
                        tracing::warn!("{line}");
                    }
                }
            }
        }
    }
}
