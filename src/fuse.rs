//! Translates FUSE requests to calls of [`FileSystem`], and the results to replies.
//!
//! A device of the mount may depend on a file of the same mount: for example, a loop device whose backing file is a file
//! of the mount. A request for such a device leads to further requests, and both must be answered at the same time. So no
//! request may block all threads; see the module `threads`.

mod attributes;
mod buffers;
mod kernel_cache;
mod passthrough;
mod read;
#[cfg(test)]
mod tests;
mod threads;
mod write;

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    IoctlFlags, KernelConfig, LockOwner, OpenFlags, PollEvents, PollFlags, PollNotifier, RenameFlags, ReplyAttr,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyPoll,
    ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use log::log;

use crate::deadline;
use crate::error::Error;
use crate::fs::{Fh, FileSystem, Ino};
use crate::map::view::Whence;
use crate::spec::LONGEST_NAME;
use crate::units::Bytes;
use attributes::{file_attr, file_type};
use buffers::Buffers;
use kernel_cache::KernelCache;
use passthrough::Passthrough;
use read::read;
use threads::{IfNoThread, Threads, is_own_thread, run_caught};

/// How long the kernel may cache a name. An inode number always belongs to the same path, so a cached name can only hide
/// for this time that the file was removed.
const ENTRY_TTL: Duration = Duration::from_secs(1);

/// Attributes are not cached: size, blocks and times follow the device.
const ATTRIBUTE_TTL: Duration = Duration::ZERO;

/// The generation of every inode: an inode number is never reused for another path.
const GENERATION: Generation = Generation(0);

/// The number of session threads, which read the requests of the kernel. At most all but one of them work on a request at
/// the same time. `benches/README.md` compares the speed and the memory of other numbers.
pub const SESSION_THREADS: usize = 8;

/// The reply to a request that this process sends to its own mount: it would wait for itself.
const OWN_REQUEST: Errno = Errno::EDEADLK;

/// What only a mount that is not written uses. In one that is, a file that is open for writing is read past the page cache of
/// the mount, and the kernel must refuse to map it shared: stores to such a mapping would stay in that cache unseen.
const READ_ONLY_CAPABILITIES: &[InitFlags] = &[InitFlags::FUSE_PASSTHROUGH, InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP];

/// The largest read or write request, in bytes, and so the largest size of a buffer.
const MAX_REQUEST: u32 = 1 << 20;

/// The kernel's default for the number of requests that no process waits for (`FUSE_DEFAULT_MAX_BACKGROUND` of
/// `fs/fuse/inode.c`).
const DEFAULT_BACKGROUND: u16 = 12;

/// The stacking depth that the mount announces to the kernel: 1 allows passthrough for images on file systems that are not
/// themselves stacked. An image on a stacked file system, such as overlayfs, is read through the daemon.
const PASSTHROUGH_DEPTH: u32 = 1;

/// The longest name of an entry in bytes, as on devtmpfs and most other file systems.
const NAME_MAX: u32 = LONGEST_NAME as u32;

/// The block size of statfs(2) in bytes: bsdtar aligns its buffers to it.
const BLOCK_SIZE: u32 = 4096;

/// The FUSE side of a [`FileSystem`].
pub struct BlkHoleFs {
    fs: Arc<FileSystem>,
    threads: Threads,
    passthrough: Arc<Passthrough>,
    kernel_cache: Arc<KernelCache>,
    buffers: Arc<Buffers>,
    /// The flags in the reply to an open of a file that is read through the daemon.
    open_flags: FopenFlags,
}

impl BlkHoleFs {
    /// Serves `fs`. With `direct_io`, reads through the daemon bypass the page cache of the mount.
    pub fn new(fs: Arc<FileSystem>, direct_io: bool) -> Self {
        // Without FOPEN_KEEP_CACHE each open drops the cached pages, so that no read returns bytes older than the open.
        let open_flags = if direct_io { FopenFlags::FOPEN_DIRECT_IO } else { FopenFlags::empty() };
        let (passthrough, kernel_cache, buffers) = (Arc::default(), Arc::<KernelCache>::default(), Arc::default());
        let cache = kernel_cache.clone();
        fs.set_drop_pages(move |ino, range| cache.drop_range(ino, range));
        Self { fs, threads: Threads::new(SESSION_THREADS), passthrough, kernel_cache, buffers, open_flags }
    }

    /// The sender of notifications to the kernel. The caller connects it to the session.
    pub fn kernel_cache(&self) -> Arc<KernelCache> {
        self.kernel_cache.clone()
    }

    /// Runs a request that may block, so that other requests are answered at the same time. It fails with EIO if there is
    /// no thread for it.
    fn answer(&self, work: impl FnOnce(&FileSystem) + Send + 'static) {
        self.run(IfNoThread::Refuse, work);
    }

