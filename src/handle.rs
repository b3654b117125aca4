//! One open device: reads, and questions about extents that are answered with what is true now.
//!
//! The freshness rule is here. A hole is reported only after these steps:
//! 1. the stack of the device is resolved, and its extents are loaded;
//! 2. the dirty pages of every layer are written back, so that the layers below have received every completed write;
//! 3. the extents are asked;
//! 4. every guard of the stack finds what it found before the extents were loaded.
//!
//! When a guard finds a change, the stack is resolved and loaded again. That takes at most a tenth of the time. A request
//! that comes in between waits until it may be done again, if that is soon: the answer "all data" makes a client read
//! everything up to the end of the device. A device whose extents take too long to load for that is all data in between.

mod map_cache;
mod read_memory;
mod resolved;
mod sequence;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use log::{Level, log};

use crate::error::{Result, shown};
use crate::export::Export;
use crate::map::view::{self, Whence};
use crate::map::{Extent, ExtentKind, HoleMap};
use crate::reason::DenseReason;
use crate::source::{Context, Loaded, Stack};
use crate::sys::buffer::AlignedBuffer;
use crate::sys::memory;
use crate::units::Bytes;
use map_cache::Slot;
use read_memory::ReadMemory;
use resolved::Resolved;
use sequence::SequenceNumber;

pub use map_cache::MapCache;
pub use read_memory::ReadPermit;

/// How often one request may resolve the stack again before it answers "data".
const MAX_TRIES: usize = 3;

/// Extents in one answer of [`Handle::extents`]. The check of all guards at the end of an answer costs as much as
/// finding many extents.
const EXTENTS_AT_ONCE: usize = 256;

/// Loading or dropping extents of this size or more is followed by a call that gives free memory back to the system.
const LARGE: Bytes = Bytes::new(256 << 10);

/// How long one request waits at most until its stack may be resolved again.
const LONGEST_WAIT: Duration = Duration::from_secs(3);

/// How long all requests of an open device may wait together, besides a tenth of the time since it was opened: a client
/// that asks for each of many extents must not take longer than one that reads everything.
const ALL_WAITS: Duration = Duration::from_secs(30);

/// An open device, shared by all opens of its file.
pub struct Handle {
    export: Arc<dyn Export>,
    context: Arc<Context>,
    maps: Arc<MapCache>,
    slot: Arc<Slot>,
    /// Locked while a stack is resolved, so that several requests resolve it once.
    resolving: Mutex<Waits>,
    /// The reason of the last stack that was all data, so that it is logged once.
    logged_reason: Mutex<Option<DenseReason>>,
    /// Whether it was logged that the device changes too fast.
    logged_busy: AtomicBool,
    /// Log lines have the level debug: the device is open for a stat(2) only.
    quiet: bool,
    /// The bound on the memory of reads.
    read_memory: Arc<ReadMemory>,
}

/// How long requests have waited until a stack could be resolved again.
struct Waits {
    since: Instant,
    waited: Duration,
}

impl Waits {
    fn new() -> Self {
        Self { since: Instant::now(), waited: Duration::ZERO }
    }

    /// Whether a request may wait for `rest` more.
    fn allow(&self, rest: Duration) -> bool {
        rest <= LONGEST_WAIT && self.waited + rest <= ALL_WAITS + self.since.elapsed() / 10
    }
}

impl Handle {
    /// Takes an open device. Its extents count against the limit of `maps`.
    pub fn new(export: Arc<dyn Export>, context: Arc<Context>, maps: Arc<MapCache>) -> Self {
        Self::with(export, context, maps, false)
    }

    /// Takes a device that is open only while its attributes are read.
    pub fn for_attributes(export: Arc<dyn Export>, context: Arc<Context>) -> Self {
        Self::with(export, context, Arc::default(), true)
    }

    fn with(export: Arc<dyn Export>, context: Arc<Context>, maps: Arc<MapCache>, quiet: bool) -> Self {
        Self {
            export,
            context,
            maps,
            slot: Arc::default(),
            resolving: Mutex::new(Waits::new()),
            logged_reason: Mutex::default(),
            logged_busy: AtomicBool::new(false),
            quiet,
            read_memory: Arc::default(),
        }
    }

    /// Shares the bound on the memory of reads with `other`, which is the same device by another name.
    pub fn share_read_memory(&mut self, other: &Self) {
        self.read_memory = other.read_memory.clone();
    }

