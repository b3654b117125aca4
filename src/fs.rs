//! The file system, without FUSE: names, inodes, attributes and the table of open files.
//!
//! A SPEC that is a device or an image is shown as one file. A SPEC that is a directory is shown as it is at each lookup,
//! with a file for each block device in it. A device is open only while one of its files is open.

mod attributes;
pub mod change;
mod flush;
mod nodes;
mod open;
mod share;
mod status;
mod usage;
mod write;

pub use attributes::{Attributes, Ownership};
pub use nodes::{Ino, ROOT};
pub use status::{FileStatus, Status};

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use log::{debug, info};

use crate::error::{Error, Result, shown};
use crate::export::{Catalog, CatalogEntry, Export, FileKind, HostNode, KeptOpen, Usage, Wanted};
use crate::handle::{Handle, MapCache, ReadAhead, Reader};
use crate::source::{Context, StaticDevices};
use crate::spec::{SourceOptions, Spec};
use crate::units::Bytes;
use change::Changes;
use flush::FlushFailures;
use nodes::Nodes;
use open::{OpenFile, OpenFiles};
use share::{OpenDevices, is_same};
use usage::UsageCache;
use write::{DropPages, Writers};

/// An open file's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fh(pub u64);

/// How a file is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// It can be written.
    pub is_for_writing: bool,
    /// Each change is to survive a loss of power when its call returns (`O_SYNC`, `O_DSYNC`).
    pub is_synchronous: bool,
}

/// An entry of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectoryEntry {
    /// Its inode number.
    pub ino: Ino,
    /// Directory or file.
    pub kind: FileKind,
    /// Its name.
    pub name: OsString,
}

/// How much memory and how many requests a mount may use; the defaults where `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// The memory of the maps of all open files together.
    pub map_cache: Option<Bytes>,
    /// The memory of what is fetched ahead for all open files together. Nothing is fetched ahead with zero.
    pub read_ahead: Option<Bytes>,
    /// The number of requests to a device that are in progress at the same time for one open file.
    pub queue_depth: Option<u16>,
}

/// The mounted file system.
pub struct FileSystem {
    catalog: Catalog,
    ownership: Ownership,
    context: Arc<Context>,
    maps: Arc<MapCache>,
    ahead: Arc<ReadAhead>,
    nodes: Nodes,
    changes: Changes,
    usage: UsageCache,
    open: OpenFiles,
    /// The open devices, by inode. All opens of an inode share one handle.
    devices: Mutex<OpenDevices>,
    writers: Writers,
    flush_failures: FlushFailures,
    drop_pages: OnceLock<DropPages>,
    listings: Mutex<HashMap<u64, OpenDirectory>>,
    next_fh: AtomicU64,
}

/// An open directory.
struct OpenDirectory {
    entries: Arc<[DirectoryEntry]>,
    _kept_open: KeptOpen,
}

impl FileSystem {
    /// Makes the file system of a SPEC. What the SPEC names must exist and be readable now.
    ///
    /// # Errors
    /// As [`Catalog::new`] and [`Catalog::side_export`].
    pub fn new(spec: &Spec, options: &SourceOptions, ownership: Ownership, limits: Limits) -> Result<Self> {
        let catalog = Catalog::new(spec, options)?;
        let nbd = options.nbd.clone().map(|uri| catalog.side_export(uri).map(Arc::new)).transpose()?;
        let maps = MapCache::new(limits.map_cache);
        let static_devices = options.is_static.then(|| StaticDevices::new(maps.limit()));
        let context = Context { nbd, static_devices, ..Context::default() };
        Ok(Self {
            nodes: Nodes::new(),
            catalog,
            ownership,
            context: Arc::new(context),
            maps: Arc::new(maps),
            ahead: ReadAhead::new(limits.read_ahead, limits.queue_depth),
            changes: Changes::default(),
            usage: UsageCache::default(),
            open: OpenFiles::default(),
            devices: Mutex::default(),
            writers: Writers::default(),
            flush_failures: FlushFailures::default(),
            drop_pages: OnceLock::new(),
            listings: Mutex::default(),
            next_fh: AtomicU64::new(1),
        })
    }

    /// Shares the times of devices with other mounts through a file in this directory, so that an unchanged device has the same
    /// times in all of them.
    pub fn share_times_in(&self, directory: &Path) {
        self.changes.share_in(directory);
    }

