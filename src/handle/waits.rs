//! How long requests wait until a stack may be resolved again.

use std::time::Duration;

/// How long one request waits at most until its stack may be resolved again.
const LONGEST_WAIT: Duration = Duration::from_secs(3);

/// How long all requests of an open device may wait together, besides a tenth of the time since it was opened: a client
/// that asks for each of many extents must not take longer than one that reads everything.
const ALL_WAITS: Duration = Duration::from_secs(30);

/// How long the requests of an open device have waited until a stack could be resolved again.
pub(super) struct Waits {
    /// The time at which the device was opened.
    since: Duration,
    waited: Duration,
}

impl Waits {
    /// A device that is opened at `now`.
    pub(super) fn new(now: Duration) -> Self {
        Self { since: now, waited: Duration::ZERO }
    }

    /// Whether a request may wait at `now` for `rest` more. If so, that wait is counted.
    pub(super) fn take(&mut self, rest: Duration, now: Duration) -> bool {
        let all = ALL_WAITS + now.saturating_sub(self.since) / 10;
        let allowed = rest <= LONGEST_WAIT && self.waited + rest <= all;
        self.waited += if allowed { rest } else { Duration::ZERO };
        allowed
    }
}
