//! `doctor`: is this node ready? Each check has a verdict, and a remedy when it is not good.
//!
//! Everything is read, nothing is changed; the programs are loaded, and let go again. Files are read under a root that
//! tests replace.

mod company;
mod conflict;
mod kernel;

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::status::Status;
use super::table;
use agent_kernel::datapath::attach::others::Others;

/// How a check ended, the worst last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// Works, but not as well as it could, or not for everyone.
    Warn,
    /// Does not work.
    Fail,
}

/// One check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was looked at.
    pub name: &'static str,
    /// How it ended.
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What to do about it; null when nothing.
    pub remedy: Option<String>,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Ok, found: found.into(), remedy: None }
    }

    fn warn(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Warn, found: found.into(), remedy: Some(remedy.into()) }
    }

    fn fail(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Fail, found: found.into(), remedy: Some(remedy.into()) }
    }
}

/// All checks.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Whether none has failed.
    pub ready: bool,
    /// The checks, in the order in which things are needed.
    pub checks: Vec<Check>,
}

/// What became of loading the programs.
#[derive(Clone, Debug)]
pub struct Trial {
    /// How many were loaded, or why one was not: two or three lines, the last of them what to do.
    pub outcome: Result<usize, String>,
    /// What the kernel lacks and is done without, a line each.
    pub fall_backs: Vec<String>,
}

/// The node as the checks see it.
#[derive(Clone, Copy)]
pub struct Node<'a> {
    /// `/`, or what stands for it in a test.
    pub root: &'a Path,
    /// What a kube-proxy has left, a line each.
    pub leftovers: &'a dyn Fn() -> Vec<String>,
    /// Loads the programs without pinning or attaching them.
    pub trial: &'a dyn Fn() -> Trial,
    /// Who else is at our hooks.
    pub others: &'a dyn Fn() -> Others,
    /// Whether some Service asks for direct server return.
    pub direct: &'a dyn Fn() -> bool,
    /// Where pins live or will live.
    pub bpf_root: &'a Path,
}

impl Node<'_> {
    fn path(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    /// A small file without the white space round it.
    fn read(&self, path: &str) -> Option<String> {
        std::fs::read_to_string(self.path(path)).ok().map(|text| text.trim().to_owned())
    }

    /// Names in a directory, sorted.
    fn list(&self, path: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.path(path)).into_iter().flatten().flatten();
        let mut names: Vec<_> = entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    /// Place and type of every mount (proc_pid_mounts(5)).
    fn mounts(&self) -> Vec<(String, String)> {
        let text = self.read("/proc/self/mounts").unwrap_or_default();
        let words = text.lines().map(|line| line.split(' ').skip(1));
        words.filter_map(|mut w| Some((w.next()?.to_owned(), w.next()?.to_owned()))).collect()
    }
}

/// Does every check. `agent` is the agent's status, or why it cannot be told.
#[must_use]
pub fn examine(node: &Node<'_>, object: &[u8], agent: Result<&Status, String>) -> Report {
    let mut checks = vec![embedded(object)];
    checks.extend(kernel::checks(node));
    if !object.is_empty() {
        checks.extend(kernel::programs(&(node.trial)()));
    }
    checks.extend(conflict::checks(node));
    checks.extend(company::checks(node));
    checks.push(running(agent));
    Report { ready: checks.iter().all(|check| check.verdict != Verdict::Fail), checks }
}

fn embedded(object: &[u8]) -> Check {
    const NAME: &str = "BPF object";
    match object.len() {
        0 => Check::fail(
            NAME,
            "this binary was built without the BPF programs",
            "run `cargo xtask build-ebpf`, then build again",
        ),
        n => Check::ok(NAME, format!("embedded, {n} bytes")),
    }
}

fn running(agent: Result<&Status, String>) -> Check {
    const NAME: &str = "agent";
    match agent {
        Err(reason) => Check::fail(
            NAME,
            format!("its tables cannot be read: {reason}"),
            "run doctor as root, with the --bpf-root of the agent",
        ),
        Ok(status) => match status.problems.as_slice() {
            [] => Check::ok(NAME, "running and healthy"),
            [first, ..] if status.agent.is_none() => Check::warn(NAME, &first.text, &first.remedy),
            [first, ..] => Check::fail(NAME, &first.text, &first.remedy),
        },
    }
}

/// The report for a person.
#[must_use]
pub fn text(report: &Report) -> String {
    let mut page = match report.ready {
        true => "this node is ready\n\n".to_owned(),
        false => "this node is not ready\n\n".to_owned(),
    };
    let rows = report.checks.iter().map(|check| {
        let verdict = match check.verdict {
            Verdict::Ok => "ok",
            Verdict::Warn => "warn",
            Verdict::Fail => "FAIL",
        };
        let found = match &check.remedy {
            Some(remedy) => format!("{}\nremedy: {remedy}", check.found),
            None => check.found.clone(),
        };
        vec![verdict.to_owned(), check.name.to_owned(), found]
    });
    page += &table::table(&["VERDICT", "CHECK", "FOUND"], rows.collect());
    page
}

#[cfg(test)]
mod tests;
