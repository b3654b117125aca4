//! Replies to the requests that change a file.
//!
//! A file that is open for writing is read and written past the page cache of the mount (FOPEN_DIRECT_IO), so a write is
//! complete, and its error known, when write(2) returns. No program can map such a file shared. Other opens of the same file
//! use that cache: their pages of a range that was written are dropped before the reply.

use std::ops::Range;

use fuser::{Errno, FopenFlags, InitFlags, OpenAccMode, OpenFlags, ReplyAttr, ReplyEmpty, ReplyWrite};

use super::attributes::file_attr;
use super::{ATTRIBUTE_TTL, errno};
use crate::error::{Error, Result};
use crate::fs::{Access, Fh, FileSystem, Ino};
use crate::units::Bytes;

/// What a mount that is written asks of the kernel. No file has set-user-id bits or capabilities that a change would have to
/// remove: with FUSE_HANDLE_KILLPRIV_V2 the kernel does not ask for them before each fallocate(2) and copy_file_range(2)
/// (`file_remove_privs` of `fs/inode.c`). It never does before a write through a file with FOPEN_DIRECT_IO.
pub(super) const CAPABILITIES: &[InitFlags] = &[InitFlags::FUSE_HANDLE_KILLPRIV_V2];

/// The reply to an open for writing. Writes of several threads are sent at the same time (Linux 6.2 and newer; in 6.12 and newer
/// only while no open file of the inode uses the page cache: `fuse_dio_lock` of `fs/fuse/file.c`). A close sends no FUSE_FLUSH, for
/// which there is nothing to do: the kernel would let it wait for the writes of other descriptors (`fuse_flush` of `fs/fuse/file.c`),
/// and so would let each start of a program by a process that has the file open.
pub(super) const OPEN_FLAGS: FopenFlags =
    FopenFlags::FOPEN_DIRECT_IO.union(FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES).union(FopenFlags::FOPEN_NOFLUSH);

/// What the flags of open(2) ask for. Those of each write have `O_SYNC` and `O_DSYNC` too, also where they come from
/// pwritev2(2) or a mount with `sync` (`fuse_write_flags` of `fs/fuse/file.c`). The kernel sends no fsync request for them.
pub(super) fn access(flags: OpenFlags) -> Access {
    Access { is_for_writing: flags.acc_mode() != OpenAccMode::O_RDONLY, is_synchronous: is_synchronous(flags) }
}

fn is_synchronous(flags: OpenFlags) -> bool {
    // O_SYNC contains the bit of O_DSYNC.
    flags.0 & libc::O_DSYNC != 0
}

/// Writes to an open file.
pub(super) fn write(fs: &FileSystem, fh: Fh, offset: Bytes, bytes: &[u8], flags: OpenFlags, reply: ReplyWrite) {
    match fs.write(fh, offset, bytes, is_synchronous(flags)).map(u32::try_from) {
        Ok(Ok(count)) => reply.written(count),
        Ok(Err(_)) => reply.error(Errno::EOVERFLOW),
        Err(error) => reply.error(errno("write", &error)),
    }
}

/// Makes a range of an open file zero: FALLOC_FL_PUNCH_HOLE and FALLOC_FL_ZERO_RANGE are the same, because most devices can only
/// do both at once. Blocks cannot be reserved.
pub(super) fn fallocate(fs: &FileSystem, fh: Fh, range: Range<Bytes>, mode: i32) -> Result<()> {
    let keeps_size = mode & libc::FALLOC_FL_KEEP_SIZE != 0;
    match mode & !libc::FALLOC_FL_KEEP_SIZE {
        libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE => fs.make_zero(fh, range, keeps_size),
        _ => Err(Error::failed(format!("mode {mode:#x} is not supported")).with_errno(libc::EOPNOTSUPP)),
    }
}

/// Copies a range from one open file to another one.
pub(super) fn copy(fs: &FileSystem, from: (Fh, Bytes), to: (Fh, Bytes), len: Bytes, reply: ReplyWrite) {
    match fs.copy_range(from, to, len).map(|copied| u32::try_from(copied.get())) {
        Ok(Ok(count)) => reply.written(count),
        Ok(Err(_)) => reply.error(Errno::EOVERFLOW),
        Err(error) => reply.error(errno("copy_file_range", &error)),
    }
}

/// Sets the length, which is the only attribute that can be set: all others are those of the device node.
pub(super) fn set_attributes(fs: &FileSystem, ino: Ino, fh: Option<Fh>, len: Option<Bytes>, reply: ReplyAttr) {
    let Some(len) = len else { return reply.error(not_possible(fs)) };
    match fs.truncate(ino, fh, len) {
        Ok(attributes) => reply.attr(&ATTRIBUTE_TTL, &file_attr(&attributes)),
        Err(error) => reply.error(errno("truncate", &error)),
    }
}

/// The errno of what is possible in no mount, such as creating a file: in one that is written, EROFS would mislead.
pub(super) fn not_possible(fs: &FileSystem) -> Errno {
    if fs.is_writable() { Errno::EPERM } else { Errno::EROFS }
}

/// The errno of a change of extended attributes, which no file has. Programs that copy them go on after EOPNOTSUPP.
pub(super) fn no_attributes(fs: &FileSystem) -> Errno {
    if fs.is_writable() { Errno::EOPNOTSUPP } else { Errno::EROFS }
}

pub(super) fn reply_empty(operation: &str, result: Result<()>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(errno(operation, &error)),
    }
}
