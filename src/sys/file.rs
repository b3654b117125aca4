//! Calls on open files: the runs of a file, and reads with and without the page cache.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::sys::statfs::{
    BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, FUSE_SUPER_MAGIC, NFS_SUPER_MAGIC, TMPFS_MAGIC, XFS_SUPER_MAGIC, fstatfs,
};
use nix::unistd::{Whence, fdatasync, lseek64};

use super::buffer::AlignedBuffer;
use crate::units::Bytes;

/// Where the next data begins at or after `offset`; `None` when there is none up to the end of the file.
///
/// Moves the descriptor's position: use a private one.
///
/// # Errors
/// As lseek(2).
pub fn next_data(file: &File, offset: Bytes) -> io::Result<Option<Bytes>> {
    seek(file, offset, Whence::SeekData)
}

/// Where the next hole begins at or after `offset`, at the latest at the end of the file; `None` past the end.
///
/// Moves the descriptor's position: use a private one.
///
/// # Errors
/// As lseek(2).
pub fn next_hole(file: &File, offset: Bytes) -> io::Result<Option<Bytes>> {
    seek(file, offset, Whence::SeekHole)
}

/// The length of a file. Costs less than its attributes.
///
/// Moves the descriptor's position: use a private one.
///
/// # Errors
/// As lseek(2).
pub fn end(file: &File) -> io::Result<Bytes> {
    let end = lseek64(file, 0, Whence::SeekEnd)?;
    u64::try_from(end).map(Bytes::new).map_err(|_| Errno::EOVERFLOW.into())
}

/// What SEEK_DATA and SEEK_HOLE of a file system say of reads through the page cache of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seeks {
    /// They are answered from what such reads see, dirty pages included. Holes begin and end on whole blocks of `unit`
    /// bytes, a power of two.
    Exact {
        /// The file system's block.
        unit: Bytes,
    },
    /// The same, once the dirty pages are written back.
    AfterWriteBack,
    /// They are answered elsewhere, by a server for example: the page cache may hold older bytes. Only reads with direct
    /// I/O go to the same place. Every file system that is not known counts here.
    Elsewhere,
}

impl Seeks {
    /// What the file system of an open file does.
    pub fn of(file: &File) -> Self {
        let Ok(stat) = fstatfs(file) else { return Self::Elsewhere };
        match stat.filesystem_type() {
            // ext4_llseek and xfs_file_llseek (both by iomap_seek_hole and iomap_seek_data), btrfs_file_llseek,
            // shmem_file_llseek. ext2 and ext3 have the magic of ext4.
            EXT4_SUPER_MAGIC | XFS_SUPER_MAGIC | BTRFS_SUPER_MAGIC | TMPFS_MAGIC => {
                let unit = u64::try_from(stat.block_size()).ok().filter(|unit| unit.is_power_of_two());
                unit.map_or(Self::AfterWriteBack, |unit| Self::Exact { unit: Bytes::new(unit) })
            }
            // f2fs is one of these: older kernels find holes inside of compressed clusters. So is overlayfs, which asks the
            // file below on whatever file system that is.
            _ => Self::Elsewhere,
        }
    }
}

/// Whether reads of a file with `O_DIRECT` go to the server that also answers its seeks: NFS (`nfs_file_direct_read`) and
/// FUSE (`fuse_direct_IO`). Other file systems may take the flag and then refuse to read.
pub fn reads_from_server(file: &File) -> bool {
    fstatfs(file).is_ok_and(|stat| matches!(stat.filesystem_type(), NFS_SUPER_MAGIC | FUSE_SUPER_MAGIC))
}

