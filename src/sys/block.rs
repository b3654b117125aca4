//! What every block device answers: size, logical block, disk sequence number, its bytes; and writing back its dirty pages.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr;

use super::buffer::AlignedBuffer;
use super::file::{read_direct_below, read_full};
use crate::units::Bytes;

/// How often the pages of a last, partial sector are dropped before its reading fails.
const DROPS: usize = 8;

mod raw {
    // include/uapi/linux/fs.h; BLKGETSIZE64 is declared with size_t, and is a u64 on every 64-bit kernel.
    nix::ioctl_read!(blkgetsize64, 0x12, 114, u64);
    nix::ioctl_read_bad!(blksszget, libc::BLKSSZGET, libc::c_int);
    nix::ioctl_read!(blkgetdiskseq, 0x12, 128, u64);
}

/// The length of a block device now.
///
/// # Errors
/// As ioctl(2); `ENOTTY` when it is none.
pub fn len(device: &File) -> io::Result<Bytes> {
    let mut bytes = 0;
    // SAFETY: the descriptor is open for the call, and the kernel writes one u64 through the pointer.
    unsafe { raw::blkgetsize64(device.as_raw_fd(), &raw mut bytes)? };
    Ok(Bytes::new(bytes))
}

/// The logical block size of a block device: the unit of `O_DIRECT` reads.
///
/// # Errors
/// As ioctl(2); `InvalidData` when the kernel names a size that is not positive.
pub fn logical_block(device: &File) -> io::Result<Bytes> {
    let mut size: libc::c_int = 0;
    // SAFETY: the descriptor is open for the call, and the kernel writes one int through the pointer.
    unsafe { raw::blksszget(device.as_raw_fd(), &raw mut size)? };
    match u64::try_from(size) {
        Ok(size @ 1..) => Ok(Bytes::new(size)),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// The disk sequence number: a count that never repeats and that a new medium or backing file raises. `None` where the
/// kernel (before 5.15) has none.
///
/// # Errors
/// As ioctl(2), for a device that is gone.
pub fn disk_sequence(device: &File) -> io::Result<Option<u64>> {
    let mut sequence = 0;
    // SAFETY: the descriptor is open for the call, and the kernel writes one u64 through the pointer.
    match unsafe { raw::blkgetdiskseq(device.as_raw_fd(), &raw mut sequence) } {
        Ok(_) => Ok(Some(sequence)),
        Err(nix::errno::Errno::ENOTTY | nix::errno::Errno::EINVAL) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Writes back the dirty pages of a block device's page cache and waits for them. No flush is sent to the device.
///
/// # Errors
/// As sync_file_range(2): a write that failed is reported here, and then no hole may be claimed.
pub fn write_back(device: &File) -> io::Result<()> {
    let how = libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: the call takes no pointers; the descriptor is open for its duration. A length of 0 means "to the end".
    match unsafe { libc::sync_file_range(device.as_raw_fd(), 0, 0, how) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Where the whole logical blocks of a device of `len` bytes end. What follows is the last sector, which is not whole: some
/// kernels can read it, and only through the page cache.
///
/// # Errors
/// As [`logical_block`].
pub fn whole_blocks(device: &File, len: Bytes) -> io::Result<Bytes> {
    logical_block(device).map(|block| len.align_down(block))
}

/// An open block device to read from.
#[derive(Clone, Copy)]
pub struct Readable<'a> {
    /// The device with `O_DIRECT`.
    pub direct: &'a File,
    /// The device without.
    pub cached: &'a File,
    /// Its length now.
    pub len: Bytes,
    /// The unit of direct reads, a multiple of its logical block.
    pub align: Bytes,
}

/// Reads `size` bytes at `offset`, which end within the device; answers where in `buffer` they are, fewer where the device
/// has become shorter.
///
/// All of it comes from the device during the call, and nothing from an older page cache.
///
/// # Errors
/// As pread(2).
pub fn read(device: Readable<'_>, buffer: &mut AlignedBuffer, offset: Bytes, size: usize) -> io::Result<Range<usize>> {
    let Readable { direct, cached, len, align } = device;
    let whole = if len == len.align_down(align) { len } else { whole_blocks(cached, len)? };
    let end = offset.saturating_add(Bytes::new(size as u64));
    let range = read_direct_below(direct, buffer, offset, size, align, whole)?;
    // A direct read that did not get that far has found another end.
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

/// Reads what a direct read cannot: the part of the last sector that the device has (`blkdev_dio_unaligned` or
/// `blkdev_dio_invalid` of `block/fops.c` refuse it, and `guard_bio_eod` cuts a buffered read to it).
///
/// # Errors
/// As pread(2), and `EBUSY` when its pages stay in the page cache, where they may be older than the device.
fn read_tail(device: &File, offset: Bytes, place: &mut [u8]) -> io::Result<usize> {
    write_back(device)?;
    let first = offset.align_down(page_size());
    let len = to_usize(offset.saturating_sub(first))? + place.len();
    for _ in 0..DROPS {
        drop_pages(device, first)?;
        if !is_cached(device, first, len)? {
            // From here on the page cache has nothing that is older than this call.
            return read_full(device, place, offset);
        }
    }
    Err(io::Error::from_raw_os_error(libc::EBUSY))
}

/// The unit of the page cache.
fn page_size() -> Bytes {
    // SAFETY: the call takes no pointers.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    // Every machine has one; 4096 is the smallest.
    Bytes::new(u64::try_from(size).unwrap_or(4096))
}

/// Drops the clean pages of a device from `first` on that nobody uses.
fn drop_pages(device: &File, first: Bytes) -> io::Result<()> {
    let first = i64::try_from(first.get()).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
    // SAFETY: the call takes no pointers; the descriptor is open for its duration. A length of 0 means "to the end".
    match unsafe { libc::posix_fadvise(device.as_raw_fd(), first, 0, libc::POSIX_FADV_DONTNEED) } {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// Whether a byte of a range that begins on a page is in the page cache. For a process that may not know, the
/// kernel says that all is (`can_do_mincore` of `mm/mincore.c`).
fn is_cached(device: &File, first: Bytes, len: usize) -> io::Result<bool> {
    let first = i64::try_from(first.get()).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
    let mut pages = vec![0_u8; len.div_ceil(to_usize(page_size())?.max(1))];
    // SAFETY: the kernel chooses an address that nothing else uses; the descriptor is open for the call.
    let map = unsafe { libc::mmap(ptr::null_mut(), len, libc::PROT_READ, libc::MAP_SHARED, device.as_raw_fd(), first) };
    if map == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the mapping begins on a page and has `len` bytes, and there is a byte for each of its pages. No byte of the
    // mapping is read.
    let code = unsafe { libc::mincore(map, len, pages.as_mut_ptr()) };
    let result = if code == 0 { Ok(pages.iter().any(|page| page & 1 != 0)) } else { Err(io::Error::last_os_error()) };
    // SAFETY: the mapping was made above, with this address and length, and nothing refers to it any more.
    unsafe { libc::munmap(map, len) };
    result
}
