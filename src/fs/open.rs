//! The table of open files.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::flush::ReportedFailure;
use super::{Fh, Ino};
use crate::export::Writer;
use crate::handle::{Handle, Reader};

/// One open file.
pub struct OpenFile {
    /// Its inode.
    pub ino: Ino,
    /// Its reads and seeks.
    pub reader: Arc<Reader>,
    /// What writes to its device, if it is open for writing.
    pub writer: Option<Arc<dyn Writer>>,
    /// Whether each change is to survive a loss of power when its call returns (`O_SYNC`, `O_DSYNC`).
    pub is_synchronous: bool,
    /// The failed flushes that it has reported.
    pub(super) reported: Arc<ReportedFailure>,
}

/// All open files, by number.
#[derive(Default)]
pub struct OpenFiles(RwLock<BTreeMap<Fh, OpenFile>>);

impl OpenFiles {
    /// Adds an open file.
    pub fn insert(&self, fh: Fh, open: OpenFile) {
        self.write().insert(fh, open);
    }

    /// The reads and seeks of an open file.
    pub fn reader(&self, fh: Fh) -> Option<Arc<Reader>> {
        self.read().get(&fh).map(|open| open.reader.clone())
    }

    /// The device of an open file.
    pub fn handle(&self, fh: Fh) -> Option<Arc<Handle>> {
        self.read().get(&fh).map(|open| open.reader.handle().clone())
    }

    /// What writes to the device of an open file; `None` unless it is open for writing.
    pub fn writer(&self, fh: Fh) -> Option<Arc<dyn Writer>> {
        self.read().get(&fh).and_then(|open| open.writer.clone())
    }

    /// Whether each change of an open file is to survive a loss of power when its call returns.
    pub fn is_synchronous(&self, fh: Fh) -> bool {
        self.read().get(&fh).is_some_and(|open| open.is_synchronous)
    }

    /// The failed flushes that an open file has reported.
    pub(super) fn reported(&self, fh: Fh) -> Option<Arc<ReportedFailure>> {
        self.read().get(&fh).map(|open| open.reported.clone())
    }

    /// The inode of an open file.
    pub fn ino(&self, fh: Fh) -> Option<Ino> {
        self.read().get(&fh).map(|open| open.ino)
    }

    /// Removes an open file, and returns it.
    pub fn remove(&self, fh: Fh) -> Option<OpenFile> {
        self.write().remove(&fh)
    }

    /// How many files are open.
    pub fn len(&self) -> usize {
        self.read().len()
    }

    fn read(&self) -> RwLockReadGuard<'_, BTreeMap<Fh, OpenFile>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, BTreeMap<Fh, OpenFile>> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}
