//! Writing to what a file of a mount shows.

use std::io;
use std::ops::Range;

use crate::units::Bytes;

/// The way to write to one device, image, or export of a server.
///
/// It exists as long as its file is open for writing. That of a block device is the only one: it holds the device open with
/// `O_EXCL`, so that the device is neither mounted nor part of another device.
///
/// Callers check ranges first: all of them end at or before the end of the device, and none is empty. A range may begin and end at
/// any byte. Calls may come from several threads at the same time, also for the same range.
pub trait Writer: Send + Sync {
    /// Writes all of `bytes` at `offset`. Bytes around them stay as they are, whatever the block size of the device is.
    ///
    /// The write is complete when this returns: each later read through the export gets these bytes, and the kernel, the pool or
    /// the server has reported no error.
    ///
    /// # Errors
    /// As pwrite(2): `ENOSPC` from a pool that is full. After an error any part of the range may have been written.
    fn write_at(&self, bytes: &[u8], offset: Bytes) -> io::Result<()>;

    /// Makes a range read as zeros, with as few allocated blocks as the device allows.
    ///
    /// # Errors
    /// As pwrite(2). After an error any part of the range may be zeros.
    fn make_zero(&self, range: &Range<Bytes>) -> io::Result<Zeroed>;

    /// Returns when everything that was written before, through this writer, survives a loss of power.
    ///
    /// # Errors
    /// As fsync(2). An error is reported once at least, also if an earlier write caused it.
    fn flush(&self) -> io::Result<()>;

    /// Whether it writes nothing more, whatever is asked of it. An open that comes later needs another writer.
    fn has_ended(&self) -> bool {
        false
    }
}

/// What is known of a range after [`Writer::make_zero`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zeroed {
    /// All of it reads as zeros: the kernel or the server guarantees that.
    Proven,
    /// Some of it may be as it was before. The caller must look, and write zeros where there are none.
    Unproven,
}
