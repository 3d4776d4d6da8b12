//! Blocking work on a thread of its own, beside an event loop.
//!
//! Not on tokio's pool: that panics when no thread can be started, as on a node that has run out of process ids. Here the
//! event loop then does the work itself, and blocks.

use std::io;
use std::sync::mpsc::{self, SendError};

use tokio::sync::oneshot;

type Work<T> = Box<dyn FnOnce() -> T + Send>;

/// Runs work on a thread of this name. An error: the work has panicked.
pub async fn run_blocking<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    let start = |helper| std::thread::Builder::new().name(name.to_owned()).spawn(helper).map(drop);
    on_thread(start, name, Box::new(work)).await
}

async fn on_thread<T: Send + 'static>(
    start: impl FnOnce(Work<()>) -> io::Result<()>,
    name: &str,
    work: Work<T>,
) -> io::Result<T> {
    let (hand_over, handed_over) = mpsc::channel::<Work<T>>();
    let (done, result) = oneshot::channel();
    let helper = move || {
        if let Ok(work) = handed_over.recv() {
            done.send(work()).ok(); // An error: the caller was cancelled.
        }
    };
    if let Err(error) = start(Box::new(helper)) {
        tracing::warn!("the thread {name} cannot be started, its work blocks the event loop: {error}");
    }
    match hand_over.send(work) {
        Ok(()) => result.await.map_err(|_| io::Error::other(format!("the thread {name} has panicked"))),
        Err(SendError(work)) => Ok(work()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_is_done_on_a_thread_of_its_name() {
        let name = || std::thread::current().name().map(ToOwned::to_owned);
        assert_eq!(run_blocking("helper", name).await.unwrap().as_deref(), Some("helper"));
        let error = run_blocking("helper", || -> u8 { panic!("as the test wants it") }).await.unwrap_err();
        assert_eq!(error.to_string(), "the thread helper has panicked");
    }

    #[tokio::test]
    async fn work_is_done_where_no_thread_can_be_had() {
        let none = |_| Err(io::ErrorKind::WouldBlock.into());
        let here = std::thread::current().id();
        let done = on_thread(none, "helper", Box::new(move || std::thread::current().id() == here)).await;
        assert!(done.unwrap());
    }
}
