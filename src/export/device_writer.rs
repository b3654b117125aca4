//! Writing to a block device.

use std::io;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use super::{Writer, Zeroed};
use crate::source::{BlockDevice, CountedFile};
use crate::sys::buffer::AlignedBuffer;
use crate::sys::{block, device, file, zero};
use crate::units::Bytes;

/// A block device that is open for writing, claimed with `O_EXCL`.
pub(super) struct DeviceWriter {
    file: CountedFile,
    /// The unit of writes with `O_DIRECT`.
    block: Bytes,
    /// Held while a part of a block is written: it is read first, and the rest of it written again.
    partial: Mutex<()>,
}

impl DeviceWriter {
    /// Claims an open device.
    ///
    /// # Errors
    /// As open(2): `EBUSY` if the device is in use.
    pub(super) fn new(device: &BlockDevice) -> io::Result<Self> {
        let file = device::reopen_writable_exclusive(&device.file)?;
        let block = block::logical_block(&file)?;
        Ok(Self { file: CountedFile::new(file, device.id), block, partial: Mutex::default() })
    }

    /// Divides a range into its whole blocks, and the parts of blocks before and after them.
    fn parts(&self, range: &Range<Bytes>) -> [Range<Bytes>; 3] {
        let first = range.start.align_up(self.block).unwrap_or(range.end).min(range.end);
        let last = range.end.align_down(self.block).max(first);
        [range.start..first, first..last, last..range.end]
    }

    /// Writes `bytes` at `offset` within one block.
    fn write_part(&self, bytes: &[u8], offset: Bytes) -> io::Result<()> {
        let start = offset.align_down(self.block);
        let at = usize::try_from(offset.saturating_sub(start).get()).unwrap_or(0);
        let size = usize::try_from(self.block.get()).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
        let _partial = self.partial.lock().unwrap_or_else(PoisonError::into_inner);
        let mut buffer = AlignedBuffer::new();
        if file::read_full(&self.file, buffer.resize(size), start)? < size {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        buffer.bytes_mut()[at..at + bytes.len()].copy_from_slice(bytes);
        self.file.write_all_at(buffer.bytes(), start.get())
    }
}

impl Writer for DeviceWriter {
    fn write_at(&self, bytes: &[u8], offset: Bytes) -> io::Result<()> {
        let range = offset..offset.saturating_add(Bytes::new(bytes.len() as u64));
        for (index, part) in self.parts(&range).into_iter().enumerate().filter(|(_, part)| part.start < part.end) {
            let at = |position: Bytes| usize::try_from(position.saturating_sub(offset).get()).unwrap_or(bytes.len());
            let piece = &bytes[at(part.start)..at(part.end)];
            match index {
                1 => self.file.write_all_at(piece, part.start.get())?,
                _ => self.write_part(piece, part.start)?,
            }
        }
        Ok(())
    }

    fn make_zero(&self, range: &Range<Bytes>) -> io::Result<Zeroed> {
        let [head, whole, tail] = self.parts(range);
        for part in [head, tail].into_iter().filter(|part| part.start < part.end) {
            let size = usize::try_from(part.end.saturating_sub(part.start).get()).unwrap_or(0);
            self.write_part(&vec![0; size], part.start)?;
        }
        if whole.start < whole.end {
            zero::punch_hole(&self.file, &whole).or_else(|_| zero::zero_out(&self.file, &whole))?;
        }
        Ok(Zeroed::Proven)
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}
