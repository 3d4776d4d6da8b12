//! Work that waits for the kernel or for others, beside an event loop.
//!
//! Not by tokio's own pool: it panics where no thread can be had, which happens on a node whose processes have used up its
//! process ids. Then the loop itself does the work, and waits.

use std::io;
use std::sync::mpsc::{self, SendError};

use tokio::sync::oneshot;

type Work<T> = Box<dyn FnOnce() -> T + Send>;

/// Has a thread of this name do some work. An error: the work has panicked.
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
            let _ = done.send(work()); // Whoever wanted it may have gone.
        }
    };
    if let Err(error) = start(Box::new(helper)) {
        tracing::warn!("the thread {name} cannot be started, its work is waited for: {error}");
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
