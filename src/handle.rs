//! One open device: reads, and seeks that are true now.
//!
//! The freshness rule lives here. A hole is claimed only after
//! 1. the dirty pages of every layer were written back, so that the layers below know of every completed write;
//! 2. the map was asked;
//! 3. every guard of the stack still saw what it saw before the map was made.
//!
//! When a guard saw a change the stack is resolved again, which costs at most a tenth of the time. A request that comes in
//! between waits until it may be done again, as long as that is soon: an answer "all data" makes a client read everything
//! up to the end of the device. A device whose map takes too long to read for that is all data in between.

mod map_cache;
mod order;
mod room;

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use log::{Level, log};

use crate::error::{Result, shown};
use crate::map::view::{self, Whence};
use crate::map::{Extent, ExtentKind as Kind, HoleMap};
use crate::source::{Backing, Context, Stack};
use crate::sys::buffer::AlignedBuffer;
use crate::sys::memory;
use crate::units::Bytes;
use map_cache::Slot;
use order::Moment;
use room::Room;

pub use map_cache::MapCache;
pub use room::RoomPart;

/// How often one request may resolve the stack again before it answers "data".
const MAX_TRIES: usize = 3;

/// Runs that are told at once: enough that what it takes to believe them is little beside finding them.
const RUNS_AT_ONCE: usize = 256;

/// From this size on, a map is worth a look at the heap for what it left behind.
const LARGE: Bytes = Bytes::new(256 << 10);

/// Of so many questions one is timed: the clock costs as much as finding the answer.
const TIMED_ONE_IN: u64 = 16;

/// After a rebuild that took T, the next one waits for this many times T: a tenth of the time at most.
const REST_FACTOR: u32 = 9;

/// How long one request waits at most until its stack may be resolved again.
const LONGEST_WAIT: Duration = Duration::from_secs(3);

/// How long all requests of an open device may wait together, besides a tenth of the time since it was opened: a client that
/// asks for each of many extents is not to take longer than one that reads everything.
const PATIENCE: Duration = Duration::from_secs(30);

/// An open device, shared by all opens of its file.
pub struct Handle {
    backing: Backing,
    context: Arc<Context>,
    maps: Arc<MapCache>,
    held: Arc<Slot>,
    /// Held while a stack is resolved, so that it is done once.
    renewing: Mutex<Waits>,
    /// What the last stack was dense for, so that it is said once.
    told: Mutex<Option<String>>,
    /// Whether the user was already told that this device changes too fast.
    told_busy: AtomicBool,
    /// A glance for the sake of stat(2) is not worth a line of the log; an open file is.
    quiet: bool,
    /// For the reads of this device.
    room: Arc<Room>,
}

/// How long requests waited until a stack could be resolved again.
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
        rest <= LONGEST_WAIT && self.waited + rest <= PATIENCE + self.since.elapsed() / 10
    }
}

/// A resolved stack, and what it cost.
struct Held {
    stack: Stack,
    /// Taken before anything of the stack was looked at.
    born: Moment,
    /// The same, for the time that the map lives.
    made: Instant,
    resolved_in: Duration,
    /// Nanoseconds that the slowest question took, 0 before the first.
    slowest: AtomicU64,
    told: AtomicBool,
    /// Whether the map is as long as the device; from then on a guard watches the length.
    fits: bool,
}

impl Held {
    /// Asks, and notes how long it took: the first time, when some maps are read, and now and then.
    fn ask<T>(&self, request: Moment, ask: impl Fn(&dyn HoleMap) -> T) -> T {
        if self.slowest().is_some() && !request.is_one_in(TIMED_ONE_IN) {
            return ask(self.stack.map());
        }
        let start = Instant::now();
        let answer = ask(self.stack.map());
        let took = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX).max(1);
        // Most are not the slowest: a write would take the line away from the other processors at each of them.
        if took > self.slowest.load(Ordering::Relaxed) {
            self.slowest.fetch_max(took, Ordering::Relaxed);
        }
        answer
    }

    /// The longest that a question took: some maps are read only when they are asked. `None` before the first.
    fn slowest(&self) -> Option<Duration> {
        match self.slowest.load(Ordering::Relaxed) {
            0 => None,
            nanoseconds => Some(Duration::from_nanos(nanoseconds)),
        }
    }

    /// Whether a claim of this stack stands. One that was made within the request holds every write that completed
    /// before it; what must not have changed since is only how it is built.
    fn is_believed(&self, request: Moment) -> bool {
        self.fits && if self.born > request { self.stack.same_shape() } else { self.stack.unchanged() }
    }

    /// How long it is until another one may be made. One that was not asked yet cost nothing.
    fn rest(&self) -> Duration {
        let cost = self.slowest().map_or(Duration::ZERO, |read| (self.resolved_in + read) * (REST_FACTOR + 1));
        cost.saturating_sub(self.made.elapsed())
    }
}