    /// Waits until the reads of this device may use a buffer of `size` bytes more, as long as the permit is kept.
    pub fn wait_for_read_memory(&self, size: usize) -> ReadPermit<'_> {
        self.read_memory.take(size)
    }

    /// The open device, image, volume or export of a server.
    pub fn export(&self) -> &dyn Export {
        &*self.export
    }

    /// Reads up to `size` bytes at `offset` through `buffer`; shorter only at the end.
    ///
    /// # Errors
    /// As the `read` of `dyn Export`.
    pub fn read<'a>(&self, buffer: &'a mut AlignedBuffer, offset: Bytes, size: usize) -> Result<&'a [u8]> {
        self.export.read(buffer, offset, size)
    }

    /// lseek(2) with SEEK_DATA or SEEK_HOLE. `None` is ENXIO: the offset is at or past the end, or there is no more data.
    ///
    /// # Errors
    /// When the device is gone.
    pub fn seek(&self, offset: Bytes, whence: Whence) -> Result<Option<Bytes>> {
        let align = self.export.align();
        // With each answer, whether it holds whatever the lengths of the layers are now.
        let ask = |map: &dyn HoleMap| match view::seek_inside(map, align, offset, whence) {
            Some(found) => (Some(found), true),
            None => (view::seek(map, align, offset, whence), false),
        };
        // Extents that are used are as long as the device.
        if let Some((found, _)) = self.fresh_answer_of(|_| None, ask, |&(_, inside)| inside) {
            return Ok(found);
        }
        let len = self.export.len()?;
        let data = match whence {
            Whence::Data => offset,
            Whence::Hole => len,
        };
        Ok((offset < len).then_some(data))
    }

    /// The first extents of a `range` that is not empty, each with its start: at least one, and at most
    /// [`EXTENTS_AT_ONCE`].
    ///
    /// # Errors
    /// When the device is gone.
    pub fn extents(&self, range: Range<Bytes>) -> Result<Vec<(Bytes, Extent)>> {
        let align = self.export.align();
        let some = |map: &dyn HoleMap| view::runs(map, align, range.clone()).take(EXTENTS_AT_ONCE).collect::<Vec<_>>();
        match self.fresh_answer(some) {
            Some(extents) if !extents.is_empty() => Ok(extents),
            // There is no valid answer, or none within the range because the device has become shorter.
            _ => self.export.len().map(|_| vec![(range.start, Extent { end: range.end, kind: ExtentKind::Data })]),
        }
    }

    /// Bytes of data within `range`, where they can be counted without a walk over all extents.
    pub fn count_data(&self, range: &Range<Bytes>) -> Option<Bytes> {
        let align = self.export.align();
        self.fresh_answer(|map| view::count_data(map, align, range)).flatten()
    }

    /// Whether a seek would find a hole. The extents are loaded only where the stack does not know it otherwise.
    ///
    /// # Errors
    /// When the device is gone.
    pub fn has_hole(&self) -> Result<bool> {
        let align = self.export.align();
        let known = |stack: &Stack| view::has_hole_of(stack.is_sparse(), align);
        match self.fresh_answer_of(known, |map| view::has_hole(map, align), |_| false) {
            Some(has_hole) => Ok(has_hole),
            None => self.export.len().map(|_| false),
        }
    }

    /// The number of allocated bytes, as of the last time that the stack was resolved. `None` if it never was, or if
    /// the number takes a walk over all extents.
    pub fn allocated(&self) -> Option<Bytes> {
        self.current().and_then(|current| current.stack.allocated())
    }

    /// A number that changes when the stack does; `None` while it is not known how the stack is built now.
    pub fn trace(&self) -> Option<u64> {
        self.current().filter(|current| current.stack.same_shape()).map(|current| current.stack.trace())
    }

    /// Drops the extents and everything that they hold open. The next question resolves and loads them again.
    pub fn drop_map(&self) {
        *self.slot.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// The result of `ask`, which gets the extents, after a check that they were valid during the call. Loads them
    /// first if necessary. `None` if no result passes the check: the device changes too often, is suspended, or cannot
    /// write back its dirty pages.
    fn fresh_answer<T>(&self, ask: impl Fn(&dyn HoleMap) -> T) -> Option<T> {
        self.fresh_answer_of(|_| None, ask, |_| false)
    }

    /// As [`Handle::fresh_answer`], for a question that `known` may answer from the stack before its extents are loaded.
    /// The length of no layer is checked for an answer of which `inside` is true.
    fn fresh_answer_of<T>(
        &self,
        known: impl Fn(&Stack) -> Option<T>,
        ask: impl Fn(&dyn HoleMap) -> T,
        inside: impl Fn(&T) -> bool,
    ) -> Option<T> {
        let request = SequenceNumber::last();
        let mut resolved = self.current().filter(|current| current.fits);
        let mut newer_than = request;
        for tries_left in (0..MAX_TRIES).rev() {
            let now = match resolved.take() {
                Some(resolved) => resolved,
                None => self.resolve(newer_than)?,
            };
            newer_than = newer_than.max(now.born);
            if !now.stack.write_back() {
                return None;
            }
            let answer = match now.is_loaded() {
                true => None,
                false => known(&now.stack),
            };
            let answer = match answer {
                Some(answer) => {
                    now.set_answered();
                    answer
                }
                // The write-back may have moved a counter: extents that are loaded now would be void at once.
                None if tries_left > 0 && !now.is_loaded() && !now.stack.unchanged() => continue,
                None => ask(self.load(&now).map()),
            };
            if now.is_fresh(request, inside(&answer)) {
                return Some(answer);
            }
        }
        self.log_busy();
        None
    }

    /// Resolves the stack again, and stores it in the slot. Concurrent requests share the work: a stack that another
    /// one resolved after `newer_than` is returned as it is.
    ///
    /// Waits until the device may be resolved again (see [`Resolved::rest`]). `None` if that would take longer than a
    /// request may wait.
    fn resolve(&self, newer_than: SequenceNumber) -> Option<Arc<Resolved>> {
        let mut waits = self.resolving.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(current) = self.current() {
            if current.born > newer_than {
                return Some(current);
            }
            let rest = current.rest();
            if !waits.allow(rest) {
                self.log_busy();
                return None;
            }
            waits.waited += rest;
            // The lock is kept during the wait, because the other requests would have to wait as long.
            thread::sleep(rest);
        }
        let len = || self.export.len().ok();
        let resolved = Arc::new(Resolved::new(|| self.export.stack(&self.context), len));
        *self.slot.write().unwrap_or_else(PoisonError::into_inner) = Some(resolved.clone());
        Some(resolved)
    }

    /// The stack that was resolved last, which may be out of date. `None` if it was dropped, or never resolved.
    fn current(&self) -> Option<Arc<Resolved>> {
        self.slot.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Loads the extents of a stack, unless that was done before. The first time, logs the result and counts its memory.
    fn load<'a>(&self, resolved: &'a Arc<Resolved>) -> &'a Loaded {
        resolved.load(|loaded| {
            self.log_loaded(loaded);
            self.maps.keep(&self.slot, resolved, loaded.memory);
            give_back_after(loaded.memory);
        })
    }

    fn log_loaded(&self, loaded: &Loaded) {
        let name = shown(self.export.name());
        let mut logged = self.logged_reason.lock().unwrap_or_else(PoisonError::into_inner);
        match &loaded.dense_because {
            Some(reason) if logged.as_ref() != Some(reason) => {
                self.log(Level::Warn, &format!("{name}: all data: {reason}"));
            }
            Some(_) => {}
            None => self.log(Level::Info, &format!("{name}: new map")),
        }
        logged.clone_from(&loaded.dense_because);
    }

    /// Logs, once for this device, that it changes faster than its extents can be loaded.
    fn log_busy(&self) {
        // The guards of a device that is gone find a change too, which is no reason for this message.
        if self.export.len().is_ok() && !self.logged_busy.swap(true, Ordering::Relaxed) {
            let name = shown(self.export.name());
            let why = "changes faster than its map can be read: all data in between; back up a snapshot instead";
            self.log(Level::Warn, &format!("{name}: {why}"));
        }
    }

    fn log(&self, level: Level, message: &str) {
        log!(if self.quiet { Level::Debug } else { level }, "{message}");
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.maps.release(&self.slot);
        let memory = self.current().map_or(Bytes::ZERO, |current| current.memory());
        self.drop_map();
        give_back_after(memory);
    }
}

/// Gives free memory back to the system after extents of `extents` bytes were loaded or dropped. Loading needs more
/// memory than its result, and frees it at the end.
fn give_back_after(extents: Bytes) {
    if extents >= LARGE {
        memory::give_back();
    }
}
