//! Hole maps of devices that other hosts may write to: SCSI disks and NBD exports.
//!
//! Such a device has no change counter that covers all its writers. So every hole comes from an answer to a query that
//! was sent after the question arrived, and no hole is remembered. Data is always a correct answer: it is remembered
//! for a short time ([`remembered`]), and it is the answer where a query fails or takes too long ([`budget`]).
//!
//! With `-o static` the user says that nobody writes to the device. It is then asked once ([`once`]), until something
//! contradicts that ([`static_device`]).

mod ahead;
mod budget;
mod evidence;
mod kept;
mod last_answers;
mod once;
mod remembered;
mod static_device;
mod window;

pub(super) use evidence::WriteEvidence;
pub use static_device::StaticDevices;

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use self::budget::Budgets;
use self::last_answers::LastAnswers;
use self::once::AskedOnce;
use self::remembered::RememberedData;
use self::window::{ENOUGH_EXTENTS, QueryWindow};
use crate::error::Error;
use crate::map::{Extent, ExtentKind, HoleMap};
use crate::reason::{Degraded, DegradedState, DenseReason};
use crate::sys::sysfs::IoCounters;
use crate::units::Bytes;

/// The number of extents that are expected from an offset on, at least, where a query is not about many extents.
const ENOUGH_EXPECTED: usize = 32;

/// A device that is queried for its extents at each question.
pub(super) trait LiveSource: Send + Sync {
    /// The device in log messages.
    fn name(&self) -> String;

    /// The length of the device.
    fn len(&self) -> Bytes;

    /// The alignment of queries, a power of two.
    fn block(&self) -> Bytes;

    /// The longest range of one query: a multiple of every possible block size, or [`Bytes::MAX`]. `None` where a query
    /// has only a start and the device decides how far its answer reaches.
    fn longest_query(&self) -> Option<Bytes>;

    /// Consecutive extents from the start of the first range on, as the device reports them now.
    ///
    /// The ranges are adjacent; each begins on a block and ends on a block or at the end of the device. The extents may
    /// end before the last range or after it. Without any extent, everything from the start on is data.
    ///
    /// # Errors
    ///
    /// The query failed. Where no later query is worth sending, [`LiveSource::unusable`] gives the reason from now on.
    fn extents(&self, ranges: &[Range<Bytes>]) -> Result<Vec<Extent>, QueryError>;

    /// The answers to queries about ranges that need not be adjacent, sent at the same time: for each of the first ranges,
    /// at least one, what [`LiveSource::extents`] is for it alone.
    ///
    /// All holes of an answer are kept, so everything that a hole needs is asked for each of them.
    fn answers(&self, ranges: &[Range<Bytes>]) -> Vec<Result<Vec<Extent>, QueryError>>;

    /// Why the device has no usable extents. It is not queried any more then, and all of it is data.
    fn unusable(&self) -> Option<DenseReason>;

    /// Counters of the writes and discards of this host; remembered data is dropped when they change. Nothing is
    /// remembered while they cannot be read (`None`).
    fn counters(&self) -> Option<IoCounters>;

    /// The number of the medium in the device, which another medium does not have.
    fn medium(&self) -> Option<u64>;

    /// Why writes, or another device in place of this one, may not be visible in [`LiveSource::counters`] and
    /// [`LiveSource::medium`], if so.
    fn unobserved(&self) -> Option<String>;
}

/// A query that failed: what is data in place of its answer.
pub(super) enum QueryError {
    /// The ranges of the query. The device may answer queries about other ranges.
    Ranges(Error),
    /// Everything from the start of the query to the end of the device.
    Device(Error),
}

/// The holes of a device that is queried at each question, or once.
pub(super) struct LiveMap<S> {
    source: S,
    /// What is kept of a device that nobody writes to.
    once: Option<AskedOnce>,
    window: QueryWindow,
    remembered: Mutex<RememberedData>,
    /// Where data may be, for reading ahead. No answer comes from it.
    last_answers: Mutex<LastAnswers>,
    budgets: Mutex<Budgets>,
    /// Whether the last query failed. The first failure of several in a row is logged.
    failing: DegradedState,
    /// Whether the last question was answered without a query, because its extent takes too long to find.
    spent: DegradedState,
}

