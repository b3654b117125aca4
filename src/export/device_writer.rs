//! Writing to a block device.
//!
//! Writes go past the page cache, so a write is complete, and its error known, when it returns. They are made of whole logical
//! blocks: of a block that is written in part, the rest is read first. Writers of the same device lock such a block, so that
//! none of them loses bytes. Two programs that write to one block at the same time, one through a mount and one to the device
//! itself, have to agree on that themselves, as two programs that write to the device with O_DIRECT have to.

mod fill;

use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};

use super::{Writer, Zeroed};
use crate::range_locks::{RangeLocks, Use};
use crate::source::dm::SharedControl;
use crate::source::{BlockDevice, CountedFile, Provisioning};
use crate::sys::buffer::AlignedBuffer;
use crate::sys::{block, device, file, sysfs, zero};
use crate::units::Bytes;
use fill::Filled;

/// How much one system call makes zero at most. It may not be possible to interrupt it.
const PIECE: Bytes = Bytes::new(1 << 30);

/// The same for a call that may write the zeros.
const WRITTEN_PIECE: Bytes = Bytes::new(64 << 20);

/// How much one system call writes of memory that is not aligned: that much is copied.
const COPY: usize = 1 << 20;

/// The alignment in memory of writes with `O_DIRECT`: no driver requires more than a page (`stx_dio_mem_align` of statx(2)).
const MEMORY_ALIGN: usize = 4096;

/// A block device that is open for writing, claimed with `O_EXCL`.
pub(super) struct DeviceWriter {
    device: BlockDevice,
    /// The device, opened with `O_DIRECT` and `O_EXCL`.
    direct: CountedFile,
    /// The unit of writes with `O_DIRECT`.
    block: Bytes,
    locks: RangeLocks,
    control: SharedControl,
    provisioning: Mutex<Arc<Provisioning>>,
    filled: Filled,
}

/// The length of a range that is in memory.
fn len(range: &Range<Bytes>) -> io::Result<usize> {
    usize::try_from(range.end.saturating_sub(range.start).get())
        .map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))
}

/// The pieces of a range that follow each other, each of at most `size` bytes.
fn pieces(range: Range<Bytes>, size: Bytes) -> impl Iterator<Item = Range<Bytes>> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        let start = at;
        at = start.saturating_add(size).min(range.end);
        (start < at).then_some(start..at)
    })
}

