//! FUSE passthrough (Linux 6.9, root only): the kernel reads an image file without a request to the daemon.
//!
//! The kernel serves reads of an image from the image itself, through the page cache of the image alone. All other
//! requests, such as lseek, still go to the daemon.
//!
//! Passthrough is used for images that are regular files, and for nothing else. The kernel binds an open file of the mount
//! to a backing file until it is closed. A loop device over a regular file has the same bytes, but while it is open its
//! offset and its backing file can be changed. Also, where the backing file was truncated, a read of the loop device
//! fails, while a read of the backing file ends. So the reads of a loop device must go to the device.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use fuser::{BackingId, FileHandle, FopenFlags, ReplyOpen};
use log::debug;

use crate::fs::Fh;
use crate::handle::Handle;

/// The open files whose device is an image.
#[derive(Default)]
pub(super) struct Passthrough(Mutex<HashMap<Fh, OpenImage>>);

/// An open file whose device is an image.
struct OpenImage {
    handle: Arc<Handle>,
    /// The kernel's number of the backing file, shared by all opens of the handle. `None` where the kernel refused
    /// passthrough. Then all opens of the handle are read through the daemon: the kernel does not allow opens with and
    /// without passthrough of one inode at the same time.
    id: Option<Arc<BackingId>>,
}

impl Passthrough {
    /// Replies to an open: with passthrough where it is possible, and otherwise with `flags`.
    pub(super) fn open(&self, fh: Fh, handle: Arc<Handle>, flags: FopenFlags, reply: ReplyOpen) {
        let Some(file) = handle.export().regular_file() else { return reply.opened(FileHandle(fh.0), flags) };
        let mut opens = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let same = opens.values().find(|open| Arc::ptr_eq(&open.handle, &handle));
        let id = match same {
            Some(open) => open.id.clone(),
            None => {
                let id = reply.open_backing(file).inspect_err(|error| debug!("no passthrough: {error}"));
                id.ok().map(Arc::new)
            }
        };
        match &id {
            Some(id) => reply.opened_passthrough(FileHandle(fh.0), FopenFlags::empty(), id),
            None => reply.opened(FileHandle(fh.0), flags),
        }
        opens.insert(fh, OpenImage { handle, id });
    }

    /// Removes a file that is closed. The kernel closes the image when the last open of the handle is removed.
    pub(super) fn release(&self, fh: Fh) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&fh);
    }
}
