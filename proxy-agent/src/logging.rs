//! The log: lines go to stderr on a thread of their own, so that who logs never waits, never fails, and never ends by it.
//!
//! stderr may be a file on a full disk, a pipe whose reader has gone, or one that nobody reads. So lines wait in a queue
//! of bounded size. Those that find no room or cannot be written are counted ([`lost`]), and said to be lost as soon as
//! something can be written again.

use std::backtrace::Backtrace;
use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};
use tracing_subscriber::EnvFilter;

/// Who writes.
const THREAD: &str = "log";
/// What may wait to be written, in bytes: some two thousand lines.
const ROOM: usize = 1 << 18;
/// How long the end of the process waits for lines to be written.
const LAST: Duration = Duration::from_secs(1);
/// How long to wait where stderr says "not now".
const PAUSE: Duration = Duration::from_millis(20);

static QUEUE: Queue = Queue::new();

/// Logs to stderr from here on: 0 is what everybody should know, 1 and more for who looks for something. `RUST_LOG`
/// overrides it. Panics are logged, too.
pub fn start(verbose: u8) -> io::Result<()> {
    // Of requests that fail the source tells itself, with what happens next.
    let default = match verbose {
        0 => "info,kube_client=off",
        1 => "info,kube_client=off,proxy_agent=debug,agent_core=debug,agent_kernel=debug,agent_source=debug",
        2 => "debug,proxy_agent=trace,agent_core=trace,agent_kernel=trace,agent_source=trace",
        _ => "trace",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    // Past a limit of the size of files (RLIMIT_FSIZE) the kernel sends this signal, which ends a process; threads to come
    // have it blocked, too.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGXFSZ);
    signals.thread_block().ok();
    let thread = std::thread::Builder::new().name(THREAD.into());
    thread.spawn(|| QUEUE.write_to(|text| nix::unistd::write(io::stderr(), text).map_err(Into::into)))?;
    std::panic::set_hook(Box::new(|panic| {
        let backtrace = Backtrace::capture();
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("without a name");
        let words = format!("thread {name} {panic}\n{backtrace}");
        match name {
            // Nobody else would write it.
            THREAD => drop(nix::unistd::write(io::stderr(), format!("{words}\n").as_bytes())),
            _ => {
                say(&words);
                flush();
            }
        }
    }));
    // A second call (tests) finds the first one's subscriber in place, which is as good.
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| Lines)
        // It would tell stderr itself, which panics where that cannot be written.
        .log_internal_errors(false)
        .with_ansi(io::stderr().is_terminal())
        .try_init()
        .ok();
    Ok(())
}

/// Writes a line as it is, whatever is logged.
pub fn say(line: &str) {
    QUEUE.push(format!("{line}\n").as_bytes());
}

/// Waits until all has been written, but not for long.
pub fn flush() {
    QUEUE.flush(LAST);
}

/// Lines that could not be written.
#[must_use]
pub fn lost() -> u64 {
    QUEUE.lost.load(Ordering::Relaxed)
}

/// What each event is written to, all of it in one call.
struct Lines;

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        QUEUE.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Lines on their way.
struct Queue {
    waiting: Mutex<Waiting>,
    changed: Condvar,
    lost: AtomicU64,
}

struct Waiting {
    text: Vec<u8>,
    /// Whether what was taken last is still being written.
    writing: bool,
}

