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

/// What a hole must hold for [`HoleMap::is_sparse`](crate::map::HoleMap::is_sparse): holes that are shown begin and end at
/// multiples of it.
const UNIT: Bytes = Bytes::new(4096);

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
            let extents = extents.unwrap_or_default();
            kept.keep(range.start, extents);
            if has_long_hole(range.start, extents) {
                self.device.set_sparse();
            }
        }
        drop(kept);
        self.changes.fetch_add(1, Ordering::Relaxed);
        (ranges[0].clone(), answers.swap_remove(0))
    }

    /// Whether the device is known to have a hole with a whole unit of [`UNIT`].
    pub(super) fn is_sparse(&self) -> bool {
        self.device.is_sparse()
    }

    /// The memory that is taken.
    pub(super) fn memory(&self) -> Bytes {
        self.kept().memory()
    }

    fn kept(&self) -> MutexGuard<'_, KeptExtents> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether one of consecutive extents, the first of which begins at `start`, is a hole with a whole unit of [`UNIT`].
fn has_long_hole(mut start: Bytes, extents: &[Extent]) -> bool {
    extents.iter().any(|extent| {
        let unit_end = start.align_up(UNIT).and_then(|unit| unit.checked_add(UNIT));
        start = extent.end;
        extent.kind.is_hole() && unit_end.is_some_and(|end| end <= extent.end)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::ExtentKind;

    #[test]
    fn a_long_hole_has_a_whole_unit() {
        let has_hole = |start, end| {
            let data = Extent { end: Bytes::new(start), kind: ExtentKind::Data };
            has_long_hole(Bytes::ZERO, &[data, Extent { end: Bytes::new(end), kind: ExtentKind::Hole }])
        };
        assert!(has_hole(4096, 8192) && has_hole(512, 8192));
        assert!(!has_hole(512, 8191) && !has_hole(4096, 4608) && !has_hole(512, 4608));
        assert!(!has_long_hole(Bytes::ZERO, &[Extent { end: Bytes::new(1 << 20), kind: ExtentKind::Data }]));
    }
}
