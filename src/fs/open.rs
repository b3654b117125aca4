//! The table of open files.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::{Fh, Ino};
use crate::handle::Handle;

/// Parts of the table.
const PARTS: u64 = 64;

/// One open file.
pub struct Open {
    /// Its inode.
    pub ino: Ino,
    /// Its device.
    pub handle: Arc<Handle>,
}

/// Open files by number, in parts that have a lock each: requests for different files meet at none.
pub struct OpenFiles(Vec<RwLock<BTreeMap<Fh, Open>>>);

impl Default for OpenFiles {
    fn default() -> Self {
        Self((0..PARTS).map(|_| RwLock::default()).collect())
    }
}

impl OpenFiles {
    /// Adds an open file under its own number.
    pub fn insert(&self, fh: Fh, open: Open) {
        self.for_writing(fh).insert(fh, open);
    }

    /// The device of an open file.
    pub fn handle(&self, fh: Fh) -> Option<Arc<Handle>> {
        self.for_reading(fh).get(&fh).map(|open| open.handle.clone())
    }

    /// Takes an open file out.
    pub fn remove(&self, fh: Fh) -> Option<Open> {
        self.for_writing(fh).remove(&fh)
    }

    /// How many files are open.
    pub fn len(&self) -> usize {
        self.0.iter().map(|part| part.read().unwrap_or_else(PoisonError::into_inner).len()).sum()
    }

    fn for_reading(&self, fh: Fh) -> RwLockReadGuard<'_, BTreeMap<Fh, Open>> {
        self.part(fh).read().unwrap_or_else(PoisonError::into_inner)
    }

    fn for_writing(&self, fh: Fh) -> RwLockWriteGuard<'_, BTreeMap<Fh, Open>> {
        self.part(fh).write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Numbers are given out in order, so that neighbours are in different parts.
    fn part(&self, fh: Fh) -> &RwLock<BTreeMap<Fh, Open>> {
        &self.0[usize::try_from(fh.0 % PARTS).expect("a small number")]
    }
}
