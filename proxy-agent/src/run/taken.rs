//! Reads the kernel's connection tracking again and again, for the sake of source ports (see `datapath::taken`). A large one
//! takes a while to read, so a thread does it.

use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Error;

use crate::datapath::TableError;
use crate::datapath::pin::BpfRoot;
use crate::datapath::taken::{Taken, TakenError};
use crate::plan::Step;

/// From one reading to the next: well before the shortest note of a conversation ends, after 30 s.
const EVERY: Duration = Duration::from_secs(10);
/// The same when endpoints have come.
const SOON: Duration = Duration::from_millis(500);
/// Reading is to take no more of a CPU than one part in so many.
const SHARE: u32 = 50;

/// Who reads.
pub(super) struct Follower {
    state: State,
    complaint: Arc<Mutex<Option<String>>>,
}

enum State {
    /// Not yet: there is nothing to be masqueraded before the tables are written.
    Idle(Box<Taken>),
    Reading(SyncSender<()>),
    /// There is no thread for it.
    Dead,
}

impl Follower {
    pub(super) fn open(root: &BpfRoot) -> Result<Self, TableError> {
        Ok(Self { state: State::Idle(Box::new(Taken::open(root)?)), complaint: Arc::default() })
    }

    /// The tables have been written. The first time connection tracking is read before this returns, so that no flow is
    /// masqueraded before; later, soon after endpoints have come.
    pub(super) fn wrote(&mut self, steps: &[Step]) {
        match std::mem::replace(&mut self.state, State::Dead) {
            State::Idle(taken) => self.begin(taken),
            state => self.state = state,
        }
        let come = |step: &Step| matches!(step, Step::PutBackend(_, backend) if backend.is_live());
        if let State::Reading(wake) = &self.state
            && steps.iter().any(come)
        {
            // Full: it has been asked already.
            let _ = wake.try_send(());
        }
    }

    fn begin(&mut self, mut taken: Box<Taken>) {
        let mut took = read(&mut taken, &self.complaint);
        let (wake, woken) = sync_channel(1);
        let complaint = self.complaint.clone();
        let work = move || {
            while wait(&woken, took) {
                took = read(&mut taken, &complaint);
            }
        };
        match std::thread::Builder::new().name("conntrack".into()).spawn(work) {
            Ok(_) => self.state = State::Reading(wake),
            Err(error) => say(&self.complaint, &Error::from(error)),
        }
    }

    /// What is wrong.
    pub(super) fn complaint(&self) -> Option<String> {
        self.complaint.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Waits until the next reading is due, after one that took so long; false when the agent has ended.
fn wait(woken: &Receiver<()>, took: Duration) -> bool {
    let share = took * SHARE;
    match woken.recv_timeout(EVERY.max(share)) {
        Err(RecvTimeoutError::Disconnected) => return false,
        Err(RecvTimeoutError::Timeout) => {}
        Ok(()) => {
            // Those that come meanwhile are read with it.
            std::thread::sleep(SOON.max(share));
            let _ = woken.try_recv();
        }
    }
    true
}

/// How long it took.
fn read(taken: &mut Taken, complaint: &Mutex<Option<String>>) -> Duration {
    let started = Instant::now();
    match taken.follow() {
        Ok(_) => *complaint.lock().unwrap_or_else(PoisonError::into_inner) = None,
        Err(error) => say(complaint, &TakenError::into(error)),
    }
    started.elapsed()
}

fn say(complaint: &Mutex<Option<String>>, error: &Error) {
    let line = format!(
        "{error:#}; masqueraded flows may take source ports that somebody else's masquerade uses towards the same endpoint"
    );
    let mut said = complaint.lock().unwrap_or_else(PoisonError::into_inner);
    if said.as_ref() != Some(&line) {
        tracing::warn!("{line}");
        *said = Some(line);
    }
}