    /// Starts the threads that some sources need. Must be called in the process that serves the mount, after the fork.
    pub fn begin(&self) {
        if let Some(beside) = &self.context.nbd {
            beside.watch();
        }
    }

    /// Shows the one device as the root itself, for a mount on a regular file.
    ///
    /// # Errors
    /// When the SPEC is a directory.
    pub fn show_as_file(&mut self) -> Result<()> {
        self.nodes.root_is_file(&self.catalog)
    }

    /// Checks that the files can have their names, for a mount on a directory.
    ///
    /// # Errors
    /// As [`Catalog::check_names`].
    pub fn check_names(&self) -> Result<()> {
        self.catalog.check_names()
    }

    /// The entry `name` of a directory.
    ///
    /// # Errors
    /// ENOENT when there is none.
    pub fn lookup(&self, parent: Ino, name: &OsStr) -> Result<Attributes> {
        let directory = self.nodes.path(parent)?;
        let path = self.catalog.child(&directory, name).ok_or_else(|| Error::from_errno(libc::ENOENT))?;
        let target = self.with_open_view(&path, self.catalog.find(&path)?);
        let ino = {
            let devices = self.lock_devices();
            self.nodes.look_up(&path, target.node(), |ino| devices.is_in_use(ino))
        };
        // The kernel counts a lookup only if it got an answer.
        self.attributes(ino, &target, Wanted::Bound).inspect_err(|_| self.forget(ino, 1))
    }

    /// Subtracts `lookups` from the lookup count of an inode, since the kernel dropped it.
    pub fn forget(&self, ino: Ino, lookups: u64) {
        let devices = self.lock_devices();
        self.nodes.forget(ino, lookups, devices.is_in_use(ino));
    }

    /// The attributes of a file or directory. An open file stays with its device, wherever its name leads by now.
    ///
    /// # Errors
    /// ENOENT when it is gone, ESTALE when its name is to be looked up again, and when an open device no longer answers.
    pub fn getattr(&self, ino: Ino) -> Result<Attributes> {
        let found = self.attributes_of(ino)?;
        // Programs such as cp compare the number of a file before and after its open. All inodes of a view have the same one.
        let ino = if found.is_view { self.nodes.shown_number(ino) } else { ino };
        Ok(Attributes { ino, ..found })
    }

    fn attributes_of(&self, ino: Ino) -> Result<Attributes> {
        let find = || self.nodes.path(ino).and_then(|path| self.catalog.find(&path));
        match self.handle_of(ino) {
            // A view that is found is never the one that is open, and finding it may open its device.
            Some(handle) if handle.export().base().is_some() => self.of_open(ino, &handle, None),
            Some(handle) => {
                let target = find();
                let node = target.ok().and_then(|target| target.node().copied());
                let node = node.filter(|node| node.identity == handle.export().identity());
                self.of_open(ino, &handle, node)
            }
            None => {
                let target = find()?;
                self.nodes.renew(ino, target.node())?;
                self.attributes(ino, &target, Wanted::Attributes)
            }
        }
    }

    fn attributes(&self, ino: Ino, target: &CatalogEntry, wanted: Wanted) -> Result<Attributes> {
        let node = match target {
            CatalogEntry::Directory(node) => return Ok(Attributes::directory(ino, node, &self.ownership)),
            CatalogEntry::File(_, node) => *node,
            CatalogEntry::View(_, node) => Some(*node),
        };
        let identity = node.and_then(|node| node.identity);
        // An open device is used through its handle. Any other is opened only for this answer.
        let open = self.handle_of(ino).filter(|handle| is_same(handle, identity));
        let handle = match open {
            Some(handle) => handle,
            None => match self.open_for_attributes(target, wanted) {
                Ok(export) if export.identity() == identity => {
                    Arc::new(Handle::for_attributes(export, self.context.clone()))
                }
                Ok(_) => return Err(Error::from_errno(libc::ESTALE)),
                // A shortage of descriptors or memory is no property of the device.
                Err(error) if matches!(error.errno(), libc::EMFILE | libc::ENFILE | libc::ENOMEM) => return Err(error),
                // A device that cannot be opened must not make a listing of all devices fail.
                Err(error) => {
                    debug!("{error}");
                    return Ok(Attributes::unopened(ino, &node.ok_or(error)?, &self.ownership));
                }
            },
        };
        self.of_open(ino, &handle, node)
    }

