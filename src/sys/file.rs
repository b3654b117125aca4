//! Calls on open files: the runs of a file, and reads with and without the page cache.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::sys::statfs::{BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, FsType, TMPFS_MAGIC, XFS_SUPER_MAGIC, fstatfs};
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

/// File systems that keep no hole which does not begin and end on a whole block of theirs, and whose answers to
/// SEEK_DATA and SEEK_HOLE know of what is written in the page cache only.
const WELL_KNOWN: [FsType; 4] = [EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC, BTRFS_SUPER_MAGIC, TMPFS_MAGIC];

/// The unit of a file's holes, where its file system is known to have one.
pub fn hole_unit(file: &File) -> Option<Bytes> {
    let stat = fstatfs(file).ok()?;
    let block = u64::try_from(stat.block_size()).ok().filter(|block| block.is_power_of_two())?;
    WELL_KNOWN.contains(&stat.filesystem_type()).then_some(Bytes::new(block))
}

/// Whether SEEK_DATA and SEEK_HOLE may not know of writes that are in the file's page cache: FUSE leaves the answer to
/// the file system's server (`fuse_lseek` of `fs/fuse/file.c`), which has not seen them.
pub fn hides_dirty_pages(file: &File) -> bool {
    !fstatfs(file).is_ok_and(|stat| WELL_KNOWN.contains(&stat.filesystem_type()))
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
    let too_big = || io::Error::from(Errno::EOVERFLOW);
    let start = offset.align_down(align);
    let end = offset.checked_add(Bytes::new(size as u64)).and_then(|end| end.align_up(align)).ok_or_else(too_big)?;
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
