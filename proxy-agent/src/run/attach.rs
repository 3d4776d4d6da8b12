//! Programs on their hooks, as interfaces and pods come and go.

use agent_kernel::datapath::attach::AttachError;
use anyhow::Result;

use super::Agent;

impl Agent {
    /// Attaches the programs for the first time in this process.
    pub(super) fn attach(&mut self) -> Result<()> {
        // First: what is to be left must not be translated in between.
        self.exclude();
        match &self.cgroup_root {
            Some(cgroup) => {
                // Everything else is tried again, and told meanwhile.
                if let Err(error @ (AttachError::CgroupRoot { .. } | AttachError::Missing { .. })) =
                    self.loaded.attach_cgroup(cgroup)
                {
                    return Err(error.into());
                }
            }
            None => drop(self.loaded.detach_cgroup()?),
        }
        self.attach_interfaces();
        Ok(())
    }

    pub(super) fn excluded_changed(&mut self) {
        if self.ready {
            self.exclude();
        }
    }

    /// Pods come and go, and their cgroups some time after we hear of them.
    pub(super) fn exclude(&mut self) {
        let Some(cgroup) = &self.cgroup_root else { return };
        match self.loaded.sync_excluded(cgroup, &self.excluded, self.pods_known) {
            Ok(results) => self.report.excluded(results),
            Err(error) => tracing::warn!(
                error = &error as &dyn std::error::Error,
                "pods are not left to their packets, or no longer"
            ),
        }
    }

    pub(super) fn attach_interfaces(&mut self) {
        let links = self.config.devices.choose(self.world.links());
        let results = self.loaded.sync_interfaces(&links);
        self.report.interfaces(results);
        self.attach_drivers();
        self.tell_hooks();
    }

    /// What an uplink is may change with more than links, and a driver that refused is tried again.
    pub(super) fn attach_drivers(&mut self) {
        let mut wanted = self.world.at_drivers(self.config.drivers);
        let carries = |index| {
            let links = self.world.links().iter();
            links.filter(|link| link.index == index).any(|link| self.config.devices.carries(link))
        };
        wanted.retain(|driver| carries(driver.index));
        let results = self.loaded.sync_drivers(&wanted);
        self.report.drivers(&wanted, results, self.loaded.at_drivers());
    }
}