impl DeviceWriter {
    /// Claims an open device.
    ///
    /// # Errors
    /// As open(2): `EBUSY` if the device is in use, and `PermissionDenied` if it is read-only. As [`Provisioning::of`].
    pub(super) fn new(device: &BlockDevice) -> io::Result<Self> {
        if block::is_read_only(&device.file)? {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, "the device is read-only"));
        }
        let direct = device::reopen_writable_exclusive(&device.file)?;
        let direct = CountedFile::new(direct, device.id);
        let block = block::logical_block(&direct)?;
        let control = SharedControl::default();
        let provisioning = Mutex::new(Arc::new(Provisioning::of(device.id, &control)?));
        let filled = Filled::new(device.id);
        Ok(Self { device: device.clone(), direct, block, locks: RangeLocks::default(), control, provisioning, filled })
    }

    /// How the device allocates space now.
    fn provisioning(&self) -> io::Result<Arc<Provisioning>> {
        let mut known = self.provisioning.lock().unwrap_or_else(PoisonError::into_inner);
        if !known.unchanged(&self.control) {
            self.filled.forget();
            *known = Arc::new(Provisioning::of(self.device.id, &self.control)?);
        }
        Ok(known.clone())
    }

    /// The end of the last whole block.
    fn whole_end(&self) -> io::Result<Bytes> {
        Ok(block::len(&self.direct)?.align_down(self.block))
    }

    /// Divides a range into its whole blocks, and the parts of blocks before and after them.
    fn parts(&self, range: &Range<Bytes>) -> [Range<Bytes>; 3] {
        let first = range.start.align_up(self.block).unwrap_or(range.end).min(range.end);
        let last = range.end.align_down(self.block).max(first);
        [range.start..first, first..last, last..range.end]
    }

    /// The block, or the blocks, that a range is in.
    fn around(&self, range: &Range<Bytes>) -> Range<Bytes> {
        range.start.align_down(self.block)..range.end.align_up(self.block).unwrap_or(range.end)
    }

    /// Writes without filling blocks of a pool. Locks each part if `locks` is set: else the caller has locked all of it.
    fn write_parts(&self, bytes: &[u8], offset: Bytes, locks: bool) -> io::Result<()> {
        let range = offset..offset.saturating_add(Bytes::new(bytes.len() as u64));
        for (index, part) in self.parts(&range).into_iter().enumerate().filter(|(_, part)| part.start < part.end) {
            let start = len(&(offset..part.start))?;
            let piece = &bytes[start..start + len(&part)?];
            if index == 1 {
                let _lock = locks.then(|| self.locks.lock(part.clone(), Use::Shared));
                self.write_blocks(piece, part.start)?;
            } else {
                let _lock = locks.then(|| self.locks.lock(self.around(&part), Use::Alone));
                self.write_part(piece, &part)?;
            }
        }
        Ok(())
    }

    /// Writes whole blocks. The kernel refuses memory that is not aligned (`blkdev_dio_unaligned` or `blkdev_dio_invalid` of
    /// `block/fops.c`).
    fn write_blocks(&self, bytes: &[u8], offset: Bytes) -> io::Result<()> {
        if bytes.as_ptr().align_offset(MEMORY_ALIGN) == 0 {
            return self.direct.write_all_at(bytes, offset.get());
        }
        let mut buffer = AlignedBuffer::new();
        let mut at = offset.get();
        for piece in bytes.chunks(COPY) {
            buffer.resize(piece.len()).copy_from_slice(piece);
            self.direct.write_all_at(buffer.bytes(), at)?;
            at = at.saturating_add(piece.len() as u64);
        }
        Ok(())
    }

    /// Writes a part of one block, which the caller has locked.
    fn write_part(&self, bytes: &[u8], part: &Range<Bytes>) -> io::Result<()> {
        if part.start >= self.whole_end()? {
            return self.write_remainder(bytes, part.start);
        }
        let mut buffer = AlignedBuffer::new();
        let (start, at) = self.read_block(&mut buffer, part)?;
        buffer.bytes_mut()[at..at + bytes.len()].copy_from_slice(bytes);
        self.direct.write_all_at(buffer.bytes(), start.get())
    }

    /// Makes a part of one block zero, which the caller has locked. A block in which it is zero already is not written, because that
    /// could allocate it.
    fn zero_part(&self, part: &Range<Bytes>) -> io::Result<()> {
        let size = len(part)?;
        if part.start >= self.whole_end()? {
            return self.write_remainder(&vec![0; size], part.start);
        }
        let mut buffer = AlignedBuffer::new();
        let (start, at) = self.read_block(&mut buffer, part)?;
        let bytes = &mut buffer.bytes_mut()[at..at + size];
        if bytes.iter().all(|byte| *byte == 0) {
            return Ok(());
        }
        bytes.fill(0);
        self.direct.write_all_at(buffer.bytes(), start.get())
    }

    /// Reads the block that `part` is in. Returns its start, and the distance of `part` from there.
    fn read_block(&self, buffer: &mut AlignedBuffer, part: &Range<Bytes>) -> io::Result<(Bytes, usize)> {
        let start = part.start.align_down(self.block);
        self.read_blocks(buffer.resize(len(&(Bytes::ZERO..self.block))?), start)?;
        Ok((start, len(&(start..part.start))?))
    }

    /// Reads whole blocks.
    fn read_blocks(&self, place: &mut [u8], start: Bytes) -> io::Result<()> {
        let wanted = place.len();
        match file::read_full(&self.direct, place, start)? {
            count if count < wanted => Err(io::Error::from_raw_os_error(libc::EIO)),
            _ => Ok(()),
        }
    }

    /// Writes to what a device has after its last whole block. Only the page cache can write it, and some kernels refuse that too
    /// when it is written back (`bio_unaligned` of `block/blk-mq.c`): then the error is known here.
    fn write_remainder(&self, bytes: &[u8], offset: Bytes) -> io::Result<()> {
        let cached = device::reopen_writable(&self.device.file)?;
        cached.write_all_at(bytes, offset.get())?;
        cached.sync_data()
    }

    /// Makes whole blocks zero by what the device has for that, as far as it can. Returns where that ended.
    fn punch(&self, whole: &Range<Bytes>) -> Bytes {
        for piece in pieces(whole.clone(), PIECE) {
            let _lock = self.locks.lock(piece.clone(), Use::Shared);
            // Any error: EOPNOTSUPP, EREMOTEIO of a SCSI disk that has refused WRITE SAME with UNMAP, or EIO of a loop device whose
            // backing file has another error. If the device is at fault, writing zeros fails too, and reports the error.
            if zero::punch_hole(&self.direct, &piece).is_err() {
                return piece.start;
            }
        }
        whole.end
    }

    /// Discards the blocks of the pools below that are inside of a range. What is discarded is not known afterwards.
    fn discard(&self, range: &Range<Bytes>, unit: Bytes) {
        let size = unit.saturating_add(unit).max(PIECE);
        let mut start = range.start;
        while start < range.end {
            let piece = start..start.saturating_add(size).min(range.end);
            // Alone: a write that relies on the block being mapped must not come in between.
            let lock = self.locks.lock(piece.clone(), Use::Alone);
            let discarded = self.discard_piece(&piece);
            self.filled.forget();
            drop(lock);
            if discarded.is_err() || piece.end == range.end {
                break;
            }
            // The block that the end of this piece cuts is inside of the next one.
            start = piece.end.saturating_sub(unit).max(start.saturating_add(unit));
        }
    }

    /// Discards a piece. `bio_discard_limit` of `block/blk-lib.c` (`__blkdev_issue_discard` in Linux 5.10) rounds as if each
    /// granularity were a power of two: where it is none, the kernel divides a discard once, at a place that may be inside of a
    /// block of the pool. It does not from a power of two on.
    fn discard_piece(&self, piece: &Range<Bytes>) -> io::Result<()> {
        zero::discard(&self.direct, piece)?;
        let granularity = sysfs::number(self.device.id, "queue/discard_granularity").unwrap_or(1);
        let again = granularity.checked_next_power_of_two().and_then(|unit| piece.start.align_up(Bytes::new(unit)));
        match again {
            Some(start) if !granularity.is_power_of_two() && start > piece.start && start < piece.end => {
                zero::discard(&self.direct, &(start..piece.end))
            }
            _ => Ok(()),
        }
    }
}

