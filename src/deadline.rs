//! When the request that a thread works on is to be answered.
//!
//! A request may wait for a server several times: for a connection, for the length, for each part of a map. All these
//! waits share one deadline, which belongs to the thread that does the work. Work that no request asked for has none.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// How long a request of the kernel may wait for servers.
pub const REQUEST: Duration = Duration::from_secs(30);

thread_local! {
    static UNTIL: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// Puts the deadline back that held before, however the work ends.
struct Restore(Option<Instant>);

impl Drop for Restore {
    fn drop(&mut self) {
        UNTIL.set(self.0);
    }
}

/// Does `work` with a deadline after `limit`, or with the earlier one that the thread has already.
pub fn within<T>(limit: Duration, work: impl FnOnce() -> T) -> T {
    let _before = Restore(UNTIL.get());
    UNTIL.set(Some(no_later_than(Instant::now() + limit)));
    work()
}

/// The earlier of `at` and the deadline of this thread's work.
pub fn no_later_than(at: Instant) -> Instant {
    UNTIL.get().map_or(at, |until| until.min(at))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_earliest_deadline_holds_as_long_as_its_work() {
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
