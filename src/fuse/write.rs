//! Replies to the requests that change a file.
//!
//! A file that is open for writing is read and written past the page cache of the mount (FOPEN_DIRECT_IO), so a write is
//! complete, and its error known, when write(2) returns. No program can map such a file shared. Other opens of the same file
//! use that cache: their pages of a range that was written are dropped before the reply.

use std::ops::Range;

use fuser::{Errno, FopenFlags, InitFlags, ReplyAttr, ReplyEmpty, ReplyWrite};

use super::attributes::file_attr;
use super::kernel_cache::KernelCache;
use super::{ATTRIBUTE_TTL, errno};
use crate::error::{Error, Result};
use crate::fs::{Fh, FileSystem, Ino};
use crate::units::Bytes;

/// What a mount that is written asks of the kernel. No file has set-user-id bits or capabilities that a write would have to
/// remove: with FUSE_HANDLE_KILLPRIV_V2 the kernel does not ask for them before each write.
pub(super) const CAPABILITIES: &[InitFlags] = &[InitFlags::FUSE_HANDLE_KILLPRIV_V2];

/// The reply to an open for writing. Writes of several threads are sent at the same time (Linux 6.2 and newer). A close sends no
/// FUSE_FLUSH, for which there is nothing to do: the kernel would let it wait for the writes of other descriptors (`fuse_flush` of
/// `fs/fuse/file.c`), and so would let each start of a program by a process that has the file open.
pub(super) const OPEN_FLAGS: FopenFlags =
    FopenFlags::FOPEN_DIRECT_IO.union(FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES).union(FopenFlags::FOPEN_NOFLUSH);

/// Writes to an open file.
pub(super) fn write(fs: &FileSystem, cache: &KernelCache, fh: Fh, offset: Bytes, bytes: &[u8], reply: ReplyWrite) {
    let written = fs.write(fh, offset, bytes);
    drop_pages(fs, cache, fh, offset..offset.saturating_add(Bytes::new(bytes.len() as u64)));
    match written.map(u32::try_from) {
        Ok(Ok(count)) => reply.written(count),
        Ok(Err(_)) => reply.error(Errno::EOVERFLOW),
        Err(error) => reply.error(errno("write", &error)),
    }
}

/// Makes a range of an open file zero: FALLOC_FL_PUNCH_HOLE and FALLOC_FL_ZERO_RANGE are the same, because most devices can only
/// do both at once. Blocks cannot be reserved.
pub(super) fn fallocate(fs: &FileSystem, cache: &KernelCache, fh: Fh, range: Range<Bytes>, mode: i32) -> Result<()> {
    let keeps_size = mode & libc::FALLOC_FL_KEEP_SIZE != 0;
    match mode & !libc::FALLOC_FL_KEEP_SIZE {
        libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE => {}
        _ => return Err(Error::from_errno(libc::EOPNOTSUPP)),
    }
    let zeroed = fs.make_zero(fh, range.clone(), keeps_size);
    drop_pages(fs, cache, fh, range);
    zeroed
}

/// Copies a range from one open file to another one.
pub(super) fn copy(
    fs: &FileSystem,
    cache: &KernelCache,
    from: (Fh, Bytes),
    to: (Fh, Bytes),
    len: Bytes,
    reply: ReplyWrite,
) {
    let copied = fs.copy_range(from, to, len);
    drop_pages(fs, cache, to.0, to.1..to.1.saturating_add(len));
    match copied.map(|copied| u32::try_from(copied.get())) {
        Ok(Ok(count)) => reply.written(count),
        Ok(Err(_)) => reply.error(Errno::EOVERFLOW),
        Err(error) => reply.error(errno("copy_file_range", &error)),
    }
}

/// Sets the length, which is the only attribute that can be set: all others are those of the device node.
pub(super) fn set_attributes(fs: &FileSystem, cache: &KernelCache, ino: Ino, len: Option<Bytes>, reply: ReplyAttr) {
    let Some(len) = len else { return reply.error(if fs.is_writable() { Errno::EPERM } else { Errno::EROFS }) };
    let set = fs.truncate(ino, len);
    if len == Bytes::ZERO {
        // The kernel drops pages only where the length changes.
        cache.drop_pages(ino);
    }
    match set {
        Ok(attributes) => reply.attr(&ATTRIBUTE_TTL, &file_attr(&attributes)),
        Err(error) => reply.error(errno("truncate", &error)),
    }
}

pub(super) fn reply_empty(operation: &str, result: Result<()>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(errno(operation, &error)),
    }
}

/// Drops the pages of a range that other opens of the file may have.
fn drop_pages(fs: &FileSystem, cache: &KernelCache, fh: Fh, range: Range<Bytes>) {
    if let Some(ino) = fs.ino(fh).filter(|&ino| fs.has_readers(ino)) {
        cache.drop_range(ino, range);
    }
}
