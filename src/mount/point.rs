//! The place of a mount: before, when it must be fit for one, and after, when it must be found again to unmount it.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::unistd::geteuid;

use crate::error::{Error, ErrorKind, Result};
use crate::mount::fusermount;
use crate::mount::mountinfo::{self, DeviceNumber, MountEntry};
use crate::mount::namespace::Namespace;

/// What the mount's root looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// A directory that holds the files.
    Directory,
    /// The one file itself.
    File,
}

/// A place that is fit for a mount.
#[derive(Debug)]
pub struct MountPoint {
    dir: PathBuf,
    shape: Shape,
    namespace: Namespace,
}

impl MountPoint {
    /// Checks that `dir`, an absolute path, can take a mount.
    ///
    /// # Errors
    /// When it is missing, neither directory nor regular file, or already a mount of ours.
    pub fn find(dir: &Path, namespace: Namespace) -> Result<Self> {
        let cannot = |e: io::Error| Error::failed("cannot mount here").on(dir).because(e);
        let (found, shape) = namespace.within(|| {
            let found = fs::canonicalize(dir).map_err(cannot)?;
            // Asked before stat(2), which would wait for the daemon of that mount.
            if let Some(mount) = mountinfo::top(&list()?, &found)
                && mount.is_ours()
            {
                let source = mount.source.display();
                return Err(Error::failed(format!("{source} is already mounted here"))
                    .on(dir)
                    .hint("unmount it first"));
            }
            let kind = fs::metadata(&found).map_err(cannot)?.file_type();
            match (kind.is_dir(), kind.is_file()) {
                (true, _) => Ok((found, Shape::Directory)),
                (_, true) => Ok((found, Shape::File)),
                _ => Err(Error::failed("cannot mount here: neither a directory nor a regular file").on(dir)),
            }
        })?;
        Ok(Self { dir: found, shape, namespace })
    }

    /// The place, without symbolic links.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What will be seen there.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Where the place is.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Checks that a mount here leaves the file or device `path` in sight: behind itself a mount would ask itself.
    ///
    /// # Errors
    /// When `path` is what is mounted on, or lies below it.
    pub fn leaves(&self, path: &Path) -> Result<()> {
        let covered =
            !self.namespace.is_other() && fs::canonicalize(path).is_ok_and(|path| path.starts_with(&self.dir));
        if !covered {
            return Ok(());
        }
        Err(Error::failed(format!("cannot mount on {}: the mount would cover what it shows", self.dir.display()))
            .on(path))
    }

    /// The mount that was made here just now.
    ///
    /// # Errors
    /// When it is not in the kernel's list.
    pub fn mounted(self, spec: &OsStr) -> Result<Mounted> {
        let device = self.namespace.within(|| match mountinfo::top(&list()?, &self.dir) {
            Some(mount) if mount.is_ours() => Ok(mount.device),
            _ => Err(Error::failed("the mount vanished at once").on(&self.dir)),
        })?;
        Ok(Mounted { point: self, device, spec: spec.to_owned() })
    }
}

/// A mount that this process made.
#[derive(Debug)]
pub struct Mounted {
    point: MountPoint,
    device: DeviceNumber,
    spec: OsString,
}

impl Mounted {
    /// Where it was made.
    pub fn dir(&self) -> &Path {
        &self.point.dir
    }

    /// Its `st_dev`.
    pub fn device(&self) -> DeviceNumber {
        self.device
    }

    /// Whether it is in another mount namespace than this process.
    pub fn is_elsewhere(&self) -> bool {
        self.point.namespace.is_other()
    }

    /// Unmounts it wherever it is now; where it is in use, it goes out of sight and ends with its last user.
    ///
    /// # Errors
    /// When the kernel refuses, or something else is mounted over it.
    pub fn unmount(&self) -> Result<()> {
        self.point.namespace.within(|| {
            let list = list()?;
            for mount in list.iter().filter(|mount| self.is_this(mount)) {
                if mountinfo::top(&list, &mount.point) != Some(mount) {
                    return Err(Error::failed("cannot unmount: something else is mounted over it").on(&mount.point));
                }
                unmount_lazily(&mount.point)?;
            }
            Ok(())
        })
    }

    fn is_this(&self, mount: &MountEntry) -> bool {
        mount.is_ours() && mount.device == self.device && mount.source == self.spec
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
