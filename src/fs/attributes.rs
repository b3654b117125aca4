//! The attributes for stat(2), by the rules that copy and backup tools rely on.

use std::time::SystemTime;

use super::Ino;
use super::change::FileTimes;
use crate::error::Result;
use crate::export::{FileIdentity, FileKind, HostNode};
use crate::handle::Handle;
use crate::sys::sysfs;
use crate::units::Bytes;

/// The permissions that a file can have at most.
const READABLE: u32 = 0o444;
/// The same of a file that can be written.
const WRITABLE: u32 = 0o666;
/// The permissions that a directory can have at most.
const MAX_DIRECTORY_MODE: u32 = 0o555;

/// `st_blksize`, as ext4 reports it. Python takes it for the size of its buffer, and a program that mixes buffered reads
/// with `lseek` on the descriptor goes wrong when that is larger than an extent. Readers that want more choose it
/// themselves: cp takes 128 KiB or 256 KiB at least.
const BLOCK_SIZE: u32 = 4096;

/// The attributes of a file or directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// The inode number.
    pub ino: Ino,
    /// Directory or file.
    pub kind: FileKind,
    /// The length.
    pub size: Bytes,
    /// Allocated units of 512 bytes: never 0, and fewer than the size has exactly when there is a hole.
    pub blocks: u64,
    /// The preferred size of reads, in bytes.
    pub block_size: u32,
    /// The last change of the contents, as far as is known.
    pub mtime: SystemTime,
    /// The last change of contents or attributes.
    pub ctime: SystemTime,
    /// Permission bits.
    pub mode: u32,
    /// The owner.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// Whether it is a view: the next lookup of its name may give another inode.
    pub is_view: bool,
}

/// Owner, group and permissions of all files, where options of the mount change those of the devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ownership {
    /// The owner of every file, instead of the device node's.
    pub uid: Option<u32>,
    /// The group of every file, instead of the device node's.
    pub gid: Option<u32>,
    /// The permission bits that a file may have at most.
    pub mode: u32,
    /// Whether files can be opened for writing by those who may write to the devices.
    pub is_writable: bool,
}

impl Attributes {
    /// The attributes of a directory: those of the directory of the host.
    pub fn directory(ino: Ino, shown: &HostNode, ownership: &Ownership) -> Self {
        Self {
            ino,
            kind: FileKind::Directory,
            size: Bytes::ZERO,
            blocks: 0,
            block_size: BLOCK_SIZE,
            mtime: shown.mtime,
            ctime: shown.ctime,
            mode: shown.mode & MAX_DIRECTORY_MODE,
            uid: ownership.uid.unwrap_or(shown.uid),
            gid: ownership.gid.unwrap_or(shown.gid),
            is_view: false,
        }
    }

    /// The attributes of a device that cannot be opened: all data, with the length from sysfs.
    pub fn unopened(ino: Ino, node: &HostNode, ownership: &Ownership) -> Self {
        let size = match node.identity {
            Some(FileIdentity::Device(id)) => sysfs::len(id).unwrap_or(Bytes::ZERO),
            _ => Bytes::ZERO,
        };
        let changed = FileTimes { mtime: node.mtime, ctime: node.ctime };
        Self::new(ino, node, size, blocks(size, false, None), changed, ownership)
    }

    /// The attributes of an open device or image that is found at `node`.
    ///
    /// # Errors
    /// When its length cannot be read any more.
    pub fn file(
        ino: Ino,
        handle: &Handle,
        node: &HostNode,
        has_hole: bool,
        changed: FileTimes,
        ownership: &Ownership,
    ) -> Result<Self> {
        let export = handle.export();
        let size = export.len()?;
        let blocks = blocks(size, has_hole, handle.allocated());
        let is_view = export.base().is_some();
        Ok(Self { is_view, ..Self::new(ino, node, size, blocks, changed, ownership) })
    }

    fn new(ino: Ino, shown: &HostNode, size: Bytes, blocks: u64, changed: FileTimes, ownership: &Ownership) -> Self {
        Self {
            ino,
            kind: FileKind::File,
            size,
            blocks,
            block_size: BLOCK_SIZE,
            mtime: changed.mtime,
            ctime: changed.ctime,
            mode: shown.mode & if ownership.is_writable { WRITABLE } else { READABLE } & ownership.mode,
            uid: ownership.uid.unwrap_or(shown.uid),
            gid: ownership.gid.unwrap_or(shown.gid),
            is_view: false,
        }
    }
}

/// `st_blocks`: cp and tar look for holes only when it is below the size, and tar takes 0 for "nothing to read".
fn blocks(size: Bytes, has_hole: bool, allocated: Option<Bytes>) -> u64 {
    let full = size.get().div_ceil(512);
    if !has_hole {
        return full.max(1);
    }
    let most = (size.get() / 512).saturating_sub(1);
    let stored = allocated.map_or(most, |allocated| allocated.get().div_ceil(512));
    stored.min(most).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_never_0_and_fewer_than_the_size_only_with_a_hole() {
        let mib = Bytes::new(1 << 20);
        for (size, has_hole, allocated, expected) in [
            (mib, false, None, 2048),
            (mib, false, Some(Bytes::ZERO), 2048),
            (mib, true, None, 2047),
            (mib, true, Some(Bytes::ZERO), 1),
            (mib, true, Some(Bytes::new(8192)), 16),
            (mib, true, Some(mib), 2047),
            (mib, true, Some(Bytes::MAX), 2047),
            (Bytes::new(1000), false, None, 2),
            (Bytes::ZERO, false, None, 1),
        ] {
            assert_eq!(blocks(size, has_hole, allocated), expected, "{size} {has_hole} {allocated:?}");
        }
    }
}
