//! Every system call of a start and of a sync once: the agent is killed at it, or it fails.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::mpsc::channel;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use fastrand::Rng;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;

use super::{Fault, Next, Options};
use crate::chaos::calls;
use crate::chaos::ground::Ground;
use crate::chaos::progress;
use crate::chaos::services::COMING;
use crate::chaos::trace::{self, Act, Made, Site, Traced};
use crate::crowd::now_ms;
use crate::probe::eventually;

/// How long an agent that has been hit may take until it serves what is published, or has ended.
const SOON: Duration = Duration::from_secs(30);
/// What a sync goes on with when the tables are written.
const AFTER: Duration = Duration::from_millis(100);

/// Which of the two it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    Kill,
    Fail,
}

/// What is still to be done.
pub(super) struct Syscalls {
    what: What,
    /// So many are wanted; they are chosen at random.
    most: usize,
    random: Rng,
    /// Names of calls begin with one of these, if there is any.
    names: Vec<String>,
    /// Sites with the number of their first call; `None` until the calls have been counted.
    left: Option<std::vec::IntoIter<(Site, u32)>>,
    made: BTreeMap<Site, Made>,
    done: u64,
    missed: u64,
    ended: u64,
    /// Of these, by a panic of a library.
    of_library: u64,
}

impl Syscalls {
    pub(super) fn new(what: What, options: &Options) -> Self {
        let most = options.rounds.map_or(usize::MAX, |rounds| usize::try_from(rounds).unwrap_or(usize::MAX));
        Self {
            what,
            most,
            random: Rng::with_seed(options.seed),
            names: options.calls.clone(),
            left: None,
            made: BTreeMap::new(),
            done: 0,
            missed: 0,
            ended: 0,
            of_library: 0,
        }
    }

    /// Counts the calls of a start and a sync of which nothing is disturbed: sites in the order of their first calls.
    fn count(&mut self, ground: &mut Ground<'_>) -> Result<Vec<(Site, u32)>> {
        let traced = run(ground, "counting system calls", None)?;
        let Some(WaitStatus::Signaled(_, Signal::SIGKILL, _)) = traced.as_ref().map(|traced| traced.ended)
        else {
            bail!("an agent that is only watched does not live: {traced:?}\n{}", ground.agent.log_text());
        };
        self.made = traced.map(|traced| traced.made).unwrap_or_default();
        let wanted = self.made.iter().filter(|(site, _)| self.act(site).is_some());
        let mut all: Vec<_> = wanted.map(|(site, made)| (site.clone(), made.first)).collect();
        let there = all.len();
        self.random.shuffle(&mut all);
        all.truncate(self.most);
        all.sort_by_key(|(_, first)| *first);
        progress(&format!("{}, {} of {there} to be hit", self.counted(), all.len()));
        Ok(all)
    }

    fn counted(&self) -> String {
        let calls: u32 = self.made.values().map(|made| made.times).sum();
        let kinds: BTreeSet<_> = self.made.keys().map(|site| site.kind).collect();
        format!("{calls} system calls of {} kinds from {} places", kinds.len(), self.made.len())
    }

    fn act(&self, site: &Site) -> Option<Act> {
        let name = calls::name(site.kind);
        if !self.names.is_empty() && !self.names.iter().any(|wanted| name.starts_with(wanted)) {
            return None;
        }
        match self.what {
            What::Kill => Some(Act::Kill),
            // What the loader makes of an error is not the agent's.
            What::Fail => calls::error(site.kind).filter(|_| !site.of_loader).map(Act::Fail),
        }
    }

    /// What has come of an agent of which a call has failed and that has ended: it must have said why.
    fn judge(&mut self, traced: &Traced, said: &str) -> Result<()> {
        match traced.ended {
            WaitStatus::Signaled(_, Signal::SIGKILL, _) => Ok(()),
            WaitStatus::Exited(_, code) => {
                self.ended += 1;
                ensure!(code != 0, "it ended with exit code 0: {said}");
                let of_library = is_of_library(said);
                self.of_library += u64::from(of_library);
                ensure!(of_library || !said.contains("panicked"), "it panicked: {said}");
                if of_library {
                    return Ok(());
                }
                ensure!(said.contains("rror"), "exit code {code} and no reason: {said}");
                Ok(())
            }
            // Memory that cannot be had has no other way out, nor has what is done before the program or a thread begins.
            WaitStatus::Signaled(_, Signal::SIGABRT, _)
                if [
                    "memory allocation of",
                    "fatal runtime error: init",
                    "sys/pal/unix/stack_overflow.rs",
                ]
                .iter()
                .any(|reason| said.contains(reason)) =>
            {
                self.ended += 1;
                Ok(())
            }
            WaitStatus::Signaled(_, Signal::SIGABRT, _) if is_of_library(said) => {
                self.ended += 1;
                self.of_library += 1;
                Ok(())
            }
            other => bail!("it ended so: {other:?}: {said}"),
        }
    }
}

