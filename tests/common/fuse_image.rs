//! An image on a file system in user space that answers SEEK_DATA and SEEK_HOLE itself, as virtiofsd and glusterfs do,
//! while the kernel delays writeback (`FUSE_WRITEBACK_CACHE`).

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use fuser::{
    BackgroundSession, BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyLseek,
    ReplyOpen, ReplyWrite, Request, TimeOrNow, WriteFlags,
};

const PAGE: u64 = 4096;
const TTL: Duration = Duration::from_secs(3600);
const IMAGE: INodeNo = INodeNo(2);

/// A mounted file system with one image. Dropping this value unmounts it.
pub struct FuseImage {
    path: PathBuf,
    pages: Pages,
    gate: Arc<Mutex<()>>,
    _session: BackgroundSession,
    _directory: tempfile::TempDir,
}

impl FuseImage {
    /// An image of `size` bytes that is one hole.
    pub fn new(size: u64) -> Self {
        let directory = tempfile::Builder::new().prefix("blkholefs-").tempdir().expect("a temporary directory");
        let (pages, gate) = (Pages::default(), Arc::<Mutex<()>>::default());
        let server = Server { size, pages: pages.clone(), gate: gate.clone() };
        let session = fuser::spawn_mount(server, directory.path(), &Config::default()).expect("root may mount");
        Self { path: directory.path().join("image"), pages, gate, _session: session, _directory: directory }
    }

    /// Makes all of the image a hole, as another client of the server may do it: the local kernel gets no notification.
    pub fn punch_elsewhere(&self) {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Blocks all reads until the returned guard is dropped.
    pub fn block_reads(&self) -> MutexGuard<'_, ()> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The image.
    pub fn path(&self) -> &std::path::Path {
        &self.path
    }
}

type Pages = Arc<Mutex<BTreeMap<u64, Vec<u8>>>>;

struct Server {
    size: u64,
    pages: Pages,
    /// Held while reads are to wait.
    gate: Arc<Mutex<()>>,
}

impl Server {
    fn pages(&self) -> MutexGuard<'_, BTreeMap<u64, Vec<u8>>> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn attributes(&self, ino: INodeNo) -> FileAttr {
        let (kind, size) = if ino == IMAGE { (FileType::RegularFile, self.size) } else { (FileType::Directory, 0) };
        let time = SystemTime::UNIX_EPOCH;
        FileAttr {
            ino,
            size,
            blocks: self.pages().len() as u64 * (PAGE / 512),
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind,
            perm: 0o755,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }

    fn seek(&self, offset: u64, whence: i32) -> Option<u64> {
        let pages = self.pages();
        let first = (offset < self.size).then_some(offset / PAGE)?;
        let found = match whence {
            libc::SEEK_DATA => *pages.range(first..).next()?.0,
            _ => (first..).find(|page| !pages.contains_key(page)).expect("some page is not there"),
        };
        Some((found * PAGE).clamp(offset, self.size))
    }
}

impl Filesystem for Server {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        config.add_capabilities(InitFlags::FUSE_WRITEBACK_CACHE).expect("every kernel since 3.15 has it");
        Ok(())
    }

    fn lookup(&self, _request: &Request, _parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match name == "image" {
            true => reply.entry(&TTL, &self.attributes(IMAGE), Generation(0)),
            false => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _request: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &self.attributes(ino));
    }

    fn setattr(
        &self,
        _request: &Request,
        ino: INodeNo,
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
        // Only the kernel sets attributes: the time of a write.
        reply.attr(&TTL, &self.attributes(ino));
    }

    fn open(&self, _request: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE);
    }

    fn read(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        drop(self.gate.lock().unwrap_or_else(PoisonError::into_inner));
        let pages = self.pages();
        let mut bytes = Vec::new();
        for page in offset / PAGE..(offset + u64::from(size)).min(self.size).div_ceil(PAGE) {
            bytes.extend(pages.get(&page).map_or(&[0; PAGE as usize][..], Vec::as_slice));
        }
        // The kernel requests whole pages.
        reply.data(&bytes);
    }

    fn write(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let mut pages = self.pages();
        for (at, byte) in (offset..).zip(data) {
            pages.entry(at / PAGE).or_insert_with(|| vec![0; PAGE as usize])[(at % PAGE) as usize] = *byte;
        }
        reply.written(data.len() as u32);
    }

    fn lseek(&self, _request: &Request, _ino: INodeNo, _fh: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        match self.seek(offset as u64, whence) {
            Some(found) => reply.offset(found as i64),
            None => reply.error(Errno::ENXIO),
        }
    }

    fn flush(&self, _request: &Request, _ino: INodeNo, _fh: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _request: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        reply.ok();
    }
}
