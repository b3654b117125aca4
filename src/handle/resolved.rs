//! A resolved stack, its extents once they are loaded, and what both cost.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::sequence::SequenceNumber;
use crate::source::{Loaded, Stack};
use crate::units::Bytes;

/// After a stack that took T to resolve and load, the next one may be resolved when this many times T have passed since: a
/// tenth of the time at most.
const REST_FACTOR: u32 = 9;

/// A resolved stack.
pub(super) struct Resolved {
    pub(super) stack: Stack,
    /// Taken before anything of the stack was looked at.
    pub(super) born: SequenceNumber,
    /// The time at which resolving began.
    begun: Instant,
    resolved_in: Duration,
    loaded: OnceLock<Loaded>,
    /// Whether a question was answered from the description of the stack.
    answered: AtomicBool,
    /// Whether the stack is as long as the device. From then on a guard watches the length.
    pub(super) fits: bool,
}

impl Resolved {
    /// Resolves a stack. `len` gives the length of the device, and is called after that.
    pub(super) fn new(resolve: impl FnOnce() -> Stack, len: impl FnOnce() -> Option<Bytes>) -> Self {
        let (born, begun) = (SequenceNumber::next(), Instant::now());
        let stack = resolve();
        let resolved_in = begun.elapsed();
        let fits = len() == Some(stack.len());
        Self { stack, born, begun, resolved_in, loaded: OnceLock::new(), answered: AtomicBool::new(false), fits }
    }

    /// Whether the extents are loaded.
    pub(super) fn is_loaded(&self) -> bool {
        self.loaded.get().is_some()
    }

    /// The loaded extents. The first call loads them, while other calls wait for the result, and then calls `first`
    /// with them.
    pub(super) fn load(&self, first: impl FnOnce(&Loaded)) -> &Loaded {
        if let Some(loaded) = self.loaded.get() {
            return loaded;
        }
        let mut is_first = false;
        let loaded = self.loaded.get_or_init(|| {
            is_first = true;
            self.stack.load()
        });
        if is_first {
            first(loaded);
        }
        loaded
    }

    /// The memory that the extents take; none before they are loaded.
    pub(super) fn memory(&self) -> Bytes {
        self.loaded.get().map_or(Bytes::ZERO, |loaded| loaded.memory)
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
        let is_temporary = self.loaded.get().is_some_and(|loaded| loaded.is_temporary);
        !is_temporary && if inside { self.stack.unchanged_inside() } else { self.stack.unchanged() }
    }

    /// Notes that a question was answered from the description of the stack, without its extents.
    pub(super) fn set_answered(&self) {
        // Most calls find it set. A write would take the cache line from the other processors each time.
        if !self.answered.load(Ordering::Relaxed) {
            self.answered.store(true, Ordering::Relaxed);
        }
    }

    /// How long it is until the stack may be resolved again. A stack that answered nothing cost nothing: it was void before
    /// its extents were loaded, and the same request resolves it again.
    pub(super) fn rest(&self) -> Duration {
        let cost = match self.loaded.get() {
            Some(loaded) => self.resolved_in + loaded.cost,
            None if self.answered.load(Ordering::Relaxed) => self.resolved_in,
            None => Duration::ZERO,
        };
        (cost * (REST_FACTOR + 1)).saturating_sub(self.begun.elapsed())
    }
}
