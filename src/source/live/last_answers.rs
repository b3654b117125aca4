//! The extents of the last answers of a device, as a hint of where its data may be.
//!
//! No hole rests on them. A device may have been written since, so they serve only to choose what to read in advance.

use std::collections::BTreeMap;

use crate::map::Extent;
use crate::units::Bytes;

/// The number of extents that are kept at most. At one more, all earlier ones are dropped.
const MAX_EXTENTS: usize = 64 << 10;

/// The extents of the last answers, by their starts. They do not overlap.
#[derive(Default)]
pub(super) struct LastAnswers(BTreeMap<Bytes, Extent>);

impl LastAnswers {
    /// Adds an answer of consecutive extents, the first of which begins at `start`, in place of what was known about its
    /// range.
    pub(super) fn add(&mut self, start: Bytes, extents: &[Extent]) {
        let extents = &extents[..extents.len().min(MAX_EXTENTS)];
        let Some(end) = extents.last().map(|last| last.end).filter(|&end| start < end) else { return };
        self.remove(start, end);
        if self.0.len() + extents.len() > MAX_EXTENTS {
            self.0.clear();
        }
        let mut at = start;
        for extent in extents {
            self.0.insert(at, *extent);
            at = extent.end;
        }
    }

    /// Forgets everything if an answer of consecutive extents from `start` on is not what was expected: the device has been
    /// written, perhaps elsewhere too.
    pub(super) fn check(&mut self, start: Bytes, extents: &[Extent]) {
        let mut at = start;
        for extent in extents {
            let expected = self.extent_at(at);
            // The last extent of an answer may end before its true end.
            if !expected.is_some_and(|expected| expected.kind == extent.kind && extent.end <= expected.end) {
                return self.0.clear();
            }
            at = extent.end;
        }
    }

    /// The extent that holds `offset`. Its end may be before its true end, or after it.
    pub(super) fn extent_at(&self, offset: Bytes) -> Option<Extent> {
        let (_, extent) = self.0.range(..=offset).next_back()?;
        (extent.end > offset).then_some(*extent)
    }

    /// The end of the extent that is expected to follow the one that holds `offset`, if much is known of what follows: at
    /// least `enough` extents from `offset` on, or all up to `len`.
    pub(super) fn end_of_next(&self, offset: Bytes, enough: usize, len: Bytes) -> Option<Bytes> {
        let first = self.extent_at(offset)?;
        let (mut end, mut next_end) = (first.end, first.end);
        for (index, (start, extent)) in (1..).zip(self.0.range(first.end..).take(enough)) {
            if *start != end {
                return None;
            }
            end = extent.end;
            if index == 1 {
                next_end = end;
            }
            if index == enough {
                return Some(next_end);
            }
        }
        (end >= len).then_some(next_end)
    }

    /// The memory that the extents take.
    pub(super) fn memory(&self) -> Bytes {
        // The nodes of a tree are half full at worst.
        let bytes = self.0.len().saturating_mul(2 * size_of::<(Bytes, Extent)>());
        Bytes::new(u64::try_from(bytes).unwrap_or(u64::MAX))
    }

