//! Ranges of ports: what is left of them, and which are worth having.

use std::cmp::Reverse;
use std::ops::RangeInclusive;

use proxy_common::abi::{PORT_RANGES, PortRange};

/// `ranges` without the ports in `taken`; neither need be in order.
#[must_use]
pub fn without(ranges: Vec<RangeInclusive<u16>>, taken: &[RangeInclusive<u16>]) -> Vec<RangeInclusive<u16>> {
    let mut left = ranges;
    for out in taken {
        let cut = |range: RangeInclusive<u16>| {
            let (first, last) = (*range.start(), *range.end());
            let below = out.start().checked_sub(1).map(|end| first..=last.min(end));
            let above = out.end().checked_add(1).map(|start| first.max(start)..=last);
            [below, above].into_iter().flatten().filter(|part| !part.is_empty())
        };
        left = left.into_iter().flat_map(cut).collect();
    }
    left
}

/// How many ports there are in ranges that do not overlap.
#[must_use]
pub fn count(ranges: &[RangeInclusive<u16>]) -> usize {
    ranges.iter().map(ExactSizeIterator::len).sum()
}

/// The largest of ranges that do not overlap: as many as the tables have room for.
#[must_use]
pub fn largest(mut ranges: Vec<RangeInclusive<u16>>) -> Vec<PortRange> {
    ranges.sort_by_key(|range| (Reverse(range.len()), *range.start()));
    let ranges = ranges.into_iter().take(PORT_RANGES);
    // All 65536 ports are never meant: port 0 is none.
    let count = |range: &RangeInclusive<u16>| u16::try_from(range.len()).unwrap_or(u16::MAX);
    ranges.map(|range| PortRange { first: *range.start(), count: count(&range) }).collect()
}

/// Ports near each other as one range: each gap of fewer than this many would be a range of its own, of which there
/// is room for few.
const NEAR: u16 = 1_024;

/// Ranges that hold all of some ports, which come in ascending order.
pub(super) fn spans(ports: impl Iterator<Item = u16>) -> Vec<RangeInclusive<u16>> {
    let mut spans: Vec<RangeInclusive<u16>> = Vec::new();
    for port in ports {
        match spans.last_mut() {
            Some(span) if port - span.end() < NEAR => *span = *span.start()..=port,
            _ => spans.push(port..=port),
        }
    }
    spans
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_out_splits_ranges_and_ends_them() {
        let all = || vec![1024..=65535];
        assert_eq!(without(all(), &[30000..=32767]), [1024..=29999, 32768..=65535]);
        assert_eq!(without(all(), &[0..=2000, 60000..=65535, 5000..=5000]), [2001..=4999, 5001..=59999]);
        assert_eq!(without(all(), &[0..=65535]), []);
        assert_eq!(without(vec![1..=5, 10..=15], &[4..=11]), [1..=3, 12..=15]);
        assert_eq!(count(&without(all(), &[2000..=2999])), 64_512 - 1_000);
    }

    #[test]
    fn the_largest_ranges_are_kept_the_largest_first() {
        let ranges = (0..20).map(|n| n * 100..=n * 100 + n).collect();
        let kept: Vec<(u16, u16)> = largest(ranges).iter().map(|range| (range.first, range.count)).collect();
        assert_eq!(kept.len(), PORT_RANGES);
        assert_eq!(kept[0], (1900, 20));
        assert_eq!(kept[7], (1200, 13));
    }

    #[test]
    fn ports_near_each_other_are_one_span() {
        assert_eq!(spans([20_000, 20_500, 21_400, 40_000].into_iter()), [20_000..=21_400, 40_000..=40_000]);
        assert_eq!(spans([].into_iter()), []);
    }
}
