//! The real agent in a node: started, waited for, asked, killed, cleaned up.
//!
//! Only its command line is known here. It has a bpffs of its own in a temporary directory and the node's cgroup
//! tree, so agents of several nodes on one kernel do not see each other.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::channel;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

use crate::apiserver::ApiServer;
use crate::manifests::ManifestDir;
use crate::pod::Place;
use crate::probe::{eventually, eventually_by_command};
use crate::test_cluster::TestCluster;

/// How long the agent may take to start, and to end.
const START: Duration = Duration::from_secs(20);
/// How long one of its other commands may take.
const COMMAND: Duration = Duration::from_secs(20);

/// Flags for most agents: where pods are, and tables of a size that is made and read in no time.
pub const FLAGS: [&str; 11] = [
    "--cluster-cidr=10.244.0.0/16,fd00:244::/32",
    "--max-frontends=4096",
    "--max-slots=16384",
    "--max-backends=8192",
    "--max-services=4096",
    "--max-sources=1024",
    "--max-addresses=4096",
    "--max-flows=16384",
    "--max-young-flows=8192",
    "--max-affinity=4096",
    "--max-fragments=1024",
];

/// Where the agent gets Services from.
#[derive(Clone, Debug)]
pub enum Feed {
    /// `--manifests DIR`.
    Manifests(PathBuf),
    /// `--apiserver URL`.
    ApiServer(String),
    /// `--config FILE`: what the kubeconfig says that it names.
    Config(PathBuf),
}

impl From<&ManifestDir> for Feed {
    fn from(directory: &ManifestDir) -> Self {
        Self::Manifests(directory.path())
    }
}

impl From<&ApiServer> for Feed {
    fn from(server: &ApiServer) -> Self {
        Self::ApiServer(server.url())
    }
}

/// An agent in a node. Dropping it kills it, has `cleanup` take its programs down, and removes its files; after a
/// panic its log is printed first.
#[derive(Debug)]
pub struct Agent {
    binary: PathBuf,
    place: Place,
    arguments: Vec<String>,
    /// What a shell does before it becomes the agent.
    before: Option<String>,
    child: Option<Child>,
    /// `None` once it is kept for the operator.
    directory: Option<TempDir>,
    bpf_root: PathBuf,
    log: PathBuf,
}

impl Agent {
    /// Starts the agent in a node with these further flags of `run`, and waits until it is ready.
    pub fn start(cluster: &TestCluster, node: &str, feed: impl Into<Feed>, flags: &[&str]) -> Result<Self> {
        let mut agent = Self::prepare(&crate::require::agent_binary()?, cluster, node, feed, flags)?;
        agent.spawn()?;
        agent.wait_ready()?;
        Ok(agent)
    }

    /// Makes everything ready for a program with the agent's command line, without starting it.
    pub fn prepare(
        binary: &Path,
        cluster: &TestCluster,
        node: &str,
        feed: impl Into<Feed>,
        flags: &[&str],
    ) -> Result<Self> {
        let directory = tempfile::Builder::new()
            .prefix(&format!("{}-agent-", crate::unique()))
            .tempdir()
            .context("making a directory for the agent")?;
        let (bpf_root, log) = (directory.path().join("bpf"), directory.path().join("agent.log"));
        std::fs::create_dir(&bpf_root).context("making a mount point for the agent's bpffs")?;
        mount(Some("bpffs"), &bpf_root, Some("bpf"), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("mounting a bpffs on {}", bpf_root.display()))?;
        let (flag, value) = match feed.into() {
            Feed::Manifests(path) => ("--manifests", path.display().to_string()),
            Feed::ApiServer(url) => ("--apiserver", url),
            Feed::Config(path) => ("--config", path.display().to_string()),
        };
        let cgroup_root = cluster.cgroup_root(node).display().to_string();
        let mut arguments = ["--hostname-override", node, "--cgroup-root", &cgroup_root, flag, &value]
            .map(ToOwned::to_owned)
            .to_vec();
        arguments.extend(flags.iter().map(ToString::to_string));
        let place = cluster.place(node).clone();
        Ok(Self {
            binary: binary.into(),
            place,
            arguments,
            before: None,
            child: None,
            directory: Some(directory),
            bpf_root,
            log,
        })
    }

    /// Further flags of `run`, from the next start on.
    pub fn further(&mut self, flags: &[&str]) {
        self.arguments.extend(flags.iter().map(ToString::to_string));
    }

    /// The value of a flag of `run`, from the next start on.
    pub fn set(&mut self, flag: &str, value: &str) {
        if let Some(at) = self.arguments.iter().position(|argument| argument == flag) {
            self.arguments.drain(at..self.arguments.len().min(at + 2));
        }
        self.further(&[flag, value]);
    }

    /// What a shell is to do before it becomes the agent, from the next start on: set limits, lead its output elsewhere.
    pub fn before(&mut self, script: &str) {
        self.before = Some(script.to_owned());
    }

    /// Another program with the same command line, from the next start on.
    pub fn becomes(&mut self, binary: &Path) {
        self.binary = binary.into();
    }

    /// Starts it (again) with the same flags; [`Self::wait_ready`] tells when it is ready.
    pub fn spawn(&mut self) -> Result<()> {
        ensure!(self.child.is_none(), "the agent of {} runs already", self.place.name);
        self.child = Some(self.place.spawn(self.run_command()?)?);
        Ok(())
    }

