//! The tables that are at work: they grow, are repaired, and know what ports others use.

pub(super) mod growth;
pub(super) mod repair;
pub(super) mod taken;

use agent_core::model::Urgency;
use agent_core::plan::Capacity;
use agent_kernel::datapath::flow::Sweeper;
use agent_kernel::datapath::load::Loaded;
use agent_kernel::datapath::store::pin::BpfRoot;
use agent_kernel::datapath::tables::kernel::Kernel;
use agent_source::api::events::Event;
use anyhow::Result;

use super::Agent;

impl Agent {
    /// Tables that are nearly full become larger.
    pub(super) fn grow(&mut self, beat: bool) {
        // While connections of another proxy are adopted the loop holds flows of these tables.
        let adopting = self.adoption.as_ref().is_none_or(|adoption| adoption.leave() != 0);
        let (Some(planner), false, true) = (&self.planner, adopting, self.ready) else { return };
        let root = self.loaded.root().clone();
        let grown = self.growth.go_on(&root, planner, self.report.pinned(), beat);
        let grown = grown.and_then(|loaded| loaded.map_or(Ok(()), |loaded| self.move_to(loaded)));
        if let Err(error) = grown {
            tracing::error!("tables do not grow: {error:#}");
            // Whatever counts now is what is written; what is left to do of the exchange the next start does.
            if let Err(error) = self.open_tables(&root) {
                tracing::error!("the tables cannot be opened again: {error:#}");
            }
        }
        if let Some(news) = self.growth.news() {
            self.repairs.emit(Event::NotGrown(news));
        }
        self.report.growth(self.growth.standing(), self.growth.warnings());
    }

    /// From now on these programs and their tables are at work.
    pub(super) fn move_to(&mut self, loaded: Loaded) -> Result<()> {
        if let Some(change) = loaded.changed() {
            tracing::info!("{change}");
        }
        self.loaded = loaded;
        let root = self.loaded.root().clone();
        self.open_tables(&root)
    }

    /// Works with the newest tables from now on.
    pub(super) fn open_tables(&mut self, root: &BpfRoot) -> Result<()> {
        self.kernel = Kernel::open(root)?;
        self.capacity = Capacity::of_maps(&self.kernel.sizes());
        self.sweeper = Sweeper::open(root, self.config.flow_timeouts)?;
        self.report.moved(root)?;
        if self.ready {
            // The links are the same, and are held by these programs from now on.
            self.attach()?;
        }
        if let Some(adoption) = &mut self.adoption
            && adoption.move_on()
        {
            self.world.set_leave(adoption.leave());
            self.taken_over = false;
        }
        // What found no room is planned again.
        self.full = true;
        let now = self.now_ms();
        self.runner.request(now, Urgency::Settled);
        Ok(())
    }
}
