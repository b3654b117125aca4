//! The size of everything that a mount shows.

use std::collections::HashSet;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::shown::Shown;
use super::{DeviceDirectory, FileKind, FileSource};
use crate::sys::device::DeviceId;
use crate::sys::sysfs;
use crate::units::Bytes;

/// Entries of a directory SPEC, those of its subdirectories included, that are counted; the rest is left out.
const MAX_ENTRIES: u64 = 10_000;

/// The size of a mount.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// The lengths of all files together. A device that has several names counts once.
    pub bytes: Bytes,
    /// Files and directories, the root included.
    pub entries: u64,
}

impl Usage {
    /// Opens no device: the lengths come from sysfs. A file whose length cannot be found counts as empty.
    pub(super) fn of(shown: &Shown) -> Self {
        match shown {
            Shown::File { source, export_len, .. } => {
                let len = match source {
                    FileSource::Path(path) => len_at(path).map_or(Bytes::ZERO, |(_, len)| len),
                    FileSource::Export(_) | FileSource::Volume(_) => *export_len,
                };
                Self { bytes: len, entries: 2 }
            }
            Shown::Directory(root) => Self::of_directory(root),
            Shown::Pool(pools) => {
                let found = pools.open().and_then(|pool| pool.volumes()).unwrap_or_default();
                let lens = found.iter().filter_map(|found| found.volume.as_ref().ok()).map(|volume| volume.len());
                Self { bytes: lens.fold(Bytes::ZERO, Bytes::saturating_add), entries: 1 + found.len() as u64 }
            }
        }
    }

    fn of_directory(root: &DeviceDirectory) -> Self {
        let mut sum = Self { bytes: Bytes::ZERO, entries: 1 };
        let mut devices = HashSet::new();
        let mut left = vec![PathBuf::new()];
        while let Some(directory) = left.pop() {
            for (name, kind) in root.entries(&directory).unwrap_or_default() {
                if sum.entries >= MAX_ENTRIES {
                    return sum;
                }
                sum.entries += 1;
                let path = directory.join(name);
                match kind {
                    FileKind::Directory => left.push(path),
                    FileKind::File => {
                        let found = len_at(&root.path.join(path));
                        if let Some((_, len)) = found.filter(|(id, _)| devices.insert(*id)) {
                            sum.bytes = sum.bytes.saturating_add(len);
                        }
                    }
                }
            }
        }
        sum
    }
}

/// The length of the device or image at `path`, and which one it is (an image: on which file system).
fn len_at(path: &Path) -> Option<(DeviceId, Bytes)> {
    let metadata = path.metadata().ok()?;
    if metadata.file_type().is_block_device() {
        let id = DeviceId::from_dev(metadata.rdev());
        return Some((id, sysfs::len(id)?));
    }
    Some((DeviceId::from_dev(metadata.dev()), Bytes::new(metadata.len())))
}
