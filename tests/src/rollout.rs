//! The updates of a Deployment, played step by step: pods start and end, and their endpoints say so as Kubernetes'
//! controllers would.
//!
//! What happens between the steps (wait for traffic to move, count, tell somebody) is the caller's: it is called with
//! every [`Event`], and the update goes on when it returns.

use anyhow::Result;

use crate::manifests::{EndpointController, Phase};
use crate::pod::Place;
use crate::probe::Server;

/// What has just happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// A new pod serves and its endpoint is ready.
    Ready(&'a str),
    /// A pod is being deleted: its endpoint terminates but still serves, and so does the pod. It stops when the caller
    /// returns.
    Ending(&'a str),
    /// A pod and its endpoint are gone.
    Gone(&'a str),
    /// All endpoints were exchanged in one edit. The old pods serve until the caller returns.
    Switched,
    /// No pod serves any more, and the endpoints say so. New ones start when the caller returns.
    NoneServes,
}

/// Is called with each step of an update.
pub type Listener<'l> = dyn FnMut(Event<'_>) -> Result<()> + 'l;

/// Pods that serve, and the Services in front of them.
pub struct Deployment<'a> {
    services: Vec<EndpointController<'a>>,
    ports: Vec<u16>,
    pods: Vec<(Place, Server)>,
}

impl<'a> Deployment<'a> {
    /// Takes over pods that serve these ports, and the controllers of the Services that lead to them.
    #[must_use]
    pub fn new(services: Vec<EndpointController<'a>>, ports: &[u16], pods: Vec<(Place, Server)>) -> Self {
        Self { services, ports: ports.to_vec(), pods }
    }

    /// The pods of now.
    pub fn pods(&self) -> impl Iterator<Item = &Place> {
        self.pods.iter().map(|(pod, _)| pod)
    }

    /// RollingUpdate with `maxSurge: 1`, `maxUnavailable: 0`: one new pod, one old pod less, until all are new.
    pub fn rolling_update(&mut self, new: &[Place], listener: &mut Listener<'_>) -> Result<()> {
        let mut old = std::mem::take(&mut self.pods).into_iter();
        for pod in new {
            self.surge(pod, listener)?;
            if let Some((pod, server)) = old.next() {
                self.retire(&pod, server, listener)?;
            }
        }
        old.try_for_each(|(pod, server)| self.retire(&pod, server, listener))
    }

    /// Blue/green: the new pods run beside the old ones, then every Service turns to them in one edit.
    pub fn switch(&mut self, new: &[Place], listener: &mut Listener<'_>) -> Result<()> {
        let started = new
            .iter()
            .map(|pod| Ok((pod.clone(), Server::start(pod, &self.ports)?)))
            .collect::<Result<Vec<_>>>()?;
        let pods: Vec<&Place> = new.iter().collect();
        self.services.iter_mut().try_for_each(|service| service.replace(&pods))?;
        let old = std::mem::replace(&mut self.pods, started);
        listener(Event::Switched)?;
        for (pod, mut server) in old {
            server.drain()?;
            drop(server);
            listener(Event::Gone(&pod.name))?;
        }
        Ok(())
    }

    /// Recreate: all old pods end before the first new one starts.
    pub fn recreate(&mut self, new: &[Place], listener: &mut Listener<'_>) -> Result<()> {
        let old = std::mem::take(&mut self.pods);
        for (pod, _) in &old {
            self.set(pod, Phase::Terminating)?;
        }
        for (pod, _) in &old {
            listener(Event::Ending(&pod.name))?;
        }
        for (pod, _) in &old {
            self.set(pod, Phase::Stopped)?;
        }
        listener(Event::NoneServes)?;
        for (pod, mut server) in old {
            server.drain()?;
            drop(server);
            self.remove(&pod)?;
            listener(Event::Gone(&pod.name))?;
        }
        new.iter().try_for_each(|pod| self.surge(pod, listener))
    }

    fn surge(&mut self, pod: &Place, listener: &mut Listener<'_>) -> Result<()> {
        self.set(pod, Phase::Starting)?;
        let server = Server::start(pod, &self.ports)?;
        self.set(pod, Phase::Ready)?;
        self.pods.push((pod.clone(), server));
        listener(Event::Ready(&pod.name))
    }

    fn retire(&mut self, pod: &Place, mut server: Server, listener: &mut Listener<'_>) -> Result<()> {
        self.set(pod, Phase::Terminating)?;
        listener(Event::Ending(&pod.name))?;
        server.drain()?;
        self.set(pod, Phase::Stopped)?;
        drop(server);
        self.remove(pod)?;
        listener(Event::Gone(&pod.name))
    }

    fn set(&mut self, pod: &Place, phase: Phase) -> Result<()> {
        self.services.iter_mut().try_for_each(|service| service.set(pod, phase))
    }

    fn remove(&mut self, pod: &Place) -> Result<()> {
        self.services.iter_mut().try_for_each(|service| service.remove(&pod.name))
    }
}
