//! The one factory: a device to its stack of layers.

use std::collections::HashMap;
use std::fs::File;
use std::hash::{DefaultHasher, Hasher};
use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::map::HoleMap;
use crate::source::device::{BlockDevice, MediumGuard, SizeGuard};
use crate::source::{Guard, Layer, dense, dm, file, loop_device, md, nbd, partition, scsi, thin};
use crate::sys::device::DeviceId;
use crate::sys::file::write_through;
use crate::sys::sysfs::SuspendFile;
use crate::sys::{block, sysfs};
use crate::units::Bytes;

/// A stack deeper than this is a mistake; no kernel allows as much (`DM_MAX_...` and the loop driver stop far earlier).
const MAX_DEPTH: usize = 32;

/// The loop driver's major number (`Documentation/admin-guide/devices.txt`).
const LOOP_MAJOR: u32 = 7;

/// The kernel's NBD driver (`NBD_MAJOR` of `include/uapi/linux/major.h`).
const NBD_MAJOR: u32 = 43;

/// What outlives a single resolve: the control device, and what the user chose.
#[derive(Default)]
pub struct Context {
    /// What device-mapper sources share.
    pub dm: dm::Shared,
    /// What readers of live thin pools share.
    pub thin: thin::pool::Readers,
    /// The export that the kernel's NBD device is connected to.
    pub nbd: Option<nbd::Beside>,
}

/// A device, all the way down.
pub struct Stack {
    /// The device itself; the layers below it hang on it.
    pub top: Arc<Layer>,
    guards: Vec<Box<dyn Guard>>,
    /// From the bottom up.
    dirty: Vec<Dirty>,
    waits_on: Vec<SuspendFile>,
}

/// What has a page cache that may hold writes of which the layers below do not know.
enum Dirty {
    Device(Arc<File>),
    File(File),
}

impl Dirty {
    fn write_back(&self) -> io::Result<()> {
        match self {
            Self::Device(device) => block::write_back(device),
            Self::File(file) => write_through(file),
        }
    }
}

impl Stack {
    /// Resolves an open block device.
    pub fn of_device(device: &BlockDevice, context: &Context) -> Self {
        Self::build(context, |resolver| resolver.opened(device))
    }

    /// Resolves an open regular file.
    pub fn of_file(file: &File, path: &Path, len: Bytes, context: &Context) -> Self {
        Self::build(context, |resolver| Arc::new(file::layer(file, path, len, resolver)))
    }

    /// Resolves anything: `top` asks the resolver for what it stands on, and adds a guard for its own length if that
    /// can change.
    pub fn build(context: &Context, top: impl FnOnce(&mut Resolver<'_>) -> Arc<Layer>) -> Self {
        let mut resolver = Resolver {
            context,
            guards: Vec::new(),
            dirty: Vec::new(),
            waits_on: Vec::new(),
            above: Vec::new(),
            known: HashMap::new(),
        };
        let top = top(&mut resolver);
        Self { top, guards: resolver.guards, dirty: resolver.dirty, waits_on: resolver.waits_on }
    }

    /// The holes of the whole device.
    pub fn map(&self) -> &dyn HoleMap {
        &*self.top.map
    }

    /// Whether the map may still be believed: nothing happened to any layer since it was made.
    pub fn unchanged(&self) -> bool {
        self.guards.iter().all(|guard| guard.unchanged())
    }

    /// Whether every layer is still built as it was; what is stored may have changed.
    pub fn same_shape(&self) -> bool {
        self.guards.iter().all(|guard| guard.is_of_content() || guard.unchanged())
    }

    /// A number that changes when a layer is built otherwise, or a file at the bottom was written.
    pub fn trace(&self) -> u64 {
        let mut trace = DefaultHasher::new();
        self.guards.iter().for_each(|guard| guard.trace(&mut trace));
        trace.finish()
    }

    /// Writes back the dirty pages of every layer, from the top down: only then do the layers below know of a write.
    ///
    /// Returns whether all of it was written. A suspended device is not waited for, and answers `false`.
    pub fn write_back(&self) -> bool {
        // A device that is suspended between this look and the write still blocks until its resume; LVM keeps that to
        // milliseconds, and a read would wait for it all the same.
        !self.suspended() && self.dirty.iter().rev().all(|dirty| dirty.write_back().is_ok())
    }

    /// Whether a device-mapper device of the stack is suspended, so that reads and writes wait for its resume.
    pub fn suspended(&self) -> bool {
        self.waits_on.iter().any(SuspendFile::is_suspended)
    }
}

/// Resolves one stack; collects its guards on the way.
pub struct Resolver<'a> {
    /// What outlives this resolve.
    pub context: &'a Context,
    guards: Vec<Box<dyn Guard>>,
    dirty: Vec<Dirty>,
    waits_on: Vec<SuspendFile>,
    above: Vec<DeviceId>,
    known: HashMap<DeviceId, Arc<Layer>>,
}

