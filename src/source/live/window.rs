//! The lengths of the ranges that queries are about, where a query has a range.
//!
//! A short range is answered fast, and a long one saves queries where extents are long. It also shows what may be read in
//! advance. The length follows the answers: it grows where a range has few extents, and shrinks where it has many.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::map::Extent;
use crate::units::Bytes;

/// The length of the first range, and the longest one after a query failed.
const FIRST_LENGTH: u64 = 64 << 20;
/// The length of the shortest range.
const MIN_LENGTH: u64 = 1 << 20;
/// The factor by which the length grows where one extent fills a range.
const GROWTH: u64 = 16;
/// The factor by which the length grows where a range has few extents.
const SMALL_GROWTH: u64 = 2;
/// The number of extents that one answer should have at most. A server has to find all extents of a range, and the first
/// ones are needed soon.
pub(super) const ENOUGH_EXTENTS: usize = 128;
/// The number of ranges in one query, where an extent is longer than the longest range.
const RANGES: usize = 16;

/// The length of the next range, in bytes.
pub(super) struct QueryWindow(AtomicU64);

impl Default for QueryWindow {
    fn default() -> Self {
        Self(AtomicU64::new(FIRST_LENGTH))
    }
}

impl QueryWindow {
    /// The adjacent ranges of one query at the start of `rest`: one, or several of the length `longest` where an extent
    /// `continues` from before.
    pub(super) fn ranges(&self, rest: Range<Bytes>, longest: Bytes, continues: bool) -> Vec<Range<Bytes>> {
        let length = Bytes::new(self.0.load(Ordering::Relaxed)).min(longest);
        let count = if continues && length == longest { RANGES } else { 1 };
        let mut ranges = Vec::new();
        let mut start = rest.start;
        while ranges.len() < count && start < rest.end {
            // Lengths are multiples of every minimum block size.
            let end = start.saturating_add(length).min(rest.end);
            ranges.push(start..end);
            start = end;
        }
        ranges
    }

    /// Makes the next range longer after an answer of few extents, and shorter after one of many.
    pub(super) fn adapt(&self, ranges: &[Range<Bytes>], extents: &[Extent], longest: Bytes) {
        let (Some(first), Some(last)) = (ranges.first(), ranges.last()) else { return };
        let length = self.0.load(Ordering::Relaxed);
        let next = match extents {
            [extent] if extent.end >= last.end => length.saturating_mul(GROWTH),
            [.., end] if extents.len() <= ENOUGH_EXTENTS / 2 && end.end >= last.end && first.end == last.end => {
                length.saturating_mul(SMALL_GROWTH)
            }
            [.., end] if extents.len() > ENOUGH_EXTENTS => {
                let covered = end.end.saturating_sub(first.start);
                covered.get() / extents.len() as u64 * ENOUGH_EXTENTS as u64
            }
            _ => return,
        };
        let next = Bytes::new(next.max(MIN_LENGTH)).align_down(Bytes::new(MIN_LENGTH));
        self.0.store(next.min(longest).get(), Ordering::Relaxed);
    }

    /// Makes the next range as short as the first one: a failed query may have been about too long a range.
    pub(super) fn reset(&self) {
        self.0.fetch_min(FIRST_LENGTH, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::ExtentKind;

    const LEN: Bytes = Bytes::new(1 << 50);
    const LONGEST: Bytes = Bytes::new((4 << 30) - (64 << 10));

    fn extent(end: u64) -> Extent {
        Extent { end: Bytes::new(end), kind: ExtentKind::Hole }
    }

    #[test]
    fn few_extents_make_the_range_longer_and_many_make_it_shorter() {
        let window = QueryWindow::default();
        let mut ranges = window.ranges(Bytes::ZERO..LEN, LONGEST, true);
        assert_eq!(ranges, vec![Bytes::ZERO..Bytes::new(FIRST_LENGTH)]);
        for _ in 0..2 {
            window.adapt(&ranges, &[extent(LEN.get())], LONGEST);
            ranges = window.ranges(Bytes::ZERO..LEN, LONGEST, false);
        }
        assert_eq!(ranges, vec![Bytes::ZERO..LONGEST]);
        assert_eq!(window.ranges(Bytes::ZERO..LEN, LONGEST, true).len(), RANGES);
        let many: Vec<_> = (1..=256).map(|index| extent(index << 20)).collect();
        window.adapt(&ranges, &many, LONGEST);
        assert_eq!(window.ranges(Bytes::ZERO..LEN, LONGEST, true), vec![Bytes::ZERO..Bytes::new(128 << 20)]);
        window.adapt(&ranges, &many[..2], LONGEST);
        assert_eq!(window.ranges(Bytes::ZERO..Bytes::new(5), LONGEST, true), vec![Bytes::ZERO..Bytes::new(5)]);
    }

    #[test]
    fn few_extents_up_to_the_end_of_a_range_double_it() {
        let window = QueryWindow::default();
        let ranges = window.ranges(Bytes::ZERO..LEN, LONGEST, false);
        window.adapt(&ranges, &[extent(1 << 20), extent(2 << 20)], LONGEST);
        assert_eq!(window.ranges(Bytes::ZERO..LEN, LONGEST, false), ranges, "the answer does not reach the end");
        window.adapt(&ranges, &[extent(1 << 20), extent(FIRST_LENGTH)], LONGEST);
        assert_eq!(window.ranges(Bytes::ZERO..LEN, LONGEST, false), vec![Bytes::ZERO..Bytes::new(2 * FIRST_LENGTH)]);
    }

    #[test]
    fn after_a_failure_the_range_is_as_short_as_the_first() {
        let window = QueryWindow::default();
        window.adapt(&[Bytes::ZERO..LONGEST], &[extent(LEN.get())], LONGEST);
        window.reset();
        assert_eq!(window.ranges(Bytes::ZERO..LEN, LONGEST, true), vec![Bytes::ZERO..Bytes::new(FIRST_LENGTH)]);
    }
}
