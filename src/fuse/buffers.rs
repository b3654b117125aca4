//! Buffers for reads and writes, which are reused: the page faults of new memory cost more than a small read.

use std::sync::{Arc, Mutex, PoisonError};

use crate::sys::buffer::AlignedBuffer;

/// The largest number of unused buffers: one for each session thread. A buffer grows to the largest read.
const KEPT: usize = super::SESSION_THREADS;

/// The buffers that no read uses now.
#[derive(Debug, Default)]
pub(super) struct Buffers(Mutex<Vec<AlignedBuffer>>);

impl Buffers {
    /// Calls `work` with a buffer: the one that was used last, or a new one.
    pub(super) fn with_buffer<T>(&self, work: impl FnOnce(&mut AlignedBuffer) -> T) -> T {
        let mut buffer = self.take();
        let done = work(&mut buffer);
        self.put(buffer);
        done
    }

    /// A copy of `bytes` in a buffer that the request of another thread can own.
    pub(super) fn copy_of(self: &Arc<Self>, bytes: &[u8]) -> CopiedBytes {
        let mut buffer = self.take();
        buffer.resize(bytes.len()).copy_from_slice(bytes);
        CopiedBytes { buffer, buffers: self.clone() }
    }

    fn take(&self) -> AlignedBuffer {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default()
    }

    fn put(&self, buffer: AlignedBuffer) {
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if free.len() < KEPT {
            free.push(buffer);
        }
    }
}

/// The bytes of a write. They begin on a page, as writes past the page cache of a device need it.
pub(super) struct CopiedBytes {
    buffer: AlignedBuffer,
    buffers: Arc<Buffers>,
}

impl AsRef<[u8]> for CopiedBytes {
    fn as_ref(&self) -> &[u8] {
        self.buffer.bytes()
    }
}

impl Drop for CopiedBytes {
    fn drop(&mut self) {
        self.buffers.put(std::mem::take(&mut self.buffer));
    }
}
