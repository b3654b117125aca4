//! Answers that are data for as long as something cannot be found out.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

/// Answers that are data in place of what could not be found out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Degraded {
    /// The time of the first of these answers. All answers since then were degraded too.
    pub since: SystemTime,
    /// Why the last of them was.
    pub reason: String,
}

/// Whether the last answer of something was degraded. Asking that, and noting an answer that was not, costs a read of memory
/// that rarely changes.
#[derive(Debug, Default)]
pub struct DegradedState {
    /// Whether `now` has a value. Written only while `now` is locked.
    is_degraded: AtomicBool,
    now: Mutex<Option<Degraded>>,
}

impl DegradedState {
    /// Notes that an answer was data because of `reason`. Returns whether the answer before it was not degraded.
    pub fn set(&self, reason: impl Into<String>) -> bool {
        let reason = reason.into();
        let mut now = self.lock();
        match &mut *now {
            Some(degraded) => {
                degraded.reason = reason;
                false
            }
            None => {
                *now = Some(Degraded { since: SystemTime::now(), reason });
                self.is_degraded.store(true, Ordering::Relaxed);
                true
            }
        }
    }

    /// Notes that an answer was not degraded.
    pub fn clear(&self) {
        if self.is_degraded.load(Ordering::Relaxed) {
            let mut now = self.lock();
            *now = None;
            self.is_degraded.store(false, Ordering::Relaxed);
        }
    }

    /// Since when answers are degraded, and why. `None` if the last one was not.
    pub fn now(&self) -> Option<Degraded> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Degraded>> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn degraded_answers_have_the_time_of_the_first_and_the_reason_of_the_last() {
        let state = DegradedState::default();
        state.clear();
        assert_eq!(state.now(), None);
        let before = SystemTime::now();
        assert!(state.set("one"));
        let first = state.now().unwrap();
        assert!(before <= first.since && first.since <= SystemTime::now());
        assert!(!state.set("two"), "it was degraded before");
        assert_eq!(state.now(), Some(Degraded { reason: "two".to_owned(), ..first }));
        state.clear();
        assert_eq!(state.now(), None);
        assert!(state.set("three"), "it was not degraded before");
    }
}
