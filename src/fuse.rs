//! A stand-in for the file system: an empty directory, or an empty file.

use std::ffi::OsStr;
use std::fs::File;
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, INodeNo, ReplyAttr, ReplyDirectory, ReplyEntry, Request,
};

use crate::error::{Error, Result};
use crate::mount::options::MountOptions;
use crate::mount::point::Shape;
use crate::mount::serve::Hooks;

/// A file system that is ready to be mounted.
pub struct Opened {
    /// What answers the kernel.
    pub filesystem: Stub,
    /// What signals ask of it.
    pub hooks: Hooks,
}

/// Opens and probes `spec`. No thread may be started: the daemon is forked after this.
///
/// # Errors
/// When `spec` cannot be opened.
pub fn open(spec: &OsStr, shape: Shape, _options: &MountOptions) -> Result<Opened> {
    let file = File::open(spec).map_err(|e| Error::failed("cannot open").on(spec).because(e))?;
    let hooks =
        Hooks { drop_maps: Box::new(|| log::info!("maps dropped")), log_counters: Box::new(|| log::info!("counters")) };
    Ok(Opened { filesystem: Stub { shape, _file: file }, hooks })
}

/// The stand-in.
pub struct Stub {
    shape: Shape,
    _file: File,
}

impl Filesystem for Stub {
    fn lookup(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEntry) {
        reply.error(Errno::ENOENT);
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        let (kind, perm) = match self.shape {
            Shape::Directory => (FileType::Directory, 0o555),
            Shape::File => (FileType::RegularFile, 0o444),
        };
        let attr = FileAttr {
            ino,
            size: 0,
            blocks: 0,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        };
        reply.attr(&Duration::ZERO, &attr);
    }

    fn readdir(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        if offset == 0 && !reply.add(ino, 1, FileType::Directory, ".") {
            let _full = reply.add(ino, 2, FileType::Directory, "..");
        }
        reply.ok();
    }
}
