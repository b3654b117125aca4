//! What the open files of a mount share for reading ahead: the memory, and the limits.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Instant;

use super::Reader;
use crate::export::MIN_ALIGN;
use crate::sys::buffer::{AlignedBuffer, BufferPool};
use crate::units::Bytes;

/// The default of `-o read_ahead`: the memory of all that is fetched ahead in a mount.
const DEFAULT_READ_AHEAD: Bytes = Bytes::new(32 << 20);

/// The default of `-o queue_depth`: the reads of one open file that are in progress at the same time. It is the number of
/// requests that nbdcopy has in progress for one connection.
const DEFAULT_QUEUE_DEPTH: u16 = 64;

/// What the open files of a mount share for reading ahead.
pub struct ReadAhead {
    pool: Arc<BufferPool>,
    /// The most bytes that one open file may have fetched.
    pub(super) per_file: Bytes,
    depth: usize,
    /// Open files that have something fetched.
    readers: Mutex<Vec<Weak<Reader>>>,
}

impl ReadAhead {
    /// At most `memory` bytes for all open files together, and a half of it for one; at most `depth` reads in progress for
    /// one open file. Nothing is read ahead with a `memory` of zero.
    pub fn new(memory: Option<Bytes>, depth: Option<u16>) -> Arc<Self> {
        let memory = memory.unwrap_or(DEFAULT_READ_AHEAD).get();
        Arc::new(Self {
            pool: BufferPool::new(usize::try_from(memory).unwrap_or(usize::MAX)),
            per_file: Bytes::new(memory / 2),
            depth: usize::from(depth.unwrap_or(DEFAULT_QUEUE_DEPTH)),
            readers: Mutex::default(),
        })
    }

    /// The number of reads of one open file that are in progress at the same time, at most.
    pub fn depth(&self) -> usize {
        self.depth
    }

    /// Whether anything can be fetched: whether a buffer of one page may be made, which takes twice as much memory.
    pub(super) fn is_used(&self) -> bool {
        self.per_file >= MIN_ALIGN
    }

    /// Bytes of all buffers.
    pub fn memory(&self) -> usize {
        self.pool.bytes()
    }

    /// Gives the memory that nothing uses back to the system.
    pub fn trim(&self) {
        self.pool.trim();
    }

    /// A buffer, for which pieces of other files that are too old to be used give way. These files are added to `others`.
    /// They may have been closed in between, and dropping one may wait for its device. So the caller drops them when it
    /// holds no lock, and has begun its own reads: the device may be one that reads the file of the caller.
    pub(super) fn buffer(&self, len: usize, others: &mut Vec<Arc<Reader>>) -> Option<AlignedBuffer> {
        self.pool.take(len).or_else(|| {
            let readers = self.readers.lock().unwrap_or_else(PoisonError::into_inner).clone();
            for reader in readers.iter().filter_map(Weak::upgrade) {
                // A file that is used at this moment keeps what it has.
                if let Ok(mut state) = reader.state.try_lock() {
                    state.window.drop_stale(reader.handle.generation(), Instant::now());
                }
                others.push(reader);
            }
            self.pool.take(len)
        })
    }

    pub(super) fn add(&self, reader: &Arc<Reader>) {
        let mut readers = self.readers.lock().unwrap_or_else(PoisonError::into_inner);
        readers.retain(|other| other.strong_count() > 0);
        readers.push(Arc::downgrade(reader));
    }
}
