//! The page cache that the kernel keeps for the files of the mount.

use std::sync::OnceLock;

use fuser::{INodeNo, Notifier};
use log::debug;

use crate::fs::Ino;

/// Sends notifications about cached pages to the kernel. Does nothing before the session is connected.
#[derive(Default)]
pub struct KernelCache(OnceLock<Notifier>);

impl KernelCache {
    /// Connects the session through which notifications are sent.
    pub fn connect(&self, notifier: Notifier) {
        // A file system has one session, so the cell is empty here.
        let _ = self.0.set(notifier);
    }

    /// Drops the cached pages of a file that is no longer open. The next open would drop them anyway (there is no
    /// FOPEN_KEEP_CACHE), so until then they only take memory.
    pub(super) fn drop_pages(&self, ino: Ino) {
        let Some(notifier) = self.0.get() else { return };
        if let Err(error) = notifier.inval_inode(INodeNo(ino.0), 0, 0) {
            debug!("cannot drop the page cache of inode {}: {error}", ino.0);
        }
    }
}
