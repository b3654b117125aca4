//! What a SPEC names: one device, one image, or a directory of devices.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use super::{FileKind, not_found};
use crate::error::{Error, Result};
use crate::source::backing::Node;
use crate::sys::device;

/// What is mounted.
#[derive(Clone, Debug)]
pub enum Spec {
    /// A block device or an image: one file, named as the last part of the path.
    File {
        /// Where it is.
        path: PathBuf,
        /// The name of the file that shows it.
        name: OsString,
    },
    /// A directory of devices.
    Directory(PathBuf),
}

/// What a path inside the mount leads to.
pub enum Target {
    /// A directory.
    Directory(Node),
    /// The device or image at that path of the host.
    File(PathBuf),
}

impl Spec {
    /// Looks at what a SPEC names.
    ///
    /// # Errors
    /// When it is missing, cannot be opened for reading, or is nothing that can be shown.
    pub fn new(spec: &OsStr) -> Result<Self> {
        // Absolute from here on: the daemon leaves the directory that it was started in.
        let path =
            std::path::absolute(spec).map_err(|error| Error::failed("cannot resolve").on(spec).because(error))?;
        let failed = |what: &str, error: io::Error| Error::failed(what).on(spec).because(error);
        let kind = fs::metadata(&path).map_err(|error| failed("cannot open", error))?.file_type();
        if kind.is_dir() {
            fs::read_dir(&path).map_err(|error| failed("cannot read the directory", error))?;
            return Ok(Self::Directory(path));
        }
        if !kind.is_block_device() && !kind.is_file() {
            return Err(Error::failed("is neither a block device, nor a regular file, nor a directory").on(spec));
        }
        device::open(&path, false).map_err(|error| failed("cannot open", error))?;
        let name = path.file_name().map(ToOwned::to_owned);
        Ok(Self::File { name: name.ok_or_else(|| Error::failed("has no name").on(spec))?, path })
    }

    /// The path of the one file, if there is only one.
    pub fn only_file(&self) -> Option<PathBuf> {
        match self {
            Self::File { name, .. } => Some(PathBuf::from(name)),
            Self::Directory(_) => None,
        }
    }

    /// The path of an entry of a directory; `None` for a name that is not one.
    pub fn child(&self, directory: &Path, name: &OsStr) -> Option<PathBuf> {
        let one = Path::new(name);
        let plain = one.components().count() == 1 && one.file_name() == Some(name);
        plain.then(|| directory.join(name))
    }

    /// What a path inside the mount leads to now.
    ///
    /// # Errors
    /// ENOENT when nothing is there that is shown.
    pub fn target(&self, path: &Path) -> Result<Target> {
        match self {
            Self::File { path: device, name } if path == Path::new(name) => Ok(Target::File(device.clone())),
            Self::File { path: device, .. } if path.as_os_str().is_empty() => {
                let parent = device.parent().unwrap_or(Path::new("/"));
                fs::metadata(parent).map(|metadata| Target::Directory(Node::of(&metadata))).map_err(|_| not_found())
            }
            Self::File { .. } => Err(not_found()),
            Self::Directory(root) => {
                let path = root.join(path);
                let kind = shown(&path).ok_or_else(not_found)?;
                match kind {
                    FileKind::File => Ok(Target::File(path)),
                    FileKind::Directory => {
                        let metadata = fs::metadata(&path).map_err(|_| not_found())?;
                        Ok(Target::Directory(Node::of(&metadata)))
                    }
                }
            }
        }
    }

    /// The names in a directory, as they are now.
    ///
    /// # Errors
    /// As readdir(3).
    pub fn entries(&self, directory: &Path) -> Result<Vec<(OsString, FileKind)>> {
        let root = match self {
            Self::File { name, .. } => return Ok(vec![(name.clone(), FileKind::File)]),
            Self::Directory(root) => root,
        };
        let path = root.join(directory);
        let failed = |error: io::Error| Error::failed("cannot read the directory").on(&path).because(error);
        let mut entries = Vec::new();
        for entry in fs::read_dir(&path).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            if let Some(kind) = shown(&path.join(&name)) {
                entries.push((name, kind));
            }
        }
        entries.sort();
        Ok(entries)
    }
}

/// How a path of the host is shown: block devices as files, also through links, and real directories as directories.
/// Links to directories are not followed, so no path is endless.
fn shown(path: &Path) -> Option<FileKind> {
    let own = fs::symlink_metadata(path).ok()?.file_type();
    if own.is_dir() {
        return Some(FileKind::Directory);
    }
    let kind = if own.is_symlink() { fs::metadata(path).ok()?.file_type() } else { own };
    kind.is_block_device().then_some(FileKind::File)
}
