//! One open device: reads, and seeks that are true now.
//!
//! The freshness rule lives here. A hole is claimed only after
//! 1. the dirty pages of every layer were written back, so that the layers below know of every completed write;
//! 2. the map was asked;
//! 3. every guard of the stack still saw what it saw before the map was made.
//!
//! When a guard saw a change the stack is resolved again, which costs at most a tenth of the time: a device that is
//! written faster than its map can be read is all data in between.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use log::{info, warn};

use crate::error::Result;
use crate::map::view::{self, Whence};
use crate::source::{Backing, Context, Stack};
use crate::sys::buffer::AlignedBuffer;
use crate::units::Bytes;

/// How often one request may resolve the stack again before it answers "data".
const MAX_TRIES: usize = 3;

/// After a rebuild that took T, the next one waits for this many times T: a tenth of the time at most.
const REST_FACTOR: u32 = 9;

/// An open device, shared by all opens of its file.
pub struct Handle {
    backing: Backing,
    context: Arc<Context>,
    stack: RwLock<Option<Arc<Stack>>>,
    rebuild: Mutex<Rebuild>,
    /// Whether the user was already told that this device changes too fast.
    told_busy: AtomicBool,
}

/// When the stack was resolved, and what that cost.
#[derive(Default)]
struct Rebuild {
    not_before: Option<Instant>,
    /// What the last stack was dense for, so that it is said once.
    reason: Option<String>,
}

impl Handle {
    /// Takes an open device.
    pub fn new(backing: Backing, context: Arc<Context>) -> Self {
        Self {
            backing,
            context,
            stack: RwLock::default(),
            rebuild: Mutex::default(),
            told_busy: AtomicBool::new(false),
        }
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
        let len = self.backing.len()?;
        if offset >= len {
            return Ok(None);
        }
        let data = match whence {
            Whence::Data => Some(offset),
            Whence::Hole => Some(len),
        };
        let align = self.backing.align();
        let claim = self.claim(len, |stack| {
            let found = view::seek(stack.map(), align, offset, whence);
            (found != data).then_some(found)
        });
        Ok(claim.unwrap_or(data))
    }

    /// Whether a seek would find a hole.
    ///
    /// # Errors
    /// When the device is gone.
    pub fn has_hole(&self) -> Result<bool> {
        let align = self.backing.align();
        let len = self.backing.len()?;
        Ok(self.claim(len, |stack| view::has_hole(stack.map(), align).then_some(())).is_some())
    }

    /// Bytes that are stored, where the sources know it without a walk.
    pub fn allocated(&self) -> Option<Bytes> {
        self.current().and_then(|stack| stack.map().allocated())
    }

    /// Forgets the map and everything that it holds open; the next seek makes a new one.
    pub fn drop_map(&self) {
        *self.stack.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Asks a stack for something that is a claim of holes; `None` when it claims none, or none may be claimed now.
    fn claim<T>(&self, len: Bytes, ask: impl Fn(&Stack) -> Option<T>) -> Option<T> {
        let mut stack = self.current().filter(|stack| stack.map().len() == len);
        let mut made_now = false;
        for _ in 0..MAX_TRIES {
            let (now, claim) = match stack.take() {
                Some(now) => {
                    let claim = Self::ask(&now, &ask);
                    (now, claim)
                }
                None => {
                    made_now = true;
                    self.rebuild(&ask)?
                }
            };
            // "Data" is verified as well: a device may have gained holes since.
            if now.map().len() == len && believed(&now, made_now) {
                return claim;
            }
        }
        self.tell_busy();
        None
    }

    /// Writes back what is dirty, then asks.
    fn ask<T>(stack: &Stack, ask: &impl Fn(&Stack) -> Option<T>) -> Option<T> {
        if stack.write_back() { ask(stack) } else { None }
    }

    /// Resolves the stack again and asks it; `None` while the last rebuild is too recent.
    ///
    /// The question is part of the time it costs: a map may be read only when it is asked.
    fn rebuild<T>(&self, ask: &impl Fn(&Stack) -> Option<T>) -> Option<(Arc<Stack>, Option<T>)> {
        let mut rebuild = self.rebuild.lock().unwrap_or_else(PoisonError::into_inner);
        let start = Instant::now();
        if rebuild.not_before.is_some_and(|not_before| start < not_before) {
            self.tell_busy();
            return None;
        }
        let stack = Arc::new(self.backing.resolve(&self.context));
        let claim = Self::ask(&stack, ask);
        let cost = start.elapsed();
        rebuild.not_before = Some(Instant::now() + cost * REST_FACTOR);
        self.tell_map(&stack, cost, &mut rebuild.reason);
        *self.stack.write().unwrap_or_else(PoisonError::into_inner) = Some(stack.clone());
        Some((stack, claim))
    }

    fn current(&self) -> Option<Arc<Stack>> {
        self.stack.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn tell_map(&self, stack: &Stack, cost: Duration, told: &mut Option<String>) {
        let reason = stack.map().dense_because();
        match &reason {
            Some(reason) if told.as_ref() != Some(reason) => {
                warn!("{}: all data: {reason}", self.backing.path().display());
            }
            Some(_) => {}
            None => info!("{}: new map in {cost:?}", self.backing.path().display()),
        }
        *told = reason;
    }

    fn tell_busy(&self) {
        if !self.told_busy.swap(true, Ordering::Relaxed) {
            let path = self.backing.path().display();
            warn!("{path}: changes faster than its map can be read: all data in between; back up a snapshot instead");
        }
    }
}

/// Whether a claim stands. A stack that was made within the request holds every write that completed before it; what
/// must not have changed since is only how it is built.
fn believed(stack: &Stack, made_now: bool) -> bool {
    if made_now { stack.same_shape() } else { stack.unchanged() }
}
