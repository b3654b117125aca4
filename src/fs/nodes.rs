//! Inode numbers: the same for the same path, in every mount, as long as the path leads to the same device.
//!
//! A number belongs to one device, because the kernel caches data and permissions by number. When a path leads to another
//! device (a link was changed, a name was used again) it keeps its number only if the old device is not open, and if both
//! have the same owner, group and mode. Otherwise it gets a new number, and a request with the old number fails with
//! ESTALE, so that the kernel looks the name up again.
//!
//! A name is kept as long as the kernel keeps its inode. The kernel counts the lookups that were answered, and returns the
//! count when it drops the inode (`FUSE_FORGET`). Numbers are computed from the path, so a name that was dropped gets the
//! same number again. A listing counts no lookup, and keeps no name.

use std::collections::HashMap;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Result};
use crate::export::Catalog;
use crate::export::{FileIdentity, HostNode};
use crate::sys::memory;

/// An inode number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ino(pub u64);

/// The root of the mount (`FUSE_ROOT_ID`).
pub const ROOT: Ino = Ino(1);

/// Memory is given back to the system after this many names were removed, and at least as many as are left.
const MANY: usize = 1024;

/// The names whose inodes the kernel has, relative to the SPEC.
pub struct Nodes(Mutex<Names>);

struct Names {
    by_ino: HashMap<Ino, Name>,
    by_path: HashMap<Arc<Path>, Ino>,
    /// Names that were removed since memory was given back.
    removed: usize,
}

struct Name {
    path: Arc<Path>,
    /// The device or file that was found there.
    shown: Option<HostNode>,
    /// Lookups that the kernel has not returned yet.
    lookups: u64,
}

impl Name {
    fn new(path: &Path) -> Self {
        Self { path: path.into(), shown: None, lookups: 0 }
    }

    fn is_view(&self) -> bool {
        matches!(self.shown, Some(HostNode { identity: Some(FileIdentity::View(_)), .. }))
    }

