//! The deadline of the FUSE request that a thread runs.
//!
//! A request can wait for a server several times: for a connection, for the length, and for each part of a map. All these
//! waits share one deadline, which is a thread-local value. Work outside of a request, such as that of a background thread,
//! has no deadline.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// The time after which a FUSE request stops waiting for servers.
pub const REQUEST: Duration = Duration::from_secs(30);

thread_local! {
    static DEADLINE: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// Restores an earlier deadline of the thread when it is dropped, also by a panic.
struct Restore(Option<Instant>);

impl Drop for Restore {
    fn drop(&mut self) {
        DEADLINE.set(self.0);
    }
}

/// Calls `work` with a deadline that is `limit` from now, or with the current deadline of the thread if that is earlier.
pub fn within<T>(limit: Duration, work: impl FnOnce() -> T) -> T {
    let _restore = Restore(DEADLINE.get());
    DEADLINE.set(Some(no_later_than(Instant::now() + limit)));
    work()
}

/// The earlier of `at` and the deadline of the calling thread.
pub fn no_later_than(at: Instant) -> Instant {
    DEADLINE.get().map_or(at, |deadline| deadline.min(at))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_earliest_deadline_applies_until_its_work_ends() {
        let far = Instant::now() + Duration::from_secs(3600);
        assert_eq!(no_later_than(far), far);
        within(Duration::from_secs(60), || {
            let outer = no_later_than(far);
            assert!(outer < far);
            within(Duration::from_secs(1), || assert!(no_later_than(far) < outer));
            within(Duration::from_secs(600), || assert_eq!(no_later_than(far), outer));
            assert_eq!(no_later_than(far), outer);
            let now = Instant::now();
            assert_eq!(no_later_than(now), now);
        });
        assert_eq!(no_later_than(far), far);
        let panicked = std::panic::catch_unwind(|| within(Duration::ZERO, || panic!("on purpose")));
        assert!(panicked.is_err());
        assert_eq!(no_later_than(far), far);
    }
}
