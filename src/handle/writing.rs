//! Writing to an open device, and making ranges of it zero.

use std::io;
use std::ops::Range;

use super::sequence::SequenceNumber;
use super::{EXTENTS_AT_ONCE, Handle};
use crate::deadline;
use crate::error::{Error, Result};
use crate::export::{Writer, Zeroed};
use crate::map::HoleMap;
use crate::map::view::{self, Whence};
use crate::sys::buffer::AlignedBuffer;
use crate::units::Bytes;

/// The size of the reads by which a range is found to be zeros.
const PIECE: u64 = 1 << 20;

/// Zeros are written to whole units of this size that have other bytes. No pool and no file system allocates smaller ones.
const UNIT: usize = 4096;

/// A range up to this length is read without a look at the map. Measured with a thin volume in user-mode-linux, each range after a write
/// that had made the map void: reading 64 MiB that are not mapped took 25 ms, and loading the map, with the wait before it, 120 to
/// 280 ms.
const READ_WHOLE: Bytes = Bytes::new(256 << 20);

/// After so many bytes of data the map is looked at again: it may have been all data only for a moment.
const LOOK_AGAIN: Bytes = Bytes::new(1 << 30);

static ZEROS: [u8; UNIT] = [0; UNIT];

impl Handle {
    /// Writes `bytes` at `offset`, as far as the device reaches. Returns how many of them were written: all, or those before
    /// the end of the device.
    ///
    /// # Errors
    /// ENOSPC at or past the end of the device, and when a pool is full. Otherwise EIO, or ENODEV for a device that is gone.
    pub fn write(&self, writer: &dyn Writer, offset: Bytes, bytes: &[u8]) -> Result<usize> {
        let left = self.export.len()?.index_from(offset);
        let inside = &bytes[..bytes.len().min(left)];
        if inside.is_empty() {
            return if bytes.is_empty() { Ok(0) } else { Err(self.past_end()) };
        }
        let written = writer.write_at(inside, offset);
        // What was fetched ahead before is older than this write. It is not used after the reply to it.
        self.begin_generation();
        written.map_err(|error| self.write_error(&format!("write at {offset}"), error))?;
        Ok(inside.len())
    }

    /// Makes a range read as zeros, as far as the device reaches. It takes as few allocated blocks as the device allows.
    ///
    /// # Errors
    /// As [`Handle::write`], except past the end, where there is nothing to do.
    pub fn make_zero(&self, writer: &dyn Writer, range: Range<Bytes>) -> Result<()> {
        let range = self.without_known_holes(range.start..range.end.min(self.export.len()?));
        if range.start >= range.end {
            return Ok(());
        }
        let zeroed = writer.make_zero(&range);
        self.begin_generation();
        match zeroed.map_err(|error| self.write_error(&format!("make zeros at {}", range.start), error))? {
            Zeroed::Proven => Ok(()),
            Zeroed::Unproven => self.prove_zero(writer, range),
        }
    }

    /// Returns when all completed writes survive a loss of power.
    ///
    /// # Errors
    /// As fsync(2).
    pub fn flush(&self, writer: &dyn Writer) -> Result<()> {
        writer.flush().map_err(|error| self.write_error("flush", error))
    }

    /// The range without the holes at its start and its end, in extents that are loaded already, and that own writes do not make void:
    /// an empty range if all of it is a hole. A program that has emptied a file first, and then writes data and makes the holes
    /// between, changes nothing but the ends of what it has written.
    ///
    /// Only where a hole takes no space: in a file, a hole may be space that is reserved, and would be freed.
    fn without_known_holes(&self, range: Range<Bytes>) -> Range<Bytes> {
        let request = SequenceNumber::last();
        let known = self.current().filter(|current| current.fits && current.stack.is_guarded());
        let Some((known, map)) = known.as_ref().and_then(|known| Some((known, known.loaded()?.map()))) else {
            return range;
        };
        if range.start >= range.end || !known.stack.write_back() {
            return range;
        }
        let used = used_part(map, &range);
        if used != range && known.is_fresh(request, false) { used } else { range }
    }

    /// Reads a range where the map has no hole, and writes zeros where there are other bytes.
    fn prove_zero(&self, writer: &dyn Writer, range: Range<Bytes>) -> Result<()> {
        let mut at = range.start;
        if range.end.saturating_sub(range.start) <= READ_WHOLE {
            return self.zero_data(writer, range);
        }
        while at < range.end {
            for (start, extent) in deadline::anew(|| self.extents(at..range.end))? {
                at = extent.end;
                if extent.kind.is_data() {
                    at = at.min(start.saturating_add(LOOK_AGAIN));
                    self.zero_data(writer, start..at)?;
                }
                if at < extent.end {
                    break;
                }
            }
        }
        Ok(())
    }

