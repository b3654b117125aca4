//! Locks of ranges, for writes that read a block first.

use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::units::Bytes;

/// Whether other threads may have the same bytes locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sharing {
    /// With other shared locks.
    Shared,
    /// With no other lock.
    Exclusive,
}

/// Locks of ranges of one export. A thread gets a lock when all earlier locks that are in conflict with it were released, so that
/// no thread waits for ever.
#[derive(Debug, Default)]
pub(super) struct RangeLocks {
    state: Mutex<LockState>,
    released: Condvar,
}

#[derive(Debug, Default)]
struct LockState {
    next: u64,
    /// In the order in which they were requested.
    locks: Vec<(u64, Range<Bytes>, Sharing)>,
}

impl LockState {
    /// Whether a lock that was requested earlier is in conflict.
    fn must_wait(&self, id: u64, range: &Range<Bytes>, sharing: Sharing) -> bool {
        let earlier = self.locks.iter().take_while(|(other, ..)| *other != id);
        let mut overlapping = earlier.filter(|(_, other, _)| other.start < range.end && range.start < other.end);
        overlapping.any(|(.., other)| sharing == Sharing::Exclusive || *other == Sharing::Exclusive)
    }
}

/// A lock, released when it is dropped.
#[derive(Debug)]
pub(super) struct RangeLock<'a> {
    locks: &'a RangeLocks,
    id: u64,
}

impl RangeLocks {
    /// Waits for the lock of a range.
    pub(super) fn lock(&self, range: Range<Bytes>, sharing: Sharing) -> RangeLock<'_> {
        let mut state = self.state();
        let id = state.next;
        state.next += 1;
        state.locks.push((id, range.clone(), sharing));
        while state.must_wait(id, &range, sharing) {
            state = self.released.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        RangeLock { locks: self, id }
    }

    fn state(&self) -> MutexGuard<'_, LockState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for RangeLock<'_> {
    fn drop(&mut self) {
        self.locks.state().locks.retain(|(id, ..)| *id != self.id);
        self.locks.released.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    fn bytes(start: u64, end: u64) -> Range<Bytes> {
        Bytes::new(start)..Bytes::new(end)
    }

    #[test]
    fn only_earlier_locks_in_conflict_are_waited_for() {
        let locks = vec![(1, bytes(0, 10), Sharing::Shared), (2, bytes(20, 30), Sharing::Exclusive)];
        let state = LockState { next: 3, locks };
        for (range, sharing, waits) in [
            (bytes(5, 15), Sharing::Shared, false),
            (bytes(5, 15), Sharing::Exclusive, true),
            (bytes(10, 20), Sharing::Exclusive, false),
            (bytes(15, 25), Sharing::Shared, true),
            (bytes(29, 40), Sharing::Exclusive, true),
            (bytes(30, 40), Sharing::Exclusive, false),
        ] {
            assert_eq!(state.must_wait(3, &range, sharing), waits, "{range:?} {sharing:?}");
        }
        assert!(!state.must_wait(1, &bytes(0, 30), Sharing::Exclusive), "it is the first one");
    }

    #[test]
    fn exclusive_locks_exclude_each_other() {
        let locks = RangeLocks::default();
        let sum = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for start in 0..4 {
                let (locks, sum) = (&locks, &sum);
                scope.spawn(move || {
                    for _ in 0..1000 {
                        let _lock = locks.lock(bytes(start, 10), Sharing::Exclusive);
                        let before = sum.load(Ordering::Relaxed);
                        std::thread::yield_now();
                        sum.store(before + 1, Ordering::Relaxed);
                    }
                });
            }
        });
        assert_eq!(sum.into_inner(), 4000);
        assert!(locks.state().locks.is_empty());
    }
}
