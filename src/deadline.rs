//! The deadline of the FUSE request that a thread runs.
//!
//! A request can wait for a server several times: for a connection, for the length, and for each part of a map. All these
//! waits share one deadline, which is a thread-local value. Only a change of a range of any size, such as a truncation, has one for
//! each of its steps. Work outside of a request, such as that of a background thread, has no deadline.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// How long a FUSE request waits for servers, from the begin of its first wait.
pub const REQUEST: Duration = Duration::from_secs(30);

/// The deadline of a thread.
#[derive(Clone, Copy)]
struct Deadline {
    /// The time that the work has, and that each of its steps has that begins anew.
    limit: Duration,
    /// `None` until the first wait begins. Most requests never wait for a server, and need not know the time.
    at: Option<Instant>,
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
    let at = DEADLINE.get().map(|_| no_later_than(Instant::now() + limit));
    let _restore = Restore(DEADLINE.replace(Some(Deadline { limit, at })));
    work()
}

/// Calls `work` with as much time as the whole request had at its begin. For one of many steps of a change whose size the client
/// chooses: each step is to end in time, and all of them may take long, as a write to a slow disk may.
pub fn anew<T>(work: impl FnOnce() -> T) -> T {
    let deadline = DEADLINE.get().map(|deadline| Deadline { at: None, ..deadline });
    let _restore = Restore(DEADLINE.replace(deadline));
    work()
}

/// The earlier of `at` and the deadline of the calling thread. Called when a wait begins.
pub fn no_later_than(at: Instant) -> Instant {
    let Some(Deadline { limit, at: known }) = DEADLINE.get() else { return at };
    let deadline = known.unwrap_or_else(|| Instant::now() + limit);
    DEADLINE.set(Some(Deadline { limit, at: Some(deadline) }));
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

    #[test]
    fn each_step_has_the_time_of_the_request() {
        let far = Instant::now() + Duration::from_secs(3600);
        assert_eq!(anew(|| no_later_than(far)), far);
        within(Duration::from_secs(60), || {
            let whole = no_later_than(far);
            let step = anew(|| {
                let step = no_later_than(far);
                assert_eq!(no_later_than(far), step);
                step
            });
            assert!(step > whole && step < far);
            assert_eq!(no_later_than(far), whole);
        });
    }
}
