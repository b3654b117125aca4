//! The writes of this process to block devices, counted as the kernel counts them, so that extents that were read before such
//! a write can be used after it. Why that is sound is in `docs/correctness.md`, "Own writes".

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::ops::{Deref, Range};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use crate::map::WrittenRanges;
use crate::sys::device::DeviceId;
use crate::sys::sysfs::{IoCounters, StatFile};
use crate::units::{Bytes, Sectors};

/// Own writes at the same time are counted if they do not meet in one unit of this size: the largest block of a page cache.
const UNIT: Bytes = Bytes::new(64 << 10);

/// The own writes of all devices, by the device and the inode of its counters, which no other device has before or after it.
static DEVICES: Mutex<Option<OwnWritesByDevice>> = Mutex::new(None);

type OwnWritesByDevice = HashMap<(DeviceId, u64), Weak<OwnWrites>>;

/// The writes of this process to one device.
#[derive(Default)]
pub struct OwnWrites {
    state: Mutex<State>,
    ended: Condvar,
}

#[derive(Default)]
struct State {
    /// Sectors of the writes that have begun, without those that failed.
    begun: u64,
    /// Sectors of the writes that have succeeded. The device has counted all of these.
    succeeded: u64,
    /// The writes under way, by their numbers.
    in_flight: HashMap<u64, Range<Bytes>>,
    /// The number of writes so far.
    last: u64,
    /// The number of writes that have ended.
    ended: u64,
    /// At least this many of the sectors that the device has counted were not written by this process.
    foreign: Option<u64>,
    /// Whether the device counted fewer sectors than were written. Its counters then prove nothing about own writes.
    is_inexact: bool,
    /// The ranges that follow the writes.
    followers: Vec<Weak<WrittenRanges>>,
}

/// What the counters of a device were when its extents were read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Baseline {
    /// At least this many of the sectors that were written are not those of own writes.
    foreign: u64,
    /// The discards, and their sectors.
    discards: (u64, u64),
}

impl OwnWrites {
    /// The own writes of the device `id`, whose counters are `stat`.
    ///
    /// # Errors
    /// As fstat(2).
    pub fn of(id: DeviceId, stat: &StatFile) -> io::Result<Arc<Self>> {
        let key = (id, stat.inode()?);
        let mut devices = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
        let devices = devices.get_or_insert_default();
        if let Some(known) = devices.get(&key).and_then(Weak::upgrade) {
            return Ok(known);
        }
        devices.retain(|_, device| device.strong_count() > 0);
        let new = Arc::<Self>::default();
        devices.insert(key, Arc::downgrade(&new));
        Ok(new)
    }

    /// Ranges of a device of that length, in blocks of that size, that get every write which ends from now on.
    pub fn follow(&self, len: Bytes, block: Bytes) -> Arc<WrittenRanges> {
        let ranges = Arc::new(WrittenRanges::new(len, block));
        let mut state = self.lock();
        state.in_flight.values().for_each(|range| ranges.add(range));
        state.followers.push(Arc::downgrade(&ranges));
        ranges
    }

