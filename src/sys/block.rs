//! Operations that every block device has: its size, logical block size and disk sequence number, reads, and the write-back
//! of its dirty pages.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr;

use super::buffer::AlignedBuffer;
use super::file::{read_direct_below, read_full};
use crate::units::Bytes;

/// No block device has larger logical blocks (docs/correctness.md, "Every block device").
const LARGEST_LOGICAL_BLOCK: Bytes = Bytes::new(64 << 10);

/// How often the page cache of a partial last sector is dropped before a read of it fails.
const DROPS: usize = 8;

mod raw {
    // From include/uapi/linux/fs.h. BLKGETSIZE64 is declared there with size_t, but the kernel writes a u64.
    nix::ioctl_read!(blkgetsize64, 0x12, 114, u64);
    nix::ioctl_read_bad!(blksszget, libc::BLKSSZGET, libc::c_int);
    nix::ioctl_read_bad!(blkroget, nix::request_code_none!(0x12, 94), libc::c_int);
    nix::ioctl_read!(blkgetdiskseq, 0x12, 128, u64);
}

/// The current length of a block device.
///
/// # Errors
/// As ioctl(2): `ENOTTY` if `device` is not a block device.
pub fn len(device: &File) -> io::Result<Bytes> {
    let mut bytes = 0;
    // SAFETY: the descriptor stays open during the call, and the kernel writes one u64 through the pointer.
    unsafe { raw::blkgetsize64(device.as_raw_fd(), &raw mut bytes)? };
    Ok(Bytes::new(bytes))
}

