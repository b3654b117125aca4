//! Buffers for reads, which are reused: the page faults of new memory cost more than a small read.

use std::sync::{Mutex, PoisonError};

use crate::sys::buffer::AlignedBuffer;

/// The largest number of unused buffers: one for each session thread. A buffer grows to the largest read.
const KEPT: usize = super::SESSION_THREADS;

/// The buffers that no read uses now.
#[derive(Debug, Default)]
pub(super) struct Buffers(Mutex<Vec<AlignedBuffer>>);

impl Buffers {
    /// Calls `work` with a buffer: the one that was used last, or a new one.
    pub(super) fn with_buffer<T>(&self, work: impl FnOnce(&mut AlignedBuffer) -> T) -> T {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut buffer = kept.unwrap_or_default();
        let done = work(&mut buffer);
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if free.len() < KEPT {
            free.push(buffer);
        }
        done
    }
}
