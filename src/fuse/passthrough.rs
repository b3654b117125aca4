//! Reads that the kernel makes without us: FUSE passthrough (Linux 6.9, root only).
//!
//! An image is read by the kernel from the image itself, at the speed of the image, and through its page cache alone.
//! Everything else, lseek included, still comes here.
//!
//! This is for regular files that are shown as they are, and for nothing else. The kernel binds an open file to what it
//! is read from for good: there is no way to take that back. A loop device over a regular file has the same bytes, but
//! it can be given another offset or another backing file while it is open, and where its image was cut short it gives
//! errors and the image the end of the file. Its bytes must come from the device.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use fuser::{BackingId, FileHandle, FopenFlags, ReplyOpen};
use log::debug;

use crate::fs::Fh;
use crate::handle::Handle;

/// The open files that are images.
#[derive(Default)]
pub(super) struct Passthrough(Mutex<HashMap<Fh, Opened>>);

struct Opened {
    handle: Arc<Handle>,
    /// `None` where the kernel refused: then all opens of this handle are read through the daemon, as the kernel does
    /// not mix the two.
    id: Option<Arc<BackingId>>,
}

impl Passthrough {
    /// Answers an open: by passthrough where that is possible, and else with `flags`.
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
        opens.insert(fh, Opened { handle, id });
    }

    /// Forgets an open file. The kernel lets go of the image with the last one.
    pub(super) fn release(&self, fh: Fh) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&fh);
    }
}
