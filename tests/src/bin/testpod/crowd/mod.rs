//! A crowd of clients: connections that are held, idle or busy, and new requests all the time. Whatever is not answered
//! as it should be is printed at once.

mod line;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::io::BufRead;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::Result;
use futures::future::join_all;
use proxy_tests::crowd::{Count, Loss, Plan, Said, Target, now_ms};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::task::{LocalSet, spawn_local};
use tokio::time::MissedTickBehavior;

use line::Line;

/// Pause between two exchanges over a busy connection.
const BUSY: Duration = Duration::from_millis(100);
/// What a request is called that is no exchange over a connection that is held.
const NEW: &str = "new";
/// How often it is looked whether all are silent.
const TICK: Duration = Duration::from_millis(5);

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// What to do, as JSON (`proxy_tests::crowd::Plan`).
    #[arg(long, value_parser = |text: &str| serde_json::from_str::<Plan>(text))]
    plan: Plan,
    /// Ends by itself after this time.
    #[arg(long, default_value_t = 600.0)]
    seconds: f64,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let (sender, orders) = unbounded_channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
        // The end of the orders is an order, too: the receiver sees it.
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let crowd = Crowd::new(arguments.plan.clone());
    let clients = LocalSet::new();
    let play = clients.run_until(crowd.play(orders));
    let limit = Duration::from_secs_f64(arguments.seconds);
    let ended = runtime.block_on(async { tokio::time::timeout(limit, play).await });
    // Time that is up is an end like any other.
    ended.unwrap_or(Ok(()))
}

/// What all clients share.
struct Crowd {
    plan: Plan,
    count: RefCell<Count>,
    /// Services that may refuse for the time being.
    refusing: RefCell<BTreeSet<String>>,
    /// Whether busy connections whose packets are translated are silent for the time being.
    silent: Cell<bool>,
    /// Exchanges over such connections that are under way.
    under_way: Cell<u32>,
    /// Who answers where all new requests must be answered by one.
    bound: RefCell<BTreeMap<usize, String>>,
    /// Counts questions, so that an answer tells which it belongs to.
    asked: Cell<u64>,
}

impl Crowd {
    fn new(plan: Plan) -> Rc<Self> {
        Rc::new(Self {
            plan,
            count: RefCell::default(),
            refusing: RefCell::default(),
            silent: Cell::new(false),
            under_way: Cell::new(0),
            bound: RefCell::default(),
            asked: Cell::new(0),
        })
    }

    fn timeout(&self) -> Duration {
        Duration::from_millis(self.plan.timeout_ms)
    }

    fn next_number(&self) -> u64 {
        self.asked.set(self.asked.get() + 1);
        self.asked.get()
    }

    async fn play(self: Rc<Self>, mut orders: UnboundedReceiver<String>) -> Result<()> {
        let mut idle = Vec::new();
        for target in &self.plan.targets {
            for n in 0..target.idle + target.busy {
                let held = Held::open(&self, target).await.map_err(anyhow::Error::msg)?;
                self.count.borrow_mut().held += 1;
                if n < target.idle {
                    idle.push(held);
                } else {
                    spawn_local(keep_busy(self.clone(), held));
                }
            }
        }
        crate::print(&Said::Count(self.count.borrow().clone()))?;
        spawn_local(self.clone().ask());
        while let Some(order) = orders.recv().await {
            match order.split_once(' ').unwrap_or((&order, "")) {
                ("stop", _) => break,
                ("report", _) => {}
                ("check", _) => drop(join_all(idle.iter_mut().map(|held| held.exchange(&self))).await),
                ("may-refuse", service) => drop(self.refusing.borrow_mut().insert(service.into())),
                ("must-serve", service) => drop(self.refusing.borrow_mut().remove(service)),
                ("be-silent", _) => self.fall_silent().await,
                ("speak", _) => self.silent.set(false),
                (other, _) => anyhow::bail!("no such order: {other}"),
            }
            crate::print(&Said::Count(self.count.borrow().clone()))?;
        }
        Ok(())
    }

    /// Has busy connections whose packets are translated say nothing more, and waits for what they have said last.
    async fn fall_silent(&self) {
        self.silent.set(true);
        while self.under_way.get() > 0 {
            tokio::time::sleep(TICK).await;
        }
    }

    /// Begins new requests at a steady rate, whatever becomes of those before.
    async fn ask(self: Rc<Self>) {
        let mut beat = tokio::time::interval(Duration::from_secs_f64(1.0 / self.plan.rate));
        beat.set_missed_tick_behavior(MissedTickBehavior::Skip);
        for index in (0..self.plan.targets.len()).cycle() {
            beat.tick().await;
            let crowd = self.clone();
            spawn_local(async move { crowd.request(index).await });
        }
    }

