//! What stat(2) reports of a device node, file or directory of the host.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::time::{Duration, SystemTime};

use crate::sys::acl::has_acl;
use crate::sys::device::{self, DeviceId};

/// The identity of a device or file, independent of its names. While it is open, no other one can get the same identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FileIdentity {
    /// A block device. Its node does not count: it may be made again for the same device.
    Device(DeviceId),
    /// A file or directory.
    Inode {
        /// The file system.
        device: DeviceId,
        /// The file in it.
        number: u64,
    },
    /// A view of a file. Each open that may show something else has another number.
    View(u64),
}

impl FileIdentity {
    pub(super) fn of(metadata: &Metadata) -> Self {
        match metadata.file_type().is_block_device() {
            true => Self::Device(DeviceId::from_dev(metadata.rdev())),
            false => Self::Inode { device: DeviceId::from_dev(metadata.dev()), number: metadata.ino() },
        }
    }
}

/// Owner, permissions and times.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostNode {
    /// Which device, file or directory it is; `None` where only one can be at that place.
    pub identity: Option<FileIdentity>,
    /// The owner.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// Type and permissions, as in `st_mode`.
    pub mode: u32,
    /// The time of the last change of its contents.
    pub mtime: SystemTime,
    /// The time of the last change of its contents or attributes.
    pub ctime: SystemTime,
}

impl HostNode {
    /// The attributes of the file, directory or device node at a path.
    ///
    /// # Errors
    /// As stat(2).
    pub fn at(path: &Path) -> io::Result<Self> {
        path.metadata().map(|metadata| Self::of(&metadata, has_acl(path)))
    }

    /// The same of an open one.
    ///
    /// # Errors
    /// As fstat(2).
    pub fn of_open(file: &File) -> io::Result<Self> {
        file.metadata().map(|metadata| Self::of(&metadata, has_acl(&device::own_path(file))))
    }

    fn of(metadata: &Metadata, has_acl: bool) -> Self {
        // With a list, only the owner's bits still mean what they say: the others may be denied to some.
        let granted = if has_acl { !0o077 } else { !0 };
        Self {
            identity: Some(FileIdentity::of(metadata)),
            uid: metadata.uid(),
            gid: metadata.gid(),
            mode: metadata.mode() & granted,
            mtime: time(metadata.mtime(), metadata.mtime_nsec()),
            ctime: time(metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// A time of stat(2); one before 1970 is taken for 1970.
fn time(seconds: i64, nanoseconds: i64) -> SystemTime {
    let nanoseconds = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(0));
    u64::try_from(seconds)
        .map_or(SystemTime::UNIX_EPOCH, |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds) + nanoseconds)
}
