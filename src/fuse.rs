//! FUSE requests to calls of [`FileSystem`] and back: decode, call, reply, nothing else.
//!
//! A device may stand on a file of this very mount: a loop device over a file that is shown here, and shown here itself.
//! So no request may keep the others from being answered. The module `threads` sees to that.

mod attributes;
mod buffers;
mod kernel;
mod passthrough;
#[cfg(test)]
mod tests;
mod threads;

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, Errno, FileHandle, Filesystem, FopenFlags, Generation, INodeNo, InitFlags, IoctlFlags, KernelConfig,
    LockOwner, OpenAccMode, OpenFlags, PollEvents, PollFlags, PollNotifier, RenameFlags, ReplyAttr, ReplyCreate,
    ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyPoll, ReplyStatfs,
    ReplyXattr, Request, TimeOrNow,
};
use log::log;

use crate::deadline;
use crate::error::Error;
use crate::fs::{Fh, FileSystem, Ino};
use crate::handle::Handle;
use crate::map::view::Whence;
use crate::units::Bytes;
use attributes::{file_attr, file_type};
use buffers::Buffers;
use kernel::Kernel;
use passthrough::Passthrough;
use threads::{IfNoThread, Threads, is_ours, perform};

/// How long the kernel may keep a name: an inode number belongs to its path for good, so only removal is seen late.
const ENTRY_TTL: Duration = Duration::from_secs(1);

/// Attributes are asked each time: size, blocks and times follow the device.
const ATTRIBUTE_TTL: Duration = Duration::ZERO;

/// Path lookups never make two inodes of one number.
const GENERATION: Generation = Generation(0);

/// Threads that answer requests; the last one that is free waits for no device. `benches/README.md` tells what each
/// number costs, and why.
pub const SESSION_THREADS: usize = 8;

/// What a request of our own to our own mount gets: nobody but us could answer it.
const OURSELVES: Errno = Errno::EDEADLK;

/// The largest read that the kernel sends, and so the most that one buffer grows to.
const MAX_READ: u32 = 1 << 20;

/// File systems below an image that is read by passthrough: one that is itself stacked, as overlayfs is, is read by us.
const PASSTHROUGH_DEPTH: u32 = 1;

/// The longest name of an entry, as on the file systems that device nodes are on.
const NAME_MAX: u32 = 255;

/// The block size of statfs(2): bsdtar aligns its buffers to it.
const BLOCK_SIZE: u32 = 4096;

/// The FUSE side of a [`FileSystem`].
pub struct BlkHoleFs {
    fs: Arc<FileSystem>,
    threads: Threads,
    passthrough: Arc<Passthrough>,
    kernel: Arc<Kernel>,
    buffers: Arc<Buffers>,
    /// What the kernel is told at each open of a file that is read through the daemon.
    open_flags: FopenFlags,
}

impl BlkHoleFs {
    /// Serves a file system. With `direct_io`, what is read through the daemon bypasses the page cache of the mount.
    pub fn new(fs: Arc<FileSystem>, direct_io: bool) -> Self {
        // No FOPEN_KEEP_CACHE: what is read after an open is no older than the open.
        let open_flags = if direct_io { FopenFlags::FOPEN_DIRECT_IO } else { FopenFlags::empty() };
        let (passthrough, kernel, buffers) = (Arc::default(), Arc::default(), Arc::default());
        Self { fs, threads: Threads::new(SESSION_THREADS), passthrough, kernel, buffers, open_flags }
    }

    /// The way back to the kernel, which the session is to connect.
    pub fn kernel(&self) -> Arc<Kernel> {
        self.kernel.clone()
    }

    /// Answers a request, so that another one can be answered meanwhile.
    fn answer(&self, work: impl FnOnce(&FileSystem) + Send + 'static) {
        self.run(IfNoThread::Refuse, work);
    }

    fn run(&self, if_no_thread: IfNoThread, work: impl FnOnce(&FileSystem) + Send + 'static) {
        let fs = self.fs.clone();
        self.threads.run(if_no_thread, move || deadline::within(deadline::REQUEST, || work(&fs)));
    }
}

/// Logs the failure of a request, and returns the errno of its reply.
fn errno(operation: &str, error: &Error) -> Errno {
    log!(error.level(), "{operation}: {error}");
    Errno::from_i32(error.errno())
}

