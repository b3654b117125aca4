//! The page cache that the kernel keeps for the files of the mount.

use std::ops::Range;
use std::sync::OnceLock;

use fuser::{INodeNo, Notifier};
use log::debug;

use crate::fs::Ino;
use crate::units::Bytes;

/// Sends notifications about cached pages to the kernel. Does nothing before the session is connected.
#[derive(Default)]
pub struct KernelCache(OnceLock<Notifier>);

impl KernelCache {
    /// Connects the session through which notifications are sent.
    pub fn connect(&self, notifier: Notifier) {
        // A file system has one session, so the cell is empty here.
        let _ = self.0.set(notifier);
    }

    /// Gives the kernel the length of a file, if it has a smaller one. For that a byte is stored at the end, since no other
    /// notification changes the length (`fuse_notify_store` of `fs/fuse/dev.c`, in Linux 7.3 `fs/fuse/notify.c`). Only for a file
    /// whose open is not replied to yet: after the reply the kernel drops its cached pages, and so this byte.
    pub(super) fn lengthen(&self, ino: Ino, len: Bytes) {
        let (Some(notifier), Some(last)) = (self.0.get(), len.get().checked_sub(1)) else { return };
        let ino = INodeNo(ino.0);
        // First the kernel must ignore replies that are on their way: they may have the length of a view that was open before.
        // This changes no cached page (`fuse_reverse_inval_inode` of `fs/fuse/inode.c`).
        let given = notifier.inval_inode(ino, -1, 0).and_then(|()| notifier.store(ino, last, &[0]));
        if let Err(error) = given {
            debug!("the length of inode {ino} is not updated: {error}");
        }
    }

    /// Drops the cached pages of a file that is no longer open. The next open would drop them anyway (there is no
    /// FOPEN_KEEP_CACHE), so until then they only take memory.
    pub(super) fn drop_pages(&self, ino: Ino) {
        self.drop_range(ino, Bytes::ZERO..Bytes::ZERO);
    }

    /// Drops the cached pages of a range of a file, and waits for those that are being read: `invalidate_inode_pages2_range` of
    /// `mm/truncate.c` locks each page, and a page stays locked until the reply to its read. An empty range stands for the whole file.
    pub(super) fn drop_range(&self, ino: Ino, range: Range<Bytes>) {
        let Some(notifier) = self.0.get() else { return };
        let len = range.end.saturating_sub(range.start).get();
        // A length of 0 means up to the end of the file.
        let (Ok(start), len) = (i64::try_from(range.start.get()), i64::try_from(len).unwrap_or(0)) else { return };
        if let Err(error) = notifier.inval_inode(INodeNo(ino.0), start, len) {
            debug!("cannot drop the page cache of inode {}: {error}", ino.0);
        }
    }
}
