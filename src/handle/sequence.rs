//! The order of events within the program. A clock does not serve: on a kernel that counts ticks (`clocksource`
//! `jiffies`) it stands still for milliseconds, and extents that were read before a write would pass for extents that
//! were read after it.

use std::sync::atomic::{AtomicU64, Ordering};

/// A sequence number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct SequenceNumber(u64);

/// The largest number that was taken.
static LAST: AtomicU64 = AtomicU64::new(0);

impl SequenceNumber {
    /// The next number. It is larger than all that were taken before, in any thread.
    pub(super) fn next() -> Self {
        Self(LAST.fetch_add(1, Ordering::SeqCst) + 1)
    }

    /// The largest number that was taken so far: every number that is taken from now on is larger. There is one such call
    /// for each question, and a write would take the cache line from the other processors each time.
    pub(super) fn last() -> Self {
        Self(LAST.load(Ordering::SeqCst))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_after_a_look_is_larger_and_what_was_taken_before_is_not() {
        let before = SequenceNumber::next();
        let look = SequenceNumber::last();
        assert!(before <= look && look < SequenceNumber::next());
    }

    #[test]
    fn no_two_numbers_are_the_same_and_each_thread_sees_them_ascend() {
        let taken = std::thread::scope(|scope| {
            let take = || (0..1000).map(|_| SequenceNumber::next()).collect::<Vec<_>>();
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(take)).collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        });
        for one in taken.chunks(1000) {
            assert!(one.is_sorted_by(|a, b| a < b));
        }
        let mut all = taken;
        all.sort();
        assert!(all.is_sorted_by(|a, b| a < b));
    }
}
