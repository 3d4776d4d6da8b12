//! `retire`: the way back to another proxy. What is new is left to it, what lives goes on, and this says when nothing is left.

use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use proxy_common::abi::config::LEAVE_NEW;
use proxy_common::abi::{Flow, State};

use super::table;
use super::view::{Now, View};
use crate::config::GoDuration;

/// How long a running agent may take to follow.
const FOLLOWS: Duration = Duration::from_secs(15);
/// How often it is looked.
const AGAIN: Duration = Duration::from_millis(200);
/// How often is said how many flows are left.
const SAY: Duration = Duration::from_secs(10);

/// `retire`.
#[derive(Args, Clone, Copy, Debug)]
pub struct RetireArgs {
    /// Wait until no flow is left, at most for so long (such as 10m; without a value as long as it takes); exit 1 if
    /// some are left then.
    #[arg(long, value_name = "DURATION", num_args = 0..=1, require_equals = true, default_missing_value = "0s")]
    pub wait: Option<GoDuration>,
    /// Serve what is new again. Connections that the other proxy has begun meanwhile are taken over.
    #[arg(long, conflicts_with = "wait")]
    pub undo: bool,
}

/// Retires the node's proxy or takes that back; whether all is as it was asked for.
pub(super) fn retire(
    view: &mut dyn View,
    args: RetireArgs,
    there_is_another: bool,
    out: &mut dyn Write,
) -> Result<bool> {
    let running = view.is_running()?;
    view.retire(!args.undo).context("telling the agent")?;
    if args.undo {
        if !running {
            table::write(
                out,
                "retired no longer: no agent runs; `proxy-agent run` serves what is new again\n",
            )?;
            return Ok(true);
        }
        follows(view, false)?;
        table::write(out, "retired no longer: what is new is served again\n")?;
        return Ok(true);
    }
    follows(view, true)?;
    let left = left(view)?;
    table::write(
        out,
        &format!(
            "retired: what is new is left to another proxy; {left} flows go on (connections that were translated at their \
                  socket have none, and need nothing of this proxy)\n"
        ),
    )?;
    if !there_is_another {
        table::write(
            out,
            "warning: nobody serves what is new: there are no rules of a kube-proxy on this node yet\n",
        )?;
    }
    match args.wait {
        None => Ok(true),
        Some(limit) => wait(view, limit.positive(), out),
    }
}

/// Waits until the programs do as they are told.
fn follows(view: &dyn View, retired: bool) -> Result<()> {
    let begun = Instant::now();
    while (view.actual()?.config.flags & LEAVE_NEW != 0) != retired {
        if begun.elapsed() > FOLLOWS {
            bail!(
                "the agent (pid {}) does not follow within {FOLLOWS:?}: see `proxy-agent status` and its log",
                view.agent()?.pid
            );
        }
        std::thread::sleep(AGAIN);
    }
    Ok(())
}

/// Flows that may still carry something.
fn left(view: &dyn View) -> Result<usize> {
    let now = Now::read()?.mono_ns;
    let mut count = 0;
    // Those that are left to netfilter need nothing of this proxy.
    let needs = |flow: &Flow| !flow.is_own() && !flow.is_closed(now) && flow.state == State::LIVE;
    view.flows(&mut |flow| count += usize::from(needs(flow)))?;
    Ok(count)
}

fn wait(view: &dyn View, limit: Option<Duration>, out: &mut dyn Write) -> Result<bool> {
    let (begun, mut said) = (Instant::now(), Instant::now());
    loop {
        let left = left(view)?;
        if left == 0 {
            table::write(
                out,
                "no flow is left: stop the agent, then run `proxy-agent cleanup` to remove its programs\n",
            )?;
            return Ok(true);
        }
        if limit.is_some_and(|limit| begun.elapsed() >= limit) {
            table::write(out, &format!("{left} flows are left: see `proxy-agent conntrack list`\n"))?;
            return Ok(false);
        }
        if said.elapsed() >= SAY {
            said = Instant::now();
            table::write(out, &format!("{left} flows are left\n"))?;
        }
        std::thread::sleep(AGAIN);
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory::small_cluster;
    use super::*;

    fn args(wait: Option<&str>, undo: bool) -> RetireArgs {
        RetireArgs { wait: wait.map(|text| text.parse().unwrap()), undo }
    }

    fn said(memory: &mut super::super::memory::Memory, args: RetireArgs, another: bool) -> (bool, String) {
        let mut out = Vec::new();
        let done = retire(memory, args, another, &mut out).unwrap();
        (done, String::from_utf8(out).unwrap())
    }

    #[test]
    fn it_says_how_many_flows_go_on_and_warns_when_nobody_else_serves() {
        let mut memory = small_cluster();
        let (done, text) = said(&mut memory, args(None, false), true);
        assert!(done && text.contains("3 flows go on") && !text.contains("warning"), "{text}");
        assert_ne!(memory.actual.config.flags & LEAVE_NEW, 0);
        let (_, text) = said(&mut memory, args(None, false), false);
        assert!(text.contains("warning: nobody serves"), "{text}");
        assert!(said(&mut memory, args(None, true), true).1.contains("no longer"));
        assert_eq!(memory.actual.config.flags & LEAVE_NEW, 0);
    }

    #[test]
    fn waiting_ends_with_the_last_flow_or_with_the_time_given() {
        let mut memory = small_cluster();
        let (done, text) = said(&mut memory, args(Some("300ms"), false), true);
        assert!(!done && text.contains("3 flows are left"), "{text}");
        memory.flows.borrow_mut().clear();
        let (done, text) = said(&mut memory, args(Some("0s"), false), true);
        assert!(done && text.contains("no flow is left"), "{text}");
    }
}
