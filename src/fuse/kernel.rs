//! What we tell the kernel without being asked.

use std::sync::OnceLock;

use fuser::{INodeNo, Notifier};
use log::debug;

use crate::fs::Ino;

/// The way to the kernel, once the session is up.
#[derive(Default)]
pub struct Kernel(OnceLock<Notifier>);

impl Kernel {
    /// Gives the way.
    pub fn connect(&self, notifier: Notifier) {
        // There is one session, and so one way.
        let _ = self.0.set(notifier);
    }

    /// Has the kernel drop the bytes that it keeps of a file that nobody has open: whoever opens it next would not be
    /// given them, and until then they would only take memory.
    pub(super) fn drop_cache(&self, ino: Ino) {
        let Some(notifier) = self.0.get() else { return };
        if let Err(error) = notifier.inval_inode(INodeNo(ino.0), 0, 0) {
            debug!("the page cache of inode {} stays: {error}", ino.0);
        }
    }
}
