//! The extents of a device that is asked once.
//!
//! A question about an extent that is not kept asks for it, and at the same time for several windows behind it
//! ([`ahead`](super::ahead)). All answers are kept ([`kept`](super::kept)). A device of any size has its first answer soon,
//! because only the windows that a question needs are asked.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::ahead::QueriesAhead;
use super::kept::KeptExtents;
use super::static_device::{StaticDevice, StaticDevices};
use super::{LiveSource, QueryError};
use crate::map::Extent;
use crate::units::Bytes;

/// What is kept of a device that nobody writes to.
pub(super) struct AskedOnce {
    device: Arc<StaticDevice>,
    kept: Mutex<KeptExtents>,
    /// Locked while the device is asked, so that several questions about the same range ask once.
    ahead: Mutex<QueriesAhead>,
    /// Counts the changes of what is kept.
    changes: Arc<AtomicU64>,
}

/// The right to ask the device.
pub(super) struct Asking<'a>(MutexGuard<'a, QueriesAhead>);

impl AskedOnce {
    /// Keeps nothing yet of the device with that name.
    pub(super) fn new(devices: &StaticDevices, name: String) -> Self {
        let kept = Mutex::new(KeptExtents::new(devices.limit()));
        Self { device: devices.device(name), kept, ahead: Mutex::default(), changes: devices.counter() }
    }

    /// Whether the device may be asked once, as of now. Must be called after a question arrived and before it is answered.
    /// As soon as it may not, nothing is kept any more.
    pub(super) fn may_answer(&self, source: &impl LiveSource) -> bool {
        let holds = self.device.holds(source);
        if !holds {
            self.kept().clear();
        }
        holds
    }

    /// The rest of the kept extent that holds `offset`.
    pub(super) fn extent_at(&self, offset: Bytes) -> Option<Extent> {
        self.kept().extent_at(offset)
    }

    /// Waits until no other question asks the device.
    pub(super) fn wait_to_ask(&self) -> Asking<'_> {
        Asking(self.ahead.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Asks the device for the extents from `start` on, a multiple of its block size, and keeps all answers. Returns the
    /// first range, and its answer.
    pub(super) fn ask(
        &self,
        asking: &mut Asking<'_>,
        source: &impl LiveSource,
        start: Bytes,
    ) -> (Range<Bytes>, Result<Vec<Extent>, QueryError>) {
        let rest = start..source.len();
        let ranges = match source.longest_query() {
            Some(longest) => asking.0.ranges(&self.kept(), rest, source.block(), longest),
            None => vec![rest],
        };
        let begin = Instant::now();
        let mut answers = source.answers(&ranges);
        let extents: Vec<Option<&[Extent]>> = answers.iter().map(|answer| answer.as_deref().ok()).collect();
        asking.0.adapt(&ranges, &extents, begin.elapsed());
        // The answer to the question is kept last, since the oldest ones are dropped first.
        let mut kept = self.kept();
        for (range, extents) in ranges.iter().zip(extents).rev() {
            kept.keep(range.start, extents.unwrap_or_default());
        }
        drop(kept);
        self.changes.fetch_add(1, Ordering::Relaxed);
        (ranges[0].clone(), answers.swap_remove(0))
    }

    /// The memory that is taken.
    pub(super) fn memory(&self) -> Bytes {
        self.kept().memory()
    }

    fn kept(&self) -> MutexGuard<'_, KeptExtents> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
