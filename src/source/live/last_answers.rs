//! The extents of the last answers of a device, as a hint of where its data may be.
//!
//! No hole rests on them. A device may have been written since, so they serve only to choose what to read in advance.

use std::collections::VecDeque;
use std::ops::Range;

use crate::map::Extent;
use crate::units::Bytes;

/// The number of answers that are kept: several programs may go through a device at the same time.
const MAX_ANSWERS: usize = 4;
/// The number of extents of one answer that are kept.
const MAX_EXTENTS: usize = 1024;

/// The last answers, the newest last.
#[derive(Default)]
pub(super) struct LastAnswers(VecDeque<LastAnswer>);

/// Consecutive extents, from `start` on.
struct LastAnswer {
    start: Bytes,
    extents: Vec<Extent>,
}

impl LastAnswers {
    /// Adds an answer of consecutive extents, the first of which begins at `start`.
    pub(super) fn add(&mut self, start: Bytes, extents: &[Extent]) {
        if self.0.len() >= MAX_ANSWERS {
            self.0.pop_front();
        }
        let extents = extents[..extents.len().min(MAX_EXTENTS)].to_vec();
        self.0.push_back(LastAnswer { start, extents });
    }

    /// The first ranges of data at or after `from`, at most `limit`, in the newest answer about `from`. The first one
    /// begins at `from` where that is data.
    pub(super) fn data_from(&self, from: Bytes, limit: usize) -> Vec<Range<Bytes>> {
        let is_about = |answer: &&LastAnswer| answer.start <= from && from < answer.end();
        let Some(answer) = self.0.iter().rev().find(is_about) else { return Vec::new() };
        answer
            .data()
            .filter(|range| range.end > from)
            .take(limit)
            .map(|range| range.start.max(from)..range.end)
            .collect()
    }

    /// The memory that the answers take.
    pub(super) fn memory(&self) -> Bytes {
        let extents: usize = self.0.iter().map(|answer| answer.extents.capacity()).sum();
        Bytes::new(extents.saturating_mul(size_of::<Extent>()) as u64)
    }
}

impl LastAnswer {
    fn end(&self) -> Bytes {
        self.extents.last().map_or(self.start, |extent| extent.end)
    }

    fn data(&self) -> impl Iterator<Item = Range<Bytes>> {
        let starts = std::iter::once(self.start).chain(self.extents.iter().map(|extent| extent.end));
        let ranges = starts.zip(&self.extents);
        ranges.filter(|(_, extent)| extent.kind.is_data()).map(|(start, extent)| start..extent.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::ExtentKind;

    fn extents(ends: &[(u64, ExtentKind)]) -> Vec<Extent> {
        ends.iter().map(|&(end, kind)| Extent { end: Bytes::new(end), kind }).collect()
    }

    fn data(answers: &LastAnswers, from: u64, limit: usize) -> Vec<(u64, u64)> {
        let ranges = answers.data_from(Bytes::new(from), limit).into_iter();
        ranges.map(|range| (range.start.get(), range.end.get())).collect()
    }

    #[test]
    fn the_data_of_the_newest_answer_about_an_offset_is_expected() {
        use ExtentKind::{Data, Hole};
        let mut answers = LastAnswers::default();
        assert_eq!(data(&answers, 0, 9), []);
        answers.add(Bytes::new(10), &extents(&[(20, Data), (30, Hole), (40, Data), (50, Hole), (60, Data)]));
        assert_eq!(data(&answers, 10, 9), [(10, 20), (30, 40), (50, 60)]);
        assert_eq!(data(&answers, 15, 2), [(15, 20), (30, 40)]);
        assert_eq!(data(&answers, 45, 9), [(50, 60)]);
        assert_eq!(data(&answers, 9, 9), [], "before the answer");
        assert_eq!(data(&answers, 60, 9), [], "after the answer");
        answers.add(Bytes::new(30), &extents(&[(40, Hole), (70, Data)]));
        assert_eq!(data(&answers, 30, 9), [(40, 70)]);
        assert_eq!(data(&answers, 20, 9), [(30, 40), (50, 60)], "the newest one begins later");
    }

    #[test]
    fn the_number_of_answers_and_of_their_extents_is_bounded() {
        let mut answers = LastAnswers::default();
        let many: Vec<Extent> = (1..=3000).map(|end| Extent { end: Bytes::new(end), kind: ExtentKind::Data }).collect();
        for _ in 0..10 {
            answers.add(Bytes::ZERO, &many);
        }
        assert_eq!(answers.0.len(), MAX_ANSWERS);
        assert_eq!(answers.memory(), Bytes::new((MAX_ANSWERS * MAX_EXTENTS * size_of::<Extent>()) as u64));
    }
}
