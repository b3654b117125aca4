//! The ranges of the queries that are sent together, where all of their answers are kept.
//!
//! A server has to find all extents of a range, so the length of a range follows the number of extents in the answers. The
//! number of queries at the same time follows the time that the answers take. A server whose answers end before their
//! ranges do gets one query at a time: answers to further ranges would leave gaps, and the gaps would be asked again.

use std::ops::Range;
use std::time::Duration;

use super::kept::KeptExtents;
use crate::map::Extent;
use crate::units::Bytes;

/// The length of the first ranges, and the longest one after a query failed.
const FIRST_LENGTH: u64 = 64 << 20;
/// The length of the shortest range.
const MIN_LENGTH: u64 = 1 << 20;
/// The number of the first queries.
const FIRST_COUNT: usize = 4;
/// The largest number of queries at the same time: that of the client of NBD exports.
const MAX_COUNT: usize = 16;
/// The number of extents that one answer should have at most.
const ENOUGH_EXTENTS: u64 = 4096;
/// The factor by which the length grows where answers have few extents.
const GROWTH: u64 = 16;
/// Answers that take less time are followed by more queries at the same time.
const FAST: Duration = Duration::from_millis(250);
/// Answers that take more time are followed by fewer queries at the same time, and not by longer ones.
const SLOW: Duration = Duration::from_secs(1);

/// The length and the number of the next queries.
pub(super) struct QueriesAhead {
    length: u64,
    count: usize,
}

impl Default for QueriesAhead {
    fn default() -> Self {
        Self { length: FIRST_LENGTH, count: FIRST_COUNT }
    }
}

impl QueriesAhead {
    /// The ranges of the next queries, of what is not kept: the first one begins at `start`, a multiple of `block`.
    pub(super) fn ranges(
        &self,
        kept: &KeptExtents,
        rest: Range<Bytes>,
        block: Bytes,
        longest: Bytes,
    ) -> Vec<Range<Bytes>> {
        let length = Bytes::new(self.length).min(longest);
        let mut ranges = Vec::new();
        let mut start = rest.start;
        while ranges.len() < self.count && start < rest.end {
            // The end of a kept extent may lie within a block.
            let end = kept.unknown(start, rest.end).map_or(rest.end, |unknown| unknown.end);
            let end = end.align_up(block).unwrap_or(rest.end).min(start.saturating_add(length)).min(rest.end);
            ranges.push(start..end);
            start = kept.unknown(end, rest.end).map_or(rest.end, |unknown| unknown.start.align_down(block));
        }
        ranges
    }

    /// Chooses the next length and number after answers to `ranges`, which took `took` together. Failed ones are `None`.
    pub(super) fn adapt(&mut self, ranges: &[Range<Bytes>], answers: &[Option<&[Extent]>], took: Duration) {
        if answers.contains(&None) {
            self.length = self.length.min(FIRST_LENGTH);
            self.count = 1;
            return;
        }
        let answers = ranges.iter().zip(answers.iter().flatten());
        if let Some((range, extents)) = answers.clone().find(|(range, extents)| !reaches(extents, range.end)) {
            self.count = 1;
            self.set_length(extents.last().map_or(Bytes::ZERO, |last| last.end.saturating_sub(range.start)));
            return;
        }
        let Some((range, extents)) = answers.max_by_key(|(_, extents)| extents.len()) else { return };
        let most = extents.len() as u64;
        if most > ENOUGH_EXTENTS {
            let enough = range.end.saturating_sub(range.start).get() / most * ENOUGH_EXTENTS;
            self.set_length(Bytes::new(enough));
        } else if most <= ENOUGH_EXTENTS / GROWTH && took < SLOW {
            self.set_length(Bytes::new(self.length.saturating_mul(GROWTH)));
        }
        if took < FAST {
            self.count = (self.count * 2).min(MAX_COUNT);
        } else if took > SLOW {
            self.count = (self.count / 2).max(1);
        }
    }

    /// Lengths are multiples of every minimum block size.
    fn set_length(&mut self, length: Bytes) {
        self.length = length.get().max(MIN_LENGTH) / MIN_LENGTH * MIN_LENGTH;
    }
}

