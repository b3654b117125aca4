//! Which open device a new open of a file shares, and which length of a view the kernel is given.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::{Fh, FileSystem, Ino, ROOT};
use crate::error::{Error, Result};
use crate::export::{CatalogEntry, FileIdentity, HostNode, Wanted};
use crate::handle::Handle;
use crate::units::Bytes;

/// The open devices.
#[derive(Default)]
pub(super) struct OpenDevices {
    pub(super) by_ino: HashMap<Ino, OpenDevice>,
    /// Views that are being opened, and how often.
    opening: HashMap<Ino, usize>,
}

impl OpenDevices {
    pub(super) fn is_in_use(&self, ino: Ino) -> bool {
        self.by_ino.contains_key(&ino) || self.opening.contains_key(&ino)
    }
}

/// A view that is being opened. Dropping it ends that.
struct Opening<'a> {
    devices: &'a Mutex<OpenDevices>,
    ino: Ino,
}

impl<'a> Opening<'a> {
    fn new(locked: &mut OpenDevices, devices: &'a Mutex<OpenDevices>, ino: Ino) -> Self {
        *locked.opening.entry(ino).or_default() += 1;
        Self { devices, ino }
    }
}

impl Drop for Opening<'_> {
    fn drop(&mut self) {
        let mut devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = devices.opening.get_mut(&self.ino) {
            *count -= 1;
            if *count == 0 {
                devices.opening.remove(&self.ino);
            }
        }
    }
}

/// An open device, and how many open files it has.
pub(super) struct OpenDevice {
    pub(super) handle: Arc<Handle>,
    pub(super) opens: usize,
    /// Set when the kernel was given the length of a view.
    len_is_given: Arc<OnceLock<()>>,
}

impl OpenDevice {
    /// A device with its first open file.
    pub(super) fn new(handle: Arc<Handle>) -> Self {
        Self { handle, opens: 1, len_is_given: Arc::default() }
    }
}

impl FileSystem {
    /// What a lookup of `path` found. A view is the one that is open, if that shows what a new one would show.
    pub(super) fn with_open_view(&self, path: &Path, target: CatalogEntry) -> CatalogEntry {
        let CatalogEntry::View(view, node) = target else { return target };
        let open = self.handle_of(self.nodes.number(path)).filter(|handle| handle.export().is_current());
        let identity = open.map_or(node.identity, |handle| handle.export().identity());
        CatalogEntry::View(view, HostNode { identity, ..node })
    }

    /// Calls `give` with the length of a view at its first open, before that is replied to. The kernel may have the length of
    /// a view that was open before, and sendfile(2) and splice(2) read up to the length that the kernel has without asking.
    pub fn give_len(&self, fh: Fh, give: impl FnOnce(Ino, Bytes)) {
        let (Some(ino), Some(handle)) = (self.open.ino(fh), self.open.handle(fh)) else { return };
        let (Some(_), Ok(len)) = (handle.export().base(), handle.export().len()) else { return };
        let device =
            self.lock_devices().by_ino.get(&ino).map(|device| (device.handle.clone(), device.len_is_given.clone()));
        if let Some((_, is_given)) = device.filter(|(of_ino, _)| Arc::ptr_eq(of_ino, &handle)) {
            is_given.get_or_init(|| give(ino, len));
        }
    }

