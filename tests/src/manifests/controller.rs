//! Kubernetes' endpoint controller for one Service, step by step: the test says when pods change.

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::{Context, Result};

use super::slice::{Family, SlicePlan};
use crate::object::{Key, Kind, Object, Publish};
use crate::pod::Place;

/// Where a pod is in its life, as its endpoint shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Started, not ready yet.
    Starting,
    /// Ready.
    Ready,
    /// Being deleted, still answering.
    Terminating,
    /// Being deleted, no longer answering.
    Stopped,
}

impl Phase {
    /// The conditions ready, serving and terminating.
    #[must_use]
    pub fn conditions(self) -> (bool, bool, bool) {
        match self {
            Self::Starting => (false, false, false),
            Self::Ready => (true, true, false),
            Self::Terminating => (false, true, true),
            Self::Stopped => (false, false, true),
        }
    }
}

#[derive(Clone, Debug)]
struct Member {
    addresses: [IpAddr; 2],
    node: Option<String>,
    phase: Phase,
}

/// Publishes a slice a family for the pods of a Service, after each step.
pub struct EndpointController<'a> {
    service: String,
    ports: Vec<(String, String, u16)>,
    families: Vec<Family>,
    members: BTreeMap<String, Member>,
    target: &'a dyn Publish,
}

impl<'a> EndpointController<'a> {
    /// For a dual-stack Service; ports are name, protocol and number at the pods. Publishes empty slices.
    pub fn new(target: &'a dyn Publish, service: &str, ports: &[(&str, &str, u16)]) -> Result<Self> {
        Self::for_families(target, service, ports, &Family::ALL)
    }

    /// For a Service of these families.
    pub fn for_families(
        target: &'a dyn Publish,
        service: &str,
        ports: &[(&str, &str, u16)],
        families: &[Family],
    ) -> Result<Self> {
        let controller = Self::unpublished(target, service, ports, families);
        controller.publish()?;
        Ok(controller)
    }

    fn unpublished(
        target: &'a dyn Publish,
        service: &str,
        ports: &[(&str, &str, u16)],
        families: &[Family],
    ) -> Self {
        let owned =
            |&(name, protocol, port): &(&str, &str, u16)| (name.to_owned(), protocol.to_owned(), port);
        Self {
            service: service.into(),
            ports: ports.iter().map(owned).collect(),
            families: families.to_vec(),
            members: BTreeMap::new(),
            target,
        }
    }

    /// Takes over a Service that these pods serve already: publishes them as ready, at once.
    pub fn adopt(
        target: &'a dyn Publish,
        service: &str,
        ports: &[(&str, &str, u16)],
        families: &[Family],
        pods: &[&Place],
    ) -> Result<Self> {
        let mut controller = Self::unpublished(target, service, ports, families);
        controller.replace(pods)?;
        Ok(controller)
    }

    /// A pod appears, or moves on to another phase.
    pub fn set(&mut self, pod: &Place, phase: Phase) -> Result<()> {
        self.note(pod, phase);
        self.publish()
    }

    /// A pod is gone.
    pub fn remove(&mut self, pod: &str) -> Result<()> {
        self.members.remove(pod).with_context(|| format!("no pod {pod} behind {}", self.service))?;
        self.publish()
    }

    /// Exactly these pods, all ready, in one edit: blue/green, recreate, scale to zero.
    pub fn replace(&mut self, pods: &[&Place]) -> Result<()> {
        self.members.clear();
        for pod in pods {
            self.note(pod, Phase::Ready);
        }
        self.publish()
    }

    /// A rolling update's first half: a pod starts, `ready` makes it ready to serve, then it is announced.
    pub fn surge(&mut self, pod: &Place, ready: impl FnOnce() -> Result<()>) -> Result<()> {
        self.set(pod, Phase::Starting)?;
        ready()?;
        self.set(pod, Phase::Ready)
    }

    /// A rolling update's second half: a pod is told to end, `drained` lets it finish, then it answers no more, then
    /// it is gone.
    pub fn retire(&mut self, pod: &Place, drained: impl FnOnce() -> Result<()>) -> Result<()> {
        self.set(pod, Phase::Terminating)?;
        drained()?;
        self.set(pod, Phase::Stopped)?;
        self.remove(&pod.name)
    }

    /// Takes the slices away, as when the Service is deleted.
    pub fn withdraw(self) -> Result<()> {
        self.families.iter().try_for_each(|family| self.target.retract(&self.key(*family)))
    }

    /// The pods and their phases.
    pub fn members(&self) -> impl Iterator<Item = (&str, Phase)> {
        self.members.iter().map(|(name, member)| (name.as_str(), member.phase))
    }

    fn note(&mut self, pod: &Place, phase: Phase) {
        let member = Member { addresses: pod.addresses(), node: pod.node.clone(), phase };
        self.members.insert(pod.name.clone(), member);
    }

    fn publish(&self) -> Result<()> {
        self.families.iter().try_for_each(|family| self.target.publish(&self.slice(*family)))
    }

    fn slice(&self, family: Family) -> Object {
        let mut slice = SlicePlan::new(&self.service, suffix(family), family);
        for (name, protocol, port) in &self.ports {
            slice = slice.port(name, protocol, *port);
        }
        for (name, member) in &self.members {
            for address in member.addresses.iter().filter(|address| Family::of(**address) == family) {
                slice = slice.endpoint(name, *address, member.node.as_deref(), member.phase);
            }
        }
        Object::from(&slice.build())
    }

    fn key(&self, family: Family) -> Key {
        let name = format!("{}-{}", self.service, suffix(family));
        Key { kind: Kind::EndpointSlice, namespace: "default".into(), name }
    }
}

fn suffix(family: Family) -> &'static str {
    match family {
        Family::V4 => "v4",
        Family::V6 => "v6",
    }
}
