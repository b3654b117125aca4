//! Operations on open files: SEEK_DATA and SEEK_HOLE, the length, write-back, and reads with and without the page cache.
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

/// The first byte of data at or after `offset`. `None` if there is none up to the end of the file.
///
/// Changes the file position, so that the descriptor must not be shared.
///
/// # Errors
/// As lseek(2).
pub fn next_data(file: &File, offset: Bytes) -> io::Result<Option<Bytes>> {
    seek(file, offset, Whence::SeekData)
}

/// The start of the first hole at or after `offset`, where the end of the file counts as a hole. `None` if `offset` is not
/// below the end of the file.
///
/// Changes the file position, so that the descriptor must not be shared.
///
/// # Errors
/// As lseek(2).
pub fn next_hole(file: &File, offset: Bytes) -> io::Result<Option<Bytes>> {
    seek(file, offset, Whence::SeekHole)
}

/// The length of a file, from lseek(2), which is cheaper than fstat(2).
///
/// Changes the file position, so that the descriptor must not be shared.
///
/// # Errors
/// As lseek(2).
pub fn end(file: &File) -> io::Result<Bytes> {
    let end = lseek64(file, 0, Whence::SeekEnd)?;
    u64::try_from(end).map(Bytes::new).map_err(|_| Errno::EOVERFLOW.into())
}

/// How the answers of SEEK_DATA and SEEK_HOLE of a file system relate to reads through the page cache of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seeks {
    /// A hole reads as zeros at the time of the answer, even if there are dirty pages. Holes begin and end at multiples of
    /// `unit` bytes, a power of two.
    Exact {
        /// The block size of the file system.
        unit: Bytes,
    },
    /// A hole reads as zeros if no dirty pages existed at the time of the answer.
    AfterWriteBack,
    /// The answers do not come from the local page cache, but from a server, for example. The page cache may hold older
    /// bytes than the server, so that a hole need not read as zeros, except with direct I/O to the same server. This is the
    /// value for every file system that is not known.
    Elsewhere,
}

impl Seeks {
    /// The value for the file system of an open file.
    pub fn of(file: &File) -> Self {
        let Ok(stat) = fstatfs(file) else { return Self::Elsewhere };
        match stat.filesystem_type() {
            // From the code of each: ext4_llseek and xfs_file_llseek (both use iomap_seek_hole and iomap_seek_data),
            // btrfs_file_llseek, shmem_file_llseek. ext2 and ext3 have the magic number of ext4. `stamp::LOCAL_CLOCK` has
            // the same file systems for another property of them. A file system with one of the properties need not have
            // the other one, so the lists are separate.
            EXT4_SUPER_MAGIC | XFS_SUPER_MAGIC | BTRFS_SUPER_MAGIC | TMPFS_MAGIC => {
                let unit = u64::try_from(stat.block_size()).ok().filter(|unit| unit.is_power_of_two());
                unit.map_or(Self::AfterWriteBack, |unit| Self::Exact { unit: Bytes::new(unit) })
            }
            // f2fs is not in the list: older kernels report holes inside of compressed clusters. Neither is overlayfs, which
            // passes the call to a file on any other file system.
            _ => Self::Elsewhere,
        }
    }
}

/// Whether reads of a file with `O_DIRECT` go to the same server as SEEK_DATA and SEEK_HOLE. They do on NFS
/// (`nfs_file_direct_read`) and FUSE (`fuse_direct_IO`). Some other file systems accept the flag, but refuse to read.
pub fn reads_from_server(file: &File) -> bool {
    fstatfs(file).is_ok_and(|stat| matches!(stat.filesystem_type(), NFS_SUPER_MAGIC | FUSE_SUPER_MAGIC))
}

/// The current length of a file, from the server of its file system and not from cached attributes.
///
/// # Errors
/// As statx(2).
pub fn len_now(file: &File) -> io::Result<Bytes> {
    let mut stat = MaybeUninit::<libc::statx>::zeroed();
    let flags = libc::AT_EMPTY_PATH | libc::AT_STATX_FORCE_SYNC;
    // SAFETY: the path is a NUL-terminated string, the descriptor stays open during the call, and the kernel writes one
    // `struct statx` through the pointer.
    let code = unsafe { libc::statx(file.as_raw_fd(), c"".as_ptr(), flags, libc::STATX_SIZE, stat.as_mut_ptr()) };
    if code != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the memory was zeroed, and a `struct statx` of zeros is valid, as it has only integers.
    Ok(Bytes::new(unsafe { stat.assume_init() }.stx_size))
}

/// Writes back the dirty pages of a file with fdatasync(2). sync_file_range(2) is not enough: FUSE before Linux 6.15 copies
/// the pages and waits for the copies only in fsync, and on overlayfs the dirty pages belong to another file.
///
/// # Errors
/// As fdatasync(2). `EINVAL` is not an error: a file system without this operation has nothing to write back.
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

/// Reads `size` bytes at `offset` through the page cache. Returns the range of `buffer` that holds them, which is shorter
/// than `size` at the end of the file.
///
/// # Errors
/// As pread(2).
pub fn read_buffered(file: &File, buffer: &mut AlignedBuffer, offset: Bytes, size: usize) -> io::Result<Range<usize>> {
    Ok(0..read_full(file, buffer.resize(size), offset)?)
}

/// Reads `size` bytes at `offset` from a descriptor that was opened with `O_DIRECT`, in whole units of `align` bytes. Returns
/// the range of `buffer` that holds them, which is shorter than `size` at the end of the device.
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

/// Like [`read_direct`], but reads nothing at or above `limit`, which need not be a multiple of `align`.
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

/// Reads until the buffer is full or the file ends. Returns the number of bytes.
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
