//! The floor: a FUSE file system that does nothing but answer.
//!
//! Files whose extents follow from a formula: each pitch begins with data, and the rest of it is a hole. It answers
//! lseek without looking at anything and reads bytes from memory: what it costs is FUSE's own cost. They are not zeros,
//! which programs that copy would not write.

use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, UNIX_EPOCH};

use blkholefs::testing::fuse::SESSION_THREADS;
use blkholefs::testing::mount::session::CLONE_DESCRIPTOR;
use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, KernelConfig,
    LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, Request,
};

use crate::common::{run, wait_until};
use crate::shape::Shape;

/// The inode number of file 0; the others follow.
const FIRST: u64 = 2;
/// What the files are called, before their numbers.
const NAME: &str = "floor";
const TTL: Duration = Duration::from_secs(3600);
const MAX_READ: usize = 1 << 20;

/// The word that makes this program the floor's daemon.
pub const WORD: &str = "--floor";

struct FloorFs {
    shape: Shape,
    bytes: Vec<u8>,
}

/// The attributes of a file of `size` bytes that looks sparse, or of a directory.
pub fn attributes(ino: INodeNo, is_file: bool, size: u64) -> FileAttr {
    FileAttr {
        ino,
        size,
        blocks: 1,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: if is_file { FileType::RegularFile } else { FileType::Directory },
        perm: 0o555,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

impl FloorFs {
    fn attr(&self, ino: INodeNo) -> FileAttr {
        attributes(ino, ino.0 >= FIRST, self.shape.size)
    }
}

impl Filesystem for FloorFs {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        let most = u32::try_from(MAX_READ).expect("a MiB");
        let _ = config.set_max_write(most);
        let _ = config.set_max_readahead(most).or_else(|kernels| config.set_max_readahead(kernels));
        Ok(())
    }

    fn lookup(&self, _request: &Request, _parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let number = name.to_str().and_then(|name| name.strip_prefix(NAME)?.parse::<u64>().ok());
        match number {
            Some(number) => reply.entry(&TTL, &self.attr(INodeNo(FIRST + number)), Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _request: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &self.attr(ino));
    }

    fn open(&self, _request: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::empty());
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
        let left = usize::try_from(self.shape.size.saturating_sub(offset)).unwrap_or(MAX_READ);
        reply.data(&self.bytes[..usize::try_from(size).unwrap_or(MAX_READ).min(MAX_READ).min(left)]);
    }

    fn lseek(&self, _request: &Request, _ino: INodeNo, _fh: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        let shape = &self.shape;
        let offset = u64::try_from(offset).expect("the walk begins at 0");
        let within = offset % shape.pitch;
        let found = match (whence == libc::SEEK_DATA, within < shape.data) {
            (true, true) | (false, false) => offset,
            (true, false) => offset - within + shape.pitch,
            (false, true) => offset - within + shape.data,
        };
        match found < shape.size {
            true => reply.offset(i64::try_from(found).expect("a file's size")),
            false => reply.error(Errno::ENXIO),
        }
    }

    fn flush(&self, _request: &Request, _ino: INodeNo, _fh: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }
}

/// Runs the daemon: the arguments after [`WORD`].
pub fn serve(arguments: &[String]) {
    let [directory, shape, threads] = arguments else { panic!("{WORD} DIRECTORY SHAPE THREADS") };
    let mut config = Config::default();
    config.mount_options = vec![MountOption::RO, MountOption::FSName("floor".to_owned())];
    config.n_threads = Some(threads.parse().expect("a number of threads"));
    config.clone_fd = CLONE_DESCRIPTOR;
    let floor = FloorFs { shape: Shape::parse(shape), bytes: vec![1; MAX_READ] };
    fuser::mount(floor, directory, &config).expect("the floor mounts");
}

/// A mounted floor, unmounted with this value. It has as many threads as the program under test.
pub struct Floor {
    daemon: Child,
    directory: tempfile::TempDir,
}

impl Floor {
    /// Mounts a file of this shape.
    pub fn new(shape: Shape) -> Self {
        let directory = tempfile::Builder::new().prefix("blkholefs-").tempdir().expect("a temporary directory");
        let mut command = Command::new(std::env::current_exe().expect("this program has a path"));
        command.arg(WORD).arg(directory.path()).arg(shape.to_string()).arg(SESSION_THREADS.to_string());
        command.stdin(Stdio::null());
        let floor = Self { daemon: command.spawn().expect("this program starts"), directory };
        assert!(wait_until(|| File::open(floor.file()).is_ok()), "the floor does not mount");
        floor
    }

    /// One of its files.
    pub fn file(&self) -> PathBuf {
        self.numbered(0)
    }

    /// A file by its number: there are as many as are asked for.
    pub fn numbered(&self, number: usize) -> PathBuf {
        self.directory.path().join(format!("{NAME}{number}"))
    }

    /// The daemon's process.
    pub fn pid(&self) -> u32 {
        self.daemon.id()
    }
}

impl Drop for Floor {
    fn drop(&mut self) {
        unmount(self.directory.path());
        let _ = self.daemon.wait();
    }
}

/// Takes a mount away, also while a panic unwinds.
pub fn unmount(at: &Path) {
    if std::thread::panicking() {
        let _ = Command::new("umount").arg("--lazy").arg(at).status();
    } else {
        run("umount", [at]);
    }
}
