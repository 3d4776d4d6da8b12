//! The agent is killed under load, and comes back.

use std::time::{Duration, Instant};

use anyhow::Result;
use proxy_tests::agent::Agent;
use proxy_tests::answer::Load;
use proxy_tests::probe::{Ask, Runner};
use proxy_tests::stop::pause;
use proxy_tests::test_cluster::TestCluster;

use crate::answers::webui;
use crate::promise::Promises;
use crate::screen::Screen;
use crate::updates::Clients;

pub(crate) fn show(
    screen: &Screen,
    test_cluster: &TestCluster,
    agent: &mut Agent,
    promises: &mut Promises,
) -> Result<()> {
    screen.heading("6. The agent is killed")?;
    screen.text(
        "SIGKILL, as when memory runs out. Tables and programs are the kernel's, so traffic goes on without the agent. \
         Started again it finds them, compares them with the manifests, and writes only what differs: nothing.",
    )?;
    let mut clients = Clients::of_webui(test_cluster)?;
    let every = Duration::from_millis(20);
    let held =
        Runner::hold(test_cluster.place("shell-2"), &Ask::tcp(webui()), every, Duration::from_secs(60))?;
    let before = clients.so_far()?;
    let pid = agent.pid().unwrap_or_default();
    agent.kill()?;
    pause(Duration::from_millis(1500))?;
    let dead = clients.so_far()?;
    screen.step(&format!(
        "killed process {pid}; without an agent: {} requests answered, {} failed",
        dead.made - before.made,
        dead.failed - before.failed
    ))?;
    let begun = Instant::now();
    agent.spawn()?;
    agent.wait_ready()?;
    screen.step(&format!("started again, in step after {:.0} ms", begun.elapsed().as_secs_f64() * 1000.0))?;
    let mut loads = clients.finish(screen)?;
    let held = held.stop()?;
    screen.remark(&format!(
        "One connection stayed open throughout: {} exchanges, {} failed.",
        held.made, held.failed
    ))?;
    loads.push(Load { made: held.made, failed: held.failed, ..Load::default() });
    let kept = dead.made > before.made && loads.iter().all(|load| load.failed == 0) && held.made > 0;
    promises.note("Agent killed, restarted", "none fails", &loads.iter().collect::<Vec<_>>(), kept);
    Ok(())
}