impl Writer for DeviceWriter {
    fn write_at(&self, bytes: &[u8], offset: Bytes) -> io::Result<()> {
        let provisioning = self.provisioning()?;
        if provisioning.exposes_old_bytes() {
            return self.write_filled(&provisioning, bytes, offset);
        }
        self.write_parts(bytes, offset, true)
    }

    fn make_zero(&self, range: &Range<Bytes>) -> io::Result<Zeroed> {
        let provisioning = self.provisioning()?;
        let [head, whole, tail] = self.parts(range);
        let rest = self.punch(&whole)..whole.end;
        if provisioning.is_sparse() && rest.start < rest.end || provisioning.exposes_old_bytes() {
            // A discard that unmaps nothing would only make the map void.
            if let Some(unit) = provisioning.discard_unit().filter(|_| provisioning.discards_blocks(&rest)) {
                self.discard(&rest, unit);
            }
            return Ok(Zeroed::Unproven);
        }
        for piece in pieces(rest, WRITTEN_PIECE) {
            let _lock = self.locks.lock(piece.clone(), Use::Shared);
            // A kernel since 6.12 may fail where writing zeros works (`blkdev_issue_write_zeroes` of `block/blk-lib.c`).
            if zero::zero_out(&self.direct, &piece).is_err() {
                return Ok(Zeroed::Unproven);
            }
        }
        for part in [head, tail].into_iter().filter(|part| part.start < part.end) {
            let _lock = self.locks.lock(self.around(&part), Use::Alone);
            self.zero_part(&part)?;
        }
        Ok(Zeroed::Proven)
    }

    fn flush(&self) -> io::Result<()> {
        self.direct.sync_data()
    }
}
