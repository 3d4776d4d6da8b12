//! How often something may be done: at a steady rate, and some of it at once.

const SECOND_US: u64 = 1_000_000;

/// What may still be done now.
#[derive(Clone, Copy, Debug)]
pub struct Allowance {
    each_us: u64,
    /// When what has been done is paid for.
    paid_us: u64,
}

impl Allowance {
    /// So many a second, and as many at once.
    #[must_use]
    pub const fn per_second(count: u64) -> Self {
        Self { each_us: SECOND_US / count, paid_us: 0 }
    }

    /// Whether it may be done once more.
    pub fn take(&mut self, now_us: u64) -> bool {
        let paid_us = self.paid_us.max(now_us) + self.each_us;
        let may = paid_us <= now_us + SECOND_US;
        if may {
            self.paid_us = paid_us;
        }
        may
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_s_worth_at_once_and_then_as_time_goes_by() {
        let mut allowance = Allowance::per_second(100);
        let mut taken = |now_us| (0..1_000).filter(|_| allowance.take(now_us)).count();
        assert_eq!(taken(5 * SECOND_US), 100);
        assert_eq!(taken(5 * SECOND_US), 0);
        assert_eq!(taken(5 * SECOND_US + 100_000), 10);
        assert_eq!(taken(60 * SECOND_US), 100, "what was not used is not saved up");
    }
}
