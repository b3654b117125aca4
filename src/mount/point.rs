//! The mountpoint: the checks before the mount, the mount found in the kernel's list, and the unmount.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::unistd::geteuid;

use crate::error::{Error, ErrorKind, Result};
use crate::mount::fusermount;
use crate::mount::namespace::Namespace;
use crate::mount::record::{self, MountPointLock};
use crate::sys::device::DeviceId;
use crate::sys::mountinfo::{self, MountEntry};

/// What the mountpoint is, and so what the root of the mount is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MountPointKind {
    /// A directory that holds the files.
    Directory,
    /// The only file.
    File,
}

/// A mountpoint that has passed the checks.
#[derive(Clone, Debug)]
pub struct MountPoint {
    dir: PathBuf,
    /// `st_dev` and `st_ino` of the directory or file below the mount.
    inode: (u64, u64),
    kind: MountPointKind,
    namespace: Namespace,
}

impl MountPoint {
    /// Checks that `dir`, an absolute path, is a mountpoint for a new mount.
    ///
    /// # Errors
    /// When it is missing, is neither a directory nor a regular file, or has a mount of this program already.
    pub fn find(dir: &Path, namespace: Namespace) -> Result<Self> {
        let cannot = |e: io::Error| Error::failed("cannot mount here").on(dir).because(e);
        let (found, inode, kind) = namespace.within(|| {
            let found = fs::canonicalize(dir).map_err(cannot)?;
            // Checked before stat(2), which would wait for the daemon of such a mount.
            refuse_second(&list()?, &found)?;
            let metadata = fs::metadata(&found).map_err(cannot)?;
            let inode = (metadata.dev(), metadata.ino());
            match (metadata.is_dir(), metadata.is_file()) {
                (true, _) => Ok((found, inode, MountPointKind::Directory)),
                (_, true) => Ok((found, inode, MountPointKind::File)),
                _ => Err(neither(dir, &metadata)),
            }
        })?;
        Ok(Self { dir: found, inode, kind, namespace })
    }

    /// Locks the mountpoint for one mount. Another command that mounts here waits, and then finds the mount.
    ///
    /// # Errors
    /// When another command has mounted here since.
    pub fn claim(self) -> Result<Claim> {
        let lock = self.lock();
        let before = self.namespace.within(list)?;
        refuse_second(&before, &self.dir)?;
        let below = before.into_iter().filter(|mount| mount.point == self.dir).map(|mount| mount.device).collect();
        Ok(Claim { point: self, below, _lock: lock })
    }

    fn lock(&self) -> Option<MountPointLock> {
        let directory = record::directory()?;
        MountPointLock::wait(&directory, self.inode)
            .inspect_err(|error| log::debug!("{}: no lock of the mountpoint: {error}", directory.display()))
            .ok()
    }

    /// Unmounts the mount of a daemon that died before it served. A mount whose daemon runs stays.
    ///
    /// # Errors
    /// When it cannot be unmounted.
    pub fn remove_dead_mount(&self) -> Result<()> {
        let _lock = self.lock();
        self.namespace.within(|| {
            let list = list()?;
            let owner = Some(geteuid().as_raw());
            let is_own = |mount: &&MountEntry| mount.is_blkholefs() && mount.owner == owner;
            let Some(mount) = mountinfo::top(&list, &self.dir).filter(is_own) else { return Ok(()) };
            let is_dead = fs::metadata(&self.dir).is_err_and(|e| e.raw_os_error() == Some(libc::ENOTCONN));
            if is_dead { unmount_lazily(&mount.point) } else { Ok(()) }
        })
    }

    /// The path, without symbolic links.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What it is.
    pub fn kind(&self) -> MountPointKind {
        self.kind
    }

    /// The namespace that it is in.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Checks that a mount here leaves the file or device `path` visible. Otherwise the daemon would read `path` from its own
    /// mount.
    ///
    /// # Errors
    /// When `path` is the mountpoint, or is below it.
    pub fn keeps_visible(&self, path: &Path) -> Result<()> {
        let covered =
            !self.namespace.is_other() && fs::canonicalize(path).is_ok_and(|path| path.starts_with(&self.dir));
        if !covered {
            return Ok(());
        }
        Err(Error::failed(format!("cannot mount on {}: the mount would cover what it shows", self.dir.display()))
            .on(path))
    }
}

/// The error for a mountpoint that is neither a directory nor a regular file.
fn neither(dir: &Path, found: &fs::Metadata) -> Error {
    let error = Error::failed("cannot mount here: neither a directory nor a regular file").on(dir);
    if !found.file_type().is_block_device() {
        return error;
    }
    error.hint("the device comes first, and then the directory")
}