fn reaches(extents: &[Extent], end: Bytes) -> bool {
    extents.last().is_some_and(|last| last.end >= end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::ExtentKind;

    const LEN: Bytes = Bytes::new(1 << 50);
    const LONGEST: Bytes = Bytes::new((4 << 30) - (64 << 10));
    const BLOCK: Bytes = Bytes::new(4096);

    fn ranges(ahead: &QueriesAhead, kept: &KeptExtents, start: u64) -> Vec<Range<Bytes>> {
        ahead.ranges(kept, Bytes::new(start)..LEN, BLOCK, LONGEST)
    }

    /// Answers of `count` extents, the last of which ends `short` bytes before its range.
    fn answers(ranges: &[Range<Bytes>], count: u64, short: u64) -> Vec<Vec<Extent>> {
        let answer = |range: &Range<Bytes>| {
            let end = range.end.saturating_sub(Bytes::new(short));
            let part = end.saturating_sub(range.start).get() / count;
            let ends = (1..count).map(|index| range.start.saturating_add(Bytes::new(index * part)));
            ends.chain([end]).map(|end| Extent { end, kind: ExtentKind::Hole }).collect()
        };
        ranges.iter().map(answer).collect()
    }

    fn adapt(ahead: &mut QueriesAhead, count: u64, short: u64, took: Duration) {
        let ranges = ranges(ahead, &KeptExtents::new(LEN), 0);
        let answers = answers(&ranges, count, short);
        ahead.adapt(&ranges, &answers.iter().map(|answer| Some(&**answer)).collect::<Vec<_>>(), took);
    }

    #[test]
    fn ranges_are_adjacent_and_omit_what_is_kept() {
        let (ahead, mut kept) = (QueriesAhead::default(), KeptExtents::new(LEN));
        let at = |range: Range<u64>| Bytes::new(range.start * FIRST_LENGTH)..Bytes::new(range.end * FIRST_LENGTH);
        assert_eq!(ranges(&ahead, &kept, 0), [at(0..1), at(1..2), at(2..3), at(3..4)]);
        let hole = |end| [Extent { end, kind: ExtentKind::Hole }];
        kept.keep(at(1..3).start, &hole(at(1..3).end));
        kept.keep(at(4..5).start, &hole(Bytes::new(4 * FIRST_LENGTH + 100)));
        let next = Bytes::new(4 * FIRST_LENGTH)..Bytes::new(5 * FIRST_LENGTH);
        assert_eq!(ranges(&ahead, &kept, 0), [at(0..1), at(3..4), next, at(5..6)], "whole blocks");
        let last = ahead.ranges(&kept, at(6..7).start..Bytes::new(6 * FIRST_LENGTH + 5), BLOCK, LONGEST);
        assert_eq!(last, [Bytes::new(6 * FIRST_LENGTH)..Bytes::new(6 * FIRST_LENGTH + 5)], "the end of the device");
    }

    #[test]
    fn few_extents_make_ranges_longer_and_many_make_them_shorter() {
        let mut ahead = QueriesAhead::default();
        for (length, count) in [(16 * FIRST_LENGTH, 8), (256 * FIRST_LENGTH, 16), (4096 * FIRST_LENGTH, 16)] {
            adapt(&mut ahead, 3, 0, Duration::ZERO);
            assert_eq!((ahead.length, ahead.count), (length, count));
        }
        assert!(
            ranges(&ahead, &KeptExtents::new(LEN), 0).iter().all(|range| range.end <= Bytes::new(16 * LONGEST.get()))
        );
        let mut ahead = QueriesAhead::default();
        adapt(&mut ahead, 2 * ENOUGH_EXTENTS, 0, FAST);
        assert_eq!((ahead.length, ahead.count), (FIRST_LENGTH / 2, FIRST_COUNT), "neither fast nor slow");
    }

    #[test]
    fn slow_answers_are_followed_by_fewer_queries() {
        let mut ahead = QueriesAhead::default();
        for count in [2, 1, 1] {
            adapt(&mut ahead, 3, 0, 2 * SLOW);
            assert_eq!((ahead.length, ahead.count), (FIRST_LENGTH, count));
        }
        adapt(&mut ahead, 3, 0, FAST);
        assert_eq!((ahead.length, ahead.count), (GROWTH * FIRST_LENGTH, 1));
    }

    #[test]
    fn short_and_failed_answers_are_followed_by_one_query() {
        let mut ahead = QueriesAhead::default();
        adapt(&mut ahead, 1, FIRST_LENGTH / 2, Duration::ZERO);
        assert_eq!((ahead.length, ahead.count), (FIRST_LENGTH / 2, 1));
        let mut ahead = QueriesAhead { length: 16 * FIRST_LENGTH, count: MAX_COUNT };
        let ranges = ranges(&ahead, &KeptExtents::new(LEN), 0);
        ahead.adapt(&ranges, &[None], Duration::ZERO);
        assert_eq!((ahead.length, ahead.count), (FIRST_LENGTH, 1));
    }
}
