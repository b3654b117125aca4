//! The order of events. A clock does not do: on a kernel that counts ticks (`clocksource` `jiffies`) milliseconds have one
//! time, and a map that was read before a write would pass for one that was read after it.

use std::sync::atomic::{AtomicU64, Ordering};

/// A moment in the life of the program, before or after every other one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Moment(u64);

impl Moment {
    /// Now: later than every moment that was taken, in any thread, before this call.
    pub(super) fn now() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::SeqCst))
    }

    /// True of one moment in `n`.
    pub(super) fn is_one_in(self, n: u64) -> bool {
        self.0.is_multiple_of(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_moments_are_the_same() {
        let taken = std::thread::scope(|scope| {
            let take = || (0..1000).map(|_| Moment::now()).collect::<Vec<_>>();
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