    /// The command that [`Self::spawn`] starts in [`Self::place`], for somebody who looks after the process himself.
    pub fn run_command(&self) -> Result<Command> {
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.log)
            .context("opening the agent's log")?;
        let mut command = match &self.before {
            None => Command::new(&self.binary),
            Some(script) => {
                let mut shell = Command::new("sh");
                shell.arg("-c").arg(format!("{script}\nexec \"$0\" \"$@\"")).arg(&self.binary);
                shell
            }
        };
        command.arg("run").arg("--bpf-root").arg(&self.bpf_root);
        command.args(&self.arguments).stdin(Stdio::null());
        command.stdout(log.try_clone().context("duplicating the agent's log")?).stderr(log);
        Ok(command)
    }

    /// Where it runs.
    #[must_use]
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Waits until `status` calls it healthy; what an earlier agent has left behind does not count.
    pub fn wait_ready(&mut self) -> Result<()> {
        let ended = eventually_by_command(START, || {
            if let Some(status) = self.child.as_mut().and_then(|child| child.try_wait().transpose()) {
                // No use in waiting any longer.
                return Ok(Some(status));
            }
            self.is_ready(self.pid()).map(|()| None)
        })
        .with_context(|| self.log_text())?;
        ensure!(
            ended.is_none(),
            "the agent of {} has ended: {ended:?}\n{}",
            self.place.name,
            self.log_text()
        );
        Ok(())
    }

    /// An error as long as `status` does not call the agent with this process id healthy.
    pub fn is_ready(&self, pid: Option<u32>) -> Result<()> {
        let (status, output) = self.ask(&["status", "--output", "json"])?;
        ensure!(status.success(), "the agent of {} is not ready: {status}\n{output}", self.place.name);
        let said: Value = serde_json::from_str(&output).with_context(|| output.clone())?;
        ensure!(said["agent"]["pid"].as_u64() == pid.map(u64::from), "another agent: {output}");
        Ok(())
    }

    /// Ends it as an operator does, with SIGTERM, and waits for it.
    pub fn stop(&mut self) -> Result<ExitStatus> {
        let pid = self.pid().context("the agent does not run")?;
        let pid = i32::try_from(pid).context("a process id")?;
        kill(Pid::from_raw(pid), Signal::SIGTERM).context("sending SIGTERM to the agent")?;
        self.ended()
    }

    /// Waits until it has ended by itself.
    pub fn ended(&mut self) -> Result<ExitStatus> {
        let mut child = self.child.take().context("the agent does not run")?;
        let waited = eventually(START, || child.try_wait()?.context("the agent does not end"));
        if waited.is_err() {
            // It must not outlive the test that finds this.
            child.kill().ok();
            child.wait().ok();
        }
        waited
    }

    /// Kills it with SIGKILL, as the kernel does when memory runs out.
    pub fn kill(&mut self) -> Result<()> {
        let mut child = self.child.take().context("the agent does not run")?;
        child.kill().context("killing the agent")?;
        child.wait().context("waiting for the agent").map(drop)
    }

    /// What `status` says.
    pub fn status_json(&self) -> Result<Value> {
        self.json(&["status", "--output", "json"])
    }

    /// What `service list` says.
    pub fn service_list_json(&self) -> Result<Value> {
        self.json(&["service", "list", "--output", "json"])
    }

    /// What any command says in JSON, whatever its exit code.
    pub fn json(&self, arguments: &[&str]) -> Result<Value> {
        let (status, output) = self.ask(arguments)?;
        serde_json::from_str(&output).with_context(|| format!("{arguments:?} ({status}) printed: {output}"))
    }

    /// Runs a command of the agent in the node with its `--bpf-root`: exit code and output, errors included.
    pub fn ask(&self, arguments: &[&str]) -> Result<(ExitStatus, String)> {
        let (verb, rest) = arguments.split_first().context("no command for the agent")?;
        let mut command = Command::new(&self.binary);
        // `--bpf-root` belongs to the innermost command: `service list --bpf-root …`.
        command.arg(verb).args(rest).arg("--bpf-root").arg(&self.bpf_root);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = self.place.spawn(command)?;
        let pid = Pid::from_raw(i32::try_from(child.id()).context("a process id")?);
        let (sender, receiver) = channel();
        std::thread::spawn(move || sender.send(child.wait_with_output()));
        let Ok(output) = receiver.recv_timeout(COMMAND * crate::patience()) else {
            // It is ours and still runs: its thread has not reaped it.
            kill(pid, Signal::SIGKILL).ok();
            bail!("{} {arguments:?} did not end within {COMMAND:?}", self.binary.display());
        };
        let output = output.with_context(|| format!("waiting for {arguments:?}"))?;
        let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            text.push_str(&String::from_utf8_lossy(&output.stderr));
        }
        Ok((output.status, text))
    }

    /// Where it pins.
    #[must_use]
    pub fn bpf_root(&self) -> &Path {
        &self.bpf_root
    }

    /// Its log so far.
    #[must_use]
    pub fn log_text(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Its process id while it runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if std::thread::panicking() {
            crate::say(&format!("--- log of the agent of {} ---\n{}---", self.place.name, self.log_text()));
        }
        if crate::keep() {
            let kept = self.directory.take().map(TempDir::keep).unwrap_or_default();
            crate::say(&format!("kept: {} --bpf-root {}", kept.display(), self.bpf_root.display()));
            return;
        }
        if self.child.is_some() {
            // It may have ended by itself; then there is nothing to kill.
            self.kill().ok();
        }
        match self.ask(&["cleanup"]) {
            Ok((status, _)) if status.success() => {}
            outcome => {
                crate::say(&format!("cleanup after the agent of {} failed: {outcome:?}", self.place.name));
            }
        }
        // With the bpffs its pins go, and with them what `cleanup` may have left; mostly it has done this, too.
        if let Err(error) = umount2(&self.bpf_root, MntFlags::MNT_DETACH)
            && self.bpf_root.exists()
        {
            crate::say(&format!("unmounting {}: {error}", self.bpf_root.display()));
        }
    }
}
