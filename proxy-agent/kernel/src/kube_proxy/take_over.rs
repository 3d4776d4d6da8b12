//! At the start of `run`, once this proxy does the work: kube-proxy's leftovers go as soon as it has gone.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::{clean_around, leftovers, rewriting, running};
use crate::netlink::nf_tables;
use crate::netlink::request::News;

/// How often it is looked whether kube-proxy has gone.
const AGAIN: Duration = Duration::from_secs(5);
/// How often it is looked whether an operator has done something about what stays.
const LATER: Duration = Duration::from_secs(60);
/// How often it is looked whether somebody has flushed all of nftables, which a firewall does when it is loaded again, besides
/// when the kernel tells of a change.
const OFTEN: Duration = Duration::from_secs(1);
/// How soon it is noticed that something has changed.
const SLICE: Duration = Duration::from_millis(200);
/// Why everything stays when it was asked for.
const KEPT: &str = "they stay because of --remove-kube-proxy-rules=false; once kube-proxy is gone, start this agent \
                    without that flag";

/// The taking over: begun once, asked for what stands in its way.
#[derive(Clone, Debug, Default)]
pub struct TakeOver {
    /// `None` before it has begun.
    lines: Arc<Mutex<Option<Vec<String>>>>,
    /// Rules are left alone for now: they serve the node.
    keep: Arc<AtomicBool>,
    /// Connections of others than the node itself that netfilter still goes on with.
    left: Arc<AtomicUsize>,
    /// What is to be done with rules has changed.
    woken: Arc<AtomicBool>,
}

impl TakeOver {
    /// Looks after leftovers from a thread of its own until there are none.
    pub fn begin(&self, remove: bool) -> io::Result<()> {
        if self.lock().replace(Vec::new()).is_some() {
            return Ok(());
        }
        let shared = self.clone();
        std::thread::Builder::new().name("take-over".into()).spawn(move || shared.run(remove)).map(drop)
    }

    /// Leaves rules alone, or no longer.
    pub fn keep(&self, keep: bool) {
        if self.keep.swap(keep, Ordering::Relaxed) != keep {
            self.woken.store(true, Ordering::Relaxed);
        }
    }

    /// Waits so long, or until it is to be looked again: with connections that netfilter is kept rewriting also when it is not
    /// any more.
    fn wait(&self, long: Duration, rewriting: bool, news: &mut Option<News>) {
        let (begun, mut looked) = (Instant::now(), Instant::now());
        while begun.elapsed() < long && !self.woken.swap(false, Ordering::Relaxed) {
            let changed = match news.as_mut().filter(|_| rewriting).map(News::wait) {
                Some(Ok(changed)) => changed,
                // Without news it is looked now and then.
                Some(Err(_)) | None => {
                    std::thread::sleep(SLICE);
                    false
                }
            };
            if rewriting && (changed || looked.elapsed() >= OFTEN) {
                looked = Instant::now();
                if rewriting::has_gone() {
                    tracing::warn!(
                        "somebody has removed the nftables tables ebpf-proxy-nat: they are made again"
                    );
                    return;
                }
            }
        }
    }

    /// So many connections of others than the node itself are still netfilter's.
    pub fn left(&self, count: usize) {
        self.left.store(count, Ordering::Relaxed);
    }

    /// What is still there of kube-proxy, and why.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        self.lock().clone().unwrap_or_default()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Vec<String>>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells what is new, in the log and as warnings.
    fn report(&self, lines: Vec<String>) {
        let mut known = self.lock();
        if known.as_ref() != Some(&lines) {
            lines.iter().for_each(|line| tracing::warn!("{line}"));
            *known = Some(lines);
        }
    }

    fn run(&self, remove: bool) {
        let mut reported = false;
        let mut kept = 0;
        let mut news = nf_tables::news(SLICE).ok();
        loop {
            if self.keep.load(Ordering::Relaxed) {
                self.report(Vec::new());
                self.wait(AGAIN, false, &mut news);
                continue;
            }
            let pause = match running() {
                Some(why) if remove => {
                    if !std::mem::replace(&mut reported, true) {
                        self.report(there_are(&format!(
                            "they stay while {why}, and go when it has ended: delete the DaemonSet kube-proxy in \
                             kube-system"
                        )));
                    }
                    AGAIN
                }
                _ => {
                    // Before the rules go, and as long as there is need.
                    let rules = kept != 0 || remove && !leftovers().is_empty();
                    kept = keep(kept, rules, self.left.load(Ordering::Relaxed));
                    self.report(if remove { what_stays() } else { there_are(KEPT) });
                    LATER
                }
            };
            if self.warnings().is_empty() && pause == LATER && kept == 0 {
                // It may begin once more.
                *self.lock() = None;
                return;
            }
            self.wait(pause, kept != 0, &mut news);
        }
    }
}

/// Has netfilter go on with connections of the node's own and `others`; how many there are, when there were `before`, and there
/// are `rules` to be removed.
fn keep(before: usize, rules: bool, others: usize) -> usize {
    match rewriting::keep(rules, others) {
        Ok(count) => {
            if before == 0 && count != 0 {
                tracing::info!(
                    "netfilter goes on rewriting {count} connections that kube-proxy has begun (nftables tables \
                     ebpf-proxy-nat, which go with the last of them)"
                );
            }
            count
        }
        Err(error) => {
            tracing::warn!(
                "connections that kube-proxy's rules have begun and netfilter still rewrites may end with the rules: {error}"
            );
            before
        }
    }
}

/// What there is, a line each, and why it stays.
fn there_are(why: &str) -> Vec<String> {
    leftovers().into_iter().map(|what| format!("rules of kube-proxy on this node: {what}; {why}")).collect()
}

/// Removes what there is; the rest, a line each.
fn what_stays() -> Vec<String> {
    let led_by_ipvs = rewriting::led_by_ipvs().unwrap_or_else(|error| {
        tracing::warn!("connections that IPVS leads may end with its virtual servers: {error}");
        0
    });
    let done = clean_around(led_by_ipvs);
    for what in done.removed {
        tracing::info!("removed what kube-proxy had left: {what}");
    }
    done.left.into_iter().map(|line| format!("left by kube-proxy: {line}")).collect()
}