fn read(handle: &Handle, buffers: &Buffers, offset: Bytes, size: usize, reply: ReplyData) {
    // A read that waits holds no buffer, and one that its device keeps waiting holds one of few.
    let _room = handle.wait_for_room(size);
    buffers.lend(|buffer| match handle.read(buffer, offset, size) {
        Ok(bytes) => reply.data(bytes),
        Err(error) => reply.error(errno("read", &error)),
    });
}

/// What a file system without extended attributes answers for one: there is none of that name, or there are no such names.
fn no_attribute(name: &OsStr) -> Errno {
    let known: [&[u8]; 3] = [b"user.", b"trusted.", b"security."];
    let lists: [&[u8]; 2] = [b"system.posix_acl_access", b"system.posix_acl_default"];
    let name = name.as_bytes();
    if known.iter().any(|space| name.starts_with(space)) || lists.contains(&name) {
        Errno::ENODATA
    } else {
        Errno::EOPNOTSUPP
    }
}

impl Filesystem for BlkHoleFs {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        self.fs.begin();
        // A kernel without one of these serves all the same, only slower.
        for wanted in [
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_PASSTHROUGH,
            InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
        ] {
            let _ = config.add_capabilities(wanted);
        }
        let _ = config.set_max_stack_depth(PASSTHROUGH_DEPTH);
        let _ = config.set_max_write(MAX_READ);
        if let Err(most) = config.set_max_readahead(MAX_READ) {
            let _ = config.set_max_readahead(most);
        }
        Ok(())
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if is_ours(request.pid()) {
            return reply.error(OURSELVES);
        }
        if name.len() > NAME_MAX as usize {
            return reply.error(Errno::ENAMETOOLONG);
        }
        let name = name.to_owned();
        self.answer(move |fs| match fs.lookup(Ino(parent.0), &name) {
            Ok(found) => reply.entry_with_ttls(&ATTRIBUTE_TTL, &ENTRY_TTL, &file_attr(&found), GENERATION),
            Err(error) => reply.error(errno("lookup", &error)),
        });
    }

    fn forget(&self, _request: &Request, ino: INodeNo, lookups: u64) {
        perform(|| self.fs.forget(Ino(ino.0), lookups));
    }

    fn getattr(&self, request: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        if is_ours(request.pid()) {
            return reply.error(OURSELVES);
        }
        self.answer(move |fs| match fs.getattr(Ino(ino.0)) {
            Ok(found) => reply.attr(&ATTRIBUTE_TTL, &file_attr(&found)),
            Err(error) => reply.error(errno("stat", &error)),
        });
    }

    fn open(&self, request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if is_ours(request.pid()) {
            return reply.error(OURSELVES);
        }
        let for_writing = flags.acc_mode() != OpenAccMode::O_RDONLY;
        let (passthrough, open_flags) = (self.passthrough.clone(), self.open_flags);
        self.answer(move |fs| match fs.open(Ino(ino.0), for_writing).and_then(|fh| Ok((fh, fs.handle(fh)?))) {
            Ok((fh, handle)) => passthrough.open(fh, handle, open_flags, reply),
            Err(error) => reply.error(errno("open", &error)),
        });
    }

    fn read(
        &self,
        _request: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let (offset, size) = (Bytes::new(offset), usize::try_from(size).unwrap_or(usize::MAX));
        let buffers = self.buffers.clone();
        self.answer(move |fs| match fs.handle(Fh(fh.0)) {
            Err(error) => reply.error(errno("read", &error)),
            Ok(handle) => read(&handle, &buffers, offset, size, reply),
        });
    }

    fn lseek(&self, _request: &Request, _ino: INodeNo, fh: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        // ENXIO for a negative offset, as the VFS has it. ENOSYS would end every lseek of this mount.
        let whence = match whence {
            libc::SEEK_DATA => Whence::Data,
            libc::SEEK_HOLE => Whence::Hole,
            _ => return reply.error(Errno::EINVAL),
        };
        let Ok(offset) = u64::try_from(offset) else { return reply.error(Errno::ENXIO) };
        self.answer(move |fs| {
            let found = fs.handle(Fh(fh.0)).and_then(|handle| handle.seek(Bytes::new(offset), whence));
            match found {
                Ok(Some(found)) => match i64::try_from(found.get()) {
                    Ok(found) => reply.offset(found),
                    Err(_) => reply.error(Errno::EOVERFLOW),
                },
                Ok(None) => reply.error(Errno::ENXIO),
                Err(error) => reply.error(errno("lseek", &error)),
            }
        });
    }

    fn release(
        &self,
        _request: &Request,
        ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        let (passthrough, kernel) = (self.passthrough.clone(), self.kernel.clone());
        // The last close of a device writes back its dirty pages. One that is not done would leave the device open for good.
        self.run(IfNoThread::Postpone, move |fs| {
            passthrough.release(Fh(fh.0));
            let was_last = fs.release(Fh(fh.0));
            reply.ok();
            if was_last {
                kernel.drop_cache(Ino(ino.0));
            }
        });
    }

    fn flush(&self, _request: &Request, _ino: INodeNo, _fh: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _request: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn opendir(&self, request: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        if is_ours(request.pid()) {
            return reply.error(OURSELVES);
        }
        self.answer(move |fs| match fs.opendir(Ino(ino.0)) {
            Ok(fh) => reply.opened(FileHandle(fh.0), FopenFlags::empty()),
            Err(error) => reply.error(errno("opendir", &error)),
        });
    }

    fn readdir(&self, _request: &Request, _ino: INodeNo, fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        perform(|| {
            let entries = match self.fs.readdir(Fh(fh.0)) {
                Ok(entries) => entries,
                Err(error) => return reply.error(errno("readdir", &error)),
            };
            let start = usize::try_from(offset).unwrap_or(usize::MAX);
            for (index, entry) in entries.iter().enumerate().skip(start) {
                // The offset of an entry is that of the one after it.
                if reply.add(INodeNo(entry.ino.0), index as u64 + 1, file_type(entry.kind), &entry.name) {
                    break;
                }
            }
            reply.ok();
        });
    }

    fn releasedir(&self, _request: &Request, _ino: INodeNo, fh: FileHandle, _flags: OpenFlags, reply: ReplyEmpty) {
        perform(|| {
            self.fs.releasedir(Fh(fh.0));
            reply.ok();
        });
    }

    fn fsyncdir(&self, _request: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn statfs(&self, request: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        if is_ours(request.pid()) {
            return reply.error(OURSELVES);
        }
        self.answer(move |fs| {
            let usage = fs.usage();
            let blocks = usage.bytes.get().div_ceil(u64::from(BLOCK_SIZE));
            reply.statfs(blocks, 0, 0, usage.entries, 0, BLOCK_SIZE, NAME_MAX, BLOCK_SIZE);
        });
    }

    fn getxattr(&self, _request: &Request, _ino: INodeNo, name: &OsStr, _size: u32, reply: ReplyXattr) {
        reply.error(no_attribute(name));
    }

    fn listxattr(&self, _request: &Request, _ino: INodeNo, size: u32, reply: ReplyXattr) {
        if size == 0 { reply.size(0) } else { reply.data(&[]) }
    }

    fn ioctl(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        _command: u32,
        _input: &[u8],
        _output_size: u32,
        reply: ReplyIoctl,
    ) {
        // Programs ask each file whether it is a terminal or a disk.
        reply.error(Errno::ENOTTY);
    }

    fn poll(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _notifier: PollNotifier,
        _events: PollEvents,
        _flags: PollFlags,
        reply: ReplyPoll,
    ) {
        // Sticky for the mount, and means what holds for every regular file: it is always ready.
        reply.error(Errno::ENOSYS);
    }

    // The kernel refuses what follows by itself, until root mounts the file system again for writing.

    fn setattr(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        _size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        reply.error(Errno::EROFS);
    }

    fn mknod(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(Errno::EROFS);
    }

    fn mkdir(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(Errno::EROFS);
    }

    fn unlink(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn rmdir(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn symlink(&self, _: &Request, _: INodeNo, _: &OsStr, _: &Path, reply: ReplyEntry) {
        reply.error(Errno::EROFS);
    }

    fn rename(&self, _: &Request, _: INodeNo, _: &OsStr, _: INodeNo, _: &OsStr, _: RenameFlags, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn link(&self, _: &Request, _: INodeNo, _: INodeNo, _: &OsStr, reply: ReplyEntry) {
        reply.error(Errno::EROFS);
    }

    fn create(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: i32, reply: ReplyCreate) {
        reply.error(Errno::EROFS);
    }

    fn setxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: &[u8], _: i32, _: u32, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn removexattr(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }
}
