//! Inode numbers: the same for the same path, in every mount, as long as the path leads to the same device.
//!
//! A number stands for one device, because the kernel caches by it: the bytes that were read, and who may read them. When
//! a path leads to another device (a link that was changed, a name that was used again) it keeps its number only if
//! nobody has the old device open, and if the same users may read both. Else it gets a new number, and whoever comes with
//! the old one is told to look the name up again.
//!
//! A name is kept as long as the kernel keeps its inode: the kernel counts the lookups that it got an answer to, and gives
//! the count back when it drops the inode (`FUSE_FORGET`). A name that was forgotten gets the same number again, which is
//! made from the path. A listing is no lookup, and leaves nothing behind.

use std::collections::HashMap;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Spec;
use crate::error::{Error, Result};
use crate::source::backing::Node;
use crate::sys::memory;

/// An inode number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ino(pub u64);

/// The root of the mount (`FUSE_ROOT_ID`).
pub const ROOT: Ino = Ino(1);

/// After so many entries were removed, and no fewer than are left, their memory is given back.
const MANY: usize = 1024;

/// The paths that the kernel knows, relative to the SPEC.
pub struct Nodes(Mutex<Table>);

struct Table {
    by_ino: HashMap<Ino, Entry>,
    by_path: HashMap<Arc<Path>, Ino>,
    /// Entries that were removed since memory was given back.
    removed: usize,
}

struct Entry {
    path: Arc<Path>,
    /// What was found there.
    shown: Option<Node>,
    /// Lookups that the kernel did not give back yet.
    lookups: u64,
}

impl Entry {
    fn new(path: &Path) -> Self {
        Self { path: path.into(), shown: None, lookups: 0 }
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
    fn new(root: &Path) -> Self {
        let root = Entry::new(root);
        let by_path = HashMap::from([(root.path.clone(), ROOT)]);
        Self { by_path, by_ino: HashMap::from([(ROOT, root)]), removed: 0 }
    }

    /// The number that a path has, or would get.
    fn number(&self, path: &Path) -> Ino {
        self.by_path.get(path).copied().unwrap_or_else(|| self.free_number(path))
    }

    fn free_number(&self, path: &Path) -> Ino {
        let mut ino = Ino(hash(path));
        while ino.0 <= ROOT.0 || self.by_ino.contains_key(&ino) {
            ino.0 = ino.0.wrapping_add(1);
        }
        ino
    }

    fn insert(&mut self, path: &Path, now: Option<&Node>) -> Ino {
        let ino = self.free_number(path);
        let entry = Entry { shown: now.copied(), ..Entry::new(path) };
        self.by_path.insert(entry.path.clone(), ino);
        self.by_ino.insert(ino, entry);
        ino
    }

    /// Removes an entry. Returns whether it is time to give memory back.
    fn remove(&mut self, ino: Ino) -> bool {
        let Some(entry) = self.by_ino.remove(&ino) else { return false };
        // The path may have got another number since.
        if self.by_path.get(&entry.path) == Some(&ino) {
            self.by_path.remove(&entry.path);
        }
        self.removed += 1;
        let is_time = self.removed >= self.by_ino.len().max(MANY);
        if is_time {
            self.removed = 0;
            self.by_ino.shrink_to_fit();
            self.by_path.shrink_to_fit();
        }
        is_time
    }
}

impl Nodes {
    /// The table with the root in it.
    pub fn new() -> Self {
        Self(Mutex::new(Table::new(Path::new(""))))
    }

    /// Makes the root the one file of the SPEC.
    ///
    /// # Errors
    /// When the SPEC is a directory.
    pub fn root_is_file(&mut self, spec: &Spec) -> Result<()> {
        let file = spec.only_file().ok_or_else(|| Error::failed("a directory cannot be mounted on a file"))?;
        *self.0.get_mut().unwrap_or_else(PoisonError::into_inner) = Table::new(&file);
        Ok(())
    }

    /// The path of an inode.
    ///
    /// # Errors
    /// ENOENT for a number that the kernel does not know, or has forgotten.
    pub fn path(&self, ino: Ino) -> Result<PathBuf> {
        self.lock()
            .by_ino
            .get(&ino)
            .map(|entry| entry.path.to_path_buf())
            .ok_or_else(|| Error::from_errno(libc::ENOENT))
    }

    /// The inode number that a lookup of this path would give, whatever it leads to.
    pub fn number(&self, path: &Path) -> Ino {
        self.lock().number(path)
    }

