//! Inode numbers: the same for the same path, in every mount, as long as the path leads to the same device.
//!
//! A number stands for one device, because the kernel caches by it: the bytes that were read, and who may read them. When
//! a path leads to another device (a link that was changed, a name that was used again) it keeps its number only if
//! nobody has the old device open, and if the same users may read both. Else it gets a new number, and whoever comes with
//! the old one is told to look the name up again.

use std::collections::HashMap;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use super::{Spec, errno, not_found};
use crate::error::{Error, Result};
use crate::source::backing::Node;

/// An inode number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ino(pub u64);

/// The root of the mount (`FUSE_ROOT_ID`).
pub const ROOT: Ino = Ino(1);

/// The paths that were seen, relative to the SPEC. They are few (one a device) and are kept as long as the mount.
pub struct Nodes(Mutex<Table>);

struct Table {
    by_ino: HashMap<Ino, Entry>,
    by_path: HashMap<PathBuf, Ino>,
}

struct Entry {
    path: PathBuf,
    /// What was found there.
    shown: Option<Node>,
}

impl Entry {
    fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), shown: None }
    }

    /// Takes what is found at the path now, if it can have the number of what was there.
    fn take(&mut self, now: Option<&Node>, in_use: bool) -> bool {
        if let (Some(old), Some(now)) = (&self.shown, now)
            && old.identity != now.identity
            && (in_use || rights(old) != rights(now))
        {
            return false;
        }
        if let Some(now) = now {
            self.shown = Some(*now);
        }
        true
    }
}

/// Who may do what, and the type.
fn rights(node: &Node) -> (u32, u32, u32) {
    (node.uid, node.gid, node.mode)
}

impl Table {
    fn number(&mut self, path: &Path) -> Ino {
        let mut ino = Ino(hash(path));
        while ino.0 <= ROOT.0 || self.by_ino.contains_key(&ino) {
            ino.0 = ino.0.wrapping_add(1);
        }
        self.by_ino.insert(ino, Entry::new(path));
        self.by_path.insert(path.to_owned(), ino);
        ino
    }
}

impl Nodes {
    /// The table with the root in it.
    pub fn new() -> Self {
        Self(Mutex::new(Table {
            by_ino: HashMap::from([(ROOT, Entry::new(Path::new("")))]),
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
        table.by_ino.insert(ROOT, Entry::new(&file));
        table.by_path = HashMap::from([(file, ROOT)]);
        Ok(())
    }

    /// The path of an inode.
    ///
    /// # Errors
    /// ENOENT for a number that was never given out.
    pub fn path(&self, ino: Ino) -> Result<PathBuf> {
        let table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        table.by_ino.get(&ino).map(|entry| entry.path.clone()).ok_or_else(not_found)
    }

    /// The inode number of a path, whatever it leads to.
    pub fn ino(&self, path: &Path) -> Ino {
        self.find(path, None, |_| false)
    }

    /// The inode number of a path that leads to `now`. `in_use` tells of a number whether somebody has its device open.
    pub fn find(&self, path: &Path, now: Option<&Node>, in_use: impl Fn(Ino) -> bool) -> Ino {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = table.by_path.get(path).copied();
        let known = known.filter(|ino| table.by_ino.get_mut(ino).is_some_and(|entry| entry.take(now, in_use(*ino))));
        known.unwrap_or_else(|| {
            let ino = table.number(path);
            table.by_ino.entry(ino).and_modify(|entry| entry.shown = now.copied());
            ino
        })
    }

    /// Notes that the path of `ino`, whose device nobody has open, leads to `now`.
    ///
    /// # Errors
    /// ESTALE when that is to have a number of its own.
    pub fn renew(&self, ino: Ino, now: Option<&Node>) -> Result<()> {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = table.by_ino.get_mut(&ino).ok_or_else(not_found)?;
        if entry.take(now, false) { Ok(()) } else { Err(errno(libc::ESTALE)) }
    }
}

/// FNV-1a, 64 bits: a number that a backup tool finds again after a remount.
fn hash(path: &Path) -> u64 {
    const BASIS: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0000_0100_0000_01b3;
    path.as_os_str().as_bytes().iter().fold(BASIS, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(PRIME))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_one_device_while_it_is_open_and_one_set_of_rights() {
        let nodes = Nodes::new();
        let one = Node::at(Path::new("/proc/self")).unwrap();
        let other = Node { identity: Node::at(Path::new("/")).unwrap().identity, ..one };
        let path = Path::new("x");
        let ino = nodes.find(path, Some(&one), |_| false);
        assert_eq!(nodes.find(path, Some(&one), |_| true), ino, "the same device, open");
        assert_eq!(nodes.find(path, Some(&other), |_| false), ino, "another one, while none is open");
        let second = nodes.find(path, Some(&one), |_| true);
        assert_ne!(second, ino, "another one, while the old one is open");
        assert_eq!(nodes.ino(path), second);
        assert!(nodes.renew(ino, Some(&other)).is_ok());
        // Whoever was allowed to open the old number must not get what he could not open.
        let closed = Node { mode: one.mode & !0o077, ..other };
        assert_eq!(nodes.renew(second, Some(&closed)).unwrap_err().errno(), libc::ESTALE);
        assert_ne!(nodes.find(path, Some(&closed), |_| false), second);
        assert_eq!(nodes.path(second).unwrap(), path);
    }
}