    /// Notes that a range is about to be written.
    pub fn begin(&self, range: &Range<Bytes>) -> OwnWrite<'_> {
        let size = range.end.saturating_sub(range.start);
        let mut state = self.lock();
        state.followers.retain(|follower| follower.upgrade().inspect(|ranges| ranges.add(range)).is_some());
        // Two writes that meet may be one write of the device.
        let is_alone = !state.in_flight.values().any(|other| meet(other, range));
        let is_whole = size == size.align_down(Sectors::SIZE);
        let sectors = (is_alone && is_whole).then(|| size.get() / Sectors::SIZE.get());
        state.begun += sectors.unwrap_or(0);
        state.last += 1;
        let number = state.last;
        state.in_flight.insert(number, range.clone());
        OwnWrite { own: self, number, sectors }
    }

    /// Where a comparison with the counters begins, if these were `counters`, and no write was in flight after they were read
    /// (`is_idle`). `None` while nothing is known: a write that is in flight may have been counted before.
    pub fn baseline(&self, counters: IoCounters, is_idle: bool) -> Option<Baseline> {
        // The state is read after the counters, so that they have no sector of a write that has not begun here.
        let mut state = self.lock();
        let now = counters.write_sectors.checked_sub(state.begun).filter(|_| is_idle);
        // The number of foreign sectors only grows, so an older value is not too large.
        state.foreign = state.foreign.max(now);
        state.foreign.map(|foreign| Baseline { foreign, discards: counters.of_discards() })
    }

    /// Whether nothing but own writes was counted since the baseline. Waits no longer than `wait` for own writes that are under
    /// way, whose sectors may have been counted in part.
    ///
    /// # Errors
    /// Those of `read`, which reads the counters.
    pub fn only_own_since(
        &self,
        baseline: &Baseline,
        wait: Duration,
        read: impl Fn() -> io::Result<IoCounters>,
    ) -> io::Result<bool> {
        let deadline = Instant::now() + wait;
        loop {
            // The state is read before the counters, so that they have every sector of these writes.
            let (succeeded, ended, is_inexact) = {
                let state = self.lock();
                (state.succeeded, state.ended, state.is_inexact)
            };
            let now = read()?;
            if is_inexact || now.of_discards() != baseline.discards {
                return Ok(false);
            }
            match now.write_sectors.checked_sub(succeeded) {
                Some(now) if now == baseline.foreign => return Ok(true),
                Some(now) if now > baseline.foreign => {}
                _ => {
                    self.set_inexact();
                    return Ok(false);
                }
            }
            if !self.wait_for_end(ended, deadline) {
                return Ok(false);
            }
        }
    }

    /// Waits until more writes than `ended` have ended. `false` if there is none under way, or not before the deadline.
    fn wait_for_end(&self, ended: u64, deadline: Instant) -> bool {
        let rest = deadline.saturating_duration_since(Instant::now());
        let may_end = |state: &mut State| state.ended == ended && !state.in_flight.is_empty();
        let waited = self.ended.wait_timeout_while(self.lock(), rest, may_end);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.ended != ended && !rest.is_zero()
    }

    fn set_inexact(&self) {
        let mut state = self.lock();
        if !state.is_inexact {
            state.is_inexact = true;
            log::warn!(
                "a device counted fewer sectors than were written to it: its map is read again after each write"
            );
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether two ranges have a unit in common.
fn meet(one: &Range<Bytes>, other: &Range<Bytes>) -> bool {
    let units = |range: &Range<Bytes>| (range.start.align_down(UNIT), range.end.align_up(UNIT).unwrap_or(Bytes::MAX));
    let ((start, end), (other_start, other_end)) = (units(one), units(other));
    start < other_end && other_start < end
}

/// A write of this process that is under way. It has failed if it is dropped without [`OwnWrite::succeeded`].
#[must_use]
pub struct OwnWrite<'a> {
    own: &'a OwnWrites,
    number: u64,
    /// What it counts for; `None` if that is not certain, so that it passes for a foreign one.
    sectors: Option<u64>,
}

impl OwnWrite<'_> {
    /// Notes that all of the range was written, by one request that the kernel has counted.
    pub fn succeeded(mut self) {
        let sectors = self.sectors.take().unwrap_or(0);
        self.own.lock().succeeded += sectors;
    }
}

impl Drop for OwnWrite<'_> {
    fn drop(&mut self) {
        let mut state = self.own.lock();
        // A part of a write that failed may have been counted: it passes for a foreign one from now on.
        state.begun -= self.sectors.take().unwrap_or(0);
        state.in_flight.remove(&self.number);
        state.ended += 1;
        drop(state);
        self.own.ended.notify_all();
    }
}

/// A block device that is open for writing with `O_DIRECT`. Its writes are counted as own ones.
///
/// What is changed by other means, such as a discard, passes for a change by another process.
pub struct CountedFile {
    file: File,
    own: Option<Arc<OwnWrites>>,
}

impl CountedFile {
    /// Counts the writes to the device `id`, which is open as `file`.
    pub fn new(file: File, id: DeviceId) -> Self {
        let own = StatFile::open(id).and_then(|stat| OwnWrites::of(id, &stat)).ok();
        Self { file, own }
    }

    /// Writes all of `bytes` at `offset`.
    ///
    /// # Errors
    /// As pwrite(2).
    pub fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let Some(own) = &self.own else { return self.file.write_all_at(bytes, offset) };
        let end = offset.saturating_add(bytes.len() as u64);
        let write = own.begin(&(Bytes::new(offset)..Bytes::new(end)));
        let written = self.file.write_at(bytes, offset);
        if written.as_ref().is_ok_and(|&written| written == bytes.len()) {
            write.succeeded();
            return Ok(());
        }
        let written = match written {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            written => written?,
        };
        // The rest of a short write is written before the whole of it ends as one that may have been counted otherwise.
        self.file.write_all_at(bytes.get(written..).unwrap_or_default(), offset.saturating_add(written as u64))
    }
}

impl Deref for CountedFile {
    type Target = File;

    fn deref(&self) -> &File {
        &self.file
    }
}

#[cfg(test)]
mod tests;
