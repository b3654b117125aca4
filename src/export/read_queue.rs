//! Reads of which many are in progress at the same time, for reading ahead.

use std::fs::File;
use std::io;
use std::sync::{Arc, OnceLock};

use log::debug;

use super::view::ImageRead;
use crate::source::nbd::{BegunRead, Client};
use crate::sys::aio::{AioQueue, AioRead};
use crate::sys::buffer::AlignedBuffer;
use crate::units::Bytes;

/// The longest direct read that is begun as one request. The kernel divides it as the device needs.
const LONGEST: Bytes = Bytes::new(2 << 20);

/// Reads of one device that are begun first and waited for later.
pub trait ReadQueue: Send + Sync {
    /// The longest single read.
    fn longest(&self) -> Bytes;

    /// Begins reads, each from its offset on and as long as its buffer: at most [`ReadQueue::longest`], aligned to the
    /// unit of the export, and before the last whole unit of it ends.
    ///
    /// Their bytes are read from the device at some time after this call began. The results are in the same order; after
    /// the first one that cannot be begun there are no more.
    fn begin(&self, reads: Vec<(Bytes, AlignedBuffer)>) -> Vec<PendingRead>;

    /// Waits for the reads that were given up, for a limited time. Called before the device is closed.
    fn finish(&self);
}

/// A read that was begun. Dropping it gives its bytes up.
pub enum PendingRead {
    /// Of a device or file of this host.
    Direct(AioRead),
    /// Of an NBD server.
    Nbd(BegunRead),
    /// Of an image that is made as it is read.
    Image(ImageRead),
}

impl PendingRead {
    /// Waits for the bytes. They are fewer than asked for where the device has become shorter.
    ///
    /// # Errors
    /// When they cannot be read. Reading them again may have another result.
    pub fn wait(self) -> io::Result<AlignedBuffer> {
        match self {
            Self::Direct(read) => read.wait(),
            Self::Nbd(read) => read.wait(),
            Self::Image(read) => read.wait(),
        }
    }
}

/// The largest number of reads in progress on one device.
const DEPTH: u16 = 256;

/// Direct reads of a device or file of this host. Dropping it waits for those that are in progress.
pub(super) struct DirectQueue {
    /// Opened with `O_DIRECT`.
    file: Arc<File>,
    /// Made at the first use; `None` where the kernel has none to give.
    queue: OnceLock<Option<Arc<AioQueue>>>,
}

impl DirectQueue {
    /// A queue of reads of `file`, which is open with `O_DIRECT`.
    pub(super) fn new(file: Arc<File>) -> Self {
        Self { file, queue: OnceLock::new() }
    }
}

impl ReadQueue for DirectQueue {
    fn longest(&self) -> Bytes {
        LONGEST
    }

    fn begin(&self, reads: Vec<(Bytes, AlignedBuffer)>) -> Vec<PendingRead> {
        let make = || AioQueue::new(DEPTH).inspect_err(|error| debug!("no asynchronous reads: {error}")).ok();
        match self.queue.get_or_init(make) {
            Some(queue) => queue.begin(&self.file, reads).into_iter().map(PendingRead::Direct).collect(),
            None => Vec::new(),
        }
    }

    /// The kernel waits for them when the queue is dropped.
    fn finish(&self) {}
}

impl ReadQueue for Client {
    fn longest(&self) -> Bytes {
        self.longest_read()
    }

    fn begin(&self, reads: Vec<(Bytes, AlignedBuffer)>) -> Vec<PendingRead> {
        self.begin_reads(reads).into_iter().map(PendingRead::Nbd).collect()
    }

    fn finish(&self) {
        self.finish_reads();
    }
}