/// The logical block size of a block device, which is the unit of `O_DIRECT` reads.
///
/// # Errors
/// As ioctl(2), and `InvalidData` if the kernel returns a size that is not positive.
pub fn logical_block(device: &File) -> io::Result<Bytes> {
    let mut size: libc::c_int = 0;
    // SAFETY: the descriptor stays open during the call, and the kernel writes one int through the pointer.
    unsafe { raw::blksszget(device.as_raw_fd(), &raw mut size)? };
    match u64::try_from(size) {
        Ok(size @ 1..) => Ok(Bytes::new(size)),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Whether a block device is read-only. Some kernels let such a device be opened for writing, and refuse each write with EPERM
/// (`blkdev_write_iter` of `block/fops.c`).
///
/// # Errors
/// As ioctl(2).
pub fn is_read_only(device: &File) -> io::Result<bool> {
    let mut read_only: libc::c_int = 0;
    // SAFETY: the descriptor stays open during the call, and the kernel writes one int through the pointer.
    unsafe { raw::blkroget(device.as_raw_fd(), &raw mut read_only)? };
    Ok(read_only != 0)
}

/// The disk sequence number. No two devices have the same one, and a device gets a new one with each new medium or backing
/// file. `None` on kernels before Linux 5.15, which have no such numbers.
///
/// # Errors
/// As ioctl(2), for a device that was removed.
pub fn disk_sequence(device: &File) -> io::Result<Option<u64>> {
    let mut sequence = 0;
    // SAFETY: the descriptor stays open during the call, and the kernel writes one u64 through the pointer.
    match unsafe { raw::blkgetdiskseq(device.as_raw_fd(), &raw mut sequence) } {
        Ok(_) => Ok(Some(sequence)),
        Err(nix::errno::Errno::ENOTTY | nix::errno::Errno::EINVAL) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Writes back the dirty pages of a block device's page cache, and waits until they are written. Does not flush the write
/// cache of the device.
///
/// # Errors
/// As sync_file_range(2). After an error the device may lack data that readers of the page cache see, so that no range of
/// it may be a hole.
pub fn write_back(device: &File) -> io::Result<()> {
    let how = libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // A length of 0 means up to the end of the device.
    // SAFETY: the call takes no pointers, and the descriptor stays open during it.
    match unsafe { libc::sync_file_range(device.as_raw_fd(), 0, 0, how) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The end of the last whole logical block of a device of `len` bytes. A remainder that is shorter than a logical block can
/// be read through the page cache only, and not with every kernel. The device is asked only where its logical block size
/// makes a difference.
///
/// # Errors
/// As [`logical_block`].
pub fn whole_blocks(device: &File, len: Bytes) -> io::Result<Bytes> {
    if len == len.align_down(LARGEST_LOGICAL_BLOCK) {
        return Ok(len);
    }
    logical_block(device).map(|block| len.align_down(block))
}

/// A block device that is open for reading.
#[derive(Clone, Copy)]
pub struct Readable<'a> {
    /// The device, opened with `O_DIRECT`.
    pub direct: &'a File,
    /// The device, opened without `O_DIRECT`.
    pub cached: &'a File,
    /// The current length of the device.
    pub len: Bytes,
    /// The unit of direct reads: a multiple of the logical block size.
    pub align: Bytes,
}

/// Reads `size` bytes at `offset`, which must end within the device. Returns the range of `buffer` that holds them. It is
/// shorter than `size` if the device has shrunk.
///
/// All bytes are read from the device during the call. None is from a page cache that is older than the call.
///
/// # Errors
/// As pread(2).
pub fn read(device: Readable<'_>, buffer: &mut AlignedBuffer, offset: Bytes, size: usize) -> io::Result<Range<usize>> {
    let Readable { direct, cached, len, align } = device;
    let whole = if len == len.align_down(align) { len } else { whole_blocks(cached, len)? };
    let end = offset.saturating_add(Bytes::new(size as u64));
    let range = read_direct_below(direct, buffer, offset, size, align, whole)?;
    // A short direct read means that the device has shrunk, so that there is no remainder at the old place.
    if end <= whole || range.end < range.start + to_usize(whole.saturating_sub(offset))? {
        return Ok(range);
    }
    let tail = to_usize(end.saturating_sub(whole.max(offset)))?;
    let place = buffer.grow(range.end + tail);
    let count = read_tail(cached, whole.max(offset), &mut place[range.end..])?;
    Ok(range.start..range.end + count)
}

fn to_usize(bytes: Bytes) -> io::Result<usize> {
    usize::try_from(bytes.get()).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))
}

/// Reads from the remainder of a device behind its last whole logical block. Direct reads of it are refused
/// (`blkdev_dio_unaligned` or `blkdev_dio_invalid` of `block/fops.c`). A buffered read is cut to the end of the device
/// (`guard_bio_eod`).
///
/// # Errors
/// As pread(2), and `EBUSY` if the pages cannot be dropped from the page cache, where they may be older than the device.
fn read_tail(device: &File, offset: Bytes, place: &mut [u8]) -> io::Result<usize> {
    write_back(device)?;
    let first = offset.align_down(page_size());
    let len = to_usize(offset.saturating_sub(first))? + place.len();
    for _ in 0..DROPS {
        drop_pages(device, first)?;
        if !is_cached(device, first, len)? {
            // The page cache holds nothing that is older than this call.
            return read_full(device, place, offset);
        }
    }
    Err(io::Error::from_raw_os_error(libc::EBUSY))
}

/// The size of a page, which is the unit of the page cache.
fn page_size() -> Bytes {
    // SAFETY: the call takes no pointers.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    // The call cannot fail for this name. 4096 is the smallest page size of any machine.
    Bytes::new(u64::try_from(size).unwrap_or(4096))
}

/// Drops the pages of a device from `first` on that are clean and not in use from the page cache.
fn drop_pages(device: &File, first: Bytes) -> io::Result<()> {
    let first = i64::try_from(first.get()).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
    // A length of 0 means up to the end of the device.
    // SAFETY: the call takes no pointers, and the descriptor stays open during it.
    match unsafe { libc::posix_fadvise(device.as_raw_fd(), first, 0, libc::POSIX_FADV_DONTNEED) } {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// Whether any page of a range, which must begin on a page boundary, is in the page cache. For a process without the
/// permission to know, the kernel reports that every page is (`can_do_mincore` of `mm/mincore.c`).
fn is_cached(device: &File, first: Bytes, len: usize) -> io::Result<bool> {
    let first = i64::try_from(first.get()).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
    let mut pages = vec![0_u8; len.div_ceil(to_usize(page_size())?.max(1))];
    // SAFETY: the kernel chooses an unused address for the mapping, and the descriptor stays open during the call.
    let map = unsafe { libc::mmap(ptr::null_mut(), len, libc::PROT_READ, libc::MAP_SHARED, device.as_raw_fd(), first) };
    if map == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `map` is the address of a mapping of `len` bytes, and `pages` has one byte for each page of it. The call does
    // not access the contents of the mapping.
    let code = unsafe { libc::mincore(map, len, pages.as_mut_ptr()) };
    let result = if code == 0 { Ok(pages.iter().any(|page| page & 1 != 0)) } else { Err(io::Error::last_os_error()) };
    // SAFETY: the mapping was made above with this address and length, and there are no references into it.
    unsafe { libc::munmap(map, len) };
    result
}
