//! The deadline of the FUSE request that a thread runs.
//!
//! A request can wait for a server several times: for a connection, for the length, and for each part of a map. All these
//! waits share one deadline, which is a thread-local value. Work outside of a request, such as that of a background thread,
//! has no deadline.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// How long a FUSE request waits for servers, from the begin of its first wait.
pub const REQUEST: Duration = Duration::from_secs(30);

/// The deadline of a thread. Most requests never wait for a server, and need not know the time.
#[derive(Clone, Copy)]
enum Deadline {
    /// So long after the first wait begins.
    After(Duration),
    At(Instant),
}

thread_local! {
    static DEADLINE: Cell<Option<Deadline>> = const { Cell::new(None) };
}

/// Restores an earlier deadline of the thread when it is dropped, also by a panic.
struct Restore(Option<Deadline>);

impl Drop for Restore {
    fn drop(&mut self) {
        DEADLINE.set(self.0);
    }
}

/// Calls `work` with a deadline that is `limit` after its first call of [`no_later_than`]. Within another deadline it is
/// `limit` from now, or the other one if that is earlier.
pub fn within<T>(limit: Duration, work: impl FnOnce() -> T) -> T {
    let deadline = match DEADLINE.get() {
        None => Deadline::After(limit),
        Some(_) => Deadline::At(no_later_than(Instant::now() + limit)),
    };
    let _restore = Restore(DEADLINE.replace(Some(deadline)));
    work()
}

/// The earlier of `at` and the deadline of the calling thread. Called when a wait begins.
pub fn no_later_than(at: Instant) -> Instant {
    let deadline = match DEADLINE.get() {
        None => return at,
        Some(Deadline::At(deadline)) => deadline,
        Some(Deadline::After(limit)) => Instant::now() + limit,
    };
    DEADLINE.set(Some(Deadline::At(deadline)));
    deadline.min(at)
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
