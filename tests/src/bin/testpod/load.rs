//! A steady load of new connections.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use proxy_tests::answer::{Answer, Load};

use crate::client::{Client, Failure, Target};
use crate::stdin::{Order, Orders};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    target: Target,
    /// Ends by itself after this time.
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
    /// New connections a second, over all workers.
    #[arg(long, default_value_t = 200.0)]
    rate: f64,
    /// Connections at the same time.
    #[arg(long, default_value_t = 4)]
    concurrency: u32,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let total = Arc::new(Mutex::new(Load::default()));
    let ended = Arc::new(AtomicBool::new(false));
    let concurrency = arguments.concurrency.max(1);
    let pause = Duration::from_secs_f64(f64::from(concurrency) / arguments.rate.max(0.1));
    let workers: Vec<_> = (0..concurrency)
        .map(|_| {
            let (target, total, ended) = (arguments.target.clone(), total.clone(), ended.clone());
            std::thread::spawn(move || work(&target, pause, &total, &ended))
        })
        .collect();
    let orders = Orders::listen(arguments.seconds);
    loop {
        match orders.within(Duration::from_secs(3600)) {
            Some(Order::Stop) => break,
            Some(Order::Report) => crate::print(&*total.lock().unwrap_or_else(PoisonError::into_inner))?,
            Some(Order::Drain) | None => {}
        }
    }
    ended.store(true, Ordering::Relaxed);
    for worker in workers {
        worker.join().map_err(|_| anyhow::anyhow!("a worker panicked"))?;
    }
    crate::print(&*total.lock().unwrap_or_else(PoisonError::into_inner))
}

fn work(target: &Target, pause: Duration, total: &Mutex<Load>, ended: &AtomicBool) {
    let mut next = Instant::now();
    while !ended.load(Ordering::Relaxed) {
        let begun = Instant::now();
        let outcome = Client::open(target).and_then(|mut client| client.exchange()).map(|(answer, _)| answer);
        count(&mut total.lock().unwrap_or_else(PoisonError::into_inner), outcome, begun.elapsed());
        // A slow answer is not made up for with a burst.
        next = (next + pause).max(begun);
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
}

fn count(total: &mut Load, outcome: Result<Answer, Failure>, took: Duration) {
    let took_ms = took.as_secs_f64() * 1000.0;
    match outcome {
        Ok(answer) => {
            total.made += 1;
            *total.names.entry(answer.name).or_default() += 1;
            total.slowest_ms = total.slowest_ms.max(took_ms);
        }
        Err(failure) => {
            total.failed += 1;
            total.slowest_failure_ms = total.slowest_failure_ms.max(took_ms);
            *total.reasons.entry(failure).or_default() += 1;
        }
    }
}
