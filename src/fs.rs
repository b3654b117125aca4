//! The file system, free of FUSE: names, inodes, attributes and the table of open files.
//!
//! A SPEC that is a device or an image is one file; a SPEC that is a directory is shown as it is now, with a file for
//! each block device in it. Nothing is pinned: a device is open only while one of its files is.

mod attributes;
mod change;
mod nodes;
mod open;
mod root;
mod spec;
mod usage;

pub use attributes::{Attributes, FileKind};
pub use nodes::{Ino, ROOT};
pub use root::Root;
pub use spec::{Place, Spec, Target};
pub use usage::Usage;

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use log::{debug, info};

use crate::error::{Error, Result, shown};
use crate::handle::{Handle, MapCache};
use crate::source::Context;
use crate::source::backing::{Identity, Node};
use crate::source::nbd::{SideExport, Uri};
use crate::units::Bytes;
use attributes::Ownership;
use change::Changes;
use nodes::Nodes;
use open::{Open, OpenFiles};
use usage::UsageCache;

/// What the user chose for the whole mount.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Owner of every file, instead of the device node's.
    pub uid: Option<u32>,
    /// Group of every file, instead of the device node's.
    pub gid: Option<u32>,
    /// The permissions that a file may have at most.
    pub mode: Option<u32>,
    /// The metadata of an offline pool, whose data the SPEC is.
    pub thin_metadata: Option<PathBuf>,
    /// The export that the kernel's NBD device is connected to.
    pub nbd: Option<Uri>,
    /// The bytes that the maps of all open files may hold.
    pub map_cache: Option<Bytes>,
}

/// An open file's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fh(pub u64);

/// An entry of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its inode number.
    pub ino: Ino,
    /// Directory or file.
    pub kind: FileKind,
    /// Its name.
    pub name: OsString,
}

/// The mounted file system.
pub struct FileSystem {
    spec: Spec,
    ownership: Ownership,
    context: Arc<Context>,
    maps: Arc<MapCache>,
    nodes: Nodes,
    changes: Changes,
    usage: UsageCache,
    open: OpenFiles,
    /// The handle of each device that is open, by inode: several opens share it.
    handles: Mutex<Handles>,
    listings: Mutex<HashMap<u64, Arc<[Entry]>>>,
    next_fh: AtomicU64,
}

type Handles = HashMap<Ino, Shared>;

/// A handle and how many opens it has.
struct Shared {
    handle: Arc<Handle>,
    opens: usize,
}

impl FileSystem {
    /// Makes the file system of a SPEC. What the SPEC names must exist and be readable now.
    ///
    /// # Errors
    /// When it is missing, unreadable, or nothing that can be shown.
    pub fn new(spec: &OsStr, options: &Options) -> Result<Self> {
        let spec = Spec::new(spec, options)?;
        let nbd = options.nbd.clone().map(|uri| SideExport::new(uri, &spec.open_only()?)).transpose()?;
        let context = Context { nbd, ..Context::default() };
        Ok(Self {
            nodes: Nodes::new(),
            spec,
            ownership: Ownership::new(options),
            context: Arc::new(context),
            maps: Arc::new(MapCache::new(options.map_cache)),
            changes: Changes::default(),
            usage: UsageCache::default(),
            open: OpenFiles::default(),
            handles: Mutex::default(),
            listings: Mutex::default(),
            next_fh: AtomicU64::new(1),
        })
    }

    /// Starts what needs threads of its own. To be called in the process that serves.
    pub fn begin(&self) {
        if let Some(beside) = &self.context.nbd {
            beside.watch();
        }
    }

    /// What is mounted.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// Shows the one device as the root itself, for a mount on a regular file.
    ///
    /// # Errors
    /// When the SPEC is a directory.
    pub fn show_as_file(&mut self) -> Result<()> {
        self.nodes.root_is_file(&self.spec)
    }

    /// The entry `name` of a directory.
    ///
    /// # Errors
    /// ENOENT when there is none.
    pub fn lookup(&self, parent: Ino, name: &OsStr) -> Result<Attributes> {
        let directory = self.nodes.path(parent)?;
        let path = self.spec.child(&directory, name).ok_or_else(not_found)?;
        let target = self.spec.target(&path)?;
        let ino = {
            let handles = self.lock_handles();
            self.nodes.look_up(&path, target.node(), |ino| handles.contains_key(&ino))
        };
        // The kernel counts only what it got an answer to.
        self.attributes(ino, &target).inspect_err(|_| self.forget(ino, 1))
    }

    /// Takes back `lookups` answers of [`FileSystem::lookup`], since the kernel dropped the inode.
    pub fn forget(&self, ino: Ino, lookups: u64) {
        let handles = self.lock_handles();
        self.nodes.forget(ino, lookups, handles.contains_key(&ino));
    }