    /// Runs a request with the deadline of a request.
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

/// The errno of getxattr(2) on a file system without extended attributes: ENODATA for a name that could exist, and
/// EOPNOTSUPP for a name that cannot.
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
        // Each of these is optional: without it the mount is only slower.
        let of_all = [InitFlags::FUSE_PARALLEL_DIROPS, InitFlags::FUSE_ASYNC_DIO];
        let of_kind = if self.fs.is_writable() { write::CAPABILITIES } else { READ_ONLY_CAPABILITIES };
        for &wanted in of_all.iter().chain(of_kind) {
            let _ = config.add_capabilities(wanted);
        }
        let _ = config.set_max_stack_depth(PASSTHROUGH_DEPTH);
        let _ = config.set_max_write(MAX_REQUEST);
        // The reads of the kernel's own reading ahead, which is never below its default.
        let background = u16::try_from(self.fs.queue_depth()).unwrap_or(u16::MAX).max(DEFAULT_BACKGROUND);
        let _ = config.set_max_background(background);
        if let Err(most) = config.set_max_readahead(MAX_REQUEST) {
            let _ = config.set_max_readahead(most);
        }
        Ok(())
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if is_own_thread(request.pid()) {
            return reply.error(OWN_REQUEST);
        }
        if name.len() > NAME_MAX as usize {
            return reply.error(Errno::ENAMETOOLONG);
        }
        let name = name.to_owned();
        self.answer(move |fs| match fs.lookup(Ino(parent.0), &name) {
            Ok(found) => {
                // Each open of a view begins with a lookup, which finds out whether an open view is still what it is to show.
                let entry_ttl = if found.is_view { Duration::ZERO } else { ENTRY_TTL };
                reply.entry_with_ttls(&ATTRIBUTE_TTL, &entry_ttl, &file_attr(&found), GENERATION);
            }
            Err(error) => reply.error(errno("lookup", &error)),
        });
    }

    fn forget(&self, _request: &Request, ino: INodeNo, lookups: u64) {
        run_caught(|| self.fs.forget(Ino(ino.0), lookups));
    }

    fn getattr(&self, request: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        if is_own_thread(request.pid()) {
            return reply.error(OWN_REQUEST);
        }
        self.answer(move |fs| match fs.getattr(Ino(ino.0)) {
            Ok(found) => reply.attr(&ATTRIBUTE_TTL, &file_attr(&found)),
            Err(error) => reply.error(errno("stat", &error)),
        });
    }

    fn open(&self, request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if is_own_thread(request.pid()) {
            return reply.error(OWN_REQUEST);
        }
        let access = write::access(flags);
        let (passthrough, open_flags) = (self.passthrough.clone(), self.open_flags);
        let kernel_cache = self.kernel_cache.clone();
        self.answer(move |fs| match fs.open(Ino(ino.0), access).and_then(|fh| Ok((fh, fs.handle(fh)?))) {
            Ok((fh, handle)) => {
                fs.give_len(fh, |ino, len| kernel_cache.lengthen(ino, len));
                match (access.is_for_writing, fs.is_writable()) {
                    (true, _) => reply.opened(FileHandle(fh.0), write::OPEN_FLAGS),
                    // The kernel allows no opens with and without passthrough of one inode at the same time.
                    (false, true) => reply.opened(FileHandle(fh.0), open_flags),
                    (false, false) => passthrough.open(fh, handle, open_flags, reply),
                }
            }
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
        flags: OpenFlags,
        lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let (offset, size) = (Bytes::new(offset), usize::try_from(size).unwrap_or(usize::MAX));
        let buffers = self.buffers.clone();
        // The kernel may read directly without the flag, as the loop driver does (`lo_rw_aio` of `drivers/block/loop.c`). Only
        // direct reads have an owner of locks (`fuse_send_read` and `fuse_send_readpages` of `fs/fuse/file.c`).
        let is_direct = self.open_flags.contains(FopenFlags::FOPEN_DIRECT_IO)
            || flags.0 & libc::O_DIRECT != 0
            || lock_owner.is_some();
        self.answer(move |fs| match fs.reader(Fh(fh.0)) {
            Err(error) => reply.error(errno("read", &error)),
            Ok(reader) => read(&reader, &buffers, offset, size, !is_direct, reply),
        });
    }

    fn lseek(&self, _request: &Request, _ino: INodeNo, fh: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        // A negative offset is ENXIO, as for local file systems (`generic_file_llseek_size` and `iomap_seek_data`). The reply
        // must never be ENOSYS, after which the kernel sends no more lseek requests for this mount.
        let whence = match whence {
            libc::SEEK_DATA => Whence::Data,
            libc::SEEK_HOLE => Whence::Hole,
            _ => return reply.error(Errno::EINVAL),
        };
        let Ok(offset) = u64::try_from(offset) else { return reply.error(Errno::ENXIO) };
        self.threads.run_then_reply(&self.fs, move |fs| {
            let seek = || fs.handle(Fh(fh.0)).and_then(|handle| handle.seek(Bytes::new(offset), whence));
            let found = deadline::within(deadline::REQUEST, seek);
            move || match found {
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
        let (passthrough, kernel_cache) = (self.passthrough.clone(), self.kernel_cache.clone());
        // The last close of a device writes back its dirty pages, so it may block. It is postponed and not refused if there is
        // no thread: the kernel sends no second release, and the device would stay open.
        self.run(IfNoThread::Postpone, move |fs| {
            passthrough.release(Fh(fh.0));
            let was_last = fs.release(Fh(fh.0));
            reply.ok();
            if was_last {
                kernel_cache.drop_pages(Ino(ino.0));
            }
        });
    }

    fn flush(&self, _request: &Request, _ino: INodeNo, _fh: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _request: &Request, _ino: INodeNo, fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        self.answer(move |fs| write::reply_empty("fsync", fs.fsync(Fh(fh.0)), reply));
    }

    fn write(
        &self,
        _request: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let bytes = self.buffers.copy_of(data);
        self.answer(move |fs| write::write(fs, Fh(fh.0), Bytes::new(offset), bytes.as_ref(), flags, reply));
    }

    fn fallocate(
        &self,
        _request: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        len: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let range = Bytes::new(offset)..Bytes::new(offset.saturating_add(len));
        self.answer(move |fs| write::reply_empty("fallocate", write::fallocate(fs, Fh(fh.0), range, mode), reply));
    }

    fn copy_file_range(
        &self,
        _request: &Request,
        _from_ino: INodeNo,
        from: FileHandle,
        from_offset: u64,
        _to_ino: INodeNo,
        to: FileHandle,
        to_offset: u64,
        len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let (from, to) = ((Fh(from.0), Bytes::new(from_offset)), (Fh(to.0), Bytes::new(to_offset)));
        self.answer(move |fs| write::copy(fs, from, to, Bytes::new(len), reply));
    }

    fn opendir(&self, request: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        if is_own_thread(request.pid()) {
            return reply.error(OWN_REQUEST);
        }
        self.answer(move |fs| match fs.opendir(Ino(ino.0)) {
            Ok(fh) => reply.opened(FileHandle(fh.0), FopenFlags::empty()),
            Err(error) => reply.error(errno("opendir", &error)),
        });
    }

    fn readdir(&self, _request: &Request, _ino: INodeNo, fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        run_caught(|| {
            let entries = match self.fs.readdir(Fh(fh.0)) {
                Ok(entries) => entries,
                Err(error) => return reply.error(errno("readdir", &error)),
            };
            let start = usize::try_from(offset).unwrap_or(usize::MAX);
            for (index, entry) in entries.iter().enumerate().skip(start) {
                // The offset in an entry is where the next readdir continues: that of the following entry.
                if reply.add(INodeNo(entry.ino.0), index as u64 + 1, file_type(entry.kind), &entry.name) {
                    break;
                }
            }
            reply.ok();
        });
    }

    fn releasedir(&self, _request: &Request, _ino: INodeNo, fh: FileHandle, _flags: OpenFlags, reply: ReplyEmpty) {
        run_caught(|| {
            self.fs.releasedir(Fh(fh.0));
            reply.ok();
        });
    }

    fn fsyncdir(&self, _request: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn statfs(&self, request: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        if is_own_thread(request.pid()) {
            return reply.error(OWN_REQUEST);
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
        // Programs send terminal and disk ioctls to any file, to see what it is. ENOTTY means "neither".
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
        // After ENOSYS the kernel sends no more poll requests for this mount, and treats every file as always ready, which is
        // right for regular files.
        reply.error(Errno::ENOSYS);
    }

    fn setattr(
        &self,
        _request: &Request,
        ino: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let fh = fh.map(|fh| Fh(fh.0));
        self.answer(move |fs| write::set_attributes(fs, Ino(ino.0), fh, size.map(Bytes::new), reply));
    }

    // Nothing is created, removed or renamed, also in a mount that is written. In others the kernel refuses the following
    // requests itself, unless root has remounted them read-write.

    fn mknod(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(write::not_possible(&self.fs));
    }

    fn mkdir(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(write::not_possible(&self.fs));
    }

    fn unlink(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(write::not_possible(&self.fs));
    }

    fn rmdir(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(write::not_possible(&self.fs));
    }

    fn symlink(&self, _: &Request, _: INodeNo, _: &OsStr, _: &Path, reply: ReplyEntry) {
        reply.error(write::not_possible(&self.fs));
    }

    fn rename(&self, _: &Request, _: INodeNo, _: &OsStr, _: INodeNo, _: &OsStr, _: RenameFlags, reply: ReplyEmpty) {
        reply.error(write::not_possible(&self.fs));
    }

    fn link(&self, _: &Request, _: INodeNo, _: INodeNo, _: &OsStr, reply: ReplyEntry) {
        reply.error(write::not_possible(&self.fs));
    }

    fn create(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: i32, reply: ReplyCreate) {
        reply.error(write::not_possible(&self.fs));
    }

    fn setxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: &[u8], _: i32, _: u32, reply: ReplyEmpty) {
        reply.error(write::no_attributes(&self.fs));
    }

    fn removexattr(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(write::no_attributes(&self.fs));
    }
}