impl Fault for Syscalls {
    fn round(&mut self, ground: &mut Ground<'_>, _: u64) -> Result<Next> {
        if self.left.is_none() {
            COMING.into_iter().try_for_each(|pod| ground.serve(pod))?;
            ground.agent.kill()?;
            self.left = Some(self.count(ground)?.into_iter());
            ground.agent.spawn()?;
            ground.settle();
        }
        let next = self.left.as_mut().and_then(Iterator::next);
        let Some((site, first)) = next else { return Ok(Next::Over) };
        let act = self.act(&site).context("a call that nothing can be done at")?;
        let call = format!("{}, call {first}", calls::name(site.kind));
        let step = match act {
            Act::Kill => format!("SIGKILL at {call}"),
            Act::Fail(error) => format!("{call} fails with {error:?}"),
        };
        ground.agent.kill()?;
        let before = ground.agent.log_text().len();
        let begun = now_ms();
        let traced = run(ground, &step, Some((&site, act)))?;
        if let Some(traced) = traced {
            self.done += u64::from(traced.reached);
            self.missed += u64::from(!traced.reached);
            if self.what == What::Fail {
                let log = ground.agent.log_text();
                let outcome = self.judge(&traced, last_lines(log.get(before..).unwrap_or_default()));
                ground.clients.note(
                    "the agent",
                    "a life without the call, or an end with a reason",
                    begun,
                    outcome,
                );
            }
        }
        ground.agent.spawn()?;
        ground.settle();
        Ok(Next::More)
    }

    fn end(&mut self, ground: &mut Ground<'_>) -> Result<Vec<String>> {
        ground.settle();
        let mut remarks = vec![format!(
            "a start and a sync make {}; {} were hit, {} did not come again",
            self.counted(),
            self.done,
            self.missed
        )];
        if self.what == What::Fail {
            remarks.push(format!(
                "{} times the agent ended with a reason ({} of them a library's panic), else it went on",
                self.ended, self.of_library
            ));
        }
        Ok(remarks)
    }
}

/// Whether it has ended because a library unwraps an error: that says why, and is not ours to fix.
fn is_of_library(said: &str) -> bool {
    let place = said.split_once("panicked at ").and_then(|(_, rest)| rest.split_whitespace().next());
    place.is_some_and(|place| place.contains("/.cargo/registry/"))
}

/// The end of what an agent has said.
fn last_lines(log: &str) -> &str {
    let from = log.trim_end().rmatch_indices('\n').nth(5).map_or(0, |(at, _)| at + 1);
    log[from..].trim_end()
}

/// Starts a traced agent, has it make a sync, and ends it if it has not ended. Nothing if it did neither serve what is
/// published nor end; that is counted as lost.
fn run(ground: &mut Ground<'_>, step: &str, at: Option<(&Site, Act)>) -> Result<Option<Traced>> {
    ground.clients.step(step);
    // So that the start has something to write, too.
    ground.move_to(&COMING[..2])?;
    let mut command = ground.agent.run_command()?;
    // Its last words are its reason.
    command.env("RUST_BACKTRACE", "0");
    let place = ground.agent.place().clone();
    let (started, starts) = channel();
    std::thread::scope(|scope| {
        let tracer = scope.spawn(move || trace::run(&place, command, at, &started));
        let pid = starts.recv().map_err(|_| anyhow!("it was not started"));
        let lived = pid.as_ref().ok().map(|pid| live(ground, *pid, || tracer.is_finished()));
        if let Ok(pid) = pid {
            // It may have ended by itself; as long as the tracer has not reaped it the id is its own.
            if !tracer.is_finished() {
                kill(pid, Signal::SIGKILL).ok();
            }
        }
        let traced = tracer.join().map_err(|_| anyhow!("the tracer panicked"))?;
        let traced = traced.with_context(|| format!("tracing an agent: {step}"))?;
        if let Some(Err(error)) = lived {
            let (begun, log) = (now_ms(), ground.agent.log_text());
            let outcome = Err(error.context(format!("its last words: {}", last_lines(&log))));
            ground.clients.note("the agent", "tables as published, or its end", begun, outcome);
            return Ok(None);
        }
        Ok(Some(traced))
    })
}

/// A start, and a sync; less of it if the agent ends.
fn live(ground: &mut Ground<'_>, pid: Pid, ended: impl Fn() -> bool) -> Result<()> {
    let id = u32::try_from(pid.as_raw()).ok();
    let until = |check: &dyn Fn() -> Result<()>| eventually(SOON, || if ended() { Ok(()) } else { check() });
    until(&|| ground.agent.is_ready(id)).context("it does not get ready")?;
    if ended() {
        return Ok(());
    }
    ground.move_to(&COMING[2..])?;
    until(&|| ground.is_in_line()).context("it does not write what is new")?;
    if !ended() {
        std::thread::sleep(AFTER);
    }
    Ok(())
}
