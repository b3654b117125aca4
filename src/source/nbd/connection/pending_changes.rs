//! The changes that a server was sent and has not replied to, and until when they are waited for.

use std::collections::HashMap;
use std::time::Instant;

/// The writes and flushes without a reply, by their cookies.
///
/// A server may process requests one after the other, and a flush may take minutes. So a write that is sent during a flush gets
/// its full time once more when the flush is over, and a read that is too late is given up alone while there is a change: ending
/// the connection would make the flush fail, and with it everything that it covers. A flush that is sent later does not extend
/// the time of a write any more, so that the time is bounded.
#[derive(Debug, Default)]
pub(super) struct PendingChanges(HashMap<u64, PendingChange>);

#[derive(Debug)]
struct PendingChange {
    is_flush: bool,
    begin: Instant,
    /// The deadline without any flush.
    own: Instant,
    /// The deadline, with the flushes that are over.
    until: Instant,
}

impl PendingChanges {
    /// Adds the change with that cookie, which begins now and is waited for until its deadline.
    pub(super) fn add(&mut self, cookie: u64, is_flush: bool, now: Instant, until: Instant) {
        self.0.insert(cookie, PendingChange { is_flush, begin: now, own: until, until });
    }

    /// Removes the change with that cookie, if there is one.
    pub(super) fn remove(&mut self, cookie: u64, now: Instant) {
        let Some(removed) = self.0.remove(&cookie).filter(|removed| removed.is_flush) else { return };
        for change in self.0.values_mut().filter(|change| removed.begin < change.own) {
            change.until = change.until.max(now + change.own.saturating_duration_since(change.begin));
        }
    }

    /// The deadline of a request whose own one is `own`.
    pub(super) fn deadline(&self, cookie: u64, own: Instant) -> Instant {
        let Some(change) = self.0.get(&cookie) else { return own };
        let flushes = self.0.values().filter(|flush| flush.is_flush && flush.begin < change.own);
        flushes.map(|flush| flush.until).fold(change.until, Instant::max)
    }

    /// Whether there is a change that is waited for after `now`.
    pub(super) fn have_time(&self, now: Instant) -> bool {
        self.0.values().any(|change| change.until > now)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_flush_extends_the_deadlines_of_writes() {
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        let mut changes = PendingChanges::default();
        assert!(!changes.have_time(at(0)));
        changes.add(1, false, at(0), at(10));
        assert_eq!(changes.deadline(1, at(10)), at(10));
        changes.add(2, true, at(5), at(60));
        changes.add(3, false, at(20), at(30));
        let deadlines = |changes: &PendingChanges| [1, 2, 3, 4].map(|cookie| changes.deadline(cookie, at(25)));
        assert_eq!(deadlines(&changes), [at(60), at(60), at(60), at(25)]);
        assert!(changes.have_time(at(59)) && !changes.have_time(at(60)));
        changes.remove(2, at(50));
        assert_eq!(deadlines(&changes), [at(60), at(25), at(60), at(25)]);
        // The own time of the first write was over when this flush began.
        changes.add(4, true, at(11), at(100));
        assert_eq!(deadlines(&changes), [at(60), at(25), at(100), at(100)]);
        changes.remove(4, at(80));
        assert_eq!(deadlines(&changes), [at(60), at(25), at(90), at(25)]);
        assert!(changes.have_time(at(89)) && !changes.have_time(at(90)));
    }
}
