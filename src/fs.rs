//! The file system, free of FUSE: names, inodes, attributes and the table of open files.
//!
//! A SPEC that is a device or an image is one file; a SPEC that is a directory is shown as it is now, with a file for
//! each block device in it. Nothing is pinned: a device is open only while one of its files is.

mod attributes;
mod change;
mod nodes;
mod open;
mod spec;

pub use attributes::{Attributes, FileKind};
pub use nodes::{Ino, ROOT};
pub use spec::{Place, Spec, Target};

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use log::{debug, info};

use crate::error::{Error, Result};
use crate::handle::{Handle, MapCache};
use crate::source::Context;
use crate::source::nbd::{Export, Uri};
use crate::units::Bytes;
use attributes::Ownership;
use change::Changes;
use nodes::Nodes;
use open::{Open, OpenFiles};

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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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
    open: OpenFiles,
    /// The handle of each device that is open, by inode: several opens share it.
    handles: Mutex<HashMap<Ino, Shared>>,
    listings: Mutex<HashMap<u64, Arc<[Entry]>>>,
    next_fh: AtomicU64,
}

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
        let context = Context { nbd: options.nbd.clone().map(Export::new), ..Context::default() };
        Ok(Self {
            nodes: Nodes::new(),
            spec,
            ownership: Ownership::new(options),
            context: Arc::new(context),
            maps: Arc::new(MapCache::new(options.map_cache)),
            changes: Changes::default(),
            open: OpenFiles::default(),
            handles: Mutex::default(),
            listings: Mutex::default(),
            next_fh: AtomicU64::new(1),
        })
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
        let ino = self.nodes.ino(&path);
        self.attributes(ino, &target)
    }

    /// The attributes of a file or directory. `fh` is the open file that they are asked through.
    ///
    /// # Errors
    /// ENOENT when it is gone, and when an open device no longer answers.
    pub fn getattr(&self, ino: Ino) -> Result<Attributes> {
        let path = self.nodes.path(ino)?;
        let target = self.spec.target(&path)?;
        self.attributes(ino, &target)
    }

    fn attributes(&self, ino: Ino, target: &Target) -> Result<Attributes> {
        let place = match target {
            Target::Directory(node) => return Ok(Attributes::directory(ino, node, &self.ownership)),
            Target::File(place) => place,
        };
        // An open device is asked through its handle; any other is opened for as long as the answer takes.
        let open = self.handle_of(ino).filter(|handle| place.is_of(handle.backing()));
        let handle = match open {
            Some(handle) => handle,
            None => match self.spec.open(place) {
                Ok(backing) => Arc::new(Handle::glance(backing, self.context.clone())),
                // One device that cannot be opened must not spoil the listing of the others.
                Err(error) => {
                    debug!("{error}");
                    let node = place.path().and_then(|path| std::fs::metadata(path).ok()).ok_or(error)?;
                    return Ok(Attributes::unopened(ino, &node, &self.ownership));
                }
            },
        };
        let has_hole = handle.has_hole()?;
        let changed = self.changes.observe(ino, handle.backing());
        Attributes::file(ino, &handle, has_hole, changed, &self.ownership)
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
                entries.push(Entry { ino: self.nodes.ino(&path), kind, name });
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
        parent.map_or(ROOT, |parent| self.nodes.ino(&parent))
    }

    /// Opens a file for reading.
    ///
    /// # Errors
    /// EROFS for any other way of opening; as open(2) on the device.
    pub fn open(&self, ino: Ino, for_writing: bool) -> Result<Fh> {
        if for_writing {
            return Err(errno(libc::EROFS));
        }
        let Target::File(place) = self.spec.target(&self.nodes.path(ino)?)? else {
            return Err(errno(libc::EISDIR));
        };
        let handle = self.share(ino, &place)?;
        let fh = self.next_fh.fetch_add(1, Ordering::Relaxed);
        self.open.insert(Fh(fh), Open { ino, handle });
        debug!("open {place:?} as {fh}");
        Ok(Fh(fh))
    }

    /// The handle of a device that is about to be opened once more.
    fn share(&self, ino: Ino, place: &Place) -> Result<Arc<Handle>> {
        let mut handles = self.handles.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(shared) = handles.get_mut(&ino).filter(|shared| place.is_of(shared.handle.backing())) {
            shared.opens += 1;
            return Ok(shared.handle.clone());
        }
        let handle = Arc::new(Handle::new(self.spec.open(place)?, self.context.clone(), self.maps.clone()));
        handle.prepare();
        handles.insert(ino, Shared { handle: handle.clone(), opens: 1 });
        Ok(handle)
    }

    /// The handle of an open file.
    ///
    /// # Errors
    /// EBADF when there is no such open file.
    pub fn handle(&self, fh: Fh) -> Result<Arc<Handle>> {
        self.open.handle(fh).ok_or_else(|| errno(libc::EBADF))
    }

    fn handle_of(&self, ino: Ino) -> Option<Arc<Handle>> {
        let handles = self.handles.lock().unwrap_or_else(PoisonError::into_inner);
        handles.get(&ino).map(|shared| shared.handle.clone())
    }

    /// Closes an open file; the device is let go with its last one, before this returns.
    pub fn release(&self, fh: Fh) {
        let Some(open) = self.open.remove(fh) else { return };
        let mut handles = self.handles.lock().unwrap_or_else(PoisonError::into_inner);
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
        }
    }

    /// Drops the maps of all open files; each is made anew when it is asked.
    pub fn drop_maps(&self) {
        let handles = self.handles.lock().unwrap_or_else(PoisonError::into_inner);
        handles.values().for_each(|shared| shared.handle.drop_map());
        info!("dropped the maps of {} open devices", handles.len());
    }

    /// Writes what is open to the log.
    pub fn log_counters(&self) {
        let opens = self.open.len();
        let handles = self.handles.lock().unwrap_or_else(PoisonError::into_inner);
        info!("{opens} open files on {} devices, maps of {} bytes", handles.len(), self.maps.used());
        for shared in handles.values() {
            info!("{}: {} opens", shared.handle.backing().name().display(), shared.opens);
        }
    }
}

/// An error that is nothing but an errno: the kernel's own message for it says all.
fn errno(code: i32) -> Error {
    Error::failed("refused").because(std::io::Error::from_raw_os_error(code))
}

fn not_found() -> Error {
    errno(libc::ENOENT)
}
