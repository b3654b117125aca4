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
//! The same holds for extents that were dropped because those of other devices take all the memory of the [`MapCache`].

mod clock;
mod degraded;
mod holes_now;
mod map_cache;
mod read_memory;
mod reader;
mod resolved;
mod sequence;
mod slot;
#[cfg(test)]
mod tests;
mod waits;
mod walk;
mod writing;

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::error::Result;
use crate::export::Export;
use crate::map::view::{self, Whence};
use crate::map::{Extent, ExtentKind, HoleMap};
use crate::reason::{DegradedState, DenseReason};
use crate::source::{Context, Loaded, Stack, StackTrace, Unique};
use crate::sys::buffer::AlignedBuffer;
use crate::sys::{memory, stamp};
use crate::units::Bytes;
use degraded::NoAnswer;
use read_memory::ReadMemory;
use resolved::{Cost, Resolved};
use sequence::SequenceNumber;
use slot::{Content, Slot};
use waits::Waits;

pub use degraded::{DenseLayer, HandleState};
pub use holes_now::{HolesNow, StackState};
pub use map_cache::MapCache;
pub use read_memory::ReadPermit;
pub use reader::{ReadAhead, Reader};
pub use walk::Walk;

/// How often one request may resolve the stack again before it answers "data".
const MAX_TRIES: usize = 3;

/// Extents in one answer of [`Handle::extents`]. The check of all guards at the end of an answer costs as much as
/// finding many extents.
const EXTENTS_AT_ONCE: usize = 256;

/// Loading or dropping extents of this size or more is followed by a call that gives free memory back to the system.
const LARGE: Bytes = Bytes::new(256 << 10);

