//! A bound on how long a disk can keep one question busy.
//!
//! The end of a hole is found by asking where each answer ends, and a disk decides how little each answer says. One that
//! tells a hole block by block would hold a single lseek for hours. So the time that was spent is carried from one end
//! to the next question there.

use std::collections::VecDeque;
use std::time::Duration;

use crate::units::Bytes;

/// How long the disk may take to tell one hole.
const PATIENCE: Duration = Duration::from_secs(2);
/// Walks at the same time that are told apart.
const WALKS: usize = 32;

/// Where walks through holes stand, and the time that each took.
#[derive(Default)]
pub(super) struct Walks {
    at: VecDeque<(Bytes, Duration)>,
}

impl Walks {
    /// The time spent by the walk that stands at `offset`, or `None` when its time is over.
    pub(super) fn join(&mut self, offset: Bytes) -> Option<Duration> {
        let spent = match self.at.iter().position(|(at, _)| *at == offset) {
            Some(index) => self.at.remove(index).map_or(Duration::ZERO, |(_, spent)| spent),
            None => Duration::ZERO,
        };
        (spent < PATIENCE).then_some(spent)
    }

    /// A hole ended at `end`, and its walk took `spent` so far.
    pub(super) fn leave(&mut self, end: Bytes, spent: Duration) {
        if self.at.len() >= WALKS {
            self.at.pop_front();
        }
        self.at.push_back((end, spent));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_walk_ends_when_its_time_is_over_and_others_go_on() {
        let mut walks = Walks::default();
        walks.leave(Bytes::new(10), Duration::from_secs(1));
        walks.leave(Bytes::new(20), Duration::from_secs(3));
        assert_eq!(walks.join(Bytes::new(10)), Some(Duration::from_secs(1)));
        assert_eq!(walks.join(Bytes::new(20)), None);
        // Both have been told: who asks there again begins a new walk.
        assert_eq!(walks.join(Bytes::new(10)), Some(Duration::ZERO));
        assert_eq!(walks.join(Bytes::new(20)), Some(Duration::ZERO));
    }

    #[test]
    fn the_oldest_walk_is_forgotten() {
        let mut walks = Walks::default();
        for end in 0..=WALKS as u64 {
            walks.leave(Bytes::new(end), Duration::from_secs(1));
        }
        assert_eq!(walks.at.len(), WALKS);
        assert_eq!(walks.join(Bytes::ZERO), Some(Duration::ZERO));
        assert_eq!(walks.join(Bytes::new(1)), Some(Duration::from_secs(1)));
    }
}
