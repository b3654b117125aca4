//! Inode numbers: the same for the same path, in every mount.

use std::collections::HashMap;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use super::{Spec, not_found};
use crate::error::{Error, Result};

/// An inode number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ino(pub u64);

/// The root of the mount (`FUSE_ROOT_ID`).
pub const ROOT: Ino = Ino(1);

/// The paths that were seen, relative to the SPEC. They are few (one a device) and are kept as long as the mount.
pub struct Nodes(Mutex<Table>);

struct Table {
    by_ino: HashMap<Ino, PathBuf>,
    by_path: HashMap<PathBuf, Ino>,
}

impl Nodes {
    /// The table with the root in it.
    pub fn new() -> Self {
        Self(Mutex::new(Table {
            by_ino: HashMap::from([(ROOT, PathBuf::new())]),
            by_path: HashMap::from([(PathBuf::new(), ROOT)]),
        }))
    }

    /// Makes the root the one file of the SPEC.
    ///
    /// # Errors
    /// When the SPEC is a directory.
    pub fn root_is_file(&mut self, spec: &Spec) -> Result<()> {
        let file = spec.only_file().ok_or_else(|| Error::failed("a directory cannot be mounted on a file"))?;
        let table = self.0.get_mut().unwrap_or_else(PoisonError::into_inner);
        table.by_ino.insert(ROOT, file.clone());
        table.by_path = HashMap::from([(file, ROOT)]);
        Ok(())
    }

    /// The path of an inode.
    ///
    /// # Errors
    /// ENOENT for a number that was never given out.
    pub fn path(&self, ino: Ino) -> Result<PathBuf> {
        let table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        table.by_ino.get(&ino).cloned().ok_or_else(not_found)
    }

    /// The inode number of a path.
    pub fn ino(&self, path: &Path) -> Ino {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(ino) = table.by_path.get(path) {
            return *ino;
        }
        let mut ino = Ino(hash(path));
        while ino.0 <= ROOT.0 || table.by_ino.contains_key(&ino) {
            ino.0 = ino.0.wrapping_add(1);
        }
        table.by_ino.insert(ino, path.to_owned());
        table.by_path.insert(path.to_owned(), ino);
        ino
    }
}

/// FNV-1a, 64 bits: a number that a backup tool finds again after a remount.
fn hash(path: &Path) -> u64 {
    const BASIS: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0000_0100_0000_01b3;
    path.as_os_str().as_bytes().iter().fold(BASIS, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(PRIME))
}
