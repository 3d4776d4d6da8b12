//! Reads the kernel's connection tracking again and again, for the sake of source ports (see `datapath::taken`). A large one
//! takes a while to read, so a thread does it.

use std::mem::{Discriminant, discriminant};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use proxy_common::abi::Timeouts;

use agent_kernel::datapath::store::pin::BpfRoot;
use agent_kernel::datapath::store::table::TableError;
use agent_kernel::datapath::tables::taken::{Taken, TakenError};

/// From one reading to the next, at most.
const EVERY: Duration = Duration::from_secs(10);
/// The same when endpoints or addresses have come, or one has failed.
const SOON: Duration = Duration::from_millis(500);
/// Reading is to take no more of a CPU than one part in so many.
const SHARE: u32 = 50;

/// Who reads.
pub(in crate::run) struct Follower {
    state: State,
    every: Duration,
    warning: Arc<Mutex<Option<String>>>,
}

enum State {
    /// Not yet: there is nothing to be masqueraded before the tables are written.
    Idle(Box<Taken>),
    Reading(SyncSender<()>),
    /// There is no thread for it.
    Dead,
}

impl Follower {
    pub(in crate::run) fn open(root: &BpfRoot, timeouts: &Timeouts) -> Result<Self, TableError> {
        // Three times while a note of a conversation lasts that has only just been seen.
        let shortest = timeouts.udp.min(timeouts.tcp_syn).min(timeouts.sctp_init);
        let every = (Duration::from_secs(shortest.into()) / 3).clamp(SOON, EVERY);
        let state = State::Idle(Box::new(Taken::open(root)?));
        Ok(Self { state, every, warning: Arc::default() })
    }

    /// The tables have been written; with `news` there are endpoints or addresses that were not there before. The first time
    /// connection tracking is read before this returns, so that no flow is masqueraded before; later, soon after news.
    pub(in crate::run) fn wrote(&mut self, news: bool) {
        match std::mem::replace(&mut self.state, State::Dead) {
            State::Idle(taken) => self.begin(taken),
            state => {
                if let (State::Reading(wake), true) = (&state, news) {
                    // Full: it has been asked already.
                    wake.try_send(()).ok();
                }
                self.state = state;
            }
        }
    }

    fn begin(&mut self, taken: Box<Taken>) {
        let mut reader = Reader { taken, warning: self.warning.clone(), said: None };
        let mut pause = reader.read(self.every);
        let (wake, woken) = sync_channel(1);
        let every = self.every;
        let work = move || {
            while wait(&woken, pause) {
                pause = reader.read(every);
            }
        };
        match std::thread::Builder::new().name("conntrack".into()).spawn(work) {
            Ok(_) => self.state = State::Reading(wake),
            Err(error) => {
                let line =
                    warning(&format!("the kernel's connection tracking is not read: no thread: {error}"));
                tracing::warn!("{line}");
                *self.warning.lock().unwrap_or_else(PoisonError::into_inner) = Some(line);
            }
        }
    }

    /// What is wrong.
    pub(in crate::run) fn warning(&self) -> Option<String> {
        self.warning.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// How long to wait for the next reading: at least, because the last one took its time, and at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pause {
    least: Duration,
    most: Duration,
}

impl Pause {
    fn after(took: Duration, every: Duration) -> Self {
        let least = SOON.max(took * SHARE);
        Self { least, most: every.max(least) }
    }
}

/// Waits until the next reading is due; false when the agent has ended.
fn wait(woken: &Receiver<()>, pause: Pause) -> bool {
    match woken.recv_timeout(pause.most) {
        Err(RecvTimeoutError::Disconnected) => return false,
        Err(RecvTimeoutError::Timeout) => {}
        Ok(()) => {
            // What comes meanwhile is read with it.
            std::thread::sleep(pause.least);
            woken.try_recv().ok();
        }
    }
    true
}

struct Reader {
    taken: Box<Taken>,
    warning: Arc<Mutex<Option<String>>>,
    /// What was wrong with the last reading: said once, though the numbers in it change.
    said: Option<Discriminant<TakenError>>,
}

impl Reader {
    fn read(&mut self, every: Duration) -> Pause {
        let started = Instant::now();
        let failed = self.taken.follow().err();
        let took = started.elapsed();
        let kind = failed.as_ref().map(discriminant);
        let line = failed.map(|error| warning(&format!("{:#}", anyhow::Error::from(error))));
        if let Some(line) = line.as_ref().filter(|_| kind != self.said) {
            tracing::warn!("{line}");
        }
        self.said = kind;
        let failed = line.is_some();
        *self.warning.lock().unwrap_or_else(PoisonError::into_inner) = line;
        Pause::after(took, if failed { SOON } else { every })
    }
}

fn warning(what: &str) -> String {
    format!(
        "{what}; masqueraded flows may take source ports that somebody else's masquerade uses towards the same endpoint"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_takes_long_reads_less_often() {
        let millis = Duration::from_millis;
        let pause = |took, every| Pause::after(millis(took), millis(every));
        assert_eq!(pause(1, 10_000), Pause { least: millis(500), most: millis(10_000) });
        assert_eq!(pause(100, 10_000), Pause { least: millis(5_000), most: millis(10_000) });
        assert_eq!(pause(1_000, 10_000), Pause { least: millis(50_000), most: millis(50_000) });
        assert_eq!(pause(1, 500), Pause { least: millis(500), most: millis(500) }, "after a failure");
    }

    #[test]
    fn a_wake_is_waited_for_no_longer_than_need_be_and_the_end_ends_it() {
        let pause = Pause { least: Duration::from_millis(1), most: Duration::from_secs(3600) };
        let (wake, woken) = sync_channel(1);
        wake.try_send(()).unwrap();
        assert!(wake.try_send(()).is_err(), "asked already");
        assert!(wait(&woken, pause));
        assert!(wait(&woken, Pause { most: Duration::from_millis(1), ..pause }));
        drop(wake);
        assert!(!wait(&woken, pause));
    }
}
