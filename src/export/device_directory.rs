//! A directory of devices of the host, and the entries of it that a mount shows.
//!
//! Block devices, and symbolic links to them, are shown as files; directories as directories. Symbolic links to directories
//! are not shown, so that no path is endless.
//!
//! A directory on another file system than the SPEC's is not shown either. If two mounts were in the directories that they
//! show, their paths would be endless, and a lookup in one would cause a lookup in the other one: the cost would double
//! with each component of the path. Other file systems that are mounted in a directory of devices (`/dev/pts`, `/dev/shm`,
//! `/dev/mqueue`) have no block devices, and their servers may hang.

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
    /// The file system that it was on at the mount.
    pub file_system: DeviceId,
}

impl DeviceDirectory {
    /// How the entry `path`, relative to this directory, is shown. `None` when it is not shown.
    pub fn shown(&self, path: &Path) -> Option<FileKind> {
        if path.as_os_str().is_empty() {
            return self.is_shown_directory(path).then_some(FileKind::Directory);
        }
        let parent = path.parent()?;
        if self.is_shown_directory(parent) { self.kind_of_entry(path) } else { None }
    }

    /// The entries that are shown of the directory `path`, relative to this one.
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
            if let Some(kind) = self.kind_of_entry(&path.join(&name)) {
                entries.push((name, kind));
            }
        }
        Ok(entries)
    }

    /// How the entry of a directory that is shown is shown itself.
    fn kind_of_entry(&self, path: &Path) -> Option<FileKind> {
        let path = self.path.join(path);
        let own = statx::path_info(&path, Links::Own).ok()?;
        match own.file_type {
            libc::S_IFBLK => Some(FileKind::File),
            libc::S_IFDIR => self.is_on_file_system(own).then_some(FileKind::Directory),
            libc::S_IFLNK => fs::metadata(&path).ok()?.file_type().is_block_device().then_some(FileKind::File),
            _ => None,
        }
    }

    /// Whether this directory, and each one on the way down to `path`, is a directory on the file system of the SPEC. They
    /// are checked from the top down, so that no lookup passes through another file system.
    fn is_shown_directory(&self, path: &Path) -> bool {
        // The SPEC itself may be a symbolic link.
        let root = statx::path_info(&self.path, Links::Follow);
        let mut below = path.ancestors().filter(|path| !path.as_os_str().is_empty()).collect::<Vec<_>>();
        below.reverse();
        let is_shown = |kind: io::Result<PathInfo>| {
            kind.is_ok_and(|kind| kind.file_type == libc::S_IFDIR && self.is_on_file_system(kind))
        };
        is_shown(root) && below.into_iter().all(|path| is_shown(statx::path_info(&self.path.join(path), Links::Own)))
    }

    fn is_on_file_system(&self, kind: PathInfo) -> bool {
        kind.device == self.file_system
    }
}
