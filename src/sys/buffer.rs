//! Buffers for reads with O_DIRECT, and a pool of them with a limit.

use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The alignment of a buffer in bytes. It is enough for every device: no driver requires more than a page
/// (`stx_dio_mem_align` of statx(2)).
const ALIGN: usize = 4096;

/// A byte buffer that begins at a multiple of 4096. It keeps its memory when it becomes shorter, so that it can be reused.
#[derive(Debug, Default)]
pub struct AlignedBuffer {
    memory: Vec<u8>,
    start: usize,
    len: usize,
    /// The pool that gets the memory back when the buffer is dropped.
    pool: Option<Arc<BufferPool>>,
}

impl AlignedBuffer {
    /// An empty buffer, which has no memory yet.
    pub const fn new() -> Self {
        Self { memory: Vec::new(), start: 0, len: 0, pool: None }
    }

    /// Sets the length to `len` and returns the buffer. Its contents are unspecified.
    pub fn resize(&mut self, len: usize) -> &mut [u8] {
        if self.memory.len() < len + ALIGN {
            self.memory = vec![0; len + ALIGN];
            self.start = self.memory.as_ptr().align_offset(ALIGN);
        }
        self.len = len;
        &mut self.memory[self.start..self.start + len]
    }

    /// Increases the length to `len` and returns the buffer. It keeps its bytes; those that are added are unspecified.
    pub fn grow(&mut self, len: usize) -> &mut [u8] {
        if self.memory.len() < len + ALIGN {
            let bytes = self.bytes().to_vec();
            self.resize(len)[..bytes.len()].copy_from_slice(&bytes);
        }
        self.len = len;
        &mut self.memory[self.start..self.start + len]
    }

    /// Makes the buffer shorter. A `len` that is not below the length changes nothing.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// The contents, with the length that was set last.
    pub fn bytes(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }

    /// The contents, with the length that was set last.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

impl PartialEq for AlignedBuffer {
    fn eq(&self, other: &Self) -> bool {
        self.bytes() == other.bytes()
    }
}

impl Eq for AlignedBuffer {}

impl Drop for AlignedBuffer {
    fn drop(&mut self) {
        if let Some(pool) = self.pool.take() {
            pool.put(Self { pool: None, len: 0, start: self.start, memory: mem::take(&mut self.memory) });
        }
    }
}

/// Buffers that together take no more memory than a limit. The memory of a buffer that is dropped is kept for the next
/// one, since the page faults of new memory cost more than a small read.
#[derive(Debug)]
pub struct BufferPool {
    limit: usize,
    state: Mutex<PoolState>,
}

#[derive(Debug, Default)]
struct PoolState {
    /// Bytes of all buffers that exist: those in use, and the free ones.
    bytes: usize,
    /// Buffers that nothing uses. The one that was used last is at the end.
    free: Vec<AlignedBuffer>,
}

impl BufferPool {
    /// A pool of at most `limit` bytes.
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, state: Mutex::default() })
    }

    /// A buffer of `len` bytes, whose contents are unspecified. `None` if it would exceed the limit.
    pub fn take(self: &Arc<Self>, len: usize) -> Option<AlignedBuffer> {
        let mut state = self.lock();
        let mut buffer = state.free.pop().unwrap_or_default();
        let (before, after) = (buffer.memory.len(), buffer.memory.len().max(len.checked_add(ALIGN)?));
        while state.bytes - before + after > self.limit {
            let Some(unused) = (!state.free.is_empty()).then(|| state.free.remove(0)) else {
                state.free.push(buffer);
                return None;
            };
            state.bytes -= unused.memory.len();
        }
        state.bytes = state.bytes - before + after;
        drop(state);
        buffer.resize(len);
        buffer.pool = Some(self.clone());
        Some(buffer)
    }

    /// Gives the memory of the free buffers back to the system.
    pub fn trim(&self) {
        let mut state = self.lock();
        let free = mem::take(&mut state.free);
        state.bytes -= free.iter().map(|buffer| buffer.memory.len()).sum::<usize>();
    }

    /// Bytes of all buffers that exist, in use or free.
    pub fn bytes(&self) -> usize {
        self.lock().bytes
    }

    fn put(&self, buffer: AlignedBuffer) {
        self.lock().free.push(buffer);
    }

    fn lock(&self) -> MutexGuard<'_, PoolState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_begin_on_a_page() {
        let mut buffer = AlignedBuffer::new();
        assert!(buffer.bytes().is_empty());
        for len in [1, 4096, 1 << 20, 5] {
            assert_eq!(buffer.resize(len).len(), len);
            assert_eq!(buffer.bytes().as_ptr().align_offset(ALIGN), 0);
        }
    }

    #[test]
    fn a_pool_reuses_memory_and_keeps_within_its_limit() {
        let pool = BufferPool::new(3 * (ALIGN + 100));
        let buffers: Vec<_> = (0..3).map(|_| pool.take(100).unwrap()).collect();
        assert!(pool.take(100).is_none(), "the limit is reached");
        let first = buffers[2].bytes().as_ptr();
        drop(buffers);
        assert_eq!(pool.bytes(), 3 * (ALIGN + 100), "free memory counts");
        assert_eq!(pool.take(50).unwrap().bytes().as_ptr(), first, "the memory that was used last is reused");
        // A longer one takes the place of free ones.
        let long = pool.take(2 * ALIGN).unwrap();
        assert_eq!(long.bytes().len(), 2 * ALIGN);
        assert!(pool.bytes() <= 3 * (ALIGN + 100));
        drop(long);
        pool.trim();
        assert_eq!(pool.bytes(), 0);
        assert!(pool.take(usize::MAX).is_none());
    }

    #[test]
    fn a_buffer_that_grows_keeps_its_bytes() {
        let mut buffer = AlignedBuffer::new();
        buffer.resize(3).copy_from_slice(b"abc");
        for len in [4, 5000, 1 << 20] {
            assert_eq!(&buffer.grow(len)[..3], b"abc");
            assert_eq!((buffer.bytes().len(), buffer.bytes().as_ptr().align_offset(ALIGN)), (len, 0));
        }
    }
}