impl Queue {
    const fn new() -> Self {
        Self {
            waiting: Mutex::new(Waiting { text: Vec::new(), writing: false }),
            changed: Condvar::new(),
            lost: AtomicU64::new(0),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more line; it is lost where there is no room.
    fn push(&self, line: &[u8]) {
        let lost = !self.fits(line);
        self.lost.fetch_add(u64::from(lost), Ordering::Relaxed);
    }

    /// Takes a line if there is room.
    fn fits(&self, line: &[u8]) -> bool {
        let mut waiting = self.lock();
        let fits = waiting.text.len() + line.len() <= ROOM;
        if fits {
            waiting.text.extend_from_slice(line);
            self.changed.notify_all();
        }
        fits
    }

    fn flush(&self, patience: Duration) {
        let is_busy = |waiting: &mut Waiting| waiting.writing || !waiting.text.is_empty();
        drop(self.changed.wait_timeout_while(self.lock(), patience, is_busy));
    }

    /// Writes what comes, for ever.
    fn write_to(&self, mut write: impl FnMut(&[u8]) -> io::Result<usize>) {
        let mut said = 0;
        loop {
            let whole = self.write_next(&mut write);
            let lost = self.lost.load(Ordering::Relaxed);
            if whole && lost > said && self.fits(lost_line(lost).as_bytes()) {
                said = lost;
            }
        }
    }

    /// Waits for lines and writes them; those that cannot be written are lost. Whether there were none.
    fn write_next(&self, write: &mut impl FnMut(&[u8]) -> io::Result<usize>) -> bool {
        let waiting = self.changed.wait_while(self.lock(), |waiting| waiting.text.is_empty());
        let mut waiting = waiting.unwrap_or_else(PoisonError::into_inner);
        waiting.writing = true;
        let text = std::mem::take(&mut waiting.text);
        drop(waiting);
        let mut rest = &text[..];
        while !rest.is_empty() {
            match write(rest) {
                Ok(written) if written != 0 => rest = &rest[written..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Somebody has made it so for all who share it.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(PAUSE),
                Ok(_) | Err(_) => break,
            }
        }
        let lost = rest.iter().filter(|byte| **byte == b'\n').count() as u64;
        self.lost.fetch_add(lost, Ordering::Relaxed);
        self.lock().writing = false;
        self.changed.notify_all();
        rest.is_empty()
    }
}

/// What is said of lost lines when something can be said again.
fn lost_line(lost: u64) -> String {
    let now = jiff::Timestamp::now();
    format!(
        "{now} WARN {lost} lines of the log were lost: stderr took no more; is its disk full, or does nobody read it?\n"
    )
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;
    use std::time::Instant;

    use super::*;

    const LONG: Duration = Duration::from_secs(10);

    /// A queue that is written to a file, which may be full, or blocked.
    struct Bench {
        queue: &'static Queue,
        written: Arc<Mutex<Vec<u8>>>,
        full: Arc<AtomicBool>,
        blocked: Arc<Mutex<()>>,
    }

    impl Bench {
        fn start() -> Self {
            let queue: &'static Queue = Box::leak(Box::new(Queue::new()));
            let bench =
                Self { queue, written: Arc::default(), full: Arc::default(), blocked: Arc::default() };
            let (written, full, blocked) = (bench.written.clone(), bench.full.clone(), bench.blocked.clone());
            std::thread::spawn(move || {
                queue.write_to(move |text| {
                    drop(blocked.lock().unwrap());
                    if full.load(Ordering::Relaxed) {
                        return Err(io::ErrorKind::StorageFull.into());
                    }
                    // Some kinds of files take a part.
                    let part = &text[..text.len().min(7)];
                    written.lock().unwrap().extend_from_slice(part);
                    Ok(part.len())
                });
            });
            bench
        }

        fn text(&self) -> String {
            self.queue.flush(LONG);
            String::from_utf8(self.written.lock().unwrap().clone()).unwrap()
        }

        fn until_said(&self, said: &str) {
            let begun = Instant::now();
            while !self.text().contains(said) {
                assert!(begun.elapsed() < LONG, "{said} is not in {}", self.text());
            }
        }
    }

    #[test]
    fn lines_are_written_whole_and_in_order() {
        let bench = Bench::start();
        for n in 0..1000 {
            bench.queue.push(format!("line {n}\n").as_bytes());
        }
        let expected: String = (0..1000).map(|n| format!("line {n}\n")).collect();
        assert_eq!(bench.text(), expected);
    }

    #[test]
    fn what_a_full_disk_does_not_take_is_counted_and_said_later() {
        let bench = Bench::start();
        bench.full.store(true, Ordering::Relaxed);
        for n in 0..3 {
            bench.queue.push(format!("lost {n}\n").as_bytes());
        }
        bench.queue.flush(LONG);
        assert_eq!(bench.queue.lost.load(Ordering::Relaxed), 3);
        bench.full.store(false, Ordering::Relaxed);
        bench.queue.push(b"kept\n");
        bench.until_said("3 lines of the log were lost");
        assert!(bench.text().starts_with("kept\n"), "{}", bench.text());
    }

    #[test]
    fn who_logs_does_not_wait_for_who_does_not_read() {
        let bench = Bench::start();
        let line = vec![b'x'; 1023].into_iter().chain([b'\n']).collect::<Vec<u8>>();
        let blocked = bench.blocked.lock().unwrap();
        let begun = Instant::now();
        for _ in 0..5000 {
            bench.queue.push(&line);
        }
        let lost = bench.queue.lost.load(Ordering::Relaxed);
        assert!((5000 - 2 * 256..=5000 - 256).contains(&lost), "{lost}");
        bench.queue.flush(Duration::from_millis(10));
        assert!(begun.elapsed() < LONG);
        drop(blocked);
        bench.until_said(&format!("{lost} lines of the log were lost"));
    }
}
