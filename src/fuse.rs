//! FUSE requests to calls of [`FileSystem`] and back: decode, call, reply, nothing else.
//!
//! A device may stand on a file of this very mount: a loop device over a file that is shown here, and shown here itself.
//! So no request may keep the others from being answered. The module `crew` sees to that.

mod crew;
mod kernel;
mod passthrough;

use std::cell::RefCell;
use std::ffi::OsStr;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags, KernelConfig,
    LockOwner, OpenAccMode, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek,
    ReplyOpen, ReplyStatfs, ReplyXattr, Request,
};
use log::{debug, warn};

use crate::deadline;
use crate::error::Error;
use crate::fs::{Attributes, Fh, FileKind, FileSystem, Ino};
use crate::handle::Handle;
use crate::map::view::Whence;
use crate::sys::buffer::AlignedBuffer;
use crate::units::Bytes;
use crew::{Crew, is_ours};
use kernel::Kernel;
use passthrough::Passthrough;

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

thread_local! {
    /// Each session thread reads into a buffer of its own, which is kept.
    static BUFFER: RefCell<AlignedBuffer> = const { RefCell::new(AlignedBuffer::new()) };
}

/// The FUSE side of a [`FileSystem`].
pub struct BlkHoleFs {
    fs: Arc<FileSystem>,
    crew: Crew,
    passthrough: Arc<Passthrough>,
    kernel: Arc<Kernel>,
    /// What the kernel is told at each open of a file that is read through the daemon.
    open_flags: FopenFlags,
}

impl BlkHoleFs {
    /// Serves a file system. With `direct_io`, what is read through the daemon bypasses the page cache of the mount.
    pub fn new(fs: Arc<FileSystem>, direct_io: bool) -> Self {
        // No FOPEN_KEEP_CACHE: what is read after an open is no older than the open.
        let open_flags = if direct_io { FopenFlags::FOPEN_DIRECT_IO } else { FopenFlags::empty() };
        Self { fs, crew: Crew::new(SESSION_THREADS), passthrough: Arc::default(), kernel: Arc::default(), open_flags }
    }

    /// The way back to the kernel, which the session is to connect.
    pub fn kernel(&self) -> Arc<Kernel> {
        self.kernel.clone()
    }

    /// Answers a request, so that another one can be answered meanwhile.
    fn answer(&self, work: impl FnOnce(&FileSystem) + Send + 'static) {
        let fs = self.fs.clone();
        self.crew.run(move || deadline::within(deadline::REQUEST, || work(&fs)));
    }
}

/// The errno of a failure. What a user should know of is logged with its cause; a plain refusal is not.
fn errno(operation: &str, error: &Error) -> Errno {
    match error.errno() {
        code @ (libc::ENOENT | libc::EROFS | libc::EISDIR | libc::ESTALE) => {
            debug!("{operation}: {error}");
            Errno::from_i32(code)
        }
        code => {
            warn!("{operation}: {error}");
            Errno::from_i32(code)
        }
    }
}

fn file_type(kind: FileKind) -> FileType {
    match kind {
        FileKind::Directory => FileType::Directory,
        FileKind::File => FileType::RegularFile,
    }
}

fn file_attr(attributes: &Attributes) -> FileAttr {
    FileAttr {
        ino: INodeNo(attributes.ino.0),
        size: attributes.size.get(),
        blocks: attributes.blocks,
        atime: attributes.mtime,
        mtime: attributes.mtime,
        ctime: attributes.ctime,
        crtime: attributes.ctime,
        kind: file_type(attributes.kind),
        perm: u16::try_from(attributes.mode & 0o7777).unwrap_or(0),
        nlink: if attributes.kind == FileKind::Directory { 2 } else { 1 },
        uid: attributes.uid,
        gid: attributes.gid,
        rdev: 0,
        blksize: attributes.block_size,
        flags: 0,
    }
}

fn read(handle: &Handle, offset: Bytes, size: usize, reply: ReplyData) {
    BUFFER.with_borrow_mut(|buffer| match handle.read(buffer, offset, size) {
        Ok(bytes) => reply.data(bytes),
        Err(error) => reply.error(errno("read", &error)),
    });
}

impl Filesystem for BlkHoleFs {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        self.fs.begin();
        // A kernel without one of these serves all the same, only slower.
        for wanted in [InitFlags::FUSE_PARALLEL_DIROPS, InitFlags::FUSE_ASYNC_DIO, InitFlags::FUSE_PASSTHROUGH] {
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
        let name = name.to_owned();
        self.answer(move |fs| match fs.lookup(Ino(parent.0), &name) {
            Ok(found) => reply.entry_with_ttls(&ATTRIBUTE_TTL, &ENTRY_TTL, &file_attr(&found), GENERATION),
            Err(error) => reply.error(errno("lookup", &error)),
        });
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
        self.answer(move |fs| match fs.handle(Fh(fh.0)) {
            Err(error) => reply.error(errno("read", &error)),
            Ok(handle) => read(&handle, offset, size, reply),
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
        // The last close of a device writes back its dirty pages.
        self.answer(move |fs| {
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
    }

    fn releasedir(&self, _request: &Request, _ino: INodeNo, fh: FileHandle, _flags: OpenFlags, reply: ReplyEmpty) {
        self.fs.releasedir(Fh(fh.0));
        reply.ok();
    }

    fn statfs(&self, _request: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        // No space of its own; bsdtar aligns its buffers to the block sizes.
        reply.statfs(0, 0, 0, 0, 0, 4096, 255, 4096);
    }

    fn getxattr(&self, _request: &Request, _ino: INodeNo, _name: &OsStr, _size: u32, reply: ReplyXattr) {
        // Sticky for the mount, and means what it says: there are none.
        reply.error(Errno::ENOSYS);
    }

    fn listxattr(&self, _request: &Request, _ino: INodeNo, _size: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }
}
