//! The used and the free space of file systems, from their own metadata.
//!
//! A range is free only if the file system is clean, its metadata is understood to the last flag, and each checksum that the
//! format has was verified. Anything else is an error with its reason, and all of the device is data.
//!
//! Nobody else writes to the device in between: the caller holds it exclusively.

pub mod btrfs;
pub mod detect;
pub mod ext;
mod fields;
pub mod memory;
pub mod partitions;
pub mod swap;
mod window;
pub mod xfs;

use std::io;

use crate::units::Bytes;

/// Reads the bytes of a device.
#[allow(clippy::len_without_is_empty, reason = "no device that is read is empty")]
pub trait ReadBytes: Sync {
    /// The length of the device.
    fn len(&self) -> Bytes;

    /// Fills `buffer` with the bytes at `offset`.
    ///
    /// # Errors
    /// As pread(2); and when the device ends before the end of the buffer.
    fn read_exact(&self, offset: Bytes, buffer: &mut [u8]) -> io::Result<()>;
}
