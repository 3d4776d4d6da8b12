//! The cluster of the demo: where the pods of `deploy/examples` run, and who plays its controllers.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use proxy_tests::agent::Agent;
use proxy_tests::manifests::{EndpointController, ExampleFile, Family, ManifestDir};
use proxy_tests::pod::Place;
use proxy_tests::probe::Server;
use proxy_tests::rollout::Deployment;
use proxy_tests::test_cluster::{Plan, TestCluster};

/// Pods: name, node, last byte of the address. The addresses of the first ones are those in the examples.
const PODS: [(&str, &str, u8); 20] = [
    ("webui-1", "node1", 11),
    ("webui-2", "node1", 12),
    ("webui-3", "node2", 11),
    ("webui-v2-1", "node1", 13),
    ("webui-v2-2", "node1", 14),
    ("webui-v2-3", "node2", 13),
    ("dns-1", "node1", 53),
    ("dns-2", "node2", 53),
    ("api-1", "node1", 81),
    ("api-2", "node1", 82),
    ("api-3", "node2", 81),
    ("api-v2-1", "node1", 84),
    ("api-v2-2", "node1", 85),
    ("api-v2-3", "node2", 84),
    ("blue-1", "node1", 91),
    ("blue-2", "node2", 91),
    ("green-1", "node1", 95),
    ("green-2", "node2", 95),
    // Clients that are pods.
    ("shell", "node1", 200),
    ("shell-2", "node1", 201),
];

/// The Services that are updated: file, Service, its pods.
const WEBUI: (&str, [&str; 2], [&str; 3]) =
    ("webui.yaml", ["webui", "webui-public"], ["webui-1", "webui-2", "webui-3"]);
const API: (&str, &str, [&str; 3]) = ("rolling-update.yaml", "api", ["api-1", "api-2", "api-3"]);
const CHECKOUT: (&str, &str, [&str; 2]) = ("blue-green.yaml", "checkout", ["blue-1", "blue-2"]);
const DNS: (&str, &str, [&str; 2]) = ("dns.yaml", "kube-dns", ["dns-1", "dns-2"]);

/// The port of the pods that speak HTTP.
const HTTP: u16 = 8080;

/// Namespaces and manifests.
pub(crate) struct Cluster {
    pub(crate) manifests: ManifestDir,
    pub(crate) test_cluster: TestCluster,
}

/// Pods with their servers.
pub(crate) type Pods = Vec<(Place, Server)>;

/// The running pods by application.
pub(crate) struct Running {
    webui: Pods,
    api: Pods,
    checkout: Pods,
    dns: Pods,
}

impl Cluster {
    pub(crate) fn raise(examples: &Path) -> Result<Self> {
        let manifests = ManifestDir::copy_of(examples)?;
        let mut test_cluster =
            Plan::default().node("node1", &[]).node("node2", &[]).client("outside").raise()?;
        for (pod, node, host) in PODS {
            proxy_tests::stop::pause(std::time::Duration::ZERO)?;
            test_cluster.add_pod_at(node, pod, host)?;
        }
        Ok(Self { manifests, test_cluster })
    }

    /// Starts the pods that the examples speak of.
    pub(crate) fn start_pods(&self) -> Result<Running> {
        let serve = |pods: &[&str], port: u16| {
            pods.iter()
                .map(|pod| {
                    let place = self.test_cluster.place(pod);
                    Ok((place.clone(), Server::start(place, &[port])?))
                })
                .collect::<Result<Pods>>()
        };
        Ok(Running {
            webui: serve(&WEBUI.2, HTTP)?,
            api: serve(&API.2, HTTP)?,
            checkout: serve(&CHECKOUT.2, HTTP)?,
            dns: serve(&DNS.2, 53)?,
        })
    }

    /// The real agent on node1.
    pub(crate) fn start_agent(&self) -> Result<Agent> {
        let ranges = TestCluster::CLUSTER_CIDRS.join(",");
        Agent::start(&self.test_cluster, "node1", &self.manifests, &["--cluster-cidr", &ranges])
            .context("starting the agent on node1")
    }
}

/// The example files that the demo edits.
pub(crate) struct Files<'a> {
    webui: ExampleFile<'a>,
    api: ExampleFile<'a>,
    checkout: ExampleFile<'a>,
    dns: ExampleFile<'a>,
}

/// The applications that are updated.
pub(crate) struct Apps<'a> {
    pub(crate) webui: Deployment<'a>,
    pub(crate) api: Deployment<'a>,
    pub(crate) checkout: Deployment<'a>,
    /// Nobody updates DNS.
    _dns: Pods,
}

impl<'a> Files<'a> {
    pub(crate) fn open(manifests: &'a ManifestDir) -> Result<Self> {
        let open = |name| ExampleFile::open(manifests, name);
        Ok(Self { webui: open(WEBUI.0)?, api: open(API.0)?, checkout: open(CHECKOUT.0)?, dns: open(DNS.0)? })
    }

    /// Whether the pods are where the examples say.
    pub(crate) fn fit(&self, test_cluster: &TestCluster) -> Result<()> {
        let check = |file: &ExampleFile<'_>, service: &str, pods: &[&str]| {
            let wanted = file.addresses(service);
            let here: Vec<String> = pods.iter().map(|pod| test_cluster.place(pod).v4.to_string()).collect();
            ensure!(
                wanted == here,
                "the examples have {wanted:?} behind {service}, but the demo's pods are at {here:?}"
            );
            Ok(())
        };
        WEBUI.1.iter().try_for_each(|service| check(&self.webui, service, &WEBUI.2))?;
        check(&self.api, API.1, &API.2)?;
        check(&self.checkout, CHECKOUT.1, &CHECKOUT.2)?;
        check(&self.dns, DNS.1, &DNS.2)
    }

    /// From now on the demo says who is ready.
    pub(crate) fn adopt(&'a self, running: Running) -> Result<Apps<'a>> {
        let adopt = |file: &'a ExampleFile<'a>, services: &[&str], pods: Pods| {
            let places: Vec<&Place> = pods.iter().map(|(place, _)| place).collect();
            let controllers = services
                .iter()
                .map(|service| {
                    let ports = [("http", "TCP", HTTP)];
                    EndpointController::adopt(file, service, &ports, &[Family::V4], &places)
                })
                .collect::<Result<Vec<_>>>()?;
            Ok::<_, anyhow::Error>(Deployment::new(controllers, &[HTTP], pods))
        };
        Ok(Apps {
            webui: adopt(&self.webui, &WEBUI.1, running.webui)?,
            api: adopt(&self.api, &[API.1], running.api)?,
            checkout: adopt(&self.checkout, &[CHECKOUT.1], running.checkout)?,
            _dns: running.dns,
        })
    }
}

/// Places by their names.
pub(crate) fn places(test_cluster: &TestCluster, names: &[&str]) -> Vec<Place> {
    names.iter().map(|name| test_cluster.place(name).clone()).collect()
}
