//! Locks on ranges of a device, for writers that read a part of a block and write all of it.

use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::units::Bytes;

/// Which other uses of a range a lock excludes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// Others may use the range at the same time, unless they need it alone. A write of whole blocks is such a use: of two at the
    /// same time the device decides which one is the last.
    Shared,
    /// Nobody else uses the range.
    Alone,
}

/// The locks of one device. A lock waits for those on the same bytes that came before it, so that none waits for ever.
#[derive(Debug, Default)]
pub(super) struct RangeLocks {
    /// The locks that are held, and those that are waited for, in the order in which they came.
    entries: Mutex<Vec<Entry>>,
    released: Condvar,
}

#[derive(Debug)]
struct Entry {
    range: Range<Bytes>,
    how: Use,
    number: u64,
}

impl Entry {
    fn excludes(&self, range: &Range<Bytes>, how: Use) -> bool {
        let overlaps = self.range.start < range.end && range.start < self.range.end;
        overlaps && (self.how == Use::Alone || how == Use::Alone)
    }
}

/// A lock. It ends when this is dropped.
#[derive(Debug)]
pub(super) struct RangeLock<'a> {
    locks: &'a RangeLocks,
    number: u64,
}

impl RangeLocks {
    /// Waits until the range may be used in that way. A thread that holds a lock takes no other one.
    pub(super) fn lock(&self, range: Range<Bytes>, how: Use) -> RangeLock<'_> {
        let mut entries = self.entries();
        let number = entries.last().map_or(0, |last| last.number + 1);
        entries.push(Entry { range: range.clone(), how, number });
        while entries.iter().any(|entry| entry.number < number && entry.excludes(&range, how)) {
            entries = self.released.wait(entries).unwrap_or_else(PoisonError::into_inner);
        }
        RangeLock { locks: self, number }
    }

    fn entries(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for RangeLock<'_> {
    fn drop(&mut self) {
        let mut entries = self.locks.entries();
        entries.retain(|entry| entry.number != self.number);
        let others = !entries.is_empty();
        drop(entries);
        if others {
            self.locks.released.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    use super::*;

    fn range(start: u64, end: u64) -> Range<Bytes> {
        Bytes::new(start)..Bytes::new(end)
    }

    #[test]
    fn only_a_use_alone_of_the_same_bytes_waits() {
        let locks = RangeLocks::default();
        let first = locks.lock(range(0, 10), Use::Shared);
        let second = locks.lock(range(5, 15), Use::Shared);
        let third = locks.lock(range(15, 20), Use::Alone);
        let excluded = AtomicBool::new(true);
        thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                let _alone = locks.lock(range(9, 16), Use::Alone);
                assert!(!excluded.load(Ordering::SeqCst));
            });
            // The entry of a lock that waits is there.
            while locks.entries().len() < 4 {
                thread::yield_now();
            }
            drop(third);
            drop(second);
            excluded.store(false, Ordering::SeqCst);
            drop(first);
            waiting.join().unwrap();
        });
        assert!(locks.entries().is_empty());
    }

    #[test]
    fn uses_alone_follow_each_other() {
        let locks = RangeLocks::default();
        let inside = AtomicBool::new(false);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        let _alone = locks.lock(range(3, 4), Use::Alone);
                        assert!(!inside.swap(true, Ordering::SeqCst));
                        thread::yield_now();
                        inside.store(false, Ordering::SeqCst);
                    }
                });
            }
        });
    }
}