impl<S: LiveSource> LiveMap<S> {
    /// The map of a device, which may be one of `static_devices`. It sends no query yet.
    pub(super) fn new(source: S, static_devices: Option<&StaticDevices>) -> Self {
        let once = static_devices.map(|devices| AskedOnce::new(devices, source.name()));
        Self {
            source,
            once,
            window: QueryWindow::default(),
            remembered: Mutex::default(),
            last_answers: Mutex::default(),
            budgets: Mutex::default(),
            failing: DegradedState::default(),
            spent: DegradedState::default(),
        }
    }

    /// Sends a first query, about the start of the device, to learn whether the device answers queries at all.
    ///
    /// # Errors
    ///
    /// As [`LiveSource::extents`].
    pub(super) fn probe(&self) -> Result<(), Error> {
        if self.len() == Bytes::ZERO {
            return Ok(());
        }
        self.remembered().refresh(self.source.counters());
        match self.query(&self.window_at(Bytes::ZERO, false)) {
            Ok(_) => Ok(()),
            Err(QueryError::Ranges(error) | QueryError::Device(error)) => Err(error),
        }
    }

    /// The extent that holds `offset`, as the device reports it now. `continues`: the extent began before `offset`.
    fn extent_now(&self, offset: Bytes, continues: bool) -> Extent {
        let start = offset.align_down(self.source.block());
        if let Some(range) = self.expected_range(start) {
            let answer = self.source.extents(std::slice::from_ref(&range));
            let answer = answer.inspect(|extents| {
                self.last_answers().check(start, extents);
                self.remember(start, extents);
            });
            return self.extent_in(answer, offset, &[range]);
        }
        let ranges = self.window_at(start, continues);
        self.extent_in(self.query(&ranges), offset, &ranges)
    }

    /// The range of the two extents that are expected from `start` on, where the extents that follow are expected, too.
    /// A server has less to do for a query about them than for one about many.
    fn expected_range(&self, start: Bytes) -> Option<Range<Bytes>> {
        let (longest, len) = (self.source.longest_query()?, self.len());
        let end = self.last_answers().end_of_next(start, ENOUGH_EXPECTED, len)?;
        let end = end.align_up(self.source.block())?.min(len).min(start.saturating_add(longest));
        (start < end).then_some(start..end)
    }

    /// The extent that holds `offset`, which is asked together with extents behind it. All of them are kept.
    fn extent_once(&self, once: &AskedOnce, offset: Bytes) -> Extent {
        let mut asking = once.wait_to_ask();
        if let Some(extent) = once.extent_at(offset) {
            return extent;
        }
        let start = offset.align_down(self.source.block());
        let (range, answer) = once.ask(&mut asking, &self.source, start);
        if answer.is_ok() {
            self.note_answer();
        }
        self.extent_in(answer, offset, &[range])
    }

    /// The extent that holds `offset` in the answer to a query about `ranges`, which begin with the block of `offset`.
    fn extent_in(&self, answer: Result<Vec<Extent>, QueryError>, offset: Bytes, ranges: &[Range<Bytes>]) -> Extent {
        let block = self.source.block();
        let start = offset.align_down(block);
        let extents = match answer {
            Ok(extents) => extents,
            Err(error) => {
                let extent = self.after_failure(ranges, error);
                self.remembered().add(start, &[extent]);
                vec![extent]
            }
        };
        let end = match extents.is_empty() {
            true => self.len(),
            // The answer ends before `offset`, within its block.
            false => start.saturating_add(block).min(self.len()),
        };
        extents.into_iter().find(|extent| extent.end > offset).unwrap_or(Extent { end, kind: ExtentKind::Data })
    }

    /// The ranges of the next query about many extents, from `start` on.
    fn window_at(&self, start: Bytes, continues: bool) -> Vec<Range<Bytes>> {
        match self.source.longest_query() {
            Some(longest) => self.window.ranges(start..self.len(), longest, continues),
            None => vec![start..self.len()],
        }
    }

    /// Sends one query, and remembers the data in its answer.
    fn query(&self, ranges: &[Range<Bytes>]) -> Result<Vec<Extent>, QueryError> {
        let extents = self.source.extents(ranges)?;
        if let Some(longest) = self.source.longest_query() {
            self.window.adapt(ranges, &extents, longest);
        }
        if let Some(range) = ranges.first() {
            self.remember(range.start, &extents);
        }
        Ok(extents)
    }

    /// Remembers the data in an answer, and what is expected where.
    fn remember(&self, start: Bytes, extents: &[Extent]) {
        self.note_answer();
        let is_cut = self.source.longest_query().is_some() && extents.len() > ENOUGH_EXTENTS;
        self.remembered().add(start, if is_cut { &extents[..ENOUGH_EXTENTS] } else { extents });
        self.last_answers().add(start, extents);
    }

