//! The Services that faults are played with, and who may answer for them.

use std::net::{IpAddr, SocketAddr};

use anyhow::Result;

use crate::crowd::Target;
use crate::manifests::{EndpointController, Phase, ServicePlan};
use crate::object::{Object, Publish};
use crate::pod::Place;
use crate::test_cluster::TestCluster;

/// The Services' port.
const PORT: u16 = 80;
/// The endpoints' port.
pub const TARGET: u16 = 8080;
/// What every slice says.
pub const PORTS: [(&str, &str, u16); 2] = [("tcp", "TCP", TARGET), ("udp", "UDP", TARGET)];
/// For how long a client keeps its endpoint that does not ask: longer than anybody here is silent.
const BOUND_SECS: u32 = 60;
/// The Service whose endpoints come and go.
pub const MOVING: &str = "moving";
/// The endpoints of [`MOVING`] that stay: connections to them must hold.
pub const STAYING: [&str; 2] = ["b", "c"];
/// Those that come and go.
pub const COMING: [&str; 4] = ["d", "e", "f", "g"];
/// The Service all of whose endpoints end before new ones begin.
pub const REBORN: &str = "reborn";

/// What is special about a Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nothing: one endpoint.
    Plain,
    /// `externalTrafficPolicy: Local`, one endpoint on this node: a client outside keeps its address.
    Local,
    /// Session affinity: a client keeps its endpoint. Its endpoints are nobody else's: sockets of pods towards it are left to
    /// their packets, and such a connection can meet one from the same port that was translated at its socket.
    Sticky,
    /// Endpoints come and go.
    Moving,
    /// There may be no endpoint at all.
    Reborn,
}

/// One Service.
#[derive(Clone, Copy, Debug)]
pub struct Role {
    /// Its name.
    pub name: &'static str,
    n: u8,
    /// Its NodePort.
    pub node_port: u16,
    /// Its endpoints at the start.
    pub pods: &'static [&'static str],
    /// What is special about it.
    pub kind: Kind,
}

/// All of them: endpoints on this node and on another.
pub const ROLES: [Role; 6] = [
    Role { name: "near", n: 1, node_port: 30_201, pods: &["b"], kind: Kind::Plain },
    Role { name: "far", n: 2, node_port: 30_202, pods: &["c"], kind: Kind::Plain },
    Role { name: "local", n: 3, node_port: 30_203, pods: &["b"], kind: Kind::Local },
    Role { name: "sticky", n: 4, node_port: 30_204, pods: &["s1", "s2"], kind: Kind::Sticky },
    Role { name: MOVING, n: 5, node_port: 30_205, pods: &["b", "c"], kind: Kind::Moving },
    Role { name: REBORN, n: 6, node_port: 30_206, pods: &["r1", "r2"], kind: Kind::Reborn },
];

/// A Service that comes and goes.
pub const GUEST: Role = Role { name: "guest", n: 9, node_port: 30_209, pods: &["b"], kind: Kind::Plain };

impl Role {
    /// Whether the rules that stand for a kube-proxy know it: they lead to one endpoint.
    #[must_use]
    pub fn has_rules(&self) -> bool {
        self.pods.len() == 1
    }

    /// Whether connections to it can be held: its endpoints stay.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.kind != Kind::Reborn
    }

    /// Its addresses with its port.
    #[must_use]
    pub fn cluster_ips(&self) -> [SocketAddr; 2] {
        vips(self.n).map(|vip| SocketAddr::new(vip, PORT))
    }

    /// How a pod asks.
    #[must_use]
    pub fn from_pods(&self, cluster: &TestCluster) -> Vec<Target> {
        let mut all = self.targets(self.cluster_ips());
        if self.kind == Kind::Plain {
            all.extend(self.targets(cluster.place("node1").at(self.node_port)));
        }
        for target in &mut all {
            target.by_packet = target.udp || self.kind == Kind::Sticky;
        }
        all
    }

    /// How a process of the node asks.
    #[must_use]
    pub fn from_host(&self) -> Vec<Target> {
        self.targets(self.cluster_ips())
    }

    /// How somebody outside asks.
    #[must_use]
    pub fn from_outside(&self, cluster: &TestCluster) -> Vec<Target> {
        let all = self.targets(cluster.place("node1").at(self.node_port)).into_iter();
        all.map(|target| Target { by_packet: true, ..target }).collect()
    }

    fn targets(&self, at: [SocketAddr; 2]) -> Vec<Target> {
        let servers: Vec<&str> = match self.kind {
            Kind::Moving => [&STAYING[..], &COMING].concat(),
            Kind::Reborn => vec!["r1", "r2", "n1", "n2"],
            Kind::Plain | Kind::Local | Kind::Sticky => self.pods.to_vec(),
        };
        let target = |to: SocketAddr, udp: bool| Target {
            service: self.name.into(),
            to,
            udp,
            servers: servers.iter().map(ToString::to_string).collect(),
            by_packet: false,
            same: self.kind == Kind::Sticky,
            // A UDP flow that is silent for long is over, and the next datagram may go elsewhere.
            idle: u32::from(self.is_held() && !(udp && self.kind == Kind::Moving)),
            busy: u32::from(self.is_held()),
        };
        at.into_iter().flat_map(|to| [target(to, false), target(to, true)]).collect()
    }
}

fn vips(n: u8) -> [IpAddr; 2] {
    [format!("10.96.0.{n}"), format!("fd00:10:96::{n}")].map(|text| text.parse().expect("an address"))
}

/// Publishes a Service with no endpoint yet.
pub fn publish<'a>(to: &'a dyn Publish, role: &Role) -> Result<EndpointController<'a>> {
    let mut plan = ServicePlan::new(role.name, &vips(role.n))
        .port("tcp", "TCP", PORT, TARGET)
        .node_port(role.node_port)
        .port("udp", "UDP", PORT, TARGET)
        .node_port(role.node_port);
    plan = match role.kind {
        Kind::Local => plan.external_local(None),
        Kind::Sticky => plan.affinity(BOUND_SECS),
        Kind::Plain | Kind::Moving | Kind::Reborn => plan,
    };
    to.publish(&Object::from(&plan.build()))?;
    EndpointController::new(to, role.name, &PORTS)
}

/// As many Services more, over TCP and UDP and both families, with this endpoint.
pub fn publish_more(to: &dyn Publish, count: u16, pod: &Place) -> Result<()> {
    for n in 0..count {
        let [high, low] = n.to_be_bytes();
        let v4 = IpAddr::from([10, 97, high, low]);
        let v6 = IpAddr::from([0xfd00, 0x10, 0x97, 0, 0, 0, 0, n]);
        let name = format!("more{n}");
        let plan = ServicePlan::new(&name, &[v4, v6]);
        let plan = plan.port("tcp", "TCP", PORT, TARGET).port("udp", "UDP", PORT, TARGET);
        to.publish(&Object::from(&plan.build()))?;
        EndpointController::new(to, &name, &PORTS)?.set(pod, Phase::Ready)?;
    }
    Ok(())
}
