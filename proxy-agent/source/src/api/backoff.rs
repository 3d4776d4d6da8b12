//! Exponential backoff with jitter, so that nodes do not retry in step. (With backon it would
//! not be shorter: its iterators cannot be reset.)

use std::time::Duration;

#[derive(Clone, Debug)]
pub(super) struct Backoff {
    first: Duration,
    longest: Duration,
    next: Duration,
}

impl Backoff {
    /// From the first pause to the longest.
    pub(super) fn new([first, longest]: [Duration; 2]) -> Self {
        Self { first, longest, next: first }
    }

    /// The next pause; jitter takes away up to a half.
    pub(super) fn pause(&mut self) -> Duration {
        let pause = self.next;
        self.next = (pause * 2).min(self.longest);
        pause.mul_f64(0.5 + fastrand::f64() / 2.0)
    }

    pub(super) fn reset(&mut self) {
        self.next = self.first;
    }
}

/// A random time between these two.
pub(super) fn between([least, most]: [Duration; 2]) -> Duration {
    least + (most - least).mul_f64(fastrand::f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest_and_begin_anew() {
        let mut backoff = Backoff::new([Duration::from_millis(800), Duration::from_secs(15)]);
        let pauses: Vec<Duration> = (0..8).map(|_| backoff.pause()).collect();
        for (i, pause) in pauses.iter().enumerate() {
            let whole = Duration::from_millis(800 << i).min(Duration::from_secs(15));
            assert!((whole.mul_f64(0.5)..=whole).contains(pause), "{pauses:?}");
        }
        backoff.reset();
        assert!(backoff.pause() <= Duration::from_millis(800));
        let times = [Duration::from_secs(1), Duration::from_secs(2)];
        assert!((times[0]..=times[1]).contains(&between(times)));
    }
}
