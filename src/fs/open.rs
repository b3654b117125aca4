//! The table of open files.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

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

    /// Whether there is an open of an inode that is not for writing.
    pub fn has_readers(&self, ino: Ino) -> bool {
        self.read().values().any(|open| open.ino == ino && open.writer.is_none())
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