    /// Counts a lookup of a path that leads to `now`, and gives its inode number. `in_use` says of a number whether its
    /// device is open.
    pub fn look_up(&self, path: &Path, now: Option<&Node>, in_use: impl Fn(Ino) -> bool) -> Ino {
        let mut table = self.lock();
        let known = table.by_path.get(path).copied();
        let known = known.filter(|ino| table.by_ino.get_mut(ino).is_some_and(|entry| entry.take(now, in_use(*ino))));
        let ino = known.unwrap_or_else(|| table.insert(path, now));
        table.by_ino.entry(ino).and_modify(|entry| entry.lookups = entry.lookups.saturating_add(1));
        ino
    }

    /// Takes back `count` lookups. A number without any, whose device is not open, is forgotten.
    pub fn forget(&self, ino: Ino, count: u64, in_use: bool) {
        let mut table = self.lock();
        let Some(entry) = table.by_ino.get_mut(&ino) else { return };
        entry.lookups = entry.lookups.saturating_sub(count);
        if entry.lookups == 0 && !in_use && ino != ROOT && table.remove(ino) {
            drop(table);
            memory::give_back();
        }
    }

    /// How many names the kernel knows, without the root.
    pub fn len(&self) -> usize {
        self.lock().by_ino.len() - 1
    }

    /// Notes that the path of `ino`, whose device nobody has open, leads to `now`.
    ///
    /// # Errors
    /// ESTALE when that is to have a number of its own.
    pub fn renew(&self, ino: Ino, now: Option<&Node>) -> Result<()> {
        let mut table = self.lock();
        let entry = table.by_ino.get_mut(&ino).ok_or_else(|| Error::from_errno(libc::ENOENT))?;
        if entry.take(now, false) { Ok(()) } else { Err(Error::from_errno(libc::ESTALE)) }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
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
        let ino = nodes.look_up(path, Some(&one), |_| false);
        assert_eq!(nodes.look_up(path, Some(&one), |_| true), ino, "the same device, open");
        assert_eq!(nodes.look_up(path, Some(&other), |_| false), ino, "another one, while none is open");
        let second = nodes.look_up(path, Some(&one), |_| true);
        assert_ne!(second, ino, "another one, while the old one is open");
        assert_eq!(nodes.number(path), second);
        assert!(nodes.renew(ino, Some(&other)).is_ok());
        // A user who was allowed to open the old number must not get what he could not open.
        let closed = Node { mode: one.mode & !0o077, ..other };
        assert_eq!(nodes.renew(second, Some(&closed)).unwrap_err().errno(), libc::ESTALE);
        assert_ne!(nodes.look_up(path, Some(&closed), |_| false), second);
        assert_eq!(nodes.path(second).unwrap(), path);
    }

    #[test]
    fn a_name_is_forgotten_with_its_last_lookup_and_gets_its_number_again() {
        let nodes = Nodes::new();
        let path = Path::new("x");
        let number = nodes.number(path);
        assert_eq!(nodes.len(), 0, "a listing leaves nothing behind");
        for _ in 0..3 {
            assert_eq!(nodes.look_up(path, None, |_| false), number);
        }
        nodes.forget(number, 2, false);
        assert_eq!(nodes.path(number).unwrap(), path, "one lookup is left");
        nodes.forget(number, 1, true);
        assert_eq!(nodes.path(number).unwrap(), path, "its device is open");
        nodes.forget(number, 0, false);
        assert_eq!(nodes.path(number).unwrap_err().errno(), libc::ENOENT);
        assert_eq!(nodes.look_up(path, None, |_| false), number);
        nodes.forget(ROOT, u64::MAX, false);
        assert_eq!(nodes.path(ROOT).unwrap(), Path::new(""));
    }

    /// A path that has a new number is not lost with the old one.
    #[test]
    fn an_old_number_goes_alone() {
        let nodes = Nodes::new();
        let one = Node::at(Path::new("/proc/self")).unwrap();
        let other = Node { identity: Node::at(Path::new("/")).unwrap().identity, ..one };
        let path = Path::new("x");
        let first = nodes.look_up(path, Some(&one), |_| false);
        let second = nodes.look_up(path, Some(&other), |_| true);
        nodes.forget(first, 1, false);
        assert_eq!(nodes.number(path), second);
        nodes.forget(second, 1, false);
        assert_eq!((nodes.number(path), nodes.len()), (first, 0));
    }

    #[test]
    fn the_table_shrinks() {
        let nodes = Nodes::new();
        let inos: Vec<_> = (0..20_000).map(|n| nodes.look_up(Path::new(&format!("{n}")), None, |_| false)).collect();
        inos.into_iter().for_each(|ino| nodes.forget(ino, 1, false));
        let table = nodes.lock();
        assert_eq!((table.by_ino.len(), table.by_path.len()), (1, 1));
        assert!(table.by_ino.capacity() < 4 * MANY && table.by_path.capacity() < 4 * MANY);
    }
}
