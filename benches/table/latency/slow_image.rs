//! A file system of one image whose reads take milliseconds, as those of a disk behind a network do. Questions about its
//! extents take no longer than those of the image.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEntry, ReplyLseek, ReplyOpen, Request,
};
use nix::unistd::{Whence, lseek};

use crate::common::wait_until;
use crate::floor::attributes;

const NAME: &str = "image";
const IMAGE: INodeNo = INodeNo(2);
const TTL: Duration = Duration::from_secs(3600);
const MAX_READ: u32 = 1 << 20;

/// How many reads may wait at the same time. The kernel sends 12 at most unless it is asked for more.
const AT_ONCE: u16 = 256;

struct SlowFs {
    image: Arc<File>,
    size: u64,
    delay: Duration,
}

impl SlowFs {
    fn attr(&self, ino: INodeNo) -> FileAttr {
        attributes(ino, ino == IMAGE, self.size)
    }
}

impl Filesystem for SlowFs {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        let _ = config.set_max_write(MAX_READ);
        let _ = config.set_max_background(AT_ONCE);
        let _ = config.set_congestion_threshold(AT_ONCE);
        // Without it the thread of the loop device waits for each of its direct reads.
        config.add_capabilities(InitFlags::FUSE_ASYNC_DIO).expect("every kernel since 3.13 has it");
        Ok(())
    }

    fn lookup(&self, _request: &Request, _parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match name == NAME {
            true => reply.entry(&TTL, &self.attr(IMAGE), Generation(0)),
            false => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _request: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &self.attr(ino));
    }

    fn open(&self, _request: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::empty());
    }

    /// Each read waits in a thread of its own, so that none waits for another.
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
        let (image, delay) = (Arc::clone(&self.image), self.delay);
        let count = u64::from(size).min(self.size.saturating_sub(offset));
        std::thread::spawn(move || {
            std::thread::sleep(delay);
            let mut bytes = vec![0; usize::try_from(count).expect("the kernel asks for less")];
            match image.read_exact_at(&mut bytes, offset) {
                Ok(()) => reply.data(&bytes),
                Err(_) => reply.error(Errno::EIO),
            }
        });
    }

    fn lseek(&self, _request: &Request, _ino: INodeNo, _fh: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        let whence = if whence == libc::SEEK_DATA { Whence::SeekData } else { Whence::SeekHole };
        match lseek(&*self.image, offset, whence) {
            Ok(found) => reply.offset(found),
            Err(_) => reply.error(Errno::ENXIO),
        }
    }
}

/// A mounted image, unmounted with this value: before its directory is taken away.
pub struct SlowImage {
    _session: BackgroundSession,
    directory: tempfile::TempDir,
}

impl SlowImage {
    /// Shows `image` so that each read takes `delay`.
    pub fn new(image: &Path, delay: Duration) -> Self {
        let directory = tempfile::Builder::new().prefix("blkholefs-").tempdir().expect("a temporary directory");
        let file = File::open(image).expect("our own image");
        let size = file.metadata().expect("our own image").len();
        let mut config = Config::default();
        config.mount_options = vec![MountOption::RO, MountOption::FSName("slow".to_owned())];
        config.n_threads = Some(4);
        config.clone_fd = true;
        let slow = SlowFs { image: Arc::new(file), size, delay };
        let session = fuser::spawn_mount(slow, directory.path(), &config).expect("root may mount");
        let slow = Self { _session: session, directory };
        assert!(wait_until(|| File::open(slow.file()).is_ok()), "the slow image does not mount");
        slow
    }

    /// The image.
    pub fn file(&self) -> PathBuf {
        self.directory.path().join(NAME)
    }
}
