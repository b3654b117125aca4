//! Flushes that failed. Each file that was open for the failure reports it once, at its next fsync(2), as local file systems do:
//! a flush of one open file is a flush of the device, so its failure is one of the writes of the others too.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Result};
use crate::export::FileIdentity;

/// The failed flushes of all devices.
#[derive(Default)]
pub(super) struct FlushFailures(Mutex<HashMap<Option<FileIdentity>, LastFailure>>);

/// The last failed flush of a device.
#[derive(Clone, Copy)]
struct LastFailure {
    /// The number of failed flushes of this device.
    number: u64,
    errno: i32,
    /// Whether some open file has reported it. One that none has reported is also for files that are opened later.
    is_reported: bool,
}

/// The number of the last failed flush of its device that an open file has reported, or need not report.
#[derive(Debug, Default)]
pub(super) struct ReportedFailure(AtomicU64);

impl FlushFailures {
    /// Which failures a file need not report that is opened now.
    pub(super) fn at_open(&self, device: Option<FileIdentity>) -> ReportedFailure {
        let last = self.lock().get(&device).copied();
        ReportedFailure(AtomicU64::new(last.map_or(0, |last| last.number - u64::from(!last.is_reported))))
    }

    /// Notes a failure that no open file reports now.
    pub(super) fn note_unreported(&self, device: Option<FileIdentity>, errno: i32) {
        self.note(device, errno, false);
    }

    /// The result of a flush for the open file that asked for it: its own failure, or one before that is not reported yet.
    pub(super) fn report(
        &self,
        device: Option<FileIdentity>,
        reported: &ReportedFailure,
        flushed: Result<()>,
    ) -> Result<()> {
        if let Err(error) = &flushed {
            reported.0.store(self.note(device, error.errno(), true), Ordering::Relaxed);
            return flushed;
        }
        match self.lock().get_mut(&device) {
            Some(last) if reported.0.fetch_max(last.number, Ordering::Relaxed) < last.number => {
                last.is_reported = true;
                Err(Error::failed("an earlier flush failed").with_errno(last.errno))
            }
            _ => Ok(()),
        }
    }

    /// Returns the number of the failure.
    fn note(&self, device: Option<FileIdentity>, errno: i32, is_reported: bool) -> u64 {
        let mut failures = self.lock();
        let number = failures.get(&device).map_or(0, |last| last.number) + 1;
        failures.insert(device, LastFailure { number, errno, is_reported });
        number
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Option<FileIdentity>, LastFailure>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_open_file_reports_a_failure_once() {
        let failures = FlushFailures::default();
        let failed = || Err(Error::from_errno(libc::ENOSPC));
        let errno = |result: Result<()>| result.err().map(|error| error.errno());
        let (one, two) = (failures.at_open(None), failures.at_open(None));
        assert_eq!(errno(failures.report(None, &one, Ok(()))), None);
        assert_eq!(errno(failures.report(None, &one, failed())), Some(libc::ENOSPC));
        assert_eq!(errno(failures.report(None, &one, Ok(()))), None);
        assert_eq!(errno(failures.report(None, &two, Ok(()))), Some(libc::ENOSPC));
        assert_eq!(errno(failures.report(None, &two, Ok(()))), None);
        let later = failures.at_open(None);
        assert_eq!(errno(failures.report(None, &later, Ok(()))), None, "it was reported before this open");
    }

    #[test]
    fn a_failure_at_the_last_close_is_for_the_next_open_file() {
        let failures = FlushFailures::default();
        let errno = |result: Result<()>| result.err().map(|error| error.errno());
        failures.note_unreported(None, libc::EIO);
        let (one, two) = (failures.at_open(None), failures.at_open(None));
        assert_eq!(errno(failures.report(None, &one, Ok(()))), Some(libc::EIO));
        assert_eq!(errno(failures.report(None, &two, Ok(()))), Some(libc::EIO));
        assert_eq!(errno(failures.report(None, &failures.at_open(None), Ok(()))), None);
    }
}