    /// The handle for one more open of a device: that of its other opens, or a new one.
    pub(super) fn share(&self, ino: Ino, target: &CatalogEntry, node: Option<&HostNode>) -> Result<Arc<Handle>> {
        let identity = node.and_then(|node| node.identity);
        if let Some(handle) = self.join(&mut self.lock_devices(), ino, identity)? {
            return Ok(handle);
        }
        // Without the lock: opening a device may take long, and a device that uses a file of this mount sends requests to it.
        let export = self.open_target(target, Wanted::Contents)?;
        if export.identity() != identity {
            return Err(Error::from_errno(libc::ESTALE));
        }
        let mut new = Handle::new(export, self.context.clone(), self.maps.clone());
        // Declared before the lock, so that a device that turns out not to be needed is closed after it.
        let (shared, replaced);
        let mut devices = self.lock_devices();
        // The device may be open by another name.
        let same = |device: &&OpenDevice| identity.is_some() && device.handle.export().identity() == identity;
        if let Some(other) = devices.by_ino.values().find(same) {
            new.share_read_memory(&other.handle);
        }
        shared = Arc::new(new);
        // Another request may have opened it in between.
        if let Some(handle) = self.join(&mut devices, ino, identity)? {
            return Ok(handle);
        }
        self.nodes.renew(ino, node)?;
        replaced = devices.by_ino.insert(ino, OpenDevice::new(shared.clone()));
        if let Some(device) = &replaced {
            // Its open files share the page cache of the inode with the new ones.
            device.handle.begin_generation();
        }
        Ok(shared)
    }

    /// The handle for one more open of a view: that of the inode, if it is open, or a new one.
    ///
    /// A lookup found out that the path leads to this inode. While that is open the path leads to it only if the view shows
    /// what a new one would show. So an open without a lookup, by a link of `/proc/PID/fd`, is one of the same open view.
    ///
    /// # Errors
    /// As [`FileSystem::join_view`].
    pub(super) fn share_view(&self, ino: Ino, target: &CatalogEntry, node: &HostNode) -> Result<Arc<Handle>> {
        // From here on a lookup gives another inode: what it is to show may be newer.
        let _opening = Opening::new(&mut self.lock_devices(), &self.devices, ino);
        if let Some(handle) = self.join_view(ino)? {
            return Ok(handle);
        }
        let export = self.open_target(target, Wanted::Contents)?;
        let new = Arc::new(Handle::new(export, self.context.clone(), self.maps.clone()));
        loop {
            // Another request may have opened it in between.
            if let Some(handle) = self.join_view(ino)? {
                return Ok(handle);
            }
            let mut devices = self.lock_devices();
            if let Entry::Vacant(entry) = devices.by_ino.entry(ino) {
                self.nodes.renew(ino, Some(node))?;
                entry.insert(OpenDevice::new(new.clone()));
                return Ok(new);
            }
        }
    }

    /// Counts one more open of the view of `ino`, if that is open.
    ///
    /// # Errors
    /// EBUSY for a mount on a regular file, which has one inode, if a new view would show something else.
    fn join_view(&self, ino: Ino) -> Result<Option<Arc<Handle>>> {
        loop {
            let Some(handle) = self.handle_of(ino) else { return Ok(None) };
            // Without the lock: it may have to write back dirty pages.
            if ino == ROOT && !handle.export().is_current() {
                return Err(Error::from_errno(libc::EBUSY));
            }
            let mut devices = self.lock_devices();
            if let Some(device) = devices.by_ino.get_mut(&ino).filter(|device| Arc::ptr_eq(&device.handle, &handle)) {
                device.opens += 1;
                device.handle.begin_generation();
                return Ok(Some(handle));
            }
        }
    }

    /// Counts one more open of the device of `ino`, if that is open.
    ///
    /// # Errors
    /// ESTALE when the name leads to another device.
    fn join(&self, devices: &mut OpenDevices, ino: Ino, identity: Option<FileIdentity>) -> Result<Option<Arc<Handle>>> {
        match devices.by_ino.get_mut(&ino) {
            Some(device) if is_same(&device.handle, identity) => {
                device.opens += 1;
                device.handle.begin_generation();
                Ok(Some(device.handle.clone()))
            }
            Some(device) if device.handle.export().identity() != identity => Err(Error::from_errno(libc::ESTALE)),
            _ => Ok(None),
        }
    }
}

/// Whether an open device is the one that a new open would find now.
pub(super) fn is_same(handle: &Handle, found: Option<FileIdentity>) -> bool {
    handle.export().identity() == found && handle.export().is_current()
}
