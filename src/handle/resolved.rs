//! A resolved stack, its extents once they are loaded, and what both cost.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use super::clock::Clock;
use super::sequence::SequenceNumber;
use crate::source::{Loaded, Stack, StaticDevices};
use crate::units::Bytes;

/// After a stack that took T to resolve and load, the next one may be resolved when this many times T have passed since: a
/// tenth of the time at most.
const REST_FACTOR: u32 = 9;

/// Extents are in use for at least this long after a use. A client on a busy machine may not run for some milliseconds, which
/// is longer than the rest of extents that cost little.
const LEAST_USE: Duration = Duration::from_millis(100);

/// What resolving a stack and loading its extents cost.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cost {
    /// The time at which it was done.
    pub(super) done: Duration,
    pub(super) spent: Duration,
}

impl Cost {
    /// How long it is at `now` until the same may be done again.
    pub(super) fn rest(&self, now: Duration) -> Duration {
        (self.done + self.whole_rest()).saturating_sub(now)
    }

    /// The rest from its begin to its end.
    pub(super) fn whole_rest(&self) -> Duration {
        self.spent * REST_FACTOR
    }
}

/// A resolved stack.
pub(super) struct Resolved {
    pub(super) stack: Stack,
    /// Taken before anything of the stack was looked at.
    pub(super) born: SequenceNumber,
    /// The cost of resolving.
    resolving: Cost,
    /// The extents, and the cost of resolving and of loading them.
    loaded: OnceLock<(Loaded, Cost)>,
    /// The cost of the extents that the device had before, if they were dropped for lack of room. The extents of this stack
    /// may be loaded after their rest.
    pub(super) evicted: Option<Cost>,
    /// The milliseconds on the clock at which the extents were last used.
    used: AtomicU64,
    /// Whether a question was answered from the description of the stack.
    answered: AtomicBool,
    /// [`StaticDevices::changes`] when the memory of the extents was counted last.
    counted: AtomicU64,
    /// [`Stack::written_memory`] at the same time.
    counted_written: AtomicU64,
    /// Whether the stack is as long as the device. From then on a guard watches the length.
    pub(super) fits: bool,
}

impl Resolved {
    /// Resolves a stack. `len` gives the length of the device, and is called after that.
    pub(super) fn new(
        clock: &Clock,
        evicted: Option<Cost>,
        resolve: impl FnOnce() -> Stack,
        len: impl FnOnce() -> Option<Bytes>,
    ) -> Self {
        let (born, begun) = (SequenceNumber::next(), clock.now());
        let stack = resolve();
        let done = clock.now();
        let resolving = Cost { done, spent: done.saturating_sub(begun) };
        let fits = len() == Some(stack.len());
        let (loaded, answered) = (OnceLock::new(), AtomicBool::new(false));
        let [used, counted, counted_written] = [0; 3].map(AtomicU64::new);
        Self { stack, born, resolving, loaded, evicted, used, answered, counted, counted_written, fits }
    }

    /// Whether the extents are loaded.
    pub(super) fn is_loaded(&self) -> bool {
        self.loaded.get().is_some()
    }

    /// The loaded extents. The first call loads them, while other calls wait for the result, and then calls `first`
    /// with them.
    pub(super) fn load(&self, clock: &Clock, first: impl FnOnce(&Loaded)) -> &Loaded {
        if let Some((loaded, _)) = self.loaded.get() {
            return loaded;
        }
        let mut is_first = false;
        let (loaded, _) = self.loaded.get_or_init(|| {
            is_first = true;
            let start = clock.now();
            let loaded = self.stack.load();
            let done = clock.now();
            self.set_used(done);
            (loaded, Cost { done, spent: self.resolving.spent + done.saturating_sub(start) })
        });
        if is_first {
            first(loaded);
        }
        loaded
    }

    /// The extents, if they are loaded.
    pub(super) fn loaded(&self) -> Option<&Loaded> {
        self.loaded.get().map(|(loaded, _)| loaded)
    }

    /// The memory that the extents take; none before they are loaded.
    pub(super) fn memory(&self) -> Bytes {
        self.loaded().map_or(Bytes::ZERO, |loaded| loaded.map().memory())
    }

    /// The memory that the extents take now, if more of them may have been asked since the last call.
    pub(super) fn memory_again(&self, devices: Option<&StaticDevices>) -> Option<Bytes> {
        let is_same = |counted: &AtomicU64, now| {
            counted.load(Ordering::Relaxed) == now || counted.swap(now, Ordering::Relaxed) == now
        };
        let is_counted = devices.is_none_or(|devices| is_same(&self.counted, devices.changes()))
            & is_same(&self.counted_written, self.stack.written_memory().get());
        (!is_counted && self.is_loaded()).then(|| self.memory())
    }

    /// Whether an answer that was given between `request` and now is true now.
    ///
    /// A stack that was resolved within the request contains every write that completed before the request. It is then
    /// enough that the layers are still built as they were. With `inside` the answer holds whatever their lengths are now.
    pub(super) fn is_fresh(&self, request: SequenceNumber, inside: bool) -> bool {
        if !self.fits {
            return false;
        }
        if self.born > request {
            return self.stack.same_shape();
        }
        let is_temporary = self.loaded().is_some_and(|loaded| loaded.is_temporary);
        !is_temporary && self.stack.extents_hold(inside)
    }

    /// Notes that a question was answered from the description of the stack, without its extents.
    pub(super) fn set_answered(&self) {
        // Most calls find it set. A write would take the cache line from the other processors each time.
        if !self.answered.load(Ordering::Relaxed) {
            self.answered.store(true, Ordering::Relaxed);
        }
    }

    /// Notes that the extents are used at `now`.
    pub(super) fn set_used(&self, now: Duration) {
        // At most one write in a millisecond, for the same reason. A thread that was interrupted here may set an earlier
        // time, which only makes the extents look unused for a little longer.
        let now = milliseconds(now);
        if self.used.load(Ordering::Relaxed) < now {
            self.used.store(now, Ordering::Relaxed);
        }
    }

    /// The milliseconds on the clock at which the extents were last used.
    pub(super) fn last_used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Whether the extents are in use at `now`: they were used within the time that they must rest for their cost, or within
    /// [`LEAST_USE`]. Loading them again after that costs no more than a tenth of the time.
    pub(super) fn in_use(&self, now: Duration) -> bool {
        // Both times are rounded down, so that less than one millisecond more may seem to have passed.
        let in_use = self.cost().whole_rest().max(LEAST_USE);
        milliseconds(now).saturating_sub(self.last_used()) <= milliseconds(in_use) + 1
    }

    /// What the stack cost. One that answered nothing cost nothing: it was void before its extents were loaded, and the same
    /// request resolves it again.
    pub(super) fn cost(&self) -> Cost {
        match self.loaded.get() {
            Some((_, cost)) => *cost,
            None if self.answered.load(Ordering::Relaxed) => self.resolving,
            None => Cost { spent: Duration::ZERO, ..self.resolving },
        }
    }
}

fn milliseconds(time: Duration) -> u64 {
    time.as_millis().try_into().unwrap_or(u64::MAX)
}
