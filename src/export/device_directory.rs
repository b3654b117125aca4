//! A directory of devices of the host: what of it is shown.
//!
//! Block devices are shown as files, also through links, and real directories as directories. Links to directories are not
//! followed, so no path is endless.
//!
//! A directory on another file system than the SPEC's is not shown. Two mounts that lie in each other's SPEC would have
//! paths without an end, and each look at one would look at the other, which looks back: the cost would double with each
//! step of the path. What else is mounted in a directory of devices (`/dev/pts`, `/dev/shm`, `/dev/mqueue`) has no block
//! devices, and its server may hang.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use super::FileKind;
use crate::error::{Error, Result};
use crate::sys::device::DeviceId;
use crate::sys::statx::{self, Links, PathInfo};

/// A directory of devices.
#[derive(Clone, Debug)]
pub struct DeviceDirectory {
    /// Its path on the host.
    pub path: PathBuf,
    /// The file system that it was on when it was mounted.
    pub file_system: DeviceId,
}

impl DeviceDirectory {
    /// How the path `path` below this directory is shown; `None` when it is not.
    pub fn shown(&self, path: &Path) -> Option<FileKind> {
        if path.as_os_str().is_empty() {
            return self.is_shown_directory(path).then_some(FileKind::Directory);
        }
        let parent = path.parent()?;
        if self.is_shown_directory(parent) { self.shown_in_shown(path) } else { None }
    }

    /// The names in the directory `path` below this one.
    ///
    /// # Errors
    /// As readdir(3); ENOENT for a directory that is not shown.
    pub fn entries(&self, path: &Path) -> Result<Vec<(OsString, FileKind)>> {
        let directory = self.path.join(path);
        let failed = |error: io::Error| Error::failed("cannot read the directory").on(&directory).because(error);
        if !self.is_shown_directory(path) {
            return Err(failed(io::Error::from_raw_os_error(libc::ENOENT)));
        }
        let mut entries = Vec::new();
        for entry in fs::read_dir(&directory).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            if let Some(kind) = self.shown_in_shown(&path.join(&name)) {
                entries.push((name, kind));
            }
        }
        Ok(entries)
    }

    /// How something in a directory that is shown is shown itself.
    fn shown_in_shown(&self, path: &Path) -> Option<FileKind> {
        let path = self.path.join(path);
        let own = statx::path_info(&path, Links::Own).ok()?;
        match own.file_type {
            libc::S_IFBLK => Some(FileKind::File),
            libc::S_IFDIR => self.is_own(own).then_some(FileKind::Directory),
            libc::S_IFLNK => fs::metadata(&path).ok()?.file_type().is_block_device().then_some(FileKind::File),
            _ => None,
        }
    }

    /// Whether this and each directory down to `path` is a directory on the file system of the SPEC. From the top down, so
    /// that no path is walked through another file system.
    fn is_shown_directory(&self, path: &Path) -> bool {
        // The SPEC itself may be a link.
        let root = statx::path_info(&self.path, Links::Follow);
        let mut below = path.ancestors().filter(|path| !path.as_os_str().is_empty()).collect::<Vec<_>>();
        below.reverse();
        let is_own =
            |kind: io::Result<PathInfo>| kind.is_ok_and(|kind| kind.file_type == libc::S_IFDIR && self.is_own(kind));
        is_own(root) && below.into_iter().all(|path| is_own(statx::path_info(&self.path.join(path), Links::Own)))
    }

    fn is_own(&self, kind: PathInfo) -> bool {
        kind.device == self.file_system
    }
}