impl Resolver<'_> {
    /// Adds what must stay unchanged for the map to be believed.
    pub fn guard(&mut self, guard: impl Guard + 'static) {
        self.guards.push(Box::new(guard));
    }

    /// Names a device-mapper device whose suspension makes reads and writes of the stack wait.
    pub fn waits_on(&mut self, id: DeviceId) {
        self.waits_on.extend(SuspendFile::open(id));
    }

    /// Names a file whose file system may not know of the writes that its page cache holds.
    pub fn written_through(&mut self, file: File) {
        self.dirty.push(Dirty::File(file));
    }

    /// The layer of the block device with that number. `len` is its length as the asking layer needs it, for a device
    /// that cannot even be opened.
    pub fn device(&mut self, id: DeviceId, len: Bytes) -> Arc<Layer> {
        if let Some(layer) = self.known.get(&id) {
            return layer.clone();
        }
        match BlockDevice::open_id(id) {
            Ok(device) => self.opened(&device),
            Err(error) => {
                let reason = format!("cannot open: {}", crate::error::plain(&error));
                Arc::new(dense::layer(id.to_string(), "block device", len, reason))
            }
        }
    }

    /// The layer of an open block device.
    pub fn opened(&mut self, device: &BlockDevice) -> Arc<Layer> {
        let refused = if self.above.contains(&device.id) {
            Some("the stack stands on itself")
        } else if self.above.len() >= MAX_DEPTH {
            Some("the stack is too deep")
        } else {
            None
        };
        if let Some(reason) = refused {
            return Arc::new(dense::layer(device.name(), "block device", device.len, reason));
        }
        self.above.push(device.id);
        // The guards before anything is read: a change from here on is seen.
        self.guard(SizeGuard::new(device));
        let medium = MediumGuard::new(device);
        let layer = Arc::new(self.dispatch(device, medium));
        self.above.pop();
        // After everything that it stands on: what is written back from here makes that dirty, by whatever way.
        self.dirty.push(Dirty::Device(device.file.clone()));
        self.known.insert(device.id, layer.clone());
        layer
    }

    fn dispatch(&mut self, device: &BlockDevice, medium: MediumGuard) -> Layer {
        let partition = sysfs::partition(device.id);
        if partition.is_none() && device.id.major == LOOP_MAJOR {
            return loop_device::layer(device, medium, self);
        }
        self.guard(medium);
        if let Some((disk, start)) = partition {
            partition::layer(device, disk, start, self)
        } else if device.id.major == NBD_MAJOR {
            nbd::device_layer(device, self)
        } else if sysfs::dm_name(device.id).is_some() {
            self.waits_on(device.id);
            dm::layer(device, self)
        } else if md::is_array(device.id) {
            md::layer(device, self)
        } else if scsi::is_disk(device.id) {
            scsi::disk_layer(device)
        } else if scsi::is_nvme(device.id) {
            scsi::nvme_layer(&device.name(), device.len)
        } else {
            dense::layer(device.name(), "block device", device.len, "this kind of device does not tell its holes")
        }
    }
}
