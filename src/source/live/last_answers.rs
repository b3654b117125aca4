//! The extents of the last answers of a device, as a hint of where its data may be.
//!
//! No hole rests on them. A device may have been written since, so they serve only to choose what to read in advance.

use std::collections::VecDeque;

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

    /// The rest of the extent that holds `offset` in the newest answer about it.
    pub(super) fn extent_at(&self, offset: Bytes) -> Option<Extent> {
        self.0.iter().rev().find_map(|answer| answer.extent_at(offset))
    }

    /// The memory that the answers take.
    pub(super) fn memory(&self) -> Bytes {
        let extents: usize = self.0.iter().map(|answer| answer.extents.capacity()).sum();
        Bytes::new(extents.saturating_mul(size_of::<Extent>()) as u64)
    }
}

impl LastAnswer {
    fn extent_at(&self, offset: Bytes) -> Option<Extent> {
        let index = self.extents.partition_point(|extent| extent.end <= offset);
        self.extents.get(index).filter(|_| self.start <= offset).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::ExtentKind;

    fn extent(end: u64, kind: ExtentKind) -> Extent {
        Extent { end: Bytes::new(end), kind }
    }

    #[test]
    fn the_extent_of_the_newest_answer_about_an_offset_is_expected() {
        use ExtentKind::{Data, Hole};
        let mut answers = LastAnswers::default();
        let expected = |answers: &LastAnswers, offset| answers.extent_at(Bytes::new(offset));
        assert_eq!(expected(&answers, 0), None);
        answers.add(Bytes::new(10), &[extent(20, Data), extent(30, Hole), extent(40, Data)]);
        let found = [9, 10, 20, 39, 40].map(|offset| expected(&answers, offset));
        assert_eq!(found, [None, Some(extent(20, Data)), Some(extent(30, Hole)), Some(extent(40, Data)), None]);
        answers.add(Bytes::new(30), &[extent(35, Hole), extent(70, Data)]);
        assert_eq!(expected(&answers, 30), Some(extent(35, Hole)));
        assert_eq!(expected(&answers, 20), Some(extent(30, Hole)), "the newest one begins later");
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
