//! The command line's view of the pinned tables.

use std::collections::BTreeMap;

use anyhow::Result;
use proxy_common::abi::{AgentState, Flow, FlowId, Reason, ServiceStats};

use super::view::{LinkInfo, MapFill, View};
use agent_core::plan::Actual;
use agent_kernel::datapath::pinned::{Pinned, Place};

impl View for Pinned {
    fn actual(&self) -> Result<Actual> {
        Ok(Self::actual(self)?)
    }

    fn agent(&self) -> Result<AgentState> {
        Ok(Self::agent(self)?)
    }

    fn is_running(&self) -> Result<bool> {
        Ok(Self::is_running(self)?)
    }

    fn warnings(&self) -> Result<Vec<String>> {
        Ok(Self::warnings(self)?)
    }

    fn reasons(&self) -> Result<Vec<(Reason, u64)>> {
        Ok(Self::reasons(self)?)
    }

    fn service_stats(&self) -> Result<BTreeMap<u32, ServiceStats>> {
        Ok(Self::service_stats(self)?)
    }

    fn flows(&self, each: &mut dyn FnMut(&Flow)) -> Result<()> {
        Ok(Self::flows(self, &mut |flow| each(flow))?)
    }

    fn end_flows(&self, ids: &[FlowId]) -> Result<u32> {
        Ok(Self::end_flows(self, ids)?)
    }

    fn fill(&self) -> Result<Vec<MapFill>> {
        Ok(Self::fill(self)?)
    }

    fn retire(&mut self, retired: bool) -> Result<()> {
        Ok(Self::retire(self, retired)?)
    }

    fn links(&self) -> Result<Vec<LinkInfo>> {
        let links = Self::links(self)?.into_iter();
        Ok(links
            .map(|link| LinkInfo {
                attached: link.place != Place::Nowhere,
                name: link.name,
                program: link.program,
                program_id: link.program_id,
            })
            .collect())
    }
}