    async fn request(&self, index: usize) {
        let target = &self.plan.targets[index];
        let (begun, begun_ms) = (Instant::now(), now_ms());
        let may_refuse = self.refusing.borrow().contains(&target.service);
        let came = async {
            let mut line = Line::connect(target.to, target.udp, self.timeout()).await?;
            line.exchange(self.next_number(), self.timeout()).await
        };
        let came = came.await;
        let refused = came.as_ref().is_err_and(|why| why.ends_with("ECONNREFUSED"));
        if refused && (may_refuse || self.refusing.borrow().contains(&target.service)) {
            self.count.borrow_mut().requests += 1;
            return;
        }
        let mut servers = target.servers.clone();
        if target.same
            && let Ok(name) = &came
        {
            servers = vec![self.bound.borrow_mut().entry(index).or_insert_with(|| name.clone()).clone()];
        }
        self.note(target, NEW, &servers, came, (begun, begun_ms));
    }

    /// Counts an exchange; what is not as it should be is printed. Says whether it was.
    fn note(
        &self,
        target: &Target,
        kind: &str,
        servers: &[String],
        came: Result<String, String>,
        (begun, begun_ms): (Instant, u64),
    ) -> bool {
        let mut count = self.count.borrow_mut();
        count.requests += 1;
        let came = match came {
            Ok(name) if servers.contains(&name) => {
                count.slowest_ms = count.slowest_ms.max(begun.elapsed().as_secs_f64() * 1000.0);
                return true;
            }
            Ok(name) => format!("an answer from {name}"),
            Err(why) => why,
        };
        count.lost += 1;
        let protocol = if target.udp { "UDP" } else { "TCP" };
        let loss = Loss {
            begun_ms,
            ended_ms: now_ms(),
            what: format!("{}: {kind} {protocol} to {} ({})", self.plan.client, target.to, target.service),
            expected: format!("an answer from {}", servers.join(" or ")),
            came,
            held: kind != NEW,
        };
        // Who does not read it has gone, and this program ends with its standard input.
        crate::print(&Said::Lost(loss)).ok();
        false
    }
}

/// A connection that is held, or a connected UDP socket. Once broken it is opened again, so that what follows is tried
/// as well.
struct Held {
    target: Target,
    server: String,
    line: Option<Line>,
    kind: &'static str,
}

impl Held {
    async fn open(crowd: &Crowd, target: &Target) -> Result<Self, String> {
        let mut held = Self { target: target.clone(), server: String::new(), line: None, kind: "held, idle" };
        held.reopen(crowd).await.map_err(|why| format!("opening a connection to {}: {why}", target.to))?;
        Ok(held)
    }

    async fn reopen(&mut self, crowd: &Crowd) -> Result<(), String> {
        let mut line = Line::connect(self.target.to, self.target.udp, crowd.timeout()).await?;
        self.server = line.exchange(crowd.next_number(), crowd.timeout()).await?;
        self.line = Some(line);
        Ok(())
    }

    async fn exchange(&mut self, crowd: &Crowd) {
        let begun = (Instant::now(), now_ms());
        let Some(line) = &mut self.line else {
            // Its end has been counted; new requests tell whether the Service is served.
            self.reopen(crowd).await.ok();
            return;
        };
        let from = line.local().map_or_else(String::new, |from| format!(" from {from}"));
        let came = line.exchange(crowd.next_number(), crowd.timeout()).await;
        // A datagram may be lost and the socket is as good as before.
        let broken = came.is_err() && !self.target.udp;
        let whole = crowd.note(
            &self.target,
            &format!("{}{from}", self.kind),
            std::slice::from_ref(&self.server),
            came.clone(),
            begun,
        );
        if broken {
            self.line = None;
        } else if let (false, Ok(other)) = (whole, came) {
            // Said once, not with every exchange that follows.
            self.server = other;
        }
    }
}

async fn keep_busy(crowd: Rc<Crowd>, mut held: Held) {
    held.kind = "held, busy";
    let by_packet = u32::from(held.target.by_packet);
    loop {
        if by_packet == 0 || !crowd.silent.get() {
            crowd.under_way.set(crowd.under_way.get() + by_packet);
            held.exchange(&crowd).await;
            crowd.under_way.set(crowd.under_way.get() - by_packet);
        }
        tokio::time::sleep(BUSY).await;
    }
}