    /// Forgets a range. Extents that begin before it or end behind it are cut.
    fn remove(&mut self, start: Bytes, end: Bytes) {
        let before = self.0.range_mut(..start).next_back();
        let mut behind = None;
        if let Some((_, extent)) = before.filter(|(_, extent)| extent.end > start) {
            behind = (extent.end > end).then_some(*extent);
            extent.end = start;
        }
        while let Some((&first, &extent)) = self.0.range(start..end).next() {
            self.0.remove(&first);
            behind = (extent.end > end).then_some(extent);
        }
        if let Some(extent) = behind {
            self.0.insert(end, extent);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::ExtentKind::{self, Data, Hole};

    fn extents(ends: &[(u64, ExtentKind)]) -> Vec<Extent> {
        ends.iter().map(|&(end, kind)| Extent { end: Bytes::new(end), kind }).collect()
    }

    fn at(answers: &LastAnswers, offset: u64) -> Option<(u64, ExtentKind)> {
        answers.extent_at(Bytes::new(offset)).map(|extent| (extent.end.get(), extent.kind))
    }

    #[test]
    fn the_newest_answer_about_an_offset_is_expected() {
        let mut answers = LastAnswers::default();
        assert_eq!(at(&answers, 0), None);
        answers.add(Bytes::new(10), &extents(&[(20, Data), (30, Hole), (40, Data), (50, Hole), (60, Data)]));
        assert_eq!(
            [10, 19, 20, 45, 59].map(|offset| at(&answers, offset)),
            [Some((20, Data)), Some((20, Data)), Some((30, Hole)), Some((50, Hole)), Some((60, Data)),]
        );
        assert_eq!((at(&answers, 9), at(&answers, 60)), (None, None), "before and after the answer");
        answers.add(Bytes::new(33), &extents(&[(40, Hole), (45, Data)]));
        assert_eq!(
            [30, 32, 33, 40, 44, 45, 50].map(|offset| at(&answers, offset)),
            [
                Some((33, Data)),
                Some((33, Data)),
                Some((40, Hole)),
                Some((45, Data)),
                Some((45, Data)),
                Some((50, Hole)),
                Some((60, Data)),
            ]
        );
        // Within one extent.
        answers.add(Bytes::new(52), &extents(&[(54, Hole)]));
        assert_eq!(
            [51, 52, 54].map(|offset| at(&answers, offset)),
            [Some((52, Data)), Some((54, Hole)), Some((60, Data)),]
        );
        answers.add(Bytes::new(70), &extents(&[(60, Data)]));
        answers.add(Bytes::new(70), &[]);
        assert_eq!(at(&answers, 70), None, "an answer without extents");
    }

    #[test]
    fn the_end_of_the_next_extent_is_known_where_much_that_follows_is() {
        let mut answers = LastAnswers::default();
        answers.add(Bytes::ZERO, &extents(&[(10, Data), (20, Hole), (30, Data), (40, Hole)]));
        let end = |answers: &LastAnswers, offset, enough| {
            answers.end_of_next(Bytes::new(offset), enough, Bytes::new(100)).map(Bytes::get)
        };
        assert_eq!([0, 5, 10, 20].map(|offset| end(&answers, offset, 2)), [Some(20), Some(20), Some(30), None]);
        assert_eq!((end(&answers, 0, 3), end(&answers, 0, 4), end(&answers, 40, 1)), (Some(20), None, None));
        answers.add(Bytes::new(50), &extents(&[(100, Data)]));
        assert_eq!((end(&answers, 20, 2), end(&answers, 30, 9)), (None, None), "a gap");
        answers.add(Bytes::new(40), &extents(&[(50, Data)]));
        assert_eq!((end(&answers, 20, 9), end(&answers, 60, 9)), (Some(40), Some(100)), "up to the end of the device");
    }

    #[test]
    fn an_answer_that_was_not_expected_ends_all_expectations() {
        let answer = || {
            let mut answers = LastAnswers::default();
            answers.add(Bytes::ZERO, &extents(&[(10, Data), (20, Hole), (30, Data)]));
            answers
        };
        for (checked, holds) in [
            (extents(&[(10, Data), (20, Hole)]), true),
            (extents(&[(10, Data), (15, Hole)]), true),
            (extents(&[(10, Hole), (20, Hole)]), false),
            (extents(&[(12, Data)]), false),
            (extents(&[(10, Data), (30, Hole)]), false),
            (extents(&[(10, Data), (20, Hole), (30, Data), (40, Hole)]), false),
        ] {
            let mut answers = answer();
            answers.check(Bytes::ZERO, &checked);
            assert_eq!(at(&answers, 25).is_some(), holds, "{checked:?}");
        }
    }

    #[test]
    fn random_answers_equal_a_table() {
        let mut random = xorshift(1);
        let (mut answers, mut table) = (LastAnswers::default(), [None; 64]);
        for _ in 0..2000 {
            let start = random() % 60;
            let len = 1 + random() % (64 - start);
            let kind = if random().is_multiple_of(2) { Data } else { Hole };
            answers.add(Bytes::new(start), &extents(&[(start + len, kind)]));
            (start..start + len).for_each(|at| table[usize::try_from(at).unwrap()] = Some(kind));
            for (offset, kind) in (0..).zip(table) {
                assert_eq!(at(&answers, offset).map(|found| found.1), kind);
            }
        }
    }

    /// Marsaglia's xorshift, a sequence of numbers that looks random.
    fn xorshift(seed: u64) -> impl FnMut() -> u64 {
        let mut state = seed;
        move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state >> 16
        }
    }

    #[test]
    fn the_number_of_extents_is_bounded() {
        let mut answers = LastAnswers::default();
        let many: Vec<Extent> = (1..=100_000).map(|end| Extent { end: Bytes::new(end), kind: Data }).collect();
        for start in [0, 1 << 30, 2 << 30] {
            let moved =
                many.iter().map(|extent| Extent { end: extent.end.saturating_add(Bytes::new(start)), ..*extent });
            answers.add(Bytes::new(start), &moved.collect::<Vec<_>>());
            assert_eq!(answers.0.len(), MAX_EXTENTS);
        }
        assert!(at(&answers, 0).is_none() && at(&answers, 2 << 30).is_some(), "the earlier ones are dropped");
    }
}