impl Handle {
    /// Takes an open device, whose map is kept in `maps`.
    pub fn new(backing: Backing, context: Arc<Context>, maps: Arc<MapCache>) -> Self {
        Self::with(backing, context, maps, false)
    }

    /// Takes a device that is opened only to tell its attributes.
    pub fn glance(backing: Backing, context: Arc<Context>) -> Self {
        Self::with(backing, context, Arc::default(), true)
    }

    fn with(backing: Backing, context: Arc<Context>, maps: Arc<MapCache>, quiet: bool) -> Self {
        Self {
            backing,
            context,
            maps,
            held: Arc::default(),
            renewing: Mutex::new(Waits::new()),
            told: Mutex::default(),
            told_busy: AtomicBool::new(false),
            quiet,
            room: Arc::default(),
        }
    }

    /// Has the reads of this device share the room of `other`, which is the same one by another name.
    pub fn share_room(&mut self, other: &Self) {
        self.room = other.room.clone();
    }

    /// Waits until the reads of this device may use a buffer of `size` bytes more, as long as the answer is kept.
    pub fn wait_for_room(&self, size: usize) -> RoomPart<'_> {
        self.room.take(size)
    }

    /// The open device or image.
    pub fn backing(&self) -> &Backing {
        &self.backing
    }

    /// Reads up to `size` bytes at `offset` through `buffer`; shorter only at the end.
    ///
    /// # Errors
    /// As [`Backing::read`].
    pub fn read<'a>(&self, buffer: &'a mut AlignedBuffer, offset: Bytes, size: usize) -> Result<&'a [u8]> {
        self.backing.read(buffer, offset, size)
    }

    /// lseek(2) with SEEK_DATA or SEEK_HOLE; `None` is ENXIO, and means "no more" and nothing else.
    ///
    /// # Errors
    /// When the device is gone.
    pub fn seek(&self, offset: Bytes, whence: Whence) -> Result<Option<Bytes>> {
        let align = self.backing.align();
        // A map that is believed is as long as the device.
        if let Some(found) = self.believed(|map| view::seek(map, align, offset, whence)) {
            return Ok(found);
        }
        let len = self.backing.len()?;
        let data = match whence {
            Whence::Data => offset,
            Whence::Hole => len,
        };
        Ok((offset < len).then_some(data))
    }

    /// The first runs of a `range` that is not empty, each with its start: at least one, and all believed at once.
    ///
    /// # Errors
    /// When the device is gone.
    pub fn runs(&self, range: Range<Bytes>) -> Result<Vec<(Bytes, Extent)>> {
        let align = self.backing.align();
        let some = |map: &dyn HoleMap| view::runs(map, align, range.clone()).take(RUNS_AT_ONCE).collect::<Vec<_>>();
        match self.believed(some) {
            Some(runs) if !runs.is_empty() => Ok(runs),
            // Also where the device has become shorter.
            _ => self.backing.len().map(|_| vec![(range.start, Extent { end: range.end, kind: Kind::Data })]),
        }
    }

    /// Bytes of data within `range`, where the map can count them without going through its runs.
    pub fn count_data(&self, range: &Range<Bytes>) -> Option<Bytes> {
        let align = self.backing.align();
        self.believed(|map| view::count_data(map, align, range)).flatten()
    }

    /// Whether a seek would find a hole.
    ///
    /// # Errors
    /// When the device is gone.
    pub fn has_hole(&self) -> Result<bool> {
        let align = self.backing.align();
        match self.believed(|map| view::has_hole(map, align)) {
            Some(has_hole) => Ok(has_hole),
            None => self.backing.len().map(|_| false),
        }
    }

    /// Bytes that are stored, where the sources know it without a walk.
    pub fn allocated(&self) -> Option<Bytes> {
        self.current().and_then(|held| held.stack.map().allocated())
    }

    /// A number that changes when the stack does; `None` while it is not known how it is built now.
    pub fn trace(&self) -> Option<u64> {
        self.current().filter(|held| held.stack.same_shape()).map(|held| held.stack.trace())
    }

    /// Forgets the map and everything that it holds open; the next seek makes a new one.
    pub fn drop_map(&self) {
        *self.held.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Asks the map, and answers what can be believed now; `None` when nothing can.
    fn believed<T>(&self, ask: impl Fn(&dyn HoleMap) -> T) -> Option<T> {
        let request = Moment::now();
        let mut held = self.current().filter(|held| held.fits);
        let mut newer_than = request;
        for tries_left in (0..MAX_TRIES).rev() {
            let now = match held.take() {
                Some(held) => held,
                None => self.renew(newer_than)?,
            };
            newer_than = newer_than.max(now.born);
            if !now.stack.write_back() {
                return None;
            }
            // What was just written back may have moved a counter: a map that is read now would be void at once.
            if tries_left > 0 && now.slowest().is_none() && !now.stack.unchanged() {
                continue;
            }
            let answer = now.ask(request, &ask);
            self.tell_map(&now);
            if now.is_believed(request) {
                return Some(answer);
            }
        }
        self.tell_busy();
        None
    }

    /// Resolves the stack again; `None` while the last time is too recent to wait for the next. Of several requests one does
    /// the work, and those that were there before it began share it.
    fn renew(&self, newer_than: Moment) -> Option<Arc<Held>> {
        let mut waits = self.renewing.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(held) = self.current() {
            if held.born > newer_than {
                return Some(held);
            }
            let rest = held.rest();
            if !waits.allow(rest) {
                self.tell_busy();
                return None;
            }
            waits.waited += rest;
            // With the lock: the others would wait as long.
            thread::sleep(rest);
        }
        let (born, made) = (Moment::now(), Instant::now());
        let stack = self.backing.resolve(&self.context);
        let resolved_in = made.elapsed();
        let fits = self.backing.len().is_ok_and(|len| len == stack.map().len());
        let (slowest, told) = (AtomicU64::new(0), AtomicBool::new(false));
        let held = Arc::new(Held { stack, born, made, resolved_in, slowest, told, fits });
        *self.held.write().unwrap_or_else(PoisonError::into_inner) = Some(held.clone());
        Some(held)
    }

    fn current(&self) -> Option<Arc<Held>> {
        self.held.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Says once of each stack, after its first question, what became of it.
    fn tell_map(&self, held: &Held) {
        // Read first: a swap would take the line away from the other processors at each request.
        if held.told.load(Ordering::Relaxed) || held.told.swap(true, Ordering::Relaxed) {
            return;
        }
        let path = shown(self.backing.name());
        let reason = held.stack.map().dense_because();
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        match &reason {
            Some(reason) if told.as_ref() != Some(reason) => {
                self.tell(Level::Warn, &format!("{path}: all data: {reason}"));
            }
            Some(_) => {}
            None => self.tell(Level::Info, &format!("{path}: new map")),
        }
        *told = reason;
        let memory = held.stack.map().memory();
        self.maps.keep(&self.held, memory);
        give_back_after(memory);
    }

    fn tell_busy(&self) {
        // A device that is gone is not busy.
        if self.backing.len().is_ok() && !self.told_busy.swap(true, Ordering::Relaxed) {
            let path = shown(self.backing.name());
            let why = "changes faster than its map can be read: all data in between; back up a snapshot instead";
            self.tell(Level::Warn, &format!("{path}: {why}"));
        }
    }

    fn tell(&self, level: Level, message: &str) {
        log!(if self.quiet { Level::Debug } else { level }, "{message}");
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.maps.release(&self.held);
        let memory = self.current().map_or(Bytes::ZERO, |held| held.stack.map().memory());
        self.drop_map();
        give_back_after(memory);
    }
}

/// Gives memory back after a map of that size was made, which takes more for a while, or dropped.
fn give_back_after(map: Bytes) {
    if map >= LARGE {
        memory::give_back();
    }
}
