//! The source halves of many agents: each with watches, connections and time-outs of its own, as it starts them in its
//! process; all on one thread, whose processor time is theirs.

use std::future::pending;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use agent_core::model::{Change, Kind};
use agent_source::api::{ClientConfig, Cluster, Requests, ServerCache};
use anyhow::{Context, Result};
use proxy_tests::probe::eventually;
use tokio::sync::{mpsc, oneshot};

/// The name of their thread.
pub(super) const THREAD: &str = "fleet";
/// Changes that may wait, as in an agent.
const QUEUE: usize = 4096;
/// Kinds without which nothing is programmed.
const NEEDED: usize = 3;

/// What has come to the agents.
#[derive(Default)]
struct Heard {
    /// When each had everything.
    complete: Vec<Instant>,
    /// When slices came after that.
    slices: Vec<Instant>,
    /// Why one could not begin.
    failed: Option<String>,
}

/// They run until this is dropped.
pub(super) struct Agents {
    heard: Arc<Mutex<Heard>>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Agents {
    /// Starts so many at once.
    pub(super) fn start(nodes: usize, kubeconfig: &Path) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("a runtime for the agents")?;
        let heard = Arc::<Mutex<Heard>>::default();
        let (stop, stopped) = oneshot::channel::<()>();
        let (told, kubeconfig) = (heard.clone(), kubeconfig.to_owned());
        let work = move || {
            runtime.block_on(async {
                for node in 0..nodes {
                    tokio::spawn(agent(node, kubeconfig.clone(), told.clone()));
                }
                // An error: nobody is left to say so.
                stopped.await.ok();
            });
            runtime.shutdown_background();
        };
        let thread = std::thread::Builder::new().name(THREAD.into()).spawn(work);
        Ok(Self { heard, stop: Some(stop), thread: Some(thread.context("starting the agents' thread")?) })
    }

    /// When each of so many had everything.
    pub(super) fn complete(&self, nodes: usize, within: Duration) -> Result<Vec<Instant>> {
        self.all(nodes, within, "have everything", |heard| &heard.complete)
    }

    /// When the slice that was changed last came to each of so many.
    pub(super) fn reached(&self, nodes: usize, within: Duration) -> Result<Vec<Instant>> {
        self.all(nodes, within, "have heard of the change", |heard| &heard.slices)
    }

    /// Forgets changes that have come.
    pub(super) fn forget(&self) {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).slices.clear();
    }

    fn all(
        &self,
        nodes: usize,
        within: Duration,
        what: &str,
        of: fn(&Heard) -> &Vec<Instant>,
    ) -> Result<Vec<Instant>> {
        eventually(within, || {
            let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
            anyhow::ensure!(heard.failed.is_none(), "an agent could not begin: {:?}", heard.failed);
            let times = of(&heard);
            anyhow::ensure!(times.len() >= nodes, "{} of {nodes} agents {what}", times.len());
            Ok(times.clone())
        })
    }
}

impl Drop for Agents {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic has been printed where it happened.
            thread.join().ok();
        }
    }
}

async fn agent(node: usize, kubeconfig: std::path::PathBuf, heard: Arc<Mutex<Heard>>) {
    let config = ClientConfig { kubeconfig: Some(kubeconfig), servers: Vec::new() };
    let cluster = match Cluster::open(config, &Requests::default(), Box::new(Nowhere)).await {
        Ok(cluster) => cluster,
        Err(error) => {
            let why = format!("{:#}", anyhow::Error::from(error));
            heard.lock().unwrap_or_else(PoisonError::into_inner).failed = Some(why);
            return pending().await;
        }
    };
    let (tx, rx) = mpsc::channel(QUEUE);
    tokio::join!(cluster.run(super::node_name(node).into(), false, tx), follow(rx, &heard));
}

/// Takes changes as they come, and notes when.
async fn follow(mut changes: mpsc::Receiver<Change>, heard: &Mutex<Heard>) {
    let mut missing = NEEDED;
    while let Some(change) = changes.recv().await {
        let mut heard = heard.lock().unwrap_or_else(PoisonError::into_inner);
        match change {
            Change::Synced(Kind::Service | Kind::Slice | Kind::Node) => {
                missing -= 1;
                if missing == 0 {
                    heard.complete.push(Instant::now());
                }
            }
            Change::Slice(..) if missing == 0 => heard.slices.push(Instant::now()),
            _ => {}
        }
    }
}

/// Servers are discovered in clusters that have their addresses among their endpoints; this one does not.
struct Nowhere;

impl ServerCache for Nowhere {
    fn load(&self) -> String {
        String::new()
    }

    fn save(&self, _: &str) {}
}