    fn open_target(&self, target: &CatalogEntry, wanted: Wanted) -> Result<Arc<dyn Export>> {
        match target {
            CatalogEntry::Directory(_) => Err(Error::from_errno(libc::EISDIR)),
            CatalogEntry::File(source, _) => source.open(),
            CatalogEntry::View(view, _) => view.open(wanted, &self.context),
        }
    }

    /// Opens a file for its attributes. A view that cannot be made has those of one that is not made yet.
    fn open_for_attributes(&self, target: &CatalogEntry, wanted: Wanted) -> Result<Arc<dyn Export>> {
        let opened = self.open_target(target, wanted);
        match (opened, target) {
            (Err(error), CatalogEntry::View(..)) => {
                debug!("{error}");
                self.open_target(target, Wanted::Bound)
            }
            (opened, _) => opened,
        }
    }

    /// The attributes of an open device, whose node was found to be `node` now.
    fn of_open(&self, ino: Ino, handle: &Arc<Handle>, node: Option<HostNode>) -> Result<Attributes> {
        let has_hole = handle.has_hole()?;
        let changed = match handle.export().base() {
            None => self.changes.observe(handle),
            // A view has the times of the exact file.
            Some(base) => {
                let base = Handle::for_attributes(base.clone(), self.context.clone());
                base.has_hole()?;
                self.changes.observe(&base)
            }
        };
        let node = node.map_or_else(|| handle.export().node(), Ok)?;
        Attributes::file(ino, handle, &node, has_hole, changed, &self.ownership)
    }

    /// The number of reads of one open file that are in progress at the same time, at most.
    pub fn queue_depth(&self) -> usize {
        self.ahead.depth()
    }

    /// The sizes for statfs(2). Opens no device.
    pub fn usage(&self) -> Usage {
        self.usage.of(&self.catalog)
    }

    /// Opens a directory. Its entries are read once, with `.` and `..` first, so that a listing in several calls is consistent.
    /// The pool of an offline pool's volumes stays open until the directory is closed.
    ///
    /// # Errors
    /// As readdir(3).
    pub fn opendir(&self, ino: Ino) -> Result<Fh> {
        let directory = self.nodes.path(ino)?;
        let kept_open = self.catalog.keep_open()?;
        let dot = |name: &str, ino| DirectoryEntry { ino, kind: FileKind::Directory, name: name.into() };
        let mut entries = vec![dot(".", ino), dot("..", self.parent(ino))];
        for (name, kind) in self.catalog.entries(&directory)? {
            if let Some(path) = self.catalog.child(&directory, &name) {
                entries.push(DirectoryEntry { ino: self.nodes.shown_number(self.nodes.number(&path)), kind, name });
            }
        }
        let fh = self.next_fh.fetch_add(1, Ordering::Relaxed);
        let open = OpenDirectory { entries: entries.into(), _kept_open: kept_open };
        self.listings.lock().unwrap_or_else(PoisonError::into_inner).insert(fh, open);
        Ok(Fh(fh))
    }

    /// The entries of an open directory.
    ///
    /// # Errors
    /// EBADF when there is no such open directory.
    pub fn readdir(&self, fh: Fh) -> Result<Arc<[DirectoryEntry]>> {
        let listings = self.listings.lock().unwrap_or_else(PoisonError::into_inner);
        listings.get(&fh.0).map(|open| open.entries.clone()).ok_or_else(|| Error::from_errno(libc::EBADF))
    }

    /// Closes an open directory.
    pub fn releasedir(&self, fh: Fh) {
        let _closed = self.listings.lock().unwrap_or_else(PoisonError::into_inner).remove(&fh.0);
    }

    /// The parent directory of `ino`; that of the root is the root.
    fn parent(&self, ino: Ino) -> Ino {
        let parent = self.nodes.path(ino).ok().and_then(|path| path.parent().map(ToOwned::to_owned));
        parent.map_or(ROOT, |parent| self.nodes.number(&parent))
    }

