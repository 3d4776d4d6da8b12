//! The nodes whose endpoints answer clients themselves: which they are, and how they fare. A thread of its own asks them, answers
//! theirs, and owns the table TUNNELS: a sync that takes long must not look like a node that does not answer.

mod worker;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use agent_core::model::World;
use agent_core::model::tunnels::{Standing, Target};
use agent_core::model::{Peers, Settings};
use agent_kernel::datapath::store::pin::BpfRoot;

use super::Agent;
use crate::serve::ProbeCounts;
use worker::Worker;

/// How long after a thread that has ended another one begins.
const AGAIN: Duration = Duration::from_secs(60);

/// Who is to be reached, and which agents are known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Wanted {
    targets: Vec<Target>,
    peers: Arc<Peers>,
    /// Whether any Service has direct server return: only then other nodes are answered.
    direct: bool,
}

/// What the thread tells.
#[derive(Clone, Debug, Default)]
pub(in crate::run) struct News {
    /// How each node fares, by name.
    pub(in crate::run) standings: Vec<Standing>,
    /// What is wrong with this agent itself.
    pub(in crate::run) warnings: Vec<String>,
    pub(in crate::run) counts: ProbeCounts,
    /// Entries of the table that somebody else had changed, not yet reported.
    pub(in crate::run) repairs: usize,
}

/// The loop's end of it.
pub(in crate::run) struct Direct {
    state: State,
    begun: Option<Instant>,
    news: Arc<Mutex<News>>,
}

enum State {
    /// Not yet: who cannot unwrap packets must not say that they get through.
    Idle,
    Working(watch::Sender<Wanted>),
    /// There is no thread for it.
    Dead,
}

impl Direct {
    pub(in crate::run) fn new() -> Self {
        Self { state: State::Idle, begun: None, news: Arc::default() }
    }

    /// The tables have been written, and programs are attached.
    fn follow(&mut self, world: &World, root: &BpfRoot) {
        let targets = world.dsr_nodes().map(|(name, number)| Target { name: name.clone(), number }).collect();
        let wanted = Wanted { targets, peers: world.peers().clone(), direct: world.has_direct_services() };
        match &self.state {
            State::Idle => self.begin(wanted, world.settings(), root),
            // It has given up: what the table says would stand for ever.
            State::Working(sender) if sender.is_closed() => {
                if self.begun.is_none_or(|begun| begun.elapsed() > AGAIN) {
                    self.begin(wanted, world.settings(), root);
                }
            }
            State::Working(sender) => drop(sender.send_if_modified(|known| {
                let news = *known != wanted;
                if news {
                    *known = wanted;
                }
                news
            })),
            State::Dead => {}
        }
    }

    fn begin(&mut self, wanted: Wanted, settings: &Settings, root: &BpfRoot) {
        self.begun = Some(Instant::now());
        let (sender, receiver) = watch::channel(wanted);
        let (port, ipv6, news) = (settings.probe_port, settings.ipv6, self.news.clone());
        let root = root.clone();
        let work = move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let worked = match runtime {
                Ok(runtime) => runtime.block_on(async {
                    Worker::open(&root, port, ipv6, receiver, news.clone())?.work().await;
                    anyhow::Ok(())
                }),
                Err(error) => Err(error.into()),
            };
            if let Err(error) = worked {
                fail(&news, &format!("{error:#}"));
            }
        };
        self.state = match std::thread::Builder::new().name("dsr".into()).spawn(work) {
            Ok(_) => State::Working(sender),
            Err(error) => {
                fail(&self.news, &format!("no thread: {error}"));
                State::Dead
            }
        };
    }

    /// What the thread has told last.
    fn news(&self) -> News {
        let mut news = self.news.lock().unwrap_or_else(PoisonError::into_inner);
        let told = news.clone();
        news.repairs = 0;
        told
    }
}

fn fail(news: &Mutex<News>, why: &str) {
    let line = format!("direct server return: other nodes are not asked whether they can be reached: {why}");
    tracing::error!("{line}");
    news.lock().unwrap_or_else(PoisonError::into_inner).warnings = vec![line];
}

impl Agent {
    /// With each sync that has succeeded.
    pub(super) fn follow_nodes(&mut self) {
        self.direct.follow(&self.world, self.loaded.root());
    }

    /// Now and then.
    pub(super) fn tell_nodes(&mut self) {
        let news = self.direct.news();
        if news.repairs != 0 {
            self.report.repaired("entry", news.repairs);
            self.tell_repaired(&[format!("{} entries of TUNNELS", news.repairs)]);
        }
        self.report.direct(&news);
    }
}
