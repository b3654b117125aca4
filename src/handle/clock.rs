//! The clock that measures what a device costs and how long it rests.

use std::thread;
use std::time::{Duration, Instant};

/// A clock. Its times are durations since its start.
pub(super) enum Clock {
    /// The system's, with the time at which it was started.
    Monotonic(Instant),
    /// One that stands still except where a test or a sleep moves it.
    #[cfg(test)]
    Manual(std::sync::Mutex<Duration>),
}

impl Clock {
    /// The system's monotonic clock, which starts now.
    pub(super) fn monotonic() -> Self {
        Self::Monotonic(Instant::now())
    }

    /// The time since the start.
    pub(super) fn now(&self) -> Duration {
        match self {
            Self::Monotonic(start) => start.elapsed(),
            #[cfg(test)]
            Self::Manual(now) => *now.lock().unwrap(),
        }
    }

    /// Returns after `time`.
    pub(super) fn sleep(&self, time: Duration) {
        match self {
            Self::Monotonic(_) => thread::sleep(time),
            #[cfg(test)]
            Self::Manual(now) => *now.lock().unwrap() += time,
        }
    }
}