    /// Opens a file.
    ///
    /// # Errors
    /// As open(2) on the device. For writing EROFS where nothing is written, and EBUSY for a device that is in use.
    pub fn open(&self, ino: Ino, access: Access) -> Result<Fh> {
        if access.is_for_writing && !self.is_writable() {
            return Err(Error::from_errno(libc::EROFS));
        }
        let target = self.catalog.find(&self.nodes.path(ino)?)?;
        let handle = match &target {
            CatalogEntry::Directory(_) => return Err(Error::from_errno(libc::EISDIR)),
            CatalogEntry::File(_, node) => self.share(ino, &target, node.as_ref())?,
            CatalogEntry::View(_, node) => self.share_view(ino, &target, node)?,
        };
        let writer = access.is_for_writing.then(|| self.begin_writing(&handle)).transpose();
        let reported = Arc::new(self.flush_failures.at_open(handle.export().identity()));
        let reader = Reader::new(handle, self.ahead.clone());
        let open = OpenFile { ino, reader, writer: None, is_synchronous: access.is_synchronous, reported };
        let open = match writer {
            Ok(writer) => OpenFile { writer, ..open },
            Err(error) => {
                self.close(open);
                return Err(error);
            }
        };
        let fh = self.next_fh.fetch_add(1, Ordering::Relaxed);
        self.open.insert(Fh(fh), open);
        debug!("open {} as {fh}", shown(self.handle(Fh(fh))?.export().name()));
        Ok(Fh(fh))
    }

    /// The handle of an open file.
    ///
    /// # Errors
    /// EBADF when there is no such open file.
    pub fn handle(&self, fh: Fh) -> Result<Arc<Handle>> {
        self.open.handle(fh).ok_or_else(|| Error::from_errno(libc::EBADF))
    }

    /// The reads and seeks of an open file.
    ///
    /// # Errors
    /// EBADF when there is no such open file.
    pub fn reader(&self, fh: Fh) -> Result<Arc<Reader>> {
        self.open.reader(fh).ok_or_else(|| Error::from_errno(libc::EBADF))
    }

    fn handle_of(&self, ino: Ino) -> Option<Arc<Handle>> {
        self.lock_devices().by_ino.get(&ino).map(|device| device.handle.clone())
    }

    fn lock_devices(&self) -> MutexGuard<'_, OpenDevices> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes an open file. The device is closed with its last open file, before this returns. Returns whether it was the last.
    pub fn release(&self, fh: Fh) -> bool {
        self.open.remove(fh).is_some_and(|open| self.close(open))
    }

    fn close(&self, mut open: OpenFile) -> bool {
        if let Some(writer) = open.writer.take() {
            self.end_writing(open.reader.handle(), writer);
        }
        let mut devices = self.lock_devices();
        // The path may lead to another device by now. Then the entry does not belong to this open file.
        let last = match devices.by_ino.get_mut(&open.ino) {
            Some(device) if Arc::ptr_eq(&device.handle, open.reader.handle()) => {
                device.opens -= 1;
                device.opens == 0
            }
            _ => false,
        };
        if last {
            devices.by_ino.remove(&open.ino);
            // The kernel may have forgotten the inode before this close was handled.
            self.nodes.forget(open.ino, 0, false);
        }
        let none_is_open = devices.by_ino.is_empty();
        drop(devices);
        if last {
            open.reader.finish();
        }
        // Closes the device.
        drop(open);
        if none_is_open {
            self.ahead.trim();
        }
        last
    }

    /// Replaces the device of all open files.
    #[cfg(test)]
    pub(crate) fn replace_handles(&self, handle: &Arc<Handle>) {
        for fh in (0..self.next_fh.load(Ordering::Relaxed)).map(Fh) {
            if let Some(open) = self.open.remove(fh) {
                self.open.insert(fh, OpenFile { reader: Reader::new(handle.clone(), self.ahead.clone()), ..open });
            }
        }
    }

    /// Drops the extents of all open devices. They are loaded again at the next question.
    pub fn drop_maps(&self) {
        let devices = self.lock_devices();
        // What the extents hold open is closed after the lock: a device that hangs must not block the opens of others.
        let dropped: Vec<_> = devices.by_ino.values().map(|device| device.handle.drop_map()).collect();
        drop(devices);
        info!("dropped the maps of {} open devices", dropped.len());
    }
}