/// Answers a question from a stack whose extents are not loaded, if it can.
type KnownAnswer<'a, T> = &'a dyn Fn(&Stack) -> Option<T>;

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
    /// The layers of the last stack that were all data when it was loaded.
    dense_layers: Mutex<Vec<DenseLayer>>,
    /// Whether the last question had no valid answer, so that the reply was data.
    unanswered: DegradedState,
    /// Whether it was logged that the device changes too fast.
    logged_busy: AtomicBool,
    /// Whether it was logged that the extents do not fit in the memory of all extents.
    logged_evicted: AtomicBool,
    /// Log lines have the level debug: the device is open for a stat(2) only.
    quiet: bool,
    /// The bound on the memory of reads.
    read_memory: Arc<ReadMemory>,
    /// The number of opens, and of changes that a guard found: what was fetched ahead before is not used after.
    generation: AtomicU64,
    unique: Unique,
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
        let waits = Waits::new(maps.clock.now());
        Self {
            export,
            context,
            maps,
            slot: Arc::default(),
            resolving: Mutex::new(waits),
            logged_reason: Mutex::default(),
            dense_layers: Mutex::default(),
            unanswered: DegradedState::default(),
            logged_busy: AtomicBool::new(false),
            logged_evicted: AtomicBool::new(false),
            quiet,
            read_memory: Arc::default(),
            generation: AtomicU64::new(0),
            unique: Unique::next(),
        }
    }

    /// Notes that the device is opened once more. Called before the reply to the open: no read through the new open gets
    /// bytes that were fetched before.
    pub fn begin_generation(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
    }

    /// The number of opens and changes so far.
    fn generation(&self) -> u64 {
        self.generation.load(Ordering::SeqCst)
    }

    /// The extent from `offset` on as it was when the extents were asked last: a hint, and no promise.
    fn expected_extent(&self, offset: Bytes) -> Option<Extent> {
        let current = self.current()?;
        let map = current.loaded()?.map();
        (offset < map.len()).then(|| map.expected_extent(offset)).flatten().filter(|extent| extent.end > offset)
    }

    /// The end of the last whole unit of the device.
    fn readable_end(&self) -> Option<Bytes> {
        Some(self.export.len().ok()?.align_down(self.export.align()))
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
        if let Some(((found, _), _)) = self.fresh_answer_of(None, ask, |&(_, inside)| inside) {
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
        match self.fresh_answer_of(Some(&known), |map| view::has_hole(map, align), |_| false) {
            Some((has_hole, _)) => Ok(has_hole),
            None => self.export.len().map(|_| false),
        }
    }

    /// The number of allocated bytes, as of the last time that the stack was resolved. `None` if it never was, or if
    /// the number takes a walk over all extents.
    pub fn allocated(&self) -> Option<Bytes> {
        self.current().and_then(|current| current.stack.allocated())
    }

    /// A number that no other handle of this process has.
    pub fn unique(&self) -> &Unique {
        &self.unique
    }

    /// A state that changes when the stack does; `None` while it is not known how the stack is built now.
    pub fn trace(&self) -> Option<StackTrace> {
        self.current().filter(|current| current.stack.same_shape()).map(|current| current.stack.trace())
    }

    /// Waits until no write to a file at the bottom is under way that the times of the file do not show, as far as
    /// [`stamp::finish_writes`] can.
    pub fn finish_file_writes(&self) {
        if let Some(current) = self.current() {
            current.stack.files().for_each(stamp::finish_writes);
        }
    }

    /// Drops the extents and everything that they hold open. The next question resolves and loads them again. A caller that
    /// holds a lock drops what is returned later: that closes devices and files, which may take long.
    pub fn drop_map(&self) -> impl Sized + use<> {
        self.slot.replace(Content::Empty)
    }

    /// The result of `ask`, which gets the extents, after a check that they were valid during the call. Loads them
    /// first if necessary. `None` if no result passes the check: the device changes too often, is suspended, or cannot
    /// write back its dirty pages.
    fn fresh_answer<T>(&self, ask: impl Fn(&dyn HoleMap) -> T) -> Option<T> {
        self.fresh_answer_of(None, ask, |_| false).map(|(answer, _)| answer)
    }

    /// As [`Handle::fresh_answer`], for a question that `known` may answer from the stack before its extents are loaded.
    /// The length of no layer is checked for an answer of which `inside` is true. With the answer, the stack that it is from.
    fn fresh_answer_of<T>(
        &self,
        known: Option<KnownAnswer<'_, T>>,
        ask: impl Fn(&dyn HoleMap) -> T,
        inside: impl Fn(&T) -> bool,
    ) -> Option<(T, Arc<Resolved>)> {
        match self.try_fresh_answer_of(known, ask, inside) {
            Ok(answer) => {
                self.unanswered.clear();
                Some(answer)
            }
            Err(why) => {
                self.note_no_answer(why);
                None
            }
        }
    }

    fn try_fresh_answer_of<T>(
        &self,
        known: Option<KnownAnswer<'_, T>>,
        ask: impl Fn(&dyn HoleMap) -> T,
        inside: impl Fn(&T) -> bool,
    ) -> std::result::Result<(T, Arc<Resolved>), NoAnswer> {
        let (request, asked) = (SequenceNumber::last(), self.maps.clock.now());
        let mut resolved = self.current().filter(|current| current.fits);
        let mut newer_than = request;
        let mut to_load = known.is_none();
        for tries_left in (0..MAX_TRIES).rev() {
            let now = match resolved.take() {
                Some(resolved) => resolved,
                None => self.resolve(newer_than, to_load)?,
            };
            newer_than = newer_than.max(now.born);
            if !now.stack.write_back() {
                return Err(NoAnswer::of_write_back(&now.stack));
            }
            let answer = match (now.is_loaded(), known) {
                (false, Some(known)) => known(&now.stack),
                _ => None,
            };
            let answer = match answer {
                Some(answer) => {
                    now.set_answered();
                    answer
                }
                None if !now.is_loaded() => {
                    to_load = true;
                    // The write-back may have moved a counter: extents that are loaded now would be void at once.
                    if self.rest_of_evicted(&now) > Duration::ZERO || tries_left > 0 && !now.stack.extents_hold(false) {
                        continue;
                    }
                    ask(self.load(&now, asked).map())
                }
                None => {
                    now.set_used(asked);
                    ask(self.load(&now, asked).map())
                }
            };
            self.count_memory_again(&now, asked);
            if now.is_fresh(request, inside(&answer)) {
                return Ok((answer, now));
            }
        }
        self.log_busy();
        Err(NoAnswer::Busy)
    }

    /// Resolves the stack again, and stores it in the slot. Concurrent requests share the work: a stack that another
    /// one resolved after `newer_than` is returned as it is.
    ///
    /// Waits until the device may be resolved again (see [`Resolved::cost`]), and with `to_load` until extents that were
    /// evicted may be loaded again.
    ///
    /// # Errors
    /// If that would take longer than a request may wait.
    fn resolve(&self, newer_than: SequenceNumber, to_load: bool) -> std::result::Result<Arc<Resolved>, NoAnswer> {
        let clock = &self.maps.clock;
        let mut waits = self.resolving.lock().unwrap_or_else(PoisonError::into_inner);
        let (before, evicted) = match self.slot.content() {
            Content::Stack(current) if current.born > newer_than => return Ok(current),
            // Extents that were loaded have a rest of their own.
            Content::Stack(current) => (Some(current.cost()), current.evicted.filter(|_| !current.is_loaded())),
            // The description alone costs little, and stat(2) needs no more.
            Content::Evicted(cost) => (None, Some(cost)),
            Content::Empty => (None, None),
        };
        let now = clock.now();
        let rest = |cost: Option<Cost>| cost.map_or(Duration::ZERO, |cost| cost.rest(now));
        let of_evicted = if to_load { rest(evicted) } else { Duration::ZERO };
        let rest = rest(before).max(of_evicted);
        if of_evicted > Duration::ZERO {
            self.log_evicted();
        }
        if !waits.take(rest, now) {
            // What was fetched ahead may be older than the change that a guard found.
            self.begin_generation();
            if of_evicted > Duration::ZERO {
                return Err(NoAnswer::Evicted);
            }
            self.log_busy();
            return Err(NoAnswer::Busy);
        }
        // The lock is kept during the wait, because the other requests would have to wait as long.
        clock.sleep(rest);
        let len = || self.export.len().ok();
        let resolved = Arc::new(Resolved::new(clock, evicted, || self.export.stack(&self.context), len));
        // What was fetched ahead may be older than the change that a guard found. This is done after the guards of the new
        // stack were made, so that they find each change since.
        self.begin_generation();
        self.slot.set(Content::Stack(resolved.clone()));
        Ok(resolved)
    }

    /// How long it is until the extents of a stack may be loaded, because those that the device had before were evicted.
    fn rest_of_evicted(&self, resolved: &Resolved) -> Duration {
        resolved.evicted.map_or(Duration::ZERO, |cost| cost.rest(self.maps.clock.now()))
    }

    /// The stack that was resolved last, which may be out of date. `None` if it was dropped, or never resolved.
    fn current(&self) -> Option<Arc<Resolved>> {
        self.slot.stack()
    }

    /// Loads the extents of a stack for a question that came at the time `asked`, unless that was done before. The first
    /// time, logs the result and counts its memory.
    fn load<'a>(&self, resolved: &'a Arc<Resolved>, asked: Duration) -> &'a Loaded {
        resolved.load(&self.maps.clock, |loaded| {
            self.log_loaded(loaded);
            self.note_dense_layers(&resolved.stack);
            if resolved.evicted.is_some() {
                self.log_evicted();
            }
            self.maps.keep(&self.slot, resolved, loaded.memory, asked);
            give_back_after(loaded.memory);
        })
    }

    /// Counts the memory of extents that grow: those that are asked once, and only as far as questions need them, and those
    /// that follow own writes.
    fn count_memory_again(&self, resolved: &Arc<Resolved>, asked: Duration) {
        if let Some(memory) = resolved.memory_again(self.context.static_devices.as_ref()) {
            self.maps.keep(&self.slot, resolved, memory, asked);
        }
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
