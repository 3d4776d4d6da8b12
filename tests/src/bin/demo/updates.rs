//! Updates under load: rolling, blue/green, recreate.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use proxy_tests::answer::Load;
use proxy_tests::probe::{Ask, Runner};
use proxy_tests::rollout::{Deployment, Event};
use proxy_tests::stop::pause;
use proxy_tests::test_cluster::TestCluster;

use crate::answers::{RATE, at, node_port, webui};
use crate::cluster::places;
use crate::promise::Promises;
use crate::screen::Screen;

/// Nobody asks for longer.
const LIMIT: Duration = Duration::from_secs(60);
/// A rejection that takes longer is not "at once": a lost SYN is sent again after a second.
const AT_ONCE_MS: f64 = 500.0;

/// Clients that ask throughout a scene.
pub(crate) struct Clients(Vec<(&'static str, Runner<Load>)>);

impl Clients {
    /// Clients of webui by every way there is.
    pub(crate) fn of_webui(test_cluster: &TestCluster) -> Result<Self> {
        let ways = [
            ("a pod, ClusterIP", "shell", webui()),
            ("the host, ClusterIP", "node1", webui()),
            ("outside, NodePort", "outside", node_port(test_cluster)),
        ];
        Self::start(test_cluster, &ways)
    }

    pub(crate) fn start(
        test_cluster: &TestCluster,
        clients: &[(&'static str, &str, SocketAddr)],
    ) -> Result<Self> {
        let start = |(label, place, to): &(&'static str, &str, SocketAddr)| {
            Ok((*label, Runner::load(test_cluster.place(place), &Ask::tcp(*to), RATE, 3, LIMIT)?))
        };
        let clients = Self(clients.iter().map(start).collect::<Result<_>>()?);
        pause(Duration::from_millis(500))?;
        Ok(clients)
    }

    /// What all have counted so far.
    pub(crate) fn so_far(&mut self) -> Result<Load> {
        let mut sum = Load::default();
        for (_, runner) in &mut self.0 {
            add(&mut sum, &runner.report()?);
        }
        Ok(sum)
    }

    /// Waits until a pod gets nothing new.
    fn quiet(&mut self, pod: &str) -> Result<()> {
        let give_up = Instant::now() + Duration::from_secs(5);
        let answers = |load: &Load| load.names.get(pod).copied().unwrap_or(0);
        let mut before = answers(&self.so_far()?);
        loop {
            pause(Duration::from_millis(120))?;
            let now = answers(&self.so_far()?);
            if now == before {
                return Ok(());
            }
            if Instant::now() > give_up {
                bail!("{pod} still gets new connections five seconds after its endpoint has left");
            }
            before = now;
        }
    }

    /// Waits until a pod is asked.
    fn reached(&mut self, pod: &str) -> Result<()> {
        let give_up = Instant::now() + Duration::from_secs(5);
        while !self.so_far()?.names.contains_key(pod) {
            pause(Duration::from_millis(20))?;
            if Instant::now() > give_up {
                bail!("{pod} gets no connection five seconds after its endpoint became ready");
            }
        }
        Ok(())
    }

    /// Ends them and shows what they counted.
    pub(crate) fn finish(self, screen: &Screen) -> Result<Vec<Load>> {
        pause(Duration::from_millis(500))?;
        let mut rows = Vec::new();
        let mut loads = Vec::new();
        for (label, runner) in self.0 {
            let load = runner.stop()?;
            rows.push(vec![
                label.to_owned(),
                (load.made + load.failed).to_string(),
                load.failed.to_string(),
                list(&load.reasons),
                format!("{:.1} ms", load.slowest_ms),
                list(&load.names),
            ]);
            loads.push(load);
        }
        screen.table(&["FROM", "REQUESTS", "FAILED", "WHY", "SLOWEST", "WHO ANSWERED"], &rows)?;
        Ok(loads)
    }
}

fn add(sum: &mut Load, load: &Load) {
    sum.made += load.made;
    sum.failed += load.failed;
    for (name, count) in &load.names {
        *sum.names.entry(name.clone()).or_default() += count;
    }
}

fn list(counts: &std::collections::BTreeMap<String, u64>) -> String {
    if counts.is_empty() {
        return "-".into();
    }
    counts.iter().map(|(name, count)| format!("{name}: {count}")).collect::<Vec<_>>().join("  ")
}

pub(crate) fn rolling(
    screen: &Screen,
    test_cluster: &TestCluster,
    webui_pods: &mut Deployment<'_>,
    promises: &mut Promises,
) -> Result<()> {
    screen.heading("3. Rolling update of webui, under load")?;
    screen.text(
        "Three new pods replace three old ones, one at a time: a new pod starts, becomes ready, and one old pod is \
         told to end. Its endpoint is then terminating but still serving; it stops when nothing new reaches it. A \
         proxy that is late sends requests to pods that are gone. Clients in a pod, on the host and outside go on \
         asking, every request with a new connection.",
    )?;
    let mut clients = Clients::of_webui(test_cluster)?;
    let new = places(test_cluster, &["webui-v2-1", "webui-v2-2", "webui-v2-3"]);
    webui_pods.rolling_update(&new, &mut |event| match event {
        Event::Ready(pod) => {
            clients.reached(pod)?;
            screen.step(&format!("{pod} is ready, and answers"))
        }
        Event::Ending(pod) => clients.quiet(pod),
        Event::Gone(pod) => screen.step(&format!("{pod} got nothing new, and is gone")),
        Event::Switched | Event::NoneServes => Ok(()),
    })?;
    let loads = clients.finish(screen)?;
    let kept = loads.iter().all(|load| load.failed == 0);
    promises.note("Rolling update", "none fails", &loads.iter().collect::<Vec<_>>(), kept);
    Ok(())
}

pub(crate) fn blue_green(
    screen: &Screen,
    test_cluster: &TestCluster,
    checkout: &mut Deployment<'_>,
    promises: &mut Promises,
) -> Result<()> {
    screen.heading("4. Blue/green switch of checkout, under load")?;
    screen.text(
        "Green runs beside blue and gets nothing; then one edit of the endpoints turns the Service from all of blue \
         to all of green. In the kernel that is one write: a packet sees the old list of pods or the new one, never \
         a mixture or nothing. Blue runs on until nothing new reaches it.",
    )?;
    let to = at([10, 100, 100, 160], 80);
    let mut clients = Clients::start(test_cluster, &[("a pod", "shell", to), ("the host", "node1", to)])?;
    let new = places(test_cluster, &["green-1", "green-2"]);
    checkout.switch(&new, &mut |event| match event {
        Event::Switched => {
            screen.step("the endpoints are green now")?;
            ["green-1", "green-2"].iter().try_for_each(|pod| clients.reached(pod))?;
            ["blue-1", "blue-2"].iter().try_for_each(|pod| clients.quiet(pod))
        }
        Event::Gone(pod) => screen.step(&format!("{pod} got nothing new, and is gone")),
        Event::Ready(_) | Event::Ending(_) | Event::NoneServes => Ok(()),
    })?;
    let loads = clients.finish(screen)?;
    let kept = loads.iter().all(|load| load.failed == 0);
    promises.note("Blue/green switch", "none fails", &loads.iter().collect::<Vec<_>>(), kept);
    Ok(())
}

/// What had failed when.
#[derive(Default)]
struct Failures {
    before: u64,
    during: u64,
    after_ready: Option<u64>,
}

pub(crate) fn recreate(
    screen: &Screen,
    test_cluster: &TestCluster,
    api: &mut Deployment<'_>,
    promises: &mut Promises,
) -> Result<()> {
    screen.heading("5. Recreate update of api, under load")?;
    screen.text(
        "All old pods end before a new one starts, so there is a time without any pod, and requests must fail then. \
         What matters: while old pods still serve they are used, although they are ending; then connections are \
         refused at once instead of hanging; and the first new pod is used as soon as it is ready.",
    )?;
    let to = at([10, 100, 100, 150], 80);
    let mut clients = Clients::start(test_cluster, &[("a pod", "shell", to), ("the host", "node1", to)])?;
    let mut failures = Failures::default();
    let new = places(test_cluster, &["api-v2-1", "api-v2-2", "api-v2-3"]);
    api.recreate(&new, &mut |event| match event {
        Event::Ending(_) => {
            pause(Duration::from_millis(200))?;
            failures.before = clients.so_far()?.failed;
            Ok(())
        }
        Event::NoneServes => {
            screen.step("all three old pods are ending; now they have stopped serving")?;
            pause(Duration::from_millis(800))?;
            failures.during = clients.so_far()?.failed;
            Ok(())
        }
        Event::Ready(pod) => {
            clients.reached(pod)?;
            if failures.after_ready.is_none() {
                // Requests that were refused before the first answer have been counted by now.
                pause(Duration::from_millis(100))?;
                failures.after_ready = Some(clients.so_far()?.failed);
            }
            screen.step(&format!("{pod} is ready, and answers"))
        }
        Event::Gone(pod) => screen.step(&format!("{pod} is gone")),
        Event::Switched => Ok(()),
    })?;
    let loads = clients.finish(screen)?;
    let failed: u64 = loads.iter().map(|load| load.failed).sum();
    let slowest = loads.iter().map(|load| load.slowest_failure_ms).fold(0.0, f64::max);
    let refused = loads.iter().all(|load| load.reasons.keys().all(|reason| reason == "connect ECONNREFUSED"));
    screen.remark(&format!(
        "Failed while old pods were ending: {}. While no pod was ready: {}, all refused, the slowest after {:.1} ms. \
         After the first new pod was ready: {}.",
        failures.before,
        failures.after_ready.unwrap_or(failed) - failures.before,
        slowest,
        failed - failures.after_ready.unwrap_or(failed),
    ))?;
    let kept = failures.before == 0
        && failures.during > 0
        && failures.after_ready == Some(failed)
        && refused
        && slowest < AT_ONCE_MS;
    let promise = "fails only while no pod is ready, and then at once";
    promises.note("Recreate update", promise, &loads.iter().collect::<Vec<_>>(), kept);
    Ok(())
}
