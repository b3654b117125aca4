//! The time that may be spent on finding the end of one extent.
//!
//! The end of an extent is found by further queries, each from where the last answer ended, and the device decides how
//! far an answer reaches. A device that reports an extent block by block would keep a single lseek(2) busy for hours.
//! So the time that was spent on an extent is kept with the offset where the answer ended, and counts for the question
//! that continues there.

use std::collections::VecDeque;
use std::time::Duration;

use crate::map::{Extent, ExtentKind};
use crate::units::Bytes;

/// The time that queries for one extent may take together.
const LIMIT: Duration = Duration::from_secs(2);
/// The number of bytes that are data, at least, when the time for an extent is spent.
const DATA: Bytes = Bytes::new(64 << 20);
/// The number of times that one SEEK_HOLE can spend its time, at most: it continues behind data until it finds a hole
/// or the end of the device.
const DATA_SHARES: u64 = 16;
/// The number of extents whose time is counted at the same time.
const MAX_BUDGETS: usize = 32;

/// The time spent on one extent, which is known up to an offset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Budget {
    at: Bytes,
    kind: Option<ExtentKind>,
    spent: Duration,
}

impl Budget {
    /// The budget after an answer that took `took`. An extent of another kind begins with no time spent.
    pub(super) fn after(self, extent: Extent, took: Duration) -> Self {
        let spent = if self.kind.is_none_or(|kind| kind == extent.kind) { self.spent } else { Duration::ZERO };
        Self { at: extent.end, kind: Some(extent.kind), spent: spent.saturating_add(took) }
    }

    /// Whether the extent began before the offset of the question.
    pub(super) fn is_begun(self) -> bool {
        self.kind.is_some()
    }

    /// The number of bytes of a device of `len` bytes to answer as data without a query; `None` while there is time
    /// left.
    pub(super) fn data_when_spent(self, len: Bytes) -> Option<Bytes> {
        let share = match self.kind {
            // SEEK_DATA ends at this data; its caller continues behind it.
            Some(ExtentKind::Hole | ExtentKind::Unchanged | ExtentKind::Free) | None => DATA,
            Some(ExtentKind::Data) => DATA.max(Bytes::new(len.get() / DATA_SHARES)),
        };
        (self.spent >= LIMIT).then_some(share)
    }
}

/// The budgets of the extents whose ends are being looked for.
#[derive(Default)]
pub(super) struct Budgets(VecDeque<Budget>);

impl Budgets {
    /// Takes the budget of the extent that is known up to `offset`, or a new one.
    pub(super) fn take(&mut self, offset: Bytes) -> Budget {
        let index = self.0.iter().position(|budget| budget.at == offset);
        index.and_then(|index| self.0.remove(index)).unwrap_or_default()
    }

    /// Puts a budget back, in place of the oldest one where there are too many.
    pub(super) fn put(&mut self, budget: Budget) {
        if self.0.len() >= MAX_BUDGETS {
            self.0.pop_front();
        }
        self.0.push_back(budget);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEN: Bytes = Bytes::new(1 << 40);

    fn extent(end: u64, kind: ExtentKind) -> Extent {
        Extent { end: Bytes::new(end), kind }
    }

    #[test]
    fn the_time_of_an_extent_adds_up_and_ends() {
        let second = Duration::from_secs(1);
        for (kind, data) in [(ExtentKind::Hole, DATA), (ExtentKind::Data, Bytes::new((1 << 40) / 16))] {
            let budget = Budget::default().after(extent(10, kind), second);
            assert_eq!(budget.data_when_spent(LEN), None);
            assert_eq!(budget.after(extent(20, kind), second).data_when_spent(LEN), Some(data));
        }
        let other =
            Budget::default().after(extent(10, ExtentKind::Hole), second).after(extent(20, ExtentKind::Data), second);
        assert_eq!(other.data_when_spent(LEN), None, "another extent");
    }

    #[test]
    fn budgets_are_separate_and_their_number_is_bounded() {
        let mut budgets = Budgets::default();
        for end in 1..=1 + MAX_BUDGETS as u64 {
            budgets.put(Budget::default().after(extent(end, ExtentKind::Hole), Duration::from_secs(1)));
        }
        assert_eq!(budgets.0.len(), MAX_BUDGETS);
        assert_eq!(budgets.take(Bytes::new(1)), Budget::default(), "the oldest is dropped");
        assert_eq!(budgets.take(Bytes::new(2)).spent, Duration::from_secs(1));
        assert_eq!(budgets.take(Bytes::new(2)), Budget::default(), "a budget is taken once");
    }
}