    /// Stores what is found at the path now, if it can have the number of the old device or file. Returns whether it can.
    fn take(&mut self, now: Option<&HostNode>, in_use: bool) -> bool {
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

/// Owner, group, permissions and type.
fn rights(node: &HostNode) -> (u32, u32, u32) {
    (node.uid, node.gid, node.mode)
}

impl Names {
    fn new(root: &Path) -> Self {
        let root = Name::new(root);
        let by_path = HashMap::from([(root.path.clone(), ROOT)]);
        Self { by_path, by_ino: HashMap::from([(ROOT, root)]), removed: 0 }
    }

    /// The number that a path has, or would get at a lookup.
    fn number(&self, path: &Path) -> Ino {
        self.by_path.get(path).copied().unwrap_or_else(|| self.free_number(path))
    }

    fn free_number(&self, path: &Path) -> Ino {
        let mut ino = first_number(path);
        while ino.0 <= ROOT.0 || self.by_ino.contains_key(&ino) {
            ino.0 = ino.0.wrapping_add(1);
        }
        ino
    }

    fn insert(&mut self, path: &Path, now: Option<&HostNode>) -> Ino {
        let ino = self.free_number(path);
        let entry = Name { shown: now.copied(), ..Name::new(path) };
        self.by_path.insert(entry.path.clone(), ino);
        self.by_ino.insert(ino, entry);
        ino
    }

    /// Removes a name. Returns whether it is time to give memory back.
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
        Self(Mutex::new(Names::new(Path::new(""))))
    }

    /// Makes the root the one file of the SPEC.
    ///
    /// # Errors
    /// As [`Catalog::only_file`].
    pub fn root_is_file(&mut self, catalog: &Catalog) -> Result<()> {
        let file = catalog.only_file()?;
        *self.0.get_mut().unwrap_or_else(PoisonError::into_inner) = Names::new(&file);
        Ok(())
    }

    /// The path of an inode.
    ///
    /// # Errors
    /// ENOENT for a number that was not given out, or was dropped.
    pub fn path(&self, ino: Ino) -> Result<PathBuf> {
        self.lock()
            .by_ino
            .get(&ino)
            .map(|entry| entry.path.to_path_buf())
            .ok_or_else(|| Error::from_errno(libc::ENOENT))
    }

    /// The inode number that a lookup of this path would give.
    pub fn number(&self, path: &Path) -> Ino {
        self.lock().number(path)
    }

    /// Counts a lookup of a path that leads to `now`, and returns its inode number. `in_use` returns whether the device
    /// of a number is open.
    pub fn look_up(&self, path: &Path, now: Option<&HostNode>, in_use: impl Fn(Ino) -> bool) -> Ino {
        let mut table = self.lock();
        let known = table.by_path.get(path).copied();
        let known = known.filter(|ino| table.by_ino.get_mut(ino).is_some_and(|entry| entry.take(now, in_use(*ino))));
        let ino = known.unwrap_or_else(|| table.insert(path, now));
        table.by_ino.entry(ino).and_modify(|entry| entry.lookups = entry.lookups.saturating_add(1));
        ino
    }

    /// Subtracts `count` lookups. A number without lookups, whose device is not open, is dropped.
    pub fn forget(&self, ino: Ino, count: u64, in_use: bool) {
        let mut table = self.lock();
        let Some(entry) = table.by_ino.get_mut(&ino) else { return };
        entry.lookups = entry.lookups.saturating_sub(count);
        if entry.lookups == 0 && !in_use && ino != ROOT && table.remove(ino) {
            drop(table);
            memory::give_back();
        }
    }

    /// The number that stat(2) and readdir(3) show for an inode: for a view the first number of its path.
    pub fn shown_number(&self, ino: Ino) -> Ino {
        let table = self.lock();
        match table.by_ino.get(&ino) {
            Some(entry) if entry.is_view() && ino != ROOT => first_number(&entry.path),
            _ => ino,
        }
    }

    /// The number of names, without the root.
    pub fn len(&self) -> usize {
        self.lock().by_ino.len() - 1
    }

    /// Stores that the path of `ino`, whose device is not open, leads to `now`.
    ///
    /// # Errors
    /// ESTALE when that needs a number of its own.
    pub fn renew(&self, ino: Ino, now: Option<&HostNode>) -> Result<()> {
        let mut table = self.lock();
        let entry = table.by_ino.get_mut(&ino).ok_or_else(|| Error::from_errno(libc::ENOENT))?;
        if entry.take(now, false) { Ok(()) } else { Err(Error::from_errno(libc::ESTALE)) }
    }

    fn lock(&self) -> MutexGuard<'_, Names> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The number of a path that has no other one, unless another path has it.
fn first_number(path: &Path) -> Ino {
    Ino(hash(path).max(ROOT.0 + 1))
}

/// FNV-1a, 64 bits. The number is the same after a remount, which backup tools need.
fn hash(path: &Path) -> u64 {
    const BASIS: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0000_0100_0000_01b3;
    path.as_os_str().as_bytes().iter().fold(BASIS, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(PRIME))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_belongs_to_one_device_while_it_is_open_and_to_one_owner_and_mode() {
        let nodes = Nodes::new();
        let one = HostNode::at(Path::new("/proc/self")).unwrap();
        let other = HostNode { identity: HostNode::at(Path::new("/")).unwrap().identity, ..one };
        let path = Path::new("x");
        let ino = nodes.look_up(path, Some(&one), |_| false);
        assert_eq!(nodes.look_up(path, Some(&one), |_| true), ino, "the same device, open");
        assert_eq!(nodes.look_up(path, Some(&other), |_| false), ino, "another one, while none is open");
        let second = nodes.look_up(path, Some(&one), |_| true);
        assert_ne!(second, ino, "another one, while the old one is open");
        assert_eq!(nodes.number(path), second);
        assert!(nodes.renew(ino, Some(&other)).is_ok());
        // A user who may open the old device must not get a device that they may not open.
        let closed = HostNode { mode: one.mode & !0o077, ..other };
        assert_eq!(nodes.renew(second, Some(&closed)).unwrap_err().errno(), libc::ESTALE);
        assert_ne!(nodes.look_up(path, Some(&closed), |_| false), second);
        assert_eq!(nodes.path(second).unwrap(), path);
    }

    #[test]
    fn a_name_is_dropped_with_its_last_lookup_and_gets_the_same_number_again() {
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

    #[test]
    fn dropping_the_old_number_of_a_path_keeps_its_new_number() {
        let nodes = Nodes::new();
        let one = HostNode::at(Path::new("/proc/self")).unwrap();
        let other = HostNode { identity: HostNode::at(Path::new("/")).unwrap().identity, ..one };
        let path = Path::new("x");
        let first = nodes.look_up(path, Some(&one), |_| false);
        let second = nodes.look_up(path, Some(&other), |_| true);
        nodes.forget(first, 1, false);
        assert_eq!(nodes.number(path), second);
        nodes.forget(second, 1, false);
        assert_eq!((nodes.number(path), nodes.len()), (first, 0));
    }

    #[test]
    fn memory_is_given_back_when_names_are_dropped() {
        let nodes = Nodes::new();
        let inos: Vec<_> = (0..20_000).map(|n| nodes.look_up(Path::new(&format!("{n}")), None, |_| false)).collect();
        inos.into_iter().for_each(|ino| nodes.forget(ino, 1, false));
        let table = nodes.lock();
        assert_eq!((table.by_ino.len(), table.by_path.len()), (1, 1));
        assert!(table.by_ino.capacity() < 4 * MANY && table.by_path.capacity() < 4 * MANY);
    }
}