fn refuse_second(list: &[MountEntry], dir: &Path) -> Result<()> {
    match mountinfo::top(list, dir) {
        Some(mount) if mount.is_blkholefs() => {
            let source = mount.source.display();
            Err(Error::failed(format!("{source} is already mounted here")).on(dir).hint("unmount it first"))
        }
        _ => Ok(()),
    }
}

/// A mountpoint that is locked for one mount, until this is dropped.
pub struct Claim {
    point: MountPoint,
    /// The file systems that were mounted here before. A device number identifies a file system while it is mounted. Mount
    /// ids would not do, because the kernel reuses them at once.
    below: Vec<DeviceId>,
    _lock: Option<MountPointLock>,
}

impl Claim {
    /// The mountpoint.
    pub fn point(&self) -> &MountPoint {
        &self.point
    }

    /// Finds the mount that was made here from `spec` just now. When the list cannot be read, it is unmounted.
    ///
    /// # Errors
    /// When it is not in the kernel's list, or the list cannot be read.
    pub fn mounted(&self, spec: &OsStr) -> Result<Mounted> {
        let MountPoint { dir, namespace, .. } = &self.point;
        let owner = geteuid().as_raw();
        let device = namespace.within(|| {
            let list = list().inspect_err(|_| {
                // The lock keeps out other mounts of this program, so the topmost mount is the new one.
                let _ = unmount_lazily(dir);
            })?;
            let made_now = |mount: &&MountEntry| {
                let is_own = mount.is_blkholefs() && mount.owner == Some(owner) && mount.source == spec;
                is_own && mount.point == *dir && !self.below.contains(&mount.device)
            };
            let mount = list.iter().rfind(made_now);
            mount.map(|mount| mount.device).ok_or_else(|| Error::failed("the mount vanished at once").on(dir))
        })?;
        Ok(Mounted { dir: dir.clone(), namespace: namespace.clone(), device })
    }
}

/// A mount that this process made.
#[derive(Debug)]
pub struct Mounted {
    dir: PathBuf,
    namespace: Namespace,
    device: DeviceId,
}

/// The result of an unmount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unmounted {
    /// The mount and its copies at other mountpoints of this namespace are gone.
    Everywhere,
    /// Something else is mounted over it at this mountpoint. The kernel unmounts only the topmost mount.
    Covered(PathBuf),
}

impl Mounted {
    /// The mountpoint at which it was made.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its `st_dev`. No other file system has it while this one is served.
    pub fn device(&self) -> DeviceId {
        self.device
    }

    /// Whether it is in another mount namespace than this process.
    pub fn is_elsewhere(&self) -> bool {
        self.namespace.is_other()
    }

    /// Unmounts it at all its mountpoints. Where it is in use it is detached, and ends with its last user.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn unmount(&self) -> Result<Unmounted> {
        self.namespace.within(|| {
            let list = list()?;
            let mut result = Unmounted::Everywhere;
            for mount in list.iter().filter(|mount| mount.is_blkholefs() && mount.device == self.device) {
                if mountinfo::top(&list, &mount.point) == Some(mount) {
                    unmount_lazily(&mount.point)?;
                } else {
                    result = Unmounted::Covered(mount.point.clone());
                }
            }
            Ok(result)
        })
    }

    /// Unmounts because of `error`. Returns the error, with a hint when the mount is still there.
    pub fn unmount_after(&self, error: Error) -> Error {
        match self.unmount() {
            Ok(Unmounted::Everywhere) => error,
            Ok(Unmounted::Covered(place)) => {
                error.hint(format!("the mount is still there, below another one on {}", place.display()))
            }
            Err(left) => error.hint(format!("the mount is still there: {left}")),
        }
    }
}

fn unmount_lazily(point: &Path) -> Result<()> {
    if !geteuid().is_root() {
        return fusermount::unmount(point, false).or_else(|_| fusermount::unmount(point, true));
    }
    let result = match umount2(point, MntFlags::UMOUNT_NOFOLLOW) {
        Err(Errno::EBUSY) => umount2(point, MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH),
        result => result,
    };
    result.map_err(|e| Error::failed("cannot unmount").on(point).because(e))
}

/// The mounts that the calling thread sees.
///
/// # Errors
/// When proc is not mounted.
pub fn list() -> Result<Vec<MountEntry>> {
    const LIST: &str = "/proc/thread-self/mountinfo";
    let text = fs::read(LIST).map_err(|e| Error::new(ErrorKind::System, "cannot read").on(LIST).because(e))?;
    Ok(mountinfo::parse(&text))
}