    /// The attributes of a file or directory. An open file stays with its device, wherever its name leads by now.
    ///
    /// # Errors
    /// ENOENT when it is gone, ESTALE when its name is to be looked up again, and when an open device no longer answers.
    pub fn getattr(&self, ino: Ino) -> Result<Attributes> {
        let target = self.nodes.path(ino).and_then(|path| self.spec.target(&path));
        match self.handle_of(ino) {
            Some(handle) => {
                let node = target.ok().and_then(|target| target.node().copied());
                let node = node.filter(|node| node.identity == handle.backing().identity());
                self.of_open(ino, &handle, node)
            }
            None => {
                let target = target?;
                self.nodes.renew(ino, target.node())?;
                self.attributes(ino, &target)
            }
        }
    }

    fn attributes(&self, ino: Ino, target: &Target) -> Result<Attributes> {
        let (place, node) = match target {
            Target::Directory(node) => return Ok(Attributes::directory(ino, node, &self.ownership)),
            Target::File(place, node) => (place, *node),
        };
        let identity = node.and_then(|node| node.identity);
        // An open device is asked through its handle; any other is opened for as long as the answer takes.
        let open = self.handle_of(ino).filter(|handle| is_same(handle, identity));
        let handle = match open {
            Some(handle) => handle,
            None => match self.spec.open(place) {
                Ok(backing) if backing.identity() == identity => {
                    Arc::new(Handle::glance(backing, self.context.clone()))
                }
                Ok(_) => return Err(errno(libc::ESTALE)),
                // What is short here says nothing of the device, and its length could not be read from sysfs either.
                Err(error) if matches!(error.errno(), libc::EMFILE | libc::ENFILE | libc::ENOMEM) => return Err(error),
                // One device that cannot be opened must not spoil the listing of the others.
                Err(error) => {
                    debug!("{error}");
                    return Ok(Attributes::unopened(ino, &node.ok_or(error)?, &self.ownership));
                }
            },
        };
        self.of_open(ino, &handle, node)
    }

    /// The attributes of an open device, whose node was found to be `node` now.
    fn of_open(&self, ino: Ino, handle: &Arc<Handle>, node: Option<Node>) -> Result<Attributes> {
        let has_hole = handle.has_hole()?;
        let changed = self.changes.observe(handle);
        let node = node.map_or_else(|| handle.backing().node(), Ok)?;
        Attributes::file(ino, handle, &node, has_hole, changed, &self.ownership)
    }

    /// What statfs(2) says: how much is shown. Opens no device.
    pub fn usage(&self) -> Usage {
        self.usage.of(&self.spec)
    }

    /// Opens a directory: its entries as they are now, `.` and `..` first, so that a listing in parts is one listing.
    ///
    /// # Errors
    /// As readdir(3).
    pub fn opendir(&self, ino: Ino) -> Result<Fh> {
        let directory = self.nodes.path(ino)?;
        let dot = |name: &str, ino| Entry { ino, kind: FileKind::Directory, name: name.into() };
        let mut entries = vec![dot(".", ino), dot("..", self.parent(ino))];
        for (name, kind) in self.spec.entries(&directory)? {
            if let Some(path) = self.spec.child(&directory, &name) {
                entries.push(Entry { ino: self.nodes.number(&path), kind, name });
            }
        }
        let fh = self.next_fh.fetch_add(1, Ordering::Relaxed);
        self.listings.lock().unwrap_or_else(PoisonError::into_inner).insert(fh, entries.into());
        Ok(Fh(fh))
    }

    /// The entries of an open directory.
    ///
    /// # Errors
    /// EBADF when there is no such open directory.
    pub fn readdir(&self, fh: Fh) -> Result<Arc<[Entry]>> {
        let listings = self.listings.lock().unwrap_or_else(PoisonError::into_inner);
        listings.get(&fh.0).cloned().ok_or_else(|| errno(libc::EBADF))
    }

    /// Closes an open directory.
    pub fn releasedir(&self, fh: Fh) {
        self.listings.lock().unwrap_or_else(PoisonError::into_inner).remove(&fh.0);
    }

    /// The directory that holds `ino`; the root holds itself.
    fn parent(&self, ino: Ino) -> Ino {
        let parent = self.nodes.path(ino).ok().and_then(|path| path.parent().map(ToOwned::to_owned));
        parent.map_or(ROOT, |parent| self.nodes.number(&parent))
    }

    /// Opens a file for reading.
    ///
    /// # Errors
    /// EROFS for any other way of opening; as open(2) on the device.
    pub fn open(&self, ino: Ino, for_writing: bool) -> Result<Fh> {
        if for_writing {
            return Err(errno(libc::EROFS));
        }
        let Target::File(place, node) = self.spec.target(&self.nodes.path(ino)?)? else {
            return Err(errno(libc::EISDIR));
        };
        let handle = self.share(ino, &place, node.as_ref())?;
        let fh = self.next_fh.fetch_add(1, Ordering::Relaxed);
        self.open.insert(Fh(fh), Open { ino, handle });
        debug!("open {place:?} as {fh}");
        Ok(Fh(fh))
    }