/// The length of a file as its file system's server has it now, and not as it is remembered here.
///
/// # Errors
/// As statx(2).
pub fn len_now(file: &File) -> io::Result<Bytes> {
    let mut stat = MaybeUninit::<libc::statx>::zeroed();
    let flags = libc::AT_EMPTY_PATH | libc::AT_STATX_FORCE_SYNC;
    // SAFETY: the path is a NUL-terminated string, the descriptor is open for the call, and the kernel writes one statx
    // through the pointer.
    let code = unsafe { libc::statx(file.as_raw_fd(), c"".as_ptr(), flags, libc::STATX_SIZE, stat.as_mut_ptr()) };
    if code != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: all of it was zeroed, which is a valid statx, and the kernel wrote over it.
    Ok(Bytes::new(unsafe { stat.assume_init() }.stx_size))
}

/// Hands a file's dirty pages to its file system. Not sync_file_range(2): FUSE up to Linux 6.14 waits for copies of the
/// pages only in fsync, and for overlayfs they are the pages of another file.
///
/// # Errors
/// As fdatasync(2); a file system that knows no such call has nothing to write.
pub fn write_through(file: &File) -> io::Result<()> {
    match fdatasync(file) {
        Err(Errno::EINVAL) => Ok(()),
        result => Ok(result?),
    }
}

fn seek(file: &File, offset: Bytes, whence: Whence) -> io::Result<Option<Bytes>> {
    let offset = i64::try_from(offset.get()).map_err(|_| io::Error::from(Errno::EOVERFLOW))?;
    match lseek64(file, offset, whence) {
        Ok(found) => u64::try_from(found).map(|found| Some(Bytes::new(found))).map_err(|_| Errno::EOVERFLOW.into()),
        Err(Errno::ENXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Reads `size` bytes at `offset` through the page cache; answers where in `buffer` they are, fewer at the end of the file.
///
/// # Errors
/// As pread(2).
pub fn read_buffered(file: &File, buffer: &mut AlignedBuffer, offset: Bytes, size: usize) -> io::Result<Range<usize>> {
    Ok(0..read_full(file, buffer.resize(size), offset)?)
}

/// Reads `size` bytes at `offset` from a descriptor with `O_DIRECT`, by whole units of `align` bytes; answers where in
/// `buffer` they are, fewer at the end of the device.
///
/// # Errors
/// As pread(2).
pub fn read_direct(
    file: &File,
    buffer: &mut AlignedBuffer,
    offset: Bytes,
    size: usize,
    align: Bytes,
) -> io::Result<Range<usize>> {
    read_direct_below(file, buffer, offset, size, align, Bytes::MAX)
}

/// [`read_direct`] of what lies below `limit` only, which need not be a multiple of `align`.
///
/// # Errors
/// As pread(2).
pub fn read_direct_below(
    file: &File,
    buffer: &mut AlignedBuffer,
    offset: Bytes,
    size: usize,
    align: Bytes,
    limit: Bytes,
) -> io::Result<Range<usize>> {
    let too_big = || io::Error::from(Errno::EOVERFLOW);
    let start = offset.align_down(align).min(limit);
    let end = offset.checked_add(Bytes::new(size as u64)).and_then(|end| end.align_up(align)).ok_or_else(too_big)?;
    let end = end.min(limit);
    let whole = usize::try_from(end.saturating_sub(start).get()).map_err(|_| too_big())?;
    let head = usize::try_from(offset.saturating_sub(start).get()).map_err(|_| too_big())?;
    let count = read_full(file, buffer.resize(whole), start)?;
    Ok(head.min(count)..(head + size).min(count))
}

/// Reads until the buffer is full or the file ends.
///
/// # Errors
/// As pread(2).
pub fn read_full(file: &File, mut buffer: &mut [u8], mut offset: Bytes) -> io::Result<usize> {
    let wanted = buffer.len();
    while !buffer.is_empty() {
        match file.read_at(buffer, offset.get()) {
            Ok(0) => break,
            Ok(count) => {
                buffer = &mut buffer[count..];
                offset = offset.saturating_add(Bytes::new(count as u64));
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(wanted - buffer.len())
}
