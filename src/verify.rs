//! Verification: whether the holes of a device read as zeros, and whether a copy has the bytes of a device.
//!
//! | function | what it compares |
//! |---|---|
//! | [`holes()`] | every hole with zeros |
//! | [`sample()`] | pieces of holes that are chosen at random with zeros |
//! | [`copy()`] | a copy with the device; what is a hole in both is not read |
//!
//! Bytes are read through the export, as a mount reads them. The map is that of a mount: [`Handle`] answers under the freshness
//! rule.
//!
//! # A device in use
//!
//! A range that was a hole may have been written before it is read, and it may have been discarded again before the map is asked
//! once more. So a byte that is not zero proves nothing by itself. [`suspects`] has the rounds that a range must pass before it is
//! reported, and what they prove.

mod batch;
mod copy;
mod differences;
mod findings;
mod holes;
mod pieces;
mod progress;
mod sample;
mod suspects;
mod threads;

pub use copy::{CopyReport, copy};
pub use findings::{Findings, Ranges};
pub use holes::{HolesReport, holes, sample};
pub use progress::Progress;
pub use sample::{LARGEST_SAMPLE, SAMPLE, random_seed};

use crate::error::Error;
use crate::handle::Handle;
use crate::sys::buffer::AlignedBuffer;
use crate::units::Bytes;

/// The longest read.
const PIECE: Bytes = Bytes::new(1 << 20);

/// The number of bytes in a range that is at most [`PIECE`] long.
fn length(range: &std::ops::Range<Bytes>) -> usize {
    range.end.index_from(range.start)
}

/// The bytes of a piece, all of them.
///
/// # Errors
/// As [`Handle::read`], and when the device has become shorter: what it does not have any more is not verified.
fn read_piece<'a>(
    handle: &Handle,
    buffer: &'a mut AlignedBuffer,
    piece: &std::ops::Range<Bytes>,
) -> crate::error::Result<&'a [u8]> {
    let bytes = handle.read(buffer, piece.start, length(piece))?;
    match bytes.len() < length(piece) {
        true => Err(Error::failed("it has become shorter").on(handle.export().name())),
        false => Ok(bytes),
    }
}