    /// The handle of a device that is about to be opened once more.
    fn share(&self, ino: Ino, place: &Place, node: Option<&Node>) -> Result<Arc<Handle>> {
        let identity = node.and_then(|node| node.identity);
        if let Some(handle) = self.join(&mut self.lock_handles(), ino, identity)? {
            return Ok(handle);
        }
        // Without the lock: a device may take long to open, and one that stands on a file of ours asks us for that.
        let backing = self.spec.open(place)?;
        if backing.identity() != identity {
            return Err(errno(libc::ESTALE));
        }
        let mut new = Handle::new(backing, self.context.clone(), self.maps.clone());
        let mut handles = self.lock_handles();
        // Another name of the device may be open.
        let same = |shared: &&Shared| identity.is_some() && shared.handle.backing().identity() == identity;
        if let Some(other) = handles.values().find(same) {
            new.share_room(&other.handle);
        }
        let new = Arc::new(new);
        // Another open may have been faster.
        if let Some(handle) = self.join(&mut handles, ino, identity)? {
            return Ok(handle);
        }
        self.nodes.renew(ino, node)?;
        handles.insert(ino, Shared { handle: new.clone(), opens: 1 });
        Ok(new)
    }

    /// Counts one more open of the device that `ino` is, if it is open; ESTALE when the name leads to another one.
    fn join(&self, handles: &mut Handles, ino: Ino, identity: Option<Identity>) -> Result<Option<Arc<Handle>>> {
        match handles.get_mut(&ino) {
            Some(shared) if is_same(&shared.handle, identity) => {
                shared.opens += 1;
                Ok(Some(shared.handle.clone()))
            }
            Some(shared) if shared.handle.backing().identity() != identity => Err(errno(libc::ESTALE)),
            _ => Ok(None),
        }
    }

    /// The handle of an open file.
    ///
    /// # Errors
    /// EBADF when there is no such open file.
    pub fn handle(&self, fh: Fh) -> Result<Arc<Handle>> {
        self.open.handle(fh).ok_or_else(|| errno(libc::EBADF))
    }

    fn handle_of(&self, ino: Ino) -> Option<Arc<Handle>> {
        self.lock_handles().get(&ino).map(|shared| shared.handle.clone())
    }

    fn lock_handles(&self) -> MutexGuard<'_, Handles> {
        self.handles.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes an open file; the device is let go with its last one, before this returns. Tells whether this was it.
    pub fn release(&self, fh: Fh) -> bool {
        let Some(open) = self.open.remove(fh) else { return false };
        let mut handles = self.lock_handles();
        // The path may lead to another device by now: then the entry is not of this open.
        let last = match handles.get_mut(&open.ino) {
            Some(shared) if Arc::ptr_eq(&shared.handle, &open.handle) => {
                shared.opens -= 1;
                shared.opens == 0
            }
            _ => false,
        };
        if last {
            handles.remove(&open.ino);
            // The kernel may have forgotten the inode before this close was handled.
            self.nodes.forget(open.ino, 0, false);
        }
        last
    }

    /// Puts another device behind all open files.
    #[cfg(test)]
    pub(crate) fn replace_handles(&self, handle: &Arc<Handle>) {
        for fh in (0..self.next_fh.load(Ordering::Relaxed)).map(Fh) {
            if let Some(open) = self.open.remove(fh) {
                self.open.insert(fh, Open { handle: handle.clone(), ..open });
            }
        }
    }

    /// Drops the maps of all open files; each is made anew when it is asked.
    pub fn drop_maps(&self) {
        let handles = self.lock_handles();
        handles.values().for_each(|shared| shared.handle.drop_map());
        info!("dropped the maps of {} open devices", handles.len());
    }

    /// Writes what is open to the log.
    pub fn log_counters(&self) {
        let opens = self.open.len();
        let handles = self.lock_handles();
        let (names, maps) = (self.nodes.len(), self.maps.used());
        info!("{opens} open files on {} devices, maps of {maps} bytes, {names} names", handles.len());
        for shared in handles.values() {
            info!("{}: {} opens", shown(shared.handle.backing().name()), shared.opens);
        }
    }
}

/// Whether an open device is the one that an open would find now.
fn is_same(handle: &Handle, found: Option<Identity>) -> bool {
    handle.backing().identity() == found && handle.backing().is_current()
}

/// An error that is nothing but an errno: the kernel's own message for it says all.
fn errno(code: i32) -> Error {
    Error::failed("refused").because(std::io::Error::from_raw_os_error(code))
}

fn not_found() -> Error {
    errno(libc::ENOENT)
}