    fn note_answer(&self) {
        self.failing.clear();
        self.spent.clear();
    }

    /// The data in place of the answer to a query that failed.
    fn after_failure(&self, ranges: &[Range<Bytes>], error: QueryError) -> Extent {
        let (end, error) = match error {
            QueryError::Ranges(error) => (ranges.last().map_or(self.len(), |range| range.end), error),
            QueryError::Device(error) => (self.len(), error),
        };
        let effect = match self.source.unusable() {
            Some(_) => "all data from now on",
            None => "data where a query fails",
        };
        let text = format!("{effect}: {error}");
        if self.failing.set(text.clone()) {
            log::warn!("{}: {text}", self.source.name());
        }
        self.window.reset();
        Extent { end, kind: ExtentKind::Data }
    }

    /// The rest of the remembered data that holds `offset`.
    fn remembered_at(&self, offset: Bytes) -> Option<Extent> {
        let mut remembered = self.remembered();
        remembered.refresh(self.source.counters());
        let end = remembered.end_of(offset)?.min(self.len());
        Some(Extent { end, kind: ExtentKind::Data })
    }

    /// Makes `len` bytes from `offset` on data without a query. They are remembered, so that the next question about
    /// them has the same answer.
    fn data_without_query(&self, offset: Bytes, len: Bytes) -> Extent {
        let text = format!("the end of an extent takes too long to find: {len} bytes from byte {offset} are data");
        log::warn!("{}: {text}", self.source.name());
        self.spent.set(text);
        let extent = Extent { end: offset.saturating_add(len).min(self.len()), kind: ExtentKind::Data };
        self.remembered().add(offset, &[extent]);
        extent
    }

    fn last_answers(&self) -> MutexGuard<'_, LastAnswers> {
        self.last_answers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remembered(&self) -> MutexGuard<'_, RememberedData> {
        self.remembered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn budgets(&self) -> MutexGuard<'_, Budgets> {
        self.budgets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S: LiveSource> HoleMap for LiveMap<S> {
    fn len(&self) -> Bytes {
        self.source.len()
    }

    fn extent_at(&self, offset: Bytes) -> Extent {
        let len = self.len();
        if offset >= len {
            return Extent::outside(offset);
        }
        if self.source.unusable().is_some() {
            return Extent { end: len, kind: ExtentKind::Data };
        }
        let once = self.once.as_ref().filter(|once| once.may_answer(&self.source));
        let budget = self.budgets().take(offset);
        let begin = Instant::now();
        let known = once.and_then(|once| once.extent_at(offset)).or_else(|| self.remembered_at(offset));
        let extent = match (known, budget.data_when_spent(len), once) {
            (Some(extent), _, _) => extent,
            (None, Some(data), _) => return self.data_without_query(offset, data),
            (None, None, Some(once)) => self.extent_once(once, offset),
            (None, None, None) => self.extent_now(offset, budget.is_begun()),
        };
        self.budgets().put(budget.after(extent, begin.elapsed()));
        extent
    }

    fn is_sparse(&self) -> Option<bool> {
        // Of a device that is asked at each question it is not known.
        let once = self.once.as_ref()?;
        (once.is_sparse() && once.may_answer(&self.source)).then_some(true)
    }

    fn expected_extent(&self, offset: Bytes) -> Option<Extent> {
        let kept = self.once.as_ref().and_then(|once| once.extent_at(offset));
        kept.or_else(|| self.last_answers().extent_at(offset))
    }

    fn dense_because(&self) -> Option<DenseReason> {
        self.source.unusable()
    }

    fn degraded(&self) -> Option<Degraded> {
        self.failing.now().or_else(|| self.spent.now())
    }

    fn memory(&self) -> Bytes {
        let kept = self.once.as_ref().map_or(Bytes::ZERO, AskedOnce::memory);
        [self.remembered().memory(), self.last_answers().memory()].into_iter().fold(kept, Bytes::saturating_add)
    }
}

#[cfg(test)]
impl<S> LiveMap<S> {
    /// Makes the map behave as if the extent of `kind` that ends at `end` had taken an hour to find.
    pub(super) fn spend_budget(&self, end: Bytes, kind: ExtentKind) {
        let budget = budget::Budget::default().after(Extent { end, kind }, std::time::Duration::from_secs(3600));
        self.budgets.lock().unwrap_or_else(PoisonError::into_inner).put(budget);
    }
}

#[cfg(test)]
mod tests;