    /// Reads a range, and writes zeros where there are other bytes.
    fn zero_data(&self, writer: &dyn Writer, range: Range<Bytes>) -> Result<()> {
        let mut buffer = AlignedBuffer::new();
        let mut at = range.start;
        while at < range.end {
            // Pieces end where units do, so that a unit is looked at as a whole.
            let end = at.saturating_add(Bytes::new(1)).align_up(Bytes::new(PIECE)).unwrap_or(range.end).min(range.end);
            let size = usize::try_from(end.saturating_sub(at).get()).unwrap_or(0);
            let bytes = deadline::anew(|| self.read(&mut buffer, at, size))?;
            if bytes.len() < size {
                // The device has become shorter.
                return Ok(());
            }
            for used in used_units(bytes, at) {
                let start = at.saturating_add(Bytes::new(used.start as u64));
                self.write_zeros(writer, start, used.len())?;
            }
            at = end;
        }
        Ok(())
    }

    fn write_zeros(&self, writer: &dyn Writer, offset: Bytes, len: usize) -> Result<()> {
        let zeros = vec![0; len];
        let written = writer.write_at(&zeros, offset);
        self.begin_generation();
        written.map_err(|error| self.write_error(&format!("write zeros at {offset}"), error))
    }

    /// The error of a request that only concerns what is past the end.
    pub fn past_end(&self) -> Error {
        Error::failed("nothing can be written past its end").on(self.export.name()).with_errno(libc::ENOSPC)
    }

    /// The error of a request: the cause has the errno that the client gets, if that is one of write(2) that has a meaning for
    /// the client. All others are EIO. A device that is gone has no length left, so the cause may be ENOSPC.
    fn write_error(&self, what: &str, cause: io::Error) -> Error {
        let errno = match cause.raw_os_error() {
            _ if self.export.is_gone() => libc::ENODEV,
            Some(errno @ (libc::ENOSPC | libc::EDQUOT | libc::EROFS | libc::EPERM | libc::ENODEV)) => errno,
            _ => libc::EIO,
        };
        Error::failed(format!("cannot {what}")).on(self.export.name()).because(cause).with_errno(errno)
    }
}

/// The part of a range from its first byte of data to the end of its last one; empty if there is none. Holes at the end stay if there
/// are many extents before them.
fn used_part(map: &dyn HoleMap, range: &Range<Bytes>) -> Range<Bytes> {
    let next = |from: Bytes, whence: Whence| {
        view::seek(map, Bytes::new(1), from, whence).map_or(range.end, |found| found.min(range.end))
    };
    let start = next(range.start, Whence::Data);
    let mut data = start;
    for _ in 0..EXTENTS_AT_ONCE {
        let end = next(data, Whence::Hole);
        data = next(end, Whence::Data);
        if data >= range.end {
            return start..end;
        }
    }
    start..range.end
}

/// The ranges of `bytes`, which begin at `offset`, that have other bytes than zeros, in whole units of the device.
fn used_units(bytes: &[u8], offset: Bytes) -> Vec<Range<usize>> {
    let mut used: Vec<Range<usize>> = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let to_unit = offset.get().wrapping_add(at as u64) % UNIT as u64;
        let end = (at + UNIT - usize::try_from(to_unit).unwrap_or(0)).min(bytes.len());
        if bytes[at..end] != ZEROS[..end - at] {
            match used.last_mut() {
                Some(last) if last.end == at => last.end = end,
                _ => used.push(at..end),
            }
        }
        at = end;
    }
    used
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_with_bytes_are_found_and_joined() {
        let mut bytes = vec![0; 5 * UNIT];
        assert!(used_units(&bytes, Bytes::ZERO).is_empty());
        for at in [0, UNIT, 4 * UNIT - 1] {
            bytes[at] = 1;
        }
        assert_eq!(used_units(&bytes, Bytes::new(1 << 20)), [0..2 * UNIT, 3 * UNIT..4 * UNIT]);
        // The units are those of the device: the first and the last one may be cut.
        let found = used_units(&bytes[..4 * UNIT + 5], Bytes::new(UNIT as u64 - 512));
        assert_eq!(found, [0..512 + UNIT, 3 * UNIT + 512..4 * UNIT + 5]);
    }
}
