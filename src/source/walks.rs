//! A bound on how long a disk or a server can keep one question busy.
//!
//! The end of a run is found by asking again where an answer ends, and the other side decides how little each answer
//! says. One that tells a run block by block would hold a single lseek for hours. So the time that was spent on a run
//! is carried from where an answer ended to the question that goes on there.

use std::collections::VecDeque;
use std::time::Duration;

use crate::map::{Extent, ExtentKind};
use crate::units::Bytes;

/// How long the other side may take to tell one run.
const PATIENCE: Duration = Duration::from_secs(2);
/// What is called data at least when the time for a run is over.
const RESPITE: Bytes = Bytes::new(64 << 20);
/// SEEK_HOLE has to go on until it finds a hole or the end. This bounds how often its time can be over before that.
const RESPITES: u64 = 16;
/// Walks at the same time that are told apart.
const WALKS: usize = 32;

/// A run that was told up to some position, and the time that took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Walk {
    at: Bytes,
    kind: Option<ExtentKind>,
    spent: Duration,
}

impl Walk {
    /// Goes on with the answer `run`, which took that long. Where the kind changes, a new walk begins.
    pub(super) fn on(self, run: Extent, took: Duration) -> Self {
        let spent = if self.kind.is_none_or(|kind| kind == run.kind) { self.spent } else { Duration::ZERO };
        Self { at: run.end, kind: Some(run.kind), spent: spent.saturating_add(took) }
    }

    /// Of which kind the run is, unless this is a new walk.
    pub(super) fn kind(self) -> Option<ExtentKind> {
        self.kind
    }

    /// How much is to be called data instead of asking on, of `len` bytes, once more; `None` while there is time.
    pub(super) fn respite(self, len: Bytes) -> Option<Bytes> {
        let share = match self.kind {
            Some(ExtentKind::Data) => RESPITE.max(Bytes::new(len.get() / RESPITES)),
            // SEEK_DATA ends here, and comes back for more.
            _ => RESPITE,
        };
        (self.spent >= PATIENCE).then_some(share)
    }
}

/// The walks that are under way.
#[derive(Default)]
pub(super) struct Walks(VecDeque<Walk>);

impl Walks {
    /// Takes the walk that stands at `offset`, or a new one.
    pub(super) fn take(&mut self, offset: Bytes) -> Walk {
        let index = self.0.iter().position(|walk| walk.at == offset);
        index.and_then(|index| self.0.remove(index)).unwrap_or_default()
    }

    /// Puts a walk back; the oldest is forgotten where there are too many.
    pub(super) fn put(&mut self, walk: Walk) {
        if self.0.len() >= WALKS {
            self.0.pop_front();
        }
        self.0.push_back(walk);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEN: Bytes = Bytes::new(1 << 40);

    fn run(end: u64, kind: ExtentKind) -> Extent {
        Extent { end: Bytes::new(end), kind }
    }

    #[test]
    fn the_time_of_a_run_adds_up_and_ends() {
        let second = Duration::from_secs(1);
        for (kind, respite) in [(ExtentKind::Hole, RESPITE), (ExtentKind::Data, Bytes::new((1 << 40) / 16))] {
            let walk = Walk::default().on(run(10, kind), second);
            assert_eq!(walk.respite(LEN), None);
            assert_eq!(walk.on(run(20, kind), second).respite(LEN), Some(respite));
        }
        let other = Walk::default().on(run(10, ExtentKind::Hole), second).on(run(20, ExtentKind::Data), second);
        assert_eq!(other.respite(LEN), None, "another run");
    }

    #[test]
    fn walks_are_told_apart_and_bounded() {
        let mut walks = Walks::default();
        for end in 1..=1 + WALKS as u64 {
            walks.put(Walk::default().on(run(end, ExtentKind::Hole), Duration::from_secs(1)));
        }
        assert_eq!(walks.0.len(), WALKS);
        assert_eq!(walks.take(Bytes::new(1)), Walk::default(), "the oldest is forgotten");
        assert_eq!(walks.take(Bytes::new(2)).spent, Duration::from_secs(1));
        assert_eq!(walks.take(Bytes::new(2)), Walk::default(), "and one that was taken is gone");
    }
}
