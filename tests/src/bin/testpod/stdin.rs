//! Orders on standard input, one a line. Its end is an order too: whoever started us is gone.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

/// What the starter wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// Print what there is so far.
    Report,
    /// Accept nothing new, keep what is open.
    Drain,
    /// Print the end result and end.
    Stop,
}

/// Receives orders until a moment at which everything ends.
pub(crate) struct Orders {
    orders: Receiver<Order>,
    end: Instant,
}

impl Orders {
    /// Listens on standard input for at most `seconds`.
    pub(crate) fn listen(seconds: f64) -> Self {
        let (sender, orders) = channel();
        std::thread::spawn(move || read(&sender));
        Self { orders, end: Instant::now() + Duration::from_secs_f64(seconds) }
    }

    /// The next order within `wait`, if one comes; [`Order::Stop`] when time is up.
    pub(crate) fn within(&self, wait: Duration) -> Option<Order> {
        let left = self.end.saturating_duration_since(Instant::now());
        match self.orders.recv_timeout(wait.min(left)) {
            Ok(order) => Some(order),
            Err(RecvTimeoutError::Disconnected) => Some(Order::Stop),
            Err(RecvTimeoutError::Timeout) if wait >= left => Some(Order::Stop),
            Err(RecvTimeoutError::Timeout) => None,
        }
    }
}

fn read(sender: &Sender<Order>) {
    for line in std::io::stdin().lines().map_while(Result::ok) {
        let order = match line.trim() {
            "report" => Order::Report,
            "drain" => Order::Drain,
            "stop" => Order::Stop,
            other => {
                eprintln!("testpod: no such order: {other}");
                continue;
            }
        };
        if sender.send(order).is_err() {
            return;
        }
    }
    // A send that fails finds nobody to tell.
    sender.send(Order::Stop).ok();
}
